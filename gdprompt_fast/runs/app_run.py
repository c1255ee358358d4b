"""``gdprompt app``: a page where a model learns passages and is asked, on this machine."""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..app.examples import Sample, unseen_samples
from ..app.student import Options
from ..bundled import META_TRAINED_INNER_LR, meta_trained_folder
from ..config.fields import check_counts, check_numbers, option
from ..errors import UserError
from ..loading import load_model, max_prompt_length, print_notes
from ..models.inner_params import INNER_PARAMS, select_inner
from .command import command
from .groups import DeviceConfig, WeightsConfig, dtype_field

LOOPBACK = ("127.0.0.1", "::1", "localhost")
INNER_LR = 1e-3  # of a model that nothing is known of
ABOUT = (
    "learns the passages in one gradient step, θ′ = θ − η ∇L, and answers without them in its "
    "prompt: **Fine-Tuning**. Beside it, at the old θ: the question alone, **No Context**, and the "
    "passages in the prompt, **Prompt**."
)
ABOUT_BUNDLED = (
    f"A Llama of 0.9 M parameters, meta-trained by `gdprompt demo`, {ABOUT} It knows only the "
    "words of passages such as these, and has never read about the people in them."
)


@dataclass(frozen=True, kw_only=True)
class AppConfig(WeightsConfig, DeviceConfig):
    """Which model to show, and on which address."""

    command = "app"

    model: Path | None = option(
        None,
        "transformers model or PEFT adapters: a folder, GGUF file or name on the hub; None: the "
        "bundled model as gdprompt demo meta-trains it",
        reads=True,
    )
    dtype: str = dtype_field()
    inner_lr: float | None = option(
        None, f"rate η to begin with; None: {META_TRAINED_INNER_LR} bundled, else {INNER_LR}"
    )
    inner_steps: int = option(1, "inner steps on the passages")
    inner_params: str = option("full", "what the inner step moves", INNER_PARAMS)
    answer_tokens: int = option(32, "longest answer")
    max_context_tokens: int = option(512, "of all passages together; more is refused")
    chat_template: bool = option(False, "ask in the words of the tokenizer's chat template")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: every one of this machine")
    port: int = option(7860, "port to listen on; 0: any that is free")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "inner_steps", "answer_tokens", "max_context_tokens")
        if self.inner_lr is not None:
            check_numbers(self, "inner_lr", above_zero=True)
        if not 0 <= self.port <= 65535:
            raise UserError(f"port: expected 0 to 65535, got {self.port}")

    @property
    def options(self) -> Options:
        """How the model learns and answers."""
        return Options(
            self.inner_steps,
            self.inner_params,
            self.answer_tokens,
            self.max_context_tokens,
            self.chat_template,
        )

    @property
    def rate(self) -> float:
        """The rate to begin with."""
        if self.inner_lr is not None:
            return self.inner_lr
        return META_TRAINED_INNER_LR if self.model is None else INNER_LR

    @property
    def about(self) -> str:
        """What is to be known of the model, in Markdown."""
        return ABOUT_BUNDLED if self.model is None else f"`{self.model}` {ABOUT}"

    @property
    def samples(self) -> list[Sample]:
        """Passages to choose from."""
        return unseen_samples() if self.model is None else []

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model on the device, and its tokenizer.

        Raises:
            UserError: naming what of them is wrong.
        """
        name = meta_trained_folder() if self.model is None else self.model
        model, tokenizer = load_model(name, self.dtype, self.torch_device, **self.weights)
        print_notes(model, tokenizer)
        return model, tokenizer


@command("A page in the browser: learn passages, ask, and see three answers side by side.")
def app(config: AppConfig) -> Callable[[], None]:
    """Sees that the address is free and loads the model; the work is to serve the page until it is
    ended.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError('app: expected gradio, got none; pip install "gdprompt_fast[app]"')
    from ..app.server import listening_socket, opened, url_of

    listening_socket(config.host, config.port).close()
    model, tokenizer = config.load()
    select_inner(model, config.inner_params)
    max_prompt_length(model, config.answer_tokens)

    def work() -> None:
        listening = listening_socket(config.host, config.port)
        page = config.about, config.rate, config.samples
        with opened(model, tokenizer, config.options, *page, listening) as server:
            print(f"{url_of(listening)}: to be opened in a browser; Ctrl-C ends it", flush=True)
            if config.host not in LOOPBACK:
                print(f"note: whoever reaches {config.host} can use the page, it has no password")
            _until_ended(server)

    return work


def _until_ended(server: threading.Thread) -> None:
    """Waits for Ctrl-C or SIGTERM; either lets everything be cleaned up."""
    ended = threading.Event()
    hears = threading.current_thread() is threading.main_thread()  # which alone gets signals
    signals = (signal.SIGINT, signal.SIGTERM) if hears else ()
    before = {each: signal.signal(each, lambda *_: ended.set()) for each in signals}
    try:
        while server.is_alive() and not ended.wait(0.2):
            pass
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
