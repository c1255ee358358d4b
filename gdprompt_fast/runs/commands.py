"""All commands, by name."""

from __future__ import annotations

from typing import Any

from .app_run import app
from .ask_run import ask
from .check_run import check
from .command import Command
from .data_run import data
from .demo_run import demo
from .evaluate_run import evaluate
from .experiment_run import experiment
from .icl_run import icl
from .internalisation_run import internalisation
from .learn_run import learn
from .plan_run import plan
from .prepare_run import prepare
from .report_run import report
from .search_run import search_outer_lr
from .train_run import train

COMMANDS: dict[str, Command[Any, Any]] = {
    each.name: each
    for each in (
        data,
        demo,
        prepare,
        check,
        train,
        search_outer_lr,
        evaluate,
        learn,
        ask,
        plan,
        experiment,
        icl,
        internalisation,
        report,
        app,
    )
}
