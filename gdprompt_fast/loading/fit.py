"""Whether a model, a tokenizer and data go together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import Example
from ..errors import UserError


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module, folder: Path) -> None:
    """The tokenizer has tokens of texts, and the model an embedding for every one.

    Raises:
        ValueError: if not; transformers makes a tokenizer of special tokens alone where the file
            of the others is not there.
    """
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise UserError(
            f"tokenizer: expected tokens of texts in {folder}, got special ones alone: a file of "
            "the tokenizer is not there, or empty"
        )
    vocabulary, largest = vocabulary_size(model), largest_id(tokenizer)
    if largest >= vocabulary:
        raise UserError(
            f"tokenizer: expected ids below the model's vocabulary of {vocabulary}, got up to "
            f"{largest} in {folder}: the tokenizer of another model, or tokens were added to it "
            "after the model was saved"
        )


def print_notes(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Says what may surprise of a model and a tokenizer that fit."""
    vocabulary, largest = vocabulary_size(model), largest_id(tokenizer)
    if vocabulary > largest + 1:
        print(
            f"note: the model has {vocabulary:,} embeddings, the tokenizer {largest + 1:,} ids: "
            "no text has the rest"
        )
    ends, eos = _model_eos(model), tokenizer.eos_token_id
    if ends and eos is not None and eos not in ends:
        print(
            f"note: the tokenizer's EOS, with which a response ends, is {eos} "
            f"({tokenizer.eos_token}), the model's is {', '.join(map(str, ends))}: untrained, it "
            "may not end its answers with the tokenizer's"
        )


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that the tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _model_eos(model: Any) -> list[int]:
    """The ids that end a text for the model by its own files."""
    files = (model.config, model.generation_config)
    named = [getattr(file, "eos_token_id", None) for file in files]
    lists = [each if isinstance(each, list) else [each] for each in named]
    return sorted({eos for each in lists for eos in each if isinstance(eos, int)})


def check_vocabulary(examples: Iterable[Example], model: nn.Module) -> None:
    """The model has an embedding for every token of the examples."""
    vocabulary = vocabulary_size(model)
    largest = max(max(*e.context, *e.prompt, *e.response) for e in examples)
    if largest >= vocabulary:
        raise UserError(
            f"tokenizer: expected ids below the model's vocabulary of {vocabulary}, got {largest}"
        )


def check_same_vocabulary(teacher: nn.Module, model: nn.Module) -> None:
    """The teacher's predictions are over the model's own tokens."""
    if vocabulary_size(teacher) != vocabulary_size(model):
        raise UserError(
            f"teacher: expected the model's vocabulary of {vocabulary_size(model)}, "
            f"got {vocabulary_size(teacher)}"
        )


def check_same_tokens(teacher: PreTrainedTokenizerBase, model: PreTrainedTokenizerBase) -> None:
    """The teacher's ids are the model's, whose tokenizer is the only one used; those of special
    tokens, which some rename or add, apart.
    """
    added = teacher.get_added_vocab().keys() | model.get_added_vocab().keys()
    theirs, own = (
        {token: id_ for token, id_ in tokenizer.get_vocab().items() if token not in added}
        for tokenizer in (teacher, model)
    )
    if theirs != own:
        token, id_ = min(theirs.items() ^ own.items())
        raise UserError(
            f"teacher: expected the tokenizer of the model, got another, of {len(theirs)} tokens "
            f"for {len(own)}: one of the two does not have {token!r} as {id_}"
        )


def vocabulary_size(model: nn.Module) -> int:
    """The number of rows of the embedding, V."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def positions(model: nn.Module) -> int:
    """The longest row that the model has positions for."""
    return int(model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]


def max_prompt_length(model: nn.Module, answer_tokens: int) -> int:
    """The longest row after which the model has positions for a generated answer.

    Raises:
        ValueError: if that is no row at all.
    """
    room = positions(model) - answer_tokens
    if room < 2:
        raise UserError(
            f"answer_tokens: expected fewer than the model's positions, {positions(model)}, less 2 "
            f"of a row, got {answer_tokens}"
        )
    return room
