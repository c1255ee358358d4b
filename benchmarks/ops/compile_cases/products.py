"""The fused inner update of a linear layer, and adapters."""

from __future__ import annotations

from typing import Any

from gdprompt_fast.kernels import linear, lora
from gdprompt_fast.kernels.linear_tiles import HOPPER, POINTERS, POINTERS_FP32, Tiles

from .case import Case


def linear_cases(target: str) -> list[Case]:
    """A layer of Llama 3.2 1B in bf16 and fp32; on
    Hopper with every row of its table, forward and backward.
    """
    cases = [
        _linear_case("updated_product bf16", "bf16", POINTERS),
        _linear_case("updated_product fp32", "fp32", POINTERS_FP32),
    ]
    cases.append(
        dict(
            name="sum_parts bf16",
            kernel=linear._sum_parts_kernel,
            signature=dict(parts_ptr="*fp32", b_ptr="*bf16", y_ptr="*bf16", ROWS="i32", O="i32"),
            constexprs=dict(HAS_BIAS=True, SPLIT=4, BLOCK=linear.SUM_BLOCK),
            aligned=["O"],
            num_warps=4,
            num_stages=3,
        )
    )
    if target == "sm_90":
        for tiles in sorted({tiles for tiles in HOPPER.values() if tiles}):
            for way in ("OI", "IO"):
                sizes = f"{tiles.rows}x{tiles.outputs}x{tiles.inputs}/{tiles.context}"
                name = f"updated_product bf16 {sizes} {way}"
                cases.append(_linear_case(name, "bf16", tiles, transposed=way == "IO"))
    return cases


def _linear_case(name: str, dtype: str, tiles: Tiles, transposed: bool = False) -> Case:
    sizes = ("ROWS", "M", "I", "O", "S", "stride_w")
    weight = (tiles.inputs, tiles.outputs) if transposed else (tiles.outputs, tiles.inputs)
    blocks = dict(
        x=(tiles.rows, tiles.inputs),
        w=weight,
        a=(tiles.update_rows, tiles.context),
        e=(tiles.context, tiles.outputs),
    )
    operands = {
        name: f"tensordesc<{dtype}[1, {r}, {c}]>" if tiles.tma else f"*{dtype}"
        for name, (r, c) in blocks.items()
    }
    return dict(
        name=name,
        kernel=linear._updated_product_kernel,
        signature={
            **operands,
            "b_ptr": f"*{dtype}",
            "y_ptr": "*fp32" if tiles.split > 1 else f"*{dtype}",
            **dict.fromkeys(sizes, "i32"),
        },
        constexprs=dict(
            HAS_BIAS=False,
            TRANSPOSED=transposed,
            TMA=tiles.tma,
            **tiles.constexprs(),
        ),
        aligned=[size for size in sizes if size not in ("ROWS", "M")],
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def lora_cases(_target: str) -> list[Case]:
    """The adapter of Llama 3.2 1B's up-projection, A [r, 2048], B [8192, r], in bf16 and fp32."""
    cases = []
    for rank in (1, 16):
        for matrix, I, O in ((f"A rank {rank}", 2048, rank), (f"B rank {rank}", rank, 8192)):
            for dtype in ("bf16", "fp32"):
                for kernel, blocks in (
                    (lora._lora_product_kernel, lora._product_blocks(256, I, O)),
                    (lora._lora_materialise_kernel, lora._materialise_blocks(I, O)),
                ):
                    cases.append(_lora_case(kernel, matrix, I, O, dtype, blocks))
    return cases


def _lora_case(
    kernel: Any, matrix: str, I: int, O: int, dtype: str, blocks: dict[str, int]
) -> Case:
    types = dict.fromkeys(("x_ptr", "w_ptr", "e_ptr", "y_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("own_ptr", "after_ptr"), "*fp32")
    types |= dict.fromkeys(("group_ptr", "order_ptr", "offset_ptr"), "*i64") | {"scale": "fp32"}
    # as in a launch: integers of 1 are constants, and fp32 needs no W
    sizes = dict(I=I, O=O, stride_wo=I, stride_wi=1, stride_g=I * O, stride_o=I, stride_i=1)
    constexprs: dict[str, Any] = blocks | {name: 1 for name, size in sizes.items() if size == 1}
    if dtype == "fp32":
        constexprs["w_ptr"] = None
    names = kernel.arg_names
    return {
        "name": f"{kernel.fn.__name__.strip('_').removesuffix('_kernel')} {matrix} {dtype}",
        "kernel": kernel,
        "signature": {n: types.get(n, "i32") for n in names if n not in constexprs},
        "constexprs": {n: value for n, value in constexprs.items() if n in names},
        "aligned": [n for n, size in sizes.items() if size % 16 == 0 and n in names],
        **lora.LAUNCH,
    }
