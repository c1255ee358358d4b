"""Bad input: an error that names the argument, before any computation, with ``.grad`` and the model
untouched.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step, inner_step, reference_meta_step
from gdprompt_fast.errors import UserError
from gdprompt_fast.ops.linear import Factor, InnerLinear
from gdprompt_fast.reference.compare import gradients_of, worst_error
from helpers.models import VOCABULARY, llama

Build = Callable[..., Any]
pytestmark = pytest.mark.transformers


def batch_arguments() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 4, dtype=torch.bool)
    response = torch.zeros(2, 4, dtype=torch.bool)
    response[:, 2:] = True
    ids = torch.arange(8).view(2, 4)
    return dict(
        context_ids=ids, context_mask=mask, query_ids=ids, query_mask=mask, response_mask=response
    )


def changed(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


BAD_BATCHES: dict[str, tuple[Callable[[dict], dict], str]] = {
    "float ids": (
        lambda a: dict(context_ids=a["context_ids"].float()),
        r"context_ids: expected a non-empty LongTensor \[C, Tc\], got float32 \[2, 4\]",
    ),
    "one dimension": (lambda a: dict(query_ids=a["query_ids"][0]), r"query_ids: .*got int64 \[4\]"),
    "empty": (lambda a: dict(context_ids=a["context_ids"][:, :0]), r"context_ids: .*non-empty"),
    "no tensor": (lambda a: dict(context_ids=[[1, 2]]), r"context_ids: .*got \[\[1, 2\]\]"),
    "integer mask": (
        lambda a: dict(context_mask=a["context_mask"].long()),
        r"context_mask: expected a BoolTensor .*got int64",
    ),
    "mask of another shape": (
        lambda a: dict(query_mask=a["query_mask"][:, :3]),
        r"query_mask: expected a BoolTensor \[Q, Tq\] = \[2, 4\], got bool \[2, 3\]",
    ),
    "left padding": (
        lambda a: dict(context_mask=changed(a["context_mask"], (1, 0), False)),
        "context_mask: expected right padding .*in row 1",
    ),
    "context of one token": (
        lambda a: dict(context_mask=changed(a["context_mask"], (1, slice(1, None)), False)),
        "context_mask: expected at least 2 real tokens in every row, got 1 in row 1",
    ),
    "empty response": (
        lambda a: dict(response_mask=changed(a["response_mask"], 1, False)),
        "response_mask: expected at least one response token in every row, got none in row 1",
    ),
    "response at position 0": (
        lambda a: dict(response_mask=changed(a["response_mask"], (0, 0), True)),
        "response_mask: expected something before the response .*position 0 of row 0",
    ),
    "response in the padding": (
        lambda a: dict(query_mask=changed(a["query_mask"], (1, 3), False)),
        "response_mask: expected response tokens to be real tokens, got padding in row 1",
    ),
    "group without a context": (
        lambda a: dict(context_group=torch.tensor([0, 2])),
        "context_group: group 1 has no context",
    ),
    "query of an unknown group": (
        lambda a: dict(query_group=torch.tensor([0, 5])),
        "query_group: group 5 has no context",
    ),
    "negative group": (lambda a: dict(query_group=torch.tensor([0, -1])), "query_group: .*got -1"),
    "group of another length": (
        lambda a: dict(context_group=torch.tensor([0])),
        r"context_group: expected a LongTensor \[2\], got int64 \[1\]",
    ),
    "other numbers of rows without groups": (
        lambda a: dict(context_ids=a["context_ids"][:1], context_mask=a["context_mask"][:1]),
        "context_group, query_group: expected both",
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_is_an_error_that_names_the_argument(case: str) -> None:
    arguments = batch_arguments()
    change, message = BAD_BATCHES[case]
    with pytest.raises(ValueError, match=message):
        MetaBatch(**{**arguments, **change(arguments)})


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "negative inner_lr": (dict(inner_lr=-1.0), "inner_lr: expected a finite number >= 0, got -1.0"),
    "NaN inner_lr": (dict(inner_lr=float("nan")), "inner_lr: .*got nan"),
    "no inner step": (dict(inner_steps=0), "inner_steps: expected an integer >= 1, got 0"),
    "half an inner step": (dict(inner_steps=0.5), "inner_steps: .*got 0.5"),
    "unknown inner_params": (dict(inner_params="all"), "inner_params: .*got 'all'"),
    "no adapters": (dict(inner_params="lora"), "inner_params: expected to select some parameters"),
    "unknown objective": (dict(objective="mse"), 'objective: expected "kl" or "gold", got \'mse\''),
    "missing teacher": (dict(objective="kl"), "teacher: expected TeacherTargets .*got None"),
    "teacher for other tokens": (
        dict(objective="kl", teacher=TeacherTargets.from_logits(torch.zeros(3, 67))),
        "teacher: expected targets for R = 6 response tokens and V = 67, got R = 3 and V = 67",
    ),
    "teacher of another vocabulary": (
        dict(objective="kl", teacher=TeacherTargets.from_logits(torch.zeros(6, 66))),
        "teacher: .*got R = 6 and V = 66",
    ),
    "teacher with gold": (
        dict(teacher=TeacherTargets.from_logits(torch.zeros(6, 67))),
        'teacher: expected None with objective="gold"',
    ),
    "unknown reduction": (dict(outer_reduction="max"), "outer_reduction: .*got 'max'"),
    "negative lm_weight": (dict(lm_weight=-0.1), "lm_weight: .*got -0.1"),
    "lm_batch that is no pair": (
        dict(lm_batch=torch.zeros(2)),
        r"lm_batch: expected an LMBatch or a pair",
    ),
    "first_order that is no bool": (dict(first_order="no"), "first_order: expected a bool"),
    "unknown recompute": (dict(recompute="all"), "recompute: expected .*got 'all'"),
    "unknown backend": (dict(backend="cuda"), "backend: expected one of .*got 'cuda'"),
}


@pytest.mark.parametrize("step", [fast_meta_step, reference_meta_step], ids=["fast", "reference"])
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_an_error_that_names_the_argument(
    case: str, step: Callable, tiny_model: Build, make_batch: Build
) -> None:
    model = tiny_model()
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        step(model, make_batch(), **{"objective": "gold", **options})
    assert all(p.grad is None for p in model.parameters())


def assert_untouched(model: nn.Module, attention: str) -> None:
    assert model.config._attn_implementation == attention
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_ids_outside_the_vocabulary_are_an_error(tiny_model: Build, make_batch: Build) -> None:
    batch = make_batch()
    batch.query_ids[0, 0] = 67
    with pytest.raises(ValueError, match=r"query_ids: expected token ids in \[0, 67\), got"):
        fast_meta_step(tiny_model(), batch, objective="gold")


@pytest.mark.parametrize("step", [fast_meta_step, reference_meta_step], ids=["fast", "reference"])
def test_a_nan_in_the_inner_loss_stops_with_gradients_untouched(
    step: Callable, tiny_model: Build, make_batch: Build
) -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"inner loss: .*got nan for group 0 at inner step 1"
    ):
        step(model, make_batch(), objective="gold")
    assert_untouched(model, before)


def test_a_nan_for_one_group_names_it(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model("llama-untied"), make_batch()
    others = set(batch.context_ids[[0, 2]].flatten().tolist())
    alone = next(token for token in batch.context_ids[1, :4].tolist() if token not in others)
    model.model.embed_tokens.weight.data[alone] = float("nan")
    for step in (fast_meta_step, reference_meta_step):
        with pytest.raises(FloatingPointError, match="for group 1"):
            step(model, batch, objective="gold")
        assert all(p.grad is None for p in model.parameters())


def test_bad_teachers_are_errors(tiny_model: Build, make_batch: Build) -> None:
    with pytest.raises(ValueError, match="TeacherTargets: expected logits, or hidden and head"):
        TeacherTargets()
    model, batch = tiny_model(), make_batch()
    teacher = TeacherTargets.from_logits(torch.full((6, 67), float("nan")))
    with pytest.raises(FloatingPointError, match="teacher: expected finite predictions"):
        fast_meta_step(model, batch, teacher=teacher)
    assert all(p.grad is None for p in model.parameters())
    ids, mask = batch.query_ids.clone(), batch.query_mask
    ids[0, 0] = 99
    with pytest.raises(ValueError, match=r"prompt_ids: expected token ids in \[0, 67\)"):
        TeacherTargets.from_model(model, ids, mask, batch.response_mask)


def test_rows_longer_than_learned_positions_are_an_error(tiny_model: Build) -> None:
    model = tiny_model("gpt2-conv1d-positions")
    ids = torch.zeros(1, 33, dtype=torch.long)
    with pytest.raises(ValueError, match=r"context_ids: expected at most 32 tokens .*got 33"):
        inner_step(model, ids, ids == 0)


def test_inference_mode_is_refused(tiny_model: Build, make_batch: Build) -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        fast_meta_step(tiny_model(), make_batch(), objective="gold")


def test_an_inner_loss_that_overflows_at_the_second_step_says_so(
    tiny_model: Build, make_batch: Build
) -> None:
    with pytest.raises(FloatingPointError, match="at inner step 2"):
        fast_meta_step(tiny_model(), make_batch(), objective="gold", inner_lr=1e308, inner_steps=2)


def test_an_error_in_the_middle_leaves_the_model_as_it_was(
    tiny_model: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    before = model.config._attn_implementation

    def fail(*_: Any) -> None:
        raise MemoryError("in the middle of the last backward")

    monkeypatch.setattr(InnerLinear, "factor_cotangents", fail)
    others = {id(thing) for thing in gc.get_objects() if isinstance(thing, Factor)}
    with pytest.raises(MemoryError):
        fast_meta_step(model, make_batch(), objective="gold")
    assert_untouched(model, before)
    held = [thing for thing in gc.get_objects() if isinstance(thing, Factor)]
    held = [factor for factor in held if id(factor) not in others]
    assert not any(factor.x_GSI.numel() or factor.uses for factor in held)


def test_replaced_forwards_and_hooks_on_the_head_are_refused(
    tiny_model: Build, make_batch: Build
) -> None:
    model = tiny_model()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = own = lambda x: 2 * x
    with pytest.raises(ValueError, match=r"own forward of model.layers.0.mlp.up_proj"):
        fast_meta_step(model, make_batch(), objective="gold")
    assert vars(layer)["forward"] is own
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the head, which the losses replace, got a forward hook"):
        fast_meta_step(model, make_batch(), objective="gold")


def test_an_inner_parameter_of_two_layers_is_refused(tiny_model: Build, make_batch: Build) -> None:
    model = tiny_model()
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"one shared by .*layers.0.*q_proj.weight and .*layers.1"):
        fast_meta_step(model, make_batch(), objective="gold")


def test_a_subclass_of_a_supported_model_is_refused(tiny_model: Build, make_batch: Build) -> None:
    model = tiny_model()
    model.__class__ = type("Scaled", (type(model),), {})
    with pytest.raises(ValueError, match=r"model: expected a transformers .*got .*Scaled"):
        fast_meta_step(model, make_batch(), objective="gold")


def test_unsupported_models_are_refused(tiny_model: Build, make_batch: Build) -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="model: expected a transformers causal LM"):
        fast_meta_step(nn.Linear(2, 2), batch, objective="gold")
    model = tiny_model()
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match="model: expected at least one parameter with requires_grad"
    ):
        fast_meta_step(model, batch, objective="gold")


def test_a_parameter_without_a_rule_is_named(tiny_model: Build, make_batch: Build) -> None:
    class OwnLinear(nn.Linear):
        """Might compute anything."""

    model = tiny_model()
    model.model.layers[1].mlp.up_proj = OwnLinear(32, 48, bias=False).double()
    with pytest.raises(
        ValueError, match=r"no rule for parameter model.layers.1.mlp.up_proj.weight"
    ):
        fast_meta_step(model, make_batch(), objective="gold")

    model = tiny_model()
    layer: Any = model.model.layers[1].mlp.up_proj
    layer.scale = nn.Parameter(torch.ones(48, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"linear.Linear, whose rule is for a weight and a bias"):
        fast_meta_step(model, make_batch(), objective="gold")


def test_an_inner_parameter_the_loss_does_not_depend_on_is_named(
    tiny_model: Build, make_batch: Build
) -> None:
    model = tiny_model()
    model.model.spare = nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match=r"inner_params: .*model.spare"):
        fast_meta_step(model, make_batch(), objective="gold")


def test_dora_adapters_are_refused(lora_model: Build, make_batch: Build) -> None:
    model = lora_model("llama-tied", use_dora=True)
    with pytest.raises(ValueError, match=r"plain LoRA on linear layers, got .*Dora"):
        fast_meta_step(model, make_batch(), objective="gold", inner_params="lora")


def test_gradient_checkpointing_is_refused(tiny_model: Build, make_batch: Build) -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing is on"):
        fast_meta_step(model, make_batch(), objective="gold")


def test_active_dropout_is_refused(tiny_model: Build, make_batch: Build) -> None:
    model = tiny_model("gpt2-conv1d-positions").train()
    with pytest.raises(
        ValueError, match=r"expected no active dropout, got 0.1 in transformer.drop"
    ):
        fast_meta_step(model, make_batch(), objective="gold")


def test_autocast_to_fp16_is_refused(tiny_model: Build, make_batch: Build) -> None:
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match=r"autocast to torch.bfloat16 .* got torch.float16"),
    ):
        fast_meta_step(tiny_model(), make_batch(), objective="gold")


def test_the_reference_refuses_autocast(tiny_model: Build, make_batch: Build) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="expected no autocast around the reference"),
    ):
        reference_meta_step(tiny_model(), make_batch(), objective="gold")


def test_inner_step_checks_its_arguments(tiny_model: Build, make_batch: Build) -> None:
    model, batch = tiny_model(), make_batch()
    with pytest.raises(ValueError, match="context_mask: expected a BoolTensor"):
        inner_step(model, batch.context_ids, batch.context_mask.long())
    with pytest.raises(ValueError, match="context_group: group 0 has no context"):
        inner_step(model, batch.context_ids, batch.context_mask, torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match="inner_lr"):
        inner_step(model, batch.context_ids, batch.context_mask, inner_lr="fast")


def test_rotary_tables_that_depend_on_the_length_refuse_padding_beyond_their_limit(
    make_batch: Build,
) -> None:
    model = llama(
        VOCABULARY,
        max_position_embeddings=6,
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0),
    ).double()
    batch = make_batch()
    with pytest.raises(UserError, match=r"context_mask: expected rows of one length beyond 6"):
        fast_meta_step(model, batch, objective="gold")
    with pytest.raises(UserError, match=r"context_mask: expected rows of one length beyond 6"):
        inner_step(model, batch.context_ids, batch.context_mask)
    rows = batch.context_mask.all(1)
    full = MetaBatch(
        batch.context_ids[rows],
        batch.context_mask[rows],
        *(each[rows] for each in (batch.query_ids, batch.query_mask, batch.response_mask)),
    )
    _, expected = gradients_of(reference_meta_step, model, full, objective="gold", inner_lr=0.1)
    _, got = gradients_of(fast_meta_step, model, full, objective="gold", inner_lr=0.1)
    assert worst_error(got, expected)[0] < 1e-5
