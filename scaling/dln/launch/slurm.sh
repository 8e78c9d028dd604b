#!/bin/bash
# One class of teachers on many machines: the chains of every teacher are shared out among the tasks.
#
#     sbatch --nodes 2 --ntasks-per-node 1 scaling/dln/launch/slurm.sh --class 10M --type A B C --count 30 \
#         --out results/10M.jsonl --data drawn --chains 8
#
# Takes the arguments of scaling.dln.run. JAX finds the other tasks by itself. Submit the same line again to go on where
# the time limit stopped it. One result file for one job.
#SBATCH --job-name=dln
#SBATCH --time=24:00:00
#SBATCH --cpus-per-task=16
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# With accelerators, one task for each machine and all its devices:
##SBATCH --gpus-per-task=8
set -euo pipefail

# sbatch copies the script away: start from the folder it was submitted in, the repository's
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the top of the repository}"
srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m scaling.dln.run "$@"
