"""How a teacher is sampled: the published protocol, or any sampler with what is not given chosen by the calibration."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

import slt_jax as slt
from scaling.dln import drawn, population
from scaling.dln.gibbs import gibbs, localization_of
from scaling.dln.teachers import INPUT_VARIANCE, SIZES, Teacher, end_to_end, loss_fn, make_data, sufficient_data

SAMPLERS = ("default", "kronecker", "sgld", "leimkuhler-matthews", "preconditioned", "sghmc", "sgnht", "hmc", "gibbs")
DATA = ("stored", "drawn", "displaced", "population")
WHOLE = ("hmc", "gibbs")  # these take no minibatches
WITHOUT_FRICTION = ("sgld", "leimkuhler-matthews", "preconditioned", *WHOLE)
PUBLISHED_BATCH = 500
LEAPFROGS = 64  # of one HMC move
SMALL = ("1K", "10K")
REGULAR = ("B", "C")
# Of these types in the other classes, where nothing is said of sampler and data. Without label noise nbeta is free, and
# without the noise of minibatches a low friction heats nothing. What is read is half the rank of the Hessian at w*: of
# regular teachers the coefficient, of others less.
LARGE = {
    "sampler": "kronecker", "data": "population", "nbeta": 1e20, "friction": 0.05, "num_chains": 2, "num_warmup": 200,
    "num_draws": 100,
}  # fmt: skip
FLAT = 0.01  # nbeta / localization^2 there: what flat directions may lose of their flatness


@dataclass(frozen=True)
class Method:
    """All that a row's numbers depend on, besides the teacher and the code. None is open.

    ``default`` is underdamped Langevin, ``kronecker`` the same in a measured metric. ``hmc`` draws from the same
    posterior exactly, over sufficient data; so does ``gibbs``, layer by layer and in float64, at any nbeta.
    ``budget``: minibatch gradients for calibration and all chains; or ``num_warmup`` and ``num_draws`` of a chain.
    ``data``: ``stored`` is ``teachers.make_data``, ``drawn`` takes no memory (``drawn``), ``displaced`` is the
    same in displacements from w*, at any nbeta; ``population`` is the law of the inputs itself, without minibatches
    (``population``): there a gradient is one of all that counts.
    """

    sampler: str = "default"
    step_size: float | None = None
    friction: float | None = None
    nbeta: float | None = None
    localization: float | None = None
    num_chains: int = 4
    budget: int | None = None
    num_warmup: int | None = None
    num_draws: int | None = None
    batch_size: int = PUBLISHED_BATCH
    label_noise: float = 0.0
    num_data: int | None = None
    data: str = "stored"
    protocol: str = "ours"

    def __post_init__(self):
        if self.friction is not None and self.sampler in WITHOUT_FRICTION:
            raise ValueError(f"{self.sampler} has no friction, got --friction {self.friction}. Leave it out.")
        drawn_hmc = self.sampler == "hmc" and self.data in ("drawn", "displaced")
        if drawn_hmc or (self.label_noise > 0 and self.data != "stored"):
            what = "hmc" if drawn_hmc else f"label noise of {self.label_noise}"
            raise ValueError(f"{what} needs all inputs at once, got --data {self.data}. Take --data stored.")
        if self.data == "displaced" and self.localization is None:
            raise ValueError(
                "--data displaced has no typical weight to take a localization from, got no --localization. Give one: "
                f"the root of nbeta / {FLAT} keeps flat directions flat."
            )
        if self.data == "population" and self.batch_size != PUBLISHED_BATCH:
            raise ValueError(f"--data population has no minibatches, got --batch-size {self.batch_size}. Leave it out.")
        if self.data == "population" and self.protocol == "published":
            raise ValueError("the published protocol takes minibatches, got --data population. Take --data drawn.")
        if self.sampler == "gibbs" and self.step_size is not None:
            raise ValueError(f"gibbs has no step size, got --step-size {self.step_size}. Leave it out.")
        if self.sampler in WHOLE and self.label_noise > 0:
            raise ValueError(
                f"{self.sampler} sees the noiseless loss, which projected noise only shifts; got --label-noise "
                f"{self.label_noise}. Leave it out: the posterior is the same."
            )
        if self.sampler in WHOLE and self.budget is not None:
            takes = f"a move takes {LEAPFROGS} gradients" if self.sampler == "hmc" else "a move draws every layer"
            raise ValueError(
                f"{self.sampler} uses no minibatches, got --budget {self.budget}. Give --draws; {takes} over all data."
            )
        if self.budget is not None and self.num_draws is not None:
            raise ValueError(f"--budget {self.budget} and --draws {self.num_draws} both set the length. Give one.")

    @property
    def noiseless(self) -> bool:
        """Whether a sampler that could take minibatches is given the loss over the law of the inputs."""
        return self.data == "population" and self.sampler not in WHOLE

    @property
    def name(self) -> str:
        """What the tables call it."""
        base = "published" if self.protocol == "published" else self.sampler
        data = f", {self.data}" if self.noiseless or self.data == "displaced" else ""
        return base + data + (f", label noise {self.label_noise:g}" if self.label_noise > 0 else "")


def ours(size: str, kind: str, given: dict[str, Any]) -> Method:
    """What is ``given`` of a Method, and for the rest what the calibration chooses; for regular teachers of a large
    class, where neither sampler nor data are given, ``LARGE``. Raises ValueError for what does not go together.
    """
    if size in SMALL or kind not in REGULAR or given.keys() & {"sampler", "data", "label_noise"}:
        return filled(Method(**given), size)
    chosen = {**LARGE, **given}
    if "budget" in given:
        chosen = {name: chosen[name] for name in chosen if name in given or name not in ("num_warmup", "num_draws")}
    return filled(Method(**{"localization": math.sqrt(chosen["nbeta"] / FLAT), **chosen}), size)


def published(size: str, num_data: int | None = None, data: str = "stored", label_noise: float = 0.0) -> Method:
    """Plain SGLD as in Lau et al., arXiv:2308.12108: one chain, localization 1, nbeta = n / log n, batch 500, the
    class's step size and number of steps, of which the first 90 % are dropped.
    """
    steps = SIZES[size].steps
    return Method(
        "sgld", SIZES[size].step_size, localization=1.0, num_chains=1, num_warmup=9 * steps // 10,
        num_draws=steps // 10, num_data=num_data, data=data, label_noise=label_noise, protocol="published",
    )  # fmt: skip


def filled(method: Method, size: str) -> Method:
    """With the class's number of examples and, where no length is given, its published number of gradients.

    hmc: 800 draws after half as many moves; gibbs: 200, and the localization is told from the weights alone.
    """
    method = replace(method, num_data=SIZES[size].num_data if method.num_data is None else method.num_data)
    if method.sampler in WHOLE:
        usual = 800 if method.sampler == "hmc" else 200
        draws = usual if method.num_draws is None else method.num_draws
        warmup = draws // 2 if method.num_warmup is None else method.num_warmup
        return replace(method, num_draws=draws, num_warmup=warmup)
    if method.budget is None and method.num_draws is None:
        return replace(method, budget=SIZES[size].steps)
    return method


def sampler_of(method: Method) -> slt.Sampler:
    step_size, friction = method.step_size, method.friction
    match method.sampler:
        case "default":
            return slt.underdamped(step_size, friction)
        case "kronecker":
            return slt.underdamped(step_size, friction, metric="kronecker")
        case "sgld":
            return slt.sgld(step_size)
        case "leimkuhler-matthews":
            return slt.sgld(step_size, noise="leimkuhler-matthews")
        case "preconditioned":
            return slt.preconditioned_sgld(step_size)
        case "sghmc":
            return slt.sghmc(step_size, friction)
        case "sgnht":
            return slt.sgnht(step_size, friction)
        case "hmc":
            return slt.hmc(step_size, LEAPFROGS)
    raise ValueError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {method.sampler!r}.")


def exact_rows(teacher: Teacher, num_data: int, data: str) -> tuple[np.ndarray, np.ndarray]:
    """Sufficient data (inputs, outputs), float64: of the stored set, or of the law of the inputs."""
    if data != "stored":
        rows = np.eye(teacher.widths[0]) * np.sqrt(INPUT_VARIANCE * teacher.widths[0])
    else:
        rows = sufficient_data(make_data(teacher, num_data, seed=teacher.seed)[0], np.float64)
    return rows, rows @ end_to_end(teacher.weights)


def posterior_and_data(teacher: Teacher, method: Method) -> tuple[slt.LocalPosterior, object]:
    """What is sampled, and the data set in the form that the sampler takes. ``num_data`` is that of the whole set."""
    num_data = SIZES[teacher.size].num_data if method.num_data is None else method.num_data
    if method.data == "drawn" and method.sampler not in WHOLE:
        posterior = drawn.posterior(teacher, num_data, method.nbeta, method.localization)
        return posterior, np.arange(num_data, dtype=np.int32)
    if method.data == "displaced" and method.sampler not in WHOLE:
        posterior = drawn.displaced_posterior(teacher, num_data, method.nbeta, method.localization)
        return posterior, np.arange(num_data, dtype=np.int32)
    if method.noiseless:
        return population.posterior_and_data(teacher, num_data, method.nbeta, method.localization)
    exact_double = method.sampler == "gibbs"
    dtype = np.float64 if exact_double else np.float32  # the first only where JAX was told to: jax_enable_x64
    unset = exact_double and method.localization is None
    localization = localization_of(teacher.weights) if unset else method.localization
    if method.sampler in WHOLE:
        data = tuple(x.astype(dtype, copy=False) for x in exact_rows(teacher, num_data, method.data))
    else:
        data = make_data(teacher, num_data, method.label_noise, seed=teacher.seed)
    center = [w.astype(dtype, copy=False) for w in teacher.weights]
    return slt.LocalPosterior(loss_fn, center, num_data, nbeta=method.nbeta, localization=localization), data


def estimate(teacher: Teacher, method: Method, mesh: Mesh) -> slt.LLCResult:
    """Raises FloatingPointError where the loss at the teacher is not finite."""
    posterior, data = posterior_and_data(teacher, method)
    if method.sampler == "gibbs":
        root = data[0] / np.sqrt(len(data[0]))
        sampler = gibbs(posterior.center, root, posterior.nbeta, posterior.localization)
    else:
        sampler = sampler_of(method)
    batch_size = 1 if method.noiseless else None if method.sampler in WHOLE else method.batch_size
    return slt.estimate_llc(
        posterior, data, sampler=sampler, num_chains=method.num_chains, budget=method.budget,
        num_warmup=method.num_warmup, num_draws=method.num_draws, batch_size=batch_size,
        baseline="full" if method.noiseless else "paired", key=teacher.seed, mesh=mesh,
    )  # fmt: skip
