"""Makes the bundled meta-trained model of what the demo leaves: the same, in half the bytes.

gdprompt demo --output runs/demo
python -m gdprompt_fast.bundled.meta_trained --demo runs/demo --output DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..artifacts.files import write_folder
from ..artifacts.outputs import Outputs
from ..loading import load_model
from ..training.checkpoint import save_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, required=True, help="output folder of gdprompt demo")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    arguments = parser.parse_args()
    Outputs(inputs={"demo": arguments.demo}, overwrite=False).check_folder(arguments.output)
    trained = arguments.demo / "kl" / "model"
    model, tokenizer = load_model(trained, "float32", torch.device("cpu"))
    write_folder(arguments.output, lambda folder: save_model(model.half(), tokenizer, folder))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
