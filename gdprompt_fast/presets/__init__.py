"""Preset files: settings by section."""

from pathlib import Path

FOLDER = Path(__file__).parent
