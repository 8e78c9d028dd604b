#!/bin/bash
# Teachers on one accelerator, one process for each number, several at a time: compiling keeps a core or two busy for
# most of a process's time, and the accelerator is idle meanwhile.
#
#     bash scaling/dln/launch/side_by_side.sh results/1M.jsonl 10 8 --class 1M 10M --type B C --sampler kronecker ...
#
# The result file, how many numbers (from 0), how many processes at a time; then arguments of scaling.dln.run. Its rows
# are kept in a folder beside the file until all are done: the same line goes on where a stopped one was.
set -euo pipefail
out=$1 count=$2 together=$3
shift 3
mkdir -p "$out.rows"
export XLA_PYTHON_CLIENT_PREALLOCATE=false OPENBLAS_NUM_THREADS=1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
seq 0 $((count - 1)) | xargs -P "$together" -I{} "${PYTHON:-.venv/bin/python}" -m scaling.dln.run "$@" \
    --seed-start {} --count 1 --out "$out.rows/{}.jsonl"
cat "$out".rows/*.jsonl > "$out"
