"""Where a run keeps the values of its observables: in memory, or in arrays of a zarr group that grow during the run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slt_jax.engine.observe import Watch

if TYPE_CHECKING:
    import zarr

_PART = 2**22  # bytes of a chunk of a zarr array
_OWNER = "slt_jax_run"  # the attribute that says which run writes an array


class Outlet(NamedTuple):
    """An array on disk. ``folder``: of its zarr group. ``array``: its name there, with dimensions ``dims``.

    ``owner``: a text of the run that writes it, by which a resumed run knows it again. ``writes``: whether this process
    does.
    """

    folder: Path
    array: str
    dims: tuple[str, ...]
    owner: str = ""
    writes: bool = True

    @property
    def there(self) -> bool:
        return (self.folder / self.array / "zarr.json").exists()

    def check_free(self) -> None:
        """Raise FileExistsError where a run could not write its values."""
        if self.there and self.opened().attrs.get(_OWNER) != self.owner:
            raise FileExistsError(
                f"{self.folder} has the values '{self.array}' of another run, which are kept. Give another path, or "
                "remove them."
            )
        if self.folder.exists() and not self.there and (what := self._foreign()):
            raise FileExistsError(f"{self.folder} exists and is {what}. Give another path.")

    def _foreign(self) -> str:
        """What a folder is that is none for values; empty if it is one."""
        import zarr

        if not self.folder.is_dir() or ((found := any(self.folder.iterdir())) and not self._is_group()):
            return "no zarr group"
        if found and any(name.startswith("slt_jax") for name in zarr.open_group(self.folder, mode="r").attrs):
            return "a saved result, sweep or trajectory"
        return ""

    def _is_group(self) -> bool:
        return (self.folder / "zarr.json").exists()

    @property
    def beside(self) -> "Outlet":
        """For draws in another order, or of some of the chains."""
        return self._replace(array=f"{self.array}_kept")

    def opened(self, mode: str = "r") -> "zarr.Array":
        """What is there."""
        import zarr

        return zarr.open_array(self.folder / self.array, mode=mode)  # pyright: ignore[reportArgumentType]

    def create(self, shape: tuple[int, ...]) -> "zarr.Array | None":
        """A new array of NaN; None in a process that does not write. Raises OSError."""
        import zarr

        if not self.writes:
            return None
        group = zarr.open_group(self.folder, mode="a")
        draws = max(1, min(shape[1], _PART // max(1, 4 * int(np.prod(shape[2:])))))
        return group.create_array(
            self.array, shape=shape, chunks=(1, draws, *shape[2:]), dtype="float32", fill_value=np.nan,
            dimension_names=self.dims, attributes={_OWNER: self.owner}, compressors=None, overwrite=True,
        )  # fmt: skip

    def resumed(self, shape: tuple[int, ...]) -> "zarr.Array | None":
        """The array that an earlier start of the run has written. Raises ValueError where it is gone."""
        if not self.writes:
            return None
        found = self.opened("r+") if self.there else None
        if found is None or (found.shape[0], *found.shape[2:]) != (shape[0], *shape[2:]):
            raise ValueError(
                f"the run that is resumed has written values to {self.folder / self.array}, and they are not there. "
                "Put them back, or give another checkpoint_dir to start anew."
            )
        if found.shape != shape:
            found.resize(shape)
        return found

    def rearranged(self, stored: "zarr.Array", chains: np.ndarray, picks: np.ndarray) -> "zarr.Array":
        """An array beside ``stored`` with the draws ``picks`` (chain, draw) of these chains; its name ends in _kept."""
        beside = self.beside.create((*picks.shape, *stored.shape[2:]))
        assert beside is not None
        step = max(1, _PART // max(1, 4 * int(np.prod(stored.shape[2:]))))
        for row, (chain, own) in enumerate(zip(chains, picks, strict=True)):
            for start in range(0, len(own), step):
                part = own[start : start + step]
                block = np.asarray(stored[int(chain), int(part.min()) : int(part.max()) + 1])
                beside[row, start : start + len(part)] = block[part - part.min()]
        return beside


Outlets = tuple[Outlet | None, ...]  # of each observable whose values are kept; None: in memory


def new_values(watches: Sequence[Watch], outlets: Outlets, num_chains: int, num_draws: int) -> tuple[Any, ...]:
    """Room for the values of a run: of each observable that keeps them, an array ``(chain, draw, ...)``."""
    return tuple(
        np.full(shape, np.nan, np.float32) if outlet is None else outlet.create(shape)
        for shape, outlet in _shapes(watches, outlets, num_chains, num_draws)
    )


def resumed_values(
    watches: Sequence[Watch], outlets: Outlets, saved: Sequence[np.ndarray], num_chains: int, num_draws: int
) -> tuple[Any, ...]:
    """The values of a run that is resumed. ``saved``: of those in memory, in turn. Raises as ``Outlet.resumed``."""
    found = iter(saved)
    return tuple(
        next(found) if outlet is None else outlet.resumed(shape)
        for shape, outlet in _shapes(watches, outlets, num_chains, num_draws)
    )


def longer_values(values: tuple[Any, ...], num_draws: int) -> tuple[Any, ...]:
    """The same, in memory, with room for more draws."""

    def longer(old: np.ndarray) -> np.ndarray:
        new = np.full((old.shape[0], num_draws, *old.shape[2:]), np.nan, np.float32)
        new[:, : old.shape[1]] = old
        return new

    return tuple(longer(old) for old in values)


def append(values: tuple[Any, ...], first: int, last: int, rows: Sequence[Any]) -> None:
    """Put the rows of a chunk, ``(chain, slot, ...)``, where its draws from ``first`` to ``last`` belong."""
    for store, new in zip(values, rows, strict=True):
        if store is not None and last > first:
            store[:, first:last] = np.asarray(new)[:, : last - first]


def held(watches: Sequence[Watch], outlets: Outlets) -> list[Watch]:
    """The observables whose values are kept in memory."""
    kept = [watch for watch in watches if not watch.parts]
    return [watch for watch, place in zip(kept, outlets or (None,) * len(kept), strict=True) if place is None]


def in_memory(values: tuple[Any, ...]) -> list[np.ndarray]:
    """Those that are saved with a checkpoint."""
    return [value for value in values if isinstance(value, np.ndarray)]


def _shapes(watches: Sequence[Watch], outlets: Outlets, num_chains: int, num_draws: int):
    kept = [watch for watch in watches if not watch.parts]
    places = outlets or (None,) * len(kept)
    return [((num_chains, num_draws, *watch.shape), place) for watch, place in zip(kept, places, strict=True)]
