"""Several processes of one run: own children, torchrun's and SLURM's places, death, and the same bytes for any number."""

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Finished, measure
from test_extract import encoder, images
from torch import nn

from dejavu_exp import neighbours, ranks
from dejavu_exp.errors import DataError
from dejavu_exp.extract import Extractor
from dejavu_exp.ranks import Place

HERE = str(Path(__file__).parent)


class Watched(nn.Module):
    """Mean of each channel; writes down who asked. One process may wait until another has begun."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        log, until = Path(os.environ["BATCHES"]), time.monotonic() + 120
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        while os.environ.get("PATIENT") == str(os.getpid()) and len(set(log.read_text().split())) == 1:
            assert time.monotonic() < until, "no other process has begun"
            time.sleep(0.01)
        time.sleep(0.02)
        return pixels.mean(dim=(2, 3))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Who worked: one line a batch. Children can import this file."""
    monkeypatch.setenv("BATCHES", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", HERE)
    return tmp_path / "log"


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert ranks.here().place == Place()


def test_children_share_the_shards_and_the_search(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views, store = images(100)
    alone = Extractor(tmp_path / "alone", accelerator="cpu", batch_size=4, shard_rows=4, workers=0)
    shared = Extractor(tmp_path / "shared", accelerator="cpu", batch_size=4, shard_rows=4, workers=0)
    expected = alone.embed(encoder(Watched()), views, store)
    log.unlink()
    monkeypatch.setenv("PATIENT", str(os.getpid()))
    with ranks.joined(3, shared.cache) as lead:
        assert lead
        found = shared.embed(encoder(Watched()), views, store)
        near = neighbours.search(found, found, 7)
    np.testing.assert_array_equal(found.values, expected.values)
    batches = log.read_text().split()
    assert len(batches) == 25, "no batch twice"
    assert len(set(batches)) > 1, "rank 0 was not alone"
    once = neighbours.search(expected.values, expected.values, 7)
    np.testing.assert_array_equal(near.positions, once.positions)
    np.testing.assert_array_equal(near.distances, once.distances)
    assert not list((shared.cache / "ranks").iterdir())
    assert not list(shared.cache.rglob(".*.lease.*"))


def test_a_helper_that_dies_costs_its_shard_only(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views, store = images(100)
    monkeypatch.setenv("PATIENT", str(os.getpid()))
    shared = Extractor(tmp_path / "cache", accelerator="cpu", batch_size=4, shard_rows=4, workers=0)

    def kill_the_helper() -> None:
        me = os.getpid()
        while True:
            others = {int(line) for line in log.read_text().split()} - {me} if log.exists() else set()
            if others:
                os.kill(others.pop(), signal.SIGKILL)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_the_helper)
    killer.start()
    with ranks.joined(2, shared.cache):
        found = shared.embed(encoder(Watched()), views, store)
    killer.join()
    assert found.readable.all()
    assert 25 <= len(log.read_text().split()) <= 26, "at most the batch in hand was done twice"


def test_what_fails_in_rank_0_ends_the_helpers(tmp_path: Path, log: Path) -> None:
    views, store = images(40)
    shared = Extractor(tmp_path / "cache", accelerator="cpu", batch_size=4, shard_rows=4, workers=0)
    with pytest.raises(KeyboardInterrupt), ranks.joined(2, shared.cache):
        shared.embed(encoder(Watched()), views, store)
        children = list(ranks.here()._children)
        raise KeyboardInterrupt
    assert all(child.poll() is not None for child in children)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Place()),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Place()),
        (
            {
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
                "SLURM_STEP_NODELIST": "gpu[07-08]",
                "SLURM_PROCID": "3",
                "SLURM_LOCALID": "1",
                "SLURM_JOB_ID": "11",
                "SLURM_STEP_ID": "0",
            },
            Place(3, 4, 1, 2, "gpu07", 20_077),
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
            | {"MASTER_ADDR": "here", "MASTER_PORT": "1234", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            Place(5, 8, 1, 4, "here", 1234, hosted=True),
        ),
    ],
)
def test_the_place_is_what_slurm_or_torchrun_says(
    env: dict[str, str], expected: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert ranks.place() == expected
    assert "RANK" not in os.environ, "Lightning would take it as said to itself"
    for name in env:
        monkeypatch.delenv(name, raising=False)


def test_a_rank_that_finds_nobody_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MEET_S", 1)
    monkeypatch.setattr(ranks, "place", lambda: Place(1, 2, address="127.0.0.1", port=1))
    with pytest.raises(DataError, match=r"rank 1 of 2 cannot reach rank 0 at 127\.0\.0\.1:1"), ranks.joined(1, tmp_path):
        pass


def test_helpers_read_nothing_but_what_rank_0_of_this_user_wrote(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(DataError, match="it is not read"):
        ranks.Ranks(Place(), tmp_path / "ranks")._load(elsewhere, ["000000.pkl"])


def embed_in_child(cache: Path) -> None:
    views, store = images(160)
    Extractor(cache, accelerator="cpu", batch_size=4, shard_rows=4, workers=0).embed(encoder(Watched()), views, store)


def test_eight_jobs_on_one_cache_extract_once_whoever_is_killed(tmp_path: Path, log: Path) -> None:
    """They start at once; twenty random kills; nothing is damaged, left behind, or waited for in vain."""
    rng, server = random.Random(1), multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_ranks"])  # forks of a process without threads, which start in no time

    def start() -> Any:
        process = server.Process(target=embed_in_child, args=[tmp_path / "cache"])
        process.start()
        return process

    processes = [start() for _ in range(8)]
    for _ in range(20):
        time.sleep(rng.uniform(0.02, 0.12))
        victim = rng.randrange(len(processes))
        processes[victim].kill()
        processes[victim].join()
        processes[victim] = start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(log.read_text().split()) <= 40 + 20, "what was done once is not done again"
    views, store = images(160)
    log.unlink()
    found = Extractor(tmp_path / "cache", accelerator="cpu", batch_size=4, shard_rows=4, workers=0).embed(encoder(Watched()), views, store)
    assert not log.exists(), "all was there"
    np.testing.assert_array_equal(
        found.values, Extractor(tmp_path / "new", accelerator="cpu", batch_size=4, shard_rows=4).embed(encoder(Watched()), views, store).values
    )
    left = [path.name for path in (tmp_path / "cache").rglob(".*")]
    assert left == []
