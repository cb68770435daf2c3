"""Image files looked at one by one, decoded as a run decodes them: what they are, and what becomes of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import PurePosixPath
from typing import Any

import polars as pl
from PIL import ExifTags, Image

from dejavu_exp import images, progress, provenance
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.doctor.findings import Examination, Severity

LARGE_PX = 50_000_000
"""Pixels of a picture that is slow to decode."""
SAME_FORMAT = {"MPO": "JPEG"}
"""Formats that hold another: what follows the first picture is not looked at."""


@dataclass(frozen=True)
class Look:
    """What a file is.

    Attributes:
        content: hash of its bytes; None where they could not be had.
        width: pixels; None where it is no image.
        height: pixels.
        fault: "missing", "not_an_image" or "not_decoded"; empty where it decodes.
        reason: what the decoder said.
        format: Pillow's name of the format.
        mode: Pillow's name of its channels.
        expected: format that the file's ending promises; empty where it promises none.
        turned: EXIF says that it is to be shown turned or mirrored.
        moving: it has several pictures.
        see_through: it has transparent parts.
    """

    content: str | None = None
    width: int | None = None
    height: int | None = None
    fault: str = ""
    reason: str = ""
    format: str = ""
    mode: str = ""
    expected: str = ""
    turned: bool = False
    moving: bool = False
    see_through: bool = False


SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    **dict.fromkeys(("content", "fault", "reason", "format", "mode", "expected"), pl.String),
    **dict.fromkeys(("width", "height"), pl.Int32),
    **dict.fromkeys(("turned", "moving", "see_through"), pl.Boolean),
}


def look_at(paths: Sequence[str], store: ImageStore) -> pl.DataFrame:
    """Read and decode files, several at a time.

    Args:
        paths: as the store knows them.
        store: gives the bytes.

    Returns:
        The fields of `Look`, in the order of the paths.
    """
    looks = []
    # Pillow warns of large pictures, which are told of here.
    with warnings.catch_warnings(), progress.bar("decoding images", len(paths), delay=2) as bar:
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for found in pool.map(partial(_look, store), paths, chunksize=16):
                looks.append(asdict(found))
                bar.update()
    return pl.DataFrame(looks, schema=SCHEMA)


def _look(store: ImageStore, path: str) -> Look:
    try:
        content = store.read(path)
    except images.UNREADABLE_ERRORS as error:
        return Look(fault="missing", reason=str(error))
    found = Look(content=provenance.hash_bytes(content), expected=_expected(path))
    try:
        with images.opened(content) as picture:
            found = replace(found, **_header(picture))
    except images.UNREADABLE_ERRORS as error:
        return replace(found, fault="not_an_image", reason=str(error))
    try:
        images.decode(content)
    except images.UNREADABLE_ERRORS as error:
        return replace(found, fault="not_decoded", reason=str(error))
    return found


def _header(picture: Image.Image) -> dict[str, Any]:
    """What is known before anything is decoded."""
    return {
        "width": picture.width,
        "height": picture.height,
        "format": SAME_FORMAT.get(str(picture.format), str(picture.format)),
        "mode": picture.mode,
        "turned": picture.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1),
        "moving": picture.format not in SAME_FORMAT and bool(getattr(picture, "is_animated", False)),
        "see_through": picture.has_transparency_data,
    }


def _expected(path: str) -> str:
    return _endings().get(PurePosixPath(path).suffix.lower(), "")


@cache
def _endings() -> dict[str, str]:
    return {ending: SAME_FORMAT.get(name, name) for ending, name in Image.registered_extensions().items()}


@dataclass(frozen=True)
class Trait:
    """Something that files may have in common.

    Attributes:
        kind: see `findings.Finding`.
        severity: likewise.
        has: which files have it.
        sentence: likewise.
        way_out: likewise.
        told: what is said of each beside its path.
    """

    kind: str
    severity: Severity
    has: pl.Expr
    sentence: str
    way_out: str
    told: pl.Expr = pl.lit("")  # noqa: RUF009 - an expression never changes


SIZE = pl.format("{} x {} px", "width", "height")
AGAIN = "Fetch or save these files again, or leave their rows out."
TRAITS = (
    Trait(
        "image_missing", Severity.FAULT, pl.col("fault") == "missing",
        "Files are not there or may not be read; a run leaves these rows out as unreadable.",
        "Check dataset.root, and the path and permissions of these files.", pl.col("reason"),
    ),
    Trait(
        "image_not_an_image", Severity.FAULT, pl.col("fault") == "not_an_image",
        "Files are no images that Pillow knows; a run leaves these rows out as unreadable.", AGAIN, pl.col("reason"),
    ),
    Trait(
        "image_not_decoded", Severity.FAULT, pl.col("fault") == "not_decoded",
        "Images are cut off, damaged or of a kind that is not read; a run leaves these rows out as unreadable.", AGAIN,
        pl.col("reason"),
    ),
    Trait(
        "image_16_bit", Severity.NOTE, pl.col("mode").str.starts_with("I;16"),
        "Grey images have 16 bits; the encoder sees the upper 8 of them.",
        "If they use only a part of that range, as many cameras' 12 bits do, scale them and save them with 8 bits.",
    ),
    Trait(
        "image_ending", Severity.WARNING,
        (pl.col("expected") != "") & (pl.col("format") != "") & (pl.col("format") != pl.col("expected")),
        "The ending of the file's name promises another format. It is read by its content, so nothing is lost here, "
        "but other programs may fail.",
        "Rename these files.", pl.format("is {}", "format"),
    ),
    Trait(
        "image_turned", Severity.WARNING, pl.col("turned"),
        "EXIF asks to show the image turned or mirrored. It is not turned here: the encoder sees the pixels as they "
        "are stored, and boxes must count in these.",
        "If boxes were drawn on the turned images, save the images turned, without the EXIF tag.",
    ),
    Trait(
        "image_cmyk", Severity.NOTE, pl.col("mode").is_in(["CMYK", "YCCK"]),
        "CMYK images are converted to RGB without their colour profile; their colours may be off.",
        "Where colours matter, convert them with a colour-managed program.",
    ),
    Trait(
        "image_moving", Severity.NOTE, pl.col("moving"),
        "Of images that move only the first picture is looked at.", "",
    ),
    Trait(
        "image_transparent", Severity.NOTE, pl.col("see_through"),
        "Transparency is dropped: the encoder sees the colours that lie below transparent parts.",
        "If these matter, lay the images on a ground and save them again.", pl.format("mode {}", "mode"),
    ),
    Trait(
        "image_large", Severity.WARNING,
        (pl.col("fault") == "") & (pl.col("width").cast(pl.Int64) * pl.col("height") > LARGE_PX),
        f"Images of more than {LARGE_PX // 10**6} million pixels decode slowly.", "Save them smaller, boxes too.", SIZE,
    ),
)  # fmt: skip


def tell(found: Examination, looks: pl.DataFrame) -> None:
    """Note all that files have in common.

    Args:
        found: gets the findings.
        looks: as `look_at` gives it, with the column path.
    """
    for trait in TRAITS:
        having = looks.filter(trait.has)
        places = having.select(pl.concat_str([pl.col("path"), trait.told], separator=": ")).to_series().to_list()
        found.add(
            trait.severity, trait.kind, trait.sentence, trait.way_out, [place.removesuffix(": ") for place in places]
        )
