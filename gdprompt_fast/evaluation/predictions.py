"""Every prediction of an evaluation in a file, a row per example."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifacts.files import write_file, write_json
from ..data import Example
from ..errors import UserError
from .scores import Scores, finite


def write_predictions(
    path: Path,
    examples: Sequence[Example],
    scores: Mapping[str, Scores],
) -> None:
    """Writes JSONL, whole or not at all: {"id" (if it has one), "context", "query", "response",
    "answers" (the gold ones), "settings": {setting: {"answer", "exact_match", "f1", "correct",
    "token_accuracy", "nll"}}}. The texts are those of the record that was read.

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
        texts = {n: text for n, text in example.texts._asdict().items() if text is not None}
        row = {
            **({"id": texts.pop("id")} if "id" in texts else {}),
            **texts,
            "answers": list(example.answers),
            "settings": {setting: rows[index] for setting, rows in columns.items()},
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_file(path, "".join(lines))


def check_squad_ids(examples: Sequence[Example]) -> None:
    """That :func:`write_squad_predictions` has an id for every answer.

    Raises:
        ValueError: if an example has none, or that of another.
    """
    ids = Counter(example.texts.id for example in examples)
    for name, count in ids.items():
        if name is None or count > 1:
            raise UserError(
                'squad_predictions: expected records with an "id" each, all of them different, got '
                f"{count} {'without one' if name is None else f'with {name!r}'}"
            )


def write_squad_predictions(
    path: Path, examples: Sequence[Example], scores: Mapping[str, Scores]
) -> None:
    """Writes what SQuAD's official script takes: the answers of Fine-Tuning by id."""
    answers = scores["fine_tuning"].answers
    assert answers is not None
    pairs = zip(examples, answers, strict=True)
    write_json(path, {str(example.texts.id): answer for example, answer in pairs})


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
