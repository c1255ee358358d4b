"""What ``gdprompt plan --gpus`` says against what gloo's processes send and hold."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

from benchmarks.report import scaling
from gdprompt_fast import fast_meta_step
from gdprompt_fast.cli.main import main
from gdprompt_fast.distributed import launched, reduce_gradients
from gdprompt_fast.distributed.local_shards import local_of
from gdprompt_fast.distributed.sharded import StandIn
from gdprompt_fast.errors import UserError
from gdprompt_fast.meta.share import share_of
from gdprompt_fast.plan import PlannedStep, plan_many
from gdprompt_fast.plan.many import communication, flops, sizes_of
from gdprompt_fast.training.optim import ClippedAdam
from helpers.models import random_batch, wide_llama
from helpers.processes import in_processes
from helpers.sharding import own_part, peak_of, shard
from helpers.traffic import bytes_sent

VOCABULARY, LAYERS = 128, 3
PLANNED = PlannedStep(
    batch=6, context=6, query=4, response=2, objective="gold", dtype="fp32", recompute="block"
)
CONFIGS = Path(__file__).parents[1] / "plan" / "configs"
# gloo scatters a sum by an all-reduce, twice around the ring.
OF_GLOO = {"none": 1, "optimizer": 2, "full": 2}


def sent_by(work: Callable[[], Any]) -> int:
    dist.barrier()
    time.sleep(0.2)
    before = bytes_sent()
    work()
    time.sleep(0.2)  # until what was sent has been acknowledged
    return bytes_sent() - before


def step(model: Any, part: dict[str, Any], **more: Any) -> None:
    options: dict[str, Any] = dict(objective="gold", recompute="block", verify="never")
    fast_meta_step(model, **part, **options, **more)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_send_what_is_planned(count: int) -> None:
    batch = random_batch(6, 6, 4, 2, VOCABULARY)

    def work() -> dict[str, int]:
        sent = {}
        model = wide_llama(96, VOCABULARY, LAYERS)
        step(model, share_of(batch, dist.get_rank(), count))
        sent["none"] = sent_by(lambda: reduce_gradients(model.parameters()))
        with launched():
            adam = ClippedAdam(list(model.parameters()), 1.0, sharded=True)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            sent["optimizer"] = sent_by(lambda: adam.update(0.1, 0))
        sharded, part = shard(wide_llama(96, VOCABULARY, LAYERS)), own_part(batch)
        step(sharded, part)
        sent["full"] = sent_by(lambda: step(sharded, part))
        return sent

    sizes = sizes_of(wide_llama(96, VOCABULARY, LAYERS).config, PLANNED)
    for of_process in in_processes(count, work):
        for sharding, sent in of_process.items():
            planned = communication(sizes, PLANNED, count, sharding)
            scattered = planned.gradients * OF_GLOO[sharding]
            assert sent == pytest.approx(planned.weights + scattered, rel=0.03), sharding


@pytest.mark.parametrize("count", [2, 3])
def test_of_a_frozen_base_only_adapters_are_sent(count: int) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an optional dependency")
    batch, rank = random_batch(6, 6, 4, 2, VOCABULARY), 4
    planned = PlannedStep(**{**vars(PLANNED), "outer": "lora", "lora_rank": rank})
    model = wide_llama(96, VOCABULARY, LAYERS)
    sent = communication(sizes_of(model.config, planned), planned, count, "none")
    config = peft.LoraConfig(r=rank, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sent.bytes == 8 * adapters * (count - 1) / count
    assert 5 * adapters < sum(p.numel() for p in model.parameters())

    def work() -> int:
        step(adapted, share_of(batch, dist.get_rank(), count))
        assert all((p.grad is not None) == p.requires_grad for p in adapted.parameters())
        return sent_by(lambda: reduce_gradients(adapted.parameters()))

    for of_process in in_processes(count, work):
        assert of_process == pytest.approx(sent.bytes, rel=0.05)


OPTIONS: list[tuple[dict[str, Any], bool]] = [
    (dict(), False),
    (dict(inner_steps=2), True),
    (dict(micro_batch=2), False),
    (dict(inner="linear"), True),
]


def test_weights_are_gathered_and_gradients_summed_as_often_as_planned() -> None:
    """To the byte; of a batch of which each of two processes has three examples."""
    batch = random_batch(6, 6, 4, 2, VOCABULARY)

    def build(tied: bool) -> Any:
        return wide_llama(96, VOCABULARY, LAYERS, tied)

    def work() -> list[list[int]]:
        moved = [0, 0]
        fill, add = StandIn.fill, StandIn.add_to_shard

        def filled(each: Any) -> None:
            moved[0] += each.numel() * each.element_size()
            fill(each)

        def added(each: Any, gradient: torch.Tensor) -> None:
            moved[1] += gradient.numel() * gradient.element_size()
            add(each, gradient)

        StandIn.fill, StandIn.add_to_shard = filled, added  # type: ignore[method-assign]
        found = []
        for options, tied in OPTIONS:
            names = dict(micro_batch="micro_groups", inner="inner_params")
            more: dict[str, Any] = {names.get(k, k): v for k, v in options.items()}
            moved[:] = 0, 0
            sharded, part = shard(build(tied)), own_part(batch)
            step(sharded, part, **more)
            found.append(list(moved))
        return found

    for of_process in in_processes(2, work):
        for (options, tied), moved in zip(OPTIONS, of_process, strict=True):
            planned = PlannedStep(**{**vars(PLANNED), **options})
            sent = communication(sizes_of(build(tied).config, planned), planned, 2, "full")
            assert moved == [2 * sent.weights, 2 * sent.gradients], (options, tied)


def test_a_process_holds_what_is_planned() -> None:
    """The peak of a step, in bytes: shards, what is gathered, gradients, factors, activations."""
    config = wide_llama(128, 2048, 4).config
    planned = PlannedStep(**{**vars(PLANNED), "batch": 4, "optimizer": "none"})
    batch = random_batch(4, 6, 4, 2, 2048)

    def work() -> int:
        model, part = shard(wide_llama(128, 2048, 4)), own_part(batch)
        peak = peak_of(model, lambda: step(model, part))
        return peak + sum(2 * 4 * local_of(each).numel() for each in model.parameters())

    expected = plan_many(config, planned, 2, "full").peak_bytes
    for held in in_processes(2, work):
        assert held == pytest.approx(expected, rel=0.05)


def test_the_command_tells_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide_llama(64, VOCABULARY, LAYERS).config.save_pretrained(tmp_path)
    file = tmp_path / "plan.json"
    sizes = ["--batch", "8", "--context", "8", "--query", "4", "--response", "2"]
    arguments = ["plan", "--model", str(tmp_path), *sizes, "--json", str(file)]
    assert main([*arguments, "--gpus", "4", "--sharding", "optimizer"]) == 0
    assert "4 GPUs, sharding optimizer: at most 2 examples on each" in capsys.readouterr().out
    written = json.loads(file.read_text())
    weights = written["parameters"] * 4
    assert written["sent_bytes"] == {"weights": 0.75 * weights, "gradients": 0.75 * weights}
    assert written["optimizer_step"]["optimizer"] < 0.3 * 2 * 4 * written["parameters"] * 2


def test_sharded_weights_are_planned_with_recomputation_alone() -> None:
    config = wide_llama(64, VOCABULARY, LAYERS).config
    with pytest.raises(UserError, match='recompute: expected "block" with sharding "full"'):
        plan_many(config, PlannedStep(), 2, "full")


def test_the_table_of_the_page_is_the_plans() -> None:
    """All that is sent and computed, and the memory of one row, whose prediction takes seconds."""
    text = scaling.PAGE.read_text(encoding="utf-8")
    table = text.split(scaling.BEGIN)[1].split(scaling.END)[0].strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) == 3 * len(scaling.MODELS) * len(scaling.BANDWIDTHS)
    configs = {m: AutoConfig.from_pretrained(CONFIGS / f) for m, f in scaling.MODELS.items()}
    sizes = {m: sizes_of(config, scaling.planned(8, "full")) for m, config in configs.items()}
    for model, gpus, sharding, _, *rest in rows:
        planned, number = scaling.planned(int(gpus), sharding), int(gpus)
        sent = communication(sizes[model], planned, number, sharding)
        work = flops(sizes[model], planned, scaling.EXAMPLES)
        assert rest == scaling.times(number, sent, work)
    model, gpus, sharding = rows[2][:3]
    many = plan_many(configs[model], scaling.planned(int(gpus), sharding), int(gpus), sharding)
    assert scaling.row(model, many) == rows[2]
