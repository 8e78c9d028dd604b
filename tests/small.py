"""A small run that takes any argument, what a refusal must say, and results without a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine.trace import Trace
from slt_jax.results.record import RunRecord
from slt_jax.results.tree import SAVED, saved_traces

DATA = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
PLAN = {"num_chains": 4, "num_draws": 4, "num_warmup": 2, "batch_size": 8}


def square(w, x):
    return 0.5 * (x @ w) ** 2


def posterior(loss_fn=square, center=None, num_data=40, **more):
    more = {"localization": 1.0, **more}
    return slt.LocalPosterior(loss_fn, jnp.zeros(3) if center is None else center, num_data, **more)


def estimate(target=None, data=DATA, **more):
    given = {"sampler": slt.sgld(1e-4), **PLAN, **more}
    return slt.estimate_llc(posterior() if target is None else target, data, **given)


def made_result(loss, warmup, settings, *, stopped=None, notes=(), **traces):
    """A result without a run, of these traces (chain, draw): numbers stand for all draws, what is left out is NaN."""
    given = {"gap_var": 1e-6, "drift_sq": 1.0, "distance_sq": 1.0, **traces}
    arrays = {name: np.full(loss.shape, given.get(name, np.nan), loss.dtype) for name in SAVED.values()}
    arrays |= {name: value for name, value in given.items() if np.ndim(value)} | {"loss": loss}
    return slt.LLCResult(Trace(**arrays), warmup, stopped or {}, RunRecord.from_json(settings), tuple(notes))


def with_traces(result, **traces):
    """The same with other traces, or other settings by their names."""
    known = {name: value for name, value in traces.items() if name in Trace._fields}
    settings = {name: value for name, value in traces.items() if name not in known}
    return dataclasses.replace(
        result, traces=result.traces._replace(**known), settings=dataclasses.replace(result.settings, **settings)
    )


def traces_of(result):
    """All that is recorded of the chains, by its name in a saved file."""
    return {**saved_traces(result.traces), "warmup_loss": result.warmup_loss}


def gamma_draws(llc, chains=8, draws=4000, seed=0):
    """Independent draws of nbeta (L - L*) at the asymptotic temperature."""
    return np.random.default_rng(seed).gamma(llc, size=(chains, draws))


def refuses(kind, call, *words):
    """``call`` raises exactly ``kind`` with every word in its text."""
    with pytest.raises(kind) as error:
        call()
    assert error.type is kind
    for word in words:
        assert str(word) in str(error.value), f"{word!r} is not in: {error.value}"


def leaking(loss_fn):
    """The same loss with a sum over all chains in it, which a compiled run must not have."""

    def leaks(*arguments):
        losses = loss_fn(*arguments)
        try:
            return losses + 1e-9 * jax.lax.pmean(losses, "chain")
        except NameError:  # outside of the program of the chains
            return losses

    return leaks
