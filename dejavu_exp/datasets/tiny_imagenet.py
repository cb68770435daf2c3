"""Tiny ImageNet as published: 64 x 64 px images, each with one box, in a folder or a zip archive."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dejavu_exp.datasets.annotations import Problems, location, rows_of, status_of, whole_box
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import ListedStore, published, read_needed
from dejavu_exp.errors import DataError
from dejavu_exp.tables import Status

FOLDER = "tiny-imagenet-200"
VAL_FILE = "val/val_annotations.txt"
LAYOUT = f"{FOLDER}/ with train/<class>/images/, train/<class>/<class>_boxes.txt, val/images/ and {VAL_FILE}"

# File names that begin with a dot are the system's, not the publisher's.
_IMAGE = re.compile(
    r"(?P<top>(?:.*/)?)(?:train/(?P<label>[^/]+)|val)/images/(?P<file>[^/.][^/]*\.(?:jpe?g|png))", re.IGNORECASE
)
_BOXES_FILE = re.compile(r"train/(?P<label>[^/]+)/(?P=label)_boxes\.txt")


@dataclass(frozen=True)
class TinyImagenet:
    """Origins train and val with one box an image; the test images of the publication have no labels and are left out.

    The published boxes include their last pixel; a manifest's boxes do not, so their upper ends are one higher here.
    Ids are `train/<class>/<file name>` and `val/<file name>`, wherever the data set lies.

    Attributes:
        root: the zip archive, the folder that holds tiny-imagenet-200/, or that folder itself.
    """

    root: str | Path

    def __post_init__(self) -> None:
        location(self.root, "root")

    def manifest(self) -> Manifest:
        """Read the data set; widths and heights are left to the images.

        Raises:
            DataError: the root is not there or has another layout, the zip is damaged, or there is no boxes file.
        """
        root = location(self.root, "root")
        store = published(root, FOLDER, _IMAGE, ("train", "val"), LAYOUT)
        problems = Problems()
        files = _AnnotationFiles(store, frozenset(store.names()), problems)
        train, val = _images(files.names)
        _check(root, files, train, val)
        rows = [row for label in sorted(train) for row in _train_rows(label, train[label], files)]
        wnids = files.wnids() or sorted(train)
        rows.extend(_val_rows(val, files, {*wnids, *train}))
        names = ("id", "path", "origin", "label", "boxes", "objects", "status", "detail")
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        return Manifest("tiny_imagenet", rows_of(columns), store, files.class_names(wnids), problems.sentences())


@dataclass(slots=True)
class _Note:
    """What an annotation file says of one image."""

    boxes: list[list[int]] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)
    fault: str | None = None


_Row = tuple[str, str, str, str | None, list[list[int]] | None, list[str] | None, str, str | None]


@dataclass(frozen=True)
class _AnnotationFiles:
    """The text files of the data set."""

    store: ListedStore
    names: frozenset[str]
    problems: Problems

    def lines(self, file: str) -> list[str]:
        """The lines; bytes that are not UTF-8 are replaced, so that they spoil one line only."""
        return read_needed(self.store, file).decode("utf-8-sig", errors="replace").splitlines()

    def notes(self, file: str, fields: int, images: Sequence[str]) -> dict[str, _Note]:
        """Notes by image from a tab-separated file: the name, perhaps the class, and an inclusive box at the end."""
        notes: dict[str, _Note] = {}
        known = frozenset(images)
        for number, line in enumerate(self.lines(file), start=1):
            values = [value.strip() for value in line.split("\t")]
            if values == [""]:
                continue
            if values[0] not in known:
                detail = f"line {number} names the image {values[0][:80]!r}, which is not there"
                self.problems.add("line without image", file, detail)
                continue
            note = notes.setdefault(values[0], _Note())
            note.labels.update(values[1 : fields - 4])
            try:
                note.boxes.append(_half_open(values, fields))
            except ValueError as error:
                note.fault = f"{file}, line {number}: {error}"
                self.problems.add("malformed line", file, f"line {number}: {error}, got {line[:80]!r}")
        unnamed = [name for name in images if name not in notes]
        if unnamed:
            detail = f"has no line for {len(unnamed)} of {len(images)} images, e.g. {unnamed[0]}"
            self.problems.add("image without line", file, detail)
        return notes

    def wnids(self) -> list[str]:
        """The classes that wnids.txt lists; it may list more than there are images of."""
        return [line.strip() for line in self._list("wnids.txt") if line.strip()]

    def class_names(self, wnids: Sequence[str]) -> dict[str, str]:
        """Names of those classes that words.txt knows; it lists all of WordNet."""
        words = dict(line.split("\t", 1) for line in self._list("words.txt") if "\t" in line)
        return {wnid: words[wnid].strip() for wnid in wnids if wnid in words}

    def _list(self, file: str) -> list[str]:
        if file in self.names:
            return self.lines(file)
        self.problems.add("missing list", file, "is not there, so some classes may have no name")
        return []


def _half_open(values: Sequence[str], fields: int) -> list[int]:
    if len(values) != fields:
        raise ValueError(f"a line must have {fields} fields, separated by tabs, not {len(values)}")
    try:
        xmin, ymin, xmax, ymax = (int(value) for value in values[-4:])
    except ValueError:
        raise ValueError("a box must be four whole numbers: xmin, ymin, xmax, ymax") from None
    return whole_box([xmin, ymin, xmax + 1, ymax + 1])


def _images(names: Collection[str]) -> tuple[dict[str, list[str]], list[str]]:
    """File names of the training images by class, with classes that have a boxes file alone, and of the val images."""
    train: dict[str, list[str]] = {match["label"]: [] for match in map(_BOXES_FILE.fullmatch, names) if match}
    val: list[str] = []
    for match in map(_IMAGE.fullmatch, sorted(names)):
        if match and not match["top"]:
            (val if match["label"] is None else train.setdefault(match["label"], [])).append(match["file"])
    return train, val


def _boxes_file(label: str) -> str:
    return f"train/{label}/{label}_boxes.txt"


def _check(root: Path, files: _AnnotationFiles, train: Mapping[str, Sequence[str]], val: Sequence[str]) -> None:
    """Refuse a root without images or without any boxes; one missing part is a problem."""
    trained = any(train.values())
    if not trained and not val:
        raise DataError(f"dataset.root={root}: there are no images; expected {LAYOUT}.")
    for part, found in (("train/<class>/images", trained), ("val/images", bool(val))):
        if not found:
            files.problems.add("missing part", part, "there are no images")
    wanted = [_boxes_file(label) for label in sorted(train)] if trained else [VAL_FILE]
    if not files.names.intersection(wanted):
        raise DataError(
            f"dataset.root={root}: there is no boxes file (expected {wanted[0]} and so on), so no background can be "
            "cut. Some copies of the data set leave them out; take the published archive."
        )


def _train_rows(label: str, images: Sequence[str], files: _AnnotationFiles) -> Iterator[_Row]:
    file = _boxes_file(label)
    notes: Mapping[str, _Note] = {}
    absent = f"{file} has no line for it"
    if file in files.names:
        notes = files.notes(file, 5, images)
    else:
        absent = f"{file} is not there"
        files.problems.add("missing boxes file", file, f"is not there, so {len(images)} images have no box")
    for name in images:
        yield _row(f"train/{label}/{name}", f"train/{label}/images/{name}", label, notes.get(name, _Note()), absent)


def _val_rows(images: Sequence[str], files: _AnnotationFiles, classes: Collection[str]) -> Iterator[_Row]:
    notes: Mapping[str, _Note] = {}
    absent = f"{VAL_FILE} has no line for it"
    if VAL_FILE in files.names:
        notes = files.notes(VAL_FILE, 6, images)
    elif images:
        absent = f"{VAL_FILE} is not there"
        files.problems.add("missing boxes file", VAL_FILE, f"is not there, so {len(images)} images have no label")
    for name in images:
        note = notes.get(name, _Note())
        label = next(iter(note.labels)) if len(note.labels) == 1 else None
        if label not in classes:
            label = None
        if label is None and name in notes:
            said = ", ".join(sorted(note.labels)) or "none"
            note.fault = note.fault or f"{VAL_FILE} must give it one class of wnids.txt, it gives {said}"
        yield _row(f"val/{name}", f"val/images/{name}", label, note, absent)


def _row(name: str, path: str, label: str | None, note: _Note, absent: str) -> _Row:
    boxes = note.boxes if note.boxes and note.fault is None else None
    status, detail = status_of(boxes, note.fault, absent)
    objects = [label] if label is not None and status == Status.OK else None
    return name, path, path.split("/")[0], label, boxes, objects, status, detail
