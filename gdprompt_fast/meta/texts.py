"""An ordinary step on texts: what a sharded model is trained on beside meta steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed.sharded import as_plain
from ..models.architecture import check_model, compute_dtype
from ..ops.backend import resolve_backend, use_backend
from .gathered import units_of
from .lm_batch import LMBatch
from .outer import lm_backward


def text_backward(model: nn.Module, rows: LMBatch, count: int, weight: float) -> Tensor:
    """Adds the gradient of ``weight`` times the sum of the tokens' weighted NLL, over ``count``, to
    the shards of ``.grad``; all processes of the model call it, each with rows of its own.

    Returns:
        The share of this process's rows in that sum over ``count``, detached.
    """
    with as_plain(model, units_of, compute_dtype) as plain:
        check_model(model)
        parameter = next(model.parameters())
        dtype = compute_dtype(model)
        backend = resolve_backend("auto", parameter.device, dtype or parameter.dtype)
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        divisor, factor = (
            torch.full((), n, dtype=wide, device=parameter.device) for n in (count, weight)
        )
        autocast = torch.autocast(parameter.device.type, enabled=False)
        torch.clear_autocast_cache()  # held open, it would go on with the weights before an update
        with torch.enable_grad(), autocast, use_backend(backend):
            loss = lm_backward(model, rows, divisor, factor, dtype, "block", plain.present)
        plain.finish()
    return loss
