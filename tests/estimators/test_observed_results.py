"""Generalization and influence of a run of the library: the exact values of its linear model."""

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from tests.results.exact_draws import linear


@pytest.mark.skipif(not hasattr(slt, "Observable"), reason="estimate_llc cannot observe yet")
@pytest.mark.quick
def test_a_run_has_the_exact_values(tmp_path):
    """Exact MALA draws of a linear model. Kills: values of other examples or draws; a center that is not w*."""
    model = linear(n=60, d=3, beta=1.0, gamma=5.0, seed=9)
    data = model.x.astype(np.float32), model.y.astype(np.float32)

    def loss(w, batch):
        return 0.5 * (batch[1] - batch[0] @ w) ** 2

    posterior = slt.LocalPosterior(
        loss, jnp.asarray(model.center, jnp.float32), num_data=60, nbeta=60.0, localization=5.0
    )
    result = slt.estimate_llc(
        posterior, data, sampler=slt.mala(0.02), num_chains=4, num_draws=1500, num_warmup=200, thinning=2,
        observe={"train": data}, key=0,
    )  # fmt: skip
    covariance, gibbs, bayes = model.exact()
    for seen in (result, None):
        found = slt.generalization(seen, "train" if seen else result.observed["train"])
        for name, truth in (("functional_variance", np.trace(covariance)), ("gibbs_train", gibbs.mean()),
                            ("bayes_train", bayes.mean())):  # fmt: skip
            value, error = getattr(found, name)
            assert abs(value - truth) < 3.5 * error
    np.testing.assert_allclose(result.observed["train"].center, model.losses(model.center), rtol=1e-4, atol=1e-5)
    every = slice(None)
    influence = slt.influence(result, of="train", on="train", normalized=False)
    assert influence.beta == 1.0
    z = (influence.block(every, every) + covariance) / influence.stderr(every, every)
    assert np.mean(z**2) < 2.5
    result.save(tmp_path / "r.zarr")
    again = slt.influence(slt.load_result(tmp_path / "r.zarr"), of="train", on="train", normalized=False)
    assert np.array_equal(again.row(3), influence.row(3))
