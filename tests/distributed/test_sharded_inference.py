"""Evaluation and inner steps of a model that FSDP2 has sharded: as of the whole one, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gdprompt_fast import check_exactness, inner_step
from gdprompt_fast.data import Example, tokenise_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.distributed import launched
from gdprompt_fast.distributed.local_shards import local_of
from gdprompt_fast.errors import UserError
from gdprompt_fast.evaluation import InnerStep, evaluate
from helpers.processes import in_processes
from helpers.sharding import shard
from helpers.training import ROOMY, TOKENIZER, tiny_llama

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return tokenise_triples(make_people_data(1, 7, seed=0).test, TOKENIZER, ROOMY).examples


def scores(model: Any, examples: list[Example], lr: float) -> dict[str, Any]:
    found = evaluate(model, TOKENIZER, examples, InnerStep(lr, steps=3), 2, answer_tokens=3)
    return {name: vars(of) for name, of in found.items()}


@pytest.mark.parametrize("count", [2, 3])
def test_an_evaluation_is_that_of_the_whole_model(count: int, examples: list[Example]) -> None:
    """Of four batches, by processes of which some have one less; an error is everybody's."""
    expected = scores(tiny_llama().eval(), examples, 0.1)

    def work() -> tuple[Any, str]:
        with launched():
            model = shard(tiny_llama().eval())
            found = scores(model, examples, 0.1)
            with pytest.raises(FloatingPointError) as caught:
                scores(model, examples, 1e30)
            with pytest.raises(UserError, match="model: expected weights that are not sharded"):
                evaluate(model, TOKENIZER, examples, InnerStep(0.1), 2, one_after_another=True)
            return found, str(caught.value)

    for found, error in in_processes(count, work, init=False):
        assert "inner loss" in error
        for setting, of in expected.items():
            for name, value in of.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    torch.testing.assert_close(found[setting][name], value, rtol=1e-4, atol=1e-5)
                elif isinstance(value, torch.Tensor):
                    assert torch.equal(found[setting][name], value), (setting, name)
                else:
                    assert found[setting][name] == value, (setting, name)


def test_an_inner_step_is_that_of_the_whole_model_and_its_state_is_refused(
    tiny_model: Build, lora_model: Build, make_batch: Build, tmp_path: Path
) -> None:
    """In each process on contexts of its own; exact to 1e-9."""
    batch = make_batch("one-each")
    builds = {
        "tied": tiny_model,
        "positions": lambda: tiny_model("gpt2-conv1d-positions"),
        "lora": lora_model,
    }

    def logits(model: Any, number: int, inner: str) -> torch.Tensor:
        own = slice(number, number + 1)
        update = inner_step(
            model, batch.context_ids[own], batch.context_mask[own], inner_lr=0.1, inner_steps=2,
            inner_params=inner,
        )  # fmt: skip
        with update.applied_to(model, groups=torch.tensor([0, 0])):
            return model(input_ids=batch.query_ids[:2]).logits

    def work() -> list[torch.Tensor]:
        got = [
            logits(shard(build()), dist.get_rank(), "lora" if name == "lora" else "full")
            for name, build in builds.items()
        ]
        check_refusals(shard(tiny_model()), batch, tmp_path)
        return got

    for number, got in enumerate(in_processes(2, work)):
        for (name, build), mine in zip(builds.items(), got, strict=True):
            inner = "lora" if name == "lora" else "full"
            torch.testing.assert_close(mine, logits(build(), number, inner), rtol=1e-9, atol=1e-9)


def check_refusals(model: Any, batch: Any, folder: Path) -> None:
    """What would need the whole model is an error that names it; also of weights written to."""
    contexts = batch.context_ids[:1], batch.context_mask[:1]
    update = inner_step(model, *contexts, inner_lr=0.1)
    one = torch.zeros(1, dtype=torch.long)
    sharded = "model: expected weights that are not sharded"
    with update.applied_to(model, groups=one):
        for ask in (model.state_dict, lambda: model.save_pretrained(folder)):
            with pytest.raises(UserError, match=sharded):
                ask()
    for ask in (update.to_state_dict, lambda: update.save_pretrained(folder / "kept")):
        with pytest.raises(UserError, match=sharded):
            ask()
    with pytest.raises(UserError, match=sharded):
        check_exactness(model, batch, objective="gold")
    weight: Any = next(model.parameters())
    for write in (lambda: weight.mul_(1.5), lambda: local_of(weight).mul_(1.5)):
        update = inner_step(model, *contexts, inner_lr=0.1)
        with update.applied_to(model, groups=one), torch.no_grad():
            model(input_ids=batch.query_ids[:1])
        with torch.no_grad():
            write()
        with (
            pytest.raises(UserError, match="take the inner step again"),
            update.applied_to(model, groups=one),
        ):
            pass
    assert not list(folder.iterdir())
