"""HTML of what was learnt and answered: every token a chip, coloured by its probability."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..evaluation import SETTINGS
from .lesson import Answer, AnswerToken, LearntLesson, PassageToken

# What each setting is, in the words of the page.
ASKED = {
    "no_context": "the question alone, at θ",
    "prompt": "passages and question, at θ",
    "fine_tuning": "the question alone, at θ′",
}
END = "end"


def percent(share: float) -> str:
    """A probability in at most two figures: "98 %", "1.2 %", "<0.1 %"."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{share:.0%}".replace("%", " %") if share >= 0.0995 else f"{share * 100:.1f} %"


def answer_card(answer: Answer | None, setting: str) -> str:
    """The card of a setting: its answer and the chips of its tokens; None: not asked yet."""
    head = f'<h3>{SETTINGS[setting]}</h3><p class="asked">{ASKED[setting]}</p>'
    if answer is None:
        body = '<p class="empty">no answer yet</p>'
    elif answer.problem:
        body = f'<p class="problem" role="alert">{escape(answer.problem)}</p>'
    else:
        chips = "".join(map(_answer_chip, answer.tokens))
        cut = "" if answer.tokens[-1].ends else '<span class="cut">… cut here</span>'
        body = (
            f'<p class="said">{escape(answer.text) or "—"}</p>'
            f'<p class="whole">the whole answer: {percent(answer.probability)}</p>'
            f'<div class="chips">{chips}{cut}</div>'
        )
    return f'<section class="card {setting}">{head}{body}</section>'


def _answer_chip(token: AnswerToken) -> str:
    likeliest = ", ".join(f"{text} {percent(share)}" for text, share in token.likeliest)
    hover = (
        f"{token.text}: {token.own:.4g} in this setting\n"
        f"after the question alone: {token.before:.4g} before the inner step, "
        f"{token.after:.4g} after it\nlikeliest here: {likeliest}"
    )
    text = f"<i>{END}</i>" if token.ends else escape(token.text)
    change = f"{percent(token.before)} → {percent(token.after)}"
    return (
        f'<span class="chip" style="--p:{token.own:.3f}" title="{escape(hover)}"><b>{text}</b>'
        f"<span>{percent(token.own)}</span><small>{change}</small></span>"
    )


def lesson_card(learnt: LearntLesson) -> str:
    """The passages' tokens before the inner step and after it, each with its mean NLL."""
    rows = []
    for when, weights in (("before", "θ"), ("after", "θ′")):
        strips = "".join(_strip(passage, when) for passage in learnt.passages)
        nll = f"{learnt.nll(when):.3f} nats a token"
        rows.append(f"<h4>{when} the inner step, at {weights}: {nll}</h4>{strips}")
    return f'<section class="card lesson">{"".join(rows)}</section>'


def _strip(passage: Sequence[PassageToken], when: str) -> str:
    chips = []
    for token in passage:
        share = getattr(token, when)
        hover = f"{token.text}: {token.before:.4g} before, {token.after:.4g} after"
        chips.append(
            f'<span class="mini" style="--p:{share:.3f}" title="{escape(hover)}">'
            f"{escape(token.text)}</span>"
        )
    return f'<div class="strip">{" ".join(chips)}</div>'


def notice(text: str) -> str:
    """A line on what was done."""
    return f'<p class="notice" role="status">{escape(text)}</p>'


def problem(text: str) -> str:
    """A line on what cannot be done."""
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def learnt_notice(learnt: LearntLesson, unknown: Iterable[str]) -> str:
    """What the inner step was taken on, and the words that the model does not know."""
    count = len(learnt.passages)
    said = (
        f"Learnt {count} passage{'s' if count > 1 else ''}, {learnt.tokens} tokens, "
        f"at η = {learnt.lesson.inner_lr:g} in {learnt.seconds:.2f} s."
    )
    words = list(unknown)
    if not words:
        return notice(said)
    return notice(said) + problem(
        f"Not in the model's vocabulary, and all the same to it: {', '.join(words[:12])}"
        f"{', …' if len(words) > 12 else ''}"
    )
