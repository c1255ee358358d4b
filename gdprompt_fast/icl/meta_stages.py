"""The stages of meta-trained models: ZSL, ICL and one inner step, a triple at a time."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifacts.files import hash_of_file
from ..artifacts.stage import Result, Stage
from ..bundled import bundled_folder, meta_trained_folder
from ..data import Example, Limits, make_data, read_triples, tokenise_triples
from ..errors import UserError
from ..evaluation.adapted import InnerStep, adapted_one_after_another
from ..loading import find_model, fingerprint_of, load_tokenizer
from .context import UNTRAINED, IclContext, load_once
from .methods import RANDOM, randomise
from .metrics import Answers, Observed, sim_am, sim_am_delta, sim_aou
from .observing import check_finite
from .recording import record
from .stages import numbers, tensor_of

SEEDS = 100_000  # of a repetition's random updates
LIMITS = Limits(context_tokens=512, query_tokens=256, prompt_tokens=768)


@dataclass(frozen=True)
class Pair:
    """Which model, on which triples.

    Attributes:
        name: of the pair.
        folder: of the model.
        model: its name, of stages; ``UNTRAINED``: one of its configuration with fresh weights.
        source, file: of the triples.
        count: how many.
    """

    name: str
    folder: str
    model: str
    source: str
    file: str | None
    count: int


@dataclass(frozen=True)
class Shown:
    """FT beside ZSL and ICL on N triples: first tokens, and similarities by metric, [N, P]."""

    answers: Answers
    at_points: dict[str, Tensor]


def shown(ctx: IclContext, pair: Pair, kind: str, lr: float) -> Shown:
    """Measured now if it is not there."""
    its = _stage(ctx, pair, kind, lr).result
    answers = Answers(*(torch.tensor(its[key]) for key in ("zsl", "icl", "ft", "gold")))
    metrics = ("sim_aou", "sim_am", "sim_am_delta", "sim_am_zsl")
    return Shown(answers, {name: tensor_of(its[name]) for name in metrics})


def _stage(ctx: IclContext, pair: Pair, kind: str, lr: float) -> Stage:
    folder = folder_of(pair.folder)

    def work(_: Path) -> Result:
        seed = ctx.seed if pair.model == UNTRAINED else None
        model = load_once(folder, ctx.preset.model.dtype, ctx.device, seed)
        examples = _examples(ctx, pair, folder)
        device, observed = ctx.device, dict[str, Observed]()
        observed["zsl"] = _stacked(_observe(model, each, each.query, device) for each in examples)
        observed["icl"] = _stacked(_observe(model, each, each.prompt, device) for each in examples)
        observed["ft"] = _stacked(_after_step(ctx, model, examples, kind, lr))
        zsl, icl, ft = observed.values()
        return {
            "examples": len(examples),
            "gold": [each.response[0] for each in examples],
            **{name: each.predicted.tolist() for name, each in observed.items()},
            "sim_aou": numbers(sim_aou(icl, zsl, ft)),
            "sim_am": numbers(sim_am(icl, ft)),
            "sim_am_zsl": numbers(sim_am(icl, zsl)),
            "sim_am_delta": numbers(sim_am_delta(icl, zsl, ft)),
        }

    wanted = {
        **asdict(pair),
        "content": hash_of_file(Path(pair.file)) if pair.file else None,
        "limits": asdict(LIMITS),
        "weights": fingerprint_of(folder),
        "dtype": ctx.preset.model.dtype,
        "kind": kind,
        "lr": lr,
    }
    return ctx.stage(f"meta-trained/{pair.name}/{pair.model}/{kind}-{lr:g}", wanted, work)


def folder_of(name: str) -> Path:
    """Of ``"bundled"``, ``"bundled-meta-trained"``, a path or a name on the hub.

    Raises:
        UserError: if there is none.
    """
    bundled = {"bundled": bundled_folder, "bundled-meta-trained": meta_trained_folder}
    return bundled[name]() if name in bundled else find_model(name).folder


def _examples(ctx: IclContext, pair: Pair, folder: Path) -> list[Example]:
    """The first of the triples to test on, or of the file's in the order of a seed."""
    if pair.file is None:
        records = make_data(pair.source, 1, pair.count, ctx.seed).test.to_list()
    else:
        records = read_triples(Path(pair.file)).to_list()
        random.Random(ctx.seed).shuffle(records)
    made_of = tokenise_triples(records[: pair.count], load_tokenizer(folder), LIMITS)
    if len(made_of.examples) < pair.count:
        raise UserError(
            f"examples: expected at most {len(made_of.examples)}, all that can be read, got "
            f"{pair.count}"
        )
    return made_of.examples


def _after_step(
    ctx: IclContext, model: nn.Module, examples: list[Example], kind: str, lr: float
) -> Iterator[Observed]:
    """The question alone, at the weights that one step on the passage leads to."""
    for index, example in enumerate(examples):
        before = [p.detach().clone() for p in model.parameters()] if kind == RANDOM else []
        with _stepped(model, example, lr):
            if kind == RANDOM:
                randomise(list(model.parameters()), before, SEEDS * ctx.seed + index)
            yield _observe(model, example, example.query, ctx.device)


@contextmanager
def _stepped(model: nn.Module, example: Example, lr: float) -> Iterator[None]:
    """A step of rate 0 is none; the engine asks for a rate above 0."""
    if lr == 0:
        yield
        return
    with adapted_one_after_another(model, [example], InnerStep(lr)):
        yield


def _observe(model: nn.Module, example: Example, row: array[int], device: torch.device) -> Observed:
    """A row with the answer's first token: at that token, and at the one before.

    Scores are those on the tokens that query and prompt end with alike, and on the answer's.
    """
    ids = torch.tensor([[*row, example.response[0]]], device=device)
    last = ids.shape[1] - 1
    recorded = check_finite(record(model, ids, torch.tensor([[last, last - 1]], device=device)))
    ends = zip(reversed(example.query), reversed(example.prompt), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    scores = recorded.scores[..., last - shared :].clone()
    scores[:, 1, ..., -1] = 0  # the query's last token does not see the answer
    predicted = recorded.logits[:, 1].argmax(-1)
    return Observed(recorded.attention.cpu(), scores.cpu(), predicted.cpu())


def _stacked(observed: Iterator[Observed]) -> Observed:
    """Rows [1, …] together, those of fewer columns padded with zeros."""
    each = list(observed)
    width = max(one.scores.shape[-1] for one in each)
    scores = [F.pad(one.scores, (0, width - one.scores.shape[-1])) for one in each]
    return Observed(
        torch.cat([one.attention for one in each]),
        torch.cat(scores),
        torch.cat([one.predicted for one in each]),
    )
