"""Triples of context, query and response: reading, tokenising, batching, the demo's generator."""

from .collate import Rows, meta_batch, pad, prompt_rows, query_rows, response_rows, with_responses
from .sampler import ShuffledSampler
from .tokenise import Example, Limits, TokenisedTriples, TripleTokeniser, batched, tokenise_triples
from .triples import read_triples, write_triples

__all__ = [
    "Example",
    "Limits",
    "Rows",
    "ShuffledSampler",
    "TokenisedTriples",
    "TripleTokeniser",
    "batched",
    "meta_batch",
    "pad",
    "prompt_rows",
    "query_rows",
    "read_triples",
    "response_rows",
    "tokenise_triples",
    "with_responses",
    "write_triples",
]
