"""The Triton attention in the interpreter: every pass against fp64, next to PyTorch's error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

pytest.importorskip("triton", reason="Triton is an optional dependency")

from gdprompt_fast import backend
from gdprompt_fast.kernels import attention as kernels
from gdprompt_fast.ops.attention import attention
from gdprompt_fast.ops.eager import attention as eager

PASSES = ("attention_forward", "attention_backward", "attention_double_backward")
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# batch, heads, key/value heads, tokens, head dim, window, dtype, (queries, keys) of a tile
CASES = {
    "one token": (2, 2, 1, 1, 16, None, FP32, (16, 16)),
    "one token in bf16": (1, 2, 2, 1, 64, 1, BF16, (16, 16)),
    "17 tokens, one to each window": (1, 2, 1, 17, 16, 1, FP32, (16, 16)),
    "17 tokens, head dim 20": (2, 4, 2, 17, 20, None, FP32, (16, 16)),
    "17 tokens, head dim 20, in bf16": (1, 3, 1, 17, 20, 5, BF16, (16, 16)),
    "17 tokens in fp16": (1, 2, 1, 17, 16, None, FP16, (16, 16)),
    "37 tokens, 4 heads on 2": (1, 4, 2, 37, 16, None, FP32, (16, 16)),
    "37 tokens, 4 heads on 2, in bf16": (1, 4, 2, 37, 16, None, BF16, (16, 16)),
    "37 tokens, 3 heads on 1, window 5": (1, 3, 1, 37, 16, 5, FP32, (16, 32)),
    "37 tokens, 3 heads on 1, window 5, in bf16": (1, 3, 1, 37, 16, 5, BF16, (32, 16)),
    "37 tokens, window 1, in bf16": (2, 2, 2, 37, 16, 1, BF16, (16, 32)),
    "37 tokens, wide query tiles": (1, 2, 1, 37, 16, None, FP32, (32, 16)),
    "37 tokens, wide key tiles": (1, 2, 1, 37, 16, None, FP32, (16, 32)),
    "the window as long as the text": (1, 2, 1, 17, 16, 17, FP32, (16, 16)),
    "the window one short of the text": (1, 2, 1, 17, 16, 16, FP32, (16, 16)),
    "the tiles of a GPU": (1, 2, 1, 67, 64, None, FP32, None),
    "the tiles of a GPU in bf16": (1, 2, 1, 131, 64, None, BF16, None),
    "the tiles of a GPU, head dim 80, window 40, in bf16": (1, 1, 1, 131, 80, 40, BF16, None),
}


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors hold NaN: an element that no kernel writes shows."""
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        empty = getattr(owner, name)

        def poisoned(*args: Any, empty: Any = empty, **options: Any) -> Tensor:
            return empty(*args, **options).fill_(float("nan"))

        monkeypatch.setattr(owner, name, poisoned)


def inputs(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """q, k and v as transposed views, dout contiguous, cotangents in three layouts."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "cot_dq": draw(batch, heads, tokens, dim),
        "cot_dk": draw(batch, tokens, kv_heads, dim).transpose(1, 2),
        "cot_dv": draw(batch, kv_heads, dim, tokens).transpose(2, 3),  # copied by the launcher
        "dout": draw(batch, tokens, heads, dim),
        "q": draw(batch, tokens, heads, dim).transpose(1, 2),
        "k": draw(batch, tokens, kv_heads, 2 * dim)[..., dim:].transpose(1, 2),
        "v": draw(batch, tokens, kv_heads, dim).transpose(1, 2),
    }


def run(
    module: Any, name: str, tensors: dict[str, Tensor], scale: float, window: int | None
) -> tuple[Tensor, ...]:
    names = {
        "attention_forward": ("q", "k", "v"),
        "attention_backward": ("dout", "q", "k", "v"),
        "attention_double_backward": tuple(tensors),
    }[name]
    outputs = getattr(module, name)(*(tensors[n] for n in names), scale, window)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖, of the value alone where the truth is zero."""
    norm = truth.norm().item()
    return (value.double() - truth).norm().item() / (norm if norm > 1e-12 else 1.0)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", CASES)
def test_errs_at_most_twice_as_much_as_pytorch(
    case: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, heads, kv_heads, tokens, dim, window, dtype, tile = CASES[case]
    if tile is not None:
        cut = kernels.Tiles(*tile, num_warps=4, num_stages=1)
        monkeypatch.setattr(kernels, "_tiles", lambda *_: cut)
    tensors = inputs(batch, heads, kv_heads, tokens, dim, dtype)
    before = {key: t.clone() for key, t in tensors.items()}
    scale = dim**-0.5
    gold = run(eager, name, {key: t.double() for key, t in tensors.items()}, scale, window)
    plain = run(eager, name, tensors, scale, window)
    ours = run(kernels, name, tensors, scale, window)
    for i, (value, ordinary, truth) in enumerate(zip(ours, plain, gold, strict=True)):
        assert value.dtype == dtype and value.shape == truth.shape
        error, allowed = relative_error(value, truth), relative_error(ordinary, truth)
        assert error <= 2 * allowed + FLOOR[dtype], (
            f"{name}, output {i}: error {error:.2e}, PyTorch's {allowed:.2e}"
        )
    assert all(torch.equal(tensors[key], t) for key, t in before.items()), "an input was changed"


def test_output_is_laid_out_as_the_model_reads_it() -> None:
    tensors = inputs(1, 2, 1, 5, 16, FP32)
    (out,) = run(kernels, "attention_forward", tensors, 0.25, None)
    assert out.shape == (1, 5, 2, 16) and out.is_contiguous()


def test_an_empty_batch_gives_empty_outputs() -> None:
    tensors = {key: t[:0] for key, t in inputs(1, 2, 1, 5, 16, FP32).items()}
    for name in PASSES:
        assert all(t.numel() == 0 for t in run(kernels, name, tensors, 0.25, None))


def test_row_statistics_keep_their_digits_far_from_zero() -> None:
    """dP and Ṡ with a large common offset in every row: the covariance in τ must not be a
    difference of their products.
    """
    tensors = inputs(1, 1, 1, 37, 16, FP32)
    tensors["v"] = tensors["v"] + 300.0
    tensors["cot_dk"] = tensors["cot_dk"] + 300.0
    gold = run(eager, PASSES[2], {key: t.double() for key, t in tensors.items()}, 0.25, None)
    plain = run(eager, PASSES[2], tensors, 0.25, None)
    ours = run(kernels, PASSES[2], tensors, 0.25, None)
    for value, ordinary, truth in zip(ours, plain, gold, strict=True):
        assert relative_error(value, truth) <= 2 * relative_error(ordinary, truth) + 1e-6


@pytest.mark.parametrize("window", [None, 5])
def test_the_op_on_triton_is_the_exact_double_backward(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "KERNELS", frozenset({"attention"}))
    tensors = inputs(1, 4, 2, 17, 16, FP32)

    def second_order(dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (tensors[n].to(dtype).requires_grad_() for n in ("q", "k", "v"))
        dout = tensors["dout"].to(dtype).requires_grad_()
        out = attention(q, k, v, scale=0.3, window=window)
        first = grad(out, (q, k, v), dout, create_graph=True)
        cotangents = [tensors[n].to(dtype) for n in ("cot_dq", "cot_dk", "cot_dv")]
        return (out, *first, *grad(first, (dout, q, k, v), cotangents))

    with backend.use_backend("triton"):
        assert backend.implementation("attention", tensors["q"]) is kernels
        ours = second_order(FP32)
    for value, truth in zip(ours, second_order(torch.float64), strict=True):
        assert relative_error(value, truth) < 1e-5
