"""Many results of one shape as one tree of arrays, and back."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax.results.llc import TRACES, LLCResult, read_traces
from slt_jax.results.storage import digest

if TYPE_CHECKING:
    import xarray as xr


def stack(
    results: Sequence[LLCResult], dims: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[dict[str, "xr.Dataset"], dict[str, Any]]:
    """(groups, attributes) of a tree that holds all of ``results``: their traces over ``dims``, chain and draw."""
    import xarray as xr

    def stacked(name):
        values = np.stack([getattr(result, name) for result in results])
        return values.reshape(*shape, *values.shape[1:])

    traces = {name: stacked(name) for name in TRACES}
    warm = stacked("warmup_loss")
    records = [[r.settings, {str(k): v for k, v in r.stopped.items()}, list(r.notes)] for r in results]
    groups = {
        "/sample_stats": xr.Dataset({name: ((*dims, "chain", "draw"), x) for name, x in traces.items()}),
        "/warmup_sample_stats": xr.Dataset({"loss": ((*dims, "chain", "step"), warm)}),
    }
    return groups, {"results": json.dumps(records), "sha256": digest([*traces.values(), warm])}


def unstack(tree: "xr.DataTree", num_dims: int) -> tuple[LLCResult, ...]:
    """What ``stack`` took. Raises ValueError when the traces are not those that were saved."""
    warm = tree["warmup_sample_stats"]["loss"].values
    arrays = [*read_traces(tree["sample_stats"], [warm], tree.attrs["sha256"]), warm]
    rows = [x.reshape(-1, *x.shape[num_dims:]) for x in arrays]
    found = []
    for i, (settings, stopped, notes) in enumerate(json.loads(tree.attrs["results"])):
        stops = {int(chain): step for chain, step in stopped.items()}
        found.append(LLCResult(*(x[i] for x in rows), stops, settings, tuple(notes)))
    return tuple(found)
