"""Training, its loss on padding, and what counts as a right answer."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from gdprompt_fast.data.words import word_tokenizer
from gdprompt_fast.errors import UserError
from gdprompt_fast.internalisation.answers import answers, scored
from gdprompt_fast.internalisation.material.numbers import NumberOptions, number_material
from gdprompt_fast.internalisation.material.subsets import OF_NUMBERS, Question
from gdprompt_fast.internalisation.meta import MetaSteps, Options, meta_batch, shuffled_answers
from gdprompt_fast.internalisation.scratch import ModelSize, new_model
from gdprompt_fast.internalisation.train import (
    CHECKPOINT_FILE,
    TrainOptions,
    add_gradient,
    new_optimizer,
    to_block,
    train,
)
from helpers.models import small_llama

TEXTS = ("a b c d", "b c", "c d a", "d")
OPTIONS = TrainOptions(epochs=3, batch_size=2, lr=1e-2, block=8)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return word_tokenizer(list("abcdexy"))


def model_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    return small_llama(len(tokenizer), num_hidden_layers=1)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def test_the_loss_has_every_token_of_the_block_or_the_text_and_its_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of(tokenizer)
    for padding, per_text in ((True, [7, 7, 7, 7]), (False, [5, 3, 4, 2])):  # <s> is not predicted
        block = to_block(TEXTS, tokenizer, 8, padding)
        assert block.counted.sum(1).tolist() == per_text
        options = replace(OPTIONS, padding_in_loss=padding)
        logits = model(input_ids=block.ids, attention_mask=block.real.long()).logits
        labels = block.ids.masked_fill(~block.counted, -100)
        theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert add_gradient(model, block, options) == pytest.approx(float(theirs.detach()))
        whole = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        add_gradient(model, block, replace(options, micro_batch=3))
        parts = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.allclose(whole, parts, atol=1e-7)
        model.zero_grad()


def test_a_text_longer_than_the_block_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        UserError, match="block: expected at least the 5 tokens of 'a b c d', got 4"
    ):
        to_block(TEXTS, tokenizer, 4, True)


def test_the_optimizer_is_that_of_the_trainer(tokenizer: PreTrainedTokenizerBase) -> None:
    (group,) = new_optimizer(model_of(tokenizer), 5e-5).param_groups
    assert group["lr"] == 5e-5 and not group["scale_parameter"] and not group["relative_step"]
    assert not group["warmup_init"] and group["weight_decay"] == 0 and group["beta1"] is None


def test_training_learns_and_goes_on_from_a_checkpoint_to_the_same_weights(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    block, options = to_block(TEXTS, tokenizer, 8, True), replace(OPTIONS, checkpoint_epochs=1)
    whole = model_of(tokenizer)
    seen: list[int] = []
    losses = train(whole, block, options, 1, watch=seen.append)
    assert losses[-1] < losses[0] and seen == [0, 1, 2, 3]

    def stop(epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model_of(tokenizer), block, options, 1, tmp_path, watch=stop)
    assert (tmp_path / CHECKPOINT_FILE).is_file()
    again = model_of(tokenizer)
    assert train(again, block, options, 1, tmp_path) == losses
    assert torch.equal(weights(again), weights(whole))
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_bf16_ends_with_the_forward_and_leaves_fp32_weights(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    block, model = to_block(TEXTS, tokenizer, 8, True), model_of(tokenizer)
    before = weights(model)

    def held(step: int) -> None:
        assert not torch.is_autocast_enabled("cpu")

    train(model, block, replace(OPTIONS, bf16=True, epochs=1), 0, add_more=held)
    assert weights(model).dtype == torch.float32 and not torch.equal(before, weights(model))


def test_a_loss_that_is_not_finite_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    model = model_of(tokenizer)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train(model, to_block(TEXTS, tokenizer, 8, True), OPTIONS, 0)


def test_answers_do_not_depend_on_what_they_are_padded_with_and_match_as_squad_s(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of(tokenizer)
    prompts = ["a b c", "d", "c d"]
    together = answers(model, tokenizer, prompts, 3, batch_size=3)
    assert together == [answers(model, tokenizer, [each], 3, 1)[0] for each in prompts]
    said = together[0]
    tests = {
        "right": (Question("a b c", (f"The {said.upper()}!",)), Question("d", ("nothing",))),
        "none": (),
    }
    assert scored(model, tokenizer, tests, 3, 8) == {"right": "10"}
    assert scored(model, tokenizer, tests, 3, 8, most=1) == {"right": "1"}


def test_a_meta_batch_has_definitions_as_groups_and_answers_that_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    chosen = [("a b", [("c d", " x"), ("d", " y")]), ("b c d", [("a", " x")])]
    batch = meta_batch(chosen, tokenizer, torch.device("cpu"))
    assert batch.groups == 2 and batch.query_group.tolist() == [0, 0, 1]
    pad, x = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("x")
    assert batch.query_ids[0][batch.response_mask[0]].tolist() == [x, pad]
    assert batch.context_mask.sum(1).tolist() == [4, 5]
    asked = shuffled_answers([each for _, each in chosen], random.Random(1))
    assert [[prompt for prompt, _ in of] for of in asked] == [["c d", "d"], ["a"]]
    assert sorted(answer for of in asked for _, answer in of) == [" x", " x", " y"]


def test_the_meta_gradient_is_weighed_with_and_without_another() -> None:
    lists = NumberOptions(variables=20, numbers=6, length=2, trained=2, tested=1)
    material = number_material(lists, OF_NUMBERS, 0, 0)
    model, tokenizer = new_model(ModelSize(16, 1, 2), lists, [material], 0)

    def added(weight: float, before: float | None, inner_lr: float = 0.1) -> torch.Tensor:
        for each in model.parameters():
            each.grad = None if before is None else torch.full_like(each, before)
        options = Options(weight=weight, contexts=2, queries=1)
        MetaSteps(model, tokenizer, material, options, inner_lr, 0).add_gradient(1)
        return torch.cat([each.grad.flatten() for each in model.parameters()])

    once = added(1.0, None)
    assert once.norm() > 0 and torch.allclose(added(0.5, None), once / 2)
    assert torch.allclose(added(0.5, 3.0), once / 2 + 3)
    no_step = added(1.0, None, inner_lr=0.0)
    assert no_step.norm() > 0 and not torch.allclose(no_step, once)


def test_bad_options_are_named() -> None:
    for name, value in (("epochs", 0), ("lr", -1.0), ("block", 1), ("micro_batch", -1)):
        with pytest.raises(UserError, match=name):
            replace(OPTIONS, **{name: value})
