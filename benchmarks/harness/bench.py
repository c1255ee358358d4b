"""Where a job of the GPU benchmark runs: on CUDA, or tiny on a CPU in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bench:
    tiny: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def job_limit_s(self) -> float:
        """Of a job that does not hang; the interpreter is slow."""
        return 600 if self.tiny else 120

    @property
    def timed_status(self) -> str:
        return "interpreter" if self.tiny else "measured"

    def prepare(self) -> None:
        """First of all in a process, which TRITON_INTERPRET has reached."""
        torch.set_float32_matmul_precision("highest")
        if self.tiny:
            torch.set_num_threads(1)
            from gdprompt_fast.testing import triton_interpreter

            triton_interpreter.mend()
        elif os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
            raise SystemExit("expected a CUDA device and no TRITON_INTERPRET=1; or give --tiny")
        else:
            torch.cuda.init()
