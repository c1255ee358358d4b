"""What a run or an experiment showed: tables, plain words on what did not show, figures, a page."""

from .charts import draw_charts
from .experiment import draw_tables, experiment_markdown
from .figure import draw_figure
from .html import PAGE_FILE, is_page, results_page
from .table import not_improved, results_table

__all__ = [
    "PAGE_FILE",
    "draw_charts",
    "draw_figure",
    "draw_tables",
    "experiment_markdown",
    "is_page",
    "not_improved",
    "results_page",
    "results_table",
]
