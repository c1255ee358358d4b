"""Linearised fine-tuning: the model's first-order expansion at θ0 learns, its weights stay.

    f_lin(x; θ) = f(x; θ0) + J(x) (θ − θ0)

Only keys and values move, by Δθ = −η Σ over texts of Jᵀ ∂L/∂logits at f_lin. Of a layer
y = x Wᵀ + b that is, with X its inputs and E the cotangents of its outputs at all tokens,

    ΔW = −η Eᵀ X,   Δb = −η Σ_t e_t,   so   x ΔWᵀ = −η (x Xᵀ) E

and ΔW is never formed. J Δθ is a forward-mode derivative through every operation of the model, in
which each such layer adds x ΔWᵀ + Δb to the tangent of its output. So there is one copy of the
model and one text's activations, where a tangent of all parameters is a copy more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .blocks import KeysOrValues, hooked, keys_and_values
from .fine_tune import check_tuning, mean_nll, trains_only
from .recording import Recorded, record


class FactoredChange:
    """ΔW and Δb of one layer's keys or values, in factors; nothing at first.

    Attributes:
        of: the layer.
        lr: η.
        x_NI: its inputs at all N tokens learnt from; keys and values of a block have it together.
        e_NR: the cotangents there of the R outputs that are keys or values; η is not in them, so
            that no rounding of η e is.
    """

    def __init__(self, of: KeysOrValues, lr: float) -> None:
        self.of, self.lr = of, lr
        self.x_NI: Tensor | None = None
        self.e_NR: Tensor | None = None

    def add(self, x_NI: Tensor, e_TR: Tensor) -> None:
        """Another text's cotangents, and the inputs with that text's after those before."""
        self.x_NI, self.e_NR = x_NI, _after(self.e_NR, e_TR)

    def of_input(self, x: Tensor) -> Tensor | None:
        """x ΔWᵀ + Δb [..., O] of inputs [..., I]; None while there is no change."""
        if self.x_NI is None or self.e_NR is None:
            return None
        change = (x @ self.x_NI.mT) @ self.e_NR
        if self.of.layer.bias is not None:
            change += self.e_NR.sum(0)
        return self.of.among_all(change.mul_(-self.lr))

    def gradients(self) -> list[Tensor]:
        """Δθ/−η of :attr:`KeysOrValues.parameters`, in full: for one that is to be looked at."""
        if self.x_NI is None or self.e_NR is None:
            return [torch.zeros_like(parameter) for parameter in self.of.parameters]
        e_NO = self.of.among_all(self.e_NR)
        weight = self.x_NI.mT @ e_NO if self.of.transposed else e_NO.mT @ self.x_NI
        return [weight, e_NO.sum(0)][: len(self.of.parameters)]


def _after(before: Tensor | None, more: Tensor) -> Tensor:
    return more if before is None else torch.cat([before, more])


@dataclass(frozen=True)
class LinearisedModel:
    """f_lin at θ0 + Δθ; it holds for the weights that the model had when it was made.

    Attributes:
        model: f at θ0.
        changes: Δθ, of each layer's keys or values from the first block up.
    """

    model: Any
    changes: Sequence[FactoredChange]

    def record(self, ids: Tensor, positions: Tensor) -> Recorded:
        """:func:`gdprompt_fast.icl.recording.record` of f_lin: of everything the value at θ0 plus
        its tangent; of scores q·k so q̇·k + q·k̇.
        """
        with _tangents(self.changes):
            recorded = record(self.model, ids, positions)
            return Recorded(*(torch.add(*_value_and_tangent(x)) for x in vars(recorded).values()))

    def logits(self, ids: Tensor) -> Tensor:
        """Of a right-padded batch, [B, T] → [B, T, V]."""
        with torch.no_grad(), _tangents(self.changes):
            value, tangent = _value_and_tangent(self.model(ids, use_cache=False).logits)
            return value + tangent


def linearised_fine_tune(
    model: nn.Module, demonstrations: Sequence[Tensor], lr: float
) -> LinearisedModel:
    """:func:`gdprompt_fast.icl.fine_tune.fine_tune` of the model's expansion at its weights, which
    stay: the same loss, rate and order.

    Args:
        model, demonstrations, lr: as there.

    Returns:
        The expansion after the last text. The gradient of its first update is, to the bit, that
        of ``fine_tune``'s; both differ in order η² after that.

    Raises:
        UserError: what ``fine_tune`` raises.
    """
    check_tuning(model, demonstrations, lr)
    trained = [each for of_block in keys_and_values(model) for each in of_block]
    linearised = LinearisedModel(model, [FactoredChange(each, lr) for each in trained])
    with trains_only(model, trained):
        for ids in demonstrations:
            _learn(linearised, ids)
    return linearised


def _learn(linearised: LinearisedModel, ids: Tensor) -> None:
    """Δθ ← Δθ − η Jᵀ ∂L/∂logits, the loss's gradient taken at f_lin."""
    with torch.no_grad(), _tangents(linearised.changes):
        output = linearised.model(ids[None], use_cache=False)
        _, tangent_TV = _value_and_tangent(output.logits[0])
        del output
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def see(_: nn.Module, args: Any, y: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(y)

    layers = [change.of.layer for change in linearised.changes]
    with hooked([layer.register_forward_hook(see) for layer in layers]):
        logits_TV = linearised.model(ids[None], use_cache=False).logits[0]
    at_flin = (logits_TV.detach() + tangent_TV).requires_grad_()
    (cotangent,) = torch.autograd.grad(mean_nll(at_flin, ids), at_flin)
    es = torch.autograd.grad(logits_TV, outputs, cotangent)
    all_inputs: dict[int, Tensor] = {}
    for change, x_1TI, e_1TO in zip(linearised.changes, inputs, es, strict=True):
        if id(x_1TI) not in all_inputs:  # what keys and values both read is kept once
            all_inputs[id(x_1TI)] = _after(change.x_NI, x_1TI[0].detach())
        e_TO = e_1TO[0] if change.of.rows is None else e_1TO[0][:, change.of.rows]
        change.add(all_inputs[id(x_1TI)], e_TO)


@contextmanager
def _tangents(changes: Sequence[FactoredChange]) -> Iterator[None]:
    """Inside, a forward pass carries J Δθ along. PyTorch's fused attention has no forward mode."""

    def source(change: FactoredChange) -> Any:
        def hook(_: nn.Module, args: Any, y: Tensor) -> Tensor:
            own = change.of_input(fwAD.unpack_dual(args[0]).primal)
            if own is None:
                return y
            value, tangent = _value_and_tangent(y)
            return fwAD.make_dual(value, own.to(value.dtype) + tangent)

        return hook

    handles = [change.of.layer.register_forward_hook(source(change)) for change in changes]
    with hooked(handles), fwAD.dual_level(), sdpa_kernel(SDPBackend.MATH):
        yield


def _value_and_tangent(x: Tensor) -> tuple[Tensor, Tensor]:
    value, tangent = fwAD.unpack_dual(x)
    return value, torch.zeros_like(value) if tangent is None else tangent
