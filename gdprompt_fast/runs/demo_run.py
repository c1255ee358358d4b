"""``gdprompt demo``: the bundled model learns to take a passage into its weights in one step.

Nothing is downloaded. The bundled model answers from a passage in its prompt, and cannot from a
gradient step on it. It is meta-trained with the method of arXiv 2506.20989: KL to what it answers
itself when prompted; and, beside it, with the gold answers. It is measured on people and things
that neither this training nor its own has mentioned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..artifacts.files import write_file
from ..artifacts.stage import KeptResults
from ..bundled import bundled_folder
from ..config.fields import WritingConfig, check_counts, option
from ..data import Example, Limits, make_people_data, tokenise_triples
from ..evaluation import Summary
from ..loading import load_model, positions
from ..report import draw_figure, results_table
from ..teacher import TeacherCache
from ..training.loop import meta_train
from ..training.metrics import METRICS_FILE, read_metrics
from ..training.options import TrainOptions
from .command import command, outputs_of
from .groups import (
    REPLACES_FOLDER,
    DeviceConfig,
    eval_batch_size_field,
    overwrite_field,
    resume_field,
)
from .output import check_output, claim_output
from .results import (
    FIGURE_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    Results,
    TestSet,
    describe_samples,
    evaluate_at_best,
    evaluate_on,
    read_results,
    summaries,
)

TEST_EXAMPLES = 400
TRAIN_EXAMPLES = 8000
INNER_LR_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
OPTIONS = TrainOptions(
    steps=600,
    batch_size=16,
    group_by_length=False,  # all passages are about equally long
    queries_per_context=4,  # all that a passage is asked: what tells its facts apart in θ'
    outer_lr=1e-3,
    warmup_steps=50,
    inner_lr=0.5,
    lm_weight=0.1,
    lm_on="prompts",
    prompt_weight=0.3,
    answer_tokens=8,  # a name has two, and EOS
    teacher_batch_size=64,
    checkpoint_every=200,
)
OBJECTIVES = {"kl": "after, KL to its prompted answers", "gold": "after, gold answers"}


@dataclass(frozen=True)
class Demo:
    """What the demo works on.

    Attributes:
        examples: questions on passages, to train on.
        test: passages to measure on.
        options: with the KL objective; the gold one is the other.
    """

    device: torch.device
    examples: Sequence[Example]
    test: TestSet
    options: TrainOptions


@dataclass(frozen=True, kw_only=True)
class DemoConfig(DeviceConfig, WritingConfig):
    """How long to train, and on how much to measure."""

    command = "demo"

    eval_batch_size: int = eval_batch_size_field()
    output: Path = option(Path("runs/demo"), "folder to write to", writes=True, may_change=True)
    steps: int = option(OPTIONS.steps, "outer steps")
    seed: int = option(0, "seed of the data and its order")
    test_examples: int = option(TEST_EXAMPLES, "passages to measure on")
    resume: bool = resume_field()
    overwrite: bool = overwrite_field(REPLACES_FOLDER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "test_examples", "steps")


@command(
    "Meta-train the bundled model on made-up facts; no download, minutes on a CPU.",
    continued_by="--resume continues the run",
)
def demo(config: DemoConfig) -> Callable[[], Results]:
    """Makes the data; the work is to measure, to meta-train with each objective and to measure
    again.
    """
    outputs = outputs_of(config)
    check_output(config.output, config.resume, outputs)
    made = make_demo(config)
    settings = {**config.settings(), **asdict(made.options)}
    claim_output(config.output, settings, config.resume, outputs)
    print(
        f"the bundled model, {len(made.examples)} questions on passages to train on and "
        f"{len(made.test.examples)} to measure on, with no person and no thing in common"
    )
    return lambda: run_demo(made, config.output)


def make_demo(config: DemoConfig) -> Demo:
    """The demo with its data."""
    steps = config.steps
    options = replace(OPTIONS, steps=steps, prompt_from=steps // 2, seed=config.seed)
    model, tokenizer = load_model(bundled_folder(), "float32", config.torch_device)
    room = positions(model) - options.answer_tokens
    limits = Limits(room, room, room)
    size = min(TRAIN_EXAMPLES, steps * options.batch_size * options.queries_per_context)
    data = make_people_data(size, config.test_examples, config.seed)
    unseen = tokenise_triples(data.test, tokenizer, limits).examples
    return Demo(
        config.torch_device,
        tokenise_triples(data.train, tokenizer, limits).examples,
        TestSet(unseen, INNER_LR_GRID, config.eval_batch_size, options.answer_tokens),
        options,
    )


def run_demo(demo: Demo, output: Path) -> Results:
    """Writes everything to ``output``; what is there, of an interrupted run, is not done again."""
    results = KeptResults(output / RESULTS_FILE, read_results)

    def before() -> dict[str, object]:
        model, tokenizer = load_model(bundled_folder(), "float32", demo.device)
        return evaluate_at_best(model, tokenizer, demo.options, demo.test)

    results.once("before", before)
    for objective, name in OBJECTIVES.items():
        results.once(name, partial(_train_with, objective, demo, output))
    text = describe_demo(results.content, demo)
    write_file(output / TABLE_FILE, text)
    metrics = read_metrics(output / "kl" / METRICS_FILE)
    draw_figure(summaries(results.content), metrics, output / FIGURE_FILE)
    print(f"\n{text}\nmodels, metrics and figure: {output}")
    return results.content


def _train_with(objective: str, demo: Demo, output: Path) -> dict[str, object]:
    """Meta-trains the bundled model with an objective; its results on the test set."""
    model, tokenizer = load_model(bundled_folder(), "float32", demo.device)
    options = replace(demo.options, objective=objective)
    teacher = None
    if objective == "kl":
        teacher = TeacherCache.build(
            output / "teacher",
            model,
            demo.examples,
            options.answer_tokens,
            options.teacher_batch_size,
        )
    print(f"meta-training, {OBJECTIVES[objective].removeprefix('after, ')}")
    meta_train(model, tokenizer, demo.examples, options, output / objective, teacher)
    return evaluate_on(model, tokenizer, options.inner, demo.test)


def describe_demo(results: Results, demo: Demo) -> str:
    """The table, what became of the Prompt setting, and a few answers."""
    measured = summaries(results)
    before = measured["before"]["prompt"]
    tried = ", ".join(results["before"]["inner_lr_tried"])
    best = results["before"]["inner"]["lr"]
    lines = [
        f"{len(demo.test.examples)} unseen passages, ± one standard error:",
        "",
        results_table(measured),
        "",
        f"Fine-Tuning before: η = {best:g}, the best for it of {tried}; "
        f"after: η = {demo.options.inner_lr:g}, as trained.",
    ]
    for name in OBJECTIVES.values():
        lines.append(f"{name}: {_shares(before, measured[name])}")
    samples = describe_samples(demo.test, results["before"], results[OBJECTIVES["kl"]])
    return "\n".join([*lines, *samples]) + "\n"


def _shares(prompt_before: Summary, after: dict[str, Summary]) -> str:
    """How much of the prompted accuracy the gradient step gives, and how much a prompt still."""
    if not prompt_before.accuracy:
        return "nothing to compare with, Prompt was never right before"
    fine_tuning, prompt = (
        after[setting].accuracy / prompt_before.accuracy for setting in ("fine_tuning", "prompt")
    )
    return (
        f"Fine-Tuning is right {fine_tuning:.0%} as often as Prompt before, "
        f"Prompt itself {prompt:.0%}"
    )
