"""What a MetaTrainer refuses at construction, each with its reason."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, PromptTuningConfig
from torch import nn
from transformers import TrainingArguments

from gdprompt_fast.errors import UserError
from gdprompt_fast.trainer import MetaCollator, MetaTrainer, MetaTrainingArguments
from gdprompt_fast.trainer.refused import REFUSED, check_accelerator
from helpers.models import llama
from helpers.trainer import ROWS, arguments, trainer_on
from helpers.training import TOKENIZER, tiny_llama

ON: dict[str, Any] = {
    "gradient_checkpointing": True,
    "activation_checkpointing": True,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "fp16": True,
    "fp16_full_eval": True,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "optim_target_modules": "all-linear",
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": "full_shard",
    "parallelism_config": object(),
    "remove_unused_columns": True,
}
KNOWN = MetaTrainingArguments.__dataclass_fields__


def test_every_refused_argument_is_tried() -> None:
    assert ON.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", [name for name in ON if name in KNOWN])
def test_an_argument_that_a_meta_step_cannot_be_trained_with(name: str, tmp_path: Path) -> None:
    reason = re.escape(REFUSED[name])
    with pytest.raises(UserError, match=f"^{name}: expected it to be off, got .*: {reason}$"):
        arguments(tmp_path, **{name: ON[name]})
    args = arguments(tmp_path)
    setattr(args, name, ON[name])  # after it was made
    with pytest.raises(UserError, match=f"^{name}: .*{reason}$"):
        MetaTrainer(tiny_llama(), args, ROWS, processing_class=TOKENIZER)


@pytest.mark.parametrize(
    "optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"]
)
def test_optimizers_that_step_inside_the_backward(optim: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f'^optim: expected .* got "{optim}", which updates'):
        arguments(tmp_path, optim=optim)


def test_several_gpus_in_one_process(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(UserError, match=r"^n_gpu: expected one GPU a process, got 2: DataParallel"):
        MetaTrainer(tiny_llama(), args, ROWS, processing_class=TOKENIZER)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(distributed_type=DistributedType.DEEPSPEED), "accelerate: .* got DEEPSPEED"),
        (dict(distributed_type=DistributedType.FSDP), "accelerate: .* got FSDP"),
        (dict(mixed_precision="fp16"), 'mixed_precision: .* got "fp16"'),
        (dict(mixed_precision="fp8"), 'mixed_precision: .* got "fp8"'),
        (
            dict(
                state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DistributedType.FSDP))
            ),
            "dynamo_backend: expected none",
        ),
    ],
)
def test_what_a_configuration_of_accelerate_turns_on(changes: Any, said: str) -> None:
    given = dict(
        distributed_type=DistributedType.NO,
        mixed_precision="no",
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=None)),
    )
    check_accelerator(SimpleNamespace(**given))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"^{said}"):
        check_accelerator(SimpleNamespace(**given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(inner_params=lambda name, _: True), "inner_params: expected"),
        (dict(inner_lr=-1.0), "inner_lr: expected"),
        (dict(objective="both"), 'objective: expected "kl" or "gold"'),
        (dict(micro_groups=0), "micro_groups: expected"),
        (dict(answer_tokens=0), "answer_tokens: expected"),
        (dict(max_query_tokens=0), "max_query_tokens: expected"),
        (dict(accelerator_config={"dispatch_batches": True}), "accelerator_config: expected"),
    ],
)
def test_options_of_the_step(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        arguments(tmp_path, **changes)


def half_trained() -> nn.Module:
    model = tiny_llama()
    model.get_input_embeddings().to(torch.bfloat16)  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(model=half_trained), "model: expected float32 weights .* got bfloat16"),
        (dict(model=lambda: nn.Linear(2, 2)), "model: expected"),
        (dict(inner_params="lora"), "inner_params: expected to select some"),
        (dict(peft_config=PromptTuningConfig()), "peft_config: expected a LoraConfig"),
        (dict(teacher=tiny_llama), 'teacher: expected None with objective="gold"'),
        (
            dict(objective="kl", teacher=lambda: llama(len(TOKENIZER) + 1)),
            "teacher: expected the model's vocabulary",
        ),
        (dict(rows=[]), "dataset: expected at least one row"),
        (dict(rows=[{"text": "a"}]), "dataset: expected the columns"),
        (dict(rows=[{**ROWS[0], "query": [1, 2]}]), "dataset: expected texts or token ids"),
        (dict(rows=[dict.fromkeys(ROWS[0], 3)]), "dataset: expected texts or lists"),
        (dict(rows=[{name: [10**6] * 3 for name in ROWS[0]}]), "tokenizer: expected ids below"),
        (dict(objective="kl", answer_tokens=10**6), "answer_tokens: expected fewer"),
    ],
)
def test_models_teachers_and_data(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = {k: v() if k in ("model", "teacher") else v for k, v in changes.items()}
    with pytest.raises(UserError, match=f"^{said}"):
        trainer_on(tmp_path, **made)


def test_adapters_on_adapters(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = trainer_on(tmp_path, peft_config=config).model
    with pytest.raises(UserError, match=r"^peft_config: expected None"):
        trainer_on(tmp_path, model, peft_config=config)


def test_arguments_of_the_trainer_that_have_no_meaning(tmp_path: Path) -> None:
    for name in ("model_init", "compute_loss_func"):
        with pytest.raises(UserError, match=f"^{name}: expected None"):
            MetaTrainer(tiny_llama(), arguments(tmp_path), ROWS, None, TOKENIZER, **{name: print})
    with pytest.raises(UserError, match=r"^args: expected MetaTrainingArguments"):
        MetaTrainer(tiny_llama(), TrainingArguments(str(tmp_path), use_cpu=True), ROWS)  # type: ignore[arg-type]


def test_texts_without_a_tokenizer_and_a_set_that_the_teacher_has_not_seen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^processing_class: expected a tokenizer"):
        MetaTrainer(tiny_llama(), arguments(tmp_path), ROWS)
    with pytest.raises(UserError, match=r"^processing_class: expected a tokenizer"):
        MetaCollator()([ROWS[0]])
    trainer = trainer_on(tmp_path, objective="kl", answer_tokens=3)
    with pytest.raises(UserError, match=r"^eval_dataset: expected .* given to MetaTrainer"):
        trainer.evaluate(ROWS)


def test_the_package_imports_without_accelerate() -> None:
    """And the room says what to install."""
    code = (
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'accelerate' else find(name, *a)\n"
        "import gdprompt_fast, gdprompt_fast.runs\n"
        "try:\n"
        "    import gdprompt_fast.trainer\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "gdprompt_fast[trainer]"' in done.stdout, done.stderr
