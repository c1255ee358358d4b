"""``fast_meta_step``: inner step, outer loss, and one backward through both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import MetaBatch
from ..models.architecture import compute_dtype, predicting_states
from ..models.inner_params import InnerParams, select_inner
from ..ops.backend import use_backend
from ..ops.phase import Phase
from ..ops.rows import GroupedRows
from ..update.attach import AdaptedModel
from ..update.site import StepState
from .config import LMBatch, MetaStepOutput, check_step
from .failures import clean_after_error
from .inner import take_inner_steps
from .outer import lm_backward, outer_target, response_weights
from .parts import Counts, Part, counts_of, lm_parts_of, parts_of
from .targets import TeacherTargets
from .verify import verify_model


def fast_meta_step(
    model: nn.Module,
    batch: MetaBatch,
    inner_lr: float = 1e-3,
    inner_steps: int = 1,
    inner_params: InnerParams = "full",
    objective: str = "kl",
    teacher: TeacherTargets | None = None,
    outer_reduction: str = "sum",
    lm_weight: float = 0.0,
    lm_batch: LMBatch | None = None,
    first_order: bool = False,
    backend: str = "auto",
    recompute: str = "none",
    verify: str = "first",
    micro_groups: int | None = None,
    query_count: int | None = None,
    lm_count: int | None = None,
) -> MetaStepOutput:
    """Adds the exact meta-gradient of a batch to ``.grad``, as ``loss.backward()`` would.

    For every group i with contexts c_i and queries q_i with responses r_i (arXiv 2506.20989, §3)::

        θ'_i  = θ − η ∇_θ L(c_i, θ)                                inner_steps times
        outer = mean over queries of
                Σ_j KL(P_teacher(· | c_i ⊕ q_i ⊕ r_i,<j) ‖ P_θ'_i(· | q_i ⊕ r_i,<j))
                + λ L_LM(θ)                                        objective="kl" (eq. 8)

    L is the mean over the group's contexts of each one's mean next-token NLL. The meta-gradient
    ∇_θ outer goes through the inner step. No θ'_i is ever formed; the cost is about two ordinary
    training steps on the same tokens.

    Under ``torch.autocast`` to bfloat16, activations and matrix products are in bfloat16 (the
    residual stream too, as in a model loaded in it), of one copy of the weights made for the step;
    weights, ``.grad`` and the sums inside norms and losses stay in fp32.

    Args:
        model: a transformers causal LM (Llama, Qwen2, Qwen3, Mistral, GPT-2, GPT-NeoX), or a PEFT
            LoRA model around one. Its parameters with ``requires_grad`` are the outer ones; hooks
            of their gradients see the meta-gradient, not the inner one. It is left as it was, also
            after an error.
        batch: contexts, queries and groups.
        inner_lr: η.
        inner_steps: the number of inner steps.
        inner_params: what the inner step moves: ``"full"`` every base parameter (frozen ones too),
            ``"lora"`` the PEFT adapters, or a callable(name, parameter) -> bool.
        objective: ``"kl"`` against ``teacher``, or ``"gold"`` for the NLL of the responses
            themselves.
        teacher: the targets of the KL objective.
        outer_reduction: over the tokens of a response, ``"sum"`` or ``"mean"``; always the mean
            over queries.
        lm_weight: λ.
        lm_batch: (ids, mask) for L_LM, the mean over rows of the mean next-token NLL; the contexts
            by default.
        first_order: drop the second-order term (first-order MAML): cheaper, and another gradient.
        backend: ``"torch"``, ``"cpp"`` (a CPU; no fp16), ``"triton"`` (a GPU; no fp64), or
            ``"auto"``: Triton or C++ where it can run.
        recompute: ``"block"`` keeps of every transformer block its input and the factors of its
            update only, and computes the rest again where a pass needs it: half to four fifths of
            the memory, mostly 1.4 to 1.6 times the time, the same gradient. ``"none"`` keeps all.
        verify: ``"first"`` holds, at the first step on a model and whenever the model has changed,
            the engine's logits on the longest context against those of the model's own forward,
            and its graph against what is twice differentiable; ``"never"`` does not.
        micro_groups: groups at a time, into the same ``.grad``: the memory of so many; None takes
            all at once.
        query_count, lm_count: the denominators of the mean over queries and of L_LM's mean over
            rows, where the batch is a part of a larger one (gradient accumulation, many
            processes), so that gradients and losses of the parts add up; None for the batch's own
            numbers.

    Returns:
        Detached losses.

    Raises:
        ValueError: for a bad argument, before anything is computed, naming it, the expected and the
            given.
        FloatingPointError: if an inner loss or the teacher's predictions are not finite; ``.grad``
            is untouched, but for what earlier micro-groups have added.

    Out of memory in the last backward leaves ``.grad`` None where it was None, and where it was
    not, with part of this step added: clear it before going on.
    """
    ran = check_step(
        model,
        batch,
        inner_lr,
        inner_steps,
        objective,
        teacher,
        outer_reduction,
        lm_weight,
        lm_batch,
        first_order,
        backend,
        recompute,
        verify,
        micro_groups,
        query_count,
        lm_count,
    )
    torch.clear_autocast_cache()  # held open, it would go on with the weights before an update
    inner = select_inner(model, inner_params)
    if verify == "first":
        verify_model(model, batch.context_ids, batch.context_mask, inner, ran, recompute)
    counts = counts_of(batch, lm_batch, query_count, lm_count)
    step = _Step(
        model,
        inner,
        float(inner_lr),
        inner_steps,
        outer_reduction,
        lm_weight,
        lm_on_contexts=lm_batch is None,
        second_order=not first_order,
        dtype=compute_dtype(model),
        recompute=recompute,
        counts=counts,
    )
    autocast = torch.autocast(batch.context_ids.device.type, enabled=False)  # sites cast themselves
    with torch.enable_grad(), autocast, use_backend(ran), clean_after_error(model):
        shares = [step.backward(part) for part in parts_of(batch, teacher, micro_groups)]
        query_loss, lm_loss, inner_loss = map(_sum, zip(*shares, strict=True))
        if lm_batch is not None:
            rows = lm_parts_of(lm_batch, batch.groups, micro_groups)
            options = (counts.lm_rows, lm_weight, step.dtype, recompute)
            lm_loss = _sum([lm_backward(model, part, *options) for part in rows])
    return MetaStepOutput(
        outer_loss=query_loss + lm_weight * lm_loss,
        query_loss=query_loss,
        lm_loss=lm_loss,
        inner_loss=inner_loss / batch.groups,
        backend=ran,
    )


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


@dataclass(frozen=True)
class _Step:
    """What the parts of a step have in common; the names are those of ``fast_meta_step``."""

    model: nn.Module
    inner: dict[str, nn.Parameter]
    inner_lr: float
    inner_steps: int
    outer_reduction: str
    lm_weight: float
    lm_on_contexts: bool
    second_order: bool
    dtype: torch.dtype | None
    recompute: str
    counts: Counts

    def backward(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the meta-gradient of some groups to ``.grad``.

        Returns:
            Their shares of the query loss and of the contexts' L_LM, and the sum of their inner
            losses, detached.
        """
        batch, steps = part.batch, self.inner_steps
        state = StepState(batch.groups, self.inner_lr, Phase(self.second_order), self.dtype)
        adapted = AdaptedModel(self.model, self.inner, state)
        with adapted.differentiable(self.recompute):
            rows = GroupedRows(batch.context_group, batch.groups)
            keep_graph = self.lm_on_contexts and self.lm_weight > 0
            tokens = batch.context_ids, batch.context_loss_mask
            nll_C, inner_loss = take_inner_steps(adapted, *tokens, rows, steps, keep_graph)
            query_loss = self._query_loss(adapted, part)
            lm = nll_C.sum() / self.counts.lm_rows
            (query_loss + self.lm_weight * lm if keep_graph else query_loss).backward()
            adapted.release()
        return query_loss.detach(), lm.detach(), inner_loss * batch.groups

    def _query_loss(self, adapted: AdaptedModel, part: Part) -> Tensor:
        """The share of the part's queries in the mean of the outer loss at each group's θ'."""
        batch = part.batch
        queries = GroupedRows(batch.query_group, batch.groups)
        hidden_BTD = adapted.hidden_states(batch.query_ids, queries, self.inner_steps)
        hidden_RD = predicting_states(hidden_BTD, batch.response_mask)
        token_group = batch.query_group.repeat_interleave(batch.response_mask.sum(1))
        rows = GroupedRows(token_group, batch.groups)
        target = outer_target(batch, part.teacher, rows, adapted.state)
        losses_R = adapted.vocabulary.response_loss(hidden_RD, target, rows)
        adapted.state.raise_flagged()
        weights = response_weights(batch, self.counts.queries, self.outer_reduction, losses_R.dtype)
        return (losses_R * weights).sum()
