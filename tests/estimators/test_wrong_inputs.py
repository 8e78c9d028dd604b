"""Inputs that gave a wrong number without a word: each is refused, or noted in the result, by its kind."""

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
from tests.small import DATA, PLAN, estimate, posterior, refuses, square
from tests.sources import Rows

# Rows against num_data

TOKENS = [np.arange(300, dtype=np.int32) + i for i in range(64)]
LAYOUTS = {
    "a list of sequences": (TOKENS, 64, ("64 arrays", "(300,)", "at most 32 arrays", "np.stack(list)")),
    "a dict of sequences": ({str(i): x for i, x in enumerate(TOKENS)}, 64, ("64 arrays", "np.stack")),
    "a short list": (list(DATA[:20]), 20, ("a list of 20 equal elements", "3 rows of each", "np.stack(data)")),
    "as many as rows": (list(np.ones((20, 20), np.float32)), 20, ("one element for each example", "np.stack(data)")),
    "a part of a list": (list(DATA[:12]), 4000, ("a list of 12 equal elements", "np.stack(data)")),
    "a list of pairs": ([(x, x) for x in DATA[:12]], 12, ("12 equal", "jax.tree.map(lambda *x: np.stack(x), *data)")),
    "a list of batches": ([DATA[:10]] * 4, 40, ("4 batches of 10 rows", "np.concatenate(data)")),
    "a last batch": ([DATA[:10]] * 3 + [DATA[:8]], 38, ("'3': 8", "join a list of batches with np.concatenate")),
    "batches": (DATA.reshape(10, 4, 3), 40, ("10 rows", "10 batches of 4", "x.reshape(-1, *x.shape[2:])")),
    "transposed": (DATA.T, 40, ("3 rows", "the length of their second axis", "transpose the data")),
    "fewer examples than rows": (DATA, 10, ("num_data = 10", "40 rows", "not of a batch", "num_data=40")),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_were_meant_otherwise(case):
    data, num_data, words = LAYOUTS[case]
    refuses(ValueError, lambda: estimate(posterior(num_data=num_data), data), *words)


def test_a_ragged_list_is_told_in_three_lines():
    with pytest.raises(ValueError, match="unequal length") as error:
        estimate(data=[DATA[: i + 3] for i in range(30)])
    assert len(str(error.value)) < 3 * 120


def pairs(w, batch):
    return square(w, batch[0] - batch[1])


def test_arrays_that_belong_together_are_no_list_of_examples():
    """Kills: (X, Y) of one shape refused, also where a coincidence makes their number that of the data."""
    assert estimate(posterior(pairs), (DATA, 2 * DATA)).notes == ()
    assert estimate(posterior(pairs), [DATA, 2 * DATA]).notes == ()
    assert estimate(posterior(pairs, num_data=2), (DATA[:2], DATA[:2]), batch_size=2).notes == ()


@pytest.mark.parametrize("host", [False, True])
def test_a_subsample_is_noted(host):
    data = Rows(DATA) if host else DATA
    (note,) = estimate(posterior(num_data=60), data).notes
    for words in ("num_data = 60", "40 rows", "sets nbeta = 14.65 and nothing else", "pass num_data=40"):
        assert words in note
    result = estimate(posterior(num_data=10**6, nbeta=3.0), data)
    for words in ("1,000,000", "sets nothing in the estimate, since nbeta = 3 was given", "25,000 times the rows"):
        assert words in result.notes[0]
    assert f"Note: {result.notes[0]}" in str(result)
    refuses(ValueError, lambda: estimate(posterior(num_data=10), data), "num_data = 10", "40 rows")


def test_a_subsample_is_noted_in_sweeps_and_trajectories():
    given = {"sampler": slt.sgld(1e-4), **PLAN}
    target = posterior(num_data=60)
    for cell in slt.sweep(target, DATA, nbeta=[1.0, 2.0], **given).results:
        assert "40 rows" in cell.notes[0]
    rows = slt.trajectory(target, {1: jnp.zeros(3)}, DATA, **given).results
    assert "40 rows" in next(iter(rows.values()))[0].notes[0]


# The mean over the batch


@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_a_sum_over_the_batch(penalty):
    """Also where the loss is exactly 0 at w*, and beside a penalty that does not grow."""

    def total(w, x):
        return jnp.sum(square(w, x)) + penalty * jnp.sum(w**2)

    words = ("adds up its batch", "same 4 rows given twice", "grew by a factor of", "Return the mean", "shape (m,)")
    refuses(ValueError, lambda: estimate(posterior(total)), *words)
    given = {"sampler": slt.sgld(1e-4), **PLAN}
    refuses(ValueError, lambda: slt.sweep(posterior(total), DATA, nbeta=[1.0, 2.0], **given), *words)
    refuses(ValueError, lambda: slt.trajectory(posterior(total), {1: jnp.zeros(3)}, DATA, **given), *words)


def contrast(w, x):
    scores = (x * w) @ x.T
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diag(scores))


SCALARS = {
    "mean": lambda w, x: jnp.mean(square(w, x)),
    "mean and penalty": lambda w, x: jnp.mean(square(w, x)) + 3 + jnp.sum(w**2),
    "negative": lambda w, x: jnp.mean(square(w, x)) - 5,
    "contrastive": contrast,
    "without data": lambda w, x: 0.5 * jnp.sum(w**2),
    "noise by position": lambda w, x: jnp.mean(square(w, x + jax.random.normal(jax.random.key(0), x.shape))),
    "its own batch size": lambda w, x: jnp.mean(square(w, x.reshape(8, 3))),
}


@pytest.mark.parametrize("case", SCALARS)
def test_losses_of_one_number_that_are_right(case):
    assert np.isfinite(estimate(posterior(SCALARS[case])).llc)


def test_rows_taken_for_inputs_and_targets():
    """``data=X`` for a loss that takes (X, Y): rows 0 and 1 of the batch are read as the two."""
    words = ("does not use all rows of its batch", "pass the data as (X, Y)")
    refuses(ValueError, lambda: estimate(posterior(lambda w, b: jnp.sum((w * b[0] - b[1]) ** 2))), *words)


# What the caller's function raises


def unpacks(w, batch):
    x, y = batch
    return square(w, x) + y


def test_errors_of_the_loss_name_the_batch():
    where = "loss_fn raised this when it was called with the weights and a batch of"
    refuses(ValueError, lambda: estimate(posterior(unpacks)), f"{where} (8, 3) of float32: too many values to unpack")
    named = {"x": DATA, "y": DATA[:, 0]}
    refuses(
        KeyError, lambda: estimate(posterior(lambda w, b: b["z"]), named), f"{where} x (8, 3) of float32, y (8,)", "z"
    )
    refuses(TypeError, lambda: estimate(posterior(lambda w, b: square(w, b[:, :2]))), where, "dot_general")


class Odd(Exception):
    def __init__(self, code, what):
        super().__init__(code, what)


def test_an_error_of_another_form_keeps_its_type_and_gets_a_note():
    def loss(w, x):
        raise Odd(3, "no")

    with pytest.raises(Odd) as error:
        estimate(posterior(loss))
    assert "a batch of (8, 3) of float32." in "".join(error.value.__notes__)


# Further data sets


def test_further_data_of_another_structure():
    both = ("also['a'] has the structure ((*, *)), the data have (*)", "the same structure")
    refuses(ValueError, lambda: estimate(also={"a": (DATA, DATA)}), *both)
    words = ("{'x': *}", "{'y': *}")
    named = posterior(lambda w, b: square(w, b["x"]))
    refuses(ValueError, lambda: estimate(named, {"x": DATA}, also={"a": {"y": DATA}}), *words)
    refuses(ValueError, lambda: estimate(data=Rows(DATA), also={"a": {"y": DATA}}), "also['a']")
    assert set(estimate(posterior(pairs), (DATA, DATA), also={"a": [DATA, DATA]}).also) == {"a"}


# Centers that are more than weights


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(3, 3, rngs=rngs)
        self.decoder = self.encoder

    def __call__(self, x):
        return self.decoder(nnx.relu(self.encoder(x)))


def through(model, batch):
    return jnp.mean(model(batch) ** 2, axis=-1)


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
    frozen = posterior(center=variables, mask=lambda path: path[0] == "params")
    assert frozen.num_free == 6
    assert posterior(center=nnx.state(model, nnx.Param)).num_free == 24
    assert posterior(slt.from_nnx(model, through)[1], slt.from_nnx(model, through)[0]).num_free == 24


# Flax values


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


# Rows with a loss that is not finite

MANY = np.random.default_rng(3).normal(size=(2000, 3)).astype(np.float32)
LONG = {"sampler": slt.sgld(1e-5), "num_chains": 2, "num_draws": 200, "num_warmup": 20, "batch_size": 64, "key": 1}


def with_nan(rows):
    data = MANY.copy()
    data[rows, 1] = np.nan
    return data


def near(loss_fn=square, **more):
    return slt.LocalPosterior(loss_fn, jnp.zeros(3), num_data=len(MANY), localization=1.0, **more)


@pytest.mark.parametrize("one_number", [False, True])
@pytest.mark.parametrize("host", [False, True])
def test_a_row_that_is_nan_is_named(one_number, host, tmp_path):
    """Kills: "take a smaller step_size" for a NaN in one row of many."""
    loss_fn = (lambda w, x: jnp.mean(square(w, x))) if one_number else square
    data = with_nan([777])
    result = slt.estimate_llc(near(loss_fn), Rows(data) if host else data, **LONG)
    words = "the loss at w* is not finite on row 777 of the data. Repair or remove it."
    assert result.verdict == "diverged"
    assert words in result.health.reason
    assert "step_size" not in result.health.reason
    assert words in str(slt.load_result(result.save(tmp_path / "result")))
    assert not slt.estimate_llc(near(loss_fn), MANY, **LONG).stopped


def test_a_row_that_is_nan_is_named_where_the_calibration_chose():
    result = slt.estimate_llc(near(), with_nan([777]), budget=3000, batch_size=64, key=3)
    assert "row 777 of the data" in result.health.reason


def test_a_row_that_is_nan_is_named_in_sweeps_and_trajectories():
    given = {**LONG, "num_warmup": 20}
    for cell in slt.sweep(near(), with_nan([777]), nbeta=[1.0, 2.0], **given).results:
        assert "row 777 of the data" in cell.health.reason
    course = slt.trajectory(near(), {1: jnp.zeros(3)}, with_nan([777]), **given)
    assert "row 777 of the data" in next(iter(course.results.values()))[0].health.reason


def test_a_step_that_is_too_long_is_told_as_one():
    result = slt.estimate_llc(near(), MANY, **{**LONG, "sampler": slt.sgld(100.0)})
    assert "take a smaller step_size" in result.health.reason


def test_a_batch_that_is_masked_out():
    def loss(w, batch):
        return jnp.sum(batch[1] * square(w, batch[0])) / jnp.sum(batch[1])

    mask = (np.arange(len(MANY)) % 100 == 0).astype(np.float32)
    result = slt.estimate_llc(near(loss), (MANY, mask), **{**LONG, "batch_size": 200})
    for words in ("not finite on a batch", "a mean over a mask that leaves out all of them"):
        assert words in result.health.reason


def test_a_gradient_that_is_not_finite_on_one_row():
    def loss(w, x):
        return square(w, x) + jnp.sqrt(jnp.abs(x[:, 0]) * (1 + jnp.sum(w**2)))

    data = MANY.copy()
    data[32] = 0.0
    result = slt.estimate_llc(near(loss), data, **{**LONG, "batch_size": 16})
    assert "the gradient of the loss at w* is not finite on row 32 of the data" in result.health.reason


def test_a_row_of_the_first_batch_is_named():
    words = ("the loss at w* is nan on the first batch of chain 0", "is not finite on rows 5, 9 of the data")
    refuses(FloatingPointError, lambda: estimate(data=np.where(np.isin(np.arange(40), (5, 9))[:, None], np.nan, DATA),
                                                 batch_size=40), *words)  # fmt: skip
    words = ("on the first examples of 'a'", "on row 5 of the data")
    other = np.where(np.arange(40)[:, None] == 5, np.nan, DATA)
    refuses(FloatingPointError, lambda: estimate(also={"a": other}), *words)


def test_a_measurement_at_the_end_that_fails_costs_no_result(monkeypatch):
    def fails(*_):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(np.linalg, "eigvalsh", fails)
    result = slt.estimate_llc(near(), MANY, **{**LONG, "num_draws": 2000})
    assert np.isfinite(result.llc)
    assert any("the curvatures at w* at the end failed (LinAlgError: Eigenvalues" in note for note in result.notes)


# Parts by path, counts, empty leaves, tensors, paths


def test_parts_by_a_rule_for_paths():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}

    def loss(p, x):
        return 0.5 * (x @ (p["a"] - 1)) ** 2 + jnp.sum((p["b"] - 1) ** 2)

    target = posterior(loss, params)
    rules = {
        "a alone": lambda path: path[0] == "a",
        "two entries": lambda path: np.arange(3) < 2 if path[0] == "a" else False,
        "b": lambda posterior: dataclasses.replace(posterior, mask=lambda path: path[0] == "b"),
    }
    given = {"sampler": slt.sgld(1e-4), **PLAN}
    course = slt.trajectory(target, {1: params}, DATA, parts=rules, **given)
    assert [row[0].settings.num_free for row in course.results.values()] == [5, 3, 2, 2]
    masked = dataclasses.replace(target, mask=lambda path: np.arange(3) > 0 if path[0] == "a" else True)
    course = slt.trajectory(masked, {1: params}, DATA, parts={"a": rules["two entries"]}, **given)
    assert [row[0].settings.num_free for row in course.results.values()] == [4, 1]


@pytest.mark.parametrize("name", ["num_chains", "num_draws", "num_warmup", "thinning", "chunk_size", "budget"])
def test_counts_that_are_too_large(name):
    """Kills: 10^30 draws, which hung."""
    given = {"num_draws": None} if name == "budget" else {}
    refuses(ValueError, lambda: estimate(**{**given, name: 10**30}), f"{name} must be a whole number <= 2,147,483,647")


def test_lengths_that_are_too_large_together():
    refuses(ValueError, lambda: estimate(num_draws=10**6, thinning=10**6), "num_draws = 1000000", "steps of a chain")
    refuses(ValueError, lambda: posterior(num_data=10**30), "num_data must be a whole number <=", 10**30)
    refuses(MemoryError, lambda: estimate(num_draws=2 * 10**9), "the record of", "Take fewer chains or draws")


def test_an_empty_leaf():
    center = {"w": jnp.zeros(3), "none": jnp.zeros((0, 4))}
    result = estimate(posterior(lambda p, x: square(p["w"], x), center))
    np.testing.assert_array_equal(result.settings.num_free, 3)
    assert np.isfinite(result.llc)


class Tensor:
    """What of a torch tensor is used."""

    def __init__(self, array, dtype="torch.float32"):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def detach(self):
        return self

    cpu = detach
    float = detach

    def numpy(self):
        return self.array


Tensor.__module__ = "torch.nn.parameter"


def test_tensors_of_torch():
    def loss(p, batch):
        return square(p["w"], batch[0]) * (1 + batch[1])

    labels = np.arange(40) % 3
    plain = estimate(posterior(loss, {"w": np.zeros(3, np.float32)}), (DATA, labels))
    target = posterior(loss, {"w": Tensor(np.zeros(3, np.float32))})
    result = estimate(target, (Tensor(DATA), Tensor(labels, "torch.int64")))
    np.testing.assert_array_equal(result.loss_trace, plain.loss_trace)
    half = posterior(loss, {"w": Tensor(np.zeros(3, np.float32), "torch.bfloat16")})
    assert half.center["w"].dtype == jnp.bfloat16
    one = np.ones(3, np.float32)
    refuses(ValueError, lambda: posterior(center={"a": Tensor(one), "b": Tensor(one)}), "one array")
    statistics = {"w": Tensor(one), "bn.running_mean": Tensor(np.zeros(3, np.float32))}
    refuses(ValueError, lambda: posterior(center=statistics), "'bn.running_mean' of center is a running statistic")


def test_the_home_directory_and_links(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = estimate(checkpoint_dir="~/run")
    result.save("~/result")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["result", "run"]
    np.testing.assert_array_equal(slt.load_result("~/result").loss_trace, result.loss_trace)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "result")
    other = estimate(key=5)
    other.save(link, overwrite=True)
    assert link.is_symlink()
    for path in (link, tmp_path / "result"):
        np.testing.assert_array_equal(slt.load_result(path).loss_trace, other.loss_trace)
