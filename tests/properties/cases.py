"""Calls on a quadratic whose LLC is known, each with up to three arguments given in some other way, right or wrong."""

import collections
import fractions
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from flax.core import FrozenDict
from hypothesis import strategies as st

import slt_jax as slt
from slt_jax.posterior.data import HostData

ROWS, SIZE = 64, 6
PLAN = {"num_chains": 4, "num_draws": 1000, "num_warmup": 40, "key": 3}
STEP = 0.4 / (ROWS / np.log(ROWS) + 1.0)  # 0.4 over the curvature of the tempered posterior
X = scipy.linalg.hadamard(ROWS)[:, 1 : SIZE + 1].astype(np.float32)  # X'X / n = 1
TRAINED = np.array([0.5, -1.25, 2.0, 0.75, -0.25, 1.5], np.float32)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Case:
    """Arguments, those of them that were changed, and whether every change is a right use."""

    center: Any = None
    mask: Any = None
    loss: Any = None
    data: Any = None
    num_data: Any = ROWS
    more: dict = field(default_factory=lambda: {"localization": 1.0})  # of the posterior
    sampler: Any = None
    given: dict = field(default_factory=lambda: {**PLAN, "batch_size": ROWS})  # of the estimate
    free: int = SIZE
    changed: tuple = ()
    right: bool = True
    label: str = ""

    def run(self):
        posterior = slt.LocalPosterior(self.loss, self.center, self.num_data, mask=self.mask, **self.more)
        return slt.estimate_llc(posterior, self.data, sampler=self.sampler, **self.given)


def weights(params):
    """All weights in the order of the leaves."""
    floats = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in floats])


def rows_of(batch):
    """Inputs and targets, of any of the structures below."""
    parts = [jnp.asarray(x).reshape(len(x), -1).astype(jnp.float32) for x in jax.tree.leaves(batch)]
    joined = jnp.concatenate(parts, axis=1)
    return joined[:, :SIZE], joined[:, SIZE]


def per_example(params, batch):
    x, y = rows_of(batch)
    return 0.5 * (x @ weights(params) - y) ** 2


def mean(params, batch):
    return jnp.mean(per_example(params, batch))


jitted = jax.jit(per_example)


class Rows(HostData):
    """Rows that the host reads."""

    num_data = ROWS

    def __init__(self, table):
        self.table = table

    def fetch(self, indices):
        return self.table[np.asarray(indices)]

    def fingerprint(self):
        return "rows"


# Right uses


def _cut(*shapes):
    """TRAINED in arrays of these shapes."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    ends = np.cumsum(sizes)
    return [TRAINED[end - size : end].reshape(shape) for shape, size, end in zip(shapes, sizes, ends, strict=True)]


@st.composite
def centers(draw):
    """Pytrees of arrays that hold TRAINED in the order of their leaves."""
    shapes = draw(st.sampled_from([[(6,)], [(2, 3)], [(), (5,)], [(2, 2), (2,)], [(1, 1, 6)], [(3,), (3, 1)],
                                   [(1,), (2,), (3,)], [(0, 3), (6,)]]))  # fmt: skip
    kind = draw(st.sampled_from([np.float32, np.float64, np.float16, jnp.bfloat16]))
    on_device = draw(st.booleans())
    leaves = [jnp.asarray(x.astype(kind)) if on_device else x.astype(kind) for x in _cut(*shapes)]
    names = [f"p{i}" for i in range(len(leaves))]
    wrap = draw(st.sampled_from(["dict", "list", "tuple", "nested", "frozen", "ordered", "none", "nnx", "alone"]))
    if wrap == "alone" and len(leaves) == 1:
        return leaves[0]
    if wrap == "nnx":
        return nnx.State({name: nnx.Param(jnp.asarray(x)) for name, x in zip(names, leaves, strict=True)})
    if wrap == "nested":
        return {"a": leaves[:1], "b": {"c": tuple(leaves[1:])}}
    if wrap == "none":
        return {"a": leaves[0], "b": None, "c": [None, *leaves[1:]]}
    named = dict(zip(names, leaves, strict=True))
    return {"list": leaves, "tuple": tuple(leaves), "frozen": FrozenDict(named),
            "ordered": collections.OrderedDict(named)}.get(wrap, named)  # fmt: skip


@st.composite
def data_sets(draw):
    """The same rows in other structures and types."""
    times = draw(st.sampled_from([1, 1, 1, 2, 3]))
    x, y = np.tile(X, (times, 1)), np.tile(X @ TRAINED, times)
    x = x.astype(draw(st.sampled_from([np.float32, np.float64, np.int8, np.int32, np.int64, np.float16])))
    y = y.astype(draw(st.sampled_from([np.float32, np.float64, np.float16, jnp.bfloat16])))
    if draw(st.booleans()):
        x, y = jnp.asarray(x), jnp.asarray(y)
    wide = np.concatenate([np.asarray(x, np.float32), np.asarray(y, np.float32)[:, None]], axis=1)
    choices = {
        "pair": (x, y), "list": [x, y], "dict": {"in": x, "out": y}, "column": (x, y[:, None]),
        "parts": {"a": {"first": x[:, :2], "then": x[:, 2:]}, "b": y}, "named": Pair(x, y), "one": wide,
        "shaped": (x.reshape(-1, 2, 3), y), "none": (x, None, y),
    }  # fmt: skip
    if times == 1:
        choices["host"] = Rows(wide)
    return choices[draw(st.sampled_from(sorted(choices)))], times * ROWS


def right_case(draw, plain=False):
    """A right use in some structure, or in a plain one; the answer is that of the quadratic."""
    data, rows = ((X, X @ TRAINED), ROWS) if plain or draw(st.booleans()) else draw(data_sets())
    center = {"w": TRAINED} if plain or rows != ROWS else draw(centers())
    case = Case(center=center, loss=per_example if plain else draw(st.sampled_from([per_example, mean, jitted])),
                data=data, num_data=rows, sampler=slt.sgld(STEP))  # fmt: skip
    case.given["batch_size"] = rows
    case.more["nbeta"] = ROWS / np.log(ROWS)
    return case


# Changes: of one argument by name. ``right``: whether the changed call is a right use, which must not be refused.


def _set(case, name, value, right=False, **other):
    more, given = dict(case.more), dict(case.given)
    fields = {}
    for key, new in {name: value, **other}.items():
        if key in ("nbeta", "localization", "forward_dtype"):
            more[key] = new
        elif key in ("center", "mask", "loss", "data", "num_data", "sampler", "free"):
            fields[key] = new
        else:
            given[key] = new
    shown = repr(value).replace("\n", " ")[:80]
    return replace(case, more=more, given=given, changed=(*case.changed, name), right=case.right and right,
                   label=f"{case.label} {name}={shown}", **fields)  # fmt: skip


NUMBERS = [0, -1, -0.0, 1e-300, 1e300, 10**400, float("nan"), float("inf"), -float("inf"), "3", True, None, [1.0], (2,),
           {}, 3j, np.float32(2), np.float64(0.5), np.ones(1), np.ones(2), jnp.float32(3), jnp.ones(2), b"1", object(),
           fractions.Fraction(1, 3), np.int32(2), 7, 0.25]  # fmt: skip
COUNTS = [0, -1, 1, 2, 3, 5, 2**31, 10**30, 2.0, 2.5, "4", True, None, np.int64(4), np.uint8(2), np.float32(4), [4],
          float("nan"), jnp.int32(2), np.array(4), object()]  # fmt: skip
OBJECTS = [None, 0, 1.5, "x", [], {}, (), object(), np.zeros(3), len, True]


def change_number(draw, case):
    name = draw(st.sampled_from(["nbeta", "localization", "hot", "checkpoint_seconds"]))
    return _set(case, name, draw(st.sampled_from(NUMBERS)))


def change_step(draw, case):
    value = draw(st.sampled_from([x for x in NUMBERS if x is not None]))
    make = draw(st.sampled_from([slt.sgld, slt.preconditioned_sgld, slt.underdamped, slt.mala]))
    return _set(case, "sampler", _Later(make, value))


@dataclass
class _Later:
    """A sampler whose constructor is called when the case is run, so that it may refuse."""

    make: Any
    value: Any


def change_count(draw, case):
    name = draw(st.sampled_from(["num_chains", "num_draws", "num_warmup", "thinning", "batch_size", "chunk_size",
                                 "micro_batches", "chain_batch", "budget", "num_data"]))  # fmt: skip
    other = {"num_draws": None} if name == "budget" else {}
    return _set(case, name, draw(st.sampled_from(COUNTS)), **other)


def change_key(draw, case):
    keys = [-1, 2**32, 2**32 - 1, 0, 1.0, "0", None, True, jax.random.key(1), jax.random.PRNGKey(1), np.uint32(7),
            jax.random.split(jax.random.key(0)), jax.random.key(0, impl="rbg"), np.array([0, 1]), object()]  # fmt: skip
    return _set(case, "key", draw(st.sampled_from(keys)))


def change_center(draw, case):
    w = jnp.asarray(TRAINED)
    nan = TRAINED.copy()
    nan[2] = np.nan
    tied = jnp.asarray(TRAINED[:3])
    values = [
        {}, [], None, 3.0, "w", {"w": TRAINED.tolist()}, {"w": nan}, {"w": np.full(6, np.inf, np.float32)},
        {"w": TRAINED.astype(complex)}, {"w": (4 * TRAINED).astype(np.int32)}, {"w": TRAINED.astype(object)},
        {"w": np.array(["a"] * 6)}, {"a": tied, "b": tied}, {"a": TRAINED[:3], "b": TRAINED[:3]}, {"w": w, "name": "x"},
        {"w": w, "steps": jnp.int32(5)}, {"params": {"w": w}, "batch_stats": {"mean": jnp.zeros(2)}},
        {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2), "scale": jnp.ones(2), "bias": w[:2]}},
        nnx.Linear(SIZE, 1, rngs=nnx.Rngs(0)), nnx.State({"w": nnx.BatchStat(w)}), {"w": nnx.Param(w)},
        {"w": np.float32(1)}, np.zeros((0, 3), np.float32), {"w": TRAINED[:5]}, {"w": np.tile(TRAINED, 2)},
        {1: TRAINED[:3], "b": TRAINED[3:]}, {"w": lambda x: x}, {"w": jax.random.key(0)}, {"w": w > 0},
        {"w": TRAINED + 0.5}, {"w": 1e30 * TRAINED},
    ]  # fmt: skip
    return _set(case, "center", draw(st.sampled_from(values)))


def change_mask(draw, case):
    flat, treedef = jax.tree.flatten(case.center)
    half = [np.arange(np.size(x)).reshape(np.shape(x)) % 2 == 0 for x in flat]
    rights = [(half, sum(int(m.sum()) for m in half))]
    if len(flat) > 1 and np.size(flat[0]):
        rights.append(([True] + [False] * (len(flat) - 1), int(np.size(flat[0]))))
    if draw(st.booleans()):
        leaves, free = draw(st.sampled_from(rights))
        return _set(case, "mask", jax.tree.unflatten(treedef, leaves), free < SIZE, free=free)
    first = jax.tree.unflatten(treedef, [1] * len(flat))
    wrong = [True, False, [True], first, jax.tree.map(lambda x: x > 0, first), "all", 3, lambda path: None,
             lambda path: "yes", lambda path: False, lambda path: path[7], lambda: True, np.ones((2, 2), bool),
             jax.tree.unflatten(treedef, [np.ones((9, 9), bool)] * len(flat))]  # fmt: skip
    return _set(case, "mask", draw(st.sampled_from(wrong)))


def _fails(params, batch):
    raise KeyError("targets")


LOSSES = [
    None, "mse", 3, lambda p: 0.0, _fails, lambda p, b: jnp.sum(per_example(p, b)), lambda p, b: 0.5,
    lambda p, b: (per_example(p, b), {}), lambda p, b: per_example(p, b)[:, None], lambda p, b: None,
    lambda p, b: per_example(p, b)[:1], lambda p, b: per_example(p, b) > 1, lambda p, b: {"loss": mean(p, b)},
    lambda p, b: per_example(p, b).astype(jnp.int32), lambda p, b: per_example(p, b).astype(complex),
    lambda p, b: np.asarray(per_example(p, b)), lambda p, b: float(mean(p, b)), lambda p, b: -per_example(p, b),
    lambda p, b: per_example(p, b) * jnp.nan, lambda p, b: per_example(p, b) / 0.0, lambda p, b: b[0][0] @ p["w"],
    lambda p, b: jnp.zeros(len(per_example(p, b))), lambda p, b: list(per_example(p, b)),
    lambda p, b: per_example(p, b).astype(jnp.bfloat16), lambda p, b: per_example(p, b)[::-1],
    lambda p, b: jnp.sqrt(per_example(p, b)), lambda p, b: mean(p, jax.tree.map(lambda x: x[:1], b)),
]  # fmt: skip


def change_loss(draw, case):
    number = draw(st.sampled_from(range(len(LOSSES))))
    changed = _set(case, "loss", LOSSES[number])
    changed.label += f" #{number}"
    return changed


def change_data(draw, case):
    y = X @ TRAINED
    nan = y.copy()
    nan[5] = np.nan
    batches = (X.reshape(8, 8, SIZE), y.reshape(8, 8))
    table = np.concatenate([X, y[:, None]], axis=1)
    values = [
        None, (), {}, "data.csv", 3.0, X, (X.T, y), (X, y[:-1]), batches, list(zip(X, y, strict=True)), list(table),
        (X[:0], y[:0]), (X, nan), (X.astype(str), y), (X.astype(object), y), (X, [float(v) for v in y]),
        [(X[:32], y[:32]), (X[32:], y[32:])], (X.astype(complex), y), (X, 2**40 * np.ones(ROWS, np.int64)),
        iter([(X, y)]), lambda: (X, y), (X, y > 0), [table[:3], table[3:5], table[5:]], table.tolist(),
        np.ma.masked_array(table), (X[:32], y[:32]), {"x": X, "y": y, "n": 5}, (X, np.float32(1)), [table] * 40,
        jax.random.key(0), (X, y, "labels"),
    ]  # fmt: skip
    return _set(case, "data", draw(st.sampled_from(values)))


def change_option(draw, case):
    name = draw(st.sampled_from(["baseline", "control_variate", "also", "mesh", "forward_dtype", "checkpoint_dir",
                                 "sampler", "progress"]))  # fmt: skip
    values = {
        "baseline": [*OBJECTS, "full", "paired", "PAIRED"],
        "control_variate": [*OBJECTS, False],
        "also": [*OBJECTS, {"a": None}, {"a": X}, {3: case.data}, {"": case.data}, {"a": case.data}, {"a": {}}],
        "mesh": [*OBJECTS, *(jax.make_mesh((n,), (axis,)) for n, axis in ((2, "chain"), (2, "x"), (8, "chain")))],
        "forward_dtype": [*OBJECTS, "float31", int, jnp.bfloat16, "bfloat16", np.float16, complex],
        "checkpoint_dir": [3, 1.5, [], object(), b"x", "/proc/no/such", "/dev/null", ""],
        "sampler": [*[x for x in OBJECTS if x is not None], slt.sgld, "sgld"],
        "progress": [None, 0],
    }  # fmt: skip
    return _set(case, name, draw(st.sampled_from(values[name])))


CHANGES = [change_number, change_step, change_count, change_count, change_key, change_center, change_mask, change_loss,
           change_data, change_option]  # fmt: skip


@st.composite
def cases(draw):
    """A right case, or one with one or two changes, of a right case or of a plain one."""
    number = draw(st.sampled_from([0, 1, 1, 1, 2, 2]))
    case = right_case(draw, plain=number and draw(st.sampled_from([True, True, True, False])))
    for change in [draw(st.sampled_from(CHANGES)) for _ in range(number)]:
        case = change(draw, case)
    if isinstance(case.sampler, _Later):
        later, run = case.sampler, Case.run
        case.run = lambda: run(replace(case, sampler=later.make(later.value)))
    return case
