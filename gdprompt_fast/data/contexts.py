"""Contexts alone, to be learnt: text files, and the contexts of a JSONL file, each once."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .texts import UTF_8, read_text
from .tokenise import TripleEncoder
from .triples import CONTEXT_LOSS, ID, check_spans, check_text, read_objects

NAMES = ("context", "privileged_context", "text", "prompt")
OF_A_FOLDER = re.compile(r"[\w-][\w.-]*")

Spans = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Context:
    """A text to be learnt.

    Attributes:
        name: no other context's; a folder can have it.
        text: what it says.
        spans: the parts of it that count in the inner step; None: all of it.
        file, line: where it was read; line 0: it is a file of its own.
    """

    name: str
    text: str
    spans: Spans | None
    file: Path
    line: int


@dataclass(frozen=True)
class ContextRow:
    """The tokens of a context.

    Attributes:
        ids: of its row, opened as every row is.
        counts: for every token whether its NLL counts; None: all do.
    """

    ids: array[int]
    counts: tuple[bool, ...] | None


def read_contexts(
    texts: Sequence[Path],
    data: Path | None = None,
    encoding: str = UTF_8,
    taken: Sequence[str] = (),
) -> list[Context]:
    """The contexts of text files, one each, and of the records of a JSONL file or JSON array: of
    those with the same context one. They are named by a file's stem, a record's "id", or its line.

    Args:
        taken: names that none of them is to have.

    Raises:
        UserError: naming the file and the line, if one has no text; if there is no context.
    """
    found: dict[tuple[str, str], Context] = {}
    for path in texts:
        if not path.is_file():
            raise UserError(f"text: expected a text file, got {path}")
        text = read_text(path, encoding).strip()
        if not text:
            raise UserError(f"text: expected a text in {path}, got none")
        found.setdefault((text, str(None)), Context(path.stem, text, None, path, 0))
    for line, content in [] if data is None else read_objects(data, "contexts", encoding):
        assert data is not None
        context = _of_record(content, data, line)
        found.setdefault((context.text, str(context.spans)), context)
    if not found:
        raise UserError(f"data: expected at least one record in {data}, got none")
    return _named_apart([*found.values()], taken)


def encode_contexts(contexts: Sequence[Context], encoder: TripleEncoder) -> list[ContextRow]:
    """The rows of contexts, as an example's :attr:`gdprompt_fast.data.Example.context` is one."""
    rows = encoder.rows([context.text for context in contexts])
    counts = [encoder.counting(context.text, context.spans) for context in contexts]
    return [ContextRow(array("i", row), own) for row, own in zip(rows, counts, strict=True)]


def reason_to_drop_context(row: ContextRow, limit: int) -> str | None:
    """Why a context cannot be learnt; None if it can."""
    if len(row.ids) < 2:
        return "context of fewer than 2 tokens"
    if len(row.ids) > limit:
        return f"context longer than {limit} tokens"
    if row.counts is not None and not any(row.counts[1:]):
        return "context_loss of no token with one before it"
    return None


def _of_record(content: Any, path: Path, line: int) -> Context:
    where = f"{path}, line {line}"
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(content).__name__}")
    name = next((each for each in NAMES if each in content), None)
    if name is None:
        raise UserError(f'{where}: expected the field "context", got only {sorted(content)}')
    text, spans = check_text(content[name], name, where), content.get(CONTEXT_LOSS)
    if spans is not None:
        spans = check_spans(spans, len(text), where)
    return Context(str(content.get(ID) or line), text, spans, path, line)


def _named_apart(contexts: Sequence[Context], others: Sequence[str]) -> list[Context]:
    """The contexts with names that folders can have side by side, and beside others, also where
    case is nothing.
    """
    taken = {name.casefold() for name in others}
    named = []
    for context in contexts:
        name = re.sub(r"[^\w.-]", "_", context.name)[:90]
        base = name if OF_A_FOLDER.fullmatch(name) else f"_{name}"
        number, name = 1, base
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        named.append(Context(name, context.text, context.spans, context.file, context.line))
    return named
