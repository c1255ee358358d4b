"""Files of triples as the command line names them, and what became of their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import write_json
from ..artifacts.outputs import written_by
from ..data import ChatEncoder, Example, Limits, TripleEncoder, read_records, tokenise_triples
from ..loading import check_vocabulary
from .groups import ExamplesConfig


@dataclass
class Reader:
    """Reads files of triples, says what it did, and remembers which records were dropped.

    Attributes:
        encoding: of the files.
        encoder: turns texts into tokens.
        dropped: {"file", "line", "id", "reason"} of every record dropped so far.
    """

    encoding: str
    encoder: type[TripleEncoder] = TripleEncoder
    dropped: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, config: ExamplesConfig) -> Reader:
        """The reader that a configuration asks for."""
        return cls(config.encoding, ChatEncoder if config.chat_template else TripleEncoder)

    def examples(
        self, path: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, limits: Limits
    ) -> list[Example]:
        """The examples in a file that the model can read.

        Raises:
            ValueError: naming the file and the line, or the tokenizer and model that do not fit.
        """
        records = read_records(path, self.encoding)
        triples = tokenise_triples(records.rows, tokenizer, limits, self.encoder)
        check_vocabulary(triples.examples, model)
        if records.read_as:
            print(f"{path}: {records.read_as}")
        print(f"{path}: {triples}")
        for index, reason in triples.reasons.items():
            place = {"file": str(path), "line": records.lines[index]}
            name = records.rows[index].get("id")
            self.dropped.append({**place, "id": name, "reason": reason})
        return triples.examples


def write_dropped(path: Path | None, command: str, dropped: Sequence[Mapping[str, Any]]) -> None:
    """Writes which records were dropped and why as JSON, if asked for."""
    if path is not None:
        write_json(path, {**written_by(command), "dropped": list(dropped)})
