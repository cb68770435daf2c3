"""The scheduler of extraction on 64 ranks, simulated, and the sums of 50 million pairs: the tables of docs/scaling.md.

`python -m benchmarks.simulate` prints them; `--write` puts them into the document. They depend on this file alone: what
was measured stands in `INPUTS`, and `--measure` measures it again, on the machine that it runs on.

The scheduler: work is cut into shards; each rank claims one by a lease file, which it rewrites as a sign of life, and
takes the next when it is done. The shard of a dead rank is taken over once its lease has not changed for the expiry,
and at once by ranks of the same host, which see that the process is gone. A slow rank keeps its own shard and no other.
"""

from __future__ import annotations

import argparse
import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dejavu_exp.tables import FloatArray

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- python -m benchmarks.simulate --write -->", "<!-- end -->"
HOUR, DAY = 3600.0, 86400.0


# The scheduler ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """Ranks that die together.

    Attributes:
        at: when, seconds.
        ranks: which.
        back: when they, or ranks in their place, start again; infinite for never.
    """

    at: float
    ranks: tuple[int, ...]
    back: float = math.inf


@dataclass(frozen=True)
class Leases:
    """How shards are claimed.

    Attributes:
        heartbeat_s: a lease is rewritten this often.
        expiry_s: an unchanged lease counts as left behind after this; counted from the last sign of life.
        claim_s: what claiming a shard takes.
        ranks_per_host: that see each other die.
    """

    heartbeat_s: float = 10.0
    expiry_s: float = 60.0
    claim_s: float = 0.1
    ranks_per_host: int = 8


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        makespan: seconds until the last shard is done; infinite where some never are.
        repeated: seconds of work lost with dead ranks, as a share of all work: what was done twice.
        unfinished: shards that are never done.
    """

    makespan: float
    repeated: float
    unfinished: int


def ideal(seconds: FloatArray, slowness: FloatArray) -> float:
    """Seconds if work could be divided at will and nothing failed: all work over the speed of all ranks.

    Args:
        seconds: shape (S,), of each shard on a rank of slowness 1.
        slowness: shape (R,), what a rank's times are multiplied by.

    >>> ideal(np.array([6.0, 6.0]), np.array([1.0, 2.0]))
    8.0
    """
    return float(seconds.sum() / (1 / slowness).sum())


@dataclass
class _Leased:
    """The state of a run with leases; events are (time, order among equal times, action, what)."""

    seconds: FloatArray
    slowness: FloatArray
    leases: Leases
    now: float = 0.0
    fresh: int = 0
    done: int = 0
    lost_work: float = 0.0
    running: dict[int, tuple[int, float]] = field(default_factory=dict)
    left: dict[int, tuple[float, int]] = field(default_factory=dict)
    """By shard of a dead rank: from when on everybody may take it, and the host that may at once."""
    alive: set[int] = field(default_factory=set)
    lives: list[int] = field(default_factory=list)
    events: list[tuple[float, int, int, str, int]] = field(default_factory=list)

    def push(self, time: float, order: int, action: str, what: int, life: int = 0) -> None:
        if time < math.inf:
            heapq.heappush(self.events, (time, order, what, action, life))

    def host(self, rank: int) -> int:
        return rank // self.leases.ranks_per_host

    def claim(self, rank: int) -> None:
        """Take the first shard left behind that this rank may have, else the next fresh one."""
        free = [shard for shard, (when, host) in self.left.items() if when <= self.now or host == self.host(rank)]
        if free:
            shard = min(free)
            del self.left[shard]
        elif self.fresh < len(self.seconds):
            shard, self.fresh = self.fresh, self.fresh + 1
        else:
            return
        self.running[rank] = (shard, self.now)
        taken = self.leases.claim_s + self.seconds[shard] * self.slowness[rank]
        self.push(self.now + taken, 0, "finish", rank, self.lives[rank])

    def finish(self, rank: int, life: int) -> None:
        if life == self.lives[rank]:
            del self.running[rank]
            self.done += 1
            self.claim(rank)

    def lose(self, loss: Loss) -> None:
        """Ranks die; their shards wait for the expiry, or for a rank of the same host."""
        died = [rank for rank in loss.ranks if rank in self.alive]
        self.alive -= set(died)
        for rank in died:
            self.lives[rank] += 1
            self.push(loss.back, 2, "start", rank)
            if rank not in self.running:
                continue
            shard, since = self.running.pop(rank)
            self.lost_work += (self.now - since) / self.slowness[rank]
            beat = self.now - (self.now - since) % self.leases.heartbeat_s
            seen = any(self.host(other) == self.host(rank) for other in self.alive)
            self.left[shard] = (beat + self.leases.expiry_s, self.host(rank) if seen else -1)
            self.push(beat + self.leases.expiry_s, 3, "look", shard)
        self.look()

    def look(self) -> None:
        """Ranks without work look again."""
        for rank in sorted(self.alive - set(self.running)):
            self.claim(rank)

    def start(self, rank: int) -> None:
        self.alive.add(rank)
        self.claim(rank)


def leased(seconds: FloatArray, slowness: FloatArray, losses: Sequence[Loss], leases: Leases) -> Outcome:
    """A run in which ranks claim shards by leases.

    Args:
        seconds: shape (S,), of each shard on a rank of slowness 1.
        slowness: shape (R,), what a rank's times are multiplied by; infinite for one that hangs and still gives signs
            of life.
        losses: what dies and when.
        leases: how shards are claimed.
    """
    ranks = range(len(slowness))
    run = _Leased(seconds, slowness, leases, lives=[0] * len(slowness))
    for number, loss in enumerate(losses):
        run.push(loss.at, 1, "lose", number)
    for rank in ranks:
        run.start(rank)
    while run.events and run.done < len(seconds):
        run.now, _, what, action, life = heapq.heappop(run.events)
        if action == "finish":
            run.finish(what, life)
        elif action == "lose":
            run.lose(losses[what])
        elif action == "start":
            run.start(what)
        else:
            run.look()
    unfinished = len(seconds) - run.done
    return Outcome(math.inf if unfinished else run.now, run.lost_work / float(seconds.sum()), unfinished)


def static(seconds: FloatArray, slowness: FloatArray, losses: Sequence[Loss]) -> Outcome:
    """A run in which rank r of R has shards r, r + R, ..., as DistributedSampler deals rows; finished ones are kept.

    A dead rank goes on with its own shards once it is back; nobody takes them over. Arguments as for `leased`.
    """
    ranks = len(slowness)
    makespan, lost, unfinished = 0.0, 0.0, 0
    for rank in range(ranks):
        own, now = seconds[rank::ranks] * slowness[rank], 0.0
        hits = sorted((loss.at, loss.back) for loss in losses if rank in loss.ranks)
        left = len(own)
        for taken in own:
            for at, back in hits:
                if now <= at < now + taken:
                    lost += (at - now) / slowness[rank]
                    now = back
            now += taken
            if now == math.inf:
                break
            left -= 1
        unfinished += left
        makespan = max(makespan, now if len(own) else 0.0)
    return Outcome(makespan, lost / float(seconds.sum()), unfinished)


def barrier(seconds: FloatArray, slowness: FloatArray, losses: Sequence[Loss]) -> Outcome:
    """A run in which all ranks wait for each other after every shard, as they do where batches are gathered.

    A loss ends the step for all; it is done again once the lost ranks are back. Arguments as for `leased`.
    """
    ranks = len(slowness)
    hits = sorted((loss.at, loss.back) for loss in losses)
    now, lost = 0.0, 0.0
    for start in range(0, len(seconds), ranks):
        step = seconds[start : start + ranks] * slowness[: len(seconds) - start]
        for at, back in hits:
            if now <= at < now + step.max():
                lost += float((np.minimum(at - now, step) / slowness[: len(step)]).sum())
                now = back
        now += float(step.max())
        if now == math.inf:
            return Outcome(now, lost / float(seconds.sum()), len(seconds) - start)
    return Outcome(now, lost / float(seconds.sum()), 0)


# What happens to a job ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What a cluster does to a job of `nodes` times `ranks_per_node` ranks.

    Attributes:
        name: in the table.
        nodes: hosts.
        ranks_per_node: ranks a host.
        spread: standard deviation of the logarithm of shard times.
        slow_share: share of the ranks that are slow.
        slow_factor: how many times slower.
        losses_per_hour: of each node; far above what is published for real clusters, to see an effect in minutes.
        back_after: seconds until a lost node is replaced; infinite for never.
        preemptions: when the whole job is stopped, as shares of the ideal time.
        restart_s: seconds from a preemption to the new start.
    """

    name: str
    nodes: int = 8
    ranks_per_node: int = 8
    spread: float = 0.2
    slow_share: float = 0.0
    slow_factor: float = 1.0
    losses_per_hour: float = 0.0
    back_after: float = math.inf
    preemptions: tuple[float, ...] = ()
    restart_s: float = 120.0

    @property
    def ranks(self) -> int:
        """In all."""
        return self.nodes * self.ranks_per_node

    def draw(
        self, shards: int, mean_s: float, rng: np.random.Generator
    ) -> tuple[FloatArray, FloatArray, list[Loss], float]:
        """Shard times, slowness of ranks, losses, and the ideal time; seconds."""
        seconds = mean_s * np.exp(rng.normal(-(self.spread**2) / 2, self.spread, shards))
        slowness = np.ones(self.ranks)
        slowness[rng.permutation(self.ranks)[: round(self.slow_share * self.ranks)]] = self.slow_factor
        best = ideal(seconds, slowness)
        losses = [
            Loss(share * best, tuple(range(self.ranks)), share * best + self.restart_s) for share in self.preemptions
        ]
        for node in range(self.nodes):
            ranks = tuple(range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node))
            now = 0.0
            while self.losses_per_hour and now < 20 * best:
                now += rng.exponential(HOUR / self.losses_per_hour)
                losses.append(Loss(now, ranks, now + self.back_after))
                now += self.back_after
        return seconds, slowness, losses, best


CALM = World("equal ranks, times vary by 20 %")
ALL = World(
    "all of it",
    spread=0.5,
    slow_share=0.05,
    slow_factor=3.0,
    losses_per_hour=1.0,
    back_after=300.0,
    preemptions=(0.5,),
)
WORLDS = (
    CALM,
    replace(CALM, name="times vary by 50 %", spread=0.5),
    replace(CALM, name="5 % of the ranks 3 times slower", slow_share=0.05, slow_factor=3.0),
    replace(CALM, name="1 rank 10 times slower", slow_share=1 / 64, slow_factor=10.0),
    replace(CALM, name="1 loss per node and hour, replaced after 5 min", losses_per_hour=1.0, back_after=300.0),
    replace(CALM, name="1 loss per node and hour, not replaced", losses_per_hour=1.0),
    replace(CALM, name="preempted twice, started again after 2 min", preemptions=(1 / 3, 2 / 3)),
    ALL,
)
DRAWS = 10
SHARD_ROWS = 8192
"""Rows a shard in the comparison of schedulers."""


# The sums -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """A number that the sums start from."""

    value: float
    unit: str
    source: str


MEASURED = "measured, one core of an AMD EPYC of two: `python -m benchmarks.simulate --measure`"
ASSUMED = "assumed"
INPUTS: Mapping[str, Input] = {
    "pairs": Input(50e6, "image-text pairs", "the question"),
    "bank": Input(10e6, "public images of them", "the question"),
    "queries": Input(20e6, "measured captions, target and unseen", "the question"),
    "nodes": Input(8, "nodes", "the question"),
    "gpus": Input(64, "GPUs", "the question"),
    "cores": Input(96, "CPU cores a node", f"{ASSUMED}: a usual node of 8 GPUs"),
    "image": Input(
        163e3, "bytes an image", "COCO train2017 as published: 18 GiB in 118,287 files of about 640 x 480 px"
    ),
    "caption": Input(60, "bytes a caption", f"{ASSUMED}: a dozen words"),
    "storage": Input(10e9, "bytes/s that a shared file system gives all nodes", ASSUMED),
    "peak": Input(312e12, "FLOP/s a GPU, bfloat16, dense", "NVIDIA A100 data sheet"),
    "peak_h100": Input(989e12, "the same of an H100 SXM", "NVIDIA H100 data sheet"),
    "use": Input(
        0.4,
        "share of the peak that a ViT reaches",
        f"{ASSUMED}; timm's published benchmark (results/benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv) has "
        "vit_large_patch14_clip_224 at 658 images/s, 0.65 of the 165 TFLOP/s of an RTX 4090",
    ),
    "use_detector": Input(
        0.2, "share of the peak that a detector reaches", f"{ASSUMED}; published on a T4: 0.23 (108 images/s, TensorRT)"
    ),
    "flop_image": Input(162e9, "FLOP an image, ViT-L/14, 224 px", "open_clip's docs/model_profile.csv: 162.03"),
    "flop_text": Input(13.3e9, "FLOP a caption, its text tower", "the same file: 13.30"),
    "flop_detector": Input(136e9, "FLOP an image, RT-DETR R50, 640 px", "PaddleDetection, configs/rtdetr"),
    "decode": Input(135, "images/s a core: JPEG to 224 px tensor", MEASURED),
    "inspect": Input(3000, "images/s a core: hash of the file and size of the image", MEASURED),
    "hash": Input(1300000.0, "views/s a core: hash of a table of views", MEASURED),
    "row": Input(20, "bytes a row of a table of views, Parquet", MEASURED),
    "search": Input(65000000000.0, "FLOP/s a core: exact search, width 768", MEASURED),
    "votes": Input(120000.0, "rows/s a core: votes of 100 neighbours, 1,000 labels", MEASURED),
    "bayes": Input(13000.0, "rows/s a core: naive Bayes, 5 tags, 1,000 labels", MEASURED),
    "bootstrap": Input(38000000.0, "rows x resamples a second and core: accuracies at 3 confident shares", MEASURED),
}


def number(name: str) -> float:
    """The value of an input."""
    return INPUTS[name].value


@dataclass(frozen=True)
class Step:
    """A step of a run on all pairs.

    Attributes:
        name: what is done.
        seconds: as the code does it today.
        where: on what.
        formula: of the seconds.
    """

    name: str
    seconds: float
    where: str
    formula: str


def steps(inputs: Mapping[str, Input] = INPUTS) -> list[Step]:
    """All steps, in the order of a run."""
    of = {name: given.value for name, given in inputs.items()}
    cores, gpus = of["nodes"] * of["cores"], of["gpus"]
    flops, detector = gpus * of["peak"] * of["use"], gpus * of["peak"] * of["use_detector"]
    distances = 2 * of["queries"] * of["bank"] * 768
    everywhere, on_gpus, alone = f"{cores:.0f} cores", f"{gpus:.0f} GPUs", "one core"
    return [
        Step("look at every file once", of["pairs"] / of["inspect"], alone, "pairs / inspect"),
        Step("key of a request", of["pairs"] / of["hash"], alone, "pairs / hash, for each encoder"),
        Step("read the images", of["pairs"] * of["image"] / of["storage"], "storage", "pairs x image / storage"),
        Step("decode", of["pairs"] / (of["decode"] * cores), everywhere, "pairs / (decode x cores x nodes)"),
        Step(
            "embed images", of["pairs"] * of["flop_image"] / flops, on_gpus, "pairs x flop_image / (gpus x peak x use)"
        ),
        Step("embed captions", of["pairs"] * of["flop_text"] / flops, on_gpus, "the same with flop_text"),
        Step("tag, detector", of["pairs"] * of["flop_detector"] / detector, on_gpus, "the same with use_detector"),
        Step("tag, zero-shot", of["pairs"] * of["flop_image"] / flops, on_gpus, "as embed images"),
        Step(
            "search, one node",
            distances / (of["search"] * of["cores"]),
            f"{of['cores']:.0f} cores",
            "2 x queries x bank x 768 / (search x cores)",
        ),
        Step("search, all nodes", distances / (of["search"] * cores), everywhere, "the same / nodes"),
        Step("search, GPUs", distances / flops, on_gpus, "2 x queries x bank x 768 / (gpus x peak x use)"),
        Step(
            "votes",
            of["queries"] / (of["votes"] * of["cores"]),
            f"{of['cores']:.0f} cores",
            "queries / (votes x cores)",
        ),
        Step("naive Bayes", of["queries"] / of["bayes"], alone, "queries / bayes"),
        Step(
            "1,000 bootstrap resamples",
            1000 * of["queries"] / (of["bootstrap"] * of["cores"]),
            f"{of['cores']:.0f} cores",
            "1000 x queries / (bootstrap x cores)",
        ),
    ]


# What the sums start from, measured ----------------------------------------------------------------------------------


def measure() -> dict[str, float]:
    """The measured inputs on this machine, for one core."""
    import torch

    from dejavu_exp import neighbours

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    found = {**_measure_images(), **_measure_tables(), **_measure_scores(rng)}
    bank, queries = rng.normal(size=(50_000, 768)).astype(np.float32), rng.normal(size=(1_000, 768)).astype(np.float32)
    found["search"] = 2 * bank.size * len(queries) / _cpu_seconds(lambda: neighbours.search(queries, bank, 100))
    return found


def _cpu_seconds(action: Callable[[], object], tries: int = 3) -> float:
    """The best of several tries; of the processor, so that neither threads nor other programs count."""
    found = []
    for _ in range(tries):
        start = time.process_time()
        action()
        found.append(time.process_time() - start)
    return min(found)


def _measure_images() -> dict[str, float]:
    """A picture as large as COCO's, in pixels and in bytes."""
    import io

    from PIL import Image, ImageFilter
    from torchvision import transforms

    from dejavu_exp import images
    from dejavu_exp.datasets.annotations import rows_of
    from dejavu_exp.datasets.stores import MemoryStore

    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (480, 640, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    stream = io.BytesIO()
    noise.save(stream, "JPEG", quality=90)
    content = stream.getvalue()
    shown = transforms.Compose([transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor()])
    names = [f"{row}.jpg" for row in range(2000)]
    rows = rows_of({"id": names, "path": names, "origin": ["train"] * 2000, "status": ["ok"] * 2000})
    store = MemoryStore(dict.fromkeys(names, content))
    looked = _cpu_seconds(lambda: images.inspect(rows, store))
    decoded = _cpu_seconds(lambda: [shown(images.decode(content)) for _ in range(50)])
    return {"image in the test": float(len(content)), "decode": 50 / decoded, "inspect": 2000 / looked}


def _measure_tables() -> dict[str, float]:
    """A table of views of 100,000 images."""
    import tempfile

    import polars as pl

    from dejavu_exp import provenance, tables

    count = 100_000
    names = [f"train/{row:012d}.jpg" for row in range(count)]
    columns = {name: pl.Series([None] * count, dtype=dtype) for name, dtype in tables.VIEWS.items()}
    hashes = [provenance.hash_bytes(name.encode()) for name in names]
    given = {"view_id": names, "id": names, "path": names, "content": hashes, "status": ["ok"] * count}
    given |= {"view": ["full"] * count, "role": ["target"] * count}
    regions = {"xmin": 0, "ymin": 0, "xmax": 640, "ymax": 480}
    views = pl.DataFrame(columns | {name: pl.Series(value) for name, value in given.items()}).with_columns(
        pl.lit(value, dtype=pl.Int32).alias(name) for name, value in regions.items()
    )
    wanted = views.select("view_id", "path", "content", *regions)
    with tempfile.TemporaryDirectory() as folder:
        tables.write(views, Path(folder) / "views.parquet")
        size = (Path(folder) / "views.parquet").stat().st_size
    return {"hash": count / _cpu_seconds(lambda: provenance.hash_table(wanted)), "row": size / count}


def _measure_scores(rng: np.random.Generator) -> dict[str, float]:
    """Votes, naive Bayes and the bootstrap."""
    from dejavu_exp import metrics, neighbours, statistics
    from dejavu_exp.references import naive_bayes

    rows, labels = 20_000, [f"{label:04d}" for label in range(1_000)]
    codes, ids = rng.integers(0, 1_000, (rows, 100)), [str(row) for row in range(rows)]
    tags = [f"tag{tag}" for tag in range(4_585)]
    found = [[tags[tag] for tag in row] for row in rng.integers(0, 4_585, (rows, 5))]
    truth = [labels[label] for label in rng.integers(0, 1_000, rows)]
    correct, sure = rng.integers(0, 2, rows), rng.random(rows)

    def accuracies(weights: FloatArray) -> FloatArray:
        return metrics.confident_means(correct, sure, [1.0, 0.2, 0.05], weights)

    resample: Callable[[], object] = lambda: statistics.bootstrap(accuracies, rows, 100, np.random.default_rng(0))  # noqa: E731
    return {
        "votes": rows / _cpu_seconds(lambda: neighbours.vote(ids, codes, labels, "lowest_label")),
        "bayes": rows / _cpu_seconds(lambda: naive_bayes.posterior(found, truth, found, labels, 1.0, None)),
        "bootstrap": 100 * rows / _cpu_seconds(resample),
    }


# The document -------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def schedulers() -> str:
    """Makespans of the three schedulers in every world."""
    rows = []
    for world in WORLDS:
        runs: dict[str, list[tuple[float, float]]] = {"leases": [], "static": [], "barrier": []}
        for seed in range(DRAWS):
            seconds, slowness, losses, best = world.draw(*_job(SHARD_ROWS), np.random.default_rng(seed))
            leases = Leases(ranks_per_host=world.ranks_per_node)
            for name, outcome in (
                ("leases", leased(seconds, slowness, losses, leases)),
                ("static", static(seconds, slowness, losses)),
                ("barrier", barrier(seconds, slowness, losses)),
            ):
                runs[name].append((outcome.makespan / best, outcome.repeated))
        rows.append([world.name, *(cell for found in runs.values() for cell in _cells(found))])
    head = [f"{name}, {what}" for name in ("leases", "static", "barrier") for what in ("time", "done twice")]
    return table(["world", *head], rows)


def _job(shard_rows: int) -> tuple[int, float]:
    """Shards of all pairs, and the seconds of one on a GPU."""
    rate = number("peak") * number("use") / number("flop_image")
    return math.ceil(number("pairs") / shard_rows), shard_rows / rate


def _cells(found: Sequence[tuple[float, float]]) -> tuple[str, str]:
    times, repeated = zip(*found, strict=True)
    if math.inf in times:
        return f"never ends in {times.count(math.inf)} of {len(times)} draws", f"{100 * np.mean(repeated):.1f} %"
    return f"{np.mean(times):.2f} (up to {max(times):.2f})", f"{100 * np.mean(repeated):.1f} %"


def shard_sizes() -> str:
    """What the size of a shard and the expiry of a lease do, with everything going wrong."""
    rows = []
    for shard_rows in (1024, 4096, 16384, 65536, 262144):
        for expiry in (60.0, 600.0):
            found = []
            for seed in range(3):
                seconds, slowness, losses, best = ALL.draw(*_job(shard_rows), np.random.default_rng(seed))
                outcome = leased(seconds, slowness, losses, Leases(expiry_s=expiry))
                found.append((outcome.makespan / best, outcome.repeated))
            shards, mean = _job(shard_rows)
            rows.append([f"{shard_rows:,}", f"{shards:,}", f"{mean:.1f} s", f"{expiry:.0f} s", *_cells(found)])
    return table(["rows a shard", "shards", "a shard takes", "expiry", "time", "done twice"], rows)


def inputs() -> str:
    """What the sums start from."""
    rows = [[name, f"{given.value:.4g}", given.unit, given.source] for name, given in INPUTS.items()]
    return table(["name", "value", "unit", "where from"], rows)


def sizes() -> str:
    """Bytes on disk and in memory."""
    pairs = number("pairs")
    rows = [
        ("images", pairs * number("image"), "pairs x image"),
        ("captions", pairs * number("caption"), "pairs x caption"),
        *(
            (f"embeddings, width {width}, float{bits}", pairs * width * bits / 8, f"pairs x {width} x {bits // 8}")
            for width in (512, 768)
            for bits in (16, 32)
        ),
        ("a table of views", pairs * number("row"), "pairs x row"),
        ("the bank in memory, width 768, float32", number("bank") * 768 * 4, "bank x 768 x 4"),
    ]
    return table(["what", "bytes", "formula"], [[name, _size(size), formula] for name, size, formula in rows])


def _size(size: float) -> str:
    return f"{size / 1e12:.2f} TB" if size >= 1e12 else f"{size / 1e9:.1f} GB"


def hours() -> str:
    """Hours of each step."""
    rows = [[step.name, _time(step.seconds), step.where, step.formula] for step in steps()]
    return table(["step", "time", "on", "formula"], rows)


def _time(seconds: float) -> str:
    return f"{seconds / HOUR:.1f} h" if seconds >= HOUR else f"{seconds / 60:.1f} min"


CHANGES: Sequence[tuple[str, Mapping[str, float]]] = (
    ("as above", {}),
    ("H100 instead of A100", {"peak": INPUTS["peak_h100"].value}),
    ("storage of 2 GB/s", {"storage": 2e9}),
    ("storage of 50 GB/s", {"storage": 50e9}),
    ("16 cores a node", {"cores": 16}),
    ("a bank of 1 million", {"bank": 1e6}),
    ("images of 24 kB (256 px)", {"image": 24e3}),
)


def binding() -> str:
    """The longest of the steps of each kind, and what changes it."""
    rows = []
    for name, changed in CHANGES:
        given = {**INPUTS, **{key: replace(INPUTS[key], value=value) for key, value in changed.items()}}
        found = steps(given)
        alone = max((step for step in found if step.where == "one core"), key=lambda step: step.seconds)
        spread = [step for step in found if step.name in ("read the images", "decode", "embed images", "tag, detector")]
        longest = max(spread, key=lambda step: step.seconds)
        search = next(step for step in found if step.name == "search, one node")
        rows.append([name, *(f"{step.name}: {_time(step.seconds)}" for step in (longest, search, alone))])
    return table(["", "longest of extraction, all nodes", "search by CPU", "longest of one core"], rows)


def render() -> str:
    """All tables, with their headings."""
    parts = {
        "What the sums start from": inputs(),
        "Bytes": sizes(),
        "Time of each step": hours(),
        "The step that binds, and what changes it": binding(),
        "The scheduler against others": schedulers(),
        "Size of a shard, and expiry of a lease": shard_sizes(),
    }
    return "\n\n".join(f"### {title}\n\n{part}" for title, part in parts.items())


def insert(document: str, text: str) -> str:
    """The document with the text between the two marks."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    """Print the tables, write them into the document, or measure what they start from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scaling.md")
    parser.add_argument("--measure", action="store_true", help="measure the measured inputs on this machine")
    arguments = parser.parse_args()
    if arguments.measure:
        print("\n".join(f"{name}: {value:.4g}" for name, value in measure().items()))
        return
    text = render()
    print(text)
    if arguments.write:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
