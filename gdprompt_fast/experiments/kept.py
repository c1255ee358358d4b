"""What keeps the use of a prompt, and what keeps running text, while a model is meta-trained?

The paper's outer loss has a term λ L_LM(θ) on general text. Beside it stands the NLL of the
responses with the context in the prompt (``prompt_weight``). Each alone, both, and neither are
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.fields import Config, check_numbers
from ..evaluation import SETTINGS
from ..report.findings import Finding, Named, forgets_little, kept
from ..report.outcome import Outcome, Table
from .context import ExperimentContext
from .forgetting import measure_text, text_tables
from .measure import EvalSpec, measure
from .preset import METRICS, OBJECTIVES, Preset, check_choice
from .variants import Variant

TITLE = "What keeps the use of a prompt, and running text"
BASE = "BM"


@dataclass(frozen=True)
class Options(Config):
    """The section ``[kept]``: the task, the objective, and the two weights."""

    task: str
    objective: str
    prompt_weight: float
    text_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective", self.objective, OBJECTIVES)
        check_numbers(self, "prompt_weight", "text_weight", above_zero=True)


def check(preset: Preset, options: Options) -> None:
    """Raises a ValueError if there is no running text."""
    _ = preset.text_task


def run(repetitions: Sequence[ExperimentContext], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    preset, models = repetitions[0].preset, _models(options)
    task = preset.tasks[options.task]
    measured = {
        head: {
            setting: measure(repetitions, EvalSpec(variant, setting), task.metrics[0])
            for setting in SETTINGS
        }
        for head, variant in models.items()
    }
    title = f"{task.label}, {METRICS[task.metrics[0]]}"
    rows = {head: [of[setting] for setting in SETTINGS] for head, of in measured.items()}
    forgotten, _ = text_tables(repetitions, {task.label: models}, BASE)
    findings: list[Finding] = []
    texts = {head: Named(head, measure_text(repetitions, each)) for head, each in models.items()}
    for head, of in measured.items():
        if head == BASE:
            continue
        after, before = Named(head, of["prompt"]), Named(BASE, measured[BASE]["prompt"])
        margins = preset.findings
        findings.append(kept("the use of a prompt is kept", head, after, before, margins.margin))
        findings.append(forgets_little(head, texts[head], texts[BASE], margins.text_margin))
    notes = [
        f"Meta-training with the {options.objective} objective. Prompt: "
        f"{options.prompt_weight:g} times the NLL of the responses with the context in the prompt "
        f"is added to the outer loss; text: λ = {options.text_weight:g} times the NLL of running "
        "text that is not of the task."
    ]
    return Outcome(
        TITLE, [Table(title, list(SETTINGS.values()), rows), *forgotten], findings, notes
    )


def variants(preset: Preset, options: Options) -> list[Variant]:
    """All that it compares."""
    return list(_models(options).values())


def _models(options: Options) -> dict[str, Variant]:
    """By what is added to the outer loss."""

    def trained(prompt: float | None = None, text: float | None = None) -> Variant:
        return Variant(options.task, options.objective, prompt_weight=prompt, text_weight=text)

    prompt, text = options.prompt_weight, options.text_weight
    return {
        BASE: Variant(options.task),
        "nothing added": trained(),
        "prompt": trained(prompt=prompt),
        "text": trained(text=text),
        "prompt and text": trained(prompt, text),
    }
