"""The card of an adapter: what it is, how it is loaded, what of θ' it has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..artifacts.markdown import markdown_table
from .adapter import Adapter
from .record import Learnt

_LOADED = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "this folder")
```"""
_WHOLE = (
    "Copied as they are after the step, not as a product of low rank (`modules_to_save`), and so "
    "not for servers that take plain LoRA alone: {names}."
)


def discarded_of(adapter: Adapter) -> dict[str, float]:
    """The share of ‖ΔW‖² that every layer's product has not, by layer."""
    return {name: product.discarded for name, (_, product) in adapter.low_rank.items()}


def summary(ranks: Mapping[str, int], discarded: Mapping[str, float]) -> str:
    """One line on what became of the change of the weights."""
    of_rank = f"rank {max(ranks.values())}, {len(ranks)} layers"
    worst = max(discarded, key=discarded.__getitem__)
    if not discarded[worst]:
        return f"{of_rank}; exact: nothing of the change is discarded"
    mean = sum(discarded.values()) / len(discarded)
    return (
        f"{of_rank}; discarded energy ‖ΔW − B A‖² / ‖ΔW‖²: {mean:.2%} on average, at most "
        f"{discarded[worst]:.2%} ({worst})"
    )


def table(ranks: Mapping[str, int], discarded: Mapping[str, float]) -> str:
    """Every layer's rank and discarded energy."""
    rows = [[name, str(ranks[name]), f"{share:.4%}"] for name, share in discarded.items()]
    return markdown_table([["layer", "rank", "discarded energy"], *rows])


def card(adapter: Adapter, learnt: Learnt, config: Mapping[str, Any]) -> str:
    """The README.md of an adapter's folder, as the Hugging Face hub reads it."""
    base = config["base_model_name_or_path"]
    ranks = {name: product.rank for name, (_, product) in adapter.low_rank.items()}
    discarded = discarded_of(adapter)
    kinds = sorted({name.rpartition(".")[2] for name in adapter.whole})
    named = [] if base is None else [f"base_model: {base}"]
    head = ["---", *named, "library_name: peft", "tags:", "- lora", "- gdprompt_fast", "---"]
    steps = f"{learnt.inner_steps} gradient step{'s' * (learnt.inner_steps > 1)}"
    rate = "" if learnt.inner_lr is None else f" with η = {learnt.inner_lr:g}"
    parts = [
        "\n".join(head),
        "# A text as an adapter",
        f"What {steps}{rate} on a text left in the weights ({learnt.inner_params}), by "
        "gdprompt_fast: the model answers as if it had the text in its prompt, as far as it was "
        "meta-trained to.",
        _LOADED.format(base=base or "the base model"),
        summary(ranks, discarded).capitalize() + ".",
        *([_WHOLE.format(names=", ".join(f"`{kind}`" for kind in kinds))] if kinds else []),
        table(ranks, discarded),
    ]
    return "\n\n".join(parts) + "\n"
