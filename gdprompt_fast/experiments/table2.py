"""Table 2: one θ' adapted to several contexts, by a step on all at once or one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.fields import Config, check_counts
from ..errors import UserError
from ..report.cells import Cell
from ..report.findings import Finding, Named, larger
from ..report.outcome import Outcome, PaperNumbers, Table
from . import paper
from .context import ExperimentContext
from .forgetting import text_tables
from .measure import EvalSpec, measure, measure_at_best
from .preset import METRICS, OBJECTIVES, Preset, check_choice
from .variants import Variant

TITLE = "Table 2: several contexts in one model, accuracy after Fine-Tuning"
METHODS = {False: "batched", True: "one after another"}
BASE, BEST = "BM", "BM, best inner rate"

Method = tuple[
    int, bool
]  # contexts that share a θ', and whether it is adapted to one after another


@dataclass(frozen=True)
class Options(Config):
    """The section ``[table2]``: the task, the objective, the numbers of contexts over 1, and the
    number of test examples to measure on, for contexts one after another take long; None: all.
    """

    task: str
    objective: str
    contexts: tuple[int, ...]
    examples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("objective", self.objective, OBJECTIVES)
        if not self.contexts or min(self.contexts) < 2:
            raise UserError(f"contexts: expected integers >= 2, got {list(self.contexts)}")
        if self.examples is not None:
            check_counts(self, "examples", least=max(self.contexts))


def check(preset: Preset, options: Options) -> None:
    """Raises a ValueError if a batch cannot be divided into groups of so many contexts."""
    for contexts in options.contexts:
        preset.train_options(options.task, contexts=contexts)


def run(repetitions: Sequence[ExperimentContext], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    task = repetitions[0].preset.tasks[options.task]
    methods = [(1, False), *((k, method) for k in options.contexts for method in METHODS)]
    trained = _models(options)
    tables, findings = [], []
    for metric in task.metrics:
        count = options.examples
        base = [_spec(Variant(options.task), method, count) for method in methods]
        rows = {
            BASE: [measure(repetitions, spec, metric) for spec in base],
            BEST: [measure_at_best(repetitions, spec, metric)[0] for spec in base],
        }
        for head, variant in trained.items():
            rows[head] = [
                measure(repetitions, _spec(variant, method, count), metric) for method in methods
            ]
        title = f"{task.label}, {METRICS[metric]}"
        is_first = metric == task.metrics[0]
        numbers = _paper(options) if is_first else {}
        tables.append(Table(title, [_head(method) for method in methods], rows, numbers))
        if is_first:
            by_method = {
                head: dict(zip(methods, cells, strict=True)) for head, cells in rows.items()
            }
            findings = _findings(by_method, methods[1:])
    columns = {task.label: {BASE: Variant(options.task), **trained}}
    forgotten, about_it = text_tables(repetitions, columns, BASE)
    notes = [
        "Test examples in a seeded order; as many neighbours as there are contexts share one θ' "
        "and are all asked of it, so standard errors are those of the means of such groups.",
        "The paper's numbers for several contexts are those of updates one after another.",
    ]
    return Outcome(TITLE, [*tables, *forgotten], [*findings, *about_it], notes)


def variants(preset: Preset, options: Options) -> list[Variant]:
    """All that it compares."""
    return [Variant(options.task), *_models(options).values()]


def _models(options: Options) -> dict[str, Variant]:
    """The meta-trained ones."""
    return {
        _trained_on(k): Variant(options.task, options.objective, contexts=k)
        for k in (1, *options.contexts)
    }


def _spec(variant: Variant, method: Method, count: int | None) -> EvalSpec:
    contexts, in_turn = method
    return EvalSpec(variant, count=count, contexts=contexts, one_after_another=in_turn)


def _findings(rows: dict[str, dict[Method, Cell]], methods: Sequence[Method]) -> list[Finding]:
    degrades = "a model trained on 1 context degrades with several"
    less = "training on as many contexts loses less"
    found = []
    single = rows[_trained_on(1)]
    for method in methods:
        at_one = Named(f"{_trained_on(1)}, {_head((1, False))}", single[1, False])
        at_many = Named(f"{_trained_on(1)}, {_head(method)}", single[method])
        several = Named(
            f"{_trained_on(method[0])}, {_head(method)}", rows[_trained_on(method[0])][method]
        )
        found += [
            larger(degrades, _head(method), at_one, at_many),
            larger(less, _head(method), several, at_many),
        ]
    return found


def _paper(options: Options) -> PaperNumbers:
    if options.task != paper.SQUAD:
        return {}
    return {
        **{(BASE, _head((k, k > 1))): number for k, number in paper.TABLE2_BASE.items()},
        **{(_trained_on(1), _head((k, k > 1))): n for k, n in paper.TABLE2_SINGLE.items()},
        **{(_trained_on(k), _head((k, True))): n for k, n in paper.TABLE2_MULTIPLE.items()},
    }


def _trained_on(contexts: int) -> str:
    return f"meta-trained on {contexts} context{'s' if contexts > 1 else ''}"


def _head(method: Method) -> str:
    contexts, one_after_another = method
    return "1 context" if contexts == 1 else f"{contexts} contexts, {METHODS[one_after_another]}"
