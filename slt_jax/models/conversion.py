"""Weights that torch wrote, as safetensors files."""

import contextlib
import importlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

_SUFFIXES = (".bin", ".pt", ".pth")
RECIPE = (
    "Convert them where torch is installed: import torch, safetensors.torch; "
    "safetensors.torch.save_file({{k: v.clone() for k, v in torch.load('{file}', weights_only=True).items()}}, "
    "'model.safetensors')"
)


@contextlib.contextmanager
def safetensors_of(folder: Path) -> Iterator[Path]:
    """The folder if it has safetensors files, else a temporary one with its torch files converted.

    Raises:
        FileNotFoundError: no weights, or torch is not installed; the message has the recipe.
        ValueError: a file that torch does not read as weights alone.
    """
    others = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and _is_weights(file.name))
    if any(folder.glob("*.safetensors")) or not others:
        yield folder
        return
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        names = ", ".join(file.name for file in others)
        recipe = RECIPE.format(file=others[0].name)
        raise FileNotFoundError(f"{folder} has no .safetensors file, but {names}. {recipe}") from error
    with tempfile.TemporaryDirectory(prefix="slt-jax-") as temporary:
        for index, file in enumerate(others):
            _convert(torch, file, Path(temporary) / f"model-{index}.safetensors")
        yield Path(temporary)


def _is_weights(name: str) -> bool:
    return not any(word in name for word in ("optimizer", "scheduler", "rng_state", "training_args", "scaler"))


def _convert(torch: Any, file: Path, target: Path) -> None:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types: a foreign, truncated or unsafe file
        raise ValueError(f"{file} is not a file of weights that torch can load: {str(error)[:200]}") from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{file} holds no weights by name. Save model.state_dict().")
    save_file({name: _array(torch, value) for name, value in loaded.items()}, target)


def _array(torch: Any, tensor: Any) -> Any:
    tensor = tensor.detach().contiguous()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
