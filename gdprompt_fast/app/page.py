"""The page in gradio: what stands where, and what is done when something is pressed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr

from ..evaluation import SETTINGS
from .desk import Desk, Shown, cleared
from .examples import Sample
from .student import Report

CSS = Path(__file__).with_name("page.css")
MOST_WAITING = 32  # requests; whoever comes then is told to come back
FURTHEST = 4  # the slider goes up to so many times the rate that it begins at
NOTCHES = 200  # of the slider
LEGEND = (
    '<div class="legend"><span>0</span><span class="scale"></span><span>1</span>'
    "<span>probability of a token in that setting; below it, after the question alone, before → "
    "after the inner step</span></div>"
)
SAVE = """(file) => {
  if (!file) return;
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name || "adapter.zip";
  document.body.append(link);
  link.click();
  link.remove();
}"""
PROGRESS = gr.Progress()  # gradio gives every request its own in the place of this
# One request at a time is at the model, whichever button it is of.
AT_MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}


def build_page(desk: Desk, about: str, inner_lr: float, samples: Sequence[Sample]) -> gr.Blocks:
    """The page.

    Args:
        about: what is to be known of the model.
        inner_lr: the rate that the slider begins at.
        samples: to choose from; the first is filled in.
    """
    first = samples[0] if samples else Sample("", "")
    with gr.Blocks(title="gdprompt", analytics_enabled=False) as page:
        gr.Markdown(f"# One gradient step instead of a prompt\n{about}", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=10, min_width=340):
                left = _Left(first.passage, inner_lr)
            with gr.Column(scale=21, min_width=480):
                right = _Right(first.question)
                if samples:
                    chosen = _samples(samples, left, right)
        asked = dict(inputs=[left.passages, left.rate, right.question], **AT_MODEL)
        asked |= dict(outputs=[left.status, left.lesson, *right.cards])
        ask = _following(desk.ask, stages=5)
        again = _following(desk.again, stages=5)
        gr.on([right.ask.click, right.question.submit], ask, api_name="ask", **asked)
        left.rate.change(again, trigger_mode="always_last", api_visibility="private", **asked)
        if samples:
            chosen.then(ask, api_visibility="private", **asked)
        _wire_left(desk, left)
        _wire_clearing(left, right)
    return page.queue(max_size=MOST_WAITING)


class _Left:
    """Passages, rate, and what is learnt of them."""

    def __init__(self, passage: str, inner_lr: float) -> None:
        most = FURTHEST * inner_lr
        self.passages = gr.Textbox(
            passage,
            label="Passages (a blank line begins another)",
            lines=5,
            max_lines=16,
            elem_id="passages",
        )
        self.rate = gr.Slider(
            0, most, inner_lr, step=most / NOTCHES, label="Inner rate η", elem_id="rate"
        )
        # checked with all else that is asked, not by gradio, which breaks off on what is no number
        self.rate.preprocess = lambda payload: payload  # type: ignore[method-assign]
        with gr.Row():
            self.learn = gr.Button("Learn", variant="primary", min_width=100, elem_id="learn")
            self.adapter = gr.Button("Download adapter", min_width=190, elem_id="adapter")
        self.file = gr.DownloadButton(visible="hidden", elem_id="file")
        status, lesson, *_ = cleared()
        self.status = gr.HTML(status, elem_id="status", min_height=44)
        self.lesson = gr.HTML(lesson, elem_id="lesson")


class _Right:
    """Question and answers."""

    def __init__(self, question: str) -> None:
        with gr.Row(equal_height=True):
            self.question = gr.Textbox(question, label="Question", scale=6, elem_id="question")
            self.ask = gr.Button("Ask", variant="primary", scale=1, min_width=90, elem_id="ask")
        _, _, *cards = cleared()
        with gr.Row(equal_height=True):
            self.cards = [
                gr.HTML(card, elem_id=setting, elem_classes="answer", min_width=150)
                for card, setting in zip(cards, SETTINGS, strict=True)
            ]
        gr.HTML(LEGEND, elem_id="legend")


def _samples(samples: Sequence[Sample], left: _Left, right: _Right) -> Any:
    """Buttons that fill in a sample; the event of one pressed."""
    return gr.Examples(
        [list(each) for each in samples],
        [left.passages, right.question],
        example_labels=[each.question for each in samples],
        label="Samples, about people that it has never read about",
        api_visibility="private",
    ).load_input_event


def _wire_left(desk: Desk, left: _Left) -> None:
    inputs, outputs = [left.passages, left.rate], [left.status, left.lesson]

    def learn(text: str, rate: float, progress: gr.Progress = PROGRESS) -> Shown:
        return desk.learn(text, rate, _report(progress, 2))

    def adapter(text: str, rate: float, progress: gr.Progress = PROGRESS) -> Any:
        return desk.adapter(text, rate, _report(progress, 3))

    left.learn.click(learn, inputs, outputs, api_name="learn", **AT_MODEL)
    made = left.adapter.click(
        adapter, inputs, [*outputs, left.file], api_name="adapter", **AT_MODEL
    )
    made.then(None, left.file, None, js=SAVE)


def _wire_clearing(left: _Left, right: _Right) -> None:
    """What was said of another text goes when a text is edited; no request is made for it."""
    status, lesson, *cards = cleared()
    left.passages.input(
        None,
        None,
        [left.status, left.lesson, *right.cards],
        js=f"() => {json.dumps([status, lesson, *cards])}",
    )
    right.question.input(None, None, right.cards, js=f"() => {json.dumps(cards)}")


def _following(
    answer: Callable[[str, float, str, Report], Iterator[Shown]], stages: int
) -> Callable[..., Iterator[Shown]]:
    """A request that is answered in parts, with a bar of its progress."""

    def run(
        text: str, rate: float, question: str, progress: gr.Progress = PROGRESS
    ) -> Iterator[Shown]:
        yield from answer(text, rate, question, _report(progress, stages))

    return run


def _report(progress: gr.Progress, stages: int) -> Report:
    done = count()
    return lambda what: progress((next(done), stages), desc=what, unit="stages")
