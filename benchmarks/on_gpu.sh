#!/usr/bin/env bash
# What needs a GPU: the tests marked accelerator, and the benchmarks beside PyTorch and ResNet-101.
#
#     benchmarks/on_gpu.sh FOLDER [tests|solvers|vision|language ...]
#
# The folder gets a log of every part and the results; a part that fails does not end the others.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:${PYTHONPATH:-}"

folder=${1:?wanted the folder of logs and results}
shift
mkdir -p "$folder"
[ $# -gt 0 ] || set -- tests solvers vision language

tests() {
  python3 -m pytest -p no:benchmark -m accelerator tests/test_accelerator.py -n "${PROCESSES:-8}" --durations=8
}

solvers() {
  python3 -m benchmarks.solvers --device gpu --out "$folder" --directions forward \
    --problems dense cheap --libraries deq_jax torchdeq jaxopt
}

vision() {
  python3 -m benchmarks.vision --device gpu --out "$folder" --models cifar10_large \
    --tasks "train with JR" infer --forms "1 device" channels_last compiled --steps 20
}

language() {
  python3 -m benchmarks.language --device gpu --out "$folder" --parts peers --sizes medium \
    --tasks "train with JR" infer --steps 20
}

for part in "$@"; do
  began=$SECONDS
  "$part" >"$folder/$part.log" 2>&1
  echo "$part: exit $?, $((SECONDS - began)) s"
  tail -n 30 "$folder/$part.log"
done
