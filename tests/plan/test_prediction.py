"""The predicted peak of a step is that of the step on real tensors."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
)

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step
from gdprompt_fast.loading import add_lora
from gdprompt_fast.models.memory import PeakMemory, model_tensors
from gdprompt_fast.plan import (
    PlannedStep,
    predict,
    predict_materialised,
    predict_sequential,
)
from gdprompt_fast.reference.lean_maml import LeanMAML, all_alive, sequential
from helpers.plans import BASE, MODELS, SIZES

CONFIGS = Path(__file__).parent / "configs"
LLAMA_1B, LLAMA_8B = CONFIGS / "llama-3.2-1b.json", CONFIGS / "llama-3.1-8b.json"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama in fp32": ("llama-tied", dict(dtype="fp32")),
    "llama in bf16": ("llama-tied", {}),
    "llama untied, gold, in fp32": ("llama-untied", dict(objective="gold", dtype="fp32")),
    "two inner steps": ("llama-tied", dict(inner_steps=2)),
    "lora outside": ("llama-tied", dict(outer="lora")),
    "lora outside, in fp32": ("llama-untied", dict(outer="lora", dtype="fp32")),
    "lora inside and outside": ("llama-tied", dict(outer="lora", inner="lora", inner_steps=2)),
    "one example, no optimizer": ("llama-tied", dict(batch=1, optimizer="none")),
    "attention in blocks": ("llama-tied", dict(context=512, batch=6)),
    "a vocabulary in blocks": ("llama-many-words", dict(batch=6, context=48)),
    "a large batch, sgd": ("llama-tied", dict(batch=17, optimizer="sgd")),
    "qwen2, lora outside": ("qwen2", dict(outer="lora")),
    "mistral in bf16": ("mistral", {}),
    "qwen3 in bf16": ("qwen3", {}),
    "gpt-neox in fp32": ("gpt-neox", dict(dtype="fp32")),
    "gpt-neox, lora outside, gold": ("gpt-neox", dict(outer="lora", objective="gold")),
    "gpt2 in bf16": ("gpt2", {}),
    "xglm in bf16": ("xglm", {}),
    "xglm in fp32": ("xglm", dict(dtype="fp32")),
    "recomputed blocks": ("llama-tied", dict(recompute="block")),
    "recomputed blocks, lora outside": ("gpt2", dict(recompute="block", outer="lora")),
}


class RealStep:
    """The same step on real tensors, with an optimizer that has its states."""

    def __init__(self, config: PreTrainedConfig, planned: PlannedStep) -> None:
        torch.manual_seed(0)
        self.planned = planned
        dtype = torch.bfloat16 if planned.dtype == "bf16" else torch.float32
        lora = planned.outer == "lora"
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype if lora else None)
        self.model: nn.Module = add_lora(model, planned.lora_rank, seed=0) if lora else model.eval()
        ids = torch.randint(config.vocab_size, (planned.batch, planned.context))
        query_ids = torch.randint(config.vocab_size, (planned.batch, planned.query))
        real = torch.ones_like(query_ids, dtype=torch.bool)
        response = real & (torch.arange(planned.query) >= planned.query - planned.response)
        context_mask = torch.ones_like(ids, dtype=torch.bool)
        self.batch = MetaBatch(ids, context_mask, query_ids, real, response)
        states = torch.randn(int(response.sum()), config.hidden_size, dtype=dtype)
        head = torch.randn(config.vocab_size, config.hidden_size, dtype=dtype)
        self.teacher = TeacherTargets(hidden=states, head=head)
        self.options = dict(
            inner_steps=planned.inner_steps,
            inner_params=planned.inner,
            objective=planned.objective,
            teacher=self.teacher if planned.objective == "kl" else None,
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.optimizer = None
        if planned.optimizer != "none":
            self.optimizer = kinds[planned.optimizer](trained, lr=1e-3, foreach=True)
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=planned.dtype == "bf16")

    def present(self) -> list[Tensor]:
        states = self.optimizer.state.values() if self.optimizer is not None else []
        tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return [*model_tensors(self.model), *tensors]

    def measure(self, backend: str = "torch") -> tuple[int, int]:
        """The peaks of the meta step and of the optimizer's."""
        teacher = self.options["teacher"]
        targets = [self.teacher.hidden, self.teacher.head] if teacher is not None else []
        memory = PeakMemory([*self.present(), *targets])
        with memory, self.autocast:
            fast_meta_step(
                self.model,
                self.batch,
                backend=backend,
                recompute=self.planned.recompute,
                **self.options,
            )
        if self.optimizer is None:
            return memory.peak_bytes, 0
        after = PeakMemory(self.present())
        with after:
            self.optimizer.step()
        return memory.peak_bytes, after.peak_bytes

    def measure_autograd(self, step: Callable[[LeanMAML], None], with_gradients: bool) -> int:
        """The peak of MAML by autograd."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and with_gradients:
                parameter.grad = torch.zeros_like(parameter)
        teacher = self.options["teacher"]
        targets = [self.teacher.hidden, self.teacher.head] if teacher is not None else []
        memory = PeakMemory([*self.present(), *targets])
        planned = self.planned
        with memory, self.autocast:
            step(
                LeanMAML(
                    self.model,
                    self.batch,
                    teacher,
                    inner_params=planned.inner,
                    inner_steps=planned.inner_steps,
                )
            )
        return memory.peak_bytes


@pytest.mark.parametrize("case", CASES)
def test_the_prediction_is_the_measured_peak(case: str) -> None:
    name, options = CASES[case]
    planned = PlannedStep(**{**BASE, **options})
    predicted = predict(MODELS[name], planned)
    step, optimizer = RealStep(MODELS[name], planned).measure()
    got = sum(predicted.meta_step.values()), sum(predicted.optimizer_step.values())
    print(f"\n{case}: predicted {got} of {(step, optimizer)} bytes, {got[0] / step - 1:+.2%}")
    assert got[0] == pytest.approx(step, rel=0.02)
    assert got[1] == pytest.approx(optimizer, rel=0.02)
    assert min(predicted.meta_step.values()) >= 0


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype="fp32"),
        dict(dtype="bf16"),
        dict(dtype="fp32", outer="lora"),
        dict(dtype="fp32", recompute="block"),
        dict(dtype="fp32", batch=2, context=1024),
    ],
    ids=str,
)
def test_the_prediction_holds_for_what_runs_on_this_machine(options: dict[str, Any]) -> None:
    wide = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, vocab_size=8192)
    config = LlamaConfig(**{**SIZES, **wide}, num_key_value_heads=2, tie_word_embeddings=True)
    planned = PlannedStep(**{**BASE, "batch": 8, "context": 128, **options})
    predicted = sum(predict(config, planned).meta_step.values())
    measured, _ = RealStep(config, planned).measure("auto")
    assert predicted == pytest.approx(measured, rel=0.10)


AUTOGRAD_CASES = [
    "llama in fp32",
    "llama untied, gold, in fp32",
    "two inner steps",
    "lora outside",
    "lora inside and outside",
    "attention in blocks",
    "a vocabulary in blocks",
    "gpt2 in bf16",
]


@pytest.mark.parametrize("case", AUTOGRAD_CASES)
def test_the_prediction_of_the_sequential_loop_is_its_measured_peak(case: str) -> None:
    name, options = CASES[case]
    planned = PlannedStep(**{**BASE, **options, "batch": 3})
    predicted = sum(predict_sequential(MODELS[name], planned).meta_step.values())
    measured = RealStep(MODELS[name], planned).measure_autograd(sequential, with_gradients=True)
    assert predicted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("case", AUTOGRAD_CASES)
def test_the_prediction_of_all_copies_at_once_is_its_measured_peak(case: str) -> None:
    name, options = CASES[case]
    made = predict_materialised(MODELS[name], PlannedStep(**{**BASE, **options}))
    for batch in (1, 5):
        planned = PlannedStep(**{**BASE, **options, "batch": batch})
        measured = RealStep(MODELS[name], planned).measure_autograd(all_alive, with_gradients=False)
        assert sum(made.at(batch).meta_step.values()) == pytest.approx(measured, rel=0.02)


def test_each_example_of_all_copies_at_once_holds_more_than_a_copy_of_the_weights() -> None:
    made = predict_materialised(MODELS["llama-tied"], PlannedStep(**BASE))
    assert sum(made.copy.values()) > 4 * made.one.parameters


def test_the_shape_of_llama_1b_is_planned_without_its_memory_and_fits_the_goal() -> None:
    made: list[Tensor] = []

    def watch(tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor) and not tensor.is_meta:
            made.append(tensor.untyped_storage().nbytes())

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with PeakMemory(on_new=watch):
        prediction = predict(AutoConfig.from_pretrained(LLAMA_1B), PlannedStep())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert prediction.parameters == 1_235_814_400
    assert made and max(made) < 1e6, f"a real tensor of {max(made)} bytes"
    assert grown < 500e3, f"the process grew by {grown} kB"
    assert prediction.peak_bytes <= 40e9
    assert prediction.meta_step["weights"] == pytest.approx(4 * prediction.parameters, rel=1e-3)
    assert prediction.meta_step["optimizer"] == pytest.approx(8 * prediction.parameters, rel=1e-3)
