"""The experiments in miniature: stages that are kept, variants, findings, tables, the page."""

from __future__ import annotations

import copy
import json
import math
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaForCausalLM

import gdprompt_fast.training.loop
from gdprompt_fast.artifacts.stage import run_stage
from gdprompt_fast.cli.main import main
from gdprompt_fast.data.characters import characters_vocabulary
from gdprompt_fast.data.people import people_vocabulary
from gdprompt_fast.data.words import word_tokenizer
from gdprompt_fast.errors import UserError
from gdprompt_fast.experiments import (
    EXPERIMENTS,
    Preset,
    StaleStage,
    experiment_contexts,
    measure,
    tasks,
    variants,
)
from gdprompt_fast.experiments.cells import Cell, Estimate
from gdprompt_fast.experiments.context import ExperimentContext
from gdprompt_fast.experiments.findings import Named, close, destroyed, larger
from gdprompt_fast.experiments.measure import EvalSpec
from gdprompt_fast.experiments.run import run_experiment
from gdprompt_fast.experiments.table4 import classify
from gdprompt_fast.experiments.table5 import mean_of_draws
from gdprompt_fast.experiments.variants import Variant
from gdprompt_fast.ops import backend
from gdprompt_fast.report import results_page
from gdprompt_fast.runs import ExperimentConfig, experiment
from gdprompt_fast.runs.experiment_run import preset_sizes
from helpers.model_folders import edit_weights, to_cache
from helpers.models import small_llama

CPU = torch.device("cpu")
TINY = """
[model]
name = "MODEL"
seeds = [0]
[limits]
context_tokens = 90
query_tokens = 48
prompt_tokens = 112
[prepare]
examples = 4
steps = 1
batch_size = 2
[train]
steps = 3
batch_size = 4
outer_lr = 1e-2
warmup_steps = 1
inner_lr = 0.5
answer_tokens = 3
teacher_batch_size = 8
checkpoint_every = 1
[train.lora-inner]
inner_lr = 0.25
[evaluate]
batch_size = 8
answer_tokens = 4
inner_lr_grid = [0.1]
tune_examples = 4
[tasks.character-description]
source = "character-description"
label = "character-description"
metrics = ["exact_match"]
train = 8
test = 8
[tasks.reversal-curse]
source = "reversal-curse"
label = "reversal-curse"
metrics = ["exact_match"]
train = 8
test = 8
[tasks.squad]
source = "people"
label = "people (in the place of SQuAD)"
metrics = ["exact_match", "f1"]
train = 8
test = 8
[tasks.wikitext]
source = "people-text"
label = "people-text (in the place of WikiText)"
metrics = ["token_accuracy"]
train = 8
test = 8
[figure2]
tasks = ["character-description", "reversal-curse", "squad", "wikitext"]
[table1]
tasks = ["squad", "wikitext"]
lora_rank = 1
[table2]
task = "squad"
objective = "kl"
contexts = [2, 4]
[table3]
source = "wikitext"
target = "squad"
examples = 4
[table4]
task = "squad"
objective = "kl"
train_examples = 4
samples = 2
[table5]
tasks = ["squad", "wikitext"]
irrelevant_seeds = [0]
[findings]
margin = 0.1
"""


class Killed(BaseException):
    """Stands for the end of the process."""


def refuse(*args: Any, **kwargs: Any) -> Any:
    """In the place of a function that must not be called."""
    raise AssertionError("work that was done before is done again")


def killed_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` that works ``calls`` times and then kills."""
    left = [calls]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return function(*args, **kwargs)

    return wrapped


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny preset, on a random Llama over the generators' words."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = word_tokenizer(sorted({*people_vocabulary(), *characters_vocabulary()}))
    model = small_llama(
        len(tokenizer), num_hidden_layers=1, max_position_embeddings=128, tie_word_embeddings=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tomllib.loads(TINY.replace("MODEL", folder.as_posix()))


def contexts_of(sections: dict[str, Any], output: Path, **changes: Any) -> list[ExperimentContext]:
    """Labs of a preset with changes, as ``train__outer_lr=1e-3``."""
    changed = copy.deepcopy(sections)
    for name, value in changes.items():
        section, key = name.split("__")
        changed[section][key] = value
    return experiment_contexts(Preset.read(changed), output, CPU)


@pytest.fixture(scope="module")
def done(sections: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all six experiments."""
    pytest.importorskip("peft", reason="PEFT is an optional dependency, of Table 1's LoRA variants")
    output = tmp_path_factory.mktemp("experiments") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "load_cpp", lambda: False)  # as every test has it
        for name in EXPERIMENTS:
            run_experiment(name, contexts_of(sections, output))
    return output


def content(folder: Path, name: str) -> dict[str, Any]:
    """An experiment's JSON, which has no NaN."""

    def refuse_nan(constant: str) -> None:
        raise AssertionError(f"{constant} in {name}.json")

    text = (folder / f"{name}.json").read_text()
    loaded: dict[str, Any] = json.loads(text, parse_constant=refuse_nan)
    return loaded


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
    ]
    assert cell("figure2", "BM", column=1, table=2)["paper"] == 87.7
    assert cell("figure2", "BM", column=1, table=3)["paper"] is None  # F1 is not accuracy
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


def test_irrelevant_contexts_come_with_the_same_queries(
    done: Path, sections: dict[str, Any]
) -> None:
    (ctx,) = contexts_of(sections, done)
    right = measure.predictions(ctx, EvalSpec(Variant("wikitext", "gold")))
    wrong = measure.predictions(ctx, EvalSpec(Variant("wikitext", "gold"), irrelevant=1))
    assert [row["query"] for row in right] == [row["query"] for row in wrong]
    assert [row["answers"] for row in right] == [row["answers"] for row in wrong]
    assert all(a["context"] != b["context"] for a, b in zip(right, wrong, strict=True))
    assert {row["context"] for row in right} == {row["context"] for row in wrong}


def test_the_best_inner_rate_is_that_of_the_best_metric_then_of_the_lowest_nll(
    done: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (ctx,) = contexts_of(sections, done, evaluate__inner_lr_grid=[0.1, 0.2, 0.3, 0.4])
    scores = {0.1: (0.5, 1.0), 0.2: (0.5, 0.9), 0.3: (0.9, None), 0.4: (0.4, 0.1), 0.5: (0.0, 0.0)}

    def fake(ctx: ExperimentContext, spec: EvalSpec) -> list[dict[str, Any]]:
        assert spec.count == 4 and spec.inner_lr is not None
        score, nll = scores[spec.inner_lr]
        return [{"settings": {"fine_tuning": {"exact_match": score, "nll": nll}}}] * 2

    monkeypatch.setattr(measure, "predictions", fake)
    assert measure.best_inner_lr(ctx, EvalSpec(Variant("squad"))) == 0.2
    scores[0.5] = (0.6, 5.0)  # the rate of training is tried too
    assert measure.best_inner_lr(ctx, EvalSpec(Variant("squad"))) == 0.5


def prediction(**exact_matches: float) -> dict[str, Any]:
    return {"settings": {name: {"exact_match": value} for name, value in exact_matches.items()}}


def test_the_classes_of_table_4() -> None:
    before = [prediction(no_context=value) for value in (0.0, 1.0, 1.0, 0.0)]
    after = [prediction(fine_tuning=value) for value in (0.0, 1.0, 0.0, 1.0)]
    assert classify(before, after) == [
        "always incorrect",
        "always correct",
        "correct without context",
        "only with context",
    ]
    with pytest.raises(ValueError):
        classify(before, after[:3])


def test_the_standard_errors_of_a_cell() -> None:
    values = (0.0, 1.0, 1.0, 0.5)
    assert Cell((values,)).se == pytest.approx(stdev(values) / 2)
    pairs = Cell((values,), group=2)
    assert (pairs.mean, pairs.se) == (0.625, pytest.approx(stdev((0.5, 0.75)) / math.sqrt(2)))
    # Two seeds far apart: what they say is more than what the examples say.
    far = Cell(((0.0, 0.1), (0.9, 1.0)))
    assert far.se == pytest.approx(stdev((0.05, 0.95)) / math.sqrt(2))
    # Two seeds that agree by chance: the examples' own spread stays.
    near = Cell(((0.0, 1.0), (1.0, 0.0)))
    assert near.se == pytest.approx(math.hypot(0.5, 0.5) / 2)
    assert math.isnan(Cell(((1.0,),)).se)


def test_differences_are_taken_example_by_example_where_there_are_the_same_examples() -> None:
    low = Cell(((0.0, 1.0, 0.0, 1.0),))
    high = Cell(((0.1, 1.1, 0.1, 1.1),))
    assert high.minus(low) == Estimate(pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    independent = high.minus_independent(low)
    assert independent.se == pytest.approx(math.hypot(high.se, low.se))
    assert high.minus(Cell(((0.0, 1.0),))).se > 0.4
    assert mean_of_draws([low, high]).values == ((0.05, 1.05, 0.05, 1.05),)


def shares(*counts: int) -> list[Cell]:
    """Cells of 100 examples of which so many are right, each the first ones."""
    return [Cell((tuple(float(i < count) for i in range(100)),)) for count in counts]


def test_findings_show_and_do_not_show() -> None:
    none, few, some, many = (
        Named(str(count), cell)
        for count, cell in zip((0, 3, 30, 90), shares(0, 3, 30, 90), strict=True)
    )
    up = larger("after is better", "a task", many, some)
    assert up.shows and up.verdict == "shows"
    assert "90 90.0 ± 3.0 %, 30 30.0 ± 4.6 %; difference +60.0 ± 4.9 points" in up.because
    assert not larger("after is better", "a task", some, many).shows
    assert not larger("after is better", "a task", few, none).shows  # 3 ± 1.7
    assert larger("harder", "a model", many, some, independent=True).differences[0].se > 0.054

    assert close("as good", "a task", few, none, margin=0.1).shows
    assert not close("as good", "a task", few, none, margin=0.05).shows  # 3 ± 3.4
    assert not close("as good", "a task", many, some, margin=0.1).shows
    single = Named("single", Cell(((1.0,),)))
    assert not close("as good", "a task", single, single, margin=0.1).shows

    claim = "an irrelevant context destroys the gain"
    assert destroyed(claim, "a task", right=many, wrong=few, without=some).shows
    assert destroyed(claim, "a task", right=many, wrong=some, without=some).shows
    assert not destroyed(claim, "a task", right=many, wrong=some, without=none).shows
    assert not destroyed(claim, "a task", right=few, wrong=none, without=none).shows


@pytest.mark.parametrize("name", ["small", "paper"])
def test_the_presets_of_the_package_do_for_every_experiment(name: str) -> None:
    preset = Preset.read(preset_sizes(name))
    for each, its in EXPERIMENTS.items():
        its.check(preset, preset.section(each, its.options))
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
        CPU,
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


class Balanced(HTMLParser):
    """Checks that every tag is closed, and collects images and what is outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "meta":
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(str(dict(attrs)["src"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns("stages"))
    found = content(folder, "table4")
    found["texts"][0]["rows"][0][2] = "<script>alert('no')</script> & more"
    (folder / "table4.json").write_text(json.dumps(found))
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    page = Balanced()
    page.feed(text)
    assert not page.open and "script" not in page.tags and "link" not in page.tags
    assert "&lt;script&gt;alert(&#x27;no&#x27;)&lt;/script&gt; &amp; more" in text
    assert len(page.images) == 6
    assert all(image.startswith("data:image/png;base64,iVBOR") for image in page.images)
    for name in EXPERIMENTS:
        assert content(folder, name)["title"] in text
    assert "does not show" in text and "59.4" in text and "http" not in text


def test_the_page_has_the_runs_of_the_demo_and_of_train(tmp_path: Path) -> None:
    demo = ["demo", "--steps", "1", "--test-examples", "2", "--device", "cpu"]
    assert main([*demo, "--output", str(tmp_path / "demo")]) == 0
    text = results_page(tmp_path)
    assert "Run: demo" in text and "accuracy before" in text
    assert text.count("data:image/png;base64,iVBOR") == 1
