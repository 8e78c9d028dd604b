"""A sweep: its cells are single estimates, compiled once; lost cells marked, memory kept to, resumed."""

import json
import random
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.estimators import observing
from slt_jax.results.sweep import AXES, table_of
from tests.durable import SLOWLY, Child, watched
from tests.small import refuses, traces_of

GRID = {"nbeta": [10.0, 30.0], "localization": [1.0, 3.0], "step_size": [1e-3, 3e-3, 1e-2]}
PLAN = {"num_chains": 2, "num_draws": 100, "num_warmup": 20, "thinning": 2, "batch_size": 50}
CURVED = jnp.linspace(0.2, 3.0, 10)


def sweep(regression, **changes):
    posterior, data = regression
    return slt.sweep(posterior, data, **{**GRID, "sampler": slt.sgld(), **PLAN, "key": 3, **changes})


@pytest.fixture(scope="module")
def data():
    return jax.random.normal(jax.random.key(1), (400, 10)) * CURVED


@pytest.fixture(scope="module")
def found(data):
    return sweep((posterior(), data))


def loss_fn(p, x):
    return 0.5 * (x @ p["w"]) ** 2


def posterior(loss=loss_fn, **numbers):
    return slt.LocalPosterior(loss, {"w": jnp.zeros(10)}, 400, **{"localization": 1.0, **numbers})


@pytest.mark.quick
@pytest.mark.parametrize("at", [0, 4, 11])
def test_a_cell_is_the_estimate_at_its_numbers(found, data, at):
    """Kills: a cell with another's numbers, noise or batches; looks at another cell's chains."""
    cells = np.array(np.meshgrid(*GRID.values(), indexing="ij")).reshape(3, -1)
    numbers = dict(zip(AXES, cells[:, at].tolist(), strict=True))
    alone = slt.estimate_llc(
        posterior(nbeta=numbers["nbeta"], localization=numbers["localization"]), data,
        sampler=slt.sgld(numbers["step_size"]), key=jax.random.fold_in(jax.random.key(3), at), **PLAN,
    )  # fmt: skip
    cell = found.cell(**numbers)
    assert cell is found.results[at]
    for name, values in traces_of(cell).items():
        np.testing.assert_allclose(values, traces_of(alone)[name], rtol=2e-5, atol=1e-7, err_msg=name)
    assert cell.llc == pytest.approx(alone.llc, rel=1e-4)
    assert cell.settings.probe["gradients"] > 0
    assert cell.settings.probe == pytest.approx(alone.settings.probe, rel=1e-3)
    assert cell.verdict == alone.verdict


@pytest.mark.quick
def test_the_grid_is_compiled_once(data):
    """Kills: a number of the grid that became a constant of the program."""
    counts = []
    for grid in ({"step_size": [1e-3]}, GRID):
        traces = []

        def loss(p, x, traces=traces):
            traces.append(1)
            return loss_fn(p, x)

        sweep((posterior(loss, nbeta=10.0), data), **{**dict.fromkeys(AXES), **grid})
        counts.append(len(traces))
    assert counts[0] == counts[1]


def test_cells_have_noise_of_their_own(found):
    """Kills: one key for all cells, which would make their errors one error."""
    # Linear in the step size, two cells that share their noise move almost alike.
    slow, fast = (found.cell(nbeta=10, localization=1, step_size=s).loss_trace[0] for s in (1e-3, 3e-3))
    assert abs(np.corrcoef(slow, fast)[0, 1]) < 0.7
    firsts = [r.loss_trace[0, 0] for r in found.results]
    assert len(set(firsts)) == len(firsts)


def test_a_lost_cell_is_marked_and_the_others_go_on(data, tmp_path):
    """Step sizes beyond what is stable: 2 / (nbeta curvature)."""
    wild = sweep((posterior(), data), step_size=[1e-3, 1e-2, 50.0])
    lost = wild.dataset.diverged.values
    np.testing.assert_array_equal(lost, np.broadcast_to([False, False, True], lost.shape))
    assert np.isnan(wild.dataset.llc.values[lost]).all()
    assert np.isfinite(wild.dataset.llc.values[~lost]).all()
    assert set(wild.dataset.verdict.values[lost]) == {"diverged"}
    assert wild.reading.recommended is None or wild.reading.recommended["step_size"] < 50
    assert sum("diverged" in line for line in table_of(wild)) == lost.sum()
    wild.save(tmp_path / "s.zarr")
    np.testing.assert_array_equal(slt.load_sweep(tmp_path / "s.zarr").dataset.diverged.values, lost)


def test_estimates_are_those_of_the_posterior(data):
    """Sum of nbeta h / (nbeta h + gamma) / 2 over the Hessian's eigenvalues, in every cell; z-scores over the grid."""
    wide = {"nbeta": [20.0, 60.0], "localization": [1.0, 5.0], "step_size": [1e-3, 3e-3]}
    grid = sweep((posterior(), data), **wide, num_draws=600, num_warmup=300, num_chains=4, sampler=slt.underdamped())
    curvature = np.linalg.eigvalsh(np.asarray(data.T @ data, float) / 400)
    z = []
    for r in grid.results:
        s = r.settings
        exact = np.sum(s.nbeta * curvature / (s.nbeta * curvature + s.localization)) / 2
        z.append((r.llc - exact) / r.llc_stderr)
    assert np.abs(z).max() < 4
    assert np.sqrt(np.mean(np.square(z))) < 1.8


def test_the_control_is_the_gaussian_alone(found, data):
    """E[L] = tr H / (2 gamma) at nbeta = 0. Kills: a wrong width; the same draw each time."""
    trace = float(jnp.trace(data.T @ data) / 400)
    for gamma, (rise, error) in zip(GRID["localization"], found.control, strict=True):
        assert abs(rise - trace / (2 * gamma)) < 4 * error
        assert 0 < error < rise / 3
    gap = found.dataset.llc_raw / found.dataset.nbeta
    np.testing.assert_allclose(found.dataset.held, 1 - gap / found.dataset.control)


def test_the_control_is_above_the_loss_at_the_center(found, data):
    """A loss that is 3 higher everywhere rises by as much. Kills: the mean loss in place of the rise."""
    higher = sweep((posterior(lambda p, x: loss_fn(p, x) + 3), data), num_draws=10)
    np.testing.assert_allclose(higher.control, found.control, rtol=1e-3)


@pytest.mark.quick
def test_saved_and_read_again(found, tmp_path):
    found.save(tmp_path / "s.zarr")
    again = slt.load_sweep(tmp_path / "s.zarr")
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())
    assert str(again) == str(found)
    for name, values in traces_of(again.results[5]).items():
        np.testing.assert_array_equal(values, traces_of(found.results[5])[name])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        found.save(tmp_path / "s.zarr")
    with pytest.raises(ValueError, match=r"holds a sweep, not a result. Read it with load_sweep"):
        slt.load_result(tmp_path / "s.zarr")
    found.results[0].save(tmp_path / "r.zarr")
    with pytest.raises(ValueError, match=r"holds a result, not a sweep. Read it with load_result"):
        slt.load_sweep(tmp_path / "r.zarr")
    with pytest.raises(FileExistsError, match="is not a sweep"):
        found.save(tmp_path / "r.zarr", overwrite=True)
    chunks = (tmp_path / "s.zarr" / "sample_stats" / "loss_trace" / "c").rglob("*")
    next(path for path in chunks if path.is_file()).unlink()
    with pytest.raises(ValueError, match=r"truncated, or it was changed or damaged .*do not have the digest"):
        slt.load_sweep(tmp_path / "s.zarr")


OFTEN = {"chunk_size": 30, "checkpoint_seconds": 0}


@pytest.fixture(scope="module")
def in_parts():
    """A budget in which four cells fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys.modules["slt_jax.estimators.sweep"], "state_bytes", lambda engine: engine.plan.num_chains * 2**30
        )
        yield {"memory_gib": 9.0}


@pytest.fixture(scope="module")
def whole(data, in_parts):
    return sweep((posterior(), data), **in_parts, **OFTEN)


def test_fewer_cells_at_once_change_nothing(data, found, whole, in_parts):
    for one, other in zip(whole.results, found.results, strict=True):
        np.testing.assert_allclose(one.loss_trace, other.loss_trace, rtol=2e-5, atol=1e-7)
    with pytest.raises(MemoryError, match=r"memory_gib = 1.5 is less than the chains of one cell"):
        sweep((posterior(), data), memory_gib=1.5)


@pytest.mark.parametrize("stop_at", [(0, 30), (1, 0), (2, 150)])
def test_interrupted_and_resumed(data, whole, in_parts, tmp_path, stop_at):
    """Stopped in its first, second or last part, in its middle or at its beginning."""
    options = {**in_parts, **OFTEN}
    part, step = stop_at
    with watched(step, part), pytest.raises(KeyboardInterrupt, match=f"{4 * part} of 12 cells are done, and saved in"):
        sweep((posterior(), data), **options, checkpoint_dir=tmp_path / "run")
    again = sweep((posterior(), data), **options, checkpoint_dir=tmp_path / "run")
    parts = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert [name for name in parts if name.startswith("cells")] == ["cells-0-3", "cells-4-7", "cells-8-11"]
    for one, other in zip(again.results, whole.results, strict=True):
        for name, values in traces_of(one).items():
            np.testing.assert_array_equal(values, traces_of(other)[name], err_msg=name)
    assert str(again) == str(whole)
    with pytest.raises(ValueError, match=r"another grid\.step_size"):
        sweep((posterior(), data), **options, step_size=[1e-3, 2e-3, 1e-2], checkpoint_dir=tmp_path / "run")


KILLED = (
    SLOWLY
    + """
import numpy as np
import slt_jax as slt
from tests.estimators.test_sweep import CURVED, GRID, PLAN, posterior

sys.modules["slt_jax.estimators.sweep"].state_bytes = lambda engine: engine.plan.num_chains * 2**30
data = jax.random.normal(jax.random.key(1), (400, 10)) * CURVED
found = slt.sweep(
    posterior(), data, **GRID, **PLAN, sampler=slt.sgld(), memory_gib=9.0, chunk_size=5, checkpoint_seconds=0,
    checkpoint_dir=sys.argv[2] if len(sys.argv) > 2 else None,
)
np.save(sys.argv[1], np.stack([r.loss_trace for r in found.results]))
"""
)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(tmp_path):
    """Eight SIGKILLs over the three parts of a sweep; the end is bit for bit that of an unbroken one."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    assert (whole := Child(script, tmp_path / "whole.npy")).returncode == 0, whole.errors.read_text()
    pick = random.Random(7)
    children = [Child(script, tmp_path / "x.npy", tmp_path / "run", kill_after=pick.uniform(0, 1)) for _ in range(8)]
    last = Child(script, tmp_path / "again.npy", tmp_path / "run")
    assert last.returncode == 0, last.errors.read_text()
    assert sum(child.returncode == -signal.SIGKILL for child in children) >= 4
    np.testing.assert_array_equal(np.load(tmp_path / "again.npy"), np.load(tmp_path / "whole.npy"))


RUN = """
import resource, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
import slt_jax as slt

width = 2828
posterior = slt.LocalPosterior(lambda w, x: jnp.sum((x @ w) ** 2, -1), jnp.zeros((width, width)), 16, 1.0, 1.0)
slt.sweep(
    posterior, jnp.ones((16, width)), nbeta=[1.0, 2.0, 3.0], localization=[1.0, 2.0], step_size=[1e-7, 1e-6],
    sampler=slt.sgld(), num_chains=2, num_draws=2, num_warmup=1, batch_size=4, progress=True,
    memory_gib=float(sys.argv[1]) if len(sys.argv) > 1 else None,
)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_a_process_keeps_to_its_budget():
    """24 chains of 32 MB, in a process of its own; without the budget it takes more."""
    free = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    kept = subprocess.run([sys.executable, "-c", RUN, "1.2"], capture_output=True, text=True, check=True)
    assert "12 cells at once" in free.stderr
    assert 1 <= int(re.search(r"(\d+) cells at once", kept.stderr)[1]) < 12
    assert float(kept.stdout) <= 1.2 < float(free.stdout)


def observed(data):
    return {"few": slt.Observable(data[:7]), "moments": slt.Observable(data[:7], keep="moments")}


def test_a_cell_observes_what_its_estimate_does(data, tmp_path):
    """Kills: what another cell's chains observed; what is observed lost in a file; a lost cell's values."""
    grid = {"nbeta": [10.0], "localization": [1.0, 3.0], "step_size": [3e-3, 50.0]}
    given = {**grid, "num_draws": 30, "checkpoint_dir": tmp_path / "run"}
    found = sweep((posterior(), data), **given, observe=observed(data))
    repeated = sweep((posterior(), data), **given, observe=observed(data))
    refuses(ValueError, lambda: sweep((posterior(), data), **given, observe={"few": data[:7]}), "observe")
    found.save(tmp_path / "s.zarr")
    again = slt.load_sweep(tmp_path / "s.zarr")
    at, numbers, step_size = 2, {"nbeta": 10.0, "localization": 3.0}, 3e-3
    alone = slt.estimate_llc(
        posterior(**numbers), data, sampler=slt.sgld(step_size), key=jax.random.fold_in(jax.random.key(3), at),
        observe=observed(data), **{**PLAN, "num_draws": 30},
    )  # fmt: skip
    for cell in (found.results[at], again.cell(**numbers, step_size=step_size), repeated.results[at]):
        assert list(cell.observed) == ["few", "moments"]
        for name, one in alone.observed.items():
            own = cell.observed[name]
            np.testing.assert_allclose(own.gap, one.gap, rtol=2e-4, atol=1e-6)
            np.testing.assert_allclose(own.center, one.center)
            for field, value in one.as_moments()._asdict().items():
                near = 1e-4 * np.abs(value).max()
                np.testing.assert_allclose(getattr(own.as_moments(), field), value, 1e-3, near, err_msg=field)
        np.testing.assert_allclose(cell.observed["few"].values, alone.observed["few"].values, 2e-4, 1e-6)
    assert found.results[at].settings.gradients["observe"] == alone.settings.gradients["observe"]
    assert found.results[at].settings.observed == alone.settings.observed
    for lost in (found.results[1], again.results[1]):
        assert lost.verdict == "diverged"
        assert lost.observed["few"].values.shape == (0, 30, 7)


def test_what_cells_cannot_observe(data, tmp_path, monkeypatch):
    """Kills: a remedy that a sweep refuses; a limit of memory for one cell and not for all."""
    given = {"localization": None, "nbeta": [10.0], "step_size": [1e-3, 3e-3], "num_draws": 20, "num_warmup": 2}
    on_disk = {"few": slt.Observable(data[:7], path=tmp_path / "v")}
    refuses(ValueError, lambda: sweep((posterior(), data), **given, observe=on_disk), "observe['few']", "path", "sweep")
    monkeypatch.setattr(observing, "MOST_VALUES", 1.5 * 4 * 7 * 2 * 20)
    found = sweep((posterior(), data), **given, observe={"few": data[:7]})
    for cell in found.results:
        assert cell.observed["few"].values is None
        (note,) = [note for note in cell.notes if "only moments were kept" in note]
        assert note.endswith("Give it keep='values' to keep them.")
