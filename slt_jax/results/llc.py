"""What a run gives back: the estimate, its error, its traces, on screen and on disk."""

import dataclasses
import functools
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float64, Int

from slt_jax.diagnostics.bias import Bias, Moments, thermometer
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.sensitivity import Slope, covariance_with_loss, degree_of, slopes, spacing_of, tilt_of
from slt_jax.diagnostics.series import Rise, error_of_mean, ess_and_rhat
from slt_jax.diagnostics.verdict import Health, assess
from slt_jax.engine.trace import Trace
from slt_jax.results.ascent import health_of_control, rise_and_end
from slt_jax.results.card import card, sparkline, tone_color
from slt_jax.results.observed import Observed
from slt_jax.results.other_data import Reading
from slt_jax.results.record import RunRecord
from slt_jax.results.spectral import EffectiveDimension, beside
from slt_jax.results.storage import RESULT, load, write
from slt_jax.results.text import (
    bias_line,
    cost_line,
    estimate_text,
    interrupted_line,
    marked,
    settings_line,
    signs_text,
    stopped_line,
)
from slt_jax.results.tree import fields_of, tree_of
from slt_jax.samplers import theory_of
from slt_jax.samplers.base import Theory

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class LLCResult:
    """A local learning coefficient with its error bar. All axes are (chain, draw).

    ``traces``: what was recorded at the draws, see ``engine.trace.Trace``. ``warmup_loss``: L_m(w_t) before the draws,
    (chain, step). ``stopped``: chain -> step at which it went non-finite; those chains are in the traces but not in the
    estimate. ``settings``: everything the run was given, what it took, and the versions it ran with. ``notes``: what
    went wrong without touching the numbers. ``other_names``: of the further data sets in ``traces.also``; read them as
    ``also``. ``theory``: of the sampler; by default the one that ``settings.family`` names. ``observed``: what
    observables read at the draws, by name.
    """

    traces: Trace
    warmup_loss: Float[np.ndarray, "chain step"]
    stopped: dict[int, int]
    settings: RunRecord
    notes: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()
    theory: Theory | None = None
    observed: dict[str, Observed] = field(default_factory=dict)

    @property
    def loss_trace(self) -> Float[np.ndarray, "chain draw"]:
        """L_m(w_t) at the draws, nats per example."""
        return self.traces.loss

    @property
    def baseline_trace(self) -> Float[np.ndarray, "chain draw"]:
        """The loss at w* that is subtracted from ``loss_trace``, nats per example."""
        return self.traces.baseline

    @functools.cached_property
    def kept_chains(self) -> Int[np.ndarray, " kept"]:
        """Indices of the chains that stayed finite."""
        return np.array([c for c in range(len(self.traces.loss)) if c not in self.stopped], dtype=int)

    @functools.cached_property
    def llc_draws(self) -> Float64[np.ndarray, "kept draw"]:
        """nbeta (L_m(w_t) - L_m(w*)) of the chains that stayed finite, float64."""
        gap = self.traces.loss.astype(np.float64) - self.traces.baseline.astype(np.float64)
        return self.settings.nbeta * gap[self.kept_chains]

    @property
    def llc_raw(self) -> float:
        """nbeta (E[L_n(w)] - L_n(w*)): the mean over chains and draws; NaN when no chain stayed finite."""
        return float(self.llc_draws.mean()) if self.llc_draws.size else math.nan

    @property
    def llc(self) -> float:
        """``llc_raw`` less the bias of step size and minibatch noise, where that is small enough to be subtracted."""
        return self.llc_raw - self.bias.applied

    @functools.cached_property
    def also(self) -> dict[str, Reading]:
        """What the further data sets read at the same draws, by name."""
        return {name: self._other(k) for k, name in enumerate(self.other_names)}

    def _other(self, k: int) -> Reading:
        loss, baseline, gap_var = np.moveaxis(self.traces.also[self.kept_chains, :, k], -1, 0)
        return Reading(loss, baseline, gap_var, self.settings.nbeta)

    @functools.cached_property
    def effective_dimension(self) -> EffectiveDimension | None:
        """What was given to ``with_effective_dimension``."""
        written = self.settings.effective_dimension
        return EffectiveDimension.from_dict(written) if written else None

    def with_effective_dimension(self, found: EffectiveDimension) -> "LLCResult":
        """The same result with an ``effective_dimension`` beside it, at the result's nbeta and localization.

        ``print``, the page of ``report`` and the saved file then have it.

        Raises:
            ValueError: it is one of another number of weights.
        """
        return dataclasses.replace(self, settings=beside(found, self.settings))

    @functools.cached_property
    def bias(self) -> Bias:
        """What step size and minibatch noise add to ``llc_raw``, to first order."""
        kept = self.kept_chains
        if not kept.size:
            return Bias(math.nan, math.nan, math.nan, 0.0, "no chain stayed finite")
        if self.settings.nbeta == 0:
            return Bias(0.0, 0.0, 0.0, 0.0, "nbeta = 0")
        return self._theory.bias(self._moments)

    @property
    def _theory(self) -> Theory:
        return theory_of(self.settings.family) if self.theory is None else self.theory

    @property
    def _moments(self) -> Moments:
        s, t, kept = self.settings, self.traces, self.kept_chains
        pull = np.where(np.isnan(t.pull), t.virial, t.pull)
        drift_sq, pull = (float(x[kept].mean(dtype=np.float64)) for x in (t.drift_sq, pull))
        return Moments(
            raw=self.llc_raw,
            drift_sq=drift_sq - s.localization * pull,
            heat=self._heat,
            noise=s.gradient_noise,
            step_size=s.step_size,
            friction=0.1 if s.friction is None else s.friction,
            control_variate=s.control_variate,
            with_loss=covariance_with_loss(self.llc_draws, t.gap_var[kept], t.drift_sq[kept], s.nbeta),
            degree=self._degree.value,
        )

    @functools.cached_property
    def _heat(self) -> Slope:
        kinetic = self.traces.kinetic[self.kept_chains]
        return Slope(*thermometer(kinetic, self.settings.num_free, ess_and_rhat(kinetic)[0]))

    @functools.cached_property
    def _degree(self) -> Slope:
        t, kept = self.traces, self.kept_chains
        return degree_of(self.llc_draws, t.virial[kept], t.distance_sq[kept], self.settings.localization)

    @functools.cached_property
    def _hot(self) -> np.ndarray:
        """Which of the kept chains started hot."""
        return (self.kept_chains % 2 == 1) & (self.settings.hot > 1)

    @functools.cached_property
    def _spread(self) -> tuple[Rise, Slope]:
        """(how the chains that started at w* rose, where they would end)."""
        cold = ~self._hot
        chains, draws = self.kept_chains[cold], self.llc_draws[cold]
        return rise_and_end(
            self.settings,
            self._theory,
            self.warmup_loss[chains],
            self.traces.baseline[chains].astype(np.float64),
            draws,
        )

    @functools.cached_property
    def health(self) -> Health:
        """Convergence numbers and the verdict."""
        if not self.kept_chains.size:
            cause, step = self.settings.probe.get("stopped_by", ""), self.settings.chosen_step
            stopped = Evidence(num_stopped=len(self.stopped), stopped_by=cause, chosen_step=step)
            return assess(self.llc_draws, stopped)
        if self.settings.nbeta == 0:
            return self._health_of_control
        return assess(self.llc_draws, self._evidence)

    @property
    def _health_of_control(self) -> Health:
        return health_of_control(self.settings, self.traces, self.kept_chains, len(self.stopped))

    @property
    def _evidence(self) -> Evidence:
        s, t, kept = self.settings, self.traces, self.kept_chains
        drift_sq, virial, kinetic = (x[kept].mean(dtype=np.float64) for x in (t.drift_sq, t.virial, t.kinetic))
        excess = self._theory.virial_excess
        expected = s.num_free + (excess(s.step_size, drift_sq) if excess else 0.0)
        away, cool = t.distance_sq[kept], 1.0
        if self.bias.applied:
            cool = self.llc / self.llc_raw  # the heat is spread like the draws
        rise, end = self._spread
        by_nbeta, by_pull = slopes(cool * self.llc_draws, cool**2 * t.gap_var[kept], away, s.nbeta, s.localization)
        return Evidence(
            virial=float(virial / expected),
            kinetic=float(kinetic),
            acceptance=s.probe.get("acceptance", math.nan),
            bias=self.bias,
            nbeta_slope=by_nbeta,
            localization_slope=by_pull,
            degree=self._degree,
            localized_share=float(1 - (virial - s.localization * away.mean(dtype=np.float64)) / s.num_free),
            hot=self._hot,
            num_stopped=len(self.stopped),
            stopped_by=s.probe.get("stopped_by", ""),
            num_free=s.num_free,
            metric=s.metric,
            heat=self._heat,
            rise=rise,
            end=end,
            tilt=tilt_of(t.tilt[kept], s.nbeta),
            unrelaxed_bias=s.probe.get("owed", math.nan),
            times_longer=s.probe.get("longer", math.nan),
            spacing=s.nbeta * spacing_of(self.init_loss),
            example_spread=self._example_spread,
            scatter=self._scatter,
            chosen_step=s.chosen_step,
            expected=s.probe.get("expected", math.nan),
            hidden=s.probe.get("hidden", 0),
            hides=s.probe.get("hides", math.nan) if s.calibration.get("by_curvature") else math.nan,
            scatter_error=math.sqrt(self._scatter * self.llc_draws.var() / self.llc_draws.size),
            gradients=sum(s.spent.values()) or math.nan,
            loss=float(t.loss[kept].mean(dtype=np.float64)),
            chance_loss=math.nan if s.chance_loss is None else s.chance_loss,
        )

    @functools.cached_property
    def _scatter(self) -> float:
        """Share of the variance of the draws that is minibatch noise; NaN where it is not known."""
        noise = self.traces.gap_var[self.kept_chains].mean(dtype=np.float64)
        return float(self.settings.nbeta**2 * noise / max(self.llc_draws.var(), 1e-300))

    @property
    def _example_spread(self) -> float:
        """nbeta times the standard deviation of L_i(w) - L_i(w*) over examples i; NaN where it is not known."""
        if self.settings.baseline != "paired":
            return 0.0  # the spread that was recorded is that of the losses themselves
        variance = self.traces.gap_var[self.kept_chains].mean(dtype=np.float64)
        return self.settings.nbeta * math.sqrt(self.settings.batch_size * variance)

    @property
    def llc_stderr(self) -> float:
        """Standard error of ``llc``: that of ``llc_raw``, and that of the correction where one is subtracted."""
        error = self.llc_raw_stderr
        return math.hypot(error, self.bias.stderr) if self.bias.applied else error

    @property
    def llc_raw_stderr(self) -> float:
        """Standard error of ``llc_raw``: pooled standard deviation over the root of ``ess``.

        Where minibatch noise is most of the variance of the draws, that of their means over blocks if it is larger.
        """
        return error_of_mean(self.llc_draws, self.ess, self._scatter) if self.llc_draws.size else math.nan

    @property
    def ess(self) -> float:
        """Effective sample size: the number of independent draws that those of all chains are worth."""
        return self.health.ess

    @property
    def rhat(self) -> float:
        """R-hat: near 1 if the chains, and the halves of each, agree."""
        return self.health.rhat

    @property
    def verdict(self) -> str:
        """The first fault that was found, or "converged"; ``health.reason`` says more."""
        return self.health.verdict

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the run before it had all its draws; estimate and verdict are of those it has."""
        return bool(self.settings.interrupted)

    @property
    def init_loss(self) -> float:
        """Mean of the loss at w* that was subtracted."""
        kept = self.traces.baseline[self.kept_chains]
        return float(kept.mean(dtype=np.float64)) if kept.size else math.nan

    @property
    def wbic(self) -> float:
        """Watanabe's n E[L_n(w)], nats; NaN unless nbeta is num_data / log(num_data), for which it is defined.

        Source: Watanabe, JMLR 14 (2013), 867-897.
        """
        n, kept = self.settings.num_data, self.traces.loss[self.kept_chains]
        if not kept.size or not math.isclose(self.settings.nbeta, n / math.log(n), rel_tol=1e-6):
            return math.nan
        return n * float(kept.mean(dtype=np.float64))

    def estimate_text(self, sign: str) -> str:
        """Estimate and error bar in words, with a * unless the verdict is "converged"."""
        return marked(estimate_text(self.llc, self.llc_stderr, sign), self.verdict)

    def __repr__(self) -> str:
        return f"<LLCResult: LLC {self.estimate_text('+/-')}, {self.verdict}; {self._size_text()}>"

    def _size_text(self) -> str:
        chains, draws = len(self.kept_chains), self.traces.loss.shape[1]
        text = f"{chains} chain{'s' * (chains != 1)} x {draws:,} draws, R-hat {self.rhat:.3f}, ESS {self.ess:,.0f}"
        return text + (f", interrupted (of {self.settings.interrupted:,} draws)" if self.interrupted else "")

    def _repr_html_(self) -> str:
        lines = [self.health.reason, self._size_text(), *(f"Note: {note}" for note in self.notes[:3])]
        baseline = self.init_loss if math.isfinite(self.init_loss) else None
        losses = self.traces.loss[self.kept_chains] if self.kept_chains.size else self.traces.loss
        picture = sparkline(losses[:6], "the loss of each chain at its draws; dashed: the loss at w*", baseline)
        return card(f"LLC {self.estimate_text('±')}", self.verdict, lines, picture, tone_color(self.verdict))

    def __str__(self) -> str:
        s, h = self.settings, self.health
        losses = self.traces.loss[self.kept_chains]
        around = np.nanmean(losses) if len(losses) else math.nan
        lines = [
            f"LLC {self.estimate_text('+/-')}  ({len(losses)} chains x {losses.shape[1]} draws, "
            f"R-hat {h.rhat:.3f}, ESS {h.ess:.0f})",
            f"Verdict: {h.verdict}: {h.reason}",
            interrupted_line(s),
            f"Loss {self.init_loss:.5g} at w*, {around:.5g} around it (nats per example); {signs_text(h)}.",
            bias_line(self.llc_raw, self.bias),
            settings_line(s),
            *(other.line(name) for name, other in self.also.items()),
            self.effective_dimension.line(self.llc, self.llc_stderr) if self.effective_dimension is not None else "",
            cost_line(s.cost, s.memory.get("total_mib")),
            stopped_line(self.stopped, len(self.traces.loss)),
            *(f"Note: {note}" for note in self.notes),
        ]
        return "\n".join(filter(None, lines))

    def to_dict(self) -> dict[str, Any]:
        """The numbers, the verdict and the settings, for JSON; NaN becomes None."""
        h = self.health
        numbers = {
            "llc": self.llc, "llc_stderr": self.llc_stderr, "init_loss": self.init_loss, "wbic": self.wbic,
            "llc_raw": self.llc_raw, "bias_step_size": self.bias.step_size, "bias_noise": self.bias.noise,
            **h.numbers(self.llc),
        }  # fmt: skip
        plain = {k: (v if math.isfinite(v) else None) for k, v in numbers.items()}
        stopped = {str(k): v for k, v in self.stopped.items()}
        return {
            **plain,
            "verdict": h.verdict,
            "reason": h.reason,
            "flags": list(h.flags),
            "interrupted": self.interrupted,
            "stopped": stopped,
            "also": {name: other.to_dict() for name, other in self.also.items()},
            "settings": self.settings.to_json(),
        }

    def to_xarray(self) -> "xr.DataTree":
        """DataTree for ArviZ: ``az.summary(result.to_xarray())``, ``az.plot_trace(...)``.

        The group ``posterior`` has ``llc``, ``loss`` and ``distance`` (from w*) at each draw of the chains that stayed
        finite; ``sample_stats`` all traces (chain, draw), ``warmup_sample_stats`` the loss before them (chain, step),
        with further data sets, ``also_sample_stats`` (data_set, chain, draw), and for each observable a group
        ``observed_0``, ``observed_1``, ... with its ``values`` (chain, draw, example, ...) or their moments.
        """
        return tree_of(
            self.traces, self.warmup_loss, self.stopped, self.settings, notes=self.notes, other_names=self.other_names,
            observed=self.observed,
        )  # fmt: skip

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Write the traces and settings as zarr. Raises FileExistsError on an existing path, and OSError."""
        return write(self.to_xarray(), path, RESULT, overwrite=overwrite)

    def plot(self, path: str | os.PathLike | None = None):
        """Loss traces by chain and the running estimate; written to ``path`` if given.

        Returns the figure, which a notebook shows.
        """
        from slt_jax.report.traces import plot_result

        return plot_result(self, path)

    def report(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Write everything as one self-contained HTML page."""
        from slt_jax.report.write import write_report

        return write_report(self, path, overwrite=overwrite)


def load_result(path: str | os.PathLike) -> LLCResult:
    """Read what ``LLCResult.save`` wrote. Raises FileNotFoundError, or ValueError for a foreign or truncated file."""
    return load(path, RESULT, lambda tree: LLCResult(**fields_of(tree)))
