"""The Triton attention in the interpreter: every pass against fp64, next to PyTorch's error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from gdprompt_fast.testing.gates import FLOOR, judge, relative_error, widened
from helpers.backends import only_kernels
from helpers.paths import ROOT

pytest.importorskip("triton", reason="Triton is an optional dependency")

from gdprompt_fast.kernels import attention as kernels
from gdprompt_fast.kernels.attention import launch
from gdprompt_fast.kernels.attention.tiles import Tiles
from gdprompt_fast.ops import backend
from gdprompt_fast.ops.attention import attention, visible_keys
from gdprompt_fast.ops.eager import attention as eager

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# batch, heads, key/value heads, tokens, head dim, window, segments, dtype, tile (queries, keys)
CASES = {
    "one token": (2, 2, 1, 1, 16, None, None, FP32, (16, 16)),
    "one token in bf16": (1, 2, 2, 1, 64, 1, (1,), BF16, (16, 16)),
    "17 tokens, one to each window": (1, 2, 1, 17, 16, 1, None, FP32, (16, 16)),
    "17 tokens, head dim 20": (1, 4, 2, 17, 20, None, None, FP32, (16, 16)),
    "17 tokens, head dim 20, in bf16": (1, 3, 1, 17, 20, 5, None, BF16, (16, 16)),
    "17 tokens in fp16": (1, 2, 1, 17, 16, None, None, FP16, (16, 16)),
    "37 tokens, 4 heads on 2": (1, 4, 2, 37, 16, None, None, FP32, (16, 16)),
    "37 tokens, 4 heads on 2, in bf16": (1, 4, 2, 37, 16, None, None, BF16, (16, 16)),
    "37 tokens, 3 heads on 1, window 5": (1, 3, 1, 37, 16, 5, None, FP32, (16, 32)),
    "37 tokens, 3 heads on 1, window 5, in bf16": (1, 3, 1, 37, 16, 5, None, BF16, (32, 16)),
    "37 tokens, window 1, in bf16": (1, 2, 2, 37, 16, 1, None, BF16, (16, 32)),
    "37 tokens, wide query tiles": (1, 2, 1, 37, 16, None, None, FP32, (32, 16)),
    "37 tokens, wide key tiles": (1, 2, 1, 37, 16, None, None, FP32, (16, 32)),
    "37 tokens, segments": (2, 1, 1, 37, 16, None, (3, 1, 20, 13), FP32, (16, 16)),
    "37 tokens, segments, window 7, in bf16": (2, 1, 1, 37, 16, 7, (3, 1, 20, 13), BF16, (16, 32)),
    "37 segments of a token": (1, 2, 1, 37, 16, None, (1,) * 37, FP32, (32, 16)),
    "the window as long as the text": (1, 2, 1, 17, 16, 17, None, FP32, (16, 16)),
    "the window one short of the text": (1, 2, 1, 17, 16, 16, None, FP32, (16, 16)),
    "the tiles of a GPU": (1, 1, 1, 67, 64, None, None, FP32, None),
    "the tiles of a GPU in bf16": (1, 2, 1, 131, 64, None, None, BF16, None),
    "the tiles of a GPU, head dim 80, window 40, in bf16": (1, 1, 1, 131, 80, 40, None, BF16, None),
    "the tiles of a GPU, head dim 96, segments, in bf16": (
        *(1, 1, 1, 131, 96, None, (60, 71), BF16, None),
    ),
    "the tiles of a GPU, head dim 128, in bf16": (1, 2, 1, 131, 128, None, None, BF16, None),
}


def inputs(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """q, k and v as views in three layouts, dout contiguous, cotangents in three layouts."""
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
        "v": draw(batch, kv_heads, dim, tokens).transpose(2, 3),  # copied too
    }


def segments_of(lengths: tuple[int, ...], batch: int) -> Tensor:
    """[B, T], the lengths in turns from another one on in every row."""
    rows = [lengths[row:] + lengths[:row] for row in range(batch)]
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows])


def run(
    module: Any, tensors: dict[str, Tensor], scale: float, visible: tuple[Tensor, Tensor] | None
) -> dict[str, tuple[Tensor, ...]]:
    """The outputs of all passes; the backward passes read O and lse as the forward left them."""
    qkv = tensors["q"], tensors["k"], tensors["v"]
    out, lse = module.attention_forward(*qkv, scale, visible)
    dout, kept = tensors["dout"], (*qkv, out, lse, scale, visible)
    cotangents = tensors["cot_dq"], tensors["cot_dk"], tensors["cot_dv"]
    return {
        "forward": (out, lse),
        "backward": module.attention_backward(dout, None, *kept),
        "double backward": module.attention_double_backward(*cotangents, dout, *kept),
    }


def errors(
    tensors: dict[str, Tensor], visible: tuple[Tensor, Tensor] | None = None
) -> Iterator[tuple[str, float, float]]:
    """Every output's name, its error and PyTorch's, all against fp64."""
    scale = tensors["q"].shape[-1] ** -0.5
    gold = run(eager, {key: t.double() for key, t in tensors.items()}, scale, visible)
    plain, ours = (run(module, tensors, scale, visible) for module in (eager, kernels))
    for name, outputs in ours.items():
        for i, (value, ordinary, truth) in enumerate(
            zip(outputs, plain[name], gold[name], strict=True)
        ):
            assert value.dtype == ordinary.dtype and value.shape == truth.shape
            yield (
                f"{name}, output {i}",
                relative_error(value, truth, negligible=1e-12),
                relative_error(ordinary, truth, negligible=1e-12),
            )


@pytest.mark.parametrize("case", CASES)
def test_errs_at_most_twice_as_much_as_pytorch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, kv_heads, tokens, dim, window, lengths, dtype, tile = CASES[case]
    if tile is not None:
        cut = Tiles(*tile, num_warps=4, num_stages=1)
        monkeypatch.setattr(launch, "tiles_of", lambda *_: cut)
    tensors = inputs(batch, heads, kv_heads, tokens, dim, dtype)
    before = {key: t.clone() for key, t in tensors.items()}
    segment_BT = None if lengths is None else segments_of(lengths, batch)
    visible = visible_keys(tensors["q"], window, segment_BT)
    for name, error, allowed in errors(tensors, visible):
        assert error <= 2 * allowed + FLOOR[dtype], (
            f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"
        )
    assert all(torch.equal(tensors[key], t) for key, t in before.items()), "an input was changed"


@pytest.mark.parametrize("way", ["one loop", "two sweeps", "copy engine"])
@pytest.mark.parametrize("window", [None, 20])
def test_every_way_to_cut_a_kernel_up_is_right(
    way: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Tiles(
        *(16, 16, 4, 1),
        split=way != "one loop",
        tma=way == "copy engine",
        sweeps=1 + ("two" in way),
    )
    monkeypatch.setattr(launch, "tiles_of", lambda *_: cut)
    tensors = inputs(1, 4, 2, 45, 16, BF16)
    for name, error, allowed in errors(tensors, visible_keys(tensors["q"], window)):
        assert error <= 2 * allowed + FLOOR[BF16], f"{name}: error {error:.2e}, {allowed:.2e}"


@pytest.mark.usefixtures("dots_as_without_matrix_instructions")
@pytest.mark.parametrize("pass_", ["attention_backward", "attention_double_backward"])
def test_long_sums_in_fp32_keep_their_digits(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key's sums are over the queries of all heads of its group: 16,384 here, as many as of four
    heads in a text of 4,096 tokens.
    """
    monkeypatch.setattr(launch, "tiles_of", lambda *_: Tiles(256, 256, num_warps=4, num_stages=1))
    tensors = inputs(1, 64, 1, 256, 16, FP32)
    qkv = tensors["q"], tensors["k"], tensors["v"]
    kept = *qkv, *eager.attention_forward(*qkv, 0.25, None), 0.25, None
    given = tensors["dout"], None, *kept
    if pass_ == "attention_double_backward":
        given = *(tensors[f"cot_{name}"] for name in ("dq", "dk", "dv")), tensors["dout"], *kept
    ours, plain = (getattr(module, pass_)(*given) for module in (kernels, eager))
    verdict = judge(ours, plain, getattr(eager, pass_)(*map(widened, given)))
    assert verdict.status == "passed", verdict


@pytest.fixture
def dots_as_without_matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's ``tl.dot`` adds its products one by one, as a GPU does in fp32."""
    from triton.runtime import interpreter

    def create_dot(_self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = d.data.copy()
        for column, row in zip(a.data.T, b.data, strict=True):
            total += column[:, None] * row
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def test_the_compiler_leaves_long_sums_in_fp32_in_two_parts() -> None:
    """No dot of the kernel with the longest sums has the running sum as its accumulator."""
    script = """
from benchmarks.ops.compile_kernels import TARGETS, compile_case
from benchmarks.ops.compile_cases.attention import attention_case as case_of
from gdprompt_fast.kernels.attention.tiles import Tiles

case = case_of("backward_key", 64, False, Tiles(16, 16, 8, 1), dtype="fp32")
print(compile_case(case, TARGETS["sm_90"]).asm["ttir"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    accumulators = re.findall(r"tt\.dot %\w+, %\w+, %(\w+)", done.stdout)
    assert accumulators and all(name.startswith("cst") for name in accumulators), accumulators


def test_a_negative_scale_is_one() -> None:
    tensors = inputs(1, 2, 1, 20, 16, FP32)
    ours, gold = (
        run(module, {n: t.to(dtype) for n, t in tensors.items()}, -0.4, None)
        for module, dtype in ((kernels, FP32), (eager, torch.float64))
    )
    for name, outputs in ours.items():
        for value, truth in zip(outputs, gold[name], strict=True):
            assert relative_error(value, truth) < 1e-5, name


def test_output_is_laid_out_as_the_model_reads_it() -> None:
    tensors = inputs(1, 2, 1, 5, 16, FP32)
    out, lse = run(kernels, tensors, 0.25, None)["forward"]
    assert out.shape == (1, 5, 2, 16) and out.is_contiguous()
    assert lse.shape == (1, 2, 5)


def test_an_empty_batch_gives_empty_outputs() -> None:
    tensors = {key: t[:0] for key, t in inputs(1, 2, 1, 5, 16, FP32).items()}
    for outputs in run(kernels, tensors, 0.25, None).values():
        assert all(t.numel() == 0 for t in outputs)


def test_row_statistics_keep_their_digits_far_from_zero() -> None:
    """dP and Ṡ with a large common offset in every row: σ and τ must not be sums of large terms
    that cancel.
    """
    tensors = inputs(1, 1, 1, 37, 16, FP32)
    tensors["v"] = tensors["v"] + 300.0
    tensors["cot_dk"] = tensors["cot_dk"] + 300.0
    for name, error, allowed in errors(tensors):
        assert error <= 2 * allowed + 1e-6, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


def second_order(
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    window: int | None = None,
    segment_BT: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The op's output and its first and second derivatives, tokens in the second but last place."""
    q, k, v, dout = (tensors[n].to(dtype).requires_grad_() for n in ("q", "k", "v", "dout"))
    out = attention(q, k, v, scale=0.3, window=window, segment_BT=segment_BT)
    first = grad(out, (q, k, v), dout, create_graph=True)
    cotangents = [tensors[n].to(dtype) for n in ("cot_dq", "cot_dk", "cot_dv")]
    cot_dout, *second = grad(first, (dout, q, k, v), cotangents)
    return out.transpose(1, 2), *first, cot_dout.transpose(1, 2), *second


@pytest.mark.parametrize("segments", [None, (4, 9, 4)], ids=["one-text", "packed"])
@pytest.mark.parametrize("window", [None, 5])
def test_the_op_on_triton_is_the_exact_double_backward(
    window: int | None, segments: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_kernels(monkeypatch, "attention")
    tensors = inputs(1, 4, 2, 17, 16, FP32)
    segment_BT = None if segments is None else segments_of(segments, 1)
    with backend.use_backend("triton"):
        assert backend.implementation("attention", tensors["q"]) is kernels
        ours = second_order(tensors, FP32, window, segment_BT)
    exact = second_order(tensors, torch.float64, window, segment_BT)
    for value, truth in zip(ours, exact, strict=True):
        assert relative_error(value, truth) < 1e-5


def test_packed_and_padded_texts_come_out_as_each_alone() -> None:
    """Texts of 20 and 9 tokens after padding of large values, against each by itself."""
    tensors = inputs(1, 2, 1, 37, 16, FP32)
    segment_BT = segments_of((8, 20, 9), 1)

    def tokens_of(name: str, place: slice) -> Tensor:
        return tensors[name][:, place] if name == "dout" else tensors[name][:, :, place]

    for name in tensors:
        tokens_of(name, slice(0, 8)).fill_(1e3)
    with backend.use_backend("triton"):
        packed = second_order(tensors, FP32, segment_BT=segment_BT)
        for place in (slice(8, 28), slice(28, 37)):
            alone = second_order({n: tokens_of(n, place) for n in tensors}, FP32)
            for value, expected in zip(packed, alone, strict=True):
                torch.testing.assert_close(value[:, :, place], expected)
