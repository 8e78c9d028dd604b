"""The effective dimension: a cross-check of an LLC by the spectrum at w*, without sampling."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from slt_jax._checks import check_count, check_key, check_positive, shown
from slt_jax.diagnostics.quadrature import Coefficients
from slt_jax.engine.curvature import GAUSS_NEWTON, HESSIAN, Curvature
from slt_jax.engine.mesh import chain_mesh, check_mesh, spans_processes
from slt_jax.engine.screen import Screen, shows_progress
from slt_jax.estimators.arguments import check_posterior
from slt_jax.estimators.context import in_own_context
from slt_jax.estimators.rows import check_rows
from slt_jax.machine import size_text, taken_and_free, versions
from slt_jax.posterior.data import MEMORY_LIMIT, Source, as_source, check_batch_size
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.outputs import parts_of
from slt_jax.posterior.split import automatic
from slt_jax.results.spectral import EffectiveDimension

_FEW = 2_000  # weights, up to which all eigenvalues are computed by default
_MANY = 1_000_000  # weights, beyond which order and probes are fewer by default
_ORDERS, _PROBES = (32, 16), (8, 2)  # up to and beyond that
_MOST_ROWS, _MOST_OUTPUTS = 256, 2**24  # that go through the model at once by default
_PRECISIONS = ("float32", "float64")
_DENSE = 8  # matrices in float64 that the eigenvalues of one take
_ROUNDINGS = 4.0  # of the largest eigenvalue, in those near 0

_NO_PARTS = (
    "this loss_fn has no Gauss-Newton matrix, because it does not say which outputs of the model the loss is taken of. "
    "Write it as loss_fn = slt.loss_of_outputs(outputs, loss), with outputs(params, batch) and loss(outputs, batch) "
    "(from_nnx, from_linen and from_torch do that on their own), or take curvature='hessian'."
)
_WIDE_FORWARD = (
    "computed without the posterior's forward_dtype ({forward}), whose rounding a second derivative would take for "
    "curvature"
)


@in_own_context
def effective_dimension(
    posterior: LocalPosterior,
    data: Any,
    *,
    curvature: str = GAUSS_NEWTON,
    localization: float | None = None,
    examples: int | None = None,
    batch_size: int | None = None,
    exact: bool | None = None,
    order: int | None = None,
    probes: int | None = None,
    precision: str | None = None,
    key: Any = 0,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> EffectiveDimension:
    """The effective dimension, 1/2 tr[nbeta H (nbeta H + localization)^-1], without sampling.

    H is the curvature of the mean loss at w*, over the weights that are free. If the loss were quadratic, this would be
    the LLC that ``estimate_llc`` estimates; what that differs by is due to curvature away from w*. The localization is
    that of the posterior's density, the same in all directions: a metric of the sampler does not change it.

    Args:
        posterior, data: as for ``estimate_llc``.
        curvature: ``"gauss-newton"``: the mean of J' (d2 loss / d outputs2) J, with J the derivative of the model's
            outputs by the weights. It has no negative eigenvalues if the loss is convex in the outputs, and is the
            Hessian where the model fits the data exactly. The loss must have outputs: models of ``from_nnx``,
            ``from_linen``, ``from_torch`` and ``slt_jax.models`` do; others are written as ``loss_of_outputs``.
            ``"hessian"``: of any loss with a second derivative. Its negative eigenvalues count 0, and are reported.
        localization: default that of the posterior; where that is open, give ``result.settings.localization``.
        examples: number of examples that H is averaged over, drawn without replacement. Default: all of the data. With
            fewer of them H is another matrix, of a lower rank if they are very few.
        batch_size: number of examples that go through the model at once. Default: up to 256; for the Gauss-Newton
            matrix, as far as their outputs are at most 2^24 numbers.
        exact: compute all eigenvalues; it takes num_free products with H, and num_free^2 numbers of memory. Default: up
            to 2,000 free weights. Otherwise the trace is estimated by stochastic Lanczos quadrature (``matfree``).
        order: products with H from each random vector, 1 to num_free. As many vectors as long as the free weights are
            kept. Default: 32, and 16 beyond a million weights.
        probes: number of random vectors. Default: 8, and 2 beyond a million weights.
        precision: ``"float32"`` or ``"float64"``. Default: float64 for the exact value, or float32 with a note if the
            loss cannot be computed in float64; float32 for the quadrature. The posterior's ``forward_dtype`` is left
            out, with a note.
        key: ``jax.random.key(...)`` or an integer seed, for the random vectors and the examples.
        mesh: devices, with axes as for ``estimate_llc``, over which examples, random vectors and their basis are
            spread. They are of this process. Default: the first device.
        progress: show what is computed, on stderr. Default: in a terminal and in a notebook.

    Returns:
        An EffectiveDimension: ``value`` with ``stderr``, of the random vectors, of the finite order and of rounding.
        For the Gauss-Newton matrix the order's part is half of the distance between two bounds, the Gauss and the
        Gauss-Radau quadrature; for the Hessian it is how much the value changed over the second half of the order.

    Raises:
        TypeError, ValueError: an argument cannot be used, or the loss does not have this matrix.
        FloatingPointError: loss or matrix are not finite at w*.
        MemoryError: it would not fit into memory. This is raised before it is begun.

    Source: Golub and Meurant, Matrices, Moments and Quadrature (2010); Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl.
    38 (2017) 1075. For the effective dimension, MacKay, Neural Computation 4 (1992) 448.
    """
    began = time.perf_counter()
    asked = _Asked.checked(
        posterior, data, curvature, localization, examples, batch_size, exact, order, probes, precision, key, mesh
    )
    with Screen(enabled=shows_progress(progress), began=began) as screen:
        found = asked.exactly(screen) if asked.exact else asked.by_lanczos(screen)
        return EffectiveDimension(
            curvature=curvature,
            nbeta=posterior.nbeta,
            localization=asked.localization,
            num_free=posterior.num_free,
            num_examples=asked.num_examples,
            seconds=time.perf_counter() - began,
            devices=f"{asked.mesh.devices.size} x {asked.mesh.devices.flat[0].device_kind}",
            versions=versions(),
            **found,
        )


@dataclass(frozen=True)
class _Asked:
    """The checked arguments. ``rows``: the examples, in memory. ``precision`` None is open."""

    posterior: LocalPosterior
    rows: PyTree
    curvature: str
    localization: float
    num_examples: int
    batch_size: int
    exact: bool
    order: int
    probes: int
    precision: str | None
    key: jax.Array
    mesh: Mesh
    notes: tuple[str, ...]

    @classmethod
    def checked(
        cls, posterior: Any, data: Any, curvature: Any, localization: Any, examples: Any, batch_size: Any, exact: Any,
        order: Any, probes: Any, precision: Any, key: Any, mesh: Any,
    ) -> "_Asked":  # fmt: skip
        """Raises TypeError and ValueError that name the argument."""
        check_posterior(posterior)
        _check_names(curvature, exact, precision)
        localization = _checked_localization(posterior, localization)
        source, key, num_free = as_source(data), check_key(key), posterior.num_free
        notes = check_rows(posterior, data, source)
        exact = num_free <= _FEW and order is None and probes is None if exact is None else exact
        order, probes = _checked_effort(num_free, exact, order, probes)
        if (forward := posterior.program.forward_dtype) is not None:
            notes = (*notes, _WIDE_FORWARD.format(forward=forward.name))
            posterior = dataclasses.replace(posterior, forward_dtype=None)
        num, rows = _checked_rows(source, examples, key)
        numbers = _MOST_OUTPUTS // _MOST_ROWS
        if curvature == GAUSS_NEWTON:
            numbers = max(1, sum(x.size for x in jax.tree.leaves(_outputs_of_one(posterior, rows))))
        if batch_size is None:
            batch_size = int(np.clip(_MOST_OUTPUTS // numbers, 1, min(_MOST_ROWS, num)))
        check_batch_size(batch_size, num)
        return cls(
            posterior, rows, curvature, localization, num, int(batch_size), exact, order, probes, precision, key,
            _checked_mesh(mesh), notes,
        )  # fmt: skip

    def exactly(self, screen: Screen) -> dict[str, Any]:
        """All eigenvalues, in float64 if the loss can be computed in it."""
        screen.phase(f"{self.posterior.num_free:,} products with the {self.curvature} matrix", "products")
        room = _DENSE * 8 * self.posterior.num_free**2
        self._check_room(room, f"a matrix of {self.posterior.num_free:,} rows", "exact=False")
        tries = _PRECISIONS[::-1] if self.precision is None else (self.precision,)
        notes = self.notes
        for precision in tries:
            try:
                matrix, used = self._matrix(precision)
            except (TypeError, ValueError, NotImplementedError) as error:
                if precision == tries[-1]:
                    raise
                notes = (*notes, f"computed in float32, because the loss cannot be in float64: {error}")
            else:
                eigenvalues, rounding = _eigenvalues(matrix)
                return {"eigenvalues": eigenvalues, "epsilon": rounding, "precision": used, "notes": notes}
        raise AssertionError

    def _matrix(self, precision: str) -> tuple[np.ndarray, str]:
        """(H, the type it was computed in)."""
        with self._measured(precision) as measured:
            matrix = measured.matrix()
        if not np.isfinite(matrix).all():
            raise FloatingPointError(_NOT_FINITE.format(what=f"the {self.curvature} matrix"))
        return matrix, measured.precision

    def by_lanczos(self, screen: Screen) -> dict[str, Any]:
        """Lanczos coefficients from each probe."""
        found = []
        screen.phase("compiling products with the matrix", "compilation")
        with self._measured(self.precision or "float32") as measured:
            num_bytes = measured.bytes_of_lanczos(self.order)
            self._check_room(
                num_bytes, f"Lanczos' iteration of order {self.order}", "a lower order, a smaller batch_size"
            )
            for probe in range(self.probes):
                screen.phase(f"probe {probe + 1} of {self.probes}: {self.order} products", "products")
                found.append(measured.lanczos(jax.random.fold_in(self.key, probe), self.order))
        diagonal, beside = (np.stack(x) for x in zip(*found, strict=True))
        if not np.isfinite(diagonal[:, 0]).all():
            raise FloatingPointError(_NOT_FINITE.format(what=f"the {self.curvature} matrix"))
        precision = measured.precision
        epsilon = float(np.finfo(precision).eps)
        largest = max(float(np.abs(np.nan_to_num(x)).max()) for x in (diagonal, beside))
        coefficients = Coefficients(diagonal, beside, self.posterior.num_free, epsilon)
        return {
            "coefficients": coefficients, "epsilon": _ROUNDINGS * epsilon * largest, "precision": precision,
            "notes": self.notes,
        }  # fmt: skip

    @contextlib.contextmanager
    def _measured(self, precision: str) -> Iterator[Curvature]:
        """The matrix on the mesh, while the precision is set; checked at w*."""
        double = precision == "float64"
        with jax.enable_x64(True) if double else contextlib.nullcontext():
            measured = Curvature(
                self.curvature, self.posterior, self.rows, self.batch_size, self.mesh, double=double
            )  # fmt: skip
            if not np.isfinite(measured.loss()):
                raise FloatingPointError(_NOT_FINITE.format(what="the loss"))
            yield measured

    def _check_room(self, num_bytes: float, what: str, remedy: str) -> None:
        devices = list(self.mesh.devices.flat)
        many = len(devices) if devices[0].platform == "cpu" else 1
        free = taken_and_free(devices)[2]
        if many * num_bytes > free:
            where = "this process" if many > 1 or devices[0].platform == "cpu" else "each device"
            raise MemoryError(
                f"{what} takes {size_text(many * num_bytes)} of {where}, and {size_text(free)} are free. Take "
                f"{remedy}, a mesh of more devices, or a machine with more memory."
            )


_NOT_FINITE = "{what} is not finite at w*. Check the weights, the data, and the loss at w*."


def _check_names(curvature: Any, exact: Any, precision: Any) -> None:
    if not isinstance(curvature, str) or curvature not in (GAUSS_NEWTON, HESSIAN):
        raise ValueError(f"curvature must be 'gauss-newton' or 'hessian', got {shown(curvature)}.")
    if exact is not None and not isinstance(exact, bool | np.bool_):
        raise TypeError(f"exact must be True, False or None, got {shown(exact)}.")
    if precision is not None and precision not in _PRECISIONS:
        raise ValueError(f"precision must be 'float32' or 'float64', got {shown(precision)}.")


def _checked_localization(posterior: LocalPosterior, localization: Any) -> float:
    if posterior.nbeta == 0:
        raise ValueError("at nbeta = 0 the effective dimension is 0 by definition. Give the posterior nbeta > 0.")
    if localization is not None:
        check_positive("localization", localization, "It is gamma in (gamma/2)|w - w*|^2.")
        return float(localization)
    if posterior.localization is None:
        raise ValueError(
            "the posterior's localization is open. Give the one that an estimate chose, "
            "localization=result.settings.localization, or one of your own."
        )
    return posterior.localization


def _checked_effort(num_free: int, exact: bool, order: Any, probes: Any) -> tuple[int, int]:
    if exact and (order is not None or probes is not None):
        raise ValueError("exact=True computes all eigenvalues, and needs neither order nor probes. Leave one out.")
    large = num_free > _MANY
    order = min(_ORDERS[large], num_free) if order is None else order
    probes = _PROBES[large] if probes is None else probes
    check_count("order", order, 1, "It is the number of products with H from each random vector.")
    check_count("probes", probes, 1, "It is the number of random vectors.")
    if order > num_free:
        raise ValueError(f"order = {order} is more than the {num_free} free weights. Take fewer, or exact=True.")
    return int(order), int(probes)


def _checked_rows(source: Source, examples: Any, key: jax.Array) -> tuple[int, PyTree]:
    """(number of examples, the examples in memory)."""
    num = source.num_data
    if examples is not None:
        check_count("examples", examples, 1, f"The data have {num:,} examples.", num)
    chosen = num if examples is None else int(examples)
    if source.on_host:
        row = sum(np.asarray(x).nbytes for x in jax.tree.leaves(source.fetch(np.zeros(1, np.int64))))
        if row * chosen > MEMORY_LIMIT:
            raise ValueError(
                f"{chosen:,} examples take {size_text(row * chosen)} of memory, and the matrix is taken over at most "
                f"{size_text(MEMORY_LIMIT)}. Take fewer, e.g. examples={min(num, 1024)}."
            )
    if chosen == num:
        return num, source.fetch(np.arange(num)) if source.on_host else source.arrays
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return chosen, source.fetch(np.sort(random.choice(num, chosen, replace=False)))


def _outputs_of_one(posterior: LocalPosterior, rows: PyTree) -> Any:
    """Shapes of the outputs for one example. Raises ValueError where there are none."""
    parts = parts_of(posterior.loss_fn)
    if parts is None:
        raise ValueError(_NO_PARTS)

    def both(params: PyTree, batch: PyTree) -> tuple[PyTree, Any]:
        outputs = parts.outputs(params, batch)
        return outputs, parts.loss(outputs, batch)  # an output of one vmap does not outlive it

    try:
        found, _ = jax.eval_shape(both, posterior.center, jax.tree.map(lambda x: x[:1], rows))
    except Exception as error:
        raise ValueError(
            f"the outputs of the model cannot be separated from its loss ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). A loss(forward, batch) may only call forward, outside of vmap. "
            "Write the loss as slt.loss_of_outputs(outputs, loss), or take curvature='hessian'."
        ) from error
    kinds = {str(x.dtype) for x in jax.tree.leaves(found) if not jnp.issubdtype(x.dtype, jnp.floating)}
    if kinds or not jax.tree.leaves(found):
        what = f"of type {', '.join(sorted(kinds))}" if kinds else "missing: the loss does not call forward"
        raise ValueError(f"the outputs of the model are {what}. They must be floating-point arrays.")
    return found


def _eigenvalues(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """(ascending eigenvalues, how far rounding may have moved those near 0).

    The antisymmetric part of the matrix is rounding alone, and that of the symmetric part is as large.
    """
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    largest = float(np.abs(eigenvalues).max(initial=0.0))
    rounding = float(np.linalg.norm((matrix - matrix.T) / 2, 2))
    return eigenvalues, 2 * rounding + _ROUNDINGS * float(np.finfo(np.float64).eps) * largest


def _checked_mesh(mesh: Any) -> Mesh:
    if mesh is None:
        return chain_mesh(1, jax.local_devices()[:1])
    mesh = automatic(mesh)
    if spans_processes(mesh):
        raise ValueError("mesh has devices of other processes. Take jax.local_devices().")
    return check_mesh(mesh, mesh.shape["chain"] if "chain" in mesh.axis_names else 1)
