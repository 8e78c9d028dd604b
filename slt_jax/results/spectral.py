"""The effective dimension: the LLC of the quadratic posterior, with its errors and where it comes from."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from slt_jax._checks import check_positive
from slt_jax.diagnostics.quadrature import Coefficients, Trace, from_eigenvalues, from_lanczos
from slt_jax.results.record import RunRecord

MATRICES = {"gauss-newton": "Gauss-Newton matrix", "hessian": "Hessian"}


@dataclass(frozen=True, repr=False, eq=False)
class EffectiveDimension:
    """1/2 tr[nbeta H (nbeta H + localization)^-1]: the LLC of the posterior if its loss were quadratic around w*.

    ``curvature``: which matrix H is, ``"gauss-newton"`` or ``"hessian"``, of the mean loss over ``num_examples``
    examples, in nats. ``num_free``: d, its dimension. ``eigenvalues``: all of H, ascending; None if ``coefficients``,
    those of Lanczos' iteration, are given. ``epsilon``: rounding of eigenvalues near 0, in units of H. ``precision``:
    the type that H was computed in. ``notes``: what went wrong without touching the number.
    """

    curvature: str
    nbeta: float
    localization: float
    num_free: int
    num_examples: int
    eigenvalues: Float64[np.ndarray, " d"] | None = None
    coefficients: Coefficients | None = None
    epsilon: float = 0.0
    precision: str = "float32"
    seconds: float = math.nan
    devices: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def trace(self) -> Trace:
        """Half of the trace, its errors, and the negative part of the spectrum."""
        if self.eigenvalues is not None:
            return from_eigenvalues(self.eigenvalues, self.epsilon, self.nbeta, self.localization)
        assert self.coefficients is not None
        semidefinite = self.curvature == "gauss-newton"
        return from_lanczos(
            self.coefficients, self.epsilon, self.nbeta, self.localization, semidefinite=semidefinite
        )  # fmt: skip

    @property
    def value(self) -> float:
        """The effective dimension. Negative eigenvalues count 0."""
        return self.trace.value

    @property
    def stderr(self) -> float:
        """The errors of ``trace`` together: random probes, truncation, rounding."""
        return math.hypot(self.trace.probes, self.trace.truncation, self.trace.rounding)

    @property
    def bounds(self) -> tuple[float, float]:
        """Where the value is for these probes: between the quadratures that bound it from below and above."""
        return self.value - self.trace.truncation, self.value + self.trace.truncation

    @property
    def is_exact(self) -> bool:
        """Whether it is a sum over all eigenvalues."""
        return self.eigenvalues is not None

    @property
    def order(self) -> int | None:
        """Steps of Lanczos' iteration; None where the value is exact."""
        return None if self.coefficients is None else self.coefficients.diagonal.shape[1]

    @property
    def probes(self) -> int | None:
        """Random vectors; None where the value is exact."""
        return None if self.coefficients is None else self.coefficients.diagonal.shape[0]

    @property
    def negative_count(self) -> float:
        """Negative eigenvalues of H beyond rounding; where the value is not exact, how many at least."""
        return self.trace.negative

    @property
    def negative_share(self) -> float:
        """Their share of the sum of the absolute values of all eigenvalues."""
        return self.trace.negative_share

    def at(self, *, nbeta: float | None = None, localization: float | None = None) -> "EffectiveDimension":
        """The same spectrum at another nbeta or localization. It costs nothing.

        Raises:
            TypeError, ValueError: a number that is not positive.
        """
        numbers = {"nbeta": nbeta, "localization": localization}
        given = {name: value for name, value in numbers.items() if value is not None}
        for name, value in given.items():
            check_positive(name, value, "It is a number of the posterior.")
        return dataclasses.replace(self, **{name: float(value) for name, value in given.items()})

    def text(self, sign: str) -> str:
        """The value with its error, as far as it has one."""
        if self.stderr < 1e-4 * self.value:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} {sign} {self.stderr:.2g}"

    def __repr__(self) -> str:
        matrix = MATRICES[self.curvature]
        return f"<EffectiveDimension: {self.text('+/-')} of {self.num_free:,} weights, by the {matrix} at w*>"

    def __str__(self) -> str:
        lines = [
            f"Effective dimension {self.text('+/-')}, by the {MATRICES[self.curvature]} at w* of {self.num_free:,} "
            f"weights, over {self.num_examples:,} examples.",
            f"It is the LLC at nbeta {self.nbeta:.4g} and localization {self.localization:.3g} if the loss were "
            "quadratic around w*. What an LLC differs by is due to curvature away from w*.",
            self.method_text,
        ]
        if self.has_negative:
            lines.append(self.negative_text)
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    @property
    def method_text(self) -> str:
        """How it was computed, and the parts of its error, in words."""
        if self.is_exact:
            text = f"Exact: the sum over all eigenvalues, in {self.precision}"
            return f"{text}; rounding +/- {self.trace.rounding:.2g}." if self.trace.rounding > 1e-6 else f"{text}."
        errors = f"+/- {self.trace.probes:.2g} by the probes, +/- {self.trace.truncation:.2g} by the order"
        many = "probe" if self.probes == 1 else "probes"
        return (
            f"Stochastic Lanczos quadrature of order {self.order} with {self.probes} random {many}, in "
            f"{self.precision}: {errors}."
        )

    @property
    def has_negative(self) -> bool:
        """Whether there are negative eigenvalues beyond rounding."""
        return self.negative_share > 0

    @property
    def negative_text(self) -> str:
        """The negative eigenvalues in words."""
        about = "" if self.is_exact else "At least about "
        verb = "is" if self.is_exact and self.negative_count == 1 else "are"
        return (
            f"{about}{self.negative_count:,.0f} of {self.num_free:,} eigenvalues {verb} negative, with "
            f"{self.negative_share:.2g} of the sum of all absolute values; they count 0."
        )

    def below(self, llc: float, llc_stderr: float, sign: str) -> str:
        """What an LLC of the same posterior has more, with its error."""
        return f"{llc - self.value:+.3g} {sign} {math.hypot(llc_stderr, self.stderr):.2g}"

    def line(self, llc: float, llc_stderr: float) -> str:
        """For a text about an estimate of the same posterior."""
        return (
            f"Effective dimension {self.text('+/-')} by the {MATRICES[self.curvature]} at w*; LLC less that: "
            f"{self.below(llc, llc_stderr, '+/-')}, due to curvature away from w*."
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers, and all that ``from_dict`` needs, as plain values for JSON."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            **{f"stderr_{name}": getattr(self.trace, name) for name in ("probes", "truncation", "rounding")},
            "negative_count": self.negative_count,
            "negative_share": self.negative_share,
            "order": self.order,
            "probes": self.probes,
            **{field: getattr(self, field) for field in _PLAIN},
            "seconds": self.seconds if math.isfinite(self.seconds) else None,
            "notes": list(self.notes),
            "eigenvalues": None if self.eigenvalues is None else self.eigenvalues.tolist(),
            "lanczos": _plain(self.coefficients),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EffectiveDimension":
        """What ``to_dict`` wrote."""
        eigenvalues, lanczos, seconds = values["eigenvalues"], values["lanczos"], values["seconds"]
        return cls(
            **{field: values[field] for field in _PLAIN},
            seconds=math.nan if seconds is None else seconds,
            notes=tuple(values["notes"]),
            eigenvalues=None if eigenvalues is None else np.array(eigenvalues, np.float64),
            coefficients=None if lanczos is None else _coefficients(lanczos),
        )


_PLAIN = (
    "curvature", "nbeta", "localization", "num_free", "num_examples", "epsilon", "precision", "devices", "versions",
)  # fmt: skip


def _plain(coefficients: Coefficients | None) -> dict[str, Any] | None:
    if coefficients is None:
        return None
    return {name: np.asarray(value).tolist() for name, value in coefficients._asdict().items()}


def _coefficients(values: dict[str, Any]) -> Coefficients:
    arrays = {name: np.array(values[name], np.float64) for name in ("diagonal", "beside")}
    return Coefficients(**arrays, dimension=int(values["dimension"]), epsilon=float(values["epsilon"]))


def beside(found: EffectiveDimension, settings: RunRecord) -> RunRecord:
    """The settings of a result with ``found``, at their nbeta and localization. Raises ValueError for another model."""
    if found.num_free != settings.num_free:
        raise ValueError(
            f"the effective dimension is of {found.num_free:,} free weights, the result of {settings.num_free:,}. "
            "Take both of one posterior."
        )
    here = found.at(nbeta=settings.nbeta, localization=settings.localization)
    return dataclasses.replace(settings, effective_dimension=here.to_dict())
