"""A run on disk: what it depends on, and where it got to. Orbax writes the state; a manifest guards it."""

import errno
import json
import logging
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slt_jax._checks import shown
from slt_jax._io import digest_of_arrays, digest_of_json, remove_all_partials, user_path, write_file
from slt_jax.engine.mesh import allgather, is_main_process, spans_processes
from slt_jax.posterior.tree import to_host

MANIFEST = "manifest.json"
FORMAT = 4
DIGEST = "sha256"  # in the manifest, in notes, and of a save
_NOTE_FORMAT = "note_format"
_BEGUN = ".orbax-checkpoint-tmp"  # in the name of a save that is not finished
_SEEDS = (0x243F6A88, 0x85A308D3)
_UNFINISHED: set[Path] = set()  # directories into which a writer of this process may still be writing
PATIENCE = 20  # seconds until a file that another machine wrote is seen here


def check_directory(directory: Any) -> None:
    """Raise TypeError unless ``directory`` is a path."""
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"checkpoint_dir must be a path, got {shown(directory)}. Give a directory of its own.")


def _reported_otherwise(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax logs of errors which it raises too."""
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


class RunStore:
    """The directory of one run; with a mesh that spans processes, one for all of them, on a disk that they share.

    Args:
        directory: created if missing; may hold an earlier, interrupted run of the same thing.
        identity: nested dict of strings and numbers: everything the result depends on, causes before what they change.
        mesh: whose processes call this together; without one, this process only.

    Raises:
        ValueError: the directory holds something else, or a run that differs; the text names the first field. Or the
            processes do not share it.
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, identity: dict[str, Any], mesh: Mesh | None = None):
        import orbax.checkpoint as ocp  # its import takes a third of a second, only where something is saved

        check_directory(directory)
        self.path, self.mesh = user_path(directory).absolute(), mesh
        if jax.process_count() > 1 and not spans_processes(mesh):
            raise ValueError(
                f"checkpoint_dir {self.path} needs all {jax.process_count()} processes to sample together, and the "
                "mesh has devices of only one. Take a mesh of all, leave checkpoint_dir out, or start this process "
                "without jax.distributed."
            )
        try:
            self._first_does(lambda: self._open({"format": FORMAT, **identity}))
            if spans_processes(mesh):
                self._check_shared()
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True, create=True)
            self._manager = ocp.CheckpointManager(self.path / "steps", options=options)
            logging.getLogger("absl").addFilter(_reported_otherwise)
        except OSError as error:
            raise OSError(
                error.errno,
                f"checkpoint_dir {self.path} cannot be written to as a directory ({type(error).__name__}: {error}). "
                "Give another directory, or leave checkpoint_dir out",
            ) from error

    def _open(self, identity: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        manifest = self.path / MANIFEST
        if manifest.exists():
            saved = _read_json(manifest)
            found = saved.pop(DIGEST, None)
            self._compare(saved, identity, damaged=found not in (None, digest_of_json(saved)))
        else:
            foreign = [p.name for p in self.path.iterdir() if not p.name.lstrip(".").startswith(MANIFEST)]
            if foreign:
                raise ValueError(
                    f"checkpoint_dir {self.path} is not empty and holds no {MANIFEST}, so it is not a run of slt-jax "
                    f"(it has {foreign[0]}). Give an empty or new directory."
                )
            signed = {**identity, DIGEST: digest_of_json(identity)}
            write_file(manifest, json.dumps(signed, indent=1, sort_keys=True))
        steps = self.path / "steps"
        if steps.exists() and not steps.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{steps} is a file: remove it")
        self._clear()

    def _clear(self) -> None:
        """Remove what runs that were killed had begun to write."""
        remove_all_partials(self.path)
        if self.path in _UNFINISHED:
            return
        for begun in (self.path / "steps").glob(f"*{_BEGUN}*"):
            shutil.rmtree(begun, ignore_errors=True)

    def _first_does(self, action: Callable[[], Any]) -> Any:
        """What ``action`` returns or raises on the first process, on all of them."""
        value = error = report = None
        if is_main_process(self.mesh):
            try:
                value = action()
            except (OSError, ValueError) as raised:
                error, report = (
                    raised,
                    [getattr(raised, "errno", None), getattr(raised, "strerror", None) or str(raised)],
                )
        value, report = allgather([value, report], self.mesh)[0]
        if error is not None:
            raise error
        if report is not None:
            raise ValueError(report[1]) if report[0] is None else OSError(*report)
        return value

    def _check_shared(self) -> None:
        """Raise ValueError unless all processes see a file that the first one writes."""
        token = secrets.token_hex(8)
        shown = self.path / f"{MANIFEST}.{self._first_does(lambda: token)}"
        self._first_does(lambda: shown.write_text(""))
        until = time.monotonic() + PATIENCE
        while not shown.exists() and time.monotonic() < until:
            time.sleep(0.05)
        seen = allgather(shown.exists(), self.mesh)
        self._first_does(lambda: shown.unlink())
        if not all(seen):
            raise ValueError(
                f"checkpoint_dir {self.path} is not one directory for all processes: process {seen.index(False)} does "
                "not see what process 0 writes there. Give a directory on a disk that they share, or leave it out."
            )

    def read_note(self, name: str, fields: Collection[str] = ()) -> dict[str, Any] | None:
        """What ``write_note`` kept under this name; None when nothing was.

        Raises ValueError for a file that is truncated, lacks one of ``fields``, or was changed. One of an older version
        has no digest, and is read as it is.
        """
        return self._first_does(lambda: self._read_note(self.path / f"{name}.json", fields))

    def _read_note(self, path: Path, fields: Collection[str]) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            note = json.loads(path.read_text())
            if not isinstance(note, dict):
                raise ValueError(f"it holds a {type(note).__name__}")
            if lacking := [field for field in fields if field not in note]:
                raise ValueError(f"it lacks {', '.join(lacking)}")
        except ValueError as error:
            raise ValueError(f"{path} is truncated or foreign: {error}. Remove it to have it computed again.") from None
        if not note.keys() & {DIGEST, _NOTE_FORMAT}:
            return note
        found, number = note.pop(DIGEST, None), note.pop(_NOTE_FORMAT, None)
        if number != 1 or found != digest_of_json(note):
            raise ValueError(
                f"{path} was changed or damaged after it was written: its numbers do not have the digest that was "
                "written with them. Remove it to have it computed again."
            )
        return note

    def write_note(self, name: str, value: dict[str, Any]) -> None:
        """Keep plain JSON beside the run, with its digest. A disk that is full costs the note, not the run."""
        signed = {**value, _NOTE_FORMAT: 1, DIGEST: digest_of_json(value)}
        if is_main_process(self.mesh):
            try:
                write_file(self.path / f"{name}.json", json.dumps(signed, indent=1))
            except OSError as error:
                message = f"{error.strerror or error}; the run goes on, and one that resumes it computes this again."
                warnings.warn(message, RuntimeWarning, stacklevel=3)

    def restore(self, state: Any, host: dict[str, np.ndarray]) -> tuple[int, Any, dict[str, np.ndarray]] | None:
        """(step, state, host arrays) of the newest complete save, laid out like the arguments; None without one."""
        import orbax.checkpoint as ocp

        step = self._first_does(self._manager.latest_step)
        if step is None:
            return None
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        items: dict[str, Any] = {"state": ocp.args.StandardRestore(target), "host": ocp.args.StandardRestore(host)}
        if (self.path / "steps" / str(step) / DIGEST).exists():  # not in saves of older versions
            items[DIGEST] = ocp.args.JsonRestore()
        try:
            saved = self._manager.restore(step, args=ocp.args.Composite(**items))
            if DIGEST in items and saved[DIGEST] != _digests(step, saved["state"], saved["host"]):
                raise ValueError("its arrays do not have the digest that was saved with them")
        except Exception as error:
            self.close()
            raise ValueError(
                f"the checkpoint of step {step} in {self.path} is truncated or foreign or was changed "
                f"({type(error).__name__}: {str(error)[:200]}). Remove {self.path / 'steps' / str(step)} to go back "
                "to the save before it, or to the start."
            ) from error
        return step, saved["state"], {k: np.array(v) for k, v in saved["host"].items()}

    def save(self, step: int, state: Any, host: dict[str, np.ndarray]) -> None:
        """Write in the background. The arguments may be changed or donated as soon as this returns."""
        import orbax.checkpoint as ocp

        digests = ocp.args.JsonSave(_digests(step, state, host))
        # On CPU Orbax may read the very buffers that the next chunk overwrites: hand it copies.
        state, host = jax.tree.map(jnp.copy, state), {k: v.copy() for k, v in host.items()}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), host=ocp.args.StandardSave(host), **{DIGEST: digests}
        )
        _UNFINISHED.add(self.path)
        self._manager.save(step, args=args)

    def wait(self) -> None:
        """Until everything handed to ``save`` is on disk; raises what the background writer met."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        try:
            self._manager.close()
            _UNFINISHED.discard(self.path)
        finally:
            logging.getLogger("absl").removeFilter(_reported_otherwise)

    def _compare(self, saved: dict[str, Any], wanted: dict[str, Any], damaged: bool) -> None:
        """``damaged``: whether the manifest is not the one that was written; unharmed where it is the one wanted."""
        if (other := first_difference(saved, wanted)) is not None:
            name, there, here = other
            changed = f"{MANIFEST} there was changed or damaged after it was written. " if damaged else ""
            raise ValueError(
                f"checkpoint_dir {self.path} holds a run with another {name}: {there!r} there, {here!r} now. {changed}"
                "Give the same value to resume it, or another directory to start anew."
            )


def first_difference(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """(dotted name, saved value, wanted value) of the first field of two nested dicts that differs, else None."""
    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        there, here = saved.get(name), wanted.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            if (inside := first_difference(there, here, f"{prefix}{name}.")) is not None:
                return inside
        elif json.dumps(here) != json.dumps(there):  # as text, in which NaN is itself
            return f"{prefix}{name}", there, here
    return None


def _digests(step: int, state: Any, host: dict[str, np.ndarray]) -> dict[str, Any]:
    """What tells a save from one that was changed: plain JSON."""
    sums = np.asarray(to_host(_checksums(jax.tree.leaves(state)))).tolist()
    return {"step": step, "state": sums, "host": digest_of_arrays(np.asarray(host[name]) for name in sorted(host))}


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    """64 bits for each array, where it is: two sums over one-to-one functions of its bits and their place.

    A change of one element changes both sums; any other one goes unseen with a probability of 2^-64.
    """
    return jnp.stack([jnp.stack([_checksum(leaf, seed) for seed in _SEEDS]) for leaf in leaves])


def _checksum(leaf: jax.Array, seed: int) -> jax.Array:
    bits = _bits(leaf)
    place = jnp.uint32(seed) * jnp.ones((), jnp.uint32)
    for axis in range(bits.ndim):
        place = place * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = _mixed(bits ^ _mixed(place))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _bits(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint32)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of 32 bits: the end of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or foreign: {error}. Give another directory.") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path} is not a manifest of slt-jax. Give another directory.")
    return content
