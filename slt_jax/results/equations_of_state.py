"""Generalization error from the draws of one run: singular fluctuation, functional variance, WAIC, WBIC."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from slt_jax.diagnostics.estimate import Estimate
from slt_jax.diagnostics.series import ess_and_rhat, standard_error
from slt_jax.results.averages import LARGE, Averages, averages_of
from slt_jax.results.card import card, tone_color
from slt_jax.results.chain_variance import variance_between_chains
from slt_jax.results.llc import LLCResult
from slt_jax.results.observed import Observed, observed_of

_FAR = 2.0  # nbeta / n beyond this factor is no longer called the Bayes posterior
_MANY = 0.01  # share of large variances from which the Bayes numbers are called in doubt
_TOKENS_DIFFER = 0.2
_UNSHOWN = ("functional_variance_between_chains",)  # on screen: a second estimate of V
_LABELS = {
    "llc": "learning coefficient (LLC)",
    "fluctuation": "singular fluctuation nu",
    "functional_variance": "functional variance V",
    "functional_variance_of_tokens": "V, tokens taken one by one",
    "gibbs_train": "Gibbs training loss",
    "gibbs_predicted": "Gibbs generalization loss, predicted",
    "gibbs_heldout": "Gibbs generalization loss, held out",
    "bayes_train": "Bayes training loss",
    "waic": "Bayes generalization loss, predicted (WAIC)",
    "bayes_heldout": "Bayes generalization loss, held out",
    "wbic": "WBIC",
    "large_share": f"share with Var(loss) > {LARGE}",
}


@dataclass(frozen=True, kw_only=True)
class Generalization:
    """What the draws of a run predict for new data. Losses are in nats per example (per token at token level).

    Each number has its Monte Carlo error: that of a finite number of draws, and of having observed ``num_examples`` of
    ``num_data`` examples. It does not contain how much the training set itself varies. A number that is None has its
    reason in ``missing``.

    Attributes:
        llc: lambda, as in the result.
        fluctuation: nu = (beta / 2) V. It is that of the theory if the loss is a calibrated log loss.
        functional_variance: V, the sum of Var(l_i) over all training examples, where l_i of a text is the sum over its
            tokens; nats^2.
        functional_variance_of_tokens: the sum of Var(l) over all single tokens, equal to V to first order if the model
            is calibrated. None at the level of examples.
        functional_variance_between_chains: V from the differences of the chains at each draw, which a slow chain does
            not make too small. None for one chain, or where only moments were kept.
        gibbs_train, gibbs_predicted, gibbs_heldout: mean loss over the draws: on the training set, predicted for new
            data (training plus beta V / n), and on the held-out set.
        bayes_train, waic, bayes_heldout: the same of the loss of the mean predictive distribution.
        wbic: n times the mean loss, nats; only at nbeta = n / log n.
        large_share: the share of examples (tokens) with Var(l_i) above 0.4.
        beta: nbeta over the number of training examples (tokens).
        heat: factor by which V and all excesses over the loss at w* were multiplied for the bias of step size and
            minibatch noise.
        ess: effective number of draws, of the loss of one example.
        flags: what stands against these numbers, in sentences.
    """

    llc: Estimate
    fluctuation: Estimate
    functional_variance: Estimate
    functional_variance_of_tokens: Estimate | None
    functional_variance_between_chains: Estimate | None
    gibbs_train: Estimate
    gibbs_predicted: Estimate
    gibbs_heldout: Estimate | None
    bayes_train: Estimate | None
    waic: Estimate | None
    bayes_heldout: Estimate | None
    wbic: Estimate | None
    large_share: Estimate
    level: str
    beta: float
    nbeta: float
    num_data: int
    num_examples: int
    heat: float
    ess: float
    flags: tuple[str, ...]
    missing: dict[str, str]

    def numbers(self) -> dict[str, Estimate]:
        """The numbers that are known, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Estimate)}

    def to_dict(self) -> dict[str, Any]:
        """The numbers with their errors and what is known about them, for JSON; NaN becomes None."""
        found = {name: {"value": _plain(x.value), "stderr": _plain(x.stderr)} for name, x in self.numbers().items()}
        settings = {name: _plain(getattr(self, name)) for name in ("beta", "nbeta", "heat", "ess")}
        rest = {name: getattr(self, name) for name in ("level", "num_data", "num_examples", "missing")}
        return {**found, **settings, **rest, "flags": list(self.flags)}

    def __repr__(self) -> str:
        nu, gibbs = self.fluctuation, self.gibbs_predicted
        flags = f"; {len(self.flags)} caution{'s' * (len(self.flags) > 1)}" if self.flags else ""
        return f"<Generalization: nu {nu}, Gibbs loss on new data {gibbs}{flags}>"

    def __str__(self) -> str:
        unit = "token" if self.level == "token" else "example"
        shown = ((name, x) for name, x in self.numbers().items() if name not in _UNSHOWN)
        lines = [f"{_LABELS[name]:<46}{_text(x)}{self._unit(name, unit)}" for name, x in shown]
        lines += [f"{_LABELS[name]:<46}not known: {why}" for name, why in self.missing.items()]
        lines.append(self._size())
        return "\n".join([*lines, *(f"Caution: {flag}" for flag in self.flags)])

    @staticmethod
    def _unit(name: str, unit: str) -> str:
        if name in ("llc", "fluctuation", "large_share"):
            return ""
        return " nats" if name == "wbic" else " nats^2" if name.startswith("functional") else f" nats per {unit}"

    def _size(self) -> str:
        heat = f"; heat of the sampler removed, factor {self.heat:.3f}" if self.heat != 1 else ""
        return (
            f"From {self.num_examples:,} of {self.num_data:,} examples at beta {self.beta:.3g} (nbeta "
            f"{self.nbeta:.4g}); effective draws {self.ess:,.0f}{heat}."
        )

    def _repr_html_(self) -> str:
        unit = "token" if self.level == "token" else "example"
        lines = [
            f"{_LABELS[name]}: {_text(x, '±')}{self._unit(name, unit)}"
            for name, x in self.numbers().items()
            if name not in ("fluctuation", *_UNSHOWN)
        ]
        notes = [f"Caution: {flag}" for flag in self.flags]
        verdict = f"{len(notes)} caution{'s' * (len(notes) > 1)}" if notes else "no cautions"
        color = tone_color("depends on nbeta or localization" if notes else "converged")
        return card(
            f"Singular fluctuation {_text(self.fluctuation, '±')}", verdict, [*lines, self._size(), *notes], "", color
        )


def generalization(
    result: LLCResult | None, train: str | Observed, heldout: str | Observed | None = None
) -> Generalization:  # fmt: skip
    """Singular fluctuation, and the generalization loss that the equations of state predict.

    With n training examples, losses l_i, <.> the mean over the posterior exp(-n beta L_n(w)), and nu = (beta / 2) V,

        V = sum_i Var(l_i),   Gibbs training Gt = <L_n>,   Bayes training Bt = -(1/n) sum_i log <exp(-l_i)>,
        Gibbs generalization  Gg ~ Gt + beta V / n,   Bayes generalization  Bg ~ WAIC = Bt + beta V / n.

    For a realizable, calibrated log loss the mean excess over the loss of the truth is (lambda / beta + nu) / n for Gg
    and (lambda / beta - nu) / n for Gt. nu is no variance of the mean loss: nbeta^2 Var(L_n), which
    ``variance_estimator`` has, tends to lambda and not to nu.

    Variances are corrected for the number of draws. The bias of step size and minibatch noise that ``result.bias``
    removes from the LLC multiplies V and the excess losses alike, to first order, and is removed from them.

    Args:
        result: of a run that observed the data sets, ``estimate_llc(observe=...)``; None for an ``Observed`` from
            elsewhere, whose LLC is then nbeta times its mean gap.
        train: name of the observed training examples, drawn at random from the training set; or an ``Observed``. For
            text observe tokens: the mean over the tokens of a text is no log loss.
        heldout: name of observed examples that were not trained on; None without.

    Returns:
        The numbers with their Monte Carlo errors. Bayes numbers are None where only moments of the losses were kept.

    Raises:
        ValueError: a name that was not observed; observables that are not losses; values that are not finite; held-out
            data of another level; fewer than two draws, or none because no chain stayed finite.
        TypeError: something else than a result or a name.

    Error: WAIC and Gg ~ Gt + beta V / n neglect terms of order 1 / n^2, and WAIC the third cumulants of l_i, which are
    not small where Var(l_i) > 0.4; ``flags`` reports that. Errors from draws assume that a block, an eighth of a
    chain's draws, is long against their correlation time.

    Source: Watanabe, Equations of states in singular statistical estimation, Neural Networks 23 (2010), 20-34, and
    JMLR 11 (2010), 3571-3594; WBIC: JMLR 14 (2013), 867-897.
    """
    seen = _losses_of(result, train, "train")
    tested = None if heldout is None else _losses_of(result, heldout, "heldout")
    if tested is not None and tested.center.ndim != seen.center.ndim:
        raise ValueError(
            f"train is of level {seen.level!r} and heldout of {tested.level!r}. Observe both at one level."
        )
    heat, heat_error = _heat(result)
    raw = averages_of(seen)
    if not math.isfinite(raw.center):
        heat, heat_error = 1.0, 0.0
    found, units = raw.cooled(heat), seen.num_data * raw.per_example
    new = None if tested is None else _Hot(averages_of(tested).cooled(heat), heat_error / heat, 1.0)
    beta, missing = seen.nbeta / units, dict[str, str]()
    by_example = "summed" if math.isfinite(found.values[2]) else "variance"
    hot = _Hot(found, heat_error / heat, max(0.0, 1 - found.num_examples / seen.num_data))
    variance = hot.combined({by_example: 1.0})
    correction, between = {by_example: beta}, variance_between_chains(seen)
    return Generalization(
        llc=_llc_of(result, seen),
        fluctuation=_times(variance, units * beta / 2),
        functional_variance=_times(variance, units),
        functional_variance_of_tokens=_times(hot.combined({"variance": 1.0}), units) if seen.level == "token" else None,
        functional_variance_between_chains=None if between is None else _times(between, seen.num_data * heat),
        gibbs_train=hot.combined({"gibbs": 1.0}),
        gibbs_predicted=hot.combined({"gibbs": 1.0, **correction}),
        gibbs_heldout=None if new is None else new.combined({"gibbs": 1.0}),
        bayes_train=_bayes(hot, {"bayes": 1.0}, "bayes_train", missing),
        waic=_bayes(hot, {"bayes": 1.0, **correction}, "waic", missing),
        bayes_heldout=None if new is None else _bayes(new, {"bayes": 1.0}, "bayes_heldout", missing),
        wbic=_wbic(result, seen, missing),
        large_share=hot.combined({"large": 1.0}),
        level=seen.level,
        beta=beta,
        nbeta=seen.nbeta,
        num_data=seen.num_data,
        num_examples=found.num_examples,
        heat=heat,
        ess=found.ess,
        flags=tuple(_flags(found, seen, hot.combined({"large": 1.0}).value, bool(np.isfinite(found.values[3])))),
        missing=missing,
    )


@dataclass(frozen=True)
class _Hot:
    """Averages with the error of the factor by which they were cooled. ``sampled``: see ``Averages.combined``."""

    averages: Averages
    error: float
    sampled: float

    def combined(self, weights: dict[str, float]) -> Estimate:
        value, stderr = self.averages.combined(self.sampled, **weights)
        losses = sum(weights.get(name, 0.0) for name in ("gibbs", "bayes"))
        excess = value - (losses * self.averages.center if losses and self.error else 0.0)
        return Estimate(value, math.hypot(stderr, self.error * excess))


def _times(x: Estimate, factor: float) -> Estimate:
    return Estimate(factor * x.value, factor * x.stderr)


def _losses_of(result: LLCResult | None, which: Any, argument: str) -> Observed:
    seen = observed_of(result, which, argument)
    if seen.level not in ("example", "token"):
        raise ValueError(
            f"{argument}={seen.name!r} is a custom observable, and the equations of state are about losses. Observe "
            "the data without a function of your own, or give the Observable level='example' if its function returns "
            "the loss of each example."
        )
    return seen


def _heat(result: LLCResult | None) -> tuple[float, float]:
    """By what factor to multiply what the sampler's heat has multiplied, and the standard error of that."""
    if result is None or not result.bias.applied or not result.llc_raw:
        return 1.0, 0.0
    return result.llc / result.llc_raw, result.bias.stderr / abs(result.llc_raw)


def _llc_of(result: LLCResult | None, seen: Observed) -> Estimate:
    if result is not None:
        return Estimate(result.llc, result.llc_stderr)
    draws = seen.nbeta * seen.gap.astype(np.float64)
    return Estimate(float(draws.mean()), standard_error(draws, ess_and_rhat(draws)[0]))


def _bayes(hot: _Hot, weights: dict[str, float], name: str, missing: dict[str, str]) -> Estimate | None:
    if not math.isfinite(hot.averages.values[3]):
        missing[name] = "only moments of the losses were kept, and it needs their values"
        return None
    return hot.combined(weights)


def _wbic(result: LLCResult | None, seen: Observed, missing: dict[str, str]) -> Estimate | None:
    if result is None or math.isnan(result.wbic):
        n = seen.num_data
        asked = f"it is defined at nbeta = n / log n = {n / math.log(max(n, 2)):.4g}, and nbeta is {seen.nbeta:.4g}"
        missing["wbic"] = "it needs the result of a run" if result is None else asked
        return None
    losses = result.traces.loss[result.kept_chains].astype(np.float64)
    return Estimate(result.wbic, seen.num_data * standard_error(losses, ess_and_rhat(losses)[0]))


def _flags(found: Averages, seen: Observed, large: float, bayes: bool) -> Iterator[str]:
    n, what = seen.num_data * found.per_example, "tokens" if seen.level == "token" else "examples"
    if large > _MANY and bayes:
        yield (
            f"{large:.0%} of the {what} have Var(loss) > {LARGE}: the Bayes training loss and WAIC are not valid, the "
            "Gibbs losses and V are."
        )
    if bayes and not 1 / _FAR <= seen.nbeta / n <= _FAR:
        yield (
            f"nbeta is {seen.nbeta:.4g} and there are {n:,.0f} {what}: the Bayes losses are those of this posterior, "
            f"and not of the Bayes posterior, which has nbeta = {n:,.0f}."
        )
    summed, single = found.values[2], found.values[1]
    if seen.level == "token" and not math.isfinite(summed):
        yield "only moments of single tokens were kept, so that V is their sum and not that of whole texts."
    differ = found.combined(1.0, summed=1.0, variance=-1.0)
    if seen.level == "token" and abs(differ.value) > max(_TOKENS_DIFFER * single, 3 * differ.stderr):
        yield (
            f"V of whole texts is {summed / single:.2f} times that of their single tokens: the loss is not a "
            "calibrated log loss around w*, and nu is not that of the theory."
        )
    if math.isnan(found.ess):
        yield "how many effective draws there are is not known: errors are themselves rough. Draw more."
    elif found.ess < 20:
        yield f"there are {found.ess:.0f} effective draws: errors from so few are themselves rough. Draw more."


def _text(x: Estimate, sign: str = "+/-") -> str:
    if not math.isfinite(x.stderr):
        return f"{x.value:.6g} (no error bar)"
    digits = 3 if x.stderr == 0 else max(0, min(8, 1 - math.floor(math.log10(x.stderr))))
    return f"{x.value:.{digits}f} {sign} {x.stderr:.{digits}f}"


def _plain(x: float) -> float | None:
    return x if math.isfinite(x) else None
