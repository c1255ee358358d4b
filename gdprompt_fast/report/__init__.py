"""What a run showed: a table, plain words on what did not improve, and a figure."""

from .figure import draw_figure
from .table import not_improved, results_table

__all__ = ["draw_figure", "not_improved", "results_table"]
