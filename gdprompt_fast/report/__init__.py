"""What a run or an experiment showed: tables, plain words on what did not show, figures, a page."""

from .experiment import draw_tables, experiment_markdown
from .figure import draw_figure
from .html import write_page
from .table import not_improved, results_table

__all__ = [
    "draw_figure",
    "draw_tables",
    "experiment_markdown",
    "not_improved",
    "results_table",
    "write_page",
]
