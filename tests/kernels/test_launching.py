"""Launches of compiled kernels past Triton's own look at the arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdprompt_fast.kernels import launching


class Kernel:
    """Stands for a kernel and all that was compiled of it."""

    def __init__(self) -> None:
        self.fn, self.arg_names = self, ["x", "n", "scale", "BLOCK", "ADD"]
        self.bound: list[Any] = []
        self.started: list[Any] = []
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Kernel:
            self.bound.append((grid, arguments, constants))
            return self

        return launch

    def run(self, *arguments: Any) -> None:
        self.started.append(arguments)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "JITFunction", Kernel)
    active = SimpleNamespace(get_current_device=lambda: -1, get_current_stream=lambda _: "stream")
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launching, "_compiled", {})
    return Kernel()


def test_a_kernel_is_looked_at_once_and_started_with_all_arguments_in_order(
    kernel: Kernel,
) -> None:
    x, y = torch.zeros(8), torch.ones(8)
    launching.run_kernel(kernel, (3,), x, 8, 0.5, ADD=True, BLOCK=16, num_warps=4)
    launching.run_kernel(kernel, (4, 2), y, 8, 0.7, ADD=True, BLOCK=16, num_warps=4)
    assert kernel.bound == [((3,), (x, 8, 0.5), dict(ADD=True, BLOCK=16, num_warps=4))]
    (started,) = kernel.started
    launch = (4, 2, 1, "stream", "function", "metadata", None, None, None)
    assert started[:9] == launch and started[9] is y and started[10:] == (8, 0.7, 16, True)


@pytest.mark.parametrize(
    "changed",
    [
        dict(x=torch.zeros(8, dtype=torch.bfloat16)),
        dict(x=torch.zeros(9)[1:]),  # not aligned
        dict(n=1),
        dict(n=(8, 4)),
        dict(n=(torch.zeros(8), 4)),
        dict(BLOCK=32),
        dict(ADD=False),
        dict(num_warps=8),
    ],
    ids=str,
)
def test_what_another_kernel_is_compiled_for_is_looked_at_again(
    kernel: Kernel, changed: dict[str, Any]
) -> None:
    given = dict(x=torch.zeros(8), n=8, BLOCK=16, ADD=True, num_warps=4)
    for each in (given, {**given, **changed}):
        constants = {name: each[name] for name in ("BLOCK", "ADD", "num_warps")}
        launching.run_kernel(kernel, (1,), each["x"], each["n"], 0.5, **constants)
    assert len(kernel.bound) == 2 and not kernel.started


def test_hooks_on_launches_see_them(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = SimpleNamespace(calls=[print])
    monkeypatch.setattr(launching.knobs.runtime, "launch_enter_hook", hooks)
    for _ in range(2):
        launching.run_kernel(kernel, (1,), torch.zeros(8), 8, 0.5, BLOCK=16, ADD=True)
    assert len(kernel.bound) == 2 and not kernel.started
