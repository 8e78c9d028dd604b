"""The front door: losses of local chains into a learning coefficient with an error bar."""

import functools
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from slt_jax._checks import check_count, check_key, check_positive
from slt_jax.calibration.choose import Choice, calibrate, default_budget, probe_of
from slt_jax.engine.checkpoint import RunStore
from slt_jax.engine.loop import Engine
from slt_jax.engine.memory import Need, layouts, need_of, weighs
from slt_jax.engine.mesh import automatic, check_mesh, gathered, leads, spans_processes
from slt_jax.engine.plan import Schedule
from slt_jax.engine.run import abandon, check_also, check_at_center, full_loss_at_center, run_to_end
from slt_jax.estimators.outcome import curvature_gradients, look_bytes, result_of
from slt_jax.estimators.request import as_sampler, check_posterior, check_same_call, checked_batch, identity_of
from slt_jax.posterior.data import as_source, named_data
from slt_jax.posterior.local import LocalPosterior
from slt_jax.results.llc import LLCResult
from slt_jax.samplers.base import Sampler

WARMUP_SHARE = 0.4  # of the steps, where the budget sets the lengths
FEW_CHAINS = {500: 1, 4000: 2}  # so many for a smaller budget: what is short of steps reads low, in every chain alike


@dataclass(frozen=True)
class _Request:
    """What the caller asked for; None is open."""

    num_chains: int | None
    num_draws: int | None
    num_warmup: int | None
    thinning: int | None
    budget: int | None
    control_variate: bool | None
    hot: float | None


def estimate_llc(
    posterior: LocalPosterior,
    data: Any,
    *,
    sampler: Any = None,
    num_chains: int | None = None,
    num_draws: int | None = None,
    num_warmup: int | None = None,
    thinning: int | None = None,
    batch_size: int | None = None,
    key: Any = 0,
    mesh: Mesh | None = None,
    chain_batch: int | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool = False,
    micro_batches: int = 1,
    baseline: str = "paired",
    budget: int | None = None,
    control_variate: bool | None = None,
    hot: float | None = None,
    also: Mapping[str, Any] | None = None,
    chunk_size: int = 512,
    checkpoint_seconds: float = 60.0,
) -> LLCResult:
    """Estimate the local learning coefficient at ``posterior.center``.

    The estimate is ``nbeta (E[L_m(w)] - L_m(w*))`` over chains and draws, after ``num_warmup`` steps from w*, less the
    bias of step size and minibatch noise where that can be told. What is not given is chosen: a sampler without a step
    size, or a posterior without a localization, starts a calibration, which spends at most 15 % of the gradients,
    or 50 to 130 where that is more (a Kronecker metric some 230).

    Args:
        posterior: what is sampled.
        data: a pytree of arrays with one row per example, or ``token_file(...)``, ``hf_dataset(...)``.
        sampler: how one step moves; default ``underdamped()``, calibrated. Also any ``blackjax.SamplingAlgorithm``.
        num_chains, num_draws, thinning: each chain keeps ``num_draws`` draws, one every ``thinning`` steps. Four chains
            by default; with a ``budget`` below 4,000 two, and below 500 one, unless ``mesh``, ``chain_batch`` or
            several processes say how chains are laid out.
        num_warmup: steps before the first draw.
        batch_size: examples in one step's minibatch, drawn with replacement, its own for each chain; default
            ``min(256, num_data)``. As many as there are: all of them in every step, and no noise.
        key: ``jax.random.key(...)`` or an integer seed.
        mesh: devices, with an axis ``chain`` (and ``model``); default as many devices as divide ``num_chains``. With
            several processes (``jax.distributed.initialize``) those of all; every process makes the same call on the
            same data, which each holds whole, and gets the same result.
        chain_batch: chains advanced together on one device; 1 uses least memory. Must divide the chains of a device.
            Default: 1 on a CPU and for large models, else as many as fit into the device's memory.
        checkpoint_dir: where to keep state and traces; the same call with the same directory resumes an interrupted run
            and ends bit for bit equal to an unbroken one on the same mesh, versions and device kind. Several processes
            need a disk that they share.
        progress: show the memory that large models will take, what the calibration chose, the time to go, and a bar
            with steps/s and the running estimate; on the first process.
        micro_batches: parts in which a minibatch goes through the model, to save memory; must divide ``batch_size``.
        baseline: ``"paired"`` subtracts L_m(w*) on the same batch at each draw (one more forward pass a draw, much less
            variance); ``"full"`` subtracts L_n(w*) over all data, computed once.
        budget: minibatch gradients for all of this, calibration and every chain counted; sets the lengths that are not
            given. Default: 10,000, more for fewer than 10,000 weights; without a calibration, 500 draws a chain.
        control_variate: take g_m(w) - g_m(w*) + grad L_n(w*) as the gradient: no minibatch noise at w*, at twice the
            cost a step and one pass over the data. Default: where the calibration finds that it pays.
        hot: every other chain starts at nbeta / hot and is cooled over half of the warm-up, so that the answer is met
            from both sides; 1 for none. Default: 10 when the step size was calibrated and the warm-up allows it.
        also: name -> data set, like ``data``. Their losses are read at every draw, on a batch of their own at w and at
            w* (two more forward passes each): ``result.also`` has nbeta (E[L'(w)] - L'(w*)) for each, with w still from
            the posterior of ``data``. Held in memory.
        chunk_size: most steps between two looks of the host. Changes no number.
        checkpoint_seconds: least time between two saves.

    Raises:
        TypeError, ValueError: an argument that cannot be used; the text says which, its value, and what to do.
        FloatingPointError: the loss is not finite at w*.
        MemoryError: the run would take more memory than there is; said before it starts.

    Error: the standard error counts sampling noise and that of the corrections; ``verdict`` says what else is wrong.

    Source: Lau et al., arXiv:2308.12108, equation 14.
    """
    check_posterior(posterior)
    source = as_source(data)
    sampler = as_sampler(sampler)
    request = _Request(num_chains, num_draws, num_warmup, thinning, budget, control_variate, hot)
    _check_request(request)
    check_positive("checkpoint_seconds", checkpoint_seconds, "0 saves after every chunk.", zero=True)
    batch_size = checked_batch(source, sampler, batch_size, micro_batches, baseline, chunk_size)
    key = check_key(key)
    others = named_data(also)
    is_open = sampler.step_size is None or sampler.friction is None or posterior.localization is None
    few = mesh is None and chain_batch is None and jax.process_count() == 1
    lay = functools.partial(
        _lay_out, request, sampler, is_open, few, posterior.num_free, -(-source.num_data // batch_size)
    )
    at_end = functools.partial(curvature_gradients, sampler, posterior.num_free, source.num_data, batch_size)
    control = bool(control_variate) and not is_open
    chains, *_ = first = lay(0.0 if is_open else at_end(budget or 0), control)
    mesh = None if mesh is None else check_mesh(automatic(mesh), chains)

    def schedule(lengths: tuple, control: bool, group: int) -> Schedule:
        *counts, hotter = lengths
        counts = (int(x) for x in (*counts, batch_size, micro_batches))  # off NumPy
        return Schedule(*counts, baseline, group, int(chunk_size), control, hotter)

    need = None
    for layout, group in layouts(chains, mesh, chain_batch, posterior.num_free):
        plan = schedule(first, control, group)
        engine = Engine(posterior, source, sampler, plan, key, layout, tuple(others.values()))
        if not weighs(posterior, chains):
            break
        need = _need(engine, is_open, request, checkpoint_dir is not None)
        if all(gathered(need.fits, layout)):
            break
    else:
        raise MemoryError(need.refusal() if need else "")
    mesh = engine.mesh
    if need is not None and progress and leads(mesh):
        print(*(f"  {line}" for line in need.lines()), sep="\n", file=sys.stderr)
    if spans_processes(mesh):
        same = {**identity_of(engine, key, vars(request), others), "chunk_size": int(chunk_size)}
        check_same_call({**same, "checkpoint_dir is given": checkpoint_dir is not None}, mesh)
    check_also(engine, others)
    full = gathered(full_loss_at_center(engine), mesh)[0] if baseline == "full" else None
    store = None
    if checkpoint_dir is not None:
        store = RunStore(checkpoint_dir, identity_of(engine, key, vars(request), others), mesh)
    choice = None
    if is_open:
        roomy = need is None or all(gathered(need.fits_with_control, mesh))
        choice = _calibrated(engine, store, sampler, posterior, request, roomy)
        engine.localize(choice.localization)
        lengths = lay(choice.gradients + at_end(_total(engine, request)), choice.control_variate)
        limit = math.inf if choice.limit is None else choice.limit
        engine.configure(schedule(lengths, choice.control_variate, group), choice.step_size, choice.friction, limit)
        if progress and leads(mesh):
            print(*(f"  {line}" for line in choice.lines), sep="\n", file=sys.stderr)
    run = run_to_end(engine, store, progress, checkpoint_seconds)
    used = choice or sampler
    return result_of(
        engine, run, engine.posterior, used.step_size, used.friction, full_loss=full, choice=choice, need=need,
        names=tuple(others),
    )  # fmt: skip


def _check_request(request: _Request) -> None:
    least = {"num_chains": 1, "num_draws": 1, "num_warmup": 0, "thinning": 1, "budget": 1}
    for name, low in least.items():
        if (value := getattr(request, name)) is not None:
            check_count(name, value, low)
    if request.control_variate not in (None, True, False):
        raise TypeError(f"control_variate must be True, False or None, got {request.control_variate!r}.")
    if request.hot is not None:
        check_positive("hot", request.hot, "1 starts every chain at w*, 10 every other one at a tenth of nbeta.")
        if request.hot < 1:
            raise ValueError(f"hot must be at least 1, got {request.hot}. 10 starts every other chain at nbeta / 10.")
    if request.budget is not None and request.num_draws is not None:
        raise ValueError(
            f"budget = {request.budget} and num_draws = {request.num_draws} both set the length. Give one of them."
        )


def _lay_out(
    request: _Request, sampler: Sampler, is_open: bool, few: bool, num_free: int, full_pass: int, spent: float,
    control: bool,
) -> tuple[int, int, int, int, float]:  # fmt: skip
    """(num_chains, num_draws, num_warmup, thinning, hot) where ``spent`` gradients go elsewhere.

    ``few``: whether a small budget may have fewer than four chains. ``full_pass``: minibatches of all the data.
    ``control``: with control variates, which take a pass over the data, and two gradients a step.
    """
    spent, cost = (spent + full_pass, 2) if control else (spent, 1)
    chains = 4 if request.num_chains is None else request.num_chains
    if request.budget is None and (not is_open or request.num_draws is not None):
        draws = 500 if request.num_draws is None else request.num_draws
        thinning = 1 if request.thinning is None else request.thinning
        warmup = draws if request.num_warmup is None else request.num_warmup
    else:
        total = default_budget(num_free) if request.budget is None else request.budget
        if request.num_chains is None and few:
            chains = next((k for most, k in FEW_CHAINS.items() if total < most), chains)
        steps = int((total - spent) / (chains * cost))
        warmup = int(WARMUP_SHARE * steps) if request.num_warmup is None else request.num_warmup
        left = steps - warmup
        thinning = (1 if left < 400 else max(4, left // 20_000)) if request.thinning is None else request.thinning
        draws = left // thinning
        if draws < 4:
            raise ValueError(
                f"a budget of {total} gradients leaves {max(0, steps)} steps for each of {chains} chains, of which "
                f"{warmup} are warm-up: fewer than 4 draws. Raise the budget, or take fewer chains."
            )
    hot = request.hot
    if hot is None:
        plain = sampler.step_size is None and sampler.family != "exact" and not sampler.metric
        hot = 10.0 if plain and chains >= 2 and warmup >= 200 else 1.0
    return int(chains), int(draws), int(warmup), int(thinning), float(hot)


def _calibrated(
    engine: Engine, store: RunStore | None, sampler: Sampler, posterior: LocalPosterior, request: _Request, roomy: bool
) -> Choice:
    """The calibration's choice; a resumed run reads that of its first start. Control variates only where ``roomy``."""
    found = None if store is None else store.read_note("calibration")
    if found is not None and not sampler.metric:  # the metric is not kept: it is measured again, a function of the key
        return _choice_of(found)
    total = _total(engine, request)
    control = request.control_variate
    if sampler.family == "exact" or (control is None and not roomy):
        control = False
    try:
        check = functools.partial(check_at_center, engine)
        choice = calibrate(engine, sampler, posterior.localization, control, total, check)
        choice = _choice_of(gathered(choice.to_dict(), engine.mesh)[0])
    except BaseException:
        abandon(store)
        raise
    if store is not None:
        store.write_note("calibration", choice.to_dict())
    return choice


def _total(engine: Engine, request: _Request) -> float:
    """Minibatch gradients of the whole estimate."""
    return request.budget or engine.plan.num_chains * engine.plan.total_steps


def _choice_of(found: dict[str, Any]) -> Choice:
    return Choice(**{**found, "lines": tuple(found["lines"])})


def _need(engine: Engine, is_open: bool, request: _Request, saves: bool) -> Need:
    looks = look_bytes(engine, engine.plan.num_chains)
    if is_open:
        looks += probe_of(engine, _total(engine, request)).temporaries(calibrates=True)
    return need_of(engine, looks, saves=saves, control=bool(request.control_variate))
