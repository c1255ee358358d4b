"""The page in a real browser, headless: learn, ask, move the slider, download, reload."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("selenium", reason="no selenium to lead a browser with")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from gdprompt_fast.app.examples import unseen_samples
from gdprompt_fast.app.probabilities import probabilities
from helpers.pages import PEOPLE, lesson_of, student_in, with_adapter
from helpers.paths import ROOT

PROGRAMS = [shutil.which(each) for each in ("chromium", "chromedriver")]
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("gradio") is None,
        reason="the page needs gradio: pip install -e '.[app]'",
    ),
    pytest.mark.skipif(
        None in PROGRAMS, reason="no chromium and chromedriver to look at the page with"
    ),
]
PATIENCE = 120  # seconds, on a machine that does much else
OPTIONS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --window-size=1380,1150"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``gdprompt app`` as a user starts it; ended, it leaves nothing behind."""
    place = tmp_path_factory.mktemp("app")
    temporary = place / "tmp"
    temporary.mkdir()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": path}
    command = [sys.executable, "-m", "gdprompt_fast", "app", "--port", "0", "--device", "cpu"]
    log = place / "app.log"
    with log.open("w") as errors:
        app = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert app.stdout is not None
        try:
            found = re.match(r"(http://127\.0\.0\.1:\d+/): ", app.stdout.readline())
            assert found, log.read_text()
            yield found[1]
        finally:
            app.send_signal(signal.SIGTERM)
            assert app.wait(PATIENCE) == 0
    assert "Traceback" not in log.read_text()
    assert not list(temporary.glob("gdprompt-app-*"))


class Visit:
    """A browser at the page, with what a visitor does there and sees."""

    def __init__(self, browser: Any, downloads: Path) -> None:
        self.browser, self.downloads = browser, downloads

    def element(self, selector: str) -> Any:
        return self.until(lambda: self.browser.find_elements(By.CSS_SELECTOR, selector))[0]

    def until(self, see: Callable[[], Any]) -> Any:
        """What ``see`` returns when that is true."""
        return WebDriverWait(self.browser, PATIENCE, 0.1).until(lambda _: see())

    def press(self, name: str) -> None:
        self.element(f"#{name}").click()

    def write(self, name: str, text: str) -> None:
        box = self.element(f"#{name} textarea, #{name} input")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(Keys.DELETE)
        box.send_keys(text)

    def status(self) -> str:
        return str(self.element("#status").text)

    def until_status(self, words: str) -> None:
        self.until(lambda: words in self.status())

    def said(self, setting: str) -> str:
        """The answer in a setting; "" while there is none."""
        found = self.browser.find_elements(By.CSS_SELECTOR, f"#{setting} .said")
        return str(found[0].text) if found else ""

    def answers(self) -> list[str]:
        return [self.said(setting) for setting in ("no_context", "prompt", "fine_tuning")]

    def downloaded(self) -> Path | None:
        whole = [each for each in self.downloads.iterdir() if each.suffix == ".zip"]
        return whole[0] if whole else None

    def hosts(self) -> set[str]:
        """Of all that the page has asked for over the network."""
        sent = [
            json.loads(row["message"])["message"] for row in self.browser.get_log("performance")
        ]
        asked = [each["params"] for each in sent if each["method"] == "Network.requestWillBeSent"]
        urls = [urlsplit(each["request"]["url"]) for each in asked]
        return {str(url.hostname) for url in urls if url.scheme in ("http", "https", "ws", "wss")}


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """A browser that has been nowhere yet."""
    place = tmp_path_factory.mktemp("browser")
    downloads = place / "downloads"
    downloads.mkdir()
    options = webdriver.ChromeOptions()
    options.binary_location, driver = PROGRAMS
    for each in [*OPTIONS.split(), f"--user-data-dir={place / 'profile'}"]:
        options.add_argument(each)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Visit(browser, downloads)
    finally:
        browser.quit()


@pytest.fixture
def visit(url: str, visitor: Visit) -> Visit:
    """At a page as every visitor finds it."""
    visitor.browser.get(url)
    return visitor


def test_a_visit(visit: Visit, tmp_path: Path) -> None:
    person, sample = PEOPLE[0], unseen_samples()[0]
    visit.press("learn")  # what the page begins with
    visit.until_status("Learnt 1 passage")
    assert len(visit.browser.find_elements(By.CSS_SELECTOR, "#lesson .mini")) > 60

    visit.press("ask")
    no_context, prompt, fine_tuning = visit.until(lambda: all(visit.answers()) and visit.answers())
    assert prompt == fine_tuning != no_context and prompt in sample.passage
    chip = visit.element("#fine_tuning .chip")
    assert "before the inner step" in chip.get_attribute("title") and "→" in chip.text

    visit.write("passages", person["context"])  # what was said of another is gone at once
    visit.until(lambda: visit.answers() == ["", "", ""])
    visit.write("question", person["query"] + Keys.ENTER)
    visit.until(lambda: all(visit.answers()))
    assert visit.said("prompt") == visit.said("fine_tuning") == person["response"]

    visit.press("adapter")
    path = visit.until(visit.downloaded)
    check_adapter(path, person, tmp_path)

    visit.element("#rate input[type=range]").send_keys(Keys.HOME)  # η = 0: nothing is learnt
    visit.until_status("at η = 0 ")
    visit.until(
        lambda: all(visit.answers()) and visit.said("fine_tuning") == visit.said("no_context")
    )

    visit.browser.refresh()
    visit.until(
        lambda: visit.element("#passages textarea").get_attribute("value") == sample.passage
    )
    assert visit.answers() == ["", "", ""]
    visit.press("ask")
    visit.until(lambda: visit.said("fine_tuning") == fine_tuning)

    assert visit.hosts() == {"127.0.0.1"}
    severe = [each for each in visit.browser.get_log("browser") if each["level"] == "SEVERE"]
    assert not severe


def check_adapter(path: Path, person: dict[str, str], folder: Path) -> None:
    """Plain PEFT with the zip on a fresh base holds the answer as likely as the page said."""
    student = student_in(folder)
    answer = student.answer(lesson_of(person), person["query"], "fine_tuning")
    loaded = with_adapter(path, folder / "adapter")
    rows = student.tokenizer(
        [person["query"], f"{person['response']}{student.tokenizer.eos_token}"]
    )
    query, response = rows["input_ids"]
    (places,) = probabilities(loaded, [query], [response[1:]])  # without the BOS
    expected = [pytest.approx(token.own, rel=1e-3) for token in answer.tokens]
    assert [place.probability for place in places] == expected


def test_bad_input_is_a_message(visit: Visit) -> None:
    visit.write("passages", " ")
    visit.press("learn")
    visit.until_status("passages: expected a text to learn, got none")
    visit.press("adapter")
    visit.until_status("passages: expected a text to learn, got none")
    visit.write("passages", "the mill is red. " * 60)
    visit.press("ask")
    visit.until_status("passages: expected 2 to 128 tokens in each")
    visit.write("passages", PEOPLE[0]["context"])
    visit.write("question", " " + Keys.ENTER)
    visit.until_status("question: expected one, got none")
    visit.write("question", PEOPLE[0]["query"] + Keys.ENTER)
    visit.until(lambda: all(visit.answers()))  # and all is well again
