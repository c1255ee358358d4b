"""Every source of triples: WikiText, SQuAD, JSONL and what is generated, from files and the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from gdprompt_fast.cli.main import main
from gdprompt_fast.data import (
    SOURCES,
    make_data,
    read_triples,
)
from gdprompt_fast.data.squad import Row, sentence_with_answer, squad_corpus
from gdprompt_fast.data.wikitext import PARAGRAPHS, Cut, articles_of, cut_articles
from helpers.paths import SHARED_DATA
from helpers.triples import unlike

SQUAD_SUBSET = SHARED_DATA / "squad" / "squad-v1.1-subset.json"


Records = list[dict[str, Any]]
WIKITEXT = """
 = First = \n \n one two three four five six seven
 \n = = Section = = \n \n a b c
 \n alpha beta gamma delta epsilon zeta
 \n some formula with a break
 = 1 and k =
 2 . This goes on and on
 \n = Second ( film ) = \n \n eins zwei drei vier fünf sechs sieben acht
"""


def test_wikitext_is_read_by_article_without_headings() -> None:
    assert list(articles_of(WIKITEXT.splitlines())) == [
        [
            "one two three four five six seven",
            "a b c",
            "alpha beta gamma delta epsilon zeta",
            "some formula with a break",
            "2 . This goes on and on",
        ],
        ["eins zwei drei vier fünf sechs sieben acht"],
    ]


def test_a_text_is_cut_into_context_one_word_and_continuation() -> None:
    cut = Cut(min_words=30, min_context_words=10, max_context_words=20, response_words=5)
    texts = [" ".join(f"w{i}" for i in range(length)) for length in range(28, 60)]
    corpus = cut_articles([texts], cut, seed=0)
    assert corpus.counts == {"fewer than 30 words": 2}
    (records,) = corpus.groups
    assert len(records) == 30
    for text, record in zip(texts[2:], records, strict=True):
        words = record["context"].split()
        assert 10 <= len(words) <= 20 and len(record["response"].split()) == 5
        assert len(record["query"].split()) == 1
        assert text.startswith(" ".join([*words, record["query"], record["response"]]))
    assert len({len(record["context"].split()) for record in records}) > 5
    assert cut_articles([texts], cut, seed=0) == corpus != cut_articles([texts], cut, seed=1)


def test_every_place_that_leaves_room_is_cut_at() -> None:
    cut = Cut(min_words=6, min_context_words=2, max_context_words=9, response_words=2)
    corpus = cut_articles([["a b c d e f g"]] * 50, cut, seed=0)
    assert {record["context"] for record in corpus.records()} == {"a b", "a b c", "a b c d"}


def test_a_cut_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected min_words to have room"):
        Cut(min_words=20, min_context_words=10, max_context_words=15, response_words=10)
    with pytest.raises(ValueError, match="expected 1 <= min_context_words <= max_context_words"):
        Cut(min_words=30, min_context_words=10, max_context_words=9, response_words=10)


def paragraph(word: str) -> str:
    return " ".join(f"{word}{i}" for i in range(PARAGRAPHS.min_words + 20))


def wikitext_file(path: Path, articles: Iterable[str]) -> Path:
    path.write_text("".join(f"\n = {a} = \n\n {paragraph(a)} \n short\n" for a in articles))
    return path


def test_a_single_wikitext_file_is_divided_by_article(tmp_path: Path) -> None:
    path = wikitext_file(tmp_path / "wiki.txt", [f"title{i}x" for i in range(30)])
    data = make_data("wikitext", source=path, seed=1)
    assert (len(data.train), len(data.test)) == (27, 3)
    assert data.counts == {"train": 27, "test": 3, "dropped: fewer than 128 words": 30}
    assert unlike(data)
    assert make_data("wikitext", source=path, seed=1).test.to_list() == data.test.to_list()
    assert make_data("wikitext", source=path, seed=2).test.to_list() != data.test.to_list()


def squad_layout(articles: dict[str, dict[str, list[tuple[str, list[str]]]]]) -> dict[str, Any]:
    def qas(questions: list[tuple[str, list[str]]]) -> Records:
        return [
            {"question": question, "answers": [{"text": text, "answer_start": 0} for text in texts]}
            for question, texts in questions
        ]

    return {
        "version": "1.1",
        "data": [
            {
                "title": title,
                "paragraphs": [{"context": c, "qas": qas(q)} for c, q in paragraphs.items()],
            }
            for title, paragraphs in articles.items()
        ],
    }


def squad_file(path: Path, articles: Iterable[str]) -> Path:
    layout = squad_layout(
        {a: {f"About {a}.": [("What?", [a]), ("Who?", [f"the {a}", a, a])]} for a in articles}
    )
    path.write_text(json.dumps(layout))
    return path


def test_squad_keeps_all_answers_and_drops_empty_and_repeated_questions() -> None:
    corpus = squad_corpus(
        [
            Row("A", "Bob sings. ", " Who sings?", ["Bob", " ", "Bob", "bob "]),
            Row("A", "Bob sings.", "Who sings?", ["Robert"]),
            Row("A", "Bob sings.", "Who dances?", []),
            Row("B", "Bob sings.", " ", ["Bob"]),
            Row("B", "Ann sings.", "Who sings?", ["Ann"]),
        ]
    )
    assert corpus.groups == [
        [
            {
                "context": "Bob sings.",
                "query": "Who sings?",
                "response": "Bob",
                "answers": ["Bob", "bob"],
            }
        ],
        [
            {
                "context": "Ann sings.",
                "query": "Who sings?",
                "response": "Ann",
                "answers": ["Ann"],
            }
        ],
    ]
    assert corpus.counts == {"question repeated": 1, "empty context, question or answer": 2}


def test_of_a_passage_only_the_sentence_with_the_answer_may_be_kept() -> None:
    passage = 'Ann met Mr. Bob. "He sings!" she said. In the U.S. Army he danced. It ended.'

    def sentence(answer: str) -> str:
        row = Row("A", passage, "Who?", [answer], begin=passage.index(answer))
        return sentence_with_answer(row)

    assert sentence("she") == '"He sings!" she said.'
    assert sentence("U.S. Army") == "In the U.S. Army he danced."  # its own full stop is inside
    assert sentence("ended") == "It ended."
    (group,) = squad_corpus([Row("A", passage, "Who?", ["she"], begin=29)], sentences=True).groups
    assert group[0]["context"] == '"He sings!" she said.'


def test_a_single_squad_file_is_divided_by_article(tmp_path: Path) -> None:
    data = make_data("squad", source=squad_file(tmp_path / "squad.json", "abcdefghij"), test=3)
    assert len(data.test) == 3 and len(data.train) == 16
    assert unlike(data)
    assert [len(answers) for answers in data.train["answers"]] == [1, 2] * 8


def test_two_files_are_training_and_test_set(tmp_path: Path) -> None:
    train = squad_file(tmp_path / "train.json", "abcdx")
    test = squad_file(tmp_path / "dev.json", "xyz")
    data = make_data("squad", source=train, test_source=test)
    assert {*data.train["context"]} == {f"About {a}." for a in "abcd"}
    assert {*data.test["context"]} == {f"About {a}." for a in "xyz"}
    assert data.counts == {"train": 8, "test": 6, "dropped: context in the test set": 2}


def test_long_records_are_dropped_and_fewer_can_be_drawn(tmp_path: Path) -> None:
    files = {
        "source": squad_file(tmp_path / "train.json", ["a", "b", "c", "d" * 50]),
        "test_source": squad_file(tmp_path / "dev.json", ["x", "y"]),
    }
    data = make_data("squad", 4, 1, max_characters=40, **files)
    assert data.counts == {"train": 4, "test": 1, "dropped: more than 40 characters": 2}
    again = make_data("squad", 4, 1, max_characters=40, **files)
    assert again.train.to_list() == data.train.to_list()
    with pytest.raises(ValueError, match="train: expected 1 to 8, all records there are, got 9"):
        make_data("squad", 9, 1, **files)


def test_real_squad() -> None:
    if not SQUAD_SUBSET.is_file():
        pytest.skip("the SQuAD subset is not in ../shared/data")
    data = make_data("squad", source=SQUAD_SUBSET)
    too_long = {"dropped: more than 1500 characters": 400}
    dropped = {"dropped: question repeated": 30, **too_long}
    assert data.counts == {"train": 7347, "test": 986, **dropped}
    whole = make_data("squad", source=SQUAD_SUBSET, max_characters=100_000)
    assert whole.counts["train"] + whole.counts["test"] == 7347 + 986 + 400
    assert unlike(data)
    for record in data.test:
        assert record["response"] == record["answers"][0]
        assert any(answer in record["context"] for answer in record["answers"])


def jsonl_file(path: Path, contexts: int) -> Path:
    lines = [
        json.dumps({"context": f"c{i // 3}", "query": f"q{i}", "response": "r"})
        for i in range(3 * contexts)
    ]
    path.write_text("\n".join(lines))
    return path


def test_jsonl_is_divided_by_context(tmp_path: Path) -> None:
    path = jsonl_file(tmp_path / "mine.jsonl", contexts=20)
    data = make_data("jsonl", source=path)
    assert (len(data.train), len(data.test)) == (54, 6) and unlike(data)
    assert len(make_data("jsonl", source=path, test=25).test) == 25
    with pytest.raises(ValueError, match="test: expected to leave records to train on, got 60"):
        make_data("jsonl", source=path, test=60)


def test_a_bad_line_is_an_error_naming_file_and_line(tmp_path: Path) -> None:
    path = jsonl_file(tmp_path / "mine.jsonl", contexts=2)
    path.write_text(path.read_text() + '\n{"context": "c", "query": "q"}')
    with pytest.raises(ValueError, match=r'mine\.jsonl, line 7: expected the field "response"'):
        make_data("jsonl", source=path)


def test_bad_arguments_are_errors_that_name_them(tmp_path: Path) -> None:
    path = jsonl_file(tmp_path / "mine.jsonl", contexts=2)
    with pytest.raises(ValueError, match=r"name: expected one of character-.*, got 'squid'"):
        make_data("squid")
    with pytest.raises(ValueError, match="source: expected none for people, which is made up"):
        make_data("people", source=path)
    with pytest.raises(ValueError, match="source: expected a file for jsonl, got none"):
        make_data("jsonl")
    with pytest.raises(ValueError, match="source: expected a file for squad, got none"):
        make_data("squad", test_source=path)
    with pytest.raises(ValueError, match=r"source: expected a file, got .*absent"):
        make_data("squad", source=tmp_path / "absent")
    with pytest.raises(ValueError, match="train: expected an integer >= 1, got 0"):
        make_data("people", train=0)
    with pytest.raises(ValueError, match=r"mine\.jsonl: expected SQuAD's official JSON layout"):
        make_data("squad", source=path)
    half = tmp_path / "half.json"
    half.write_text(
        squad_file(tmp_path / "squad.json", "ab").read_text().replace("About", "\\ud83d")
    )
    with pytest.raises(ValueError, match=r"half\.json: expected SQuAD's .*surrogates not allowed"):
        make_data("squad", source=half)
    with pytest.raises(ValueError, match="expected paragraphs of at least 128 words"):
        make_data("wikitext", source=path)


def hub(rows: dict[str, Records], asked: list[str]) -> Any:
    """Stands for ``datasets.load_dataset``."""

    def load(path: str, name: str | None, split: str) -> Dataset:
        asked.append(f"{path} {name} {split}")
        return Dataset.from_list(rows[split])

    return load


def test_the_splits_of_squad_on_the_hub_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(title: str) -> dict[str, Any]:
        answers = {"text": [title, f"the {title}"], "answer_start": [0, 0]}
        return {"title": title, "context": f"About {title}.", "question": "?", "answers": answers}

    asked: list[str] = []
    rows = {"train": [row("a"), row("b")], "validation": [row("c")]}
    monkeypatch.setattr("gdprompt_fast.data.corpus.load_dataset", hub(rows, asked))
    data = make_data("squad")
    assert data.train["context"][:] == ["About a.", "About b."]
    assert data.test["answers"][:] == [["c", "the c"]]
    assert asked == ["rajpurkar/squad None train", "rajpurkar/squad None validation"]


def test_wikitext_103_is_asked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(articles: str) -> Records:
        lines = [line for a in articles for line in ("", f" = {a} = \n", "", paragraph(a))]
        return [{"text": line} for line in lines]

    asked: list[str] = []
    splits = {"train": rows("abc"), "test": rows("xy")}
    monkeypatch.setattr("gdprompt_fast.data.corpus.load_dataset", hub(splits, asked))
    data = make_data("wikitext")
    assert (len(data.train), len(data.test)) == (3, 2)
    name = "Salesforce/wikitext wikitext-103-raw-v1"
    assert asked == [f"{name} train", f"{name} test"]


def test_the_command_writes_triples_and_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = squad_file(tmp_path / "squad.json", "abcdefghij")
    output = tmp_path / "new" / "squad"
    command = ["data", "squad", "--output", str(output), "--source", str(source), "--test", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| train | 18 | 82,031 |" in printed and "| test | 2 | 10,380 |" in printed
    assert printed.count("\nresponse: ") == 3
    assert len(read_triples(output / "train.jsonl")) == 18
    assert read_triples(output / "test.jsonl")[1]["answers"][0].startswith("the ")
    about = json.loads((output / "data.json").read_text())
    assert about["name"] == "squad" and about["seed"] == 0 and about["source"] == str(source)
    assert about["sizes"] == {"train": 18, "test": 2}
    assert about["counts"] == {"train": 18, "test": 2}
    assert about["paper"] == {"train": 82031, "test": 10380}
    assert {*about["versions"]} == {"python", "gdprompt_fast", "datasets"}


def test_the_command_replaces_its_own_data_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "people", "--output", str(tmp_path / "people"), "--test", "2", "--train"]
    assert main([*command, "3"]) == 0 and main([*command, "4"]) == 0
    assert len(read_triples(tmp_path / "people" / "train.jsonl")) == 4
    (tmp_path / "people" / "notes.txt").write_text("mine")
    assert main([*command, "5"]) == 2
    assert "output: expected a new or empty folder" in capsys.readouterr().err
    assert len(read_triples(tmp_path / "people" / "train.jsonl")) == 4


@pytest.mark.parametrize("name", ["squad", "wikitext"])
def test_a_hub_out_of_reach_is_an_error_that_names_the_way_out(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_network(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("gdprompt_fast.data.corpus.load_dataset", no_network)
    assert main(["data", name, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "Couldn't reach the Hub" in error and "--source" in error
    assert not (tmp_path / "out").exists()


def test_every_source_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    printed = re.sub(r"\s+", "", capsys.readouterr().out)
    assert all(f"{name}:" in printed for name in SOURCES)
