"""How many kernels a step starts: what bounds it where the GPU waits for Python.

A kernel is an op that PyTorch dispatches and that is neither a view nor an allocation, or a launch
of a Triton kernel. Nothing is timed, and a GPU is not needed: for Triton the shapes are those of
Llama 3.2 1B, on tensors without values, and launches are stubs.

    python -m benchmarks.studies.op_counts            # a block in fp32 in C++, a step in Triton
    python -m benchmarks.studies.op_counts --by-name  # which ops they are
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from gdprompt_fast.models.inner_params import select_inner
from gdprompt_fast.ops import gradient
from gdprompt_fast.ops.backend import use_backend
from gdprompt_fast.ops.phase import Phase
from gdprompt_fast.ops.vocabulary import KLTarget, block
from gdprompt_fast.rows import GroupedRows
from gdprompt_fast.update.adapted_layer import StepState
from gdprompt_fast.update.attach import AdaptedModel

from ..step.cases import LLAMA_1B, llama

NO_KERNELS = (  # allocations and questions
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "promote_types",
    "device",
)


class KernelCounts(TorchDispatchMode):
    """Counts, by name, the ops that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        returned = func(*args, **(kwargs or {}))
        if not _is_view(func, args, returned) and name not in NO_KERNELS:
            self.counts[name] += 1
        return returned


def _is_view(func: Any, args: tuple[Any, ...], returned: Any) -> bool:
    """Whether an op only looks at a tensor in another way, or has nothing to do."""
    if func.is_view or func.overloadpacket.__name__ in ("_unsafe_view", "detach", "alias"):
        return True
    return returned is not None and args != () and returned is args[0] and not _writes(func)


def _writes(func: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


@contextmanager
def stubbed_launches(counts: Counter[str]) -> Iterator[None]:
    """Inside, launches of Triton kernels are counted and do nothing."""
    from triton.runtime.interpreter import InterpretedFunction

    def launch(self: Any, *_: Any, **__: Any) -> None:
        counts[self.fn.__name__] += 1

    with patch.object(InterpretedFunction, "run", launch):
        yield


def step_counts(
    config: LlamaConfig,
    *,
    groups: int,
    tokens: tuple[int, int],
    response: int,
    backend: str,
    dtype: torch.dtype | None = None,
    fake: bool = False,
) -> Counter[str]:
    """Kernels of a step on one context [Tc] and one query [Tq] a group, KL to a teacher."""
    rows = GroupedRows(torch.arange(groups), groups)
    responses = GroupedRows(torch.arange(groups).repeat_interleave(response), groups)
    counts = KernelCounts()
    with ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            # as on a GPU
            stack.enter_context(patch.object(block, "TILE_ELEMENTS", block.CUDA_TILE_ELEMENTS))
            stack.enter_context(patch.object(gradient, "sums_wide", lambda _: True))
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = [torch.zeros(groups, length, dtype=torch.long) for length in tokens]
        weight = torch.ones(groups, tokens[0])
        teacher = torch.zeros(groups, response, config.hidden_size, dtype=dtype)
        eta = torch.full((groups,), 0.1)
        stack.enter_context(use_backend(backend))
        stack.enter_context(stubbed_launches(counts.counts))
        stack.enter_context(counts)
        state = StepState(groups, eta, Phase(second_order=True), dtype)
        adapted = AdaptedModel(model, select_inner(model, "full"), state)
        with adapted.differentiable():
            adapted.vocabulary.vocabulary.begin_contexts(ids[0], rows)
            hidden = adapted.hidden_states(ids[0], rows, level=0)
            adapted.inner_step(adapted.vocabulary.context_loss(hidden, weight).sum(), False)
            hidden = adapted.hidden_states(ids[1], rows, level=1)
            predicting = hidden[:, -response - 1 : -1].flatten(0, 1)
            target = KLTarget(None, teacher, model.lm_head.weight.detach())
            losses = adapted.vocabulary.response_loss(predicting, target, responses)
            losses.sum().backward()
            adapted.release()
    return counts.counts


def block_counts(backend: str = "cpp", dtype: torch.dtype | None = None) -> Counter[str]:
    """Kernels that one more transformer block adds to a step, in fp32 by default."""
    shapes: dict[str, Any] = dict(groups=3, tokens=(12, 6), response=2, backend=backend)
    fewer, more = (
        step_counts(llama(64, layers, 4, 2, 96, 100), dtype=dtype, **shapes) for layers in (2, 3)
    )
    return more - fewer


def launches_1b() -> Counter[str]:
    """Kernels of a step of Llama 3.2 1B on 16 × (256 + 32) tokens in bf16, in Triton."""
    return step_counts(
        LLAMA_1B,
        groups=16,
        tokens=(256, 32),
        response=16,
        backend="triton",
        dtype=torch.bfloat16,
        fake=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--by-name", action="store_true", help="the number of each op")
    by_name = parser.parse_args().by_name
    for what, counts in (
        ("a block in fp32, C++", block_counts()),
        ("a step of Llama 3.2 1B in bf16, Triton", launches_1b()),
    ):
        print(f"{what}: {counts.total()} kernels")
        for name, count in counts.most_common() if by_name else ():
            print(f"  {count:6} {name}")


if __name__ == "__main__":
    main()
