"""Runs that several tests look at."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest


@dataclass(frozen=True)
class Finished:
    """A finished run of the command line."""

    code: int
    folder: Path
    stdout: str
    stderr: str

    def figures(self) -> Any:
        return json.loads((self.folder / "figures.json").read_text())

    def scores(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "scores.parquet")


def measure(folder: Path, *overrides: str, cache: Path | None = None, timeout: float = 300, **env: str) -> Finished:
    """Run `python -m dejavu_exp` in another folder, with a cache of its own unless one is given."""
    settings = {
        **os.environ,
        "DEJAVU_CACHE": str(cache or folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        **env,
    }
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "dejavu_exp", f"hydra.run.dir={folder}", *overrides],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode, folder, done.stdout, done.stderr)


SMALL = (
    "dataset.classes=3",
    "dataset.train_per_class=30",
    "dataset.val_per_class=8",
    "split.target=8",
    "split.heldout=8",
    "split.public=14",
    "split.unseen=8",
    "probe.k=10",
    "model.recipe.epochs=1",
    "scoring.resamples=200",
    "tracking=none",
)
"""The embedded data set, small enough for a run in seconds; its figures mean nothing."""


@pytest.fixture(scope="session")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The default run, whole: what `make run` does."""
    done = measure(tmp_path_factory.mktemp("default"), timeout=600)
    assert done.code == 0, done.stderr
    return done
