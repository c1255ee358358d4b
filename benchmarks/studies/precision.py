"""What half precision leaves of an inner step: a layer's output after it, in dual form and with the
weights rounded after the update, against fp64.

    python -m benchmarks.studies.precision     # seconds on a CPU; replaces results/precision.jsonl

The layer is a projection of a 2048-wide Llama at initialisation, its cotangents those of a mean
over 256 context tokens at a loss of order one. The error that counts is that of the output's
change, y' − y: what the inner step is there for. The whole output, rounded to bf16 as any
activation, hides it: that error is the same for both ways, and is shown beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdprompt_fast.ops.eager.linear import updated_product

from ..harness.rows import RESULTS, replace_rows
from ..report.tables import markdown

INNER_RATES = (1e-4, 1e-3, 1e-2)
WIDTH, CONTEXT, QUERY = 2048, 256, 32


def layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W [O, I], X and E of the context, and x of the query."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(WIDTH, WIDTH)
    x_context, x_query = torch.randn(1, CONTEXT, WIDTH), torch.randn(1, QUERY, WIDTH)
    e_context = torch.randn(1, CONTEXT, WIDTH) / (CONTEXT * WIDTH**0.5)
    return tuple(t.to(dtype) for t in (weight, x_context, e_context, x_query))  # type: ignore


def outputs(way: str, tensors: tuple[Tensor, ...], inner_lr: float) -> tuple[Tensor, Tensor]:
    """y' = x W'ᵀ in the layer's dtype, and its change y' − y before that is rounded; [1, T, O]."""
    weight, x_context, e_context, x_query = tensors
    if way == "rounded weights":
        update = e_context[0].double().T @ x_context[0].double()
        adapted = (weight.double() - inner_lr * update).to(weight.dtype)
        return x_query @ adapted.T, x_query.double() @ (adapted.double() - weight.double()).T
    match = (x_query @ x_context.transpose(1, 2)).mul_(-inner_lr)
    y = updated_product(x_query, weight, None, match, e_context)
    nothing = torch.zeros_like(weight)
    return y, updated_product(x_query, nothing, None, match, e_context).double()


def measure(dtype: torch.dtype, inner_lr: float) -> dict[str, Any]:
    tensors = layer(dtype)
    wide = tuple(t.double() for t in tensors)
    exact, change = outputs("dual form", wide, inner_lr)
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "inner_lr": inner_lr}
    row["relative_change_of_output"] = float(change.norm() / exact.norm())
    for way in ("dual form", "rounded weights"):
        y, change_of_y = outputs(way, tensors, inner_lr)
        name = way.replace(" ", "_")
        row[f"change_error_{name}"] = float((change_of_y - change).norm() / change.norm())
        row[f"output_error_{name}"] = float((y - exact).norm() / exact.norm())
    return row | {"torch": torch.__version__, "shape": [CONTEXT, QUERY, WIDTH]}


def main() -> None:
    rows = [measure(torch.bfloat16, inner_lr) for inner_lr in INNER_RATES]
    replace_rows(RESULTS / "precision.jsonl", rows)
    lines = []
    for row in rows:
        for way in ("dual form", "rounded weights"):
            change, whole = (
                row[f"{e}_error_{way.replace(' ', '_')}"] for e in ("change", "output")
            )
            lines.append((f"{row['inner_lr']:g}", way, f"{change:.1%}", f"{whole:.2%}"))
    header = ["η", "way", "error of the change of the output", "error of the whole output"]
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
