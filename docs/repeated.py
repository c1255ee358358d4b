"""The pairs of places in the repository that share six or more lines.

    python docs/repeated.py           # the pairs, the longest first; exit code 1 if there are more
                                      # than 40

Whitespace, comments and imports aside. Of a longer run of equal lines the whole is one pair; of
three equal places there are three.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLACES = "gdprompt_fast", "kernels", "csrc", "benchmarks", "tests", "docs", "examples"
LEAST_LINES, MOST_PAIRS = 6, 40


class Line(NamedTuple):
    number: int
    text: str


class Pair(NamedTuple):
    """Two places, ``file:line``, and the number of lines that they share."""

    lines: int
    one: str
    other: str


def code_lines(path: Path) -> list[Line]:
    """The lines that count, without the whitespace in them."""
    text = path.read_text(encoding="utf-8")
    without = _without_comments(text) if path.suffix == ".py" else text.splitlines()
    lines = (Line(n, "".join(line.split())) for n, line in enumerate(without, 1))
    return [line for line in lines if line.text and not line.text.startswith("//")]


def _without_comments(text: str) -> list[str]:
    """The lines of Python, those of imports and the comments empty."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[row - 1] = ""
    return lines


def repeated() -> list[Pair]:
    """The longest first."""
    files = {
        path.relative_to(ROOT).as_posix(): code_lines(path)
        for place in PLACES
        for path in sorted((ROOT / place).rglob("*"))
        if path.suffix in (".py", ".cpp", ".h")
    }
    starts: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, lines in files.items():
        for start in range(len(lines) - LEAST_LINES + 1):
            window = tuple(line.text for line in lines[start : start + LEAST_LINES])
            starts[window].append((name, start))
    equal = {pair for places in starts.values() for pair in combinations(places, 2)}
    pairs = []
    for (one, i), (other, j) in equal:
        if ((one, i - 1), (other, j - 1)) in equal:
            continue  # the middle of a longer run
        more = 1
        while ((one, i + more), (other, j + more)) in equal:
            more += 1
        where = (f"{name}:{files[name][at].number}" for name, at in ((one, i), (other, j)))
        pairs.append(Pair(LEAST_LINES + more - 1, *where))
    return sorted(pairs, key=lambda pair: (-pair.lines, pair.one, pair.other))


def main() -> int:
    found = repeated()
    for pair in found:
        print(f"{pair.lines:4d} lines  {pair.one}  {pair.other}")
    print(f"{len(found)} pairs of places share {LEAST_LINES} or more lines, at most {MOST_PAIRS}")
    return int(len(found) > MOST_PAIRS)


if __name__ == "__main__":
    sys.exit(main())
