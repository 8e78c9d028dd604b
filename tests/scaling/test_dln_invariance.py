"""The study of invariance: rescaled networks are the same function, and what is predicted of their posteriors."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.dln import invariance, invariance_plot, truth

SCALES = (1e-4, 0.1, 1.0, 30.0, 1e4)


@pytest.fixture(scope="module", params=["linear", "relu"])
def network(request):
    return invariance.make_network(request.param)


@pytest.mark.quick
@pytest.mark.parametrize("s", SCALES)
def test_the_rescaled_network_computes_the_same_function(network, s):
    """To rounding: the loss against its own outputs is nothing beside the outputs' size."""
    batch = (network.x[:500], network.y[:500])
    for weights in (invariance.rescale(network.weights, s), invariance.balance(invariance.rescale(network.weights, s))):
        losses = invariance.LOSSES[network.name](weights, batch)
        # a relative error of a few float32 roundings, squared
        assert float(jnp.max(losses)) < (16 * np.finfo(np.float32).eps) ** 2 * np.max(np.sum(batch[1] ** 2, 1))


@pytest.mark.quick
def test_the_scale_is_on_the_layers(network):
    first, second = invariance.rescale(network.weights, 100.0)
    np.testing.assert_allclose(first, 100 * network.weights[0], rtol=1e-6)
    np.testing.assert_allclose(second, network.weights[1] / 100, rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("s", SCALES)
def test_balance_leads_every_scale_to_the_same_weights(network, s):
    found = invariance.balance(invariance.rescale(network.weights, s))
    for mine, base in zip(found, invariance.balance(network.weights), strict=True):
        np.testing.assert_allclose(mine, base, rtol=1e-5)
    assert np.linalg.norm(found[0]) == pytest.approx(np.linalg.norm(found[1]), rel=1e-5)


@pytest.mark.quick
def test_the_jacobian_is_that_of_the_network(network):
    """Kills a wrong order of the entries, and the layers exchanged."""
    x = jnp.asarray(network.x[:40])
    act = jax.nn.relu if network.name == "relu" else lambda z: z
    by_layer = jax.jacobian(lambda w: act(x @ w[0]) @ w[1])(tuple(map(jnp.asarray, network.weights)))
    expected = np.concatenate([np.asarray(j).reshape(40 * network.y.shape[1], -1) for j in by_layer], axis=1)
    np.testing.assert_allclose(math.sqrt(40) * invariance.jacobian(network, 40), expected, atol=1e-5)


@pytest.mark.quick
def test_the_coefficients_are_exact(network):
    """Half the rank of the Jacobian at a regular zero set; for the linear one also the theorem's."""
    assert 2 * network.coefficient == np.linalg.matrix_rank(invariance.jacobian(network))
    free = sum(w.size for w in network.weights)
    if network.name == "linear":
        assert network.coefficient == 14 == truth.learning_coefficient((6, 4, 5), 4)[0]
        assert truth.local_bounds(network.weights) == (14, 14)
    else:
        assert network.coefficient == 17.5 == (free - 5) / 2


@pytest.mark.quick
def test_the_curvatures_are_those_of_the_rescaled_loss(network):
    """The Hessian at (s W_1, W_2 / s) by differentiation, over the same examples, in float32."""
    s, batch = 3.0, (network.x[:2000], network.y[:2000])
    center, unravel = jax.flatten_util.ravel_pytree(tuple(map(jnp.asarray, invariance.rescale(network.weights, s))))
    loss = lambda w: jnp.mean(invariance.LOSSES[network.name](unravel(w), batch))  # noqa: E731
    expected = np.linalg.eigvalsh(np.asarray(jax.hessian(loss)(center), np.float64))[::-1]
    found = invariance.curvatures(network, s, 1.0)
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-5 * expected[0])


@pytest.mark.quick
def test_a_perfect_sampler_reads_the_coefficient_in_the_middle_and_the_far_value_at_the_ends(network):
    nbeta = 8686.0
    assert invariance.posterior_value(network, 1.0, nbeta, 1e-6) == pytest.approx(network.coefficient, rel=1e-6)
    for s in (1e-6, 1e6):
        # a localization at the geometric mean of stiff and soft
        found = invariance.posterior_value(network, s, nbeta, nbeta)
        assert found == pytest.approx(invariance.far_value(network, s), rel=1e-6)
        assert found < network.coefficient


def test_sgld_at_one_step_is_right_at_one_and_lost_at_the_ends(network):
    """What fails is seen: no number, or a verdict."""
    middle, end = (invariance.measure(network, "SGLD, fixed step", e, 6_000) for e in (0, 3))
    assert middle["llc"] == pytest.approx(network.coefficient, abs=5 * middle["llc_stderr"])
    assert end["llc"] is None
    assert end["verdict"] == "diverged"
    assert end["step_size"] == middle["step_size"]


@pytest.mark.quick
def test_an_unknown_relu_coefficient_is_refused():
    network = invariance.make_network("relu")
    dead = (-np.abs(network.weights[0]), network.weights[1])
    broken = network._replace(weights=dead, x=np.abs(network.x))
    with pytest.raises(ValueError, match="has rank 0, not 35"):
        invariance.exact_coefficient(broken)


@pytest.mark.quick
def test_tables_and_picture_need_only_the_record(tmp_path, capsys):
    rows = [
        {
            "network": name, "method": "default", "exponent": e, "coefficient": 14.0, "posterior_value": 13.0,
            "llc": llc, "llc_stderr": llc and 0.1, "verdict": verdict, "step_size": 1e-6, "localization": 1.0,
        }
        for name in ("linear", "relu")
        for e, llc, verdict in ((-4, None, "diverged"), (0, 14.1, "converged"), (2, 90.0, "too few draws"),
                                (4, 10.0, "converged"))
    ]  # fmt: skip
    record = json.loads(json.dumps({"rows": rows}))
    invariance.print_tables(record)
    assert "| linear | default | 0.71 to 6.43 | 1 | 0 | 3 (1) | 3 (1) |" in capsys.readouterr().out
    invariance_plot.draw(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
