"""The arrays of susceptibilities: made of the columns of all components, and as a tree on disk."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax.results.llc import LLCResult
from slt_jax.results.stacking import stack, unstack
from slt_jax.results.storage import FORMAT, SUSCEPTIBILITIES
from slt_jax.results.susceptibility_columns import Column, Reference

if TYPE_CHECKING:
    import xarray as xr

_DIMS = ("estimate",)  # of the traces: the components, and after them that of all weights


def dataset_of(
    columns: Mapping[str, Column], reference: Reference | None, valid: np.ndarray | None, level: str,
    groups: Sequence[str] | None, attributes: Mapping[str, Any],
) -> "xr.Dataset":  # fmt: skip
    """``Susceptibilities.dataset`` of these columns by component.

    Args:
        valid: which tokens count, (example, token); None for all.
        groups: a label for each example.
    """
    import xarray as xr

    each = list(columns.values())
    units = ("example", "token") if level == "token" else ("example",)
    shape = each[0].chi.shape
    most = max(len(column.count) for column in each)

    def filled(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.zeros((most - len(values), *values.shape[1:]), values.dtype)])

    tokens = np.full(shape[0], shape[1] if level == "token" else 1) if valid is None else valid.sum(-1)
    variables: dict[str, Any] = {
        "chi": (("component", *units), np.stack([column.chi for column in each])),
        "stderr": (("component", *units), np.stack([column.stderr for column in each])),
        "reliability": (("component",), [column.reliability for column in each]),
        "phi": (("component",), [column.phi for column in each]),
        "scale": (("component",), np.ones(len(each))),
        "blocks": (("component", "block", "example"), np.stack([filled(column.blocks) for column in each])),
        "count": (("component", "block"), np.stack([filled(column.count) for column in each])),
        "widening": (("component",), [column.widening for column in each]),
        "units": (("example",), tokens),
    }
    if reference is not None:
        variables["full_blocks"] = (("full_block", "example"), reference.blocks)
        variables["full_count"] = (("full_block",), reference.count)
        variables["full_widening"] = ((), reference.widening)
    coordinates: dict[str, Any] = {"component": np.array(list(columns), object)}
    if groups is not None:
        coordinates["group"] = (("example",), np.array(groups, object))
    found = xr.Dataset(variables, coordinates, {**attributes, "transformed": []})
    found["chi"].attrs = {"long_name": "susceptibility", "units": "nats^2"}
    found["phi"].attrs = {"long_name": "mean of L_m(w) - L_m(w*)", "units": "nats per example"}
    return found


def tree_of(
    dataset: "xr.Dataset", results: Mapping[str, LLCResult], full: LLCResult | None, interrupted: int
) -> "xr.DataTree":
    """The fields of ``Susceptibilities`` as a tree."""
    import xarray as xr

    flat = [*results.values(), *([] if full is None else [full])]
    groups, attributes = stack(flat, _DIMS, (len(flat),)) if flat else ({}, {"results": "[]"})
    tree = xr.DataTree.from_dict({"/": dataset.assign_attrs(), **groups})
    own = {"interrupted": interrupted, "has_full": full is not None, "estimates": list(results)}
    tree.attrs = {SUSCEPTIBILITIES: FORMAT, **dataset.attrs, **attributes, **own}
    return tree


def fields_of(tree: "xr.DataTree") -> dict[str, Any]:
    """What ``tree_of`` was given, by name."""
    dataset, names = tree.to_dataset(inherit=False), tree.attrs["estimates"]
    flat = list(unstack(tree, len(_DIMS))) if "sample_stats" in tree else []
    ours = {SUSCEPTIBILITIES, "results", "interrupted", "has_full", "estimates", "contents_sha256"}
    dataset.attrs = {name: value for name, value in dataset.attrs.items() if name not in ours}
    return {
        "dataset": dataset, "results": dict(zip(names, flat, strict=False)),
        "full": flat[-1] if tree.attrs["has_full"] else None, "interrupted": int(tree.attrs["interrupted"]),
    }  # fmt: skip
