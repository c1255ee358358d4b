"""Trains the bundled model from random weights until it answers from a passage in its prompt.

    python -m gdprompt_fast.bundled.pretrain --output DIR

Seeded, on the CPU. A row of text is a passage of the generators, then all its questions with their
answers, of which the answers count most. The first lesson has one fact a passage, and teaches to
copy; the second one to four, so that nothing can be told from positions alone; the third adds the
other generators' texts. No person and no thing of any test set occurs.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..artifacts.files import write_folder
from ..artifacts.outputs import Outputs
from ..artifacts.progress import progress_bar
from ..data import (
    Limits,
    Rows,
    characters_vocabulary,
    make_characters,
    make_people_articles,
    make_people_data,
    pad,
    people_dialogue,
    people_vocabulary,
    tokenise_triples,
)
from ..data.words import word_tokenizer
from ..evaluation import InnerStep, evaluate
from ..training.checkpoint import save_model
from ..training.prepare import row_loss

POSITIONS, TEST_PASSAGES = 128, 400
ROPE_THETA, LOOK_BACK, LOOK_BACK_FREQUENCIES = 10_000.0, 6.0, 3
BATCH, CLIP_NORM, TEXT_WEIGHT = 32, 1.0, 0.2
MUON_LR, ADAM_LR = 6e-3, 1e-3  # of the layers' matrices, and of all else
WARMUP_STEPS, FALLING_SHARE = 50, 0.3  # the rate rises, stays, and falls to zero at the end
OTHER_TEXTS = 5000  # of every other kind

Dialogue = list[tuple[str, str]]  # what is read and what is to be said, in turns


@dataclass(frozen=True)
class Lesson:
    """So many ``steps`` on passages of one to ``facts`` facts, and a ``share`` of other texts."""

    facts: int
    steps: int
    share: float = 0.0


LESSONS = (Lesson(1, 200), Lesson(4, 2000), Lesson(4, 2000, share=0.4))


def bundled_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over all words of the generators."""
    return word_tokenizer(sorted({*people_vocabulary(), *characters_vocabulary()}))


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> nn.Module:
    """A Llama of 4 layers, 128 wide, over the tokenizer's words, with seeded random weights."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            attention_bias=True,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _look_back(model)
    return model


@torch.no_grad()
def _look_back(model: LlamaForCausalLM) -> None:
    """Has head h of the first layer begin with its attention on the token h + 1 places before.

    Looking up needs such heads, and finding them takes most of a training from random weights. The
    biases alone do it: after rotation by its position, a key fits the query h + 1 places later best
    where the key's bias is the query's, rotated by as much. Fast frequencies tell places apart.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    half = head_dim // 2
    query_HD, key_HD = (
        projection.bias.zero_().view(heads, head_dim)
        for projection in (attention.q_proj, attention.k_proj)
    )
    for head in range(heads):
        for frequency in range(LOOK_BACK_FREQUENCIES):
            angle = (head + 1) * ROPE_THETA ** (-frequency / half)
            query_HD[head, frequency] = LOOK_BACK
            key_HD[head, frequency] = LOOK_BACK * math.cos(angle)
            key_HD[head, half + frequency] = LOOK_BACK * math.sin(angle)


def other_dialogues(rng: random.Random, seed: int) -> list[Dialogue]:
    """The other generators' texts: characters in both orders, and articles cut somewhere."""
    dialogues: list[Dialogue] = []
    for task in ("character-description", "reversal-curse"):
        for triple in make_characters(task, OTHER_TEXTS, 1, seed).train:
            dialogues.append([(f"{triple['context']} {triple['query']}", triple["response"])])
    for article in make_people_articles(OTHER_TEXTS, 1, seed)[0]:
        words = article.split()
        cut = rng.randrange(len(words) // 2, len(words) - 1)
        dialogues.append([(" ".join(words[:cut]), " ".join(words[cut:]))])
    return dialogues


def tokenised(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Dialogue]) -> Rows:
    """Rows of the dialogues, each opened with BOS, every response ended with EOS."""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids, said = [], []
    for dialogue in dialogues:
        row, says = [tokenizer.bos_token_id], [0]
        for read, response in dialogue:
            start, end = ids_of(read), [*ids_of(response), tokenizer.eos_token_id]
            row += start + end
            says += [0] * len(start) + [1] * len(end)
        ids.append(row)
        said.append(says)
    padded, mask = pad(ids)
    return Rows(padded, mask, pad(said)[0].bool())


def pretrain(
    seed: int, lessons: Sequence[Lesson] = LESSONS
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The model after all lessons, with its tokenizer; prints how well it does after each."""
    tokenizer = bundled_tokenizer()
    model = new_model(tokenizer, seed)
    optimizers = new_optimizers(model)
    rng = random.Random(seed)
    others = other_dialogues(rng, seed)
    total, done = sum(lesson.steps for lesson in lessons), 0
    for lesson in lessons:
        with progress_bar(lesson.steps, f"up to {lesson.facts} facts", "step") as bar:
            for _ in range(lesson.steps):
                dialogues = [_draw(rng, lesson, others) for _ in range(BATCH)]
                rows = tokenised(tokenizer, dialogues)
                loss = _step(model, optimizers, rows, rate_share(done, total))
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()
                done += 1
        print(f"{lesson}: {_scores(model, tokenizer, seed)}", flush=True)
    return model, tokenizer


def _draw(rng: random.Random, lesson: Lesson, others: Sequence[Dialogue]) -> Dialogue:
    if rng.random() < lesson.share:
        return rng.choice(others)
    return people_dialogue(rng, rng.randint(1, lesson.facts))


def new_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, in a third of Adam's steps, and Adam for all else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "layers" in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0),
        torch.optim.Adam(rest, lr=ADAM_LR),
    ]


def rate_share(step: int, steps: int) -> float:
    """What part of the learning rates holds at ``step``, counted from 0."""
    return min(1, (step + 1) / WARMUP_STEPS, (steps - step) / (FALLING_SHARE * steps))


def _step(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rows: Rows, share: float
) -> float:
    """One step; the loss before it."""
    for optimizer, lr in zip(optimizers, (MUON_LR, ADAM_LR), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = share * lr
    loss = row_loss(model, rows, TEXT_WEIGHT)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _scores(model: nn.Module, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """The accuracy on unseen passages of four facts."""
    limits = Limits(POSITIONS, POSITIONS, POSITIONS)
    unseen = tokenise_triples(make_people_data(1, TEST_PASSAGES, seed).test, tokenizer, limits)
    scores = evaluate(
        model,
        tokenizer,
        unseen.examples,
        InnerStep(0.0),
        batch_size=100,
        settings=("no_context", "prompt"),
        answer_tokens=0,
    )
    return ", ".join(f"{setting} {of.summary().accuracy:.1%}" for setting, of in scores.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    Outputs(inputs={}, overwrite=False).check_folder(arguments.output)
    start = time.perf_counter()
    model, tokenizer = pretrain(arguments.seed)
    write_folder(arguments.output, lambda folder: save_model(model, tokenizer, folder))
    print(f"{arguments.output}: {(time.perf_counter() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
