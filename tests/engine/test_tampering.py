"""Whatever its user has done to a model, a meta step is exact or refuses with weights untouched."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gdprompt_fast import MetaBatch, fast_meta_step
from gdprompt_fast.errors import UserError
from gdprompt_fast.ops.backend import load_cpp
from gdprompt_fast.reference.compare import without_upcasts
from helpers import models
from helpers.tampering import REFUSED, RUN, TAMPERS, Tamper
from helpers.truth import derivative, dot, objective, random_direction, unit

STEPS = (2e-5, 4e-6, 8e-7)  # the steeper the objective, the smaller
DRAWS = int(os.environ.get("GDPROMPT_FUZZ", "200"))
SIZES = {**models.SIZES, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 31}
INNER = {
    "full": "full",
    "linear": lambda name, p: p.dim() == 2 and "layers" in name and "lora" not in name,
    "norms": lambda name, p: p.dim() == 1 and "norm" in name,
    "mlp": lambda name, p: name.endswith("up_proj.weight") or "up_proj.base_layer.weight" in name,
}


def small_model(tied: bool, family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if family == "qwen3":
        config = Qwen3Config(**SIZES, head_dim=4, tie_word_embeddings=tied)
        return Qwen3ForCausalLM(config).double().eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).double().eval()


def with_lora(model: nn.Module, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="PEFT is an optional dependency")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], **options)
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3)
    return adapted.double()


def small_batch(draw: random.Random) -> MetaBatch:
    """One to three groups of contexts and queries of random lengths."""
    groups = draw.randint(1, 2)
    context_group = [*range(groups), *(draw.randrange(groups) for _ in range(draw.randint(0, 1)))]
    query_group = [draw.randrange(groups) for _ in range(draw.randint(1, 2))]

    def rows(number: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([draw.randint(3, width) for _ in range(number)])
        ids = torch.tensor([[draw.randrange(31) for _ in range(width)] for _ in range(number)])
        return ids, torch.arange(width)[None] < lengths[:, None]

    context_ids, context_mask = rows(len(context_group), 7)
    query_ids, query_mask = rows(len(query_group), 5)
    response = query_mask & (torch.arange(5)[None] >= 2)
    return MetaBatch(
        context_ids,
        context_mask,
        query_ids,
        query_mask,
        response,
        torch.tensor(context_group),
        torch.tensor(query_group),
    )


def check_exact(model: nn.Module, batch: MetaBatch, options: dict[str, Any], seed: int) -> None:
    """The meta-gradient is the derivative of the true objective, in a random direction and in that
    in which first order differs most.
    """
    true = {key: value for key, value in options.items() if key not in ("recompute", "backend")}
    dtype = next(model.parameters()).dtype
    tolerance = 1e-5 if dtype == torch.float64 else 3e-3

    def at() -> float:
        return objective(model, batch, **true)

    def gradient(**more: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        fast_meta_step(model, batch, objective="gold", **options, **more)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with without_upcasts(model):
        exact, first_order = gradient(), gradient(first_order=True)
    model.double()
    exact = {name: g.double() for name, g in exact.items()}
    difference = {name: g - first_order[name] for name, g in exact.items()}
    for v in (random_direction(model, seed), difference):
        v = unit(v)
        got, scale = dot(exact, v), max(float(g.norm()) for g in exact.values())
        estimates = (derivative(model, v, at, step) for step in STEPS)
        assert any(abs(got - each) < tolerance * max(scale, abs(each)) for each in estimates), (
            f"{got} is not the derivative {derivative(model, v, at, STEPS[0])}"
        )
    model.to(dtype)


def run(model: Any, tampers: list[Tamper], options: dict[str, Any], seed: int) -> str:
    """ "exact" or why it was refused; fails on anything else."""
    draw = random.Random(seed)
    batch = small_batch(draw)
    undo = [tamper(model, draw) for tamper in tampers]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        try:
            fast_meta_step(model, batch, objective="gold", **options)
        except UserError as refusal:
            assert all(p.grad is None for p in model.parameters())
            outcome = str(refusal)
        else:
            check_exact(model, batch, options, seed)
            outcome = "exact"
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), f"{name} has changed"
    finally:
        for each in reversed(undo):
            each()
    return outcome


OUTCOMES: Counter[str] = Counter()
OPTIONS = st.fixed_dictionaries(
    {
        "inner_lr": st.sampled_from([0.05, 0.3]),
        "inner_steps": st.sampled_from([1, 1, 2]),
        "recompute": st.sampled_from(["none", "block"]),
        "backend": st.sampled_from(["torch", "cpp"] if load_cpp() else ["torch"]),
        "lm_weight": st.sampled_from([0.0, 0.5]),
        "inner_params": st.sampled_from(sorted(INNER)),
    }
)


@settings(
    max_examples=DRAWS,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    tampers=st.lists(st.sampled_from(RUN), min_size=1, max_size=2, unique=True),
    refused=st.sampled_from([None] * 9 + [REFUSED]),
    lora=st.sampled_from([None, None, {}, {"use_rslora": True}, {"lora_bias": True}]),
    tied=st.booleans(),
    family=st.sampled_from(["llama", "qwen3"]),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    options=OPTIONS,
    seed=st.integers(0, 10**6),
)
def draw_one(
    tampers: list[Tamper],
    refused: tuple[Tamper, ...] | None,
    lora: dict[str, Any] | None,
    tied: bool,
    family: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    seed: int,
) -> None:
    model = small_model(tied, family)
    model = model if lora is None else with_lora(model, **lora)
    if refused is not None:
        tampers = [*tampers, random.Random(seed).choice(refused)]
    options = {**options, "inner_params": INNER[options["inner_params"]]}
    OUTCOMES[run(model.to(dtype), tampers, options, seed)] += 1


def test_a_tampered_model_is_exact_or_refused(cpp: None) -> None:
    OUTCOMES.clear()
    draw_one()
    exact, drawn = OUTCOMES["exact"], OUTCOMES.total()
    reasons = "\n".join(f"{n:5} {reason[:150]}" for reason, n in OUTCOMES.most_common())
    print(f"{drawn} draws, {exact} exact, the rest refused:\n{reasons}")
    assert exact >= 0.7 * drawn, f"{exact} of {drawn} draws are exact:\n{reasons}"


@pytest.mark.parametrize("tamper", TAMPERS, ids=lambda tamper: tamper.__name__)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_tamper_alone_is_exact_or_refused(tamper: Tamper, recompute: str) -> None:
    options = dict(inner_lr=0.3, recompute=recompute, inner_params=INNER["mlp"])
    run(small_model(False, "llama"), [tamper], options, seed=0)
