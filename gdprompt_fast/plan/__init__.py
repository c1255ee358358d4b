"""The memory a meta step will need, predicted from shapes before anything is allocated."""

from .plan import Plan, largest_micro_batch, make_plan, parse_memory, plan_json, plan_table
from .prediction import Materialised, Prediction, predict, predict_materialised, predict_sequential
from .step import PlannedStep

__all__ = [
    "Materialised",
    "Plan",
    "PlannedStep",
    "Prediction",
    "largest_micro_batch",
    "make_plan",
    "parse_memory",
    "plan_json",
    "plan_table",
    "predict",
    "predict_materialised",
    "predict_sequential",
]
