"""The local posterior: what moves, what stays, the loss as a program, and its fingerprint."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt

CENTER = {
    "blocks": [{"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.arange(3.0)}],
    "head": jnp.ones((3,), jnp.bfloat16),
}
KERNEL, BIAS, HEAD = "blocks/0/kernel", "blocks/0/bias", "head"


def loss_fn(params, x):
    block = params["blocks"][0]
    return jnp.tanh(x @ block["kernel"] + block["bias"]) @ params["head"].astype(jnp.float32)


BATCH = np.ones((5, 2), np.float32)


def posterior(loss_fn=loss_fn, center=CENTER, num_data=100, **more):
    return slt.LocalPosterior(loss_fn, center, num_data, **more)


def tree_of(kernel, bias, head):
    return {"blocks": [{"kernel": kernel, "bias": bias}], "head": head}


@pytest.mark.quick
def test_defaults():
    target = posterior()
    assert target.nbeta == 100 / math.log(100)
    assert target.localization is None
    assert target.num_free == 12
    assert sorted(target.free_names) == sorted([BIAS, KERNEL, HEAD])


@pytest.mark.usefixtures("wrong_types")
@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.float64(3), np.int64(3), jnp.float32(3), jnp.int32(3)])
def test_any_real_scalar_is_a_hyperparameter(value):
    target = posterior(nbeta=value, localization=value)
    assert (target.nbeta, target.localization) == (3.0, 3.0)
    assert type(target.nbeta) is type(target.localization) is float
    assert slt.sgld(value).step_size == 3.0


@pytest.mark.usefixtures("wrong_types")
def test_num_data_of_numpy_becomes_an_int():
    """Kills: a NumPy integer in the settings, which JSON cannot write."""
    assert type(posterior(num_data=np.int32(100)).num_data) is int


CHOSEN = np.array([[True, False, False], [False, True, True]])
MASKS = {
    "one leaf of a tree": (tree_of(True, False, False), [KERNEL], 6),
    "a function": (lambda path: path[-1] == "bias", [BIAS], 3),
    "a function of the whole path": (lambda path: path == ("blocks", "0", "kernel"), [KERNEL], 6),
    "entries": (tree_of(CHOSEN, False, True), [KERNEL, HEAD], 6),
    "entries from a function": (lambda path: CHOSEN if path[-1] == "kernel" else False, [KERNEL], 3),
    "device entries": (tree_of(jnp.asarray(CHOSEN), True, True), [BIAS, KERNEL, HEAD], 9),
    "no entry": (tree_of(np.zeros((2, 3), bool), True, np.True_), [BIAS, HEAD], 6),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", MASKS)
def test_masks(case):
    """Sizes, names, and split and merge there and back. Kills: entries in another order; a cut leaf merged whole."""
    mask, names, num_free = MASKS[case]
    target = posterior(mask=mask)
    assert sorted(target.free_names) == sorted(names)
    assert target.num_free == num_free
    position, frozen = target.program.split(CENTER)
    assert [x.dtype for x in position] == [jnp.float32] * len(names)
    assert sum(x.size for x in position) == num_free
    back = target.program.merge(position, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(CENTER)
    for got, given in zip(jax.tree.leaves(back), jax.tree.leaves(CENTER), strict=True):
        assert got.dtype == given.dtype
        np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize("case", MASKS)
def test_only_what_the_mask_leaves_free_moves(case):
    """Kills: a mask taken for its complement; an entry written to the wrong place."""
    mask, names, _ = MASKS[case]
    target = posterior(mask=mask)
    position, frozen = target.program.split(CENTER)
    moved = target.program.merge(tuple(w + 64.0 for w in position), frozen)
    for path, before in jax.tree_util.tree_flatten_with_path(CENTER)[0]:
        name = "/".join(str(getattr(k, "key", getattr(k, "idx", None))) for k in path)
        after = moved
        for k in path:
            after = after[getattr(k, "key", getattr(k, "idx", None))]
        expected = np.full(before.shape, name in names)
        if name == KERNEL and "entries" in case:
            expected = CHOSEN
        np.testing.assert_array_equal(after, before + 64.0 * expected, err_msg=name)


def test_the_engine_moves_only_free_weights(tmp_path):
    """An integer leaf, a random key and a frozen leaf go through a whole run with checkpoints."""
    center = {"w": jnp.zeros(2), "table": jnp.arange(4), "key": jax.random.key(0), "scale": np.float16(2)}

    def loss(params, x):
        assert params["table"].dtype == jnp.int32
        assert params["scale"].dtype == jnp.float16
        return params["scale"] * (x @ params["w"]) ** 2 + params["table"].sum()

    target = slt.LocalPosterior(loss, center, 20, mask=lambda path: path[0] == "w")
    result = slt.estimate_llc(
        target, np.ones((20, 2), np.float32), num_draws=8, batch_size=4, num_chains=1, checkpoint_dir=tmp_path
    )
    assert target.num_free == result.settings.num_free == 2
    assert np.isfinite(result.llc)


def test_masters_are_float32_and_the_loss_sees_the_forward_dtype():
    """Kills: a chain in bfloat16, whose small steps round to nothing; frozen leaves left in float32."""
    seen = []

    def watch(params, x):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return loss_fn(jax.tree.map(lambda w: w.astype(jnp.float32), params), x)

    target = posterior(watch, mask=tree_of(CHOSEN, False, True), forward_dtype=jnp.bfloat16)
    position, frozen = target.program.split(CENTER)
    value = target.program.mean_loss(position, frozen, BATCH)
    assert {x.dtype for x in position} == {jnp.dtype(jnp.float32)}
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert value.dtype == jnp.float32


def test_a_numpy_float64_center_is_float32_without_x64():
    """Kills: a warning about truncation for every leaf (warnings are errors here)."""
    target = slt.LocalPosterior(lambda w, x: x @ w, np.zeros(3), 10, mask=np.array([True, False, True]))
    position, frozen = target.program.split(target.center)
    assert {x.dtype for x in (*position, *frozen, target.program.merge(position, frozen))} == {jnp.dtype("float32")}


def test_mean_loss_of_per_example_losses_and_of_a_scalar():
    target, scalar = posterior(), posterior(lambda p, x: loss_fn(p, x).mean())
    position, frozen = target.program.split(CENTER)
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    expected = float(np.mean([loss_fn(CENTER, x[i : i + 1])[0] for i in range(5)]))
    for one in (target, scalar):
        np.testing.assert_allclose(one.program.mean_loss(position, frozen, x), expected, rtol=1e-6)
    assert target.program.losses(position, frozen, x).shape == (5,)


def changed_gradient(factor):
    """loss_fn with another gradient and the same value."""

    @jax.custom_vjp
    def scaled(value):
        return value

    scaled.defvjp(lambda value: (value, None), lambda _, g: (factor * g,))
    return lambda p, x: scaled(loss_fn(p, x))


def constant_inside(position, *, jit):
    weights = np.ones(3000, np.float32)
    weights[position] = 2.0
    inner = (jax.jit if jit else lambda f: f)(lambda p, x: loss_fn(p, x) * (x.sum() * jnp.asarray(weights)).max())
    return lambda p, x: inner(p, x)


PARTS = {
    "nbeta": ({"nbeta": 50.0}, {"nbeta": 51.0}, {"nbeta"}),
    "localization": ({}, {"localization": 2.0}, {"localization"}),
    "num_data": ({"nbeta": 5.0}, {"nbeta": 5.0, "num_data": 101}, {"num_data"}),
    "one weight": ({}, {"center": tree_of(CENTER["blocks"][0]["kernel"], jnp.array([0.0, 1.0, 2.5]), CENTER["head"])},
                   {"center"}),
    "a mask": ({}, {"mask": tree_of(True, True, False)}, {"mask", "loss_fn"}),
    "entries of a mask": (
        {"mask": tree_of(CHOSEN, True, True)}, {"mask": tree_of(CHOSEN[::-1], True, True)}, {"mask", "loss_fn"}),
    "forward_dtype": ({}, {"forward_dtype": jnp.float16}, {"forward_dtype", "loss_fn"}),
    "loss": ({}, {"loss_fn": lambda p, x: 3.0 * loss_fn(p, x)}, {"loss_fn"}),
    "a constant": ({"loss_fn": constant_inside(5, jit=False)}, {"loss_fn": constant_inside(1500, jit=False)},
                   {"loss_fn"}),
    "a constant inside jit": ({"loss_fn": constant_inside(5, jit=True)}, {"loss_fn": constant_inside(1500, jit=True)},
                              {"loss_fn"}),
    "a custom gradient": ({"loss_fn": changed_gradient(1.0)}, {"loss_fn": changed_gradient(2.0)}, {"loss_fn"}),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_the_fingerprint_changes_with_each_ingredient(part):
    """Kills: an ingredient left out; one hashed by its printed form, which abbreviates."""
    base, other, expected = PARTS[part]
    first, again, second = (posterior(**given).fingerprint(BATCH) for given in (base, base, other))
    assert first == again
    differing = {name for name in first if first[name] != second[name]}
    assert expected - {"loss_fn"} <= differing <= expected
    assert differing


def test_the_fingerprint_does_not_depend_on_the_function_object_or_the_batch_values():
    def same(params, x):
        return loss_fn(params, x)

    assert posterior(same).fingerprint(BATCH) == posterior().fingerprint(2 * BATCH)


STABLE = """
import json, jax, jax.numpy as jnp, numpy as np
import slt_jax as slt
weights = np.linspace(0, 1, 2000, dtype=np.float32)
inner = jax.jit(lambda p, x: jnp.tanh(x @ p["w"]) * jnp.asarray(weights).sum())
remat = jax.checkpoint(lambda p, x: jax.nn.relu(inner(p, x)))
def loss_fn(p, x):
    jax.debug.callback(lambda total: None, x.sum())  # printed with its address
    return remat(p, x)
center = {name: jnp.arange(2.0) for name in ("w", "v", "u")}
target = slt.LocalPosterior(loss_fn, center, 100, mask=lambda path: path[0] in {"w", "v"})
print(json.dumps(target.fingerprint(np.ones((3, 2), np.float32))))
"""


def test_the_fingerprint_is_the_same_in_every_process(monkeypatch):
    """Kills: addresses or the order of sets in the hash, after which no run could be resumed."""
    found = set()
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.add(subprocess.run([sys.executable, "-c", STABLE], capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1
    assert "loss_fn" in found.pop()


@pytest.mark.quick
def test_other_numbers_around_the_same_weights():
    """Kills: numbers that are not checked; weights that are looked at again; a program of its own."""
    first = slt.LocalPosterior(lambda w, x: x @ w, jnp.ones(3), 40, 10.0, 1.0, mask=np.array([True, False, True]))
    other = first.with_numbers(nbeta=20, localization=None)
    assert (first.nbeta, first.localization) == (10.0, 1.0)
    assert (other.nbeta, other.localization, other.num_free) == (20.0, None, 2)
    assert isinstance(other.nbeta, float)
    assert other.program is first.program
    for wrong in ({"nbeta": -1.0, "localization": 1.0}, {"nbeta": 1.0, "localization": 0.0}):
        with pytest.raises(ValueError, match="must be a finite number >"):
            first.with_numbers(**wrong)
