"""In which order must tag (t), variable (v) and entity (e) stand in a definition?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..report.findings import Finding
from ..report.outcome import Outcome
from .context import Context
from .material.subsets import TWO_TAGS
from .material.texts import ORDERS, TextRules
from .measured import STRONG, STRONG_CLAIM, Scores, label, more, one_model
from .preset import RunOptions
from .runs import Run, run_stages
from .varied import vanishes, varied

TITLE = "The order of tag, variable and entity"


@dataclass(frozen=True)
class Options(RunOptions):
    """The section ``[word-order]``.

    Attributes:
        orders: those compared.
    """

    orders: tuple[str, ...] = ORDERS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.orders or not set(self.orders) <= set(ORDERS):
            raise UserError(f"orders: expected some of {ORDERS}, got {list(self.orders)}")


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    model = one_model(repetitions[0].preset, options)
    rows, findings = dict[str, Scores](), list[Finding]()
    for order in options.orders:
        its = Run(f"word-order/{order}", TextRules(TWO_TAGS, order), options, model)
        rows[order.upper()] = Scores(run_stages(repetitions, its, order))
    for head, scores in rows.items():
        where = f"{label(model)}, {head}"
        if head.endswith("V"):  # what a variable stands for is never predicted after it
            findings += vanishes("no strong internalisation, variable last", where, rows, head)
        else:
            findings += more(STRONG_CLAIM, where, scores, STRONG)
    return varied(
        TITLE, rows, findings, ["T: the tag, V: the variable, E: the entity of a definition."]
    )
