"""Tiny models and batches that every test of the engine builds on."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from gdprompt_fast import MetaBatch
from gdprompt_fast.data import write_triples
from gdprompt_fast.data.people import make_people_data, people_tokenizer
from gdprompt_fast.ops import backend
from gdprompt_fast.testing import gates
from helpers.models import MODELS, last_tokens, ragged, small_llama

if importlib.util.find_spec("triton") is not None:
    from gdprompt_fast.testing import triton_interpreter

    triton_interpreter.mend()

LOAD_CPP, SAVEFIG = backend.load_cpp, Figure.savefig
logging.getLogger("transformers").setLevel(logging.ERROR)
torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


@pytest.fixture(autouse=True)
def auto_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, also where the C++ ops are built: a test of those asks for the fixture ``cpp``."""
    monkeypatch.setattr(backend, "load_cpp", lambda: False)


@pytest.fixture(autouse=True)
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures have all their content in fewer pixels, with axes that make no room for one another:
    a fifth of a short training's time. A test of a figure asks for the fixture ``full_figures``.
    """

    def savefig(self: Figure, path: Any, **options: Any) -> None:
        self.set_layout_engine("none")
        SAVEFIG(self, path, **{**options, "dpi": 30})

    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def full_figures(small_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)


@pytest.fixture(autouse=True)
def default_dtype_of_xglm(request: pytest.FixtureRequest) -> Iterator[None]:
    """XGLM's own attention makes a tensor of the default dtype of the least number of its own."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if not {"xglm", "xglm-untied"} & {each for each in parameters.values() if type(each) is str}:
        yield
        return
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def cpp(auto_is_pytorch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ ops are there, and ``"auto"`` takes them."""
    if not LOAD_CPP():
        pytest.skip(f"the C++ ops are not built: {backend.BUILD_CPP}")
    monkeypatch.setattr(backend, "load_cpp", LOAD_CPP)


@pytest.fixture(params=["torch", "cpp"])
def on_each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Ops on the CPU run in PyTorch, then in C++."""
    if request.param == "cpp":
        request.getfixturevalue("cpp")
    with backend.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fresh memory is NaN: an element that no pass writes shows."""
    torch.manual_seed(0)
    with gates.poisoned_empty():
        yield


@pytest.fixture
def tiny_model() -> Callable[..., torch.nn.Module]:
    """``tiny_model(name, dtype)``: a seeded model of MODELS in eval mode, norms and biases off
    their defaults.
    """

    def build(name: str = "llama-tied", dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        torch.manual_seed(0)
        model = MODELS[name]().to(dtype).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    return build


@pytest.fixture
def lora_model(tiny_model: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """``lora_model(name, rank)``: a PEFT model with adapters that are not zero."""
    peft = pytest.importorskip("peft", reason="PEFT is an optional dependency")

    def build(name: str = "llama-tied", rank: int = 2, **config: Any) -> torch.nn.Module:
        model = peft.get_peft_model(
            tiny_model(name),
            peft.LoraConfig(r=rank, lora_alpha=4, target_modules="all-linear", **config),
        )
        for parameter_name, parameter in model.named_parameters():
            if ".lora_" in parameter_name:
                parameter.data.normal_(std=0.3)
        return model

    return build


@pytest.fixture
def make_batch() -> Callable[[str], MetaBatch]:
    """``make_batch(kind)``: ragged batches with one or more contexts and queries in a group."""

    def build(kind: str = "one-each", seed: int = 0) -> MetaBatch:
        contexts = {"one-each": [8, 5, 7], "grouped": [8, 6, 8, 3, 8], "uneven": [7, 4]}[kind]
        queries = {"one-each": [6, 6, 4], "grouped": [6, 4, 6, 5], "uneven": [6, 5, 6]}[kind]
        responses = {"one-each": [3, 1, 2], "grouped": [3, 1, 4, 2], "uneven": [1, 2, 3]}[kind]
        groups: dict[str, Any] = {
            "one-each": {},
            # several contexts and queries in a group, out of order
            "grouped": dict(
                context_group=torch.tensor([0, 2, 1, 0, 1]), query_group=torch.tensor([1, 0, 1, 2])
            ),
            # a group without a query
            "uneven": dict(context_group=torch.tensor([1, 0]), query_group=torch.tensor([1, 1, 1])),
        }[kind]
        context_ids, context_mask = ragged(contexts, 8, seed)
        query_ids, query_mask = ragged(queries, 6, seed + 1)
        return MetaBatch(
            context_ids,
            context_mask,
            query_ids,
            query_mask,
            last_tokens(query_mask, responses),
            **groups,
        )

    return build


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny saved Llama with the people tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = people_tokenizer()
    small_llama(
        len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def triples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of nine passages about people."""
    path = tmp_path_factory.mktemp("data") / "triples.jsonl"
    write_triples(make_people_data(1, 9, seed=0).test.to_list(), path)
    return path
