"""Every experiment at the smallest size, from its command to its page."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdprompt_fast.cli.main import main
from gdprompt_fast.errors import UserError
from gdprompt_fast.internalisation import EXPERIMENTS, Preset, mnist, stages
from gdprompt_fast.internalisation.material.digits import FILES, make_pairs, read_digits, targets
from gdprompt_fast.internalisation.measured import STRONG_CLAIM, Scores
from gdprompt_fast.internalisation.mnist import FRACTIONS, Options
from gdprompt_fast.report import results_page
from gdprompt_fast.runs import InternalisationConfig, internalisation
from gdprompt_fast.runs.file_run import read_run_file
from gdprompt_fast.runs.internalisation_run import OWN_PRESETS, preset_sizes
from gdprompt_fast.runs.papers import chosen
from helpers.experiments import content


def config(sections: dict[str, Any], output: Path, **options: Any) -> InternalisationConfig:
    return InternalisationConfig(sizes=sections, output=output, **options)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_tables_findings_notes_and_a_figure(made: Path, name: str) -> None:
    found = content(made / "out", name)
    assert found["tables"] and found["findings"] and found["notes"] and found["over_seeds"]
    assert found["seeds"] == [0, 1] and "2310.15047" in found["paper"]["source"]
    for table in found["tables"]:
        assert all(len(row["cells"]) == len(table["columns"]) for row in table["rows"])
    verdicts = {each["verdict"] for each in found["findings"]}
    assert verdicts <= {"shows", "does not show"}
    text = (made / "out" / f"{name}.md").read_text()
    assert "half of the 95 % interval over seeds" in text
    assert (made / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_has_all_of_them(made: Path) -> None:
    page = results_page(made / "out")
    titles = [content(made / "out", name)["title"] for name in EXPERIMENTS]
    assert all(escape(title) in page for title in titles)


def claims(made: Path, name: str) -> list[str]:
    return [each["claim"] for each in content(made / "out", name)["findings"]]


def test_what_the_paper_says_is_judged_and_nothing_else(made: Path) -> None:
    of = {name: claims(made, name) for name in EXPERIMENTS}
    for name in ("main", "trex"):
        assert "names and variables are answered alike" in of[name]
        assert "what is never seen is answered above 0 by guessing" in of[name]
    assert "tag 2, the questions' entity: none" in of["attribution"]
    assert "strong internalisation is larger on entities than on facts" in of["attribution"]
    assert not any("strong internalisation: " in claim for claim in of["mnist"])  # of 10 pairs
    wrong = "a wrong definition with tag 1 is learnt more than a right one with tag 2"
    assert wrong not in of["alpha"]  # of α = 0.75
    assert sorted(Counter(of["alignment"]).values())[-3:] == [4, 4, 4]  # two batches, two pairs
    whole = [claim for claim in of["batch-size"] if "a batch has all texts" in claim]
    assert len(whole) == 1  # of numbers, which are not attributed


def test_an_order_may_have_fewer_seeds(made: Path) -> None:
    of = {"seed-0/word-order/tve", "seed-1/word-order/tve", "seed-0/word-order/etv"}
    assert set(content(made / "out", "word-order")["stages"]) == of


def test_mnist_grows_with_its_pairs_and_is_judged_from_fifty_on() -> None:
    def of(high: str, low: str) -> Scores:
        result = {"first": {"d1consis": high, "d2consis": low, "qd1consis": "1", "qd2incons": "0"}}
        return Scores([SimpleNamespace(result=result)] * 2, joint=True)

    found = mnist.judged((20, 100), {"20 pairs": of("10", "10"), "100 pairs": of("11", "10")})
    strong = [each.where for each in found if each.claim == STRONG_CLAIM]
    assert strong == ["100 pairs"] and "difference at 100 pairs 50.0" in found[-1].because


def test_torchvision_s_digits_make_stages_stale_too(made: Path, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(made / "digits", raw)
    before = mnist.hashes(tmp_path)
    assert len(before) == 4 and all(name.startswith("MNIST/raw/") for name in before)
    (raw / FILES["test"][1]).write_bytes(b"other")
    assert mnist.hashes(tmp_path) != before


def test_attribution_asks_the_models_of_the_main_experiment(made: Path) -> None:
    used = content(made / "out", "attribution")["stages"]
    assert set(used) == {f"seed-{seed}/main/tiny" for seed in (0, 1)}


def test_what_is_there_is_not_done_again_and_the_files_are_left_as_they_were(
    made: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(stages, "train", never)
    markdown = internalisation(config(sections, made / "out", name="number-lists"))
    assert markdown == made / "out" / "number-lists.md"


def test_an_interrupted_stage_goes_on_where_it_was(
    made: Path, sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, done = stages.train, list[int]()

    def third_fails(*args: Any, **kwargs: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(0)
        return train(*args, **kwargs)

    monkeypatch.setattr(stages, "train", third_fails)
    with pytest.raises(KeyboardInterrupt):
        internalisation(config(sections, tmp_path / "out", name="main"))
    monkeypatch.setattr(stages, "train", lambda *a, **k: done.append(1) or train(*a, **k))
    internalisation(config(sections, tmp_path / "out", name="main"))
    assert done == [0, 0, 1, 1, 1, 1]  # two seeds, each a first and two second stages
    whole, again = (content(each / "out", "main") for each in (made, tmp_path))
    assert whole["tables"] == again["tables"]
    folder = tmp_path / "out" / "stages" / "seed-0" / "main" / "tiny"
    assert not list(folder.glob("*.pt"))


def test_other_settings_are_refused_where_stages_are_there(
    made: Path, sections: dict[str, Any]
) -> None:
    lists = {**sections["number-lists"], "stage2_seeds": 2}
    with pytest.raises(UserError, match="stage2_seeds: expected 1 as in"):
        internalisation(
            config({**sections, "number-lists": lists}, made / "out", name="number-lists")
        )


@pytest.mark.parametrize(
    ("section", "change", "match"),
    [
        ("people", {"file": "nowhere"}, "files: expected people=FILE"),
        ("people", {"entities": 0}, "entities"),
        ("stages", {"first": {"epochs": 1}}, "batch_size"),
        ("main", {"stage2_seeds": 0}, "stage2_seeds"),
        ("main", {"colour": 1}, "colour"),
        ("main", {"seeds": [1, 1]}, r"\[main\]: seeds"),
        ("ask", {"attribution": ["whose"]}, "attribution"),
        ("model", {"name": "no-such-folder/x/y"}, "model"),
    ],
)
def test_a_preset_that_does_not_do_is_refused(
    sections: dict[str, Any], tmp_path: Path, section: str, change: dict[str, Any], match: str
) -> None:
    changed = {**sections, section: {**sections[section], **change}}
    with pytest.raises(UserError, match=match):
        internalisation(config(changed, tmp_path / "out", name="main"))


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("alpha", {"alphas": [1.5]}, "alphas"),
        ("word-order", {"orders": ["tvx"]}, "orders"),
        ("batch-size", {"batches": [16]}, "batches"),
        ("data-amount", {"amounts": []}, "amounts"),
        ("mnist", {"side": 5}, "side"),
        ("mnist", {"folder": "nowhere"}, "mnist=FOLDER"),
        ("alignment", {"source": "poems"}, "source"),
        ("meta", {"arms": {"epochz": 1}}, "epochz"),
        ("number-lists", {"lists": {"variables": 4, "numbers": 2, "length": 2}}, "numbers"),
    ],
)
def test_a_bad_section_is_refused(
    sections: dict[str, Any], tmp_path: Path, name: str, change: dict[str, Any], match: str
) -> None:
    changed = {**sections, name: {**sections[name], **change}}
    with pytest.raises(UserError, match=match):
        internalisation(config(changed, tmp_path / "out", name=name))


@pytest.mark.parametrize("name", OWN_PRESETS)
def test_the_presets_of_the_package_have_all_experiments(name: str) -> None:
    preset = Preset.read(preset_sizes(name))
    assert chosen("all", EXPERIMENTS, preset.sections) == list(EXPERIMENTS)
    for each, its in EXPERIMENTS.items():
        preset.section(each, its.options)
        assert preset.seeds_of(each)


def test_the_command_line_and_files_take_it(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.toml"
    lists = {"variables": 20, "numbers": 6, "length": 2}
    text = (
        '[internalisation]\nname = "number-lists"\noutput = "OUT"\n[internalisation.sizes.model]\n'
    )
    text += 'name = "none"\nseeds = [0]\n[internalisation.sizes.number-lists]\n'
    text += "first = {epochs = 1, batch_size = 99, block = 8}\n"
    text += f"second = {{epochs = 1, batch_size = 99, block = 8}}\nlists = {json.dumps(lists)}\n"
    text = text.replace('":', '" =')
    file.write_text(text.replace("OUT", (tmp_path / "out").as_posix()))
    (read,) = read_run_file(file)
    assert isinstance(read, InternalisationConfig)
    command = ["internalisation", "main", "--output", str(tmp_path / "new")]
    assert main([*command, "--files", "stars=here"]) == 2
    assert "files: expected NAME=PATH" in capsys.readouterr().err
    assert main([*command, "--files", "people=nowhere"]) == 2
    assert "people=FILE" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_digits_are_read_gzipped_or_not_and_a_broken_file_is_named(
    made: Path, tmp_path: Path
) -> None:
    for split in FILES:
        digits = read_digits(made / "digits", split, 14)
        assert digits.images.shape == (20, 14, 14) and len(digits.of_digit) == 10
    with pytest.raises(UserError, match="torchvision's MNIST"):
        read_digits(tmp_path, "test", 14)
    folder = shutil.copytree(made / "digits", tmp_path / "digits")
    (folder / FILES["test"][1]).write_bytes(b"\0\0\x08\x01\0\0\0\x09abc")
    with pytest.raises(UserError, match=r"expected \(9,\) values"):
        read_digits(folder, "test", 14)


def test_a_wrong_grid_differs_in_every_cell_and_a_question_has_one_answer() -> None:
    pairs = make_pairs(40, 2, 4, FRACTIONS, 0)
    wrong = pairs.subset["qd2incons"]
    assert len(wrong) == 12 and (pairs.defined[wrong] != pairs.labels[wrong]).all()
    assert len({tuple(each) for each in pairs.digits.tolist()}) == 40
    right = pairs.subset["d2consis"]
    assert (pairs.defined[right] == pairs.labels[right]).all() and not pairs.asked[right].any()
    said = targets(pairs, wrong[:2], torch.tensor([3, -1]), Options().labels)
    assert said[0].tolist() == [4, 4, 4, int(pairs.labels[wrong[0], 3])]
    assert said[1].tolist() == pairs.defined[wrong[1]].tolist()
