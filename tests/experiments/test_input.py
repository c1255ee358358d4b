"""Presets and models of experiments: what does, and one clear line for what does not."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from gdprompt_fast.cli.main import main
from gdprompt_fast.errors import UserError
from gdprompt_fast.experiments import (
    EXPERIMENTS,
    Preset,
    experiment_contexts,
    tasks,
)
from gdprompt_fast.runs import ExperimentConfig, experiment
from gdprompt_fast.runs.experiment_run import OWN_PRESETS, preset_sizes
from gdprompt_fast.runs.papers import chosen
from helpers.model_folders import edit_weights, to_cache


@pytest.mark.parametrize("name", OWN_PRESETS)
def test_the_presets_of_the_package_do_for_their_experiments(name: str) -> None:
    preset = Preset.read(preset_sizes(name))
    names = chosen("all", EXPERIMENTS, preset.sections)
    assert names == ["second-order"] or {"figure2", "table1"} <= set(names)
    for each in names:
        its = EXPERIMENTS[each]
        options = preset.section(each, its.options)
        its.check(preset, options)
        assert its.variants(preset, options) or each == "second-order"  # which has its own stages
        assert set(preset.seeds_of(each)) <= set(preset.seeds)
    assert preset.limits.prompt_tokens > preset.limits.context_tokens


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "seeds", [], r"\[model\]: seeds: expected different integers"),
        ("model", "dtype", "int8", r"\[model\]: dtype: expected one of"),
        ("train", "stepz", 3, r"\[train.*\]: expected keys among .*, got 'stepz'"),
        ("train", "objective", "kl", "objective: expected to be left to the experiment"),
        ("train", "batch_size", 3, r"\[train.*\]: batch_size: expected a multiple of 2 contexts"),
        ("prepare", "examples", 0, r"\[prepare\]: examples: expected an integer >= 1, got 0"),
        ("evaluate", "batch_size", 0, r"\[evaluate\]: batch_size: expected an integer >= 1"),
        ("evaluate", "inner_lr_grid", [], r"\[evaluate\]: inner_lr_grid: expected rates > 0"),
        ("findings", "margin", 5, r"\[findings\]: margin: expected a number between 0 and 1"),
        ("limits", "prompt_tokens", 126, "limits: expected prompt_tokens and answer_tokens within"),
        ("table2", "task", "squid", r"\[table2\]: task: expected among .*, got 'squid'"),
        ("table2", "contexts", [1], r"\[table2\]: contexts: expected integers >= 2"),
        ("table2", "objective", "lc", r"\[table2\]: objective: expected one of"),
        ("table2", "seeds", [7], r"\[table2\]: seeds: expected some of \[0\], got \[7\]"),
        ("text", "task", "squid", r"\[text\]: task: expected among .*, got 'squid'"),
        ("findings", "text_margin", 0, r"\[findings\]: text_margin: expected a number > 0"),
        ("tasks", "squad", {"source": "people"}, r"\[tasks.squad\]: expected the key 'label'"),
    ],
)
def test_a_bad_preset_is_one_clear_line_before_any_work(
    section: str, key: str, value: Any, message: str, sections: dict[str, Any], tmp_path: Path
) -> None:
    changed, new = copy.deepcopy(sections), tmp_path / "new"
    changed[section][key] = value
    with pytest.raises(UserError, match=message):
        experiment(ExperimentConfig(name="table2", sizes=changed, output=new, device="cpu"))
    assert not new.exists()


def test_the_model_may_be_on_the_hub_and_without_all_its_weights(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "model"
    shutil.copytree(sections["model"]["name"], model)
    edit_weights(model, lambda weights: {n: w for n, w in weights.items() if "mlp" not in n})
    to_cache(model, tmp_path / "hub", "org/tiny", "v1")
    config = ExperimentConfig(
        name="table4",
        sizes=sections,
        output=tmp_path / "new",
        model="org/tiny",
        revision="v1",
        device="cpu",
    )
    with pytest.raises(UserError, match=r"3 missing \(model.layers.0.mlp.down_proj.weight"):
        experiment(config)
    (ctx,) = experiment_contexts(
        replace(Preset.read(sections), model="org/tiny", revision="v1"),
        tmp_path / "new",
        torch.device("cpu"),
        allow_missing=True,
    )
    assert tasks.prepare_stage(ctx, "squad").result["examples"] == 4


def test_bad_input_to_the_commands_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "something").touch()
    new = str(tmp_path / "new")
    for command, message in (
        (["experiment", "table4", "--preset", "no-such", "--output", new], "preset: expected"),
        (
            ["experiment", "table4", "--output", new, "--model", str(tmp_path / "none")],
            "model: expected",
        ),
        (["experiment", "table4", "--output", str(tmp_path)], "output: expected a new or empty"),
        (["report", str(tmp_path)], "folder: expected finished results"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_files_seeds_and_limits_are_put_over_a_preset(sections: dict[str, Any]) -> None:
    changed = copy.deepcopy(sections)
    changed["model"]["seeds"] = [0, 1]
    changed["table2"]["seeds"] = [1]
    changed["tasks"]["squad"]["limits"] = {"query_tokens": 20}

    def read(**over: Any) -> Preset:
        config = ExperimentConfig(name="table2", sizes=changed, output=Path("new"), **over)
        return config.read_preset()

    assert read().seeds_of("table2") == (1,) and read().seeds_of("table1") == (0, 1)
    assert read(seeds=(4,)).seeds_of("table2") == (4,)
    assert read().limits_of("squad") == replace(read().limits, query_tokens=20)
    assert read().limits_of("wikitext") == read().limits
    squad, wikitext = "squad=dir/a.json", "wikitext=a.txt,b.txt"
    tasks = read(files=(squad, wikitext)).tasks
    assert (tasks["squad"].file, tasks["squad"].test_file) == ("dir/a.json", None)
    assert (tasks["wikitext"].file, tasks["wikitext"].test_file) == ("a.txt", "b.txt")
    with pytest.raises(UserError, match=r"files: expected TASK=FILE with a task of .*squid=a"):
        read(files=("squid=a",))
