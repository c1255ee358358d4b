"""Attention to training tokens: do ICL and fine-tuned queries look at the same ones?

The parent paper's measure (Dai et al., arXiv 2212.10559). ICL: the raw attention scores of a point
on the demonstrations' tokens in the prompt, summed over heads. Fine-tuning, in its dual form: the
fine-tuned model's query vector there times the query vector of each token of the training texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..artifacts.stage import Result, Stage
from ..config.fields import Config, check_counts
from ..errors import UserError
from ..report.findings import Finding
from ..report.outcome import PERCENT, Outcome, Table
from . import paper
from .by_task import CONTROLS_NOTE, UNDEFINED, Measure, above, by_task, mean_of
from .context import IclContext
from .methods import FT, recorder_after
from .metrics import kendall_tau, recall_of_top
from .observing import POINTS, Batch, in_context, recorded_rows
from .prompts import Prompts
from .recording import record
from .similarities import CONTROLS, Row

TITLE = "ICL and fine-tuning: attention to training tokens"
VECTOR = "control: random map"
METHODS = {"FT": Row(FT), **CONTROLS}
MEASURES = {  # heads of tables, their units
    "tau": ("Kendall's τ of tokens", "τ"),
    "tokens": ("Recall of the top {tokens} tokens", PERCENT),
    "demonstrations": ("Recall of the top {demonstrations} demonstrations", PERCENT),
}


@dataclass(frozen=True)
class Options(Config):
    """The section ``[attention]``.

    Attributes:
        tasks: their names.
        examples: of the evaluation set.
        tokens, demonstrations: how many at the top are compared.
    """

    tasks: tuple[str, ...]
    examples: int = 100
    tokens: int = 100
    demonstrations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "tokens", "demonstrations")
        check_counts(self, "examples", least=2)


def check(repetitions: Sequence[IclContext], options: Options) -> None:
    """Raises a UserError if the prompts have no more tokens or demonstrations than are compared."""
    for ctx in repetitions:
        for task in options.tasks:
            _check_top(ctx.prompts(task), options)


def run(repetitions: Sequence[IclContext], options: Options) -> Outcome:
    """Measures; every seed is a repetition."""
    tables: list[Table] = []
    findings: list[Finding] = []
    for point, where in enumerate(POINTS):
        for measure, (title, unit) in MEASURES.items():
            rows = {head: _values(options, head, measure, point) for head in (VECTOR, *METHODS)}
            head = f"{title.format(**asdict(options))}, at the {where}"
            table = by_task(head, repetitions, options.tasks, rows, unit=unit)
            tables.append(table)
            claim = f"{title.format(**asdict(options))} is above a random map's, at the {where}"
            findings += above(claim, table, "FT", VECTOR)
            claim = f"{title.format(**asdict(options))} is above rate 0's, at the {where}"
            findings += above(claim, table, "FT", "control: FT at rate 0")
    notes = [
        "Softmax over all tokens of input and answer of the demonstrations in the prompt; means "
        "over layers and examples. FT's query vectors of training tokens are those of the model "
        "before fine-tuning; where positions are rotary, query vectors have them.",
        "The paper has no numbers of these; its parent, Dai et al. (arXiv 2212.10559), has some "
        "of other settings.",
        _chance(repetitions, options),
        UNDEFINED,
        CONTROLS_NOTE,
    ]
    return Outcome(TITLE, tables, findings, notes, paper=paper.PAPER)


def _chance(repetitions: Sequence[IclContext], options: Options) -> str:
    """A note: with few demonstrations much of the top is shared by chance."""
    fit = {len(ctx.prompts(task).spans) for ctx in repetitions for task in options.tasks}
    top = options.demonstrations
    shares = [f"{top / n:.1%} where a prompt has {n}" for n in sorted(fit)]
    return f"By chance the recall of the top {top} demonstrations is {', '.join(shares)}."


def _values(options: Options, head: str, measure: str, point: int) -> Measure:
    def values(ctx: IclContext, task: str) -> list[float]:
        row = METHODS.get(head, METHODS["FT"])
        stage = _stage(ctx, task, row, options)
        numbers = stage.result["random" if head == VECTOR else "method"][measure]
        return [each[point] for each in numbers]

    return mean_of(values)


def _stage(ctx: IclContext, task: str, row: Row, options: Options) -> Stage:
    count = min(options.examples, ctx.count(task, row != METHODS["FT"]))
    method = row.method(ctx, task)

    def work(folder: Path) -> Result:
        model, prompts = ctx.load(row.which), ctx.prompts(task)
        size = ctx.preset.evaluate.batch_size
        icl = _maps(in_context(model, prompts, count, size), _on_prompt(prompts))
        training = _training_queries(model, prompts)
        with recorder_after(method, model, prompts) as recorder:
            rows = recorded_rows(recorder, [prompts.bos], prompts, count, size, ctx.device)
            ft = _maps(rows, lambda batch: _dual(batch, training))
        generator = torch.Generator().manual_seed(ctx.seed)
        noise = {i: torch.rand(icl[i].shape, generator=generator) for i in range(count)}
        return {
            "examples": count,
            "method": _compared(icl, ft, prompts, options),
            "random": _compared(icl, noise, prompts, options),
        }

    wanted = {
        **ctx.task_settings(task),
        **{name: value for name, value in asdict(options).items() if name != "tasks"},
        "method": asdict(method),
        "examples": count,
    }
    return ctx.stage(f"attention/{task}/{row.which}/{row.kind}", wanted, work)


def _check_top(prompts: Prompts, options: Options) -> None:
    lengths = [end - start for start, end in prompts.spans]
    for name, there in (("tokens", sum(lengths)), ("demonstrations", len(lengths))):
        if getattr(options, name) >= there:
            raise UserError(
                f"attention: {name}: expected fewer than the {there} in the prompt, got "
                f"{getattr(options, name)}"
            )


def _on_prompt(prompts: Prompts) -> Callable[[Batch], Tensor]:
    """Scores on the demonstrations' tokens summed over heads, [B, P, L, C]."""
    columns = torch.cat([torch.arange(*span) for span in prompts.spans])
    return lambda batch: batch.recorded.scores.sum(-2)[..., columns]


def _training_queries(model: nn.Module, prompts: Prompts) -> Tensor:
    """Query vectors of the same tokens in their training texts, [C, L, H, D]."""
    device = next(model.parameters()).device
    found = []
    for text in prompts.texts[: len(prompts.spans)]:
        positions = torch.arange(1, len(text), device=device)[None]
        found.append(record(model, torch.tensor([text], device=device), positions).queries[0])
    return torch.cat(found)


def _dual(batch: Batch, training: Tensor) -> Tensor:
    """Query vectors times those of training tokens, all heads concatenated, [B, P, L, C]."""
    return torch.einsum("bplhd,clhd->bplc", batch.recorded.queries, training)


def _maps(batches: Iterator[Batch], of: Callable[[Batch], Tensor]) -> dict[int, Tensor]:
    """The attention on training tokens of every example, [P, L, C]."""
    found = {}
    for batch in batches:
        for index, each in zip(batch.indices, of(batch).double().softmax(-1).cpu(), strict=True):
            found[index] = each
    return found


def _compared(
    icl: dict[int, Tensor], ft: dict[int, Tensor], prompts: Prompts, options: Options
) -> dict[str, list[list[float]]]:
    """Means over layers, by measure a list of P numbers an example."""
    lengths = [end - start for start, end in prompts.spans]
    measured: dict[str, list[list[float]]] = {name: [] for name in MEASURES}
    for index in range(len(icl)):
        one, other = icl[index], ft[index]
        by_layer = [kendall_tau(one[:, each], other[:, each]) for each in range(one.shape[1])]
        measured["tau"].append(torch.stack(by_layer, 1).mean(1).tolist())
        recall = recall_of_top(one, other, options.tokens)
        measured["tokens"].append(recall.mean(1).tolist())
        recall = recall_of_top(
            _summed(one, lengths), _summed(other, lengths), options.demonstrations
        )
        measured["demonstrations"].append(recall.mean(1).tolist())
    return measured


def _summed(x: Tensor, lengths: list[int]) -> Tensor:
    """Tokens [..., C] summed by demonstration."""
    return torch.stack([part.sum(-1) for part in x.split(lengths, -1)], -1)
