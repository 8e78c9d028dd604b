"""What share of a regular teacher's coefficient a posterior holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.dln import population, resolved
from scaling.dln.teachers import Shape, draw_shape

NBETA, PULL = 300.0, 50.0


def test_the_share_is_that_of_the_whole_hessian():
    """tr(H (H + localization)^-1) / 2 over all weights. Kills: a side's products in the wrong order, or transposed."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=pair) for pair in ((3, 2), (2, 4), (4, 5))]
    sizes = np.cumsum([0, *(w.size for w in layers)])

    def loss(flat):
        parts = [flat[a:b].reshape(w.shape) for a, b, w in zip(sizes, sizes[1:], layers, strict=False)]
        return population.loss_fn(parts, [jnp.asarray(w)[None] for w in layers])[0]

    hessian = NBETA * np.asarray(jax.hessian(loss)(jnp.zeros(int(sizes[-1]))), np.float64)
    whole = 0.5 * np.trace(hessian @ np.linalg.inv(hessian + PULL * np.eye(sizes[-1])))
    assert resolved.held(resolved.eigenvalues(layers), 5, NBETA, PULL) == pytest.approx(whole, rel=1e-4)
    every = 2 * (3 + 5 - 2) / 2
    assert resolved.held(resolved.eigenvalues(layers), 5, 1e12, PULL) == pytest.approx(every, rel=1e-4)


@pytest.mark.quick
def test_a_narrower_shape_keeps_what_is_full_and_what_is_cut():
    shape = resolved.narrowed(Shape((100, 60, 80), (60, 20)), 10)
    assert shape == Shape((10, 6, 8), (6, 2))
    assert resolved.narrowed(Shape((100, 30), (5,)), 20) == Shape((5, 4), (1,))


def test_a_deep_narrow_teacher_needs_a_larger_nbeta_than_a_shallow_one(capsys, monkeypatch):
    """19 layers of class 1M against 5: the table that README.md quotes, in small."""
    deep, shallow = (resolved.narrowed(draw_shape("B", "1M", seed), 30) for seed in (6, 4))
    low, high = resolved.shares(deep, 38, [1e12, 1e24], 0)
    assert low < 0.9 < 0.97 < high
    assert resolved.shares(shallow, 360, [1e12], 0)[0] > 0.98
    monkeypatch.setattr("sys.argv", "resolved --class 1M --type B --seed 4 --narrower 60 --nbeta 1e12".split())
    resolved.main()
    head, _, row = capsys.readouterr().out.splitlines()
    assert head == "| teacher | layers | 1e+12 |"
    assert row.startswith("| 1M B 4 | 5 | ")
