"""How a teacher is sampled: the posterior of the divergence to its predictions, and a sampler's settings."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import slt_jax as slt
from scaling.transformers import carried
from scaling.transformers import difference as d
from scaling.transformers.gauge import Config
from scaling.transformers.networks import MLPConfig
from scaling.transformers.teachers import Teacher, make_inputs, num_data_of

SAMPLERS = ("spectrum", "default", "kronecker", "published", "hmc")
LEAPFROGS = 64  # of one HMC move
PUBLISHED = {
    "nbeta": 30.0, "localization": 300.0, "step_size": 1e-3, "num_chains": 4, "num_warmup": 200, "num_draws": 200,
    "batch_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """All that a row's numbers depend on, besides the teacher and the code. None is open, or slt-jax's default.

    ``spectrum``: no sampling, the quadratic posterior at every ratio of nbeta to localization. ``published``: SGLD at
    settings that are in use for language models. ``data``: ``stored`` sequences, or ``drawn`` ones, new in each step.
    ``labels``: ``teacher``, its probabilities; ``sampled``, one token each, for which w* is not the minimum.
    """

    sampler: str = "default"
    nbeta: float | None = None
    localization: float | None = None
    step_size: float | None = None
    friction: float | None = None
    num_chains: int | None = None
    budget: int | None = None
    num_warmup: int | None = None
    num_draws: int | None = None
    batch_size: int | None = None
    num_data: int | None = None
    data: Literal["stored", "drawn"] = "stored"
    labels: Literal["teacher", "sampled"] = "teacher"

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}.")
        if self.budget is not None and self.num_draws is not None:
            raise ValueError(f"--budget {self.budget} and --draws {self.num_draws} both set the length. Give one.")
        if self.data == "drawn" and (self.sampler in ("spectrum", "hmc") or self.labels == "sampled"):
            raise ValueError(f"{self.sampler} with {self.labels} labels needs stored data, got --data drawn.")
        if self.sampler in ("hmc", "spectrum") and self.budget is not None:
            raise ValueError(f"{self.sampler} has no budget of minibatches, got --budget {self.budget}. Give --draws.")


def filled(method: Method, layout: str, size: str) -> Method:
    """With the usual number of sequences, and the settings of ``published`` and ``hmc`` where they are not given."""
    usual: dict[str, Any] = {"num_data": num_data_of(layout, size)}
    if method.sampler == "published":
        usual |= PUBLISHED
    if method.sampler == "hmc":
        usual |= {"num_chains": 4, "num_warmup": 100, "num_draws": 200}
    if method.budget is not None:
        usual = {name: value for name, value in usual.items() if name not in ("num_warmup", "num_draws")}
    return Method(**{name: usual.get(name) if v is None else v for name, v in vars(method).items()})


def divergence_loss(config: Config, params: dict[str, Any], inputs: Array) -> Array:
    """KL(teacher || network), nats, ``(m,)``. ``params``: ``teacher`` and either ``weights`` or ``displacement``."""
    return carried.divergences(config, params["teacher"], _change(params), inputs)


def sampled_loss(config: Config, params: dict[str, Any], batch: dict[str, Array]) -> Array:
    """Cross-entropy of sampled labels minus that of the teacher, ``(m,)``: the divergence plus a part of mean zero.

    With D the difference of the logits, p the teacher's probabilities and y the label, it is
    KL + sum p D - D_y.
    """
    pair = carried.logits(config, params["teacher"], _change(params), batch["inputs"])
    p = jax.nn.softmax(pair.base, axis=-1)
    chosen = jnp.take_along_axis(pair.change, batch["labels"][..., None], axis=-1)[..., 0]
    each = d.divergence(pair) + jnp.sum(p * pair.change, axis=-1) - chosen
    return each if each.ndim == 1 else jnp.mean(each, axis=-1)


def drawn_loss(config: Config, seed: int, params: dict[str, Any], rows: Array) -> Array:
    """``divergence_loss`` on inputs that are a function of their row number and take no memory."""
    key = jax.random.key(seed, impl="threefry2x32")

    def one(row: Array) -> Array:
        own = jax.random.fold_in(key, row)
        if isinstance(config, MLPConfig):
            return jax.random.normal(own, (config.widths[0],))
        return jax.random.randint(own, (config.context_length,), 0, config.vocab_size)

    return divergence_loss(config, params, jax.vmap(one)(rows))


def _change(params: dict[str, Any]) -> Any:
    if "displacement" in params:
        return params["displacement"]
    return jax.tree.map(jnp.subtract, params["weights"], params["teacher"])


def sampled_labels(config: Config, teacher: Any, inputs: np.ndarray, seed: int) -> np.ndarray:
    """A label for every prediction from the teacher's probabilities, int32."""
    zero = jax.tree.map(jnp.zeros_like, teacher)
    logits = carried.logits(config, teacher, zero, jnp.asarray(inputs)).base
    return np.asarray(jax.random.categorical(jax.random.key(seed), logits, axis=-1), np.int32)


def posterior_and_data(teacher: Teacher, method: Method) -> tuple[slt.LocalPosterior, Any]:
    """What is sampled, and the data set.

    With a localization the displacement from w* is sampled, which float32 holds to seven digits at any nbeta. The
    calibration takes a localization from the typical size of the weights: without one the weights are sampled.
    """
    num_data = num_data_of(teacher.layout, teacher.size) if method.num_data is None else method.num_data
    config, name = teacher.config, "weights" if method.localization is None else "displacement"
    own = jax.tree.map(np.copy if name == "weights" else np.zeros_like, teacher.weights)
    if method.data == "drawn":
        loss, data = functools.partial(drawn_loss, config, teacher.seed), np.arange(num_data, dtype=np.int32)
    else:
        loss, data = functools.partial(divergence_loss, config), make_inputs(config, num_data, teacher.seed)
    if method.labels == "sampled":
        labels = sampled_labels(config, teacher.weights, data, teacher.seed)
        loss, data = functools.partial(sampled_loss, config), {"inputs": data, "labels": labels}
    posterior = slt.LocalPosterior(
        loss, {name: own, "teacher": teacher.weights}, num_data, nbeta=method.nbeta, localization=method.localization,
        mask=lambda path: path[0] == name,
    )  # fmt: skip
    return posterior, data


def sampler_of(method: Method) -> Any:
    match method.sampler:
        case "default":
            return (
                None
                if method.step_size is None and method.friction is None
                else slt.underdamped(method.step_size, method.friction)
            )
        case "kronecker":
            return slt.underdamped(method.step_size, method.friction, metric="kronecker")
        case "published":
            return slt.sgld(method.step_size)
        case "hmc":
            return slt.hmc(method.step_size, LEAPFROGS)
    raise ValueError(f"{method.sampler} does not sample.")


def estimate(teacher: Teacher, method: Method) -> slt.LLCResult:
    """Raises FloatingPointError where the loss at the teacher is not finite."""
    posterior, data = posterior_and_data(teacher, method)
    return slt.estimate_llc(
        posterior, data, sampler=sampler_of(method), num_chains=method.num_chains, budget=method.budget,
        num_warmup=method.num_warmup, num_draws=method.num_draws, batch_size=method.batch_size, key=teacher.seed,
        progress=False,
    )  # fmt: skip
