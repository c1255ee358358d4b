"""What inner products of texts' gradients cost on a model, dense and from factors.

    python -m benchmarks.studies.alignment_cost --model DIR

A definition and its questions are random tokens: nothing depends on what they are.
"""

from __future__ import annotations

import argparse

import torch

from gdprompt_fast.internalisation.alignment import costs
from gdprompt_fast.loading import choose_device, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--definitions", type=int, default=2)
    args = parser.parse_args()
    device = choose_device(args.device)
    model, _ = load_model(args.model, "float32", device)
    torch.manual_seed(0)
    shape = (args.definitions, 1 + args.questions, args.tokens)
    ids = torch.randint(10, 1000, shape, device=device)
    found = costs(model, [(each, torch.ones_like(each, dtype=torch.bool)) for each in ids])
    print(f"{found['parameters']:,} parameters, differ by {found['difference']:.1e}")
    for way in found["seconds"]:
        print(f"{way}: {found['seconds'][way]:.2f} s, {found['bytes'][way] / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
