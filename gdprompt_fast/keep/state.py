"""θ' in the place of θ in a model's state dict."""

from __future__ import annotations


from torch import Tensor

from ..update.adapted_layer import AdaptedLayer
from ..update.attach import AdaptedModel
from .layers import values_at


def state_of(adapted: AdaptedModel, group: int) -> dict[str, Tensor]:
    """The model's state dict with what the inner step moves at θ' of a group, in the weights' own
    dtypes; a tied embedding and its head are one tensor.
    """
    state = dict(adapted.model.state_dict())
    changes: dict[AdaptedLayer, dict[str, Tensor]] = {}
    for path, module in adapted.model.named_modules(remove_duplicate=False):
        layer = adapted.layer_of(module)
        if layer is None or not layer.moving:
            continue
        if layer not in changes:
            changes[layer] = values_at(module, layer.change(group))
        for name, value in changes[layer].items():
            state[f"{path}.{name}"] = value
    return state
