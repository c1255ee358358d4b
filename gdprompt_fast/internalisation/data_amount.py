"""How many entities does strong internalisation take?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import UserError
from ..report.findings import Finding
from ..report.outcome import Outcome
from .context import Context
from .material.subsets import TWO_TAGS
from .material.texts import TextRules
from .measured import STRONG, STRONG_CLAIM, Scores, label, more, one_model
from .preset import RunOptions
from .runs import Run, run_stage
from .varied import grows, varied

TITLE = "The number of entities"


@dataclass(frozen=True)
class Options(RunOptions):
    """The section ``[data-amount]``.

    Attributes:
        amounts: numbers of entities, from few to many.
    """

    amounts: tuple[int, ...] = (250, 500, 1000, 2000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.amounts or min(self.amounts) < 1:
            raise UserError(f"amounts: expected integers >= 1, got {list(self.amounts)}")


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    model, rows, findings = one_model(repetitions[0].preset, options), {}, list[Finding]()
    for amount in options.amounts:
        own = replace(options, entities=amount)
        its = Run(f"data-amount/{amount}", TextRules(TWO_TAGS), own, model)
        scores = Scores([run_stage(ctx, its) for ctx in repetitions])
        rows[f"{amount} entities"] = scores
        findings += more(STRONG_CLAIM, f"{label(model)}, {amount} entities", scores, STRONG)
    heads = list(rows)
    findings += grows("the difference grows", label(model), rows, heads[-1], heads[0])
    return varied(TITLE, rows, findings, [], ("entities", options.amounts))
