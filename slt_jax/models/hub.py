"""Decoder checkpoints: ``config.json`` with safetensors (Hugging Face) or with an Orbax tree (slt-jax's own)."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from slt_jax._io import user_path
from slt_jax.machine import check_room
from slt_jax.models.config import DecoderConfig
from slt_jax.models.conversion import safetensors_of
from slt_jax.models.decoder import Decoder
from slt_jax.models.layouts import Layout, read_config
from slt_jax.models.tensors import Tensor, list_tensors
from slt_jax.models.weights import make_plan
from slt_jax.posterior.split import automatic, split_spec

FORMAT = 2
_WANTED = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
_OTHERS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]  # only of repositories without safetensors
_REPOSITORY = r"\w[\w.-]*(/\w[\w.-]*)?"


def load_checkpoint(
    path: str | os.PathLike, *, mesh: Mesh | None = None, revision: str | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """(model, content of config.json) of a folder of either kind, or of a repository on the Hugging Face Hub.

    ``mesh`` and ``revision`` as in ``load_pretrained``.

    Raises:
        FileNotFoundError, ValueError: as ``load_pretrained`` and ``load_decoder``.
    """
    folder = user_path(path).absolute()
    if folder.is_dir() and "model_type" not in _read_record(folder):
        return load_decoder(folder, mesh=mesh)
    return load_pretrained(path, mesh=mesh, revision=revision)


def load_pretrained(
    path: str | os.PathLike, *, mesh: Mesh | None = None, revision: str | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """A checkpoint of one of the architectures in ``slt_jax.models.layouts``, as (model, content of config.json).

    The weights become float32, whatever the type in the file. Besides them, loading needs the memory of one layer's
    tensor, or 32 MiB.

    Args:
        path: a folder with ``config.json`` and one or more ``.safetensors`` files; or the name of a repository, such as
            ``EleutherAI/pythia-160m`` or ``EleutherAI/pythia-160m@step3000``, which ``huggingface_hub`` downloads into
            its cache. Files of torch (``pytorch_model.bin``, ``.pt``) are converted if torch is installed.
        mesh: split each large array over the mesh's axis ``model``, as the chains will be; each device reads its own
            part. Default: everything on the first device of this process.
        revision: of the repository, such as Pythia's ``step3000``.

    Raises:
        FileNotFoundError: no such folder or repository, or a file is missing from it.
        ValueError: an architecture, a field of config.json, a tensor, a shape or a file that is not supported; the
            message names it. No tensor of the file is ignored, and no parameter is initialized at random.
        MemoryError: the weights do not fit into memory. Raised before they are read.
    """
    folder = folder_of(path, revision)
    record = _read_record(folder)
    layout, config = read_config(record, str(folder / "config.json"))
    with safetensors_of(folder) as files:
        return _load(config, layout, folder, list_tensors(files), None if mesh is None else automatic(mesh)), record


def describe_checkpoint(path: str | os.PathLike, *, revision: str | None = None) -> Decoder:
    """The decoder of a checkpoint with shapes in the place of its weights; only ``config.json`` is read.

    Raises:
        FileNotFoundError, ValueError: as ``load_checkpoint``.
    """
    name, revision = name_and_revision(path, revision)
    folder = user_path(name).absolute()
    if not folder.is_dir():
        folder = _downloaded(name, revision, ["config.json"])
    record = _read_record(folder)
    config = _own_config(folder, record) if "model_type" not in record else read_config(record, str(folder))[1]
    return _of_shapes(config)


def _of_shapes(config: DecoderConfig) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def _load(
    config: DecoderConfig, layout: Layout, folder: Path, tensors: dict[str, Tensor], mesh: Mesh | None
) -> Decoder:
    graphdef, state = nnx.split(_of_shapes(config))
    paths = {"/".join(map(str, keys)): keys for keys, _ in nnx.to_flat_state(state)}
    plan = make_plan(config, layout, list(paths), tensors, str(folder))
    size = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(state))
    parts = 1 if mesh is None else mesh.shape.get("model", 1)
    check_room(size / parts, f"{folder} in float32")
    for name, keys in paths.items():
        nnx.replace_by_pure_dict(state, _nested(keys, plan.array(name, mesh)))
    return nnx.merge(graphdef, state)


def _nested(keys: tuple, value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def name_and_revision(path: str | os.PathLike, revision: str | None = None) -> tuple[str, str | None]:
    """``org/name@step1000`` as the name and the revision; a folder as it is.

    Raises:
        ValueError: the name and ``revision`` say two different revisions.
    """
    name, sign, named = os.fspath(path).rpartition("@")
    if user_path(path).exists() or not sign or not re.fullmatch(_REPOSITORY, name):
        return os.fspath(path), revision
    if revision not in (None, named):
        raise ValueError(f"{os.fspath(path)!r} names a revision, and revision = {revision!r} another. Leave one out.")
    return name, named


def folder_of(path: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a checkpoint; of a repository, after its download, or from the cache.

    Raises:
        FileNotFoundError: no such folder or repository. ValueError: two revisions.
    """
    name, revision = name_and_revision(path, revision)
    folder = user_path(name).absolute()
    if folder.is_dir() and revision is None:
        return folder
    if folder.is_dir():
        raise ValueError(f"{folder} is a folder, which has no revision {revision!r}. Leave the revision out.")
    found = _downloaded(name, revision, _WANTED)
    if not any(found.glob("*.safetensors")):
        found = _downloaded(name, revision, [*_WANTED, *_OTHERS])
    return found


def _downloaded(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of a repository, or from the cache. Raises FileNotFoundError."""
    folder = user_path(name).absolute()
    if folder.exists() or not re.fullmatch(_REPOSITORY, name):
        raise FileNotFoundError(f"{folder} has no config.json, and {name!r} is not the name of a repository.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise FileNotFoundError(
            f"{name!r} is no folder here, so it must be a repository on the Hugging Face Hub; its download{at} failed "
            f"with {type(error).__name__}: {str(error).strip()[:300]}"
        ) from error


def _read_record(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises FileNotFoundError or ValueError."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a complete checkpoint.")
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is truncated or foreign: {error!r}.") from error
    if not isinstance(record, dict) or not {"decoder", "model_type"} & set(record):
        raise ValueError(f"{file} is truncated or foreign: it has neither a 'model_type' nor a 'decoder'.")
    return record


def save_decoder(path: str | os.PathLike, model: Decoder, extra: dict[str, Any] | None = None) -> None:
    """Write the model's configuration, its parameters and ``extra`` (JSON) to a new folder.

    Raises:
        FileExistsError: the folder exists.
    """
    folder = user_path(path).absolute()
    folder.mkdir(parents=True)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder / "params", nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    record = {"format": FORMAT, "decoder": model.config.to_dict(), **(extra or {})}
    # Written last, so that a folder with a config.json is a complete checkpoint.
    (folder / "config.json").write_text(json.dumps(record, indent=1))


def load_decoder(path: str | os.PathLike, *, mesh: Mesh | None = None) -> tuple[Decoder, dict[str, Any]]:
    """(model, content of config.json) from a folder that ``save_decoder`` wrote. ``mesh``: as in ``load_pretrained``.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: a file that is foreign, truncated or of an earlier version; the message names it.
    """
    folder = user_path(path).absolute()
    record = _read_record(folder)
    graphdef, state = nnx.split(_of_shapes(_own_config(folder, record)))

    def where(x: Any) -> Sharding:
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(automatic(mesh), split_spec(mesh, x.shape))

    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), nnx.to_pure_dict(state))
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


def _own_config(folder: Path, record: dict[str, Any]) -> DecoderConfig:
    """Of a folder that ``save_decoder`` wrote. Raises ValueError."""
    if "decoder" in record and record.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is in format {record.get('format', 1)} of slt-jax's decoder checkpoints, and this version reads "
            f"format {FORMAT}. Train it again; for the demo, remove its folder."
        )
    try:
        return DecoderConfig.from_dict(record["decoder"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is truncated or foreign: {error!r}.") from error
