"""What the readers share: boxes and captions checked, the status of a row, problems that do not flood a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dejavu_exp import tables
from dejavu_exp.errors import ConfigError
from dejavu_exp.tables import Status

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
"""Endings of image files, lower case."""

MAX_PIXELS = 2**31 - 1
"""Largest coordinate a table column can hold."""

SHOWN_PER_KIND = 20


class Problems:
    """What a reader could not read: one sentence a file, and beyond 20 files of a kind one that counts them.

    >>> problems = Problems()
    >>> problems.add("broken file", "a.txt", "line 3 has 2 fields instead of 5")
    >>> problems.add("broken file", "a.txt", "line 7 has 1 fields instead of 5")
    >>> problems.sentences()
    ('a.txt: line 3 has 2 fields instead of 5 (and 1 more like it).',)
    """

    def __init__(self) -> None:
        self._files: dict[str, dict[str, tuple[str, int]]] = {}

    def add(self, kind: str, file: str, detail: str) -> None:
        """Note one problem.

        Args:
            kind: a short noun phrase; problems of a kind are counted together.
            file: the file it is in.
            detail: what is wrong, without the file's name and without a full stop.
        """
        kinds = self._files.setdefault(file, {})
        first, count = kinds.get(kind, (detail, 0))
        kinds[kind] = (first, count + 1)

    def sentences(self) -> tuple[str, ...]:
        """The sentences, by kind and file in the order noted."""
        by_kind: dict[str, list[str]] = {}
        for file, kinds in self._files.items():
            details = [
                first + (f" (and {count - 1} more like it)" if count > 1 else "") for first, count in kinds.values()
            ]
            by_kind.setdefault(next(iter(kinds)), []).append(f"{file}: {'; '.join(details)}.")
        answer: list[str] = []
        for kind, sentences in by_kind.items():
            answer.extend(sentences[:SHOWN_PER_KIND])
            if len(sentences) > SHOWN_PER_KIND:
                more = len(sentences) - SHOWN_PER_KIND
                answer.append(f"{kind}: {more} more like the {SHOWN_PER_KIND} named, {len(sentences)} in all.")
        return tuple(answer)


def whole_box(values: Sequence[Any]) -> list[int]:
    """Four coordinates as whole pixels; fractions are rounded outwards, so that no part of an object is left outside.

    Args:
        values: xmin, ymin, xmax, ymax: numbers or their text; upper ends exclusive.

    Raises:
        ValueError: they are not four finite numbers that a table can hold.

    >>> whole_box(["1", "2.5", "10", "20.5"])
    [1, 2, 10, 21]
    """
    try:
        numbers = [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(values) != 4 or len(numbers) != 4:
        raise ValueError("a box must be four numbers: xmin, ymin, xmax, ymax")
    if not all(abs(number) < MAX_PIXELS for number in numbers):
        raise ValueError("a box must have coordinates that an image can have")
    return [math.floor(numbers[0]), math.floor(numbers[1]), math.ceil(numbers[2]), math.ceil(numbers[3])]


def storable(text: str) -> str:
    r"""The text with "?" for lone surrogates, which JSON can hold and a table cannot.

    >>> storable("caf\u00e9 \ud83d")
    'café ?'
    """
    return text.encode("utf-8", errors="replace").decode("utf-8")


def captions_of(texts: Iterable[str]) -> list[str] | None:
    r"""The captions of an image as they stand, whole and in order, repeated ones too; blank ones are left out.

    >>> captions_of(["a dog\n", " ", "a dog\n"])
    ['a dog\n', 'a dog\n']
    >>> captions_of([""]) is None
    True
    """
    return [storable(text) for text in texts if text.strip()] or None


def status_of(boxes: object, fault: str | None, absent: str) -> tuple[str, str | None]:
    """Status and detail of a row. A row without a label is no worse for it: only the label test asks for one.

    Args:
        boxes: None where there is no annotation; an empty list is an annotation.
        fault: what is wrong with the annotation; None where nothing is.
        absent: the detail of a row without annotation.

    >>> status_of([], None, "no file")
    ('ok', None)
    """
    if fault is not None:
        return str(Status.BAD_ANNOTATION), fault
    if boxes is None:
        return str(Status.NO_ANNOTATION), absent
    return str(Status.OK), None


def rows_of(columns: Mapping[str, Sequence[Any]]) -> pl.DataFrame:
    """A table with the columns of `tables.MANIFEST`; those not given are null."""
    nothing = [None] * len(columns["id"])
    return pl.DataFrame([_series(name, columns.get(name, nothing), dtype) for name, dtype in tables.MANIFEST.items()])


def _series(name: str, values: Sequence[Any], dtype: pl.DataType | type[pl.DataType]) -> pl.Series:
    """A column; lists go by way of Arrow, which is many times as fast at the size of ImageNet."""
    import pyarrow as pa

    kinds = {tables.BOXES: pa.list_(pa.list_(pa.int32())), pl.List(pl.String): pa.list_(pa.string())}
    if isinstance(dtype, pl.List):
        return pl.Series(name, pa.array(values, type=kinds[dtype]), dtype=dtype)
    return pl.Series(name, values, dtype=dtype)


def location(value: str | Path, key: str) -> Path:
    """A configured path with `~` replaced.

    Raises:
        ConfigError: it is empty, which would silently mean the working directory.
    """
    if not str(value).strip():
        raise ConfigError(f"dataset.{key} is empty: give the path of a file or folder.")
    return Path(value).expanduser()
