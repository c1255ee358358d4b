"""Triples as turns of a chat, in the words of the tokenizer's own chat template.

- The query row is a user's turn with the query, the prompt row one with context, blank line, query;
  both end in the template's opening of the assistant's turn, without thinking where a template
  knows ``enable_thinking``: responses have none.
- The response is what the template makes of the assistant's turn, up to and with the token that
  ends it. That token, not EOS, then ends what a model generates.
- The context of the inner step stays running text, opened as any text: its loss is that of a
  language model on a passage, and a chat model is never trained to predict a user's turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .tokenise import Split, TripleEncoder, split_at_common_prefix

PROBE = "probe"


class ChatEncoder(TripleEncoder):
    """As :class:`TripleEncoder`, by the rule of this file.

    Raises:
        ValueError: if the tokenizer has no chat template, or one whose opening of an answer is not
            how it begins one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise UserError("chat_template: expected a tokenizer with a chat template, got none")
        self.end = self._end_of_turn()

    def _prompt(self, context: str, query: str) -> str:
        return f"{context}\n\n{query}"

    def _split(self, starts: Sequence[str], responses: Sequence[str]) -> list[Split]:
        asked = [self._turns(start) for start in starts]
        told = [self._turns(*pair) for pair in zip(starts, responses, strict=True)]
        pairs = zip(self._ids(told), self._ids(asked), strict=True)
        return [self._until_end(split_at_common_prefix(*pair)) for pair in pairs]

    def _until_end(self, split: Split) -> Split:
        if self.end not in split.response:
            return split
        last = len(split.response) - 1 - split.response[::-1].index(self.end)
        return Split(split.start, split.response[:last])

    def _turns(self, user: str, assistant: str | None = None) -> str:
        turns: list[dict[str, Any]] = [{"role": "user", "content": user}]
        if assistant is not None:
            turns.append({"role": "assistant", "content": assistant})
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=assistant is None,
                    enable_thinking=False,
                )
            )
        except Exception as error:  # a template is a program, which may raise anything
            raise UserError(
                f"chat_template: expected it to take these turns, got {error}"
            ) from error

    def _end_of_turn(self) -> int:
        """The first special token that the template puts after a response; EOS if there is none."""
        asked, told = self._turns(PROBE), self._turns(PROBE, PROBE)
        if not told.startswith(asked) or PROBE not in told[len(asked) :]:
            raise UserError(
                "chat_template: expected its opening of an answer to be how it begins one, got "
                f"{asked!r} and {told!r}"
            )
        (after,) = self._ids([told[len(asked) :].rpartition(PROBE)[2]])
        added = self.tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special}
        return next((token for token in after if token in special), self.end)
