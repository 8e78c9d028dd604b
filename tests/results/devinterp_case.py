"""A tiny trace, and what devinterp's compute_bif makes of it: ``python -m tests.results.devinterp_case`` where that is
installed (devinterp 2.0.1, which needs torch) prints the numbers of devinterp_expected.json."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from slt_jax.results.observed import Observed

EXPECTED = Path(__file__).with_name("devinterp_expected.json")


def trace() -> Observed:
    """4 texts of 3 tokens at 2 chains of 6 draws: sines, which are the same everywhere."""
    chain, draw, text, token = np.meshgrid(*(np.arange(size) for size in (2, 6, 4, 3)), indexing="ij")
    phase = 1.7 * chain + 2.3 * draw + 0.9 * draw * text + 0.4 * text + 1.1 * token * draw
    values = (2 + np.sin(phase) + 0.3 * np.cos(0.7 * draw)).astype(np.float32)
    gap = (values.mean((2, 3)) - 2).astype(np.float64)
    return Observed(
        name="tiny", level="token", values=values, moments=None, center=np.full((4, 3), 2, np.float32), valid=None,
        gap=gap, nbeta=10.0, num_data=100, localization=5.0,
    )  # fmt: skip


def influences(path: Path) -> dict[str, list]:
    """What compute_bif gives for the file at ``path``, by its options; every array as a list."""
    import xarray as xr
    from devinterp.slt.bif import compute_bif  # pyright: ignore[reportMissingImports]

    samples = xr.open_datatree(str(path), engine="zarr", consolidated=False)
    found = {}
    for method in ("token", "sequence"):
        for covariance in (False, True):
            values = compute_bif(samples, correlation_method=method, compute_covariance=covariance, device="cpu")
            found[f"{method}, {'covariance' if covariance else 'correlation'}"] = values["influences"].values.tolist()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        json.dump(influences(trace().to_devinterp(Path(folder) / "tiny.zarr")), sys.stdout)
