"""A sharded model, and the state of its optimizer, in files as one process writes them: a tensor
at a time is whole, but for those of adapters, which are small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..artifacts.tensors import SavedTensors, write_tensors
from ..distributed.local_shards import put_rows
from ..distributed.sharded import whole

WEIGHTS_FILE = "model.safetensors"


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def make_base_absolute(model: Any) -> None:
    """Adapters find their base from any folder."""
    for config in model.peft_config.values():
        base = config.base_model_name_or_path
        if base and Path(base).exists():
            config.base_model_name_or_path = str(Path(base).absolute())


def save_sharded(model: Any, folder: Path | None) -> None:
    """The model, of a PEFT model its adapters, as ``save_pretrained`` has it of one process.

    Args:
        folder: None in a process that does not write.
    """
    if is_peft(model):
        own = {name: each for name, each in model.state_dict().items() if ".lora_" in name}
        adapters = {name: whole(each) for name, each in own.items()}
        if folder is not None:
            make_base_absolute(model)
            model.save_pretrained(folder, state_dict=adapters, save_embedding_layers=False)
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__bases__[1].__name__]  # without FSDP2's
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    write_tensors(folder and folder / WEIGHTS_FILE, _tensors_of(model))


def load_sharded(model: nn.Module, folder: Path) -> None:
    """Puts back what a model without adapters had, of which each process reads its rows.

    Raises:
        UserError: for a weight that is not there.
    """
    saved = SavedTensors(folder)
    for name, tensor in _tensors_of(model).items():
        put_rows(saved.rows(name), tensor)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """By name, a tied weight once."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def taken_out(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, which is left without them, by names of a file."""
    states, state["state"] = state["state"], {}
    return {f"{number}.{name}": t for number, of in states.items() for name, t in of.items()}


def put_back(saved: SavedTensors, by_rows: bool) -> dict[int, dict[str, Any]]:
    """The state that :func:`taken_out` took the tensors of; by rows, what gives rows of them."""
    states: dict[int, dict[str, Any]] = {}
    for key in saved.names:
        number, name = key.split(".")
        read = saved.rows if by_rows and name != "step" else saved.tensor
        states.setdefault(int(number), {})[name] = read(key)
    return dict(sorted(states.items()))
