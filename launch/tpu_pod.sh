#!/usr/bin/env bash
# Trains on one TPU slice by running the same command on each of its hosts, through gcloud's SSH.
#   TPU=NAME ZONE=ZONE [DIR=jllama] launch/tpu_pod.sh --config RECIPE [--key=value ...]
# The checkout with its .venv must be in DIR on every host (relative to the login's home), and
# run.folder on storage that all hosts share. Prints a line for each host that fails, and returns
# gcloud's status.
set -uo pipefail

: "${TPU:?set TPU to the name of the TPU VM}" "${ZONE:?set ZONE to its zone}"
train=$(printf '%q ' .venv/bin/python train.py "$@")
# A process that JAX aborts cannot print this line itself.
remote="cd $(printf '%q' "${DIR:-jllama}") && $train || { status=\$?;
  echo \"error: train.py on \$(hostname) left with status \$status; the same command resumes\" >&2;
  exit \$status; }"

gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$remote"
status=$?
if [ "$status" -ne 0 ]; then
  echo "error: $TPU: the run ended with status $status; the lines above say on which hosts" >&2
fi
exit "$status"
