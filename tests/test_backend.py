"""The choice of a backend, and the whole step on Triton kernels under the interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdprompt_fast import MetaBatch, backend, fast_meta_step, reference_meta_step
from gdprompt_fast.reference.compare import gradients_of, without_upcasts, worst_error

Build = Callable[..., Any]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@needs_triton
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-conv1d-positions"])
def test_the_step_on_triton_equals_the_reference(
    name: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    options: dict[str, Any] = dict(inner_lr=0.05, inner_steps=steps)
    assert_triton_equals_the_reference(tiny_model(name), make_batch("uneven"), **options)


@needs_triton
def test_the_step_on_adapters_on_triton_equals_the_reference(
    lora_model: Build, make_batch: Build
) -> None:
    options: dict[str, Any] = dict(inner_lr=0.01, inner_steps=2, inner_params="lora")
    assert_triton_equals_the_reference(lora_model(rank=3), make_batch("uneven"), **options)


def assert_triton_equals_the_reference(
    model: torch.nn.Module, batch: MetaBatch, **options: Any
) -> None:
    """The gradients in fp32 on Triton err at most twice as much as on PyTorch."""
    options["objective"] = "gold"
    model = model.float()
    out, on_triton = gradients_of(fast_meta_step, model, batch, backend="triton", **options)
    assert out.backend == "triton"
    _, on_torch = gradients_of(fast_meta_step, model, batch, backend="torch", **options)
    model = model.double()
    with without_upcasts(model):
        _, exact = gradients_of(reference_meta_step, model, batch, **options)
    error, parameter = worst_error(on_triton, exact)
    plain, _ = worst_error(on_torch, exact)
    assert error <= 2 * plain + 1e-6, f"{parameter}: error {error:.1e}, of PyTorch {plain:.1e}"


@needs_triton
def test_every_op_with_a_kernel_runs_it(
    lora_model: Build, tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set()
    implementation = backend.implementation

    def spy(op: str, like: torch.Tensor) -> Any:
        module = implementation(op, like)
        used.add(module.__name__)
        return module

    modules = {op for op in backend.KERNELS if op != "vocabulary"}
    for module in modules | {"vocabulary.online", "vocabulary.state", "vocabulary.target"}:
        monkeypatch.setattr(f"gdprompt_fast.ops.{module}.implementation", spy)
    options: dict[str, Any] = dict(objective="gold", inner_params=lambda *_: True)
    for model in (lora_model("llama-tied"), tiny_model("gpt-neox")):
        fast_meta_step(model.float(), make_batch("uneven"), backend="triton", **options)
    assert used >= {f"gdprompt_fast.kernels.{op}" for op in backend.KERNELS}


def test_auto_is_pytorch_on_a_cpu(tiny_model: Build, make_batch: Build) -> None:
    assert fast_meta_step(tiny_model(), make_batch(), objective="gold").backend == "torch"
    assert backend.resolve_backend("auto", CPU) == "torch"


def test_triton_where_it_cannot_run_is_an_error(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r'backend: expected Triton and a GPU for "triton"'):
        fast_meta_step(tiny_model(), make_batch(), objective="gold", backend="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="no triton package"):
        backend.resolve_backend("triton", torch.device("cuda"))
    assert backend.resolve_backend("auto", torch.device("cuda")) == "torch"


def test_the_backend_is_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), backend.use_backend("torch"):
        raise KeyError
    assert backend._chosen == "auto"
