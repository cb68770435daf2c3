"""Several processes of one run: own children, torchrun's and SLURM's places, death, and the same bytes always."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import SMALL, Finished, measure
from test_extract import encoder, images
from torch import nn

from dejavu_exp import neighbours, ranks
from dejavu_exp.encoders import LoadedEncoder, TimmEncoder
from dejavu_exp.errors import DataError
from dejavu_exp.extract import Extractor
from dejavu_exp.ranks import Place
from dejavu_exp.shards import Embeddings

HERE = str(Path(__file__).parent)
IMPORTABLE: dict[str, Any] = {"PYTHONPATH": HERE, "DEJAVU_TARGETS": "test_ranks"}
"""The environment of runs whose encoder is defined here."""


class Watched(nn.Module):
    """Mean of each channel; writes down who asked. One process may wait until another has begun."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        log, until = Path(os.environ["BATCHES"]), time.monotonic() + 120
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        while os.environ.get("PATIENT") == str(os.getpid()) and len(set(log.read_text().split())) == 1:
            assert time.monotonic() < until, "no other process has begun"
            time.sleep(0.01)
        time.sleep(float(os.environ.get("PAUSE", "0")))
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


def test_children_share_the_shards_and_the_search(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_helper_that_dies_costs_its_shard_only(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    children = []

    def fail() -> None:
        with ranks.joined(2, shared.cache):
            shared.embed(encoder(Watched()), views, store)
            children.extend(ranks.here()._children)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert children
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
    # Lightning leaves it set in a process that trained on several ranks.
    monkeypatch.delenv("MASTER_PORT", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    ranks.place.cache_clear()
    try:
        assert ranks.place() == expected
        assert "MASTER_PORT" not in os.environ, "Lightning would take it as said to itself"
    finally:
        ranks.place.cache_clear()


def test_a_rank_that_finds_nobody_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MEET_S", 1)
    monkeypatch.setattr(ranks, "place", lambda: Place(1, 2, address="127.0.0.1", port=1))
    with (
        pytest.raises(DataError, match=r"rank 1 of 2 cannot reach rank 0 at 127\.0\.0\.1:1"),
        ranks.joined(1, tmp_path),
    ):
        pass


def test_helpers_read_nothing_but_what_rank_0_of_this_user_wrote(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(DataError, match="it is not read"):
        ranks.Ranks(Place(), tmp_path / "ranks")._load(elsewhere, ["000000.pkl"])


def job(cache: Path) -> Extractor:
    return Extractor(cache, accelerator="cpu", batch_size=4, shard_rows=8, workers=0)


def embed_all(cache: Path) -> Embeddings:
    views, store = images(800)
    return job(cache).embed(encoder(Watched()), views, store)


@pytest.mark.slow
def test_eight_jobs_on_one_cache_extract_once_whoever_is_killed(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They start at once; twenty random kills; nothing is damaged, left behind, or waited for in vain."""
    rng, cache = random.Random(1), tmp_path / "cache"
    monkeypatch.setenv("PAUSE", "0.2")
    command = "import sys, pathlib, test_ranks; test_ranks.embed_all(pathlib.Path(sys.argv[1]))"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", command, str(cache)], stderr=subprocess.DEVNULL)

    processes, until = [start() for _ in range(8)], time.monotonic() + 200
    for kill in range(20):
        # Every second victim is one that works, others are at their start or wait.
        while not log.exists() or len(log.read_text().split()) < 5 * kill:
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        working = [number for number, process in enumerate(processes) if str(process.pid) in log.read_text().split()]
        victim = rng.choice(working) if kill % 2 and working else rng.randrange(len(processes))
        processes[victim].kill()
        processes[victim].wait()
        processes[victim] = start()
    assert [process.wait(timeout=200) for process in processes] == [0] * 8
    assert 200 <= len(log.read_text().split()) <= 200 + 20 * 2, "what was done once is not done again"
    monkeypatch.setenv("PAUSE", "0")
    log.unlink()
    found = embed_all(cache)
    assert not log.exists(), "all was there"
    np.testing.assert_array_equal(found.values, embed_all(tmp_path / "new").values)
    assert [path.name for path in cache.rglob(".*")] == []


@dataclass(frozen=True)
class PatientEncoder:
    """A timm model of random weights, of which rank 0 waits until another rank has begun.

    Attributes:
        arch: timm's name.
    """

    reads: ClassVar[frozenset[str]] = TimmEncoder.reads
    arch: str

    def check(self) -> None:
        TimmEncoder(self.arch, weights="random").check()

    def load(self) -> LoadedEncoder:
        loaded = TimmEncoder(self.arch, weights="random").load()
        return replace(loaded, module=Patient(loaded.module))


class Patient(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.watched = module, Watched()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        here = ranks.here().place
        if here.rank == 0 and here.size > 1:
            os.environ["PATIENT"] = str(os.getpid())
        self.watched(pixels)
        embedded: torch.Tensor = self.module(pixels)
        return embedded


SHARED = (
    *(value for value in SMALL if not value.startswith("model.")),
    "model=efficientnet_lite0",
    "model._target_=test_ranks.PatientEncoder",
    "~model.weights",
    "~model.output",
    "model.arch=test_resnet.r160_in1k",
    "reference=[naive_bayes,class_prior,crop_classifier]",
    "trainer.batch_size=8",
    "trainer.shard_rows=8",
    "trainer.workers=0",
)
"""A run of many small shards in which every rank gets some."""


def run_shared(folder: Path, *more: str, pause: str = "0") -> Finished:
    return measure(folder, *SHARED, *more, **IMPORTABLE, BATCHES=str(folder / "log"), PAUSE=pause)


def figures(run: Finished) -> dict[str, Any]:
    """What must not depend on how a run was done: all but its times."""
    assert run.code == 0, run.stderr
    found: dict[str, Any] = run.figures()
    del found["run"]["seconds"], found["run"]["created"]
    return found


def workers(folder: Path) -> Counter[str]:
    """Batches by process."""
    return Counter((folder / "log").read_text().split())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_shared(tmp_path_factory.mktemp("one"))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_any_number_of_ranks_gives_the_same_figures(devices: int, one_rank: Finished, tmp_path: Path) -> None:
    several = run_shared(tmp_path, f"trainer.devices={devices}", pause="0.2")
    assert figures(several) == figures(one_rank)
    assert several.scores().equals(one_rank.scores())
    assert len(workers(tmp_path)) > 1
    assert workers(tmp_path).total() == workers(one_rank.folder).total(), "each batch was embedded once"


@pytest.mark.slow
def test_torchrun_gives_the_same_figures(one_rank: Finished, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dejavu_exp"]
    # One thread a process is torchrun's default, and another number trains other weights of the crop classifier.
    threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    places = {"DEJAVU_CACHE": str(tmp_path / "cache"), **IMPORTABLE, "BATCHES": str(tmp_path / "log")}
    done = subprocess.run(
        [*run, f"hydra.run.dir={tmp_path}", *SHARED],
        env={**os.environ, **places, "OMP_NUM_THREADS": threads},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert figures(Finished(done.returncode, tmp_path, done.stdout, done.stderr)) == figures(one_rank)
    assert len(workers(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 0", "helper"])
def test_a_run_of_which_a_rank_is_killed_goes_on_to_the_same_figures(
    victim: str, one_rank: Finished, tmp_path: Path
) -> None:
    places = {"DEJAVU_CACHE": str(tmp_path / "cache"), **IMPORTABLE, "BATCHES": str(tmp_path / "log")}
    first = subprocess.Popen(
        [sys.executable, "-m", "dejavu_exp", *SHARED, "trainer.devices=2", f"hydra.run.dir={tmp_path}"],
        cwd=tmp_path,
        env={**os.environ, **places, "PAUSE": "0.2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 200
    while not (tmp_path / "log").exists() or not (helper := set(workers(tmp_path)) - {str(first.pid)}):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(first.pid if victim == "rank 0" else int(helper.pop()), signal.SIGKILL)
    assert first.wait(timeout=200) == (-signal.SIGKILL if victim == "rank 0" else 0), "a dead helper ends nothing"
    again = run_shared(tmp_path, "trainer.devices=2")
    assert figures(again) == figures(one_rank)
    assert workers(tmp_path).total() <= workers(one_rank.folder).total() + 2, "at most the batch of each rank was lost"
    assert not list((tmp_path / "cache").rglob(".*.lease.*"))
