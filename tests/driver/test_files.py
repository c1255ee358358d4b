"""Files and folders killed at every step of being written: the old or the new, whole."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gdprompt_fast.artifacts import files
from gdprompt_fast.artifacts.files import (
    exchange,
    is_empty,
    read_json,
    recover,
    write_file,
    write_folder,
    write_json,
)
from gdprompt_fast.data import TrainTest
from gdprompt_fast.data.folder import is_data_folder, write_data
from gdprompt_fast.training.checkpoint import check_checkpoint, save_checkpoint

OLD = {"a.txt": "old a", "of old/b.txt": "old b"}
NEW = {"a.txt": "new a", "of new/c.txt": "new c", "d.txt": ""}


def filled(content: dict[str, str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, text in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return write


def content_of(folder: Path) -> dict[str, str]:
    files_in = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files_in}


def killed_before_call(number: int, action: Callable[[], None]) -> bool:
    """Runs ``action`` in a process of its own that is killed right before its call of this number
    to the file system; False if it makes fewer.
    """
    child = os.fork()
    if child == 0:
        calls = count()

        def step() -> None:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, _: object) -> None:
            if event == "open" or event.startswith(("os.", "shutil.")):
                step()

        def before(call: Callable[..., object]) -> Callable[..., object]:
            return lambda *arguments: (step(), call(*arguments))[1]

        os.fsync = before(os.fsync)
        files.exchange = before(files.exchange)
        sys.addaudithook(hook)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture(params=["exchange", "set aside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Both ways of putting a folder in the place of another."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    if request.param == "set aside":
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    elif not exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("the file system cannot exchange folders")
    return str(request.param)


def test_a_folder_killed_at_every_step_is_the_old_or_the_new(way: str, tmp_path: Path) -> None:
    seen = []
    for number in count():
        place = tmp_path / str(number)
        place.mkdir()
        folder = place / "data"
        write_folder(folder, filled(OLD))
        killed = killed_before_call(number, lambda f=folder: write_folder(f, filled(NEW)))
        there = folder.exists()
        assert there or way == "set aside"
        recover(folder)
        assert content_of(folder) in (OLD, NEW)
        seen.append((there, content_of(folder) == NEW))
        write_folder(folder, filled({"e.txt": "e"}))
        assert content_of(place) == {"data/e.txt": "e"}
        if not killed:
            break
    assert len(seen) > 30
    assert set(seen) >= {(True, False), (True, True)}
    assert ((False, False) in seen) == (way == "set aside")


def test_a_new_folder_killed_at_every_step_is_whole_or_not_there(tmp_path: Path) -> None:
    for number in count():
        folder = tmp_path / str(number) / "data"
        killed = killed_before_call(number, lambda f=folder: write_folder(f, filled(NEW)))
        assert not folder.exists() or content_of(folder) == NEW
        if not killed:
            break
    assert content_of(folder) == NEW


def test_a_file_killed_at_every_step_is_the_old_or_the_new(tmp_path: Path) -> None:
    seen = set()
    for number in count():
        path = tmp_path / str(number) / "file"
        path.parent.mkdir()
        path.write_text("old")
        killed = killed_before_call(number, lambda p=path: write_file(p, "new"))
        seen.add(path.read_text())
        assert path.read_text() in ("old", "new")
        write_file(path, "next")
        assert content_of(path.parent) == {"file": "next"}
        if not killed:
            break
    assert seen == {"old", "new"}


def test_a_folder_behind_a_link_stays_behind_it(way: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "real", filled(OLD))
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link", filled(NEW))
    assert (tmp_path / "link").is_symlink() and content_of(tmp_path / "real") == NEW
    (tmp_path / "to file").symlink_to("real/a.txt")
    write_file(tmp_path / "to file", "text")
    assert (tmp_path / "to file").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "text"


def test_a_failed_write_leaves_what_was_there(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def half(path: Path) -> None:
        filled(NEW)(path)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(folder, half)
    assert not folder.exists()
    write_folder(folder, filled(OLD))
    with pytest.raises(RuntimeError):
        write_folder(folder, half)
    assert content_of(folder) == OLD


def test_a_folder_with_a_killed_writes_leftovers_counts_as_empty(tmp_path: Path) -> None:
    assert is_empty(tmp_path / "absent") and is_empty(tmp_path)
    (tmp_path / ".model.gdprompt-tmp").mkdir()
    assert is_empty(tmp_path)
    (tmp_path / ".mine.tmp").write_text("")
    assert not is_empty(tmp_path) and not is_empty(tmp_path / ".mine.tmp")


def test_a_data_folder_killed_at_every_step_is_still_known_to_be_ours(tmp_path: Path) -> None:
    def write(count: int) -> None:
        rows: Any = [{"context": "c", "query": "q", "response": "r"}] * count
        write_data(TrainTest(rows, rows, {}), tmp_path / "data", "people", {})

    seen = set()
    for number in count():
        write(1)
        killed = killed_before_call(number, lambda: write(2))
        recover(tmp_path / "data")
        assert is_data_folder(tmp_path / "data")
        seen.add(read_json(tmp_path / "data" / "data.json")["sizes"]["train"])
        if not killed:
            break
    assert seen == {1, 2}


def test_checkpoints_killed_at_every_step_leave_a_whole_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = torch.nn.Linear(2, 2), torch.nn.Identity()
    for part in (model, tokenizer):
        part.save_pretrained = filled({type(part).__name__: "its files"})
    optimizer = torch.optim.Adam(model.parameters())

    def save(step: int, output: Path) -> None:
        save_checkpoint(output, step, model, tokenizer, optimizer, {})

    seen = set()
    for number in count():
        output = tmp_path / str(number)
        save(2, output)
        killed = killed_before_call(number, lambda o=output: save(4, o))
        seen.add(check_checkpoint(output))
        save(6, output)
        assert check_checkpoint(output) == 6 and len(list(output.iterdir())) == 1
        if not killed:
            break
    assert seen == {2, 4}


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000])
def test_json_that_is_not_ours_is_an_error_naming_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json: expected"):
        read_json(tmp_path / "x.json")


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the size of files")
def test_a_disk_that_is_full_is_an_error_of_files(tmp_path: Path) -> None:
    import resource

    tensors = {"a": torch.zeros(1 << 16)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        for save in (lambda path: save_file(tensors, path), lambda path: torch.save(tensors, path)):
            with pytest.raises(OSError):
                write_folder(tmp_path / "model", lambda folder, save=save: save(folder / "w"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "model").exists()


def test_a_name_that_is_no_utf_8_can_be_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"data": "caf\udce9"})
    assert read_json(tmp_path / "a.json") == {"data": "caf\udce9"}
