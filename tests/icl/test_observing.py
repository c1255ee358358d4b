"""The evaluation set as it is observed: in batches, after demonstrations that are run once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdprompt_fast.errors import UserError
from gdprompt_fast.icl.methods import (
    CLIPPED_L2,
    FT,
    LINEARISED,
    RANDOM,
    RATE_0,
    Method,
    randomise,
    recorder_after,
)
from gdprompt_fast.icl.metrics import Observed, sim_am, sim_aou
from gdprompt_fast.icl.observing import in_context, observe, recorded_rows, zero_shot
from gdprompt_fast.icl.prompts import Prompts
from gdprompt_fast.icl.recording import after_prefix, record
from helpers.icl import FAMILIES_OF_ICL, tiny

CPU = torch.device("cpu")
QUERIES = [[11, 12, 13], [14, 15, 16, 17, 18], [19, 20, 21]]
DEMOS = [[5, 6, 7, 8], [9, 10, 3, 8]]


@pytest.fixture
def prompts() -> Prompts:
    context, spans = [1], []
    for demo in DEMOS:
        spans.append((len(context), len(context) + len(demo)))
        context += [*demo, 2]
    texts = [[1, *demo] for demo in DEMOS]
    return Prompts(texts, context, spans, QUERIES, [0, 1, 0], options=[30, 31, 32], bos=1)


def plain(model: torch.nn.Module, before: list[int], query: list[int]) -> tuple[Tensor, Tensor]:
    """Attention's outputs [P, L, d] and scores [P, L, H, T] of one whole row alone."""
    ids = torch.tensor([[*before, *query, 30]])
    last = ids.shape[1] - 1
    recorded = record(model, ids, torch.tensor([[last, last - 1]]))
    scores = recorded.scores[0, ..., len(before) :].clone()
    scores[1, ..., -1] = 0
    return recorded.attention[0], scores


@pytest.mark.parametrize("name", FAMILIES_OF_ICL)
def test_demonstrations_run_once_give_what_whole_rows_give(name: str, prompts: Prompts) -> None:
    model = tiny(name)
    for batch_size in (1, 2, 3):
        for before, batches in (
            (prompts.context, in_context(model, prompts, 3, batch_size)),
            ([prompts.bos], zero_shot(model, prompts, 3, batch_size)),
        ):
            observed = observe(batches, prompts, 3)
            assert observed.scores.shape[-1] == 6  # the longest query and its candidate
            for index, query in enumerate(QUERIES):
                attention, scores = plain(model, before, query)
                torch.testing.assert_close(observed.attention[index], attention)
                own = observed.scores[index, ..., : len(query) + 1]
                torch.testing.assert_close(own, scores)
                assert not observed.scores[index, ..., len(query) + 1 :].any()


def test_the_answer_is_the_likeliest_option_after_the_query(prompts: Prompts) -> None:
    model = tiny("llama-tied")
    observed = observe(in_context(model, prompts, 3, 2), prompts, 3)
    for index, query in enumerate(QUERIES):
        logits = model(torch.tensor([[*prompts.context, *query]])).logits[0, -1]
        assert observed.predicted[index] == logits[prompts.options].argmax()


def test_columns_of_scores_begin_with_the_prefix(prompts: Prompts) -> None:
    model = tiny("gpt2-conv1d-positions")
    prefix = after_prefix(model, torch.tensor([prompts.context]))
    assert prefix is not None
    ids, position = torch.tensor([QUERIES[0]] * 2), torch.tensor([[2], [1]])
    cached = record(model, ids, position, prefix(2))
    whole = torch.tensor([[*prompts.context, *QUERIES[0]]] * 2)
    expected = record(model, whole, position + len(prompts.context))
    for key in ("attention", "queries", "scores", "logits"):
        torch.testing.assert_close(getattr(cached, key), getattr(expected, key))


def ft_of(method: Method, prompts: Prompts, name: str = "llama-tied") -> tuple[Observed, ...]:
    """ZSL, ICL and the method."""
    model = tiny(name)
    zsl = observe(zero_shot(model, prompts, 3, 2), prompts, 3)
    icl = observe(in_context(model, prompts, 3, 2), prompts, 3)
    with recorder_after(method, model, prompts) as recorder:
        ft = observe(recorded_rows(recorder, [1], prompts, 3, 2, CPU), prompts, 3)
    assert torch.equal(observe(zero_shot(model, prompts, 3, 2), prompts, 3).scores, zsl.scores)
    return zsl, icl, ft


def test_at_rate_0_everything_is_zero_shot_to_the_bit(prompts: Prompts) -> None:
    zsl, icl, ft = ft_of(Method(RATE_0, 0.0), prompts)
    assert torch.equal(ft.predicted, zsl.predicted)
    assert torch.equal(ft.attention, zsl.attention) and torch.equal(ft.scores, zsl.scores)
    assert torch.equal(sim_am(icl, ft), sim_am(icl, zsl))
    assert sim_aou(icl, zsl, ft).isnan().all()


def test_a_random_update_is_as_long_as_fine_tunings_and_elsewhere(prompts: Prompts) -> None:
    model = tiny("gpt2-conv1d-positions")
    before = [parameter.clone() for parameter in model.parameters()]
    updates = {}
    for kind in (FT, RANDOM):
        with recorder_after(Method(kind, 0.1, seed=4), model, prompts):
            after = [parameter.clone() for parameter in model.parameters()]
        updates[kind] = [a - b for a, b in zip(after, before, strict=True)]
    moved = 0
    for ft, random in zip(updates[FT], updates[RANDOM], strict=True):
        torch.testing.assert_close(ft.norm(), random.norm())
        assert torch.equal(ft == 0, random == 0)  # nothing that makes queries moves
        if ft.any():
            moved += 1
            cosine = (ft * random).sum() / (ft.norm() * random.norm())
            assert cosine.abs() < 0.5
    assert moved == 4  # weight and bias of two blocks


def test_fine_tuning_that_diverges_is_an_error(prompts: Prompts) -> None:
    model = tiny("llama-tied").float()
    with (
        pytest.raises(FloatingPointError, match="ft: expected finite weights, got others at rate"),
        recorder_after(Method(FT, 1e38), model, prompts),
    ):
        pass
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_expansion_that_diverges_is_an_error(prompts: Prompts) -> None:
    model = tiny("llama-tied").float()
    with (
        recorder_after(Method(LINEARISED, 1e38), model, prompts) as recorder,
        pytest.raises(FloatingPointError, match="icl: expected finite logits, got others"),
    ):
        observe(recorded_rows(recorder, [prompts.bos], prompts, 3, 2, CPU), prompts, 3)


def test_a_clip_of_nothing_leaves_the_model_where_it_is(prompts: Prompts) -> None:
    zsl, _, ft = ft_of(Method(CLIPPED_L2, 0.1, clip=1e-12), prompts)
    torch.testing.assert_close(ft.attention, zsl.attention)


def test_a_prefix_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="prefix"):
        after_prefix(tiny("llama-tied"), torch.tensor([[10_000]]))


def test_where_nothing_moved_nothing_is_made_random() -> None:
    old = torch.ones(3)
    still, moved = old.clone(), torch.tensor([1.0, 3.0, 1.0])
    randomise([still, moved], [old, old], seed=0)
    assert torch.equal(still, old)
    assert torch.equal(moved[[0, 2]], old[[0, 2]]) and abs(float(moved[1]) - 1) == 2
