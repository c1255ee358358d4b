"""What is done to a model with the demonstrations, before it reads a query alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import KeysOrValues, keys_and_values
from .fine_tune import fine_tune
from .layer_causal import layer_causal_fine_tune
from .linearised import linearised_fine_tune
from .observing import Recorder
from .prompts import Prompts
from .recording import record

FT, RATE_0, RANDOM = "ft", "ft-rate-0", "random"
LAYER_CAUSAL, IN_TURN = "layer-causal", "layer-causal-in-turn"
CLIPPED_L2, CLIPPED_MAX = "layer-causal-l2", "layer-causal-max"
LINEARISED = "linearised"
CONTROLS = (RATE_0, RANDOM)


@dataclass(frozen=True)
class Method:
    """A way to put demonstrations into weights.

    Attributes:
        kind: of those above.
        lr: the rate η.
        clip: the largest norm of a step's gradient, for those that are clipped.
        seed: of random numbers.
    """

    kind: str
    lr: float
    clip: float = 0.0
    seed: int = 0


@contextmanager
def recorder_after(method: Method, model: nn.Module, prompts: Prompts) -> Iterator[Recorder]:
    """Inside, records the model as the method leaves it; its weights are then as before.

    Raises:
        FloatingPointError: if the weights diverge.
    """
    device = next(model.parameters()).device
    texts = [torch.tensor(text, device=device) for text in prompts.texts]
    if method.kind == LINEARISED:
        yield linearised_fine_tune(model, texts, method.lr).record
        return
    with _TUNED[method.kind](model, texts, method):
        _check_finite(method, model)
        yield lambda ids, positions: record(model, ids, positions)


def _check_finite(method: Method, model: nn.Module) -> None:
    for layer in _moved(model):
        if not all(parameter.isfinite().all() for parameter in layer.parameters):
            raise FloatingPointError(
                f"{method.kind}: expected finite weights, got others at rate {method.lr:g}"
            )


def _moved(model: nn.Module) -> list[KeysOrValues]:
    return [layer for of_block in keys_and_values(model) for layer in of_block]


Texts = Sequence[Tensor]
Tuned = AbstractContextManager[Any]


@contextmanager
def _random(model: nn.Module, texts: Texts, method: Method) -> Iterator[None]:
    parameters = [parameter for layer in _moved(model) for parameter in layer.parameters]
    before = [parameter.detach().clone() for parameter in parameters]
    with fine_tune(model, texts, method.lr):
        randomise(parameters, before, method.seed)
        yield


@torch.no_grad()
def randomise(parameters: Sequence[Tensor], before: Sequence[Tensor], seed: int) -> None:
    """Puts a random update in the place of each parameter's: as long, and 0 where that is 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter, old in zip(parameters, before, strict=True):
        update = parameter - old
        noise = torch.randn(update.shape, generator=generator).to(update) * (update != 0)
        if noise.any():
            parameter.copy_(old + noise * (update.norm() / noise.norm()))


def _layer_causal(**options: Any) -> Callable[[nn.Module, Texts, Method], Tuned]:
    return lambda model, texts, method: layer_causal_fine_tune(model, texts, method.lr, **options)


def _clipped(norm: str) -> Callable[[nn.Module, Texts, Method], Tuned]:
    return lambda model, texts, method: layer_causal_fine_tune(
        model, texts, method.lr, clip=method.clip, clip_norm=norm
    )


_TUNED: dict[str, Callable[[nn.Module, Texts, Method], Tuned]] = {
    FT: lambda model, texts, method: fine_tune(model, texts, method.lr),
    RATE_0: lambda model, texts, method: fine_tune(model, texts, 0.0),
    RANDOM: _random,
    LAYER_CAUSAL: _layer_causal(),
    IN_TURN: _layer_causal(order="one_after_another"),
    CLIPPED_L2: _clipped("l2"),
    CLIPPED_MAX: _clipped("linf"),
}
