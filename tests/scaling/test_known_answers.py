"""The values that estimates are held against, found in a second way."""

import numpy as np
import pytest

from scaling.known_answers import by_name


@pytest.mark.parametrize("nbeta", [500.0, 16_384.0])
@pytest.mark.parametrize("localization", [0.16, 1.0])
def test_the_cusp_s_value_is_the_same_integrated_the_other_way(nbeta, localization):
    """Over y first and along x, in place of over x and along y: no grid point is shared, and no Jacobian."""
    reach = 12 / np.sqrt(localization)
    y = np.concatenate([[0.0], np.geomspace(1e-9, reach, 4000)])
    band = 7 / np.sqrt(nbeta)
    low, high = np.cbrt(y**2 - band), np.cbrt(y**2 + band)
    x = low + np.linspace(0, 1, 801)[:, None] * (high - low)
    fall = nbeta * (y**2 - x**3) ** 2
    density = np.exp(-fall - 0.5 * localization * (x**2 + y**2)) * (high - low)
    held, total = (np.trapezoid(part.mean(0), y) for part in (fall * density, density))
    assert by_name("(y^2 - x^3)^2").exact(nbeta, localization) == pytest.approx(held / total, rel=2e-3)


@pytest.mark.parametrize(("name", "power"), [("x^2 y^2", 2), ("x^2 y^4", 4)])
def test_a_product_s_value_is_the_same_with_one_factor_integrated_out(name, power):
    """Given y, x is Gaussian of precision 2 nbeta y^power + localization: one integral is left in place of two."""
    nbeta, localization = 16_384.0, 0.16
    y = np.geomspace(1e-9, 12 / np.sqrt(localization), 20_001)
    curvature = 2 * nbeta * y**power
    density = y * np.exp(-0.5 * localization * y**2) / np.sqrt(curvature + localization)  # the first y is dy / dlog y
    expected = (0.5 * curvature / (curvature + localization) * density).sum() / density.sum()
    assert by_name(name).exact(nbeta, localization) == pytest.approx(expected, rel=1e-3)
