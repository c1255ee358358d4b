"""The memory plan: predictions against measured peaks, and that nothing is allocated for them."""

from __future__ import annotations

import json
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
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from gdprompt_fast import MetaBatch, TeacherTargets, fast_meta_step
from gdprompt_fast.cli.main import main
from gdprompt_fast.loading import add_lora
from gdprompt_fast.models.memory import PeakMemory, model_tensors
from gdprompt_fast.ops.blocks import abridged_loops, block_ranges
from gdprompt_fast.plan import (
    PlannedStep,
    make_plan,
    parse_memory,
    plan_table,
    predict,
    predict_materialised,
    predict_sequential,
)
from gdprompt_fast.plan.plan import LARGEST_BATCH, largest_batch
from gdprompt_fast.reference.frugal import Task, all_alive, sequential
from helpers.plans import BASE, SIZES, VOCABULARY

CONFIGS = Path(__file__).parent / "configs"
LLAMA_1B, LLAMA_8B = CONFIGS / "llama-3.2-1b.json", CONFIGS / "llama-3.1-8b.json"
MODELS: dict[str, PreTrainedConfig] = {
    "llama-tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-one-layer": LlamaConfig(**{**SIZES, "num_hidden_layers": 1}),
    "llama-untied": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama-many-words": LlamaConfig(
        **{**SIZES, "vocab_size": 1 << 15, "hidden_size": 32}, tie_word_embeddings=True
    ),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
    ),
}
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

    def measure_autograd(self, step: Callable[[Task], None], with_gradients: bool) -> int:
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
                Task(
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


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("case", AUTOGRAD_CASES)
def test_the_prediction_of_all_copies_at_once_is_its_measured_peak(case: str, batch: int) -> None:
    name, options = CASES[case]
    planned = PlannedStep(**{**BASE, **options, "batch": batch})
    made = predict_materialised(MODELS[name], planned)
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


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    def peak_at(batch: int) -> int:
        planned = PlannedStep(**{**BASE, "batch": batch})
        return predict(MODELS["llama-one-layer"], planned).peak_bytes

    memory = peak_at(13)
    peaks = {4: peak_at(4)}
    assert largest_batch(peak_at, peaks, memory) == 13
    assert largest_batch(peak_at, peaks, memory - 1) == 12
    assert peaks[12] < peaks[13] == memory


def test_a_batch_that_is_larger_than_any_looked_for_and_fits_is_the_answer() -> None:
    peaks = {LARGEST_BATCH + 1: 10}
    assert largest_batch(lambda batch: 10, peaks, memory=11) == LARGEST_BATCH + 1


def test_a_batch_of_very_many_tokens_is_planned() -> None:
    small, large = (
        predict(MODELS["llama-one-layer"], PlannedStep(batch, 512, 32)) for batch in (512, 1024)
    )
    grown = large.meta_step["activations"] / small.meta_step["activations"]
    assert grown == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("start", [1, 16, 1000])
@pytest.mark.parametrize("largest", [0, 1, 2, 15, 16, 17, 700, LARGEST_BATCH])
def test_the_search_finds_the_largest_batch_in_a_few_predictions(start: int, largest: int) -> None:
    asked = []

    def peak_at(batch: int) -> int:
        asked.append(batch)
        return max(100 + 7 * batch, 10 * batch)

    memory = 106 if largest == 0 else peak_at(largest)
    asked.clear()
    assert largest_batch(peak_at, {start: max(100 + 7 * start, 10 * start)}, memory) == largest
    assert len(asked) <= 12


def test_abridged_loops_take_the_last_blocks() -> None:
    assert block_ranges(10, 4) == [(0, 4), (4, 8), (8, 10)]
    with abridged_loops():
        assert block_ranges(100, 7) == [(84, 91), (91, 98), (98, 100)]
        assert block_ranges(5, 7) == [(0, 5)]
    assert len(block_ranges(100, 7)) == 15


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80_000_000_000), ("1.5 GiB", 3 << 29), ("500MB", 500_000_000)]
)
def test_sizes_of_memory_are_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    MODELS["llama-one-layer"].save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_the_command_prints_a_plan_and_writes_its_numbers(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    options = ["--batch", "4", "--context", "24", "--query", "10", "--json", str(output)]
    assert main(["plan", "--model", str(config_file.parent), *options, "--memory", "9MB"]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads(output.read_text())
    plan = make_plan(AutoConfig.from_pretrained(config_file), PlannedStep(4, 24, 10))
    fast = numbers["predicted"]["fast_meta_step"]
    assert fast["peak_bytes"] == plan.fast.peak_bytes == sum(fast["meta_step"].values())
    assert numbers["largest_batch"] > 4 and f"| {numbers['largest_batch']} " in printed
    assert main(["plan", "--model", str(config_file), *options]) == 0
    assert capsys.readouterr().out == plan_table(str(config_file), plan) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/config.json"], "model: expected a config.json, a folder with one or"),
        (["--batch", "0"], "batch: expected an integer >= 1, got 0"),
        (["--context", "-3"], "context: expected an integer >= 2, got -3"),
        (["--context", "9999"], "context: expected at most the model's 2048 positions, got 9999"),
        (["--response", "32"], "response: expected fewer tokens than the query's 32"),
        (["--inner", "lora"], 'inner: expected "full" without adapters'),
        (["--lora-rank", "0"], "lora_rank: expected an integer >= 1, got 0"),
        (["--memory", "80"], "memory: expected a size in MB, GB"),
        (["--memory", "80 Gb"], "memory: expected a size in MB, GB"),
        (["--memory", "0GB"], "memory: expected a size in MB, GB"),
        (["--json", "no/such/folder/plan.json"], "json: expected a file in an existing folder"),
        (["--model", "bert.json"], "model: expected a transformers causal LM"),
        (["--model", "mamba.json"], "model: expected one that can be built, got Mamba"),
        (
            ["--model", "unknown.json"],
            "model: expected a configuration at unknown.json, got a model_",
        ),
        (["--model", "broken.json"], "model: expected JSON in broken.json"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str],
    message: str,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(config_file.parent)
    Path("bert.json").write_text('{"model_type": "bert"}')
    Path("mamba.json").write_text('{"model_type": "mamba", "hidden_size": 8, "vocab_size": 16}')
    Path("broken.json").write_text("{")
    Path("unknown.json").write_text('{"model_type": "llama9"}')
    assert main(["plan", "--model", str(config_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_file_that_cannot_be_written_is_one_clear_line(
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
    output = tmp_path / "plan.json"
    assert main(["plan", "--model", str(config_file), "--json", str(output)]) == 2
    assert capsys.readouterr().err.endswith(
        f"error: json: expected a file that can be written, got {output}\n"
    )


@pytest.mark.parametrize(
    "fault",
    [
        {"num_attention_heads": 5},
        {"num_key_value_heads": 3},
        {"hidden_size": "64"},
        {"hidden_act": "nosuch"},
        {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_a_faulty_configuration_is_one_clear_line(
    fault: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=64)
    config = {"model_type": "llama", "num_attention_heads": 4, **sizes, **fault}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert main(["plan", "--model", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: model: expected" in error
