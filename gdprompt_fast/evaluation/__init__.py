"""How well a model answers: without the context, with it in the prompt, after an inner step."""

from .scores import Scores, Summary, score_rows
from .settings import (
    SETTINGS,
    InnerStep,
    TunedInnerStep,
    evaluate,
    fine_tuned_answers,
    fine_tuning_scores,
    tune_inner_lr,
)

__all__ = [
    "SETTINGS",
    "InnerStep",
    "Scores",
    "Summary",
    "TunedInnerStep",
    "evaluate",
    "fine_tuned_answers",
    "fine_tuning_scores",
    "score_rows",
    "tune_inner_lr",
]
