"""What transformers' Trainer offers and a meta step cannot be trained with, and why."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from ..errors import UserError
from ..models.architecture import check_model
from ..models.inner_params import select_inner
from ..models.walk import parameters_of

CHECKPOINTING = (
    "it recomputes with the wrong weights inside a meta step; "
    'recompute="block" saves the memory and is exact'
)
COMPILE = (
    "a compiled module's second derivative can be wrong; "
    "on a GPU steps are replayed as CUDA graphs by themselves (capture)"
)
FP16 = "its range needs a scaled loss, through which no inner step goes; bf16 is supported"
SHARDED = "a step needs whole weights; several processes each with all of them are supported"
# The arguments that have to be off, with the reason.
REFUSED = {
    "gradient_checkpointing": CHECKPOINTING,
    "activation_checkpointing": CHECKPOINTING,
    "torch_compile": COMPILE,
    "torch_compile_backend": COMPILE,
    "torch_compile_mode": COMPILE,
    "use_liger_kernel": "its layers have no second derivative; the step has kernels of its own",
    "fp16": FP16,
    "fp16_full_eval": FP16,
    "label_smoothing_factor": "the outer loss is the KL to the teacher, or the responses' NLL",
    "neftune_noise_alpha": "with noise in the embeddings inner and outer pass see other models",
    "optim_target_modules": "optimizers that work layer by layer step inside the backward",
    "deepspeed": "it runs the backward and keeps the gradients itself, as a meta step does",
    "fsdp": SHARDED,
    "parallelism_config": SHARDED,
    "remove_unused_columns": "context, query and response are no arguments of the model's forward",
}
# They update weights while a backward is under way that still needs them.
IN_BACKWARD = ("lomo", "adalomo")
DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def check_arguments(args: TrainingArguments) -> None:
    """
    Raises:
        UserError: naming the argument that has to be off, and why.
    """
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        if value:
            raise UserError(f"{name}: expected it to be off, got {value!r}: {reason}")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim.endswith("layerwise") or optim in IN_BACKWARD:
        raise UserError(
            "optim: expected an optimizer that steps on whole gradients, got "
            f'"{optim}", which updates weights inside the backward that still needs them'
        )


def check_devices(args: TrainingArguments) -> None:
    """
    Raises:
        UserError: where one process has several GPUs, among which DataParallel would copy the
            model.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"n_gpu: expected one GPU a process, got {args.n_gpu}: DataParallel's copies of a "
            "model have no second derivative; start a process a GPU (accelerate launch, torchrun), "
            "or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def check_accelerator(accelerator: Accelerator) -> None:
    """What a configuration of accelerate, or its environment, turns on by itself.

    Raises:
        UserError: naming what it is.
    """
    kind, precision = accelerator.distributed_type, accelerator.mixed_precision
    if kind not in DISTRIBUTED:
        raise UserError(
            f"accelerate: expected one process, or several with whole models, got {kind.value}: "
            f"{SHARDED}"
        )
    if precision not in ("no", "bf16"):
        raise UserError(f'mixed_precision: expected "no" or "bf16", got "{precision}": {FP16}')
    backend = getattr(accelerator.state.dynamo_plugin, "backend", None)
    if backend is not None and backend.value != "NO":
        raise UserError(f"dynamo_backend: expected none, got {backend.value}: {COMPILE}")


def check_others(given: dict[str, Any]) -> None:
    """
    Raises:
        UserError: for the arguments of ``Trainer`` that have no meaning here.
    """
    reasons = {
        "compute_loss_func": "the loss is that of the meta step",
        "model_init": "the teacher answers once, for one initial model",
    }
    for name, reason in reasons.items():
        if given.get(name) is not None:
            raise UserError(f"{name}: expected None, got {given[name]!r}: {reason}")


def check_trained(model: nn.Module, inner_params: str) -> None:
    """
    Raises:
        UserError: for a model that no step can be taken on, or whose trained weights are too coarse
            for the steps of an optimizer.
    """
    check_model(model)
    select_inner(model, inner_params)
    for name, parameter in parameters_of(model):
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"model: expected float32 weights where they are trained, got {dtype} in {name}: "
                "an optimizer's steps are smaller than its rounding; load it with "
                "dtype=torch.float32, bf16=True then computes in bfloat16"
            )
