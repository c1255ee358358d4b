"""``gdprompt ask``: what a model answers after it has learnt a text."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config.fields import REQUIRED, check_counts, option
from ..data import ChatEncoder, Example, TripleEncoder
from ..data.texts import read_text
from ..errors import UserError
from ..evaluation import SETTINGS, decode
from ..keep.record import Learnt, learnt_in
from ..loading import positions
from ..meta.inner import InnerUpdate
from ..teacher.answers import greedy_answers
from .command import command
from .groups import ModelConfig, dtype_field


@dataclass(frozen=True, kw_only=True)
class AskConfig(ModelConfig):
    """What to ask which model with which adapter."""

    command = "ask"

    adapter: Path = option(REQUIRED, "folder of an adapter that learn wrote", reads=True)
    question: str | None = option(
        None, "what to ask; without it questions are read line by line", positional=True
    )
    compare: bool = option(
        False, "answer without the text and with it in the prompt too, side by side"
    )
    text: Path | None = option(
        None, "the text, for --compare, where the adapter's folder does not have it", reads=True
    )
    encoding: str = option("utf-8", "of --text, as utf-16")
    chat_template: bool = option(
        False, "ask as a user's turn, in the words of the tokenizer's chat template"
    )
    answer_tokens: int = option(32, "longest answer generated")
    dtype: str = dtype_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "answer_tokens")
        if self.question is not None and not self.question.strip():
            raise UserError("question: expected a text, got none")
        if self.text is not None and not self.compare:
            raise UserError("text: expected none without compare, which puts it into the prompt")


@dataclass(frozen=True)
class Asked:
    """A model before and after it learnt a text, ready to be asked.

    Attributes:
        model: before.
        base: the adapter's base: the same model, or one without the adapters that it has.
        update: what the adapter changes of the base.
        text: what was learnt; "" where it is not needed.
        settings: in which it answers.
    """

    model: Any
    base: Any
    update: InnerUpdate
    tokenizer: PreTrainedTokenizerBase
    encoder: TripleEncoder
    text: str
    settings: tuple[str, ...]
    answer_tokens: int

    def answers(self, question: str) -> dict[str, str]:
        """The answer in each setting.

        Raises:
            UserError: for a question that the model has no tokens or no positions for.
        """
        example = self.encoded(question)
        return {setting: self._answer(setting, example) for setting in self.settings}

    def encoded(self, question: str) -> Example:
        """The rows of a question, as those of a triple's query."""
        example = self.encoder.asked(self.text or question, question)
        if example is None or not example.query:
            raise UserError(f"question: expected one that has tokens, got {question!r}")
        longest = len(example.prompt if "prompt" in self.settings else example.query)
        room = positions(self.model) - self.answer_tokens
        if longest > room:
            raise UserError(
                f"question: expected rows of at most {room} tokens, as the model has positions and "
                f"{self.answer_tokens} are for the answer, got {longest}"
            )
        return example

    def _answer(self, setting: str, example: Example) -> str:
        start = example.prompt if setting == "prompt" else example.query
        if setting != "fine_tuning":
            return self._decoded(self.model, start)
        only = torch.zeros(1, dtype=torch.long, device=next(self.base.parameters()).device)
        with self.update.applied_to(self.base, only):
            return self._decoded(self.base, start)

    def _decoded(self, model: nn.Module, start: Sequence[int]) -> str:
        (ids,) = greedy_answers(model, [start], self.encoder.end, self.answer_tokens)
        return decode(self.tokenizer, ids)


@command("Ask a model what it has learnt from a text; without a question, one after another.")
def ask(config: AskConfig) -> Callable[[], list[dict[str, str]]]:
    """Loads model and adapter; the work is to answer, and returns the answers by setting."""
    learnt = learnt_in(config.adapter)
    model, tokenizer = config.load(config.dtype)
    base = _without_adapters(model, config.compare)
    encoder = (ChatEncoder if config.chat_template else TripleEncoder)(tokenizer)
    asked = Asked(
        model,
        base,
        InnerUpdate.from_pretrained(config.adapter, base),
        tokenizer,
        encoder,
        _text(config, learnt) if config.compare else "",
        tuple(SETTINGS) if config.compare else ("fine_tuning",),
        config.answer_tokens,
    )
    if config.question is not None:
        asked.encoded(config.question)

    def work() -> list[dict[str, str]]:
        if config.question is None:
            return list(_conversation(asked))
        answers = asked.answers(config.question)
        print(_in_lines(answers))
        return [answers]

    return work


def _without_adapters(model: Any, keep: bool) -> Any:
    """The base that an adapter belongs to; a copy where the model is to be kept beside it."""
    if not hasattr(model, "peft_config"):
        return model
    return (copy.deepcopy(model) if keep else model).unload()


def _text(config: AskConfig, learnt: Learnt) -> str:
    """What the adapter learnt, for the prompt.

    Raises:
        UserError: if neither the adapter's folder nor the configuration has it.
    """
    if config.text is not None:
        if not config.text.is_file():
            raise UserError(f"text: expected a text file, got {config.text}")
        return read_text(config.text, config.encoding).strip()
    if not learnt.texts:
        raise UserError(
            f"text: expected a file for compare, as {config.adapter} has no text, got none"
        )
    return "\n\n".join(learnt.texts)


def _conversation(asked: Asked) -> Iterator[dict[str, str]]:
    """Answers what is typed, until it ends; a blank line is no question."""
    if sys.stdin.isatty():
        print("a question a line; Ctrl-D ends")
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            answers = asked.answers(line.strip())
        except UserError as error:  # of this question alone
            print(error)
            continue
        print(_in_lines(answers), flush=True)
        yield answers


def _in_lines(answers: Mapping[str, str]) -> str:
    """The one answer, or a line for each setting."""
    if len(answers) == 1:
        return next(iter(answers.values()))
    width = max(len(SETTINGS[setting]) for setting in answers) + 1
    return "\n".join(f"{SETTINGS[each] + ':':<{width}} {text}" for each, text in answers.items())
