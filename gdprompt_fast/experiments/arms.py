"""The models that experiments compare: base models, and what meta-training made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoint import MODEL_FOLDER, load_weights, read_metrics
from ..evaluation import InnerStep
from ..loading import add_lora, load_model
from ..teacher import TeacherCache
from ..train import METRICS_FILE, TrainOptions, train
from .lab import Lab
from .stages import Result, Stage
from .tasks import examples, fine_tuned, prepared, teacher


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
        joint: a task whose ordinary fine-tuning loss is added in every outer step.
        joint_examples: how many of its examples.
        then: a task it was fine-tuned on in the ordinary way afterwards.
        then_examples: on how many of its examples.
    """

    task: str
    objective: str = "none"
    lora_rank: int = 0
    inner_params: str = "full"
    contexts: int = 1
    joint: str = ""
    joint_examples: int = 0
    then: str = ""
    then_examples: int = 0

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
            objective="gold" if self.objective == "none" else self.objective,
            inner_params=self.inner_params,
            contexts_per_group=self.contexts,
            seed=lab.seed,
        )

    def inner(self, lab: Lab) -> InnerStep:
        """The inner step that it was meta-trained with, or would be."""
        return self.options(lab).inner


def made(lab: Lab, arm: Arm) -> Stage:
    """The last stage of an arm's training; its model, or adapters, are in ``model``."""
    stage = prepared(lab, arm.task) if arm.objective == "none" else meta_trained(lab, arm)
    if not arm.then:
        return stage
    start = stage.folder / MODEL_FOLDER
    wanted = {"start": stage.key}
    return fine_tuned(lab, f"arm/{arm.name}", start, arm.then, arm.then_examples, wanted)


def meta_trained(lab: Lab, arm: Arm) -> Stage:
    """An arm before any fine-tuning that follows; ``train`` keeps its checkpoints in the folder."""
    before_then = Arm(**{**asdict(arm), "then": "", "then_examples": 0})
    options = arm.options(lab)
    base = prepared(lab, arm.task)
    wanted = {"base": base.key, "arm": asdict(before_then), "options": asdict(options)}
    targets = None
    if arm.objective == "kl":
        targets = teacher(lab, arm.task, options.answer_tokens, options.teacher_batch_size)
        wanted["teacher"] = targets.key
    if arm.joint:
        wanted["joint"] = prepared(lab, arm.joint).key

    def work(folder: Path) -> Result:
        model, tokenizer = load_base(lab, arm)
        chosen = examples(lab, arm.task, "train", tokenizer, model)
        joint, cache = None, None
        if arm.joint:
            joint = examples(lab, arm.joint, "train", tokenizer, model, arm.joint_examples)
        if targets is not None:
            cache = TeacherCache.open(targets.folder / "cache")
        train(model, tokenizer, chosen, options, folder, cache, joint)
        rows = read_metrics(folder / METRICS_FILE)
        return {"examples": len(chosen), "steps": len(rows), "last": rows[-1]}

    return lab.stage(f"arm/{before_then.name}", wanted, work)


def load(lab: Lab, arm: Arm) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """An arm's model on the device, and its tokenizer."""
    folder = made(lab, arm).folder / MODEL_FOLDER
    if not arm.lora_rank:
        return load_model(folder, lab.preset.dtype, lab.device)
    model, tokenizer = load_base(lab, arm)
    if arm.objective != "none":
        load_weights(model, folder)
    return model, tokenizer


def load_base(lab: Lab, arm: Arm) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """An arm as it was before meta-training, with new adapters if it has any."""
    folder = prepared(lab, arm.task).folder / MODEL_FOLDER
    model, tokenizer = load_model(folder, lab.preset.dtype, lab.device)
    if arm.lora_rank:
        model = add_lora(model, arm.lora_rank, lab.seed)
    return model, tokenizer
