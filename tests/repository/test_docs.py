"""The README and docs/: code runs, command lines parse, links lead on, the map is today's."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gdprompt_fast import runs
from gdprompt_fast.cli.main import main as cli
from gdprompt_fast.runs.file_run import read_run_file
from helpers.paths import ROOT
from helpers.scripts import docs_script

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NAMING = [*PAGES, ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A line of text with a command, cut where the shell cuts it: at a comment or an operator.
ENDS = {"&&", "||", "|", ";", "#"}


def blocks(page: Path, language: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def commands(script: str) -> list[list[str]]:
    """The commands of a shell script, as lists of words."""
    found: list[list[str]] = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = [*lexer, ";"]
        while words:
            end = next(i for i, word in enumerate(words) if word in ENDS)
            found.append(words[:end])
            words = words[end + 1 :]
    return [words for words in found if words]


def test_results_name_no_folder_of_a_machine() -> None:
    files = sorted((ROOT / "docs").rglob("*.json"))
    assert files
    for path in files:
        assert not re.search(r'": "/', path.read_text(encoding="utf-8")), path


def of_pages(part: Callable[[Path], list[Any]]) -> list[Any]:
    return [
        pytest.param(each, id=f"{page.relative_to(ROOT)} {number}")
        for page in PAGES
        for number, each in enumerate(part(page), start=1)
    ]


def lines_of(page: Path) -> list[list[str]]:
    return [words for script in blocks(page, "bash") for words in commands(script)]


def words_of(file: Path) -> set[str]:
    return set(re.findall(r"\w+", file.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def sources() -> list[Path]:
    """Every file of code in the repository."""
    folders = ("gdprompt_fast", "kernels", "csrc", "benchmarks", "tests", "docs")
    found = [file for each in folders for file in sorted((ROOT / each).rglob("*"))]
    return [ROOT / "setup.py", *(f for f in found if f.suffix in (".py", ".cpp", ".h", ".toml"))]


@pytest.fixture(scope="module")
def words(sources: list[Path]) -> set[str]:
    """Every word in the code."""
    return {word for file in sources for word in words_of(file)}


class Parsed(Exception):
    """The arguments were understood; nothing has begun."""


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def test_every_kind_of_block_is_one_that_is_tested() -> None:
    kinds = {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert kinds <= {"python", "bash", "mermaid", "toml"}
    assert all(page.read_text(encoding="utf-8").count("```") % 2 == 0 for page in PAGES)


def test_a_script_is_cut_into_its_commands() -> None:
    script = "pip install -e '.[a b]' && gdprompt demo  # quick; or not\ngdprompt plan \\\n  --x 1"
    expected = [["pip", "install", "-e", ".[a b]"], ["gdprompt", "demo"]]
    assert commands(script) == [*expected, ["gdprompt", "plan", "--x", "1"]]


@pytest.mark.parametrize("words", of_pages(lines_of))
def test_every_command_line_is_one_that_there_is(words: list[str], only_parsed: None) -> None:
    program, *arguments = words
    if program in ("torchrun", "accelerate"):  # and then as they launch it
        program, arguments = "gdprompt", arguments[arguments.index("gdprompt_fast") + 1 :]
    if program == "gdprompt":
        with pytest.raises(Parsed):  # SystemExit, and a message on stderr, otherwise
            cli(arguments)
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1])
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert program in ("pip", "pytest", "ruff", "mypy")


def test_a_wrong_option_would_be_found(
    only_parsed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli(["demo", "--stepps", "3"])
    assert "--stepps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.name) for p in PAGES if p != README and blocks(p, "python")]
)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the README's example, whose names a page may use; that alone: test_package.py."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in blocks(README, "python") + blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("text", of_pages(lambda page: blocks(page, "toml")))
def test_every_toml_file_is_one_that_gdprompt_run_takes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    path.write_text(text, encoding="utf-8")
    assert read_run_file(path)


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


# Where the pages' paths begin.
PLACES = [ROOT, *(ROOT / each for each in ("gdprompt_fast", "tests", "benchmarks", "docs"))]
PLACES += [ROOT / "benchmarks" / "results"]
SUFFIX = re.compile(r"\.(py|md|toml|cpp|h|jsonl?|txt)$")
# What is in no repository: files of the user, of a run, of a measurement on a GPU.
OF_RUNS = {"FILE.toml", "triples.jsonl", "metrics.jsonl", "gpu.jsonl", "tests/ROOM"}
OUTPUTS = re.compile(r"runs/\w+(/\w+)*$")
IN_SOURCE = re.compile(r"(?<![\w./])((?:[\w-]+/)+[\w-]+\.(?:py|md|toml|cpp))\b")
NOT_OURS = ("torch/", "site-packages/", "kernels/__init__.py")


def without_drawings(page: Path) -> str:
    """A page without blocks of code and what is written by a script."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"<!-- (\w+) -->.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)


def paths_in(span: str) -> list[str]:
    """The paths that a span of code names, `{a,b}/` as two and a module of a script as its file."""
    found = []
    for word in span.split():
        if word.startswith("benchmarks."):
            word = word.replace(".", "/") + ".py"
        head, brace, rest = word.partition("{")
        inside, _, tail = rest.partition("}")
        found += [head + each + tail for each in inside.split(",")] if brace else [word]
    paths = [each for each in found if re.fullmatch(r"[\w./*-]+", each)]
    named = [each for each in paths if "/" in each or SUFFIX.search(each)]
    return [each for each in named if each not in OF_RUNS and not OUTPUTS.match(each)]


def files_at(path: str, beside: Path = ROOT) -> list[Path]:
    """The files or folders of a path; NAME stands for any."""
    pattern = path.replace("NAME", "*").rstrip("/")
    return [file for place in (*PLACES, beside.parent) for file in place.glob(pattern)]


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in NAMING])
def test_every_path_and_name_in_a_page_is_there(page: Path, words: set[str]) -> None:
    text = without_drawings(page)
    for span in re.findall(r"`([^`\n]+)`", text):
        for path in paths_in(span):
            assert files_at(path, page), path
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span) and not SUFFIX.search(span):
            assert set(filter(None, span.partition("(")[0].split("."))) <= words, span
    for name, path in re.findall(r"`([A-Za-z_]\w+)` (?:in |of |\()`([\w/.]+\.py)`", text):
        assert any(name in words_of(file) for file in files_at(path, page)), (name, path)


def test_every_path_in_a_comment_or_docstring_is_there(sources: list[Path]) -> None:
    for source in sources:
        for path in IN_SOURCE.findall(source.read_text(encoding="utf-8")):
            known = path.startswith(NOT_OURS) or source == Path(__file__)
            assert known or files_at(path, source), (source, path)


def test_a_path_that_is_gone_would_be_found() -> None:
    assert paths_in("ops/{linear,lnear}.py") == ["ops/linear.py", "ops/lnear.py"]
    assert files_at("ops/linear.py") and not files_at("ops/lnear.py")
    assert paths_in("python -m benchmarks.ops.cpp") == ["benchmarks/ops/cpp.py"]
    assert files_at("ops/NAME.py") and not files_at("linear.py")


def test_every_command_has_a_row_and_is_for_python() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted([*runs.COMMANDS, runs.run.name])
    for command in runs.COMMANDS.values():
        for name in (command.name.replace("-", "_"), command.config.__name__):
            assert name in runs.__all__ and hasattr(runs, name), name


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.fixture(scope="module")
def imports() -> ModuleType:
    return docs_script("imports")


def test_lower_floors_never_import_higher_ones_and_no_file_is_too_long(imports: ModuleType) -> None:
    assert imports.faults(imports.arrows()) == []


def test_the_map_is_that_of_today(imports: ModuleType) -> None:
    text = imports.PAGE.read_text(encoding="utf-8")
    assert imports.page(text, imports.arrows()) == text, "run python docs/imports.py --write"
    assert imports.picture(imports.arrows()) in text


def test_an_arrow_upwards_a_circle_and_a_room_without_a_floor_are_found(
    imports: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = imports.arrows()
    upwards = found | {("ops", "training"): ["ops/new.py"]}
    (said,) = imports.faults(upwards)
    assert "ops imports training" in said and "ops/new.py" in said
    (said,) = imports.faults(found | {("errors", "batch"): ["errors.py"]})
    assert "circle" in said
    monkeypatch.setitem(imports.EXCEPTIONS, ("ops", "training"), "for a reason")
    assert imports.faults(upwards) == []
    assert imports.faults(found) == ["ops no longer imports training"]
    monkeypatch.setitem(imports.FLOORS, "ground", imports.FLOORS["ground"][1:])
    assert "errors is a room without a floor" in imports.faults(found)
    monkeypatch.setitem(imports.FLOORS, "ground", (*imports.FLOORS["ground"], "errors", "update"))
    assert "update is on two floors" in imports.faults(found)


def test_a_file_that_is_too_long_is_found(
    imports: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, path = imports.source_files()[0]
    monkeypatch.setattr(imports, "LONG", {"docs/imports.py": "no more"})
    monkeypatch.setattr(imports, "MOST_LINES", lines - 1)
    assert imports.faults(imports.arrows()) == [
        f"{path} has {lines} lines, more than {lines - 1}",
        "docs/imports.py is listed as too long and is not",
    ]


def test_tests_import_helpers_and_never_one_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        names = {part for module in imported for part in module.split(".")}
        assert not {name for name in names if name.startswith("test_") or name == "conftest"}, path


def test_every_way_to_import_is_an_arrow(imports: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "here.py"
    path.write_text(
        "import torch, gdprompt_fast.training.loop\n"
        "from . import phase\n"
        "from .. import __version__\n"
        "from ..batch import MetaBatch\n"
        "def late():\n    from gdprompt_fast.meta import step\n"
    )
    known = imports.modules()
    assert imports.imported("gdprompt_fast.ops.here", path, known) == {
        "gdprompt_fast",
        "gdprompt_fast.batch",
        "gdprompt_fast.meta.step",
        "gdprompt_fast.ops.phase",
        "gdprompt_fast.training.loop",
    }
