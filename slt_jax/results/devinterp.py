"""Losses at the draws in the zarr layout of devinterp 2: one group of arrays with named dimensions.

Of every data set NAME there are ``loss_NAME`` (chain, draw, batch_NAME, token_pos), nats per token, and
``input_ids_NAME`` (batch_NAME, token); the settings of the sampler are in the attribute ``metadata``.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slt_jax._io import user_path

_CHUNK = 1 << 22  # numbers of a chunk on disk
UNKNOWN_TOKEN = -1


class Stored(NamedTuple):
    """One data set of such a file. ``losses``: (chain, draw, example, token), on disk. ``gap``: nats per token."""

    name: str
    losses: Any
    gap: np.ndarray
    nbeta: float
    localization: float


def write_losses(
    path: str | os.PathLike, name: str, pieces: Any, shape: tuple[int, ...], gap: np.ndarray, at_center: float,
    input_ids: Any, *, nbeta: float, localization: float,
) -> Path:  # fmt: skip
    """Write one data set; NaN marks tokens that do not count.

    Args:
        pieces: of (chain, draws, losses (draw, example, token)). shape: (chain, draw, example, token).
        gap: the loss of the run less that at w*, (chain, draw). at_center: mean loss at w*.
        input_ids: (example, token + 1), or None.

    Raises:
        FileExistsError: the path exists. ValueError: token ids of another shape.
    """
    import zarr

    target = user_path(path)
    if target.exists():
        raise FileExistsError(f"{target} exists. Give another path, or remove it.")
    ids = np.full((shape[2], shape[3] + 1), UNKNOWN_TOKEN) if input_ids is None else np.asarray(input_ids)
    if ids.shape != (shape[2], shape[3] + 1):
        raise ValueError(
            f"input_ids must have the shape {(shape[2], shape[3] + 1)}, one token more than there are losses, got "
            f"{ids.shape}."
        )
    group, batch = zarr.open_group(target, mode="w-"), f"batch_{name}"
    draws = max(1, min(shape[1], _CHUNK // (shape[2] * shape[3])))
    losses = group.create_array(
        f"loss_{name}", shape=shape, chunks=(1, draws, *shape[2:]), dtype="float32", fill_value=np.nan,
        dimension_names=("chain", "draw", batch, "token_pos"),
    )  # fmt: skip
    for chain, part, values in pieces:
        losses[chain, part] = values
    group.create_array(f"input_ids_{name}", data=ids.astype(np.int64), dimension_names=(batch, "token"))
    run = np.repeat((gap + at_center)[:, :, None, None].astype(np.float32), shape[3], axis=3)  # of all tokens the same
    for stored, dims in (("sampling_loss", ("draw", "batch")), ("sampling_loss_micro", ("step", "batch_sampling"))):
        group.create_array(stored, data=run, dimension_names=("chain", *dims, "token_pos"))
    init = np.full((shape[0], shape[3]), at_center, np.float32)
    group.create_array("init_loss", data=init, dimension_names=("chain", "token_pos"))
    sampler = {"n_beta": nbeta, "localization": localization, "num_chains": shape[0], "num_draws": shape[1]}
    group.attrs["metadata"] = {"config": {"sampler": sampler}}
    return target


def read_losses(path: str | os.PathLike) -> list[Stored]:
    """All data sets of a file that devinterp or ``write_losses`` wrote. Their losses stay on disk.

    Raises:
        FileNotFoundError: nothing is there. ValueError: it has no losses, or not the settings of a sampler.
    """
    import zarr

    source = user_path(path)
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}.")
    try:
        group = zarr.open_group(source, mode="r")
    except Exception as error:
        raise ValueError(f"{source} is no zarr group ({type(error).__name__}: {error}).") from error
    arrays = dict(group.arrays())
    names = [name.removeprefix("loss_") for name in arrays if name.startswith("loss_") and arrays[name].ndim == 4]
    sampler = _sampler_of(group)
    if not names or "n_beta" not in sampler:
        raise ValueError(
            f"{source} is not what devinterp's sample() writes: it has {len(names)} data sets and "
            f"{'no' if 'n_beta' not in sampler else 'a'} n_beta. Give the path that was its output_path."
        )
    gap = np.zeros(arrays[f"loss_{names[0]}"].shape[:2])
    if "sampling_loss" in arrays and "init_loss" in arrays:
        at_center = np.asarray(arrays["init_loss"][:], np.float64).mean()
        gap = np.asarray(arrays["sampling_loss"][:], np.float64).mean((2, 3)) - at_center
    nbeta, localization = float(sampler["n_beta"]), float(sampler.get("localization") or 0.0)
    return [Stored(name, arrays[f"loss_{name}"], gap, nbeta, localization) for name in sorted(names)]


def _sampler_of(group: Any) -> dict[str, Any]:
    found: Any = dict(group.attrs).get("metadata", {})
    for name in ("config", "sampler"):
        found = found.get(name, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) else {}
