"""Training with weights that are divided: the run of one process, its files, its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gdprompt_fast import fast_meta_step
from gdprompt_fast.artifacts.tensors import SavedTensors
from gdprompt_fast.data import Example, tokenise_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.distributed import launched
from gdprompt_fast.distributed.sharded import whole
from gdprompt_fast.evaluation.held_out import HeldOut
from gdprompt_fast.meta.gathered import shard
from gdprompt_fast.reference.compare import without_upcasts
from gdprompt_fast.teacher import Teacher, TeacherCache, TeacherOnTheFly
from gdprompt_fast.training import loop
from gdprompt_fast.training.best import BEST_FILE, BEST_FOLDER
from gdprompt_fast.training.checkpoint import MODEL_FOLDER
from gdprompt_fast.training.metrics import METRICS_FILE, read_metrics
from gdprompt_fast.training.options import TrainOptions
from helpers.processes import in_processes
from helpers.training import GOLD, GROUPED, KL, LORA, ROOMY, TOKENIZER, initial_model, tiny_llama

Weights = dict[str, torch.Tensor]
CPU = torch.device("cpu")
LONG = 120.0  # seconds: every pass of a block gathers


def briefly(options: TrainOptions, **changes: Any) -> TrainOptions:
    own = dict(steps=3, checkpoint_every=2, recompute="block", sharding="full")
    return dataclasses.replace(options, **{**own, **changes})


# options, whether LoRA is trained, examples of joint training, whether the teacher is kept
Case = tuple[TrainOptions, bool, int, bool]
CASES: dict[str, Case] = {
    "gold with λ, a group at a time": (briefly(GOLD, micro_batch=1, batch_size=3), False, 0, True),
    "kl, joint, prompted": (briefly(KL, prompt_weight=0.3), False, 3, False),
    "a group of two contexts, λ on prompts": (briefly(GROUPED, steps=2), False, 0, True),
    "LoRA inside and outside": (briefly(LORA, steps=2, batch_size=1), True, 0, True),
}
BEGUN, WHOLE = [*CASES][:2], [*CASES][2:]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return tokenise_triples(make_people_data(1, 7, seed=0).test, TOKENIZER, ROOMY).examples


def trained(name: str, examples: list[Example], output: Path, divided: bool) -> Weights:
    """A short run in fp64; its final weights."""
    options, lora, joint, kept = CASES[name]
    model: Any = initial_model(lora).double()
    own: Any = tiny_llama(seed=1).eval().double()
    if divided:
        model, own = shard(model, CPU), shard(own, CPU)
    teacher: Teacher | None = None
    if options.objective == "kl" and kept:
        teacher = TeacherCache.build(output / "teacher", own, examples, 3, batch_size=2)
    elif options.objective == "kl":
        teacher = TeacherOnTheFly(own, examples, 3, batch_size=1)
    held_out = HeldOut(examples[4:], every=2, batch_size=2) if name == BEGUN[0] else None
    more: dict[str, Any] = dict(joint=examples[:joint] or None, held_out=held_out)
    with without_upcasts(tiny_llama()):
        loop.meta_train(model, TOKENIZER, examples, options, output, teacher, **more)
    return {key: whole(value).clone() for key, value in model.state_dict().items()}


def assert_close(got: Weights, expected: Weights) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)


def stop_after(steps: int) -> None:
    left = [steps]

    def some(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError
        return fast_meta_step(*args, **options)

    loop.fast_meta_step = some


def test_runs_end_as_those_of_one_process_which_went_on_in_another_number(
    examples: list[Example], tmp_path: Path
) -> None:
    """In fp64: begun by three, stopped after step 2, continued by two, or by one with the whole
    model. Some processes have no share of a step.
    """
    one, many = tmp_path / "one", tmp_path / "many"
    expected = {name: trained(name, examples, one / name, False) for name in CASES}

    def begin() -> bool:
        with launched():
            for name in BEGUN:
                stop_after(2)
                with pytest.raises(InterruptedError):
                    trained(name, examples, many / name, True)
        return True

    def go_on() -> dict[str, Weights]:
        with launched():
            return {name: trained(name, examples, many / name, True) for name in (BEGUN[0], *WHOLE)}

    assert in_processes(3, begin, init=False, longest=LONG) == [True] * 3
    (kept,) = (many / BEGUN[1] / "checkpoints").iterdir()
    state = SavedTensors(kept / "optimizer.safetensors")
    shapes = [list(parameter.shape) for parameter in tiny_llama().parameters()]
    assert [[*state.tensor(f"{n}.exp_avg").shape] for n in range(len(shapes))] == shapes
    assert_close(trained(BEGUN[1], examples, many / BEGUN[1], False), expected[BEGUN[1]])

    for of_process in in_processes(2, go_on, init=False, longest=LONG):
        for name, got in of_process.items():
            assert_close(got, expected[name])
    for name in CASES:
        mine, theirs = (read_metrics(at / name / METRICS_FILE) for at in (one, many))
        for before, after in zip(mine, theirs, strict=True):
            del before["padding"], after["padding"]  # which each process has of its own
            assert after == pytest.approx(before, rel=1e-6, abs=1e-9)
        for path in (one / name).glob("teacher/*"):
            assert (many / name / "teacher" / path.name).read_bytes() == path.read_bytes()
    check_model_files(one, many)


def check_model_files(one: Path, many: Path) -> None:
    """A model is in the files of one process."""
    folders = [at / BEGUN[0] / BEST_FOLDER for at in (one, many)]
    best = [json.loads((folder / BEST_FILE).read_text()) for folder in folders]
    assert best[1] == pytest.approx(best[0], rel=1e-5)
    assert_close(*(load_file(folder / "model.safetensors") for folder in reversed(folders)))
    for name in CASES:
        files = [sorted(p.name for p in (at / name / MODEL_FOLDER).iterdir()) for at in (one, many)]
        assert files[0] == files[1], name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        texts = [(at / WHOLE[0] / MODEL_FOLDER / name).read_text() for at in (one, many)]
        assert texts[0] == texts[1]
    adapters = [at / WHOLE[1] / MODEL_FOLDER / "adapter_config.json" for at in (one, many)]
    configs = [json.loads(path.read_text()) for path in adapters]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(many / WHOLE[0] / MODEL_FOLDER)
    own = AutoModelForCausalLM.from_pretrained(one / WHOLE[0] / MODEL_FOLDER)
    assert_close(dict(loaded.named_parameters()), dict(own.named_parameters()))
