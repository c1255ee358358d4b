"""Where a model is: a folder, a GGUF file, or a name on the Hugging Face hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import UserError

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
SETTINGS_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
PICKLED_WEIGHTS = ["pytorch_model*.bin", "adapter_model.bin"]
WEIGHTS_AND_SETTINGS = {".json", ".safetensors", ".bin", ".model", ".gguf"}
READ_AT_ONCE = 1 << 24  # bytes
OTHER_COPIES = ["*/*", "consolidated*"]  # of the weights, in other formats


@dataclass(frozen=True)
class FoundModel:
    """A model, or adapters of one, that is on the disk.

    Attributes:
        folder: of its files.
        name: what it can be found by from any folder: a name on the hub or an absolute path.
        revision: the commit on the hub; None: it is none of the hub.
        gguf: the GGUF file that was asked for, if one was.
    """

    folder: Path
    name: str
    revision: str | None = None
    gguf: Path | None = None


def find_model(name: str | Path, revision: str | None = None) -> FoundModel:
    """A model by the path of its folder or of its GGUF file, or by its name on the hub, downloaded
    if need be.

    Raises:
        ValueError: naming all that was tried.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise UserError(f"revision: expected none for {path}, which is here, got {revision!r}")
        return _on_disk(path)
    return _on_hub(str(name), revision)


def find_config(name: str, revision: str | None = None) -> Path:
    """The folder or config.json of a model that need not have weights, by path or name on the hub.

    Raises:
        ValueError: naming all that was tried.
    """
    path = Path(name)
    if path.exists():
        return path if path.is_file() else find_model(name, revision).folder
    if path.suffix == ".json":
        raise UserError(
            "model: expected a config.json, a folder with one or the name of a model on the hub, "
            f"got {name}: there is no such file"
        )
    try:
        return _snapshot(name, revision, CONFIG_FILE)
    except Exception as error:
        raise _not_found(name, revision, error) from error


def fingerprint_of(folder: Path) -> str:
    """A hash of a model's files, to know another model under the same name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in WEIGHTS_AND_SETTINGS:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(READ_AT_ONCE):
                    digest.update(block)
    return digest.hexdigest()[:16]


def holds_model(folder: Path) -> bool:
    """Whether a folder has the files of a model or of adapters."""
    configs = (folder / CONFIG_FILE, folder / ADAPTER_CONFIG_FILE)
    return any(path.is_file() for path in configs) or any(folder.glob("*.gguf"))


def _on_disk(path: Path) -> FoundModel:
    if path.is_file() and path.suffix == ".gguf":
        return FoundModel(path.parent, str(path.absolute()), gguf=path)
    if not path.is_dir() or not holds_model(path):
        raise UserError(
            "model: expected a folder with a config.json, an adapter_config.json or a GGUF file, "
            f"got {path}"
        )
    return FoundModel(path, str(path.absolute()))


def _on_hub(name: str, revision: str | None) -> FoundModel:
    try:
        folder = _snapshot(name, revision, *SETTINGS_FILES, "*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = _snapshot(name, revision, *SETTINGS_FILES, *PICKLED_WEIGHTS)
    except Exception as error:  # the hub's client has errors of many types
        raise _not_found(name, revision, error) from error
    return FoundModel(folder, name, revision=folder.name)


def _snapshot(name: str, revision: str | None, *wanted: str) -> Path:
    def fetch(**options: Any) -> Path:
        patterns: Any = dict(allow_patterns=[*wanted], ignore_patterns=OTHER_COPIES)
        return Path(snapshot_download(name, revision=revision, **patterns, **options))

    try:
        return fetch()
    except IncompleteSnapshotError as error:
        # Something of the repository is not here, perhaps nothing that is needed.
        return Path(error.snapshot_path)
    except OfflineModeIsEnabled:  # with a commit, also where the cache has it
        return fetch(local_files_only=True)


def _not_found(name: str, revision: str | None, error: Exception) -> UserError:
    at = "" if revision is None else f" at revision {revision!r}"
    return UserError(
        f"model: expected a folder with a config.json or the name of a model on the hub, got "
        f"{name}{at}: there is no folder {Path(name).absolute()}, and {_on_the_hub(error)}"
    )


def _on_the_hub(error: Exception) -> str:
    """What became of the name on the hub."""
    cache = f"the cache, {constants.HF_HUB_CACHE}, does not have it"
    if isinstance(error, HFValidationError):
        return "it is no name on the hub, which is of the form organisation/model"
    if isinstance(error, GatedRepoError):
        return "on the hub it is behind a licence: accept it there, then hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has the model, but not this revision"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or not without hf auth login"
    if constants.HF_HUB_OFFLINE:
        return f"{cache}; the hub was not asked (HF_HUB_OFFLINE)"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{cache}; the hub cannot be reached"
    return f"{cache}; the hub: {str(error).strip().partition(chr(10))[0]}"
