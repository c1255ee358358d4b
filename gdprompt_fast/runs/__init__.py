"""The commands, for Python: each is called with its configuration, as ``train(TrainConfig(...))``.

What a configuration says is checked when it is made, and all that it names before the long work.
"""

from .app_run import AppConfig, app
from .ask_run import AskConfig, ask
from .check_run import CheckConfig, check
from .command import Command
from .commands import COMMANDS
from .data_run import DataConfig, data
from .demo_run import DemoConfig, demo
from .evaluate_run import EvaluateConfig, evaluate
from .experiment_run import ExperimentConfig, experiment
from .file_run import RunConfig, run
from .icl_run import IclConfig, icl
from .internalisation_run import InternalisationConfig, internalisation
from .learn_run import LearnConfig, learn
from .plan_run import PlanConfig, plan
from .prepare_run import PrepareConfig, prepare
from .report_run import ReportConfig, report
from .search_run import SearchConfig, search_outer_lr
from .train_run import TrainConfig, train

__all__ = [
    "COMMANDS",
    "AppConfig",
    "AskConfig",
    "CheckConfig",
    "Command",
    "DataConfig",
    "DemoConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "IclConfig",
    "InternalisationConfig",
    "LearnConfig",
    "PlanConfig",
    "PrepareConfig",
    "ReportConfig",
    "RunConfig",
    "SearchConfig",
    "TrainConfig",
    "app",
    "ask",
    "check",
    "data",
    "demo",
    "evaluate",
    "experiment",
    "icl",
    "internalisation",
    "learn",
    "plan",
    "prepare",
    "report",
    "run",
    "search_outer_lr",
    "train",
]
