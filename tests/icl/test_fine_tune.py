"""Fine-tuning on demonstrations, against torch's SGD and blocks run by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdprompt_fast.errors import UserError
from gdprompt_fast.icl.blocks import keys_and_values
from gdprompt_fast.icl.fine_tune import fine_tune
from gdprompt_fast.icl.layer_causal import layer_causal_fine_tune
from helpers.icl import FAMILIES_OF_ICL, demonstrations, tiny

LR = 0.5
State = dict[str, Tensor]


def state_of(model: Any) -> State:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def change(model: Any, before: State) -> State:
    return {name: value - before[name] for name, value in state_of(model).items()}


def is_key_or_value(name: str, family: str) -> bool:
    fused = {"gpt2-conv1d-positions": "c_attn", "gpt-neox": "query_key_value"}
    return fused[family] in name if family in fused else "k_proj" in name or "v_proj" in name


def queries_frozen(name: str, family: str, gradient: Tensor) -> Tensor:
    """Of a layer that makes queries, keys and values: without what is of the queries."""
    gradient = gradient.clone()
    if family == "gpt2-conv1d-positions":
        gradient[..., :32] = 0
    if family == "gpt-neox":
        gradient.unflatten(0, (4, 3, 8))[:, 0] = 0
    return gradient


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("family", FAMILIES_OF_ICL)
def test_it_is_sgd_on_keys_and_values_one_text_at_a_time(family: str, clip: float | None) -> None:
    other, texts = tiny(family), demonstrations()
    moved = {n: p for n, p in other.named_parameters() if is_key_or_value(n, family)}
    sgd = torch.optim.SGD(moved.values(), lr=LR)
    for ids in texts:
        sgd.zero_grad()
        logits = other(ids[None]).logits[0]
        F.cross_entropy(logits[:-1], ids[1:]).backward()
        for name, parameter in moved.items():
            parameter.grad = queries_frozen(name, family, parameter.grad)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(moved.values(), clip)
        sgd.step()

    model = tiny(family)
    before = state_of(model)
    with fine_tune(model, texts, LR, clip=clip) as tuned:
        for name, parameter in tuned.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name)), name
            assert torch.equal(parameter, before[name]) == (name not in moved), name


@pytest.mark.parametrize("tune", [fine_tune, layer_causal_fine_tune])
def test_the_model_is_restored_to_the_bit_also_after_an_error(tune: Any) -> None:
    model = tiny("llama-biases")
    model.model.embed_tokens.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), tune(model, demonstrations(), LR):
        raise ZeroDivisionError
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad == wanted[name]
    assert not any(module._forward_hooks for module in model.modules())


def test_an_infinity_norm_is_the_largest_change() -> None:
    model, texts = tiny("llama-biases"), demonstrations()[:1]
    before = state_of(model)
    with fine_tune(model, texts, LR, clip=1e-3, clip_norm="linf"):
        largest = max(float(each.abs().max()) for each in change(model, before).values())
    assert largest == pytest.approx(LR * 1e-3, rel=1e-2)  # (ε stands beside the norm)
    with fine_tune(model, texts, LR, clip=1e9, clip_norm="linf"):
        clipped = change(model, before)
    with fine_tune(model, texts, LR):
        assert all(torch.equal(v, clipped[n]) for n, v in change(model, before).items())


def local_gradients(model: Any, ids: Tensor, layers: range) -> list[State]:
    """Of each block its own loss's, the block fed what the model has there, by hand."""
    found = []
    for layer in layers:
        states = model(ids[None], output_hidden_states=True).hidden_states
        h = states[layer].detach()
        position = torch.arange(len(ids))[None]
        rotary = model.model.rotary_emb(h, position)
        mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=h.dtype).triu(1)[None, None]
        y = model.model.layers[layer](h, attention_mask=mask, position_embeddings=rotary)
        y = y[0] if isinstance(y, tuple) else y
        loss = F.cross_entropy(model.lm_head(model.model.norm(y))[0, :-1], ids[1:])
        model.zero_grad()
        loss.backward()
        found.append(
            {
                name: p.grad.clone()
                for name, p in model.named_parameters()
                if f"layers.{layer}." in name and is_key_or_value(name, "llama")
            }
        )
    return found


def test_a_summed_step_moves_every_block_by_its_own_loss() -> None:
    model, texts = tiny("llama-biases"), demonstrations()[:1]
    before = state_of(model)
    expected = local_gradients(tiny("llama-biases"), texts[0], range(2))
    with layer_causal_fine_tune(model, texts, LR):
        got = change(model, before)
    for own in expected:
        for name, gradient in own.items():
            torch.testing.assert_close(got.pop(name), -LR * gradient, rtol=1e-6, atol=1e-9)
    assert not any(each.any() for each in got.values())


def test_one_after_another_a_block_sees_the_blocks_below_moved() -> None:
    model, texts = tiny("llama-biases"), demonstrations()[:1]
    before = state_of(model)
    by_hand = tiny("llama-biases")
    for layer in range(2):
        (own,) = local_gradients(by_hand, texts[0], range(layer, layer + 1))
        with torch.no_grad():
            for name, gradient in own.items():
                by_hand.get_parameter(name).sub_(LR * gradient)
    with layer_causal_fine_tune(model, texts, LR, order="one_after_another"):
        for name, parameter in by_hand.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-6, atol=1e-9)
        one_after_another = change(model, before)
    with layer_causal_fine_tune(model, texts, LR):
        summed = change(model, before)
    for name in summed:
        same = torch.equal(summed[name], one_after_another[name])
        assert same == ("layers.1." not in name or not is_key_or_value(name, "llama")), name


@pytest.mark.parametrize("family", FAMILIES_OF_ICL)
def test_the_last_block_moves_as_in_fine_tuning(family: str) -> None:
    """Its own loss is the model's."""
    model, texts = tiny(family), demonstrations()[:1]
    before = state_of(model)
    last = {id(p) for each in keys_and_values(model)[-1] for p in each.parameters}
    with fine_tune(model, texts, LR):
        ordinary = change(model, before)
    with layer_causal_fine_tune(model, texts, LR):
        local = change(model, before)
    for name, parameter in model.named_parameters():
        if id(parameter) in last:
            assert ordinary[name].any()
            torch.testing.assert_close(local[name], ordinary[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ["summed", "one_after_another"])
def test_a_clip_bounds_the_whole_step_or_each_blocks(order: str) -> None:
    model, texts, clip = tiny("gpt-neox"), demonstrations()[:1], 0.01
    before = state_of(model)
    with layer_causal_fine_tune(model, texts, LR, order=order, clip=clip):
        moved = change(model, before)
    of_layer = [
        torch.stack([v.norm() for n, v in moved.items() if f"layers.{layer}." in n]).norm()
        for layer in range(2)
    ]
    if order == "summed":
        assert float(torch.stack(of_layer).norm()) == pytest.approx(LR * clip, rel=1e-3)
    else:
        assert [float(each) for each in of_layer] == pytest.approx([LR * clip] * 2, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(lr=-1.0), "lr: expected a number >= 0, got -1.0"),
        (dict(lr=float("nan")), "lr: expected a number >= 0, got nan"),
        (dict(clip=float("inf")), "clip: expected a number >= 0, got inf"),
        (dict(clip_norm="l1"), "clip_norm: expected one of l2, linf, got 'l1'"),
        (dict(texts=[torch.tensor([1])]), r"demonstrations: expected int64 \[T\] of 2 tokens"),
        (dict(texts=[torch.tensor([1, 999])]), "demonstrations: expected token ids in"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], words: str) -> None:
    given = {"lr": LR, **options}
    texts = given.pop("texts", demonstrations())
    with pytest.raises(UserError, match=words), fine_tune(tiny("llama-tied"), texts, **given):
        pass


def test_an_unknown_order_is_refused() -> None:
    wrong = layer_causal_fine_tune(tiny("llama-tied"), demonstrations(), LR, order="last_first")
    with pytest.raises(UserError, match="order: expected one of summed, one_after_another"), wrong:
        pass


def test_a_model_with_adapters_is_refused(lora_model: Any) -> None:
    with (
        pytest.raises(UserError, match="expected a causal LM without adapters"),
        fine_tune(lora_model(), demonstrations(), LR),
    ):
        pass
