#!/usr/bin/env bash
# A Cloud TPU pod slice, from a machine with gcloud: makes the slice, installs, trains, and does so again after a
# pre-emption, until the training is done.
#
#   CONFIG=configs/imagenet64_edm.py WORKDIR=gs://BUCKET/runs/imagenet64 ZONE=us-west4-a \
#     recipes/tpu_pod.sh [--config.KEY=VALUE ...]
#
# WORKDIR must be in a bucket of the same region: the disks of the slice go with it. Keep the script alive (tmux).
set -uo pipefail
cd "$(dirname "$0")/.."
config=${CONFIG:?a file of configs/}
workdir=${WORKDIR:?gs://BUCKET/FOLDER}
zone=${ZONE:?the zone of the slice}
name=${NAME:-ogdm-jax}
kind=${KIND:-v5litepod-32}             # its last number counts cores (v2, v3, v4, v5p) or chips (v5e, v6e)
version=${VERSION:-v2-alpha-tpuv5-lite}  # the software that fits the kind: gcloud compute tpus versions list
attempts=${ATTEMPTS:-20}
vm() { gcloud compute tpus tpu-vm "$1" "$name" --zone "$zone" "${@:2}"; }

slice() {  # a slice that is READY; one that was pre-empted is made anew
  case $(vm describe --format='value(state)' 2>/dev/null) in
    READY) return ;;
    "") ;;
    *) vm delete --quiet || return ;;
  esac
  vm create --accelerator-type "$kind" --version "$version" --spot || return
  install || { vm delete --quiet; return 1; }  # else the next start would find it READY, without the code
}

install() {
  local code
  code=$(mktemp -d)/code.tar.gz
  # tar ends with 1 where a file changed while it was read, such as a cache.
  tar -czf "$code" --exclude=./.git --exclude='./.venv*' --exclude=./runs . || [ $? = 1 ] || return
  gcloud compute tpus tpu-vm scp --worker=all --zone "$zone" "$code" "$name":code.tar.gz || return
  # uv brings the Python that the package asks for: that of the image may be older.
  vm ssh --worker=all --command="mkdir -p ogdm_jax && tar -xzf code.tar.gz -C ogdm_jax && cd ogdm_jax && \
    python3 -m pip install -q --user uv && python3 -m uv venv -q --python 3.12 .venv && \
    python3 -m uv pip install -q --python .venv -e '.[tpu,gcs]'"
}

# All workers start the same command; JAX finds them by the metadata of the slice.
train="cd ogdm_jax && .venv/bin/python train.py --config $(printf %q "$config") --workdir $(printf %q "$workdir")"
train+=" --stopped-code 75$(printf ' %q' "$@")"
for ((i = 1; i <= attempts; i++)); do
  if slice; then
    vm ssh --worker=all --command="$train" && exit 0
    # One worker that stays behind would hold its chips.
    vm ssh --worker=all --command="pkill -TERM -f '[t]rain.py' || true"
  fi
  echo "tpu_pod.sh: start $i of $attempts ended early; the next one goes on from the newest checkpoint" >&2
  sleep "${PAUSE:-30}"
done
echo "tpu_pod.sh: gave up after $attempts starts; the log above says why" >&2
exit 1
