"""A model at θ and at every group's θ' at once: its layers replaced by sites while attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture import backbone_and_head, causal_lm
from ..ops.rows import GroupedRows

# Importing a rule's module registers it.
from . import embedding, linear, norm  # noqa: F401
from .lora import LowRankSite
from .site import Site, StepState, find_rule
from .substitutes import ATTENTION, substitute_for
from .vocabulary import VocabularySite


class AdaptedModel:
    """The sites of a model and the inner steps taken on them.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        inner: the parameters the inner step moves, by name.
        state: what the sites share.

    Raises:
        ValueError: naming the first parameter whose layer has no rule.
    """

    def __init__(self, model: nn.Module, inner: dict[str, nn.Parameter], state: StepState) -> None:
        self.model, self.state = model, state
        self.backbone, head = backbone_and_head(model)
        tokens: Any = causal_lm(model).get_input_embeddings()
        tied = tokens.weight is head.weight
        moved = {id(parameter) for parameter in inner.values()}
        self.vocabulary = VocabularySite(
            head, tokens if tied else None, id(head.weight) in moved, state
        )
        self.head = head
        self.sites: dict[nn.Module, Site] = {}
        for name, module in model.named_modules():
            if module is head or not any(True for _ in module.parameters(recurse=False)):
                continue
            tied_here = tied and module is tokens
            self.sites[module] = self.vocabulary if tied_here else _site(name, module, moved, state)

    @property
    def _all_sites(self) -> list[Site]:
        return list(dict.fromkeys([*self.sites.values(), self.vocabulary]))

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Inside, the model's modules run as sites, with ops that are twice differentiable."""
        forwards: dict[nn.Module, Callable[..., Any]]
        forwards = {module: site.forward for module, site in self.sites.items()}
        for module in self.model.modules():
            if module not in forwards and (forward := substitute_for(module)) is not None:
                forwards[module] = forward
        config = causal_lm(self.model).config
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            with _replaced(forwards):
                yield
        finally:
            config._attn_implementation = before

    @contextmanager
    def inference(self, rows: GroupedRows) -> Iterator[None]:
        """Inside, row b of any input runs at the last θ' of its group; no gradients."""
        self.state.rows = rows
        forwards: dict[nn.Module, Callable[..., Any]]
        forwards = {module: _checked(site.forward, rows) for module, site in self.sites.items()}
        forwards[self.head] = _checked(self.vocabulary.logits, rows)
        with _replaced(forwards):
            yield

    def hidden_states(self, ids_BT: Tensor, rows: GroupedRows, level: int) -> Tensor:
        """Final hidden states [B, T, D] at θ after ``level`` inner steps."""
        self.state.rows, self.state.level = rows, level
        return self.backbone(input_ids=ids_BT, use_cache=False).last_hidden_state

    def inner_step(self, loss: Tensor, retain_graph: bool) -> None:
        """θ ← θ − η ∇θ loss, for all groups at once; differentiable if the state is of second
        order.
        """
        moved = [tensor for site in self._all_sites for tensor in site.moved]
        with self.state.phase.inner():
            grads = torch.autograd.grad(
                loss,
                moved,
                create_graph=self.state.phase.second_order,
                retain_graph=retain_graph or self.state.phase.second_order,
                allow_unused=True,
            )
        self._check_used(moved, grads)
        after = iter([w - self.state.inner_lr * g for w, g in zip(moved, grads, strict=True)])
        for site in self._all_sites:
            site.moved = [next(after) for _ in site.moved]

    def detach(self, level: int) -> None:
        """Keeps the values of θ' after ``level`` steps and drops their graph, for inference."""
        self.state.level = level
        for site in self._all_sites:
            site.moved = [tensor.detach() for tensor in site.moved]

    def _check_used(self, moved: list[Tensor], grads: tuple[Tensor | None, ...]) -> None:
        unused = {id(tensor) for tensor, grad in zip(moved, grads, strict=True) if grad is None}
        for name, module in self.model.named_modules():
            site = self.sites.get(module)
            if site is not None and any(id(tensor) in unused for tensor in site.moved):
                raise ValueError(
                    "inner_params: expected parameters that the inner loss depends on, "
                    f"got those of {name}, on which it does not"
                )


def _site(name: str, module: nn.Module, moved: set[int], state: StepState) -> Site:
    inner = {key: id(p) in moved for key, p in module.named_parameters(recurse=False)}
    if any(inner.values()) and name.rpartition(".")[0].endswith((".lora_A", ".lora_B")):
        return LowRankSite(module, inner, state)
    rule = find_rule(module)
    if rule is None:
        raise ValueError(
            f"model: no rule for parameter {name}.{next(iter(inner))} of a {type(module).__name__}"
        )
    return rule(module, inner, state)


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Runs modules with other forwards, and puts back exactly what was there."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def _checked(forward: Callable[..., Tensor], rows: GroupedRows) -> Callable[..., Tensor]:
    """A forward without gradients that refuses another number of rows than has been announced."""

    def checked(x: Tensor) -> Tensor:
        if len(x) != len(rows) and not (len(x) == 1 and x.dtype == torch.long):
            raise ValueError(
                f"groups: expected one group for each of the {len(x)} rows, got {len(rows)}"
            )
        with torch.no_grad():
            return forward(x)

    return checked
