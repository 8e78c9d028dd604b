"""Susceptibilities: how the loss of each part of a model covaries with the losses of a probe's examples."""

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from slt_jax._checks import shown
from slt_jax._io import digest_of_json
from slt_jax.engine.mesh import is_main_process, spans_processes
from slt_jax.engine.progress import span
from slt_jax.engine.run import abandon
from slt_jax.engine.screen import Screen
from slt_jax.estimators.context import in_own_context
from slt_jax.estimators.llc import estimate
from slt_jax.estimators.observing import observe_identity, watched
from slt_jax.estimators.request import Notes, Request, check_no_metric, lengths_of_each
from slt_jax.models.restrict import OfPart, restricted
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.observable import Observable
from slt_jax.posterior.program import leaf_masks
from slt_jax.results.llc import LLCResult, load_result
from slt_jax.results.observed import Observed
from slt_jax.results.patterns import check_labels
from slt_jax.results.susceptibilities import FULL, Susceptibilities
from slt_jax.results.susceptibilities_data import dataset_of
from slt_jax.results.susceptibility_columns import (
    ONE_CHAIN,
    TWO_CHAIN,
    Column,
    Reference,
    column_of,
    reference_of,
)

_PROBE = "probe"


@in_own_context
def susceptibilities(
    posterior: LocalPosterior,
    data: Any,
    components: Sequence[str] | Mapping[str, Any],
    observe: Any,
    *,
    estimator: str = TWO_CHAIN,
    groups: Sequence[str] | None = None,
    on_component: Callable[[str, Susceptibilities], Any] | None = None,
    sampler: Any = None,
    num_chains: int = 4,
    num_draws: int = 200,
    num_warmup: int | None = None,
    thinning: int = 4,
    batch_size: int | None = None,
    key: Any = 0,
    mesh: Mesh | None = None,
    chain_batch: int | None = None,
    micro_batches: int = 1,
    control_variate: bool | None = None,
    hot: float | None = None,
    checkpoint_dir: Any = None,
    progress: bool | None = None,
    chunk_size: int = 512,
    checkpoint_seconds: float = 60.0,
) -> Susceptibilities:
    """Estimate how each component of a model responds to each example, or token, of a probe.

    The posterior is restricted to a component C: its weights move, all others stay at w*. With phi = L_m(w) - L_m(w*)
    on the minibatch of a draw, l_i the loss of an example of the probe, and L the mean of l over the probe::

        two-chain   chi_i = -(<phi (l_i - L)>_C - <phi>_C <l_i - L>_full)       (as published)
        one-chain   chi_i = -(<phi (l_i - L)>_C - <phi>_C <l_i - L>_C)          (a covariance)

    where <.>_C is the mean over the draws of the restricted posterior, and <.>_full over those of all weights. If the
    data are shifted towards example i, with weight h, the mean of phi changes by nbeta chi_i h; chi is without this
    factor. All components of one shape, such as the heads, share one compiled program. Only sums over blocks of draws
    are kept, never the losses of single draws.

    Args:
        posterior: of all weights; it must have a localization, which is the same for all components. With nbeta = 0 the
            result is a control.
        data: as for ``estimate_llc``.
        components: names of parts of a decoder (``"layer 0 head 1"``, ``"layer 0 mlp"``, ``"embedding"``), or name ->
            such a part, or name -> mask as for ``LocalPosterior``. The numbers of a component do not depend on which
            others there are.
        observe: the probe: a data set, or an ``Observable`` of level ``"example"`` or ``"token"``.
        estimator: ``"two-chain"`` or ``"one-chain"``. The first also samples the posterior of all weights, once.
        groups: a label for each example of the probe, for ``Susceptibilities.response`` and ``plot``.
        on_component: called as ``on_component(name, so_far)`` after each component, with the ``Susceptibilities`` of
            those that are finished.
        sampler: as for ``estimate_llc``; with a step size it is that of all components, and the verdict of each tells
            whether it is right for it. Default: step size and friction are calibrated for each.
        num_chains, num_draws, thinning: of each component. The reliability needs two chains.
        num_warmup: steps before the first draw. Default: as many as go into the draws.
        key: ``jax.random.key(...)`` or a seed. Each component has a key of its own, by its name.
        checkpoint_dir: folder for the finished components, and the state of the one that runs. The same call resumes
            it; components may be added.
        batch_size, mesh, chain_batch, micro_batches, control_variate: as for ``estimate_llc``.
        hot, progress, chunk_size, checkpoint_seconds: as for ``estimate_llc``.

    Returns:
        Susceptibilities: ``chi`` and ``stderr`` by (component, example[, token]), the ``reliability`` and the LLC of
        each component. Ctrl-C gives those of the components that are finished, with ``interrupted`` set, if there is
        one; otherwise it raises KeyboardInterrupt.

    Raises:
        TypeError, ValueError: an argument cannot be used. The message has its name, its value, and what to do.
        FloatingPointError: the loss is not finite at w*.
        MemoryError: a run would not fit into memory.

    Source: arXiv:2504.18274, definition 2.5; both estimators: appendix C.4.
    """
    if estimator not in (TWO_CHAIN, ONE_CHAIN):
        raise ValueError(f"estimator must be '{TWO_CHAIN}' or '{ONE_CHAIN}', got {shown(estimator)}.")
    if on_component is not None and not callable(on_component):
        raise TypeError(f"on_component must be a function on_component(name, so_far), got {shown(on_component)}.")
    request = Request.checked(
        posterior, data, sampler=sampler, num_chains=num_chains, num_draws=num_draws, num_warmup=num_warmup,
        thinning=thinning, batch_size=batch_size, key=key, mesh=mesh, chain_batch=chain_batch,
        checkpoint_dir=checkpoint_dir, progress=progress, micro_batches=micro_batches, control_variate=control_variate,
        hot=hot, observe={_PROBE: _probe(observe)}, chunk_size=chunk_size, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    check_no_metric(request)
    if posterior.localization is None:
        raise ValueError(
            "the posterior has no localization, and susceptibilities compare components under the same one. Give "
            "LocalPosterior a localization: 300 is the value of published work on language models."
        )
    request = dataclasses.replace(request, num_warmup=lengths_of_each(request).num_warmup)
    parts = _parts(posterior, components)
    labels = _labels(groups, request.observables[_PROBE][1].num_data)
    with request.screen() as screen:
        return _Course(request, screen, parts, estimator, labels).run(on_component)


@dataclass(frozen=True)
class _Course:
    """All runs of a call. ``parts``: the restricted posterior of each component. ``request``: of all weights."""

    request: Request
    screen: Screen
    parts: dict[str, LocalPosterior]
    estimator: str
    groups: list[str] | None

    def run(self, on_component: Callable[[str, Susceptibilities], Any] | None) -> Susceptibilities:
        self._check_folder()
        columns: dict[str, Column] = {}
        results: dict[str, LLCResult] = {}
        full = reference = probe = None
        try:
            if self.estimator == TWO_CHAIN:
                self.screen.say(f"{FULL}, for the means that all components share")
                full, probe = self._estimate(FULL, self.request.posterior)
                reference = reference_of(probe)
            for number, (name, part) in enumerate(self.parts.items(), start=1):
                self.screen.say(f"component {number} of {len(self.parts)}: {name}")
                results[name], probe = self._estimate(name, part)
                columns[name] = column_of(probe, self.estimator, reference)
                self._tell(name, number, columns, results)
                if on_component is not None:
                    on_component(name, self._so_far(columns, results, reference, full, probe))
        except KeyboardInterrupt:
            if not columns or spans_processes(self._mesh):
                raise
            results = {name: results[name] for name in columns}
            found = self._so_far(columns, results, reference, full, probe)
            return dataclasses.replace(found, interrupted=len(self.parts))
        return self._so_far(columns, results, reference, full, probe)

    @property
    def _mesh(self) -> Mesh:
        return self.request.mesh_of_one(self.request.num_chains or 1)

    def _so_far(
        self, columns: dict[str, Column], results: dict[str, LLCResult], reference: Reference | None,
        full: LLCResult | None, probe: Observed | None,
    ) -> Susceptibilities:  # fmt: skip
        assert probe is not None
        posterior, source = self.request.posterior, self.request.source
        attributes = {
            "estimator": self.estimator, "level": probe.level, "nbeta": float(posterior.nbeta),
            "beta": float(posterior.nbeta) / posterior.num_data, "localization": posterior.localization,
            "num_data": source.num_data, "num_chains": self.request.num_chains, "num_draws": self.request.num_draws,
        }  # fmt: skip
        dataset = dataset_of(columns, reference, probe.valid, probe.level, self.groups, attributes)
        return Susceptibilities(dataset=dataset, results=dict(results), full=full)

    def _estimate(self, name: str, posterior: LocalPosterior) -> tuple[LLCResult, Observed]:
        """(the estimate without what it observed, the probe): as they were saved, or sampled.

        Raises KeyboardInterrupt where Ctrl-C ended it before it had all its draws.
        """
        folder = None if self.request.folder is None else self.request.folder / _folder_name(name, posterior)
        saved = None if folder is None else folder.with_name(f"{folder.name}.zarr")
        self.screen.clock.restart()
        if saved is not None and saved.exists():
            result = load_result(saved)
        else:
            result = estimate(self._request(name, posterior, folder), self.screen)
            if result.interrupted:
                raise KeyboardInterrupt
            if saved is not None and folder is not None and is_main_process(self._mesh):
                result.save(saved)
                shutil.rmtree(folder, ignore_errors=True)
        return dataclasses.replace(result, observed={}), result.observed[_PROBE]

    def _request(self, name: str, posterior: LocalPosterior, folder: Path | None) -> Request:
        """The estimate of one component: with the probe's function, if it has one, of the weights of the part."""
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1
        observable, data = self.request.observables[_PROBE]
        if observable.fn is not None and isinstance(posterior.loss_fn, OfPart):
            observable = dataclasses.replace(observable, fn=dataclasses.replace(posterior.loss_fn, fn=observable.fn))
        return dataclasses.replace(
            self.request, posterior=posterior, key=jax.random.fold_in(self.request.key, number),
            observables={_PROBE: (observable, data)}, checkpoint_dir=folder,
        )  # fmt: skip

    def _check_folder(self) -> None:
        """Raise ValueError where the directory has something else. Components may differ, as each has its own part."""
        request = self.request
        plan = request.schedule(lengths_of_each(request))
        watches = tuple(watch for watch, _ in watched(request, lengths_of_each(request)))
        more = observe_identity(request, watches)
        asked = {"control_variate": request.control_variate, "hot": request.hot}
        abandon(Notes.opened(request, plan, self._mesh, more, asked).store)

    def _tell(self, name: str, number: int, columns: dict[str, Column], results: dict[str, LLCResult]) -> None:
        result, reliability = results[name], columns[name].reliability
        self.screen.say(f"{name}: LLC {result.estimate_text('±')}, {result.verdict}; reliability {reliability:.2f}")
        if number == 1 and len(self.parts) > 1:
            seconds = (len(self.parts) - 1) * result.settings.cost.get("seconds", 0.0)
            self.screen.say(f"{len(self.parts) - 1} more components, about {span(seconds)} to go")


def _probe(observe: Any) -> Observable:
    """What is observed, as moments. Raises ValueError where it cannot be that."""
    observable = observe if isinstance(observe, Observable) else Observable(observe)
    if observable.level == "custom":
        raise ValueError(
            "observe has level='custom', and susceptibilities are of losses. Take level='example' or 'token'."
        )
    if observable.path is not None or observable.keep == "values":
        raise ValueError(
            "susceptibilities keep moments of the losses and not their values: leave path and keep='values' out of "
            "observe. estimate_llc(observe=...) keeps values."
        )
    return dataclasses.replace(observable, keep="moments")


def _parts(posterior: LocalPosterior, components: Any) -> dict[str, LocalPosterior]:
    """name -> restricted posterior. Raises TypeError and ValueError that name the component."""
    if isinstance(components, str) or not isinstance(components, Mapping | Sequence) or not components:
        raise TypeError(
            f"components must be a list of names, or name -> mask, got {shown(components)}. Write components=['layer 0 "
            "mlp'], or components={'first layer': mask}."
        )
    rules = components if isinstance(components, Mapping) else {name: name for name in components}
    if wrong := [name for name in rules if not isinstance(name, str) or not name]:
        raise TypeError(f"the name of a component must be a text, got {shown(wrong[0])}.")
    if len(rules) < len(components):
        twice = next(name for name in rules if list(components).count(name) > 1)
        raise ValueError(f"components has {twice!r} twice. Give each once.")
    if FULL in rules:
        raise ValueError(f"a component is called {FULL!r}, which is the name of the whole. Give it another.")
    found = {}
    for name, rule in rules.items():
        try:
            found[name] = restricted(posterior, rule) if isinstance(rule, str) else _masked(posterior, rule)
        except (TypeError, ValueError) as error:
            raise type(error)(f"component {name!r}: {error}") from error
    return found


def _masked(posterior: LocalPosterior, mask: Any) -> LocalPosterior:
    """With the weights free that both the mask and the posterior's own leave free."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(posterior.center)
    given = leaf_masks(mask, flat, treedef)
    if posterior.mask is not None:
        own = leaf_masks(posterior.mask, flat, treedef)
        given = [a & b for a, b in zip(given, own, strict=True)]
    return dataclasses.replace(posterior, mask=jax.tree.unflatten(treedef, given))


def _labels(groups: Any, count: int) -> list[str] | None:
    if groups is None:
        return None
    check_labels(groups)
    if len(groups) != count:
        raise ValueError(f"groups must have a label for each of the {count} examples of observe, got {shown(groups)}.")
    return [str(label) for label in groups]


def _folder_name(name: str, posterior: LocalPosterior) -> str:
    """The name in letters that a file may have, and a digest of it and of the weights that are free."""
    free = [hashlib.sha256(repr((leaf.name, leaf.entries)).encode()).hexdigest() for leaf in posterior.program.leaves]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:40]}-{digest_of_json([name, free])[:12]}"
