"""Are a definition's gradient and its questions' better aligned where the tag is reliable?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.stage import Result, Stage
from ..config.fields import check_counts
from ..errors import UserError
from ..models.memory import peak_bytes_over_model, wait_for
from ..report.findings import Finding
from ..report.outcome import Chart, Outcome, Table, Texts
from ..report.over_seeds import NamedSeeds, OverSeeds, estimate, larger_over_seeds
from .context import Context
from .gradients import alignment
from .material.subsets import ALIGNED, OF_NUMBERS, Defined, Material
from .material.texts import TextRules
from .measured import PAPER, STRONG, WEAK, head_of, seeds_in_words
from .preset import NUMBERS, Preset, SourceOptions, settings_of
from .sources import Source, check_source, source_of
from .train import TrainOptions, to_block, train

TITLE = "Alignment of definitions' and questions' gradients"
SETS = (*STRONG, *WEAK)
DISTANCE = "distance"
CLAIMS = {
    "cosine": "with tag 1 the gradients are better aligned",
    "inner_product": "with tag 1 the gradients' inner product is larger",
    DISTANCE: "with tag 1 the gradients are nearer to each other",
}
PAIRS = {"not trained on": STRONG, "trained on": WEAK}


@dataclass(frozen=True)
class Options(SourceOptions):
    """The section ``[alignment]``.

    Attributes:
        batches: texts an optimizer step, from few to many.
        epochs: of the first stage, of every one of them.
        every: epochs between measurements.
        definitions: measured of a set, the first ones.
        questions: the most of a definition.
        costs: definitions that time and memory are measured on; 0: they are not.
    """

    batches: tuple[int, ...] = (256, 1024, 4096, 16384)
    epochs: tuple[int, ...] = (20, 20, 50, 151)
    every: tuple[int, ...] = (2, 2, 5, 15)
    definitions: int = 100
    questions: int = 6
    costs: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "definitions", "questions")
        check_counts(self, "costs", least=0)
        lengths = {len(self.batches), len(self.epochs), len(self.every)}
        numbers = (*self.batches, *self.epochs, *self.every)
        if len(lengths) != 1 or not numbers or min(numbers) < 1:
            raise UserError(
                "batches: expected integers >= 1, as many as epochs and every, got "
                f"{list(self.batches)}, {list(self.epochs)} and {list(self.every)}"
            )


def check(preset: Preset, options: Options) -> None:
    """
    Raises:
        UserError: if the source is not there.
    """
    check_source(preset, options.source, options.lists, "first")


def _source(ctx: Context, options: Options) -> Source:
    fractions = OF_NUMBERS if options.source == NUMBERS else ALIGNED
    own = (options.lists, options.entities, options.pretrained)
    return source_of(ctx, options.source, TextRules(fractions), *own)


@dataclass(frozen=True)
class Measuring:
    """A model in training and how its gradients are compared."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train: TrainOptions
    options: Options

    def rows(self, defined: Defined) -> tuple[Tensor, Tensor]:
        """A definition and its held-out questions as the loss has them, ids and mask [1 + K, T].

        Where padding is predicted, it is also read by the padding after it, which in training reads
        the text alone.
        """
        asked = [prompt + answer for prompt, answer in defined.tested[: self.options.questions]]
        texts = [defined.definition, *asked]
        block = to_block(texts, self.tokenizer, self.train.block, self.train.padding_in_loss)
        mask = block.counted.clone()
        mask[:, 0] = True
        device = next(self.model.parameters()).device
        return block.ids.to(device), mask.to(device)

    def point(self, material: Material) -> dict[str, Any]:
        """By set, numbers of every definition, means over its questions."""
        found: dict[str, Any] = {}
        for name in SETS:
            chosen = material.defined[name][: self.options.definitions]
            measured = [alignment(self.model, *self.rows(each)) for each in chosen]
            found[name] = {
                "cosine": [_with_first(each.cosines) for each in measured],
                "inner_product": [_with_first(each.gram) for each in measured],
                "distance": [_with_first(each.distances) for each in measured],
                "squared_norm_of_definition": [float(m.squared_norms[0]) for m in measured],
                "squared_norm_of_questions": [float(m.squared_norms[1:].mean()) for m in measured],
            }
        return found


def _with_first(matrix: Tensor) -> float:
    """The mean of what the first text has with the others."""
    return float(matrix[0, 1:].mean())


def alignment_stage(ctx: Context, options: Options, index: int) -> Stage:
    """A first stage of training and what was measured along it."""
    source = _source(ctx, options)
    batch, epochs, every = (
        each[index] for each in (options.batches, options.epochs, options.every)
    )
    chosen = replace(
        source.training("first", {}), batch_size=batch, epochs=epochs, checkpoint_epochs=0
    )
    wanted = {
        **source.settings,
        "train": settings_of(chosen),
        "every": every,
        "definitions": options.definitions,
        "questions": options.questions,
    }

    def work(folder: Path) -> Result:
        model, tokenizer = source.new_model()
        material = source.material(0)
        block = to_block(material.stages[0], tokenizer, chosen.block, chosen.padding_in_loss)
        measuring = Measuring(model, tokenizer, chosen, options)
        points: list[dict[str, Any]] = []

        def watch(epoch: int) -> None:
            if epoch % every == 0 or epoch == epochs:
                points.append({"epoch": epoch, "sets": measuring.point(material)})

        losses = train(model, block, chosen, ctx.seed, watch=watch)
        return {"points": points, "losses": losses, "counts": {"texts": len(block.ids)}}

    return ctx.stage(f"alignment/{options.source}-{batch}", wanted, work)


def cost_stage(ctx: Context, options: Options) -> Stage:
    """Seconds and bytes over the model's own of the inner products of definitions and their
    questions, by dense gradients and from factors, and how far apart they are.
    """
    source = _source(ctx, options)
    wanted = {**source.settings, "definitions": options.costs, "questions": options.questions}

    def work(folder: Path) -> Result:
        model, tokenizer = source.new_model()
        measuring = Measuring(model, tokenizer, source.training("first", {}), options)
        defined = source.material(0).defined[WEAK[0]][: options.costs]
        rows = [measuring.rows(each) for each in defined]
        return costs(model, rows)

    return ctx.stage(f"alignment/{options.source}-cost", wanted, work)


def costs(model: nn.Module, rows: Sequence[tuple[Tensor, Tensor]]) -> Result:
    """By way, the mean seconds of a definition's inner products and the peak bytes over the model;
    the largest difference of the two ways, as a share of the largest product.

    Args:
        rows: ids and mask of every definition and its questions, as ``alignment`` takes them.
    """
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "dense": lambda ids, mask: dense_products(model, ids, mask),
        "factors": lambda ids, mask: alignment(model, ids, mask).gram[0],
    }
    result: Result = {"seconds": {}, "bytes": {}}
    products = {name: way(*rows[0]) for name, way in ways.items()}  # warms up, too
    for name, way in ways.items():
        wait_for(rows[0][0].device)
        start = time.perf_counter()
        for ids, mask in rows:
            way(ids, mask)
        wait_for(rows[0][0].device)
        result["seconds"][name] = (time.perf_counter() - start) / len(rows)
        result["bytes"][name] = peak_bytes_over_model(model, partial(way, *rows[0]))
    dense, factors = products.values()
    result["difference"] = float((dense - factors).abs().max() / dense.abs().max())
    result["parameters"] = sum(each.numel() for each in model.parameters())
    result["texts"] = [len(rows[0][0]), rows[0][0].shape[1]]
    return result


def dense_products(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """⟨g_0, g_j⟩ for all texts j, [G], with two dense gradients at a time."""
    parameters = list(model.parameters())

    def gradient(row: int) -> list[Tensor]:
        size = int(mask[row].sum())
        logits = model(input_ids=ids[row : row + 1, :size], use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, ids[row, 1:size])
        return list(torch.autograd.grad(loss, parameters))

    first = gradient(0)
    return torch.stack([_product(first, gradient(row)) for row in range(len(ids))])


def _product(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def _cells(stages: Sequence[Stage], at: int, number: str) -> dict[str, OverSeeds]:
    """A number of every set at a measurement, by set."""
    points = [stage.result["points"][at]["sets"] for stage in stages]
    return {name: OverSeeds(tuple(tuple(each[name][number]) for each in points)) for name in SETS}


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    by_batch = {
        batch: [alignment_stage(ctx, options, index) for ctx in repetitions]
        for index, batch in enumerate(options.batches)
    }
    tables, notes = [], []
    for number in CLAIMS:
        rows = {f"batch {batch}": _cells(stages, -1, number) for batch, stages in by_batch.items()}
        cells = {head: [of[name] for name in SETS] for head, of in rows.items()}
        title = f"{number.replace('_', ' ')} of a definition's and its questions' gradients"
        tables.append(
            Table(f"{title}, after the last epoch", [*map(head_of, SETS)], cells, unit=number)
        )
    findings: list[Finding] = []
    for batch, stages in by_batch.items():
        for words, pair in PAIRS.items():
            where = f"batch {batch}, definitions and questions {words}"
            findings += [_compared(stages, number, pair, where) for number in CLAIMS]
            notes.append(f"{where}, cosine: {seeds_in_words(_gaps(stages, -1, pair))}")
    findings += _by_batch(by_batch)
    if options.costs:
        costs, said = _costs(cost_stage(repetitions[0], options))
        notes.insert(0, said)
    charts = [_chart(words, pair, by_batch) for words, pair in PAIRS.items()]
    about = (
        "g is the gradient of a text's mean loss over all parameters. Padding is predicted where "
        "training predicts it; here, other than there, it is also read by the padding after it. "
        "Questions are held out; those of D5 and D6, and their definitions, are of the second "
        "stage, so not trained on at that point."
    )
    return Outcome(
        TITLE,
        tables,
        findings,
        [about, *notes],
        texts=[costs] if options.costs else (),
        charts=charts,
        paper=PAPER,
        over_seeds=True,
    )


def _compared(stages: Sequence[Stage], number: str, pair: tuple[str, str], where: str) -> Finding:
    """Whether a number after the last epoch is on the side that better alignment has it."""
    cells = _cells(stages, -1, number)
    named = [NamedSeeds(head_of(each), cells[each], share=False) for each in pair]
    if number == DISTANCE:
        named.reverse()
    return larger_over_seeds(CLAIMS[number], where, *named)


def _gaps(stages: Sequence[Stage], at: int, pair: tuple[str, str]) -> list[float]:
    cells = _cells(stages, at, "cosine")
    return cells[pair[0]].differences(cells[pair[1]])


def _by_batch(by_batch: dict[int, list[Stage]]) -> list[Finding]:
    """Whether the smallest batch aligns more than the largest."""
    small, large = min(by_batch), max(by_batch)
    if small == large:
        return []
    named = []
    for batch in (small, large):
        gaps = tuple((gap,) for gap in _gaps(by_batch[batch], -1, STRONG))
        named.append(NamedSeeds(f"difference at {batch}", OverSeeds(gaps), share=False))
    claim = "the difference of the cosines of tags 1 and 2 is larger at a small batch"
    return [larger_over_seeds(claim, "not trained on", *named)]


def _chart(words: str, pair: tuple[str, str], by_batch: dict[int, list[Stage]]) -> Chart:
    lines = {}
    for batch, stages in by_batch.items():
        epochs = [point["epoch"] for point in stages[0].result["points"]]
        lines[f"batch {batch}"] = [
            (float(epoch), estimate(_gaps(stages, at, pair))) for at, epoch in enumerate(epochs)
        ]
    return Chart(words, "epochs", f"cosine, {head_of(pair[0])} − {head_of(pair[1])}", lines)


def _costs(stage: Stage) -> tuple[Texts, str]:
    result = stage.result
    rows = [
        [name, f"{result['seconds'][name]:.3f}", f"{result['bytes'][name] / 1e6:.2f}"]
        for name in ("dense", "factors")
    ]
    texts, tokens = result["texts"]
    said = (
        f"Cost, on a model of {result['parameters']:,} parameters before training: a definition "
        f"with {texts - 1} questions of {tokens} tokens. Dense keeps two gradients at a time; the "
        f"two ways differ by {result['difference']:.1e} of the largest product."
    )
    columns = ("way", "seconds a definition", "peak over the model, MB")
    return Texts("What the inner products cost", columns, rows), said
