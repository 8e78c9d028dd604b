"""What a careless user may pass: each is refused by name, with its value and what to do instead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import slt_jax as slt
from slt_jax._checks import shown
from tests.small import DATA, PLAN, estimate, posterior, refuses, square

# Numbers

pytestmark = pytest.mark.usefixtures("wrong_types")

NOT_POSITIVE = [0, -1.0, float("nan"), float("inf"), np.float32(-2), 10**400]
NOT_NUMBERS = ["3", "many", True, np.True_, [3.0], (1,), 3j, np.complex64(1), b"3", np.ones(1), jnp.ones(2), {}, {1: 2}]


@pytest.mark.parametrize("name", ["nbeta", "localization", "step_size"])
@pytest.mark.parametrize("value", [*NOT_POSITIVE, *NOT_NUMBERS, None], ids=lambda v: str(v)[:12])
def test_positive_numbers(name, value):
    if value is None or (name == "nbeta" and value is NOT_POSITIVE[0]):
        return  # the default, and a control
    kind = TypeError if value is None or any(value is v for v in NOT_NUMBERS) else ValueError
    call = slt.sgld if name == "step_size" else posterior
    remedy = {"nbeta": "num_data / log(num_data)", "localization": "common values", "step_size": "try 1e-4"}[name]
    least = ">= 0" if name == "nbeta" else "> 0"
    refuses(kind, lambda: call(**{name: value}), f"{name} must be a finite number {least}, got {shown(value)}", remedy)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "60", True, None])
def test_checkpoint_seconds(value):
    kind = ValueError if isinstance(value, float) else TypeError
    refuses(
        kind,
        lambda: estimate(checkpoint_seconds=value),
        f"checkpoint_seconds must be a finite number >= 0, got {value!r}",
    )


COUNTS = {"num_chains": 1, "num_draws": 1, "num_warmup": 0, "thinning": 1, "chunk_size": 1, "micro_batches": 1}
COUNTS["chain_batch"] = 1


@pytest.mark.parametrize("name", [*COUNTS, "num_data"])
@pytest.mark.parametrize(
    "value", [-1, "4", True, 4.0, float("nan"), [4], None, np.float32(4), np.ones(2, int)], ids=str
)
def test_counts(name, value):
    if value is None and name not in ("chunk_size", "micro_batches", "num_data"):
        return  # the default
    least = 2 if name == "num_data" else COUNTS[name]
    kind = ValueError if value is not None and type(value) is int else TypeError
    call = posterior if name == "num_data" else estimate
    refuses(kind, lambda: call(**{name: value}), f"{name} must be a whole number >= {least}, got {value!r}")
    if kind is ValueError:
        refuses(ValueError, lambda: call(**{name: least - 1}), name, f"got {least - 1}")


@pytest.mark.parametrize(("size", "kind"), [(0, ValueError), (8.0, TypeError), (True, TypeError)])
def test_batch_size(size, kind):
    words = (f"batch_size must be between 1 and num_data = 40, got {size!r}", "A few hundred is usual")
    refuses(kind, lambda: estimate(batch_size=size), *words)


def test_a_batch_of_more_examples_than_there_are():
    words = ("batch_size = 41 is more than the 40 examples of the data", "Take batch_size=40")
    refuses(ValueError, lambda: estimate(batch_size=41), *words)


def test_numpy_integers_are_numbers(tmp_path):
    """Kills: NumPy integers in the manifest or the settings, which JSON cannot write."""
    named = ("num_chains", "num_draws", "num_warmup", "thinning", "batch_size", "chunk_size", "micro_batches")
    given = {**PLAN, "thinning": 1, "chunk_size": 4, "micro_batches": 2, "chain_batch": None}
    plain = estimate(**given)
    numpy = estimate(posterior(num_data=np.int64(40)), checkpoint_dir=tmp_path / "run", key=np.int32(0),
                     **{k: np.int64(v) if k in named else v for k, v in given.items()})  # fmt: skip
    np.testing.assert_array_equal(numpy.loss_trace, plain.loss_trace)
    assert slt.load_result(numpy.save(tmp_path / "result")).settings.num_chains == 4


# Parts that do not divide


def test_parts_that_do_not_divide():
    two, four = (jax.make_mesh((n,), ("chain",)) for n in (2, 4))
    refuses(ValueError, lambda: estimate(micro_batches=3), "micro_batches = 3", "batch_size = 8", "Take a divisor")
    words = ("chain_batch = 3", "the 4 chains of one device", "Take one of [1, 2, 4]")
    refuses(ValueError, lambda: estimate(num_chains=8, chain_batch=3, mesh=two), *words)
    words = ("num_chains = 6", "chain axis of 4 devices", "Take a multiple, or a smaller mesh")
    refuses(ValueError, lambda: estimate(num_chains=6, mesh=four), *words)


# Mesh, sampler, posterior, baseline


def test_meshes(regression):
    model = jax.make_mesh((2,), ("model",))
    refuses(ValueError, lambda: estimate(mesh=model), "mesh must have an axis 'chain'", "('model',)")
    extra = jax.make_mesh((2, 2), ("chain", "data"))
    refuses(ValueError, lambda: estimate(mesh=extra), "mesh must have an axis 'chain'", "'data'")
    for bad in (jax.devices(), "chain", 4):
        refuses(
            TypeError, lambda bad=bad: estimate(mesh=bad), "mesh must be a jax.sharding.Mesh", shown(bad), "make_mesh"
        )


def test_meshes_of_either_kind_give_the_same(regression):
    """Kills: jax.make_mesh, whose axes are explicit unless told otherwise, refused by JAX deep inside."""
    plain = estimate(mesh=Mesh(np.array(jax.devices()[:4]), ("chain",)))
    np.testing.assert_array_equal(estimate(mesh=jax.make_mesh((4,), ("chain",))).loss_trace, plain.loss_trace)


@pytest.mark.quick
def test_wrong_objects():
    refuses(
        TypeError, lambda: estimate({"w": 1}), "posterior must be a LocalPosterior, got a dict", "LocalPosterior(loss"
    )
    refuses(TypeError, lambda: estimate(DATA, posterior()), "posterior must be a LocalPosterior", "then the data")
    for bad in ("sgld", slt.sgld, 1e-4):
        words = ("sampler must be a Sampler", repr(bad), "slt_jax.sgld(step_size)")
        refuses(TypeError, lambda bad=bad: estimate(sampler=bad), *words)
    for bad in ("both", None, True, np.zeros(2)):
        words = ("baseline must be 'paired' or 'full'", repr(bad))
        refuses(ValueError, lambda bad=bad: estimate(baseline=bad), *words)


@pytest.mark.parametrize("progress", [1, 0, None])
def test_progress_may_be_anything_true_or_false(progress, capsys):
    assert np.isfinite(estimate(progress=progress).llc)


# Keys


@pytest.mark.parametrize(
    "key",
    [
        lambda: jax.random.PRNGKey(0),
        lambda: np.array([0, 1], np.uint32),
        lambda: jax.random.split(jax.random.key(0), 2),
        lambda: jax.random.key(0, impl="rbg"),
        lambda: jax.random.key(0, impl="unsafe_rbg"),
        lambda: jnp.int32(3),
        lambda: 1.0,
        lambda: True,
        lambda: "0",
        lambda: None,
    ],
)
def test_keys(key):
    refuses(TypeError, lambda: estimate(key=key()), "key must be", "jax.random")


def test_what_the_refusal_of_a_key_says():
    refuses(
        TypeError, lambda: estimate(key=jax.random.PRNGKey(0)), "an array of uint32", "jax.random.wrap_key_data(key)"
    )
    refuses(TypeError, lambda: estimate(key=jax.random.key(0, impl="rbg")), "rbg", "impl='threefry2x32'")
    refuses(TypeError, lambda: estimate(key=jax.random.split(jax.random.key(0))), "shape (2,)")
    refuses(TypeError, lambda: estimate(key=1.5), "got 1.5")
    for seed in (-1, 2**32, 2**70, np.int64(-(2**31))):  # 2**32 drew what 0 draws
        words = ("key must be at least 0 and below 2**32", f"got {seed}.", "Take a number in that range")
        refuses(ValueError, lambda seed=seed: estimate(key=seed), *words)


def test_a_seed_and_its_key_are_the_same():
    first, last = (estimate(key=seed).loss_trace for seed in (0, 2**32 - 1))
    np.testing.assert_array_equal(last, estimate(key=jax.random.key(2**32 - 1)).loss_trace)
    assert not np.array_equal(first, last)


# Data

DATA_CASES = {
    "none": (None, ValueError, "no arrays"),
    "no leaves": ({}, ValueError, "no arrays"),
    "no rows": (np.ones((0, 3)), ValueError, "no examples"),
    "one number": (np.float32(3), TypeError, "every leaf must be an array"),
    "a leaf of one number": ({"x": DATA, "y": jnp.float32(1)}, TypeError, "'y'"),
    "lists of lists": ([[1.0, 2.0, 3.0]] * 40, TypeError, "every leaf must be an array"),
    "unequal rows": ({"x": DATA, "y": DATA[:7]}, ValueError, "'y': 7"),
    "a path": ("data.npy", TypeError, "'data.npy'"),
}


@pytest.mark.parametrize("case", DATA_CASES)
def test_data(case):
    data, kind, word = DATA_CASES[case]
    refuses(kind, lambda: estimate(data=data), "data", word)


# Center and mask

SOME_NAN = {"a": jnp.ones(2), "b": {"c": jnp.array([1.0, jnp.nan, jnp.inf])}}
CENTERS = {
    "nan": (SOME_NAN, ValueError, ("parameter 'b/c' has 2 entries of 3", "NaN or infinite", "center must be finite")),
    "integer": ({"w": jnp.arange(3)}, TypeError, ("parameter 'w' has type int32", "Freeze it with a mask")),
    "boolean": ({"w": np.ones(3, bool)}, TypeError, ("parameter 'w' has type bool", "Freeze it with a mask")),
    "complex": ({"w": jnp.ones(3, complex)}, TypeError, ("parameter 'w' has type complex64", "Freeze it")),
    "a Python float": ({"w": 0.0}, TypeError, ("parameter 'w'", "0.0", "jnp.asarray")),
    "lists": ({"w": [0.0, 1.0]}, TypeError, ("parameter 'w/0'", "not an array")),
    "empty": ({}, ValueError, ("center has no arrays", "Pass the trained parameters")),
    "too large for float32": ({"w": np.array([1e300])}, ValueError, ("'w' has 1 entries of 1",)),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("case", CENTERS)
def test_centers(case):
    center, kind, words = CENTERS[case]
    refuses(kind, lambda: posterior(center=center), *words)


def test_a_nan_in_a_frozen_leaf_is_refused_and_an_integer_leaf_is_not():
    refuses(ValueError, lambda: posterior(center=SOME_NAN, mask=lambda path: path[0] == "a"), "'b/c'")
    assert posterior(center={"w": jnp.ones(3), "n": jnp.arange(2)}, mask={"w": True, "n": False}).num_free == 3


PAIR = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
MASK_CASES = {
    "all free": ({"w": True, "b": True}, ValueError, ("the mask restricts nothing", "b, w", "Leave it out")),
    "all free by entries": (lambda path: np.True_, ValueError, ("the mask restricts nothing",)),
    "all frozen": (lambda path: path[0] == "typo", ValueError, ("leaves no weight free", "all 2 leaves", "b, w")),
    "another structure": ({"w": True}, ValueError, ("the mask does not match center", "'b'", "one boolean")),
    "one boolean": (True, ValueError, ("the mask does not match center", "one boolean")),
    "another shape": (
        {"w": np.ones((3, 2), bool), "b": False},
        ValueError,
        ("mask for 'w'", "(3, 2)", "(2, 3)", "Give"),
    ),
    "numbers": (
        {"w": 1, "b": 0},
        TypeError,
        ("the mask for 'b' must be boolean", "'0' of type int", "Give True, False"),
    ),
    "nothing returned": (lambda path: None, TypeError, ("the mask for 'b' must be boolean", "None")),
    "a name": ("w", ValueError, ("the mask does not match center",)),
}


@pytest.mark.parametrize("case", MASK_CASES)
def test_masks(case):
    mask, kind, words = MASK_CASES[case]
    refuses(kind, lambda: posterior(center=PAIR, mask=mask), *words)


@pytest.mark.parametrize("dtype", [jnp.int32, "int8", bool, "banana", complex, 16])
def test_forward_dtype(dtype):
    """Kills: weights rounded to whole numbers, whose gradient is zero and whose LLC looks like one."""
    refuses(
        TypeError,
        lambda: posterior(forward_dtype=dtype),
        "forward_dtype must be a floating-point",
        repr(dtype),
        "bfloat16",
    )


# The loss


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, w, x):
        return square(w, x)


def test_losses_that_are_no_functions():
    for bad in (None, 0.5, jnp.zeros(3)):
        refuses(TypeError, lambda bad=bad: posterior(loss_fn=bad), "loss_fn must be a function", type(bad).__name__)
    refuses(TypeError, lambda: posterior(loss_fn=Unhashable()), "loss_fn must be hashable", "lambda p, batch")
    assert np.isfinite(estimate(posterior(functools.partial(square))).llc)


LOSSES = {
    "per output": (lambda w, x: x * w, ValueError, "shape (8, 3)"),
    "one too few": (lambda w, x: square(w, x)[1:], ValueError, "shape (7,)"),
    "a column": (lambda w, x: square(w, x)[:, None], ValueError, "shape (8, 1)"),
    "a float": (lambda w, x: 0.0, ValueError, "a float"),
    "nothing": (lambda w, x: None, ValueError, "a NoneType"),
    "whole numbers": (lambda w, x: (x @ w > 0).astype(jnp.int32), TypeError, "int32"),
    "truths": (lambda w, x: x @ w > 0, TypeError, "bool"),
    "complex": (lambda w, x: square(w, x) + 0j, TypeError, "complex64"),
}


@pytest.mark.parametrize("baseline", ["paired", "full"])
@pytest.mark.parametrize("case", LOSSES)
def test_losses_of_the_wrong_shape(case, baseline):
    loss_fn, kind, found = LOSSES[case]
    remedy = "Reduce over every other axis" if kind is ValueError else "must return floating-point losses"
    refuses(kind, lambda: estimate(posterior(loss_fn), baseline=baseline), "loss_fn must return", found, remedy)


def test_a_loss_with_metrics():
    words = ("the losses alone", "a tuple of 2", "lambda p, batch: loss_fn(p, batch)[0]")
    refuses(ValueError, lambda: estimate(posterior(lambda w, x: (square(w, x), {"accuracy": 1.0}))), *words)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("baseline", ["paired", "full"])
def test_a_loss_not_finite_at_the_center(bad, baseline):
    target = posterior(lambda w, x: square(w, x) + bad)
    words = (f"the loss at w* is {bad}", "finite loss at the center", "Check the data for NaN")
    refuses(FloatingPointError, lambda: estimate(target, baseline=baseline), *words)


def test_one_bad_row_anywhere_shows_in_the_full_baseline():
    """Kills: an estimate of NaN without a word, when the bad row is in no chain's batch."""
    data = DATA.copy()
    data[-1, 0] = np.nan
    drawn = estimate(key=2, batch_size=1)
    assert not drawn.stopped
    refuses(
        FloatingPointError, lambda: estimate(data=data, key=2, batch_size=1, baseline="full"), "over the whole data set"
    )


def test_a_baseline_that_is_not_finite_stops_its_chain():
    """Finite where the chain is, not at w*, in one row only. Kills: a NaN in the draws of a chain called sound."""
    data = np.arange(40, dtype=np.float32)

    def loss(w, x):
        return jnp.where(x == 20, jnp.where(jnp.all(w == 0), jnp.nan, 1.0), 1.0) + 0.5 * jnp.sum(w**2)

    result = estimate(posterior(loss), data, num_draws=40, batch_size=1, num_warmup=0, key=1)
    assert result.stopped
    assert len(result.stopped) < 4
    assert np.isfinite(result.llc)
    for chain, step in result.stopped.items():
        assert np.flatnonzero(~np.isfinite(result.baseline_trace[chain]))[0] == step
