"""One estimate, whose chains are shared out among all processes of a job step. On a CPU the layout changes no bit.

    srun -n2 python -m scaling.launch.one_estimate --out two.npz     # two tasks, found by jax.distributed
    python -m scaling.launch.one_estimate --out one.npz              # this process alone

Prints the LLC in full and the verdict. Takes a few seconds for a tanh network of 39 weights at its true parameters.
"""

import argparse
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import slt_jax as slt
from scaling.dln import devices

NUM_DATA = 2000


def loss_fn(params, batch):
    x, y = batch
    return 0.5 * jnp.sum((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2, axis=-1)


def problem() -> tuple[slt.LocalPosterior, tuple[np.ndarray, np.ndarray]]:
    """The posterior and its data: targets of the network itself, with noise."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(10, 3)) / 3, "b": rng.normal(size=(3, 3))}
    x = rng.normal(size=(NUM_DATA, 10))
    y = np.tanh(x @ params["a"]) @ params["b"] + 0.1 * rng.normal(size=(NUM_DATA, 3))
    params, data = jax.tree.map(lambda z: z.astype(np.float32), (params, (x, y)))
    return slt.LocalPosterior(loss_fn, params, num_data=NUM_DATA), data


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the first process writes the loss at all draws there")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of each process")
    parser.add_argument("--checkpoint-dir", type=Path, help="on a disk that all processes share")
    args = parser.parse_args(argv)
    devices.start(devices.cluster(None, None, None, os.environ), args.devices)
    posterior, data = problem()
    result = slt.estimate_llc(
        posterior, data, num_chains=4, budget=4000, batch_size=256, checkpoint_dir=args.checkpoint_dir, progress=False
    )
    if jax.process_index() == 0:
        np.savez(args.out, llc=result.llc, llc_stderr=result.llc_stderr, loss=result.loss_trace)
        count = jax.process_count()
        print(
            f"LLC {result.llc!r} +/- {result.llc_stderr:.2g}, {result.verdict}; {count} process{'es' * (count > 1)}, "
            f"{result.settings.devices}"
        )


if __name__ == "__main__":
    main()
