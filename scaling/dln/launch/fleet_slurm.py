"""Teachers of one class as a fleet: a SLURM job for each; where there is no SLURM, processes of this machine.

    python -m scaling.dln.launch.fleet_slurm --class 1K --type A B C --count 30 --folder fleet-1K \
        --partition cpu --minutes 60

Prints the table of estimates and truths, and what failed. The same command again runs what is missing, and waits for
jobs that SLURM still has. ``--folder`` must be on a disk that all machines share.
"""

import argparse
from typing import Any

import submitit

import slt_jax as slt
from scaling.dln import devices
from scaling.dln.methods import estimate, ours
from scaling.dln.teachers import KINDS, SIZES, make_teacher
from slt_jax.fleet.run import run_fleet


def run_one(case: dict[str, Any]) -> slt.LLCResult:
    method = ours(case["size"], case["kind"], {})
    return estimate(make_teacher(**case), method, devices.mesh_for(method.num_chains, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--class", dest="size", choices=list(SIZES), required=True)
    add("--type", dest="kinds", nargs="+", choices=KINDS, required=True)
    add("--count", type=int, default=30, help="teachers of each type")
    add("--folder", required=True)
    add("--partition", help="of SLURM")
    add("--cores", type=int, default=8, help="of a job")
    add("--minutes", type=int, default=60, help="time limit of a job")
    args = parser.parse_args()
    cases = {
        f"{args.size}-{kind}-{seed}": {"kind": kind, "size": args.size, "seed": seed}
        for kind in args.kinds
        for seed in range(args.count)
    }
    executor = None
    if submitit.AutoExecutor.which() == "slurm":
        executor = submitit.AutoExecutor(f"{args.folder}/logs", cluster="slurm")
        executor.update_parameters(
            name="dln", timeout_min=args.minutes, cpus_per_task=args.cores, slurm_partition=args.partition
        )
    done = run_fleet(run_one, cases, args.folder, executor=executor, progress=True)
    truth = [float(make_teacher(**case).truth) for case in cases.values()]
    table = done.dataset.assign(truth=("job", truth))
    print(table[["llc", "llc_stderr", "truth", "verdict", "reason"]].to_dataframe().to_string())


if __name__ == "__main__":
    main()
