"""What susceptibilities give back: how each component of a model responds to each example, with errors."""

import dataclasses
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slt_jax._checks import shown
from slt_jax.results.card import card, tone_color
from slt_jax.results.llc import LLCResult
from slt_jax.results.patterns import Response, check_labels, matrix_of, reached_by, weights_for
from slt_jax.results.plateau import SETTLED
from slt_jax.results.storage import SUSCEPTIBILITIES, load, write
from slt_jax.results.susceptibilities_data import fields_of, tree_of

if TYPE_CHECKING:
    import xarray as xr

FULL = "all weights"
RELIABLE = 0.5
SIGNAL, NOISE, UNKNOWN = "more signal than noise", "mostly noise", "not known"
_LINES = 12  # of a notebook's card


class Pattern(NamedTuple):
    """Weights of groups of data that move the components as wanted; see ``Susceptibilities.pattern``.

    ``weights``: (group,), the share of the data that goes over to each group. ``reached``, ``reached_stderr``:
    (component,), the change of <L(w) - L(w*)>_C by such weights, in nats, from draws that they were not chosen by.
    Smaller than was asked for where the weights follow the noise; NaN where there are too few draws to tell.
    """

    weights: "xr.DataArray"
    reached: "xr.DataArray"
    reached_stderr: "xr.DataArray"

    def __repr__(self) -> str:
        return f"<Pattern: weights of {self.weights.size:,} groups that move {self.reached.size} components>"


@dataclass(frozen=True, eq=False)
class Susceptibilities:
    """The susceptibility of each component of a model to each example, or token, of a probe.

    Its value, chi, is minus the covariance of the loss gap of the posterior restricted to the component with the loss
    of the example, less the mean over the probe. nbeta times chi is the change of the component's mean loss gap when
    the data are shifted towards the example; chi itself is without this factor.

    Args:
        dataset: over ``component``, ``example`` and, at token level, ``token``: ``chi`` and its ``stderr`` (nats
            squared). Over ``component``: ``reliability`` (the correlation that chi of two such runs would have, from
            the halves of the chains), ``phi`` (mean loss gap, nats), ``scale`` (what chi was divided by). ``blocks``:
            what each block of draws contributes to the mean over an example. Attributes: the estimator and the numbers
            of the posterior.
        results: the estimate of the LLC of each component.
        full: that of all weights, of the two-chain estimator.
        interrupted: the number of components that were asked for, where Ctrl-C ended the call before it had them.
    """

    dataset: "xr.Dataset"
    results: dict[str, LLCResult] = field(default_factory=dict)
    full: LLCResult | None = None
    interrupted: int = 0

    @property
    def components(self) -> list[str]:
        return [str(name) for name in self.dataset["component"].values]

    @property
    def chi(self) -> "xr.DataArray":
        """(component, example[, token]), nats squared unless it was scaled; NaN for tokens that do not count."""
        return self.dataset["chi"]

    @property
    def stderr(self) -> "xr.DataArray":
        """The standard error of each ``chi``."""
        return self.dataset["stderr"]

    @property
    def reliability(self) -> dict[str, float]:
        """Of each component the correlation that chi of two such runs would have; NaN for one chain."""
        return dict(zip(self.components, map(float, self.dataset["reliability"].values), strict=True))

    def quality(self, component: str) -> str:
        """ "more signal than noise" from a reliability of 0.5, "mostly noise" below, or that it is not known."""
        value = self.reliability[component]
        return UNKNOWN if math.isnan(value) else SIGNAL if value >= RELIABLE else NOISE

    def zscored(self) -> "Susceptibilities":
        """With each component's chi divided by its standard deviation over the probe; its mean is 0 already.

        This takes out a factor of each component that the two-chain estimator cannot know, so that components compare.
        """
        units = self.chi.dims[1:]
        sd = self.chi.astype(float).std(units)
        sd = sd.where(sd > 0)
        chi, stderr = ((x / sd).astype(np.float32) for x in (self.chi, self.stderr))
        data = self.dataset.assign(chi=chi, stderr=stderr, scale=self.dataset["scale"] * sd)
        return self._with(data, "zscored")

    def centered(self) -> "Susceptibilities":
        """Less the mean over components, of each example or token: what a component does that not all do.

        Errors are as if those of the components were independent.
        """
        count = self.chi.sizes["component"]
        total = (self.stderr.astype(float) ** 2).sum("component", skipna=False)
        own = self.stderr.astype(float) ** 2
        stderr = np.sqrt((1 - 2 / count) * own + total / count**2)
        chi = self.chi - self.chi.mean("component")
        data = self.dataset.assign(chi=chi.astype(np.float32), stderr=stderr.astype(np.float32))
        return self._with(data.drop_vars("blocks"), "centered")

    def whitened(self, dims: int | None = None) -> "xr.Dataset":
        """Principal components over the probe: uncorrelated coordinates of examples or tokens, each of variance 1.

        Args:
            dims: how many; default as many as there are components.

        Returns:
            ``coordinate`` (dim, example[, token]); ``loading`` (dim, component), by which the coordinates give back chi
            less its mean over the probe; ``share`` (dim,) of the variance. The largest loading of each is positive.

        Raises:
            ValueError: ``dims`` is not from 1 to the number of components, or there are fewer examples.
        """
        import xarray as xr

        units = self.chi.dims[1:]
        values = self.chi.values.reshape(len(self.components), -1).astype(np.float64)
        valid = np.isfinite(values).all(0)
        if valid.sum() < 2:
            raise ValueError(
                f"principal components need at least 2 units of the probe whose chi is known, and there are "
                f"{int(valid.sum())} of {valid.size}."
            )
        most = min(len(values), int(valid.sum()) - 1)
        dims = most if dims is None else dims
        if isinstance(dims, bool) or not isinstance(dims, int | np.integer) or not 1 <= dims <= most:
            raise ValueError(f"dims must be a whole number from 1 to {most}, got {dims!r}.")
        away = values[:, valid] - values[:, valid].mean(1, keepdims=True)
        left, singular, right = np.linalg.svd(away, full_matrices=False)
        signs = np.sign(left[np.abs(left).argmax(0), np.arange(left.shape[1])])[:dims]
        root = math.sqrt(valid.sum() - 1)
        coordinates = np.full((dims, values.shape[1]), math.nan)
        coordinates[:, valid] = signs[:, None] * right[:dims] * root
        shape = (dims, *(self.chi.sizes[name] for name in units))
        return xr.Dataset(
            {
                "coordinate": (("dim", *units), coordinates.reshape(shape)),
                "loading": (("dim", "component"), (left[:, :dims] * signs * singular[:dims] / root).T),
                "share": (("dim",), singular[:dims] ** 2 / (singular**2).sum()),
            },
            {"component": self.dataset["component"]},
        )

    def response(self, groups: Sequence[Any] | Mapping[str, Any] | None = None) -> "xr.Dataset":
        """The response matrix: mean of chi over the examples, or their tokens, of each group of data.

        Args:
            groups: a label for each example, or name -> indices of examples. Default: the labels that
                ``susceptibilities`` was given.

        Returns:
            ``response`` and ``stderr`` (group, component), ``count`` (group,) of examples or tokens. The error is that
            of a finite number of draws, by batch means; the errors of the examples of a group are not independent.

        Raises:
            ValueError: labels of another number than there are examples, an unknown example, an empty group, or
                susceptibilities that were ``centered``.
        """
        import xarray as xr

        data, chosen = self.dataset, self._groups(groups)
        value, error = (x / data["scale"].values for x in matrix_of(self._by_block(chosen)))
        names = np.array(list(chosen), object)
        return xr.Dataset(
            {
                "response": (("group", "component"), value), "stderr": (("group", "component"), error),
                "count": (("group",), [int(data["units"].values[rows].sum()) for rows in chosen.values()]),
            },
            {"group": names, "component": data["component"]},
        )  # fmt: skip

    def _by_block(self, chosen: Mapping[str, np.ndarray]) -> Response:
        """What each block of draws contributes to the means over these examples; not scaled, without nbeta."""
        data = self.dataset
        if "blocks" not in data:
            raise ValueError("centered() mixes the components. Take response() first, and subtract its mean after it.")
        weights = np.stack([np.bincount(rows, minlength=data.sizes["example"]) for rows in chosen.values()])
        weights = weights * data["units"].values
        if empty := [name for name, row in zip(chosen, weights, strict=True) if not row.sum()]:
            raise ValueError(f"the group {empty[0]!r} has no examples, or none with tokens that count.")
        weights = (weights / weights.sum(1, keepdims=True)).T
        parts = np.nan_to_num(data["blocks"].values.astype(float)) @ weights
        full, full_count, full_widening = np.zeros((len(parts), 0, weights.shape[1])), np.zeros(0), 1.0
        if "full_blocks" in data:
            each = np.nan_to_num(data["full_blocks"].values.astype(float)) @ weights
            full = data["phi"].values[:, None, None] * each
            full_count, full_widening = data["full_count"].values, float(data["full_widening"])
        return Response(parts, data["count"].values, data["widening"].values, full, full_count, full_widening)

    def pattern(self, delta: Mapping[str, float], groups: Sequence[Any] | Mapping[str, Any] | None = None) -> Pattern:
        """The change of the data that moves the components' mean loss gaps by ``delta``, to first order.

        The weights h minimize the expected squared miss, given the errors s of the response matrix R::

            sum_c (nbeta sum_g h_g R_gc - delta_c)^2 + nbeta^2 sum_g h_g^2 sum_c s_gc^2

        which is the pseudo-inverse of nbeta R with the noise as ridge: what is not known is not used. With many groups
        for few draws they follow the noise all the same; ``reached`` is measured on draws that did not choose them.

        Args:
            delta: component -> wanted change of <L(w) - L(w*)>_C, nats; 0 for components that are not named.
            groups: as for ``response``. Default: the labels that were given, else each example by itself.

        Raises:
            TypeError, ValueError: ``delta`` is no mapping of components to finite numbers; susceptibilities that were
                scaled or centered; those of nbeta = 0.

        Source: arXiv:2601.13548.
        """
        import xarray as xr

        wanted = self._wanted(delta)
        if done := self.dataset.attrs["transformed"]:
            raise ValueError(f"pattern() needs chi itself, and this was {' and '.join(done)}. Call it before.")
        if not (nbeta := self.dataset.attrs["nbeta"]):
            raise ValueError("at nbeta = 0 the data do not move the posterior, so there is no pattern.")
        if groups is None and "group" not in self.dataset:
            groups = {str(k): [k] for k in range(self.dataset.sizes["example"])}
        found = self.response(groups)
        matrix, error = found["response"].values, found["stderr"].values  # (group, component)
        if not np.isfinite(error).all():
            raise ValueError(
                "the errors of these susceptibilities are not known, and the weights depend on them. Take more draws."
            )
        weights = weights_for(nbeta * matrix, nbeta * error, wanted)
        reached, spread = reached_by(self._by_block(self._groups(groups)).times(nbeta), wanted)
        by = {"component": found["component"]}
        return Pattern(
            xr.DataArray(weights, {"group": found["group"]}, ("group",)),
            xr.DataArray(reached, by, ("component",)),
            xr.DataArray(spread, by, ("component",)),
        )

    def _wanted(self, delta: Any) -> np.ndarray:
        if not isinstance(delta, Mapping):
            raise TypeError(f"delta must be a mapping of components to changes, {{name: nats}}, got {shown(delta)}.")
        if unknown := [name for name in delta if name not in self.components]:
            raise ValueError(f"delta names {shown(unknown[0])}. The components are {', '.join(self.components)}.")
        for name, change in delta.items():
            if isinstance(change, bool) or not isinstance(change, numbers.Real) or not math.isfinite(change):
                raise ValueError(f"delta[{name!r}] must be a finite number of nats, got {shown(change)}.")
        return np.array([float(delta.get(name, 0.0)) for name in self.components])

    def _with(self, data: "xr.Dataset", step: str) -> "Susceptibilities":
        data.attrs = {**self.dataset.attrs, "transformed": [*self.dataset.attrs["transformed"], step]}
        return dataclasses.replace(self, dataset=data)

    def _groups(self, groups: Any) -> dict[str, np.ndarray]:
        """Name -> indices of examples."""
        count = self.dataset.sizes["example"]
        if groups is None:
            if "group" not in self.dataset:
                raise ValueError("groups must be given: a label for each example of the probe, or name -> indices.")
            groups = self.dataset["group"].values
        if isinstance(groups, Mapping):
            if not groups:
                raise ValueError("groups is empty. Give name -> indices of examples, or a label for each example.")
            chosen = {str(name): np.atleast_1d(np.asarray(rows)) for name, rows in groups.items()}
            for name, rows in chosen.items():
                if not rows.size:
                    raise ValueError(f"the group {name!r} has no examples, or none with tokens that count.")
                if rows.ndim != 1 or rows.dtype.kind not in "iu" or not 0 <= rows.min() <= rows.max() < count:
                    raise ValueError(f"the group {name!r} must hold indices of examples, from 0 to {count - 1}.")
            return chosen
        check_labels(groups)
        labels = [str(label) for label in groups]
        if len(labels) != count:
            raise ValueError(f"groups must have a label for each of the {count} examples, got {len(labels)}.")
        return {name: np.flatnonzero(np.array(labels) == name) for name in dict.fromkeys(labels)}

    def __repr__(self) -> str:
        return f"<Susceptibilities: {self._size_text()}>"

    def _size_text(self) -> str:
        units = " x ".join(f"{size:,} {name}s" for name, size in self.chi.sizes.items())
        known = [value for value in self.reliability.values() if math.isfinite(value)]
        good = sum(value >= RELIABLE for value in known)
        asked = f" (of {self.interrupted}: interrupted)" if self.interrupted else ""
        rest = f"{good} of {len(known)} reliable" if known else "reliability not known"
        return f"{units}{asked}, {self.dataset.attrs['estimator']}; {rest}"

    def __str__(self) -> str:
        return "\n".join([f"Susceptibilities: {self._size_text()}.", *self.table()])

    def table(self) -> list[str]:
        """Lines of Markdown: a row for each component."""
        lines = ["| component | weights | LLC ± standard error | its verdict | reliability | chi |", "|---" * 6 + "|"]
        return [*lines, *(f"| {' | '.join(row)} |" for row in self.rows())]

    def rows(self) -> list[tuple[str, ...]]:
        """Of each component: name, weights, LLC, its verdict, reliability, and whether chi is mostly noise."""
        found = []
        for name, value in self.reliability.items():
            result = self.results.get(name)
            llc = ("", "", "") if result is None else (
                f"{result.settings.num_free:,}", result.estimate_text("±"), result.verdict
            )  # fmt: skip
            found.append((name, *llc, "" if math.isnan(value) else f"{value:.2f}", self.quality(name)))
        return found

    def _repr_html_(self) -> str:
        known = [value for value in self.reliability.values() if math.isfinite(value)]
        good = bool(known) and min(known) >= RELIABLE
        order = sorted(self.reliability.items(), key=lambda pair: -np.nan_to_num(pair[1], nan=-2))
        lines = [f"{name}: reliability {value:.2f}, {self.quality(name)}" for name, value in order[:_LINES]]
        lines += [f"and {len(order) - _LINES} more"] if len(order) > _LINES else []
        tone = "converged" if good else SETTLED[-1]
        return card("Susceptibilities", self._size_text(), lines, "", tone_color(tone))

    def to_dict(self) -> dict[str, Any]:
        """The numbers of each component, for JSON; chi itself is in ``dataset``."""
        plain = {name: value if math.isfinite(value) else None for name, value in self.reliability.items()}
        return {
            "settings": dict(self.dataset.attrs),
            "interrupted": self.interrupted,
            "components": {
                name: {
                    "reliability": value, "quality": self.quality(name),
                    **({"llc": self.results[name].to_dict()} if name in self.results else {}),
                } for name, value in plain.items()
            },
        }  # fmt: skip

    def plot(self, path: str | os.PathLike | None = None, *, by: str | None = None):
        """A heat map of the z-scored chi; written to ``path`` if given.

        Args:
            by: what is across: ``"group"`` (mean over the examples of a group), ``"token"`` (over a token position) or
                ``"example"``. Default: groups where there are any, else positions, else examples.

        Returns:
            the figure, which a notebook shows.
        """
        from slt_jax.report.susceptibilities import plot_susceptibilities

        return plot_susceptibilities(self, path, by)

    def report(
        self, path: str | os.PathLike, *, texts: Sequence[Any] | None = None, show: str | None = None,
        overwrite: bool = False,
    ) -> Path:  # fmt: skip
        """Write everything as one self-contained HTML page: a heat map, a map of the probe, the strongest responses.

        Args:
            texts: of each example of the probe, or at token level the strings of its predicted tokens.
            show: the component whose strongest responses are shown. Default: the most reliable one.
            overwrite: replace ``path``, if it is a page of slt-jax.
        """
        from slt_jax.report.write import write_report

        return write_report(self, path, overwrite=overwrite, texts=texts, show=show)

    def to_xarray(self) -> "xr.DataTree":
        """DataTree: ``/`` is ``dataset``; ``sample_stats`` has the traces of all components, then of all weights."""
        return tree_of(self.dataset, self.results, self.full, self.interrupted)

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Write everything as zarr. Raises FileExistsError on an existing path, and OSError."""
        return write(self.to_xarray(), path, SUSCEPTIBILITIES, overwrite=overwrite)


def load_susceptibilities(path: str | os.PathLike) -> Susceptibilities:
    """Read what ``Susceptibilities.save`` wrote.

    Raises FileNotFoundError, or ValueError for a foreign or truncated file.
    """
    return load(path, SUSCEPTIBILITIES, lambda tree: Susceptibilities(**fields_of(tree)))
