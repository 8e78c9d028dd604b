"""What tensors a folder's safetensors files hold, read from their headers."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"


class Tensor(NamedTuple):
    """One tensor of a checkpoint. A file is mapped only while ``read`` runs: its pages count as resident memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, *index: slice) -> np.ndarray:
        with safe_open(self.file, "np") as opened:
            return opened.get_slice(self.name)[index]


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, by name.

    Raises:
        FileNotFoundError: no safetensors file, or one that the index names is missing.
        ValueError: a file is truncated or foreign, is not in the index, or holds what another one or the index
            contradicts.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
        raise FileNotFoundError(f"{folder} has no .safetensors file, but {', '.join(others) or 'no weights'}.")
    found: dict[str, Tensor] = {}
    for file in files:
        for tensor in _tensors_of(file):
            if tensor.name in found:
                raise ValueError(f"tensor '{tensor.name}' is in {found[tensor.name].file} and in {file.name}.")
            found[tensor.name] = tensor
    if (folder / _INDEX).is_file():
        _check_index(folder / _INDEX, found)
    return found


def _tensors_of(file: Path) -> list[Tensor]:
    try:
        with safe_open(file, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return [Tensor(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def _check_index(index: Path, found: dict[str, Tensor]) -> None:
    try:
        wanted = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is truncated or foreign: {error!r}.") from error
    for file in sorted(set(wanted.values())):
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not in the folder.")
    for name in sorted(wanted.keys() | found.keys()):
        where = found[name].file.name if name in found else None
        if wanted.get(name) != where:
            raise ValueError(f"tensor '{name}' is in {where or 'no file'}; {index} says {wanted.get(name, 'none')}.")
