"""The README and docs/: code runs, command lines parse, links lead on, the map is today's."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gdprompt_fast.cli.main import main as cli
from gdprompt_fast.runs.file_run import read_run_file
from helpers.paths import ROOT

pytestmark = pytest.mark.quick

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
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


def of_pages(part: Callable[[Path], list[Any]]) -> list[Any]:
    return [
        pytest.param(each, id=f"{page.relative_to(ROOT)} {number}")
        for page in PAGES
        for number, each in enumerate(part(page), start=1)
    ]


def lines_of(page: Path) -> list[list[str]]:
    return [words for script in blocks(page, "bash") for words in commands(script)]


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


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.fixture(scope="module")
def imports() -> ModuleType:
    """docs/imports.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_imports", ROOT / "docs" / "imports.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
