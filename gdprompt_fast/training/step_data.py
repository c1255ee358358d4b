"""What one outer step is taken on, from examples to the arguments of the engine."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import MetaBatch
from ..data import Example, meta_batch, moved, pad, prompt_rows
from ..layout import rung
from ..meta.lm_batch import LMBatch
from ..meta.targets import TeacherTargets
from ..teacher import Teacher
from .options import StepOptions, TrainOptions


class LeastSizes(NamedTuple):
    """Sizes that every step of a training is padded to, so that one captured step serves all."""

    context_tokens: int
    query_tokens: int
    group_responses: int

    @staticmethod
    def of(examples: Sequence[Example], options: TrainOptions) -> LeastSizes | None:
        """The longest rows of the examples; None where batches are of like lengths, whose shorter
        ones would be mostly padding.
        """
        if options.group_by_length:
            return None
        response = max(len(example.response) for example in examples)
        if options.objective == "kl":
            response = options.answer_tokens
        return LeastSizes(
            context_tokens=max(len(example.context) for example in examples),
            query_tokens=max(len(example.query) for example in examples) + response,
            group_responses=options.contexts_per_group * options.queries_per_context * response,
        )


@dataclass(frozen=True)
class StepData:
    """Examples in units with one context each.

    Attributes:
        units: the examples, with the responses that they came with.
        answered: all of them in a row, with the responses that the step asks for: those of the
            teacher, if there is one.
        targets: the teacher's predictions of these responses; None for the gold objective.
        texts: rows of running text for L_LM, in the place of what ``lm_on`` says; None: as it says.
    """

    units: Sequence[Sequence[Example]]
    answered: Sequence[Example]
    targets: TeacherTargets | None = None
    texts: Sequence[array[int]] | None = None

    @staticmethod
    def of(
        examples: Sequence[Example],
        units: Sequence[Sequence[int]],
        teacher: Teacher | None,
        texts: Sequence[array[int]] | None = None,
    ) -> StepData:
        """Of the examples with these indices, answered by the teacher, if there is one."""
        drawn = [[examples[index] for index in unit] for unit in units]
        if teacher is None:
            answered = [example for unit in drawn for example in unit]
            return StepData(drawn, answered, texts=texts)
        indices = [index for unit in units for index in unit]
        return StepData(drawn, *teacher.batch(indices), texts)

    @property
    def tokens(self) -> int:
        """The tokens in the contexts and the query rows."""
        contexts = sum(len(unit[0].context) for unit in self.units)
        rows = (example for unit in self.units for example in unit)
        return contexts + sum(len(example.query) + len(example.response) for example in rows)

    def arguments(
        self,
        model: nn.Module,
        options: StepOptions,
        ladder: bool = False,
        least: LeastSizes | None = None,
    ) -> dict[str, Any]:
        """What :func:`gdprompt_fast.fast_meta_step` takes beside model and configuration: of the
        units ``contexts_per_group`` neighbours share one θ'.

        Args:
            ladder: a step that is taken at once is padded to sizes of the ladder of captured steps
                here, on the host.
            least: then to no less than these.
        """
        device: torch.device = next(model.parameters()).device

        def there(tensor: Tensor) -> Tensor:
            return moved(tensor, device)

        context_of = [number for number, unit in enumerate(self.units) for _ in unit]
        batch = MetaBatch.padding()  # of a process without a share of the step
        if self.units:
            batch = meta_batch(self.answered, context_of, options.contexts_per_group)
        at_once = options.step_config.micro_groups is None
        lm_batch = self._lm_batch(options)
        if ladder and at_once:
            shape = batch.layout.shape
            shape = shape if least is None else shape.at_least(*least)
            batch = batch.padded(shape.rung())
            lm_batch = None if lm_batch is None else lm_batch.on_ladder()
        return {
            "batch": batch.map(there),
            "teacher": self.targets,
            "lm_batch": None if lm_batch is None else lm_batch.map(there),
        }

    def _lm_batch(self, options: StepOptions) -> LMBatch | None:
        """The rows of L_LM; None where it is on the contexts, or counts for nothing."""
        if not options.lm_weight:
            return None
        if self.texts is None and options.lm_on == "contexts":
            return None
        if not (self.units if self.texts is None else self.texts):
            return LMBatch.padding()  # of a process without a share of the step
        if self.texts is not None:
            return LMBatch(*pad(self.texts))
        prompts = prompt_rows([example for unit in self.units for example in unit])
        return LMBatch(prompts.ids, prompts.mask)


def padding_of(batch: MetaBatch, micro_groups: int | None, ladder: bool) -> float:
    """The share of padding in what :func:`positions_of` counts."""
    real, computed = positions_of(batch, micro_groups, ladder)
    return 1 - real / computed


def positions_of(batch: MetaBatch, micro_groups: int | None, ladder: bool) -> tuple[int, int]:
    """The positions of context and query rows that a step computes: the real ones, and all.

    Args:
        micro_groups: groups at a time, whose rows are as long as their longest.
        ladder: these parts, too, are padded to sizes of the ladder of captured steps.
    """
    host, tokens, computed = batch.host, 0, 0
    for mask, group_B in (
        (host.context_mask, host.context_group),
        (host.query_mask, host.query_group),
    ):
        length_B = mask.sum(1)
        tokens += int(length_B.sum())
        if micro_groups is None or micro_groups >= batch.groups:
            computed += mask.numel()
            continue
        part_B = group_B // micro_groups
        rows_P = torch.bincount(part_B)
        width_P = torch.zeros_like(rows_P).scatter_reduce(0, part_B, length_B, "amax")
        if ladder:  # all to one shape
            computed += len(rows_P) * int(rows_P.max()) * rung(int(width_P.max()))
        else:
            computed += int((rows_P * width_P).sum())
    return tokens, computed
