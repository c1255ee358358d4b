"""The memory a meta step will need, predicted from shapes before anything is allocated."""

from .many import SHARDINGS, ManyGPUs, many_json, many_table, plan_many
from .plan import Plan, largest_micro_batch, make_plan, parse_memory, plan_json, plan_table
from .prediction import Materialised, Prediction, predict, predict_materialised, predict_sequential
from .step import PlannedStep

__all__ = [
    "SHARDINGS",
    "ManyGPUs",
    "Materialised",
    "Plan",
    "PlannedStep",
    "Prediction",
    "largest_micro_batch",
    "make_plan",
    "many_json",
    "many_table",
    "parse_memory",
    "plan_json",
    "plan_many",
    "plan_table",
    "predict",
    "predict_materialised",
    "predict_sequential",
]
