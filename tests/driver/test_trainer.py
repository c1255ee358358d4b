"""MetaTrainer: its steps are the driver's, and what is the Trainer's means what it means there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback

from gdprompt_fast import fast_meta_step
from gdprompt_fast.data import ShuffledSampler, tokenise_triples
from gdprompt_fast.errors import UserError
from gdprompt_fast.models.intact import has_own_forward
from gdprompt_fast.trainer import MetaCollator, MetaTrainer
from gdprompt_fast.training.optim import warmup_then_cosine
from helpers.trainer import ROWS, arguments, same, trainer_on, weights
from helpers.training import GOLD, KL, ROOMY, TOKENIZER, run, tiny_llama


class InOrderOfTheDriver(MetaTrainer):
    """Draws what ``ShuffledSampler`` draws, 2 rows a step."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        drawn = ShuffledSampler(len(self.train_dataset), seed=0).take(2 * self.args.max_steps)
        loader = DataLoader(
            self.train_dataset, batch_size=2, sampler=drawn, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


@pytest.mark.parametrize("objective", ["kl", "gold"])
def test_20_steps_give_the_parameters_of_20_steps_of_the_driver(
    objective: str, tmp_path: Path
) -> None:
    options = dataclasses.replace(KL if objective == "kl" else GOLD, steps=20)
    examples = tokenise_triples(ROWS, TOKENIZER, ROOMY).examples
    driver = run(options, examples, tmp_path / "driver")

    model = tiny_llama()
    adam = torch.optim.Adam(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: warmup_then_cosine(step, 20, options.warmup_steps, options.outer_lr)
    )
    args = arguments(
        tmp_path / "trainer",
        max_steps=20,
        objective=objective,
        answer_tokens=3,
        teacher_batch_size=4,
    )
    teacher = tiny_llama(seed=1) if objective == "kl" else None
    InOrderOfTheDriver(
        model,
        args,
        ROWS,
        processing_class=TOKENIZER,
        teacher=teacher,
        optimizers=(adam, schedule),
    ).train()
    assert same(weights(model), driver)


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    """Ragged: 7 rows in batches of 3, 3 and 1, of 7 and of 1 each."""

    def trained(size: int, accumulated: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        model = tiny_llama().double()
        trainer = trainer_on(
            tmp_path,
            model,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            objective="kl",
            answer_tokens=3,
            optim="sgd",
        )
        trainer.train()
        return weights(model), [log["loss"] for log in trainer.state.log_history if "loss" in log]

    whole, losses = trained(7, 1)
    for size, accumulated in ((3, 3), (1, 7), (2, 4)):
        parts, their_losses = trained(size, accumulated)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12)
        assert their_losses == pytest.approx(losses, rel=1e-6)  # logged in float32


def batch_of(trainer: MetaTrainer) -> dict[str, Any]:
    return next(iter(trainer.get_eval_dataloader()))


@pytest.mark.parametrize(
    "options",
    [
        dict(objective="kl", answer_tokens=3),
        dict(objective="gold", outer_reduction="mean", inner_steps=2),
        dict(objective="gold", lm_weight=0.0, inner_params="linear"),
    ],
)
def test_the_loss_of_an_evaluation_is_that_of_the_step(
    options: dict[str, Any], tmp_path: Path
) -> None:
    trainer = trainer_on(tmp_path, tiny_llama().double(), **options)
    inputs = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    targets = None
    if options["objective"] == "kl":
        targets = trainer._prepared.targets(inputs["gdprompt_row"])
    out = fast_meta_step(
        trainer.model, inputs["batch"], teacher=targets, config=trainer.args.step_config
    )
    assert not loss.requires_grad
    torch.testing.assert_close(loss, out.outer_loss, rtol=1e-9, atol=0)
    trainer.model.zero_grad()
    logged = trainer.evaluate()["eval_loss"]
    assert logged == pytest.approx(float(out.outer_loss), rel=1e-6)  # 7 rows are one batch
    trainer.args.per_device_eval_batch_size = 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged, rel=1e-6)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_metrics_see_the_logits_and_labels_of_the_responses(tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": right[prediction.label_ids[:, 1:] != -100].mean()}

    trainer = trainer_on(tmp_path, compute_metrics=metrics, per_device_eval_batch_size=3)
    result = trainer.evaluate()
    assert 0 <= result["eval_accuracy"] <= 1
    predictions, labels = seen[0].predictions, seen[0].label_ids
    assert predictions.shape == (*labels.shape, len(TOKENIZER)) and len(labels) == len(ROWS)
    answers = [[int(token) for token in row if token != -100] for row in labels]
    assert answers == [list(example.response) for example in examples()]
    assert trainer.predict(ROWS).predictions.shape == predictions.shape


def examples() -> list[Any]:
    return tokenise_triples(ROWS, TOKENIZER, ROOMY).examples


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_with_the_parameters_of_one_that_was_not(
    lora: bool, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    options: dict[str, Any] = dict(
        objective="kl",
        answer_tokens=3,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        gradient_accumulation_steps=2,
    )
    whole = trainer_on(tmp_path / "whole", peft_config=config, **options)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 4

    trainer_on(tmp_path / "cut", peft_config=config, callbacks=[Stop()], **options).train()
    resumed = trainer_on(tmp_path / "cut", peft_config=config, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert same(weights(whole.model), weights(resumed.model))
    files = {path.name for path in (tmp_path / "cut" / "checkpoint-6").iterdir()}
    assert ("adapter_model.safetensors" if lora else "model.safetensors") in files
    frozen = [p.grad is None for n, p in resumed.model.named_parameters() if not p.requires_grad]
    assert len(frozen) > 0 if lora else not frozen


def test_another_teacher_is_not_taken_for_the_one_that_answered(tmp_path: Path) -> None:
    trainer_on(tmp_path, objective="kl", answer_tokens=3)
    with pytest.raises(UserError, match=r"teacher_cache.* was made with another weights"):
        trainer_on(tmp_path, tiny_llama(seed=2), objective="kl", answer_tokens=3)
    trainer_on(tmp_path, tiny_llama(seed=2), objective="kl", answer_tokens=3, teacher=tiny_llama())


def test_dropout_stays_off_while_training(tmp_path: Path) -> None:
    modes: list[bool] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            modes.append(model.training)
            model.train()

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    trainer = trainer_on(tmp_path, peft_config=config, callbacks=[Look()])
    trainer.train()
    assert modes == [False] * 3


def test_bfloat16_is_near_float32_and_trains_float32_weights(tmp_path: Path) -> None:
    def losses(**changes: Any) -> list[float]:
        trainer = trainer_on(
            tmp_path, inner_lr=0.05, eval_strategy="steps", eval_steps=1, **changes
        )
        trainer.train()
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        around = "forward" in vars(trainer.model)  # what accelerate has put there, if anything
        with trainer._computing():
            assert has_own_forward(trainer.model)
        assert around == ("forward" in vars(trainer.model)) == changes.get("bf16", False)
        return [
            v for log in trainer.state.log_history for k, v in log.items() if k.endswith("loss")
        ]

    exact, rounded = losses(), losses(bf16=True)
    assert rounded == pytest.approx(exact, rel=0.03)
    assert all(a != b for a, b in zip(exact, rounded, strict=True))


def test_a_step_that_is_not_finite_updates_nothing(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path, inner_lr=1e30)
    before = weights(trainer.model)
    with pytest.raises(FloatingPointError, match=r"^meta-gradient: its norm is"):
        trainer.train()
    assert same(weights(trainer.model), before)


def test_another_collator_gets_the_prepared_rows(tmp_path: Path) -> None:
    seen: list[Any] = []

    def collate(rows: list[Any]) -> dict[str, Any]:
        seen.extend(rows)
        return MetaCollator()(rows)

    trainer_on(tmp_path, data_collator=collate, objective="kl", answer_tokens=3).train()
    assert len(seen) >= 6 and all(isinstance(row["context"], list) for row in seen)


def test_callbacks_reports_and_the_best_checkpoint_are_the_trainers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_on(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        report_to="tensorboard",
        max_steps=20,
        learning_rate=0.3,  # so large that it soon gets worse
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    trainer.train()
    assert trainer.state.global_step < 20
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    scalars = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/inner_loss", "train/lm_loss", "eval/loss"} <= set(scalars)


def test_the_losses_logged_are_those_of_the_steps(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(log["query_loss"] + 0.1 * log["lm_loss"], rel=1e-5)
        assert log["inner_loss"] == pytest.approx(log["lm_loss"], rel=1e-5)  # the contexts' NLL


def test_token_ids_and_texts_are_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {name: list(getattr(each, name)) for name in ("context", "query", "prompt", "response")}
        for each in examples()
    ]
    of_ids, of_texts = MetaCollator()(rows), MetaCollator(TOKENIZER)(list(ROWS))
    for name in ("context_ids", "query_ids", "response_mask", "context_mask", "context_loss_mask"):
        torch.testing.assert_close(getattr(of_ids["batch"], name), getattr(of_texts["batch"], name))
    options: dict[str, Any] = dict(objective="kl", answer_tokens=3)
    a = trainer_on(tmp_path / "a", rows=rows, **options)
    b = trainer_on(tmp_path / "b", rows=ROWS, **options)
    assert list(a.train_dataset) == list(b.train_dataset)


def test_streams_train_on_gold_responses_and_have_no_teacher(tmp_path: Path) -> None:
    stream = ROWS.to_iterable_dataset()
    model, other = tiny_llama(), tiny_llama()
    args = arguments(tmp_path, max_steps=2)
    MetaTrainer(model, args, stream, processing_class=TOKENIZER).train()

    class Sequential(MetaTrainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return self.accelerator.prepare(
                DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)
            )

    Sequential(other, args, ROWS, processing_class=TOKENIZER).train()
    assert same(weights(model), weights(other))
    with pytest.raises(UserError, match=r"train_dataset: .* got a stream"):
        MetaTrainer(model, arguments(tmp_path, objective="kl"), stream, processing_class=TOKENIZER)


def test_a_part_of_a_set_is_evaluated_and_another_trainers_set_is_answered_anew(
    tmp_path: Path,
) -> None:
    trainer = trainer_on(tmp_path / "a", objective="kl", answer_tokens=3)
    one = trainer.eval_dataset.select([5])
    targets = trainer._prepared.targets(torch.tensor(one["gdprompt_row"][:]))
    assert targets.tokens == len(one[0]["response"])
    assert trainer.evaluate(one)["eval_loss"] > 0
    other: dict[str, Any] = dict(objective="kl", answer_tokens=2, teacher=tiny_llama(seed=1))
    again = trainer_on(tmp_path / "b", rows=trainer.train_dataset, **other)
    assert list(again.train_dataset) == list(trainer_on(tmp_path / "c", **other).train_dataset)


def test_rows_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    long = {**ROWS[0], "context": " ".join(["red"] * 300)}
    trainer = trainer_on(tmp_path, rows=[*ROWS, long])
    assert len(trainer.train_dataset) == len(ROWS)
    with pytest.raises(UserError, match="expected at least one usable record"):
        trainer_on(tmp_path, rows=[long])


def test_workers_and_batches_by_length(tmp_path: Path) -> None:
    args = arguments(tmp_path, dataloader_num_workers=1, max_steps=2)
    by_length = "train_sampling_strategy" in {each.name for each in dataclasses.fields(args)}
    if by_length:
        args.train_sampling_strategy = "group_by_length"
    else:
        args.group_by_length = True
    trainer = MetaTrainer(tiny_llama(), args, ROWS, processing_class=TOKENIZER)
    assert trainer.train().global_step == 2
