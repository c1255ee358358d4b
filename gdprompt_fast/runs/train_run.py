"""``gdprompt train``: evaluates a model, meta-trains it, evaluates it again and reports."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..artifacts.files import write_file
from ..artifacts.stage import KeptResults
from ..config.fields import check_counts, check_numbers, option
from ..distributed.group import barrier, rank
from ..errors import UserError
from ..evaluation.held_out import HeldOut
from ..report import draw_figure
from ..teacher import Teacher
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
    TestSet,
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
    eval_every: int = option(
        0,
        "outer steps between measurements on a sample of --test-data, for the curve; the model "
        "that does best there is kept in best/; 0: none",
        may_change=True,
    )
    eval_examples: int = option(64, "size of that sample, drawn with --seed", may_change=True)
    overwrite: bool = overwrite_field(REPLACES_FOLDER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "eval_examples")
        check_numbers(self, "eval_every", above_zero=False)
        if self.eval_every and self.test_data is None:
            raise UserError("eval_every: expected test_data to measure on beside it, got none")

    def check_divided(self) -> None:
        """
        Raises:
            UserError: for what a model that no process has as a whole cannot do.
        """
        if self.check:
            raise UserError(
                'check: expected --no-check with sharding "full", of which no process has the '
                "model to check, got a check; the first step verifies its forward all the same"
            )
        if self.memory is not None:
            raise UserError(
                f'memory: expected none with sharding "full", got {self.memory!r}: gdprompt plan '
                "--sharding full tells what a micro_batch needs"
            )

    def held_out(self, test: TestSet | None) -> HeldOut | None:
        """What to measure on as training goes, if anything."""
        if test is None or not self.eval_every:
            return None
        count = min(self.eval_examples, len(test.examples))
        drawn = random.Random(self.seed).sample(range(len(test.examples)), count)
        sample = [test.examples[index] for index in sorted(drawn)]
        return HeldOut(sample, self.eval_every, self.eval_batch_size)


@command(
    "Meta-train a transformers model on triples of context, query and response.",
    continued_by="--resume continues the run",
    shared=True,
)
def train(config: TrainConfig) -> Callable[[], Results]:
    """Loads model and examples; the work is to train, and with a test set to evaluate."""
    outputs = outputs_of(config)
    if config.divides_weights:
        config.check_divided()
    if rank() == 0:
        check_output(config.output, config.resume, outputs)
    job = load_job(config, config.options)
    if rank() == 0:
        claim_output(config.output, run_settings(config), config.resume, outputs)

    def work() -> Results:
        barrier()
        write_dropped(config.dropped, config.command, job.reader.dropped)
        teacher = job.build_teacher()
        if config.check and rank() == 0:
            check_before_training(job, teacher, config.output)
        return run_training(job, teacher, config.output, config.held_out(job.test))

    return work


def run_training(
    job: Job, teacher: Teacher | None, output: Path, held_out: HeldOut | None = None
) -> Results:
    """Meta-trains into ``output`` and, with a test set, reports before and after; what ``output``,
    which was claimed with :func:`claim_output`, already holds is not done again.
    """
    model, tokenizer, options, test = job.model, job.tokenizer, job.options, job.test
    model.eval()
    results = KeptResults(output / RESULTS_FILE, read_results)
    if test is not None:
        results.once("before", lambda: evaluate_at_best(model, tokenizer, options, test))
    data = job.examples, options, output, teacher, job.joint, job.texts
    meta_train(model, tokenizer, *data, held_out)
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
