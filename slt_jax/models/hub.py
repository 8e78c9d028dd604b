"""Decoder checkpoints on disk: a folder with ``config.json`` and an Orbax tree ``params``."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from slt_jax.models.decoder import Decoder, DecoderConfig


def save_decoder(path: str | os.PathLike, model: Decoder, extra: dict[str, Any] | None = None) -> None:
    """Write the model's configuration, its parameters and ``extra`` (JSON) to a new folder."""
    folder = Path(path).absolute()
    folder.mkdir(parents=True)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "params", nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    # Last, so that a folder with a config is a whole checkpoint.
    (folder / "config.json").write_text(json.dumps({"decoder": model.config.to_dict(), **(extra or {})}, indent=1))


def load_decoder(path: str | os.PathLike) -> tuple[Decoder, dict[str, Any]]:
    """(model, all of config.json). Raises FileNotFoundError, or ValueError naming what is foreign or truncated."""
    folder = Path(path).absolute()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a whole decoder checkpoint of slt-jax.")
    try:
        record = json.loads((folder / "config.json").read_text())
        config = DecoderConfig(**record["decoder"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is truncated or foreign: {error!r}.") from error
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), nnx.to_pure_dict(state))
    try:
        with ocp.StandardCheckpointer() as reader:
            params = reader.restore(folder / "params", target)
    except Exception as error:
        raise ValueError(
            f"{folder / 'params'} is truncated or does not match its config.json ({type(error).__name__}: "
            f"{str(error)[:300]})."
        ) from error
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state), record
