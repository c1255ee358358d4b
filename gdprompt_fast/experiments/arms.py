"""The models that experiments compare: base models, and what meta-training made of them."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..evaluation import InnerStep
from ..loading import add_lora, load_model
from ..training.checkpoint import CHECKPOINTS, MODEL_FOLDER, load_weights, read_metrics
from ..training.loop import METRICS_FILE, TrainOptions, train
from .lab import Lab
from .stages import Result, Stage
from .tasks import data, examples, fine_tuned, prepared, taught, teacher_cache


@dataclass(frozen=True)
class Arm:
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
    """

    task: str
    objective: str = "none"
    lora_rank: int = 0
    inner_params: str = "full"
    contexts: int = 1
    joint: str = ""
    then: str = ""
    ordinary_examples: int = 0

    @property
    def name(self) -> str:
        """A name that no other arm of a preset has."""
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
        return "-".join(parts)

    def options(self, lab: Lab) -> TrainOptions:
        """How it is meta-trained, or would be: a base model's inner step is the same."""
        kind = "lora-inner" if self.inner_params == "lora" else "lora" if self.lora_rank else "full"
        return lab.preset.train_options(
            self.task,
            kind,
            self.contexts,
            objective="gold" if self.objective == "none" else self.objective,
            inner_params=self.inner_params,
            seed=lab.seed,
        )

    def inner(self, lab: Lab) -> InnerStep:
        """The inner step that it was meta-trained with, or would be."""
        return self.options(lab).inner


def made(lab: Lab, arm: Arm) -> Stage:
    """The last stage of an arm's training; its model, or adapters, are in ``model``."""
    if arm.then:
        before = made(lab, replace(arm, then="", ordinary_examples=0))
        start, wanted = before.folder / MODEL_FOLDER, {"start": before.key}
        return fine_tuned(lab, f"arm/{arm.name}", start, arm.then, arm.ordinary_examples, wanted)
    return prepared(lab, arm.task) if arm.objective == "none" else meta_trained(lab, arm)


def meta_trained(lab: Lab, arm: Arm) -> Stage:
    """The stage of meta-training, whose checkpoints are in its folder."""
    options = arm.options(lab)
    teacher = taught(lab, arm.task, options) if arm.objective == "kl" else None
    wanted = {
        "base": prepared(lab, arm.task).key,
        "teacher": None if teacher is None else teacher.key,
        "joint": data(lab, arm.joint).key if arm.joint else None,
        "arm": asdict(arm),
        "options": asdict(options),
    }

    def work(folder: Path) -> Result:
        cache, joint = None, None
        if teacher is not None:
            cache = teacher_cache(lab, arm.task, teacher.folder, options)
        model, tokenizer = load_base(lab, arm)
        chosen = examples(lab, arm.task, "train", model, tokenizer)
        if arm.joint:
            count = arm.ordinary_examples
            joint = examples(lab, arm.joint, "train", model, tokenizer, count)
        if arm.lora_rank:
            model = add_lora(model, arm.lora_rank, lab.seed)
        train(model, tokenizer, chosen, options, folder, cache, joint)
        return {"examples": len(chosen), "steps": len(read_metrics(folder / METRICS_FILE))}

    stage = lab.stage(f"arm/{arm.name}", wanted, work)
    # Three times as large as the model, and of no more use once the stage is finished.
    shutil.rmtree(stage.folder / CHECKPOINTS, ignore_errors=True)
    return stage


def load(lab: Lab, arm: Arm) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """An arm's model on the device, and its tokenizer."""
    folder = made(lab, arm).folder / MODEL_FOLDER
    if not arm.lora_rank:
        return load_model(folder, lab.preset.dtype, lab.device)
    model, tokenizer = load_base(lab, arm)
    model = add_lora(model, arm.lora_rank, lab.seed)
    if arm.objective != "none":
        load_weights(model, folder)
    return model, tokenizer


def load_base(lab: Lab, arm: Arm) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model that an arm began as, and its tokenizer."""
    folder = prepared(lab, arm.task).folder / MODEL_FOLDER
    return load_model(folder, lab.preset.dtype, lab.device)
