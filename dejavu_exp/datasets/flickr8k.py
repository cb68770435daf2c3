"""Flickr8k as published: 8,000 images with five captions each and no annotation, in a folder or a zip archive."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu_exp.datasets.annotations import (
    IMAGE_SUFFIXES,
    Problems,
    captions_of,
    location,
    rows_of,
    status_of,
)
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import published, read_needed
from dejavu_exp.errors import DataError

FOLDER = "flickr8k"
CAPTIONS_FILE = "captions.txt"
HEADER = ["image", "caption"]
LAYOUT = f"{FOLDER}/ with Images/*.jpg and {CAPTIONS_FILE}"

_CAPTIONS = re.compile(r"(?P<top>(?:.*/)?)captions\.txt")


@dataclass(frozen=True)
class Flickr8k:
    """One origin, all, with all captions of an image in the order of the file.

    There are no boxes and no labels; a tagger says what is in an image. Ids are the file names. An image that has
    captions and is not there keeps its row, and is unreadable later; so does an image without captions.

    Attributes:
        root: the zip archive, the folder that holds flickr8k/, or that folder itself.
    """

    root: str | Path

    def __post_init__(self) -> None:
        location(self.root, "root")

    def manifest(self) -> Manifest:
        """Read the data set.

        Raises:
            DataError: the root is not there or has another layout, the captions file cannot be read, or there is no
                image.
        """
        root = location(self.root, "root")
        store = published(root, FOLDER, _CAPTIONS, (CAPTIONS_FILE,), LAYOUT)
        problems = Problems()
        captions = _captions(read_needed(store, CAPTIONS_FILE), problems)
        there = {name.removeprefix("Images/") for name in store.names() if _is_image(name)}
        if not there:
            raise DataError(f"dataset.root={root}: there are no images; expected {LAYOUT}.")
        _compare(there, captions, problems)
        names = sorted(there | captions.keys())
        status, detail = status_of(None, None, "the data set has no boxes")
        columns: dict[str, list[Any]] = {
            "id": names,
            "path": [f"Images/{name}" for name in names],
            "origin": ["all"] * len(names),
            "captions": [captions_of(captions.get(name, [])) for name in names],
            "status": [status] * len(names),
            "detail": [detail] * len(names),
        }
        return Manifest("flickr8k", rows_of(columns), store, {}, problems.sentences())


def _is_image(name: str) -> bool:
    folder, _, file = name.partition("/")
    return folder == "Images" and not file.startswith(".") and file.lower().endswith(IMAGE_SUFFIXES)


def _captions(content: bytes, problems: Problems) -> dict[str, list[str]]:
    """Captions by image; a line of another form is a problem, and an open quote spoils the file."""
    text = content.decode("utf-8-sig", errors="replace")
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    captions: dict[str, list[str]] = defaultdict(list)
    try:
        header = next(lines, [])
        if [name.strip().lower() for name in header] != HEADER:
            raise DataError(f"{CAPTIONS_FILE}: must begin with the line image,caption, got {str(header)[:80]}.")
        for fields in lines:
            if len(fields) == 2 and fields[0].strip() and "/" not in fields[0]:
                captions[fields[0].strip()].append(fields[1])
            elif fields:
                detail = f"line {lines.line_num} must be a file name and a caption, quoted where it has commas"
                problems.add("malformed line", CAPTIONS_FILE, f"{detail}, got {','.join(fields)[:80]!r}")
    except csv.Error as error:
        raise DataError(
            f"{CAPTIONS_FILE}, line {lines.line_num}: is no CSV ({error}). Check its quotes, or download it again."
        ) from error
    return captions


def _compare(there: set[str], captions: Mapping[str, object], problems: Problems) -> None:
    lost, silent = sorted(captions.keys() - there), sorted(there - captions.keys())
    if lost:
        detail = f"{len(lost)} of the {len(captions)} images it names are not there, e.g. Images/{lost[0]}"
        problems.add("missing images", CAPTIONS_FILE, detail)
    if silent:
        detail = f"has no caption for {len(silent)} of the {len(there)} images that are there, e.g. {silent[0]}"
        problems.add("images without captions", CAPTIONS_FILE, detail)
