"""The teacher's cache: the same targets as on the fly, the same bits after a kill, a key."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gdprompt_fast import TeacherTargets, fast_meta_step
from gdprompt_fast.data import Example, Limits, meta_batch, tokenise_triples
from gdprompt_fast.data.people import make_people_data, people_tokenizer
from gdprompt_fast.reference.compare import gradients_of, worst_error
from gdprompt_fast.teacher import TeacherCache, cache, teach
from helpers.models import small_llama

TOKENIZER = people_tokenizer()
EOS = TOKENIZER.eos_token_id


def llama(seed: int, **config: Any) -> torch.nn.Module:
    options: dict[str, Any] = {"initializer_range": 0.2, "tie_word_embeddings": True, **config}
    model = small_llama(len(TOKENIZER), seed, **options)
    model.lm_head.weight.data[EOS] *= 10  # now likely, now unlikely: answers of several lengths
    return model


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    records = make_people_data(1, 11, seed=0).test.to_list()
    for record in records[:4]:  # rows of different lengths
        record["context"] = record["context"].partition(".")[0]
    return tokenise_triples(records, TOKENIZER, Limits(64, 64, 64)).examples


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_EXAMPLES", 4)


def build(
    folder: Path, examples: list[Example], teacher: torch.nn.Module | None = None, **changes: int
) -> TeacherCache:
    settings = {"answer_tokens": 3, "batch_size": 2, **changes}
    return TeacherCache.build(folder, teacher or llama(1), examples, **settings)


def test_a_step_on_cached_targets_is_the_step_taught_on_the_fly(
    examples: list[Example], tmp_path: Path
) -> None:
    teacher, student = llama(1), llama(0)
    indices = [9, 0, 4, 9]
    answered, cached = build(tmp_path, examples, teacher).batch(indices)
    expected, taught = teach(teacher, [examples[i] for i in indices], EOS, max_tokens=3)
    assert answered == expected
    assert len({len(example.response) for example in expected}) > 1

    def step(targets: TeacherTargets) -> Any:
        options = dict(teacher=targets, inner_lr=0.3)
        return gradients_of(fast_meta_step, student, meta_batch(answered), **options)

    (out, gradients), (on_the_fly, expected_gradients) = step(cached), step(taught)
    assert float(out.outer_loss) == pytest.approx(float(on_the_fly.outer_loss), rel=1e-5)
    error, name = worst_error(gradients, expected_gradients)
    assert error < 1e-4, name


def test_a_teacher_in_bf16_is_cached_in_bf16(examples: list[Example], tmp_path: Path) -> None:
    _, targets = build(tmp_path, examples, llama(1).bfloat16()).batch([3])
    assert targets.hidden is not None and targets.hidden.dtype == torch.bfloat16


def killed_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    left = [calls]

    def wrapped(*args: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return function(*args)

    return wrapped


def test_a_killed_build_goes_on_after_its_last_shard_to_the_same_bits(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "whole", examples)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == ["key.json", "sha256.json", *(f"shard-0000{n}.safetensors" for n in range(3))]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "teach", killed_after(3, teach))
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "killed", examples)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == names[:3]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "teach", killed_after(4, teach))  # of six batches two are there
        build(tmp_path / "killed", examples)
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_a_whole_cache_asks_the_teacher_nothing(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(tmp_path, examples)
    monkeypatch.setattr(cache, "teach", killed_after(0, teach))
    assert build(tmp_path, examples).answered == first.answered


def test_the_gold_responses_are_no_part_of_the_key(examples: list[Example], tmp_path: Path) -> None:
    first = build(tmp_path, examples)
    others = [replace(example, response=examples[0].response) for example in examples]
    again = build(tmp_path, others)
    assert again.answered == first.answered and again.examples == others


@pytest.mark.parametrize(
    ("parts", "change"),
    [
        ("weights", dict(teacher=llama(2))),
        ("config", dict(teacher=llama(1, rms_norm_eps=1e-3))),
        ("weights and dtype", dict(teacher=llama(1).bfloat16())),
        ("answer_tokens", dict(answer_tokens=4)),
        ("batch_size", dict(batch_size=3)),
    ],
    ids=["weights", "config", "dtype", "answer tokens", "batch size"],
)
def test_a_cache_of_something_else_is_refused_with_what_differs(
    parts: str, change: dict[str, Any], examples: list[Example], tmp_path: Path
) -> None:
    build(tmp_path, examples)
    with pytest.raises(ValueError, match=f"was made with another {parts}: expected"):
        build(tmp_path, examples, **change)


def test_a_cache_of_other_data_is_refused(examples: list[Example], tmp_path: Path) -> None:
    build(tmp_path, examples)
    for others in (examples[:-1], examples[::-1]):
        with pytest.raises(ValueError, match="was made with another data: expected"):
            build(tmp_path, others)


def test_a_folder_that_is_no_cache_is_refused(examples: list[Example], tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match="teacher_cache: expected a cache or a new or empty"):
        build(tmp_path, examples)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_training_the_teacher_itself_does_not_change_its_targets(
    examples: list[Example], tmp_path: Path
) -> None:
    model = llama(1)
    of_model = build(tmp_path, examples, model)
    before = copy.deepcopy(of_model.batch([0])[1].materialised_logits())
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(of_model.batch([0])[1].materialised_logits(), before)
