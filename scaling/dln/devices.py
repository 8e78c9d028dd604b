"""Where chains run: virtual CPU devices, accelerators, one process or many."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slt_jax.batches import HostData


def cluster(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Arguments of ``jax.distributed.initialize``; None for one process. Under ``srun`` JAX finds them itself.

    Raises:
      ValueError: only some of the three are given.
    """
    given = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        return given
    if len(missing) < 3:
        raise ValueError(
            f"--coordinator, --num-processes and --process-id go together, got {coordinator}, {num_processes} and "
            f"{process_id}. Give all three to every process, or none where the cluster is detected."
        )
    # of the step, not of the job: a batch script itself also sees the job's number of tasks
    return {} if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def start(processes: dict[str, Any] | None, cpu_devices: int | None) -> None:
    """Configure JAX before it touches a device; with ``processes``, join the others.

    Args:
      processes: from ``cluster``; an empty dict lets JAX detect the cluster.
      cpu_devices: virtual devices of this process where it runs on a CPU; default one a core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", cpu_devices or cores)
    # accelerators multiply in TF32 or bfloat16 unless told otherwise: a loss of 0 at w* then has gradients of its own
    jax.config.update("jax_default_matmul_precision", "highest")
    if processes is not None:
        jax.distributed.initialize(**processes)


def mesh_for(num_chains: int, most: int | None = None) -> Mesh:
    """A mesh of as many devices as divide ``num_chains``, equally many of each process.

    Args:
      most: devices of one process to use; default all.

    Raises:
      ValueError: the chains cannot be shared out equally among the processes.
    """
    processes = jax.process_count()
    if num_chains % processes:
        raise ValueError(
            f"{num_chains} chains cannot be shared out equally among {processes} processes. Give --chains "
            f"{processes * -(-num_chains // processes)}, or fewer processes."
        )
    own = [[d for d in jax.devices() if d.process_index == p] for p in range(processes)]
    limit = min(*map(len, own), num_chains // processes, num_chains if most is None else most)
    used = max(k for k in range(1, limit + 1) if num_chains // processes % k == 0)
    chosen = np.array([devices[:used] for devices in own]).reshape(-1)
    return Mesh(chosen, ("chain",), axis_types=(AxisType.Auto,))


class OnEveryHost(HostData):
    """A data set that every process holds whole, read by the host.

    With several processes every one of them must cut its steps into the same chunks: those of data read by the host
    have a fixed length, others are cut by the clock.
    """

    def __init__(self, arrays: Any):
        self.data = arrays
        self.num_data = len(jax.tree.leaves(arrays)[0])

    def fetch(self, indices: np.ndarray) -> Any:
        return jax.tree.map(lambda a: a[np.asarray(indices)], self.data)

    def fingerprint(self) -> str:
        return "the same arguments draw the same data"


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Arrays equal on all processes, as arrays that span the mesh; with one process, as they are."""
    if jax.process_count() == 1:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def key_everywhere(seed: int, mesh: Mesh) -> Any:
    """A random key that spans the mesh; with one process the seed."""
    if jax.process_count() == 1:
        return seed
    whole = NamedSharding(mesh, PartitionSpec())
    data = np.asarray(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))
    wrap = jax.jit(lambda d: jax.random.wrap_key_data(d, impl="threefry2x32"), out_shardings=whole)
    return wrap(jax.device_put(data, whole))


def first_says(value: float) -> float:
    """The first process's value, on all of them."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def most_of(value: float) -> float:
    """The largest value of all processes."""
    if jax.process_count() == 1:
        return value
    return float(np.max(multihost_utils.process_allgather(np.float32(value))))
