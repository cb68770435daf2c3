#!/usr/bin/env bash
# The state of every cell of a sweep; --failed prints the commands that run failed and stopped cells again, each alone.
#   launchers/sweep_status.sh [DIR] [--failed]
# Exit status 1 unless all are finished.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ] || [[ "$1" == --* ]]; then set -- outputs/sweeps "$@"; fi
exec "${PYTHON:-.venv/bin/python}" -m dejavu_exp.sweep "$@"
