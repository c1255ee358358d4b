"""XGLM: what is its own, and what in it a step refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import XGLMForCausalLM

from gdprompt_fast import fast_meta_step, reference_meta_step
from gdprompt_fast.errors import UserError
from gdprompt_fast.reference.compare import gradients_of, worst_error
from gdprompt_fast.update.masks import engine_attention
from helpers.models import VOCABULARY, random_batch, xglm_config

Build = Callable[..., Any]
OPTIONS: dict[str, Any] = dict(objective="gold", inner_lr=0.1)
pytestmark = [
    pytest.mark.transformers,
    pytest.mark.parametrize("name", ["xglm"]),  # (which makes the default dtype fp64)
]


def build(**changes: Any) -> Any:
    torch.manual_seed(0)
    return XGLMForCausalLM(xglm_config(VOCABULARY, **changes)).double().eval()


def assert_exact(model: nn.Module, batch: Any) -> None:
    _, expected = gradients_of(reference_meta_step, model, batch, **OPTIONS)
    _, gradients = gradients_of(fast_meta_step, model, batch, **OPTIONS)
    error, parameter = worst_error(gradients, expected)
    assert error <= 1e-9, f"{parameter}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "changes",
    [dict(scale_embedding=False), dict(activation_function="relu"), dict(d_model=36)],
    ids=str,
)
def test_its_configurations_are_exact(name: str, changes: Any, make_batch: Build) -> None:
    assert_exact(build(**changes), make_batch())


def test_rows_longer_than_its_positions_are_exact(name: str) -> None:
    torch.manual_seed(0)
    model = build(max_position_embeddings=4)
    assert_exact(model, random_batch(2, 11, 5, 2, VOCABULARY))


def test_its_own_attention_is_exact_where_a_hook_sees_masks(name: str, make_batch: Build) -> None:
    model = build()
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    assert not engine_attention(model)
    assert_exact(model, make_batch())


def test_a_hook_on_a_key_is_run(name: str, make_batch: Build) -> None:
    model = build()
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _, x, y: 1.3 * y)
    assert_exact(model, make_batch())


@pytest.mark.parametrize(
    "rate", ["dropout", "attention_dropout", "activation_dropout", "layerdrop"]
)
def test_active_dropout_is_refused(name: str, rate: str, make_batch: Build) -> None:
    off = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    model = build(**{**off, rate: 0.1})
    fast_meta_step(model, make_batch(), **OPTIONS)
    with pytest.raises(UserError, match=r"expected no active dropout, got 0\.1 in model"):
        fast_meta_step(model.train(), make_batch(), **OPTIONS)


def other_positions(model: Any) -> None:
    own = model.model.embed_positions.forward
    model.model.embed_positions.forward = lambda ids, *rest: own(ids + 1, *rest)


def scaled_again(model: Any) -> None:
    own = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: 2 * own(ids)


def other_attention(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        y, *rest = own(*inputs, **options)
        return (1.5 * y, *rest)

    attention.forward = forward


def subclassed(model: Any) -> None:
    class Doubled(type(model.model.embed_tokens)):  # type: ignore[misc]
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    model.model.embed_tokens.__class__ = Doubled


@pytest.mark.parametrize(
    "tamper", [other_positions, scaled_again, other_attention, subclassed], ids=lambda t: t.__name__
)
def test_a_changed_model_is_exact_or_refused(name: str, tamper: Any, make_batch: Build) -> None:
    model = build()
    tamper(model)
    try:
        fast_meta_step(model, make_batch(), **OPTIONS)
    except UserError:
        return
    assert_exact(model, make_batch())


def test_cross_attention_is_refused(name: str, make_batch: Build) -> None:
    with pytest.raises(UserError, match="expected parameters that the inner loss depends on"):
        fast_meta_step(build(add_cross_attention=True), make_batch(), **OPTIONS)


def test_under_autocast_the_hidden_states_are_in_its_dtype(name: str, make_batch: Build) -> None:
    model, seen = build().float(), []
    model.model.embed_positions.weights = model.model.embed_positions.weights.float()
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        fast_meta_step(model, make_batch(), verify="never", **OPTIONS)  # which runs the own forward
    assert set(seen) == {torch.bfloat16}
