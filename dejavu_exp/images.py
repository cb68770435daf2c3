"""Images from bytes to what an encoder takes: inspect, decode, cut the view, transform."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
from PIL import Image, UnidentifiedImageError

from dejavu_exp import progress, provenance
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.errors import DataError
from dejavu_exp.tables import Status

if TYPE_CHECKING:
    from torch import Tensor

UNREADABLE_ERRORS = (OSError, KeyError, SyntaxError, ValueError, Image.DecompressionBombError, UnidentifiedImageError)
"""What Pillow and the stores raise for an image that is missing, cut off or not an image."""


def decode(content: bytes) -> Image.Image:
    """Decode to RGB. EXIF rotation is not applied: boxes count in the pixels as they are stored."""
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("RGB")


def inspect(rows: pl.DataFrame, store: ImageStore, title: str = "reading images") -> pl.DataFrame:
    """Read every file once: its content hash, and its size where the manifest does not know it.

    Args:
        rows: columns of `tables.MANIFEST`.
        store: gives the bytes.
        title: for the progress bar.

    Returns:
        The rows with `width`, `height` and a new column `content`; a file that is not there, or whose header cannot be
        read, gets the status "unreadable" and the reason. (A file that breaks off later is found when it is decoded.)
    """

    def look(path: str) -> tuple[str | None, int | None, int | None, str | None]:
        try:
            content = store.read(path)
            with Image.open(io.BytesIO(content)) as picture:
                return provenance.hash_bytes(content), picture.width, picture.height, None
        except UNREADABLE_ERRORS as error:
            return None, None, None, f"{path}: {error}"

    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        looks = []
        with progress.bar(title, len(rows), delay=2) as bar:
            for found in pool.map(look, rows["path"], chunksize=64):
                looks.append(found)
                bar.update()
    seen = pl.DataFrame(
        looks,
        schema={"content": pl.String, "width": pl.Int32, "height": pl.Int32, "reason": pl.String},
        orient="row",
    )
    unreadable = pl.col("reason").is_not_null()
    return (
        rows.drop("width", "height")
        .hstack(seen)
        .with_columns(
            status=pl.when(unreadable).then(pl.lit(str(Status.UNREADABLE))).otherwise("status"),
            detail=pl.when(unreadable).then("reason").otherwise("detail"),
        )
        .drop("reason")
    )


def cut(picture: Image.Image, region: tuple[int, int, int, int]) -> Image.Image:
    """The region (xmin, ymin, xmax, ymax; upper ends exclusive) of an image."""
    return picture if region == (0, 0, *picture.size) else picture.crop(region)


@dataclass
class ViewImages:
    """The views of a table as (row number, pixels, reason): a map-style data set for worker processes.

    A view whose image does not decode gives blank pixels and the reason, so that one broken file stops nothing.
    """

    paths: list[str]
    regions: list[tuple[int, int, int, int]]
    store: ImageStore
    transform: Callable[[Image.Image], Tensor]
    blank: Tensor

    @classmethod
    def of(cls, views: pl.DataFrame, store: ImageStore, transform: Callable[[Image.Image], Tensor]) -> ViewImages:
        """From a table with the columns of `tables.VIEWS`, all of status ok."""
        regions = list(views.select("xmin", "ymin", "xmax", "ymax").iter_rows())
        blank = transform(Image.new("RGB", (64, 64))) * 0
        return cls(views["path"].to_list(), regions, store, transform, blank)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor, str]:
        try:
            picture = cut(decode(self.store.read(self.paths[row])), self.regions[row])
        except UNREADABLE_ERRORS as error:
            return row, self.blank, f"{self.paths[row]}: {error}"
        return row, self.transform(picture), ""


def thumbnail(store: ImageStore, path: str, region: tuple[int, int, int, int] | None, side_px: int) -> bytes:
    """A JPEG of a view, its longer side scaled to `side_px`; for reports.

    Raises:
        DataError: the image cannot be read.
    """
    try:
        picture = decode(store.read(path))
    except UNREADABLE_ERRORS as error:
        raise DataError(f"{path}: cannot be shown: {error}") from error
    if region is not None:
        picture = cut(picture, region)
    scale = side_px / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST).save(
        stream, "JPEG", quality=85
    )
    return stream.getvalue()
