"""Which implementation of an op runs: Triton on a GPU, plain PyTorch anywhere."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
# The ops that have one.
KERNELS = frozenset(
    {"attention", "gelu", "linear", "lora", "norm", "rotary", "swiglu", "vocabulary"}
)

# A plain global: autograd runs the backward of GPU tensors in threads of its own.
_chosen = "auto"


def triton_runs(device: torch.device) -> bool:
    """Whether Triton is there and can run on the device: a GPU, or any under its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(backend: str, device: torch.device) -> str:
    """ "torch" or "triton" for a choice of the caller.

    Raises:
        ValueError: for an unknown name, or "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "triton" and not triton_runs(device):
        raise ValueError(
            f'backend: expected Triton and a GPU for "triton", got device {device} '
            f"and {'a' if importlib.util.find_spec('triton') else 'no'} triton package"
        )
    if backend == "auto":
        return "triton" if device.type == "cuda" and triton_runs(device) else "torch"
    return backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Inside, ops run on ``backend``, "torch" or "triton"."""
    global _chosen
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


def implementation(op: str, like: Tensor) -> ModuleType:
    """The module with the passes of ``op``: ``kernels.<op>`` or ``ops.eager.<op>``, of the same
    names.

    Kernels are for fp32, fp16 and bf16; fp64 is for proofs, and runs in PyTorch.
    """
    backend = resolve_backend(_chosen, like.device)
    if backend == "triton" and op in KERNELS and like.dtype != torch.float64:
        return importlib.import_module(f"gdprompt_fast.kernels.{op}")
    return importlib.import_module(f"gdprompt_fast.ops.eager.{op}")
