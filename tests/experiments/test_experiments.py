"""The paper's experiments, tiny: what they leave, what they share, and how they go on."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import gdprompt_fast.training.loop
from gdprompt_fast.artifacts.stage import run_stage
from gdprompt_fast.cli.main import main
from gdprompt_fast.experiments import (
    EXPERIMENTS,
    Preset,
    StaleStage,
    measure,
    tasks,
    variants,
)
from gdprompt_fast.experiments.cost import describe_cost
from gdprompt_fast.experiments.measure import EvalSpec
from gdprompt_fast.experiments.parallel import finished_one_by_one
from gdprompt_fast.experiments.run import run_experiment
from gdprompt_fast.experiments.variants import Variant
from helpers.experiments import TINY, content, contexts_of
from helpers.killing import Killed, killed_after

CPU = torch.device("cpu")


def refuse(*args: Any, **kwargs: Any) -> Any:
    """In the place of a function that must not be called."""
    raise AssertionError("work that was done before is done again")


def test_every_experiment_leaves_json_markdown_and_a_figure(done: Path) -> None:
    for name in EXPERIMENTS:
        found = content(done, name)
        assert found["seeds"] == [0] and found["versions"]["torch"] == torch.__version__
        assert found["settings"]["train"]["steps"] == 3 and found["stages"] and found["seconds"] > 0
        assert (done / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        markdown = (done / f"{name}.md").read_text()
        assert found["title"] in markdown and "in the place of SQuAD" in markdown
        for table in found["tables"]:
            for row in table["rows"]:
                assert row["head"] in markdown
                assert len(row["cells"]) == len(table["columns"])
        assert all(each["verdict"] in ("shows", "does not show") for each in found["findings"])


def test_tables_have_the_rows_of_the_paper_and_its_numbers(done: Path) -> None:
    def cell(name: str, row: str, column: int = 0, table: int = 0) -> dict[str, Any]:
        rows = content(done, name)["tables"][table]["rows"]
        (found,) = (each["cells"][column] for each in rows if each["head"] == row)
        return dict(found)

    assert [each["title"] for each in content(done, "figure2")["tables"]] == [
        "character-description, exact match",
        "reversal-curse, exact match",
        "people (in the place of SQuAD), exact match",
        "people (in the place of SQuAD), F1",
        "people-text (in the place of WikiText), token accuracy",
        "Running text (people-text (in the place of WikiText)), NLL in nats a token",
    ]
    assert cell("figure2", "BM", column=1, table=2)["paper"] == 87.7
    assert cell("figure2", "BM", column=1, table=3)["paper"] is None  # F1 is not accuracy
    assert cell("figure2", "LG", column=2, table=2)["paper"] == 58.6
    assert cell("figure2", "LG", column=2, table=4)["paper"] == 37.2
    assert cell("table1", "LoRA (rank 1) outside, full rank inside")["paper"] == 59.4
    assert cell("table1", "untrained LoRA (rank 1)", column=2)["paper"] == 32.2
    assert cell("table2", "BM", column=4)["paper"] == 43.6
    assert cell("table2", "BM", column=3)["paper"] is None  # the paper's is one after another
    assert cell("table3", "meta-trained on the same task")["paper"] == 58.6
    assert cell("table4", "only with context")["paper"] == 12.8
    assert cell("table4", "only with context", column=1)["examples"] == 4
    assert cell("table5", "Fine-Tuning, irrelevant context", column=2)["paper"] == 0.01
    classes = content(done, "table4")["tables"][0]["rows"]
    assert sum(row["cells"][0]["mean"] for row in classes) == pytest.approx(100)
    shared = [
        cell("figure2", "LG", column=2, table=2),
        cell("table1", "full rank"),
        cell("table3", "meta-trained on the same task"),
        cell("table5", "Fine-Tuning, right context"),
    ]
    assert all({**each, "paper": None} == {**shared[0], "paper": None} for each in shared)


def test_arms_are_shared_and_nothing_is_done_twice(
    done: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = sorted(path.name for path in (done / "stages/seed-0/arm").iterdir())
    assert trained == [
        "character-description-gold",
        "character-description-kl",
        "reversal-curse-gold",
        "reversal-curse-kl",
        "squad-gold",
        "squad-gold-lora1",
        "squad-gold-lora1-lora-inside",
        "squad-kl",
        "squad-kl-2-contexts",
        "squad-kl-4-contexts",
        "squad-kl-prompt-weight-0.3",
        "squad-kl-prompt-weight-0.3-text-weight-0.1",
        "squad-kl-text-weight-0.1",
        "wikitext-gold",
        "wikitext-gold-lora1",
        "wikitext-gold-lora1-lora-inside",
        "wikitext-gold-then-squad",
        "wikitext-gold-with-squad",
        "wikitext-kl",
    ]
    assert not list(done.glob("stages/seed-0/arm/*/checkpoints"))
    before = {name: content(done, name)["tables"] for name in EXPERIMENTS}
    for module, name in (
        (variants, "meta_train"),
        (tasks, "fine_tune"),
        (tasks, "make_data"),
        (measure, "evaluate"),
        (tasks.TeacherCache, "build"),
    ):
        monkeypatch.setattr(module, name, refuse)
    for name in EXPERIMENTS:
        run_experiment(name, contexts_of(sections, done))
        assert content(done, name)["tables"] == before[name]


def test_what_is_forgotten_is_in_every_table(done: Path) -> None:
    for name in EXPERIMENTS:
        if name == "second-order":  # measures gradients beside accuracy, no running text
            continue
        last = content(done, name)["tables"][-1]
        assert last["unit"] == "nats a token" and last["title"].startswith("Running text")
        cells = [cell for row in last["rows"] for cell in row["cells"] if cell is not None]
        assert all(cell["examples"] == 4 and cell["mean"] > 0 for cell in cells)
        claims = {each["claim"] for each in content(done, name)["findings"]}
        assert "running text is not forgotten" in claims
    rows = content(done, "figure2")["tables"][-1]["rows"]
    assert rows[0]["cells"][2] != rows[1]["cells"][2]  # BM and LC on the same task


def test_figure_2_may_be_of_one_objective(
    done: Path, sections: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "one"
    shutil.copytree(done, output)
    run_experiment("figure2", contexts_of(sections, output, figure2__objectives=["kl"]))
    found, both = content(output, "figure2"), content(done, "figure2")
    for table, whole in zip(found["tables"], both["tables"], strict=True):
        kept = [row for row in whole["rows"] if row["head"] != "LG"]
        assert table["rows"] == kept and len(kept) < len(whole["rows"])
    assert not any("gold" in each["claim"] for each in found["findings"])


def test_processes_share_the_stages_of_a_folder(
    done: Path, sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, names = tmp_path / "shared", ["table5", "table4"]
    shutil.copytree(done, output)
    for path in ("arm/squad-kl", "evaluation/squad-kl", "evaluation/squad-base"):
        shutil.rmtree(output / "stages/seed-0" / path)
    assert list(finished_one_by_one(names, contexts_of(sections, output), jobs=2)) == names
    monkeypatch.setattr(variants, "meta_train", refuse)
    monkeypatch.setattr(measure, "evaluate", refuse)
    for name in names:
        run_experiment(name, contexts_of(sections, output))
        again, before = (content(folder, name)["tables"] for folder in (output, done))
        assert [each["title"] for each in again] == [each["title"] for each in before]
        for row, old in zip(again[-1]["rows"], before[-1]["rows"], strict=True):
            means = [[cell["mean"] for cell in each["cells"]] for each in (row, old)]
            # The processes have the C++ ops, which round in another way than those of the tests.
            assert row["head"] == old["head"] and means[0] == pytest.approx(means[1], rel=1e-3)


def test_a_stage_that_two_ask_for_at_once_is_done_once(tmp_path: Path) -> None:
    begun: list[int] = []

    def work(folder: Path) -> dict[str, Any]:
        begun.append(len(begun))
        time.sleep(0.3)
        return {"number": len(begun)}

    with ThreadPoolExecutor(3) as pool:
        stages = list(pool.map(lambda _: run_stage(tmp_path / "stage", {"a": 1}, work), range(3)))
    assert begun == [0] and {stage.result["number"] for stage in stages} == {1}


def test_the_cost_is_told_of_all_that_is_trained(sections: dict[str, Any], tmp_path: Path) -> None:
    contexts = contexts_of(sections, tmp_path, train__steps=0)
    table = describe_cost(["figure2", "table3"], contexts)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:-2]]
    assert [row[0] for row in rows][-2:] == ["wikitext-gold", "wikitext-gold-with-squad"]
    assert {row[2] for row in rows} == {"2"}  # an epoch of 8 examples, 4 at a time
    assert all(row[3].endswith(" GB") and float(row[4]) > 0 for row in rows)


def test_an_experiment_killed_while_training_goes_on_from_the_checkpoint(
    done: Path, sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "killed"
    shutil.copytree(done, output)
    for path in ("arm/squad-kl", "evaluation/squad-kl"):
        shutil.rmtree(output / "stages/seed-0" / path)
    step = gdprompt_fast.training.loop.fast_meta_step
    monkeypatch.setattr(gdprompt_fast.training.loop, "fast_meta_step", killed_after(2, step))
    with pytest.raises(Killed):
        run_experiment("figure2", contexts_of(sections, output))
    folder = output / "stages/seed-0/arm/squad-kl"
    record = json.loads((folder / "stage.json").read_text())
    assert record["result"] is None and record["seconds"] > 0
    monkeypatch.setattr(gdprompt_fast.training.loop, "fast_meta_step", killed_after(1, step))
    monkeypatch.setattr(tasks, "fine_tune", refuse)
    run_experiment("figure2", contexts_of(sections, output))  # one of three steps was left
    again = json.loads((folder / "stage.json").read_text())
    assert again["result"]["steps"] == 3 and again["seconds"] > record["seconds"]
    weights = "stages/seed-0/arm/squad-kl/model/model.safetensors"
    assert (output / weights).read_bytes() == (done / weights).read_bytes()
    assert content(output, "figure2")["tables"] == content(done, "figure2")["tables"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(train__outer_lr=1e-3),
            r"options.outer_lr: expected 0.01 as in .*squad-kl, got 0.001",
        ),
        (dict(prepare__steps=2), r"options.steps: expected 1 as in .*base/squad, got 2"),
        (
            dict(limits__query_tokens=47),
            r"limits.query_tokens: expected 48 as in .*data/squad, got",
        ),
        (dict(evaluate__answer_tokens=5), r"answer_tokens: expected 4 as in .*fine_tuning, got 5"),
    ],
)
def test_a_stale_stage_is_refused(
    changes: dict[str, Any], message: str, done: Path, sections: dict[str, Any]
) -> None:
    (ctx,) = contexts_of(sections, done, **changes)
    with pytest.raises(StaleStage, match=message):
        measure.predictions(ctx, EvalSpec(Variant("squad", "kl")))


def test_another_model_under_the_same_name_makes_stages_stale(
    done: Path, sections: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(sections["model"]["name"], model)
    weights = LlamaForCausalLM.from_pretrained(model)
    weights.model.norm.weight.data += 1
    weights.save_pretrained(model)
    preset = tmp_path / "tiny.toml"
    preset.write_text(TINY.replace("MODEL", "elsewhere"))
    command = ["experiment", "table4", "--preset", str(preset), "--output", str(done)]
    assert main([*command, "--device", "cpu", "--model", str(model)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("gdprompt experiment: stopped: model: expected '")
    assert "remove that folder to have it done again" in error


def test_a_stage_is_done_once_and_its_time_adds_up(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").touch()
        raise Killed

    with pytest.raises(Killed):
        run_stage(tmp_path / "one", {"a": (1, 2)}, fail)
    stage = run_stage(
        tmp_path / "one", {"a": [1, 2]}, lambda folder: {"there": (folder / "half").exists()}
    )
    assert stage.result == {"there": True}
    again = run_stage(tmp_path / "one", {"a": [1, 2]}, refuse)
    assert (again.key, again.result, again.seconds) == (stage.key, stage.result, stage.seconds)
    with pytest.raises(StaleStage, match=r"a: expected \[1, 2\] as in .*one, got \[1\]"):
        run_stage(tmp_path / "one", {"a": [1]}, refuse)
    assert run_stage(tmp_path / "two", {"a": [1]}, lambda folder: {}).key != stage.key


def test_seeds_are_repetitions_of_everything(sections: dict[str, Any], tmp_path: Path) -> None:
    repetitions = contexts_of(sections, tmp_path / "two", model__seeds=[3, 5])
    spec = EvalSpec(Variant("wikitext"), "no_context")
    first, second = (measure.predictions(ctx, spec) for ctx in repetitions)
    assert [row["query"] for row in first] != [row["query"] for row in second]
    cell = measure.measure(repetitions, spec, "token_accuracy")
    assert [len(values) for values in cell.values] == [8, 8]
    assert repetitions[0].used.keys() == {
        f"seed-{seed}/{stage}"
        for seed in (3, 5)
        for stage in (
            "data/wikitext",
            "base/wikitext",
            "evaluation/wikitext-base/wikitext-test-no_context",
        )
    }


def test_groups_of_contexts_keep_the_number_of_contexts_in_a_step(sections: dict[str, Any]) -> None:
    preset = Preset.read(sections)
    options = preset.train_options("squad", contexts=4)
    assert (options.batch_size, options.contexts_per_group) == (1, 4)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 contexts, got 4"):
        preset.train_options("squad", contexts=3)
    assert preset.train_options("squad", "lora-inner").inner_lr == 0.25
    assert preset.train_options("squad", "lora").inner_lr == 0.5
