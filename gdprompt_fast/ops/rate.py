"""The inner rate η, a tensor on the device: it may change from step to step, and may be learnt."""

from __future__ import annotations

import torch
from torch import Tensor


class RateGradient:
    """Sums ∂outer/∂η, [G], over the uses of the weights that an inner step made.

    A use of W' = W − η g whose cotangent of W' is Fᵀ U adds −⟨Fᵀ U, g⟩.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, value_G: Tensor) -> None:
        self._sum = value_G if self._sum is None else self._sum + value_G

    def take(self) -> Tensor | None:
        """The sum since the last time."""
        total, self._sum = self._sum, None
        return total


class Rate:
    """η of every group, of all layers or of one.

    Attributes:
        eta_G: η, [G], fp32, or fp64 for fp64 models.
        gradient: where ∂outer/∂η is summed; None unless η requires it.
    """

    def __init__(self, eta_G: Tensor) -> None:
        self.eta_G = eta_G
        self.gradient = RateGradient() if eta_G.requires_grad else None
        self._minus_G = -eta_G
        self._minus_G11 = self._minus_G.detach()[:, None, None]

    def moving(self, moves: bool) -> tuple[Tensor, RateGradient | None]:
        """For the handle of a layer: its share of η's gradient, if the inner step moves it."""
        return self.eta_G, self.gradient if moves else None

    def scale_(self, x_GMS: Tensor) -> Tensor:
        """−η x, in place."""
        return x_GMS.mul_(self._minus_G11)

    def scaled(self, x_GMS: Tensor) -> Tensor:
        """−η x, in x's dtype."""
        return (x_GMS * self._minus_G11).to(x_GMS.dtype)

    def add_gradient(self, match_GMS: Tensor, cotangent_GMS: Tensor) -> None:
        """+= −Σ match ∘ cotangent, from a use y = … − η match E with cotangent F, and F Eᵀ."""
        if self.gradient is not None:
            wide = torch.promote_types(match_GMS.dtype, self.eta_G.dtype)
            self.gradient.add(-(match_GMS.to(wide) * cotangent_GMS).sum((1, 2)))

    def step(self, own: Tensor, gradient: Tensor) -> Tensor:
        """own − η gradient of every group, [G, *shape]; differentiable in all three."""
        return torch.addcmul(own, self._minus_G.view(-1, *(1,) * (own.dim() - 1)), gradient)
