"""How well a model answers: without the context, with it in the prompt, after an inner step."""

from .adapted import InnerStep, check_inner_step
from .answers import decode, exact_match, f1, normalise
from .irrelevant import with_irrelevant_contexts
from .predictions import (
    check_squad_ids,
    read_predictions,
    write_predictions,
    write_squad_predictions,
)
from .scores import Scores, Summary, score_rows
from .settings import SETTINGS, evaluate, fine_tuning_scores, whole_groups
from .tuning import TunedInnerStep, tune_inner_lr

__all__ = [
    "SETTINGS",
    "InnerStep",
    "Scores",
    "Summary",
    "TunedInnerStep",
    "check_inner_step",
    "check_squad_ids",
    "decode",
    "evaluate",
    "exact_match",
    "f1",
    "fine_tuning_scores",
    "normalise",
    "read_predictions",
    "score_rows",
    "tune_inner_lr",
    "whole_groups",
    "with_irrelevant_contexts",
    "write_predictions",
    "write_squad_predictions",
]
