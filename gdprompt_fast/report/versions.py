"""What results may depend on besides their settings."""

from __future__ import annotations

import torch
import transformers

from .. import __version__


def versions() -> dict[str, str]:
    """The versions of the packages that do the work."""
    return {
        "gdprompt_fast": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def device_name(device: torch.device) -> str:
    """A GPU by the name of its maker, another device by its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
