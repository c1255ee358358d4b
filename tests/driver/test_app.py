"""What the page says, without the page: what is learnt and answered, and what cannot be."""

from __future__ import annotations

import copy
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gdprompt_fast.app import lesson as lesson_module
from gdprompt_fast.app import student as student_module
from gdprompt_fast.app.desk import Desk
from gdprompt_fast.app.examples import unseen_samples
from gdprompt_fast.app.lesson import Answer, Lesson
from gdprompt_fast.app.markup import percent
from gdprompt_fast.app.probabilities import probabilities
from gdprompt_fast.app.student import KEPT_ADAPTERS, KEPT_LESSONS, Student
from gdprompt_fast.bundled import meta_trained_folder
from gdprompt_fast.cli.main import main
from gdprompt_fast.data import Limits, make_people_data, tokenise_triples
from gdprompt_fast.evaluation import SETTINGS, InnerStep, evaluate
from helpers.pages import PEOPLE, RATE, desk_in, lesson_of, said, student_in, text_of, with_adapter


@pytest.fixture
def student(tmp_path: Path) -> Student:
    return student_in(tmp_path)


def quiet(what: str) -> None:
    """Hears a report and does nothing."""


def answers(student: Student, person: dict[str, str], rate: float = RATE) -> dict[str, Answer]:
    lesson = lesson_of(person, rate)
    return {each: student.answer(lesson, person["query"], each) for each in SETTINGS}


def test_the_bundled_meta_trained_model_is_small_and_learns_in_one_step(tmp_path: Path) -> None:
    assert sum(file.stat().st_size for file in meta_trained_folder().iterdir()) < 2.5e6
    student = student_in(tmp_path)
    unseen = make_people_data(1, 200, seed=1).test
    examples = tokenise_triples(unseen, student.tokenizer, Limits(128, 128, 128)).examples
    inner = InnerStep(RATE)
    scores = evaluate(student.model, student.tokenizer, examples, inner, 100, answer_tokens=0)
    accuracy = {setting: of.summary().accuracy for setting, of in scores.items()}
    assert accuracy["no_context"] <= 0.05
    assert accuracy["prompt"] >= 0.95 and accuracy["fine_tuning"] >= 0.95


@pytest.mark.parametrize("sample", unseen_samples(), ids=lambda sample: sample.question)
def test_a_sample_of_the_page_is_answered_right_after_the_step(
    sample: Any, student: Student
) -> None:
    person = {"context": sample.passage, "query": sample.question}
    found = {setting: answer.text for setting, answer in answers(student, person).items()}
    assert found["fine_tuning"] == found["prompt"] != found["no_context"]
    assert found["prompt"] in sample.passage


@torch.no_grad()
def test_probabilities_are_those_of_the_models_own_forward(student: Student) -> None:
    model = student.model
    starts, ends = [[1, 8, 9], [1, 7, 30, 31, 32]], [[5, 6], [9]]
    for start, end, places in zip(starts, ends, probabilities(model, starts, ends), strict=True):
        for at, place in enumerate(places):
            row = torch.tensor([[*start, *end[:at]]])
            shares = model(input_ids=row).logits[0, -1].softmax(-1)
            assert place.probability == pytest.approx(float(shares[end[at]]), rel=1e-4)
            best = int(shares.argmax())
            assert place.likeliest[0] == (best, pytest.approx(float(shares[best]), rel=1e-4))


def test_what_is_said_after_the_step_is_what_a_step_of_sgd_leaves(student: Student) -> None:
    person = PEOPLE[0]
    answer = answers(student, person)["fine_tuning"]
    stepped = copy.deepcopy(student.model)
    ids = torch.tensor([student._encode.rows([person["context"]])[0]])
    loss = F.cross_entropy(stepped(input_ids=ids).logits[0, :-1], ids[0, 1:])
    loss.backward()
    with torch.no_grad():
        for parameter in stepped.parameters():
            parameter -= RATE * parameter.grad
    other = Student(stepped, student.tokenizer, student.options, student.folder)
    again = other.answer(lesson_of(person, 0.0), person["query"], "no_context")
    assert again.text == answer.text == person["response"]
    for token, of_sgd in zip(answer.tokens, again.tokens, strict=True):
        assert token.own == token.after == pytest.approx(of_sgd.own, rel=1e-4)
    learnt, at_sgd = student.learn(lesson_of(person)), other.learn(lesson_of(person, 0.0))
    assert learnt.nll("before") == pytest.approx(float(loss), rel=1e-5)
    assert learnt.nll("after") == pytest.approx(at_sgd.nll("before"), rel=1e-4)


def test_tokens_have_their_probabilities_in_every_setting(student: Student) -> None:
    found = answers(student, PEOPLE[1])
    for setting, answer in found.items():
        assert answer.tokens[-1].ends and answer.text == " ".join(
            t.text for t in answer.tokens[:-1]
        )
        for token in answer.tokens:
            own = {"no_context": token.before, "fine_tuning": token.after}
            assert token.own == own.get(setting, token.own)
            assert token.likeliest[0] == (token.text, pytest.approx(token.own))  # it is greedy
    assert found["prompt"].tokens[0].before < 0.5 < found["prompt"].tokens[0].after


def test_at_a_rate_of_zero_nothing_is_learnt(student: Student) -> None:
    found = answers(student, PEOPLE[2], rate=0.0)
    assert found["fine_tuning"].text == found["no_context"].text
    for token in found["fine_tuning"].tokens:
        assert token.before == pytest.approx(token.after, rel=1e-5)


def test_several_passages_are_learnt_in_one_step(student: Student) -> None:
    text = f"{PEOPLE[0]['context']}\n \n{PEOPLE[1]['context']}\n\n\n"
    lesson = Lesson.of(text, RATE)
    assert lesson.passages == (PEOPLE[0]["context"], PEOPLE[1]["context"])
    learnt = student.learn(lesson)
    assert len(learnt.passages) == 2
    assert learnt.nll("after") < learnt.nll("before")


def test_passages_too_long_for_the_prompt_are_learnt_all_the_same(tmp_path: Path) -> None:
    text = "\n\n".join(person["context"] for person in PEOPLE[:4])
    *_, last = desk_in(tmp_path).ask(text, RATE, PEOPLE[0]["query"], quiet)
    _, _, no_context, prompt, fine_tuning = last
    assert said(no_context) and said(fine_tuning) and not said(prompt)
    assert "the model has room for 96 before an answer" in text_of(prompt)


PASSAGE = PEOPLE[0]["context"]
LONG = " ".join(["the mill is red."] * 40)


@pytest.mark.parametrize(
    ("text", "rate", "message"),
    [
        ("", RATE, "passages: expected a text to learn, got none"),
        (None, RATE, "passages: expected a text to learn, got none"),
        (" \n\n \t", RATE, "passages: expected a text to learn, got none"),
        (LONG, RATE, "passages: expected 2 to 128 tokens in each, which the model has"),
        ("\n\n".join([PASSAGE] * 20), RATE, "passages: expected at most 512 tokens in all, got 8"),
        ("a" * 300_000, RATE, "passages: expected at most 200,000 characters, got 300,000"),
        (PASSAGE, -1.0, "η: expected a number from 0 to 1,000,000, got -1.0"),
        (PASSAGE, float("nan"), "η: expected a number from 0 to 1,000,000, got nan"),
        (PASSAGE, float("inf"), "η: expected a number from 0 to 1,000,000, got inf"),
        (PASSAGE, "much", "η: expected a number from 0 to 1,000,000, got much"),
        (PASSAGE, None, "η: expected a number from 0 to 1,000,000, got None"),
        (PASSAGE, 10**400, "η: expected a number from 0 to 1,000,000, got 1000"),
        ("the \ud83d", RATE, "passages: expected whole characters, got half of one"),
        (PASSAGE, True, "η: expected a number from 0 to 1,000,000, got True"),
    ],
)
def test_a_bad_lesson_is_a_message(text: Any, rate: Any, message: str, tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    status, lesson = desk.learn(text, rate, quiet)
    assert text_of(status).startswith(message) and not lesson
    (shown,) = desk.ask(text, rate, PEOPLE[0]["query"], quiet)
    assert shown[0] == status and not any(map(said, shown[2:]))
    status, lesson, path = desk.adapter(text, rate, quiet)
    assert text_of(status).startswith(message) and path is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "question: expected one, got none"),
        (None, "question: expected one, got none"),
        ("  ", "question: expected one, got none"),
        ("who \ud83d", "question: expected whole characters, got half of one"),
        (LONG, "question: expected 1 to 96 tokens, which leaves room for an answer, got"),
        ("a" * 300_000, "question: expected at most 200,000 characters, got 300,000"),
    ],
)
def test_a_bad_question_is_a_message(question: Any, message: str, tmp_path: Path) -> None:
    (shown,) = desk_in(tmp_path).ask(PASSAGE, RATE, question, quiet)
    assert text_of(shown[0]).startswith(message)


def test_a_rate_that_leaves_no_probabilities_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lesson_module, "HIGHEST_RATE", 1e38)
    status, lesson = desk_in(tmp_path).learn(PASSAGE, 1e38, quiet)
    message = "η: expected a rate at which θ' gives probabilities, got 1e+38"
    assert text_of(status) == message and not lesson


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), FloatingPointError("inner loss: not finite")]
)
def test_a_failing_step_is_a_message(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(student_module, "inner_step", fail)
    status, _ = desk_in(tmp_path).learn(PASSAGE, RATE, quiet)
    assert text_of(status) == str(error)


def test_words_that_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    status, _ = desk_in(tmp_path).learn("the Zebra of the mill is Ada Quagga.", RATE, quiet)
    assert text_of(status).endswith("all the same to it: Zebra, Quagga")
    assert "vocabulary" not in text_of(desk_in(tmp_path).learn(PASSAGE, RATE, quiet)[0])


def test_what_is_typed_is_text_and_no_html(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)"> & the mill'
    shown = [part for each in desk_in(tmp_path).ask(evil, RATE, evil, quiet) for part in each]
    assert "img" in text_of("".join(shown))
    assert not any("<img" in part for part in shown)


ODD = [
    "",
    "\0",
    "\ud83d",
    "é\u2028",
    "<b>",
    "&amp;",
    "a\n\nb",
    "\n\n",
    "\t",
    "𝕏" * 5,
    "🙂",
    "the mill",
]
ODD += ["<s>", "</s> the", "<unk>", "<pad> <pad>", "the " * 100, PASSAGE]
ODD_RATES = [0, RATE, -1, 10.0, 1e30, 1e-320, 10**400, "x", None, float("nan"), [], {}]


def test_odd_input_is_an_answer_or_a_message(tmp_path: Path) -> None:
    desk, rng = desk_in(tmp_path), random.Random(0)
    for _ in range(100):
        text = " ".join(rng.choices(ODD, k=rng.randint(1, 3)))
        *_, (status, _, *cards) = desk.ask(text, rng.choice(ODD_RATES), rng.choice(ODD), quiet)
        assert 'class="said"' in "".join(cards) or 'role="alert"' in status


def test_answers_come_one_after_another_and_every_stage_is_reported(tmp_path: Path) -> None:
    stages: list[str] = []
    shown = list(desk_in(tmp_path).ask(PASSAGE, RATE, PEOPLE[0]["query"], stages.append))
    assert [sum(map(bool, map(said, each[2:]))) for each in shown] == [1, 2, 3]
    assert stages[:2] == ["inner step on 41 tokens", "what it changed"]
    assert stages[2:] == [f"answering: {name}" for name in SETTINGS.values()]


def test_without_a_question_another_rate_is_only_learnt_at(tmp_path: Path) -> None:
    ((status, lesson, *cards),) = desk_in(tmp_path).again(PASSAGE, 0.25, " ", quiet)
    assert "η = 0.25" in text_of(status) and lesson and not any(map(said, cards))


def test_an_adapter_gives_the_same_answer_by_plain_peft(student: Student, tmp_path: Path) -> None:
    person = PEOPLE[3]
    answer = answers(student, person)["fine_tuning"]
    loaded = with_adapter(student.adapter(lesson_of(person)), tmp_path / "unpacked")
    query, _ = student._starts(lesson_of(person), person["query"])
    ids = student.tokenizer.convert_tokens_to_ids([t.text for t in answer.tokens[:-1]])
    end = student.tokenizer.eos_token_id
    (places,) = probabilities(loaded, [query], [[*ids, end]])
    for token, place in zip(answer.tokens, places, strict=True):
        assert place.probability == pytest.approx(token.own, rel=1e-4)


def test_gdprompt_ask_takes_the_adapter(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    person, folder = PEOPLE[4], tmp_path / "unpacked"
    shutil.unpack_archive(student.adapter(lesson_of(person)), folder)
    model = ["--model", str(meta_trained_folder()), "--device", "cpu"]
    capsys.readouterr()
    assert main(["ask", *model, "--adapter", str(folder), "--compare", person["query"]]) == 0
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[-3:])
    found = {SETTINGS[setting]: answer.text for setting, answer in answers(student, person).items()}
    assert {name: text.strip() for name, text in told.items()} == found


def test_only_so_much_is_kept(tmp_path: Path) -> None:
    student = student_in(tmp_path, max_context_tokens=41)
    first = student.learn(lesson_of(PEOPLE[0]))
    assert student.learn(lesson_of(PEOPLE[0])) is first
    for index in range(KEPT_ADAPTERS + 2):
        path = student.adapter(lesson_of(PEOPLE[0], RATE + index / 100))
        assert path.is_file()
    assert sum(each.tokens for each in student._learnt.values()) <= 41 * KEPT_LESSONS
    assert len(list(tmp_path.rglob("*.zip"))) == len(list(tmp_path.iterdir())) == KEPT_ADAPTERS
    assert student.learn(lesson_of(PEOPLE[0])) is not first


def test_many_users_at_once_get_what_each_would_get_alone(student: Student, tmp_path: Path) -> None:
    alone = {p["query"] + p["context"]: answers(student, p) for p in PEOPLE}
    together = student_in(tmp_path, max_context_tokens=41)  # so θ' are dropped and made again
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda person: answers(together, person), PEOPLE * 2))
    for person, got in zip(PEOPLE * 2, found, strict=True):
        assert got == alone[person["query"] + person["context"]]
    assert not any("forward" in vars(module) for module in together.model.modules())


def test_whoever_stops_listening_holds_up_nobody(tmp_path: Path) -> None:
    desk: Desk = desk_in(tmp_path)
    left = desk.ask(PASSAGE, RATE, PEOPLE[0]["query"], quiet)
    next(left)  # its connection is gone; it is neither asked for more nor closed
    other = threading.Thread(target=lambda: desk.learn(PEOPLE[1]["context"], RATE, quiet))
    other.start()
    other.join(30)
    assert not other.is_alive()


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.0 %"),
        (1e-9, "<0.1 %"),
        (0.012, "1.2 %"),
        (0.0996, "10 %"),
        (0.984, "98 %"),
        (1, "100 %"),
    ],
)
def test_a_probability_is_written_in_two_figures(share: float, text: str) -> None:
    assert percent(share) == text
