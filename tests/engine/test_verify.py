"""The look at a model before its first step, and what makes it look again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step, inner_step
from gdprompt_fast.errors import UserError
from gdprompt_fast.meta import verify
from helpers.models import wide_llama

Build = Callable[..., Any]
pytestmark = pytest.mark.transformers
DIFFERS = "expected to compute what its own forward computes"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How long the row of every look was."""
    rows: list[int] = []
    own = verify._own_logits

    def watched(model: Any, row: torch.Tensor, keep: int) -> Any:
        rows.append(row.shape[1])
        return own(model, row, keep)

    monkeypatch.setattr(verify, "_own_logits", watched)
    return rows


def step(model: Any, batch: MetaBatch, **options: Any) -> None:
    fast_meta_step(model, batch, objective="gold", **options)


def test_a_model_is_looked_at_once_on_the_longest_row(
    tiny_model: Build, make_batch: Build, looks: list[int]
) -> None:
    model, batch = tiny_model(), make_batch()
    for _ in range(3):
        step(model, batch)
    assert looks == [8]
    step(model, batch, verify="never")
    step(tiny_model(), batch, verify="never")
    assert looks == [8]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda m: m.model.layers[0].register_forward_hook(lambda *_: None),
    "a forward": lambda m: setattr(m.model.layers[0], "forward", m.model.layers[0].forward),
    "a module": lambda m: setattr(m.model, "norm", torch.nn.Identity()),
    "a flag of a module": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.1),
    "a configuration": lambda m: setattr(m.config, "hidden_act", "gelu"),
    "what is trained": lambda m: m.model.norm.requires_grad_(False),
    "the class of a module": lambda m: setattr(
        m.model.layers[0], "__class__", type("Mine", (type(m.model.layers[0]),), {})
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_looked_at_again(
    change: Callable[[Any], Any], tiny_model: Build, make_batch: Build, looks: list[int]
) -> None:
    model, batch = tiny_model(), make_batch()
    options = dict(inner_params=lambda name, _: "mlp" in name)
    step(model, batch, **options)
    change(model)
    step(model, batch, **options)
    assert len(looks) == 2


def test_a_changed_function_of_the_modeling_file_is_noticed(
    tiny_model: Build, make_batch: Build, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    model, batch = tiny_model(), make_batch()
    step(model, batch)
    own = modeling_llama.rotate_half
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: own(x))
    step(model, batch)
    assert len(looks) == 2


def test_a_model_is_looked_at_again_beyond_its_window(tiny_model: Build, looks: list[int]) -> None:
    model = tiny_model("mistral-sliding-window")
    for tokens in (2, 3, 3, 4, 5):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        inner_step(model, ids, ids == 0)
    assert looks == [2, 4]


def test_what_the_engine_does_not_see_is_an_error_before_anything_has_changed(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model(), make_batch()
    monkeypatch.setattr("gdprompt_fast.models.architecture.check_never_run", lambda *_: None)

    def louder(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = 1.01 * output.logits
        return output

    handle = model.register_forward_hook(louder)
    for call in (
        lambda: step(model, batch),
        lambda: inner_step(model, batch.context_ids, batch.context_mask),
    ):
        with pytest.raises(UserError, match=DIFFERS):
            call()
    assert all(p.grad is None for p in model.parameters())
    step(model, batch, verify="never")
    handle.remove()
    step(model, batch)


def test_a_bad_value_is_an_error(tiny_model: Build, make_batch: Build) -> None:
    with pytest.raises(UserError, match='verify: expected "first" or "never", got True'):
        step(tiny_model(), make_batch(), verify=True)


def test_a_verified_model_is_not_kept_alive(tiny_model: Build, make_batch: Build) -> None:
    model = tiny_model()

    def call(*args: Any, own: Any = model.model.layers[0].forward, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.model.layers[0].forward = call
    step(model, make_batch(), inner_params=lambda name, _: "mlp" in name)
    reference = weakref.ref(model)
    del model, call
    gc.collect()
    assert reference() is None


class Work(TorchDispatchMode):
    """Counts floating-point operations of products, and numbers written."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.numbers = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if count := flop_registry.get(op._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        self.numbers += sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def test_the_look_is_less_than_a_twentieth_of_a_steps_work() -> None:
    model = wide_llama(128)
    ids = torch.randint(1024, (24, 64))
    real = torch.ones_like(ids, dtype=torch.bool)
    response = real & (torch.arange(64) >= 48)
    batch = MetaBatch(ids, real, ids, real, response)
    teacher = TeacherTargets.from_model(model, ids, real, response)
    with Work() as whole:
        fast_meta_step(model, batch, teacher=teacher, verify="never")
    with Work() as look:
        verify.verify_model(model, ids, real, dict(model.named_parameters()), "torch")
    assert 0 < look.flops < 0.05 * whole.flops
    assert 0 < look.numbers < 0.05 * whole.numbers
