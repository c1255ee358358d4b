"""The padding token, of whose embedding PyTorch takes no gradient although outputs depend on it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..meta.lm_batch import LMBatch
from ..models.architecture import causal_lm
from .objective import StepArguments


def without_padding_token(
    model: nn.Module, step: StepArguments
) -> tuple[StepArguments, tuple[str, ...]]:
    """The step with another token in the place of a padding token that is read as a real one, and
    the sentence that says so.

    ``nn.Embedding(padding_idx=…)`` drops a part of the gradient by convention, and so do the
    engine and the reference: there, differences of the objective show another derivative.
    """
    embedding = causal_lm(model).get_input_embeddings()
    token, batch = getattr(embedding, "padding_idx", None), step.batch
    texts = [(batch.context_ids, batch.context_mask), (batch.query_ids, batch.query_mask)]
    lm_batch = step.lm_batch
    texts += [] if lm_batch is None else [(lm_batch.ids, lm_batch.mask)]
    if token is None or not any(_is_read(token, *text) for text in texts):
        return step, ()
    other = (token + 1) % len(embedding.weight)

    def changed(ids: Tensor) -> Tensor:
        return ids.masked_fill(ids == token, other)

    if lm_batch is not None:
        lm_batch = LMBatch(changed(lm_batch.ids), lm_batch.mask)
    ids = {name: changed(getattr(batch, name)) for name in ("context_ids", "query_ids")}
    note = (
        f"Token {token} is the model's padding token and occurs as a real one; PyTorch takes no "
        f"gradient of its embedding, so the gradients are compared with token {other} instead."
    )
    return replace(step, batch=replace(batch, **ids), lm_batch=lm_batch), (note,)


def _is_read(token: int, ids: Tensor, mask: Tensor) -> bool:
    """Whether an output that counts depends on it: the last token of a row is only predicted."""
    return bool(((ids == token)[:, :-1] & mask[:, 1:]).any())
