"""The memory of a step from shapes alone: the step itself is run, on tensors without data.

Counted are the tensors, as PyTorch's own operators make them. On a GPU the Triton kernels make
other small temporaries, and the CUDA context and what the caching allocator holds in reserve come
on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..batch import MetaBatch
from ..errors import UserError
from ..loading import add_lora, positions
from ..meta.step import fast_meta_step
from ..meta.targets import TeacherTargets
from ..models.architecture import causal_lm
from ..models.families import plain_attention
from ..ops.blocks import abridged_loops
from ..reference.lean_maml import LeanMAML, all_alive, sequential
from ..update.adapted_layer import AdaptedLayer
from .layers import Run, run_layers
from .parts import LOSS_TILES, PeakParts
from .shapes import ShapesOnly
from .step import DTYPES, PlannedStep
from .timeline import Parts, Timeline

WEIGHTS, CAST, GRADIENTS = "weights", "weights cast for the step", "gradients"
OPTIMIZER, TEACHER = "optimizer", "teacher's head and states"
FACTORS, ACTIVATIONS = "factors of θ'", "activations"
PARTS = (WEIGHTS, CAST, GRADIENTS, OPTIMIZER, TEACHER, FACTORS, ACTIVATIONS, LOSS_TILES)


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes, by part, at the peak of each half of a training step.

    Attributes:
        meta_step: the forward and backward passes.
        optimizer_step: the update of the weights that follows; empty without an optimizer.
        parameters: the number of the model's weights, adapters included.
    """

    parameters: int
    meta_step: Parts
    optimizer_step: Parts

    @property
    def peak_bytes(self) -> int:
        """The peak of the whole."""
        return max(sum(self.meta_step.values()), sum(self.optimizer_step.values()))

    @property
    def captured_peak_bytes(self) -> int:
        """The peak where captured steps keep their memory in a pool, so that the optimizer's
        temporaries come on top of it.
        """
        states, with_temporaries = (
            parts.get(OPTIMIZER, 0) for parts in (self.meta_step, self.optimizer_step)
        )
        return sum(self.meta_step.values()) + max(0, with_temporaries - states)


@dataclass(frozen=True)
class Materialised:
    """The memory with all adapted copies alive at once.

    Attributes:
        one: for a single example.
        two: for two.
        copy: bytes by part that each further example adds: its θ' and its graph. The second may add
            other than that, where its arrival moves the peak to another moment.
    """

    one: Prediction
    two: Prediction
    copy: Parts

    def at(self, batch: int) -> Prediction:
        if batch == 1:
            return self.one
        more = batch - 2
        parts = {p: self.two.meta_step.get(p, 0) + more * size for p, size in self.copy.items()}
        return replace(self.two, meta_step=parts)


def predict(config: PreTrainedConfig, planned: PlannedStep) -> Prediction:
    """The memory of ``fast_meta_step`` and of the optimizer after it.

    The optimizer has its states, and ``.grad`` is None before the step. It updates all weights at
    once (``foreach``), as PyTorch does on a GPU: Adam then makes a temporary of the size of them
    all.

    Raises:
        ValueError: naming the option that does not fit the model, or the model if it is of an
            unknown architecture.
    """
    run = planned
    if 0 < planned.micro_batch < planned.batch:  # from the second part on all are alike
        run = replace(planned, batch=min(planned.batch, 2 * planned.micro_batch))
    predicted = _prediction(run_layers(lambda layers: run_step(layers, run), config))
    more = (planned.batch - run.batch) * _teacher_bytes(config, planned)
    if not more:
        return predicted
    at_peak = {**predicted.meta_step, TEACHER: predicted.meta_step.get(TEACHER, 0) + more}
    return replace(predicted, meta_step=at_peak)


def run_step(config: PreTrainedConfig, planned: PlannedStep) -> Run:
    """``fast_meta_step`` and the optimizer's, on the whole model."""
    model, batch = model_on_meta(config, planned), _batch(planned)
    with ShapesOnly(), abridged_loops():
        _take_shapes(model)
        optimizer = _optimizer(model, planned.optimizer)
        teacher = _teacher(config, planned)
        meta_step = _meta_step(model, batch, planned, teacher, optimizer)
        return Run(_parameters(model), meta_step, _optimizer_step(model, optimizer))


def _prediction(run: Run) -> Prediction:
    return Prediction(run.parameters, run.meta_step.at_peak(), run.optimizer_step.at_peak())


def predict_sequential(config: PreTrainedConfig, planned: PlannedStep) -> Prediction:
    """The memory of exact MAML by autograd's own double backward, one example at a time: that of
    ``reference.lean_maml.sequential`` on an example after the first, when the gradients are there.
    """
    return _predict_autograd(config, replace(planned, batch=1), sequential, with_gradients=True)


def predict_materialised(config: PreTrainedConfig, planned: PlannedStep) -> Materialised:
    """The memory with every example's θ' and its graph alive at once: that of
    ``reference.lean_maml.all_alive``, run for one, two and three examples.
    """
    one, two, three = (
        _predict_autograd(config, replace(planned, batch=batch), all_alive, with_gradients=False)
        for batch in (1, 2, 3)
    )
    copy = {part: three.meta_step.get(part, 0) - two.meta_step.get(part, 0) for part in PARTS}
    return Materialised(one, two, copy)


def _predict_autograd(
    config: PreTrainedConfig,
    planned: PlannedStep,
    step: Callable[[LeanMAML], None],
    with_gradients: bool,
) -> Prediction:
    return _prediction(
        run_layers(lambda layers: run_autograd(layers, planned, step, with_gradients), config)
    )


def run_autograd(
    config: PreTrainedConfig,
    planned: PlannedStep,
    step: Callable[[LeanMAML], None],
    with_gradients: bool,
) -> Run:
    """MAML by autograd and the optimizer's step, on the whole model."""
    model, batch = model_on_meta(config, planned), _batch(planned)
    with ShapesOnly():
        _take_shapes(model)
        optimizer = _optimizer(model, planned.optimizer)
        teacher = _teacher(config, planned)
        if with_gradients:
            for parameter in _trained(model):
                parameter.grad = torch.empty_like(parameter)
        memory = PeakParts(ACTIVATIONS, _present(model, teacher, optimizer))
        memory.mark(GRADIENTS, _gradients(model))
        with memory, _autocast(planned):
            step(
                LeanMAML(
                    model,
                    batch,
                    teacher,
                    inner_params=planned.inner,
                    inner_steps=planned.inner_steps,
                )
            )
        memory.mark(GRADIENTS, _gradients(model))
        return Run(_parameters(model), memory.timeline(), _optimizer_step(model, optimizer))


def model_on_meta(config: PreTrainedConfig, planned: PlannedStep) -> Any:
    """Weights that are trained are fp32; those frozen beside adapters are in the dtype of the
    step.
    """
    frozen = planned.outer == "lora"
    dtype = DTYPES[planned.dtype] if frozen else torch.float32
    if getattr(config, "quantization_config", None):
        raise UserError("model: expected weights that are not quantised, got quantization_config")
    with torch.device("meta"):
        model = _built(config, dtype)
        causal_lm(model)
        for name in ("context", "query"):
            if getattr(planned, name) > positions(model):
                raise UserError(
                    f"{name}: expected at most the model's {positions(model)} positions, "
                    f"got {getattr(planned, name)}"
                )
        return add_lora(model, planned.lora_rank, seed=0) if frozen else model


def _built(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration, with the attention that the engine takes the place of."""
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=plain_attention(config.model_type)
        )
    except Exception as error:  # transformers has errors of many types for a faulty configuration
        reason = str(error).strip().partition("\n")[0][:300]
        raise UserError(f"model: expected one that can be built, got {reason}") from error
    heads = getattr(config, "num_attention_heads", None)
    key_value_heads = getattr(config, "num_key_value_heads", None)
    if heads and key_value_heads and heads % key_value_heads:
        raise UserError(
            f"model: expected num_key_value_heads to divide the {heads} heads, "
            f"got {key_value_heads}"
        )
    return model.eval()


def _take_shapes(model: nn.Module) -> None:
    """Puts tensors made here, on the CPU, in the place of a model's own on the meta device."""
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    causal_lm(model).tie_weights()


def _batch(planned: PlannedStep) -> MetaBatch:
    context_ids = torch.zeros(planned.batch, planned.context, dtype=torch.long)
    query_ids = torch.zeros(planned.batch, planned.query, dtype=torch.long)
    real = torch.ones_like(query_ids, dtype=torch.bool)
    is_response = torch.arange(planned.query) >= planned.query - planned.response
    context_mask = torch.ones_like(context_ids, dtype=torch.bool)
    return MetaBatch(context_ids, context_mask, query_ids, real, real & is_response)


def _teacher(config: PreTrainedConfig, planned: PlannedStep) -> TeacherTargets | None:
    """The teacher itself is not on the card with the model: its final states and its head are."""
    if planned.objective == "gold":
        return None
    dtype, tokens = DTYPES[planned.dtype], planned.batch * planned.response
    hidden = torch.empty(tokens, config.hidden_size, dtype=dtype)
    head = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
    return TeacherTargets(hidden=hidden, head=head)


def _teacher_bytes(config: PreTrainedConfig, planned: PlannedStep) -> int:
    """The teacher's final states of an example."""
    if planned.objective == "gold":
        return 0
    return int(planned.response * config.hidden_size * DTYPES[planned.dtype].itemsize)


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer | None:
    """An optimizer that has taken a step, and so has its states."""
    trained = _trained(model)
    optimizer: torch.optim.Optimizer
    if name == "none":
        return None
    if name == "adam":
        optimizer = torch.optim.Adam(trained, foreach=True)
    else:
        optimizer = torch.optim.SGD(trained, foreach=True)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _autocast(planned: PlannedStep) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=planned.dtype == "bf16")


def _meta_step(
    model: Any,
    batch: MetaBatch,
    planned: PlannedStep,
    teacher: TeacherTargets | None,
    optimizer: torch.optim.Optimizer | None,
) -> Timeline:
    memory = PeakParts(CAST, _present(model, teacher, optimizer))
    passes = 0

    def before_a_pass(*_: Any) -> None:
        nonlocal passes
        memory.part = ACTIVATIONS
        if (
            passes % (planned.inner_steps + 1) == planned.inner_steps
        ):  # the contexts are done, the queries follow
            memory.mark(FACTORS, _factors(model))
        passes += 1

    hook = causal_lm(model).base_model.register_forward_pre_hook(before_a_pass)
    with memory, _autocast(planned):
        fast_meta_step(model, batch, teacher=teacher, config=planned.step_config)
    hook.remove()
    memory.mark(GRADIENTS, _gradients(model))
    return memory.timeline()


def _optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Timeline:
    if optimizer is None:
        return Timeline([])
    memory = PeakParts(OPTIMIZER, _present(model, None, optimizer))
    memory.mark(GRADIENTS, _gradients(model))
    with memory:
        optimizer.step()
    return memory.timeline()


def _present(
    model: nn.Module, teacher: TeacherTargets | None, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    states = [] if optimizer is None else optimizer.state.values()
    return {
        WEIGHTS: [*model.parameters(), *model.buffers()],
        TEACHER: [] if teacher is None else [teacher.hidden, teacher.head],
        OPTIMIZER: [t for state in states for t in state.values() if isinstance(t, Tensor)],
    }


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _factors(model: nn.Module) -> Iterator[Tensor]:
    """What makes θ' of θ in all adapted layers."""
    for module in model.modules():
        adapted_layer = getattr(vars(module).get("forward"), "__self__", None)
        if isinstance(adapted_layer, AdaptedLayer):
            yield from adapted_layer.factor_tensors()
