"""Inner products of gradients from factors, against dense ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdprompt_fast.internalisation.gradients import alignment
from gdprompt_fast.models.memory import peak_bytes_over_model
from gdprompt_fast.reference.compare import without_upcasts
from helpers.models import MODELS, VOCABULARY, llama


def texts(lengths: list[int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)))
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def dense(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Every text's whole gradient, [G, parameters]."""
    parameters, rows = list(model.parameters()), []
    for row, real in zip(ids, mask, strict=True):
        size = int(real.sum())
        logits = model(input_ids=row[None, :size]).logits[0, :-1]
        loss = F.cross_entropy(logits, row[1:size])
        gradients = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([each.flatten() for each in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
def test_all_that_is_between_gradients_is_that_of_dense_ones(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    ids, mask = texts([9, 5, 7])
    with without_upcasts(model):
        g = dense(model, ids, mask)
    found, gram = alignment(model, ids, mask), g @ g.T
    scale = gram.abs().max()
    assert (found.gram - gram).abs().max() <= 1e-9 * scale
    assert (found.squared_norms - gram.diagonal()).abs().max() <= 1e-9 * scale
    distances = (g[:, None] - g).norm(dim=-1)
    off = ~torch.eye(3, dtype=torch.bool)
    assert (found.distances - distances)[off].abs().max() <= 1e-9 * distances.max()
    cosines = F.cosine_similarity(g[:, None], g, dim=-1)
    assert (found.cosines - cosines).abs().max() <= 1e-9
    variance = float((g - g.mean(0)).square().sum(1).mean())
    assert found.variance == pytest.approx(variance, rel=1e-9)


def test_the_model_is_left_as_it_was_and_fp32_is_close() -> None:
    torch.manual_seed(0)
    model = MODELS["gpt-neox"]().eval()
    ids, mask = texts([6, 6])
    before = [each.clone() for each in model.parameters()]
    found = alignment(model, ids, mask)
    assert found.gram.dtype == torch.float32
    g = dense(model, ids, mask)
    assert (found.gram - g @ g.T).abs().max() <= 1e-4 * (g @ g.T).max()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(each.grad is None for each in model.parameters())


def test_no_gradient_is_formed() -> None:
    """A model whose parameters are far more than the activations of a few short texts."""
    model = llama(VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    ids, mask = texts([4, 4, 4])
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    with_factors = peak_bytes_over_model(model, lambda: alignment(model, ids, mask))
    with_gradients = peak_bytes_over_model(model, lambda: dense(model, ids[:1], mask[:1]))
    assert with_gradients > size and with_factors < size / 4
