"""Parts of a step replayed as graphs, without Python, from the second of a shape on."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..models.architecture import causal_lm
from ..models.intact import is_intact
from ..models.walk import modules_of, parameters_of
from .config import MetaStepConfig

MOST_GRAPHS = 12  # of a model; the one that was not used for longest goes first
CAPTURING = ("cuda",)  # kinds of devices that have graphs
PACKAGES = ("torch", "transformers", "peft")  # whose modules do nothing in Python that is missed
PROVEN_ROTARY = (None, "default", "linear", "llama3")


class Graph(Protocol):
    """Work that is recorded once and run again on the same memory."""

    def record(self, work: Callable[[], None]) -> None: ...

    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph; the graphs of a model share a stream to be captured on and a pool of memory."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph, self._pool, self._stream = torch.cuda.CUDAGraph(), pool, stream

    def record(self, work: Callable[[], None]) -> None:
        options = dict(pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        random_numbers = _random_numbers(self._stream.device)
        with _no_garbage_collection(), random_numbers, torch.cuda.graph(self._graph, **options):
            work()

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def _random_numbers(device: torch.device) -> Iterator[None]:
    """After a capture that failed, random numbers can be drawn as before: what is left of their
    generator believes that it is still captured.
    """
    generator = torch.cuda.default_generators[device.index]
    state = generator.get_state()
    try:
        yield
    except BaseException:
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What is collected during a capture may free memory in a way that is not allowed there."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


Made = TypeVar("Made", bound="Mappable")


class Mappable(Protocol):
    """Inputs that can be rebuilt with every tensor changed."""

    def map(self: Made, change: Callable[[Tensor], Tensor]) -> Made: ...


def tensors_of(inputs: Mappable) -> list[Tensor]:
    """All tensors of the inputs, in the order in which they are mapped."""
    found: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    inputs.map(see)
    return found


class Done(NamedTuple):
    """What a piece of work gives: numbers, then flags, and the error that each flag stands for."""

    tensors: list[Tensor]
    errors: list[Exception]


Unit = Callable[[Any], Done]  # a piece of work; adds to ``.grad``


@dataclass
class _Recorded:
    """A graph, the memory that its inputs and outputs live in, and the parameters whose gradients
    it adds to.
    """

    graph: Graph
    inputs: list[Tensor]
    done: Done
    reached: list[nn.Parameter]

    def __call__(self, inputs: Mappable) -> Done:
        torch._foreach_copy_(self.inputs, tensors_of(inputs))
        self.graph.replay()
        copies = [tensor.clone() for tensor in self.done.tensors]  # the next replay writes there
        return Done(copies, self.done.errors)


class Graphs:
    """The graphs of one model and the gradients that they add to.

    They share a pool of memory, in which a smaller one lives where the largest one does if that was
    recorded first: one that is larger than all others takes their place, and they are recorded
    again after it.

    A gradient that a graph adds to is a buffer outside the graphs' pool. It becomes the ``.grad``
    of its parameter: zeroed where that was None, with the value of another tensor that stood there.
    A buffer that somebody keeps from an earlier step is left to them, and all is recorded again.
    """

    def __init__(self, device: torch.device) -> None:
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._seen: set[Any] = set()
        self._refused: dict[Any, str] = {}
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._own: dict[nn.Parameter, int] = {}  # references that are ours
        self._validity: Any = None
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def new_graph(self) -> Graph:
        assert self._stream is not None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(self._pool, self._stream)

    def begin(self, validity: Any) -> None:
        """Before a step: drops what was recorded when the model was another."""
        free = [p for p, buffer in self._buffers.items() if p.grad is not buffer]
        kept = any(_references(self._buffers, p) > self._own[p] for p in free)
        if validity != self._validity or kept:
            self.clear()
        self._validity = validity

    def clear(self) -> None:
        """Drops the graphs and the buffers; one that is a ``.grad`` stays that, as any tensor."""
        for each in (self._recorded, self._seen, self._refused, self._buffers, self._own):
            each.clear()
        self._pool = None  # it went with the last graph

    def run(
        self, key: Any, unit: Unit, inputs: Any, trained: Sequence[nn.Parameter]
    ) -> tuple[Done, str]:
        """The result of ``unit(inputs)``, and why they are not those of a replay: an empty string
        if they are.
        """
        if key not in self._recorded and key not in self._refused:
            if key not in self._seen:
                self._seen.add(key)
                done = self._eagerly(unit, inputs, trained)
                return done, "the first step of a shape warms kernels up"
            try:
                self._record(key, unit, inputs, trained)
            except torch.OutOfMemoryError:
                self.clear()
                self._refused[key] = "there is no memory for a graph beside what is in use"
        if key in self._refused:
            return self._eagerly(unit, inputs, trained), self._refused[key]
        self._recorded.move_to_end(key)
        recorded = self._recorded[key]
        self._take_over(recorded.reached)
        return recorded(inputs), ""

    def _eagerly(self, unit: Unit, inputs: Any, trained: Sequence[nn.Parameter]) -> Done:
        """``unit(inputs)``, without the graphs if there is no memory for it beside them."""
        before = [(p, p.grad, None if p.grad is None else p.grad._version) for p in trained]
        try:
            return unit(inputs)
        except torch.OutOfMemoryError:
            added = any(grad is not None and grad._version != seen for _, grad, seen in before)
            if added or not self._recorded:
                raise
        for parameter, grad, _ in before:
            parameter.grad = grad
        self.clear()
        return unit(inputs)

    def _make_room(self, inputs: Any) -> None:
        size = _elements(tensors_of(inputs))
        if all(size > _elements(each.inputs) for each in self._recorded.values()):
            self._recorded.clear()
            self._pool = None
        while len(self._recorded) >= MOST_GRAPHS:
            self._recorded.popitem(last=False)

    def _record(self, key: Any, unit: Unit, inputs: Any, trained: Sequence[nn.Parameter]) -> None:
        self._make_room(inputs)
        self._add_buffers(trained)
        before = {p: _references(self._buffers, p) for p in trained}
        written = {p: self._buffers[p]._version for p in trained}
        static, done = inputs.map(torch.clone), list[Done]()
        graph = self.new_graph()
        with _gradients_kept(trained):
            for parameter in trained:
                parameter.grad = self._buffers[parameter]
            try:
                graph.record(lambda: done.append(unit(static)))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._refused[key] = f"it could not be captured: {error}"
                return
        reached = [p for p in trained if self._buffers[p]._version != written[p]]
        self._recorded[key] = _Recorded(graph, tensors_of(static), done[0], reached)
        for parameter in trained:
            self._own[parameter] += _references(self._buffers, parameter) - before[parameter]

    def _add_buffers(self, trained: Sequence[nn.Parameter]) -> None:
        for parameter in trained:
            if parameter not in self._buffers:
                self._buffers[parameter] = torch.zeros_like(parameter)
                self._own[parameter] = _references(self._buffers, parameter)

    def _take_over(self, reached: Sequence[nn.Parameter]) -> None:
        """Makes the buffers the gradients of the parameters."""
        empty = []
        for parameter in reached:
            buffer = self._buffers[parameter]
            if parameter.grad is None:
                empty.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if empty:
            torch._foreach_zero_(empty)


@contextmanager
def _gradients_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Puts the gradients back that there were."""
    before = [parameter.grad for parameter in parameters]
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _references(held: dict[Any, Tensor], key: Any) -> int:
    """How many hold a tensor of ``held``, or a view of it."""
    count: int = torch._C._storage_Use_Count(held[key].untyped_storage()._cdata)
    return sys.getrefcount(held[key]) + count


_graphs: weakref.WeakKeyDictionary[nn.Module, Graphs] = weakref.WeakKeyDictionary()


def graphs_of(model: nn.Module, device: torch.device, validity: Any) -> Graphs:
    """The graphs of a model, for as long as it lives and what they rest on is the same."""
    if model not in _graphs:
        _graphs[model] = Graphs(device)
    _graphs[model].begin(validity)
    return _graphs[model]


def why_eager(model: nn.Module, config: MetaStepConfig, device: torch.device) -> str:
    """Why no step of this kind can be captured; empty if it can."""
    if config.capture == "never":
        return 'capture="never"'
    if device.type not in CAPTURING:
        return f"there are no graphs on {device.type}"
    if config.recompute != "none":
        return "recomputed blocks are not proven in a graph"
    if any(rate.requires_grad for rate in _rates(config.inner_lr)):
        return "the gradient of inner_lr is not proven in a graph"
    if rotary_type(model) not in PROVEN_ROTARY:
        return "rotary tables that depend on the length are not proven in a graph"
    for name, module in modules_of(model):
        if not is_intact(module) or type(module).__module__.partition(".")[0] not in PACKAGES:
            return f"Python of {name or type(module).__name__} would not run in a replay"
    for name, parameter in parameters_of(model):
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"a hook on the gradient of {name} would not run in a replay"
        if parameter.requires_grad and not parameter.is_leaf:
            return f"{name} is no leaf"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode around the step would see nothing of a replay"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a graph is being captured already"
    return ""


def _rates(inner_lr: Any) -> list[Tensor]:
    given = inner_lr.values() if isinstance(inner_lr, Mapping) else [inner_lr]
    return [rate for rate in given if isinstance(rate, Tensor)]


def rotary_type(model: nn.Module) -> str | None:
    parameters = getattr(causal_lm(model).config, "rope_parameters", None) or {}
    kind: str | None = parameters.get("rope_type")
    return kind


def surroundings(model: nn.Module, device: torch.device) -> Any:
    """What a graph rests on beside the model's fingerprint: where its tensors are, and the modes
    that kernels are chosen by.
    """
    backends = torch.backends
    return (
        tuple(parameter.data_ptr() for _, parameter in parameters_of(model)),
        tuple(
            buffer.data_ptr()
            for _, module in modules_of(model)
            for buffer in module._buffers.values()
            if buffer is not None
        ),
        backends.cuda.matmul.allow_tf32,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        str(device),
    )
