#!/usr/bin/env bash
# The train step on an NVIDIA GPU beside torch.compile with flash attention: bfloat16, rows of 4,096.
#
#   make .venv/.cuda && benchmarks/gpu.sh | tee gpu.md
#
# The 3B model needs about 60 GB for float32 parameters and AdamW: leave it out below 80 GB with
# MODELS="llama3.2-1b:8". MODEL:ROWS, one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
MODELS=${MODELS:-"llama3.2-1b:8 llama3.2-3b:4"}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
settings=()
for model in $MODELS; do settings+=(--setting "$model:4096"); done
# Rows without document boundaries on both sides, so that both use flash attention: cuDNN's here.
# Both recompute each block. PyPI's torch is CUDA's.
peer="$(.venv/bin/python tests/peers/environment.py transformers)"
exec .venv/bin/python -m benchmarks.compare --peers "$peer" --dtype bfloat16 \
  --rounds "${ROUNDS:-3}" --steps 10 "${settings[@]}" \
  --set compute.attention.kind=cudnn --set data.document_mask=false --set compute.remat=full \
  --set compute.loss_block=4096 --peer-option=--checkpointing
