"""Running text as rows of equal lengths, for L_LM on a general corpus."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .texts import UTF_8, read_text
from .tokenise import TripleEncoder, batched

LINES_AT_ONCE = 1000


def text_rows(
    path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int, encoding: str = UTF_8
) -> list[array[int]]:
    """The text of a file, gzipped or not, cut into rows of ``tokens`` tokens, opened as every row
    is (with BOS if the tokenizer opens texts with it). What is left at the end is dropped, and so
    are blank lines.

    Raises:
        ValueError: if the file has not enough text for a row.
    """
    encode = TripleEncoder(tokenizer)
    opened = array("i", encode.rows([""])[0])
    size, rest = tokens - len(opened), array("i")
    rows: list[array[int]] = []
    for lines in batched(_lines(read_text(path, encoding)), LINES_AT_ONCE):
        for ids in encode.rows(lines):
            rest.extend(ids[len(opened) :])
        whole = len(rest) // size * size
        rows += [opened + rest[start : start + size] for start in range(0, whole, size)]
        rest = rest[whole:]
    if not rows:
        raise UserError(f"{path}: expected text of at least {size} tokens, got {len(rest)}")
    return rows


def _lines(text: str) -> Iterator[str]:
    """The lines that are not blank, each with its end."""
    return (line + "\n" for line in text.splitlines() if line.strip())
