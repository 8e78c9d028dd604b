"""Small models of many kinds, each at weights that training found: what the error bars and the verdict are held to.

Classifiers of digits, autoencoders, recurrent and attention networks, mixtures, regressions on features as they were
measured, count data, factorizations, and trainings that did not finish. The data are scikit-learn's, or drawn with the
seed that the function names; where labels could be told apart without error, a share of them is replaced at random.
No limit of the verdict was set with these known.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import slt_jax as slt
from scaling.checkpoints.problems import Problem, minimum

FLIPPED = 0.15  # share of labels that are replaced
UNFINISHED = 25  # steps of L-BFGS


def fitted(
    loss_fn: Callable, shapes: dict[str, tuple[int, ...]], data: Any, *, seed: int, steps: int = 1500
) -> Problem:
    """Weights of ``shapes`` where L-BFGS ends, from normal ones of variance 1 / (number of inputs)."""
    keys = dict(zip(shapes, jax.random.split(jax.random.key(seed), len(shapes)), strict=True))
    start = {k: jax.random.normal(keys[k], s) / np.sqrt(s[-2] if len(s) > 1 else 4) for k, s in shapes.items()}
    center = minimum(lambda w: jnp.mean(loss_fn(w, data)), start, steps)
    return Problem(slt.LocalPosterior(loss_fn, center, len(jax.tree.leaves(data)[0])), data, 128)


def _classes(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _noisy(labels: np.ndarray, seed: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    replaced = rng.integers(0, labels.max() + 1, len(labels))
    return jnp.asarray(np.where(rng.random(len(labels)) < FLIPPED, replaced, labels), jnp.int32)


def _digits(rows: int = 1797) -> tuple[jax.Array, jax.Array]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return jnp.asarray(found.images[:rows] / 16, jnp.float32), _noisy(found.target[:rows], 0)


def _table(name: str, scaled: bool) -> tuple[jax.Array, np.ndarray]:
    from sklearn import datasets

    extra = {"scaled": False} if name == "diabetes" else {}
    found = getattr(datasets, f"load_{name}")(**extra)
    x = (found.data - found.data.mean(0)) / found.data.std(0) if scaled else found.data
    return jnp.asarray(x, jnp.float32), found.target


def _layers(widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    pairs = list(itertools.pairwise(widths))
    return {f"w{k}": pair for k, pair in enumerate(pairs)} | {f"b{k}": (out,) for k, (_, out) in enumerate(pairs)}


def _mlp(w: dict, x: jax.Array, activation: Callable) -> jax.Array:
    depth = len(w) // 2
    for k in range(depth):
        x = x @ w[f"w{k}"] + w[f"b{k}"]
        x = activation(x) if k + 1 < depth else x
    return x


def digits_mlp(widths: tuple[int, ...], activation: Callable, *, seed: int, steps: int = 1500) -> Problem:
    images, labels = _digits()
    data = (images.reshape(len(images), -1), labels)
    return fitted(lambda w, b: _classes(_mlp(w, b[0], activation), b[1]), _layers(widths), data, seed=seed, steps=steps)


def autoencoder(widths: tuple[int, ...], activation: Callable, *, seed: int, steps: int = 1500) -> Problem:
    """On the 16 central pixels of the digits; squared error over 2 x 0.1^2."""
    images, _ = _digits()
    data = images[:, 2:6, 2:6].reshape(-1, 16)
    shapes = _layers((16, *widths, 16))
    loss = lambda w, x: 50 * jnp.sum((_mlp(w, x, activation) - x) ** 2, -1)  # noqa: E731
    return fitted(loss, shapes, data, seed=seed, steps=steps)


def recurrent_digits(width: int, *, seed: int, steps: int = 800) -> Problem:
    """Reads an image row by row."""
    shapes = {"in": (8, width), "again": (width, width), "bias": (width,), "out": (width, 10), "out_bias": (10,)}

    def loss(w: dict, batch: Any) -> jax.Array:
        state = jnp.zeros((len(batch[0]), width), jnp.asarray(w["in"]).dtype)
        for row in range(8):
            state = jnp.tanh(batch[0][:, row] @ w["in"] + state @ w["again"] + w["bias"])
        return _classes(state @ w["out"] + w["out_bias"], batch[1])

    return fitted(loss, shapes, _digits(1000), seed=seed, steps=steps)


def gated_forecast(width: int, *, seed: int) -> Problem:
    """A gated recurrent unit forecasts the next value of a noisy sum of two sines."""
    rng = np.random.default_rng(seed)
    time = rng.uniform(0, 50, (600, 1)) + np.arange(9)
    series = np.sin(0.7 * time) + 0.5 * np.sin(1.9 * time) + 0.2 * rng.normal(size=time.shape)
    shapes = {f"{kind}{gate}": (width if kind == "u" else 1, width) for gate in "zrh" for kind in "wu"}
    shapes |= {f"b{gate}": (width,) for gate in "zrh"} | {"out": (width, 1)}

    def loss(w: dict, x: jax.Array) -> jax.Array:
        state = jnp.zeros((len(x), width), jnp.asarray(w["wz"]).dtype)
        for k in range(8):
            now = x[:, k : k + 1]
            z, r = (jax.nn.sigmoid(now @ w[f"w{g}"] + state @ w[f"u{g}"] + w[f"b{g}"]) for g in "zr")
            new = jnp.tanh(now @ w["wh"] + (r * state) @ w["uh"] + w["bh"])
            state = (1 - z) * state + z * new
        return 12.5 * ((state @ w["out"])[:, 0] - x[:, 8]) ** 2

    return fitted(loss, shapes, jnp.asarray(series, jnp.float32), seed=seed)


def attention_digits(width: int, heads: int, *, seed: int, steps: int = 800) -> Problem:
    """One block of attention over the rows of an image, then their mean."""
    inner = width // heads
    shapes = {"embed": (8, width), "positions": (8, width), "o": (width, width), "out": (width, 10), "out_bias": (10,)}
    shapes |= {name: (heads, width, inner) for name in "qkv"}

    def loss(w: dict, batch: Any) -> jax.Array:
        x = batch[0] @ w["embed"] + w["positions"]
        q, k, v = (jnp.einsum("mtw,hwd->mhtd", x, w[name]) for name in "qkv")
        scores = jax.nn.softmax(jnp.einsum("mhtd,mhsd->mhts", q, k) / np.sqrt(inner), -1)
        mixed = jnp.einsum("mhts,mhsd->mthd", scores, v).reshape(x.shape)
        x = jnp.tanh(x + mixed @ w["o"])
        return _classes(x.mean(1) @ w["out"] + w["out_bias"], batch[1])

    return fitted(loss, shapes, _digits(1000), seed=seed, steps=steps)


def decoder(*, seed: int) -> Problem:
    """A causal transformer without norms, on sequences of a Markov chain of six tokens."""
    rng = np.random.default_rng(seed)
    chance = rng.dirichlet(0.5 * np.ones(6), 6)
    rows = [rng.integers(0, 6, 800)]
    for _ in range(7):
        rows.append(np.array([rng.choice(6, p=chance[token]) for token in rows[-1]]))
    tokens, width = jnp.asarray(np.stack(rows, 1), jnp.int32), 6
    shapes = {"tokens": (6, width), "positions": (7, width), "up": (width, 12), "up_bias": (12,), "down": (12, width)}
    shapes |= {name: (width, width) for name in "qkvo"} | {"head": (width, 6)}
    causal = np.tril(np.ones((7, 7), bool))

    def loss(w: dict, batch: jax.Array) -> jax.Array:
        x = w["tokens"][batch[:, :-1]] + w["positions"]
        scores = jnp.einsum("mtd,msd->mts", x @ w["q"], x @ w["k"]) / np.sqrt(width)
        x = x + jax.nn.softmax(jnp.where(causal, scores, -1e9), -1) @ (x @ w["v"]) @ w["o"]
        x = x + jax.nn.gelu(x @ w["up"] + w["up_bias"]) @ w["down"]
        return _classes(x @ w["head"], batch[:, 1:]).sum(-1)

    return fitted(loss, shapes, tokens, seed=seed)


def gaussian_mixture(components: int, *, seed: int) -> Problem:
    """In the plane; the data are drawn from two normal distributions, so that some of the components are too many."""
    rng = np.random.default_rng(seed)
    x = np.concatenate((rng.normal(size=(600, 2)) + np.array([1.5, 0]), rng.normal(size=(400, 2)) - np.array([1.5, 1])))
    shapes = {"means": (components, 2), "shares": (components,)}

    def loss(w: dict, x: jax.Array) -> jax.Array:
        distance = jnp.sum((x[:, None] - w["means"]) ** 2, -1)
        return -jax.nn.logsumexp(jax.nn.log_softmax(w["shares"]) - distance / 2, axis=-1)

    return fitted(loss, shapes, jnp.asarray(x, jnp.float32), seed=seed)


def binary_mixture(components: int, *, seed: int) -> Problem:
    """Classes of independent pixels, on the central pixels of the digits in black and white."""
    images, _ = _digits()
    pixels = (images[:, 2:6, 2:6].reshape(-1, 16) > 0.5).astype(jnp.float32)
    shapes = {"logits": (components, 16), "shares": (components,)}

    def loss(w: dict, x: jax.Array) -> jax.Array:
        each = x @ w["logits"].T - jnp.sum(jax.nn.softplus(w["logits"]), -1)
        return -jax.nn.logsumexp(jax.nn.log_softmax(w["shares"]) + each, axis=-1)

    return fitted(loss, shapes, pixels, seed=seed)


def raw_regression(*, seed: int) -> Problem:
    """Least squares on the diabetes table as it was measured: curvatures from 0.03 to 4e4."""
    x, target = _table("diabetes", scaled=False)
    y = jnp.asarray((target - target.mean()) / 50, jnp.float32)
    return fitted(lambda w, b: 0.5 * (b[0] @ w["w"] + w["b"] - b[1]) ** 2, {"w": (10,), "b": ()}, (x, y), seed=seed)


def table_classifier(name: str, widths: tuple[int, ...], scaled: bool, *, seed: int) -> Problem:
    x, target = _table(name, scaled)
    data = (x, _noisy(target, seed))
    shapes = _layers((x.shape[1], *widths, int(target.max()) + 1))
    return fitted(lambda w, b: _classes(_mlp(w, b[0], jnp.tanh), b[1]), shapes, data, seed=seed)


def table_regression(widths: tuple[int, ...], *, seed: int) -> Problem:
    x, target = _table("diabetes", scaled=True)
    y = jnp.asarray((target - target.mean()) / 50, jnp.float32)
    loss = lambda w, b: 0.5 * (_mlp(w, b[0], jnp.tanh)[:, 0] - b[1]) ** 2  # noqa: E731
    return fitted(loss, _layers((10, *widths, 1)), (x, y), seed=seed)


def counts(*, seed: int) -> Problem:
    """Poisson regression: a network gives the logarithm of the rate."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(800, 4))
    y = rng.poisson(np.exp(0.5 * np.sin(x[:, 0]) + 0.4 * x[:, 1] * x[:, 2]))

    def loss(w: dict, batch: Any) -> jax.Array:
        log_rate = _mlp(w, batch[0], jax.nn.softplus)[:, 0]
        return jnp.exp(log_rate) - batch[1] * log_rate

    return fitted(loss, _layers((4, 8, 1)), (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)), seed=seed)


def factorization(rank: int, *, seed: int) -> Problem:
    """Entries of a noisy 30 x 20 matrix of rank 2, fitted with a rank that is too high."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 20)) + 0.5 * rng.normal(size=(30, 20))
    i, j = np.divmod(np.arange(600), 20)
    data = (jnp.asarray(i), jnp.asarray(j), jnp.asarray(matrix.ravel(), jnp.float32))
    loss = lambda w, b: 2 * (jnp.sum(w["left"][b[0]] * w["right"][b[1]], -1) - b[2]) ** 2  # noqa: E731
    return fitted(loss, {"left": (30, rank), "right": (20, rank)}, data, seed=seed)


def radial(*, seed: int) -> Problem:
    """Eight bumps with places, widths and heights, on a noisy curve."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, 500)
    y = np.sin(2 * x) * np.exp(-(x**2) / 4) + 0.2 * rng.normal(size=500)

    def loss(w: dict, batch: Any) -> jax.Array:
        bumps = jnp.exp(-((batch[0][:, None] - 3 * w["place"]) ** 2) * jax.nn.softplus(w["width"]))
        return 12.5 * (bumps @ w["height"] - batch[1]) ** 2

    shapes = {name: (8,) for name in ("place", "width", "height")}
    return fitted(loss, shapes, (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)), seed=seed)


def word_vectors(*, seed: int) -> Problem:
    """The next of twelve words from the last one, through vectors of three numbers."""
    rng = np.random.default_rng(seed)
    chance = np.stack([rng.dirichlet(0.3 * np.ones(12)) for _ in range(12)])
    first = rng.integers(0, 12, 1500)
    second = np.array([rng.choice(12, p=chance[word]) for word in first])
    loss = lambda w, b: _classes(w["in"][b[0]] @ w["out"], b[1])  # noqa: E731
    data = (jnp.asarray(first, jnp.int32), jnp.asarray(second, jnp.int32))
    return fitted(loss, {"in": (12, 3), "out": (3, 12)}, data, seed=seed)


NETWORKS: dict[str, Callable[[], Problem]] = {
    "digits, softmax": lambda: digits_mlp((64, 10), jnp.tanh, seed=1),
    "digits, relu 64-6-10": lambda: digits_mlp((64, 6, 10), jax.nn.relu, seed=2),
    "digits, gelu 64-5-5-10": lambda: digits_mlp((64, 5, 5, 10), jax.nn.gelu, seed=3),
    "digits, row by row": lambda: recurrent_digits(6, seed=4),
    "digits, attention": lambda: attention_digits(6, 2, seed=5),
    "autoencoder, relu 16-6-16": lambda: autoencoder((6,), jax.nn.relu, seed=6),
    "autoencoder, tanh 16-8-3-8-16": lambda: autoencoder((8, 3, 8), jnp.tanh, seed=7),
    "forecast, gated": lambda: gated_forecast(4, seed=8),
    "decoder": lambda: decoder(seed=9),
    "mixture of normals": lambda: gaussian_mixture(4, seed=10),
    "mixture of pixels": lambda: binary_mixture(5, seed=11),
    "diabetes, linear, raw": lambda: raw_regression(seed=12),
    "diabetes, tanh 10-4-1": lambda: table_regression((4,), seed=13),
    "wine, softmax, raw": lambda: table_classifier("wine", (), False, seed=14),
    "breast cancer, tanh 30-3-2": lambda: table_classifier("breast_cancer", (3,), True, seed=15),
    "iris, tanh 4-5-3": lambda: table_classifier("iris", (5,), True, seed=16),
    "counts": lambda: counts(seed=17),
    "matrix, rank 4 of 2": lambda: factorization(4, seed=18),
    "bumps": lambda: radial(seed=19),
    "word vectors": lambda: word_vectors(seed=20),
    "unfinished, relu 64-6-10": lambda: digits_mlp((64, 6, 10), jax.nn.relu, seed=21, steps=UNFINISHED),
    "unfinished, row by row": lambda: recurrent_digits(6, seed=22, steps=UNFINISHED),
    "unfinished, autoencoder": lambda: autoencoder((4,), jnp.tanh, seed=23, steps=UNFINISHED),
}
