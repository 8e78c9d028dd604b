"""Saved files of which a byte was changed, and files of the first format: read as they were saved, or refused."""

import copy
import json
import random
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax._io import digest_of_arrays
from slt_jax.results.storage import UNVERIFIED
from tests.small import DATA, PLAN, estimate, posterior, refuses, traces_of

LOADERS = {"result": slt.load_result, "sweep": slt.load_sweep, "trajectory": slt.load_trajectory}


def results_of(loaded):
    """Every result of what was loaded."""
    if isinstance(loaded, slt.LLCResult):
        return [loaded]
    return (
        list(loaded.results) if isinstance(loaded, slt.Sweep) else [r for row in loaded.results.values() for r in row]
    )


def same(one, other):
    """Whether two loaded objects hold the same numbers, settings, notes and coordinates."""
    place = [(x.axes, x.control) if isinstance(x, slt.Sweep) else getattr(x, "steps", ()) for x in (one, other)]
    pairs = list(zip(results_of(one), results_of(other), strict=True))
    return repr(place[0]) == repr(place[1]) and all(
        repr((a.settings, a.stopped, a.notes, a.other_names)) == repr((b.settings, b.stopped, b.notes, b.other_names))
        and all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a.traces, b.traces, strict=True))
        and np.array_equal(a.warmup_loss, b.warmup_loss, equal_nan=True)
        for a, b in pairs
    )


def flipped(content, pick):
    """``content`` with one byte changed: a digit to another one where it has some, half of the time, else any bit."""
    digits = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    changed = bytearray(content)
    if digits and pick.random() < 0.5:
        at = pick.choice(digits)
        changed[at] = pick.choice([byte for byte in range(48, 58) if byte != changed[at]])
    else:
        changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
    return bytes(changed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind -> (object, its directory)."""
    folder = tmp_path_factory.mktemp("saved")
    made = {
        "result": estimate(also={"held out": DATA[:20]}),
        "sweep": slt.sweep(posterior(), DATA, sampler=slt.sgld(), step_size=[1e-4, 2e-4], **PLAN),
        "trajectory": slt.trajectory(
            posterior(), {0: jnp.zeros(3), 5: jnp.ones(3)}, DATA, sampler=slt.sgld(1e-4), thinning=1, **PLAN
        ),
    }
    return {kind: (thing, thing.save(folder / kind)) for kind, thing in made.items()}


def outcomes(kind, path, number, seed):
    """How many of ``number`` flips over all files were refused, were harmless, and were read as something else."""
    pick, load = random.Random(seed), LOADERS[kind]
    whole, files = load(path), sorted(p for p in path.rglob("*") if p.is_file())
    counts = {"refused": 0, "the same": 0, "different": 0}
    for i in range(number):
        file = files[i % len(files)] if i % 3 else path / "zarr.json"  # attributes in every third
        content = file.read_bytes()
        if not content:
            continue
        file.write_bytes(flipped(content, pick))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = load(path)
            counts["the same" if same(found, whole) else "different"] += 1
        except ValueError as error:
            counts["refused" if str(path) in str(error) else "different"] += 1
        finally:
            file.write_bytes(content)
    return counts


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("number", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_changed_byte_is_refused_or_changes_nothing(saved, tmp_path, kind, number):
    """Kills: settings, coordinates, notes or names outside the digest; a format marker that one byte takes away."""
    path = shutil.copytree(saved[kind][1], tmp_path / kind)
    counts = outcomes(kind, path, number, seed=31)
    print(kind, counts)
    assert counts["different"] == 0
    assert counts["refused"] >= number / 3


def edited(path, change):
    """The root's attributes, as ``change`` changes them in place."""
    record = json.loads((path / "zarr.json").read_text())
    change(record["attributes"])
    (path / "zarr.json").write_text(json.dumps(record))
    return path


CHANGES = {
    "a setting": lambda a: a.update(settings=a["settings"].replace('"num_free": 3', '"num_free": 4')),
    "a note": lambda a: a.update(notes='["all is well"]'),
    "a stopped chain": lambda a: a.update(stopped='{"1": 3}'),
    "another attribute": lambda a: a.update(title="mine"),
    "no digest": lambda a: a.pop("contents_sha256"),
    "no settings": lambda a: a.pop("settings"),
    "no format": lambda a: a.update(slt_jax_result=1),
    "a later format": lambda a: a.update(slt_jax_result=3),
}


@pytest.mark.quick
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_attribute_is_refused(saved, tmp_path, change):
    path = edited(shutil.copytree(saved["result"][1], tmp_path / "result"), CHANGES[change])
    refuses(ValueError, lambda: slt.load_result(path), path, "it was changed or damaged after it was saved")


def test_a_changed_name_of_a_data_set_or_coordinate_is_refused(saved, tmp_path):
    path = shutil.copytree(saved["result"][1], tmp_path / "result")
    group = path / "also_sample_stats" / "data_set" / "zarr.json"
    group.write_text(group.read_text().replace('"data_set"', '"date_set"'))
    refuses(ValueError, lambda: slt.load_result(path), path, "changed or damaged")
    path = shutil.copytree(saved["sweep"][1], tmp_path / "sweep")
    axis = saved["sweep"][0].dataset["step_size"]
    other = axis.to_dataset(name="x").assign_coords(step_size=2 * axis.values)
    shutil.rmtree(path / "step_size")
    other.to_zarr(tmp_path / "other", consolidated=False)
    shutil.copytree(tmp_path / "other" / "step_size", path / "step_size")
    refuses(ValueError, lambda: slt.load_sweep(path), path, "changed or damaged")


@pytest.mark.quick
@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_saved_comes_back(saved, kind):
    thing, path = saved[kind]
    assert same(LOADERS[kind](path), thing)
    assert not any("unverified" in note for result in results_of(LOADERS[kind](path)) for note in result.notes)


def test_a_trace_of_negative_nan_comes_back(tmp_path):
    """Kills: a digest over the sign of a NaN, of which a file keeps nothing where all values are NaN."""
    result = copy.copy(estimate())
    traces = result.traces._replace(kinetic=np.copysign(np.full_like(result.loss_trace, np.nan), -1.0))
    object.__setattr__(result, "traces", traces)
    assert np.isnan(slt.load_result(result.save(tmp_path / "result")).traces.kinetic).all()


# The first format, whose digest is of the traces only


def first_format(thing, path, kind):
    """What versions before format 2 wrote."""
    tree = thing.to_xarray()
    arrays = [tree["sample_stats"][name].values for name in traces_of(results_of(thing)[0]) if name != "warmup_loss"]
    arrays.append(tree["warmup_sample_stats"]["loss"].values)
    if "also_sample_stats" in tree:
        also = tree["also_sample_stats"].to_dataset()
        arrays += list(np.stack([also[name].values for name in also.data_vars], axis=-1))
    tree.attrs = {**tree.attrs, f"slt_jax_{kind}": 1, "sha256": digest_of_arrays(arrays)}
    tree.to_zarr(path, consolidated=False)
    return path


@pytest.mark.parametrize("kind", LOADERS)
def test_files_of_the_first_format_are_read_as_unverified(saved, tmp_path, kind):
    thing, _ = saved[kind]
    path = first_format(thing, tmp_path / kind, kind)
    found = LOADERS[kind](path)
    for result, before in zip(results_of(found), results_of(thing), strict=True):
        assert result.notes == (*before.notes, UNVERIFIED)
        np.testing.assert_array_equal(result.loss_trace, before.loss_trace)
    loss = path / "sample_stats" / "loss_trace"
    shutil.rmtree(loss / "c")
    refuses(ValueError, lambda: LOADERS[kind](path), path, "its traces are not those that were saved")


def test_a_file_of_the_first_format_without_its_digest_is_refused(saved, tmp_path):
    path = first_format(saved["result"][0], tmp_path / "result", "result")
    edited(path, lambda a: a.pop("sha256"))
    refuses(ValueError, lambda: slt.load_result(path), path, "it has no digest of its contents")
