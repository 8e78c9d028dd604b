"""What a trajectory gives back: the LLC of one model over its training, its stages, on screen and on disk."""

import dataclasses
import functools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax.results.card import card, sparkline, tone_color
from slt_jax.results.llc import LLCResult
from slt_jax.results.observed import pooled_moments
from slt_jax.results.observed_tree import axes_of, groups_of, observed_in
from slt_jax.results.plateau import HEATED, SETTLED
from slt_jax.results.stacking import stack, unstack
from slt_jax.results.stages import Stages, find_stages
from slt_jax.results.storage import FORMAT, TRAJECTORY, load, write
from slt_jax.samplers import theory_of

if TYPE_CHECKING:
    import xarray as xr

WHOLE = "all"
_DIMS = ("part", "training_step")
_NUMBERS = ("llc", "llc_stderr", "llc_raw", "rhat", "ess", "init_loss", "trend", "acceptance", "tilt", "tilt_stderr")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The LLC at each of many checkpoints, with one setting for all.

    ``steps``: of training, increasing. ``results``: by part, ``"all"`` the whole, one for each step. ``interrupted``:
    the number of checkpoints that were asked for, where Ctrl-C ended the call before it had them; else 0.
    """

    steps: tuple[int, ...]
    results: dict[str, tuple[LLCResult, ...]]
    interrupted: int = 0

    @property
    def losses(self) -> list[float]:
        """Loss at each checkpoint, nats per example."""
        return [result.init_loss for result in self.results[WHOLE]]

    @property
    def stages(self) -> Stages | None:
        """Stages of the whole's LLC; None with fewer than four checkpoints that have one."""
        return self.stages_of(WHOLE)

    def stages_of(self, part: str, drift: float | None = None) -> Stages | None:
        """Stages of a part's LLC. Raises KeyError for a part that was not measured.

        ``drift``: of the level within a stage, per checkpoint; default estimated from the curve. With 0 a curve that
        rises all the time is described by steps too.
        """
        if part not in self.results:
            raise KeyError(f"no part '{part}' in this trajectory, which has {', '.join(self.results)}.")
        if (part, drift) not in self._stages:
            self._stages[part, drift] = self._cut(part, drift)
        return self._stages[part, drift]

    @functools.cached_property
    def _stages(self) -> dict[tuple[str, float | None], Stages | None]:
        return {}

    def _cut(self, part: str, drift: float | None) -> Stages | None:
        estimates = self.results[part]
        llc, error = (np.array([getattr(r, name) for r in estimates]) for name in ("llc", "llc_stderr"))
        known = np.isfinite(llc) & np.isfinite(error) & (error > 0)
        if known.sum() < 4:
            return None
        return find_stages(np.array(self.steps, float)[known], llc[known], error[known], drift=drift)

    @property
    def setting(self) -> dict[str, Any]:
        """The numbers that all have in common; no friction of a sampler without momentum."""
        first = self.results[WHOLE][0].settings
        own = ("friction",) if theory_of(first.family).has_momentum else ()
        return {name: getattr(first, name) for name in ("nbeta", "localization", "step_size", *own)}

    @functools.cached_property
    def dataset(self) -> "xr.Dataset":
        """Estimates, errors and verdicts over part and training step."""
        import xarray as xr

        dicts = [[r.to_dict() for r in row] for row in self.results.values()]
        variables = {}
        for name in _NUMBERS:
            values = [[np.nan if d[name] is None else d[name] for d in row] for row in dicts]
            variables[name] = (_DIMS, np.array(values, float))
        variables["verdict"] = (_DIMS, np.array([[d["verdict"] for d in row] for row in dicts], object))
        dataset = xr.Dataset(
            variables, {"part": np.array(list(self.results), object), "training_step": list(self.steps)}
        )
        dataset["llc"].attrs = {"long_name": "local learning coefficient", "units": "1"}
        dataset["init_loss"].attrs = {"long_name": "loss at the checkpoint", "units": "nats per example"}
        return dataset

    def observed(self, name: str) -> "xr.Dataset":
        """The losses that were observed under this name, over training.

        Variables by (training_step, example[, token]): ``center``, at w*; ``mean`` and ``variance`` over all draws;
        ``covariance`` with the run's own L_m(w) - L_m(w*), whose negative is a one-chain susceptibility of the whole
        model before the mean over the examples is taken off. In nats, and their squares; NaN for tokens that do not
        count. Raises KeyError for a name that was not observed.
        """
        import xarray as xr

        whole = self.results[WHOLE]
        if name not in whole[0].observed:
            names = ", ".join(whole[0].observed) or "nothing"
            raise KeyError(f"no observable '{name}' in this trajectory, which has {names}.")
        found = [result.observed[name] for result in whole]
        pooled = [pooled_moments(one) for one in found]
        dims = ("training_step", *axes_of(found[0]))
        variables = {key: (dims, np.stack([each[key] for each in pooled])) for key in pooled[0]}
        return xr.Dataset(variables, {"training_step": list(self.steps)}, {"name": name, "level": found[0].level})

    def unserved(self) -> dict[int, str]:
        """Step -> verdict of the checkpoints that the one setting does not serve: a step too long, chains lost."""
        bad = {*HEATED, "diverged"}
        return {s: r.verdict for s, r in zip(self.steps, self.results[WHOLE], strict=True) if r.verdict in bad}

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<Trajectory: {self._size_text()}>"

    def _size_text(self) -> str:
        whole = self.results[WHOLE]
        converged = sum(result.verdict == "converged" for result in whole)
        parts = f", and {len(self.results) - 1} parts" if len(self.results) > 1 else ""
        asked = f" (of {self.interrupted}: interrupted)" if self.interrupted else ""
        return (
            f"{len(whole)} checkpoints{asked}, steps {self.steps[0]:,} to {self.steps[-1]:,}{parts}; {converged} of "
            f"{len(whole)} converged"
        )

    def _repr_html_(self) -> str:
        whole = self.results[WHOLE]
        curve = np.array([[result.llc for result in whole]])
        picture = sparkline(curve, "the LLC from checkpoint to checkpoint")
        tone = "converged" if all(r.verdict == "converged" for r in whole) else SETTLED[-1]
        return card("LLC over training", self._size_text(), self.summary().splitlines(), picture, tone_color(tone))

    def summary(self, drift: float | None = None) -> str:
        """What ``print`` says, with ``stages_of("all", drift)``."""
        whole, stages = self.results[WHOLE], self.stages_of(WHOLE, drift)
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self.setting.items() if value is not None)
        lines = [f"LLC at {len(whole)} checkpoints, steps {self.steps[0]:,} to {self.steps[-1]:,}, all with {numbers}."]
        if self.interrupted:
            lines.append(f"Interrupted after {len(self.steps)} of {self.interrupted} checkpoints.")
        if bad := self.unserved():
            steps = ", ".join(f"{step:,} ({verdict})" for step, verdict in bad.items())
            lines.append(f"The setting is not right for {steps}: take a shorter step_size for all.")
        other = Counter(r.verdict for r in whole if r.verdict not in SETTLED and r.verdict not in bad.values())
        lines += [f"{count} of them '{verdict}'." for verdict, count in other.most_common()]
        lines.append(str(stages) if stages is not None else "Too few estimates to look for stages.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "steps": list(self.steps),
            "interrupted": self.interrupted,
            "results": {name: [r.to_dict() for r in row] for name, row in self.results.items()},
            "stages": None if self.stages is None else self.stages.to_dict(),
        }

    def plot(
        self, path: str | os.PathLike | None = None, *, unit: str = "nats per example", drift: float | None = None
    ):
        """LLC and loss over training with the boundaries of ``stages_of("all", drift)``; written to ``path`` if given.

        Returns the figure, which a notebook shows.
        """
        from slt_jax.report.training import plot_training

        results = self.results if len(self.results) > 1 else self.results[WHOLE]
        return plot_training(self.steps, self.losses, results, path, stages=self.stages_of(WHOLE, drift), unit=unit)

    def report(
        self, path: str | os.PathLike, *, overwrite: bool = False, unit: str = "nats per example",
        drift: float | None = None,
    ) -> Path:  # fmt: skip
        """Write everything as one self-contained HTML page, with the picture and the stages that ``plot`` shows."""
        from slt_jax.report.write import write_report

        return write_report(self, path, overwrite=overwrite, unit=unit, drift=drift)

    def to_xarray(self) -> "xr.DataTree":
        """DataTree: ``/`` is ``dataset``; ``sample_stats`` and ``warmup_sample_stats`` hold all traces.

        ``posterior`` has the LLC at each draw, for ArviZ.
        """
        import xarray as xr

        flat = [result for row in self.results.values() for result in row]
        groups, attrs = stack(flat, _DIMS, (len(self.results), len(self.steps)))
        for step, result in zip(self.steps, self.results[WHOLE], strict=True):
            groups |= {f"/step_{step}{group}": data for group, data in groups_of(result.observed).items()}
        tree = xr.DataTree.from_dict({"/": self.dataset, **groups})
        tree.attrs = {TRAJECTORY: FORMAT, **attrs, **({"interrupted": self.interrupted} if self.interrupted else {})}
        return tree

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Write everything as zarr. Raises FileExistsError on an existing path, and OSError."""
        return write(self.to_xarray(), path, TRAJECTORY, overwrite=overwrite)


def load_trajectory(path: str | os.PathLike) -> Trajectory:
    """Read what ``Trajectory.save`` wrote. Raises FileNotFoundError, or ValueError for a foreign or truncated file."""
    return load(path, TRAJECTORY, _of_tree)


def _of_tree(tree: "xr.DataTree") -> Trajectory:
    steps = tuple(tree.to_dataset()["training_step"].values.tolist())
    flat, parts = unstack(tree, len(_DIMS)), [str(name) for name in tree.to_dataset()["part"].values.tolist()]
    rows = {name: flat[i * len(steps) : (i + 1) * len(steps)] for i, name in enumerate(parts)}
    if kept := [tree.children[f"step_{step}"] for step in steps if f"step_{step}" in tree.children]:
        observed = [observed_in(of_step) for of_step in kept]
        rows[WHOLE] = tuple(dataclasses.replace(r, observed=o) for r, o in zip(rows[WHOLE], observed, strict=True))
    return Trajectory(steps, rows, interrupted=int(tree.attrs.get("interrupted", 0)))
