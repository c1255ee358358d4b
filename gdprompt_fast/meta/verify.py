"""One look at a model before its first step: does the engine compute what the model computes?

On the longest context: the model's own logits against the engine's, the graph of the context's loss
against the operations known to be twice differentiable, and every use of a weight against the layer
that owns it. It costs forward passes of three rows, and is repeated when the model's fingerprint
changes.
"""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..distributed.sharded import PlainModel
from ..distributed.watch import ProcessLost
from ..errors import UserError
from ..models.architecture import causal_lm, compute_dtype
from ..models.graph import check_twice_differentiable
from ..ops.backend import use_backend
from ..ops.phase import Phase
from ..ops.vocabulary.block import tile_elements
from ..rows import GroupedRows
from ..update.adapted_layer import StepState, Weights, always_there
from ..update.attach import AdaptedModel
from .fingerprint import fingerprint

# Largest difference of the logits, over their spread, that rounding explains.
TOLERANCES = {
    torch.float64: 1e-5,  # transformers' norms are fp32 inside
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

_verified: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def verify_model(
    model: nn.Module,
    context_ids: Tensor,
    context_mask: Tensor,
    inner: dict[str, nn.Parameter],
    backend: str,
    recompute: str = "none",
    of_model: Any = None,
    plain: PlainModel | None = None,
) -> None:
    """Verifies the model at its first step, and whenever it is not as it was then.

    Args:
        context_ids, context_mask: as in :class:`gdprompt_fast.MetaBatch`; the longest row is taken.
        inner: the parameters the inner step moves.
        backend: that of the step.
        recompute: as in :func:`gdprompt_fast.fast_meta_step`.
        of_model: its fingerprint, where that is known.
        plain: of a sharded model, which all processes look at together.

    Raises:
        UserError: naming what the engine would get wrong; nothing has changed.
    """
    of_model = of_model or fingerprint(model, context_ids.shape[1])
    now = of_model, tuple(inner), backend, recompute
    look = partial(_look, model, context_ids, context_mask, inner, backend, recompute, plain)
    if plain is None:
        if _verified.get(model) == now:
            return
        look()()
    elif plain.most(_verified.get(model) != now):
        _together(plain, look())
    _verified[model] = now


def _together(plain: PlainModel, judge: Callable[[], None]) -> None:
    """Has all processes refuse what one refuses."""
    error = None
    try:
        judge()
    except UserError as found:
        error = found
    refused = plain.most(error is not None)
    if error is not None:
        raise error
    if refused:
        raise UserError("model: expected to compute what its own forward computes in all processes")


def _look(
    model: nn.Module,
    context_ids: Tensor,
    context_mask: Tensor,
    inner: dict[str, nn.Parameter],
    backend: str,
    recompute: str,
    plain: PlainModel | None,
) -> Callable[[], None]:
    """The passes, which the processes of a sharded model take together; what is found in them is
    judged by calling what is returned.
    """
    lengths = context_mask.sum(1)
    length = int(lengths.max()) or context_ids.shape[1]  # padding, where a process has no share
    row = context_ids[lengths.argmax()][:length][None]
    vocabulary = len(causal_lm(model).get_output_embeddings().weight)
    # of two rows; the last positions, where windows show
    keep = min(row.shape[1], max(1, tile_elements(row.device) // (2 * vocabulary)))
    with torch.enable_grad(), use_backend(backend), _runs("a meta step"):
        weights = always_there if plain is None else plain.present
        logits, reached = _engine_pass(model, row, inner, keep, weights)
    with nullcontext() if plain is None else plain.gathering():
        random_states = _random_states()
        own, used = _own_logits(model, row, keep)
        drawn = random_states != _random_states()
        if drawn if plain is None else plain.most(drawn):
            drawn = _draws(model, row, keep)

    def judge() -> None:
        if drawn:
            what = "nothing random in its forward, got random numbers drawn"
            raise UserError(f"model: expected {what}")
        if own.isfinite().all():  # otherwise the inner loss is not either, and the step says so
            _check_same(model, logits, own)
        _check_gradients(model, used, reached, recompute)

    return judge


def _engine_pass(
    model: nn.Module, row: Tensor, inner: dict[str, nn.Parameter], keep: int, weights: Weights
) -> tuple[Tensor, set[int]]:
    """The engine's last logits [keep, V], and the leaves that the loss has a gradient for."""
    state = StepState(1, 0.0, Phase(second_order=True), compute_dtype(model), weights=weights)
    rows = GroupedRows(torch.zeros(1, dtype=torch.long, device=row.device), 1)
    with torch.autocast(row.device.type, enabled=False):
        adapted = AdaptedModel(model, inner, state)
        with adapted.differentiable():
            names = {id(parameter): name for name, parameter in inner.items()}
            with _Uses(set(names)) as uses:
                hidden_BTD = adapted.hidden_states(row, rows, level=0)
            if uses.seen:
                name = names[next(iter(uses.seen))]
                raise UserError(
                    "inner_params: expected weights to be used by their own layers alone, got "
                    f"{name}, which is read elsewhere in the model too"
                )
            adapted.vocabulary.vocabulary.begin_contexts(row, rows)
            loss = adapted.vocabulary.context_loss(hidden_BTD, torch.ones_like(hidden_BTD[..., 0]))
            leaves = check_twice_differentiable(loss.sum(), "the context pass to be")
            logits = adapted.vocabulary.logits(hidden_BTD.detach()[:, -keep:])
        parameters = {id(parameter) for parameter in model.parameters()}
        handles = {
            id(t) for adapted_layer in adapted.all_layers for t in adapted_layer.tensors
        } - parameters
        adapted.release()
    return logits[0], {id(leaf) for leaf in leaves} - handles


def _own_logits(model: nn.Module, row: Tensor, keep: int) -> tuple[Tensor, set[int]]:
    """The last logits [keep, V] of the model as its user calls it, and the parameters it read.

    It is called with another row too: what mixes the rows of a batch is not a model of each.
    """
    rows = torch.cat([row, row.flip(1)])
    dtype = compute_dtype(model)
    autocast = torch.autocast(row.device.type, dtype, enabled=dtype is not None)
    uses = _Uses({id(p) for p in model.parameters()})
    with _runs("its own forward"), torch.no_grad(), autocast, uses:
        output = model(input_ids=rows, use_cache=False, logits_to_keep=keep)
    torch.clear_autocast_cache()
    logits = output[0] if isinstance(output, tuple) else output.logits
    return logits[0], uses.seen


@contextmanager
def _runs(what: str) -> Iterator[None]:
    """Makes an error of the model's code, or of its user's in it, one that says where it was."""
    try:
        yield
    except (UserError, ProcessLost, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"model: expected {what} to run, got {type(error).__name__}: {error}"
        ) from error


def _draws(model: nn.Module, row: Tensor, keep: int) -> bool:
    """Whether a model draws random numbers, so that the passes of a step would see other models;
    asked once more, as another thread may have drawn them before.
    """
    before = _random_states()
    _own_logits(model, row, keep)
    return before != _random_states()


def _random_states() -> list[Any]:
    numpy = sys.modules.get("numpy")
    states = [random.getstate(), torch.get_rng_state().tolist()]
    states += [] if numpy is None else [repr(numpy.random.get_state(legacy=False))]
    if torch.cuda.is_initialized():
        states += [state.tolist() for state in torch.cuda.get_rng_state_all()]
    return states


class _Uses(TorchFunctionMode):
    """Records which of some parameters an operation reads that gives a tensor."""

    def __init__(self, watched: set[int]) -> None:
        super().__init__()
        self.watched, self.seen = watched, set[int]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list):
            for each in (*args, *(kwargs or {}).values()):
                for one in each if isinstance(each, tuple | list) else (each,):
                    if id(one) in self.watched and isinstance(one, nn.Parameter):
                        self.seen.add(id(one))
        return result


def _check_same(model: nn.Module, logits: Tensor, own: Tensor) -> None:
    dtype = compute_dtype(model) or next(model.parameters()).dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    own, logits = own.to(wide), logits.to(wide)
    spread = (own - own.mean(1, keepdim=True)).norm()
    difference = float((logits - own).norm() / spread.clamp(min=torch.finfo(wide).tiny))
    if not difference <= TOLERANCES[dtype]:
        raise UserError(
            "model: expected to compute what its own forward computes, got logits that differ by "
            f"{difference:.2g} of their spread: something in the model is not run by a meta step "
            '(verify="never" goes on regardless)'
        )


def _check_gradients(model: nn.Module, used: set[int], reached: set[int], recompute: str) -> None:
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trained.keys() & reached:
        raise UserError(
            "model: expected the loss to depend on a parameter with requires_grad, got none"
        )
    for key, name in trained.items():
        if key in used and key not in reached:
            raise UserError(
                f"model: expected a gradient for {name}, which requires one and is used, got none: "
                "something cuts it off"
            )
    strangers = reached - trained.keys() - {id(p) for p in model.parameters()}
    if recompute == "block" and strangers:
        raise UserError(
            'recompute: expected "none" where tensors that are not parameters of the model get a '
            "gradient, got such a tensor"
        )
