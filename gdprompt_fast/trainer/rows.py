"""The data sets of a MetaTrainer: tokenised once, and answered by the teacher before training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers.utils import logging

from ..data import Example, tokenise_triples
from ..data.tokenise import TokenisedTriples, keep_usable
from ..errors import UserError
from ..loading import check_same_vocabulary, check_vocabulary, max_prompt_length, positions
from ..meta.targets import TeacherTargets
from ..teacher import TeacherCache
from .arguments import MetaTrainingArguments
from .collate import NUMBER, MetaCollator, Row, example_of_ids, is_text, row_of

logger = logging.get_logger(__name__)


class Prepared:
    """Data sets as token ids, and, of the KL objective, what the teacher answers to them.

    Args:
        model: that is to be trained.
        teacher: the frozen one that answers; None for the gold objective.
    """

    def __init__(
        self,
        args: MetaTrainingArguments,
        collator: MetaCollator,
        model: nn.Module,
        teacher: nn.Module | None,
    ) -> None:
        self._args, self._collator, self._model = args, collator, model
        self._teacher: nn.Module | None = teacher
        self._ended = False
        self._caches: list[TeacherCache] = []
        self._starts: list[int] = []
        self._answered = 0
        room = positions(model)
        if teacher is not None:
            check_same_vocabulary(teacher, model)
            room = min(max_prompt_length(each, args.answer_tokens) for each in (model, teacher))
        self._limits = args.limits(room)

    def data(self, name: str, given: Any) -> Any:
        """A data set, or several by name, as rows of token ids; what streams stays as it is.

        Raises:
            UserError: naming the column, the rows or the data set that cannot be used.
        """
        if isinstance(given, dict):
            return {key: self.data(f"{name}-{key}", each) for key, each in given.items()}
        if given is None or (self._ended and _is_prepared(given)):
            return given
        kl = self._args.objective == "kl"
        if isinstance(given, IterableDataset) or not hasattr(given, "__len__"):
            if kl:
                raise UserError(
                    f'{name}_dataset: expected rows with a length for objective="kl", whose '
                    'teacher answers them before training, got a stream; objective="gold" takes it'
                )
            return given
        triples = self._tokenised(given)
        if triples.reasons:
            logger.warning(f"{name}_dataset: {triples}")
        check_vocabulary(triples.examples, self._model)
        examples = self._answers(name, triples.examples) if kl else triples.examples
        start = self._answered
        self._answered += len(examples)
        rows = [row_of(example) | {NUMBER: start + i} for i, example in enumerate(examples)]
        length = self._args.length_column_name
        return Dataset.from_list([row | {length: len(row["context"])} for row in rows])

    def end(self) -> None:
        """From here on the teacher is no longer what it was, or no longer needed."""
        self._teacher, self._ended = None, True

    def targets(self, numbers: Tensor) -> TeacherTargets:
        """The teacher's predictions of the responses of these rows, all of one data set."""
        place = bisect_right(self._starts, int(numbers[0])) - 1
        indices = (numbers - self._starts[place]).tolist()
        return self._caches[place].batch(indices)[1]

    def _tokenised(self, given: Any) -> TokenisedTriples:
        if not len(given):
            raise UserError("dataset: expected at least one row, got none")
        if not is_text(given[0]):
            return keep_usable(map(example_of_ids, _rows(given)), self._limits)
        encoder = self._collator.encoder
        if encoder is None:
            raise UserError("processing_class: expected a tokenizer for rows of texts, got None")
        return tokenise_triples(_rows(given), encoder.tokenizer, self._limits, type(encoder))

    def _answers(self, name: str, examples: list[Example]) -> list[Example]:
        """The examples with the teacher's answers as their responses."""
        if self._teacher is None:
            raise UserError(
                f'{name}_dataset: expected with objective="kl" a data set that was given to '
                "MetaTrainer, whose rows the initial model has answered, got another"
            )
        args = self._args
        folder = Path(args.teacher_cache or f"{args.output_dir}/_teacher", name)
        with args.main_process_first(local=False, desc="the teacher's answers"):
            cache = TeacherCache.build(
                folder, self._teacher, examples, args.answer_tokens, args.teacher_batch_size
            )
        self._caches.append(cache)
        self._starts.append(self._answered)
        return cache.answered


def _is_prepared(given: Any) -> bool:
    """Whether it is a data set of this trainer's, or rows selected from one."""
    return isinstance(given, Dataset) and NUMBER in given.column_names


def _rows(given: Any) -> Iterator[Row]:
    """All of them; of torch's data sets, which need not end by themselves, by their length."""
    return iter(given) if isinstance(given, Dataset) else (given[i] for i in range(len(given)))
