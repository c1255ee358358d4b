"""Reading, tokenising, batching and sampling triples, and the demo's generator."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gdprompt_fast.data import (
    Limits,
    ShuffledSampler,
    meta_batch,
    pad,
    prompt_rows,
    query_rows,
    read_triples,
    tokenise_triples,
    units_by_context,
    write_triples,
)
from gdprompt_fast.data.people import QUESTIONS, make_people_data, people_tokenizer
from helpers.paths import SHARED_DATA
from helpers.training import ROOMY

TRIPLE = {"context": "Anna paints. Bob sings.", "query": "Who sings?", "response": "Bob"}


def byte_level_tokenizer(bos: bool) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer as GPT-2's: the space before a word belongs to its first piece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" Anna paints. Bob sings. Who sings? Bob"] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tinystories_tokenizer() -> PreTrainedTokenizerBase:
    folder = SHARED_DATA / "models" / "TinyStories-656K"
    if not folder.is_dir():
        pytest.skip("the TinyStories-656K checkpoint is not in ../shared/data")
    return AutoTokenizer.from_pretrained(folder)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "words with BOS": people_tokenizer,
    "leading space, no BOS": lambda: byte_level_tokenizer(bos=False),
    "leading space, BOS": lambda: byte_level_tokenizer(bos=True),
    "trailing space, written BOS": tinystories_tokenizer,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


def test_triples_survive_writing_and_reading(tmp_path: Path) -> None:
    records = [TRIPLE, {**TRIPLE, "response": "Ḇöb  ☃"}]
    write_triples(records, tmp_path / "triples.jsonl")
    assert read_triples(tmp_path / "triples.jsonl").to_list() == records


def test_all_right_answers_are_kept_and_default_to_the_response(tmp_path: Path) -> None:
    records = [TRIPLE, {**TRIPLE, "answers": ["Bob", "Bobby"]}]
    write_triples(records, tmp_path / "triples.jsonl")
    read = read_triples(tmp_path / "triples.jsonl")
    assert read["answers"][:] == [["Bob"], ["Bob", "Bobby"]]
    for triples in (records, read):
        examples = tokenise_triples(triples, people_tokenizer(), ROOMY).examples
        assert [example.answers for example in examples] == [("Bob",), ("Bob", "Bobby")]


def test_blank_lines_and_other_fields_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "triples.jsonl"
    path.write_text("\n" + json.dumps({**TRIPLE, "note": 7}) + "\n\n")
    assert read_triples(path).to_list() == [TRIPLE]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "invalid JSON"),
        ('["context"]', "expected a JSON object, got list"),
        ('{"context": "a", "query": "b"}', 'expected the field "response"'),
        ('{"context": "a", "query": " ", "response": "c"}', '"query" to be a non-empty string'),
        (
            '{"context": 3, "query": "b", "response": "c"}',
            '"context" to be a non-empty string, got 3',
        ),
        (
            '{"context": "a", "query": "b", "response": "c", "answers": "c"}',
            "\"answers\" to be a list of non-empty strings, got 'c'",
        ),
        (
            '{"context": "a", "query": "b", "response": "c", "answers": []}',
            '"answers" to be a list of non-empty strings, got []',
        ),
    ],
    ids=[
        "not JSON",
        "not an object",
        "missing field",
        "empty field",
        "not a string",
        "one answer for a list",
        "no answer",
    ],
)
def test_a_bad_line_is_an_error_naming_file_and_line(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(TRIPLE) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: ") as error:
        read_triples(path)
    assert message in str(error.value)


def test_an_absent_or_empty_file_is_an_error_naming_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.jsonl: expected a JSONL file"):
        read_triples(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="expected a JSONL file of triples, got a folder"):
        read_triples(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected at least one record"):
        read_triples(tmp_path / "empty.jsonl")


def test_rows_spell_the_joined_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    record = dict(make_people_data(1, 1, seed=0).train[0])
    (example,) = tokenise_triples([record], tokenizer, ROOMY).examples

    def text(ids: list[int]) -> str:
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        return "".join(character for character in decoded if not character.isspace())

    context, query, response = (
        record[f].replace(" ", "") for f in ("context", "query", "response")
    )
    assert text(list(example.context)) == context
    assert text(list(example.query + example.response)) == query + response
    assert text(list(example.prompt + example.response)) == context + query + response
    assert text(list(example.response)) == response


def test_a_row_opens_with_bos_where_the_tokenizer_does_so(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (example,) = tokenise_triples([TRIPLE], tokenizer, ROOMY).examples
    opens = tokenizer("Who")["input_ids"][0] == tokenizer.bos_token_id
    for row in (example.context, example.query, example.prompt):
        assert (row[0] == tokenizer.bos_token_id) == opens
        assert tokenizer.bos_token_id not in row[1:]
    assert example.response[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in example.response[:-1]


def test_a_leading_space_belongs_to_the_answer() -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    (example,) = tokenise_triples([TRIPLE], tokenizer, ROOMY).examples
    assert tokenizer.decode(list(example.response)) == " Bob</s>"
    assert tokenizer.decode(list(example.prompt)) == "Anna paints. Bob sings. Who sings?"


def test_white_space_in_the_fields_replaces_the_joining_space() -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    record = {**TRIPLE, "query": "\nWho sings?\n"}
    (example,) = tokenise_triples([record], tokenizer, ROOMY).examples
    text = tokenizer.decode(list(example.prompt + example.response))
    assert text == "Anna paints. Bob sings.\nWho sings?\nBob</s>"


def test_a_trailing_space_belongs_to_the_query() -> None:
    tokenizer = tinystories_tokenizer()
    (example,) = tokenise_triples([TRIPLE], tokenizer, ROOMY).examples
    assert tokenizer.decode(list(example.query)).endswith("sings? ")
    assert tokenizer.decode(list(example.response)) == "Bob<|end_story|>"


def test_long_and_short_records_are_dropped_and_counted() -> None:
    tokenizer = people_tokenizer()
    records = [
        {"context": "the red mill is Ada", "query": "who has the red mill?", "response": "Ada"},
        {"context": "the red mill " * 9, "query": "who?", "response": "Ada"},
        {"context": "red", "query": "who " * 9, "response": "Ada"},
        {"context": "red mill is Ada", "query": "who?", "response": "Ada " * 9},
        {
            "context": "the red mill is Ada",
            "query": "who has the red mill?",
            "response": "Ada Abel",
        },
    ]
    triples = tokenise_triples(records, tokenizer, Limits(10, 10, 14))
    assert len(triples.examples) == 1 and triples.kept == [0]
    assert triples.dropped == {
        "context longer than 10 tokens": 1,
        "query and response longer than 10 tokens": 2,
        "prompt and response longer than 14 tokens": 1,
    }
    assert "1 of 5 records kept; dropped 1: context longer than 10 tokens" in str(triples)


def test_a_set_without_usable_records_is_an_error_with_the_counts() -> None:
    with pytest.raises(ValueError, match="got none: 0 of 1 records kept; dropped 1: context"):
        tokenise_triples([TRIPLE], people_tokenizer(), Limits(3, 200, 200))


def test_a_tokenizer_without_an_end_marker_is_an_error() -> None:
    tokenizer = people_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected an eos_token"):
        tokenise_triples([TRIPLE], tokenizer, ROOMY)


def test_batches_hold_the_examples_and_mark_their_responses() -> None:
    data = make_people_data(1, 8, seed=0)
    examples = tokenise_triples(data.test, people_tokenizer(), ROOMY).examples
    batch = meta_batch(examples)
    for rows, starts in (
        (query_rows(examples), [e.query for e in examples]),
        (prompt_rows(examples), [e.prompt for e in examples]),
    ):
        for index, (example, start) in enumerate(zip(examples, starts, strict=True)):
            ids = rows.ids[index][rows.mask[index]].tolist()
            assert ids == list(start + example.response)
            assert rows.ids[index][rows.response_mask[index]].tolist() == list(example.response)
    assert torch.equal(batch.query_ids, query_rows(examples).ids)
    for index, example in enumerate(examples):
        assert batch.context_ids[index][batch.context_mask[index]].tolist() == list(example.context)


def test_examples_share_contexts_and_contexts_share_groups() -> None:
    data = make_people_data(1, 5, seed=0)
    a, b, c, d, e = tokenise_triples(data.test, people_tokenizer(), ROOMY).examples
    one_each, one_by_one = meta_batch([a, b, c]), meta_batch([a, b, c], [0, 1, 2], 1)
    for field in dataclasses.fields(one_each):
        assert torch.equal(getattr(one_each, field.name), getattr(one_by_one, field.name))
    same_context = dataclasses.replace(b, context=a.context)
    batch = meta_batch([a, same_context, c, d, e], [0, 0, 1, 2, 3], contexts_per_group=2)
    assert torch.equal(batch.context_ids, pad([e.context for e in (a, c, d, e)])[0])
    assert batch.context_group.tolist() == [0, 0, 1, 1]
    assert batch.query_group.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(batch.query_ids, query_rows([a, b, c, d, e]).ids)


def test_examples_with_the_same_context_come_in_units() -> None:
    data = make_people_data(1, 3, seed=0)
    a, b, c = tokenise_triples(data.test, people_tokenizer(), ROOMY).examples
    examples = [a, b, a, c, a, b, a]
    assert units_by_context(examples, 1) == [[0], [1], [2], [3], [4], [5], [6]]
    assert units_by_context(examples, 2) == [[0, 2], [1, 5], [3], [4, 6]]
    assert units_by_context(examples, 9) == [[0, 2, 4, 6], [1, 5], [3]]


def test_padding_is_on_the_right() -> None:
    ids, mask = pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_every_epoch_is_a_new_order_of_all_examples() -> None:
    sampler = ShuffledSampler(size=7, seed=3)
    drawn = [index for _ in range(7) for index in sampler.take(3)]
    epochs = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn != [i for _ in range(7) for i in ShuffledSampler(size=7, seed=4).take(3)]


def test_a_sampler_continues_from_its_position() -> None:
    first = ShuffledSampler(size=7, seed=3)
    first.take(10)
    second = ShuffledSampler(size=7, seed=3, position=first.position)
    assert [first.take(4) for _ in range(5)] == [second.take(4) for _ in range(5)]


def people_of(records: list[dict[str, str]]) -> set[str]:
    facts = [fact for record in records for fact in record["context"].rstrip(".").split(". ")]
    return {fact.split(" is ")[1] for fact in facts}


def things_of(records: list[dict[str, str]]) -> set[str]:
    facts = [fact for record in records for fact in record["context"].rstrip(".").split(". ")]
    return {fact.split(" is ")[0].split(" of the ")[1] for fact in facts}


def test_no_person_and_no_thing_is_in_both_training_and_test() -> None:
    data = make_people_data(2000, 500, seed=0)
    train, test = data.train.to_list(), data.test.to_list()
    assert len(people_of(test)) > 90 and not people_of(train) & people_of(test)
    assert len(things_of(test)) > 20 and not things_of(train) & things_of(test)


def test_a_passage_has_four_facts_and_the_query_asks_for_one_in_other_words() -> None:
    for record in make_people_data(200, 1, seed=1).train:
        facts = record["context"].rstrip(".").split(". ")
        answers = [fact for fact in facts if fact.endswith(f" is {record['response']}")]
        assert len(facts) == len(people_of([record])) == len(things_of([record])) == 4
        assert len(answers) == 1
        noun, thing = answers[0].split(" is ")[0].removeprefix("the ").split(" of ")
        assert record["query"] == QUESTIONS[noun].format(thing)
        assert noun not in record["query"] and record["response"] not in record["query"]


def test_a_passage_to_train_on_has_a_question_on_each_of_its_facts() -> None:
    data = make_people_data(10, 10, seed=1)
    records = data.train.to_list()
    for first in (0, 4):
        passage = records[first : first + 4]
        assert len({record["context"] for record in passage}) == 1
        assert len({record["response"] for record in passage}) == 4
    assert len({record["context"] for record in records}) == 3
    assert len({record["context"] for record in data.test.to_list()}) == 10


def test_people_data_follow_from_the_seed() -> None:
    small, large = make_people_data(5, 5, seed=2), make_people_data(9, 5, seed=2)
    assert large.train.to_list()[:5] == small.train.to_list()
    assert large.test.to_list() == small.test.to_list()
    assert make_people_data(5, 5, seed=3).test.to_list() != small.test.to_list()


def test_the_people_tokenizer_knows_every_word_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = people_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for record in make_people_data(300, 300, seed=0).test:
        text = f"{record['context']} {record['query']} {record['response']}"
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert loaded(text)["input_ids"] == ids
    assert (loaded.eos_token, loaded.pad_token) == ("</s>", "<pad>")
