#!/usr/bin/env bash
# `klong sft` or `klong rl` on every host of a Cloud TPU pod slice.
#
#   launch/tpu_pod.sh TPU ZONE sft|rl [NAME=VALUE ...]
#
# Expects this repository at KLONG_DIR on each host (klong, below the home folder) and a folder that
# all hosts share, such as a Filestore mount, for run.root, data and policies. Running it again
# resumes. It follows the documentation of gcloud and JAX; it has not been run on a pod yet.
set -euo pipefail

if [ $# -lt 3 ] || [[ ! $3 =~ ^(sft|rl)$ ]]; then
    sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
tpu=$1 zone=$2
shift 2
# Cloud TPU hosts learn of each other from a metadata server, which JAX asks.
printf -v command ' %q' "$@" processes.cluster=true
gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="
    set -euo pipefail
    cd $(printf %q "${KLONG_DIR:-klong}")
    source launch/environment.sh
    install_into_venv '[tpu]'
    exec .venv/bin/klong$command"
