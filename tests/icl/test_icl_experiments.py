"""Every experiment at the smallest size: its tables, what holds of any, and going on with one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gdprompt_fast.artifacts.stage import StaleStage
from gdprompt_fast.cli.main import main
from gdprompt_fast.data import make_data
from gdprompt_fast.errors import UserError
from gdprompt_fast.icl.preset import Preset
from gdprompt_fast.icl.run import EXPERIMENTS, run_icl
from gdprompt_fast.report.html import results_page
from gdprompt_fast.runs import IclConfig, icl, run
from gdprompt_fast.runs.file_run import RunConfig
from gdprompt_fast.runs.icl_run import OWN_PRESETS, preset_sizes
from helpers.icl_tasks import contexts_of, make_sizes
from helpers.once import made_once

PER_TASK = ("table1", "table2", "table3", "table4", "attention")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the preset, ``sizes.json``, and the results of all experiments."""
    with made_once("icl", tmp_path_factory) as (folder, is_there):
        if not is_there:
            folder.mkdir(exist_ok=True)
            sections = make_sizes(folder)
            (folder / "sizes.json").write_text(json.dumps(sections))
            for name in EXPERIMENTS:
                run_icl(name, contexts_of(sections, folder / "results"))
    return folder


def sizes_of(done: Path) -> dict[str, Any]:
    sizes: dict[str, Any] = json.loads((done / "sizes.json").read_text())
    return sizes


def content(done: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((done / "results" / f"icl-{name}.json").read_text())
    return loaded


def row(table: dict[str, Any], head: str) -> list[dict[str, Any]]:
    (cells,) = [each["cells"] for each in table["rows"] if each["head"] == head]
    return list(cells)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_tables_findings_and_controls(done: Path, name: str) -> None:
    results = content(done, name)
    assert results["tables"] and results["findings"]
    assert results["paper"]["source"].endswith("2311.07772")
    for table in results["tables"]:
        heads = [each["head"] for each in table["rows"]]
        for control in ("random", "rate 0", "untrained"):
            assert any(control in head for head in heads), table["title"]
    assert (done / "results" / f"icl-{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["table2", "table3", "table4"])
def test_both_points_are_there_and_the_papers_numbers_at_one(done: Path, name: str) -> None:
    tables = content(done, name)["tables"]
    points = [table["title"].split(", at the ")[1] for table in tables]
    assert points == ["candidate token"] * 3 + ["last query token"] * 3
    has_paper = [
        any(cell["paper"] is not None for each in table["rows"] for cell in each["cells"])
        for table in tables
    ]
    assert has_paper == [True, True, False, False, False, False]
    assert all(table["unit"] == "cosine" for table in tables)


def test_at_rate_0_nothing_is_similar_and_nothing_changes(done: Path) -> None:
    """SimAOU is undefined, which is a question mark and no number."""
    rate_0 = "control: FT at rate 0"
    tables = content(done, "table2")["tables"]
    for table in tables:
        if "SimAM," not in table["title"]:
            assert all(cell["mean"] is None for cell in row(table, rate_0))
    markdown = (done / "results" / "icl-table2.md").read_text()
    assert f"| {rate_0}        | ? ± ?" in markdown and "nan" not in markdown
    for table in content(done, "table1")["tables"]:
        if table["title"] not in ("Accuracy", "The most frequent answer's share"):
            assert all(cell["mean"] in (0, None) for cell in row(table, rate_0)), table["title"]


def test_shares_are_between_0_and_100_for_every_seed_too(done: Path) -> None:
    for table in content(done, "table1")["tables"]:
        for each in table["rows"]:
            for cell in each["cells"]:
                shares = [cell["mean"], *cell["per_seed"]]
                assert all(share is None or 0 <= share <= 100 for share in shares), each["head"]


def test_the_papers_numbers_stand_beside_ours_in_table_1(done: Path) -> None:
    accuracy, _, correct, *_ = content(done, "table1")["tables"]
    assert [cell["paper"] for cell in row(accuracy, "ICL")] == [50.0, 89.1]
    assert correct["title"] == "Jaccard – correct"
    assert [cell["paper"] for cell in row(correct, "FT")] == [91.7, 40.2]


def test_a_meta_trained_model_is_beside_its_base_at_all_rates(done: Path) -> None:
    tables = content(done, "meta-trained")["tables"]
    heads = [each["head"] for each in tables[0]["rows"]]
    assert heads[:3] == ["base, rate 0.5", "base, rate 0.05", "meta-trained, kl"]
    right = row(tables[0], "meta-trained, kl")
    assert right[1]["mean"] == 100  # of a handful, with the passage in its prompt
    assert len(tables) == 4


def test_the_same_command_goes_on_where_it_stopped(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = sizes_of(done)
    config = IclConfig(name="table1", sizes=sizes, output=tmp_path, seeds=(0,), device="cpu")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gdprompt_fast.icl.stages.sim_am_delta", stop)
        with pytest.raises(KeyboardInterrupt):
            icl(config)
    begun = capsys.readouterr().out
    assert "seed-0/reference/cb/base: " in begun and "seed-0/methods/cb/base/ft …" in begun
    icl(config)
    rest = capsys.readouterr().out
    assert "reference/cb/base" not in rest and "methods/cb/base/ft: " in rest
    ours, theirs = (json.loads((f / "icl-table1.json").read_text())["tables"] for f in (
        tmp_path, done / "results"))  # fmt: skip
    for one, other in zip(ours, theirs, strict=True):
        shares = one["title"].startswith(("Accuracy", "Answers"))  # others are of all seeds
        for a, b in zip(one["rows"], other["rows"], strict=True) if shares else ():
            assert [c["per_seed"][0] for c in a["cells"]] == [c["per_seed"][0] for c in b["cells"]]


def test_other_settings_make_stages_stale(done: Path) -> None:
    sizes = sizes_of(done)
    sizes["tasks"]["mr"]["lr"] = 0.25
    with pytest.raises(StaleStage, match=r"method.lr: expected 0.5 as in .*ft, got 0.25"):
        run_icl("table1", contexts_of(sizes, done / "results"))


def test_other_triples_in_a_file_of_the_same_name_make_stages_stale(
    done: Path, tmp_path: Path
) -> None:
    file, sizes = tmp_path / "triples.jsonl", sizes_of(done)
    pair = sizes["meta-trained"]["pairs"]["bundled"] | {"file": str(file), "examples": 2}
    sizes["meta-trained"] = {"pairs": {"bundled": pair}}
    rows = [json.dumps(each) for each in make_data("people", 1, 3, 0).test.to_list()]
    file.write_text("\n".join(rows[:2]))
    run_icl("meta-trained", contexts_of(sizes, tmp_path / "results")[:1])
    file.write_text("\n".join(rows[1:]))
    with pytest.raises(StaleStage, match="content: expected"):
        run_icl("meta-trained", contexts_of(sizes, tmp_path / "results")[:1])


def test_another_prompt_makes_stages_stale(done: Path) -> None:
    """A longer query may leave room for fewer demonstrations, by the number of queries alone."""
    sizes = sizes_of(done)
    contexts = contexts_of(sizes, done / "results")
    prompts = contexts[0].prompts("mr")
    shorter = replace(prompts, context=prompts.context[:9], spans=prompts.spans[:1])
    assert shorter.fingerprint != prompts.fingerprint
    assert replace(prompts, queries=[]).fingerprint == prompts.fingerprint
    assert contexts[0].task_settings("mr")["rows"] == prompts.fingerprint


def test_the_page_of_results_has_them(done: Path) -> None:
    page = results_page(done / "results")
    assert page.count("arXiv 2311.07772") >= len(EXPERIMENTS)


@pytest.mark.parametrize("name", OWN_PRESETS)
def test_the_presets_of_the_package_do_for_their_experiments(name: str) -> None:
    preset = Preset.read(preset_sizes(name))
    assert {"table1", "table2", "table3", "table4", "meta-trained"} <= {*preset.sections}
    for each in EXPERIMENTS:
        if each in preset.sections:
            preset.section(each, EXPERIMENTS[each].options)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "seeds", [], r"\[model\]: seeds: expected different integers, got \[\]"),
        ("model", "dtype", "int8", r"\[model\]: dtype: expected one of"),
        ("prompt", "demonstrations", 0, r"\[prompt\]: demonstrations: expected an integer >= 1"),
        ("prompt", "demonstrations", 13, r"demonstrations: expected at most 12, all there are"),
        ("prompt", "window", 20, r"window: expected room for a demonstration"),
        ("prompt", "eos", "<end>", r"eos: expected a token of the tokenizer, got '<end>'"),
        ("evaluate", "examples", 1, r"\[evaluate\]: examples: expected an integer >= 2, got 1"),
        ("tasks", "rte", {}, r"expected sections \[tasks.NAME\] of cb, sst2, sst5, mr, subj, agn"),
        ("tasks", "mr", {"seed": 1}, r"\[tasks.mr\]: expected the key 'lr'"),
        ("tasks", "mr", {"seed": 1, "lr": 0}, r"\[tasks.mr\]: lr: expected a number > 0"),
        ("table3", "tasks", ["sst2"], r"\[table3\]: tasks: expected among \['cb', 'mr'\], got"),
        ("table3", "clip", -1, r"\[table3\]: clip: expected a number > 0"),
    ],
)
def test_a_bad_preset_is_one_clear_line_before_any_work(
    section: str, key: str, value: Any, message: str, done: Path, tmp_path: Path
) -> None:
    changed, new = copy.deepcopy(sizes_of(done)), tmp_path / "new"
    changed[section][key] = value
    with pytest.raises(UserError, match=message):
        icl(IclConfig(name="table3", sizes=changed, output=new, device="cpu"))
    assert not new.exists()


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"base": "bundled"}, r"pairs.x: expected the key"),
        (
            dict(base="bundled", meta_trained={}, inner_lr=0.5, examples=2),
            "meta_trained: expected a model at least",
        ),
        (
            dict(base="b", meta_trained={"a": "b"}, inner_lr=0.5, examples=2, source="x"),
            "source: expected one of",
        ),
        (
            dict(base="bundled", meta_trained={"a": "none/there"}, inner_lr=0.5, examples=2),
            "none/there",
        ),
        (
            dict(base="bundled", meta_trained={"a": "bundled"}, inner_lr=0.5, examples=2, file="f"),
            "pairs.x: file: expected a file of triples, got f",
        ),
    ],
)
def test_a_bad_pair_is_one_clear_line(
    pair: dict[str, Any], message: str, done: Path, tmp_path: Path
) -> None:
    sizes = sizes_of(done) | {"meta-trained": {"pairs": {"x": pair}}}
    with pytest.raises(UserError, match=message):
        icl(IclConfig(name="meta-trained", sizes=sizes, output=tmp_path / "new", device="cpu"))


def test_too_many_at_the_top_of_a_map_are_refused(done: Path, tmp_path: Path) -> None:
    sizes = sizes_of(done)
    sizes["attention"]["tokens"] = 1000
    with pytest.raises(UserError, match=r"attention: tokens: expected fewer than the \d+ in the"):
        icl(IclConfig(name="attention", sizes=sizes, output=tmp_path / "new", device="cpu"))


def test_files_are_given_on_the_command_line_and_in_a_file_of_runs(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sizes_of(done)["tasks"]["mr"]
    given = f"mr={files['file']},{files['test_file']}"
    preset = tmp_path / "preset.toml"
    preset.write_text(
        f'[model]\nname = "{(done / "model").as_posix()}"\nseeds = [0]\n'
        "[prompt]\ndemonstrations = 2\nwindow = 100\n[evaluate]\nbatch_size = 4\nexamples = 2\n"
        '[tasks.mr]\nseed = 1\nlr = 0.1\n[table4]\ntasks = ["mr"]\n'
    )
    arguments = ["icl", "all", "--preset", str(preset), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--files", given, "--device", "cpu"]) == 0
    assert "linearised FT" in capsys.readouterr().out
    runs = tmp_path / "runs.toml"
    runs.write_text(
        f'[icl]\nname = "table4"\npreset = "{preset.as_posix()}"\ndevice = "cpu"\n'
        f'output = "{(tmp_path / "out").as_posix()}"\nfiles = ["{given}"]\n'
    )
    assert run(RunConfig(file=runs)) == [tmp_path / "out" / "icl-table4.md"]
    assert main([*arguments, "--files", "sst2=x", "--device", "cpu"]) != 0
    assert "files: expected TASK=FILE with a task of mr, got 'sst2=x'" in capsys.readouterr().err


def test_what_is_there_is_not_written_over(done: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="output: expected a new or empty folder"):
        icl(IclConfig(name="table1", sizes=sizes_of(done), output=tmp_path, device="cpu"))


def test_names_are_those_of_modules() -> None:
    assert [*EXPERIMENTS] == [*PER_TASK, "meta-trained"]
