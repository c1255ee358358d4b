"""``MetaTrainer``: transformers' Trainer, with the meta step as its training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from ..batch import MetaBatch
from ..distributed.group import watched
from ..distributed.reduce import reduce_gradients
from ..errors import UserError
from ..meta.step import fast_meta_step
from ..meta.targets import TeacherTargets
from ..models.architecture import check_model
from ..models.walk import parameters_of
from ..training.optim import check_norm
from .arguments import MetaTrainingArguments
from .card import add_section
from .collate import BATCH, NUMBER, MetaCollator
from .loss import outer_loss
from .means import StepMeans
from .refused import check_accelerator, check_devices, check_others, check_trained
from .rows import Prepared


class MetaTrainer(Trainer):
    """Meta-trains a causal LM, as ``transformers.Trainer`` fine-tunes one.

    A training step adds the exact meta-gradient of :func:`gdprompt_fast.fast_meta_step` to
    ``.grad``, with the denominators of all batches that are accumulated, on all processes;
    ``evaluate`` gives the same outer loss on ``eval_dataset``. All else is the Trainer's: loops,
    optimizers, schedules, callbacks, reports, checkpoints, the hub.

    Data sets have the columns "context", "query" and "response", of texts or of token ids
    (:class:`MetaCollator`), and are tokenised here; records that cannot be used are dropped with a
    warning. With ``objective="kl"`` the teacher answers every row here, before training, into
    ``teacher_cache``, and its answers are the responses; a continued run finds them there.

    Args:
        model: as in :func:`gdprompt_fast.fast_meta_step`; it is put, and kept, in eval mode.
        args: a :class:`MetaTrainingArguments`.
        train_dataset, eval_dataset: as the Trainer's; what streams has no teacher.
        processing_class: the tokenizer, for data of texts.
        data_collator: in the place of a ``MetaCollator``; it returns what that returns.
        teacher: the frozen model of the KL objective; None: the model as it is given.
        peft_config: of the LoRA adapters that are trained, in the place of the model's weights.
        others: ``callbacks``, ``compute_metrics``, ``optimizers``,
            ``preprocess_logits_for_metrics`` and ``optimizer_cls_and_kwargs`` of the Trainer.

    Raises:
        UserError: for a model, an argument or data that cannot be trained with, and why.
    """

    args: MetaTrainingArguments
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        args: MetaTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        teacher: nn.Module | None = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        if not isinstance(args, MetaTrainingArguments):
            raise UserError(f"args: expected MetaTrainingArguments, got {type(args).__name__}")
        args.check()
        check_devices(args)
        check_others(others)
        if teacher is not None and args.objective == "gold":
            raise UserError('teacher: expected None with objective="gold", got a model')
        collator = MetaCollator(processing_class, args.chat_template)
        check_model(model.eval().to(args.device))
        if args.objective == "kl":
            teacher = model if teacher is None else teacher.eval().to(args.device)
        self._prepared = Prepared(args, collator, model, teacher)
        with watched():
            train_dataset = self._prepared.data("train", train_dataset)
            eval_dataset = self._prepared.data("eval", eval_dataset)
        self._prepared.end()
        if peft_config is not None:
            model = _with_adapters(model, peft_config, args.seed)
        check_trained(model, args.inner_params)
        self._means = StepMeans(lm=args.lm_weight > 0)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )
        check_accelerator(self.accelerator)

    @watched()
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Of several processes one that fails or is lost ends the others within a
        minute, and says why; so it is in ``evaluate`` and ``predict``.
        """
        return super().train(*args, **kwargs)

    @watched()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(*args, **kwargs)

    @watched()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return super().predict(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of an optimizer step, and how many queries and contexts they have on all
        processes together, [2].
        """
        samples = list(islice(epoch_iterator, num_batches))
        real = [inputs[BATCH].layout.real for inputs in samples]
        own = [sum(each.queries for each in real), sum(each.contexts for each in real)]
        return samples, self._over_processes(torch.tensor(own)).cpu()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Adds the meta-gradient of a batch, its share of the whole step's, to ``.grad``.

        Args:
            num_items_in_batch: the step's queries and contexts, of :meth:`get_batch_samples`; None:
                the batch is all of the step.

        Returns:
            The batch's share of the outer loss, on all processes together, detached.

        Raises:
            FloatingPointError: if an inner loss, the teacher's predictions or, of the whole step,
                the meta-gradient are not finite; the optimizer has not stepped on them.
        """
        schedule_free = getattr(self.optimizer, "train", None)
        if callable(schedule_free):
            schedule_free()
        batch, teacher = self._step_data(inputs)
        real = batch.layout.real
        whole = (real.queries, real.contexts)
        if num_items_in_batch is not None:
            whole = tuple(num_items_in_batch.tolist())
        with self._computing():
            out = fast_meta_step(
                self.model,
                batch,
                teacher=teacher,
                query_count=whole[0],
                lm_count=whole[1],
                config=self.args.step_config,
            )
        out.check()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        last = self.accelerator.sync_gradients
        if last:
            self._sum_gradients()
            grads = [p.grad for _, p in parameters_of(self.model) if p.grad is not None]
            check_norm(float(get_total_norm(grads)), self.state.global_step)
        losses = self._over_processes(StepMeans.of(out, real.contexts / whole[1]))
        self._means.add(losses, ends_step=last)
        return losses[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; beside the training loss also the inner loss, and the outer loss's
        two terms, if it has two.
        """
        if "loss" in logs:
            logs |= self._means.read()
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The outer loss of a batch, a mean over its own queries, without a graph; and, with
        ``return_outputs``, ``{"logits": [Q, Tq, V]}`` of the query rows at θ'.
        """
        batch, teacher = self._step_data(inputs)
        with self._computing():
            loss, logits = outer_loss(self.model, batch, teacher, self.args.step_config)
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The outer loss of a batch, and, unless ``prediction_loss_only``, the logits of the query
        rows at θ' and their labels [Q, Tq], −100 outside the responses.
        """
        loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        batch, _ = self._step_data(inputs)
        return loss, outputs["logits"], batch.query_ids.masked_fill(~batch.response_mask, -100)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        if not isinstance(eval_dataset, str):
            eval_dataset = self._prepared.data("eval", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        return super().get_test_dataloader(self._prepared.data("test", test_dataset))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's card, with what was meta-trained and how it is used."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_section(self.args)

    def _step_data(self, inputs: dict[str, Any]) -> tuple[MetaBatch, TeacherTargets | None]:
        inputs = self._prepare_inputs(inputs)
        batch = inputs[BATCH].to(self.args.device)
        kl = self.args.objective == "kl"
        return batch, self._prepared.targets(inputs[NUMBER]) if kl else None

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Inside, the model is in eval mode, where dropout is off, with its own forward instead of
        accelerate's around it, and under the autocast that this one would open: in a step only, as
        what autocast has cast is older than the weights after an update.
        """
        model, device = self.model.eval(), self.args.device.type
        own = getattr(vars(model).get("_original_forward"), "__func__", None)
        around = vars(model).pop("forward") if own is type(model).forward else None
        precision = self.accelerator.mixed_precision
        try:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                yield
        finally:
            if around is not None:
                model.forward = around

    def _over_processes(self, numbers: Tensor) -> Tensor:
        """Their sum over all processes."""
        if self.accelerator.num_processes == 1:
            return numbers
        return self.accelerator.reduce(numbers.to(self.args.device), "sum")

    def _sum_gradients(self) -> None:
        """Leaves in ``.grad`` the sum over all processes, whose shares have one denominator."""
        if self.accelerator.num_processes == 1:
            return
        reduce_gradients(parameter for _, parameter in parameters_of(self.model))


def _with_adapters(model: nn.Module, peft_config: Any, seed: int) -> nn.Module:
    """The model with adapters to train; the same ones for the same seed."""
    if hasattr(model, "peft_config"):
        raise UserError("peft_config: expected None with a model that has adapters already")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("peft_config: expected PEFT to be installed (pip install peft)") from None
    if not isinstance(peft_config, LoraConfig):
        raise UserError(f"peft_config: expected a LoraConfig, got {type(peft_config).__name__}")
    set_seed(seed)
    return get_peft_model(model, peft_config).eval()
