"""Between a step's first kernel and its losses nothing is read back from the device: with all that
depends on the batch's values made before, the passes run on tensors without values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gdprompt_fast import MetaBatch
from gdprompt_fast.models.inner_params import select_inner
from gdprompt_fast.ops.backend import use_backend
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.ops.vocabulary import KLTarget, NLLTarget
from gdprompt_fast.rows import GroupedRows
from gdprompt_fast.update.adapted_layer import StepState
from gdprompt_fast.update.attach import AdaptedModel
from helpers.models import MODELS
from helpers.tape import NoReads

Build = Callable[..., Any]
pytestmark = pytest.mark.transformers


class Step:
    """A step on a batch, of which all that depends on the batch's values is made before."""

    def __init__(self, model: nn.Module, batch: MetaBatch, inner: str) -> None:
        self.model, self.batch = model, batch
        self.inner = select_inner(model, inner)
        self.groups = batch.groups
        self.contexts = GroupedRows(batch.context_group, batch.groups)
        self.queries = GroupedRows(batch.query_group, batch.groups)
        self.row, position = batch.response_mask.nonzero(as_tuple=True)
        self.predicting = position - 1
        self.tokens = GroupedRows(batch.query_group[self.row], batch.groups)
        self.ids = batch.query_ids[self.row, position]
        self.weight = batch.context_mask.roll(-1, 1).double()

    def run(self, teacher: Tensor | None, steps: int, recompute: str, dtype: torch.dtype) -> None:
        eta = torch.full((), 0.1, dtype=torch.float64).requires_grad_()
        state = StepState(self.groups, eta, Phase(second_order=True))
        adapted = AdaptedModel(self.model, self.inner, state)
        with adapted.differentiable(recompute):
            context_ids = self.batch.context_ids
            adapted.vocabulary.vocabulary.begin_contexts(context_ids, self.contexts)
            for level in range(steps):
                hidden = adapted.hidden_states(context_ids, self.contexts, level)
                nll_C = adapted.vocabulary.context_loss(hidden, self.weight.to(dtype))
                adapted.inner_step(nll_C.sum(), retain_graph=False)
            hidden = adapted.hidden_states(self.batch.query_ids, self.queries, steps)
            target = (
                NLLTarget(self.tokens.to_groups(self.ids))
                if teacher is None
                else KLTarget(self.tokens.to_groups(teacher), None, None)
            )
            predicting = hidden[self.row, self.predicting]
            losses = adapted.vocabulary.response_loss(predicting, target, self.tokens)
            (losses.sum() + nll_C.sum()).backward()
            adapted.release()


@pytest.mark.usefixtures("on_each_backend")
@pytest.mark.parametrize("name", MODELS)
def test_a_step_reads_nothing_back(name: str, tiny_model: Build, make_batch: Build) -> None:
    step = Step(tiny_model(name), make_batch("uneven"), "full")
    teacher = torch.randn(len(step.ids), 67, dtype=torch.float64)
    with NoReads():
        step.run(teacher, 2, "none", torch.float64)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("inner", ["full", "lora"])
def test_a_step_with_adapters_or_recomputed_blocks_reads_nothing_back(
    inner: str, recompute: str, lora_model: Build, make_batch: Build
) -> None:
    step = Step(lora_model("llama-tied"), make_batch("grouped"), inner)
    with NoReads(), use_backend("torch"):
        step.run(None, 1, recompute, torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_runs_on_tensors_without_values(name: str, make_batch: Build) -> None:
    batch = make_batch("grouped")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = MODELS[name]().eval()
    step = Step(model, batch, "full")
    with FakeTensorMode(allow_non_fake_inputs=True), use_backend("torch"):
        step.run(None, 1, "none", torch.float32)
    assert all(p.grad is not None for p in model.parameters())
