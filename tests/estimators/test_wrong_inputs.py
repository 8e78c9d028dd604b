"""Other uses that crashed or hung: parts by path, counts without end, empty leaves, torch's tensors, paths."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from tests.small import DATA, PLAN, estimate, posterior, refuses, square


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


@pytest.mark.usefixtures("wrong_types")
def test_what_a_search_over_arguments_found():
    """Each was obscure, or a number without a word: found by the search in ``tests/properties``."""
    refuses(ValueError, lambda: posterior(nbeta=1e-300), "nbeta must lie in the range of float32", "1e-300")
    refuses(ValueError, lambda: posterior(localization=1e300), "localization must lie in the range of float32")
    refuses(ValueError, lambda: slt.sgld(1e300), "step_size must lie in the range of float32")
    masked = np.ma.masked_array(DATA, DATA > 1)
    refuses(TypeError, lambda: estimate(data=masked), "'data' is a masked array, whose mask would be lost", "filled(0)")
    refuses(TypeError, lambda: posterior(center={"w": np.ma.ones(3)}), "parameter 'w' is a masked array")
    refuses(TypeError, lambda: posterior(center=jnp.zeros(3), mask=lambda path: path[7]), "mask failed for the path ()")
    words = ("center cannot be read as a pytree", "of one type")
    refuses(ValueError, lambda: posterior(center={1: jnp.ones(2), "b": jnp.ones(1)}), *words)
    refuses(ValueError, lambda: estimate(data={1: DATA, "b": DATA}), "the data cannot be read as a pytree")
    refuses(ValueError, lambda: posterior(center={"w": np.zeros((0, 3), np.float32)}), "center has no weights")
    refuses(ValueError, lambda: estimate(also={"a": None}), "also['a']: the data has no arrays")
    refuses(TypeError, lambda: estimate(control_variate=np.zeros(3)), "control_variate must be True, False or None")
    large = np.arange(10_000.0).reshape(100, 100)
    with pytest.raises(TypeError, match="nbeta must be a finite number") as error:
        posterior(nbeta=large)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)
    values = [np.ones(2), np.ones(2)]
    refuses(TypeError, lambda: slt.sweep(posterior(), DATA, sampler=slt.sgld(), nbeta=values), "each nbeta must be")


def test_an_empty_leaf_on_several_devices():
    """Kills: the measurement at the end that failed for it."""
    center = {"w": jnp.zeros(3), "none": jnp.zeros((0, 4))}
    result = estimate(posterior(lambda p, x: square(p["w"], x), center), num_draws=200, num_warmup=200)
    assert result.notes == ()
    assert "noise" in result.settings.probe
