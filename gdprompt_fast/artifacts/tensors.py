"""safetensors written and read a tensor at a time: no process holds them all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..distributed.sharded import whole
from ..errors import UserError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to a file that :func:`safetensors.torch.load_file` reads.

    All processes give sharded ones, and ask for them together, one at a time.

    Args:
        path: None in a process that does not write.
    """
    if path is None:
        for tensor in tensors.values():
            whole(tensor)
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), _NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            own = whole(tensor).cpu().contiguous().flatten()
            file.write(own.view(torch.uint8).numpy().data)


class SavedTensors:
    """The tensors of the safetensors files in a folder, or of one file, by name.

    Raises:
        UserError: for one that is not there.
    """

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        self._path = path
        self._files = [safe_open(file, framework="pt") for file in files]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """All of it."""
        tensor: Tensor = self._of(name).get_tensor(name)
        return tensor

    def rows(self, name: str) -> Any:
        """What gives some of its rows when it is indexed with a slice."""
        return self._of(name).get_slice(name)

    def _of(self, name: str) -> Any:
        if name not in self._file_of:
            raise UserError(f"{self._path}: expected {name}, got no such tensor")
        return self._file_of[name]
