"""What a saved estimate holds of its observables: a group for each of them, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax.results.observed import Moments, Observed

if TYPE_CHECKING:
    import xarray as xr

_GROUP = "observed_"  # and a number
_AXES = {"example": ("example",), "token": ("example", "token")}
_FEW = ("count", "loss_mean", "loss_m2")  # moments without the axes of the values
_NUMBERS = ("nbeta", "num_data", "localization")


def groups_of(observed: dict[str, Observed]) -> "dict[str, xr.Dataset]":
    """A data set for each observable; of values in a zarr store of their own only where they are, and their moments."""
    return {f"/{_GROUP}{k}": _dataset(one) for k, one in enumerate(observed.values())}


def _dataset(one: Observed) -> "xr.Dataset":
    import xarray as xr

    axes = axes_of(one)
    variables: dict[str, Any] = {"center": (axes, one.center), "gap": (("chain", "draw"), one.gap)}
    attributes: dict[str, Any] = {"name": one.name, "level": one.level, **{x: getattr(one, x) for x in _NUMBERS}}
    if one.valid is not None:
        variables["valid"] = (axes, one.valid)
    in_memory = isinstance(one.values, np.ndarray)
    if in_memory:
        variables["values"] = (("chain", "draw", *axes), one.values)
    elif one.values is not None:
        attributes["path"] = str(Path(one.values.store.root) / one.values.path)
    if one.moments is not None or (not in_memory and one.gap.size):
        for name, value in one.as_moments()._asdict().items():
            variables[name] = (("chain", "block", *(() if name in _FEW else axes)), value)
    return xr.Dataset(variables, attrs=attributes)


def axes_of(one: Observed) -> tuple[str, ...]:
    """Names of the axes of one draw's values."""
    more = tuple(f"axis_{k}" for k in range(1, one.center.ndim))
    return _AXES.get(one.level, ("example", *more))


def observed_in(tree: "xr.DataTree") -> dict[str, Observed]:
    """The observables of a saved estimate. Values in a store of their own are None if it is not there any more."""
    names = sorted((name for name in tree.children if name.startswith(_GROUP)), key=lambda x: int(x[len(_GROUP) :]))
    found = [_observed(tree[name].to_dataset()) for name in names]
    return {one.name: one for one in found}


def _observed(group: "xr.Dataset") -> Observed:
    arrays = {str(name): group[name].values for name in group.data_vars}
    moments = Moments(*(arrays[name] for name in Moments._fields)) if "mean" in arrays else None
    return Observed(
        name=str(group.attrs["name"]), level=str(group.attrs["level"]),
        values=_stored(group.attrs["path"]) if "path" in group.attrs else arrays.get("values"), moments=moments,
        center=arrays["center"], valid=arrays.get("valid"), gap=arrays["gap"], nbeta=float(group.attrs["nbeta"]),
        num_data=int(group.attrs["num_data"]), localization=float(group.attrs["localization"]),
    )  # fmt: skip


def _stored(path: str) -> Any:
    import zarr

    return zarr.open_array(path, mode="r") if (Path(path) / "zarr.json").exists() else None
