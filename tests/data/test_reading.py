"""Data as people have it: packed, in other encodings and layouts, with ids; what is dropped."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdprompt_fast.cli.main import main
from gdprompt_fast.data import read_records, read_triples, write_triples
from gdprompt_fast.data.people import make_people_data
from gdprompt_fast.evaluation import read_predictions

TRIPLE = {"context": "Zoé paints. Bob sings.", "query": "Who sings?", "response": "Bob"}
EVALUATE = ["--device", "cpu", "--answer-tokens"]
Write = Callable[..., Path]


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(content, name)``: a file with it."""

    def to(content: str | bytes, name: str = "my.jsonl") -> Path:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return to


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (gzip.compress(jsonl(TRIPLE).encode(), mtime=0), "utf-8"),
        (codecs.BOM_UTF8 + jsonl(TRIPLE).encode(), "utf-8"),
        (jsonl(TRIPLE).encode("utf-16"), "utf-16"),
        (codecs.BOM_UTF16_LE + jsonl(TRIPLE).encode("utf-16-le"), "utf-16-le"),
        (gzip.compress(jsonl(TRIPLE).encode("cp1252"), mtime=0), "cp1252"),
        (jsonl(TRIPLE).replace("\n", "\r\n").encode(), "utf-8"),
        (json.dumps([TRIPLE]).encode(), "utf-8"),
        (json.dumps([TRIPLE], indent=2).encode("utf-16"), "utf-16"),
    ],
    ids=["gzip", "BOM", "UTF-16", "its BOM", "gzip of cp1252", "Windows", "array", "indented"],
)
def test_the_same_triple_in_every_wrapping(content: bytes, encoding: str, write: Write) -> None:
    assert read_triples(write(content), encoding).to_list() == [TRIPLE]


def test_a_file_put_after_another_may_have_its_byte_order_mark(write: Write) -> None:
    part = codecs.BOM_UTF8 + jsonl(TRIPLE).encode()
    assert read_triples(write(part * 2)).to_list() == [TRIPLE] * 2


def test_a_prompt_is_the_query_beside_a_context(write: Write) -> None:
    context, query, response = TRIPLE.values()
    row = {"privileged_context": context, "prompt": query, "response": response}
    records = read_records(write(jsonl(row)))
    assert records.rows == [TRIPLE]
    assert records.read_as == "privileged_context read as context, prompt read as query"
    with pytest.raises(ValueError, match='expected the field "query"'):
        read_records(write(jsonl({"prompt": query, "response": response})))


def test_an_element_of_an_array_is_named_by_its_line(write: Write) -> None:
    path = write(json.dumps([TRIPLE, {**TRIPLE, "query": 3}], indent=1), "my.json")
    assert json.loads(path.read_text().partition(",\n {")[0].removeprefix("[")) == TRIPLE
    with pytest.raises(ValueError, match=r'my\.json, line 7: expected "query" to be'):
        read_triples(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((jsonl(TRIPLE) * 2).encode("latin-1"), r"line 1: expected text in utf-8.*--encoding"),
        (jsonl(TRIPLE).encode() + b"\n\n\xff", r"line 4: expected text in utf-8.*--encoding"),
        (jsonl(TRIPLE).encode("utf-16"), r"line 1: expected text in utf-8"),
        (gzip.compress(jsonl(TRIPLE).encode(), mtime=0)[:-9], "expected a whole gzip file"),
        (b"\x1f\x8b not packed", "expected a whole gzip file"),
        (json.dumps([TRIPLE])[:-1], "line 1: .*no comma or end of the array"),
        ("[]", "expected at least one record"),
        (json.dumps([TRIPLE]) + "\n{}", "line 1: .*more after the end of the array"),
        (b"BZh9...", "expected text, gzipped or not, got a bzip2 file"),
        (
            gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0),
            "expected text, .*, got a gzip in a gzip file",
        ),
        ("[{]", "line 1: expected a JSON object, got invalid JSON"),
        ("[\n[1]]", "line 2: expected a JSON object, got list"),
        ("{" * 10**5, "line 1: expected a JSON object, got invalid JSON"),
        ('{"a":' * 10**5, "line 1: expected a JSON object, got invalid JSON"),
        ('{"context": 1' + "0" * 5000 + "}", "line 1: expected a JSON object, got invalid JSON"),
        ('{"context": "a", "query": "b", "response": "\\udc3d"}', r"line 1: .*\\udc3d"),
    ],
)
def test_what_cannot_be_read_is_an_error_naming_file_and_line(
    content: str | bytes, message: str, write: Write
) -> None:
    with pytest.raises(ValueError, match=r"my\.jsonl(: |, )" + message):
        read_triples(write(content))


@pytest.mark.parametrize("encoding", ["no-such", "base64", "undefined"])
def test_an_unknown_encoding_is_an_error_naming_it(encoding: str, write: Write) -> None:
    with pytest.raises(ValueError, match=f"encoding: expected one .*, got '{encoding}'"):
        read_triples(write(jsonl({**TRIPLE, "context": "x" * 100 + ".é."})), encoding)


SQUAD = {
    "id": "5733",
    "context": "Bob sings.",
    "question": "Who sings?",
    "answers": {"text": ["Bob", "Bob", "Bobby"], "answer_start": [0, 0, 0]},
}


@pytest.mark.parametrize(
    ("row", "read", "said"),
    [
        (
            SQUAD,
            {"id": "5733", "context": "Bob sings.", "query": "Who sings?", "response": "Bob"}
            | {"answers": ["Bob", "Bobby"]},
            "question read as query, the first of answers read as response",
        ),
        (
            {"question": "Who?", "prompt": "Bob sings.", "response": "Bob"},
            {"context": "Bob sings.", "query": "Who?", "response": "Bob"},
            "prompt read as context, question read as query",
        ),
        (
            {
                "question": "Who?",
                "prompt": "p",
                "privileged_context": "c",
                "response": "r",
                "id": 7,
            },
            {"id": "7", "context": "c", "query": "Who?", "response": "r"},
            "privileged_context read as context, question read as query",
        ),
        ({**TRIPLE, "question": 1, "prompt": None, "answers": None, "id": None}, TRIPLE, ""),
        ({**TRIPLE, "id": [1]}, TRIPLE, ""),
    ],
    ids=["SQuAD of datasets", "question and prompt", "privileged context", "our own", "odd id"],
)
def test_other_layouts_are_recognised(
    row: dict[str, Any], read: dict[str, Any], said: str, write: Write
) -> None:
    records = read_records(write(jsonl(row)))
    assert records.rows == [read] and records.read_as == said


def test_squad_without_an_answer_is_an_error(write: Write) -> None:
    path = write(jsonl(SQUAD, {**SQUAD, "answers": {"text": [], "answer_start": []}}))
    with pytest.raises(ValueError, match=r'line 2: expected "answers" to be a list of non-empty'):
        read_triples(path)


def test_ids_survive_writing_and_reading(tmp_path: Path) -> None:
    rows = [{**TRIPLE, "id": "a"}, {**TRIPLE, "id": None}]
    write_triples(rows, tmp_path / "with.jsonl")
    assert read_triples(tmp_path / "with.jsonl").to_list() == rows


def test_squads_ids_are_kept_by_the_data_command(write: Write, tmp_path: Path) -> None:
    def article(title: str) -> dict[str, Any]:
        qa = {"id": f"id of {title}", "question": "Who?", "answers": [{"text": "Bob"}]}
        return {"title": title, "paragraphs": [{"context": f"About {title}.", "qas": [qa]}]}

    text = json.dumps({"data": [article(title) for title in "abc"]})
    path = write(gzip.compress(text.encode("utf-16")), "squad.json.gz")
    command = ["data", "squad", "--source", str(path), "--encoding", "utf-16"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    rows = read_triples(tmp_path / "out" / "train.jsonl").to_list()
    assert all(row["id"] == "id of " + row["context"][6] for row in rows) and len(rows) == 2


@pytest.fixture
def people(write: Write) -> Path:
    """Nine passages about people, the second far too long, with ids and odd spaces."""
    rows = make_people_data(1, 9, seed=0).test.to_list()
    rows[1]["context"] *= 20
    rows[2]["context"] = rows[2]["context"].replace(" ", "  ", 1)
    text = jsonl(*({**row, "id": 10 + index} for index, row in enumerate(rows)))
    return write("\n" + text, "people.jsonl")


def test_predictions_have_the_records_own_texts_and_ids(
    people: Path, model_folder: Path, tmp_path: Path
) -> None:
    predictions, squad, dropped = (tmp_path / name for name in ("p.jsonl", "s.json", "d.json"))
    command = ["evaluate", "--model", str(model_folder), "--data", str(people), *EVALUATE, "2"]
    files = ["--predictions", predictions, "--squad-predictions", squad, "--dropped", dropped]
    assert main([*command, *map(str, files)]) == 0
    rows = read_predictions(predictions)
    records = read_triples(people).to_list()
    del records[1]
    assert len(rows) == 8
    for row, record in zip(rows, records, strict=True):
        assert {name: row[name] for name in record if name != "answers"} == {
            name: text for name, text in record.items() if name != "answers"
        }
    answers = {row["id"]: row["settings"]["fine_tuning"]["answer"] for row in rows}
    assert json.loads(squad.read_text()) == answers and len(answers) == 8
    (lost,) = json.loads(dropped.read_text())["dropped"]
    assert lost["id"] == "11" and lost["file"] == str(people) and lost["line"] == 3
    assert "longer than" in lost["reason"]


@pytest.mark.parametrize(
    ("ids", "answer_tokens", "message"),
    [
        ([1, None], "2", "got 1 without one"),
        ([1, "1"], "2", "got 2 with '1'"),
        ([1, 2], "0", "expected answer_tokens >= 1, got 0"),
    ],
)
def test_squad_predictions_need_ids_and_answers(
    ids: list[Any],
    answer_tokens: str,
    message: str,
    write: Write,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = make_people_data(1, 2, seed=0).test.to_list()
    path = write(jsonl(*({**row, "id": i} for row, i in zip(rows, ids, strict=True))))
    command = ["evaluate", "--model", str(model_folder), "--data", str(path)]
    command += [*EVALUATE, answer_tokens, "--squad-predictions", str(tmp_path / "s.json")]
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_the_data_command_lists_what_it_dropped(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people.write_text(people.read_text().replace('"query"', '"question"'))
    command = ["data", "jsonl", "--source", str(people), "--max-characters", "1000"]
    dropped = tmp_path / "dropped.json"
    assert main([*command, "--output", str(tmp_path / "out"), "--dropped", str(dropped)]) == 0
    assert f"{people}: question read as query\n" in capsys.readouterr().out
    (lost,) = json.loads(dropped.read_text())["dropped"]
    assert (lost["id"], lost["reason"]) == ("11", "more than 1000 characters")


def test_every_command_lists_what_it_dropped_and_says_what_it_read(
    people: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = people.read_text().replace('"query"', '"question"')
    people.write_bytes(gzip.compress(text.encode("utf-16")))
    files = ["--model", str(model_folder), "--data", str(people), "--encoding", "utf-16"]
    train = ["--test-data", str(people), "--objective", "gold", "--batch-size", "2"]
    train += ["--device", "cpu", "--answer-tokens", "2"]
    dropped = tmp_path / "dropped.json"
    for command, options, count in (
        ("prepare", ["--steps", "1", "--batch-size", "2", "--device", "cpu"], 1),
        ("train", ["--steps", "1", *train], 2),
        ("search-outer-lr", ["--grid", "1e-3", "--steps-per-rate", "1", *train], 2),
    ):
        output = ["--output", str(tmp_path / command), "--dropped", str(dropped)]
        assert main([command, *files, *options, *output]) == 0
        assert "question read as query" in capsys.readouterr().out
        assert len(json.loads(dropped.read_text())["dropped"]) == count
        dropped.unlink()
