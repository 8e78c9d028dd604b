"""Centers that are more than weights: one array under two names, models, running statistics, states."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import slt_jax as slt
from tests.flax_models import Normed, through
from tests.small import DATA, PLAN, estimate, posterior, refuses


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(3, 3, rngs=rngs)
        self.decoder = self.encoder

    def __call__(self, x):
        return self.decoder(nnx.relu(self.encoder(x)))


SHARED = jnp.ones((3, 3))
FLAT = np.ones((3, 4), np.float32)
TIES = {
    "one array": {"in": SHARED, "out": SHARED},
    "nested": {"a": [SHARED, jnp.zeros(2)], "b": {"c": SHARED}},
    "NumPy": {"in": FLAT, "out": FLAT},
    "a transposed view": {"in": FLAT, "out": FLAT.T},
}


@pytest.mark.parametrize("case", TIES)
def test_one_array_under_two_names(case):
    names = ["a/0", "b/c"] if case == "nested" else ["in", "out"]
    words = (f"'{names[0]}' and '{names[1]}' of center are one array", "sampled twice", "from_nnx", "jnp.array(x)")
    refuses(ValueError, lambda: posterior(center=TIES[case]), *words)


def test_equal_arrays_are_not_one():
    assert posterior(center={"in": jnp.ones(3), "out": jnp.ones(3)}).num_free == 6
    assert posterior(center={"in": SHARED, "out": SHARED}, mask={"in": True, "out": False}).num_free == 9
    empty = jnp.ones((0, 3))
    flat = np.arange(6, dtype=np.float32)
    assert posterior(center={"a": flat[:3], "b": flat[3:]}).num_free == 6
    assert posterior(center={"a": jnp.ones(2), "b": empty, "c": jnp.array(empty)}).num_free == 2


def test_models_and_training_states():
    words = ("center is a Flax model, Tied", "sampled twice", "params, loss_fn = slt_jax.from_nnx(model, loss)")
    model = Tied(nnx.Rngs(0))
    refuses(TypeError, lambda: posterior(center=model), *words)
    refuses(TypeError, lambda: posterior(center={"net": model}), "'net' of center is a Flax model")
    params, loss_fn = slt.from_nnx(model, through)
    assert posterior(loss_fn, params).num_free == 12  # once
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.adam(1e-3))
    refuses(TypeError, lambda: posterior(center=state), "a TrainState", "the optimizer's state", "state.params")


def test_running_statistics():
    model = Normed(nnx.Rngs(0))
    words = ("'norm/mean/value' of center is an nnx.BatchStat, not a weight", "from_nnx", "from_linen", "the mask")
    refuses(ValueError, lambda: posterior(center=nnx.state(model)), *words)
    module = nn.BatchNorm(use_running_average=True)
    variables = module.init(jax.random.key(0), DATA)
    words = ("'batch_stats/mean' of center is a variable of 'batch_stats', not a weight", "from_linen")
    refuses(ValueError, lambda: posterior(center=variables), *words)
    plain = nnx.to_pure_dict(nnx.state(model))
    words = ("'norm/mean' of center, beside ", "'scale'", "is a statistic of a batch normalization", "from_nnx")
    refuses(ValueError, lambda: posterior(center=plain), *words)
    restored = {"norm": {name: {"value": x} for name, x in plain["norm"].items()}}
    refuses(ValueError, lambda: posterior(center=restored), "'norm/mean' of center, beside ")
    assert posterior(center=plain, mask=lambda path: path[-1] not in ("mean", "var")).num_free == 24
    others = {"mean": jnp.zeros(3), "var": jnp.ones(3), "weight": jnp.ones(3)}
    assert posterior(center=others).num_free == 9  # a Gaussian's own
    frozen = posterior(center=variables, mask=lambda path: path[0] == "params")
    assert frozen.num_free == 6
    assert posterior(center=nnx.state(model, nnx.Param)).num_free == 24
    assert posterior(slt.from_nnx(model, through)[1], slt.from_nnx(model, through)[0]).num_free == 24


def test_checkpoints_as_states_and_models():
    """What Orbax and ``nnx.state`` give, models, and states with string keys give the numbers of the pure dict."""
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1)))
    params, loss_fn = slt.from_nnx(model, through)
    target = posterior(loss_fn, params)
    strings = {"layers": {str(k): v for k, v in params["layers"].items()}}
    centers = {1: params, 2: nnx.state(model), 3: model, 4: lambda: nnx.state(model, nnx.Param), 5: strings}
    losses = []
    for step, center in centers.items():
        course = slt.trajectory(target, {7: center}, DATA, sampler=slt.sgld(1e-4), **PLAN)
        losses.append(next(iter(course.results.values()))[0].loss_trace)
        np.testing.assert_array_equal(losses[-1], losses[0], err_msg=str(step))


def test_a_checkpoint_with_statistics_of_its_own_is_refused():
    """Kills: those of the first model used for all checkpoints without a word."""
    model = Normed(nnx.Rngs(0))
    params, loss_fn = slt.from_nnx(model, through)
    words = ("the checkpoint of step 3", "running statistic 'norm/mean'", "one posterior for each checkpoint")
    given = {"sampler": slt.sgld(1e-4), **PLAN}
    refuses(
        ValueError, lambda: slt.trajectory(posterior(loss_fn, params), {3: nnx.state(model)}, DATA, **given), *words
    )


def test_a_state_as_center_of_a_model():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    params, loss_fn = slt.from_nnx(model, through)
    state = posterior(loss_fn, nnx.state(model))
    np.testing.assert_array_equal(estimate(state).loss_trace, estimate(posterior(loss_fn, params)).loss_trace)


@pytest.mark.usefixtures("wrong_types")
def test_arguments_of_the_adapters_in_the_wrong_order():
    model, module = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), nn.Dense(1)
    refuses(TypeError, lambda: slt.from_nnx(through, model), "needs an nnx.Module first", "wrong order")
    refuses(TypeError, lambda: slt.from_nnx({"w": 1}, through), "needs an nnx.Module first", "a dict")
    refuses(
        TypeError, lambda: slt.from_linen({"params": {}}, module, through), "an nn.Module and its variables", "a dict"
    )


class Sows(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return self.linear(x)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_a_model_that_sows():
    params, loss_fn = slt.from_nnx(Sows(nnx.Rngs(0)), through)
    assert np.isfinite(estimate(posterior(loss_fn, params)).llc)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Called:
    w: object
    b: object

    def __call__(self, x):
        return x @ self.w + self.b


def test_a_model_of_booleans_as_mask():
    center = Called(jnp.ones(3), jnp.zeros(1))
    target = posterior(lambda p, x: p(x) ** 2, center, mask=Called(True, False))
    assert target.free_names == ["w"]
