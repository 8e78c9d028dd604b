"""The loss of a further data set at the draws of a run."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from slt_jax.diagnostics.series import ess_and_rhat, standard_error
from slt_jax.results.text import estimate_text

READINGS = ("loss_trace", "baseline_trace", "gap_var")


@dataclass(frozen=True)
class Reading:
    """The loss of a further data set at the draws of a run, of the chains that stayed finite.

    ``llc`` is nbeta (E[L'(w)] - L'(w*)), with w from the posterior of the run's own data. The bias from the step size
    and minibatch noise is not known for it: compare it with ``llc_raw`` of the result.
    """

    loss_trace: Float[np.ndarray, "chain draw"]
    baseline_trace: Float[np.ndarray, "chain draw"]
    gap_var: Float[np.ndarray, "chain draw"]
    nbeta: float

    def __repr__(self) -> str:
        return f"<Reading: LLC {estimate_text(self.llc, self.llc_stderr, '+/-')}, R-hat {self.rhat:.3f}>"

    def line(self, name: str) -> str:
        """The estimate in words; ``name``: of the data set."""
        estimate = estimate_text(self.llc, self.llc_stderr, "+/-")
        return (
            f"On '{name}': {estimate} (R-hat {self.rhat:.3f}), with loss {self.init_loss:.5g} at w*; compare with the "
            "raw estimate."
        )

    @functools.cached_property
    def llc_draws(self) -> Float64[np.ndarray, "chain draw"]:
        """nbeta (L'_m(w_t) - L'_m(w*))."""
        return self.nbeta * (self.loss_trace.astype(np.float64) - self.baseline_trace.astype(np.float64))

    @property
    def llc(self) -> float:
        """The estimate; NaN if no chain stayed finite."""
        return float(self.llc_draws.mean()) if self.llc_draws.size else math.nan

    @functools.cached_property
    def _ess_and_rhat(self) -> tuple[float, float]:
        return ess_and_rhat(self.llc_draws) if self.llc_draws.size else (math.nan, math.nan)

    @property
    def ess(self) -> float:
        """Effective sample size of ``llc_draws``."""
        return self._ess_and_rhat[0]

    @property
    def rhat(self) -> float:
        """Rank-normalized split R-hat of ``llc_draws``."""
        return self._ess_and_rhat[1]

    @property
    def llc_stderr(self) -> float:
        """Standard error of ``llc``, from ``ess``."""
        return standard_error(self.llc_draws, self.ess) if self.llc_draws.size else math.nan

    @property
    def init_loss(self) -> float:
        """Mean of the loss at w*."""
        return float(self.baseline_trace.mean(dtype=np.float64)) if self.baseline_trace.size else math.nan

    def to_dict(self) -> dict[str, float | None]:
        """The numbers, for JSON; NaN becomes None."""
        numbers = {name: getattr(self, name) for name in ("llc", "llc_stderr", "rhat", "ess", "init_loss")}
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
