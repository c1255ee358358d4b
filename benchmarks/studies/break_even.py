"""Where the dual form stops paying: applying an update through the context's tokens or forming it.

    python -m benchmarks.studies.break_even     # replaces results/break_even.jsonl

x W'ᵀ of M tokens after a context of S tokens adds −η (x Xᵀ) E, in M S (I + O) multiplications, or
−η x (Xᵀ E), in (M + S) I O. The engine takes the one with fewer, for every layer and pass. Both are
timed here in turns; ``ratio`` over 1 says that forming the update is faster.
"""

from __future__ import annotations

import statistics

import torch

from ..harness.rows import RESULTS, replace_rows, revision
from ..harness.timing import seconds_of
from ..report.tables import markdown

TOKENS = (64, 128, 256, 512, 1024, 2048)  # of the context and of the query
WIDTHS = (512, 1024)
ROUNDS = 15


def measure(width: int, tokens: int) -> dict[str, float]:
    x, key, value = torch.randn(3, tokens, width)
    cpu = torch.device("cpu")

    def through_tokens() -> torch.Tensor:
        return (x @ key.T) @ value

    def formed() -> torch.Tensor:
        return x @ (key.T @ value)

    times = [(seconds_of(cpu, through_tokens), seconds_of(cpu, formed)) for _ in range(ROUNDS)]
    times = times[1:]  # the first round warms up
    return dict(
        width=width,
        tokens=tokens,
        ratio=statistics.median(through / whole for through, whole in times),
        counted_ratio=tokens / width,
        through_tokens_ms=1e3 * statistics.median(through for through, _ in times),
        formed_ms=1e3 * statistics.median(whole for _, whole in times),
    )


def main() -> None:
    common = dict(revision=revision(), threads=torch.get_num_threads(), torch=torch.__version__)
    rows = [{**measure(width, tokens), **common} for width in WIDTHS for tokens in TOKENS]
    replace_rows(RESULTS / "break_even.jsonl", rows)
    header = [
        "width",
        "tokens of context and query",
        "forming is so many times as fast",
        "by count",
    ]
    lines = [
        (row["width"], row["tokens"], f"{row['ratio']:.2f}", f"{row['counted_ratio']:.2f}")
        for row in rows
    ]
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
