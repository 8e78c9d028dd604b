"""The tensors in a folder's safetensors files, from their headers."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"


class Tensor(NamedTuple):
    """One tensor of a checkpoint.

    The file is mapped into memory only while ``read`` runs, since the pages of a mapped file count as resident memory.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, *index: slice) -> np.ndarray:
        """The part of the tensor at these slices, one for each dimension."""
        with safe_open(self.file, "np") as opened:
            return opened.get_slice(self.name)[index]


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, by name.

    Raises:
        FileNotFoundError: no safetensors file, or one that the index names is missing.
        ValueError: a file is truncated or foreign; a tensor is in two files; or the index and the files differ.
    """
    files = sorted(folder.glob("*.safetensors"))
    # The same weights under other names, as Mistral's repositories have them.
    files = [file for file in files if not file.name.startswith("consolidated")] or files
    if not files:
        others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
        raise FileNotFoundError(f"{folder} has no .safetensors file, but {', '.join(others) or 'no weights'}.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for tensor in _tensors_of(file):
            if tensor.name in tensors:
                raise ValueError(f"tensor '{tensor.name}' is in {tensors[tensor.name].file} and in {file.name}.")
            tensors[tensor.name] = tensor
    if (folder / _INDEX).is_file():
        _check_index(folder / _INDEX, tensors)
    return tensors


def _tensors_of(file: Path) -> list[Tensor]:
    try:
        with safe_open(file, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return [Tensor(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def _check_index(index: Path, tensors: dict[str, Tensor]) -> None:
    try:
        file_names = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is truncated or foreign: {error!r}.") from error
    if other := next((name for name, file in file_names.items() if not isinstance(file, str)), None):
        raise ValueError(f"{index} is truncated or foreign: '{other}' is in {file_names[other]!r}, not in a file.")
    for file in sorted(set(file_names.values())):
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not in the folder.")
    for name in sorted(file_names.keys() | tensors.keys()):
        actual, indexed = tensors[name].file.name if name in tensors else None, file_names.get(name)
        if indexed != actual:
            raise ValueError(f"tensor '{name}' is in {actual or 'no file'}; {index} says {indexed or 'none'}.")
