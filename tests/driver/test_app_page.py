"""The page as a server without a browser: its requests, its address, and what it loads."""

from __future__ import annotations

import importlib
import importlib.util
import re
import socket
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from gdprompt_fast.app.examples import unseen_samples
from gdprompt_fast.app.student import Options
from gdprompt_fast.bundled import meta_trained_folder
from gdprompt_fast.cli.main import main
from gdprompt_fast.errors import UserError
from gdprompt_fast.runs import AppConfig
from helpers.pages import PEOPLE, RATE, said, student_in, text_of

if TYPE_CHECKING:
    from gradio_client import Client

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="the page needs gradio: pip install -e '.[app]'",
)
PASSAGE, QUESTION = PEOPLE[0]["context"], PEOPLE[0]["query"]


@pytest.fixture(scope="module")
def server() -> ModuleType:
    """With it comes gradio, seconds that only a process with these tests to run spends."""
    return importlib.import_module("gdprompt_fast.app.server")


@pytest.fixture(scope="module")
def url(server: ModuleType) -> Iterator[str]:
    student = student_in(Path())
    listening = server.listening_socket("127.0.0.1", 0)
    model, tokenizer = student.model, student.tokenizer
    with server.opened(model, tokenizer, Options(), "about", RATE, unseen_samples(), listening):
        yield server.url_of(listening)


def client_of(url: str, files: str | bool) -> Client:
    from gradio_client import Client

    return Client(url, verbose=False, download_files=files, analytics_enabled=False)


@pytest.fixture
def client(url: str, tmp_path: Path) -> Client:
    return client_of(url, str(tmp_path))


def html_of(shown: Any) -> str:
    """The HTML in what a request returns, which may be an update of a component."""
    return str(shown.get("value", "")) if isinstance(shown, dict) else str(shown)


def test_learning_and_asking(client: Client) -> None:
    status, lesson = map(html_of, client.predict(PASSAGE, RATE, api_name="/learn"))
    assert text_of(status).startswith("Learnt 1 passage, 41 tokens, at η = 0.5 in ")
    assert "before the inner step" in text_of(lesson) and "after the inner step" in text_of(lesson)
    *_, no_context, prompt, fine_tuning = map(
        html_of, client.predict(PASSAGE, RATE, QUESTION, api_name="/ask")
    )
    assert said(prompt) == said(fine_tuning) == PEOPLE[0]["response"] != said(no_context)


def test_the_adapter_is_a_zip(client: Client) -> None:
    status, _, path = client.predict(PASSAGE, RATE, api_name="/adapter")
    assert "The adapter is a zip of" in text_of(html_of(status))
    with zipfile.ZipFile(path) as archive:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(archive.namelist())


@pytest.mark.parametrize(
    ("text", "rate", "message"),
    [
        ("", RATE, "passages: expected a text to learn, got none"),
        (PASSAGE, "much", "η: expected a number from 0 to 1,000,000, got much"),
        (PASSAGE, None, "η: expected a number from 0 to 1,000,000, got None"),
        (PASSAGE, -3, "η: expected a number from 0 to 1,000,000, got -3"),
    ],
)
def test_bad_input_is_a_message_and_no_traceback(
    text: Any, rate: Any, message: str, client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    status, lesson = map(html_of, client.predict(text, rate, api_name="/learn"))
    assert text_of(status) == message and not lesson
    *_, path = client.predict(text, rate, api_name="/adapter")
    assert path is None or not html_of(path)
    assert "Traceback" not in capfd.readouterr().err


def test_the_page_loads_nothing_from_elsewhere(url: str) -> None:
    with urllib.request.urlopen(url) as response:
        policy, html = response.headers["Content-Security-Policy"], response.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy
    loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"([^\"]*)\"", html)
    loaded += re.findall(r"<link[^>]*\bhref=\"([^\"]*)\"", html)
    elsewhere = [each for each in loaded if re.match("(https?:)?//", each.removeprefix(url))]
    assert loaded and not elsewhere
    assert 'analytics_enabled":false' in html.replace(" ", "")


def test_files_of_the_machine_are_not_served(url: str) -> None:
    for path in (Path(__file__), meta_trained_folder() / "config.json", Path("/etc/hostname")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_what_is_no_request_of_the_page_is_refused(client: Client) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises((ValueError, AppError)):
        client.predict(PASSAGE, api_name="/no-such-request")


def test_nothing_is_left_when_the_page_closes(
    server: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    student, listening = student_in(tmp_path), server.listening_socket("127.0.0.1", 0)
    page = student.model, student.tokenizer, Options(), "", RATE, [], listening
    with server.opened(*page) as thread:
        url = server.url_of(listening)
        client = client_of(url, False)
        client.predict(PASSAGE, RATE, api_name="/adapter")
        client.close()
        assert list(tmp_path.glob("gdprompt-app-*/*"))
    assert not thread.is_alive() and not list(tmp_path.glob("gdprompt-app-*"))
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url)


def test_it_listens_on_the_loopback_address_unless_told_otherwise(server: ModuleType) -> None:
    assert AppConfig().host == "127.0.0.1"
    with server.listening_socket(AppConfig().host, 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
    with server.listening_socket("0.0.0.0", 0) as listening:
        assert server.url_of(listening).startswith("http://127.0.0.1:")


def test_an_address_that_is_not_to_be_had_is_one_clear_line(
    server: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port), "--device", "cpu"]) == 2
    message = f"error: host, port: expected an address to listen on, got 127.0.0.1 port {port}"
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="host, port: expected an address to listen on, got 256"):
        server.listening_socket("256.0.0.1", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70_000}, "port: expected 0 to 65535, got 70000"),
        ({"inner_lr": 0.0}, "inner_lr: expected a number > 0, got 0.0"),
        ({"answer_tokens": 0}, "answer_tokens: expected an integer >= 1, got 0"),
        ({"max_context_tokens": 0}, "max_context_tokens: expected an integer >= 1, got 0"),
        ({"inner_params": "some"}, "inner_params: expected one of"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        AppConfig(**options)
