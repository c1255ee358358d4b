"""The FLOPs that a step must compute, whatever a way computes."""

from __future__ import annotations

FIRST_ORDER = ("fast first-order", "sequential first-order")


def passes_of(way: str, lora_outside: bool) -> tuple[int, int]:
    """Products of the matrices with every token of a context, and of a query, that a step takes:
    forward one, backward two (one where the matrices are frozen), and of a context twice that for
    the gradient through the inner step.

        12 P T_c + 6 P T_q        (LoRA outside: 8 P T_c + 4 P T_q; ordinary: 6 P T, 4 P T)
    """
    backward = 1 if lora_outside else 2
    if way.startswith("ordinary"):
        return 1 + backward, 1 + backward
    return 2 if way.startswith(FIRST_ORDER) else 2 + 2 * backward, 1 + backward


def step_flops(
    way: str, parameters: int, context_tokens: int, query_tokens: int, lora_outside: bool
) -> float:
    """Of so many parameters and tokens in all, attention left out and the head counted for every
    token: the usual rule of thumb.
    """
    context, query = passes_of(way, lora_outside)
    return 2.0 * parameters * (context * context_tokens + query * query_tokens)
