"""Pictures of docs/concepts: ``python -m scaling.samplers.pictures`` (two minutes on two cores)."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

import slt_jax as slt

IMAGES = Path(__file__).parents[2] / "docs/images"
CURVATURE = np.geomspace(1.0, 100.0, 20, dtype=np.float32)
COLORS = {"sgld": "#0072B2", "leimkuhler-matthews": "#009E73", "sghmc": "#CC79A7", "underdamped": "#D55E00"}


def samplers(step_size: float) -> dict[str, slt.Sampler]:
    return {
        "sgld": slt.sgld(step_size),
        "leimkuhler-matthews": slt.sgld(step_size, noise="leimkuhler-matthews"),
        "sghmc": slt.sghmc(step_size, 0.2),
        "underdamped": slt.underdamped(step_size, 0.2),
    }


def quadratic(noise: float) -> tuple[slt.LocalPosterior, np.ndarray]:
    """Twenty directions over two decades; ``noise`` is the spread of a linear term over examples."""
    rng = np.random.default_rng(0)
    data = (noise * rng.normal(size=(4096, 20))).astype(np.float32)
    data -= data.mean(0)
    loss_fn = lambda w, x: 0.5 * jnp.sum(CURVATURE * w**2) + x @ w  # noqa: E731
    return slt.LocalPosterior(loss_fn, jnp.zeros(20), 4096, nbeta=100.0, localization=0.1), data


def bias_over_step_size() -> None:
    """Raw (hollow) and corrected (filled) estimates over the truth, without and with minibatch noise."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    shares = np.array([0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    for axis, noise in zip(axes, (0.0, 2.0), strict=True):
        posterior, data = quadratic(noise)
        for name, color in COLORS.items():
            raw, corrected = [], []
            for share in shares:
                result = slt.estimate_llc(
                    posterior, data, sampler=samplers(share / 1e4)[name], num_chains=4, num_draws=4000,
                    num_warmup=4000, thinning=10, batch_size=16, key=1,
                )  # fmt: skip
                raw.append(result.llc_raw / 10)
                corrected.append(result.llc / 10)
            axis.plot(shares, raw, "o--", color=color, markerfacecolor="white", linewidth=1)
            axis.plot(shares, corrected, "o-", color=color, label=name)
        axis.axhline(1, color="0.6", linewidth=1, zorder=0)
        axis.set(xscale="log", xlabel="step size times largest curvature", ylim=(0.9, 1.6))
        axis.set_title("minibatches without noise at w*" if noise == 0 else "noisy minibatches", fontsize=10)
    axes[0].set_ylabel("estimate / truth")
    axes[0].legend(frameon=False, fontsize=8, title="filled: corrected, hollow: raw", title_fontsize=8)
    figure.savefig(IMAGES / "sampler-bias.png", dpi=150)


def mixing() -> None:
    """Running estimates from w*, same curvature and step size: where friction pays."""
    posterior, data = quadratic(0.0)
    stiff = jnp.asarray(np.geomspace(1e-3, 100.0, 60), jnp.float32)
    loss_fn = lambda w, x: 0.5 * jnp.sum(stiff * w**2) + 0 * x[:, 0]  # noqa: E731
    posterior = dataclasses.replace(posterior, loss_fn=loss_fn, center=jnp.zeros(60))
    exact = float(np.sum(100 * np.asarray(stiff) / (100 * np.asarray(stiff) + 0.1))) / 2
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, color in COLORS.items():
        result = slt.estimate_llc(
            posterior, data, sampler=samplers(0.25 / 1e4)[name], num_chains=8, num_draws=2000, num_warmup=0,
            thinning=10, batch_size=16, key=2,
        )  # fmt: skip
        steps = 10 * np.arange(1, 2001)
        blocks = result.llc_draws.mean(0).reshape(40, 50).mean(1) / exact
        axis.plot(steps.reshape(40, 50).mean(1), blocks, color=color, label=name)
    axis.axhline(1, color="0.6", linewidth=1, zorder=0)
    axis.set(xscale="log", xlabel="steps of one chain", ylabel="estimate / truth", ylim=(0.4, 1.1))
    axis.legend(frameon=False)
    axis.set_title(f"condition number 100,000: sqrt is {math.sqrt(1e5):.0f}", fontsize=10)
    figure.savefig(IMAGES / "sampler-mixing.png", dpi=150)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    bias_over_step_size()
    mixing()


if __name__ == "__main__":
    main()
