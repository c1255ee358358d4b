"""Activations, norms and rotary embeddings, as a launch at the shapes of Llama specialises them."""

from __future__ import annotations

from typing import Any

from gdprompt_fast.kernels import gelu, norm, norm_kernels, rotary, swiglu
from gdprompt_fast.kernels.elementwise import BLOCK, NUM_WARPS

from .case import Case


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


def norm_cases(_target: str) -> list[Case]:
    """Norms of heads and of Llama 1B and 8B, with a residual and without."""
    kernels = {
        "forward": norm_kernels.norm_forward_kernel,
        "backward": norm_kernels.norm_backward_kernel,
        "double_backward": norm_kernels.norm_double_backward_kernel,
    }
    cases = [_norm_case("sum_kernel", norm_kernels.sum_kernel, dict(norm.SUM_TILE), ())]
    for kind, D in (("rms", 128), ("rms", 2048), ("rms", 4096), ("layer", 4096)):
        for pass_, kernel in kernels.items():
            for add in (False, True) if kind == "rms" and pass_ != "double_backward" else (False,):
                absent: tuple[str, ...] = () if add else ("residual_ptr", "h_ptr", "dh_ptr")
                if kind == "rms":
                    absent += ("mean_ptr", "bias_ptr", "dbias_ptr", "w_ptr")
                constants = norm._constants(pass_, norm._launch(pass_, D), D)
                name = f"{'add_' * add}norm_{pass_} {kind} D={D}"
                if pass_ == "backward":  # what is added is a residual's, and the double backward's
                    constants["ADD"] = add
                cases.append(_norm_case(name, kernel, constants, absent))
    return cases


def _norm_case(name: str, kernel: Any, constants: dict[str, Any], absent: tuple[str, ...]) -> Case:
    fp32 = ("rstd", "mean", "dweight", "dbias", "cot_weight", "part")
    types = {f"{each}_ptr": "*fp32" for each in fp32} | {"eps": "fp32"}
    warps = constants.pop("num_warps")
    constants |= dict.fromkeys(absent)
    constexprs = {n: value for n, value in constants.items() if n in kernel.arg_names}
    signature = {
        n: types.get(n, "*bf16" if n.endswith("_ptr") else "i32")
        for n in kernel.arg_names
        if n not in constexprs
    }
    return {
        "name": name,
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "aligned": ["D", "weight_stride", "bias_stride", "v_stride", "w_stride"],
        "num_warps": warps,
        "num_stages": 3,
    }


def rotary_cases(_target: str) -> list[Case]:
    """Heads of Llama 1B and 8B and of Pythia."""
    cases = []
    for heads, kv_heads, dim, rotated in ((32, 8, 64, 64), (32, 8, 128, 128), (16, 16, 64, 16)):
        for adjoint in (False, True):
            constexprs = {"ADJOINT": adjoint, **rotary._tile(heads, kv_heads, dim, rotated)}
            warps = constexprs.pop("num_warps")
            signature: dict[str, Any] = {}
            for name in rotary._rotary_kernel.arg_names:
                if name.endswith("_strides"):
                    signature[name] = ("i32", "i32", "i32")
                elif name not in constexprs:
                    signature[name] = "*bf16" if name.endswith("_ptr") else "i32"
            pass_ = "backward" if adjoint else "forward"
            cases.append(
                {
                    "name": f"rotary_{pass_} D={dim} R={rotated}",
                    "kernel": rotary._rotary_kernel,
                    "signature": signature,
                    "constexprs": constexprs,
                    "aligned": [n for n in signature if n.endswith(("_strides", "_stride"))],
                    "num_warps": warps,
                    "num_stages": 3,
                }
            )
    return cases
