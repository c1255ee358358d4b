"""A model at θ and at every group's θ' at once: adapted layers in the place of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from ..distributed.sharded import StandIn
from ..errors import UserError
from ..models.architecture import backbone_and_head, causal_lm, check_adapters
from ..models.families import type_name
from ..models.intact import has_own_forward
from ..models.walk import Modules, modules_of, parameters_of
from ..rows import GroupedRows

# Importing a rule's module registers it.
from . import norm  # noqa: F401
from .adapted_layer import AdaptedLayer, StepState, always_there, find_rule
from .decoder import decoder_layers
from .embedding import AdaptedEmbedding
from .linear import AdaptedLinear
from .lora import AdaptedLowRank
from .masks import ATTENTION, attention_by, engine_attention, positions_in_order
from .recompute import recomputed
from .substitutes import positions_in, substitute_for
from .vocabulary import AdaptedVocabulary


class AdaptedModel:
    """The adapted layers of a model and the inner steps taken on them.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        inner: the parameters the inner step moves, by name.
        state: what the adapted layers share.

    Raises:
        ValueError: naming an inner parameter without a rule, or shared by two layers.
    """

    def __init__(self, model: nn.Module, inner: dict[str, nn.Parameter], state: StepState) -> None:
        self.model, self.state = model, state
        self.backbone, head = backbone_and_head(model)
        tokens: Any = causal_lm(model).get_input_embeddings()
        tied = tokens.weight is head.weight
        moved = {id(parameter) for parameter in inner.values()}
        self.head = head
        modules = modules_of(model)
        head_name = next(name for name, module in modules if module is head)
        self.vocabulary = AdaptedVocabulary(
            head,
            tokens if tied else None,
            id(head.weight) in moved,
            state,
            state.rate(head_name, head.weight),
        )
        self.adapted_layers: dict[nn.Module, AdaptedLayer] = {}
        _check_not_shared(modules, moved, {tokens, head})
        for name, module in modules:
            if module is head or not any(True for _ in module.parameters(recurse=False)):
                continue
            if tied and module is tokens and has_own_forward(module):
                self.adapted_layers[module] = self.vocabulary
            elif (adapted_layer := _adapted_layer(name, module, moved, state)) is not None:
                self.adapted_layers[module] = adapted_layer
        state.check_rates()

    @property
    def all_layers(self) -> list[AdaptedLayer]:
        """Each once."""
        return list(dict.fromkeys([*self.adapted_layers.values(), self.vocabulary]))

    @property
    def reading_weights(self) -> list[nn.Module]:
        """Modules whose adapted layers have their weights gathered by themselves."""
        factored = AdaptedEmbedding, AdaptedVocabulary
        adapted = [m for m, layer in self.adapted_layers.items() if isinstance(layer, factored)]
        return [self.head, *adapted]

    def layer_of(self, module: nn.Module) -> AdaptedLayer | None:
        """The adapted layer of a module of the model."""
        return self.vocabulary if module is self.head else self.adapted_layers.get(module)

    @contextmanager
    def differentiable(self, recompute: str = "none") -> Iterator[None]:
        """Inside, the model's modules run as adapted layers, with twice differentiable ops,
        and with ``recompute="block"`` its transformer blocks keep their input only.
        """
        forwards: dict[nn.Module, Callable[..., Any]]
        forwards = {
            module: _outside_autocast(adapted_layer.forward, type(module).__name__)
            for module, adapted_layer in self.adapted_layers.items()
        }
        if recompute == "none":  # a block recomputed alone must norm its own input
            forwards |= decoder_layers(self.backbone, self.adapted_layers)
        ours = engine_attention(self.model)
        self.state.phase.recomputing = recompute == "block"
        for _, module in modules_of(self.model):
            if "forward" in vars(module):
                continue
            if module not in forwards:
                forward = substitute_for(module, self.state.dtype, ours, self.adapted_layers)
                forwards |= {} if forward is None else {module: forward}
            if recompute == "block" and _is_block(module):
                forwards[module] = recomputed(module, self.adapted_layers, self.state)
            elif self.state.weights is not always_there and _is_block(module):
                forwards[module] = self._gathering(module, forwards.get(module, module.forward))
        try:
            with _replaced(forwards), attention_by(self.model, ATTENTION if ours else None):
                yield
        except BaseException:
            self.release()
            raise

    def _gathering(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward with its weights there for a while, which no backward will read."""

        def run(*args: Any, **options: Any) -> Any:
            with self.state.weights(block):
                return forward(*args, **options)

        return run

    @contextmanager
    def inference(self, rows: GroupedRows) -> Iterator[None]:
        """Inside, row b of any input runs at the last θ' of its group; no gradients.

        The adapted layers compute in the precision of the step that made θ', also where autocast is
        entered inside; what a matrix product gives then has autocast's dtype, as without them.
        """
        self.check_theta()
        self._check_forwards()
        self.state.rows = rows
        forwards: dict[nn.Module, Callable[..., Any]]
        forwards = {
            module: self._at_inference(adapted_layer.forward, adapted_layer, rows)
            for module, adapted_layer in self.adapted_layers.items()
        }
        forwards[self.head] = self._at_inference(self.vocabulary.logits, self.vocabulary, None)
        for _, module in modules_of(self.model):
            if has_own_forward(module) and (own := positions_in(module, self.state.dtype)):
                forwards[module] = own
        device = self.head.weight.device.type
        with _replaced(forwards), torch.autocast(device, enabled=False):
            yield

    def check_theta(self) -> None:
        """θ is what θ' was made of: factors are of its activations, norms' θ' not a difference.

        Raises:
            UserError: for weights written to since then, or other adapters in use.
        """
        check_adapters(self.model)
        if _theta_of(self.model) != self._made_of:
            raise UserError(
                "model: expected the weights, and the adapters in use, as they were when the "
                "update was made, got others: take the inner step again"
            )

    def _check_forwards(self) -> None:
        """Nothing has come between the adapted layers and their modules since the inner step:
        another update that is applied, a forward of the user's.
        """
        for module in (*self.adapted_layers, self.head):
            if not has_own_forward(module):
                raise UserError(
                    f"model: expected one update applied at a time, and the forwards as they were "
                    f"at the inner step, got a replaced one of {type(module).__name__}"
                )

    def _at_inference(
        self, forward: Callable[..., Tensor], adapted_layer: AdaptedLayer, rows: GroupedRows | None
    ) -> Callable[..., Tensor]:
        """The layer's forward without gradients that refuses other rows than were announced."""
        dtype = self.state.dtype or self.head.weight.dtype
        product = isinstance(adapted_layer, AdaptedLinear | AdaptedLowRank) or rows is None

        def run(x: Tensor) -> Tensor:
            shared = (
                isinstance(adapted_layer, AdaptedEmbedding) and len(x) == 1
            )  # positions, of all rows
            if rows is not None and len(x) != len(rows) and not shared:
                raise UserError(
                    f"groups: expected one group for each of the {len(x)} rows, got {len(rows)}"
                )
            device = x.device.type
            autocast = torch.is_autocast_enabled(device)
            with torch.no_grad(), torch.autocast(device, enabled=False):
                y = forward(x.to(dtype) if autocast and x.is_floating_point() else x)
            return y.to(torch.get_autocast_dtype(device)) if autocast and product else y

        return run

    def hidden_states(self, ids_BT: Tensor, rows: GroupedRows, level: int) -> Tensor:
        """Final hidden states [B, T, D] at θ after ``level`` inner steps."""
        self.state.rows, self.state.level = rows, level
        inputs = dict(input_ids=ids_BT, use_cache=False, return_dict=True)
        with _nothing_recomputed(), positions_in_order(self._check_positions):
            return self.backbone(**inputs).last_hidden_state

    def _check_positions(self, position_BT: Tensor) -> None:
        error = "model: expected a row's positions to count up by one, got others"
        self.state.flag(UserError(error), (position_BT.diff(dim=1) != 1).any())

    def inner_step(self, loss: Tensor, retain_graph: bool) -> None:
        """θ ← θ − η ∇θ loss, for all groups at once; differentiable if the state is of second
        order.
        """
        moved = [tensor for adapted_layer in self.all_layers for tensor in adapted_layer.moved]
        with self.state.phase.inner():
            grads = torch.autograd.grad(
                loss,
                moved,
                create_graph=self.state.phase.second_order,
                retain_graph=retain_graph or self.state.phase.second_order,
                allow_unused=True,
            )
        self._check_used(moved, grads)
        each = iter(grads)
        for adapted_layer in self.all_layers:
            adapted_layer.step([next(each) for _ in adapted_layer.moved])

    def release(self) -> None:
        """Drops what the adapted layers hold, after a step or an error.

        What they hold has a graph, whose nodes hold them: a cycle that nobody else breaks.
        Autograd keeps the graph of a failed backward until its next one.
        """
        for adapted_layer in self.all_layers:
            adapted_layer.release()

    def detach(self, level: int) -> None:
        """Keeps the values of θ' after ``level`` steps and drops their graph, for inference."""
        self.state.level = level
        self._made_of = _theta_of(self.model)
        for adapted_layer in self.all_layers:
            adapted_layer.tensors = [tensor.detach() for tensor in adapted_layer.tensors]

    def _check_used(self, moved: list[Tensor], grads: tuple[Tensor | None, ...]) -> None:
        unused = {id(tensor) for tensor, grad in zip(moved, grads, strict=True) if grad is None}
        for name, module in self.model.named_modules():
            adapted_layer = self.adapted_layers.get(module)
            if adapted_layer is not None and any(
                id(tensor) in unused for tensor in adapted_layer.moved
            ):
                raise UserError(
                    "inner_params: expected parameters that the inner loss depends on, "
                    f"got those of {name}, on which it does not"
                )


def _theta_of(model: nn.Module) -> tuple[Any, ...]:
    """What changes whenever a weight is written to, or other adapters are used."""
    weights = [(name, id(p), _version_of(p)) for name, p in parameters_of(model)]
    in_use = [
        (name, module.disable_adapters, *cast(Any, module).active_adapters)
        for name, module in modules_of(model)
        if hasattr(module, "lora_A")
    ]
    return *weights, *in_use


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def _version_of(parameter: nn.Parameter) -> int:
    if isinstance(parameter, StandIn):
        return parameter.version
    return 0 if parameter.is_inference() else parameter._version


def _check_not_shared(modules: Modules, moved: set[int], tied: set[nn.Module]) -> None:
    """Each rule knows the uses of its own layer only; tied head and tokens are one layer."""
    owners: dict[int, str] = {}
    for name, module in modules:
        for key, parameter in module.named_parameters(recurse=False):
            owner = owners.setdefault(id(parameter), f"{name}.{key}")
            if owner != f"{name}.{key}" and id(parameter) in moved and module not in tied:
                raise UserError(
                    "inner_params: expected parameters of one layer each, "
                    f"got one shared by {owner} and {name}.{key}"
                )


def _adapted_layer(
    name: str, module: Any, moved: set[int], state: StepState
) -> AdaptedLayer | None:
    """A layer adapted; None for one of an unknown type that the inner step does not move."""
    inner = {key: id(p) in moved for key, p in module.named_parameters(recurse=False)}
    rule, own = find_rule(module), has_own_forward(module)
    if own and inner.get("weight") and name.rpartition(".")[0].endswith((".lora_A", ".lora_B")):
        rule = AdaptedLowRank if type(module) is nn.Linear else None
    if own and rule is not None and inner.keys() <= {"weight", "bias"} and "weight" in inner:
        return rule(module, inner, state, state.rate(name, module.weight))
    if any(inner.values()):
        key = next(key for key, moves in inner.items() if moves)
        if not own:
            raise UserError(f"model: expected the own forward of {name}, got a replaced one")
        why = "" if rule is None else ", whose rule is for a weight and a bias alone"
        raise UserError(
            f"inner_params: no rule for parameter {name}.{key} of a {type_name(module)}{why}; "
            'how to add one: docs/architecture.md, "A norm of your own"'
        )
    return None


def _outside_autocast(forward: Callable[..., Tensor], layer: str) -> Callable[..., Tensor]:
    """Its forward that refuses an autocast in the model: it would not cast as autocast does.

    One around the step or the whole model is known (``compute_dtype``), and off inside.
    """

    def run(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            raise UserError(
                "model: expected an autocast to be around the step or the whole model, got one "
                f"inside it, around a {layer}"
            )
        return forward(x)

    return run


@contextmanager
def _nothing_recomputed() -> Iterator[None]:
    """Refuses activation checkpoints in the model: their second forward would run in a backward
    pass, when the adapted layers are at other weights and rows.

    Hooks for saved tensors that are held open around a step (``save_on_cpu``) recompute nothing.
    """
    reason = "hooks for saved tensors"
    with ExitStack() as stack:
        with suppress(RuntimeError):  # where some are held open
            stack.enter_context(disable_saved_tensors_hooks(reason))
        try:
            yield
        except RuntimeError as error:
            if str(error) != reason:
                raise
            raise UserError(
                "model: expected no activation checkpoints (hooks for saved tensors) in the model, "
                'which would recompute with the weights of another pass, got one; recompute="block"'
                " saves the memory"
            ) from error


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Runs modules with other forwards, and afterwards with their own again."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)
