"""``gdprompt learn`` by several processes keeps what one keeps."""

from __future__ import annotations

from pathlib import Path

from gdprompt_fast.cli.main import main
from helpers.processes import in_processes


def files_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_process_learns_some_of_the_texts(
    model_folder: Path, triples: Path, tmp_path: Path
) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    command = ["learn", "--model", str(model_folder), "--data", str(triples), "--inner-lr", "0.1"]
    command += ["--batch-size", "2", "--rank", "4", "--device", "cpu", "--output"]
    assert main([*command, str(one)]) == 0
    assert in_processes(3, lambda: main([*command, str(many)]), init=False) == [0, 0, 0]
    assert files_in(many) == files_in(one) and len(files_in(one)) == 9
    names = [{path.name for path in folder.iterdir()} for folder in (one, many)]
    assert names[0] == names[1]
