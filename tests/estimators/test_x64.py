"""With ``jax_enable_x64``: weights in float64, and in float32, through every door.

Each kills a carry of a loop that is typed float32 while its body returns float64, which crashed all of these.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.results.trajectory import WHOLE

NUM_DATA, NBETA = 200, 100.0
RUN = {"num_chains": 2, "num_draws": 2000, "num_warmup": 500}
SHORT = {"num_chains": 2, "num_draws": 100, "num_warmup": 100}
OPEN = {
    "underdamped": slt.underdamped(),
    "sgld": slt.sgld(),
    "matthews": slt.sgld(noise="leimkuhler-matthews"),
    "sgnht": slt.sgnht(),
    "sghmc": slt.sghmc(),
    "preconditioned": slt.preconditioned_sgld(),
    "kronecker": slt.underdamped(metric="kronecker"),
    "mala": slt.mala(),
    "hmc": slt.hmc(num_steps=5),
    "nuts": slt.nuts(),
    "mclmc": slt.mclmc(),
}
MIXED = ("underdamped", "mala", "hmc", "nuts")  # with float32 weights: BlackJAX's own numbers are then float64


def square(p, x):
    return 0.5 * (x @ p["w"]) ** 2


def regression(dtype):
    """(posterior, data, exact LLC at this nbeta and localization): a quadratic loss, w* = 0 its minimum."""
    x = jax.random.normal(jax.random.key(1), (NUM_DATA, 4), dtype)
    return slt.LocalPosterior(square, {"w": jnp.zeros(4, dtype)}, NUM_DATA, nbeta=NBETA), x


def exact(x, localization):
    curvatures = NBETA * np.linalg.eigvalsh(np.asarray(x, np.float64).T @ np.asarray(x, np.float64) / NUM_DATA)
    return 0.5 * float(np.sum(curvatures / (curvatures + localization)))


def is_right(result, x):
    s = result.settings
    truth = exact(x, s.localization)
    return abs(result.llc - truth) < 4 * result.llc_stderr < 2 * truth


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[np.float64, np.float32], ids=["float64", "float32"])
def problem(request, x64):
    return regression(request.param)


@pytest.mark.parametrize(
    ("dtype", "name"), [*((np.float64, name) for name in OPEN), *((np.float32, name) for name in MIXED)]
)
def test_every_sampler_calibrated(dtype, name, x64):
    posterior, x = regression(dtype)
    batch = {"batch_size": NUM_DATA}
    assert is_right(slt.estimate_llc(posterior, x, sampler=OPEN[name], **RUN, **batch), x)


@pytest.mark.parametrize("sampler", [slt.mala(2e-3), slt.sgld(2e-3)], ids=lambda s: s.name)
def test_a_step_size_that_is_given(problem, sampler):
    posterior, x = problem
    posterior = posterior.with_numbers(nbeta=NBETA, localization=1.0)
    assert is_right(slt.estimate_llc(posterior, x, sampler=sampler, **RUN, batch_size=NUM_DATA), x)


def test_the_weights_keep_their_type(problem):
    """Not one that was cast to float32, nor one that a float64 number has widened: the loss sees it."""
    posterior, x = problem
    seen = set()

    def loss_fn(p, batch):
        seen.add(p["w"].dtype)
        return square(p, batch)

    own = slt.LocalPosterior(loss_fn, posterior.center, NUM_DATA, nbeta=NBETA)
    for sampler in (slt.underdamped(), slt.hmc(num_steps=5)):
        slt.estimate_llc(own, x, sampler=sampler, num_chains=1, num_draws=20, num_warmup=20)
    assert seen == {posterior.center["w"].dtype}


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches": 2, "control_variate": True, "thinning": 2},
        {"baseline": "full", "control_variate": False, "num_draws": 64},
    ],
    ids=["control", "full"],
)
def test_options(options, tmp_path, x64):
    posterior, x = regression(np.float64)
    result = slt.estimate_llc(
        posterior, x, batch_size=50, also={"same": x}, checkpoint_dir=tmp_path / "run", **SHORT | options
    )
    assert np.isfinite(result.llc)
    assert np.isfinite(result.also["same"].llc)
    result.save(tmp_path / "saved")
    assert slt.load_result(tmp_path / "saved").llc == result.llc


def test_sweep(x64):
    posterior, x = regression(np.float64)
    grid = slt.sweep(posterior, x, nbeta=[50.0, NBETA], num_chains=2, num_draws=1000, batch_size=NUM_DATA)
    result = grid.results[-1]
    assert result.settings.nbeta == NBETA
    assert abs(result.llc - exact(x, result.settings.localization)) < 4 * result.llc_stderr


def test_trajectory(x64):
    posterior, x = regression(np.float64)
    centers = {1: posterior.center, 2: posterior.center}
    course = slt.trajectory(posterior, centers, x, num_chains=2, num_draws=1000, batch_size=NUM_DATA)
    for result in course.results[WHOLE]:
        assert abs(result.llc - exact(x, result.settings.localization)) < 4 * result.llc_stderr
