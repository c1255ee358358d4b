"""``gdprompt learn`` by several processes keeps what one keeps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gdprompt_fast.cli.main import main
from helpers.processes import in_processes


def files_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_process_learns_some_of_the_texts(
    model_folder: Path, triples: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    command = ["learn", "--model", str(model_folder), "--data", str(triples), "--inner-lr", "0.1"]
    command += ["--batch-size", "2", "--rank", "4", "--device", "cpu", "--output"]
    assert main([*command, str(one)]) == 0
    for count in (2, 3):
        many = tmp_path / f"many-{count}"
        learnt = in_processes(count, partial(main, [*command, str(many)]), init=False)
        assert learnt == [0] * count
        assert files_in(many) == files_in(one) and len(files_in(one)) == 9
        assert {path.name for path in many.iterdir()} == {path.name for path in one.iterdir()}
