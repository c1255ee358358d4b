"""Layer-causal fine-tuning: every block learns from a loss of its own, through itself alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .blocks import KeysOrValues, blocks_of, final_norm_of, hooked, keys_and_values
from .fine_tune import check_tuning, descend, gradients_of, mean_nll, restored, trains_only

ORDERS = ("summed", "one_after_another")


@contextmanager
def layer_causal_fine_tune(
    model: nn.Module,
    demonstrations: Sequence[Tensor],
    lr: float,
    *,
    order: str = "summed",
    clip: float | None = None,
    clip_norm: str = "l2",
) -> Iterator[nn.Module]:
    """:func:`gdprompt_fast.icl.fine_tune.fine_tune` by losses of the blocks, not of the model:

        L_l = NLL of head(norm(block_l(x_l))),    x_l the block's input, detached

    with the model's final norm and head. So block l's keys and values move by ∂L_l alone.

    Args:
        order: "summed": one step of SGD a text, on Σ_l L_l, all at the weights before it, as the
            paper's code does; a gradient's norm is over all blocks. "one_after_another": block l
            moves before its output goes on to block l + 1, as the paper's text says; a norm is over
            one block.
        model, demonstrations, lr, clip, clip_norm: as there.

    Raises:
        UserError: what ``fine_tune`` raises; for an unknown order.
    """
    check_tuning(model, demonstrations, lr, clip, clip_norm)
    if order not in ORDERS:
        raise UserError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    of_blocks = keys_and_values(model)
    trained = [each for of_block in of_blocks for each in of_block]

    def learn(of_block: Sequence[KeysOrValues], gradients: list[list[Tensor]]) -> None:
        descend(of_block, gradients, lr, clip, clip_norm)

    with restored(trained):
        with trains_only(model, trained):
            for ids in demonstrations:
                if order == "summed":
                    learn(trained, _all_gradients(model, ids))
                else:
                    _through_blocks(model, ids, learn, again=True)
        yield model


def _all_gradients(model: Any, ids: Tensor) -> list[list[Tensor]]:
    """Of every block's keys and values by the block's own loss."""
    gradients: list[list[Tensor]] = []
    _through_blocks(model, ids, lambda _, own: gradients.extend(own))
    return gradients


def _through_blocks(
    model: Any,
    ids: Tensor,
    learn: Callable[[Sequence[KeysOrValues], list[list[Tensor]]], None],
    again: bool = False,
) -> None:
    """A forward pass of a text [T]; ``learn`` gets each block's gradients on the way.

    One block's graph is there at a time, with the logits [T, V] of its loss.

    Args:
        again: the block's output is what it is after ``learn``.
    """
    head, norm = model.get_output_embeddings(), final_norm_of(model)

    def detached(_: nn.Module, inputs: Any, options: Any) -> Any:
        if inputs:
            return (inputs[0].detach(), *inputs[1:]), options
        return inputs, {**options, "hidden_states": options["hidden_states"].detach()}

    def learns_from(own: Sequence[KeysOrValues]) -> Callable[..., Any]:
        def hook(block: Any, inputs: Any, options: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            learn(own, gradients_of(mean_nll(head(norm(hidden))[0], ids), own))
            if again:
                with torch.no_grad():
                    output = block.forward(*inputs, **options)
            if isinstance(output, tuple):
                return (output[0].detach(), *output[1:])
            return output.detach()

        return hook

    handles: list[Any] = []
    for block, own in zip(blocks_of(model), keys_and_values(model), strict=True):
        handles.append(block.register_forward_pre_hook(detached, with_kwargs=True))
        handles.append(block.register_forward_hook(learns_from(own), with_kwargs=True))
    with hooked(handles):
        model.base_model(ids[None], use_cache=False)
