#!/usr/bin/env bash
# A sweep through SLURM: checked first, then queued. The same command again runs what is not finished.
#   launchers/slurm_sweep.sh [OVERRIDE...]     run on a machine that may submit jobs, from the repository
# Edit what is between the lines; what is given on the command line comes last and wins.
set -euo pipefail
cd "$(dirname "$0")/.."

# ---------------------------------------------------------------------------------------------------------------------
python=.venv/bin/python                      # an environment that all nodes see, with pip install -e '.[cpu,slurm]'
sweep_dir=outputs/sweeps                     # on a file system that all nodes see
export DEJAVU_CACHE=${DEJAVU_CACHE:-outputs/cache} # the same; jobs that want the same embeddings share them here

sweep=(                                      # every combination is a cell
  "model=clip_vitb32,clip_vitl14"
  "reference=naive_bayes,class_prior"
)
fixed=(                                      # the same in every cell, e.g. dataset=imagenet dataset.root=/data/imagenet
  tracking=none
)
slurm=(                                      # conf/hydra/launcher/slurm.yaml has all keys
  trainer.devices=1                          # tasks a cell, one a device
  hydra.launcher.timeout_min=240             # minutes
  hydra.launcher.array_parallelism=16        # cells at once
  # hydra.launcher.partition=NAME
  # hydra.launcher.account=NAME
  # hydra.launcher.gpus_per_node=1
  # hydra.launcher.cpus_per_task=8
  # hydra.launcher.mem_gb=64
)
# ---------------------------------------------------------------------------------------------------------------------

command=("$python" -m dejavu_exp --multirun hydra/launcher=slurm "hydra.sweep.dir=$sweep_dir"
  "${fixed[@]}" "${slurm[@]}" "${sweep[@]}" "$@")
"${command[@]}" run.plan=true                # lists weights and data that are missing, and ends here if any is
exec "${command[@]}"
