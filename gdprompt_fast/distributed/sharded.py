"""Weights that ``fully_shard`` (FSDP2) has sharded, gathered for a block while it runs.

For the time of a step every sharded parameter of the modules has a *stand-in*: an ordinary
parameter of the full shape, whose memory is there only while it is wanted. Those of the linear
layers in blocks are filled at the begin of each pass through their block and freed at its end, when
what the pass has added to their gradients is summed over the processes into the shards; the others,
small ones and the embeddings, are there throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    return isinstance(model, FSDPModule)


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
        transposed: a view, which cannot be made while the memory is absent.
    """

    sharded: DTensor
    gradient_dtype: torch.dtype
    gradient: GradientSum | None
    transposed: Tensor | None

    @staticmethod
    def of(sharded: DTensor, dtype: torch.dtype) -> StandIn:
        full = torch.empty(sharded.shape, dtype=dtype, device=sharded.to_local().device)
        made = StandIn(full, requires_grad=sharded.requires_grad)
        made.sharded, made.gradient_dtype, made.gradient = sharded, sharded.dtype, None
        made.transposed = made.detach().T if full.dim() == 2 else None
        made.free()
        return made

    def fill(self) -> None:
        """Gathers the weight."""
        full = self.data
        full.untyped_storage().resize_(full.numel() * full.element_size())
        sharded: Any = self.sharded.detach()  # a DTensor too
        mesh = self.sharded.device_mesh
        if len(full) % mesh.size() == 0:
            all_gather(full, sharded.to_local().to(full.dtype), mesh.get_group())
            return
        with collective():
            full.copy_(sharded.to(full.dtype).full_tensor())

    def free(self) -> None:
        self.data.untyped_storage().resize_(0)

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


@dataclass
class PlainModel:
    """A sharded model as an ordinary one; made by :func:`as_plain`."""

    stand_ins: list[StandIn]
    by_block: dict[nn.Module, list[StandIn]]

    @contextmanager
    def present(self, block: nn.Module) -> Iterator[None]:
        """Inside, the weights of a block are there; then their gradients are with the shards."""
        own = self.by_block.get(block, [])
        for each in own:
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
        for each in self.stand_ins:
            if each.grad is not None:
                each.add_to_shard(each.grad)
                each.grad = None


@contextmanager
def as_plain(
    model: nn.Module,
    is_block: Callable[[nn.Module], bool],
    dtype_of: Callable[[nn.Module], torch.dtype | None],
) -> Iterator[PlainModel]:
    """Inside, a sharded model is an ordinary one, but for the absence of the linear layers' weights
    in blocks.

    Args:
        dtype_of: what these are gathered in, of the model without FSDP2; None for their own.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                stack.enter_context(_without_fsdp(module))
        plain = _put_stand_ins(model, is_block, dtype_of(model), stack)
        absent = {id(each) for own in plain.by_block.values() for each in own}
        before = [(each.sharded, each.sharded.grad is None) for each in plain.stand_ins]
        for each in plain.stand_ins:
            if id(each) not in absent:
                each.fill()
        try:
            yield plain
        except BaseException:
            for sharded, without in before:
                if without:
                    sharded.grad = None
            raise


def is_gathered(name: str, module: nn.Module) -> bool:
    """Whether the weight of a module in a block, by its name there, is gathered with the block."""
    kind = type(module)
    linear = kind is nn.Linear or kind.__qualname__ == "Conv1D"
    return linear and ".lora_" not in name


def _put_stand_ins(
    model: nn.Module,
    is_block: Callable[[nn.Module], bool],
    dtype: torch.dtype | None,
    stack: ExitStack,
) -> PlainModel:
    absent = {}
    for block in filter(is_block, model.modules()):
        for name, module in block.named_modules():
            if is_gathered(name, module):
                absent[id(module.weight)] = block
    known: dict[int, StandIn] = {}
    by_block: dict[nn.Module, list[StandIn]] = {}
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in known:
                block = absent.get(id(parameter))
                own = parameter.dtype if block is None or dtype is None else dtype
                known[id(parameter)] = StandIn.of(parameter, own)
                if block is not None:
                    by_block.setdefault(block, []).append(known[id(parameter)])
            module._parameters[key] = known[id(parameter)]
            stack.callback(module._parameters.__setitem__, key, parameter)
    return PlainModel(list(known.values()), by_block)


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
