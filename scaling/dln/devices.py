"""Where chains run: virtual CPU devices, accelerators, one process or many."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from slt_jax.engine.mesh import chain_mesh


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
    """slt-jax's own mesh, of at most ``most`` devices of each process.

    Raises:
      ValueError: the chains cannot be shared out equally among the processes.
    """
    if num_chains % (processes := jax.process_count()):
        raise ValueError(
            f"{num_chains} chains cannot be shared out equally among {processes} processes. Give --chains "
            f"{processes * -(-num_chains // processes)}, or fewer processes."
        )
    own = [[d for d in jax.devices() if d.process_index == p][:most] for p in range(processes)]
    return chain_mesh(num_chains, [device for devices in own for device in devices])


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
