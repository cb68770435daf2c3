"""Column schemas of every table, their reading, writing and checking, and the `Estimate` that each figure is."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from dejavu_exp.errors import DataError

SCHEMA_VERSION = 2
"""Part of every cache key: raise it when a column or its meaning changes."""

FIGURES_VERSION = 4
"""Stands in figures.json as `schema`: raise it when a key or its meaning changes."""

MAX_ROWS = 1 << 32
"""A table of polars has fewer rows, and so has a file that is read."""

_POLARS_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""The second is for texts that are no UTF-8, and no Exception to Python."""

Schema: TypeAlias = Mapping[str, pl.DataType | type[pl.DataType]]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]


class Status(StrEnum):
    """Why a row is or is not measured. Excluded rows stay in their table and carry one of these."""

    OK = "ok"
    NO_ANNOTATION = "no_annotation"
    BAD_ANNOTATION = "bad_annotation"
    BOX_OUTSIDE = "box_outside"
    TOO_SMALL = "too_small"
    UNREADABLE = "unreadable"
    NO_LABEL = "no_label"
    NO_CAPTION = "no_caption"
    NO_OBJECTS = "no_objects"
    NO_EVIDENCE = "no_evidence"
    LEAKED = "leaked"


NEVER_SHOWN = frozenset({Status.UNREADABLE, Status.LEAKED})
"""A row of one of these gives no view, not even of the whole image. (A missing label concerns the label test only.)"""


class Role(StrEnum):
    """What an image is used for; every image has at most one role."""

    TARGET = "target"
    HELDOUT = "heldout"
    SHARED = "shared"
    PUBLIC = "public"
    UNSEEN = "unseen"


BOXES = pl.List(pl.List(pl.Int32))

MANIFEST: Schema = {
    "id": pl.String,  # unique and stable: does not depend on where the data set lies or on listing order
    "path": pl.String,  # what the image store is asked for
    "origin": pl.String,  # the part of the data set as published: train, val, ...
    "label": pl.String,  # class id; null where unknown
    "width": pl.Int32,  # pixels; null where only the image itself can tell
    "height": pl.Int32,
    "boxes": BOXES,  # [xmin, ymin, xmax, ymax] in pixels, upper ends exclusive; null without annotation
    "captions": pl.List(pl.String),  # null or empty where there is none
    "objects": pl.List(pl.String),  # names of all annotated objects; null without annotation, empty where there is none
    "tags": pl.List(pl.String),  # names of background things the data set itself lists
    "tag_boxes": BOXES,  # where each tag is; null where the data set does not say
    "status": pl.String,
    "detail": pl.String,  # the reason, where the status is not ok
}

ROLES: Schema = {"id": pl.String, "label": pl.String, "role": pl.String}

VIEWS: Schema = {
    "view_id": pl.String,  # "<id>#<view>"
    "id": pl.String,
    "view": pl.String,
    "role": pl.String,
    "label": pl.String,
    "path": pl.String,
    "content": pl.String,  # hash of the image file's bytes
    "truth": pl.List(pl.String),  # what is to be inferred: the label, or the objects; null where it is not known
    "texts": pl.List(pl.String),  # what a caption view shows; null for a view of the image
    "xmin": pl.Int32,  # the region, pixels, upper ends exclusive; null for a caption view
    "ymin": pl.Int32,
    "xmax": pl.Int32,
    "ymax": pl.Int32,
    "status": pl.String,
    "detail": pl.String,
}

TAGS: Schema = {
    "view_id": pl.String,
    "tags": pl.List(pl.String),  # strongest first
    "scores": pl.List(pl.Float32),  # the tagger's own scale, descending
    "status": pl.String,
}

OF_ROWS: Schema = {
    "weight": pl.Float64,  # how much the row counts in the figures, mean 1; null where it is not used
    "p_value": pl.Float64,  # of a target row, from unseen rows: 1 without a score, null without unseen rows
    "q_value": pl.Float64,  # the rate of false discoveries at which the row would just be listed
}
"""What tables of scores tell of a row beside its scores."""

SCORES: Schema = {
    "id": pl.String,
    "role": pl.String,
    "label": pl.String,
    "reference": pl.String,
    "status": pl.String,
    "target_label": pl.String,
    "target_probability": pl.Float64,  # the target's share of evidence for the true label, 0 to 1
    "target_confidence": pl.Float64,  # minus the entropy of the target's evidence, nats, <= 0
    "target_correct": pl.Boolean,
    "target_correct_top5": pl.Boolean,
    "target_tied": pl.Boolean,
    "reference_label": pl.String,
    "reference_probability": pl.Float64,
    "reference_confidence": pl.Float64,
    "reference_correct": pl.Boolean,
    "reference_correct_top5": pl.Boolean,
    "reference_tied": pl.Boolean,
    "quadrant": pl.String,
    "memorization_score": pl.Float64,
    "memorization_confidence": pl.Float64,  # nats; null where it is not defined
    **OF_ROWS,
}

PREDICTIONS = ("all", "top10", "top1")
"""How many of the objects that a predictor has evidence for count as predicted."""

OBJECT_SCORES: Schema = {
    "id": pl.String,
    "role": pl.String,
    "label": pl.String,  # of the manifest; null where it has none
    "reference": pl.String,
    "status": pl.String,
    "objects": pl.List(pl.String),  # the truth, sorted
    "target_found": pl.List(pl.String),  # those that the target predicts, by the headline's prediction; sorted
    "reference_found": pl.List(pl.String),
    **{
        f"{who}_{measure}_{prediction}": pl.Float64  # fractions, 0 to 1
        for prediction in PREDICTIONS
        for who in ("target", "reference")
        for measure in ("precision", "recall", "f")
    },
    "target_distance": pl.Float64,  # to the nearest bank entry, the probe's unit; null for a predictor without a bank
    "reference_distance": pl.Float64,
    "target_confidence": pl.Float64,
    "target_tied": pl.Boolean,
    "reference_confidence": pl.Float64,
    "reference_correct": pl.Boolean,  # all objects are predicted
    "reference_tied": pl.Boolean,
    "target_correct": pl.Boolean,
    "quadrant": pl.String,  # by recall of the headline's prediction: memorized where the target's is larger
    "memorization_score": pl.Float64,
    **OF_ROWS,
}


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval and the rows behind it.

    An undefined figure is NaN with its count, never 0.

    Attributes:
        value: the point estimate.
        low: lower end of the interval.
        high: upper end of the interval.
        n_used: rows the figure rests on.
        n_excluded: rows that belong here and could not be used.
    """

    value: float
    low: float
    high: float
    n_used: int
    n_excluded: int

    @classmethod
    def undefined(cls, n_excluded: int) -> Estimate:
        """An estimate without any usable row.

        >>> Estimate.undefined(12).n_used
        0
        """
        return cls(math.nan, math.nan, math.nan, 0, n_excluded)

    def contains(self, value: float) -> bool:
        """True where the interval holds `value`; False for an undefined estimate.

        >>> Estimate(0.1, -0.1, 0.3, 10, 0).contains(0.0)
        True
        """
        return self.low <= value <= self.high

    def as_dict(self) -> dict[str, float | int | None]:
        """The fields for JSON, where NaN is null."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


def validate(frame: pl.DataFrame, schema: Schema, name: str, key: str = "id") -> pl.DataFrame:
    """Check columns, types and the uniqueness of the key; extra columns are kept.

    Args:
        frame: any table.
        schema: the columns it must have; castable types are cast.
        name: what to call the table in an error.
        key: the column that must be unique and never null.

    Returns:
        The table, schema columns first and in the schema's order.

    Raises:
        DataError: a column is missing, has values of another type, or the key is null or repeated.
    """
    missing = [column for column in schema if column not in frame.columns]
    if missing:
        raise DataError(f"{name}: missing column {', '.join(missing)}; it must have {', '.join(schema)}.")
    try:
        frame = frame.with_columns(pl.col(column).cast(dtype) for column, dtype in schema.items())
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{name}: a column has values of another type: {error}") from error
    if frame[key].null_count():
        raise DataError(f"{name}: {frame[key].null_count()} rows have no {key}; every row needs one.")
    repeated = frame.filter(frame[key].is_duplicated())[key].unique().sort()
    if len(repeated):
        shown = ", ".join(repeated.head(5))
        raise DataError(
            f"{name}: {len(repeated)} values of {key} occur more than once, e.g. {shown}; make them unique."
        )
    return frame.select([*schema, *[column for column in frame.columns if column not in schema]])


def read(path: Path) -> pl.DataFrame:
    """Read a Parquet table that a user gave; by Arrow, for a damaged file can end the process where polars reads it.

    Raises:
        DataError: it is not there, damaged, or no Parquet.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        # A file, not the folder of parts that Arrow would take too.
        with path.open("rb") as stream:
            _check_rows(parquet.read_metadata(stream))
            stream.seek(0)
            table = parquet.read_table(stream)
        table.validate(full=True)
        return pl.DataFrame(table)
    except (OSError, MemoryError, ValueError, pa.ArrowException, *_POLARS_ERRORS) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as Parquet ({reason[:200]}). Write or fetch it again.") from error


def _check_rows(metadata: Any) -> None:  # noqa: ANN401 - pyarrow's FileMetaData
    """Refuse claims of more rows than there are, for which Arrow would make room, hours and gigabytes of it.

    Raises:
        ValueError: a column has fewer values than its part of the file has rows, or there are too many rows.
    """
    if metadata.num_rows >= MAX_ROWS:
        raise ValueError(f"it claims {metadata.num_rows} rows, of at most {MAX_ROWS - 1}")
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        values = min((group.column(number).num_values for number in range(group.num_columns)), default=0)
        if group.num_rows > values:
            raise ValueError(f"it claims {group.num_rows} rows, and has {values} values in a column")


def write(frame: pl.DataFrame, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a Parquet table; it appears whole or not at all.

    Raises:
        DataError: there is no room, or no permission.
    """
    described = {key: json.dumps(value, sort_keys=True) for key, value in (metadata or {}).items()}
    with whole(path) as partial:
        frame.write_parquet(partial, metadata={"schema_version": str(SCHEMA_VERSION), **described})


def write_text(text: str, path: Path) -> None:
    """Write a text file; it appears whole or not at all. Raises as `write`."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(value: object, path: Path) -> None:
    """Write JSON with sorted keys; raises as `write`, and ValueError where a figure is NaN instead of null."""
    write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", path)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end: a reader never sees half a file.

    The name is this process's own, so that several may write the same file; one that was killed leaves it behind.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # where its folder is a file, say
            partial.unlink()
        raise


@contextmanager
def writing(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Make one sentence of what goes wrong when a file or folder is written.

    Args:
        path: what is written.
        errors: what a library raises for it beside OSError and polars' own.

    Raises:
        DataError: there is no room, or no permission.
    """
    caught: tuple[type[Exception], ...] = (OSError, pl.exceptions.PolarsError, *errors)
    try:
        yield
    except caught as error:
        raise DataError(f"cannot write {path}: {error}. Free some space or choose another folder.") from error
