"""The six tasks from files of their layouts, and from the hub's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from datasets import Dataset

from gdprompt_fast.errors import UserError
from gdprompt_fast.icl import tasks
from gdprompt_fast.icl.tasks import TASKS, Item, items_of, shuffled
from helpers.icl_tasks import write_cb, write_lines
from helpers.paths import SHARED_DATA


def test_lines_have_a_label_and_a_text(tmp_path: Path) -> None:
    train, test = tmp_path / "train", tmp_path / "dev"
    train.write_text("4 a stirring , funny crème brûlée\n0 dull .\n", encoding="utf-8")
    test.write_text("2 so so\n")
    drawn, evaluated = items_of("sst5", train, test)
    assert drawn == [
        Item("Sentence: a stirring , funny crème brûlée Label:", 4),
        Item("Sentence: dull . Label:", 0),
    ]
    assert evaluated == [Item("Sentence: so so Label:", 2)]


def test_subj_has_the_hubs_labels_and_is_latin_1(tmp_path: Path) -> None:
    """Its file has 0 for subjective; options are objective, subjective."""
    file = tmp_path / "subj"
    file.write_text("0 a crème \n1 he leaves for town . \n", encoding="latin-1")
    drawn, _ = items_of("subj", file, file)
    assert drawn == [Item("Input: a crème Type:", 1), Item("Input: he leaves for town . Type:", 0)]
    assert TASKS["subj"].options[drawn[0].label] == "subjective"


def test_news_are_classes_from_one_on(tmp_path: Path) -> None:
    file = tmp_path / "news.csv"
    file.write_text('Class Index,Title,Description\n3,Fears,"a, b ""c"""\n4,Race,on\n')
    drawn, _ = items_of("agnews", file, file)
    ask = (
        "Classify the news articles into the categories of World, Sports, Business, and "
        "Technology. Article: {} Answer:"
    )
    assert drawn == [Item(ask.format('Fears a, b "c"'), 2), Item(ask.format("Race on"), 3)]


def test_cb_has_words_for_labels(tmp_path: Path) -> None:
    file = write_cb(tmp_path / "cb", 3)
    drawn, evaluated = items_of("cb", file, file)
    assert [each.label for each in drawn] == [0, 1, 2]
    assert drawn[0].text.endswith(". True, False, or Neither? Answer:")
    assert sorted(evaluated) == sorted(drawn)


def test_of_a_single_file_what_is_evaluated_is_never_a_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mr"
    file.write_text("".join(f"{i % 2} text {i}\n" for i in range(1100)))
    drawn, evaluated = items_of("mr", file)
    assert (len(drawn), len(evaluated)) == (34, 1066)
    assert not {*drawn} & {*evaluated}
    assert items_of("mr", file) == (drawn, evaluated)


def test_the_order_is_that_of_datasets_shuffle() -> None:
    items = [Item(str(index), index) for index in range(50)]
    expected = Dataset.from_list([{"n": index} for index in range(50)]).shuffle(seed=3)["n"]
    assert [each.label for each in shuffled(items, 3)] == list(expected)


def test_the_hubs_rows_become_the_same_items(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "train": [{"premise": "p .", "hypothesis": "h", "label": 2}],
        "validation": [{"premise": "q", "hypothesis": "i", "label": 0}],
    }
    asked = []

    def load(path: str, name: str | None, split: str) -> list[dict[str, object]]:
        asked.append((path, name, split))
        return rows[split]

    monkeypatch.setattr(tasks, "load_hub", load)
    drawn, evaluated = items_of("cb")
    assert drawn == [Item("p . Question: h. True, False, or Neither? Answer:", 2)]
    assert [each.label for each in evaluated] == [0]
    assert asked == [("aps/super_glue", "cb", each) for each in ("train", "validation")]


def test_without_the_hub_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, name: str | None, split: str) -> None:
        raise UserError(f"{path}: expected to load it, got: no net; --source takes a file instead")

    monkeypatch.setattr(tasks, "load_hub", fail)
    with pytest.raises(UserError, match="got: no net; --files mr=FILE reads one instead"):
        items_of("mr")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mr", "2 text\n", r"mr, line 1: expected a label below 2 and a text, got '2 text'"),
        ("mr", "0 a\nno label\n", r"mr, line 2: expected a label below 2"),
        ("mr", "\n", r"mr: expected rows of MR, got none"),
        ("mr", "0 a\n", r"mr: expected more than the 1066 rows that are evaluated, got 1;"),
        ("agnews", "Class Index,Title\n1,a\n", r"agnews, line 2: expected Class Index \(1 to 4\)"),
        ("cb", '{"premise": "a"}\n', r"cb, line 1: expected premise, hypothesis and a label of"),
        ("cb", "[\n", r"cb, line 1: expected premise"),
    ],
)
def test_a_file_of_another_layout_is_one_clear_line(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        items_of(name, file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="files: expected a file for MR, got"):
        items_of("mr", tmp_path / "none")
    with pytest.raises(UserError, match="test_file: expected none without a file"):
        items_of("mr", None, write_lines(tmp_path / "mr", 4))


@pytest.mark.parametrize(
    ("name", "files", "sizes", "labels"),
    [
        ("cb", ("cb/train.jsonl", "cb/val.jsonl"), (250, 56), (115, 119, 16)),
        ("sst2", ("sst2/stsa.binary.train", "sst2/stsa.binary.dev"), (6920, 872), (3310, 3610)),
        ("sst5", ("sst5/stsa.fine.train", "sst5/stsa.fine.dev"), (8544, 1101), None),
        ("mr", ("mr/rt-polarity.all",), (9596, 1066), None),
        ("subj", ("subj/subj.all",), (8000, 2000), None),
        ("agnews", ("agnews/test.csv",), (5600, 2000), None),
    ],
)
def test_real_files_are_read(
    name: str, files: tuple[str, ...], sizes: tuple[int, int], labels: tuple[int, ...] | None
) -> None:
    folder = SHARED_DATA / "icl_cls"
    if not folder.is_dir():
        pytest.skip("the shared data sets are not here")
    drawn, evaluated = items_of(name, *(folder / each for each in files))
    assert (len(drawn), len(evaluated)) == sizes
    options = range(len(TASKS[name].options))
    assert {each.label for each in drawn} == {*options}
    if labels is not None:
        assert tuple(sum(each.label == label for each in drawn) for label in options) == labels
    assert random.Random(0).choice(drawn).text.endswith(":")
