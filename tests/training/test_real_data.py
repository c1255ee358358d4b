"""A general corpus for L_LM, a teacher without a cache, a held-out curve."""

from __future__ import annotations

import copy
import dataclasses
import json
from array import array
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

import gdprompt_fast.training.loop
from gdprompt_fast import fast_meta_step
from gdprompt_fast.data import Example, pad, text_rows
from gdprompt_fast.evaluation.held_out import MERIT, HeldOut
from gdprompt_fast.report import draw_figure
from gdprompt_fast.teacher import TeacherCache, TeacherOnTheFly
from gdprompt_fast.training.metrics import read_metrics
from gdprompt_fast.training.options import TrainOptions
from gdprompt_fast.training.step_data import LeastSizes, StepData
from helpers.killing import Killed, killed_after
from helpers.training import GOLD, KL, TOKENIZER, run, tiny_llama

TEXTS = [array("i", row) for row in ([5, 9, 23, 40, 7, 11], [8, 61, 12, 9], [12, 80, 3, 33, 4])]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("on_the_fly", [False, True], ids=["cache", "teacher on the fly"])
def test_a_killed_and_resumed_run_has_the_same_bits_curve_and_best_model(
    on_the_fly: bool, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {"texts": TEXTS, "held_out": HeldOut(examples[:3], every=2, batch_size=2)}
    whole = run(KL, examples, tmp_path / "a", on_the_fly=on_the_fly, **beside)
    with monkeypatch.context() as patch:
        step = killed_after(5, gdprompt_fast.training.loop.fast_meta_step)
        patch.setattr(gdprompt_fast.training.loop, "fast_meta_step", step)
        with pytest.raises(Killed):
            run(KL, examples, tmp_path / "b", on_the_fly=on_the_fly, **beside)
    resumed = run(KL, examples, tmp_path / "b", on_the_fly=on_the_fly, **beside)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    for name in ("model", "best"):
        assert folder_bytes(tmp_path / "a" / name) == folder_bytes(tmp_path / "b" / name)
    metrics = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("a", "b")]
    assert metrics[0] == metrics[1]


def test_the_best_model_is_that_of_the_lowest_held_out_nll(
    examples: list[Example], tmp_path: Path
) -> None:
    held_out = HeldOut(examples[:3], every=3, batch_size=2)
    plain = run(GOLD, examples, tmp_path / "plain")
    measured = run(GOLD, examples, tmp_path / "measured", held_out=held_out)
    assert all(torch.equal(measured[name], value) for name, value in plain.items())
    rows = read_metrics(tmp_path / "measured" / "metrics.jsonl")
    curve = {row["step"]: row[MERIT] for row in rows if MERIT in row}
    assert list(curve) == [3, 6, 7]
    best = json.loads((tmp_path / "measured" / "best" / "best.json").read_text())
    assert best["step"] == min(curve, key=lambda step: curve[step])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "measured" / "best")
    again = held_out.numbers(model, TOKENIZER, GOLD.inner)
    assert again[MERIT] == pytest.approx(best[MERIT], rel=1e-6)
    assert again["held_out/prompt/accuracy"] == best["held_out/prompt/accuracy"]
    draw_figure({}, rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_gradient_of_texts_is_lambda_times_that_of_their_mean_nll(
    examples: list[Example],
) -> None:
    model = tiny_llama().double().eval()
    options = dataclasses.replace(GOLD, lm_weight=0.3)
    bare = dataclasses.replace(GOLD, lm_weight=0.0)
    with_texts, without = copy.deepcopy(model), copy.deepcopy(model)
    for each, chosen in ((with_texts, options), (without, bare)):
        data = StepData.of(examples, [[0], [1]], None, TEXTS)
        fast_meta_step(each, **data.arguments(each, chosen), config=chosen.step_config)
    ids, mask = pad(TEXTS)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
    (0.3 * (nll.sum(1) / mask[:, 1:].sum(1)).mean()).backward()
    parameters = (each.named_parameters() for each in (with_texts, without, model))
    for (name, whole), (_, part), (_, text) in zip(*parameters, strict=True):
        expected = part.grad + text.grad
        error = (whole.grad - expected).norm() / expected.norm()
        assert error < 1e-6, f"{name}: {error}"


@pytest.mark.parametrize("options", [GOLD, KL], ids=["gold", "kl"])
def test_padding_to_the_longest_rows_of_all_changes_no_gradient(
    options: TrainOptions, examples: list[Example]
) -> None:
    teacher = None
    if options.objective == "kl":
        teacher = TeacherOnTheFly(tiny_llama(seed=1).eval(), examples, 3, batch_size=2)
    options = dataclasses.replace(options, answer_tokens=7)
    least = LeastSizes.of(examples, options)
    assert least is not None
    assert LeastSizes.of(examples, dataclasses.replace(options, group_by_length=True)) is None
    gradients, shapes = [], set()
    for ladder, sizes in ((False, None), (True, least)):
        model = tiny_llama().double().eval()
        for units in ([[0], [1]], [[2], [3]]):
            data = StepData.of(examples, units, teacher)
            arguments = data.arguments(model, options, ladder, sizes)
            if ladder:
                shapes.add(arguments["batch"].layout.shape)
            fast_meta_step(model, **arguments, config=options.step_config)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(shapes) == 1
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("indices", [[4, 0, 2], []], ids=["some", "none"])
def test_a_teacher_on_the_fly_says_what_the_cache_says(
    examples: list[Example], tmp_path: Path, indices: list[int]
) -> None:
    teacher = tiny_llama(seed=1).eval()
    cache = TeacherCache.build(tmp_path / "teacher", teacher, examples, 3, batch_size=4)
    asked = TeacherOnTheFly(teacher, examples, 3, batch_size=2)
    assert asked.examples == cache.examples
    (kept, kept_targets), (said, said_targets) = cache.batch(indices), asked.batch(indices)
    assert said == kept
    assert said_targets.hidden is not None and kept_targets.hidden is not None
    torch.testing.assert_close(said_targets.hidden, kept_targets.hidden)
    assert torch.equal(said_targets.head, kept_targets.head)


def test_a_text_is_cut_into_rows_of_equal_length(tmp_path: Path) -> None:
    words = [word for word in TOKENIZER.get_vocab() if word.isalpha()][:9]
    path = tmp_path / "text.txt"
    path.write_text(f"{' '.join(words[:4])}\n\n{' '.join(words[4:])}\n")
    rows = text_rows(path, TOKENIZER, 5)
    opening = TOKENIZER("")["input_ids"]
    assert {len(row) for row in rows} == {5}
    assert all(list(row[: len(opening)]) == opening for row in rows)
    inside = [token for row in rows for token in row[len(opening) :]]
    whole = TOKENIZER(" ".join(words), add_special_tokens=False)["input_ids"]
    assert inside == whole[: len(inside)]
    with pytest.raises(ValueError, match=r"text.txt: expected text of at least 99"):
        text_rows(path, TOKENIZER, 99 + len(opening))
