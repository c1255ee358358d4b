"""The demo: the bundled model learns to take a passage into its weights with one gradient step.

Nothing is downloaded. The bundled model answers from a passage in its prompt, and cannot from a
gradient step on it. It is meta-trained with the method of arXiv 2506.20989: KL to what it answers
itself when prompted; and, beside it, with the gold answers. It is measured on people and things
that neither this training nor its own has mentioned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..artifacts.files import write_file, write_json
from ..bundled import bundled_folder
from ..data import Example, Limits, make_people_data, tokenise_triples
from ..errors import UserError
from ..evaluation import Summary
from ..loading import load_model, positions
from ..report import draw_figure, results_table
from ..teacher import TeacherCache
from ..training.checkpoint import read_metrics
from ..training.loop import METRICS_FILE, TrainOptions, train
from .train_run import (
    FIGURE_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    Results,
    TestSet,
    describe_samples,
    measure,
    measure_at_best,
    read_results,
    summaries,
)

TEST_EXAMPLES = 400
TRAIN_EXAMPLES = 8000
INNER_LR_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
OPTIONS = TrainOptions(
    steps=600,
    batch_size=16,
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
ARMS = {"kl": "after, KL to its prompted answers", "gold": "after, gold answers"}


@dataclass(frozen=True)
class Demo:
    """What the demo works on.

    Attributes:
        examples: questions on passages, to train on.
        test: passages to measure on.
        options: of the KL arm; the gold arm has the other objective.
    """

    device: torch.device
    examples: Sequence[Example]
    test: TestSet
    options: TrainOptions


def make_demo(
    device: torch.device, steps: int, seed: int, test_examples: int, eval_batch_size: int
) -> Demo:
    """The demo with its data.

    Raises:
        ValueError: naming the option, what was expected and what was given.
    """
    if test_examples < 1:
        raise UserError(f"test_examples: expected an integer >= 1, got {test_examples}")
    if steps < 1:
        raise UserError(f"steps: expected an integer >= 1, got {steps}")
    options = replace(OPTIONS, steps=steps, prompt_from=steps // 2, seed=seed)
    model, tokenizer = load_model(bundled_folder(), "float32", device)
    room = positions(model) - options.answer_tokens
    limits = Limits(room, room, room)
    size = min(TRAIN_EXAMPLES, steps * options.batch_size * options.queries_per_context)
    data = make_people_data(size, test_examples, seed)
    unseen = tokenise_triples(data.test, tokenizer, limits).examples
    return Demo(
        device,
        tokenise_triples(data.train, tokenizer, limits).examples,
        TestSet(unseen, INNER_LR_GRID, eval_batch_size, options.answer_tokens),
        options,
    )


def run_demo(demo: Demo, output: Path) -> None:
    """Measures, meta-trains with each objective and measures again; writes it all to ``output``.

    What is there already, of an interrupted run, is not done again.
    """
    path = output / RESULTS_FILE
    results = read_results(path) if path.exists() else {}
    if "before" not in results:
        model, tokenizer = load_model(bundled_folder(), "float32", demo.device)
        results["before"] = measure_at_best(model, tokenizer, demo.options, demo.test)
        write_json(path, results)
    for objective, name in ARMS.items():
        if name not in results:
            results[name] = _train_arm(demo, objective, output)
            write_json(path, results)
    text = describe_demo(results, demo)
    write_file(output / TABLE_FILE, text)
    metrics = read_metrics(output / "kl" / METRICS_FILE)
    draw_figure(summaries(results), metrics, output / FIGURE_FILE)
    print(f"\n{text}\nmodels, metrics and figure: {output}")


def _train_arm(demo: Demo, objective: str, output: Path) -> dict[str, object]:
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
    print(f"meta-training, {ARMS[objective].removeprefix('after, ')}")
    train(model, tokenizer, demo.examples, options, output / objective, teacher)
    return measure(model, tokenizer, options.inner, demo.test)


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
    for name in ARMS.values():
        lines.append(f"{name}: {_shares(before, measured[name])}")
    samples = describe_samples(demo.test, results["before"], results[ARMS["kl"]])
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
