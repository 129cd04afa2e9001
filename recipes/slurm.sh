#!/usr/bin/env bash
# Several nodes under Slurm, one task for each GPU: JAX reads from srun's environment who takes part and where.
#
#   CONFIG=configs/imagenet64_edm.py WORKDIR=/shared/runs/imagenet64 sbatch recipes/slurm.sh [--config.KEY=VALUE ...]
#
# WORKDIR must be a folder that all nodes share, or gs://. Ask for other numbers on sbatch's command line (--nodes 8).
# Not --gpus-per-task: with it each task sees one GPU, number 0, and JAX looks for the one of its local number.
#
#SBATCH --job-name=ogdm_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Three minutes before the time is over, and when a job of higher priority takes the nodes, Slurm sends SIGTERM: all
# tasks save the same step and end with code 75, and the job goes back into the queue. Where a node dies, the others end
# within a minute with a sentence (code 1, and Slurm's own code for the dead one), and the job is queued again, too, up
# to RESTARTS times. The same job then goes on from the newest checkpoint.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
config=${CONFIG:?a file of configs/}
workdir=${WORKDIR:?a folder that all nodes share, or gs://BUCKET/FOLDER}
restarts=${SLURM_RESTART_COUNT:-0}

srun --kill-on-bad-exit=0 python train.py --config "$config" --workdir "$workdir" --stopped-code 75 "$@"
code=$?
[ $code -eq 0 ] && exit 0
if [ $code -eq 75 ] || [ "$restarts" -lt "${RESTARTS:-5}" ]; then
  echo "slurm.sh: exit code $code; queued again" >&2
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit $code
