"""The checkpoints of a training run on the command line, each loaded while the one before is sampled."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from slt_jax.cli.language import Case, load_model, open_case


class Checkpoint(NamedTuple):
    """A folder, or a repository with a revision."""

    path: str
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


def open_course(
    checkpoints: Sequence[str], *, revisions: Sequence[str] = (), steps: Sequence[int] = (), **options: Any
) -> tuple[Case, dict[int, Callable[[], Any]]]:
    """(the case of the first checkpoint, training step -> function that loads the parameters).

    Args:
        checkpoints: folders or repositories of one model; with ``revisions``, one repository.
        steps: the training step of each; default the number at the end of its name.
        options: of ``open_case``.

    Raises:
        ValueError: no checkpoints, a name without a number, or two of the same step.
        FileNotFoundError, ValueError, ImportError: as ``open_case``.
    """
    found = _by_step(_listed(checkpoints, revisions), steps)
    first = found[min(found)]
    case = open_case(first.path, revision=first.revision, **options)
    return case, Ahead(found, options.get("backend", "jax")).loaders()


def _listed(checkpoints: Sequence[str], revisions: Sequence[str]) -> list[Checkpoint]:
    if not checkpoints:
        raise ValueError("a trajectory needs checkpoints: step-100 step-1000 step-10000.")
    if not revisions:
        return [Checkpoint(checkpoint) for checkpoint in checkpoints]
    if len(checkpoints) > 1:
        raise ValueError(f"--revisions are of one repository, got {', '.join(checkpoints)}. Give one name.")
    return [Checkpoint(checkpoints[0], revision) for revision in revisions]


def _by_step(checkpoints: list[Checkpoint], steps: Sequence[int]) -> dict[int, Checkpoint]:
    if steps and len(steps) != len(checkpoints):
        raise ValueError(f"--steps names {len(steps)} steps for {len(checkpoints)} checkpoints. Give one for each.")
    found: dict[int, Checkpoint] = {}
    for index, checkpoint in enumerate(checkpoints):
        step = steps[index] if steps else _step_of(checkpoint)
        if step in found:
            raise ValueError(f"{found[step].name} and {checkpoint.name} are both of step {step}. Leave one out.")
        found[step] = checkpoint
    return found


def _step_of(checkpoint: Checkpoint) -> int:
    number = re.search(r"(\d+)\D*$", Path(checkpoint.path).name if checkpoint.revision is None else checkpoint.revision)
    if number is None:
        raise ValueError(f"the name of {checkpoint.name} has no training step. Name it step-100, or give --steps.")
    return int(number[1])


class Ahead:
    """Loads checkpoints one at a time, and the next one, by step, while the last one is used."""

    def __init__(self, checkpoints: dict[int, Checkpoint], backend: Any):
        self.checkpoints, self.backend = checkpoints, backend
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: tuple[int, Future] | None = None

    def loaders(self) -> dict[int, Callable[[], Any]]:
        """Training step -> function that returns the parameters."""
        return {step: lambda step=step: self.take(step) for step in self.checkpoints}

    def take(self, step: int) -> Any:
        if self.pending is not None and self.pending[0] == step:
            params = self.pending[1].result()
        else:
            params = self._load(step)
        later = [other for other in self.checkpoints if other > step]
        self.pending = (min(later), self.pool.submit(self._load, min(later))) if later else None
        return params

    def _load(self, step: int) -> Any:
        checkpoint = self.checkpoints[step]
        return load_model(checkpoint.path, self.backend, checkpoint.revision).params
