"""The input of a meta step: contexts, queries and the groups that tie them together."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .layout import BatchShape, Layout, Real, lay_out


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


class Host(NamedTuple):
    """What the layout is made from, on the host."""

    context_group: Tensor
    query_group: Tensor
    loss_mask: Tensor
    response_mask: Tensor
    context_mask: Tensor
    query_mask: Tensor

    def lay_out(self, real: Real, least: BatchShape | None = None) -> Layout:
        return lay_out(*self[:4], real, least)


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
    # Worked out, no arguments: of an instance, whatever a dataclass calls them.
    host: ClassVar[Host]
    _layout: ClassVar[Layout]
    _id_ranges: ClassVar[tuple[tuple[int, int], tuple[int, int]]]
    _versions: ClassVar[tuple[int, ...]]

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
        loss_mask = check_loss_mask(self.context_loss_mask, self.context_ids, self.context_mask)
        self._set(context_group=context_group, query_group=query_group, context_loss_mask=loss_mask)
        self._work_out(Real(groups, contexts, queries))

    @property
    def groups(self) -> int:
        """The number of groups, G: as many adapted models θ' as the inner step makes."""
        return self.layout.shape.groups

    @property
    def layout(self) -> Layout:
        """What depends on the values of the batch, worked out when it was made.

        Raises:
            ValueError: where a tensor was changed in place since, to what is no batch.
        """
        if self._versions_now() != self._versions:
            self.__post_init__()
        return self._layout

    @property
    def id_ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The lowest and highest token id of the contexts, and of the queries."""
        self.layout  # noqa: B018  # looks whether the ids are still those
        return self._id_ranges

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MetaBatch:
        """The same batch on ``device``; nothing is checked or worked out again."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def map(self, change: Callable[[Tensor], Tensor]) -> MetaBatch:
        """The same batch with ``change``, which keeps values, applied to every tensor."""
        layout = self.layout.map(change)
        tensors = {each.name: change(getattr(self, each.name)) for each in fields(self)}
        return self._like(tensors, layout, self.host)

    def padded(self, shape: BatchShape) -> MetaBatch:
        """The batch filled up to ``shape`` with rows, groups and slots that count for nothing.

        Losses, means and gradients are those of the batch itself. Padding rows go to the groups
        that have fewest.

        Raises:
            ValueError: if the batch does not fit.
        """
        own = self.layout.shape
        if any(size < mine for size, mine in zip(shape, own, strict=True)):
            raise UserError(f"shape: expected at least {own}, got {shape}")
        if shape == own:
            return self
        if shape.contexts - own.contexts < shape.groups - own.groups:
            raise UserError(
                f"shape: expected a context for each of the {shape.groups - own.groups} groups of "
                f"padding, got {shape.contexts - own.contexts} more contexts"
            )
        contexts, queries = shape[1:3], shape[3:5]
        own_host, device = self.host, self.context_ids.device
        context_group = _more_groups(own_host.context_group, shape.contexts, shape.groups)
        query_group = _more_groups(own_host.query_group, shape.queries, shape.groups)
        tensors = dict(
            context_ids=_filled(self.context_ids, contexts),
            context_mask=_filled(self.context_mask, contexts),
            query_ids=_filled(self.query_ids, queries),
            query_mask=_filled(self.query_mask, queries),
            response_mask=_filled(self.response_mask, queries),
            context_group=context_group.to(device, non_blocking=True),
            query_group=query_group.to(device, non_blocking=True),
            context_loss_mask=_filled(self.context_loss_mask, contexts),
        )
        host = Host(
            context_group,
            query_group,
            _filled(own_host.loss_mask, contexts),
            _filled(own_host.response_mask, queries),
            _filled(own_host.context_mask, contexts),
            _filled(own_host.query_mask, queries),
        )
        layout = host.lay_out(self.layout.real, shape)
        if layout.shape != shape:
            raise UserError(f"shape: expected padding to make up {layout.shape}, got {shape}")
        there = layout.map(lambda tensor: tensor.to(device, non_blocking=True))
        return self._like(tensors, there, host)

    def select(self, groups: Sequence[int]) -> tuple[MetaBatch, Tensor]:
        """Some groups of the batch, without the padding that all of their rows have; and which of
        the response tokens, in row-major order, are theirs.
        """
        real, device = self.layout.real, self.context_ids.device
        own = self.host  # as the layout has it now
        chosen = torch.tensor(groups)
        context = torch.isin(own.context_group, chosen).nonzero().flatten()
        query = torch.isin(own.query_group, chosen).nonzero().flatten()
        context_width = _width(own.context_mask[context])
        query_width = _width(own.query_mask[query])
        host = Host(
            torch.searchsorted(chosen, own.context_group[context]),
            torch.searchsorted(chosen, own.query_group[query]),
            own.loss_mask[context, :context_width],
            own.response_mask[query, :query_width],
            own.context_mask[context, :context_width],
            own.query_mask[query, :query_width],
        )
        pairs = zip((chosen, context, query), real, strict=True)
        layout = host.lay_out(Real(*(int((some < most).sum()) for some, most in pairs)))
        token_query = torch.arange(len(own.query_group))
        token_query = token_query.repeat_interleave(own.response_mask.sum(1))
        tokens = torch.isin(token_query, query).nonzero().flatten()

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        def some(tensor: Tensor, rows: Tensor, width: int) -> Tensor:
            return tensor.index_select(0, rows)[:, :width]

        contexts, queries = (there(context), context_width), (there(query), query_width)
        tensors = dict(
            context_ids=some(self.context_ids, *contexts),
            context_mask=some(self.context_mask, *contexts),
            query_ids=some(self.query_ids, *queries),
            query_mask=some(self.query_mask, *queries),
            response_mask=some(self.response_mask, *queries),
            context_group=there(host.context_group),
            query_group=there(host.query_group),
            context_loss_mask=some(self.context_loss_mask, *contexts),
        )
        return self._like(tensors, layout.map(there), host), there(tokens)

    @staticmethod
    def padding() -> MetaBatch:
        """A batch of nothing but padding: its losses and gradients are zero, as where a process
        has no share of a step.
        """
        one, none = torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool)
        host, ids = Host(one, one, none, none, none, none), torch.zeros(1, 2, dtype=torch.long)
        made: MetaBatch = object.__new__(MetaBatch)
        made._set(context_ids=ids, context_mask=none, query_ids=ids, query_mask=none)
        made._set(response_mask=none, context_group=one, query_group=one, context_loss_mask=none)
        made._set(host=host, _layout=host.lay_out(Real(0, 0, 0)), _id_ranges=((0, 0), (0, 0)))
        made._set(_versions=made._versions_now())
        return made

    def _work_out(self, real: Real) -> None:
        tensors = (self.context_group, self.query_group, self.context_loss_mask, self.response_mask)
        masks = self.context_mask, self.query_mask
        host = Host(*(tensor.cpu() for tensor in (*tensors, *masks)))
        device = self.context_ids.device
        layout = host.lay_out(real).map(lambda tensor: tensor.to(device))
        ranges = tuple(
            (int(ids.min()), int(ids.max())) for ids in (self.context_ids, self.query_ids)
        )
        self._set(host=host, _layout=layout, _id_ranges=ranges, _versions=self._versions_now())

    def _like(self, tensors: dict[str, Tensor], layout: Layout, host: Host) -> MetaBatch:
        """A batch of tensors made from those of this one."""
        made: MetaBatch = object.__new__(MetaBatch)
        made._set(**tensors, _layout=layout, host=host, _id_ranges=self._id_ranges)
        made._set(_versions=made._versions_now())
        return made

    def _versions_now(self) -> tuple[int, ...]:
        """What changes whenever a tensor is written to."""
        tensors = (getattr(self, each.name) for each in fields(self))
        return tuple(0 if t.is_inference() else t._version for t in tensors)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _filled(x_BT: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, T] with zeros below and to the right up to ``shape``."""
    rows, width = (size - mine for size, mine in zip(shape, x_BT.shape, strict=True))
    return F.pad(x_BT, (0, width, 0, rows))


def _more_groups(group_B: Tensor, rows: int, groups: int) -> Tensor:
    """Groups of ``rows`` rows, on the host: those that are added go where there are fewest."""
    counts = torch.bincount(group_B, minlength=groups).tolist()
    smallest = [(count, group) for group, count in enumerate(counts)]
    heapq.heapify(smallest)
    added = []
    for _ in range(rows - len(group_B)):
        count, group = smallest[0]
        heapq.heapreplace(smallest, (count + 1, group))
        added.append(group)
    return torch.cat([group_B, torch.tensor(sorted(added), dtype=torch.long)])


def _width(mask_BT: Tensor) -> int:
    """The length of the longest row; 2 at least, as a token and the next."""
    return max(2, int(mask_BT.sum(1).max()))


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
