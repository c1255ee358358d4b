"""What is compiled of the kernels: every kernel as a launch at the shapes of Llama specialises it.

A case is a dict of name, kernel, signature (type strings, or tuples of them), constexprs,
num_warps, num_stages and, if any, aligned: names of the arguments that are multiples of 16, as
pointers always are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gdprompt_fast.kernels import gelu, lora, swiglu
from gdprompt_fast.kernels.elementwise import BLOCK, NUM_WARPS

Case = dict[str, Any]


def elementwise_case(kernel: Any, variant: str = "", **constants: Any) -> Case:
    """A kernel as ``elementwise.launch`` runs it in bf16."""
    constexprs = {"BLOCK": BLOCK, **constants}
    return {
        "name": kernel.fn.__name__.strip("_").removesuffix("_kernel") + variant,
        "kernel": kernel,
        "signature": {
            name: "*bf16" if name.endswith("_ptr") else "i32"
            for name in kernel.arg_names
            if name not in constexprs
        },
        "constexprs": constexprs,
        "aligned": ["n"],
        "num_warps": NUM_WARPS,
        "num_stages": 3,
    }


def swiglu_cases(_target: str) -> list[Case]:
    backward = swiglu._swiglu_backward_kernel
    return [
        elementwise_case(swiglu._swiglu_forward_kernel),
        elementwise_case(backward, ADD=False),
        elementwise_case(backward, " adding", ADD=True),
        elementwise_case(swiglu._swiglu_double_backward_kernel),
    ]


def gelu_cases(_target: str) -> list[Case]:
    """Both forms of every pass."""
    kernels = (
        gelu._gelu_forward_kernel,
        gelu._gelu_backward_kernel,
        gelu._gelu_double_backward_kernel,
    )
    return [
        elementwise_case(kernel, f" {form}", TANH=form == "tanh")
        for kernel in kernels
        for form in ("exact", "tanh")
    ]


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


# By the kernels' module. A module that is not here has a function ``compile_cases(target)`` itself.
CASES: dict[str, Callable[[str], list[Case]]] = {
    "gelu": gelu_cases,
    "lora": lora_cases,
    "swiglu": swiglu_cases,
}
