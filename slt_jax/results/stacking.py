"""Many results of one shape as one tree of arrays, and back."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax.engine.trace import Trace
from slt_jax.results.llc import LLCResult
from slt_jax.results.record import RunRecord
from slt_jax.results.tree import SAVED, read_traces, saved_traces

if TYPE_CHECKING:
    import xarray as xr


def stack(
    results: Sequence[LLCResult], dims: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[dict[str, "xr.Dataset"], dict[str, Any]]:
    """(groups, attributes) of a tree that holds all of ``results``: their traces over ``dims``, chain and draw.

    ``posterior``, for ArviZ, has the LLC at each draw.
    """
    import xarray as xr

    def stacked(arrays: list[np.ndarray]) -> np.ndarray:
        values = np.stack(arrays)
        return values.reshape(*shape, *values.shape[1:])

    each = [saved_traces(result.traces) for result in results]
    traces = {name: stacked([one[name] for one in each]) for name in SAVED}
    warm = stacked([result.warmup_loss for result in results])
    records = [[r.settings.to_json(), {str(k): v for k, v in r.stopped.items()}, list(r.notes)] for r in results]
    gaps = [r.settings.nbeta * (r.traces.loss.astype(np.float64) - r.traces.baseline) for r in results]
    groups = {
        "/posterior": xr.Dataset({"llc": ((*dims, "chain", "draw"), stacked(gaps))}),
        "/sample_stats": xr.Dataset({name: ((*dims, "chain", "draw"), x) for name, x in traces.items()}),
        "/warmup_sample_stats": xr.Dataset({"loss": ((*dims, "chain", "step"), warm)}),
    }
    return groups, {"results": json.dumps(records)}


def unstack(tree: "xr.DataTree", num_dims: int) -> tuple[LLCResult, ...]:
    """What ``stack`` took. Raises ValueError when the traces are not those that were saved."""
    warm = tree["warmup_sample_stats"].to_dataset()["loss"].values
    traces, added = read_traces(tree, [warm])

    def flat(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, *values.shape[num_dims:])

    rows, warm = {name: flat(values) for name, values in traces.items()}, flat(warm)
    return tuple(
        LLCResult(
            traces=Trace(**{name: values[i] for name, values in rows.items()}),
            warmup_loss=warm[i],
            stopped={int(chain): step for chain, step in stopped.items()},
            settings=RunRecord.from_json(settings),
            notes=(*notes, *added),
        )
        for i, (settings, stopped, notes) in enumerate(json.loads(tree.attrs["results"]))
    )
