"""From rows of a data set, of texts or of token ids, to what a step is taken on."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data import ChatEncoder, Example, TripleEncoder, meta_batch
from ..data.tokenise import Texts
from ..errors import UserError

COLUMNS = ("context", "query", "response")
NUMBER = "gdprompt_row"  # among all rows that the trainer has prepared
BATCH = "batch"

Row = Mapping[str, Any]


class MetaCollator:
    """Turns rows with a context, a query and a response into a ``MetaBatch``, a group a row.

    Texts become token ids by the rule of ``gdprompt_fast/data/tokenise.py``. Token ids are taken as
    they are: the context's row, the query, and the response with the token that ends it, each row
    opened with BOS where the model expects it. A row may have "context_loss" too: of texts the
    spans in characters, of ids a bool for every token of the context.

    Args:
        tokenizer: for rows of texts.
        chat_template: ask and answer as turns of the tokenizer's chat.

    Raises:
        UserError: for a tokenizer without EOS, or, with ``chat_template``, without a template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None = None, chat_template: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        encoder = ChatEncoder if chat_template else TripleEncoder
        self.encoder = None if tokenizer is None else encoder(tokenizer)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """
        Returns:
            ``{"batch": MetaBatch}``; of rows that a MetaTrainer has prepared their "gdprompt_row"
            too, a LongTensor [Q].

        Raises:
            UserError: naming the column, or the row that nothing can be learnt from.
        """
        inputs: dict[str, Any] = {BATCH: meta_batch(list(self.examples(rows)))}
        if NUMBER in rows[0]:
            inputs[NUMBER] = torch.tensor([row[NUMBER] for row in rows])
        return inputs

    def examples(self, rows: Sequence[Row]) -> Iterator[Example]:
        """The rows as token ids."""
        if not is_text(rows[0]):
            yield from map(example_of_ids, rows)
            return
        if self.encoder is None:
            raise UserError("processing_class: expected a tokenizer for rows of texts, got None")
        for row, example in zip(rows, self.encoder.examples(rows), strict=True):
            if example is None or len(example.context) < 2 or not example.query:
                raise UserError(
                    "train_dataset: expected a context of 2 tokens and a response that has the "
                    f"same tokens after query and prompt, got {dict(row)!r:.200}"
                )
            yield example


def is_text(row: Row) -> bool:
    """Whether a row is of texts; else it is of token ids.

    Raises:
        UserError: if a column is missing, or is neither.
    """
    for name in COLUMNS:
        if name not in row:
            raise UserError(
                f'dataset: expected the columns "context", "query" and "response", got {[*row]}'
            )
    kinds = {isinstance(row[name], str) for name in COLUMNS}
    if kinds == {True}:
        return True
    if kinds == {True, False}:
        raise UserError("dataset: expected texts or token ids in all three columns, got both")
    return False


def example_of_ids(row: Row) -> Example:
    """An example of token ids; without a "prompt" that is context ⊕ query.

    Raises:
        UserError: if there are no ids in a column.
    """
    try:
        context, query, response = (array("i", row[name]) for name in COLUMNS)
    except TypeError as error:
        raise UserError(
            "dataset: expected texts or lists of token ids in context, query and response, got "
            f"{ {name: type(row[name]).__name__ for name in COLUMNS} }"
        ) from error
    prompt = row.get("prompt")
    loss = row.get("context_loss")
    return Example(
        context=context,
        query=query,
        prompt=context + query if prompt is None else array("i", prompt),
        response=response,
        texts=Texts("", "", "", None),
        context_loss=None if loss is None else tuple(loss),
    )


def row_of(example: Example) -> dict[str, Any]:
    """The row of token ids of an example."""
    loss = example.context_loss
    return {
        **{name: getattr(example, name).tolist() for name in (*COLUMNS, "prompt")},
        "context_loss": None if loss is None else list(loss),
    }
