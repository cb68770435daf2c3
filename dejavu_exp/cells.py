"""What a run, or one cell of a sweep, says of itself: status.json in its folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import dejavu_exp
from dejavu_exp import config
from dejavu_exp.errors import DataError

STATUS = "status.json"
SUBMITTED = "submitted.json"
"""The job that a queued cell waits for. Not in status.json, which the job itself may write at the same moment."""


class State(StrEnum):
    """Where a cell is."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Status:
    """One cell of a sweep, or a single run.

    Attributes:
        state: as the process wrote it; `now` says whether it still holds.
        command: the module that was run, e.g. "dejavu_exp".
        overrides: what was given on the command line.
        multirun: whether it is a cell of a sweep.
        host: the machine of the process.
        pid: of the process; of a queued cell, the command that started the sweep.
        job: SLURM's job id, with the index in its array.
        restarts: how often SLURM requeued the job.
        started: ISO 8601 in UTC.
        ended: the same; None before.
        error: one sentence, of a failed cell.
        log: where the process writes what it does.
    """

    state: State
    command: str
    overrides: tuple[str, ...]
    multirun: bool
    host: str
    pid: int
    job: str | None
    restarts: int
    started: str
    ended: str | None
    error: str | None
    log: str | None

    @classmethod
    def here(cls, state: State, command: str, overrides: tuple[str, ...], multirun: bool, log: Path | None) -> Status:
        """A status of this process, or of the SLURM job it is part of."""
        job = slurm_job() if state == State.RUNNING else None
        return cls(
            state, command, overrides, multirun, socket.gethostname(), os.getpid(), job,
            int(os.environ.get("SLURM_RESTART_COUNT", 0)), _time(), None, None, str(log) if log else None,
        )  # fmt: skip

    def ends(self, state: State, error: str | None = None) -> Status:
        """The same cell at its end."""
        return replace(self, state=state, ended=_time(), error=error)

    def write(self, folder: Path) -> None:
        """Write status.json; a reader never sees half of it."""
        # Imported here: tables bring polars, and --help must not.
        from dejavu_exp import tables

        tables.write_json(asdict(self), folder / STATUS)

    def now(self, jobs: Mapping[str, str] | None) -> State:
        """The state, but stopped where the process or the job is gone.

        Args:
            jobs: states by id of the jobs in SLURM's queue; None where that cannot be asked, and jobs are believed.
        """
        if self.state in (State.FINISHED, State.FAILED):
            return self.state
        if self.job:
            if jobs is None:
                return self.state
            return _state_of_job(jobs.get(self.job))
        if self.host != socket.gethostname():
            return self.state
        return self.state if _lives(self.pid) else State.STOPPED

    def repeat(self) -> str:
        """The command line that runs this alone."""
        given = [word for word in self.overrides if not word.startswith(("hydra.mode=", "hydra.sweep.subdir="))]
        return shlex.join(["python", "-m", self.command, *(["--multirun"] if self.multirun else []), *given])


def _state_of_job(state: str | None) -> State:
    if state is None:
        return State.STOPPED
    return State.QUEUED if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING") else State.RUNNING


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(folder: Path) -> Status | None:
    """The status of a folder; None where there is none.

    Raises:
        DataError: status.json is not what a run of this version writes.
    """
    try:
        found = json.loads((folder / STATUS).read_text())
        status = Status(**{field.name: found[field.name] for field in fields(Status)})
        status = replace(status, state=State(status.state), overrides=tuple(status.overrides))
        if status.state == State.QUEUED and (folder / SUBMITTED).exists():
            status = replace(status, job=json.loads((folder / SUBMITTED).read_text())["job"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / STATUS} cannot be read: {error!r}. Remove it and run the cell again.") from error
    return status


def is_finished(folder: Path, resolved: Mapping[str, Any]) -> bool:
    """True where a folder holds the whole result of this configuration, measured by this version.

    Args:
        folder: of the cell.
        resolved: the configuration.
    """
    status = read(folder)
    if status is None or status.state != State.FINISHED:
        return False
    try:
        run = json.loads((folder / "figures.json").read_text())["run"]
        made_by, measured = run["versions"]["dejavu_exp"], run["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    same = config.content_hash(measured) == config.content_hash(resolved)
    return bool(made_by == dejavu_exp.__version__ and same)


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep, before it is started.

    Attributes:
        overrides: all that sets it apart from the defaults.
        folder: where its results will lie.
        resolved: its configuration, with `run`.
    """

    overrides: tuple[str, ...]
    folder: Path
    resolved: Mapping[str, Any]

    def is_done(self) -> bool:
        """True where it needs no run."""
        return not self.resolved["run"]["again"] and is_finished(self.folder, self.resolved)

    def state(self, jobs: Mapping[str, str] | None) -> State | None:
        """Where it is, for `jobs` as `Status.now`; None where it was never started."""
        status = read(self.folder)
        return status.now(jobs) if status else None


def slurm_job() -> str | None:
    """The SLURM job that this process is a task of, with the index in its array; None outside of SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def slurm_jobs() -> dict[str, str] | None:
    """States, such as PENDING or RUNNING, of this user's jobs in SLURM's queue by id; None where it does not answer."""
    if shutil.which("squeue") is None:
        return None
    # One line for each cell of an array: ARRAY_INDEX, and the state.
    asked = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = (line.split() for line in answer.stdout.splitlines())
    return {job: state for job, state in lines if state not in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT")}
