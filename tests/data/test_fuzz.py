"""Files mangled at random: an error that names the file, with exit code 2 and nothing written, or
the right result; never a traceback. ``GDPROMPT_FUZZ=N`` for another number of draws.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gdprompt_fast.training.loop
from gdprompt_fast.cli.main import main
from gdprompt_fast.data import read_triples, write_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.errors import UserError
from gdprompt_fast.meta.step import fast_meta_step
from gdprompt_fast.ops import backend

DRAWS = int(os.environ.get("GDPROMPT_FUZZ", "300"))
RUN_DRAWS = DRAWS // 20  # each takes a good part of a second
ODD: list[Any] = [
    *(None, True, 0, -1, 1.5, 10**400, 1e999, float("nan"), "", " ", "\ud83d", "\x00", "é\u2028"),
    *([], ["a"], [[]], ["", "a"], [None], {}, {"text": []}, {"text": ["b", 1]}, {"text": ["b"]}),
]
NAMES = ["context", "query", "response", "answers", "id", "question", "prompt", "note"]
ALIASES = {"context": ("privileged_context", "prompt"), "query": ("question",), "response": ()}


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def mangled_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, put in, left out, or all after one."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(content) + 1)
        content = rng.choice(
            [
                content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
                content[:at] + rng.randbytes(rng.randrange(1, 4)) + content[at:],
                content[:at] + content[at + rng.randrange(1, 9) :],
                content[:at],
            ]
        )
    return content


def mangled_row(row: dict[str, Any], rng: random.Random) -> str:
    """A record with odd values, other or missing names, as a line of JSON."""
    row = dict(row)
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(NAMES)
        what = rng.randrange(4)
        if what == 0:
            row.pop(name, None)
        elif what == 1 and name in row:
            row[rng.choice(NAMES)] = row.pop(name)
        else:
            row[name] = nested(rng.choice([3, 500])) if rng.random() < 0.1 else rng.choice(ODD)
    if rng.random() < 0.05:
        return "[" * 100_000
    text = json.dumps(row, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:  # the same name twice
        text = text[:-1] + (", " if row else "") + '"context": ' + json.dumps(rng.choice(ODD)) + "}"
    return text


def mangled_file(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    lines = [json.dumps(row) for row in rows]
    for _ in range(rng.randrange(3)):
        index = rng.randrange(len(lines))
        lines[index] = mangled_row(rows[index], rng)
    joined = rng.choice(["\n", "\n", "\r\n", "\n\n", " \n", "\r", ""]).join(lines)
    text = f"[{','.join(lines)}]" if rng.random() < 0.2 else joined
    encoding = rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-32"])
    content = (
        text.encode(encoding, rng.choice(["surrogatepass", "ignore", "replace"]))
        if (encoding.startswith("utf"))
        else text.encode(encoding, "replace")
    )
    if rng.random() < 0.3:
        content = mangled_bytes(content, rng)
    if rng.random() < 0.2:
        content = gzip.compress(content, mtime=0)
        content = mangled_bytes(content, rng) if rng.random() < 0.5 else content
    return b"" if rng.random() < 0.02 else content


def expected_texts(content: bytes) -> list[tuple[str, str, str]]:
    """The texts that a readable file holds, told in another way than the code under test."""
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    text = content.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        found = json.loads(re.sub(r",(\s*\]\s*)\Z", r"\1", text))
    else:
        found = [json.loads(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]

    def of(record: dict[str, Any], field: str) -> str:
        for name in (field, *ALIASES[field]):
            if name in record:
                return record[name]
        answers = record["answers"]
        return (answers["text"] if isinstance(answers, dict) else answers)[0]

    return [(of(r, "context"), of(r, "query"), of(r, "response")) for r in found]


def test_mangled_triples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    rows = [{**row, "id": i} for i, row in enumerate(make_people_data(1, 4, seed=0).test.to_list())]
    path, output = tmp_path / "mangled.jsonl", tmp_path / "out"
    refused = 0
    for draw in range(DRAWS):
        content = mangled_file(rows, rng)
        path.write_bytes(content)
        error = None
        try:
            read = read_triples(path).to_list()
        except UserError as raised:
            error = str(raised)
            assert str(path) in error and "\n" not in error, (draw, content)
            assert "line " in error or "gzip" in error or "at least one record" in error
            refused += 1
        else:
            texts = [(row["context"], row["query"], row["response"]) for row in read]
            assert texts == expected_texts(content), (draw, content)
            assert all(text.strip() and text.encode() for triple in texts for text in triple)
        if draw % 10 == 0:
            capsys.readouterr()
            command = ["data", "jsonl", "--source", str(path), "--test-source", str(path)]
            code = main([*command, "--output", str(output)])
            said = capsys.readouterr().err
            assert code == 2 and (error is None or error in said), (draw, content, said)
            assert not output.exists()
    assert DRAWS * 0.2 < refused < DRAWS * 0.9


class Interrupted(BaseException):
    pass


Runs = dict[str, tuple[list[str], Path]]


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two commands that train, and for each a folder with what it leaves when killed in step 4 of 5
    (``half``) and when left alone (``whole``).
    """
    place = tmp_path_factory.mktemp("runs")
    data, test = place / "data.jsonl", place / "test.jsonl"
    for seed, path in enumerate((data, test)):
        write_triples(make_people_data(1, 6, seed).test.to_list(), path)
    options = ["--model", str(model_folder), "--data", str(data), "--test-data", str(test)]
    options += ["--batch-size", "2", "--checkpoint-every", "2", "--inner-lr", "0.1"]
    options += ["--answer-tokens", "2", "--inner-lr-grid", "0.1", "--device", "cpu"]
    commands = {
        "train": ["train", "--steps", "5", *options],
        "search": ["search-outer-lr", "--grid", "1e-3", "--steps-per-rate", "5", *options],
    }
    for name, command in commands.items():
        _leave(command, place / name)
    return {name: (command, place / name) for name, command in commands.items()}


def _leave(command: list[str], place: Path) -> None:
    left = [3]

    def step(*args: Any, **options: Any) -> Any:
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        return fast_meta_step(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "load_cpp", lambda: False)  # as in the tests themselves
        assert main([*command, "--output", str(place / "whole")]) == 0
        patch.setattr(gdprompt_fast.training.loop, "fast_meta_step", step)
        with pytest.raises(Interrupted):
            main([*command, "--output", str(place / "half")])


def edited(text: str, rng: random.Random) -> str:
    """JSON, or the lines of JSON, with another value somewhere."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    values = ["null", "-1", '"x"', "[]", "{}", "1e999", ""]
    lines[at] = re.sub(
        r": .*?(,|\}|$)", lambda m: f": {rng.choice(values)}{m[1]}", lines[at], count=1
    )
    return "\n".join(lines) + "\n"


def mangle_a_file(folder: Path, rng: random.Random) -> Path:
    """Truncates, changes or removes a file of a run; those that are read again more often."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    read = [
        path for path in files if path.suffix in (".json", ".jsonl") and "model" not in str(path)
    ]
    path = rng.choice([*files, *read * 2])
    changes: list[Callable[[], object]] = [
        path.unlink,
        lambda: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)]),
        lambda: path.write_bytes(mangled_bytes(path.read_bytes(), rng)),
    ]
    if path in read:
        changes.append(lambda: path.write_text(edited(path.read_text(), rng)))
    rng.choice(changes)()
    return path.relative_to(folder)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "result"), [("train", "model/model.safetensors"), ("search", "search.json")]
)
def test_mangled_runs(
    name: str, result: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, place = runs[name]
    rng = random.Random(0)
    codes = []
    for draw in range(RUN_DRAWS):
        run = tmp_path / str(draw)
        shutil.copytree(place / rng.choice(["half", "half", "whole"]), run)
        mangled = mangle_a_file(run, rng)
        before = snapshot(run)
        capsys.readouterr()
        codes.append(main([*command, "--output", str(run), "--resume"]))
        said = capsys.readouterr().err
        if codes[-1] == 0:
            # Another number in a result is not to be told from a measured one.
            same = (run / result).read_bytes() == (place / "whole" / result).read_bytes()
            assert same or mangled.name == "result.json", (draw, mangled)
        else:
            assert codes[-1] == 2 and snapshot(run) == before, (draw, mangled, said)
            assert said.count("\n") == 1 and str(run) in said, (draw, mangled, said)
        shutil.rmtree(run)
    assert set(codes) == {0, 2}
