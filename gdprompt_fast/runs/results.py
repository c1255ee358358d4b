"""What runs measure, as it is kept in JSON and as it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import read_json
from ..data import Example
from ..errors import UserError
from ..evaluation import SETTINGS, InnerStep, Scores, Summary, evaluate, tune_inner_lr
from ..meta.config import check_inner
from ..report import not_improved, results_table
from ..training.options import TrainOptions

RESULTS_FILE, RATE_FILE = "results.json", "result.json"  # of runs, of a rate of the search
TABLE_FILE = "results.md"
FIGURE_FILE = "figure.png"
SAMPLES = 3  # answers shown

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TestSet:
    """What a run is measured on.

    Attributes:
        examples: none of which is trained on.
        inner_lr_grid: the inner rates of which the model before training gets the best one.
        batch_size: examples evaluated at once.
        answer_tokens: the longest answer that is generated; 0: none are.
        group_by_length: examples of about equal lengths are evaluated together.
    """

    examples: Sequence[Example]
    inner_lr_grid: Sequence[float]
    batch_size: int
    answer_tokens: int = 32
    group_by_length: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"eval_batch_size: expected an integer >= 1, got {self.batch_size}")
        if self.answer_tokens < 0:
            raise UserError(f"answer_tokens: expected an integer >= 0, got {self.answer_tokens}")
        for inner_lr in self.inner_lr_grid:
            check_inner(inner_lr, inner_steps=1)


def evaluate_on(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, inner: InnerStep, test: TestSet
) -> dict[str, Any]:
    """The three settings on a test set, for JSON."""
    scores = evaluate(
        model,
        tokenizer,
        test.examples,
        inner,
        test.batch_size,
        answer_tokens=test.answer_tokens,
        group_by_length=test.group_by_length,
    )
    return as_results(scores, inner)


def as_results(scores: Mapping[str, Scores], inner: InnerStep) -> dict[str, Any]:
    """The summaries of an evaluation and the first few answers after fine-tuning, for JSON."""
    return {
        "inner": asdict(inner),
        "settings": {setting: asdict(of.summary()) for setting, of in scores.items()},
        "fine_tuned_answers": (scores["fine_tuning"].answers or [])[:SAMPLES],
    }


def evaluate_at_best(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: TrainOptions, test: TestSet
) -> dict[str, Any]:
    """As :func:`evaluate_on`, at the best inner rate of the grid and of training."""
    grid = sorted({*test.inner_lr_grid, options.inner_lr})
    tuned = tune_inner_lr(
        model,
        test.examples,
        options.inner,
        grid,
        test.batch_size,
        group_by_length=test.group_by_length,
    )
    tried = {f"{lr:g}": asdict(summary) for lr, summary in tuned.tried.items()}
    return {**evaluate_on(model, tokenizer, tuned.inner, test), "inner_lr_tried": tried}


def read_results(path: Path) -> Results:
    """The results in a file that a run, or the search for a rate, wrote, by name.

    Raises:
        ValueError: naming the file, if they are not as they were written.
    """
    content = read_json(path)
    results = {"": content} if path.name == RATE_FILE else content
    for name, result in results.items():
        if not (_is_result(result) and (name != "before" or "inner_lr_tried" in result)):
            raise UserError(
                f"{path}: expected results as they were written, got others {name}; without the "
                "file they are measured again"
            )
    return results


def _is_result(result: Any) -> bool:
    if isinstance(result, dict) and isinstance(result.get("diverged"), str):
        return True
    try:
        measured = summaries({"": result})[""]
        needed = [result["inner"]["lr"]]
        texts = [*result["fine_tuned_answers"], *result.get("inner_lr_tried", [])]
    except (AttributeError, KeyError, TypeError):
        return False
    needed += [number for of in measured.values() for number in (of.accuracy, of.token_accuracy)]
    fields = [value for of in measured.values() for value in vars(of).values() if value is not None]
    numbers = all(isinstance(value, int | float) for value in needed + fields)
    return measured.keys() == SETTINGS.keys() and numbers and all(isinstance(t, str) for t in texts)


def summaries(results: Results) -> dict[str, dict[str, Summary]]:
    """The summaries in results read from JSON, by name and setting."""
    return {
        name: {setting: Summary(**fields) for setting, fields in result["settings"].items()}
        for name, result in results.items()
    }


def describe_results(results: Results, test: TestSet) -> str:
    """The table of a finished run, what did not improve, and a few answers."""
    measured = summaries(results)
    before, after = results["before"], results["after"]
    tried = ", ".join(before["inner_lr_tried"])
    lines = [
        f"{len(test.examples)} test examples, ± one standard error:",
        "",
        results_table(measured),
        "",
        f"Fine-Tuning before: η = {before['inner']['lr']:g}, the best for it of {tried}; "
        f"after: η = {after['inner']['lr']:g}, as trained.",
        *not_improved(measured["before"], measured["after"]),
    ]
    lines += describe_samples(test, before, after)
    return "\n".join(lines) + "\n"


def describe_samples(
    test: TestSet,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> list[str]:
    """The first few test examples with the answers after an inner step, a line each."""
    answers = before["fine_tuned_answers"], after["fine_tuned_answers"]
    lines = []
    for example, answer_before, answer_after in zip(test.examples, *answers, strict=False):
        lines += [
            "",
            f"passage: {example.texts.context}",
            f"query:   {example.texts.query}",
            f"gold:    {example.texts.response}",
            f"before:  {answer_before}",
            f"after:   {answer_after}",
        ]
    return lines
