"""Any bytes at all, to everything that reads files which others wrote.

    python tests/fuzz.py [READER ...] [--seconds N] [--runs N] [--keep]

Every reader either gives what it promises or refuses with one of its own errors. Another error, five seconds for one
file, two gigabytes of memory, a program started or a file written is a finding: the status is then 1, and the input's
path is told. Put it into `tests/seeds/<reader>`, mend the fault, and `test_fuzz.py` keeps it mended. Atheris (libFuzzer
for Python) looks for inputs that reach new branches, of this package and of the libraries below it that are Python.

Seeds are the files of `tests/corpus` and of `tests/seeds/<reader>`. What is found beyond them goes to a temporary
folder; `--keep` adds the files that reach new branches to `tests/seeds`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import io
import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from PIL import Image

from dejavu_exp import images, splits, taggers
from dejavu_exp import tables as package_tables
from dejavu_exp.artefacts import files as artefacts
from dejavu_exp.datasets import headers as package_headers
from dejavu_exp.datasets import imagenet, voc, yolo
from dejavu_exp.datasets.annotations import MAX_PIXELS, Problems, rows_of
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.boxed import BoxedImages
from dejavu_exp.datasets.coco import Coco
from dejavu_exp.datasets.flickr8k import Flickr8k
from dejavu_exp.datasets.imagenet import Imagenet
from dejavu_exp.datasets.manifest import ManifestFile
from dejavu_exp.datasets.stores import MemoryStore, ZipStore
from dejavu_exp.datasets.tiny_imagenet import TinyImagenet
from dejavu_exp.datasets.webdataset import WebDataset
from dejavu_exp.encoders import weights
from dejavu_exp.errors import DataError, WeightsError
from dejavu_exp.tables import Status

CORPUS, SEEDS = Path(__file__).parent / "corpus", Path(__file__).parent / "seeds"
TIMEOUT_S, MEMORY_MB = 15, 2048
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where files are written thousands of times a second; None for the usual place of temporary ones."""
LARGEST_PICTURE_PX = 1 << 20
"""Pictures that claim more are opened and not decoded: what is large may take its time."""
LOOKED_AT = 50
"""So many members of an archive are read."""
KINDS = {70: "timeout", 71: "out of memory", 77: "crash"}
"""libFuzzer's exit codes."""
CHILD = "--child"
say = functools.partial(print, flush=True)


class Finding(Exception):  # noqa: N818
    """A reader broke a promise."""


def claim(holds: object, promise: str) -> None:
    if not holds:
        raise Finding(promise)


@dataclass(frozen=True)
class Reader:
    """One way into the package.

    Attributes:
        files: below a folder; each gets the same bytes.
        read: reads them, given the folder, and raises `Finding` where a promise is broken.
        lay: puts into the folder what else must be there.
        seeds: patterns below `tests/corpus`.
        modules: whose branches are followed beside those of this package.
    """

    files: tuple[str, ...]
    read: Callable[[Path], None]
    lay: Callable[[Path], None] = lambda folder: None
    seeds: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


# What every reader promises


@contextmanager
def may_refuse(*names: str) -> Iterator[None]:
    """A block that may end with an error that names one of the files and can be printed."""
    try:
        yield
    except (DataError, WeightsError) as error:
        claim(_printable(str(error)), "an error can be printed")
        claim(any(name in str(error) for name in names), f"an error names its file: {error}")


def _printable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def manifest_holds(manifest: Manifest) -> None:
    rows = manifest.rows
    known = {name: rows.schema[name] for name in package_tables.MANIFEST}
    claim(known == dict(package_tables.MANIFEST), "columns have their types")
    claim(rows["id"].n_unique() == len(rows) > 0, "ids are unique")
    claim(not sum(rows.select("id", "path", "origin", "status").null_count().row(0)), "no row lacks its id or status")
    claim(all(map(_printable, manifest.problems)), "problems can be printed")
    for row in rows.iter_rows(named=True):
        claim(row["status"] in [*Status], "a status is known")
        claim((row["status"] == Status.OK) == (row["detail"] is None), "a detail says why a row is not ok")
        claim(_boxes_hold(row["boxes"]) and _boxes_hold(row["tag_boxes"]), "a box has four numbers")
        claim(row["tag_boxes"] is None or len(row["tag_boxes"]) == len(row["tags"]), "each tag has one box")
        claim(all(row[side] is None or row[side] > 0 for side in ("width", "height")), "sides are positive")
        claim(row["captions"] is None or all(text.strip() for text in row["captions"]), "no caption is blank")


def _boxes_hold(boxes: Sequence[Sequence[int]] | None) -> bool:
    return all(len(box) == 4 and None not in box for box in boxes or [])


def note_holds(note: voc.Note) -> None:
    claim(_printable(note.fault or ""), "a fault can be printed")
    claim((note.boxes is None) == (note.fault is not None), "a note has boxes or a fault")
    claim(len(note.boxes or []) == len(note.names or []), "each box has its name")
    claim(_boxes_hold(note.boxes), "a box has four numbers")
    claim(all(type(end) is int and abs(end) <= MAX_PIXELS for box in note.boxes or [] for end in box), "ends are whole")


_done: list[str] | None = None
"""What was done to the world while a reader read; None while none reads."""
WORLD = re.compile(
    r"os\.(system|exec|posix_spawn|fork|forkpty|spawn|mkdir|remove|rename|rmdir|link|symlink|chmod|truncate|kill)"
    r"|subprocess\.Popen|socket\.(connect|bind|getaddrinfo)|shutil\.\w+|webbrowser\.open"
)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _done is None:
        return
    writes = event == "open" and re.search("[wax+]", str(arguments[1])) and arguments[0] != os.devnull
    if writes or WORLD.fullmatch(event):
        _done.append(f"{event} {arguments!r:.200}")


@functools.cache
def _listen() -> None:
    """Hear of programs and files, once for the process: such a hook cannot be taken away."""
    sys.addaudithook(_audit)


def check(reader: Reader, content: bytes, folder: Path) -> None:
    """Read the bytes, and raise what was not promised.

    Args:
        reader: of `READERS`.
        content: of the file.
        folder: of this reader's own, laid out by `lay`.
    """
    global _done
    _listen()
    for name in reader.files:
        # A new file: the old one may be mapped into memory.
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    _done = []
    try:
        # NumPy only warns of numbers that become others.
        with np.errstate(invalid="raise"):
            reader.read(folder)
        done = _done
    finally:
        _done = None
    claim(not done, f"reading does nothing else: {done}")


def laid(reader: Reader, folder: Path) -> Path:
    """The folder, ready for `check`."""
    for name in reader.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    reader.lay(folder)
    return folder


# Images


def read_image(folder: Path) -> None:
    content = (folder / "a.jpg").read_bytes()
    try:
        with images.opened(content) as picture:
            width, height = picture.size
            claim(width > 0 < height, "a picture has an area")
            if width * height > LARGEST_PICTURE_PX:
                return
        for decoder in images.DECODERS:
            for region in ((0, 0, width, height), (width // 2, height // 2, width, height)):
                pixels = images.decode_view(content, region, decoder)
                shape = (region[3] - region[1], region[2] - region[0], 3)
                claim(pixels.dtype == np.uint8 and pixels.shape == shape, f"{shape} bytes, not {pixels.shape}")
    except images.UNREADABLE_ERRORS:
        return
    with may_refuse("a.jpg"):
        small = images.thumbnail(MemoryStore({"a.jpg": content}), "a.jpg", (0, 0, width, height), 8)
        claim(max(Image.open(io.BytesIO(small)).size) == 8, "a thumbnail has its size")


def read_header(folder: Path) -> None:
    head = package_headers._header(folder / "a.jpg")
    claim((head.width > 0 < head.height) == (head.fault is None), "a head has a size or a fault")
    claim(head.orientation in range(1, 9), "one of eight orientations")
    claim(_printable(head.fault or ""), "a fault can be printed")


# Annotations


def lay_images(folder: Path) -> None:
    for name in ("train/dog/a.png", "train/cat/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(folder / name)


def read_voc(folder: Path) -> None:
    note = voc.read(str(folder / "train/dog/a.xml"))
    note_holds(note)
    if note.fault is not None:
        return
    with may_refuse("a.xml"):
        manifest_holds(Imagenet(folder, folder).manifest())
    with may_refuse("a.xml"):
        manifest_holds(BoxedImages(folder, folder, "voc").manifest())


def lay_yolo(folder: Path) -> None:
    lay_images(folder)
    (folder / "classes.txt").write_text("dog\ncat\n")


def read_yolo(folder: Path) -> None:
    note = yolo.read(folder / "train/dog/a.txt", {0: "dog", 1: "cat"}, 64, 48)
    note_holds(note)
    if note.fault is not None:
        return
    with may_refuse("a.txt"):
        manifest_holds(BoxedImages(folder, folder, "yolo").manifest())


def read_names(folder: Path) -> None:
    for name in ("data.yaml", "classes.txt"):
        with may_refuse(name):
            names = yolo.read_names(folder / name)
            claim(names and all(type(number) is int for number in names), "classes have whole numbers")
            claim(all(name.strip() and _printable(name) for name in names.values()), "classes have names")


def read_lists(folder: Path) -> None:
    with may_refuse("labels.txt"):
        claim(all(map(_printable, taggers.read_authors_keys(folder))), "keys can be printed")
    with may_refuse("labels.txt"):
        listing = artefacts.read_listing(folder / "labels.txt", "train")
        claim(len(listing.ids) == len(listing.labels), "each id has its label")
    with may_refuse("labels.txt"):
        found = imagenet._class_names(folder / "labels.txt", Problems())
        claim(all(label and name for label, name in found.items()), "classes have names")


def read_instances(folder: Path) -> None:
    with may_refuse("instances.json"):
        manifest_holds(BoxedImages(folder, folder / "instances.json", "coco").manifest())


def lay_coco(folder: Path) -> None:
    (folder / "train2017").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / "train2017" / name).touch()


COCO_FILES = ("annotations/captions_train2017.json", "annotations/instances_train2017.json")


def read_coco(folder: Path) -> None:
    with may_refuse(*COCO_FILES):
        manifest_holds(Coco(folder).manifest())


def lay_flickr(folder: Path) -> None:
    (folder / "Images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / "Images" / name).touch()


def read_flickr(folder: Path) -> None:
    with may_refuse("captions.txt"):
        manifest_holds(Flickr8k(folder).manifest())


def lay_tiny(folder: Path) -> None:
    for name in ("train/n1/images", "val/images"):
        (folder / name).mkdir(parents=True)
        for image in ("a.JPEG", "b.JPEG"):
            (folder / name / image).touch()


def read_tiny(folder: Path) -> None:
    with may_refuse("n1_boxes.txt"):
        manifest_holds(TinyImagenet(folder).manifest())


# Tables and arrays


def lay_pictures(folder: Path) -> None:
    for name in ("a.png", "b.png"):
        (folder / name).touch()


def read_csv(folder: Path) -> None:
    with may_refuse("t.csv", "a.png"):
        manifest_holds(ManifestFile(folder / "t.csv").manifest())


@functools.cache
def two_images() -> tuple[Manifest, pl.DataFrame]:
    """A data set of a.png and b.png, and its views."""
    names, same = ["a.png", "b.png"], {"origin": ["train"] * 2, "status": ["ok"] * 2, "label": ["dog", "cat"]}
    rows = rows_of({"id": names, "path": names, **same})
    views = rows.select("id", view_id=pl.col("id") + "#full", view=pl.lit(taggers.WHOLE))
    return Manifest("two", rows, MemoryStore({})), views


def tags_hold(tagger: taggers.Tagger) -> None:
    manifest, views = two_images()
    tags = tagger.tag(views, manifest, None, None)
    claim(tags.schema == dict(package_tables.TAGS), "columns have their types")
    claim(tags["view_id"].to_list() == views["view_id"].to_list(), "each view has its row")
    for names, scores in tags.select("tags", "scores").iter_rows():
        claim(len(names) == len(scores) and None not in names, "each tag has its score")
        claim(all(one >= other for one, other in itertools.pairwise(scores)), "strongest first")


def read_parquet(folder: Path) -> None:
    with may_refuse("t.parquet"):
        package_tables.read(folder / "t.parquet").rows()
    with may_refuse("t.parquet", "a.png"):
        manifest_holds(ManifestFile(folder / "t.parquet").manifest())
    with may_refuse("t.parquet"):
        tags_hold(taggers.PrecomputedTags(str(folder / "t.parquet")))


def lay_tags(folder: Path) -> None:
    (folder / "labels.txt").write_text("0,dog\n")


def read_tags(folder: Path) -> None:
    with may_refuse("0_dog"):
        tags_hold(taggers.PrecomputedTags(str(folder)))
    with may_refuse("0_dog_freq.json"):
        found = taggers.read_authors_frequencies(folder)
        counts = [number for tags in found.values() for numbers in tags.values() for number in numbers]
        claim(all(map(math.isfinite, counts)), "counts are finite")


def read_pickle(folder: Path) -> None:
    with may_refuse("a.pkl"):
        for row in artefacts.read_objects(folder / "a.pkl"):
            claim(all(type(item) in (int, str) and _printable(str(item)) for item in row), "whole numbers and texts")
    with may_refuse("a.pkl"):
        tags_hold(taggers.AuthorsAnnotations(str(folder / "a.pkl")))


def read_npy(folder: Path) -> None:
    path = folder / "a.npy"
    with may_refuse("a.npy"):
        split = splits.NpySplit(str(path), None, None, None, None, min_side_px=1)
        roles = split.assign(two_images()[0].rows, 0)
        claim(roles["id"].is_unique().all() and roles.schema == dict(package_tables.ROLES), "one role an image")
    with may_refuse("a.npy"):
        claim(artefacts.whole_numbers(path).dtype == np.int64, "whole numbers")
    with may_refuse("a.npy"):
        claim(artefacts.read_indices(path).ndim == 1, "one axis")
    for member in ("", "labels"):
        with may_refuse("a.npy"):
            claim(artefacts.read_neighbours(path, member).ndim == 2, "two axes")
    with may_refuse("a.npy"):
        claim(np.isfinite(artefacts.read_distances(path)).all(), "finite distances")
    with may_refuse("a.npy"):
        judged = artefacts.read_judged(path)
        claim(all(len(judged.paths) == len(column) for column in (judged.labels, judged.entropy)), "a row a crop")
        claim(all(map(_printable, judged.paths)), "paths can be printed")


# Weights


def lay_weights(folder: Path) -> None:
    """Load what is loaded once, for which torch asks the system where its libraries are."""
    import torch

    importlib.import_module("safetensors.torch")
    torch.save({"weight": torch.zeros(2, 3)}, folder / "first.pt")
    read_weights(folder / "first.pt")


def read_weights(path: Path) -> None:
    from torch import nn

    module = nn.Linear(3, 2, bias=False)
    with may_refuse(path.name):
        state = weights.as_state_dict(weights.read_checkpoint(path), path)
        claim(state and all(type(name) is str for name in state), "tensors by name")
        part, _ = weights.under_prefix(state, ["weight"], path, None, "prefix")
        weights.load_strictly(module, part, "linear", path)
    claim(module.weight.shape == (2, 3) and str(module.weight.device) == "cpu", "a module keeps its form")
    module.weight.sum().item()


def read_safetensors(folder: Path) -> None:
    read_weights(folder / "model.safetensors")


def read_torch(folder: Path) -> None:
    read_weights(folder / "model.pt")


# Archives


def read_zip(folder: Path) -> None:
    with may_refuse("flickr.zip", "captions.txt"):
        manifest_holds(Flickr8k(folder / "flickr.zip").manifest())
    with may_refuse("flickr.zip"):
        store = ZipStore(folder / "flickr.zip")
        for name in store.names()[:LOOKED_AT]:
            _read_member(store, name)


def read_tar(folder: Path) -> None:
    with may_refuse("shard.tar"):
        manifest = WebDataset(folder / "shard.tar").manifest()
        manifest_holds(manifest)
        for name in manifest.rows["path"][:LOOKED_AT]:
            _read_member(manifest.store, name)


def _read_member(store: Any, name: str) -> None:
    try:
        claim(type(store.read(name)) is bytes, "a member is bytes")
    except (OSError, KeyError):
        return


# A reader with a fault, to see that the fuzzer finds one; not among those that are fuzzed


def read_planted(folder: Path) -> None:
    content = (folder / "planted").read_bytes()
    if len(content) > 2 and content[0] == ord("d") and content[1] == ord("o") and content[2] == ord("g"):
        raise KeyError("dog")


READERS = {
    "images": Reader(("a.jpg",), read_image, seeds=("images/*",), modules=("PIL",)),
    "headers": Reader(("a.jpg",), read_header, seeds=("images/*",), modules=("PIL",)),
    "voc": Reader(("train/dog/a.xml",), read_voc, lay_images, ("xml/*",), ("defusedxml",)),
    "yolo": Reader(("train/dog/a.txt",), read_yolo, lay_yolo),
    "names": Reader(("data.yaml", "classes.txt"), read_names, modules=("yaml",)),
    "lists": Reader(("labels.txt",), read_lists),
    "instances": Reader(("instances.json",), read_instances, lay_images),
    "captions": Reader(COCO_FILES, read_coco, lay_coco),
    "flickr8k": Reader(("captions.txt",), read_flickr, lay_flickr),
    "tiny_imagenet": Reader(
        ("train/n1/n1_boxes.txt", "val/val_annotations.txt", "wnids.txt", "words.txt"), read_tiny, lay_tiny
    ),
    "csv": Reader(("t.csv",), read_csv, lay_pictures, ("tables/*.csv",)),
    "parquet": Reader(("t.parquet",), read_parquet, lay_pictures, ("tables/*.parquet",)),
    "tags": Reader(("labels/0_dog_labels.json", "frequencies/0_dog_freq.json"), read_tags, lay_tags),
    "pickles": Reader(("a.pkl",), read_pickle, modules=("pickletools",)),
    "npy": Reader(("a.npy",), read_npy, modules=("numpy.lib", "ast", "zipfile")),
    "safetensors": Reader(("model.safetensors",), read_safetensors, lay_weights, ("weights/*.safetensors",)),
    "torch": Reader(
        ("model.pt",), read_torch, lay_weights, ("weights/*.pt",),
        modules=("torch.serialization", "torch._weights_only_unpickler", "torch._utils", "zipfile"),
    ),
    "zip": Reader(("flickr.zip",), read_zip, seeds=("archives/*.zip",), modules=("zipfile",)),
    "tar": Reader(("shard.tar",), read_tar, seeds=("archives/*.tar",), modules=("tarfile",)),
}  # fmt: skip
PLANTED = {"planted": Reader(("planted",), read_planted)}


def seeds_of(name: str) -> list[Path]:
    """The files that a reader is tried with before any other."""
    reader = {**READERS, **PLANTED}[name]
    return sorted([path for pattern in reader.seeds for path in CORPUS.glob(pattern)]) + sorted(
        (SEEDS / name).glob("*")
    )


# Fuzzing: this program starts itself once for each reader


def instrument(prefixes: Iterable[str]) -> None:
    """Have every function of some modules tell which way it went."""
    import atheris

    wanted = tuple(prefixes)
    for thing in gc.get_objects():
        module = getattr(thing, "__module__", None) if isinstance(thing, types.FunctionType) else None
        if isinstance(module, str) and any(module == name or module.startswith(f"{name}.") for name in wanted):
            atheris.instrument_func(thing)


def fuzz_one(name: str, folder: Path, options: Sequence[str]) -> None:
    """Fuzz one reader in this process, which ends with it."""
    import atheris

    reader = {**READERS, **PLANTED}[name]
    place = laid(reader, Path(tempfile.mkdtemp(dir=folder)))
    for module in reader.modules:
        importlib.import_module(module)
    instrument(["dejavu_exp", "__main__", *reader.modules])
    # What libFuzzer takes for the program's path, and has a shell start once more when it merges.
    again = shlex.join([sys.executable, str(Path(__file__).resolve()), CHILD, str(folder), name, "--"])
    atheris.Setup([again, *options], lambda content: check(reader, content, place))
    atheris.Fuzz()


class Outcome(NamedTuple):
    """What came of fuzzing one reader; the kind is empty where nothing was found."""

    name: str
    kind: str
    inputs: tuple[Path, ...]
    runs: int
    rate: int
    branches: int
    told: str


@dataclass(frozen=True)
class Campaign:
    """All children of one call.

    Attributes:
        work: the temporary folder.
        seconds: for each reader.
        runs: the most for each reader; -1 for no limit.
        seed: of libFuzzer's random numbers; 0 for another in every call.
        keep: new seeds are kept.
    """

    work: Path
    seconds: int
    runs: int
    seed: int
    keep: bool
    environment: dict[str, str] = field(default_factory=lambda: {**os.environ, "TQDM_DISABLE": "1"})

    def fuzz(self, name: str) -> Outcome:
        """Fuzz one reader."""
        seeds, new, faults = self._folders(name)
        told, code = self._child(
            name,
            [
                f"-max_total_time={self.seconds}", f"-runs={self.runs}", f"-seed={self.seed}",
                f"-artifact_prefix={faults}/", f"-rss_limit_mb={MEMORY_MB}", f"-timeout={TIMEOUT_S}",
                "-len_control=0", "-print_final_stats=1", str(new), str(seeds),
            ],
        )  # fmt: skip
        if self.keep:
            self._keep(name, new)
        numbers = {key: int(number) for key, number in re.findall(r"stat::(\w+):\s+(\d+)", told)}
        branches = max([0, *map(int, re.findall(r" cov: (\d+)", told))])
        kind = KINDS.get(code, f"status {code}") if code else ""
        runs, rate = numbers.get("number_of_executed_units", 0), numbers.get("average_exec_per_sec", 0)
        return Outcome(name, kind, tuple(sorted(faults.iterdir())), runs, rate, branches, told)

    def _folders(self, name: str) -> tuple[Path, Path, Path]:
        folders = tuple(self.work / name / part for part in ("seeds", "new", "faults"))
        for folder in folders:
            folder.mkdir(parents=True)
        for number, path in enumerate(seeds_of(name)):
            shutil.copy(path, folders[0] / f"{number}-{path.name}")
        return folders[0], folders[1], folders[2]

    def _child(self, name: str, options: Sequence[str]) -> tuple[str, int]:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=IN_MEMORY) as folder:
            done = subprocess.run(
                [sys.executable, __file__, CHILD, folder, name, "--", *options],
                env=self.environment,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return done.stdout.decode(errors="replace"), done.returncode

    def _keep(self, name: str, new: Path) -> None:
        """Put the files that reach what no seed reaches into `tests/seeds`."""
        whole = self.work / name / "whole"
        shutil.copytree(self.work / name / "seeds", whole)
        before = set(whole.iterdir())
        # Without counters, which tell how often a branch is taken and would keep dozens of files of each reader.
        self._child(
            name,
            [
                "-merge=1",
                "-use_counters=0",
                f"-rss_limit_mb={MEMORY_MB}",
                f"-timeout={TIMEOUT_S}",
                str(whole),
                str(new),
            ],
        )
        (SEEDS / name).mkdir(parents=True, exist_ok=True)
        for path in set(whole.iterdir()) - before:
            shutil.copy(path, SEEDS / name / path.name[:12])


def main(arguments: Sequence[str]) -> int:
    """Fuzz readers side by side, as many as there are processors; 1 where something was found."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of files.")
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; default all")
    parser.add_argument("--seconds", type=float, default=60, help="in all, without the start of each process")
    parser.add_argument("--runs", type=int, default=-1, help="at most, of each reader")
    parser.add_argument("--seed", type=int, default=1, help="of what is tried; 0: something else in every call")
    parser.add_argument("--keep", action="store_true", help="add what reaches new branches to tests/seeds")
    asked = parser.parse_args(arguments)
    readers = asked.readers or list(READERS)
    unknown = sorted(set(readers) - {*READERS, *PLANTED})
    if unknown:
        parser.error(f"no reader {', '.join(unknown)}; there are {', '.join(READERS)}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed; it comes with the extra dev on Linux x86_64, Python 3.11 to 3.13")
    at_once = min(len(readers), os.cpu_count() or 1)
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    campaign = Campaign(work, max(1, round(asked.seconds * at_once / len(readers))), asked.runs, asked.seed, asked.keep)
    say(f"{campaign.seconds} s for each of {len(readers)} readers, {at_once} at once")
    found = False
    with ThreadPoolExecutor(at_once) as pool:
        for outcome in pool.map(campaign.fuzz, readers):
            found |= bool(outcome.kind)
            show(outcome)
    if not found:
        shutil.rmtree(work)
    return int(found)


def show(outcome: Outcome) -> None:
    line = f"{outcome.runs:8d} runs, {outcome.rate:6d} a second, {outcome.branches:6d} branches"
    say(f"{outcome.name:14}{line}  {outcome.kind or 'nothing found'}")
    if outcome.kind:
        say("\n".join([line for line in outcome.told.splitlines() if not line.startswith("#")][-60:]))
        for path in outcome.inputs:
            say(f"{outcome.kind}: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        fuzz_one(sys.argv[3], Path(sys.argv[2]), sys.argv[5:])
    else:
        sys.exit(main(sys.argv[1:]))
