"""What the teacher says at the response tokens: the target of the KL objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import check_response, check_tokens, describe
from ..errors import UserError
from ..models.architecture import (
    backbone_and_head,
    check_deterministic,
    check_ids,
    check_row_lengths,
    hidden_states,
    predicting_states,
)
from .gathered import gathered, opened


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's predictions at the R response tokens of a batch, in row-major order of its
    mask.

    Either ``logits`` [R, V], or the teacher's final ``hidden`` states [R, d] with its ``head`` [V,
    d], from which the loss makes the logits a tile of the vocabulary at a time: 4 KB a token
    instead of 256 KB for Llama 3.2 1B. Use the two constructors.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Tensor | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("logits", "hidden", "head") if getattr(self, name) is not None]
        if given not in (["logits"], ["hidden", "head"]):
            raise UserError(f"TeacherTargets: expected logits, or hidden and head, got {given}")

    @staticmethod
    def from_logits(logits: Tensor) -> TeacherTargets:
        """Targets from logits [R, V] of a floating dtype.

        Raises:
            ValueError: if the shape or dtype is another.
        """
        if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
            raise UserError(f"logits: expected a floating tensor [R, V], got {describe(logits)}")
        return TeacherTargets(logits=logits.detach())

    @staticmethod
    @torch.no_grad()
    def from_model(
        teacher: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, response_mask: Tensor
    ) -> TeacherTargets:
        """Targets from a frozen model that reads the context in its prompt.

        Args:
            teacher: a causal LM; its head is kept by reference, so it must not change before the
                step. Of a sharded one every process keeps a copy of the whole head.
            prompt_ids: LongTensor [Q, T], rows of context ⊕ query ⊕ response, right-padded, one per
                query.
            prompt_mask: BoolTensor [Q, T], True on real tokens.
            response_mask: BoolTensor [Q, T]; it picks the same R tokens, in the same order, as the
                batch's.

        Raises:
            ValueError: naming the argument, what was expected and what was given.
        """
        check_tokens("prompt", prompt_ids, prompt_mask, "[Q, T]")
        check_response(response_mask, prompt_ids, prompt_mask, "[Q, T]")
        with gathered(teacher, head=False):
            check_ids("prompt_ids", prompt_ids, teacher)
            check_row_lengths("prompt_mask", prompt_mask, teacher)
            check_deterministic(teacher)
            hidden = predicting_states(hidden_states(teacher, prompt_ids), response_mask)
            return TeacherTargets(hidden=hidden, head=head_of(teacher))

    def select(self, tokens: Tensor) -> TeacherTargets:
        """The targets of some of the response tokens, by their numbers."""
        return self.map(lambda per_token: per_token.index_select(0, tokens))

    def map(self, change: Callable[[Tensor], Tensor]) -> TeacherTargets:
        """The same with ``change`` applied to what there is of each token."""
        if self.logits is not None:
            return TeacherTargets(logits=change(self.logits))
        assert self.hidden is not None
        return TeacherTargets(hidden=change(self.hidden), head=self.head)

    @property
    def key(self) -> Any:
        """Equal where the same work is to be done: the head stays where it is."""
        own = self.head
        head = None if own is None else (own.data_ptr(), own.dtype, tuple(own.shape))
        return tuple(self._per_token.shape), self._per_token.dtype, self.logits is None, head

    @property
    def tokens(self) -> int:
        """The number of response tokens, R."""
        return len(self._per_token)

    @property
    def vocabulary(self) -> int:
        """The size of the vocabulary, V."""
        return self.logits.shape[1] if self.logits is not None else len(self.head)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self._per_token.device

    @property
    def _per_token(self) -> Tensor:
        tensor = self.logits if self.logits is not None else self.hidden
        assert tensor is not None
        return tensor

    def materialised_logits(self) -> Tensor:
        """All logits [R, V] at once; the reference uses it, the engine never does."""
        if self.logits is not None:
            return self.logits
        assert self.hidden is not None and self.head is not None
        return self.hidden @ self.head.T


def head_of(teacher: nn.Module) -> Tensor:
    """The weight of the head [V, d]: itself, but of a sharded model a copy of all of it."""
    with opened(teacher) as plain:
        head = backbone_and_head(teacher)[1]
        if plain is None:
            return head.weight.detach()
        with plain.present(head):
            return head.weight.detach().clone()


def check_teacher(
    objective: str, teacher: Any, response_tokens: int, vocabulary: int, device: torch.device
) -> None:
    """The KL objective needs targets for exactly the batch's response tokens and the model's
    vocabulary.
    """
    if objective not in ("kl", "gold"):
        raise UserError(f'objective: expected "kl" or "gold", got {objective!r}')
    if objective == "gold":
        if teacher is not None:
            raise UserError(
                f'teacher: expected None with objective="gold", got {describe(teacher)}'
            )
        return
    if not isinstance(teacher, TeacherTargets):
        raise UserError(
            f'teacher: expected TeacherTargets with objective="kl", got {describe(teacher)}'
        )
    if teacher.tokens != response_tokens or teacher.vocabulary != vocabulary:
        raise UserError(
            f"teacher: expected targets for R = {response_tokens} response tokens and V = "
            f"{vocabulary}, "
            f"got R = {teacher.tokens} and V = {teacher.vocabulary}"
        )
    if teacher.device != device:
        raise UserError(f"teacher: expected device {device}, got {teacher.device}")
