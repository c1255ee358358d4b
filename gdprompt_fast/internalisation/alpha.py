"""How reliable must a tag be? The share α of right definitions with tag 1, and wrong with tag 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..report.findings import Finding
from ..report.outcome import Outcome
from .context import Context
from .material.subsets import reliable
from .material.texts import SWAPPED, TextRules
from .measured import STRONG, STRONG_CLAIM, Scores, label, more, one_model
from .preset import RunOptions
from .runs import Run, run_stage
from .varied import grows, vanishes, varied

TITLE = "The reliability α of the tags"
NO_INFORMATION = 0.5
WRONG_ABOVE_RIGHT = 0.95  # from here on the paper has tag 1's wrong above tag 2's right definitions
WORD = "who"


@dataclass(frozen=True)
class Options(RunOptions):
    """The section ``[alpha]``.

    Attributes:
        alphas: the reliabilities, from low to high.
    """

    alphas: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alphas or not all(0 <= each <= 1 for each in self.alphas):
            raise UserError(f"alphas: expected shares between 0 and 1, got {list(self.alphas)}")


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    model = one_model(repetitions[0].preset, options)
    where, rows = label(model), dict[str, Scores]()
    for alpha in options.alphas:
        rules = TextRules(reliable(alpha))
        its = Run(f"alpha/{alpha:g}", rules, options, model)
        rows[f"α = {alpha:g}"] = Scores([run_stage(ctx, its) for ctx in repetitions])
    findings: list[Finding] = []
    for alpha, (head, scores) in zip(options.alphas, rows.items(), strict=True):
        if alpha == NO_INFORMATION:
            findings += vanishes("tags that say nothing make no difference", head, rows, head)
        else:
            findings += more(STRONG_CLAIM, head, scores, STRONG)
        if alpha >= WRONG_ABOVE_RIGHT:
            pair = (f"qd1incons{SWAPPED}:{WORD}", f"qd2consis:{WORD}")
            claim = "a wrong definition with tag 1 is learnt more than a right one with tag 2"
            findings += more(claim, head, scores, pair)
    heads = list(rows)
    findings += grows("the difference grows with α", where, rows, heads[-1], heads[0])
    about = (
        "Of the entities with questions, a share α of those with tag 1 has right definitions and "
        "the same share of those with tag 2 wrong ones; whether a definition is learnt is told by "
        f"“{WORD}” questions on the entity that it names."
    )
    return varied(TITLE, rows, findings, [about], ("α", options.alphas))
