"""The demo: a small Llama learns to take a passage into its weights with one gradient step.

Nothing is downloaded. The model starts from random weights and is meta-trained with the gold
objective on passages of four facts about four invented people; it is measured on people that no
training passage mentions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from .train import TrainOptions

TEST_EXAMPLES = 400
INNER_LR_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
POSITIONS = 128
ANSWER_TOKENS = 8  # a name has two, and EOS
OPTIONS = TrainOptions(
    steps=1000,
    batch_size=16,
    outer_lr=1e-3,
    warmup_steps=50,
    inner_lr=0.5,
    objective="gold",
    checkpoint_every=250,
)


def demo_options(steps: int, seed: int) -> TrainOptions:
    """The demo's options; tuned on other seeds, they are not choices of the command line."""
    return replace(OPTIONS, steps=steps, seed=seed)


def demo_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
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
