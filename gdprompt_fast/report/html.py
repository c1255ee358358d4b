"""``gdprompt report``: whatever results a folder holds, in one HTML page that needs nothing else.

Figures are embedded as data URIs; there is no script, and nothing is fetched.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..artifacts.files import read_json
from ..errors import UserError
from .experiment import circumstances, how_to_read, sentence, table_rows

PAGE_FILE = "report.html"
GENERATOR = '<meta name="generator" content="gdprompt report"/>'
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #e3e3e3; }
th { background: #f4f5f7; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; }
.wide { overflow-x: auto; }
.shows { color: #1d6b38; font-weight: 600; }
.does-not-show { color: #a33022; font-weight: 600; }
.small, pre { font-size: .85rem; color: #555; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading and, below it, HTML."""

    title: str
    body: str


def results_page(folder: Path) -> str:
    """The page of the results found in ``folder``.

    Raises:
        ValueError: if there are none.
    """
    sections = [*_experiments(folder), *_runs(folder)]
    if not sections:
        raise UserError(
            f"folder: expected finished results of experiments or runs in {folder}, got none"
        )
    return _page(f"Results in {folder.resolve().name}", sections)


def is_page(path: Path) -> bool:
    """Whether a file is a page that :func:`results_page` made."""
    return GENERATOR.encode() in path.read_bytes().partition(b"</head>")[0]


def _experiments(folder: Path) -> Iterator[Section]:
    """The experiments finished in ``folder`` and in those in it."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        try:
            content = json.loads(path.read_bytes())
            if isinstance(content, dict) and content.get("experiment") == path.stem:
                yield Section(content["title"], _experiment(content, path.with_suffix(".png")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: expected results as written, got {reason}") from None


def _experiment(content: dict[str, Any], figure: Path) -> str:
    parts = [_image(figure, content["title"])]
    for table in content["tables"]:
        if table["title"] != content["title"]:
            parts.append(f"<h3>{escape(table['title'])}</h3>")
        parts.append(_table(table_rows(table), numbers=True))
    parts.append(_paragraph(how_to_read(content)))
    if content["findings"]:
        parts += ["<h3>Findings</h3>", _list(map(_finding, content["findings"]))]
    parts += ["<h3>Notes</h3>", _list(escape(note) for note in content["notes"])]
    for texts in content["texts"]:
        parts += [f"<h3>{escape(texts['title'])}</h3>", _table([texts["columns"], *texts["rows"]])]
    parts += [_paragraph(circumstances(content)), _details("Settings", content["settings"])]
    parts.append(_details("Stages", content["stages"]))
    return "\n".join(parts)


def _runs(folder: Path) -> Iterator[Section]:
    """The finished runs of ``gdprompt demo`` and ``train``: ``folder`` itself and those in it."""
    for settings in sorted([*folder.glob("run.json"), *folder.glob("*/run.json")]):
        run = settings.parent
        name, figure, table = run.resolve().name, run / "figure.png", run / "results.md"
        if figure.is_file():
            text = table.read_text(encoding="utf-8") if table.is_file() else "not evaluated"
            body = [
                _image(figure, name),
                f"<pre>{escape(text)}</pre>",
                _details("Settings", read_json(settings)),
            ]
            yield Section(f"Run: {name}", "\n".join(body))


def _finding(finding: dict[str, Any]) -> str:
    kind = "shows" if finding["shows"] else "does-not-show"
    return f'<span class="{kind}">{finding["verdict"]}</span>: {escape(sentence(finding))}'


def _table(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """The first row is the heading; with ``numbers`` all columns but the first hold numbers."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for first, *rest in body:
        kind = ' class="number"' if numbers else ""
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell in rest)
        lines.append(f"<tr><td>{escape(first)}</td>{cells}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _list(items: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{item}</li>" for item in items) + "\n</ul>"


def _paragraph(text: str) -> str:
    return f'<p class="small">{escape(text)}</p>'


def _details(summary: str, content: dict[str, Any]) -> str:
    text = escape(json.dumps(content, indent=2, ensure_ascii=False))
    return f"<details><summary>{escape(summary)}</summary><pre>{text}</pre></details>"


def _image(path: Path, what: str) -> str:
    """A PNG file as part of the page; nothing if it is not there."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(what)}" src="data:image/png;base64,{data}"/></p>'


def _page(title: str, sections: Sequence[Section]) -> str:
    contents = _list(
        f'<a href="#section-{index}">{escape(section.title)}</a>'
        for index, section in enumerate(sections)
    )
    body = "\n".join(
        f'<h2 id="section-{index}">{escape(section.title)}</h2>\n{section.body}'
        for index, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"{GENERATOR}\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{contents}\n{body}\n</body>\n</html>\n"
    )
