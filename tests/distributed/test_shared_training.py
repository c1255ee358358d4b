"""Training, evaluation and the teacher's cache by several processes give what one gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gdprompt_fast.data import Example, tokenise_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.distributed import launched, rank
from gdprompt_fast.evaluation import InnerStep, evaluate
from gdprompt_fast.teacher import TeacherCache, TeacherOnTheFly
from gdprompt_fast.training.loop import meta_train
from gdprompt_fast.training.metrics import EVENTS_FOLDER, METRICS_FILE, read_metrics
from gdprompt_fast.training.options import TrainOptions
from helpers.processes import in_processes
from helpers.training import GOLD, GROUPED, KL, LORA, ROOMY, TOKENIZER, initial_model, tiny_llama

Weights = dict[str, torch.Tensor]


def briefly(options: TrainOptions, **changes: Any) -> TrainOptions:
    return dataclasses.replace(options, steps=3, checkpoint_every=2, **changes)


# options, whether LoRA is trained, examples of joint training
CASES = {
    "gold with λ and little batches": (briefly(GOLD, micro_batch=1, batch_size=3), False, 0),
    "kl, joint, prompted": (briefly(KL, prompt_weight=0.3, group_by_length=True), False, 3),
    "a group of two contexts, λ on prompts": (briefly(GROUPED), False, 0),
    "LoRA inside and outside": (briefly(LORA), True, 0),
}


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return tokenise_triples(make_people_data(1, 7, seed=0).test, TOKENIZER, ROOMY).examples


def trained(
    options: TrainOptions, lora: bool, examples: list[Example], joint: int, output: Path
) -> Weights:
    """A short run in fp64; its final weights."""
    model, teacher = initial_model(lora).double(), None
    if options.objective == "kl":
        own = tiny_llama(seed=1).eval().double()
        teacher = TeacherCache.build(output / "teacher", own, examples, 3, batch_size=2)
    meta_train(model, TOKENIZER, examples, options, output, teacher, examples[:joint] or None)
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_close(got: Weights, expected: Weights) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)


def all_trained(examples: list[Example], output: Path) -> dict[str, Weights]:
    return {
        name: trained(*case[:2], examples, case[2], output / name) for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def by_one(
    examples: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Weights]]:
    folder = tmp_path_factory.mktemp("one")
    return folder, all_trained(examples, folder)


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_ends_with_the_weights_and_metrics_of_one_process(
    count: int, by_one: tuple[Path, dict[str, Weights]], examples: list[Example], tmp_path: Path
) -> None:
    """In fp64, also where some processes have no share of a step."""
    folder, expected = by_one

    def work() -> dict[str, Weights]:
        with launched():
            return all_trained(examples, tmp_path)

    for of_process in in_processes(count, work, init=False):
        for name, got in of_process.items():
            assert_close(got, expected[name])
    for name in CASES:
        one, many = folder / name, tmp_path / name
        for mine, theirs in zip(
            *(read_metrics(at / METRICS_FILE) for at in (one, many)), strict=True
        ):
            del mine["padding"], theirs["padding"]  # which each process has of its own
            assert theirs == pytest.approx(mine, rel=1e-6, abs=1e-9)
        assert files_in(one) == files_in(many)
        for shard in one.glob("teacher/*.safetensors"):
            assert (many / "teacher" / shard.name).read_bytes() == shard.read_bytes()


def files_in(folder: Path) -> list[Path]:
    """But for TensorBoard's, which have names of their own."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in files if path.parts[0] != EVENTS_FOLDER)


def test_an_evaluation_is_shared_and_an_error_in_it_is_everybodys(examples: list[Example]) -> None:
    model = tiny_llama().eval()

    def scores(lr: float) -> Any:
        found = evaluate(model, TOKENIZER, examples, InnerStep(lr, steps=3), 2, answer_tokens=2)
        return {name: vars(of) for name, of in found.items()}

    def work() -> tuple[Any, str]:
        with launched():
            found = scores(0.1)
            with pytest.raises(FloatingPointError) as caught:
                scores(1e30)
            return found, str(caught.value)

    expected = scores(0.1)
    (mine, error), (theirs, same_error) = in_processes(2, work, init=False)
    assert error == same_error
    for found in (mine, theirs):
        for setting, of in expected.items():
            for name, value in of.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(found[setting][name], value), (setting, name)
                else:
                    assert found[setting][name] == value, (setting, name)


def test_processes_with_other_weights_or_examples_do_not_train(
    examples: list[Example], tmp_path: Path
) -> None:
    """Frozen ones, and a teacher's, count too, also in another order."""

    def permuted() -> nn.Module:
        model = initial_model(lora=True)
        frozen = next(each for each in model.parameters() if not each.requires_grad)
        frozen.copy_(frozen.flip(0) if rank() else frozen)
        return model

    def work() -> tuple[str, ...]:
        with launched(), torch.no_grad():
            with pytest.raises(ValueError, match="model: the sum of its weights") as weights:
                meta_train(tiny_llama(seed=rank()), TOKENIZER, examples, GOLD, tmp_path)
            with pytest.raises(ValueError, match="model: the sum of its weights") as frozen:
                meta_train(permuted(), TOKENIZER, examples, GOLD, tmp_path)
            with pytest.raises(ValueError, match="teacher: the sum of its weights") as teacher:
                TeacherOnTheFly(permuted(), examples, 3, batch_size=2)
            own = examples if rank() == 0 else examples[::-1]
            with pytest.raises(ValueError, match="hash of examples") as data:
                meta_train(tiny_llama(), TOKENIZER, own, GOLD, tmp_path)
            return tuple(str(each.value) for each in (weights, frozen, teacher, data))

    first, second = in_processes(2, work, init=False)
    assert first == second and all(error.endswith("in process 1") for error in first)
