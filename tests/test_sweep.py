"""Cells of a sweep: stable folders, status, what is skipped, what is told at the end; launchers without a cluster."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from dejavu_exp import cells, config, sweep
from dejavu_exp.cells import State, Status
from dejavu_exp.errors import ConfigError, DataError

ROOT = Path(config.__file__).parents[1]


def hydra_config(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    config.register()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def folder_of(*overrides: str) -> str:
    return str(OmegaConf.select(hydra_config(*overrides), "hydra.sweep.subdir"))


def multirun(folder: Path, *overrides: str, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "DEJAVU_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", **env}
    command = [sys.executable, "-m", "dejavu_exp", "-m", f"hydra.sweep.dir={folder / 'sweep'}", *overrides]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=300)


def test_a_cell_has_a_readable_folder_that_its_content_alone_decides() -> None:
    name = folder_of("reference=[naive_bayes,class_prior]")
    assert name.startswith("shapes_resnet-naive_bayes+class_prior-")
    assert len(name.rsplit("-", 1)[1]) == 12
    same = ["trainer.workers=3", "trainer.devices=2", "tracking=none", "run.again=true", "trainer.cache=/elsewhere"]
    assert {folder_of("reference=[naive_bayes,class_prior]", override) for override in same} == {name}
    others = ["seed=1", "probe.k=11", "trainer.precision=bfloat16", "dataset.classes=5"]
    assert len({name, *(folder_of("reference=[naive_bayes,class_prior]", other) for other in others)}) == 5


def status(state: State = State.RUNNING, **fields: Any) -> Status:
    return replace(Status.here(state, "dejavu_exp", ("probe.k=3",), True, None), **fields)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("known", "jobs", "expected"),
    [
        (status(), None, State.RUNNING),
        (status(pid=dead_pid()), None, State.STOPPED),
        (status(State.QUEUED, pid=dead_pid()), None, State.STOPPED),
        (status(State.FINISHED, pid=dead_pid()), {}, State.FINISHED),
        (status(State.FAILED, pid=dead_pid()), {}, State.FAILED),
        # Another machine's process cannot be looked at.
        (status(host="elsewhere", pid=dead_pid()), None, State.RUNNING),
        (status(job="7_1"), {"7_1": "RUNNING"}, State.RUNNING),
        (status(job="7_1"), {"7_1": "PENDING"}, State.QUEUED),
        (status(job="7_1"), {"7_0": "RUNNING"}, State.STOPPED),
        (status(job="7_1", pid=dead_pid()), None, State.RUNNING),
    ],
)
def test_what_is_gone_shows_as_stopped(known: Status, jobs: dict[str, str] | None, expected: State) -> None:
    assert known.now(jobs) == expected


def test_a_status_is_read_as_written(tmp_path: Path) -> None:
    written = status(State.FINISHED, ended="2026-01-01T00:00:00+00:00", error=None)
    written.write(tmp_path)
    assert cells.read(tmp_path) == written
    assert cells.read(tmp_path / "nowhere") is None
    (tmp_path / cells.STATUS).write_text('{"state": "happy"}')
    with pytest.raises(DataError, match=r"status\.json"):
        cells.read(tmp_path)


def test_a_queued_cell_knows_the_job_that_was_submitted_for_it(tmp_path: Path) -> None:
    status(State.QUEUED).write(tmp_path)
    (tmp_path / cells.SUBMITTED).write_text(json.dumps({"job": "12_3"}))
    found = cells.read(tmp_path)
    assert found is not None
    assert found.job == "12_3"


def test_the_command_of_a_cell_can_be_pasted_into_a_shell() -> None:
    given = ("hydra.mode=MULTIRUN", "hydra.sweep.dir=my sweep", "reference=[naive_bayes,class_prior]", "a='x y'")
    words = shlex.split(status(overrides=given).repeat())
    assert words == ["python", "-m", "dejavu_exp", "--multirun", *given[1:]]
    assert shlex.split(status(overrides=("a=1",), multirun=False).repeat()) == ["python", "-m", "dejavu_exp", "a=1"]


def test_the_job_of_an_array_has_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert cells.slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert cells.slurm_job() == "9"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert cells.slurm_job() == "5_2"


def test_a_folder_without_cells_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outputs/sweeps"):
        sweep.rows([tmp_path])
    with pytest.raises(ConfigError, match="no such folder"):
        sweep.rows([tmp_path / "nowhere"])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two cells: one that can be measured, and one whose k is larger than the bank."""
    folder = tmp_path_factory.mktemp("swept")
    return folder, multirun(folder, *SMALL, "reference=class_prior", "utility=none", "probe.k=10,43")


def by_k(folder: Path) -> dict[str, sweep.Row]:
    words = {row: dict(word.split("=", 1) for word in row.status.overrides) for row in sweep.rows([folder / "sweep"])}
    return {found["probe.k"]: row for row, found in words.items()}


def test_a_cell_that_fails_ends_no_sweep(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = swept
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("failed: "))
    assert "probe.k=43 is more than the bank holds" in line
    found = by_k(folder)
    assert {key: row.state for key, row in found.items()} == {"10": State.FINISHED, "43": State.FAILED}
    assert "corrected gap" in found["10"].figure
    assert (folder / "sweep" / found["10"].name / "report.html").exists()
    assert found["10"].status.host == socket.gethostname()


def test_the_status_command_shows_all_and_prints_what_to_run(
    swept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = swept
    command = [sys.executable, "-m", "dejavu_exp.sweep", str(folder / "sweep")]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 1
    assert "1 finished, 1 failed" in shown.stdout
    assert "probe.k=43 is more than the bank holds" in shown.stdout
    failed = subprocess.run([*command, "--failed"], capture_output=True, text=True)
    (line,) = failed.stdout.splitlines()
    assert "probe.k=43" in shlex.split(line)


def test_the_same_command_runs_only_what_is_not_finished(
    swept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.glob("sweep/*/figures.json")}
    given = [*SMALL, "reference=class_prior", "utility=none"]
    again = multirun(folder, *given, "probe.k=10,9")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before, and not measured again") == 1
    after = {path: path.stat().st_mtime_ns for path in folder.glob("sweep/*/figures.json")}
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()
    anew = multirun(folder, *given, "probe.k=10", "run.again=true")
    assert anew.returncode == 0, anew.stderr
    assert {path: path.stat().st_mtime_ns for path in before} != before


def test_another_version_or_a_broken_figures_file_is_not_finished(
    swept: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, _ = swept
    cell = shutil.copytree(folder / "sweep" / by_k(folder)["10"].name, tmp_path / "cell")
    resolved = yaml.safe_load((cell / "config.yaml").read_text())
    assert cells.is_finished(cell, resolved)
    assert not cells.is_finished(cell, {**resolved, "seed": 9})
    figures = json.loads((cell / "figures.json").read_text())
    figures["run"]["versions"]["dejavu_exp"] = "0.0.1"
    (cell / "figures.json").write_text(json.dumps(figures))
    assert not cells.is_finished(cell, resolved)
    (cell / "figures.json").write_text("{")
    assert not cells.is_finished(cell, resolved)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracking=none,wandb"], "2 cells of the sweep would share this folder"),
        (["+probe.kk=1,2"], "probe.kk is not a key of the configuration"),
        (
            ["hydra/launcher=slurm", "model=clip_vitl14,clip_vitb32", "dataset=imagenet", "dataset.root=/nowhere",
             "dataset.boxes=/nowhere", "reference=class_prior"],
            "dataset.root=/nowhere",
        ),
        (["hydra/launcher=slurm", "seed=0,1", "hydra.launcher.tasks_per_node=3"], "starts 1 x 3 tasks a cell"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_work_ends_before_its_first_cell(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    done = multirun(tmp_path, *overrides)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("sweep/*/status.json"))
    assert not list(tmp_path.glob("sweep/.submitit/*"))


def test_a_launcher_that_is_not_installed_names_the_extra(tmp_path: Path) -> None:
    done = multirun(tmp_path, "seed=0,1", "hydra/launcher=ray", "hydra.launcher._target_=hydra_plugins.absent.Launcher")
    assert done.returncode == 1
    assert "absent is not installed" in done.stderr
    assert "pip install 'dejavu_exp[" in done.stderr


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_launchers_compose_with_the_plugin_and_without(name: str) -> None:
    launcher = hydra_config(f"hydra/launcher={name}").hydra.launcher
    assert str(launcher._target_).startswith("hydra_plugins.")


def test_slurms_launcher_has_only_keys_that_the_plugin_reads() -> None:
    from dataclasses import fields

    plugin = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config")
    ours = hydra_config("hydra/launcher=slurm").hydra.launcher
    assert {str(key) for key in ours} <= {field.name for field in fields(plugin.SlurmQueueConf)}


@pytest.mark.parametrize("script", sorted((ROOT / "launchers").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_strict_and_parse(script: Path) -> None:
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
