"""The same metrics of a meta-trained model: does learning to simulate a prompt bring them nearer?

The task is the model's own: a passage, a question about it, an answer. ZSL is the question alone,
ICL passage and question in the prompt, FT the question after one step of all weights on the
passage. An answer counts by its first token: of the whole vocabulary the likeliest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..config.fields import Config, check_counts, check_numbers, from_section
from ..data import SOURCES
from ..errors import UserError
from ..report.cells import Cell
from ..report.findings import Finding
from ..report.outcome import Outcome, Table
from . import paper
from .by_task import COSINE, UNDEFINED, above
from .context import BASE, UNTRAINED, IclContext, load_once
from .meta_stages import Pair, Shown, folder_of, shown
from .methods import FT, RANDOM, RATE_0
from .metrics import RATIOS, ratio_cell
from .observing import POINTS
from .similarities import METRICS, SIM_AM, SIM_AOU, WHAT, rounding_note

TITLE = "ICL and fine-tuning of meta-trained models"
POINT_NAMES = ("first token of the answer", POINTS[1])
UNTRAINED_HEAD = "control: untrained model"


@dataclass(frozen=True)
class PairOptions(Config):
    """The section ``[meta-trained.pairs.NAME]``.

    Attributes:
        source: of the triples, as in ``gdprompt data``.
        file: of triples as JSONL, in the place of the source's own.
        base: the model before meta-training.
        meta_trained: models after it, by name.
        inner_lr: the rate that they were trained at.
        base_inner_lrs: further rates for the base model.
        examples: how many triples.
        control_examples: for the random update, rate 0 and the untrained model.
    """

    base: str
    meta_trained: dict[str, str]
    inner_lr: float
    examples: int
    source: str = "people"
    file: str | None = None
    base_inner_lrs: tuple[float, ...] = ()
    control_examples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "inner_lr", above_zero=True)
        check_counts(self, "examples", least=2)
        if self.control_examples is not None:
            check_counts(self, "control_examples", least=2)
        if self.source not in SOURCES:
            raise UserError(f"source: expected one of {sorted(SOURCES)}, got {self.source!r}")
        if not self.meta_trained:
            raise UserError("meta_trained: expected a model at least, got none")


@dataclass(frozen=True)
class Options(Config):
    """The section ``[meta-trained]``: models before and after meta-training, by a name."""

    pairs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pairs:
            raise UserError("pairs: expected a section [meta-trained.pairs.NAME], got none")
        for name in self.pairs:
            self.pair(name)

    def pair(self, name: str) -> PairOptions:
        """A pair's options, checked."""
        return from_section(PairOptions, self.pairs[name], f"pairs.{name}")


def check(repetitions: Sequence[IclContext], options: Options) -> None:
    """Raises a UserError if a model or a file is not there."""
    for name in options.pairs:
        its = options.pair(name)
        for model in (its.base, *its.meta_trained.values()):
            folder_of(model)
        if its.file is not None and not Path(its.file).is_file():
            raise UserError(f"pairs.{name}: file: expected a file of triples, got {its.file}")


@dataclass(frozen=True)
class _Row:
    """A model, and what is done to it."""

    model: str
    kind: str
    lr: float
    control: bool = False


def run(repetitions: Sequence[IclContext], options: Options) -> Outcome:
    """Measures; every seed is a repetition."""
    tables: list[Table] = []
    findings: list[Finding] = []
    for name in options.pairs:
        its = options.pair(name)
        of_pair = _Pair(name, its, repetitions)
        similar = [of_pair.similarities(point) for point in range(len(POINTS))]
        accuracy, changed = of_pair.accuracies(), of_pair.ratios()
        tables += [accuracy, *similar, changed]
        findings += of_pair.findings(similar, changed)
    notes = [
        "ZSL: the question alone; ICL: passage and question; FT: the question after one step of "
        "all weights on the passage. An answer is right if its likeliest first token is.",
        "What is measured at the first token of the answer has the right answer's first token "
        "appended, whichever the model would give.",
        WHAT,
        UNDEFINED,
        "Controls, on the base model: rate 0; a random update, in every weight as long as the "
        "step's at the trained rate; an untrained model of the same configuration with fresh "
        "weights.",
        *[_counts(name, options.pair(name)) for name in options.pairs],
        "The paper has no such models: no numbers of its stand here.",
        *rounding_note([_base_model(repetitions[0], options.pair(n)) for n in options.pairs]),
    ]
    return Outcome(TITLE, tables, findings, notes, paper=paper.PAPER)


def _counts(name: str, its: PairOptions) -> str:
    return (
        f"{name}: {its.examples} triples a seed, for controls the first "
        f"{its.control_examples or its.examples} of them."
    )


def _base_model(ctx: IclContext, its: PairOptions) -> nn.Module:
    return load_once(folder_of(its.base), ctx.preset.model.dtype, ctx.device, None)


@dataclass(frozen=True)
class _Pair:
    name: str
    options: PairOptions
    repetitions: Sequence[IclContext]

    def rows(self) -> dict[str, _Row]:
        """By head: the base model at all rates, meta-trained ones at theirs, controls."""
        its = self.options
        rates = dict.fromkeys((its.inner_lr, *its.base_inner_lrs))
        rows = {f"base, rate {lr:g}": _Row(BASE, FT, lr) for lr in rates}
        rows |= {f"meta-trained, {n}": _Row(n, FT, its.inner_lr) for n in its.meta_trained}
        return rows | {
            "control: random update": _Row(BASE, RANDOM, its.inner_lr, True),
            "control: rate 0": _Row(BASE, RATE_0, 0.0, True),
            UNTRAINED_HEAD: _Row(UNTRAINED, FT, its.inner_lr, True),
        }

    def shown(self, row: _Row) -> list[Shown]:
        """For every seed."""
        its = self.options
        folder = its.meta_trained.get(row.model, its.base)
        count = its.control_examples if row.control and its.control_examples else its.examples
        pair = Pair(self.name, folder, row.model, its.source, its.file, count)
        return [shown(ctx, pair, row.kind, row.lr) for ctx in self.repetitions]

    def accuracies(self) -> Table:
        columns = {
            "ZSL": lambda each: each.answers.zsl,
            "ICL": lambda each: each.answers.icl,
            "FT": lambda each: each.answers.ft,
        }
        rows: dict[str, list[Cell | None]] = {}
        for head, row in self.rows().items():
            of_seeds = self.shown(row)
            rows[head] = [
                Cell(tuple(_floats(of(each) == each.answers.gold) for each in of_seeds))
                for of in columns.values()
            ]
        return Table(f"{self.name}: first token right", list(columns), rows)

    def similarities(self, point: int) -> Table:
        """Columns of metrics; SimAM of ZSL beside that of FT."""
        heads = [SIM_AOU, "SimAM, ZSL", "SimAM, FT", *list(METRICS)[2:]]
        keys = ["sim_aou", "sim_am_zsl", "sim_am", "sim_am_delta"]
        rows: dict[str, list[Cell | None]] = {}
        for head, row in self.rows().items():
            of_seeds = self.shown(row)
            rows[head] = [
                Cell(tuple(_floats(each.at_points[key][:, point]) for each in of_seeds))
                for key in keys
            ]
        return Table(f"{self.name}: at the {POINT_NAMES[point]}", heads, rows, unit=COSINE)

    def ratios(self) -> Table:
        rows: dict[str, list[Cell | None]] = {}
        for head, row in self.rows().items():
            of_seeds = self.shown(row)
            rows[head] = [
                ratio_cell([of(each.answers) for each in of_seeds]) for of in RATIOS.values()
            ]
        return Table(f"{self.name}: first tokens changed by ICL and by FT", list(RATIOS), rows)

    def findings(self, similar: Sequence[Table], changed: Table) -> list[Finding]:
        """Whether a meta-trained model is above the base at each of its rates, and above what can
        do nothing.
        """
        found = []
        for name in self.options.meta_trained:
            for table, where in zip(similar, POINT_NAMES, strict=True):
                claim = f"{self.name}, {name}: FT is nearer to ICL than untrained, at the {where}"
                of = above(claim, table, f"meta-trained, {name}", UNTRAINED_HEAD)
                found += [each for each in of if each.where == SIM_AOU]
            for base in [head for head in self.rows() if head.startswith("base")]:
                for table, where in zip(similar, POINT_NAMES, strict=True):
                    claim = f"{self.name}, {name}: FT is nearer to ICL than {base}, at the {where}"
                    of = above(claim, table, f"meta-trained, {name}", base)
                    found += [each for each in of if each.where in (SIM_AOU, f"{SIM_AM}, FT")]
                claim = f"{self.name}, {name}: FT changes the same answers as ICL, more than {base}"
                of = above(claim, changed, f"meta-trained, {name}", base)
                found += [each for each in of if each.where == "Jaccard"]
        return found


def _floats(x: Any) -> tuple[float, ...]:
    return tuple(float(each) for each in x)
