"""Shapes that passes are gated and timed at."""

from __future__ import annotations

from gdprompt_fast.testing.op_inputs import Shape

UP = dict(groups=16, rows=32, inputs=2048, outputs=8192, context=256)
DOWN = dict(groups=16, rows=32, inputs=8192, outputs=2048, context=256)
LORA_A = dict(groups=16, rows=16, tokens=256, inputs=2048, outputs=16)
LORA_B = {**LORA_A, "inputs": 16, "outputs": 8192}
HEADS = dict(heads=32, kv_heads=8, dim=64)
# Of Llama 3.2 1B: 16 examples of 256 context tokens and 32 query tokens.
TIMED: dict[str, dict[str, Shape]] = {
    "linear": {
        "queries up": UP,
        "queries down": DOWN,
        "queries up, backward": {**DOWN, "transposed": 1},
        "queries down, backward": {**UP, "transposed": 1},
        "queries square": {**UP, "outputs": 2048},
        "queries narrow": {**UP, "outputs": 512},
        "contexts up": {**UP, "rows": 256},
    },
    "attention": {
        "contexts": dict(batch=16, tokens=256, **HEADS),
        "one text of 4096 tokens": dict(batch=1, tokens=4096, **HEADS),
        "one text of 8192 tokens": dict(batch=1, tokens=8192, **HEADS),
        "contexts packed into one row": dict(batch=1, tokens=4096, segments=16, **HEADS),
    },
    "lora": {
        "contexts, A": LORA_A,
        "contexts, B": LORA_B,
        "queries, A": {**LORA_A, "tokens": 32},
        "queries, B": {**LORA_B, "tokens": 32},
    },
    "norm": {
        "contexts": dict(examples=16, tokens=256, hidden=2048),
        "queries": dict(examples=16, tokens=32, hidden=2048),
    },
    "swiglu": {
        "contexts": dict(examples=16, tokens=256, hidden=8192),
        "queries": dict(examples=16, tokens=32, hidden=8192),
    },
    "gelu": {
        "contexts": dict(examples=16, tokens=256, hidden=8192),
        "contexts, tanh": dict(examples=16, tokens=256, hidden=8192, tanh=1),
    },
    "rotary": {
        "contexts": dict(batch=16, tokens=256, **HEADS),
        "queries": dict(batch=16, tokens=32, **HEADS),
    },
    "vocabulary": {
        "a tile of contexts": dict(groups=16, rows=256, columns=4096, hidden=2048),
        "a tile of responses": dict(groups=16, rows=32, columns=4096, hidden=2048),
    },
    "inner_linear": {
        "queries up": UP,
        "queries down": DOWN,
        "contexts up": {**UP, "rows": 256},
    },
    "losses": {
        "contexts and responses": dict(
            groups=16, rows=256, responses=32, hidden=2048, vocabulary=128256
        )
    },
}
ODD: dict[str, dict[str, Shape]] = {  # for the gate only
    "linear": {
        "odd": dict(groups=3, rows=7, inputs=41, outputs=17, context=5, bias=1),
        "one row": dict(groups=2, rows=1, inputs=40, outputs=70, context=1, transposed=1),
    },
    "attention": {  # few: in fp32 each takes half a minute to compile
        "odd": dict(batch=2, heads=6, kv_heads=2, tokens=37, dim=20),
        "odd, window": dict(batch=1, heads=3, kv_heads=1, tokens=131, dim=64, window=40),
        "odd, segments": dict(batch=2, heads=2, kv_heads=2, tokens=131, dim=96, segments=3),
        "contexts, added": dict(batch=2, tokens=256, **HEADS, add=1),
    },
    "lora": {
        "odd, groups of 0 to 3 rows": dict(groups=4, rows=5, tokens=37, inputs=401, outputs=3),
        "rank 1, one token": dict(groups=3, rows=3, tokens=1, inputs=1, outputs=70, transposed=1),
    },
    "norm": {
        "odd": dict(examples=3, tokens=5, hidden=401),
        "odd, layer norm": dict(examples=2, tokens=7, hidden=401, center=1),
        "one token": dict(examples=2, tokens=1, hidden=64),
        "contexts, added": dict(examples=2, tokens=256, hidden=2048, add=1),
    },
    "swiglu": {
        "odd": dict(examples=3, tokens=1, hidden=401),
        "odd, added": dict(examples=3, tokens=1, hidden=401, add=1),
    },
    "gelu": {
        "odd": dict(examples=3, tokens=1, hidden=401),
        "odd, tanh": dict(examples=3, tokens=1, hidden=401, tanh=1),
    },
    "rotary": {
        "odd": dict(batch=2, heads=6, kv_heads=2, tokens=37, dim=20),
        "part of each head": dict(batch=3, heads=5, kv_heads=5, tokens=1, dim=80, rotated=20),
    },
    "vocabulary": {
        "odd": dict(groups=3, rows=7, columns=401, hidden=41),
        "own columns": dict(groups=3, rows=1, columns=5000, hidden=8, own=1),
    },
    "inner_linear": {
        "odd": dict(groups=3, rows=7, inputs=41, outputs=17, context=5, bias=1),
        "odd, forms the update": dict(groups=2, rows=31, inputs=3, outputs=4, context=29),
    },
    "losses": {"odd": dict(groups=3, rows=7, responses=5, hidden=41, vocabulary=401)},
}
TINY = dict(groups=2, rows=5, inputs=32, outputs=48, context=6, examples=2, tokens=9, hidden=64)
TINY |= dict(batch=1, heads=2, kv_heads=1, dim=16, window=5, segments=2, rotated=6)
TINY |= dict(columns=70, responses=3, vocabulary=70)


def timed_shapes(op: str, tiny: bool) -> dict[str, Shape]:
    """Of those that are timed, a tiny run takes the first: the others differ in size only."""
    shapes = TIMED[op]
    return _shrunk(dict(list(shapes.items())[:1])) if tiny else shapes


def odd_shapes(op: str, tiny: bool) -> dict[str, Shape]:
    return _shrunk(ODD[op]) if tiny else ODD[op]


def _shrunk(shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {
        name: {key: min(size, TINY.get(key, size)) for key, size in shape.items()}
        for name, shape in shapes.items()
    }
