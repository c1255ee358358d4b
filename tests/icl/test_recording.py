"""What is recorded of a model, against its own outputs and plain products of its projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdprompt_fast.errors import UserError
from gdprompt_fast.icl.recording import record
from helpers.icl import FAMILIES_OF_ICL, tiny, with_eager_attention
from helpers.models import VOCABULARY

ROWS, WIDTH = 3, 9


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1))


POSITIONS = torch.tensor([[8, 7], [5, 4], [3, 2]])


def _at(x: Tensor) -> Tensor:
    return x[torch.arange(ROWS)[:, None], POSITIONS]


@pytest.mark.parametrize("name", FAMILIES_OF_ICL)
def test_outputs_and_logits_are_those_of_the_models_own_forward(name: str, ids: Tensor) -> None:
    model = tiny(name)
    outputs: list[Tensor] = []
    places = ("self_attn", "attention", "attn")
    for module_name, module in model.named_modules():
        if module_name.rpartition(".")[2] in places:
            module.register_forward_hook(lambda _, inputs, output: outputs.append(output[0]))
    logits = model(ids).logits
    own = [_at(each) for each in outputs]

    recorded = record(tiny(name), ids, POSITIONS)

    torch.testing.assert_close(recorded.logits, _at(logits), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(recorded.attention, torch.stack(own, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES_OF_ICL)
def test_the_softmax_of_scores_is_the_models_own_attention(name: str, ids: Tensor) -> None:
    model = tiny(name)
    with with_eager_attention(model):
        weights = torch.stack(model(ids, output_attentions=True).attentions, 2)  # [B, H, L, T, T]
    own = _at(weights.permute(0, 3, 2, 1, 4))

    recorded = record(model, ids, POSITIONS)

    column = torch.arange(WIDTH)
    hidden = column > POSITIONS[:, :, None, None, None]
    if name == "mistral-sliding-window":
        hidden = hidden | (column <= POSITIONS[:, :, None, None, None] - 3)
    softmax = recorded.scores.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(softmax, own, rtol=1e-5, atol=1e-6)  # theirs is fp32


def test_scores_are_queries_times_keys(ids: Tensor) -> None:
    """At GPT-2's last token, whose own key is a third of its projection."""
    model: Any = tiny("gpt2-conv1d-positions")
    projected: list[Tensor] = []
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda _, inputs, y: projected.append(y))
    recorded = record(model, ids, POSITIONS)
    for layer, y in enumerate(projected):
        keys = y[..., 32:64].view(ROWS, WIDTH, 4, 8)
        expected = torch.einsum("bphd,bthd->bpht", recorded.queries[:, :, layer], keys)
        torch.testing.assert_close(recorded.scores[:, :, layer], expected)


@pytest.mark.parametrize("name", FAMILIES_OF_ICL)
def test_a_padded_row_is_recorded_as_alone(name: str, ids: Tensor) -> None:
    model = tiny(name)
    batch = record(model, ids, POSITIONS)
    alone = record(model, ids[1:2, :6], POSITIONS[1:2])
    for key in ("attention", "queries", "logits"):
        torch.testing.assert_close(getattr(batch, key)[1:2], getattr(alone, key))
    torch.testing.assert_close(batch.scores[1:2, ..., :6], alone.scores)


def test_the_model_is_left_as_it_was(ids: Tensor) -> None:
    model = tiny("llama-tied")
    before = model.config._attn_implementation
    record(model, ids, POSITIONS)
    assert model.config._attn_implementation == before
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert not any(hooks)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        (torch.tensor([[9], [0], [0]]), r"positions: expected some in \[0, 9\), got \[0, 9\]"),
        (torch.tensor([[1], [0]]), r"positions: expected int64 \[3, P\], got"),
        (torch.ones(3, 1), r"positions: expected int64 \[3, P\], got torch.float32 \[3, 1\]"),
    ],
)
def test_positions_outside_the_rows_are_refused(positions: Tensor, words: str, ids: Tensor) -> None:
    with pytest.raises(UserError, match=words):
        record(tiny("llama-tied"), ids, positions)


def test_active_dropout_is_refused(ids: Tensor) -> None:
    model = tiny("gpt2-conv1d-positions").train()
    assert any(isinstance(module, nn.Dropout) for module in model.modules())
    with pytest.raises(UserError, match="expected no active dropout"):
        record(model, ids, POSITIONS)
