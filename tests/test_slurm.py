"""A sweep through a real SLURM: a job cancelled, a job requeued, and nothing done twice."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

from dejavu_exp import cells
from dejavu_exp.cells import State, Status

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ARCHS = ("test_resnet.r160_in1k", "test_vit.r160_in1k")
REFERENCES = ("class_prior", "label_shuffle")
CELLS = (
    *(value for value in SMALL if not value.startswith("model.")),
    "model=efficientnet_lite0",
    "model._target_=gated.GatedEncoder",
    "~model.weights",
    "~model.output",
    f"model.arch={','.join(ARCHS)}",
    f"reference={','.join(REFERENCES)}",
    "utility=none",
    "trainer.workers=0",
    "hydra.verbose=dejavu_exp.shards",  # says which shards were written
)


@pytest.fixture(autouse=True)
def slurm() -> None:
    """A SLURM that answers. Where the tests must not be skipped, its absence is a failure."""
    answers = shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True).returncode == 0
    if not answers:
        reason = "no SLURM answers; .ci/one-node-slurm.sh start makes one"
        pytest.fail(reason) if os.environ.get("DEJAVU_CI") == "1" else pytest.skip(reason)


class Sweep:
    """A sweep in a folder: its command, its cells, its gate."""

    def __init__(self, folder: Path, *more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.sweep = folder / "sweep"
        self.shards = folder / "cache" / "embeddings"
        self.gate = folder / "gate"
        self.more = (
            *more,
            f"hydra.sweep.dir={self.sweep}",
            f"+model.gate={self.gate}",
            f"+model.shards={self.shards}",
        )

    def start(self) -> subprocess.Popen[str]:
        settings = {
            **os.environ,
            "DEJAVU_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent),
            "DEJAVU_TARGETS": "gated",
        }
        command = [sys.executable, "-m", "dejavu_exp", "-m", *CELLS, *self.more]
        return subprocess.Popen(
            command, cwd=self.folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def statuses(self) -> dict[tuple[str, str], tuple[Path, Status]]:
        """Folder and status of each cell, by architecture and reference."""
        found = {}
        for path in self.sweep.glob(f"*/{cells.STATUS}"):
            status = cells.read(path.parent)
            assert status is not None
            values = dict(word.split("=", 1) for word in status.overrides if "=" in word)
            found[values["model.arch"], values["reference"]] = (path.parent, status)
        return found

    def halfway(self, arch: str, reference: str) -> str | None:
        """The job of a cell whose encoder waits at the gate, behind its first shard."""
        job = self.statuses()[arch, reference][1].job if (arch, reference) in self.statuses() else None
        return job if (self.folder / f"waiting-{job}").exists() else None

    def files(self) -> dict[Path, tuple[int, int]]:
        """Shards with what changes when one is written again."""
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.shards.glob("*/*.arrow")}

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.sweep.glob(".submitit/*/*_log.out")))

    def figures(self) -> dict[tuple[str, str], Any]:
        """Figures without times, and without where things lie."""
        found = {}
        for key, (folder, _) in self.statuses().items():
            figures = json.loads((folder / "figures.json").read_text())
            for name in ("created", "seconds"):
                figures["run"].pop(name)
            for name in ("gate", "shards"):
                figures["run"]["config"]["model"].pop(name)
            found[key] = figures
        return found


def soon(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 200) -> Any:
    """Wait for something true of a sweep that is under way."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, f"waited {seconds} s in vain"
        time.sleep(0.1)
    return found


@pytest.fixture
def queued(tmp_path: Path) -> Iterator[Sweep]:
    sweep = Sweep(
        tmp_path / "slurm",
        "hydra/launcher=slurm",
        "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.array_parallelism=2",
        "trainer.devices=2",
    )
    yield sweep
    left = [status.job for _, status in sweep.statuses().values() if status.job]
    subprocess.run(["scancel", *left], capture_output=True)


def test_a_cancelled_and_a_requeued_job_cost_nothing_that_was_done(queued: Sweep, tmp_path: Path) -> None:
    first = queued.start()
    cancelled = soon(lambda: queued.halfway(ARCHS[0], REFERENCES[0]), first)
    written = queued.files()
    assert len(written) == 1
    subprocess.run(["scancel", cancelled], check=True)
    requeued = soon(lambda: queued.halfway(ARCHS[0], REFERENCES[1]), first)
    subprocess.run(["scontrol", "requeue", requeued], check=True)
    soon(lambda: (cells.slurm_jobs() or {}).get(requeued) == "PENDING", first)
    # SLURM leaves a requeued job alone for two minutes.
    at_once = ["scontrol", "update", f"JobId={requeued}", "StartTime=now"]
    soon(lambda: subprocess.run(at_once, capture_output=True).returncode == 0, first)
    queued.gate.touch()
    said = first.communicate(timeout=300)[0]
    assert first.returncode == 1, said
    (stopped, _) = queued.statuses()[ARCHS[0], REFERENCES[0]]
    assert f"stopped: {stopped}" in said
    assert "Traceback" not in said
    state = {key: status.now(cells.slurm_jobs()) for key, (_, status) in queued.statuses().items()}
    assert state.pop((ARCHS[0], REFERENCES[0])) == State.STOPPED
    assert set(state.values()) == {State.FINISHED}, queued.logs()
    assert queued.statuses()[ARCHS[0], REFERENCES[1]][1].restarts == 1
    assert written.items() <= queued.files().items()

    written = queued.files()
    again = queued.start()
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    assert said.count("finished before, not queued") == 3
    assert {status.state for _, status in queued.statuses().values()} == {State.FINISHED}
    # Each encoder was extracted once, in a shard of queries and one of the bank: none was written twice, or again.
    assert queued.files() == written
    assert len(written) == 2 * len(ARCHS)
    assert queued.logs().count("wrote shard") == len(written)

    local = Sweep(tmp_path / "local")
    local.gate.touch()
    here = local.start()
    said = here.communicate(timeout=300)[0]
    assert here.returncode == 0, said
    assert queued.figures() == local.figures()
