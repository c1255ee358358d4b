"""The choice of a backend; the whole step in C++, and on Triton kernels in the interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.meta.config import MetaStepConfig, check_step
from gdprompt_fast.ops import backend
from gdprompt_fast.reference.compare import gradients_of, without_upcasts, worst_error

Build = Callable[..., Any]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def modules_used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Fills with the names of the modules whose passes ops take."""
    used = set()
    implementation = backend.implementation

    def spy(op: str, like: torch.Tensor) -> Any:
        module = implementation(op, like)
        used.add(module.__name__)
        return module

    modules = {op for op in backend.KERNELS if op != "vocabulary"}
    for module in modules | {"vocabulary.online", "vocabulary.state", "vocabulary.target"}:
        monkeypatch.setattr(f"gdprompt_fast.ops.{module}.implementation", spy)
    return used


# By the test below that runs them. On a layer of two inner steps all passes of one step run too.
KERNELS_OF = {
    "llama-tied": {"attention", "linear", "norm", "rotary", "swiglu", "vocabulary"},
    "gpt2-conv1d-positions": {"attention", "gelu", "linear", "norm", "vocabulary"},
    "adapters": {"lora"},
}


def one_layer(model: Any) -> Any:
    """What the interpreter takes seconds for, once."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.ModuleList) and len(child) > 1:
                setattr(module, name, child[:1])
    model.config.num_hidden_layers = 1
    return model


def kernels_used(used: set[str]) -> set[str]:
    package = "gdprompt_fast.kernels."
    return {name.removeprefix(package) for name in used if name.startswith(package)}


def test_every_op_with_a_kernel_is_run_by_a_step_here() -> None:
    assert set.union(*KERNELS_OF.values()) == backend.KERNELS


@needs_triton
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-conv1d-positions"])
def test_the_step_on_triton_equals_the_reference(
    name: str, tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, model = modules_used(monkeypatch), tiny_model(name)
    if name != "llama-tied":
        model = one_layer(model)
    options: dict[str, Any] = dict(inner_lr=0.05, inner_steps=2)
    assert_triton_equals_the_reference(model, make_batch("uneven"), **options)
    assert kernels_used(used) == KERNELS_OF[name]


@needs_triton
def test_the_step_on_adapters_on_triton_equals_the_reference(
    lora_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, model = modules_used(monkeypatch), one_layer(lora_model(rank=3))
    options: dict[str, Any] = dict(inner_lr=0.01, inner_steps=2, inner_params="lora")
    assert_triton_equals_the_reference(model, make_batch("uneven"), **options)
    assert kernels_used(used) >= KERNELS_OF["adapters"]


@needs_triton
def test_the_recomputed_step_with_a_teacher_on_triton_equals_the_reference(
    tiny_model: Build, make_batch: Build
) -> None:
    model, batch = one_layer(tiny_model()), make_batch("uneven")
    tokens = int(batch.response_mask.sum())
    teacher = TeacherTargets(
        hidden=torch.randn(tokens, 32), head=0.3 * torch.randn(model.config.vocab_size, 32)
    )
    options: dict[str, Any] = dict(inner_lr=0.05, objective="kl", teacher=teacher)
    assert_triton_equals_the_reference(model, batch, recompute="block", **options)


def assert_triton_equals_the_reference(
    model: torch.nn.Module, batch: MetaBatch, **options: Any
) -> None:
    options = {"objective": "gold", **options}
    assert_at_most_twice_torch("triton", model.float(), batch, 1e-6, **options)


def assert_at_most_twice_torch(
    on: str, model: torch.nn.Module, batch: MetaBatch, floor: float, **options: Any
) -> None:
    """The gradients on a backend err at most twice as much as on PyTorch, plus a floor."""
    out, ours = gradients_of(fast_meta_step, model, batch, backend=on, **options)
    assert out.backend == on
    _, on_torch = gradients_of(fast_meta_step, model, batch, backend="torch", **options)
    model = model.double()
    with without_upcasts(model):
        _, exact = gradients_of(reference_meta_step, model, batch, **options)
    error, parameter = worst_error(ours, exact)
    plain, _ = worst_error(on_torch, exact)
    assert error <= 2 * plain + floor, f"{parameter}: error {error:.1e}, of PyTorch {plain:.1e}"


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("steps", [1, 2], ids=lambda s: f"{s}-steps")
@pytest.mark.parametrize(
    "name", ["llama-tied", "qwen3-head-norms", "mistral-sliding-window", "gpt2-conv1d-positions"]
)
def test_the_step_in_cpp_equals_the_reference(
    name: str, steps: int, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model(name), make_batch("uneven")
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.05, inner_steps=steps)
    out, got = gradients_of(fast_meta_step, model, batch, backend="cpp", **options)
    assert out.backend == "cpp"
    with without_upcasts(model):
        _, exact = gradients_of(reference_meta_step, model, batch, **options)
    error, parameter = worst_error(got, exact)
    assert error < 1e-9, f"{parameter}: error {error:.1e}"


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_step_in_cpp_errs_at_most_twice_as_much_as_in_pytorch(
    dtype: torch.dtype, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model("llama-tied", dtype), make_batch("grouped")
    options: dict[str, Any] = dict(objective="gold", inner_lr=0.05, lm_weight=0.2)
    floor = 1e-6 if dtype == torch.float32 else 1e-3
    assert_at_most_twice_torch("cpp", model, batch, floor, **options)


@pytest.mark.usefixtures("cpp")
def test_every_op_in_cpp_runs_in_the_step(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = modules_used(monkeypatch)
    for name in ("llama-tied", "gpt2-conv1d-positions"):
        fast_meta_step(tiny_model(name), make_batch("uneven"), objective="gold", backend="cpp")
    assert used >= {f"gdprompt_fast.ops.cpp.{op}" for op in backend.CPP}
    assert "gdprompt_fast.ops.eager.linear" in used, "an op without C++ runs in PyTorch"


def test_auto_is_pytorch_on_a_cpu_without_the_cpp_ops(tiny_model: Build, make_batch: Build) -> None:
    assert fast_meta_step(tiny_model(), make_batch(), objective="gold").backend == "torch"
    assert backend.resolve_backend("auto", CPU) == "torch"


@pytest.mark.usefixtures("cpp")
def test_auto_is_cpp_on_a_cpu_with_them(tiny_model: Build, make_batch: Build) -> None:
    assert fast_meta_step(tiny_model(), make_batch(), objective="gold").backend == "cpp"
    assert backend.resolve_backend("auto", torch.device("meta")) == "torch"
    half = torch.zeros(1, dtype=torch.float16)
    assert backend.implementation("norm", half).__name__ == "gdprompt_fast.ops.eager.norm"


def test_cpp_that_is_not_built_is_an_error_that_says_how(
    tiny_model: Build, make_batch: Build
) -> None:
    with pytest.raises(ValueError, match=r"no C\+\+ ops; .*pip install --no-build-isolation -e \."):
        fast_meta_step(tiny_model(), make_batch(), objective="gold", backend="cpp")


@pytest.mark.usefixtures("cpp")
def test_cpp_away_from_the_cpu_is_an_error() -> None:
    with pytest.raises(ValueError, match=r'expected a CPU .* for "cpp", got device meta'):
        backend.resolve_backend("cpp", torch.device("meta"))


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


@needs_triton
@pytest.mark.parametrize("chosen", ["triton", "cpp"])
def test_a_dtype_that_the_backend_does_not_have_is_an_error(
    chosen: str, tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "load_cpp", lambda: True)
    dtype, name = {
        "triton": (torch.float64, "float32, float16, bfloat16"),
        "cpp": (torch.float16, "float32, float64, bfloat16"),
    }[chosen]
    model, batch = tiny_model(dtype=dtype), make_batch()
    given = str(dtype).removeprefix("torch.")
    message = f'backend: expected a step in one of {name} for "{chosen}", got one in {given}'
    for step in (fast_meta_step, reference_meta_step):
        with pytest.raises(ValueError, match=message):
            step(model, batch, objective="gold", backend=chosen)
    assert all(parameter.grad is None for parameter in model.parameters())
    # The tensors of another dtype than the step's run without the backend.
    with backend.use_backend(chosen):
        passes = backend.implementation("norm", torch.zeros(1, dtype=dtype))
    assert passes.__name__ == "gdprompt_fast.ops.eager.norm"


@needs_triton
def test_auto_is_pytorch_for_a_dtype_that_the_backend_does_not_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "load_cpp", lambda: True)
    for device, without in (("cuda", torch.float64), ("cpu", torch.float16)):
        assert backend.resolve_backend("auto", torch.device(device), without) == "torch"
    assert backend.resolve_backend("auto", torch.device("cuda"), torch.float16) == "triton"
    assert backend.resolve_backend("auto", CPU, torch.float64) == "cpp"


def test_the_dtype_of_a_step_under_autocast_is_what_it_computes_in(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "load_cpp", lambda: True)
    model, batch = tiny_model(dtype=torch.float16), make_batch()
    assert check_backend(model, batch) == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert check_backend(model, batch) == "cpp"


def check_backend(model: torch.nn.Module, batch: MetaBatch) -> str:
    """The backend of ``"auto"``, of a step that does not run."""
    return check_step(model, batch, MetaStepConfig(objective="gold"), None, None)


def test_the_backend_is_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), backend.use_backend("torch"):
        raise KeyError
    assert backend._chosen == "auto"
