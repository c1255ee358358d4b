"""The sources of triples by name: generators of our own, SQuAD, WikiText and any JSONL."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset

from ..errors import UserError
from .characters import TEST_SIZE, TRAIN_SIZE, make_characters
from .corpus import Corpus, Record
from .people import make_people_articles, make_people_data
from .squad import read_squad_file, read_squad_hub
from .texts import UTF_8
from .triples import FIELDS, TrainTest, read_records
from .wikitext import Cut, cut_articles, read_wikitext_file, read_wikitext_hub

# Four facts are 36 words and their repetition at least 24: the context has all facts, the response
# lies in the repetition.
PEOPLE_ARTICLES = Cut(min_words=60, min_context_words=36, max_context_words=60, response_words=8)


@dataclass(frozen=True)
class Source:
    """Where triples come from; a source generates them, or reads a file or the hub.

    Attributes:
        what: a line that describes it.
        paper: how many triples the paper has, to "train" and to "test"; empty if it has none.
        generate: train size, test size and seed to triples.
        read_file: file, seed and encoding to triples.
        read_hub: ``train`` or ``test`` and seed to triples.
        max_characters: records with more, of all their texts together, are too long, unless another
            number is asked for.
        revision: another one once the same settings make other triples.
    """

    what: str
    paper: dict[str, int]
    generate: Callable[[int, int, int], TrainTest] | None = None
    read_file: Callable[[Path, int, str], Corpus] | None = None
    read_hub: Callable[[str, int], Corpus] | None = None
    max_characters: int | None = None
    revision: int = 1


def make_people_text(train_size: int, test_size: int, seed: int) -> TrainTest:
    """Articles of facts, cut by the rule for running text: the small stand-in for WikiText."""
    train, test = (
        cut_articles(([text] for text in texts), PEOPLE_ARTICLES, seed).records()
        for texts in make_people_articles(train_size, test_size, seed)
    )
    counts = {"train": len(train), "test": len(test)}
    return TrainTest(Dataset.from_list(train), Dataset.from_list(test), counts)


def read_jsonl(path: Path, seed: int, encoding: str) -> Corpus:
    """Triples of a JSONL file, those of a context in a group.

    Raises:
        ValueError: naming file and line, if a record is not a triple.
    """
    groups: dict[str, list[Record]] = {}
    records = read_records(path, encoding)
    if records.read_as:
        print(f"{path}: {records.read_as}")
    for record in records.rows:
        groups.setdefault(record["context"], []).append(record)
    return Corpus(list(groups.values()), {})


SOURCES = {
    "character-description": Source(
        "invented people and their descriptions, asked for in other words",
        {"train": 5000, "test": 500},
        generate=partial(make_characters, "character-description"),
    ),
    "reversal-curse": Source(
        "invented people and their descriptions, asked for in reversed order",
        {"train": 5000, "test": 500},
        generate=partial(make_characters, "reversal-curse"),
    ),
    "people": Source(
        "passages of four facts about invented people, and questions on them",
        {},
        generate=make_people_data,
        revision=2,
    ),
    "people-text": Source(
        "articles of facts about invented people, cut as WikiText is",
        {},
        generate=make_people_text,
    ),
    "squad": Source(
        "SQuAD, from the hub or from files of the official JSON layout",
        {"train": 82_031, "test": 10_380},
        read_file=lambda path, seed, encoding: read_squad_file(path, encoding),
        read_hub=lambda split, seed: read_squad_hub(split),
        max_characters=1500,  # about 350 tokens; leaves out one record in twenty
    ),
    "squad-sentences": Source(
        "SQuAD with only the sentence that the answer stands in as passage",
        {},
        read_file=lambda path, seed, encoding: read_squad_file(path, encoding, sentences=True),
        read_hub=lambda split, seed: read_squad_hub(split, sentences=True),
    ),
    "wikitext": Source(
        "WikiText-103, from the hub or from text files of its layout",
        {"train": 343_586, "test": 758},
        read_file=read_wikitext_file,
        read_hub=read_wikitext_hub,
    ),
    "jsonl": Source('any JSONL file of {"context", "query", "response"}', {}, read_file=read_jsonl),
}


def make_data(
    name: str,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
    source: Path | None = None,
    test_source: Path | None = None,
    max_characters: int | None = None,
    encoding: str = UTF_8,
) -> TrainTest:
    """Triples to train and to test on, of one of :data:`SOURCES`.

    A single ``source`` is divided into training and test set by article (of a JSONL file, by
    context), two files and the hub's splits are kept as they are. Training records whose context
    is in the test set as well are dropped.

    Args:
        name: of the source.
        train: number of training triples; None: 5,000 of a generator, else all there are.
        test: number of test triples; None: 500 of a generator, else all there are, and a tenth of
            a single file.
        seed: of what is drawn at random.
        source: file to read; None: generated, or from the hub.
        test_source: file with the test set, where ``source`` has only the training set.
        max_characters: records with more, of all their texts together, are dropped; None: the
            source's own limit, if it has one (1,500 for SQuAD).
        encoding: of the files.

    Raises:
        ValueError: naming the argument, if there is no such source, if it needs or does not take
            a file, if a file is bad, if there are fewer triples than asked for, or if the hub
            cannot be reached.
    """
    if name not in SOURCES:
        raise UserError(f"name: expected one of {', '.join(SOURCES)}, got {name!r}")
    for option, size in (("train", train), ("test", test), ("max_characters", max_characters)):
        if size is not None and size < 1:
            raise UserError(f"{option}: expected an integer >= 1, got {size}")
    generate = SOURCES[name].generate
    if generate is None:
        corpora = _read(name, source, test_source, seed, encoding)
        limit = max_characters or SOURCES[name].max_characters
        if limit is not None:
            corpora = [_without_longer(corpus, limit) for corpus in corpora]
        to_train, to_test = corpora if len(corpora) == 2 else corpora[0].split(test, seed)
        return _chosen(to_train, to_test, train, test, seed)
    options = {"source": source, "test_source": test_source, "max_characters": max_characters}
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option}: expected none for {name}, which is made up, got {value}")
    return generate(train or TRAIN_SIZE, test or TEST_SIZE, seed)


def _read(
    name: str, source: Path | None, test_source: Path | None, seed: int, encoding: str
) -> list[Corpus]:
    """Training and test set, or the one file that both are to be taken from."""
    read_file, read_hub = SOURCES[name].read_file, SOURCES[name].read_hub
    if source is None and test_source is None and read_hub is not None:
        return [read_hub("train", seed), read_hub("test", seed)]
    if source is None or read_file is None:
        raise UserError(f"source: expected a file for {name}, got none")
    for option, path in (("source", source), ("test_source", test_source)):
        if path is not None and not path.is_file():
            raise UserError(f"{option}: expected a file, got {path}")
    return [read_file(path, seed, encoding) for path in (source, test_source) if path is not None]


def _without_longer(corpus: Corpus, max_characters: int) -> Corpus:
    def too_long(record: Record) -> bool:
        return sum(len(record[field]) for field in FIELDS) > max_characters

    return corpus.without(too_long, f"more than {max_characters} characters")


def _chosen(
    train: Corpus, test: Corpus, train_size: int | None, test_size: int | None, seed: int
) -> TrainTest:
    """Training records of no test context, drawn down to the sizes, with all that was dropped."""
    unseen = {record["context"] for record in test.records()}
    train = train.without(lambda record: record["context"] in unseen, "context in the test set")
    train_rows = _draw("train", train.records(), train_size, seed)
    test_rows = _draw("test", test.records(), test_size, seed)
    counts = Counter({"train": len(train_rows), "test": len(test_rows)})
    dropped: list[Record] = []
    for corpus in (train, test):
        counts.update({f"dropped: {why}": count for why, count in corpus.counts.items()})
        for why, records in corpus.dropped.items():
            dropped += [{"reason": why, **record} for record in records]
    return TrainTest(
        Dataset.from_list(train_rows), Dataset.from_list(test_rows), dict(counts), dropped
    )


def _draw(part: str, records: list[Record], size: int | None, seed: int) -> list[Record]:
    """``size`` records drawn at random, in the order they were in; None: all."""
    wanted = len(records) if size is None else size
    if not 1 <= wanted <= len(records):
        raise UserError(
            f"{part}: expected 1 to {len(records)}, all records there are, got {wanted}"
        )
    drawn = random.Random(seed).sample(range(len(records)), wanted)
    return [records[index] for index in sorted(drawn)]
