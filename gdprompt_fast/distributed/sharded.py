"""Weights that ``fully_shard`` (FSDP2) has sharded, gathered for a block while it runs.

For the time of a step every sharded parameter of the modules has a *stand-in*: an ordinary
parameter of the full shape, whose memory is there only while it is wanted. Those of the linear
layers in blocks are filled at the begin of each pass through their block and freed at its end, when
what the pass has added to their gradients is summed over the processes into the shards; so are
those of the head and of embeddings in the passes that read them. The others, small ones, are there
throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard

from ..errors import UserError
from .group import all_gather, collective


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has sharded the model."""
    return isinstance(model, FSDPModule) or id(model) in _open


def group_of(model: nn.Module) -> dist.ProcessGroup:
    """The processes that a sharded model's parameters are divided among.

    Raises:
        UserError: if some are divided otherwise, or are to be cast by FSDP2.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            policy = module._get_fsdp_state()._mp_policy
            if policy.param_dtype is not None or policy.reduce_dtype is not None:
                raise UserError(f"model: expected autocast around the step, got {policy}")
    meshes = set()
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or parameter.placements != (Shard(0),):
            raise UserError(
                "model: expected fully_shard to have sharded all weights along one dimension of "
                f"processes, got {name} otherwise"
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UserError(f"model: expected no hooks on sharded weights, got one on {name}")
        meshes.add(parameter.device_mesh)
    if len(meshes) != 1:
        raise UserError(f"model: expected weights sharded over one mesh, got {len(meshes)}")
    return meshes.pop().get_group()


def whole(weight: Tensor) -> Tensor:
    """A weight, detached; of a sharded one all of it, which all processes have to ask for."""
    if not isinstance(weight, DTensor):
        return weight.detach()
    sharded: Any = weight.detach()
    with collective():
        full: Tensor = sharded.full_tensor()
    return full


def release(model: nn.Module) -> None:
    """Gives back the memory of a model that is not needed any more."""
    if is_sharded(model):  # whose parts FSDP2 holds on to
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            parameter._local_tensor.untyped_storage().resize_(0)
    model.to("meta")


def transposed(weight: Tensor) -> Tensor:
    """A weight's transpose, detached."""
    if isinstance(weight, StandIn) and weight.transposed is not None:
        return weight.transposed
    return weight.detach().T


class GradientSum(Protocol):
    """Where a step sums the gradient of a weight, beside autograd."""

    def so_far(self) -> Tensor | None:
        """What has been added since the last time; None for nothing."""
        ...


class StandIn(nn.Parameter):
    """An ordinary parameter in the place of a sharded one.

    Attributes:
        sharded: the parameter that it stands for.
        gradient_dtype: of its gradient, where that is another than its own.
        gradient: where the step sums it.
        memory: itself, to be written to unseen by autograd.
        transposed: a view, which cannot be made while the memory is absent.
    """

    sharded: DTensor
    gradient_dtype: torch.dtype
    gradient: GradientSum | None
    memory: Tensor
    transposed: Tensor | None

    @staticmethod
    def of(sharded: DTensor, dtype: torch.dtype) -> StandIn:
        full = torch.empty(sharded.shape, dtype=dtype, device=sharded.to_local().device)
        made = StandIn(full, requires_grad=sharded.requires_grad)
        made.sharded, made.gradient_dtype, made.gradient = sharded, sharded.dtype, None
        made.memory = made.data
        made.transposed = made.detach().T if full.dim() == 2 else None
        made.free()
        return made

    @property
    def version(self) -> int:
        """Grows with every write to the shard, as a whole or to this process's part."""
        return self.sharded._version + self.sharded._local_tensor._version

    def fill(self) -> None:
        """Gathers the weight."""
        full = self.memory
        full.untyped_storage().resize_(full.numel() * full.element_size())
        sharded: Any = self.sharded.detach()  # a DTensor too
        mesh = self.sharded.device_mesh
        if len(full) % mesh.size() == 0:
            all_gather(full, sharded.to_local().to(full.dtype), mesh.get_group())
            return
        with collective():
            full.copy_(sharded.to(full.dtype).full_tensor())

    def free(self) -> None:
        self.memory.untyped_storage().resize_(0)

    def add_to_shard(self, gradient: Tensor) -> None:
        """Adds the sum over the processes of a gradient of the full shape to the shard's."""
        mesh = self.sharded.device_mesh
        with collective(), torch.no_grad():
            whole = DTensor.from_local(gradient, mesh, [Partial()], run_check=False)
            own = whole.redistribute(placements=[Shard(0)]).to(self.sharded.dtype)
            if self.sharded.grad is None:
                self.sharded.grad = own
            else:
                self.sharded.grad += own


# By module those parameters that are gathered for its passes alone.
Units = Mapping[nn.Module, Sequence[nn.Parameter]]

_open: dict[int, PlainModel] = {}  # by the id of the model


class PlainModel:
    """A sharded model as an ordinary one, while :meth:`open`; made by :func:`as_plain`.

    Attributes:
        group: the processes that the weights are divided among.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        units: Units,
        dtype: torch.dtype | None,
    ) -> None:
        self.group, self._model = group, model
        self._places, self._by_unit = _stand_ins_of(model, units, dtype)
        self._stand_ins = list({id(each): each for *_, each in self._places}.values())
        absent = {id(each) for own in self._by_unit.values() for each in own}
        self._throughout = [each for each in self._stand_ins if id(each) not in absent]
        self._gathering = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, the model is an ordinary one, but for the absence of the weights of units.

        Raises:
            UserError: inside another one of the same model.
        """
        if (already := _open.get(id(self._model))) is self:
            yield
            return
        if already is not None:
            raise UserError("model: expected the update of this moment, got one made before it")
        before = [(each.sharded, each.sharded.grad is None) for each in self._stand_ins]
        with ExitStack() as stack:
            _without_sharding(self._model, stack)
            for module, key, stand_in in self._places:
                stack.callback(module._parameters.__setitem__, key, module._parameters[key])
                module._parameters[key] = stand_in
            for each in self._throughout:
                stack.callback(each.free)
                each.fill()
            _open[id(self._model)] = self
            stack.callback(_open.pop, id(self._model))
            try:
                yield
            except BaseException:
                for sharded, without in before:
                    if without:
                        sharded.grad = None
                raise

    @contextmanager
    def gathering(self, but: Collection[nn.Module] = ()) -> Iterator[None]:
        """Inside, a call of a unit gathers its weights, for passes without a gradient.

        Args:
            but: units that do so by themselves.
        """
        if self._gathering:
            yield
            return
        with ExitStack() as stack:
            for unit in self._by_unit:
                if unit in but:
                    continue
                own = vars(unit).get("forward")
                undo = vars(unit).pop if own is None else partial(setattr, unit)
                stack.callback(undo, "forward", own)
                unit.forward = self._within(unit, unit.forward)
            self._gathering = True
            stack.callback(setattr, self, "_gathering", False)
            yield

    def _within(self, unit: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            with self.present(unit):
                return forward(*args, **options)

        return run

    @contextmanager
    def present(self, module: nn.Module, read: bool = True) -> Iterator[None]:
        """Inside, the weights of a unit are there; then their gradients are with the shards.

        Args:
            read: false where only gradients are added.
        """
        own = self._by_unit.get(module, [])
        for each in own if read else []:
            each.fill()
        try:
            yield
            for each in own:
                gradient = None if each.gradient is None else each.gradient.so_far()
                if gradient is not None:
                    each.add_to_shard(gradient)
        finally:
            for each in own:
                each.free()

    def finish(self) -> None:
        """Sums the gradients that are left: of what was there throughout."""
        for each in self._stand_ins:
            if each.grad is not None:
                each.add_to_shard(each.grad)
                each.grad = None

    def most(self, number: float) -> float:
        """The largest of what the processes give."""
        device = self._stand_ins[0].device
        numbers = torch.tensor(number, dtype=torch.float64, device=device)
        with collective():
            dist.all_reduce(numbers, dist.ReduceOp.MAX, self.group)
        return float(numbers)


@contextmanager
def as_plain(
    model: nn.Module,
    units_of: Callable[[nn.Module], Units],
    dtype_of: Callable[[nn.Module], torch.dtype | None],
) -> Iterator[PlainModel]:
    """Inside, a sharded model is an ordinary one: see :meth:`PlainModel.open`.

    Args:
        units_of: the units, of the model without FSDP2.
        dtype_of: likewise, what their weights are gathered in; None for their own.
    """
    plain = _open.get(id(model))
    if plain is None:
        group = group_of(model)
        with ExitStack() as stack:
            _without_sharding(model, stack)
            units, dtype = units_of(model), dtype_of(model)
        plain = PlainModel(model, group, units, dtype)
    with plain.open():
        yield plain


Places = list[tuple[nn.Module, str, StandIn]]


def _stand_ins_of(
    model: nn.Module, units: Units, dtype: torch.dtype | None
) -> tuple[Places, dict[nn.Module, list[StandIn]]]:
    """Where each belongs, and by unit those that are gathered with it."""
    absent = {id(parameter) for own in units.values() for parameter in own}
    known: dict[int, StandIn] = {}
    places: Places = []
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in known:
                own = dtype if id(parameter) in absent else None
                known[id(parameter)] = StandIn.of(parameter, own or parameter.dtype)
            places.append((module, key, known[id(parameter)]))
    return places, {unit: [known[id(each)] for each in own] for unit, own in units.items()}


def _without_sharding(model: nn.Module, stack: ExitStack) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            stack.enter_context(_without_fsdp(module))


@contextmanager
def _without_fsdp(module: nn.Module) -> Iterator[None]:
    """The module with the class that it had before, without the hooks that came with sharding."""
    sharded: Any = type(module)
    kinds = module._forward_pre_hooks, module._forward_hooks
    before = [dict(hooks) for hooks in kinds]
    try:
        module.__class__ = sharded.__bases__[1]
        for hooks in kinds:
            for key, hook in list(hooks.items()):
                if type(getattr(hook, "__self__", None)).__name__ == "FSDPState":
                    del hooks[key]
        yield
    finally:
        module.__class__ = sharded
        for hooks, own in zip(kinds, before, strict=True):
            hooks.clear()
            hooks.update(own)
