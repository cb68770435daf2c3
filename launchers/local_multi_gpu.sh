#!/usr/bin/env bash
# One machine, all its GPUs: every run, or every cell of a sweep (give --multirun), is shared among them.
#   launchers/local_multi_gpu.sh model=clip_vitl14 reference=naive_bayes
#   launchers/local_multi_gpu.sh --multirun model=clip_vitb32,clip_vitl14 reference=naive_bayes
# Without GPUs, or for some of them only: trainer.devices=N, after which CUDA_VISIBLE_DEVICES chooses.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m dejavu_exp trainer.devices=auto "$@"
