"""Linearised fine-tuning, against forward-mode derivatives of all parameters at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import XGLMConfig, XGLMForCausalLM

from gdprompt_fast.icl.blocks import keys_and_values
from gdprompt_fast.icl.fine_tune import fine_tune, mean_nll
from gdprompt_fast.icl.linearised import FactoredChange, LinearisedModel, linearised_fine_tune
from gdprompt_fast.icl.recording import Recorded, record
from gdprompt_fast.models.memory import PeakMemory
from helpers.icl import FAMILIES_OF_ICL, demonstrations, tiny
from helpers.models import VOCABULARY, wide_llama

LR = 0.05
Parameters = dict[str, Tensor]
ROWS = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.tensor([[7, 6], [5, 4]])


def parameters_of(model: Any) -> Parameters:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def formed(linearised: LinearisedModel) -> Parameters:
    """Δθ of all parameters, in full."""
    names = {id(p): name for name, p in linearised.model.named_parameters()}
    dense = {n: torch.zeros_like(p) for n, p in parameters_of(linearised.model).items()}
    for change in linearised.changes:
        for parameter, own in zip(change.of.parameters, change.gradients(), strict=True):
            dense[names[id(parameter)]] = -change.lr * own
    return dense


def value_and_tangent(model: Any, delta: Parameters, run: Callable[[], Any]) -> Any:
    """What ``run`` gives at the model's weights, and J Δθ, by ``torch.func`` over all of them."""

    class Runs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def forward(self) -> Any:
            return run()

    def at(parameters: Parameters) -> Any:
        inside = {f"inside.{name}": parameter for name, parameter in parameters.items()}
        for parameter in inside.values():
            parameter._is_param = True  # type: ignore[attr-defined]  # record() wants parameters
        return functional_call(Runs(), inside, ())

    with sdpa_kernel(SDPBackend.MATH):
        return jvp(at, (parameters_of(model),), (delta,))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids[None]).logits[0]
    return logits


def in_full(model: Any, texts: list[Tensor], lr: float) -> Parameters:
    """Δθ by the definition: a gradient in all parameters of the loss at f_lin, ΔW formed."""
    delta = {name: torch.zeros_like(p) for name, p in parameters_of(model).items()}
    names = {id(p): name for name, p in model.named_parameters()}
    trained = [each for of_block in keys_and_values(model) for each in of_block]
    for ids in texts:
        value, tangent = value_and_tangent(model, delta, partial(logits_of, model, ids))
        at_flin = (value + tangent).detach().requires_grad_()
        (cotangent,) = torch.autograd.grad(mean_nll(at_flin, ids), at_flin)
        for each in trained:
            grads = torch.autograd.grad(logits_of(model, ids), each.parameters, cotangent)
            for p, gradient in zip(each.parameters, each.only_rows([*grads]), strict=True):
                delta[names[id(p)]] -= lr * gradient
    return delta


def assert_close(got: Tensor, expected: Tensor, what: str) -> None:
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= 1e-9, f"{what}: relative error {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES_OF_ICL)
def test_it_is_the_expansion_of_the_definition(family: str) -> None:
    model = tiny(family)
    linearised = linearised_fine_tune(model, demonstrations(), LR)
    delta = in_full(model, demonstrations(), LR)
    whole = torch.stack([each.norm() for each in delta.values()]).norm()
    for name, own in formed(linearised).items():
        assert (own - delta[name]).norm() <= 1e-9 * max(delta[name].norm(), 1e-6 * whole), name

    value, tangent = value_and_tangent(model, delta, lambda: model(ROWS).logits)
    assert_close(linearised.logits(ROWS), value + tangent, "logits")
    assert tangent.norm() > 1e-3 * value.norm()


@pytest.mark.parametrize("family", FAMILIES_OF_ICL)
def test_all_that_is_recorded_is_value_plus_tangent(family: str) -> None:
    model = tiny(family)
    linearised = linearised_fine_tune(model, demonstrations(), LR)
    recorded = linearised.record(ROWS, POSITIONS)
    plain = record(model, ROWS, POSITIONS)

    def run() -> tuple[Tensor, ...]:
        return tuple(vars(record(model, ROWS, POSITIONS)).values())

    values, tangents = value_and_tangent(model, formed(linearised), run)
    for name, value, tangent in zip(vars(plain), values, tangents, strict=True):
        assert_close(getattr(recorded, name), value + tangent, name)
        assert_close(getattr(plain, name), value, name)
        assert tangent.norm() > 1e-4 * value.norm(), name


@pytest.mark.parametrize("family", FAMILIES_OF_ICL)
@pytest.mark.parametrize("lr", [0.5, 0.003])
def test_the_first_update_is_the_ordinary_one_to_the_bit(family: str, lr: float) -> None:
    model, texts = tiny(family), demonstrations()[:1]
    changes = linearised_fine_tune(model, texts, lr).changes
    before = [[p.detach().clone() for p in change.of.parameters] for change in changes]
    assert all(any(own.any() for own in change.gradients()) for change in changes)
    with fine_tune(model, texts, lr), torch.no_grad():
        for change, of_layer in zip(changes, before, strict=True):
            one_step = zip(change.of.parameters, of_layer, change.gradients(), strict=True)
            for parameter, old, gradient in one_step:
                assert torch.equal(parameter, old.add(gradient, alpha=-lr))


@pytest.mark.parametrize("family", ["llama-biases", "xglm"])
def test_the_gap_to_fine_tuning_falls_with_the_square_of_the_rate(family: str) -> None:
    model, texts = tiny(family), demonstrations()

    def gap(lr: float) -> float:
        expansion = linearised_fine_tune(model, texts, lr).record(ROWS, POSITIONS)
        with fine_tune(model, texts, lr) as tuned:
            exact = record(tuned, ROWS, POSITIONS)
        return float((expansion.attention - exact.attention).norm())

    gaps = [gap(lr) for lr in (4e-3, 2e-3, 1e-3)]
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.05)


def test_at_rate_zero_it_is_the_model() -> None:
    model = tiny("llama-tied")
    linearised = linearised_fine_tune(model, demonstrations(), 0.0)
    recorded, plain = linearised.record(ROWS, POSITIONS), record(model, ROWS, POSITIONS)
    assert_close(recorded.logits, plain.logits, "logits")
    assert_close(recorded.scores, plain.scores, "scores")


def test_the_models_weights_and_gradients_are_left_alone() -> None:
    model = tiny("gpt2-conv1d-positions")
    model.transformer.wte.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in parameters_of(model).items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    linearised_fine_tune(model, demonstrations(), LR).record(ROWS, POSITIONS)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None and parameter.requires_grad == wanted[name]
    assert not any(module._forward_hooks for module in model.modules())


def bytes_of(model: Any) -> int:
    return sum(p.nbytes for p in model.parameters())


def test_there_is_one_copy_of_the_model_where_a_tangent_of_all_parameters_is_another() -> None:
    model = wide_llama(384, vocabulary=256)
    texts = [torch.randint(256, (6,)) for _ in range(4)]
    rows, positions = torch.randint(256, (1, 8)), torch.tensor([[7, 6]])
    one = bytes_of(model)
    with PeakMemory(model.parameters()) as lean:
        linearised = linearised_fine_tune(model, texts, 1e-3)
        recorded = linearised.record(rows, positions)
    assert lean.peak_bytes < 1.15 * one

    with PeakMemory(model.parameters()) as full:
        _, tangent = value_and_tangent(
            model, formed(linearised), lambda: record(model, rows, positions).logits
        )
    assert full.peak_bytes > 2 * one
    torch.testing.assert_close(
        recorded.logits - record(model, rows, positions).logits, tangent, rtol=1e-2, atol=1e-5
    )


def test_the_factors_are_all_that_grows_with_the_texts() -> None:
    """Per block and token: an input, which keys and values share, and a cotangent of each."""
    model = wide_llama(128, vocabulary=256, layers=2)

    def peak(count: int) -> int:
        texts = [torch.randint(256, (8,)) for _ in range(count)]
        with PeakMemory(model.parameters()) as memory:
            linearised_fine_tune(model, texts, 1e-3)
        return memory.peak_bytes

    a_token = 2 * 4 * (128 + 2 * 64)  # two blocks, fp32; two heads of four share keys
    grown = peak(12) - peak(4)
    assert grown <= 1.25 * 8 * 8 * a_token


def factor_bytes(changes: Sequence[FactoredChange]) -> int:
    """Of the tensors that are there; an input that two changes share is one."""
    own = {
        id(x): x.nbytes for change in changes for x in (change.x_NI, change.e_NR) if x is not None
    }
    return sum(own.values())


def test_the_factors_of_32_long_texts_are_what_their_shapes_say() -> None:
    model = tiny("xglm").float()
    texts = [torch.randint(VOCABULARY, (24,)) for _ in range(32)]
    linearised = linearised_fine_tune(model, texts, 1e-3)
    config = model.config
    assert factor_bytes(linearised.changes) == config.num_layers * 3 * config.d_model * 32 * 24 * 4


def test_the_factors_of_agnews_and_cb_are_small_at_the_papers_sizes() -> None:
    """The same objects in the shapes of its 1.3 B model and of 32 texts of 100 tokens, by 4 bytes;
    AGNews and CB are where a tangent of all parameters did not fit the paper's GPU.
    """
    config = XGLMConfig(
        vocab_size=50257, d_model=2048, ffn_dim=8192, num_layers=24, attention_heads=32
    )
    with torch.device("meta"):
        model = XGLMForCausalLM(config)
    changes = [
        FactoredChange(each, 0.2) for of_block in keys_and_values(model) for each in of_block
    ]
    tokens = 32 * 100
    for keys, values in zip(changes[::2], changes[1::2], strict=True):
        shared = torch.empty(tokens, 2048, device="meta")
        for change in (keys, values):
            change.add(shared, torch.empty(tokens, 2048, device="meta"))
    assert factor_bytes(changes) == 24 * 3 * 2048 * tokens * 4
    assert factor_bytes(changes) == pytest.approx(1.76 * 2**30, rel=0.01)
    assert bytes_of(model) == pytest.approx(4.9 * 2**30, rel=0.01)


def test_recorded_of_the_expansion_has_the_same_shapes() -> None:
    model = tiny("gpt-neox")
    linearised = linearised_fine_tune(model, demonstrations(), LR)
    expansion: Recorded = linearised.record(ROWS, POSITIONS)
    plain = record(model, ROWS, POSITIONS)
    for name, tensor in vars(plain).items():
        assert getattr(expansion, name).shape == tensor.shape
        assert getattr(expansion, name).dtype == tensor.dtype
