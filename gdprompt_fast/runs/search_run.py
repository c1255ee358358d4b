"""``gdprompt search-outer-lr``: short trainings from the same start, scored on held-out data."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..artifacts.files import write_file, write_json
from ..artifacts.markdown import markdown_table
from ..artifacts.stage import kept
from ..config.fields import check_counts, option
from ..errors import UserError
from ..report.table import metric_cell
from ..teacher import Teacher
from ..training.checkpoint import CHECKPOINTS, MODEL_FOLDER
from ..training.loop import meta_train
from ..training.options import TrainOptions
from .command import command, outputs_of
from .groups import REPLACES_FOLDER, overwrite_field
from .job import Job, TrainingConfig, load_job, run_settings
from .output import check_output, claim_output
from .reading import write_dropped
from .results import RATE_FILE, evaluate_on, read_results, summaries

SEARCH_FILE = "search.json"
TABLE_FILE = "search.md"
GRID = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)

DIVERGED = (math.inf, 0.0)

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SearchConfig(TrainingConfig):
    """As of a training, and which rates to try."""

    command = "search-outer-lr"

    grid: tuple[float, ...] = option(GRID, "rates to try", may_change=True)
    steps_per_rate: int = option(100, "outer steps at each")
    overwrite: bool = overwrite_field(REPLACES_FOLDER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "steps_per_rate")
        for rate in self.grid:
            if not 0 < rate < math.inf:
                raise UserError(f"grid: expected numbers > 0, got {rate}")
        if not self.grid:
            raise UserError("grid: expected at least one rate, got none")
        if self.test_data is None:
            raise UserError("test_data: expected held-out triples to score the rates on, got none")

    @property
    def trainings(self) -> list[TrainOptions]:
        """The options with each rate as the peak of a whole schedule."""
        rates = sorted(set(self.grid))
        return [replace(self.options, outer_lr=rate, steps=self.steps_per_rate) for rate in rates]


@command(
    "Find the outer rate for gdprompt train: a short training at each, scored on --test-data "
    "by the NLL of the gold responses after an inner step, then by accuracy.",
    continued_by="--resume continues the run",
)
def search_outer_lr(config: SearchConfig) -> Callable[[], float]:
    """Loads model and examples; the work is to train at each rate, and returns the best one."""
    outputs = outputs_of(config)
    check_output(config.output, config.resume, outputs)
    trainings = config.trainings
    job = load_job(config, trainings[0])
    trainings = [replace(each, micro_batch=job.options.micro_batch) for each in trainings]
    claim_output(config.output, run_settings(config), config.resume, outputs)

    def work() -> float:
        write_dropped(config.dropped, config.command, job.reader.dropped)
        return best_outer_lr(job, trainings, config.output)

    return work


def best_outer_lr(job: Job, trainings: Sequence[TrainOptions], output: Path) -> float:
    """Trains at each outer rate from the model as it is, and measures on ``job.test``.

    ``output`` gets a folder for each rate (metrics and result; a rate with a result is not trained
    again), ``search.json`` and ``search.md``.

    Returns:
        The rate with the lowest Fine-Tuning NLL per token, then the highest accuracy.

    Raises:
        FloatingPointError: if training diverges at every rate.
    """
    teacher = job.build_teacher()
    trained = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}

    def try_rate(options: TrainOptions, folder: Path) -> Result:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        return _try_rate(job, options, folder, teacher)

    results: dict[float, Result] = {}
    for options in trainings:
        folder = output / f"rate-{options.outer_lr}"
        path, make = folder / RATE_FILE, partial(try_rate, options, folder)
        results[options.outer_lr] = kept(path, make, read_results)[""]
        for made in (CHECKPOINTS, MODEL_FOLDER):  # several times the size of the model
            shutil.rmtree(folder / made, ignore_errors=True)
    best = _best(results)
    write_json(output / SEARCH_FILE, {"best": best, "rates": list(results.values())})
    text = f"{_table(results)}\n\nbest: --outer-lr {best:g}\n{_at_an_end(best, results)}"
    write_file(output / TABLE_FILE, text)
    print(f"\n{text}")
    return best


def _try_rate(job: Job, options: TrainOptions, folder: Path, teacher: Teacher | None) -> Result:
    """What :func:`evaluate_on` says after training at a rate, or at which step it diverged."""
    print(f"outer rate {options.outer_lr:g}", file=sys.stderr)
    assert job.test is not None
    test = replace(job.test, answer_tokens=0)  # the gold responses say enough
    try:
        data = (job.examples, options, folder, teacher, job.joint, job.texts)
        meta_train(job.model, job.tokenizer, *data)
        measured = evaluate_on(job.model, job.tokenizer, options.inner, test)
    except FloatingPointError as error:
        return {"outer_lr": options.outer_lr, "diverged": str(error)}
    return {"outer_lr": options.outer_lr, **measured}


def _best(results: Mapping[float, Result]) -> float:
    scores = {rate: _score(result) for rate, result in results.items()}
    best = min(scores, key=lambda rate: scores[rate])
    if scores[best] == DIVERGED:
        raise FloatingPointError(f"outer_lr: training diverged at every rate of {list(results)}")
    return best


def _score(result: Result) -> tuple[float, float]:
    """Smaller is better: Fine-Tuning NLL per token, and minus the accuracy."""
    if "diverged" in result:
        return DIVERGED
    summary = summaries({"": result})[""]["fine_tuning"]
    nll = summary.nll_per_token
    return DIVERGED if nll is None else (nll, -summary.accuracy)


def _table(results: Mapping[float, Result]) -> str:
    rows = [["outer rate", "Fine-Tuning NLL per token", "Fine-Tuning accuracy"]]
    for rate, result in results.items():
        if _score(result) == DIVERGED:
            rows.append([f"{rate:g}", "diverged", ""])
            continue
        summary = summaries({"": result})[""]["fine_tuning"]
        cells = [metric_cell(summary, field) for field in ("nll_per_token", "accuracy")]
        rows.append([f"{rate:g}", *cells])
    return markdown_table(rows)


def _at_an_end(best: float, results: Mapping[float, Result]) -> str:
    """A warning where a better rate may lie outside the grid."""
    ends = {min(results): "smaller", max(results): "larger"}
    if best not in ends or len(results) == 1:
        return ""
    return f"It is at an end of the grid: try {ends[best]} rates too.\n"
