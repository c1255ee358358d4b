"""``gdprompt data``: triples of context, query and response to train and to test on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config.fields import REQUIRED, option
from ..data import SOURCES, make_data
from ..data.folder import SAMPLES, counts_table, is_data_folder, samples, write_data
from .command import command, outputs_of
from .groups import REPLACES_FOLDER, ReadingConfig, overwrite_field
from .reading import write_dropped


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadingConfig):
    """What triples to make, and where."""

    command = "data"

    name: str = option(
        REQUIRED,
        "; ".join(f"{name}: {source.what}" for name, source in SOURCES.items()),
        tuple(SOURCES),
        positional=True,
        metavar="NAME",
    )
    output: Path = option(REQUIRED, "folder to write to", writes=True, may_change=True)
    train: int | None = option(None, "training triples; None: 5,000, or all of a text")
    test: int | None = option(None, "test triples; None: 500, or all of a text")
    seed: int = option(0, "seed of what is drawn at random")
    source: Path | None = option(
        None,
        "file of squad, wikitext or jsonl; divided in two unless --test-source is given",
        reads=True,
    )
    test_source: Path | None = option(None, "file to take the test triples from", reads=True)
    max_characters: int | None = option(None, "drop a record with longer texts (squad: 1500)")
    overwrite: bool = overwrite_field(
        f"{REPLACES_FOLDER}; data that this command wrote, unchanged, needs no leave"
    )


@command("Make triples of context, query and response to train and to test on.")
def data(config: DataConfig) -> Callable[[], None]:
    """Makes the triples; the work is to write them."""
    outputs_of(config).check_folder(config.output, is_data_folder)
    made = make_data(
        config.name,
        config.train,
        config.test,
        config.seed,
        config.source,
        config.test_source,
        config.max_characters,
        config.encoding,
    )

    def work() -> None:
        settings = {n: v for n, v in config.settings().items() if n not in ("command", "name")}
        write_data(made, config.output, config.name, settings)
        write_dropped(config.dropped, config.command, made.dropped)
        print(counts_table(made, SOURCES[config.name].paper))
        print(f"\n{samples(made.train.take(SAMPLES))}\n\nwritten to {config.output}")

    return work
