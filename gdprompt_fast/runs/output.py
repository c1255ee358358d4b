"""The folder of a run: new, or one with the same settings to go on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifacts.files import is_empty, read_json, write_folder, write_json
from ..artifacts.outputs import Outputs
from ..artifacts.stage import differences
from ..errors import UserError
from ..training.loop import check_training
from .results import RATE_FILE, RESULTS_FILE, read_results

SETTINGS_FILE = "run.json"


def check_output(output: Path, resume: bool, outputs: Outputs) -> None:
    """That ``output`` can be the folder of a new run, or has one to go on with, unharmed.

    Raises:
        ValueError: if it holds anything that is not to be gone on with, or replaced.
    """
    if resume and (output / SETTINGS_FILE).exists():
        for folder in (output, *filter(Path.is_dir, output.iterdir())):
            check_training(folder)
        for path in (*output.glob(RESULTS_FILE), *output.glob(f"*/{RATE_FILE}")):
            read_results(path)
        return
    if (output / SETTINGS_FILE).exists() and not outputs.overwrite:
        raise UserError(
            f"output: expected a folder without a run, got {output}; add --resume to continue it "
            "or --overwrite to replace it, or give another --output"
        )
    if resume and not is_empty(output):
        raise UserError(f"output: expected a run to continue or an empty folder, got {output}")
    if not resume and not is_empty(output):
        outputs.check_folder(output)


def claim_output(output: Path, settings: Mapping[str, Any], resume: bool, outputs: Outputs) -> None:
    """Makes ``output``, which :func:`check_output` has let pass, the folder of a run with these
    settings.

    Raises:
        ValueError: if it is that of a run with other settings.
    """
    if not resume:
        check_output(output, resume, outputs)  # again: others may have begun in the meantime
    path = output / SETTINGS_FILE
    known = json.loads(json.dumps(settings))
    if not resume and not is_empty(output):
        write_folder(output, lambda folder: write_json(folder / SETTINGS_FILE, known))
        return
    if resume and path.exists():
        for name, (old, new) in sorted(differences(read_json(path), known).items()):
            raise UserError(f"{name}: expected {old!r} as in the run in {output}, got {new!r}")
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, known)
