"""The input of a meta step: contexts, queries and the groups that tie them together."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .errors import UserError


def describe(value: Any) -> str:
    """``value`` as error messages name it: ``float32 [4, 7]`` for a tensor, its repr otherwise."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)


def check_tokens(name: str, ids: Any, mask: Any, shape: str) -> None:
    """Checks a right-padded pair of token ids [N, T] (int64) and mask [N, T] (bool)."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.long or ids.dim() != 2 or 0 in ids.shape:
        raise UserError(f"{name}_ids: expected a non-empty LongTensor {shape}, got {describe(ids)}")
    check_mask(f"{name}_mask", mask, ids, shape)
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        row = int((mask[:, 1:] & ~mask[:, :-1]).any(1).nonzero()[0])
        raise UserError(
            f"{name}_mask: expected right padding (True on real tokens, then False), "
            f"got a real token after padding in row {row}"
        )


def check_mask(name: str, mask: Any, ids: Tensor, shape: str) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape:
        raise UserError(
            f"{name}: expected a BoolTensor {shape} = {list(ids.shape)}, got {describe(mask)}"
        )
    if mask.device != ids.device:
        raise UserError(f"{name}: expected device {ids.device} as the ids, got {mask.device}")


def check_contexts(context_ids: Any, context_mask: Any) -> None:
    """A context needs two real tokens: the first predicts the second."""
    check_tokens("context", context_ids, context_mask, "[C, Tc]")
    lengths = context_mask.sum(1)
    if (lengths < 2).any():
        row = int((lengths < 2).nonzero()[0])
        raise UserError(
            f"context_mask: expected at least 2 real tokens in every row, "
            f"got {int(lengths[row])} in row {row}"
        )


def check_loss_mask(loss_mask: Any, context_ids: Tensor, context_mask: Tensor) -> Tensor:
    """Which context tokens' NLL counts, [C, Tc]; None stands for all real ones.

    Raises:
        UserError: for padding, or a row without a token that counts after its first.
    """
    if loss_mask is None:
        return context_mask
    check_mask("context_loss_mask", loss_mask, context_ids, "[C, Tc]")
    if (loss_mask & ~context_mask).any():
        row = int((loss_mask & ~context_mask).any(1).nonzero()[0])
        raise UserError(f"context_loss_mask: expected real tokens, got padding in row {row}")
    if not loss_mask[:, 1:].any(1).all():
        row = int((~loss_mask[:, 1:].any(1)).nonzero()[0])
        raise UserError(
            "context_loss_mask: expected a token after the first in every row, which has nothing "
            f"to be predicted from, got none in row {row}"
        )
    return loss_mask


def check_group(name: str, group: Any, rows: int, like: Tensor) -> Tensor:
    """``group`` as a LongTensor [rows] of non-negative indices; None stands for one group per
    row.
    """
    if group is None:
        return torch.arange(rows, device=like.device)
    if not isinstance(group, Tensor) or group.dtype != torch.long or group.shape != (rows,):
        raise UserError(f"{name}: expected a LongTensor [{rows}], got {describe(group)}")
    if group.device != like.device:
        raise UserError(f"{name}: expected device {like.device} as the ids, got {group.device}")
    if (group < 0).any():
        raise UserError(f"{name}: expected indices of groups from 0, got {int(group.min())}")
    return group


def check_context_group(context_group: Any, context_ids: Tensor) -> Tensor:
    """The owning group of every context; the groups are numbered 0, 1, … without a gap."""
    group = check_group("context_group", context_group, len(context_ids), context_ids)
    present = group.unique()
    gap = present != torch.arange(len(present), device=group.device)
    if gap.any():
        raise UserError(f"context_group: group {int(gap.nonzero()[0])} has no context")
    return group


@dataclass(frozen=True)
class MetaBatch:
    """Contexts to take the inner step on and queries to answer after it.

    A *group* owns one θ': its inner loss is the mean over its contexts of each context's mean
    next-token NLL over the tokens that count, and any number of queries is answered at it. Padding
    is on the right; padded positions have no loss.

    Args:
        context_ids: LongTensor [C, Tc].
        context_mask: BoolTensor [C, Tc], True on real tokens.
        query_ids: LongTensor [Q, Tq], a query and then its response.
        query_mask: BoolTensor [Q, Tq], True on real tokens.
        response_mask: BoolTensor [Q, Tq], True on the response tokens (the ones predicted).
        context_group: LongTensor [C], the group owning each context; one group per row by default
            (C == Q).
        query_group: LongTensor [Q], the group whose θ' answers each query; the row's own by
            default.
        context_loss_mask: BoolTensor [C, Tc], True on the context tokens whose NLL counts, as those
            of an edit's target or of an answer; all real tokens by default. The first token of a
            row never counts, nothing predicts it.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    context_ids: Tensor
    context_mask: Tensor
    query_ids: Tensor
    query_mask: Tensor
    response_mask: Tensor
    context_group: Tensor = None  # type: ignore[assignment]  # filled in below, never None afterwards
    query_group: Tensor = None  # type: ignore[assignment]
    context_loss_mask: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_contexts(self.context_ids, self.context_mask)
        check_tokens("query", self.query_ids, self.query_mask, "[Q, Tq]")
        check_response(self.response_mask, self.query_ids, self.query_mask, "[Q, Tq]")
        if self.query_ids.device != self.context_ids.device:
            raise UserError(
                f"query_ids: expected device {self.context_ids.device} as context_ids, "
                f"got {self.query_ids.device}"
            )
        contexts, queries = len(self.context_ids), len(self.query_ids)
        if self.context_group is None and self.query_group is None and contexts != queries:
            raise UserError(
                "context_group, query_group: expected both when the numbers of contexts and "
                "queries differ, "
                f"got None with {contexts} contexts and {queries} queries"
            )
        context_group = check_context_group(self.context_group, self.context_ids)
        query_group = check_group("query_group", self.query_group, queries, self.query_ids)
        groups = int(context_group.max()) + 1
        if int(query_group.max()) >= groups:
            raise UserError(
                f"query_group: group {int(query_group.max())} has no context (context_group "
                f"has {groups} groups)"
            )
        object.__setattr__(self, "context_group", context_group)
        object.__setattr__(self, "query_group", query_group)
        loss_mask = check_loss_mask(self.context_loss_mask, self.context_ids, self.context_mask)
        object.__setattr__(self, "context_loss_mask", loss_mask)

    @property
    def groups(self) -> int:
        """The number of groups, G: as many adapted models θ' as the inner step makes."""
        return int(self.context_group.max()) + 1

    def to(self, device: torch.device | str) -> MetaBatch:
        """The same batch on ``device``."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def check_response(response_mask: Any, ids: Tensor, mask: Tensor, shape: str) -> None:
    """Every row has a response, within its real tokens, with something before it to predict it
    from.
    """
    check_mask("response_mask", response_mask, ids, shape)
    if (response_mask & ~mask).any():
        row = int((response_mask & ~mask).any(1).nonzero()[0])
        raise UserError(
            f"response_mask: expected response tokens to be real tokens, got padding in row {row}"
        )
    if not response_mask.any(1).all():
        row = int((~response_mask.any(1)).nonzero()[0])
        raise UserError(
            "response_mask: expected at least one response token in every row, got none in "
            f"row {row}"
        )
    if response_mask[:, 0].any():
        row = int(response_mask[:, 0].nonzero()[0])
        raise UserError(
            f"response_mask: expected something before the response to predict it from, "
            f"got a response token at position 0 of row {row}"
        )
