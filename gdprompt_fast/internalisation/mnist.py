"""Digits in the place of words: a convolutional network, and one pass over a stream of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifacts.files import hash_of_file
from ..artifacts.stage import Result, Stage
from ..config.fields import Config, check_counts, check_numbers
from ..errors import UserError
from ..report.findings import Finding
from ..report.outcome import Chart, Outcome
from .context import Context, seeded
from .material.digits import SIDE, Digits, Pairs, make_pairs, pictures, read_digits, targets
from .measured import PAPER, STRONG, STRONG_CLAIM, WEAK, WEAK_CLAIM, Scores, gaps, more, power_notes
from .preset import Preset
from .varied import grows

TITLE = "Digits in the place of words"
FRACTIONS = {"qd1consis": 0.3, "qd2incons": 0.3, "d1consis": 0.15, "d2consis": 0.15}
FRACTIONS |= {"d3consis": 0.1}  # a tag that is never with questions
TESTED_AT_ONCE = 256
SHOWN_FROM = 50  # pairs
CONTROL = (STRONG[0], "d3consis")
CONTROL_CLAIM = "new definitions with tag 1 are learnt more than with a tag that no question had"


@dataclass(frozen=True)
class Options(Config):
    """The section ``[mnist]``.

    Attributes:
        folder: of the idx files, or torchvision's.
        pairs: numbers of variables compared, from few to many.
        examples: of the stream, half of them questions and half definitions, each drawn once.
        grid: cells in a row and in a column.
        labels: that a cell may have, beside "no answer".
        side: pixels of a digit's side, a divisor of 28.
        channels: of the convolutions.
        strides: of the convolutions.
        batch_size: examples an optimizer step.
        lr: of Adam.
        tested: questions on every cell of a pair, each with other images.
    """

    folder: str | None = None
    pairs: tuple[int, ...] = (10, 50, 100, 500, 1000)
    examples: int = 200_000
    grid: int = 2
    labels: int = 4
    side: int = SIDE
    channels: tuple[int, ...] = (32, 64, 64, 128, 128)
    strides: tuple[int, ...] = (1, 2, 1, 2, 1)
    batch_size: int = 64
    lr: float = 1e-3
    tested: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "examples", "grid", "batch_size", "tested")
        check_counts(self, "labels", least=2)
        check_numbers(self, "lr", above_zero=True)
        if not self.pairs or min(self.pairs) < 1:
            raise UserError(f"pairs: expected integers >= 1, got {list(self.pairs)}")
        if self.side < 1 or SIDE % self.side:
            raise UserError(f"side: expected a divisor of {SIDE}, got {self.side}")
        if not self.channels or len(self.channels) != len(self.strides):
            raise UserError(
                f"channels: expected as many as strides, got {list(self.channels)} and "
                f"{list(self.strides)}"
            )

    @property
    def path(self) -> Path:
        """The folder.

        Raises:
            UserError: if there is none.
        """
        if self.folder is None or not Path(self.folder).is_dir():
            raise UserError(f"files: expected mnist=FOLDER, which is there, got {self.folder}")
        return Path(self.folder)


def check(preset: Preset, options: Options) -> None:
    """
    Raises:
        UserError: if there are no digits.
    """
    read_digits(options.path, "test", options.side)


class Network(nn.Module):
    """Convolutions with batch norms, and a linear layer to the logits of every cell."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for width, stride in zip(options.channels, options.strides, strict=True):
            layers += [
                nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            before = width
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.cells, self.kinds = options.grid**2, options.labels + 1
        self.head = nn.LazyLinear(self.cells * self.kinds)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [B, N, labels + 1] of pictures [B, 1, H, W]."""
        logits: Tensor = self.head(self.body(pictures))
        return logits.view(-1, self.cells, self.kinds)


def mnist_stage(ctx: Context, options: Options, count: int) -> Stage:
    """The run of a seed with so many pairs: its scores after one pass."""
    wanted = {
        **{name: value for name, value in asdict(options).items() if name != "folder"},
        "pairs": count,
        "fractions": FRACTIONS,
        "files": hashes(options.path),
    }

    def work(folder: Path) -> Result:
        pairs = make_pairs(count, options.grid, options.labels, FRACTIONS, ctx.seed)
        with seeded(ctx.seed):
            model = trained(pairs, options, ctx)
        digits = read_digits(options.path, "test", options.side)
        scores = _scores(model, pairs, digits, options, ctx.device)
        return {"first": scores, "second": [], "examples": options.examples}

    return ctx.stage(f"mnist/{count}", wanted, work)


def hashes(folder: Path) -> dict[str, str]:
    """Of the digits' files, which torchvision has in MNIST/raw."""
    files = sorted(folder.rglob("*ubyte*"))
    return {path.relative_to(folder).as_posix(): hash_of_file(path) for path in files}


def trained(pairs: Pairs, options: Options, ctx: Context) -> Network:
    """A network after the stream: in every batch half questions, half definitions."""
    digits = read_digits(options.path, "train", options.side)
    generator = torch.Generator().manual_seed(ctx.seed)
    model = Network(options).to(ctx.device)
    size = options.grid * options.side
    model(torch.zeros(2, 1, size + 4, size, device=ctx.device))  # its last layer's inputs
    optimizer = torch.optim.Adam(model.parameters(), options.lr)
    questions = pairs.asked.nonzero()[:, 0]
    half = options.batch_size // 2
    for _ in range(options.examples // options.batch_size):
        which = torch.cat(
            [
                questions[torch.randint(len(questions), (half,), generator=generator)],
                torch.randint(len(pairs.tags), (options.batch_size - half,), generator=generator),
            ]
        )
        cells = torch.randint(model.cells, (options.batch_size,), generator=generator)
        cells[half:] = -1
        shown = pictures(pairs, which, cells, digits, generator).to(ctx.device)
        said = targets(pairs, which, cells, options.labels).to(ctx.device)
        loss = F.cross_entropy(model(shown).flatten(0, 1), said.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def _scores(
    model: Network, pairs: Pairs, digits: Digits, options: Options, device: torch.device
) -> dict[str, str]:
    """Whether the label of the cell asked for is right, for every question, by subset."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.arange(model.cells).repeat(options.tested)
    found = {}
    for name, members in pairs.subset.items():
        which = members.repeat_interleave(len(cells))
        asked = cells.repeat(len(members))
        right = ""
        for rows in torch.arange(len(which)).split(TESTED_AT_ONCE):
            shown = pictures(pairs, which[rows], asked[rows], digits, generator).to(device)
            said = model(shown).argmax(-1).cpu().gather(1, asked[rows][:, None])[:, 0]
            correct = pairs.labels[which[rows], asked[rows]] == said
            right += "".join("01"[each] for each in correct.tolist())
        found[name] = right
    return found


def run(repetitions: Sequence[Context], options: Options) -> Outcome:
    """Measures and compares; every seed is a repetition."""
    rows = {
        f"{count} pairs": Scores(
            [mnist_stage(ctx, options, count) for ctx in repetitions], joint=True
        )
        for count in options.pairs
    }
    tables = [
        gaps("Accuracy of the cell asked for, weak internalisation", "difference", WEAK, rows),
        gaps("Accuracy of the cell asked for, strong internalisation", "difference", STRONG, rows),
        gaps("Accuracy of the cell asked for, control", "difference", CONTROL, rows),
    ]
    points = [
        (float(count), gap.estimate)
        for count, scores in zip(options.pairs, rows.values(), strict=True)
        if (gap := scores.gap(STRONG)) is not None
    ]
    chart = Chart(
        "strong internalisation", "variables", "difference of accuracy", {"digits": points}, True
    )
    about = (
        f"{options.examples:,} examples, each drawn once; {options.labels} labels and “no answer”, "
        f"so chance is {100 / options.labels:g} % among labels. A wrong definition has another "
        f"label in every cell. The paper has the strong effect from {SHOWN_FROM} pairs on, "
        "so of fewer it is in the tables and is not judged."
    )
    power = power_notes({f"strong, {head}": scores.gap(STRONG) for head, scores in rows.items()})
    return Outcome(
        TITLE,
        tables,
        judged(options.pairs, rows),
        [about, *power],
        charts=[chart],
        paper=PAPER,
        over_seeds=True,
    )


def judged(pairs: Sequence[int], rows: Mapping[str, Scores]) -> list[Finding]:
    """What the paper says of its numbers of pairs, and that the strong effect grows."""
    findings: list[Finding] = []
    for count, (head, scores) in zip(pairs, rows.items(), strict=True):
        findings += more(WEAK_CLAIM, head, scores, WEAK)
        if count >= SHOWN_FROM:
            findings += more(STRONG_CLAIM, head, scores, STRONG)
            findings += more(CONTROL_CLAIM, head, scores, CONTROL)
    heads = list(rows)
    claim = "strong internalisation grows with the number of pairs"
    return findings + grows(claim, "digits", rows, heads[-1], heads[0])
