"""A run on disk: what it depends on, and where it got to. Orbax writes the state; a manifest guards it."""

import errno
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

MANIFEST = "manifest.json"
FORMAT = 1


def versions() -> dict[str, str]:
    """Versions that a bit-for-bit result depends on."""
    found = {name: importlib.metadata.version(name) for name in ("slt-jax", "jax", "jaxlib")}
    return {**found, "python": ".".join(platform.python_version_tuple()[:2])}


class RunStore:
    """The directory of one run.

    Args:
        directory: created if missing; may hold an earlier, interrupted run of the same thing.
        identity: nested dict of strings and numbers: everything the result depends on, causes before what they change.

    Raises:
        ValueError: the directory holds something else, or a run that differs; the text names the first field.
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, identity: dict[str, Any]):
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(f"checkpoint_dir must be a path, got {directory!r}. Give a directory of its own.")
        self.path = Path(directory).absolute()
        try:
            self._open({"format": FORMAT, **identity})
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
            foreign = [p.name for p in self.path.iterdir() if not p.name.startswith(MANIFEST)]
            if foreign:
                raise ValueError(
                    f"checkpoint_dir {self.path} is not empty and holds no {MANIFEST}, so it is not a run of slt-jax "
                    f"(it has {foreign[0]}). Give an empty or new directory."
                )
            if jax.process_index() == 0:
                partial = self.path / f"{MANIFEST}.{os.getpid()}"
                partial.write_text(json.dumps(identity, indent=1, sort_keys=True))
                partial.replace(manifest)
        steps = self.path / "steps"
        if steps.exists() and not steps.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{steps} is a file: remove it")
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True, create=True)
        self._manager = ocp.CheckpointManager(steps, options=options)

    def read_note(self, name: str) -> dict[str, Any] | None:
        """What ``write_note`` kept under this name; None when nothing was. Raises ValueError for a truncated file."""
        path = self.path / f"{name}.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is truncated or foreign: {error}. Remove it to have it computed again.") from None

    def write_note(self, name: str, value: dict[str, Any]) -> None:
        """Keep plain JSON beside the run."""
        if jax.process_index() == 0:
            partial = self.path / f"{name}.json.{os.getpid()}"
            partial.write_text(json.dumps(value, indent=1))
            partial.replace(self.path / f"{name}.json")

    def restore(self, state: Any, host: dict[str, np.ndarray]) -> tuple[int, Any, dict[str, np.ndarray]] | None:
        """(step, state, host arrays) of the newest complete save, laid out like the arguments; None without one."""
        step = self._manager.latest_step()
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

    def _compare(self, found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> None:
        for name in [*wanted, *(name for name in found if name not in wanted)]:
            here, there = wanted.get(name), found.get(name)
            if isinstance(here, dict) and isinstance(there, dict):
                self._compare(there, here, f"{prefix}{name}.")
            elif here != there:
                raise ValueError(
                    f"checkpoint_dir {self.path} holds a run with another {prefix}{name}: {there!r} there, {here!r} "
                    "now. Give the same value to resume it, or another directory to start anew."
                )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or foreign: {error}. Give another directory.") from None
    if not isinstance(found, dict) or "format" not in found:
        raise ValueError(f"{path} is not a manifest of slt-jax. Give another directory.")
    return found
