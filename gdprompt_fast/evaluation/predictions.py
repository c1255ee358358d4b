"""Every prediction of an evaluation in a file, a row per example."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import Example
from ..files import write_file
from .answers import decode
from .scores import Scores, finite


def write_predictions(
    path: Path,
    examples: Sequence[Example],
    scores: Mapping[str, Scores],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes JSONL, whole or not at all: {"context", "query", "answers" (the gold ones),
    "settings": {setting: {"answer", "exact_match", "f1", "correct", "token_accuracy", "nll"}}}.

    The first three of a setting are null where no answers were generated, an NLL where it is not
    finite.

    Args:
        examples: as given to :func:`gdprompt_fast.evaluation.evaluate`; those at the end that it
            left out get no row.
        scores: what it returned.
    """
    count = min(map(len, scores.values()))
    columns = {setting: _rows(scores_of) for setting, scores_of in scores.items()}
    lines = []
    for index, example in enumerate(examples[:count]):
        row = {
            "context": decode(tokenizer, example.context),
            "query": decode(tokenizer, example.query),
            "answers": list(example.answers),
            "settings": {setting: rows[index] for setting, rows in columns.items()},
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_file(path, "".join(lines))


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that :func:`write_predictions` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _rows(scores: Scores) -> list[dict[str, Any]]:
    """The scores of every example, for JSON."""
    none = [None] * len(scores)
    columns = {
        "answer": none if scores.answers is None else scores.answers,
        "exact_match": none if scores.exact_match is None else scores.exact_match.tolist(),
        "f1": none if scores.f1 is None else scores.f1.tolist(),
        "correct": scores.correct.tolist(),
        "token_accuracy": scores.token_accuracy.tolist(),
        "nll": [finite(nll) for nll in scores.nll.tolist()],
    }
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
