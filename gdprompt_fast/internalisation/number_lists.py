"""Lists of numbers, with a model from scratch: does it take pre-training?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..artifacts.stage import Result, Stage
from ..report.outcome import Outcome
from .context import Context
from .main import found
from .material.numbers import number_material
from .material.subsets import OF_NUMBERS
from .material.texts import TextRules
from .measured import PAPER, STRONG, WEAK, Scores, of_seeds, power_notes, table
from .preset import NUMBERS, Preset
from .scratch import NumberLists, new_model
from .sources import source_of
from .stages import staged_work

TITLE = "Lists of numbers, from scratch"
WHERE = "lists of numbers"
SECTION = "number-lists"


@dataclass(frozen=True)
class Options(NumberLists):
    """The section ``[number-lists]``."""


def check(preset: Preset, options: Options) -> None:
    """
    Raises:
        UserError: naming what is wrong in a part of the section.
    """
    _ = options.numbers, options.size, options.staged


def number_stage(ctx: Context, options: Options) -> Stage:
    """The run of a seed."""
    staged = options.staged
    source = source_of(ctx, NUMBERS, TextRules(OF_NUMBERS), SECTION)
    wanted = {
        "lists": asdict(options.numbers),
        "model": asdict(options.size),
        "fractions": OF_NUMBERS,
        "questions": options.questions,
        **staged.settings(),
    }

    def work(folder: Path) -> Result:
        parts = (source.new_model, source.material, staged, source.ask, ctx.seed)
        return staged_work(folder, *parts)

    return ctx.stage(SECTION, wanted, work)


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    scores = Scores([number_stage(ctx, options) for ctx in repetitions])
    numbers, size = options.numbers, options.size
    model = new_model(size, numbers, [number_material(numbers, OF_NUMBERS, 0, 0)], 0)[0]
    count = sum(each.numel() for each in model.parameters())
    about = [
        f"{numbers.variables} variables, each a number of 0 to {numbers.numbers - 1}; lists of "
        f"{numbers.length}. {size.layers} layers of width {size.width}, {count:,} parameters.",
        "The answers are true and false, so chance is 50 %.",
        f"{of_seeds(repetitions)}, and {options.stage2_seeds} of the second stage from each.",
    ]
    gaps = {"weak": scores.gap(WEAK), "strong": scores.gap(STRONG)}
    row = {"model from scratch": scores}
    tables = [
        table("Exact match after the first stage", WEAK, row),
        table("Exact match after the second stage", STRONG, row),
    ]
    return Outcome(
        TITLE,
        tables,
        found(WHERE, scores),
        [*about, *power_notes({f"{name} internalisation": gap for name, gap in gaps.items()})],
        paper=PAPER,
        over_seeds=True,
    )
