"""The bookkeeping of the benchmarks: counts of operations, the peers' protocol, the ratios."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scaling.samplers.gradients import first_to_stay, running_means
from scaling.throughput import compare, sweep, work
from slt_jax.models import Decoder, DecoderConfig


def product_flops(jaxpr) -> float:
    """2 x the multiplications of every matrix product in a jaxpr, into its inner ones."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            inner = 1
            for axis in contracted:
                inner *= left[axis]
            total += 2.0 * inner * eqn.outvars[0].aval.size
        elif eqn.primitive.name in ("cond", "platform_index"):
            total += max((product_flops(b.jaxpr) for b in eqn.params.get("branches", ())), default=0.0)
        else:
            for name in ("jaxpr", "call_jaxpr"):
                if name in eqn.params:
                    runs = eqn.params.get("length", 1)  # of a scan
                    total += runs * product_flops(getattr(eqn.params[name], "jaxpr", eqn.params[name]))
    return total


def test_decoder_flops_are_those_of_the_traced_program():
    config = DecoderConfig(300, 24, 32, 3, 4)
    model = Decoder(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    tokens = jnp.zeros((5, 24), jnp.int32)
    forward = jax.make_jaxpr(lambda p: nnx.merge(graphdef, p).losses(tokens).mean())(params)
    assert product_flops(forward.jaxpr) * 3 == pytest.approx(work.decoder_flops(config, 5), rel=0.01)


def test_deep_linear_flops_are_those_of_the_traced_program():
    job = work.deep_linear()
    batch = (job.data[0][: job.batch_size], job.data[1][: job.batch_size])
    gradient = jax.make_jaxpr(jax.value_and_grad(lambda w: job.posterior.loss_fn(w, batch).mean()))(
        job.posterior.center
    )
    assert product_flops(gradient.jaxpr) == job.flops


def test_the_last_result_line_counts():
    script = "print('RESULT {\"steps_per_s_call\": 1}'); print('noise'); print('RESULT {\"steps_per_s_call\": 2}')"
    assert compare.result_of([sys.executable, "-c", script], "peer") == {"steps_per_s_call": 2}


@pytest.mark.parametrize("script", ["print('nothing')", "print('RESULT {}'); raise SystemExit(1)"])
def test_a_peer_without_a_result_is_named(script):
    with pytest.raises(RuntimeError, match="devinterp gave no RESULT"):
        compare.result_of([sys.executable, "-c", script], "devinterp")


def test_ratios_are_of_medians():
    own = [{"steps_per_s": s, "steps_per_s_call": s - 1, "gflop_per_step": 2.0} for s in (10.0, 30.0, 20.0)]
    peer = [{"steps_per_s_call": s} for s in (4.0, 5.0, 100.0)]
    floor = {"sgemm_gflop_per_s": 100.0, "copy_gb_per_s": 5.0}
    rounds = [
        {"floor": floor, "deep_linear:slt-jax": a, "gpt:slt-jax": a, "deep_linear:peer": b}
        for a, b in zip(own, peer, strict=True)
    ]
    done = {"peak_rss_mb": 1, "overhead": 0.05}
    record = {"rounds": rounds, "overhead": done, "gpt2_small": done, "gpt, one chain at a time": done}
    found = compare.summary(record)["deep_linear"]
    assert found["times_faster"] == {"peer": 4.0}
    assert found["share_of_that"] == pytest.approx(20.0 / 50.0)


def test_the_count_from_which_on_an_estimate_stays():
    counts = np.array([10, 20, 30, 40])
    assert first_to_stay(counts, np.array([100.0, 96.0, 104.0, 100.0]), 100.0) == 10
    assert first_to_stay(counts, np.array([100.0, 90.0, 104.0, 100.0]), 100.0) == 30
    assert first_to_stay(counts, np.array([90.0, np.nan, 104.0, 100.0]), 100.0) == 30
    assert first_to_stay(counts, np.array([100.0, 100.0, 100.0, 106.0]), 100.0) is None


def test_running_means_are_of_the_last_share():
    draws = np.array([1.0, 2.0, 6.0, 4.0])
    np.testing.assert_allclose(running_means(draws, 0.5), [1.0, 2.0, 4.0, 5.0])
    np.testing.assert_allclose(running_means(draws, 1.0), [1.0, 1.5, 3.0, 3.25])
    np.testing.assert_allclose(running_means(draws, 0.1), draws)


def test_a_cell_is_held_against_its_own_call():
    """Kills: a NaN on one side alone passing; no difference where both are NaN or 0."""
    nan = float("nan")
    assert sweep.difference([1.0, 2.0, nan, 0.0], [0, 1, 2, 3], [1.0, 2.0, nan, 0.0]) == 0
    assert sweep.difference([1.0, 2.0], [1], [2.2]) == pytest.approx(0.2 / 2.2)
    assert sweep.difference([1.0, nan], [0, 1], [1.0, 2.0]) == np.inf
    assert sweep.difference([[1.0], [nan]], [1], [nan]) == 0


def test_calls_that_were_not_run_take_the_mean_of_those_that_compiled_nothing():
    each = [9.0, 1.0, 2.0]
    assert sweep.estimated({"wall": 15.0, "each": each}) == pytest.approx(15 + 105 * 1.5)
    assert sweep.estimated({"wall": 120.0, "each": [1.0] * 108}) == 120
    assert sweep.spread(3) == [0, 53, 107]
