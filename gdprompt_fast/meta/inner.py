"""The inner step: θ' = θ − η ∇L(contexts), for every group at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import MetaBatch, check_context_group, check_contexts, check_loss_mask, describe
from ..distributed.sharded import PlainModel
from ..errors import UserError
from ..keep.folder import Kept, save
from ..keep.loaded import load_adapters
from ..keep.record import Learnt
from ..keep.state import refused, state_at, state_of
from ..layout import context_weights
from ..models.architecture import check_ids, check_model, check_row_lengths, compute_dtype
from ..models.inner_params import InnerParams, select_inner
from ..ops.phase import Phase
from ..rows import GroupedRows
from ..update.adapted_layer import StepState, always_there
from ..update.attach import AdaptedModel
from .config import check_inner, check_verify
from .failures import Failures, found_on_the_device, nothing_changed_in_place
from .gathered import check_whole, opened
from .verify import verify_model


class Contexts(NamedTuple):
    """What the inner steps are taken on; see :class:`gdprompt_fast.layout.Layout`."""

    ids: Tensor
    rows: GroupedRows
    share_C: Tensor
    weight_CT: Tensor


def contexts_of(batch: MetaBatch) -> Contexts:
    layout = batch.layout
    return Contexts(batch.context_ids, layout.contexts, layout.share_C, layout.weight_CT)


def take_inner_steps(
    adapted: AdaptedModel,
    contexts: Contexts,
    steps: int,
    failures: Failures,
    keep_graph: bool = False,
    first_group: int = 0,
) -> tuple[Tensor, Tensor]:
    """Takes the inner steps; afterwards the adapted layers of ``adapted`` are at θ'.

    Args:
        first_group: the number of the first group, for messages.

    Returns:
        The mean next-token NLL of every context at θ, [C], with its graph if ``keep_graph``, and
        the sum over groups of the inner loss at θ, detached.
    """
    adapted.vocabulary.vocabulary.begin_contexts(contexts.ids, contexts.rows)
    first: Tensor | None = None
    for step in range(steps):
        hidden_CTD = adapted.hidden_states(contexts.ids, contexts.rows, level=step)
        dtype = torch.promote_types(hidden_CTD.dtype, torch.float32)
        nll_C = adapted.vocabulary.context_loss(hidden_CTD, contexts.weight_CT.to(dtype))
        loss_C = nll_C * contexts.share_C.to(dtype)
        failures.watch_inner_loss(loss_C.detach(), step, first_group, contexts.rows.group_B)
        loss = loss_C.sum()
        adapted.inner_step(loss, retain_graph=keep_graph and step == 0)
        if first is None:
            first, inner_loss = nll_C, loss.detach()
    assert first is not None
    return first, inner_loss


NOT_KEPT = (
    "model: expected weights that are not sharded to keep θ' or to ask for its state, got those of "
    "fully_shard"
)


class InnerUpdate:
    """The θ' of every group: to run the model at, and to keep; made by :func:`inner_step`, or of
    adapters that were kept.

    Attributes:
        adapted: the model's layers at θ'.
        learnt: how the θ' of each group was.
    """

    def __init__(
        self, adapted: AdaptedModel, learnt: Sequence[Learnt], plain: PlainModel | None = None
    ) -> None:
        self.adapted, self.learnt, self._plain = adapted, tuple(learnt), plain

    @property
    def groups(self) -> int:
        """The number of groups, G."""
        return self.adapted.state.groups

    @contextmanager
    def applied_to(self, model: nn.Module, groups: Tensor) -> Iterator[None]:
        """Inside, row b of any input to the model runs at θ' of group ``groups[b]``; for inference
        only.

        ``model(...)`` and ``model.generate(...)`` work as ever, with the model's own attention,
        masks and cache; their outputs have no graph. With one group ``model.state_dict()`` and
        ``model.save_pretrained(...)`` are of its θ' (of a PEFT model whose base moves, as an
        adapter: :meth:`save_pretrained`); with several they raise.

        A model that ``fully_shard`` has sharded gathers the weights of a block while that runs: all
        processes, each with an update of its own, have to call it as often. Its state they cannot
        have, nor :meth:`save_pretrained` or :meth:`to_state_dict`.

        Args:
            model: the model the inner step was taken on.
            groups: LongTensor [B], one group for each row of the inputs.

        Raises:
            ValueError: for another model or other groups; for weights written to since the update
                was made; inside, for an input with another number of rows.
        """
        if model is not self.adapted.model:
            raise UserError("model: expected the one the inner step was taken on, got another")
        if (
            not isinstance(groups, Tensor)
            or groups.dtype != torch.long
            or groups.dim() != 1
            or not len(groups)
        ):
            raise UserError(f"groups: expected a LongTensor [B], got {describe(groups)}")
        if int(groups.min()) < 0 or int(groups.max()) >= self.groups:
            raise UserError(
                f"groups: expected indices in [0, {self.groups}), got [{int(groups.min())}, "
                f"{int(groups.max())}]"
            )
        applied = groups.unique().tolist()
        with ExitStack() as stack:
            if self._plain is None:
                save = partial(self.save_pretrained, group=applied[0])
                stack.enter_context(state_at(self.adapted, applied, save))
            else:
                stack.enter_context(self._plain.open())
                stack.enter_context(self._plain.gathering(but=self.adapted.reading_weights))
                stack.enter_context(refused(model, UserError(NOT_KEPT)))
            stack.enter_context(self.adapted.inference(GroupedRows(groups, self.groups)))
            yield

    def save_pretrained(
        self,
        folder: str | Path,
        group: int = 0,
        rank: int | None = None,
        form: str = "lora",
        for_vllm: bool = False,
        texts: Sequence[str] = (),
    ) -> Kept:
        """Writes θ' of a group to a new folder, whole or not at all, and prints what of it was
        discarded.

        ``form="lora"`` is an adapter that plain PEFT loads on the fresh base model. A linear
        layer's W' − W = −η Eᵀ X has at most the rank of the context's tokens, the head's and the
        embedding's too, and adapters trained on the layer add theirs: exact where ``rank`` allows,
        else the best product of that rank, by the SVD. Norms, layers whose bias moves, and an
        embedding tied to its head are copied whole (``modules_to_save``); ``inner_params="linear"``
        moves none of these. ``form="full"`` is the whole model at θ', adapters in its weights.

        Args:
            folder: a path of nothing yet, or of an empty folder.
            group: whose θ'.
            rank: the highest of a layer; None: as high as exact takes.
            form: ``"lora"`` or ``"full"``.
            for_vllm: one rank for all layers that vLLM has room for (8, 16, 32, 64, 128, 256, 320
                or 512), filled up with zeros; the best of rank 512 where exact takes more.
            texts: the contexts, to be kept beside it, for ``gdprompt ask --compare``.

        Raises:
            ValueError: naming the argument, what was expected and what was given: a folder that
                is not empty; ``for_vllm`` for an update of more than linear layers' weights; an
                update that no adapter holds; weights written to since the update was made.
            FloatingPointError: if θ' is not finite.
        """
        self._check_kept(group)
        if isinstance(texts, str):
            raise UserError(f"texts: expected a sequence of texts, got the text {texts[:40]!r}")
        learnt = self.learnt[group]
        if texts:
            learnt = replace(learnt, texts=tuple(texts))
        options: dict[str, Any] = dict(form=form, rank=rank, for_vllm=for_vllm)
        kept = save(self.adapted, Path(folder), group, learnt, **options)
        print(kept)
        return kept

    def to_state_dict(self, group: int = 0) -> dict[str, Tensor]:
        """The model's state dict with what the inner step moves at θ' of a group, in the weights'
        own dtypes: ``model.load_state_dict`` of a copy makes it the adapted model.

        Raises:
            ValueError: for a group that there is not; for weights written to since the update was
                made.
        """
        self._check_kept(group)
        return state_of(self.adapted, group)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path | Sequence[str | Path], model: nn.Module
    ) -> InnerUpdate:
        """The θ' of adapters that :meth:`save_pretrained` wrote, one a group, to be applied to
        their base model all at once.

        Args:
            folder: of an adapter, or those of several.
            model: the base, without adapters.

        Raises:
            ValueError: for a folder without such an adapter, or with one of another model.
        """
        folders = [folder] if isinstance(folder, str | Path) else [*folder]
        check_whole(model, "adapters that were kept")
        adapted, learnt = load_adapters(model, [Path(each) for each in folders])
        return cls(adapted, learnt)

    def _check_kept(self, group: int) -> None:
        if self._plain is not None:
            raise UserError(NOT_KEPT)
        self.adapted.check_theta()
        if type(group) is not int or not 0 <= group < self.groups:
            raise UserError(f"group: expected an integer in [0, {self.groups}), got {group!r}")


def inner_step(
    model: nn.Module,
    context_ids: Tensor,
    context_mask: Tensor,
    context_group: Tensor | None = None,
    inner_lr: float = 1e-3,
    inner_steps: int = 1,
    inner_params: InnerParams = "full",
    verify: str = "first",
    context_loss_mask: Tensor | None = None,
) -> InnerUpdate:
    """θ'_i = θ − η ∇_θ L(c_i, θ) for every group i at once, kept in factors of the size of
    activations.

    Args:
        model, inner_lr, inner_steps, inner_params, verify: as in
            :func:`gdprompt_fast.fast_meta_step`.
        context_ids, context_mask, context_group, context_loss_mask: as in
            :class:`gdprompt_fast.MetaBatch`.

    Returns:
        The update, to be applied with :meth:`InnerUpdate.applied_to`, or kept with
        :meth:`InnerUpdate.save_pretrained`. The model and its ``.grad`` are untouched.

    Raises:
        ValueError: for a bad argument, naming it, the expected and the given.
        FloatingPointError: if an inner loss is not finite.
    """
    check_contexts(context_ids, context_mask)
    loss_mask = check_loss_mask(context_loss_mask, context_ids, context_mask)
    check_inner(inner_lr, inner_steps)
    check_verify(verify)
    group = check_context_group(context_group, context_ids)
    with opened(model) as plain:
        check_model(model)
        check_ids("context_ids", context_ids, model)
        check_row_lengths("context_mask", context_mask, model)
        torch.clear_autocast_cache()  # held open, it would go on with the weights before an update
        inner = select_inner(model, inner_params)
        if verify == "first":
            verify_model(model, context_ids, context_mask, inner, "auto", plain=plain)
        groups = int(group.max()) + 1
        share_C, weight_CT = (
            weights.to(group.device)
            for weights in context_weights(group.cpu(), groups, loss_mask.cpu())
        )
        contexts = Contexts(context_ids, GroupedRows(group, groups), share_C, weight_CT)
        adapted = _adapted_by(model, inner, contexts, float(inner_lr), inner_steps, plain)
        adapted.detach(level=inner_steps)
    chosen = inner_params if isinstance(inner_params, str) else "a choice by name"
    return InnerUpdate(adapted, [Learnt(float(inner_lr), inner_steps, chosen)] * groups, plain)


def _adapted_by(
    model: nn.Module,
    inner: dict[str, nn.Parameter],
    contexts: Contexts,
    inner_lr: float,
    inner_steps: int,
    plain: PlainModel | None,
) -> AdaptedModel:
    """The model after inner steps; of a sharded one the processes take theirs together.

    Raises:
        FloatingPointError: if an inner loss is not finite, of a sharded model in any process.
    """
    device = contexts.ids.device
    weights = always_there if plain is None else plain.present
    phase, groups = Phase(second_order=False), contexts.rows.groups
    state = StepState(groups, inner_lr, phase, compute_dtype(model), weights=weights)
    autocast = torch.autocast(device.type, enabled=False)
    with ExitStack() as stack:
        if plain is not None:  # one that stopped would leave the others waiting
            stack.enter_context(found_on_the_device())
        failures = Failures(device)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(autocast)
        stack.enter_context(nothing_changed_in_place())
        adapted = AdaptedModel(model, inner, state)
        with adapted.differentiable("none" if plain is None else "block"):
            take_inner_steps(adapted, contexts, inner_steps, failures)
            failures.take(state.flags)
    lost = plain is not None and plain.most(float(failures.found_inf)) > 0
    failures.check()
    if lost:
        raise FloatingPointError("inner loss: expected finite numbers, got others elsewhere")
    return adapted
