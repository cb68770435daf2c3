"""What a user waits for: the help, and the default run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import Comparison, seconds


def _python(*arguments: str, **env: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env={**os.environ, **env})


def start_up() -> Comparison:
    """`--help`, which composes the configuration, beside the imports that it needs or leaves out."""
    helped = seconds(lambda: _python("-m", "dejavu_exp", "--help"))
    return Comparison(
        "start-up: python -m dejavu_exp --help",
        {
            "dejavu_exp": helped,
            "import torch alone": seconds(lambda: _python("-c", "import torch")),
            "import lightning alone": seconds(lambda: _python("-c", "import lightning.pytorch")),
        },
        f"import hydra alone: {seconds(lambda: _python('-c', 'import hydra')):.2f} s",
        "under a second on an idle machine",
    )


def default_run() -> Comparison:
    """The default run with an empty cache, and again with what it left there."""
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            _python("-m", "dejavu_exp", "tracking=none", f"hydra.run.dir={folder}/run", DEJAVU_CACHE=f"{folder}/cache")

        first = seconds(run, tries=1)
        spent = json.loads((Path(folder) / "run" / "figures.json").read_text())["run"]["seconds"]
        again = seconds(run, tries=1)
    return Comparison(
        "default run: 10 classes of drawn shapes, 3 references, report",
        {"dejavu_exp, all from the cache": again, "dejavu_exp, empty cache": first},
        f"training the encoder takes {spent['encoder'] / first:.0%} of the first run",
        note="Nobody else has such a run; the second shows what a sweep's further cells cost.",
    )


COMPARISONS = (start_up, default_run)
