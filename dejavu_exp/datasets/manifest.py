"""A data set of one's own, described by a Parquet or CSV file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dejavu_exp import tables
from dejavu_exp.datasets.annotations import (
    MAX_PIXELS,
    Problems,
    captions_of,
    location,
    rows_of,
    status_of,
    storable,
    whole_box,
)
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import FolderStore
from dejavu_exp.errors import ConfigError, DataError

COLUMNS = (*tables.MANIFEST, "caption")
"""Columns that are understood here."""
ENDINGS = (".parquet", ".csv")
RESERVED = ("role", "content", "reason")
"""Columns that later stages add to the rows."""

LOOKED_AT = 5
"""So many paths are tried to find out whether the root is right."""


@dataclass(frozen=True)
class ManifestFile:
    """Images listed in a file, one a row.

    Columns (list columns of a CSV file are JSON text):
        path: of the image, relative to root; required.
        label: the class of the foreground; the label test leaves out rows without one.
        id: unique; default the path.
        origin: the part of the data set; default "train".
        boxes: of all objects, [[xmin, ymin, xmax, ymax], ...] in pixels, upper ends exclusive. Empty ([]): annotated,
            and there is no object. Null: not annotated.
        caption: text; or captions: a list of them, ["a dog runs", "a dog on grass"]. They are taken as they stand.
        objects, tags: lists of names, ["dog", "ball"].
        tag_boxes: one box for each tag.
        width, height: pixels; default: the image tells.
    Further columns are kept. `status` and `detail` are set anew.

    Attributes:
        path: the file; its name ends in .parquet or .csv.
        root: the folder that the image paths are relative to; null for the file's own folder.
    """

    path: str | Path
    root: str | Path | None = None

    def __post_init__(self) -> None:
        path = location(self.path, "path")
        if path.suffix.lower() not in ENDINGS:
            raise ConfigError(f"dataset.path={path}: unknown file ending {path.suffix!r}; must be .parquet or .csv.")
        if self.root is not None:
            location(self.root, "root")

    def manifest(self) -> Manifest:
        """Read the file and check every cell.

        Raises:
            DataError: the file cannot be read, lacks a column, has rows without path or with the same id, or none of
                its first images is there.
        """
        path = location(self.path, "path")
        root = path.parent if self.root is None else location(self.root, "root")
        frame = _read(path)
        problems = Problems()
        cells = _Cells(path, frame, problems)
        rows = _rows(cells)
        _check_ids(path, rows["id"].to_list(), frame.columns)
        _check_root(path, root, rows["path"].to_list())
        kept = frame.drop([name for name in COLUMNS if name in frame.columns])
        return Manifest(path.stem, rows.hstack(kept), FolderStore(root), {}, problems.sentences())


def _read(path: Path) -> pl.DataFrame:
    """The file as it stands; known columns of a CSV file as text, further ones as they look."""
    try:
        if path.suffix.lower() == ".parquet":
            frame = tables.read(path)
        else:
            header = pl.read_csv(path, n_rows=0, infer_schema=False).columns
            known: dict[str, type[pl.DataType]] = {name: pl.String for name in COLUMNS if name in header}
            frame = pl.read_csv(path, schema_overrides=known, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = f"{error}. It must be UTF-8, and a cell with commas needs quotes."
        raise DataError(f"dataset.path={path}: cannot be read: {reason}") from error
    if "path" not in frame.columns:
        raise DataError(f"{path}: missing column path; there are: {', '.join(frame.columns) or 'none'}.")
    if {"caption", "captions"} <= {*frame.columns}:
        raise DataError(f"{path}: there are the columns caption and captions; keep the one that holds the captions.")
    double = [name for name in COLUMNS if f"{name}_duplicated_0" in frame.columns]
    if double:
        raise DataError(f"{path}: there are several columns {double[0]}; keep one of them.")
    taken = [name for name in RESERVED if name in frame.columns]
    if taken:
        raise DataError(
            f"{path}: column {', '.join(taken)}: later stages add a column of this name; rename or drop it."
        )
    if frame.is_empty():
        raise DataError(f"{path}: there are no rows; expected one for each image.")
    return frame


@dataclass(frozen=True)
class _Cells:
    """The cells of the file, understood column by column; faults of annotations are noted by row."""

    path: Path
    frame: pl.DataFrame
    problems: Problems

    def texts(self, name: str) -> list[str | None]:
        """Text without blanks at its ends; None where it is null or blank."""
        if name not in self.frame.columns:
            return [None] * len(self.frame)
        texts = self._as_text(name)
        return [text.strip() or None if text is not None else None for text in texts.to_list()]

    def _as_text(self, name: str) -> pl.Series:
        kind = self.frame[name].dtype
        way_out = "; lists go into a column captions" if name == "caption" else ""
        fault = f"{self.path}: column {name} must hold text, not {kind}{way_out}."
        if kind.is_nested():
            raise DataError(fault)
        try:
            return self.frame[name].cast(pl.String)
        except pl.exceptions.PolarsError as error:
            raise DataError(fault) from error

    def captions(self) -> list[list[str] | None]:
        """Those of a file with one text a row, as they stand."""
        if "caption" not in self.frame.columns:
            return [None] * len(self.frame)
        return [captions_of([text or ""]) for text in self._as_text("caption").to_list()]

    def parsed(self, name: str, parse: Callable[[Any], Any], faults: dict[int, str]) -> list[Any]:
        """Cells as `parse` understands them; one it refuses is null, and a problem.

        Args:
            name: of the column.
            parse: raises ValueError for a cell that must not be.
            faults: the details of refused cells by row, added to.
        """
        values: list[Any] = []
        cells = self.frame[name].to_list() if name in self.frame.columns else [None] * len(self.frame)
        for row, cell in enumerate(cells):
            try:
                values.append(None if cell is None or str(cell).isspace() or cell == "" else parse(cell))
            except (ValueError, RecursionError) as error:
                values.append(None)
                detail = f"row {row + 1}: {name}: {error}, got {str(cell)[:80]!r}"
                faults.setdefault(row, detail)
                self.problems.add(f"{name} not understood", str(self.path), detail)
        return values


def _rows(cells: _Cells) -> pl.DataFrame:
    """The columns of the manifest."""
    paths, labels = cells.texts("path"), cells.texts("label")
    pathless = [str(row) for row, path in enumerate(paths, start=1) if path is None]
    if pathless:
        raise DataError(f"{cells.path}: {len(pathless)} rows have no path, e.g. row {', '.join(pathless[:5])}.")
    faults: dict[int, str] = {}
    columns: dict[str, list[Any]] = {
        "path": paths,
        "label": labels,
        "id": [name or path for name, path in zip(cells.texts("id"), paths, strict=True)],
        "origin": [origin or "train" for origin in cells.texts("origin")],
        # A caption that is not understood says nothing against the image and its boxes.
        "captions": cells.parsed("captions", _captions, {}) if "captions" in cells.frame.columns else cells.captions(),
        "boxes": cells.parsed("boxes", _boxes, faults),
        "objects": cells.parsed("objects", _names, faults),
        "tags": cells.parsed("tags", _names, faults),
        "tag_boxes": cells.parsed("tag_boxes", _boxes, faults),
        # The image tells its size anyway, so a wrong one does not spoil the row.
        "width": cells.parsed("width", _side, {}),
        "height": cells.parsed("height", _side, {}),
    }
    _check_tags(cells, columns["tags"], columns["tag_boxes"], faults)
    judged = [status_of(boxes, faults.get(row), "it has no boxes") for row, boxes in enumerate(columns["boxes"])]
    columns["status"] = [status for status, _ in judged]
    columns["detail"] = [detail for _, detail in judged]
    return rows_of(columns)


def _check_tags(
    cells: _Cells, tags: list[list[str] | None], boxes: list[list[list[int]] | None], faults: dict[int, str]
) -> None:
    """Tags and their boxes must go in pairs; without that the boxes say nothing, and are dropped."""
    for row, (named, placed) in enumerate(zip(tags, boxes, strict=True)):
        if placed is not None and len(placed) != len(named or []):
            boxes[row] = None
            detail = f"row {row + 1}: {len(placed)} tag_boxes for {len(named or [])} tags"
            faults.setdefault(row, detail)
            cells.problems.add("tag_boxes not understood", str(cells.path), detail)


def _list(cell: object, form: str) -> list[Any]:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            raise ValueError(f"must be {form}") from None
    if not isinstance(cell, list):
        raise ValueError(f"must be {form}")
    return cell


def _boxes(cell: object) -> list[list[int]]:
    form = "a list of boxes, e.g. [[10, 20, 50, 60]]"
    boxes = _list(cell, form)
    if not all(isinstance(box, list) for box in boxes):
        raise ValueError(f"must be {form}")
    if any(isinstance(end, str) for box in boxes for end in box):
        raise ValueError("a box must be four numbers: xmin, ymin, xmax, ymax")
    return [whole_box(box) for box in boxes]


def _names(cell: object) -> list[str]:
    return _strings(cell, 'a list of names, e.g. ["dog"]')


def _captions(cell: object) -> list[str] | None:
    return captions_of(
        _strings(cell, 'a list of texts, e.g. ["a dog runs"] (a single text goes into a column caption)')
    )


def _strings(cell: object, form: str) -> list[str]:
    texts = _list(cell, form)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"must be {form}")
    return [storable(text) for text in texts]


def _side(cell: object) -> int:
    try:
        side = float(str(cell))
    except ValueError:
        side = 0.0
    if not (side.is_integer() and 0 < side <= MAX_PIXELS):
        raise ValueError("must be a whole number of pixels above 0")
    return int(side)


def _check_ids(path: Path, ids: list[str], columns: Collection[str]) -> None:
    repeated = sorted(name for name, count in Counter(ids).items() if count > 1)
    if repeated:
        source = "" if "id" in columns else " (there is no column id, so the path is the id)"
        way_out = "; several captions of an image go into one row, as a list in a column captions"
        raise DataError(
            f"{path}: {len(repeated)} values of id occur more than once{source}, e.g. {', '.join(repeated[:5])}; "
            f"make them unique{way_out if 'caption' in columns else ''}."
        )


def _check_root(path: Path, root: Path, paths: list[str]) -> None:
    """A wrong root is the most common mistake, and would otherwise show as one unreadable image after the other."""
    first = [root / name for name in paths[:LOOKED_AT]]
    if not any(os.path.exists(image) for image in first):
        raise DataError(
            f"dataset.root={root}: none of the first {len(first)} images of {path} is there, e.g. {first[0]}. "
            "Set dataset.root to the folder that the column path is relative to."
        )
