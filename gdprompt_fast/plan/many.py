"""A step on many GPUs: the bytes that each holds, and those that it sends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from ..artifacts.markdown import markdown_table
from ..errors import UserError
from ..meta.gathered import is_block, units_of
from ..models.architecture import backbone_and_head
from .plan import size_text
from .prediction import CAST, GRADIENTS, OPTIMIZER, PARTS, WEIGHTS, model_on_meta, predict
from .step import DTYPES, PlannedStep
from .timeline import Parts

SHARDINGS = "none", "optimizer", "full"
WIDE = 4  # bytes of a gradient, and of a weight that is trained


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model's weights.

    Attributes:
        trained: those that are trained.
        frozen: those that are not.
        blocks: those of the linear layers in blocks, which a sharded step gathers for a block at a
            time.
        head, tables: those of the head and of the embeddings, gathered for their passes; of a tied
            one both have them all.
        largest: of the blocks, the head and the embeddings, each alone.
        kept: those of the rest, which a sharded step has throughout.
        base_trained: whether all but adapters are trained.
    """

    trained: int
    frozen: int
    blocks: int
    head: int
    tables: int
    largest: int
    kept: int
    base_trained: bool


@dataclass(frozen=True)
class Communication:
    """What a GPU sends in a step: (N − 1)/N of a tensor's bytes each time that goes round a ring.

    Attributes:
        gathers, scatters: passes of a block's weights and of its gradients, for a part of the
            batch; 0 where nothing of a block is gathered.
        weights: bytes of weights sent.
        gradients: bytes of gradients sent.
    """

    gathers: int
    scatters: int
    weights: float
    gradients: float

    @property
    def bytes(self) -> float:
        return self.weights + self.gradients


@dataclass(frozen=True)
class ManyGPUs:
    """A step divided among GPUs.

    Attributes:
        examples: of the batch, those of a GPU; at most so many.
        meta_step, optimizer_step: bytes of a GPU by part, at the peaks of one.
        sent: what a GPU sends.
        flops: of a GPU's share of the step, as in docs/distributed.md.
    """

    gpus: int
    sharding: str
    examples: int
    meta_step: Parts
    optimizer_step: Parts
    sent: Communication
    flops: float

    @property
    def peak_bytes(self) -> int:
        return max(sum(self.meta_step.values()), sum(self.optimizer_step.values()))


def plan_many(config: PreTrainedConfig, planned: PlannedStep, gpus: int, sharding: str) -> ManyGPUs:
    """Plans the step for so many GPUs.

    Raises:
        UserError: for weights that are sharded in a step that keeps the activations of blocks.
    """
    if sharding == "full" and planned.recompute != "block":
        raise UserError('recompute: expected "block" with sharding "full", got "none"')
    sizes, examples = sizes_of(config, planned), -(-planned.batch // gpus)
    one = predict(config, replace(planned, batch=examples))
    dividing = sizes, planned, gpus, sharding
    meta_step = _on_one(one.meta_step, *dividing, gathering=True)
    optimizer_step = _on_one(one.optimizer_step, *dividing) if one.optimizer_step else {}
    sent, work = communication(*dividing), flops(sizes, planned, examples)
    return ManyGPUs(gpus, sharding, examples, meta_step, optimizer_step, sent, work)


def sizes_of(config: PreTrainedConfig, planned: PlannedStep) -> Sizes:
    model = model_on_meta(config, planned)
    units, head = units_of(model), backbone_and_head(model)[1]
    numbers = {unit: sum(weight.numel() for weight in own) for unit, own in units.items()}
    alone = {id(weight): weight.numel() for own in units.values() for weight in own}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Sizes(
        trained,
        frozen,
        blocks=sum(number for unit, number in numbers.items() if is_block(unit)),
        head=numbers[head],
        tables=sum(n for unit, n in numbers.items() if not is_block(unit) and unit is not head),
        largest=max(numbers.values()),
        kept=trained + frozen - sum(alone.values()),
        base_trained=head.weight.requires_grad,
    )


def communication(sizes: Sizes, planned: PlannedStep, gpus: int, sharding: str) -> Communication:
    """What a GPU sends in a step.

    ``none`` sums the gradients, twice around the ring; ``optimizer`` once, and once the weights.
    ``full`` gathers a block in each of its passes: forward and inner backward of every inner step,
    forward and backward of the query, and double and last backward of every inner step; embeddings
    in every forward; the head in forward, inner backward and last backward of every inner step, and
    with the query. What these passes add to gradients is scattered by the last of them: of a block
    also by every double backward, which the query's products wait for, as those at the head do for
    the inner step, if that moves it.
    """
    around = (gpus - 1) / gpus
    if sharding == "none":
        return Communication(0, 0, 0.0, 2 * around * WIDE * sizes.trained)
    if sharding == "optimizer":
        half = around * WIDE * sizes.trained
        return Communication(0, 0, half, half)
    steps, response = planned.inner_steps, int(planned.inner != "full")
    gathers, scatters = 4 * steps + 2, steps + 1
    local = -(-planned.batch // gpus)
    parts = -(-local // planned.micro_batch) if planned.micro_batch else 1
    gathered = gathers * sizes.blocks + scatters * sizes.tables
    gathered += (3 * steps + 1 + response) * sizes.head
    scattered = scatters * (sizes.blocks + sizes.tables) + (steps + response) * sizes.head
    weights = parts * DTYPES[planned.dtype].itemsize * gathered
    weights += _kept_bytes(sizes, planned)
    gradients = parts * scattered + sizes.kept if sizes.base_trained else sizes.trained
    return Communication(gathers, scatters, around * weights, around * WIDE * gradients)


def _kept_bytes(sizes: Sizes, planned: PlannedStep) -> int:
    """Of the weights that a sharded step has throughout."""
    if sizes.base_trained:
        return WIDE * sizes.kept
    frozen = sizes.kept - sizes.trained
    return WIDE * sizes.trained + DTYPES[planned.dtype].itemsize * frozen


def flops(sizes: Sizes, planned: PlannedStep, examples: int) -> float:
    """Of a step's products with weights, on so many examples: twice 6 for each context token and
    weight, 6 for a query's; recomputation takes half as many again.
    """
    weights = sizes.trained + sizes.frozen
    steps = planned.inner_steps
    tokens = 12 * steps * planned.context + 6 * planned.query
    again = 1.5 if planned.recompute == "block" else 1.0
    return again * examples * tokens * weights


def _on_one(
    parts: Parts,
    sizes: Sizes,
    planned: PlannedStep,
    gpus: int,
    sharding: str,
    gathering: bool = False,
) -> Parts:
    """The bytes of a GPU, of those of one that has everything.

    Args:
        gathering: in a step, which gathers sharded weights.
    """
    if sharding == "none":
        return dict(parts)
    divided = dict(parts)
    divided[OPTIMIZER] = parts.get(OPTIMIZER, 0) // gpus
    slices = WIDE * sizes.trained // gpus
    if sharding == "optimizer":
        divided[WEIGHTS] = parts.get(WEIGHTS, 0) + slices
        divided[GRADIENTS] = parts.get(GRADIENTS, 0) + slices
        return divided
    divided[WEIGHTS] = parts.get(WEIGHTS, 0) // gpus
    divided[GRADIENTS] = slices
    if not gathering:
        return divided
    divided[WEIGHTS] += _kept_bytes(sizes, planned)
    divided[WEIGHTS] += DTYPES[planned.dtype].itemsize * sizes.largest
    largest = sizes.largest + sizes.largest // gpus  # and its part of the sum, to be added
    divided[GRADIENTS] += WIDE * (sizes.kept + largest if sizes.base_trained else sizes.trained)
    divided[CAST] = DTYPES[planned.dtype].itemsize * sizes.kept if parts.get(CAST) else 0
    return divided


def many_table(many: ManyGPUs) -> str:
    """The plan in words and a Markdown table."""
    rows = [["of each GPU, at the peak of", "the meta step", "the optimizer's step"]]
    halves = many.meta_step, many.optimizer_step
    for part in PARTS:
        rows.append([part, *(size_text(half.get(part, 0)) for half in halves)])
    rows.append(["**all**", *(size_text(sum(half.values())) for half in halves)])
    sent = many.sent
    gathered = f", {sent.gathers} gathers of every block" if sent.gathers else ""
    return "\n".join(
        [
            f"{many.gpus} GPUs, sharding {many.sharding}: at most {many.examples} examples on each",
            "",
            markdown_table(rows),
            "",
            f"Each sends {size_text(sent.bytes)} a step: {size_text(sent.gradients)} of gradients, "
            f"{size_text(sent.weights)} of weights{gathered}.",
        ]
    )


def many_json(many: ManyGPUs) -> dict[str, Any]:
    """The numbers, in bytes."""
    return {
        "gpus": many.gpus,
        "sharding": many.sharding,
        "examples_a_gpu": many.examples,
        "peak_bytes": many.peak_bytes,
        "meta_step": many.meta_step,
        "optimizer_step": many.optimizer_step,
        "sent_bytes": {"weights": many.sent.weights, "gradients": many.sent.gradients},
        "flops": many.flops,
    }
