"""The checkpoints of a trajectory, each with its posterior, engine and folder, and the one setting for all."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from slt_jax._io import user_path
from slt_jax.engine.checkpoint import RunStore
from slt_jax.engine.loop import Engine
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.engine.screen import Screen
from slt_jax.estimators.observing import Observing, watched
from slt_jax.estimators.request import Request, lengths_of_each
from slt_jax.posterior.flax import params_like
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.tree import check_pytree, path_of
from slt_jax.results.trajectory import WHOLE


class Ways(NamedTuple):
    """``common_noise``: the same random numbers at all checkpoints."""

    warm_start: bool
    common_noise: bool


@dataclass(frozen=True)
class Course:
    """The checkpoints, and the one setting for all. ``identity``: digest of everything that the numbers depend on."""

    request: Request
    screen: Screen
    centers: Mapping[int, Any]
    plan: Schedule
    mesh: Mesh
    identity: str
    ways: Ways

    def posterior_at(self, step: int) -> LocalPosterior:
        """The posterior around the checkpoint of this step."""
        center = self.centers[step]
        center = center() if callable(center) and not isinstance(center, nnx.Module) else center
        check_pytree(f"the checkpoint of step {step}", center)
        try:
            center = params_like(center, self.request.posterior.center)
            posterior = dataclasses.replace(self.request.posterior, center=center)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the checkpoint of step {step}: {error}") from error
        given, wanted = _shapes(center), _shapes(self.request.posterior.center)
        for name in [*wanted, *given]:
            if given.get(name) != wanted.get(name):
                raise ValueError(
                    f"the checkpoint of step {step} is of another model than posterior.center: '{name}' has shape "
                    f"{given.get(name)} there, {wanted.get(name)} here. Give checkpoints of one training run."
                )
        return posterior

    def engine(self, posterior: LocalPosterior, key: jax.Array, *, observes: bool = False) -> Engine:
        observed = ()
        if observes:
            request = dataclasses.replace(self.request, posterior=posterior)
            observed = watched(request, lengths_of_each(request), len(self.centers))
        problem = self.request.problem(self.mesh, posterior, observed)
        return Engine(problem, self.request.sampler, self.plan, key)

    def observing(self, engine: Engine, step: int) -> Observing:
        """What the checkpoint of this step observes."""
        found = {
            name: (x if x.path is None else dataclasses.replace(x, path=user_path(x.path) / f"step-{step}"), data)
            for name, (x, data) in self.request.observables.items()
        }
        request = dataclasses.replace(self.request, observables=found, checkpoint_dir=self.folder_of(WHOLE, step))
        request = request if self.request.folder else dataclasses.replace(request, checkpoint_dir=None)
        return Observing.begun(request, engine, {"trajectory": self.identity, "step": step})

    @property
    def numbers(self) -> Numbers:
        """What all chains are moved with, once nothing is open any more."""
        posterior, sampler = self.request.posterior, self.request.sampler
        return Numbers(posterior.nbeta, posterior.localization, sampler.step_size, sampler.friction)

    def store_at(self, name: str, step: int) -> RunStore:
        """Where the state of one checkpoint is kept."""
        identity = {"trajectory": self.identity, "part": name, "step": step, "mesh": dict(self.mesh.shape)}
        return RunStore(self.folder_of(name, step), identity, self.mesh)

    def folder_of(self, name: str, step: int) -> Path:
        return (self.request.folder or Path()) / name.replace(" ", "-") / f"step-{step}"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {"/".join(path_of(path)): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
