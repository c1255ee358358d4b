"""``fast_meta_step``: inner step, outer loss, and one backward through both."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..batch import MetaBatch
from ..models.architecture import compute_dtype
from ..models.inner_params import InnerParams, select_inner
from ..models.walk import parameters_of, walked
from ..update.adapted_layer import always_there
from .capture import graphs_of, surroundings, why_eager
from .compute import MetaStep
from .config import MetaStepConfig, MetaStepOutput, Rate, check_step
from .failures import found_on_the_device, pend, raise_pending
from .fingerprint import fingerprint
from .lm_batch import LMBatch
from .parts import lm_parts_of, number_dtype, numbers_of, parts_of
from .replicas import Replicas, replicas_of
from .targets import TeacherTargets
from .verify import verify_model


def fast_meta_step(
    model: nn.Module,
    batch: MetaBatch,
    inner_lr: Rate = 1e-3,
    inner_steps: int = 1,
    inner_params: InnerParams = "full",
    objective: str = "kl",
    teacher: TeacherTargets | None = None,
    outer_reduction: str = "sum",
    lm_weight: float | Tensor = 0.0,
    lm_batch: LMBatch | tuple[Tensor, Tensor] | None = None,
    first_order: bool = False,
    backend: str = "auto",
    recompute: str = "none",
    verify: str = "first",
    micro_groups: int | None = None,
    capture: str = "auto",
    query_count: int | Tensor | None = None,
    lm_count: int | Tensor | None = None,
    config: MetaStepConfig | None = None,
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
        model: a transformers causal LM (Llama, Qwen2, Qwen3, Mistral, GPT-2, GPT-NeoX, XGLM), or
            a PEFT LoRA model around one. Its parameters with ``requires_grad`` are the outer ones;
            hooks of their gradients see the meta-gradient, not the inner one. It is left as it was,
            also after an error. In DistributedDataParallel, or sharded by ``fully_shard``, the
            batches of all processes are one batch, whose losses and ``.grad`` all get:
            docs/distributed.md.
        batch: contexts, queries and groups.
        inner_lr: η: a number; a tensor [] or [G], for every group its own; or one of these tensors
            for each layer that the inner step moves, by the layer's name. Where a tensor requires
            a gradient, its own is added to its ``.grad`` (learnt rates); it has to be > 0 then.
        inner_steps: the number of inner steps.
        inner_params: what the inner step moves: ``"full"`` every base parameter (frozen ones too),
            ``"linear"`` of these the weights of linear layers but the head's, which any server of
            LoRA adapters takes an update of, ``"lora"`` the PEFT adapters, or a callable(name,
            parameter) -> bool.
        objective: ``"kl"`` against ``teacher``, or ``"gold"`` for the NLL of the responses
            themselves.
        teacher: the targets of the KL objective.
        outer_reduction: over the tokens of a response, ``"sum"`` or ``"mean"``; always the mean
            over queries.
        lm_weight: λ, a number or a tensor [].
        lm_batch: for L_LM, the mean over rows of the mean next-token NLL, an LMBatch or a pair
            (ids, mask); the contexts by default.
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
        capture: ``"auto"``: on a GPU, from the second step of a shape on, what can be is replayed
            as a CUDA graph: the same result without Python's time. Batches are padded to sizes of
            a short ladder for it. ``out.eager`` says why a step was none. ``"never"``: none is.
        query_count, lm_count: the denominators of the mean over queries and of L_LM's mean over
            rows, where the batch is a part of a larger one (gradient accumulation, many
            processes), so that gradients and losses of the parts add up, as numbers or tensors
            []; None for the batch's own numbers.
        config: in the place of all options from ``inner_lr`` to ``capture`` but ``teacher``
            and ``lm_batch``.

    Returns:
        Detached losses.

    Raises:
        ValueError: for a bad argument, before anything is computed, naming it, the expected and the
            given.
        FloatingPointError: if an inner loss or the teacher's predictions are not finite; ``.grad``
            is untouched, but for what earlier micro-groups have added. On a GPU, which a step does
            not wait for, it is raised by ``check()`` of what is returned, or by a later step on
            the model, and ``.grad`` holds what is of no use: give ``found_inf`` to a fused
            optimizer, which leaves the weights alone then, or call ``check()`` before its step.

    Out of memory in the last backward leaves ``.grad`` None where it was None, and where it was
    not, with part of this step added: clear it before going on.
    """
    model, replicas = replicas_of(model)
    if replicas is not None:
        raise_pending(model, together=True)
    with nullcontext() if replicas is None else replicas.failing_together():
        if config is None:
            config = MetaStepConfig(
                inner_lr,
                inner_steps,
                inner_params,
                objective,
                outer_reduction,
                lm_weight,
                first_order,
                backend,
                recompute,
                verify,
                micro_groups,
                capture,
            )
        rows = None if lm_batch is None else LMBatch.of(lm_batch)
        if replicas is None:
            return _step(model, None, batch, config, teacher, rows, query_count, lm_count)
        replicas.check(config)
        with replicas.plain():
            return _step(model, replicas, batch, config, teacher, rows, query_count, lm_count)


def _step(
    model: nn.Module,
    replicas: Replicas | None,
    batch: MetaBatch,
    config: MetaStepConfig,
    teacher: TeacherTargets | None,
    rows: LMBatch | None,
    query_count: int | Tensor | None,
    lm_count: int | Tensor | None,
) -> MetaStepOutput:
    with walked(model):
        ran = check_step(model, batch, config, teacher, rows, query_count, lm_count)
        if replicas is None:
            raise_pending(model)
        torch.clear_autocast_cache()  # held open, it would go on with the weights before an update
        inner, device = select_inner(model, config.inner_params), batch.context_ids.device
        if replicas is not None:
            query_count, lm_count = replicas.counts(batch, rows, query_count, lm_count)
        now = fingerprint(model, batch.layout.shape.context_tokens)
        numbers = numbers_of(config, batch, rows, query_count, lm_count, number_dtype(model))
        trained = [p for _, p in parameters_of(model) if p.requires_grad]
        weights = always_there if replicas is None else replicas.weights
        step = MetaStep(model, inner, trained, config, ran, compute_dtype(model), weights)
        why, graphs = why_eager(model, config, device), None
        if not why:
            graphs = graphs_of(model, device, (now, surroundings(model, device), step.kind))
    plain = None if replicas is None else replicas.sharded
    if config.verify == "first" and (batch.layout.real.contexts or plain is not None):
        texts = batch.context_ids, batch.context_mask
        verify_model(model, *texts, inner, ran, config.recompute, now, plain)
    micro_groups, ladder = config.micro_groups, graphs is not None
    parts = parts_of(batch, teacher, micro_groups, ladder)
    lm_parts = lm_parts_of(rows, batch.groups, micro_groups, ladder)
    if replicas is None:
        out = step.run(parts, lm_parts, numbers, graphs, why)
    else:
        with found_on_the_device():
            out = step.run(*replicas.even(parts, lm_parts), numbers, graphs, why)
        out = replicas.finish(out)
    pend(model, out.failures)
    return out
