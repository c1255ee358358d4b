"""Contexts of which only some tokens count, from the data file to the step and the scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gdprompt_fast import fast_meta_step
from gdprompt_fast.data import (
    Example,
    meta_batch,
    read_records,
    read_triples,
    tokenise_triples,
    units_by_context,
    write_triples,
)
from gdprompt_fast.data.people import make_people_data, people_tokenizer
from gdprompt_fast.evaluation import InnerStep, evaluate, with_irrelevant_contexts
from helpers.models import llama
from helpers.training import GOLD, ROOMY, TOKENIZER, run

TRIPLE = {"context": "Ada sings loud", "query": "who?", "response": "Ada"}
LOUD = [10, 14]


def letters(bos: str | None = None) -> PreTrainedTokenizerFast:
    """A token a character."""
    vocabulary = {chr(code): code for code in range(32, 127)} | {"<s>": 0, "</s>": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token=bos)


def example(**also: Any) -> Example:
    return tokenise_triples([{**TRIPLE, **also}], letters(), ROOMY).examples[0]


def test_a_token_counts_if_a_character_of_it_does() -> None:
    assert example().context_loss is None
    counts = example(context_loss=[[0, 3], LOUD]).context_loss
    assert counts == tuple(at < 3 or at >= 10 for at in range(14))
    words = {**TRIPLE, "context": "Ada is the painter of Bob .", "context_loss": [[12, 13]]}
    (in_words,) = tokenise_triples([words], people_tokenizer(), ROOMY).examples
    texts = [people_tokenizer().decode([token]).strip() for token in in_words.context]
    assert in_words.context_loss is not None
    assert [text for text, c in zip(texts, in_words.context_loss, strict=True) if c] == [
        texts[in_words.context_loss.index(True)]
    ]
    assert len(in_words.context_loss) == len(in_words.context)


def test_a_context_whose_first_token_alone_counts_is_dropped() -> None:
    records = [TRIPLE, {**TRIPLE, "context_loss": [[0, 1]]}]
    triples = tokenise_triples(records, letters(), ROOMY)
    assert triples.kept == [0]
    assert triples.reasons == {1: "context_loss of no token with one before it"}


def test_spans_survive_reading_and_writing(tmp_path: Path) -> None:
    path = tmp_path / "triples.jsonl"
    write_triples([TRIPLE, {**TRIPLE, "context_loss": [LOUD]}], path)
    assert [row["context_loss"] for row in read_records(path).rows] == [None, [LOUD]]
    write_triples(read_triples(path), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "spans", [[], 3, "all", [[3]], [[3, 3]], [[-1, 2]], [[0, 15]], [["0", 2]], [[0, True]], [None]]
)
def test_bad_spans_are_an_error_naming_the_line(spans: Any, tmp_path: Path) -> None:
    path = tmp_path / "triples.jsonl"
    path.write_text(json.dumps(TRIPLE) + "\n" + json.dumps({**TRIPLE, "context_loss": spans}))
    expected = r'line 2: expected "context_loss" to be a list of \[begin, end\] .* <= 14'
    with pytest.raises(ValueError, match=expected):
        read_records(path)


def test_the_batch_has_the_mask_and_units_the_same_one() -> None:
    whole, part = example(), example(context_loss=[LOUD])
    batch = meta_batch([whole, part])
    assert batch.context_loss_mask[0].all() and batch.context_loss_mask[1].sum() == 4
    assert units_by_context([whole, part, whole, part], 2) == [[0, 2], [1, 3]]


def test_irrelevant_contexts_bring_their_own_spans() -> None:
    records = [{**TRIPLE, "context": f"text {n}", "context_loss": [[n, n + 1]]} for n in range(4)]
    for record in with_irrelevant_contexts(Dataset.from_list(records), seed=0):
        number = int(record["context"][-1])
        assert record["context_loss"] == [[number, number + 1]]


def test_training_and_evaluation_take_the_step_on_what_counts(tmp_path: Path) -> None:
    records = [{**TRIPLE, "context_loss": [LOUD]}, {**TRIPLE, "context": "Bob is not loud"}]
    part, other = tokenise_triples(records, letters(), ROOMY).examples
    model = llama(128).eval()

    def nll(of: Example) -> float:
        ids = torch.tensor([list(of.context)])
        with torch.no_grad():
            per_token = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        counts = torch.tensor(of.context_loss or [True] * len(of.context))[1:]
        return float(per_token[counts].mean())

    out = fast_meta_step(model, meta_batch([part, other]), objective="gold")
    assert float(out.inner_loss) == pytest.approx((nll(part) + nll(other)) / 2, rel=1e-5)
    scores = {}
    for name, one, one_after_another in (
        ("part", part, False),
        ("part in place", part, True),
        ("whole", replace(part, context_loss=None), False),
    ):
        scores[name] = evaluate(
            model,
            letters(),
            [one],
            InnerStep(0.5),
            1,
            settings=["fine_tuning"],
            answer_tokens=0,
            one_after_another=one_after_another,
        )["fine_tuning"].nll
    torch.testing.assert_close(scores["part"], scores["part in place"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores["part"], scores["whole"], rtol=1e-3)


def test_a_run_differs_where_less_counts(tmp_path: Path) -> None:
    records = make_people_data(1, 4, seed=0).test.to_list()
    weights = []
    for counts in (False, True):
        spans = {"context_loss": [[len(records[0]["context"]) // 2, len(records[0]["context"])]]}
        given = [{**record, **(spans if counts else {})} for record in records]
        examples = tokenise_triples(given, TOKENIZER, ROOMY).examples
        weights.append(run(replace(GOLD, steps=2), examples, tmp_path / str(counts)))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
