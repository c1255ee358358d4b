"""θ' of every group, materialised by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from gdprompt_fast import MetaBatch
from gdprompt_fast.models.inner_params import select_inner
from gdprompt_fast.reference.step import next_token_nll
from gdprompt_fast.update.masks import attention_by

INNER_LR = 0.1


def adapted_copies(model: nn.Module, batch: MetaBatch, inner_params: Any, steps: int) -> list[dict]:
    """θ' of every group, materialised by autograd."""
    copies = []
    with attention_by(model, None):
        for group in range(batch.groups):
            rows = (batch.context_group == group).nonzero().flatten()
            ids, mask = batch.context_ids[rows], batch.context_mask[rows]
            theta = {n: p.detach().clone() for n, p in select_inner(model, inner_params).items()}
            for _ in range(steps):
                leaves = {n: p.requires_grad_() for n, p in theta.items()}
                logits = functional_call(model, leaves, kwargs={"input_ids": ids}).logits
                grads = torch.autograd.grad(
                    next_token_nll(logits, ids, mask).mean(), list(leaves.values())
                )
                theta = {
                    n: (p - INNER_LR * g).detach()
                    for (n, p), g in zip(leaves.items(), grads, strict=True)
                }
            copies.append(theta)
    return copies
