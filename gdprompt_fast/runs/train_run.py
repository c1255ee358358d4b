"""``gdprompt train``: evaluates a model, meta-trains it, evaluates it again and reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..artifacts.files import write_file
from ..artifacts.stage import KeptResults
from ..config.fields import option
from ..distributed.group import barrier, rank
from ..report import draw_figure
from ..teacher import TeacherCache
from ..training.loop import meta_train
from ..training.metrics import METRICS_FILE, read_metrics
from .check_run import check_before_training
from .command import command, outputs_of
from .groups import REPLACES_FOLDER, overwrite_field
from .job import Job, TrainingConfig, load_job, run_settings
from .output import check_output, claim_output
from .reading import write_dropped
from .results import (
    FIGURE_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    Results,
    describe_results,
    evaluate_at_best,
    evaluate_on,
    read_results,
    summaries,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingConfig):
    """How to meta-train which model on which examples."""

    command = "train"

    check: bool = option(
        True,
        "first of all gdprompt check on one example; train nothing where it is not exact",
        may_change=True,
    )
    overwrite: bool = overwrite_field(REPLACES_FOLDER)


@command(
    "Meta-train a transformers model on triples of context, query and response.",
    continued_by="--resume continues the run",
    shared=True,
)
def train(config: TrainConfig) -> Callable[[], Results]:
    """Loads model and examples; the work is to train, and with a test set to evaluate."""
    outputs = outputs_of(config)
    if rank() == 0:
        check_output(config.output, config.resume, outputs)
    job = load_job(config, config.options)
    if rank() == 0:
        claim_output(config.output, run_settings(config), config.resume, outputs)

    def work() -> Results:
        barrier()
        write_dropped(config.dropped, config.command, job.reader.dropped)
        teacher = job.build_teacher_cache()
        if config.check and rank() == 0:
            check_before_training(job, teacher, config.output)
        return run_training(job, teacher, config.output)

    return work


def run_training(job: Job, teacher: TeacherCache | None, output: Path) -> Results:
    """Meta-trains into ``output`` and, with a test set, reports before and after; what ``output``,
    which was claimed with :func:`claim_output`, already holds is not done again.
    """
    model, tokenizer, options, test = job.model, job.tokenizer, job.options, job.test
    model.eval()
    results = KeptResults(output / RESULTS_FILE, read_results)
    if test is not None:
        results.once("before", lambda: evaluate_at_best(model, tokenizer, options, test))
    meta_train(model, tokenizer, job.examples, options, output, teacher, job.joint)
    if test is not None:
        results.keep("after", evaluate_on(model, tokenizer, options.inner, test))
        text = describe_results(results.content, test)
        write_file(output / TABLE_FILE, text)
        print(f"\n{text}")
    if rank() > 0:
        return results.content
    metrics = read_metrics(output / METRICS_FILE)
    draw_figure(summaries(results.content), metrics, output / FIGURE_FILE)
    print(f"model, metrics and figure: {output}")
    return results.content
