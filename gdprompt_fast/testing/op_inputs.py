"""Inputs of every pass of every op, of any size and dtype: what gates and timings run on.

``PASSES[op](draw, shape)`` returns the arguments of each pass of an op by the pass's name, as
``ops/eager/``, ``ops/cpp/`` and ``kernels/`` take them. A shape is a dict of sizes; which names an
op reads stands in its function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import visible_keys
from ..rows import GroupedRows

Shape = dict[str, int]
Passes = dict[str, tuple[Any, ...]]  # the arguments of every pass
Draw = Callable[..., Tensor]


def drawer(device: torch.device, dtype: torch.dtype) -> Draw:
    """``draw(*shape)``: a normal sample on the device."""
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return draw


LINEAR = ("groups", "rows", "inputs", "outputs", "context")
LORA = ("groups", "rows", "tokens", "inputs", "outputs")


def sizes(shape: Shape, names: tuple[str, ...]) -> list[int]:
    return [shape[name] for name in names]


def linear_passes(draw: Draw, shape: Shape) -> Passes:
    groups, rows, inputs, outputs, context = sizes(shape, LINEAR)
    x = draw(groups, rows, inputs)
    weight = draw(inputs, outputs).T if shape.get("transposed") else draw(outputs, inputs)
    bias = draw(outputs) if shape.get("bias") else None
    match, factor = draw(groups, rows, context), draw(groups, context, outputs)
    return {"updated_product": (x, weight, bias, match, factor)}


def lora_passes(draw: Draw, shape: Shape) -> Passes:
    """Every group has a weight of its own; rows that are no more than the groups have one each."""
    groups, rows, tokens, inputs, outputs = sizes(shape, LORA)
    weight = draw(inputs, outputs).T if shape.get("transposed") else draw(outputs, inputs)
    own = weight.float() + draw(groups, outputs, inputs).float()
    x, e = draw(rows, tokens, inputs), draw(rows, tokens, outputs)
    group = torch.arange(rows, device=x.device)
    grouped = GroupedRows(group if rows <= groups else group**2 % groups, groups)
    return {
        "lora_product": (x, weight, own, grouped),
        "lora_materialise": (own, e, x, grouped, -0.3),
    }


def norm_passes(draw: Draw, shape: Shape) -> Passes:
    """Every example has a weight of its own, as after an inner step."""
    eager = importlib.import_module("gdprompt_fast.ops.eager.norm")
    examples, tokens, hidden = shape["examples"], shape["tokens"], shape["hidden"]
    x, dy, u = (draw(examples, tokens, hidden) for _ in range(3))
    weight, v, w = (draw(examples, hidden) for _ in range(3))
    center = bool(shape.get("center"))
    bias = draw(examples, hidden) if center else None
    forward = (2 * x + 0.5, weight, bias, 1e-5, center)
    kept = (forward[0], weight, *eager.norm_forward(*forward)[1:])
    return {
        "norm_forward": forward,
        "norm_backward": (dy, None, draw(*x.shape) if shape.get("add") else None, center, *kept),
        "norm_double_backward": (u, v, w if center else None, dy, *kept),
    }


def swiglu_passes(draw: Draw, shape: Shape) -> Passes:
    size = shape["examples"], shape["tokens"], shape["hidden"]
    gate, up, dy, a, b = (draw(*size) for _ in range(5))
    return {
        "swiglu_forward": (gate, up),
        "swiglu_backward": (dy, gate, up, (draw(*size), draw(*size)) if shape.get("add") else None),
        "swiglu_double_backward": (a, b, dy, gate, up),
    }


def gelu_passes(draw: Draw, shape: Shape) -> Passes:
    x, dy, a = (draw(shape["examples"], shape["tokens"], shape["hidden"]) for _ in range(3))
    approximate = "tanh" if shape.get("tanh") else "none"
    return {
        "gelu_forward": (x, approximate),
        "gelu_backward": (dy, x, approximate),
        "gelu_double_backward": (a, dy, x, approximate),
    }


def rotary_passes(draw: Draw, shape: Shape) -> Passes:
    """q and k as a model has them: [B, T, H, D] in memory."""
    batch, tokens, dim = shape["batch"], shape["tokens"], shape["dim"]
    q, k = (draw(batch, tokens, shape[n], dim).transpose(1, 2) for n in ("heads", "kv_heads"))
    angle = draw(1, tokens, shape.get("rotated", dim))
    arguments = (q, k, angle.cos(), angle.sin())
    return {"rotary_forward": arguments, "rotary_backward": arguments}


def vocabulary_passes(draw: Draw, shape: Shape) -> Passes:
    """A tile in the middle of the vocabulary; of some rows the id is in it."""
    groups, rows, columns, hidden = (shape[n] for n in ("groups", "rows", "columns", "hidden"))
    z, teacher_z, b_bar = (3 * draw(groups, rows, columns) for _ in range(3))
    lse, teacher_lse, center, weight = (draw(groups, rows).float() for _ in range(4))
    lse, teacher_lse = lse + 10, teacher_lse + 10
    ids = torch.arange(groups * rows, device=z.device).view(groups, rows) * 2
    first: int | Tensor = rows
    if shape.get("own"):
        first = torch.arange(columns, device=z.device).expand(groups, columns)
    top, total = draw(groups, 2 * rows).float(), draw(groups, 2 * rows).float().exp()
    student, teacher = (top[:, :rows], total[:, :rows], center), (top, total, center)
    b, e_w = draw(groups, rows, columns), draw(groups, rows, hidden)
    return {
        "online_softmax": (z, ids, rows, z.dtype, *student),
        "online_kl": (z, teacher_z, z.dtype, *teacher),
        "accumulate_": (draw(groups, rows, hidden).float(), e_w, lse.sigmoid()),
        "softmax_minus_one_hot": (z, lse, z.dtype, ids, first),
        "softmax_difference": (z, lse, z.dtype, teacher_z, teacher_lse),
        "logit_cotangent": (b_bar, b, b.dtype, center, weight, ids, first),
    }


def attention_passes(draw: Draw, shape: Shape) -> Passes:
    """q, k and v as a model has them: [B, T, H, D] in memory."""
    eager = importlib.import_module("gdprompt_fast.ops.eager.attention")
    batch, tokens, dim = shape["batch"], shape["tokens"], shape["dim"]

    def draw_heads(heads: int) -> Tensor:
        return draw(batch, tokens, heads, dim).transpose(1, 2)

    q, cot_dq, dout = (draw_heads(shape["heads"]) for _ in range(3))
    k, v, cot_dk, cot_dv = (draw_heads(shape["kv_heads"]) for _ in range(4))
    segment_BT = None
    if segments := shape.get("segments"):
        segment_BT = (torch.arange(tokens, device=q.device) * segments // tokens).expand(batch, -1)
    options = dim**-0.5, visible_keys(q, shape.get("window"), segment_BT)
    forward = (q, k, v, *options)
    kept = (q, k, v, *eager.attention_forward(*forward), *options)
    dout = dout.transpose(1, 2)
    into = None
    if shape.get("add"):
        into = tuple(draw_heads(shape[heads]) for heads in ("heads", "kv_heads", "kv_heads"))
    return {
        "attention_forward": forward,
        "attention_backward": (dout, into, *kept),
        "attention_double_backward": (cot_dq, cot_dk, cot_dv, dout, *kept),
    }


PASSES: dict[str, Callable[[Draw, Shape], Passes]] = {
    "linear": linear_passes,
    "lora": lora_passes,
    "norm": norm_passes,
    "swiglu": swiglu_passes,
    "gelu": gelu_passes,
    "rotary": rotary_passes,
    "vocabulary": vocabulary_passes,
    "attention": attention_passes,  # last: it takes the longest to compile
}
PASS_NAMES = {
    op: tuple(f"{op}_{pass_}" for pass_ in ("forward", "backward", "double_backward"))
    for op in PASSES
}
PASS_NAMES |= {
    "linear": ("updated_product",),
    "lora": ("lora_product", "lora_materialise"),
    "rotary": ("rotary_forward", "rotary_backward"),  # the double backward is the forward
    "vocabulary": (
        "online_softmax",
        "online_kl",
        "accumulate_",
        "softmax_minus_one_hot",
        "softmax_difference",
        "logit_cotangent",
    ),
}
ATTENTION_PRODUCTS = {"forward": 2, "backward": 5, "double_backward": 12}  # the fewest there can be


def flops(op: str, pass_: str, shape: Shape) -> float | None:
    """Of the matrix products of a pass; None where memory traffic is the ceiling."""
    if op == "linear":
        per_row = shape["outputs"] * (shape["inputs"] + shape["context"])
        return 2.0 * shape["groups"] * shape["rows"] * per_row
    if op == "attention":
        # a query sees itself and those before in its segment
        pairs = shape["tokens"] * (shape["tokens"] / shape.get("segments", 1) + 1) / 2
        product = 2.0 * shape["batch"] * shape["heads"] * pairs * shape["dim"]
        return product * ATTENTION_PRODUCTS[pass_.removeprefix("attention_")]
    return None
