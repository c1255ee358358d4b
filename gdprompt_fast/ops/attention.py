"""Causal attention with a double backward and no [T, T] buffer between passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..backend import implementation
from .guard import differentiable_no_further


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """O = softmax(scale · Q Kᵀ + causal mask) V, twice differentiable.

    PyTorch's fused attention has no double backward (pytorch issue 116350). Every pass here
    recomputes the probabilities from q, k and v, a block of queries at a time.

    Args:
        q: [B, H, T, D].
        k, v: [B, K, T, D], K key/value heads; K divides H (grouped-query attention).
        window: a query sees this many positions, itself the last; None for all before it.

    Returns:
        [B, T, H, D], contiguous, as transformers' attention functions return it.
    """
    return _Attention.apply(q, k, v, scale, window)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = scale, window
        return implementation("attention", q).attention_forward(q, k, v, scale, window)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        dq, dk, dv = _AttentionBackward.apply(dout, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, None


class _AttentionBackward(Function):
    # dP = dO Vᵀ;  δ = rowsum(P ∘ dP);  dS = P ∘ (dP − δ);  dQ = s dS K;  dK = s dSᵀ Q;  dV = Pᵀ dO
    @staticmethod
    def forward(
        ctx: Any,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(dout, q, k, v)
        ctx.options = scale, window
        return implementation("attention", q).attention_backward(dout, q, k, v, scale, window)

    @staticmethod
    def backward(ctx: Any, cot_dq: Tensor, cot_dk: Tensor, cot_dv: Tensor) -> Any:
        # Cotangents Q̇ of dQ, K̇ of dK, V̇ of dV:
        #   Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ);  σ = rowsum(P ∘ Ṡ);  Ṗ = P ∘ (Ṡ − σ)
        #   P̄ = (dP − δ) ∘ Ṡ − σ dP + dO V̇ᵀ;  S̄ = P ∘ (P̄ − rowsum(P ∘ P̄))
        #   cot dO = Ṗ V + P V̇;  cot V = Ṗᵀ dO
        #   cot Q = s (S̄ K + dS K̇);  cot K = s (S̄ᵀ Q + dSᵀ Q̇)
        differentiable_no_further("attention", "twice")
        cotangents = implementation("attention", cot_dq).attention_double_backward(
            cot_dq, cot_dk, cot_dv, *ctx.saved_tensors, *ctx.options
        )
        return *cotangents, None, None
