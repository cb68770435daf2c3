"""Annotation files in the form of Pascal VOC: one XML an image."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from defusedxml import ElementTree
from tqdm import tqdm

from dejavu_exp.datasets.annotations import MAX_PIXELS, whole_box
from dejavu_exp.datasets.stores import read_file

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

POOL_FROM = 2000
"""With more XML files than this, processes share the work and a progress bar is shown."""
MAX_BYTES = 1 << 24
"""A longer file is no annotation of one image."""


class Note(NamedTuple):
    """What an annotation file says of one image.

    Attributes:
        width: pixels; None where it does not say.
        height: likewise.
        boxes: of all objects, upper ends exclusive; None where it could not be understood.
        names: of the object in each box; empty where it has none.
        fault: why it could not be understood.
    """

    width: int | None = None
    height: int | None = None
    boxes: list[list[int]] | None = None
    names: list[str] | None = None
    fault: str | None = None


def read_all(paths: Sequence[str]) -> list[Note]:
    """Read XML files in their order; many are shared among processes, since the parser is Python code."""
    if len(paths) <= POOL_FROM:
        return [read(path) for path in paths]
    workers = min(16, os.cpu_count() or 1)
    # Forking a process that has threads (polars has) can leave a lock held for ever in the child.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        notes = pool.map(read, paths, chunksize=200)
        return list(tqdm(notes, total=len(paths), desc="reading boxes", unit="file", leave=False))


def read(path: str) -> Note:
    """A note on one file. Faults are returned, not raised: one broken file of half a million stops nothing."""
    try:
        return _understood(ElementTree.fromstring(read_file(Path(path), MAX_BYTES)))
    except (OSError, ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        return Note(fault=str(error) or type(error).__name__)


def _understood(annotation: Element) -> Note:
    if annotation.tag != "annotation":
        raise ValueError(f"its root must be <annotation>, not <{annotation.tag[:80]}>")
    boxes: list[list[int]] = []
    names: list[str] = []
    for number, thing in enumerate(annotation.findall("object"), start=1):
        ends = [thing.findtext(f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax")]
        try:
            boxes.append(whole_box(ends))
        except ValueError as error:
            raise ValueError(f"object {number}: {error}, got {', '.join(str(end)[:20] for end in ends)}") from error
        names.append((thing.findtext("name") or "").strip())
    return Note(_side(annotation, "width"), _side(annotation, "height"), boxes, names)


def _side(annotation: Element, name: str) -> int | None:
    """Width or height; some published files say 0, and then only the image can tell."""
    text = (annotation.findtext(f"size/{name}") or "").strip()
    # A number of more digits than Python converts is none of pixels either.
    return int(text) if text.isdecimal() and len(text) < 12 and 0 < int(text) <= MAX_PIXELS else None
