"""The parameter-free parts of a model that ops compute inside a meta step, and only there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.activations

from gdprompt_fast import fast_meta_step, reference_meta_step
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.reference.compare import without_upcasts
from gdprompt_fast.update import substitutes
from gdprompt_fast.update.adapted_layer import StepState
from gdprompt_fast.update.attach import AdaptedModel
from helpers.models import MODELS

Build = Callable[..., Any]
pytestmark = pytest.mark.transformers
ROTARY = "apply_rotary_pos_emb"
USED = {"llama": {"rotary", "swiglu"}, "gpt2": {"gelu"}, "xglm": {"gelu"}}
USED |= {"gpt-neox": {"gelu", "rotary"}}
USED |= dict.fromkeys(("qwen2", "qwen3", "mistral"), USED["llama"])


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the ops that ran in place of a model's own parts."""
    names: set[str] = set()

    def watch(name: str) -> None:
        plain = getattr(substitutes, name)

        def watched(*args: Any) -> Any:
            names.add(name)
            return plain(*args)

        monkeypatch.setattr(substitutes, name, watched)

    for name in ("gelu", "rotary", "swiglu"):
        watch(name)
    return names


def adapted(model: torch.nn.Module) -> AdaptedModel:
    return AdaptedModel(model, {}, StepState(1, 0.0, Phase(second_order=False)))


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3]])).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_step_runs_the_ops_and_leaves_the_model_as_it_was(
    name: str, tiny_model: Build, make_batch: Build, used: set[str]
) -> None:
    model = tiny_model(name)
    file = sys.modules[type(model).__module__]
    own = getattr(file, ROTARY, None)
    expected = run(model)
    assert not used
    fast_meta_step(model, make_batch("uneven"), objective="gold")
    assert used == next(ops for start, ops in USED.items() if name.startswith(start))
    used.clear()
    assert all("forward" not in vars(module) for module in model.modules())
    assert getattr(file, ROTARY, None) is own
    assert torch.equal(run(model), expected)
    assert not used


@pytest.mark.parametrize("where", ["layers.1", "layers.1.input_layernorm", "norm"])
@pytest.mark.parametrize("in_place", [False, True], ids=["anew", "in-place"])
def test_a_state_changed_on_its_way_is_normed_as_it_is(
    where: str, in_place: bool, tiny_model: Build, make_batch: Build
) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()

    def change(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].mul_(1.5) if in_place else args[0] * 1.5,)

    model.model.get_submodule(where).register_forward_pre_hook(change)
    fast_meta_step(model, batch, objective="gold")
    fast = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    with without_upcasts(model):
        reference_meta_step(model, batch, objective="gold")
    exact = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(fast, exact, rtol=1e-9, atol=1e-9)


def test_after_an_error_inside_the_model_runs_its_own_again(
    tiny_model: Build, used: set[str]
) -> None:
    model = tiny_model("gpt-neox")
    with pytest.raises(KeyError), adapted(model).differentiable():
        raise KeyError
    run(model)
    assert not used


def test_another_model_of_the_same_class_runs_its_own_meanwhile(
    tiny_model: Build, used: set[str]
) -> None:
    model, other = tiny_model("llama-tied"), tiny_model("llama-tied")
    expected = run(other)
    with adapted(model).differentiable():
        assert torch.equal(run(other), expected)
    assert not used


def test_a_rotary_embedding_that_is_not_that_of_transformers_is_kept(
    tiny_model: Build, make_batch: Build, used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model("llama-tied"), make_batch()
    file = sys.modules[type(model).__module__]
    own, calls = getattr(file, ROTARY), []

    def replaced(*args: Any) -> Any:
        calls.append(args)
        return own(*args)

    monkeypatch.setattr(file, ROTARY, replaced)
    fast_meta_step(model, batch, objective="gold")
    assert calls
    assert "rotary" not in used


def test_a_rotary_embedding_that_hugging_faces_kernels_package_made_a_module_of_is_known(
    tiny_model: Build, make_batch: Build, used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama-tied")
    file = sys.modules[type(model).__module__]
    source = """
def module_of(function):
    class Function(nn.Module):
        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)
    return Function()
"""
    names: dict[str, Any] = {"nn": torch.nn}
    exec(compile(source, "site-packages/kernels/layer/layer.py", "exec"), names)
    module = names["module_of"](getattr(file, ROTARY))
    monkeypatch.setattr(file, ROTARY, module)
    fast_meta_step(model, make_batch(), objective="gold")
    assert "rotary" in used
    used.clear()
    module.forward = module.forward  # a kernel in the function's place
    fast_meta_step(model, make_batch(), objective="gold")
    assert "rotary" not in used


@pytest.mark.parametrize("forward", ["wrapped", "without-rotary"])
def test_a_forward_that_does_not_call_the_rotary_embedding_itself_is_kept(
    forward: str, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = tiny_model("llama-tied").model.layers[0].self_attn
    assert substitutes.substitute_for(attention, None) is not None
    own = type(attention).forward

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    replacement = wrapped if forward == "wrapped" else torch.nn.Identity()
    monkeypatch.setattr(type(attention), "forward", replacement)
    assert substitutes.substitute_for(attention, None) is None


@pytest.mark.parametrize("name", substitutes._GELUS, ids=lambda name: name.rpartition(".")[2])
def test_an_activation_and_its_substitute_agree_to_rounding(name: str) -> None:
    activation = getattr(transformers.activations, name.rpartition(".")[2])()
    substitute = substitutes.substitute_for(activation, None)
    assert substitute is not None
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    torch.testing.assert_close(substitute(x), activation(x), rtol=1e-13, atol=1e-15)


def test_a_subclass_of_an_activation_keeps_its_own() -> None:
    class Other(transformers.activations.NewGELUActivation):
        pass

    assert substitutes.substitute_for(Other(), None) is None
    assert substitutes.substitute_for(transformers.activations.FastGELUActivation(), None) is None
