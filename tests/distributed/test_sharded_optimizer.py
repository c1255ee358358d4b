"""Adam whose state is divided among the processes: the same steps, and the same checkpoints."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from gdprompt_fast.data import Example, tokenise_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.distributed import launched, rank
from gdprompt_fast.distributed.sharded import whole
from gdprompt_fast.distributed.shards import Shards
from gdprompt_fast.training import loop
from gdprompt_fast.training.loop import meta_train
from gdprompt_fast.training.optim import ClippedAdam
from gdprompt_fast.training.options import TrainOptions
from helpers.processes import in_processes
from helpers.sharding import shard
from helpers.training import GOLD, ROOMY, TOKENIZER, tiny_llama

Weights = dict[str, torch.Tensor]
SHARDED = dataclasses.replace(GOLD, sharding="optimizer", steps=5, checkpoint_every=2, batch_size=3)
KINDS = [(2, "none", "optimizer"), (3, "optimizer", "none")]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return tokenise_triples(make_people_data(1, 7, seed=0).test, TOKENIZER, ROOMY).examples


def trained(options: TrainOptions, examples: list[Example], output: Path) -> Weights:
    model = tiny_llama().double()
    meta_train(model, TOKENIZER, examples, options, output)
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_close(got: Weights, expected: Weights) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("count", "sharding", "then"), KINDS)
def test_a_checkpoint_goes_on_in_another_number_of_processes(
    count: int, sharding: str, then: str, examples: list[Example], tmp_path: Path
) -> None:
    """Begun in ``count`` processes, stopped at step 3, and continued from step 2 in others, of
    which each has a part of the state, or all of it; and in one.
    """
    expected = trained(SHARDED, examples, tmp_path / "one")
    begun = tmp_path / "begun"

    def begin() -> None:
        step, left = loop.fast_meta_step, [3]

        def three_times(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            return step(*args, **options)

        loop.fast_meta_step = three_times
        with pytest.raises((InterruptedError, SystemExit)), launched():
            trained(dataclasses.replace(SHARDED, sharding=sharding), examples, begun)

    def go_on() -> Weights:
        with launched():
            return trained(dataclasses.replace(SHARDED, sharding=then), examples, begun)

    in_processes(count, begin, init=False)
    state = torch.load(begun / "checkpoints" / "step-00000002" / "training_state.pt")["optimizer"]
    shapes = [parameter.shape for parameter in tiny_llama().parameters()]
    assert [each["exp_avg"].shape for each in state["state"].values()] == shapes
    shutil.copytree(begun, tmp_path / "alone")
    assert_close(trained(SHARDED, examples, tmp_path / "alone"), expected)
    for got in in_processes(5 - count, go_on, init=False):
        assert_close(got, expected)


def test_every_process_has_its_part_of_the_state(tiny_model: Any) -> None:
    """In buckets smaller than a weight, of a number of elements that three do not divide; and so of
    sharded weights.
    """
    torch.manual_seed(0)
    gradients = [torch.randn_like(p) for p in tiny_model().parameters()]

    def of_sharded() -> tuple[int, Weights, float]:
        model = shard(tiny_model())
        parameters: list[Any] = list(model.parameters())
        adam = ClippedAdam(parameters, clip_norm=1.0)
        for step in range(3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.grad = distribute_tensor(gradient * (step + 1), mesh, placements)
            norm = float(adam.update(0.1, step))
        held = sum(state["exp_avg"].numel() for state in adam.adam.state.values())
        return held, {key: whole(value) for key, value in model.state_dict().items()}, norm

    def work() -> list[tuple[int, Weights, float]]:
        with launched():
            model = tiny_model()
            parameters = list(model.parameters())
            adam = ClippedAdam(parameters, clip_norm=1.0, sharded=True)
            for step in range(3):
                for number, (parameter, gradient) in enumerate(
                    zip(parameters, gradients, strict=True)
                ):
                    if number % 3 == rank():  # the others have none
                        parameter.grad = gradient * (step + 1)
                norm = float(adam.update(0.1, step))
            states = adam.adam.state.values()
            held = sum(state["exp_avg"].numel() for state in states)
            return [(held, dict(model.state_dict()), norm), of_sharded()]

    model = tiny_model()
    parameters = list(model.parameters())
    adam = ClippedAdam(parameters, clip_norm=1.0)
    for step in range(3):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * (step + 1)
        expected_norm = float(adam.update(0.1, step))
    every = sum(parameter.numel() for parameter in parameters)
    rows = sum(parameter[0].numel() for parameter in parameters)  # of which one has one more
    of_processes = in_processes(3, work, init=False)
    for (held, *_), (held_of_sharded, *_) in of_processes:
        assert held < every / 3 + 100
        assert held_of_sharded <= every / 3 + rows
    for _, got, norm in (found for each in of_processes for found in each):
        assert norm == pytest.approx(expected_norm, rel=1e-12)
        assert_close(got, dict(model.state_dict()))


def test_slices_are_cut_from_pieces_of_a_weight_and_put_together_again(tiny_model: Any) -> None:
    def work() -> bool:
        model = tiny_model()
        parameters = list(model.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        shards = Shards(parameters, bucket_bytes=1000)
        for parameter in parameters:
            parameter.data.zero_()
        shards.push()
        return all(map(torch.equal, before, parameters))

    assert in_processes(3, work) == [True] * 3
