"""Which implementation of an op runs: Triton on a GPU, C++ on a CPU, plain PyTorch anywhere."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..errors import UserError

BACKENDS = ("auto", "torch", "cpp", "triton")
# The ops that have one.
KERNELS = frozenset(
    {"attention", "gelu", "linear", "lora", "norm", "rotary", "swiglu", "vocabulary"}
)
# The ops in C++: those it is 1.3 times as fast as PyTorch on some shape of benchmarks/ops/cpp.py.
CPP = frozenset({"attention", "gelu", "norm", "rotary", "swiglu", "vocabulary"})
DTYPES = {
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cpp": (torch.float32, torch.float64, torch.bfloat16),
}
BUILD_CPP = "pip install 'setuptools>=77' && pip install --no-build-isolation -e ."

# A plain global: autograd runs the backward of GPU tensors in threads of its own.
_chosen = "auto"


def triton_runs(device: torch.device) -> bool:
    """Whether Triton is there and can run on the device: a GPU, or any under its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def load_cpp() -> bool:
    """Loads the C++ ops, if the installation built them; whether they are there.

    Raises:
        OSError: if they do not load, or are older than their sources in a checkout.
    """
    package = Path(__file__).parents[1]
    built = list(package.glob("_cpp*.so"))
    for library in built:
        for source in (package.parent / "csrc").glob("*"):
            if source.stat().st_mtime > library.stat().st_mtime:
                raise OSError(
                    f"{library} is older than {source}: build it again ({BUILD_CPP}), "
                    f'or choose backend="torch"'
                )
        try:
            torch.ops.load_library(library)
        except OSError as error:
            raise OSError(
                f'{library} does not load: build it again ({BUILD_CPP}), or choose backend="torch"'
            ) from error
    return bool(built)


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """ "torch", "cpp" or "triton" for a choice of the caller, to compute in ``dtype``.

    Raises:
        ValueError: for an unknown name, or "cpp" or "triton" where it cannot run or has no
            ``dtype``.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "triton" and not triton_runs(device):
        raise UserError(
            f'backend: expected Triton and a GPU for "triton", got device {device} '
            f"and {'a' if importlib.util.find_spec('triton') else 'no'} triton package"
        )
    if backend == "cpp" and not (device.type == "cpu" and load_cpp()):
        raise UserError(
            f'backend: expected a CPU and the C++ ops for "cpp", got device {device} and '
            f"{'' if load_cpp() else 'no '}C++ ops; they are built with {BUILD_CPP}"
        )
    if backend in DTYPES and not _has_dtype(backend, dtype):
        names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES[backend])
        raise UserError(
            f'backend: expected a step in one of {names} for "{backend}", got one in '
            f"{str(dtype).removeprefix('torch.')}"
        )
    if backend != "auto":
        return backend
    if device.type == "cuda" and triton_runs(device) and _has_dtype("triton", dtype):
        return "triton"
    return "cpp" if device.type == "cpu" and load_cpp() and _has_dtype("cpp", dtype) else "torch"


def _has_dtype(backend: str, dtype: torch.dtype | None) -> bool:
    return dtype is None or dtype in DTYPES[backend]


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Inside, ops run on ``backend``, "torch", "cpp" or "triton"."""
    global _chosen
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


def implementation(op: str, like: Tensor) -> ModuleType:
    """The module with the passes of ``op``: ``kernels.<op>``, ``ops.cpp.<op>`` or
    ``ops.eager.<op>``, of the same names.

    A tensor of a dtype that the backend does not have, such as an fp64 sum, takes the eager one.
    """
    if _chosen == "auto":
        return _passes(resolve_backend(_chosen, like.device), op, like.dtype)
    return _chosen_implementation(op, _chosen, like.device, like.dtype)


@functools.cache  # a step asks some 800 times
def _chosen_implementation(
    op: str, chosen: str, device: torch.device, dtype: torch.dtype
) -> ModuleType:
    return _passes(resolve_backend(chosen, device), op, dtype)


def _passes(backend: str, op: str, dtype: torch.dtype) -> ModuleType:
    if backend == "triton" and op in KERNELS and dtype in DTYPES[backend]:
        return importlib.import_module(f"gdprompt_fast.kernels.{op}")
    if backend == "cpp" and op in CPP and dtype in DTYPES[backend]:
        return importlib.import_module(f"gdprompt_fast.ops.cpp.{op}")
    return importlib.import_module(f"gdprompt_fast.ops.eager.{op}")
