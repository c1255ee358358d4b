"""What of an outer step one of several processes takes, and what they found together."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.alike import check_same_weights
from ..distributed.group import check_same, share, summed, world_size
from .options import StepOptions

Unit = list[int]


def check_alike(model: nn.Module, start: int, read: Iterable[Any]) -> None:
    """That all processes begin at the same step with the same weights, examples and options.

    Args:
        read: the examples and options, each with a ``repr`` that tells it from any other.

    Raises:
        UserError: naming the process that does not.
    """
    if world_size() > 1:
        check_same("output: the step of its checkpoint", start)
        digest = hashlib.sha256()
        for each in read:
            digest.update(repr(each).encode())
        check_same("data: the hash of examples and options", digest.hexdigest()[:16])
    check_same_weights("model", model)


@dataclass(frozen=True)
class Share:
    """The units of a step that are this process's, in whole groups; there may be none.

    Attributes:
        units: those, of the units drawn.
        part: this process's part of the groups drawn.
        counts: the denominators of the whole step, as the engine takes them.
        texts: its rows of running text; None where the step has none.
    """

    units: list[Unit]
    part: float
    counts: Mapping[str, int]
    texts: Sequence[array[int]] | None = None

    @staticmethod
    def of(
        drawn: Sequence[Unit], options: StepOptions, texts: Sequence[array[int]] | None = None
    ) -> Share:
        """Of the units and the rows of text of a step, which all processes draw alike."""
        size = options.contexts_per_group
        groups = [drawn[start : start + size] for start in range(0, len(drawn), size)]
        own = share(groups)
        queries = sum(map(len, drawn))
        rows = queries if options.lm_on == "prompts" else len(drawn)
        counts = {"query_count": queries, "lm_count": rows if texts is None else len(texts)}
        own_texts = None if texts is None else share(texts)
        units = [unit for group in own for unit in group]
        return Share(units, len(own) / len(groups), counts, own_texts)

    def of_all(
        self, row: Mapping[str, Any], real: int, computed: int, like: Tensor
    ) -> dict[str, Any]:
        """Losses of all processes, whether all are finite, and their share of padding.

        Args:
            row: what there is of this process: its shares of losses, as tensors [], and what all
                know; but of the inner loss its mean.
            real, computed: the positions of this process's rows, without and with padding.
            like: a tensor on the device of the losses.
        """
        if world_size() == 1:
            return {**row, "padding": 1 - real / computed}
        own = {name: value for name, value in row.items() if isinstance(value, Tensor)}
        if "inner_loss" in own:
            own["inner_loss"] = own["inner_loss"] * self.part
        counts = torch.tensor([real, computed], dtype=torch.float64).to(like.device)
        numbers = torch.stack([*(value.double() for value in own.values()), *counts])
        *of_all, real_of_all, computed_of_all = summed(numbers)
        together = {**row, **dict(zip(own, of_all, strict=True))}
        if "found_inf" in together:
            together["found_inf"] = (together["found_inf"] > 0).float()
        return {**together, "padding": 1 - real_of_all / computed_of_all}
