"""The three settings: No Context, Prompt and Fine-Tuning."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.progress import progress_bar
from ..data import Example, Size, batched, by_length, end_token, response_rows
from ..distributed.group import shared_work, world_size
from ..distributed.sharded import is_sharded
from ..errors import UserError
from ..loading import positions
from ..teacher import greedy_answers
from .adapted import InnerStep, adapted_one_after_another, adapted_to_contexts, check_inner_step
from .answers import decode
from .scores import Scores, score_rows

SETTINGS = {"no_context": "No Context", "prompt": "Prompt", "fine_tuning": "Fine-Tuning"}

Adapt = Callable[[list[Example]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Answerer:
    """Generates greedy answers of at most ``max_tokens`` up to the token ``end``, as texts."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    end: int

    def answers(self, model: nn.Module, starts: Sequence[Sequence[int]]) -> list[str]:
        """What the model says after each start."""
        ids = greedy_answers(model, starts, self.end, self.max_tokens)
        return [decode(self.tokenizer, answer) for answer in ids]


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    inner: InnerStep,
    batch_size: int,
    *,
    settings: Iterable[str] = tuple(SETTINGS),
    answer_tokens: int = 32,
    contexts_per_group: int = 1,
    one_after_another: bool = False,
    group_by_length: bool = False,
) -> dict[str, Scores]:
    """The scores of the gold responses, and of generated answers, by setting.

    - ``no_context``: the query alone, at θ;
    - ``prompt``: context ⊕ query, at θ;
    - ``fine_tuning``: the query alone, at θ', an inner step on the example's context away.

    With several contexts a group, the scores are of the examples in whole groups only: of N
    examples the last N mod ``contexts_per_group`` are left out, in every setting.

    Args:
        batch_size: examples at once, in whole groups.
        settings: those to evaluate, of ``SETTINGS``.
        answer_tokens: the longest answer generated; 0 for none, which saves most of the time where
            the gold responses' NLL and accuracy are enough.
        contexts_per_group: so many consecutive examples share one θ', adapted to all of their
            contexts: by an inner step on the mean of their losses. A context that two examples of
            a group have counts twice, so shuffle examples that come in order of their contexts.
        one_after_another: by an inner step on each context in turn instead; slower, a group at a
            time, and with a copy of the moved weights.
        group_by_length: groups of about equal lengths are evaluated together, the longest first;
            the scores are in the order of the examples all the same.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
        FloatingPointError: if an inner loss is not finite; contexts one after another may diverge,
            and are then answered wrong.
    """
    settings = list(settings)
    examples = whole_groups(examples, contexts_per_group)
    _check_evaluation(model, examples, batch_size, settings, answer_tokens)
    if "fine_tuning" in settings:
        check_inner_step(model, inner, one_after_another)
    end = end_token(examples)
    answerer = Answerer(tokenizer, answer_tokens, end) if answer_tokens else None
    scores = {}
    for setting in settings:
        if setting == "fine_tuning":
            grouping = contexts_per_group, one_after_another, group_by_length
            scores[setting] = fine_tuning_scores(
                model, examples, inner, batch_size, *grouping, answerer
            )
        else:
            order = _order(examples, setting, 1) if group_by_length else range(len(examples))
            scores[setting] = _scores(
                model, examples, order, setting, batch_size, _at_theta, answerer
            )
    return scores


def whole_groups(examples: Sequence[Example], contexts_per_group: int) -> Sequence[Example]:
    """The examples without the last ones that are too few for a group.

    Raises:
        ValueError: if there is not one whole group.
    """
    if contexts_per_group < 1:
        raise UserError(f"contexts_per_group: expected an integer >= 1, got {contexts_per_group}")
    if len(examples) < contexts_per_group:
        raise UserError(
            f"contexts_per_group: expected at most the number of examples, {len(examples)}, "
            f"got {contexts_per_group}"
        )
    return examples[: len(examples) // contexts_per_group * contexts_per_group]


def fine_tuning_scores(
    model: nn.Module,
    examples: Sequence[Example],
    inner: InnerStep,
    batch_size: int,
    contexts_per_group: int = 1,
    one_after_another: bool = False,
    group_by_length: bool = False,
    answerer: Answerer | None = None,
) -> Scores:
    """The responses scored after the query alone, at the θ' of their groups, a batch at once.

    The arguments are those of :func:`evaluate`.
    """

    def adapt(batch: list[Example]) -> AbstractContextManager[None]:
        if one_after_another:
            return adapted_one_after_another(model, batch, inner)
        return adapted_to_contexts(model, batch, inner, contexts_per_group)

    groups_at_once = 1 if one_after_another else max(1, batch_size // contexts_per_group)
    size = groups_at_once * contexts_per_group
    order: Sequence[int] = range(len(examples))
    if group_by_length:
        order = _order(examples, "fine_tuning", contexts_per_group)
    return _scores(model, examples, order, "fine_tuning", size, adapt, answerer)


def _order(examples: Sequence[Example], setting: str, contexts_per_group: int) -> list[int]:
    """The examples in groups of about equal lengths, the longest first: one that is too long for
    the memory fails at once.
    """
    starts = _starts(examples, setting)
    rows = [len(start) + len(e.response) for start, e in zip(starts, examples, strict=True)]
    contexts = [len(e.context) if setting == "fine_tuning" else 0 for e in examples]
    groups = [
        range(first, first + contexts_per_group)
        for first in range(0, len(examples), contexts_per_group)
    ]
    sizes = [sorted([max(of[i] for i in group) for of in (rows, contexts)]) for group in groups]
    order = by_length([Size(long, short) for short, long in sizes])
    return [index for number in reversed(order) for index in groups[number]]


def _at_theta(batch: list[Example]) -> AbstractContextManager[None]:
    return nullcontext()


def _scores(
    model: nn.Module,
    examples: Sequence[Example],
    order: Sequence[int],
    setting: str,
    batch_size: int,
    adapt: Adapt,
    answerer: Answerer | None,
) -> Scores:
    """The scores in one setting, batch by batch, each with the model that ``adapt`` makes for it.

    The model's answers are the same for every size of the batches, up to rounding.
    """
    batches = list(batched((examples[index] for index in order), batch_size))
    with progress_bar(len(examples), f"evaluating {SETTINGS[setting]}", "ex", leave=False) as bar:

        def score(batch: list[Example]) -> Scores:
            with adapt(batch):
                scores = _score_batch(model, batch, _starts(batch, setting), answerer)
            bar.update(len(batch) * world_size())
            return scores

        parts = shared_work(batches, score, (FloatingPointError,), together=is_sharded(model))
    places = sorted(range(len(order)), key=order.__getitem__)
    return Scores.concatenate(parts).reordered(places)


def _score_batch(
    model: nn.Module,
    batch: Sequence[Example],
    starts: Sequence[array[int]],
    answerer: Answerer | None,
) -> Scores:
    rows = response_rows(starts, [example.response for example in batch])
    scores = score_rows(model, rows.to(next(model.parameters()).device))
    if answerer is None:
        return scores
    return scores.with_answers(answerer.answers(model, starts), [e.answers for e in batch])


def _starts(examples: Sequence[Example], setting: str) -> list[array[int]]:
    """What stands before the response: context ⊕ query for Prompt, else the query alone."""
    return [example.prompt if setting == "prompt" else example.query for example in examples]


def _check_evaluation(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    settings: Sequence[str],
    answer_tokens: int,
) -> None:
    unknown = [setting for setting in settings if setting not in SETTINGS]
    if unknown or not settings:
        raise UserError(f"settings: expected some of {list(SETTINGS)}, got {settings}")
    if batch_size < 1:
        raise UserError(f"batch_size: expected an integer >= 1, got {batch_size}")
    if answer_tokens < 0:
        raise UserError(f"answer_tokens: expected an integer >= 0, got {answer_tokens}")
    if not answer_tokens:
        return
    if not all(example.answers for example in examples):
        raise UserError(
            "examples: expected gold answers to compare generated ones with, got an example "
            "without; tokenise_triples keeps them, answer_tokens=0 does without"
        )
    longest = max(len(start) for setting in settings for start in _starts(examples, setting))
    if longest + answer_tokens > positions(model):
        raise UserError(
            f"answer_tokens: expected at most {positions(model) - longest} after a row of "
            f"{longest} tokens, with the model's {positions(model)} positions, got {answer_tokens}"
        )
