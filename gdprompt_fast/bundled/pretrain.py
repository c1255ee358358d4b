"""Trains the bundled model from random weights until it answers from a passage in its prompt.

    python -m gdprompt_fast.bundled.pretrain --output DIR

Seeded, on the CPU. It is fine-tuned in the Prompt and No Context formats on the generators' own
texts, first on passages of one fact, then of two, then of four: from four at once it does not find
out how to look an answer up. No person and no thing of any test set is in its texts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..checkpoint import save_model, write_folder
from ..data import Limits, tokenise_triples
from ..data.characters import TRAIN_SIZE, characters_vocabulary, make_characters
from ..data.people import make_people_articles, make_people_data, people_vocabulary
from ..data.words import word_tokenizer
from ..evaluation import InnerStep, evaluate
from ..prepare import PrepareOptions, fine_tune

POSITIONS = 128
TEST_PASSAGES = 400
SHARES = {"people": 0.5, "articles": 0.2, "character-description": 0.15, "reversal-curse": 0.15}


@dataclass(frozen=True)
class Lesson:
    """Fine-tuning on passages of so many facts, and on the other texts."""

    facts: int
    steps: int


LESSONS = (Lesson(1, 500), Lesson(2, 1000), Lesson(4, 1500))
BATCH, EXAMPLES, TEXT_WEIGHT, PEAK_LR = 32, 40_000, 0.1, 1e-3


def bundled_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over all words of the generators."""
    return word_tokenizer(sorted({*people_vocabulary(), *characters_vocabulary()}))


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> nn.Module:
    """A Llama of 4 layers, 128 wide, over the tokenizer's words, with seeded random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def lesson_records(facts: int, seed: int) -> list[dict[str, str]]:
    """Triples of every kind in the shares of ``SHARES``."""
    sizes = {kind: int(share * EXAMPLES) for kind, share in SHARES.items()}
    records = list(make_people_data(sizes.pop("people"), 1, seed, facts).train)
    texts, _ = make_people_articles(sizes.pop("articles"), 1, seed)
    rng = random.Random(seed)
    records += [_continuation(rng, text.split()) for text in texts]
    for task, size in sizes.items():
        while size > 0:  # again with other descriptions where there are not as many names
            seed += 1
            part = list(make_characters(task, min(size, TRAIN_SIZE), 1, seed).train)
            records, size = records + part, size - len(part)
    return records


def _continuation(rng: random.Random, words: list[str]) -> dict[str, str]:
    """A text cut anywhere in its second half: what comes before, one word, what comes after."""
    cut = rng.randrange(len(words) // 2, len(words) - 1)
    return {
        "context": " ".join(words[:cut]),
        "query": words[cut],
        "response": " ".join(words[cut + 1 :]),
    }


def pretrain(
    seed: int, lessons: Sequence[Lesson] = LESSONS
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The model after all lessons, with its tokenizer; prints how well it does after each."""
    tokenizer = bundled_tokenizer()
    model = new_model(tokenizer, seed)
    limits = Limits(POSITIONS, POSITIONS, POSITIONS)
    unseen = tokenise_triples(make_people_data(1, TEST_PASSAGES, seed).test, tokenizer, limits)
    for number, lesson in enumerate(lessons):
        records = lesson_records(lesson.facts, 1000 * (seed + 1) + 100 * number)
        options = PrepareOptions(
            steps=lesson.steps,
            batch_size=BATCH,
            lr=PEAK_LR,
            warmup_steps=50,
            text_weight=TEXT_WEIGHT,
            seed=seed,
        )
        fine_tune(model, tokenise_triples(records, tokenizer, limits).examples, options)
        scores = evaluate(
            model,
            tokenizer,
            unseen.examples,
            InnerStep(0.0),
            batch_size=100,
            settings=("no_context", "prompt"),
            answer_tokens=0,
        )
        for setting, of in scores.items():
            print(f"after {lesson}: {setting} {of.summary().accuracy:.1%}")
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    model, tokenizer = pretrain(arguments.seed)
    write_folder(arguments.output, lambda folder: save_model(model, tokenizer, folder))
    print(f"{arguments.output}: {(time.perf_counter() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
