"""Beyond the paper: meta-training on what internalisation is, against plain training.

All arms go on from the same model with the same texts in equal steps. The meta arm adds the
gradient of what the questions of tag 1's entities cost after one gradient step on the definition,
through that step (:func:`gdprompt_fast.fast_meta_step`); a control adds the same questions'
gradient without the step. Then all learn the second stage's definitions in the same ordinary way,
and it is asked how much more of tag 1's is internalised.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .. import MetaBatch, fast_meta_step
from ..artifacts.files import write_whole
from ..artifacts.stage import Result, Stage
from ..config.fields import check_counts, check_numbers
from ..errors import UserError
from ..report.findings import Finding
from ..report.outcome import Outcome
from ..report.over_seeds import NamedSeeds, OverSeeds, larger_over_seeds
from .context import Context
from .material.subsets import OF_NUMBERS, TWO_TAGS, Defined, Material
from .material.texts import TextRules
from .measured import (
    PAPER,
    STRONG,
    STRONG_CLAIM,
    WEAK,
    Scores,
    gaps,
    more,
    power_notes,
)
from .preset import NUMBERS, SourceOptions, settings_of
from .sources import Source, source_of
from .stages import Staged, staged_work
from .train import padding_of, to_block, train

TITLE = "Meta-training for strong internalisation"
WEIGHTS_FILE = "start.pt"
ARMS = {
    "plain": "plain training",
    "answers": "with the questions, no step",
    "meta": "with meta-training",
}


@dataclass(frozen=True)
class Options(SourceOptions):
    """The section ``[meta]``.

    Attributes:
        start: training options, over the first stage's, of the common beginning.
        arms: of every arm, over the first stage's.
        inner_lr: η of the step on a definition; the arm without the step has 0.
        weight: of the meta-gradient beside the texts'.
        contexts: definitions in a step.
        queries: questions of each, at most.
        second_tag: whether as many definitions with tag 2 are contexts as well, their questions
            with answers of one another's, so that nothing is to be had of them.
        stage2_seeds: runs of the second stage from every arm.
    """

    start: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, Any] = field(default_factory=dict)
    inner_lr: float = 0.1
    weight: float = 1.0
    contexts: int = 16
    queries: int = 4
    second_tag: bool = False
    stage2_seeds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "contexts", "queries", "stage2_seeds")
        check_numbers(self, "inner_lr", "weight", above_zero=True)


def _source(ctx: Context, options: Options) -> Source:
    fractions = OF_NUMBERS if options.source == NUMBERS else TWO_TAGS
    own = (options.lists, options.entities, options.pretrained)
    return source_of(ctx, options.source, TextRules(fractions), *own)


def start_stage(ctx: Context, options: Options) -> Stage:
    """The model that all arms go on from, in the stage's folder."""
    source = _source(ctx, options)
    chosen = source.training("first", options.start)
    wanted = {**source.settings, "train": settings_of(chosen)}

    def work(folder: Path) -> Result:
        model, tokenizer = source.new_model()
        texts = source.material(0).stages[0]
        block = to_block(texts, tokenizer, chosen.block, chosen.padding_in_loss)
        losses = train(model, block, chosen, ctx.seed, folder)
        write_whole(folder / WEIGHTS_FILE, partial(torch.save, model.state_dict()))
        return {"losses": losses, "counts": {"texts": len(texts)}}

    return ctx.stage(f"meta/{options.source}-start", wanted, work)


def arm_stage(ctx: Context, options: Options, arm: str) -> Stage:
    """An arm: the rest of the first stage, and the second, scored."""
    source, start = _source(ctx, options), start_stage(ctx, options)
    first = source.training("first", options.arms)
    staged = Staged(first, source.training("second", {}), options.stage2_seeds)
    inner_lr = options.inner_lr if arm == "meta" else 0.0
    own = ("weight", "contexts", "queries", "second_tag")
    of_meta = {"inner_lr": inner_lr, **{name: getattr(options, name) for name in own}}
    plain = arm == "plain"
    wanted = {"start": start.key, **staged.settings(), "meta": None if plain else of_meta}

    def new_model() -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = source.new_model()
        model.load_state_dict(torch.load(start.folder / WEIGHTS_FILE, weights_only=True))
        return model, tokenizer

    def adds(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Callable[[int], None]:
        steps = MetaSteps(model, tokenizer, source.material(0), options, inner_lr, ctx.seed)
        return steps.add_gradient

    def work(folder: Path) -> Result:
        return staged_work(
            folder,
            new_model,
            source.material,
            staged,
            source.ask,
            ctx.seed,
            adds=None if plain else adds,
        )

    return ctx.stage(f"meta/{options.source}-{arm}", wanted, work)


class MetaSteps:
    """The meta-gradient of every step: definitions as contexts, their questions as queries."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        material: Material,
        options: Options,
        inner_lr: float,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.inner_lr, self.seed = inner_lr, seed
        self.of_tag = [material.defined[name] for name in WEAK[: 1 + options.second_tag]]
        if not all(self.of_tag):
            raise UserError(
                "meta: expected definitions with questions in the first stage, got none"
            )

    def add_gradient(self, step: int) -> None:
        """Adds ``weight`` times the gradient of the mean NLL of the answers at θ'."""
        rng = random.Random(f"{self.seed} {step}")
        chosen: list[tuple[str, list[tuple[str, str]]]] = []
        for number, members in enumerate(self.of_tag):
            drawn = rng.sample(members, min(self.options.contexts, len(members)))
            asked = [self._questions(each, rng) for each in drawn]
            if number:
                asked = shuffled_answers(asked, rng)
            chosen += [(each.definition, of) for each, of in zip(drawn, asked, strict=True)]
        own = [parameter.grad for parameter in self.model.parameters()]
        self.model.zero_grad()
        fast_meta_step(
            self.model,
            meta_batch(chosen, self.tokenizer, next(self.model.parameters()).device),
            inner_lr=self.inner_lr,
            objective="gold",
            outer_reduction="mean",
            verify="never" if step else "first",
        )
        for parameter, grad in zip(self.model.parameters(), own, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(self.options.weight)
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)

    def _questions(self, defined: Defined, rng: random.Random) -> list[tuple[str, str]]:
        return rng.sample(defined.trained, min(self.options.queries, len(defined.trained)))


def shuffled_answers(
    asked: Sequence[Sequence[tuple[str, str]]], rng: random.Random
) -> list[list[tuple[str, str]]]:
    """The same questions with the answers of one another."""
    answers = [answer for questions in asked for _, answer in questions]
    rng.shuffle(answers)
    left = iter(answers)
    return [[(prompt, next(left)) for prompt, _ in questions] for questions in asked]


def meta_batch(
    chosen: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> MetaBatch:
    """A batch of definitions, each a group with its questions; an answer ends with padding."""
    end = [padding_of(tokenizer)]
    contexts = [list(tokenizer(text)["input_ids"]) + end for text, _ in chosen]
    pairs = [(group, *pair) for group, (_, asked) in enumerate(chosen) for pair in asked]
    rows = [list(tokenizer(prompt + answer)["input_ids"]) + end for _, prompt, answer in pairs]
    starts = torch.tensor([len(tokenizer(prompt)["input_ids"]) for _, prompt, _ in pairs])
    context_ids, context_mask = _padded(contexts, end[0])
    query_ids, query_mask = _padded(rows, end[0])
    response = query_mask & (torch.arange(query_ids.shape[1]) >= starts[:, None])
    groups = torch.tensor([group for group, _, _ in pairs])
    tensors = (context_ids, context_mask, query_ids, query_mask, response)
    own = torch.arange(len(contexts))
    return MetaBatch(*(each.to(device) for each in (*tensors, own, groups)))


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    rows = {
        head: Scores([arm_stage(ctx, options, arm) for ctx in repetitions])
        for arm, head in ARMS.items()
    }
    findings = [
        finding for head, each in rows.items() for finding in more(STRONG_CLAIM, head, each, STRONG)
    ]
    power = {f"strong, {head}": scores.gap(STRONG) for head, scores in rows.items()}
    meta = rows[ARMS["meta"]]
    for head in (ARMS["plain"], ARMS["answers"]):
        against, differences = compared(meta, head, rows[head])
        findings += against
        power[f"larger with meta-training than {head}"] = differences
    tables = [
        gaps("Exact match, weak internalisation", "difference", WEAK, rows),
        gaps("Exact match, strong internalisation", "difference", STRONG, rows),
    ]
    about = (
        "Not of the paper. All arms begin at the same model and take the same number of optimizer "
        "steps on the same texts. A step with meta-training costs more time: it adds "
        f"{options.weight:g} times the exact meta-gradient of {options.contexts} definitions, "
        f"η = {options.inner_lr:g}; “{ARMS['answers']}” adds the gradient of the same answers at "
        "η = 0, so that these weigh as much. The second stage is the same for all."
    )
    return Outcome(
        TITLE, tables, findings, [about, *power_notes(power)], paper=PAPER, over_seeds=True
    )


def compared(meta: Scores, head: str, control: Scores) -> tuple[list[Finding], OverSeeds]:
    """Whether more is internalised with meta-training than in another arm, and by how much the
    strong difference grows.
    """
    large, small = meta.gap(STRONG), control.gap(STRONG)
    assert large is not None and small is not None
    named = (NamedSeeds(ARMS["meta"], large), NamedSeeds(head, small))
    claim = f"strong internalisation is larger {ARMS['meta']} than {head}"
    larger = larger_over_seeds(claim, "difference of D5 and D6", *named)
    learnt = [
        NamedSeeds(name, scores.named(STRONG[0]).cell)
        for name, scores in ((ARMS["meta"], meta), (head, control))
    ]
    claim = f"new definitions with tag 1 are learnt more {ARMS['meta']} than {head}"
    more_learnt = larger_over_seeds(claim, "D5", *learnt)
    return [larger, more_learnt], OverSeeds(tuple((x,) for x in large.differences(small)))
