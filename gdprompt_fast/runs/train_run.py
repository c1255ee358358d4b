"""A whole run, of the demo and of ``gdprompt train``: evaluate, meta-train, evaluate, report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import is_empty, read_json, write_file, write_folder, write_json
from ..artifacts.outputs import Outputs
from ..data import Example
from ..errors import UserError
from ..evaluation import SETTINGS, InnerStep, Scores, Summary, evaluate, tune_inner_lr
from ..meta.config import check_inner
from ..report import draw_figure, not_improved, results_table
from ..teacher import TeacherCache
from ..training.checkpoint import read_metrics
from ..training.loop import METRICS_FILE, TrainOptions, check_training, train

SETTINGS_FILE = "run.json"
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
    """

    examples: Sequence[Example]
    inner_lr_grid: Sequence[float]
    batch_size: int
    answer_tokens: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"eval_batch_size: expected an integer >= 1, got {self.batch_size}")
        if self.answer_tokens < 0:
            raise UserError(f"answer_tokens: expected an integer >= 0, got {self.answer_tokens}")
        for inner_lr in self.inner_lr_grid:
            check_inner(inner_lr, inner_steps=1)


def check_output(output: Path, resume: bool, outputs: Outputs) -> None:
    """That ``output`` can be the folder of a new run, or has one to go on with, unharmed.

    Raises:
        ValueError: if it holds anything that is not to be gone on with, or replaced.
    """
    if resume and (output / SETTINGS_FILE).exists():
        for folder in (output, *filter(Path.is_dir, output.iterdir())):
            check_training(folder)
        for path in (*output.glob(RESULTS_FILE), *output.glob(f"*/{RATE_FILE}")):
            read_results(path)
        return
    if (output / SETTINGS_FILE).exists() and not outputs.overwrite:
        raise UserError(
            f"output: expected a folder without a run, got {output}; add --resume to continue it "
            "or --overwrite to replace it, or give another --output"
        )
    if resume and not is_empty(output):
        raise UserError(f"output: expected a run to continue or an empty folder, got {output}")
    if not resume and not is_empty(output):
        outputs.check_folder(output)


def claim_output(output: Path, settings: Mapping[str, Any], resume: bool, outputs: Outputs) -> None:
    """Makes ``output``, which :func:`check_output` has let pass, the folder of a run with these
    settings.

    Raises:
        ValueError: if it is that of a run with other settings.
    """
    if not resume:
        check_output(output, resume, outputs)  # again: others may have begun in the meantime
    path = output / SETTINGS_FILE
    known = json.loads(json.dumps(settings))
    if not resume and not is_empty(output):
        write_folder(output, lambda folder: write_json(folder / SETTINGS_FILE, known))
        return
    if resume and path.exists():
        old = read_json(path)
        for name in sorted(old.keys() | known.keys()):
            if old.get(name) != known.get(name):
                raise UserError(
                    f"{name}: expected {old.get(name)!r} as in the run in {output}, "
                    f"got {known.get(name)!r}"
                )
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, known)


def run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: TrainOptions,
    output: Path,
    teacher: TeacherCache | None = None,
    test: TestSet | None = None,
    joint: Sequence[Example] | None = None,
) -> None:
    """Meta-trains ``model`` into ``output`` and, with a test set, reports before and after.

    ``output`` was claimed with :func:`claim_output`; what it already holds is not done again.
    """
    model.eval()
    path = output / RESULTS_FILE
    results = read_results(path) if path.exists() else {}
    if test is not None and "before" not in results:
        results["before"] = measure_at_best(model, tokenizer, options, test)
        write_json(path, results)
    train(model, tokenizer, examples, options, output, teacher, joint)
    if test is not None:
        results["after"] = measure(model, tokenizer, options.inner, test)
        write_json(path, results)
        text = describe_results(results, test)
        write_file(output / TABLE_FILE, text)
        print(f"\n{text}")
    metrics = read_metrics(output / METRICS_FILE)
    draw_figure(summaries(results), metrics, output / FIGURE_FILE)
    print(f"model, metrics and figure: {output}")


def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, inner: InnerStep, test: TestSet
) -> dict[str, Any]:
    """The three settings on a test set, for JSON."""
    scores = evaluate(
        model, tokenizer, test.examples, inner, test.batch_size, answer_tokens=test.answer_tokens
    )
    return as_results(scores, inner)


def as_results(scores: Mapping[str, Scores], inner: InnerStep) -> dict[str, Any]:
    """The summaries of an evaluation and the first few answers after fine-tuning, for JSON."""
    return {
        "inner": asdict(inner),
        "settings": {setting: asdict(of.summary()) for setting, of in scores.items()},
        "fine_tuned_answers": (scores["fine_tuning"].answers or [])[:SAMPLES],
    }


def measure_at_best(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: TrainOptions, test: TestSet
) -> dict[str, Any]:
    """As :func:`measure`, at the best inner rate of the grid and of training."""
    grid = sorted({*test.inner_lr_grid, options.inner_lr})
    tuned = tune_inner_lr(model, test.examples, options.inner, grid, test.batch_size)
    tried = {f"{lr:g}": asdict(summary) for lr, summary in tuned.tried.items()}
    return {**measure(model, tokenizer, tuned.inner, test), "inner_lr_tried": tried}


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
