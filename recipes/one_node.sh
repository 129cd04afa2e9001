#!/usr/bin/env bash
# One machine, one or several GPUs: one process uses them all.
#
#   CONFIG=configs/cifar10_ogdm.py WORKDIR=runs/cifar10_ogdm recipes/one_node.sh [--config.KEY=VALUE ...]
#
# CUDA_VISIBLE_DEVICES=0,1 takes some of the GPUs. The script starts training again where it was stopped (exit code 75)
# or died (a driver error, out of memory on the host): each start goes on from the newest checkpoint. An error in the
# settings (exit code 1) ends it.
set -uo pipefail
cd "$(dirname "$0")/.."
config=${CONFIG:?a file of configs/}
workdir=${WORKDIR:?a folder, or gs://BUCKET/FOLDER}
attempts=${ATTEMPTS:-10}

for ((i = 1; i <= attempts; i++)); do
  python train.py --config "$config" --workdir "$workdir" --stopped-code 75 "$@"
  code=$?
  case $code in
    0) exit 0 ;;      # trained to the end
    1 | 2) exit $code ;;  # a sentence above says what to mend
  esac
  echo "one_node.sh: exit code $code; start $((i + 1)) goes on from the newest checkpoint" >&2
  sleep "${PAUSE:-5}"
done
echo "one_node.sh: $attempts starts did not suffice" >&2
exit 1
