"""The processes of one run, one a device: the first leads, the others help with what it asks for.

They meet in the store of torch.distributed, the rendezvous of gloo and NCCL, and pass work through files and leases.
There is no collective operation in it: a rank that is slow or dead costs the piece of work it has, and stops nobody.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dejavu_exp import tables
from dejavu_exp.errors import ConfigError, DataError, DejavuError

log = logging.getLogger(__name__)

MEET_S = 600
"""Seconds for which a helper looks for rank 0."""
LISTEN_S = 0.1
"""Seconds between two looks at what another rank says."""
PART_S = 30
"""Seconds for which rank 0 waits at its end for tasks that start late, or have died."""
END = "end"


@dataclass(frozen=True)
class Place:
    """Which of the processes of a run this is.

    Attributes:
        rank: 0 leads.
        size: processes in all.
        local_rank: on this machine.
        local_size: processes on this machine, as far as it is known.
        address: host of rank 0.
        port: where its store listens; 0 for any free one.
        hosted: True where torchrun holds the store, and not rank 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    hosted: bool = False


@functools.cache
def place() -> Place:
    """This process's place among the tasks that torchrun or SLURM started; alone where neither did."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return _place_of_torchrun()
    # A step of srun; a shell within an allocation is not one.
    return _place_of_slurm() if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 else Place()


def _place_of_torchrun() -> Place:
    """Where its store is, is taken out of the environment: Lightning would take it as said to itself."""
    env = os.environ
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    address, port = env.pop("MASTER_ADDR"), int(env.pop("MASTER_PORT"))
    local_rank, local_size = int(env.pop("LOCAL_RANK", rank)), int(env.pop("LOCAL_WORLD_SIZE", size))
    hosted = env.pop("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    return Place(rank, size, local_rank, local_size, address, port, hosted)


def _place_of_slurm() -> Place:
    env = os.environ
    here = int(env["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0])
    port = 20_000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env.get("SLURM_STEP_ID", "0"))) % 20_000
    address = _first_host(env["SLURM_STEP_NODELIST"])
    return Place(
        int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]), here, address, port
    )


@functools.cache
def _store(found: Place) -> Any:  # noqa: ANN401 - a TCPStore, of which torch says nothing
    """The store where the ranks meet, one for all runs of this process.

    Raises:
        DataError: rank 0 cannot be found, or the port cannot be had.
    """
    leads = found.rank == 0 and not found.hosted
    try:
        return TCPStore(
            found.address,
            found.port,
            found.size,
            is_master=leads,
            timeout=timedelta(seconds=MEET_S),
            wait_for_workers=False,
        )
    except (distributed.DistError, RuntimeError) as error:
        where = f"{found.address}:{found.port}"
        raise DataError(f"rank {found.rank} of {found.size} cannot reach rank 0 at {where}: {error}") from error


def _first_host(nodes: str) -> str:
    """The first host of a list in SLURM's short form.

    >>> _first_host("gpu[07-09,12],login1"), _first_host("n1,n2")
    ('gpu07', 'n1')
    """
    found = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if not found:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes}: not a list of hosts.")
    return "".join(part or "" for part in found.groups())


class Ranks:
    """The processes of a run as seen from one of them.

    Args:
        place: of this process.
        folder: on a file system that all share; work is passed through files in it.
    """

    def __init__(self, place: Place, folder: Path) -> None:
        self.place = place
        self._parent, self._folder = folder, folder / uuid.uuid4().hex
        self._store: Any = None
        self._run = 0
        self._asked = 0
        self._children: list[subprocess.Popen[bytes]] = []
        self._written: dict[int, tuple[Any, str]] = {}
        self._read: dict[str, Any] = {}

    @property
    def cores(self) -> int:
        """Cores of this machine for each of its processes, to decode on.

        Networks run on as many threads as in a process alone: another number could add in another order. On CPUs ranks
        then share cores, which costs little where idle threads sleep.
        """
        mine = int(os.environ.get("SLURM_CPUS_PER_TASK", "0")) if self.place.size > 1 else 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return mine or max(1, cores // self.place.local_size)

    def open(self, run: int) -> None:
        """Meet the other ranks.

        Args:
            run: number of the run, which is the same in all ranks; nothing of another is read.

        Raises:
            DataError: as `_store`.
        """
        self._run = run
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"dejavu_exp/{attempt}/{run}", _store(self.place))

    def ask(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the other ranks call a function when they can; this call does not wait for them.

        What is asked for replaces what was asked for before: by then, that must have been done.

        Args:
            function: of a module; must do nothing where the work is done already.
            arguments: can be pickled; each is written once as long as it is the same object.

        Raises:
            DataError: the folder cannot be written.
        """
        if self.place.size == 1:
            return
        names = [self._write(value) for value in (function, *arguments)]
        self._asked += 1
        self._store.set("work", json.dumps([self._asked, str(self._folder), names]))
        self._store.set(f"asked/{self._asked}", "")
        self._start_children()

    def _write(self, value: object) -> str:
        if id(value) not in self._written:
            name = f"{len(self._written):06d}.pkl"
            with tables.whole(self._private() / name) as partial, partial.open("wb") as stream:
                pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)
            self._written[id(value)] = (value, name)  # the object is kept, so that its id stays its own
        return self._written[id(value)][1]

    def _private(self) -> Path:
        """The folder of this run, for this user alone: what lies there is unpickled."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._folder

    def _start_children(self) -> None:
        """Start the other ranks, where they are this process's own; not before there is work for them."""
        if self._children or self.place.port:
            return
        for rank in range(1, self.place.size):
            self._children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dejavu_exp.ranks", str(self._parent), str(self._run)],
                    env={**os.environ, **self._said_to(rank)},
                    stdin=subprocess.DEVNULL,
                )
            )

    def _said_to(self, rank: int) -> dict[str, str]:
        """The environment of a child, as torchrun's."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.place.size),
            "LOCAL_WORLD_SIZE": str(self.place.size),
            "MASTER_ADDR": self.place.address,
            "MASTER_PORT": str(_store(self.place).port),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # that rank 0 has gone is no news
        }

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what the ranks tell each other, which all see; gone afterwards."""
        folder = self._private() / uuid.uuid4().hex
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def serve(self) -> None:
        """Do what rank 0 asks for, until it has ended."""
        last = 0
        while self._next(last):
            last, folder, names = json.loads(self._store.get("work"))
            if last == END:
                self._store.set(f"left/{self.place.rank}", "")
                return
            try:
                function, *arguments = self._load(Path(folder), names)
            except FileNotFoundError:  # rank 0 has ended since, and says so next
                continue
            try:
                function(*arguments)
            except DejavuError as error:  # rank 0 does the work, or meets the same error and tells it
                log.warning("rank %d: %s", self.place.rank, error)

    def is_led(self) -> bool:
        """False in a helper whose rank 0 is gone."""
        if self.place.rank == 0:
            return True
        try:
            self._store.check([END])
        except (distributed.DistError, RuntimeError):
            return False
        return True

    def _next(self, last: int) -> bool:
        """Wait for work that comes after number `last`; False where rank 0 is gone."""
        # Asked again and again: a wait cannot be interrupted, and logs each time it comes to nothing.
        try:
            while not self._store.check([f"asked/{last + 1}"]):
                time.sleep(LISTEN_S)
        except (distributed.DistError, RuntimeError):
            return False
        return True

    def _load(self, folder: Path, names: list[str]) -> list[Any]:
        """Read what rank 0 wrote: files in the shared folder that belong to this user, and nothing else."""
        if folder.parent.resolve() != self._parent.resolve() or folder.stat().st_uid != os.getuid():
            raise DataError(f"{folder}: not a folder that rank 0 of this run can have made; it is not read.")
        for name in set(names) - self._read.keys():
            with (folder / name).open("rb") as stream:
                self._read[name] = pickle.load(stream)
        self._read = {name: self._read[name] for name in names}
        return [self._read[name] for name in names]

    def close(self) -> None:
        """Tell the other ranks that the run has ended."""
        if self._store is not None and self.place.rank == 0:
            self._store.set("work", json.dumps([END, "", []]))
            self._store.set(f"asked/{self._asked + 1}", "")
            for child in self._children:
                child.terminate()  # all that was asked for is done
            for child in self._children:
                child.wait()
            if self.place.port:
                self._part()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _part(self) -> None:
        """Wait until the other tasks know that the run has ended: one that starts late would look long for rank 0."""
        others = [f"left/{rank}" for rank in range(1, self.place.size)]
        until = time.monotonic() + PART_S
        while not self._store.check(others) and time.monotonic() < until:
            time.sleep(LISTEN_S)


_here = Ranks(Place(), Path())
_runs = 0


def here() -> Ranks:
    """The ranks of the run that this process belongs to; as torch.distributed has its default group."""
    return _here


@contextmanager
def joined(devices: int, folder: Path) -> Iterator[bool]:
    """Take this process's place in a run.

    Args:
        devices: processes where nothing else has started them; what torchrun or SLURM started counts before it.
        folder: that all processes share.

    Yields:
        True in rank 0, which does the run; False in the others, after they have helped until it ended.

    Raises:
        DataError: the processes do not find each other.
    """
    global _here, _runs
    found = place()
    if found.size == 1 and devices > 1:
        found = Place(size=devices, local_size=devices)
    before, _here = _here, Ranks(found, folder / "ranks")
    _runs += 1
    try:
        if found.size > 1:
            _here.open(_runs)
        if found.rank:
            _here.serve()
        yield found.rank == 0
    finally:
        _here.close()
        _here = before


def device_index() -> int:
    """The GPU of this process, among those it can see."""
    return _here.place.local_rank % max(1, torch.cuda.device_count())


def main(folder: str, run: str) -> None:
    """A child: help with one run of the process that started it.

    Args:
        folder: that rank 0 passes work through.
        run: its number.
    """
    global _runs
    _runs = int(run) - 1
    with suppress(KeyboardInterrupt), joined(1, Path(folder).parent):
        pass


if __name__ == "__main__":
    # Under its own name, so that what is unpickled here finds the same module.
    from dejavu_exp import ranks

    ranks.main(*sys.argv[1:])
