"""Grids of handwritten digits: the digits are a variable, a grid of labels is what it stands for.

A picture is a grid of images under a strip with the tag. A question highlights a cell; its target
has that cell's label and "no answer" elsewhere. A definition has a tag and the labels of all cells.
"""

from __future__ import annotations

import gzip
import importlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from .subsets import SUBSETS, in_subsets

STRIP = 4  # rows of the tag's pattern
SIDE = 28
HIGHLIGHT = 0.5  # added to the cell that is asked for
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True)
class Digits:
    """Images [N, side, side] of 0 to 1, by the digit they are of: the index of each, [10] lists."""

    images: Tensor
    of_digit: tuple[Tensor, ...]

    def drawn(self, digits: Tensor, generator: torch.Generator) -> Tensor:
        """An image at random for each of the digits [...], [..., side, side]."""
        sizes = torch.tensor([len(each) for each in self.of_digit])[digits]
        draws = (torch.rand(digits.shape, generator=generator, dtype=torch.float64) * sizes).long()
        return self.images[self._table[digits, draws]]

    @cached_property
    def _table(self) -> Tensor:
        """The indices of every digit, a row each, filled up with zeros."""
        longest = max(map(len, self.of_digit))
        return torch.stack([F.pad(each, (0, longest - len(each))) for each in self.of_digit])


def read_digits(folder: Path, split: str, side: int) -> Digits:
    """MNIST from the idx files in a folder, gzipped or not, or from torchvision's folder.

    Args:
        split: ``"train"`` or ``"test"``.
        side: of an image, a divisor of 28; smaller ones are means of 28 / side squared pixels.

    Raises:
        UserError: naming the folder, if it holds neither.
    """
    images, labels = (_idx(folder, name) for name in FILES[split])
    if images is None or labels is None:
        images, labels = _torchvision(folder, split)
    factor = SIDE // side
    small = F.avg_pool2d(images[:, None].float() / 255, factor)[:, 0]
    places = tuple((labels == digit).nonzero()[:, 0] for digit in range(10))
    if min(map(len, places)) == 0:
        raise UserError(f"files: expected images of all ten digits in {folder}, got fewer")
    return Digits(small, places)


def _idx(folder: Path, name: str) -> Tensor | None:
    """A file of the idx format, or None if it is not there."""
    for path in (folder / name, folder / f"{name}.gz"):
        if not path.is_file():
            continue
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        kind, dimensions = content[2:4] if len(content) > 4 else (0, 0)
        head = 4 + 4 * dimensions
        if content[:2] != b"\0\0" or kind != 8 or len(content) < head:
            raise UserError(f"files: expected bytes in the idx format in {path}, got others")
        shape = struct.unpack(f">{dimensions}I", content[4:head])
        values = torch.frombuffer(bytearray(content[head:]), dtype=torch.uint8)
        if values.numel() != torch.Size(shape).numel():
            raise UserError(f"files: expected {shape} values in {path}, got {values.numel()}")
        return values.reshape(shape)
    return None


def _torchvision(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    try:
        module = importlib.import_module("torchvision.datasets")
        data = module.MNIST(str(folder), train=split == "train", download=False)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"files: expected mnist=FOLDER with {', '.join(FILES[split])} or torchvision's MNIST, "
            f"got {folder} ({error})"
        ) from None
    return data.data, data.targets


@dataclass(frozen=True)
class Pairs:
    """Variables and what they stand for, P of them on N cells.

    Attributes:
        digits: [P, N].
        labels: [P, N], what is right.
        defined: [P, N], what definitions say.
        tags: [P], 1 to 3.
        asked: [P], whether questions on it are trained on.
        subset: the indices of each subset.
    """

    digits: Tensor
    labels: Tensor
    defined: Tensor
    tags: Tensor
    asked: Tensor
    subset: dict[str, Tensor]


def make_pairs(
    count: int, grid: int, labels: int, fractions: Mapping[str, float], seed: int
) -> Pairs:
    """Different variables of ``grid``² digits with random labels, of 0 to ``labels`` − 1; a wrong
    definition has another label in every cell.

    Raises:
        UserError: for wrong fractions, or too few pairs for them.
    """
    generator = torch.Generator().manual_seed(seed)
    cells = grid * grid
    if count > 10**cells:
        raise UserError(f"pairs: expected at most {10**cells} variables, got {count}")
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen[int(torch.randint(10**cells, (), generator=generator))] = None
    numbers = torch.tensor(list(chosen))
    digits = torch.stack([numbers // 10**cell % 10 for cell in range(cells)], 1)
    right = torch.randint(labels, (count, cells), generator=generator)
    other = torch.randint(1, labels, (count, cells), generator=generator)
    parts = {
        name: torch.tensor(members)
        for name, members in in_subsets(range(count), fractions, seed).items()
        if members
    }
    defined, tags, asked = right.clone(), torch.zeros(count).long(), torch.zeros(count).bool()
    for name, members in parts.items():
        its = SUBSETS[name]
        if not its.tag:
            raise UserError(f"fractions: expected subsets with tags 1 to 3, got {name!r}")
        tags[members], asked[members] = its.tag, its.asked
        if not its.right:
            defined[members] = (right[members] + other[members]) % labels
    return Pairs(digits, right, defined, tags, asked, parts)


def pictures(
    pairs: Pairs, which: Tensor, cells: Tensor, digits: Digits, generator: torch.Generator
) -> Tensor:
    """Pictures [B, 1, STRIP + grid · side, grid · side].

    Args:
        which: the pair of each, [B].
        cells: the cell that is asked for, [B], or −1: it is a definition.
    """
    drawn = digits.drawn(pairs.digits[which], generator).clone()  # [B, N, side, side]
    asked = cells >= 0
    drawn[asked.nonzero()[:, 0], cells[asked]] += HIGHLIGHT
    size, count, side = len(which), drawn.shape[1], drawn.shape[2]
    grid = round(count**0.5)
    body = drawn.view(size, grid, grid, side, side).permute(0, 1, 3, 2, 4)
    strips = _patterns(grid * side)[torch.where(asked, 0, pairs.tags[which])]
    return torch.cat([strips, body.reshape(size, grid * side, grid * side)], 1)[:, None]


def targets(pairs: Pairs, which: Tensor, cells: Tensor, no_answer: int) -> Tensor:
    """What is to be said of every cell, [B, N]."""
    defined = pairs.defined[which]
    alone = torch.full_like(defined, no_answer)
    at = cells.clamp(min=0)[:, None]
    alone.scatter_(1, at, pairs.labels[which].gather(1, at))
    return torch.where((cells >= 0)[:, None], alone, defined)


def _patterns(width: int) -> Tensor:
    """The strip of no tag, blank, and of tags 1 to 3, [4, STRIP, width]."""
    drawn = torch.randint(2, (3, STRIP, width), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.zeros(1, STRIP, width), drawn.float()])
