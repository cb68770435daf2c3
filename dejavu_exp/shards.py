"""Embeddings on disk: the table of what was asked for, and checksummed shards that any number of processes may fill."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from dejavu_exp import tables
from dejavu_exp.errors import DataError
from dejavu_exp.tables import BoolArray, Float32Array, IntArray

log = logging.getLogger(__name__)

Storage = Literal["float32", "float16"]
WRITTEN_ROWS = 65_536
"""Rows of the request that are written at a time."""


@dataclass(frozen=True)
class ShardFolder:
    """One request for embeddings: a table of views, sorted by id, and shards of ids, values and reasons.

    Shard s holds the rows from s * rows_per_shard on, in the order of the ids. The table is read through a memory map,
    so that processes share one copy, and memory does not grow with the number of rows.

    Attributes:
        folder: of this request alone.
        key: what went into it; stands in every shard.
        rows: N views asked for.
        rows_per_shard: of every shard but the last.
        storage: type of the values on disk.
    """

    folder: Path
    key: str
    rows: int
    rows_per_shard: int
    storage: Storage = "float32"

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __len__(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def write_request(self, views: pl.DataFrame) -> None:
        """Write the table of views, which is sorted by its unique column view_id, unless it is there and whole."""
        path = self.folder / "request.feather"
        if path.exists() and self._is_request(views):
            return
        schema = views.clear().to_arrow(compat_level=pl.CompatLevel.oldest()).schema
        with tables.whole(path) as partial, pa.OSFile(str(partial), "wb") as stream:  # noqa: SIM117 - closed in this order
            with pa.ipc.new_file(stream, schema) as writer:
                for start in range(0, len(views), WRITTEN_ROWS):
                    part = views[start : start + WRITTEN_ROWS]
                    writer.write_table(part.to_arrow(compat_level=pl.CompatLevel.oldest()))

    def _is_request(self, views: pl.DataFrame) -> bool:
        """True where the table that is there holds the ids of `views`; a disk that was full can leave less."""
        try:
            table = self._read_request()
            table.validate(full=True)
            return bool(pl.Series(table["view_id"]).equals(views["view_id"]))
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
            log.warning("%s is damaged and will be made again: %s", self.folder / "request.feather", error)
            return False

    @cached_property
    def request(self) -> pa.Table:
        """The table of views."""
        return self._read_request()

    def _read_request(self) -> pa.Table:
        with pa.memory_map(str(self.folder / "request.feather")) as stream:
            return pa.ipc.open_file(stream).read_all()

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{shard:06d}-of-{len(self):06d}.arrow"

    def span(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def batches(self, shard: int, batch_size: int) -> Iterator[list[int]]:
        """The rows of a shard, a batch at a time."""
        rows = list(self.span(shard))
        return (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))

    def ids(self, rows: range) -> list[str]:
        """The ids of consecutive rows."""
        found: list[str] = self.request["view_id"].slice(rows.start, len(rows)).to_pylist()
        return found

    def missing_count(self) -> int:
        """Rows whose shard is not there."""
        return sum(len(self.span(shard)) for shard in range(len(self)) if not self.path(shard).exists())

    def write(self, shard: int, values: npt.NDArray[np.floating[Any]], reasons: list[str]) -> None:
        """Write a shard under a temporary name, then rename it.

        Raises:
            DataError: an embedding is not finite, or too large for the storage, or there is no room.
        """
        ids = self.ids(self.span(shard))
        with np.errstate(over="ignore"):
            stored = values.astype(self.storage)
        for found, fault, way_out in (
            (values, "NaN or infinite embeddings", "Check the weights, or set trainer.precision=float32."),
            (stored, "embeddings beyond 65504, which float16 cannot hold,", "Set trainer.storage=float32."),
        ):
            bad = ~np.isfinite(found).all(axis=1) & (np.array(reasons) == "")
            if bad.any():
                first = ids[int(bad.argmax())]
                raise DataError(f"the encoder gave {fault} for {bad.sum()} views, first {first}. {way_out}")
        table = pa.table(
            {
                "view_id": ids,
                "values": pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1]),
                "reason": reasons,
            }
        ).replace_schema_metadata({"key": self.key, "checksum": checksum(ids, stored, reasons)})
        try:
            with (
                tables.whole(self.path(shard)) as partial,
                partial.open("wb") as stream,
                pa.ipc.new_file(stream, table.schema) as writer,
            ):
                writer.write_table(table)
        except DataError as error:
            if self.path(shard).exists():  # by a process that took over from this one, while it was asleep
                return
            raise DataError(
                f"{error} Finished shards are kept; trainer.cache can name another disk. Then run the command again."
            ) from error
        log.debug("wrote shard %s of %s", self.path(shard).name, self.key)

    def check(self) -> dict[str, str]:
        """Read every shard once; take away those whose content is not what was written.

        Returns:
            Why images could not be read, by view id; of shards that remain.
        """
        reasons: dict[str, str] = {}
        for shard in range(len(self)):
            loaded = self._load(shard)
            if loaded is None:
                self.path(shard).unlink(missing_ok=True)
                continue
            if any(loaded[1]):
                reasons |= {view: why for view, why in zip(self.ids(self.span(shard)), loaded[1], strict=True) if why}
        return reasons

    def forget_killed(self) -> None:
        """Take away what killed processes had begun to write; to be called when all shards are there."""
        for left in self.folder.glob(".*.partial"):
            left.unlink(missing_ok=True)

    def gather(self, rows: IntArray) -> npt.NDArray[np.floating[Any]]:
        """Values of ascending rows, shape (N, D), as they are stored; NaN where unreadable.

        Raises:
            DataError: a shard is missing or damaged.
        """
        if not self.rows:
            return np.empty((0, 0), dtype=self.storage)
        result: npt.NDArray[np.floating[Any]] | None = None
        shards = rows // self.rows_per_shard
        for shard in np.unique(shards).tolist():
            values, why = self._needed(shard)
            if result is None:
                result = np.empty((len(rows), values.shape[1]), dtype=self.storage)
            first, last = np.searchsorted(shards, [shard, shard + 1])
            within = rows[first:last] - self.span(shard).start
            result[first:last] = values[within]
            lost = [bool(why[row]) for row in within]
            result[first:last][lost] = np.nan
        return np.empty((0, self.width), dtype=self.storage) if result is None else result

    @property
    def width(self) -> int:
        """D; 0 where nothing was asked for."""
        return self._needed(0)[0].shape[1] if self.rows else 0

    def _needed(self, shard: int) -> tuple[npt.NDArray[np.floating[Any]], list[str]]:
        loaded = self._load(shard)
        if loaded is None:
            raise DataError(f"{self.path(shard)}: the shard is missing or damaged. Run the same command again.")
        return loaded

    def _load(self, shard: int) -> tuple[npt.NDArray[np.floating[Any]], list[str]] | None:
        """Values and reasons of a shard, or None where it is missing or damaged."""
        try:
            with pa.memory_map(str(self.path(shard))) as stream, pa.ipc.open_file(stream) as reader:
                table = reader.read_all()
                table.validate(full=True)  # without it a damaged offset is followed out of the file
                metadata = table.schema.metadata or {}
                ids, reasons = table["view_id"].to_pylist(), table["reason"].to_pylist()
                values = np.array(table["values"].combine_chunks().flatten()).reshape(len(ids), -1)
        except FileNotFoundError:
            return None
        # Arrow's own errors, and those of metadata and columns that are others than were written.
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, AttributeError, MemoryError) as error:
            log.warning("%s is damaged and will be made again: %s", self.path(shard), error)
            return None
        if ids != self.ids(self.span(shard)) or metadata.get(b"checksum") != checksum(ids, values, reasons).encode():
            log.warning("%s is damaged and will be made again: its checksum does not fit", self.path(shard))
            return None
        return values, reasons


def checksum(ids: Sequence[str], values: npt.NDArray[np.floating[Any]], reasons: Sequence[str]) -> str:
    """BLAKE2b over everything a shard holds."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((list(ids), values.shape, list(reasons), tables.SCHEMA_VERSION)).encode())
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Embeddings:
    """The encoder's output for each view asked for; read from its shards when it is looked at.

    Attributes:
        shards: where the values are.
        rows: shape (N,), the rows of the shards, in the order asked for.
        readable: shape (N,), False where the image could not be decoded.
        reasons: why not, by view id.
        classes: names of the D columns, or None.
    """

    shards: ShardFolder
    rows: IntArray
    readable: BoolArray
    reasons: dict[str, str]
    classes: tuple[str, ...] | None

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: IntArray) -> Embeddings:
        """Those at some places of the order asked for."""
        return Embeddings(self.shards, self.rows[places], self.readable[places], self.reasons, self.classes)

    @property
    def width(self) -> int:
        """D, the columns of the values."""
        return self.shards.width

    @property
    def view_ids(self) -> tuple[str, ...]:
        """N ids, in the order asked for."""
        return tuple(self.shards.request["view_id"].take(self.rows).to_pylist())

    @cached_property
    def values(self) -> Float32Array:
        """Shape (N, D), float32; NaN where the image could not be decoded."""
        result = np.empty((len(self), self.width), dtype=np.float32)
        for places, values in self.slices(self.shards.rows_per_shard):
            result[places] = values
        return result

    def slices(self, most: int) -> Iterator[tuple[IntArray, Float32Array]]:
        """The values in pieces, in the order of the shards, each shard read once or twice.

        Args:
            most: rows of a piece, at most.

        Yields:
            Where the rows stand in the order asked for, and their values, shape (up to `most`, D), float32.
        """
        order = np.argsort(self.rows, kind="stable")
        for start in range(0, len(order), most):
            places = order[start : start + most]
            yield places, self.shards.gather(self.rows[places]).astype(np.float32, copy=False)

    def readable_only(self) -> Embeddings:
        """The rows whose image could be decoded."""
        return self if self.readable.all() else replace(self.take(np.flatnonzero(self.readable)), reasons={})
