"""``gdprompt evaluate``: a model without the context, with it, and after the inner step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.files import write_json
from ..artifacts.outputs import is_marked, written_by
from ..config.fields import option
from ..errors import UserError
from ..evaluation import (
    InnerStep,
    check_inner_step,
    check_squad_ids,
    tune_inner_lr,
    whole_groups,
    write_predictions,
    write_squad_predictions,
)
from ..evaluation import (
    evaluate as scores_of,
)
from ..loading import max_prompt_length
from ..models.inner_params import INNER_PARAMS
from ..report import results_table
from .command import command, outputs_of
from .groups import (
    ExamplesConfig,
    ModelConfig,
    dtype_field,
    eval_batch_size_field,
    inner_lr_grid_field,
    overwrite_field,
)
from .reading import Reader, write_dropped
from .results import TestSet, as_results, summaries


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ExamplesConfig, ModelConfig):
    """What to evaluate, on what, after which inner step."""

    command = "evaluate"

    eval_batch_size: int = eval_batch_size_field()
    dtype: str = dtype_field()
    inner_lr: float = option(1e-3, "rate η of the inner step")
    inner_steps: int = option(1, "inner steps on a context")
    inner_params: str = option("full", "what the inner step moves", INNER_PARAMS)
    tune_inner_lr: bool = option(False, "take the best rate of the grid instead")
    inner_lr_grid: tuple[float, ...] = inner_lr_grid_field()
    contexts_per_group: int = option(1, "examples that share one inner step")
    one_after_another: bool = option(
        False, "an inner step on each context of a group in turn, not one on all of them"
    )
    group_by_length: bool = option(
        True, "examples of about equal lengths together, which leaves little padding"
    )
    answer_tokens: int = option(32, "longest answer generated; 0: none are")
    results: Path | None = option(None, "JSON file to write the results to", writes=True)
    predictions: Path | None = option(None, "JSONL file to write every answer to", writes=True)
    squad_predictions: Path | None = option(
        None,
        "JSON file to write Fine-Tuning's answers to by id, as SQuAD's official script takes",
        writes=True,
    )
    overwrite: bool = overwrite_field(
        "replace files that exist; --results and --dropped of this command need no leave"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.squad_predictions and not self.answer_tokens:
            raise UserError(
                "squad_predictions: expected answer_tokens >= 1, got 0: there is no answer"
            )

    @property
    def inner(self) -> InnerStep:
        """The inner step asked for."""
        return InnerStep(self.inner_lr, self.inner_steps, self.inner_params)

    @property
    def grouping(self) -> dict[str, Any]:
        """Which contexts share an inner step, as :func:`gdprompt_fast.evaluation.evaluate` takes
        it.
        """
        return {
            "contexts_per_group": self.contexts_per_group,
            "one_after_another": self.one_after_another,
        }


@command(
    "No Context, Prompt and Fine-Tuning: accuracy and NLL of gold responses, exact match and F1 of "
    "generated answers.",
    shared=True,
)
def evaluate(config: EvaluateConfig) -> Callable[[], dict[str, Any]]:
    """Loads model and examples; the work is to score, and returns the summaries."""
    outputs, grouping = outputs_of(config), config.grouping
    together = config.group_by_length
    outputs.check_file("results", config.results, lambda path: is_marked(path, "evaluate"))
    outputs.check_file("predictions", config.predictions)
    outputs.check_file("squad_predictions", config.squad_predictions)
    model, tokenizer = config.load(config.dtype)
    check_inner_step(model, config.inner, config.one_after_another)
    room = max_prompt_length(model, config.answer_tokens)
    reader = Reader.of(config)
    triples = reader.examples(config.data, model, tokenizer, config.limits(room))
    test = TestSet(triples, config.inner_lr_grid, config.eval_batch_size, config.answer_tokens)
    examples = whole_groups(test.examples, config.contexts_per_group)
    if config.squad_predictions:
        check_squad_ids(examples)

    def work() -> dict[str, Any]:
        write_dropped(config.dropped, config.command, reader.dropped)
        inner = config.inner
        if config.tune_inner_lr:
            grid, size = test.inner_lr_grid, test.batch_size
            tuned = tune_inner_lr(
                model, examples, inner, grid, size, group_by_length=together, **grouping
            )
            inner = tuned.inner
        scores = scores_of(
            model,
            tokenizer,
            examples,
            inner,
            test.batch_size,
            answer_tokens=test.answer_tokens,
            group_by_length=together,
            **grouping,
        )
        result = {**as_results(scores, inner), **grouping}
        if config.results:
            write_json(config.results, {**written_by(config.command), **result})
        if config.predictions:
            write_predictions(config.predictions, examples, scores)
        if config.squad_predictions:
            write_squad_predictions(config.squad_predictions, examples, scores)
        print(f"\n{len(examples)} examples, ± one standard error:\n")
        print(f"{results_table(summaries({'': result}))}\n\nFine-Tuning: η = {inner.lr:g}")
        return result

    return work
