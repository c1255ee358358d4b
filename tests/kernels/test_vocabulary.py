"""The vocabulary's losses on Triton, under its interpreter, against fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdprompt_fast import TeacherTargets, fast_meta_step, reference_meta_step
from gdprompt_fast.models.memory import PeakMemory, model_tensors
from gdprompt_fast.ops import backend
from gdprompt_fast.ops.eager import vocabulary as eager
from gdprompt_fast.ops.vocabulary import block
from gdprompt_fast.reference.compare import gradients_of, without_upcasts, worst_error
from gdprompt_fast.testing.op_inputs import PASS_NAMES
from helpers.backends import only_kernels
from helpers.materialised import (
    leaf,
    vocabulary_twice,
)
from helpers.models import random_batch, self_teacher, wide_llama
from helpers.passes import assert_at_most_twice_eager, widen

pytest.importorskip("triton", reason="Triton is not installed")
from gdprompt_fast.kernels import online, tiles
from gdprompt_fast.kernels import vocabulary as kernels

Build = Callable[..., Any]
FIRST = 3  # of the columns of a tile
TILE_PASSES = PASS_NAMES["vocabulary"]

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def vocabulary_on_triton(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Only the vocabulary's passes run in Triton; the names of those that did."""
    only_kernels(monkeypatch, "vocabulary")
    used = set()

    def watch(name: str, plain: Callable[..., Any]) -> None:
        def watched(*args: Any) -> Any:
            used.add(name)
            return plain(*args)

        monkeypatch.setattr(kernels, name, watched)

    for name in TILE_PASSES:
        watch(name, getattr(kernels, name))
    return used


def as_tuple(values: Any) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


@each_dtype
@pytest.mark.parametrize("wide_logits", [False, True], ids=["logits-as-tiles", "fp32-logits"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 41), (3, 1, 130), (1, 5, 64)], ids=str)
def test_every_tile_pass_errs_at_most_twice_as_much_as_eager(
    shape: tuple[int, int, int],
    wide_logits: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "BLOCK", 16)  # several programs to a row
    monkeypatch.setattr(online, "WHOLE_ROW", 64)  # 130 columns are longer
    monkeypatch.setattr(online, "SWEEP_BLOCK", 32)
    G, N, v = shape
    z_dtype = torch.float32 if wide_logits else dtype
    z, z_before, b_bar = ((3 * torch.randn(shape)).to(z_dtype) for _ in range(3))
    every_logit = 3 * torch.randn(G, N, v + 9)  # the teacher's: a tile of them is a view
    t, t_before = every_logit.to(dtype)[..., FIRST : FIRST + v], torch.randn(shape).to(dtype)
    ids = torch.randint(-1, FIRST + v + 3, (G, N))  # some are nowhere, before or behind the tile
    ids[0, 0] = FIRST + v - 1
    own_columns = torch.randint(-1, FIRST + v, (G, v))
    nothing = torch.full((G, 2 * N), torch.finfo(torch.float32).min), torch.zeros(G, 2 * N)
    tops = nothing[0][:, :N], nothing[1][:, :N], torch.zeros(G, N)
    _, *student, _ = eager.online_softmax(z_before.clone(), ids, FIRST + v, dtype, *tops)
    _, *both, _ = eager.online_kl(z_before, t_before, dtype, *nothing, torch.zeros(G, N))
    lse, t_lse = z.float().logsumexp(-1), every_logit.logsumexp(-1)
    sums, shares = torch.randn(G, N, 2 * v), torch.randn(G, N, 2 * v).to(dtype)
    center, weight, shrink = torch.randn(G, N), torch.rand(G, N), torch.rand(G, N)
    b = eager.softmax_minus_one_hot(z.clone(), lse, dtype, ids, FIRST)
    b_own = eager.softmax_minus_one_hot(z.clone(), lse, dtype, ids, own_columns)
    statistics = "e top total value shrink"
    cases: list[tuple[str, str, tuple[Any, ...]]] = [
        ("online_softmax", statistics, (z, ids, FIRST, dtype, *student)),
        ("online_softmax", statistics, (z, ids, FIRST, dtype, *tops)),
        ("online_kl", statistics, (z, t, dtype, *both)),
        ("online_kl", statistics, (z, t, dtype, *nothing, torch.zeros(G, N))),
        ("accumulate_", "sum", (sums, shares, shrink)),
        ("softmax_minus_one_hot", "b", (z, lse, dtype, ids, FIRST)),
        ("softmax_minus_one_hot", "b of own columns", (z, lse, dtype, ids, own_columns)),
        ("softmax_difference", "f", (z, lse, dtype, t, t_lse)),
        ("logit_cotangent", "z_cot", (b_bar, b, dtype, center, weight, ids, FIRST)),
        ("logit_cotangent", "z_cot", (b_bar, b_own, dtype, center, weight, ids, own_columns)),
    ]

    def fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Without the tensors that a pass may overwrite."""
        overwritten = [id(z), id(b_bar), id(sums)]
        return tuple(a.clone() if id(a) in overwritten else a for a in arguments)

    for name, outputs, arguments in cases:
        fast, plain = getattr(kernels, name), getattr(eager, name)
        gold = as_tuple(plain(*widen(arguments)))
        results = as_tuple(fast(*fresh(arguments))), as_tuple(plain(*fresh(arguments))), gold
        for output, *values in zip(outputs.split(), *results, strict=len(gold) > 1):
            if values[2].count_nonzero():
                assert_at_most_twice_eager(output, *((value,) for value in values))
            else:
                assert not values[0].count_nonzero(), output


@pytest.mark.parametrize("passes", [eager, kernels], ids=["eager", "triton"])
def test_a_row_without_any_logit_yet_and_a_teacher_that_excludes_tokens_are_finite(
    passes: Any,
) -> None:
    z, teacher = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    teacher[0, 0, :5] = float("-inf")  # the whole first tile, and some of the second
    top, total = torch.full((1, 4), torch.finfo(torch.float32).min), torch.zeros(1, 4)
    gap = torch.zeros(1, 2)
    for tile in (slice(0, 4), slice(4, 8)):
        operands = z[..., tile].clone(), teacher[..., tile], torch.float32, top, total, gap
        e, top, total, gap, shrink = passes.online_kl(*operands)
        assert torch.isfinite(e).all() and torch.isfinite(shrink).all()
    lse, t_lse = (top + total.log()).chunk(2, 1)
    kl = lse - t_lse + gap / total[:, 2:]
    p, log_q = teacher.softmax(-1), z.log_softmax(-1)
    exact = torch.where(p > 0, p * (teacher.log_softmax(-1) - log_q), 0.0).sum(-1)
    torch.testing.assert_close(kl, exact)
    f = passes.softmax_difference(z.clone(), lse, torch.float32, teacher, t_lse)
    torch.testing.assert_close(f, z.softmax(-1) - p)


@pytest.mark.parametrize("passes", [eager, kernels], ids=["eager", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_logits_that_are_not_finite_show_in_the_statistics(passes: Any, bad: float) -> None:
    z = torch.randn(1, 1, 8)
    z[0, 0, 3] = bad
    top, total = torch.full((1, 2), torch.finfo(torch.float32).min), torch.zeros(1, 2)
    ids = torch.zeros(1, 1, dtype=torch.long)
    rows = top[:, :1], total[:, :1], torch.zeros(1, 1)
    _, new_top, new_total, _, _ = passes.online_softmax(z.clone(), ids, 0, torch.float32, *rows)
    assert not torch.isfinite(new_top + new_total.log()).any()
    of_student = z, torch.randn(1, 1, 8), torch.float32, top, total, rows[2]
    _, new_top, new_total, _, _ = passes.online_kl(*of_student)
    assert torch.isfinite(new_top + new_total.log()).tolist() == [[False, True]]


@pytest.mark.parametrize("objective", ["gold", "teacher"])
@pytest.mark.parametrize("tied", [False, True], ids=["head-alone", "tied"])
def test_the_losses_and_all_their_derivatives_on_triton_equal_fp64(
    tied: bool,
    objective: str,
    vocabulary_on_triton: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block, "TILE_ELEMENTS", 24)  # three or four of the seven columns
    ids = [torch.tensor([[1, 2, 1], [0, 3, 2]]), torch.tensor([[1, 0], [2, 3], [4, 1]])]
    groups = [torch.tensor([0, 1]), torch.tensor([1, 1, 0])]
    leaves = [leaf(7, 3), leaf(3, 3)]
    teacher = leaf(3, 7).detach() if objective == "teacher" else None

    def run(on: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
        with backend.use_backend(on):
            given = None if teacher is None else teacher.to(dtype)
            out = vocabulary_twice(*inputs, ids, groups, tied, given)
            return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    gold, plain = run("torch", torch.float64), run("torch", torch.float32)
    assert not vocabulary_on_triton
    fast = run("triton", torch.float32)
    assert_at_most_twice_eager("loss table mix", tuple(fast), tuple(plain), tuple(gold))
    of_target = {"online_kl", "softmax_difference"} if objective == "teacher" else set()
    assert (
        vocabulary_on_triton == set(TILE_PASSES) - {"online_kl", "softmax_difference"} | of_target
    )


@pytest.mark.parametrize(
    ("name", "objective", "steps"),
    [("llama-tied", "kl", 2), ("llama-untied", "kl", 1), ("gpt2-conv1d-positions", "gold", 1)],
)
def test_the_step_with_the_vocabulary_on_triton_equals_the_reference(
    name: str,
    objective: str,
    steps: int,
    vocabulary_on_triton: set[str],
    tiny_model: Build,
    make_batch: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block, "TILE_ELEMENTS", 40 * 16)  # two blocks, the second one narrower
    model, batch = tiny_model(name).float(), make_batch("uneven")
    options: dict[str, Any] = dict(
        objective=objective, inner_lr=0.05, inner_steps=steps, lm_weight=0.3
    )
    if objective == "kl":
        logits = torch.randn(
            int(batch.response_mask.sum()), len(model.get_input_embeddings().weight)
        )
        logits[:, ::5] = float("-inf")
        options["teacher"] = TeacherTargets.from_logits(logits)
    _, plain = gradients_of(fast_meta_step, model, batch, backend="torch", **options)
    assert not vocabulary_on_triton
    _, fast = gradients_of(fast_meta_step, model, batch, backend="triton", **options)
    assert vocabulary_on_triton >= {"online_softmax", "accumulate_", "logit_cotangent"}
    model.double()
    with without_upcasts(model):
        _, exact = gradients_of(reference_meta_step, model, batch, **options)
    error, parameter = worst_error(fast, exact)
    allowed = 2 * worst_error(plain, exact)[0] + 1e-6
    assert error <= allowed, f"{parameter}: error {error:.1e}, allowed {allowed:.1e}"


def test_a_teacher_that_predicts_nan_is_an_error_on_triton_too(
    vocabulary_on_triton: set[str], tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model().float(), make_batch()
    logits = torch.randn(int(batch.response_mask.sum()), model.config.vocab_size)
    logits[1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="teacher: expected finite predictions"):
        fast_meta_step(model, batch, teacher=TeacherTargets.from_logits(logits), backend="triton")
    assert "online_kl" in vocabulary_on_triton
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_buffer_of_tokens_times_vocabulary_exists_on_triton(
    vocabulary_on_triton: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, context, query, response, vocabulary, hidden = 2, 4, 4, 2, 1024, 16
    tokens = examples * context
    monkeypatch.setattr(block, "TILE_ELEMENTS", tokens * 128)
    model = wide_llama(hidden, vocabulary)
    batch = random_batch(examples, context, query, response, vocabulary)
    teacher = self_teacher(model, batch)
    weights = {tuple(p.shape) for p in model.parameters()}
    sizes = []

    def watch(tensor: Tensor) -> None:
        if tuple(tensor.shape) not in weights:
            sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())

    inputs = [*dataclasses.astuple(batch), teacher.hidden]
    with PeakMemory([*model_tensors(model), *inputs], on_new=watch):
        fast_meta_step(model, batch, teacher=teacher, backend="triton")
    assert vocabulary_on_triton == set(TILE_PASSES)
    assert tokens * 128 <= max(sizes) < examples * response * vocabulary, max(sizes)


def test_a_tile_of_a_gpu_is_wider_and_of_whole_matrix_tiles() -> None:
    cuda = torch.device("cuda")
    widths = [each.stop - each.start for each in block.slices(128_256, 4096, cuda)]
    assert widths[0] == block.CUDA_TILE_ELEMENTS // 4096 and sum(widths) == 128_256
    assert next(block.slices(128_256, 3000, cuda)).stop % block.ALIGNMENT == 0
    assert block.tile_elements(torch.device("cpu")) == block.TILE_ELEMENTS
