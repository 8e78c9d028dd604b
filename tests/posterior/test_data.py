"""Minibatches: uniform indices, the same batch from memory and from disk, and clear refusals of bad files."""

import builtins
import json
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_jax.kernels.langevin import random_words, reference, uniform_index
from slt_jax.posterior import files
from slt_jax.posterior.data import ArrayData, HostData, Prefetcher, as_source, check_batch_size, draw_indices
from slt_jax.posterior.files import hf_dataset, token_file
from tests.small import estimate

TOKENS = np.random.default_rng(0).integers(0, 50, 1003)
INDICES = np.array([[[0, 3], [99, 7]], [[3, 3], [50, 0]], [[1, 2], [98, 97]]])  # (chains, steps, batch)


def write(path, tokens=TOKENS, dtype=np.uint16):
    tokens = np.asarray(tokens).astype(dtype)
    if path.suffix == ".npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    return path


@pytest.mark.quick
@pytest.mark.parametrize("num", [1, 2, 3, 100, 65_537, 2**20, 10**9 + 7, 2**31 - 2, 2**31 - 1])
def test_uniform_index_equals_python_integers(num):
    """Kills: a carry lost in the 96-bit product, which no statistical test sees."""
    key = jax.random.key(num)
    high, low = (np.asarray(word) for word in random_words(key, (500,)))
    exact = [reference.uniform_index(h, w, num) for h, w in zip(high, low, strict=True)]
    drawn = jax.jit(uniform_index, static_argnums=(1, 2))(key, 500, num)
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(drawn, exact)


@pytest.mark.parametrize("num", [0, 2**31])
def test_uniform_index_refuses_what_int32_cannot_index(num):
    with pytest.raises(ValueError, match=f"got {num}"):
        uniform_index(jax.random.key(0), 4, num)


@pytest.mark.quick
@pytest.mark.parametrize("num", [7, 64, 1000])
def test_indices_are_uniform(num):
    """Chi-square over keys and positions. Kills: modulo of too few bits, the last index never drawn."""
    keys = jax.random.split(jax.random.key(3), 400)
    drawn = jax.vmap(lambda key: draw_indices(key, num, 500))(keys)
    counts = np.bincount(np.asarray(drawn).ravel(), minlength=num)
    expected = drawn.size / num
    chi2 = np.sum((counts - expected) ** 2) / expected
    assert len(counts) == num
    assert abs(chi2 - (num - 1)) < 4 * np.sqrt(2 * (num - 1))  # mean and variance of chi-square


def test_draws_within_a_batch_are_independent():
    """With replacement: two entries agree with probability 1 / num. Kills: a permutation, one index repeated."""
    num, keys = 20, jax.random.split(jax.random.key(4), 20_000)
    drawn = np.asarray(jax.vmap(lambda key: draw_indices(key, num, 2))(keys))
    agree = np.mean(drawn[:, 0] == drawn[:, 1])
    assert abs(agree - 1 / num) < 4 * np.sqrt((1 / num) * (1 - 1 / num) / len(drawn))


def test_array_data_gathers_rows_of_every_leaf():
    data = {"x": np.arange(12.0, dtype=np.float32).reshape(6, 2), "y": [np.arange(6)]}
    source = as_source(data)
    got = source.fetch(np.array([5, 0, 5]))
    np.testing.assert_array_equal(got["x"], data["x"][[5, 0, 5]])
    np.testing.assert_array_equal(got["y"][0], [5, 0, 5])
    assert (source.num_data, source.on_host) == (6, False)
    assert as_source(source) is source


@pytest.mark.parametrize(
    ("data", "error", "sentence"),
    [
        ({}, ValueError, "no arrays"),
        (None, ValueError, "no arrays"),
        ({"x": np.ones((3, 2)), "y": np.ones(4)}, ValueError, "'x': 3, 'y': 4"),
        (np.ones((0, 2)), ValueError, "no examples"),
        ({"x": np.ones(3), "y": 1.0}, TypeError, "'y' is 1.0"),
        ({"x": np.float32(1)}, TypeError, "'x'"),
        ([1, 2, 3], TypeError, "'0' is 1"),
        ("train.npy", TypeError, "'train.npy'"),
        (np.array(["a", "b"]), TypeError, "hold numbers"),
        (np.array([None, None]), TypeError, "hold numbers"),
        (np.array([0, 2**31]), ValueError, "0 to 2147483648, which do not fit int32"),
    ],
)
def test_bad_arrays_are_refused(data, error, sentence):
    with pytest.raises(error, match=sentence):
        as_source(data)


@pytest.mark.parametrize("size", [1, 40, np.int64(7)])
def test_batch_size_in_range(size):
    """Kills: a refusal of one example, or of as many as there are; a whole number of NumPy's that no file takes."""
    settings = estimate(batch_size=size).settings
    assert json.loads(json.dumps(settings.to_json()))["batch_size"] == size


@pytest.mark.parametrize(
    ("size", "error"),
    [(0, ValueError), (-3, ValueError), (101, ValueError), (True, TypeError), (2.0, TypeError), (None, TypeError)],
)
def test_batch_size_out_of_range(size, error):
    told = "batch_size = 101 is more than the 100 examples of the data" if size == 101 else (
        f"batch_size must be between 1 and num_data = 100, got {size}"
    )  # fmt: skip
    with pytest.raises(error, match=told):
        check_batch_size(size, 100)


FORMATS = [("t.npy", np.uint16, None), ("t.npy", np.int64, None), ("t.npy", ">i4", None), ("t.npy", np.uint8, None)]
FORMATS += [("t.bin", np.uint16, None), ("t.bin", np.uint32, np.uint32), ("t.bin", np.uint16, "uint16")]


@pytest.mark.parametrize(("name", "stored", "asked"), FORMATS)
def test_a_file_gives_the_batch_that_memory_gives(tmp_path, name, stored, asked):
    """Kills: examples that overlap or drift by the remainder; axes of the index array mixed up."""
    source = token_file(write(tmp_path / name, dtype=stored), 10, dtype=asked, vocab_size=50)
    memory = as_source(TOKENS[:1000].reshape(100, 10).astype(np.int32))
    assert (source.num_data, source.on_host) == (100, True)
    batch = source.fetch(INDICES)
    assert isinstance(batch, np.ndarray)
    assert (batch.dtype, batch.shape) == (np.int32, (3, 2, 2, 10))
    np.testing.assert_array_equal(batch, memory.fetch(INDICES))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("bad", "stored"), [(50, np.uint16), (65_535, np.uint16), (-1, np.int32), (2**31, np.int64)])
def test_an_id_outside_the_vocabulary_is_named(tmp_path, monkeypatch, bad, stored, scan):
    """Found when opening, or in a file too large for that, when fetched. Kills: a position counted within the batch."""
    monkeypatch.setattr(files, "SCAN_LIMIT", 2**28 if scan else 0)
    monkeypatch.setattr(files, "BLOCK", 64)
    tokens = TOKENS.copy()
    tokens[503] = bad
    path = write(tmp_path / "t.npy", tokens, stored)
    sentence = f"token id {bad} at position 503 of .*t.npy is outside the vocabulary of 50"
    if scan:
        with pytest.raises(ValueError, match=sentence):
            token_file(path, 10, vocab_size=50)
        return
    source = token_file(path, 10, vocab_size=50)
    source.fetch(np.array([49, 51]))
    with pytest.raises(ValueError, match=sentence):
        source.fetch(np.array([[3, 50]]))


@pytest.mark.parametrize(("bad", "stored"), [(-1, np.int32), (2**31, np.int64), (2**31, np.uint32)])
def test_without_a_vocabulary_an_id_must_still_be_an_int32(tmp_path, bad, stored):
    """Kills: uint32 4294967295 handed to the model as -1."""
    tokens = np.append(TOKENS, bad)
    with pytest.raises(ValueError, match=f"token id {bad} at position 1003 .* outside the range of int32"):
        token_file(write(tmp_path / "t.npy", tokens, stored), 10)


def not_npy(path):
    path.write_bytes(b"this is no array, whatever its name says")


def truncated_npy(path):
    write(path)
    path.write_bytes(path.read_bytes()[:-100])


def truncated_header(path):
    write(path)
    path.write_bytes(path.read_bytes()[:40])


def zip_named_npy(path):
    with open(path, "wb") as file:
        np.savez(file, tokens=TOKENS)


BAD_NPY = {
    "foreign": (not_npy, "not a readable .npy"),
    "truncated": (truncated_npy, "not a readable .npy"),
    "header": (truncated_header, "not a readable .npy"),
    "zip": (zip_named_npy, "not a readable .npy"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable .npy"),
    "object": (lambda path: np.save(path, np.array([[1], None], object)), "not a readable .npy"),
    "matrix": (lambda path: np.save(path, np.ones((4, 5), int)), "holds rows of 5 tokens, less than one seq_len = 10"),
    "cube": (lambda path: np.save(path, np.ones((4, 5, 6), int)), r"holds shape \(4, 5, 6\)"),
    "float": (lambda path: np.save(path, np.ones(40)), "integers, it holds shape .* of float64"),
    "short": (lambda path: np.save(path, np.ones(9, int)), "holds 9 tokens, less than one seq_len = 10"),
}


@pytest.mark.parametrize("case", BAD_NPY)
def test_a_bad_npy_is_refused_by_name(tmp_path, case):
    make, sentence = BAD_NPY[case]
    make(tmp_path / "t.npy")
    with pytest.raises(ValueError, match=rf"t\.npy.*{sentence}|t\.npy {sentence}"):
        token_file(tmp_path / "t.npy", 10)


def test_a_bad_raw_file_is_refused(tmp_path):
    path = tmp_path / "t.bin"
    with pytest.raises(FileNotFoundError, match=r"t\.bin"):
        token_file(path, 10)
    for size, dtype in [(0, None), (2001, None), (2002, np.uint32)]:
        path.write_bytes(b"\0" * size)
        with pytest.raises(ValueError, match=rf"t\.bin has {size} bytes"):
            token_file(path, 10, dtype=dtype)
    path.write_bytes(b"\0" * 2000)
    for dtype in (np.float32, bool):
        with pytest.raises(ValueError, match="dtype of a raw token file must be"):
            token_file(path, 10, dtype=dtype)


def test_bad_arguments_of_a_token_file_are_refused(tmp_path):
    path = write(tmp_path / "t.npy")
    for seq_len, error in [(1, ValueError), (0, ValueError), (True, TypeError), (10.0, TypeError)]:
        with pytest.raises(error, match="seq_len"):
            token_file(path, seq_len)
    for vocab_size, error in [(0, ValueError), (50.0, TypeError)]:
        with pytest.raises(error, match="vocab_size"):
            token_file(path, 10, vocab_size=vocab_size)
    with pytest.raises(ValueError, match="holds uint16, but dtype = uint32"):
        token_file(path, 10, dtype=np.uint32)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["t.npy", "t.bin"])
def test_one_changed_token_changes_the_fingerprint(tmp_path, monkeypatch, name, whole):
    """Kills: a fingerprint of the head of the file, or of its name and size."""
    if not whole:
        monkeypatch.setattr(files, "HASH_LIMIT", 100)
        monkeypatch.setattr(files, "BLOCK", 64)  # 64 blocks of 64 bytes cover these 2006 bytes
    path = write(tmp_path / name)
    first = token_file(path, 10).fingerprint()
    assert first == token_file(path, 10).fingerprint()
    assert first != token_file(path, 11).fingerprint()
    for position in (0, 501, 1002):
        changed = TOKENS.copy()
        changed[position] += 1
        assert token_file(write(tmp_path / f"{position}{name}", changed), 10).fingerprint() != first


def test_array_fingerprints_see_structure_type_shape_and_bytes():
    base = {"x": np.arange(6, dtype=np.int32)}
    others = [
        {"x": np.array([0, 1, 2, 3, 4, 6], np.int32)},
        {"y": base["x"]},
        {"x": base["x"].astype(np.float32)},
        {"x": base["x"].reshape(6, 1)},
        {"x": base["x"].view(np.uint32)},
    ]
    prints = {ArrayData(d).fingerprint() for d in [base, {"x": jnp.arange(6)}, *others]}
    assert len(prints) == 1 + len(others)


@pytest.mark.parametrize("number", [1, 5])
def test_prefetched_equals_direct(tmp_path, number):
    """Kills: results handed out in the wrong order or one late."""
    source = token_file(write(tmp_path / "t.npy"), 10)
    chunks = [np.random.default_rng(i).integers(0, 100, (2, 3, 4)) for i in range(number)]
    with Prefetcher(source) as ahead:
        ahead.submit(jnp.asarray(chunks[0]))
        for now, following in zip(chunks, [*chunks[1:], None], strict=True):
            got = ahead.result()
            if following is not None:
                ahead.submit(following)
            np.testing.assert_array_equal(got, source.fetch(now))


class Waiting(HostData):
    """Fetches only when allowed to; fails on index 13."""

    num_data = 100

    def __init__(self):
        self.allowed, self.thread = threading.Event(), None

    def fetch(self, indices):
        self.thread = threading.current_thread()
        assert self.allowed.wait(10)
        if 13 in indices:
            raise OSError("disk gone")
        return {"x": np.asarray(indices) * 2}


def test_prefetching_runs_beside_the_caller_and_hands_on_its_errors():
    """Kills: a submit that blocks; an error swallowed by the thread; a thread that outlives the run."""
    source = as_source(Waiting())
    with Prefetcher(source) as ahead:
        with pytest.raises(RuntimeError, match="nothing was submitted"):
            ahead.result()
        ahead.submit(np.array([1, 2]))
        with pytest.raises(RuntimeError, match="under way"):
            ahead.submit(np.array([3]))
        source.allowed.set()
        np.testing.assert_array_equal(ahead.result()["x"], [2, 4])
        ahead.submit(np.array([13]))
        with pytest.raises(OSError, match="disk gone"):
            ahead.result()
        ahead.submit(np.array([5]))
        np.testing.assert_array_equal(ahead.result()["x"], [10])
    assert source.thread is not threading.main_thread()
    assert not source.thread.is_alive()


def test_hugging_face_rows(tmp_path):
    """One column is an array, several are a dict; repeated and unordered indices keep their places."""
    datasets = pytest.importorskip("datasets")
    rows = TOKENS[:1000].reshape(100, 10)

    def save(name, rows, **more):
        datasets.Dataset.from_dict({"tokens": rows.tolist(), "label": list(range(len(rows))), **more}).save_to_disk(
            str(tmp_path / name)
        )
        return tmp_path / name

    path = save("a", rows, text=["word"] * 100)
    source = hf_dataset(path, ["tokens", "label"])
    batch = source.fetch(INDICES)
    np.testing.assert_array_equal(batch["tokens"], rows[INDICES])
    np.testing.assert_array_equal(batch["label"], INDICES)
    np.testing.assert_array_equal(hf_dataset(path, ["tokens"]).fetch(INDICES), rows[INDICES])
    assert source.fingerprint() == hf_dataset(path, ["tokens", "label"]).fingerprint()
    assert source.fingerprint() != hf_dataset(path, ["tokens"]).fingerprint()
    changed = rows.copy()
    changed[60, 4] += 1
    assert hf_dataset(save("b", changed), ["tokens"]).fingerprint() != hf_dataset(path, ["tokens"]).fingerprint()

    with pytest.raises(ValueError, match=r"columns \['other'\] are not in"):
        hf_dataset(path, ["other"])
    with pytest.raises(ValueError, match=r"column 'text' .* not numbers"):
        hf_dataset(path)
    with pytest.raises(ValueError, match="not a data set with rows"):
        hf_dataset(save("empty", rows[:0]))
    with pytest.raises(ValueError, match="save_to_disk"):
        hf_dataset(tmp_path)
    datasets.Dataset.from_dict({"t": [[1, 2], [3]]}).save_to_disk(str(tmp_path / "ragged"))
    with pytest.raises(ValueError, match=r"different shapes, \(1,\) and \(2,\)"):
        hf_dataset(tmp_path / "ragged").fetch(np.array([0, 1]))
    datasets.DatasetDict({"train": datasets.load_from_disk(str(path))}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"splits \['train'\]"):
        hf_dataset(tmp_path / "splits")


def test_without_the_extra_the_remedy_is_named(tmp_path, monkeypatch):
    ordinary = builtins.__import__

    def without(name, *rest, **more):
        if name == "datasets":
            raise ImportError(name)
        return ordinary(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "slt-jax\[hf\]"'):
        hf_dataset(tmp_path)
