"""Leases: one holder, death noticed, expiry, what is left behind; and processes that are killed at random."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dejavu_exp import tables
from dejavu_exp.errors import DataError
from dejavu_exp.leases import Leases, Pieces


def lease_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".lease." in path.name)


def test_one_process_holds_a_lease_and_gives_it_back(tmp_path: Path) -> None:
    work = tmp_path / "result"
    with Leases() as first, Leases() as second:
        assert first.claim(work)
        assert not second.claim(work)
        assert str(os.getpid()) in second.holder(work)
        first.release(work)
        assert second.claim(work)
    assert lease_files(tmp_path) == []


def test_a_lease_without_a_sign_of_life_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "result"
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    elsewhere = {"owner": "x", "host": "far", "machine": "another", "pid": 1, "started": "1"}
    (tmp_path / ".result.lease.1").write_text(json.dumps(elsewhere))
    with Leases(expiry_s=10) as mine:
        assert not mine.claim(work)
        assert mine.holder(work) == "process 1 on far"
        clock[0] = 9.0
        assert not mine.claim(work)
        (tmp_path / ".result.lease.1").write_text(json.dumps({**elsewhere, "beat": 1}))
        clock[0] = 18.0
        assert not mine.claim(work), "the holder has written since"
        clock[0] = 29.0
        assert mine.claim(work)
        assert lease_files(tmp_path) == [".result.lease.1", ".result.lease.2"]
    assert lease_files(tmp_path) == []


def test_a_dead_holder_on_this_machine_is_noticed_at_once(tmp_path: Path) -> None:
    work = tmp_path / "result"
    claim = (
        "import sys, os, pathlib; from dejavu_exp.leases import Leases; "
        "Leases().claim(pathlib.Path(sys.argv[1])); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", claim, str(work)], check=True)
    assert lease_files(tmp_path) == [".result.lease.1"]
    with Leases(expiry_s=1e6) as mine:
        assert mine.claim(work)


def test_a_lease_without_content_expires_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    (tmp_path / ".result.lease.1").touch()
    with Leases(expiry_s=10) as mine:
        assert not mine.claim(tmp_path / "result")
        assert mine.holder(tmp_path / "result") == "another process"
        clock[0] = 11.0
        assert mine.claim(tmp_path / "result")


def test_a_holder_writes_as_long_as_it_lives(tmp_path: Path) -> None:
    work = tmp_path / "result"
    with Leases(expiry_s=0.3) as first:
        first.claim(work)
        path = tmp_path / ".result.lease.1"
        before, until = path.read_bytes(), time.monotonic() + 10
        while path.read_bytes() == before and time.monotonic() < until:
            time.sleep(0.01)
        assert path.read_bytes() != before


def test_waiting_ends_when_the_work_is_done(tmp_path: Path) -> None:
    work = tmp_path / "result"
    with Leases() as first, Leases() as second:
        with first.held(work, "training", work.exists) as mine:
            assert mine
            assert not second.claim(work)
            work.touch()
        with second.held(work, "training", work.exists) as mine:
            assert not mine
    assert lease_files(tmp_path) == []


def test_pieces_done_or_held_are_passed_over(tmp_path: Path) -> None:
    with Leases() as first, Leases() as second:
        mine = Pieces(4, lambda piece: tmp_path / str(piece), first)
        other = Pieces(4, lambda piece: tmp_path / str(piece), second)
        (tmp_path / "2").touch()
        taken = mine.take()
        assert next(taken) == 0
        assert list(other.take()) == [1, 3]
        assert list(taken) == []
        assert mine.missing() == [0, 1, 3]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with Leases() as mine, pytest.raises(DataError, match=r"cannot write .*lease"):
        mine.claim(tmp_path / "no" / "result")


def work_on(folder: Path) -> None:
    with Leases() as mine:
        pieces = Pieces(200, lambda piece: folder / str(piece), mine)
        while pieces.missing():
            for piece in pieces.take():
                with (folder / "log").open("a") as log:
                    log.write(f"{piece}\n")
                time.sleep(0.02)
                tables.write_text("x" * 1000, folder / str(piece))
                pieces.release(piece)
            time.sleep(0.01)


def test_eight_processes_do_every_piece_once_whoever_is_killed(tmp_path: Path) -> None:
    """Twenty kills at random; what a killed process had begun is done again, and nothing else."""
    rng, forked = random.Random(0), multiprocessing.get_context("fork")

    def start() -> Any:
        process = forked.Process(target=work_on, args=[tmp_path])
        process.start()
        return process

    processes = [start() for _ in range(8)]
    for _ in range(20):
        time.sleep(rng.uniform(0.005, 0.03))
        victim = rng.randrange(len(processes))
        processes[victim].kill()
        processes[victim].join()
        processes[victim] = start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert all((tmp_path / str(piece)).read_text() == "x" * 1000 for piece in range(200))
    begun = (tmp_path / "log").read_text().split()
    assert set(begun) == {str(piece) for piece in range(200)}
    assert 200 < len(begun) <= 200 + 20, "some were killed at work"
    assert lease_files(tmp_path) == []
