"""A step on many GPUs: the bytes that each holds, and those that it sends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from ..artifacts.markdown import markdown_table
from ..errors import UserError
from ..meta.gathered import _is_gathered as is_gathered
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
        gathered: those of the linear layers in blocks, which a sharded step gathers for a block at
            a time; of them ``gathered_trained`` are trained.
        blocks: the number of blocks.
    """

    trained: int
    frozen: int
    gathered: int
    gathered_trained: int
    blocks: int


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
    meta_step = _on_one(one.meta_step, *dividing)
    optimizer_step = _on_one(one.optimizer_step, *dividing) if one.optimizer_step else {}
    sent, work = communication(*dividing), flops(sizes, planned, examples)
    return ManyGPUs(gpus, sharding, examples, meta_step, optimizer_step, sent, work)


def sizes_of(config: PreTrainedConfig, planned: PlannedStep) -> Sizes:
    model = model_on_meta(config, planned)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    gathered = [
        module.weight
        for block in blocks
        for name, module in block.named_modules()
        if is_gathered(name, module)
    ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Sizes(
        trained,
        frozen,
        sum(weight.numel() for weight in gathered),
        sum(weight.numel() for weight in gathered if weight.requires_grad),
        len(blocks),
    )


def communication(sizes: Sizes, planned: PlannedStep, gpus: int, sharding: str) -> Communication:
    """What a GPU sends in a step.

    ``none`` sums the gradients, twice around the ring; ``optimizer`` once, and once the weights.
    ``full`` gathers a block in each of its passes: forward and inner backward of every inner step,
    forward and backward of the query, and, but for first order, double and last backward of every
    inner step. What these add to gradients is scattered by the last backward and by every double
    backward, which the query's products wait for.
    """
    around = (gpus - 1) / gpus
    if sharding == "none":
        return Communication(0, 0, 0.0, 2 * around * WIDE * sizes.trained)
    if sharding == "optimizer":
        half = around * WIDE * sizes.trained
        return Communication(0, 0, half, half)
    steps = planned.inner_steps
    gathers, scatters = 4 * steps + 2, steps + 1
    local = -(-planned.batch // gpus)
    parts = -(-local // planned.micro_batch) if planned.micro_batch else 1
    dtype = DTYPES[planned.dtype].itemsize
    frozen_dtype = dtype if planned.outer == "lora" else WIDE
    kept_frozen = sizes.frozen - (sizes.gathered - sizes.gathered_trained)
    kept_trained = sizes.trained - sizes.gathered_trained
    weights = parts * gathers * dtype * sizes.gathered
    weights += WIDE * kept_trained + frozen_dtype * kept_frozen
    gradients = WIDE * (parts * scatters * sizes.gathered_trained + kept_trained)
    return Communication(gathers, scatters, around * weights, around * gradients)


def flops(sizes: Sizes, planned: PlannedStep, examples: int) -> float:
    """Of a step's products with weights, on so many examples: twice 6 for each context token and
    weight, 6 for a query's; recomputation takes half as many again.
    """
    weights = sizes.trained + sizes.frozen
    steps = planned.inner_steps
    tokens = 12 * steps * planned.context + 6 * planned.query
    again = 1.5 if planned.recompute == "block" else 1.0
    return again * examples * tokens * weights


def _on_one(parts: Parts, sizes: Sizes, planned: PlannedStep, gpus: int, sharding: str) -> Parts:
    """The bytes of a GPU, of those of one that has everything."""
    if sharding == "none":
        return dict(parts)
    divided = dict(parts)
    divided[OPTIMIZER] = parts.get(OPTIMIZER, 0) // gpus
    slices = WIDE * sizes.trained // gpus
    if sharding == "optimizer":
        divided[WEIGHTS] = parts.get(WEIGHTS, 0) + slices
        divided[GRADIENTS] = parts.get(GRADIENTS, 0) + slices
        return divided
    dtype = DTYPES[planned.dtype].itemsize
    kept = sizes.trained + sizes.frozen - sizes.gathered
    kept_trained = sizes.trained - sizes.gathered_trained
    block, block_trained = (n // sizes.blocks for n in (sizes.gathered, sizes.gathered_trained))
    divided[WEIGHTS] = parts.get(WEIGHTS, 0) // gpus + WIDE * kept + dtype * block
    divided[GRADIENTS] = slices + WIDE * (kept_trained + block_trained)
    divided[CAST] = dtype * kept if parts.get(CAST) else 0
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
