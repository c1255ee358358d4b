"""The teacher's answers and its predictions of them on disk: computed once, before training.

A cache is a folder of ``key.json``, which says what it was made from, of shards and their hashes. A
shard has the answers to some examples and the teacher's final hidden states at their tokens, a few
KB a token; with the teacher's head, which stays in memory, that is all that the KL objective needs.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..artifacts.files import hash_of_file, is_empty, read_json, write_json, write_whole
from ..artifacts.progress import progress_bar
from ..artifacts.stage import differences
from ..data import Example, batched, end_token, moved, with_responses
from ..distributed.group import barrier, of_first, rank, shared_work, world_size
from ..distributed.sharded import is_sharded, whole
from ..errors import UserError
from ..meta.gathered import opened
from ..meta.targets import TeacherTargets, head_of
from ..models.architecture import causal_lm
from .targets import teach

KEY_FILE, HASHES_FILE = "key.json", "sha256.json"
SHARD_EXAMPLES = 1024  # at most; a killed build loses the work on one shard
NOT_OF_THE_FUNCTION = ("_name_or_path", "architectures", "dtype", "transformers_version")

Key = dict[str, str | int]


class TeacherCache:
    """The teacher's greedy answers to examples, and its predictions of them; see :meth:`build`.

    Attributes:
        examples: what the teacher answered, with the responses that they came with.
        answered: the same examples with the teacher's answers as responses.
    """

    def __init__(self, shards: Sequence[Path], examples: Sequence[Example], head: Tensor) -> None:
        self._head = head
        self._shards = [safe_open(path, framework="pt") for path in shards]
        self._place: dict[int, tuple[int, int]] = {}  # shard, and row of its hidden states
        answers: dict[int, list[int]] = {}
        for number, shard in enumerate(self._shards):
            lengths = shard.get_tensor("tokens").tolist()
            start = 0
            parts = shard.get_tensor("answers").split(lengths)
            for index, answer in zip(shard.get_tensor("examples").tolist(), parts, strict=True):
                answers[index], self._place[index] = answer.tolist(), (number, start)
                start += len(answer)
        self.examples = list(examples)
        self.answered = with_responses(examples, [answers[i] for i in range(len(examples))])

    @staticmethod
    def build(
        folder: Path,
        teacher: nn.Module,
        examples: Sequence[Example],
        answer_tokens: int,
        batch_size: int,
    ) -> TeacherCache:
        """The cache in ``folder``, after making what is not there yet.

        Built on a CPU, it has the very same bits however often its build was killed and continued:
        which examples are answered together is fixed. The teacher is not needed afterwards.

        Args:
            teacher: the frozen causal LM that reads context ⊕ query.
            answer_tokens: the longest greedy answer, in tokens.
            batch_size: examples answered at once.

        Raises:
            ValueError: if the folder is the cache of another model, data or settings, or no cache.
        """
        key = cache_key(teacher, examples, answer_tokens, batch_size)
        check_cache(folder, key)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / KEY_FILE).exists():  # processes that read it at once do not write it
            write_json(folder / KEY_FILE, key)
        shards = _fill(folder, teacher, end_token(examples), examples, answer_tokens, batch_size)
        # A copy: the head that was given may be that of a model about to be trained.
        head = head_of(teacher).clone()
        return TeacherCache(shards, examples, head)

    def batch(self, indices: Sequence[int]) -> tuple[list[Example], TeacherTargets]:
        """These examples with the teacher's answers as responses, and its predictions of them."""
        answered = [self.answered[index] for index in indices]
        hidden = [self._hidden(index) for index in indices] or [self._hidden(0)[:0]]
        states = moved(torch.cat(hidden), self._head.device)
        return answered, TeacherTargets(hidden=states, head=self._head)

    def _hidden(self, index: int) -> Tensor:
        shard, start = self._place[index]
        hidden = self._shards[shard].get_slice("hidden")
        return hidden[start : start + len(self.answered[index].response)]


def cache_key(
    teacher: nn.Module,
    examples: Sequence[Example],
    answer_tokens: int,
    batch_size: int,
) -> Key:
    """All that the bits of a cache follow from, in parts with names."""
    return {
        "weights": _hash_of_weights(teacher),
        "config": _hash_of_config(teacher),
        "data": _hash_of_prompts(examples),
        "answer_tokens": answer_tokens,
        "eos_token": end_token(examples),
        "dtype": str(next(teacher.parameters()).dtype).removeprefix("torch."),
        "batch_size": batch_size,  # rows of other batches are padded and rounded in other ways
        "shard_examples": SHARD_EXAMPLES,
    }


def check_cache(folder: Path, key: Key) -> None:
    """``folder`` is new, empty or a cache with this key.

    Raises:
        ValueError: if it is not, naming the parts that differ or the shard that was changed.
    """
    path = folder / KEY_FILE
    if path.exists():
        old: Key = read_json(path)
        parts = differences(old, key)
        if parts:
            there, here = ({name: of.get(name) for name in parts} for of in (old, key))
            raise UserError(
                f"teacher_cache: {folder} was made with another {' and '.join(parts)}: "
                f"expected {there}, got {here}"
            )
        for name, written in _hashes(folder).items():
            if (folder / name).is_file() and hash_of_file(folder / name) != written:
                raise UserError(
                    f"{folder / name}: expected the file as it was written, got another; without "
                    "it, it is made again"
                )
    elif not is_empty(folder):
        raise UserError(f"teacher_cache: expected a cache or a new or empty folder, got {folder}")


def _fill(
    folder: Path,
    teacher: nn.Module,
    eos: int,
    examples: Sequence[Example],
    answer_tokens: int,
    batch_size: int,
) -> list[Path]:
    """All shards, after writing those that are not there."""
    # Longest first: little padding, and a batch too large for the memory fails at once.
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].prompt), index))
    shards = list(batched(batched(order, batch_size), max(1, SHARD_EXAMPLES // batch_size)))
    paths = [folder / f"shard-{number:05d}.safetensors" for number in range(len(shards))]
    hashes = _hashes(folder)
    made = {path.name for path in paths if path.name in hashes and path.is_file()}
    left = of_first([number for number, path in enumerate(paths) if path.name not in made])
    to_do = sum(len(indices) for number in left for indices in shards[number])
    with progress_bar(len(examples), "teacher", "ex", done=len(examples) - to_do) as bar:

        def answers_to(indices: Sequence[int]) -> tuple[list[array[int]], Tensor]:
            batch = [examples[index] for index in indices]
            answered, targets = teach(teacher, batch, eos, answer_tokens)
            assert targets.hidden is not None
            bar.update(len(indices) * world_size())
            return [example.response for example in answered], targets.hidden.cpu()

        for number in left:
            shard = shards[number]
            parts = shared_work(shard, answers_to, together=is_sharded(teacher))
            answers = [answer for of_batch, _ in parts for answer in of_batch]
            hidden = [states for _, states in parts]
            tensors = {
                "examples": torch.tensor([index for indices in shard for index in indices]),
                "tokens": torch.tensor([len(answer) for answer in answers]),
                "answers": torch.tensor([token for answer in answers for token in answer]),
                "hidden": torch.cat(hidden),
            }
            write_whole(paths[number], partial(save_file, tensors))
            if rank() == 0:
                hashes[paths[number].name] = hash_of_file(paths[number])
                write_json(folder / HASHES_FILE, hashes)
    barrier()
    return paths


def _hashes(folder: Path) -> dict[str, str]:
    """By name, the hashes of the shards that were written as a whole."""
    path = folder / HASHES_FILE
    return read_json(path) if path.exists() else {}


def _hash_of_weights(model: nn.Module) -> str:
    def digest(named: tuple[str, Tensor]) -> bytes:
        name, weight = named
        values = weight.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        shape = f"{name} {weight.dtype} {list(weight.shape)}"
        return shape.encode() + hashlib.sha256(values).digest()

    named = ((name, whole(weight)) for name, weight in model.named_parameters())
    if is_sharded(model):  # gathered by all processes in one order, and one at a time
        digests = [digest(each) for each in named]
    else:
        with ThreadPoolExecutor() as pool:  # hashing does not hold Python's lock
            digests = list(pool.map(digest, named))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _hash_of_config(model: nn.Module) -> str:
    with opened(model):
        config = causal_lm(model).config.to_dict()
    function = {name: config[name] for name in config if name not in NOT_OF_THE_FUNCTION}
    # The scale of adapters is in no config of the base model.
    scales = {n: str(m.scaling) for n, m in model.named_modules() if hasattr(m, "scaling")}
    return hashlib.sha256(json.dumps([function, scales], sort_keys=True).encode()).hexdigest()


def _hash_of_prompts(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.prompt).to_bytes(8, "little") + example.prompt.tobytes())
    return digest.hexdigest()
