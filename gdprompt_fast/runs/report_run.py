"""``gdprompt report``: one HTML page of a folder's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..artifacts.files import write_file
from ..config.fields import REQUIRED, WritingConfig, option
from ..report import PAGE_FILE, is_page, results_page
from .command import command, outputs_of
from .groups import overwrite_field


@dataclass(frozen=True, kw_only=True)
class ReportConfig(WritingConfig):
    """Which folder to report on."""

    command = "report"

    folder: Path = option(
        REQUIRED, "an --output folder, or one with such folders", writes=True, positional=True
    )
    overwrite: bool = overwrite_field("replace a page that this command did not write")


@command("One self-contained HTML page of the experiments and runs in a folder.")
def report(config: ReportConfig) -> Callable[[], Path]:
    """Makes the page; the work is to write it, and returns its path."""
    page, path = results_page(config.folder), config.folder / PAGE_FILE
    outputs_of(config).check_file(PAGE_FILE, path, is_page)

    def work() -> Path:
        write_file(path, page)
        print(f"written to {path}")
        return path

    return work
