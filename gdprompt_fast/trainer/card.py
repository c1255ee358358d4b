"""What a model card says of meta-training."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from .arguments import MetaTrainingArguments

TAG = "gdprompt_fast"
# What one has to know to take the inner step as it was taken in training, and what it was for.
OPTIONS = (
    *("inner_lr", "inner_steps", "inner_params", "objective", "outer_reduction", "lm_weight"),
    "first_order",
)
TEXT = """
## Meta-training

Meta-trained with gdprompt_fast so that one gradient step on a text does what putting that text in
the prompt does ([arXiv 2506.20989](https://arxiv.org/abs/2506.20989)).

| option | value |
|---|---|
{options}

The inner step is taken as it was in training, and the model then answers without the text:

```python
import torch
from gdprompt_fast import inner_step

update = inner_step(
    model,
    context_ids,
    context_mask,
    inner_lr={args.inner_lr!r},
    inner_steps={args.inner_steps!r},
    inner_params={args.inner_params!r},
)
with update.applied_to(model, groups=torch.arange(len(context_ids))):
    answers = model.generate(query_ids)
```
"""


def add_section(args: MetaTrainingArguments) -> None:
    """Adds to the card in ``output_dir`` what the step was, and how the model is used."""
    path = Path(str(args.output_dir), "README.md")
    card = ModelCard.load(path)
    options = "\n".join(f"| `{name}` | {getattr(args, name)} |" for name in OPTIONS)
    card.data.tags = [*(tag for tag in card.data.tags or [] if tag != TAG), TAG]
    card.text = card.text.rstrip() + "\n" + TEXT.format(options=options, args=args)
    card.save(path)
