"""The page on an address, and nothing of it from anywhere else."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .desk import Desk
from .examples import Sample
from .page import CSS, build_page
from .student import Options, Student

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
# The browser itself refuses whatever is not of this server.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; base-uri 'self'; object-src 'none'; frame-ancestors 'self'"
)


@contextmanager
def opened(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    about: str,
    inner_lr: float,
    samples: Sequence[Sample],
    listening: socket.socket,
) -> Iterator[threading.Thread]:
    """Inside, the page of a model is served by the thread given; afterwards nothing of it is left.

    Args:
        options: as :class:`Student` takes them.
        about, inner_lr, samples: as :func:`build_page` takes them.
        listening: made by :func:`listening_socket`; it is closed at the end.

    Raises:
        UserError: if the tokenizer does not go with the options.
        RuntimeError: if the server does not start.
    """
    temporary = TemporaryDirectory(prefix="gdprompt-app-")
    with closing(listening), temporary as folder, _own_files(folder):
        student = Student(model, tokenizer, options, Path(folder))
        page = build_page(Desk(student), about, inner_lr, samples)
        with _served(page, listening) as thread:
            yield thread


@contextmanager
def _own_files(folder: str) -> Iterator[None]:
    """Inside, gradio keeps its files in ``folder`` and reports to nobody."""
    own = {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any that is free.

    Raises:
        UserError: if there is none to be had.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"host, port: expected an address to listen on, got {host} port {port} ({error})"
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port, *_ = listening.getsockname()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


@contextmanager
def _served(page: gr.Blocks, listening: socket.socket) -> Iterator[threading.Thread]:
    """Inside, the page is served by the thread given."""
    config = uvicorn.Config(_application(page), log_level="warning", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), name="gdprompt app")
    thread.start()
    try:
        while not server.started:
            thread.join(0.05)
            if not thread.is_alive():
                raise RuntimeError("the server of the page did not start")
        yield thread
    finally:
        server.should_exit = True
        thread.join()


def _application(page: gr.Blocks) -> FastAPI:
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    application.add_middleware(_OwnAlone)
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal, neutral_hue=gr.themes.colors.slate, font=FONTS
    )
    return gr.mount_gradio_app(
        application,
        page,
        path="/",
        theme=theme,
        css_paths=CSS,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )


class _OwnAlone:
    """Adds the policy to every answer."""

    def __init__(self, application: Any) -> None:
        self._application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self._application(scope, receive, send_with_policy)
