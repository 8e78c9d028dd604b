"""A run on disk: what it depends on, and where it got to. Orbax writes the state; a manifest guards it."""

import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from slt_jax._io import user_path, write_file
from slt_jax.engine.mesh import allgather, is_main_process, spans_processes

MANIFEST = "manifest.json"
FORMAT = 3
PATIENCE = 20  # seconds until a file that another machine wrote is seen here


def check_directory(directory: Any) -> None:
    """Raise TypeError unless ``directory`` is a path."""
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"checkpoint_dir must be a path, got {directory!r}. Give a directory of its own.")


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
            self._compare(_read_json(manifest), identity)
        else:
            foreign = [p.name for p in self.path.iterdir() if not p.name.lstrip(".").startswith(MANIFEST)]
            if foreign:
                raise ValueError(
                    f"checkpoint_dir {self.path} is not empty and holds no {MANIFEST}, so it is not a run of slt-jax "
                    f"(it has {foreign[0]}). Give an empty or new directory."
                )
            write_file(manifest, json.dumps(identity, indent=1, sort_keys=True))
        steps = self.path / "steps"
        if steps.exists() and not steps.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{steps} is a file: remove it")

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

    def read_note(self, name: str) -> dict[str, Any] | None:
        """What ``write_note`` kept under this name; None when nothing was. Raises ValueError for a truncated file."""
        return self._first_does(lambda: self._read_note(self.path / f"{name}.json"))

    def _read_note(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is truncated or foreign: {error}. Remove it to have it computed again.") from None

    def write_note(self, name: str, value: dict[str, Any]) -> None:
        """Keep plain JSON beside the run."""
        if is_main_process(self.mesh):
            write_file(self.path / f"{name}.json", json.dumps(value, indent=1))

    def restore(self, state: Any, host: dict[str, np.ndarray]) -> tuple[int, Any, dict[str, np.ndarray]] | None:
        """(step, state, host arrays) of the newest complete save, laid out like the arguments; None without one."""
        step = self._first_does(self._manager.latest_step)
        if step is None:
            return None
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        try:
            saved = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target), host=ocp.args.StandardRestore(host)),
            )
        except Exception as error:
            self.close()
            raise ValueError(
                f"the checkpoint of step {step} in {self.path} is truncated or foreign ({type(error).__name__}: "
                f"{str(error)[:200]}). Remove {self.path / 'steps' / str(step)} to go back to the save before it, "
                "or to the start."
            ) from error
        return step, saved["state"], {k: np.array(v) for k, v in saved["host"].items()}

    def save(self, step: int, state: Any, host: dict[str, np.ndarray]) -> None:
        """Write in the background. The arguments may be changed or donated as soon as this returns."""
        # On CPU Orbax may read the very buffers that the next chunk overwrites: hand it copies.
        state, host = jax.tree.map(jnp.copy, state), {k: v.copy() for k, v in host.items()}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.StandardSave(host))
        self._manager.save(step, args=args)

    def wait(self) -> None:
        """Until everything handed to ``save`` is on disk; raises what the background writer met."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _compare(self, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        if (other := first_difference(saved, wanted)) is not None:
            name, there, here = other
            raise ValueError(
                f"checkpoint_dir {self.path} holds a run with another {name}: {there!r} there, {here!r} "
                "now. Give the same value to resume it, or another directory to start anew."
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


def digest_of(identity: dict[str, Any]) -> str:
    """SHA-256 of plain JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or foreign: {error}. Give another directory.") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path} is not a manifest of slt-jax. Give another directory.")
    return content
