"""Does strong internalisation shrink with the batch, and vanish where it has all texts?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import UserError
from ..report.findings import Finding
from ..report.outcome import Outcome
from .context import Context
from .material.subsets import TWO_TAGS
from .material.texts import ATTRIBUTION, TextRules
from .measured import STRONG, STRONG_CLAIM, Scores, label, more, one_model
from .preset import Preset, RunOptions
from .runs import Run, run_stage
from .sources import check_source
from .varied import grows, vanishes, varied

TITLE = "The batch size"


@dataclass(frozen=True)
class Options(RunOptions):
    """The section ``[batch-size]``.

    Attributes:
        batches: texts an optimizer step, from few to many; as many as there are, or more, are all.
        epochs: of every one of them.
    """

    batches: tuple[int, ...] = (16, 256, 4096, 32768)
    epochs: tuple[int, ...] = (30, 60, 60, 240)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batches or min(self.batches) < 1 or len(self.batches) != len(self.epochs):
            raise UserError(
                "batches: expected integers >= 1, as many as epochs, got "
                f"{list(self.batches)} and {list(self.epochs)}"
            )


def check(preset: Preset, options: Options) -> None:
    """
    Raises:
        UserError: if the source is not there, or joint training is not said.
    """
    check_source(preset, options.source, options.lists, "joint")


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    model, rows, findings = one_model(repetitions[0].preset, options), dict[str, Scores](), []
    whole = set()
    for batch, epochs in zip(options.batches, options.epochs, strict=True):
        own = replace(options, joint={**options.joint, "batch_size": batch, "epochs": epochs})
        its = Run(f"batch-size/{batch}", TextRules(TWO_TAGS), own, model, joint=True)
        stages = [run_stage(ctx, its) for ctx in repetitions]
        rows[f"{batch} texts"] = Scores(stages, joint=True)
        if batch >= stages[0].result["counts"]["first"]:
            whole.add(f"{batch} texts")
    for head, scores in rows.items():
        if head in whole:
            findings += _vanish(label(model), rows, head)
        else:
            findings += more(STRONG_CLAIM, f"{label(model)}, {head}", scores, STRONG)
    heads = list(rows)
    claim = "the difference shrinks as the batch grows"
    findings += grows(claim, label(model), rows, heads[0], heads[-1])
    about = "All texts in one stage, as the stored configurations have it; the rate is the same."
    return varied(TITLE, rows, findings, [about], ("texts an optimizer step", options.batches))


def _vanish(where: str, rows: dict[str, Scores], head: str) -> list[Finding]:
    """No strong internalisation, on questions and, where they are asked, on entities."""
    claim = "no strong internalisation where a batch has all texts"
    findings = vanishes(claim, where, rows, head)
    for word in ATTRIBUTION:
        pair = (f"{STRONG[0]}:{word}", f"{STRONG[1]}:{word}")
        findings += vanishes(claim, f"{where}, “{word}”", rows, head, pair)
    return findings
