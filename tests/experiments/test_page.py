"""The page of the results."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

from gdprompt_fast.cli.main import main
from gdprompt_fast.experiments import (
    EXPERIMENTS,
)
from gdprompt_fast.report import results_page
from helpers.experiments import content
from helpers.paths import ROOT


class Balanced(HTMLParser):
    """Checks that every tag is closed, and collects images and what is outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "meta":
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(str(dict(attrs)["src"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns("stages"))
    found = content(folder, "table4")
    found["texts"][0]["rows"][0][2] = "<script>alert('no')</script> & more"
    (folder / "table4.json").write_text(json.dumps(found))
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    page = Balanced()
    page.feed(text)
    assert not page.open and "script" not in page.tags and "link" not in page.tags
    assert "&lt;script&gt;alert(&#x27;no&#x27;)&lt;/script&gt; &amp; more" in text
    assert len(page.images) == len(EXPERIMENTS)
    assert all(image.startswith("data:image/png;base64,iVBOR") for image in page.images)
    for name in EXPERIMENTS:
        assert content(folder, name)["title"] in text
    assert "does not show" in text and "59.4" in text and "http" not in text


def test_the_page_has_the_runs_of_the_demo_and_of_train(tmp_path: Path) -> None:
    demo = ["demo", "--steps", "1", "--test-examples", "2", "--device", "cpu"]
    assert main([*demo, "--output", str(tmp_path / "demo")]) == 0
    text = results_page(tmp_path)
    assert "Run: demo" in text and "accuracy before" in text
    assert text.count("data:image/png;base64,iVBOR") == 1


def test_one_page_holds_the_results_of_all_three_papers_that_the_docs_have(tmp_path: Path) -> None:
    for folder, name in (
        ("experiments-small", "table4"),
        ("experiments-internalisation", "number-lists"),
        ("experiments-icl", "icl-table1"),
    ):
        for ending in ("json", "png"):
            shutil.copy(ROOT / "docs" / folder / f"{name}.{ending}", tmp_path)
    page = results_page(tmp_path)
    for paper in ("arXiv 2506.20989", "arXiv 2310.15047", "arXiv 2311.07772"):
        assert paper in page
