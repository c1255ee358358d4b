"""Whether a check fits the memory."""

from __future__ import annotations

import torch
from torch import nn

from ..models.inner_params import InnerParams, select_inner

# Vectors alive at once beside the copy of the model: θ', the inner gradient, ∂outer/∂θ' and sums on
# the way, of what is moved; the meta-gradients, their difference, the model's own terms and a
# direction, of what is trained.
OF_MOVED, OF_TRAINED = 5, 9


def obstacle_to(
    dtype: torch.dtype, model: nn.Module, backend: str, inner_params: InnerParams
) -> str | None:
    """Why the gradients cannot be compared in ``dtype``; None if they can.

    Activations are not counted: a tenth of the memory is left to them.
    """
    if backend == "triton" and dtype == torch.float64:
        return "Triton does not have it"
    needed = dtype.itemsize * _elements(model, inner_params)
    available = _available_bytes(next(model.parameters()).device)
    if available is None or needed <= 0.9 * available:
        return None
    return f"it takes about {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free"


def _elements(model: nn.Module, inner_params: InnerParams) -> int:
    moved = sum(p.numel() for p in select_inner(model, inner_params).values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    return everything + OF_MOVED * moved + OF_TRAINED * trained


def _available_bytes(device: torch.device) -> int | None:
    """Free memory; None where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
