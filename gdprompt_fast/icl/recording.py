"""What a model does at some tokens of a text: outputs of attention, raw scores, logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UserError
from ..models.architecture import backbone_and_head, check_ids, hidden_states
from .blocks import attentions_of, check_plain, hooked, known_family

_RECORDED = "gdprompt_fast_recorded"  # in transformers' registries


@dataclass(frozen=True)
class Recorded:
    """What is recorded of B rows at P positions each, in the model's dtype.

    Attributes:
        attention: h, [B, P, L, d]: what the self-attention of each of L blocks adds to the
            residual: after the output projection with its bias.
        queries: q, [B, P, L, H, D]: those that meet the keys: scaled, with positions where those
            are rotary.
        scores: m = q·kᵀ, [B, P, L, H, T]: raw, before mask and softmax, so columns right of the
            position are of tokens it does not see.
        logits: [B, P, V], of the token after the position.
    """

    attention: Tensor
    queries: Tensor
    scores: Tensor
    logits: Tensor


def record(model: nn.Module, ids: Tensor, positions: Tensor, past: Cache | None = None) -> Recorded:
    """Runs the model on rows and keeps what :class:`Recorded` says at some positions of each.

    Without gradients; forward-mode derivatives pass through (see ``linearised.py``). In the paper
    (ft-vs-icl) the position is the last one of BOS + query + candidate answer; its control is the
    one before, which predicts the answer.

    Args:
        model: a plain causal LM; its dropout off.
        ids: [B, T], right-padded: attention is causal, so no mask is needed.
        positions: [B, P] int64, each a real token of its row.
        past: keys and values of B equal prefixes (:func:`after_prefix`), which the rows go on from;
            the columns of scores begin with the prefix.

    Raises:
        UserError: for adapters, an unknown family, active dropout, ids outside the vocabulary,
            positions outside the rows.
    """
    check_plain(model)
    check_ids("ids", ids, model)
    _check_positions(ids, positions)
    recorder = _Recorder(positions)
    _, head = backbone_and_head(model)
    with torch.no_grad(), _recording(model, recorder):
        hidden_BTd = hidden_states(model, ids) if past is None else _going_on(model, ids, past)
        logits = head(_at(hidden_BTd, positions))
    return Recorded(
        torch.stack(recorder.attention, 2),
        torch.stack(recorder.queries, 2),
        torch.stack(recorder.scores, 2),
        logits,
    )


def after_prefix(model: nn.Module, prefix: Tensor) -> Callable[[int], Cache] | None:
    """Runs a prefix [1, T] once; what is returned makes the ``past`` of B rows that go on from it,
    a new one for every call of :func:`record`. None where a cache does not serve: for families
    whose scores are recorded without it, and for a sliding window, past which it forgets.
    """
    check_plain(model)
    check_ids("prefix", prefix, model)
    if not known_family(model).attention_registry:
        return None
    lm: Any = model
    made = DynamicCache(config=lm.config)
    if any(made.is_sliding):
        return None
    with torch.no_grad():
        _going_on(model, prefix, made)

    def of_rows(count: int) -> Cache:
        past = copy.deepcopy(made)
        past.batch_repeat_interleave(count)
        return past

    return of_rows


def _going_on(model: nn.Module, ids: Tensor, past: Cache) -> Tensor:
    """Final hidden states [B, T, d] of right-padded ids after what the cache holds; it grows."""
    backbone, _ = backbone_and_head(model)
    takes = inspect.signature(backbone.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # by the version of transformers
    output = backbone(input_ids=ids, use_cache=True, return_dict=True, **{name: past})
    hidden: Tensor = output.last_hidden_state
    return hidden


def _check_positions(ids: Tensor, positions: Tensor) -> None:
    fits = positions.dim() == 2 and len(positions) == len(ids) and positions.shape[1] > 0
    if not fits or positions.dtype != torch.int64:
        raise UserError(
            f"positions: expected int64 [{len(ids)}, P], got {positions.dtype} {[*positions.shape]}"
        )
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= ids.shape[1]:
        raise UserError(f"positions: expected some in [0, {ids.shape[1]}), got [{low}, {high}]")


def _at(x_BTd: Tensor, positions: Tensor) -> Tensor:
    """x at the positions [B, P] of each row, [B, P, …]."""
    rows = torch.arange(len(positions), device=positions.device)
    return x_BTd[rows[:, None], positions]


@dataclass
class _Recorder:
    """What the blocks have shown so far, from the first one on."""

    positions: Tensor
    attention: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def see_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Of a self-attention module: a forward hook."""
        self.attention.append(_at(output[0], self.positions))

    def see_heads(self, query_BHTD: Tensor, key_BKTD: Tensor, scale: float) -> None:
        """Queries of H heads, keys of K, a divisor of H."""
        groups = query_BHTD.shape[1] // key_BKTD.shape[1]
        q_BPHD = _at(query_BHTD.transpose(1, 2), self.positions) * scale
        key_BHTD = key_BKTD.repeat_interleave(groups, dim=1)
        scores_BHPT = q_BPHD.transpose(1, 2) @ key_BHTD.mT
        self.queries.append(q_BPHD)
        self.scores.append(scores_BHPT.transpose(1, 2))


_active: list[_Recorder] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> Any:
    """PyTorch's attention, as a model would call it; queries and keys are recorded."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _active[-1].see_heads(query, key, scale)
    run = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return run(module, query, key, value, attention_mask, scaling=scale, **options)


AttentionInterface.register(_RECORDED, _attention)
AttentionMaskInterface.register(_RECORDED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def _recording(model: Any, recorder: _Recorder) -> Iterator[None]:
    """Inside, a forward pass of the model fills the recorder."""
    attentions = attentions_of(model)
    handles = [each.register_forward_hook(recorder.see_output) for each in attentions]
    with ExitStack() as stack:
        stack.enter_context(hooked(handles))
        if known_family(model).attention_registry:
            stack.enter_context(_attention_recorded(model, recorder))
        else:
            stack.enter_context(hooked([h for each in attentions for h in _watch(each, recorder)]))
        yield


@contextmanager
def _attention_recorded(model: Any, recorder: _Recorder) -> Iterator[None]:
    own = model.config._attn_implementation
    _active.append(recorder)
    try:
        model.config._attn_implementation = _RECORDED
        yield
    finally:
        model.config._attn_implementation = own
        _active.pop()


def _watch(attention: Any, recorder: _Recorder) -> list[Any]:
    """Hooks of an attention module that computes its scores itself, from q_proj and k_proj."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, y_BTO: Tensor) -> None:
            heads = (*y_BTO.shape[:-1], attention.num_heads, attention.head_dim)
            seen[name] = y_BTO.view(heads).transpose(1, 2)
            if len(seen) == 2:
                recorder.see_heads(seen.pop("q_proj"), seen.pop("k_proj"), attention.scaling)

        return hook

    return [getattr(attention, name).register_forward_hook(see(name)) for name in _WATCHED]


_WATCHED = ("q_proj", "k_proj")
