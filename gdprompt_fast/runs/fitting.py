"""The largest micro-batch of a training that is predicted to fit into a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..data import Example, units_by_context
from ..errors import UserError
from ..loading import positions
from ..models.architecture import causal_lm
from ..plan import PlannedStep, largest_micro_batch, predict
from ..training.options import TrainOptions


def fitting(
    options: TrainOptions, model: nn.Module, examples: Sequence[Example], memory: int
) -> TrainOptions:
    """The options with the most groups at a time that fit, all at once if they do.

    Raises:
        UserError: if not even one group does, saying how much it is predicted to need.
    """
    planned, of_group = _planned(options, model, examples), options.contexts_per_group
    config = causal_lm(model).config
    groups = largest_micro_batch(config, planned, memory) // of_group
    if not groups:
        needed = predict(config, replace(planned, micro_batch=of_group)).peak_bytes
        raise UserError(
            f"memory: expected at least {needed / 1e9:.2f}GB for a group of contexts at a time, "
            f"got {memory / 1e9:.2f}GB"
        )
    all_at_once = groups >= options.batch_size
    print(f"groups at a time in {memory / 1e9:.2f} GB: {min(groups, options.batch_size)}")
    return replace(options, micro_batch=0 if all_at_once else groups)


def _planned(options: TrainOptions, model: Any, examples: Sequence[Example]) -> PlannedStep:
    """The step of a training on its longest rows; the queries of a context as one long row."""
    units = units_by_context(examples, options.queries_per_context)
    queries = max(len(unit) for unit in units)
    response = max(len(example.response) for example in examples)
    if options.objective == "kl":
        response = max(response, options.answer_tokens)
    query = max(len(example.query) for example in examples) + response
    adapters = getattr(model, "peft_config", {})
    dtypes = {parameter.dtype for parameter in model.parameters()}
    in_bf16 = options.compute_dtype == "bfloat16" or torch.bfloat16 in dtypes
    query = min(queries * query, positions(model))
    return PlannedStep(
        batch=options.contexts,
        context=max(len(example.context) for example in examples),
        query=query,
        response=min(queries * response, query - 1),
        inner=options.inner_params,
        outer="lora" if adapters else "full",
        lora_rank=max((each.r for each in adapters.values()), default=1),
        inner_steps=options.inner_steps,
        objective=options.objective,
        recompute=options.recompute,
        dtype="bf16" if in_bf16 else "fp32",
    )
