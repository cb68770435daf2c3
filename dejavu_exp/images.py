"""Images from bytes to what an encoder takes: inspect, decode, cut the view, transform."""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import PIL
import polars as pl
import pyarrow as pa
from PIL import Image, UnidentifiedImageError, features

from dejavu_exp import jpeg, progress, provenance
from dejavu_exp.crops import Rect
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.errors import DataError
from dejavu_exp.jpeg import Pixels
from dejavu_exp.tables import Status

if TYPE_CHECKING:
    from torch import Tensor

UNREADABLE_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's readers and the stores raise for an image that is missing, damaged, made to harm or not an image."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are read, whatever a file is called; of moving pictures the first. Pillow knows others, some of which
start programs (EPS) or are read by code that nobody uses."""
DECODERS = ("auto", "pillow")
"""How views are decoded. "pillow" decodes the whole picture and transforms it with the same bits as the encoder's own
transform on a picture of Pillow. "auto" decodes only the region where it can, with the same bits, and lets torch
resize, which moves some values by 1/255, seldom by 2/255, before they are normalised."""


def decode(content: bytes) -> Image.Image:
    """Decode to RGB. EXIF rotation is not applied: boxes count in the pixels as they are stored."""
    with opened(content) as picture:
        picture.load()
        if picture.format == "PNG":
            _refuse_missing_rows(picture, content)
        return eight_bits(picture).convert("RGB")


PNG_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps, of the passes of an interlaced PNG (PNG specification, section 8.2)."""
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Values a pixel, by the colour type in a PNG's header."""


def _refuse_missing_rows(picture: Image.Image, content: bytes) -> None:
    """Refuse a PNG whose data ends early: Pillow leaves the rows that are not there black and says nothing.

    Raises:
        OSError: it is one.
    """
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    last_row = np.asarray(picture.crop((0, picture.height - 1, picture.width, picture.height)))
    if last_row.any() and not interlaced:
        return  # To count the bytes costs as much as a third of decoding; this nearly always does without.
    passes = PNG_PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - left) // across), -(-(height - top) // down)) for left, top, across, down in passes]
    expected = sum(
        rows * (1 + -(-columns * bits * PNG_CHANNELS[colour] // 8)) for columns, rows in sizes if columns > 0
    )
    inflated = zlib.decompressobj().decompress(b"".join(_png_data(content)), expected)
    if len(inflated) < expected:
        raise OSError(f"truncated: its rows need {expected} bytes of pixels, it has {len(inflated)}")


def _png_data(content: bytes) -> Iterator[bytes]:
    """The data of a PNG's IDAT chunks, those of its first picture where it moves."""
    start = 8
    while start + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, start)
        if name == b"IDAT":
            yield content[start + 8 : start + 8 + length]
        start += 12 + length


def eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits by its upper 8, as Pillow reads colours of 16 bits; its own conversion would make most white.

    Raises:
        ValueError: the values have 32 bits, and so no known range.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are numbers of 32 bits (Pillow's mode {picture.mode}), of which nobody can say what is white; "
            "save it with 8 or 16 bits"
        )
    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def opened(content: bytes) -> Image.Image:
    """A picture of which only the header is read, of one of `FORMATS`.

    Raises:
        Some of UNREADABLE_ERRORS: it is none.
    """
    try:
        return Image.open(io.BytesIO(content), formats=_formats())
    except UnidentifiedImageError as error:  # its message names an address in memory, another one in every run
        raise UnidentifiedImageError("cannot identify image file") from error


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
            with opened(content) as picture:
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


def cut(picture: Image.Image, region: Rect) -> Image.Image:
    """The region (xmin, ymin, xmax, ymax; upper ends exclusive) of an image."""
    return picture if region == (0, 0, *picture.size) else picture.crop(region)


def decoder_text(decoder: str) -> str:
    """What makes pixels of bytes, with versions: it belongs into the cache key of what is computed from them.

    Args:
        decoder: one of `DECODERS`.
    """
    pillow = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}, upper 8 of 16 bits"
    if decoder == "pillow":
        return f"whole pictures and resize: {pillow}"
    return f"regions: {jpeg.library() or 'none'}; whole pictures: {pillow}; resize: torch"


def decode_view(content: bytes, region: Rect, decoder: str) -> Pixels:
    """The pixels of a region of an encoded image.

    Args:
        content: the file.
        region: what to show.
        decoder: one of `DECODERS`.

    Raises:
        OSError, SyntaxError or ValueError: the image cannot be decoded.
    """
    if decoder == "auto" and jpeg.library() is not None:
        pixels = jpeg.decode_region(content, region)
        if pixels is not None:
            return pixels
    return np.array(cut(decode(content), region))


@dataclass(frozen=True)
class ViewImages:
    """The views of a table as (row number, pixels, reason): a map-style data set for worker processes.

    A view whose image does not decode gives blank pixels and the reason, so that one broken file stops nothing. Paths
    and regions are columns, not lists: a worker that counts references in a list copies all of it sooner or later.
    """

    paths: pa.Array
    regions: npt.NDArray[np.int32]
    store: ImageStore
    transform: Callable[[Pixels], Tensor]
    blank: Tensor
    decoder: str

    @classmethod
    def of(
        cls,
        views: pl.DataFrame,
        store: ImageStore,
        transform: Callable[[Image.Image], Tensor],
        decoder: str = "auto",
    ) -> ViewImages:
        """From a table with the columns of `tables.VIEWS`, all of status ok.

        Args:
            views: the table.
            store: gives the bytes.
            transform: the encoder's own.
            decoder: one of `DECODERS`.
        """
        from dejavu_exp import transforms  # here, so that a report, which shows thumbnails, does not load torch

        regions = views.select(pl.col("xmin", "ymin", "xmax", "ymax").cast(pl.Int32)).to_numpy()
        blank = transform(Image.new("RGB", (64, 64))) * 0
        on_pixels = transforms.on_pixels(transform, exact=decoder == "pillow")
        return cls(views["path"].to_arrow(), regions, store, on_pixels, blank, decoder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor, str]:
        path = self.paths[row].as_py()
        xmin, ymin, xmax, ymax = self.regions[row].tolist()
        try:
            pixels = decode_view(self.store.read(path), (xmin, ymin, xmax, ymax), self.decoder)
        except UNREADABLE_ERRORS as error:
            return row, self.blank, f"{path}: {error}"
        return row, self.transform(pixels), ""


def thumbnail(store: ImageStore, path: str, region: Rect | None, side_px: int) -> bytes:
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
