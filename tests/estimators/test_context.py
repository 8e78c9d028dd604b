"""What a caller's JAX may be set to: a current mesh, checks for NaN, data that lie elsewhere, a transformation.

Each either changes no number or is refused in one sentence that says what to do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import slt_jax as slt
from slt_jax.posterior.tree import on_one_device
from slt_jax.results.trajectory import WHOLE
from tests.small import refuses

NUM_DATA = 64
X = np.random.default_rng(0).normal(size=(NUM_DATA, 3)).astype(np.float32)
RUN = {"num_chains": 4, "num_draws": 8, "num_warmup": 8, "batch_size": 16}
SENTENCE = ("runs programs of its own and cannot be called inside jax.jit, vmap or grad", "Call it outside")


def square(p, x):
    return 0.5 * (x @ p["w"]) ** 2


def posterior(center=None):
    center = {"w": jnp.zeros(3)} if center is None else center
    return slt.LocalPosterior(square, center, NUM_DATA, localization=1.0)


def estimate(data=X, center=None, **more):
    return slt.estimate_llc(posterior(center), data, **RUN | more)


def mesh(count, kind=AxisType.Explicit, name="data"):
    return jax.make_mesh((count,), (name,), axis_types=(kind,), devices=jax.devices()[:count])


def split(x, count, kind=AxisType.Explicit):
    return jax.device_put(x, NamedSharding(mesh(count, kind), PartitionSpec("data")))


@pytest.fixture(scope="module")
def plain():
    return estimate()


def same(result, plain):
    assert np.array_equal(result.loss_trace, plain.loss_trace)
    assert result.llc == plain.llc


@pytest.mark.parametrize("name", ["data", "chain"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("count", [1, 4])
def test_a_current_mesh_changes_nothing(count, kind, name, plain):
    """Kills: every array taken to lie on the caller's mesh (ShardingTypeError, on one device too)."""
    current = mesh(count, kind, name)
    with jax.set_mesh(current):
        same(estimate(), plain)
        assert jax.sharding.get_abstract_mesh() == current.abstract_mesh


def test_a_current_mesh_under_the_other_calls():
    grid = slt.sweep(posterior(), X, nbeta=[10.0, 20.0], num_chains=2, num_draws=8)
    course = slt.trajectory(posterior(), {1: {"w": jnp.zeros(3)}}, X, num_chains=2, num_draws=8)
    with jax.set_mesh(mesh(2)):
        center = {"w": jnp.zeros(3)}  # laid out on that mesh
        again = slt.sweep(posterior(center), jnp.asarray(X), nbeta=[10.0, 20.0], num_chains=2, num_draws=8)
        later = slt.trajectory(posterior(center), {1: center}, jnp.asarray(X), num_chains=2, num_draws=8)
    assert [r.llc for r in again.results] == [r.llc for r in grid.results]
    assert [r.llc for r in later.results[WHOLE]] == [r.llc for r in course.results[WHOLE]]


def test_the_mesh_of_the_chains_may_be_current():
    chains = mesh(2, AxisType.Auto, "chain")
    with jax.set_mesh(chains):
        assert np.isfinite(estimate(mesh=chains).llc)


@pytest.mark.parametrize("setting", ["debug_nans", "debug_infs"])
def test_checks_for_nan_and_infinity(setting, plain):
    """Kills: the NaN of a step that is not recorded taken for an error (RecursionError)."""
    with getattr(jax, setting)(True):
        same(estimate(), plain)


def test_a_loss_that_is_nan_is_still_reported_under_debug_nans():
    with jax.debug_nans(True):
        refuses(FloatingPointError, lambda: estimate(np.full_like(X, np.nan)), "the loss at w* is nan")


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_data_on_another_mesh(count, kind, plain):
    """Kills: a gather from sharded rows whose result has no layout, or lies on devices of another program."""
    same(estimate(split(X, count, kind)), plain)


def test_data_and_weights_anywhere(plain):
    there = jax.devices()[5]
    same(estimate(jax.device_put(X, there), {"w": jax.device_put(jnp.zeros(3), there)}), plain)
    same(estimate(split(X, 4), {"w": jax.device_put(jnp.zeros(3), NamedSharding(mesh(2), PartitionSpec()))}), plain)
    other = estimate(also={"same": split(X, 8)})
    assert np.isfinite(other.also["same"].llc)


def test_an_array_on_one_device_loses_its_mesh():
    x = split(X, 4)
    assert jax.typeof(on_one_device(x)) == jax.typeof(jnp.asarray(X))
    own = jnp.asarray(X)
    assert on_one_device(own) is own


CALLS = {
    "estimate_llc": lambda p, x: slt.estimate_llc(p, x, sampler=slt.sgld(1e-3), **RUN).llc,
    "sweep": lambda p, x: slt.sweep(p, x, nbeta=[1.0, 2.0]).results[0].llc,
    "trajectory": lambda p, x: slt.trajectory(p, {1: p.center}, x).results[WHOLE][0].llc,
}


@pytest.mark.parametrize("name", CALLS)
def test_inside_a_transformation(name):
    """Kills: a ConcretizationTypeError, from the depth of a run, about an array that the caller does not know."""
    p, call = posterior(), CALLS[name]
    refuses(TypeError, lambda: jax.jit(lambda: call(p, X))(), name, *SENTENCE)
    refuses(TypeError, lambda: jax.jit(lambda x: call(p, x))(X), name, *SENTENCE)
    refuses(TypeError, lambda: jax.vmap(lambda x: call(p, x))(X[None]), name, *SENTENCE)
    refuses(TypeError, lambda: jax.grad(lambda x: call(p, x))(X), name, *SENTENCE)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
def test_a_center_that_is_traced(transform):
    center = jnp.zeros((2, 3)) if transform is jax.vmap else jnp.zeros(3)
    refuses(TypeError, lambda: transform(lambda w: estimate(center={"w": w}).llc)(center), "LocalPosterior", *SENTENCE)
    checkpoints = lambda w: slt.trajectory(posterior({"w": jnp.zeros(3)}), {1: {"w": w}}, X)  # noqa: E731
    if transform is not jax.jit:
        refuses(TypeError, lambda: transform(checkpoints)(center), "trajectory", *SENTENCE)


def test_a_number_or_a_key_that_is_traced(wrong_types):
    def at(nbeta):
        return slt.LocalPosterior(square, {"w": jnp.zeros(3)}, NUM_DATA, nbeta=nbeta).nbeta

    refuses(TypeError, lambda: jax.grad(at)(10.0), "nbeta must be a number, not one that jax.jit, vmap or grad trace")
    refuses(TypeError, lambda: jax.jit(lambda e: slt.sgld(e).step_size)(1e-3), "step_size must be a number")
    keys = jax.random.split(jax.random.key(0), 2)
    refuses(TypeError, lambda: jax.vmap(lambda key: estimate(key=key).llc)(keys), "estimate_llc", *SENTENCE)
