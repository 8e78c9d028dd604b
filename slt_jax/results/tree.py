"""What a saved estimate holds: its traces and settings as a tree of arrays with attributes, and back."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax._io import digest_of_arrays
from slt_jax.engine.trace import Trace
from slt_jax.results.observed import Observed
from slt_jax.results.observed_tree import groups_of, observed_in
from slt_jax.results.other_data import READINGS
from slt_jax.results.record import RunRecord
from slt_jax.results.storage import FORMAT, RESULT, TRACES_DIGEST, UNVERIFIED

if TYPE_CHECKING:
    import xarray as xr


SAVED = {
    "loss_trace": "loss", "baseline_trace": "baseline",
    **{name: name for name in (
        "gap_var", "tilt", "drift_sq", "virial", "distance_sq", "kinetic", "acceptance", "pull",
    )},
}  # fmt: skip
"""Name in a saved file -> name in ``Trace``."""


def tree_of(
    traces: Trace,
    warmup_loss: np.ndarray,
    stopped: dict[int, int],
    settings: RunRecord,
    notes: tuple[str, ...],
    other_names: tuple[str, ...],
    observed: dict[str, Observed],
) -> "xr.DataTree":
    """The fields of an ``LLCResult`` as a tree; see ``LLCResult.to_xarray``."""
    import xarray as xr  # 70 MB of memory, only when needed

    sample = xr.Dataset({name: (("chain", "draw"), x) for name, x in saved_traces(traces).items()})
    warm = xr.Dataset({"loss": (("chain", "step"), warmup_loss)})
    groups = {"/sample_stats": sample, "/warmup_sample_stats": warm}
    if kept := [c for c in range(len(traces.loss)) if c not in stopped]:
        draws = {name: (("chain", "draw"), x[kept]) for name, x in posterior_of(traces, settings.nbeta).items()}
        groups["/posterior"] = xr.Dataset(draws, {"chain": kept, "draw": np.arange(traces.loss.shape[1])})
    if other_names:
        each = np.moveaxis(traces.also, (2, 3), (1, 0))
        dims = ("data_set", "chain", "draw")
        also = {name: (dims, value) for name, value in zip(READINGS, each, strict=True)}
        groups["/also_sample_stats"] = xr.Dataset(also, {"data_set": np.array(other_names, dtype=object)})
    tree = xr.DataTree.from_dict(groups | groups_of(observed))
    tree.attrs = {
        RESULT: FORMAT,
        "settings": json.dumps(settings.to_json()),
        "stopped": json.dumps({str(k): v for k, v in stopped.items()}),
        "notes": json.dumps(list(notes)),
    }
    return tree


def fields_of(tree: "xr.DataTree") -> dict[str, Any]:
    """What ``tree_of`` was given, by name. Raises what ``read_traces`` raises, and KeyError where a part is missing."""
    settings, stopped, notes = (json.loads(tree.attrs[name]) for name in ("settings", "stopped", "notes"))
    warm = tree["warmup_sample_stats"].to_dataset()["loss"].values
    also, names, each = (), (), []
    if "also_sample_stats" in tree:
        group = tree["also_sample_stats"].to_dataset()
        also = np.moveaxis(np.stack([group[name].values for name in READINGS], axis=-1), 0, 2)
        names, each = tuple(str(name) for name in group["data_set"].values), list(np.moveaxis(also, 2, 0))
    traces, added = read_traces(tree, [warm, *each])
    return {
        "traces": Trace(**traces, also=also),
        "warmup_loss": warm,
        "stopped": {int(k): v for k, v in stopped.items()},
        "settings": RunRecord.from_json(settings),
        "notes": (*notes, *added),
        "other_names": names,
        "observed": observed_in(tree),
    }


def posterior_of(traces: Trace, nbeta: float) -> dict[str, np.ndarray]:
    """What ArviZ takes for draws of the posterior: LLC, loss (nats per example) and distance from w*, at each draw."""
    gap = traces.loss.astype(np.float64) - traces.baseline.astype(np.float64)
    found = {"llc": nbeta * gap, "loss": traces.loss, "distance": np.sqrt(traces.distance_sq)}
    return {name: values for name, values in found.items() if not np.isnan(values).all()}


def saved_traces(traces: Trace) -> dict[str, np.ndarray]:
    """The traces by their names in a saved file."""
    return {name: getattr(traces, field) for name, field in SAVED.items()}


def read_traces(tree: "xr.DataTree", rest: Iterable[np.ndarray]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The traces of a saved tree, by the names of ``Trace``, and the notes that reading it adds.

    Traces that older files do not have are NaN. Raises ValueError unless the traces and ``rest`` have the digest of
    format 1, if the tree has that.
    """
    sample, expected = tree["sample_stats"].to_dataset(), tree.attrs.get(TRACES_DIGEST)
    saved = {name: sample[name].values for name in SAVED if name in sample}
    if expected is not None and digest_of_arrays([*saved.values(), *rest]) != expected:
        raise ValueError("its traces are not those that were saved")
    unknown = np.full_like(saved["loss_trace"], np.nan)
    traces = {field: saved.get(name, unknown) for name, field in SAVED.items()}
    return traces, () if expected is None else (UNVERIFIED,)
