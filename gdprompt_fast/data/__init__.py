"""Triples of context, query and response: generating, reading, tokenising, batching."""

from .characters import characters_vocabulary, make_characters
from .chat import ChatEncoder
from .collate import (
    Rows,
    context_loss_mask,
    meta_batch,
    moved,
    pad,
    prompt_rows,
    query_rows,
    response_rows,
    with_responses,
)
from .contexts import (
    Context,
    ContextRow,
    encode_contexts,
    read_contexts,
    reason_to_drop_context,
)
from .lengths import LengthSampler, Size, by_length, prompt_sizes, step_sizes
from .people import make_people_articles, make_people_data, people_dialogue, people_vocabulary
from .running_text import text_rows
from .sampler import Sampler, ShuffledSampler, units_by_context
from .sources import SOURCES, Source, make_data
from .tokenise import (
    Example,
    Limits,
    TokenisedTriples,
    TripleEncoder,
    batched,
    end_token,
    tokenise_triples,
)
from .triples import Records, TrainTest, read_records, read_triples, write_triples

__all__ = [
    "SOURCES",
    "ChatEncoder",
    "Context",
    "ContextRow",
    "Example",
    "LengthSampler",
    "Limits",
    "Records",
    "Rows",
    "Sampler",
    "ShuffledSampler",
    "Size",
    "Source",
    "TokenisedTriples",
    "TrainTest",
    "TripleEncoder",
    "batched",
    "by_length",
    "characters_vocabulary",
    "context_loss_mask",
    "encode_contexts",
    "end_token",
    "make_characters",
    "make_data",
    "make_people_articles",
    "make_people_data",
    "meta_batch",
    "moved",
    "pad",
    "people_dialogue",
    "people_vocabulary",
    "prompt_rows",
    "prompt_sizes",
    "query_rows",
    "read_contexts",
    "read_records",
    "read_triples",
    "reason_to_drop_context",
    "response_rows",
    "step_sizes",
    "text_rows",
    "tokenise_triples",
    "units_by_context",
    "with_responses",
    "write_triples",
]
