"""Figure 2: the base model and the two kinds of meta-training, in three settings, on four tasks.

- BM: the base model, prepared (§4.3) but not meta-trained;
- LC: learning from conditioning, the KL to BM's own prompted predictions;
- LG: learning from gold responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config.fields import Config
from ..evaluation import SETTINGS
from ..report.cells import Cell
from ..report.findings import Finding, Named, close, kept, larger
from ..report.outcome import Outcome, PaperNumbers, Table
from . import paper
from .context import ExperimentContext
from .forgetting import text_tables
from .measure import EvalSpec, measure, measure_at_best
from .preset import METRICS, OBJECTIVES, Preset, check_choice
from .variants import Variant

TITLE = "Figure 2: No Context, Prompt and Fine-Tuning before and after meta-training"
MODELS = {"BM": "none", "LC": "kl", "LG": "gold"}
TRAINED = ("LC", "LG")
BEST = "BM, best inner rate"
FORWARD, REVERSED = "character-description", "reversal-curse"


@dataclass(frozen=True)
class Options(Config):
    """The section ``[figure2]``: the names of the tasks, and the objectives to train with."""

    tasks: tuple[str, ...]
    objectives: tuple[str, ...] = OBJECTIVES

    def __post_init__(self) -> None:
        super().__post_init__()
        for objective in self.objectives or [""]:
            check_choice("objectives", objective, OBJECTIVES)

    def models(self, task: str) -> dict[str, Variant]:
        """What is compared on a task, by name."""
        objectives = ("none", *self.objectives)
        named = {name: each for name, each in MODELS.items() if each in objectives}
        return {name: Variant(task, objective) for name, objective in named.items()}


def run(repetitions: Sequence[ExperimentContext], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    tasks = repetitions[0].preset.tasks
    tables, findings, notes = [], [], []
    measured = {}
    for task in options.tasks:
        for metric in tasks[task].metrics:
            rows, rates = _rows(repetitions, options.models(task), metric)
            title = f"{tasks[task].label}, {METRICS[metric]}"
            is_first = metric == tasks[task].metrics[0]
            tables.append(Table(title, list(SETTINGS.values()), rows, _paper(task, is_first)))
            if is_first:
                measured[task] = {name: cells[-1] for name, cells in rows.items() if cells[-1]}
                findings += _findings(repetitions, tasks[task].label, measured[task])
                findings += _prompt_kept(repetitions, tasks[task].label, rows)
                shown = ", ".join(f"{rate:g}" for rate in rates)
                notes.append(f"{tasks[task].label}: BM's best inner rate: {shown}.")
    findings += _reversed_is_harder(measured)
    columns = {tasks[task].label: options.models(task) for task in options.tasks}
    forgotten, about_it = text_tables(repetitions, columns, "BM")
    tables += forgotten
    findings += about_it
    notes.append(
        "BM: the base model; LC: meta-trained by KL to BM's own prompted predictions; LG: "
        "meta-trained on gold responses. Fine-Tuning is one inner step on the context at the rate "
        "of meta-training; of BM also at its best rate, chosen on the first test examples."
    )
    return Outcome(TITLE, tables, findings, notes)


def variants(preset: Preset, options: Options) -> list[Variant]:
    """All that it compares."""
    return [variant for task in options.tasks for variant in options.models(task).values()]


def _rows(
    repetitions: Sequence[ExperimentContext], models: Mapping[str, Variant], metric: str
) -> tuple[dict[str, list[Cell | None]], list[float]]:
    """For every model its cells in the three settings, and BM's best rates."""
    best, rates = measure_at_best(repetitions, EvalSpec(models["BM"]), metric)
    rows: dict[str, list[Cell | None]] = {"BM": [], BEST: [None, None, best]}
    for name, variant in models.items():
        asked = [EvalSpec(variant, setting) for setting in SETTINGS]
        rows[name] = [measure(repetitions, spec, metric) for spec in asked]
    return rows, rates


def _findings(
    repetitions: Sequence[ExperimentContext], label: str, fine_tuned: dict[str, Cell]
) -> list[Finding]:
    """What a task's Fine-Tuning cells say, by model."""
    before = max((fine_tuned["BM"], fine_tuned[BEST]), key=lambda cell: cell.mean)
    bm = Named("BM at its better rate", before)
    trained = [Named(name, fine_tuned[name]) for name in TRAINED if name in fine_tuned]
    claim = "Fine-Tuning is better after meta-training than before"
    margin = repetitions[0].preset.findings.margin
    findings = [larger(claim, label, after, bm) for after in trained]
    if len(trained) == len(TRAINED):
        lc, lg = trained
        findings.append(close("kl does as well as gold in Fine-Tuning", label, lc, lg, margin))
    return findings


def _prompt_kept(
    repetitions: Sequence[ExperimentContext], label: str, rows: dict[str, list[Cell | None]]
) -> list[Finding]:
    """Whether meta-training leaves the use of a prompt."""
    prompted = list(SETTINGS).index("prompt")
    before = rows["BM"][prompted]
    assert before is not None
    after = {name: rows[name][prompted] for name in TRAINED if name in rows}
    return [
        kept(
            "the use of a prompt is kept",
            f"{label}, {name}",
            Named(name, cell),
            Named("BM", before),
            repetitions[0].preset.findings.margin,
        )
        for name, cell in after.items()
        if cell is not None
    ]


def _reversed_is_harder(fine_tuned: dict[str, dict[str, Cell]]) -> list[Finding]:
    if not {FORWARD, REVERSED} <= fine_tuned.keys():
        return []
    return [
        larger(
            "the reversed direction is harder in Fine-Tuning",
            model,
            Named(FORWARD, fine_tuned[FORWARD][model]),
            Named(REVERSED, fine_tuned[REVERSED][model]),
            independent=True,
        )
        for model in TRAINED
        if model in fine_tuned[FORWARD]
    ]


def _paper(task: str, is_first: bool) -> PaperNumbers:
    if not is_first:
        return {}
    return {
        (model, SETTINGS[setting]): number
        for model, numbers in paper.FIGURE2.get(task, {}).items()
        for setting, number in numbers.items()
    }
