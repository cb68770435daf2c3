"""COCO 2017 as published: images with five captions each and boxes of 80 categories, in a folder or a zip archive."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dejavu_exp.datasets import instances
from dejavu_exp.datasets.annotations import (
    IMAGE_SUFFIXES,
    Problems,
    captions_of,
    location,
    rows_of,
    status_of,
    storable,
)
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import ListedStore, published, read_needed
from dejavu_exp.errors import DataError

FOLDER = "coco"
ORIGINS = ("train", "val")
LAYOUT = f"{FOLDER}/ with {{train,val}}2017/*.jpg and annotations/{{captions,instances}}_{{train,val}}2017.json"

_CAPTIONS = re.compile(r"(?P<top>(?:.*/)?)annotations/captions_(?:train|val)2017\.json")


@dataclass(frozen=True)
class Coco:
    """Origins train and val with all captions of an image and the names of the objects in it. No row has a label.

    Captions stand in the order of the annotation file. Objects are the names of all categories that are annotated in
    the image, sorted, each once; groups marked as a crowd count as well. They are empty where the instances file lists
    none for the image, and null where there is no such file. Boxes, of crowds too, are rounded outwards.
    Ids are `train2017/<file name>` and `val2017/<file name>`, wherever the data set lies.

    An image that the captions file lists and that is not there keeps its row, and is unreadable later; of a part
    without any image nothing is listed. An image that no file lists keeps a row without captions and objects.

    Attributes:
        root: the zip archive, the folder that holds coco/, or that folder itself.
    """

    root: str | Path

    def __post_init__(self) -> None:
        location(self.root, "root")

    def manifest(self) -> Manifest:
        """Read the data set.

        Raises:
            DataError: the root is not there or has another layout, a JSON file cannot be read or has another form, or
                there is no image.
        """
        root = location(self.root, "root")
        store = published(root, FOLDER, _CAPTIONS, ("annotations",), LAYOUT)
        problems = Problems()
        names = frozenset(store.names())
        rows = [row for origin in ORIGINS for row in _Part(origin, store, names, problems).rows()]
        if not rows:
            raise DataError(f"dataset.root={root}: there are no images with captions; expected {LAYOUT}.")
        columns = dict(zip(_Row._fields, zip(*rows, strict=True), strict=True))
        return Manifest("coco", rows_of({**columns, "path": columns["id"]}), store, {}, problems.sentences())


class _Row(NamedTuple):
    id: str
    origin: str
    width: int | None
    height: int | None
    boxes: list[list[int]] | None
    captions: list[str] | None
    objects: list[str] | None
    status: str
    detail: str | None


class _Listing(NamedTuple):
    """The images that a captions file lists: file names by id, and width and height by file name."""

    names: dict[int | str, str]
    sizes: dict[str, tuple[int | None, int | None]]


@dataclass(slots=True)
class _Objects:
    """What the instances file says of one image."""

    names: set[str] = field(default_factory=set)
    boxes: list[list[int]] = field(default_factory=list)
    fault: str | None = None


@dataclass(frozen=True)
class _Part:
    """One part of the data set: its images and its two annotation files."""

    origin: str
    store: ListedStore
    files: frozenset[str]
    problems: Problems

    def rows(self) -> Iterator[_Row]:
        """The rows of all images that are listed or there; none where no image is there, or no captions file."""
        folder, file = f"{self.origin}2017/", f"annotations/captions_{self.origin}2017.json"
        there = {name.removeprefix(folder) for name in self.files if name.startswith(folder) and _is_image(name)}
        if not there or file not in self.files:
            fault = f"{file} is not there" if there else "there are no images"
            self.problems.add("missing part", folder, f"{fault}, so the part is left out")
            return
        content = self._loaded(file)
        listing = self._listing(file, content)
        self._compare(file, folder, there, listing.sizes.keys())
        captions = self._captions(file, content, listing.names)
        objects = self._objects(f"annotations/instances_{self.origin}2017.json", listing.names)
        for name in sorted(there | listing.sizes.keys()):
            known = objects if name in listing.sizes else None
            found = None if known is None else known.get(name, _Objects())
            yield self._row(folder + name, listing.sizes.get(name, (None, None)), captions.get(name, []), found)

    def _row(self, name: str, size: tuple[int | None, int | None], captions: list[str], found: _Objects | None) -> _Row:
        fault = found.fault if found else None
        boxes = found.boxes if found and not fault else None
        status, detail = status_of(boxes, fault, "no instances file lists it")
        # Where an object is not understood, nobody can say what else is in the image.
        objects = sorted(found.names) if found and not fault else None
        return _Row(name, self.origin, *size, boxes, captions_of(captions), objects, status, detail)

    def _loaded(self, file: str) -> dict[str, Any]:
        way_out = "Download or unpack the data set again."
        return instances.parsed(file, read_needed(self.store, file), way_out)

    def _listing(self, file: str, content: Mapping[str, Any]) -> _Listing:
        listing = _Listing({}, {})
        for number, image in instances.entries(file, content, "images", self.problems):
            key, name = image.get("id"), image.get("file_name")
            if not instances.is_key(key) or not isinstance(name, str) or not _is_plain(name):
                detail = f"entry {number} of images must have an id and the plain name of an image file"
                self.problems.add("bad entry of images", file, f"{detail}, got {str(key)[:20]!r}, {str(name)[:80]!r}")
            elif key in listing.names or name in listing.sizes:
                self.problems.add("image listed twice", file, f"entry {number} of images lists {name} or its id again")
                listing.names.setdefault(key, name)
            else:
                listing.names[key] = name
                listing.sizes[name] = instances.side(image.get("width")), instances.side(image.get("height"))
        return listing

    def _annotations(
        self, file: str, content: Mapping[str, Any], names: Mapping[int | str, str]
    ) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Number, image and content of each annotation; one of an unknown image is a problem."""
        for number, entry in instances.entries(file, content, "annotations", self.problems):
            key = entry.get("image_id")
            name = names.get(key) if instances.is_key(key) else None
            if name is None:
                detail = f"annotation {number} is for the unknown image id {str(key)[:20]!r}"
                self.problems.add("annotation without image", file, detail)
            else:
                yield number, name, entry

    def _captions(self, file: str, content: Mapping[str, Any], names: Mapping[int | str, str]) -> dict[str, list[str]]:
        captions: dict[str, list[str]] = defaultdict(list)
        for number, name, entry in self._annotations(file, content, names):
            caption = entry.get("caption")
            if isinstance(caption, str):
                captions[name].append(caption)
            else:
                detail = f"annotation {number} must have a caption, got {str(caption)[:80]!r}"
                self.problems.add("annotation without caption", file, detail)
        return captions

    def _objects(self, file: str, names: Mapping[int | str, str]) -> dict[str, _Objects] | None:
        """Objects by image; None where the file is not there."""
        if file not in self.files:
            self.problems.add("missing annotation file", file, "is not there, so its images have no objects and boxes")
            return None
        content = self._loaded(file)
        categories = instances.categories(file, content, self.problems)
        objects: dict[str, _Objects] = defaultdict(_Objects)
        for number, name, entry in self._annotations(file, content, names):
            found = objects[name]
            try:
                found.names.add(instances.category(entry.get("category_id"), categories))
                found.boxes.append(instances.box(entry.get("bbox")))
            except ValueError as error:
                found.fault = f"{file}, annotation {number}: {error}"
                self.problems.add("malformed annotation", file, f"annotation {number}: {error}")
        return dict(objects)

    def _compare(self, file: str, folder: str, there: Collection[str], listed: Collection[str]) -> None:
        lost, unlisted = sorted(set(listed) - set(there)), sorted(set(there) - set(listed))
        if lost:
            detail = f"{len(lost)} of the {len(listed)} images it lists are not there, e.g. {folder}{lost[0]}"
            self.problems.add("missing images", file, detail)
        if unlisted:
            detail = f"does not list {len(unlisted)} of the {len(there)} images that are there, e.g. {unlisted[0]}"
            self.problems.add("images without captions", file, detail)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def _is_plain(name: str) -> bool:
    """True for the name of an image file without a folder, which can stand in a table."""
    return "/" not in name and _is_image(name) and name == storable(name)
