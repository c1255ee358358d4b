"""From triples of texts to token ids.

The rule, the same for every tokenizer:

- Two texts are joined by one space, unless white space already stands on either side of the join.
- Every row (context; query ⊕ response; context ⊕ query ⊕ response) opens with the BOS token if
  the tokenizer itself opens a text with it, and never otherwise.
- The response's tokens are those of the joined text after its longest common prefix with the same
  text without the response. So the space before an answer goes to whichever side the vocabulary
  puts it on (" Anna" or "is "), and a piece that spans the join belongs to the response.
- A response ends with EOS, so that a model can say that its answer is complete; in a chat (see
  ``chat.py``) with the token that ends a turn.
- A token of the context counts in the loss of the inner step if a character of it is in one of the
  record's "context_loss" spans; all do where it has none.
- The response has the same tokens in the query row and in the prompt row: the teacher speaks about
  the tokens that the student is asked for. A record that breaks this is dropped.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from operator import eq
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from ..errors import UserError

RECORDS_AT_ONCE = 1000  # a fast tokenizer works through a list of texts in parallel
OPENING_WORDS = ["In", "Once", "The", "When", "Who"]  # how do texts that begin so begin in tokens?

_RESPONSE = "The"  # stands for one where it is only asked

Item = TypeVar("Item")


class Texts(NamedTuple):
    """A triple as it was read."""

    context: str
    query: str
    response: str
    id: str | None


@dataclass(frozen=True)
class Example:
    """The token ids of a triple, each row opened with BOS where the tokenizer does so.

    Attributes:
        context: the row of the inner step.
        query: the query alone, without its response.
        prompt: context ⊕ query, without its response.
        response: the response and EOS; it follows ``query`` or ``prompt`` in their rows.
        texts: what the ids are of.
        answers: the texts that count as right answers, for scoring what a model generates.
        context_loss: for every token of ``context`` whether its NLL counts; None: all do.
    """

    context: array[int]
    query: array[int]
    prompt: array[int]
    response: array[int]
    texts: Texts
    answers: tuple[str, ...] = ()
    context_loss: tuple[bool, ...] | None = None


def end_token(examples: Sequence[Example]) -> int:
    """The token that every gold response ends with, and so a generated answer should."""
    return examples[0].response[-1]


@dataclass(frozen=True)
class Limits:
    """Longest rows kept, in tokens with BOS and EOS; a longer record is dropped, never cut.

    Attributes:
        context_tokens: of the context row.
        query_tokens: of the query row, query ⊕ response.
        prompt_tokens: of the prompt row, context ⊕ query ⊕ response.
    """

    context_tokens: int
    query_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class TokenisedTriples:
    """The examples kept, and which records were dropped.

    Attributes:
        kept: for every example the index of its record.
        reasons: for every record that was dropped, by its index, why.
    """

    examples: list[Example]
    kept: list[int]
    reasons: dict[int, str]

    @property
    def dropped(self) -> dict[str, int]:
        """By reason, how many records were dropped."""
        return dict(Counter(self.reasons.values()))

    def __str__(self) -> str:
        reasons = "".join(f"; dropped {count}: {why}" for why, count in self.dropped.items())
        total = len(self.examples) + len(self.reasons)
        return f"{len(self.examples)} of {total} records kept{reasons}"


def tokenise_triples(
    records: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    encoder: type[TripleEncoder] | None = None,
) -> TokenisedTriples:
    """Tokenises triples and drops, by reason and count, those that cannot be used.

    A record's optional "answers" are kept as texts; without them its response is the one answer.

    Args:
        encoder: turns texts into tokens; None: :class:`TripleEncoder`.

    Raises:
        ValueError: if the tokenizer has no EOS, or if nothing is left.
    """
    encode = (encoder or TripleEncoder)(tokenizer)
    chunks = batched(records, RECORDS_AT_ONCE)
    return keep_usable((example for chunk in chunks for example in encode.examples(chunk)), limits)


def keep_usable(tokenised: Iterable[Example | None], limits: Limits) -> TokenisedTriples:
    """The examples of records, one each, without those that cannot be used.

    Raises:
        ValueError: if nothing is left.
    """
    examples: list[Example] = []
    kept: list[int] = []
    reasons: dict[int, str] = {}
    for index, example in enumerate(tokenised):
        reason = _reason_to_drop(example, limits)
        if example is not None and reason is None:
            examples.append(example)
            kept.append(index)
        else:
            reasons[index] = str(reason)
    triples = TokenisedTriples(examples, kept, reasons)
    if not examples:
        raise UserError(f"data: expected at least one usable record, got none: {triples}")
    return triples


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive lists of ``size`` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def join(left: str, right: str) -> str:
    """``left`` and ``right`` with one space between, unless white space is already there."""
    return left + right if left[-1:].isspace() or right[:1].isspace() else f"{left} {right}"


class Split(NamedTuple):
    """The two parts of a row."""

    start: list[int]
    response: list[int]


class TripleEncoder:
    """Turns triples into examples with a transformers tokenizer, by the rule of this file.

    Raises:
        ValueError: if the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("tokenizer: expected an eos_token to end a response with, got none")
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id  # of every response
        self._bos_ids, self._bos_text = _opening(tokenizer)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that each open a row."""
        return [self._bos_ids + row for row in self._ids([self._bos_text + t for t in texts])]

    def examples(self, records: Sequence[Mapping[str, Any]]) -> list[Example | None]:
        """The ids of triples; None where the response differs between query row and prompt row."""
        responses = [record["response"] for record in records]
        contexts = self.rows([record["context"] for record in records])
        queries = self._split([record["query"] for record in records], responses)
        prompts = self._split([self._prompt(r["context"], r["query"]) for r in records], responses)
        return list(map(self._example, records, contexts, queries, prompts))

    def asked(self, context: str, query: str) -> Example | None:
        """An example of which only what stands before the response counts; None where that depends
        on whether the context stands before the query.
        """
        (example,) = self.examples([{"context": context, "query": query, "response": _RESPONSE}])
        return example

    def _example(
        self, record: Mapping[str, Any], context: list[int], query: Split, prompt: Split
    ) -> Example | None:
        if not query.response or query.response != prompt.response:
            return None
        return Example(
            context=array("i", context),
            query=array("i", query.start),
            prompt=array("i", prompt.start),
            response=array("i", [*query.response, self.end]),
            texts=Texts(record["context"], record["query"], record["response"], record.get("id")),
            answers=tuple(record.get("answers") or [record["response"]]),
            context_loss=self.counting(record["context"], record.get("context_loss")),
        )

    def counting(
        self, context: str, spans: Sequence[Sequence[int]] | None
    ) -> tuple[bool, ...] | None:
        """Which tokens of a context row have a character in one of the spans."""
        if spans is None:
            return None
        if not self.tokenizer.is_fast:
            raise UserError(
                "context_loss: expected a fast tokenizer, which says where its tokens stand in a "
                f"text, got {type(self.tokenizer).__name__}"
            )
        opened = len(self._bos_text)
        places = self.tokenizer(
            self._bos_text + context,
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )["offset_mapping"]
        counts = [
            any(begin < end - opened and start - opened < stop for begin, stop in spans)
            for start, end in places
        ]
        return (*([False] * len(self._bos_ids)), *counts)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _prompt(self, context: str, query: str) -> str:
        return join(context, query)

    def _split(self, starts: Sequence[str], responses: Sequence[str]) -> list[Split]:
        joined = list(map(join, starts, responses))
        without = list(map(str.removesuffix, joined, responses))
        return list(map(split_at_common_prefix, self.rows(joined), self.rows(without)))


def split_at_common_prefix(ids: list[int], before: list[int]) -> Split:
    """``ids`` divided where they begin to differ from ``before``."""
    shared = sum(1 for _ in takewhile(bool, map(eq, ids, before)))
    return Split(ids[:shared], ids[shared:])


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """How a row begins: as ids put in front, or as text tokenised with the rest.

    Some tokenizers that put a dummy space before a text make it a token of its own ("▁", "On",
    "ce▁"), though their models were trained on texts that begin with a written BOS. There, and only
    there, writing BOS gives fewer tokens.
    """
    bos = tokenizer.bos_token_id
    bare = tokenizer(OPENING_WORDS, add_special_tokens=False)["input_ids"]
    if bos is None or tokenizer(OPENING_WORDS[0])["input_ids"][:1] != [bos]:
        return [], ""
    texts = [tokenizer.bos_token + word for word in OPENING_WORDS]
    written = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if sum(map(len, written)) < sum(len(row) + 1 for row in bare):
        return [], tokenizer.bos_token
    return [bos], ""


def _reason_to_drop(example: Example | None, limits: Limits) -> str | None:
    if example is None:
        return "response tokenised differently after query and prompt"
    if len(example.context) < 2:
        return "context of fewer than 2 tokens"
    if example.context_loss is not None and not any(example.context_loss[1:]):
        return "context_loss of no token with one before it"
    if not example.query:
        return "response with no token before it"
    lengths = {
        "context": (len(example.context), limits.context_tokens),
        "query and response": (len(example.query) + len(example.response), limits.query_tokens),
        "prompt and response": (len(example.prompt) + len(example.response), limits.prompt_tokens),
    }
    for name, (length, limit) in lengths.items():
        if length > limit:
            return f"{name} longer than {limit} tokens"
    return None
