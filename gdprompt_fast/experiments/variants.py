"""The models that experiments compare: base models, and what meta-training made of them."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.stage import Result, Stage
from ..evaluation import InnerStep
from ..loading import add_lora, load_model
from ..training.checkpoint import CHECKPOINTS, MODEL_FOLDER, load_weights
from ..training.loop import meta_train
from ..training.metrics import METRICS_FILE, read_metrics
from ..training.options import TrainOptions
from .context import ExperimentContext
from .tasks import (
    data_stage,
    examples,
    fine_tune_stage,
    prepare_stage,
    running_text,
    teacher_of,
    teacher_stage,
)


@dataclass(frozen=True)
class Variant:
    """A model of an experiment: a task's base model and how it was trained from there.

    Attributes:
        task: whose base model it began as, and whose examples it was meta-trained on.
        objective: ``kl`` ("LC", learning from conditioning), ``gold`` ("LG", learning from gold
            responses), or ``none``: not meta-trained.
        lora_rank: of adapters outside; 0: all weights are trained.
        inner_params: what the inner step moves: ``full`` or ``lora``.
        contexts: as many contexts share a θ' in training.
        joint: a task whose ordinary fine-tuning loss is added in every outer step; "": none.
        then: a task it was fine-tuned on in the ordinary way afterwards; "": none.
        ordinary_examples: the number of training examples of ``joint`` or ``then`` to go by.
        prompt_weight: of the responses' NLL after context and query; None: as the preset says.
        text_weight: λ of L_LM on the running text of ``[text]``; None: as the preset says, which
            has no such text.
    """

    task: str
    objective: str = "none"
    lora_rank: int = 0
    inner_params: str = "full"
    contexts: int = 1
    joint: str = ""
    then: str = ""
    ordinary_examples: int = 0
    prompt_weight: float | None = None
    text_weight: float | None = None

    @property
    def name(self) -> str:
        """A name that no other variant of a preset has."""
        parts = [self.task, "base" if self.objective == "none" else self.objective]
        if self.lora_rank:
            parts.append(f"lora{self.lora_rank}")
        if self.inner_params != "full":
            parts.append(f"{self.inner_params}-inside")
        if self.contexts > 1:
            parts.append(f"{self.contexts}-contexts")
        if self.joint:
            parts.append(f"with-{self.joint}")
        if self.then:
            parts.append(f"then-{self.then}")
        for weight, of in ((self.prompt_weight, "prompt"), (self.text_weight, "text")):
            if weight is not None:
                parts.append(f"{of}-weight-{weight:g}")
        return "-".join(parts)

    def options(self, ctx: ExperimentContext) -> TrainOptions:
        """How it is meta-trained, or would be: a base model's inner step is the same."""
        kind = "lora-inner" if self.inner_params == "lora" else "lora" if self.lora_rank else "full"
        own: dict[str, Any] = {"inner_params": self.inner_params, "seed": ctx.seed}
        own["objective"] = "gold" if self.objective == "none" else self.objective
        weights = {"prompt_weight": self.prompt_weight, "lm_weight": self.text_weight}
        own |= {name: weight for name, weight in weights.items() if weight is not None}
        return ctx.preset.train_options(self.task, kind, self.contexts, **own)

    def inner(self, ctx: ExperimentContext) -> InnerStep:
        """The inner step that it was meta-trained with, or would be."""
        return self.options(ctx).inner


def train_stage(ctx: ExperimentContext, variant: Variant) -> Stage:
    """The last stage of a variant's training; its model, or adapters, are in ``model``."""
    if variant.then:
        before = train_stage(ctx, replace(variant, then="", ordinary_examples=0))
        start, wanted = before.folder / MODEL_FOLDER, {"start": before.key}
        return fine_tune_stage(
            ctx, f"arm/{variant.name}", start, variant.then, variant.ordinary_examples, wanted
        )
    return (
        prepare_stage(ctx, variant.task)
        if variant.objective == "none"
        else meta_train_stage(ctx, variant)
    )


def meta_train_stage(ctx: ExperimentContext, variant: Variant) -> Stage:
    """The stage of meta-training, whose checkpoints are in its folder."""
    options, base = variant.options(ctx), prepare_stage(ctx, variant.task)
    asked = teacher_stage(ctx, variant.task, options) if variant.objective == "kl" else None
    wanted = {
        "base": base.key,
        "teacher": None if asked is None else asked.key,
        "joint": data_stage(ctx, variant.joint).key if variant.joint else None,
        "texts": data_stage(ctx, ctx.preset.text_task).key if variant.text_weight else None,
        "arm": asdict(variant),
        "options": options.lasting(),
    }

    def work(folder: Path) -> Result:
        teacher, joint, texts = None, None, None
        if asked is not None:
            teacher = teacher_of(ctx, variant.task, asked.folder, options)
        model, tokenizer = load_base(ctx, variant)
        chosen = examples(ctx, variant.task, "train", model, tokenizer)
        if variant.joint:
            count = variant.ordinary_examples
            joint = examples(ctx, variant.joint, "train", model, tokenizer, count)
        if variant.text_weight:
            texts = running_text(ctx, "train", model, tokenizer)
        if variant.lora_rank:
            model = add_lora(model, variant.lora_rank, ctx.seed)
        meta_train(model, tokenizer, chosen, options, folder, teacher, joint, texts)
        return {"examples": len(chosen), "steps": len(read_metrics(folder / METRICS_FILE))}

    stage = ctx.stage(f"arm/{variant.name}", wanted, work)
    # Three times as large as the model, and of no more use once the stage is finished.
    shutil.rmtree(stage.folder / CHECKPOINTS, ignore_errors=True)
    return stage


def load(ctx: ExperimentContext, variant: Variant) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A variant's model on the device, and its tokenizer."""
    folder = train_stage(ctx, variant).folder / MODEL_FOLDER
    if not variant.lora_rank:
        return load_model(folder, ctx.preset.dtype, ctx.device)
    model, tokenizer = load_base(ctx, variant)
    model = add_lora(model, variant.lora_rank, ctx.seed)
    if variant.objective != "none":
        load_weights(model, folder)
    return model, tokenizer


def load_base(
    ctx: ExperimentContext, variant: Variant
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model that a variant began as, and its tokenizer."""
    folder = prepare_stage(ctx, variant.task).folder / MODEL_FOLDER
    return load_model(folder, ctx.preset.dtype, ctx.device)
