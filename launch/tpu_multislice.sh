#!/usr/bin/env bash
# Trains on several TPU slices of one queued resource, data parallel between the slices.
#   QUEUED=NAME SLICES=N ZONE=ZONE [DIR=jllama] launch/tpu_multislice.sh --config RECIPE [...]
# Works as tpu_pod.sh does. The platform tells every host its slice in MEGASCALE_*, which JAX reads.
set -uo pipefail

: "${QUEUED:?set QUEUED to the queued resource}" "${ZONE:?set ZONE to its zone}"
: "${SLICES:?set SLICES to the number of slices}"
train=$(printf '%q ' .venv/bin/python train.py "--mesh.replica=$SLICES" "$@")
remote="cd $(printf '%q' "${DIR:-jllama}") && $train || { status=\$?;
  echo \"error: train.py on \$(hostname) left with status \$status; the same command resumes\" >&2;
  exit \$status; }"

gcloud compute tpus queued-resources ssh "$QUEUED" --zone="$ZONE" --node=all --worker=all \
  --command="$remote"
status=$?
if [ "$status" -ne 0 ]; then
  echo "error: $QUEUED: the run ended with status $status; the lines above say on which hosts" >&2
fi
exit "$status"
