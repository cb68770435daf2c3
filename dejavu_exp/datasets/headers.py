"""Sizes of image files, from their headers alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from dejavu_exp import progress

UNREADABLE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no image, or breaks off in its header."""
UPRIGHT = 1
"""EXIF's number for a picture that is stored as it is to be seen."""


class Header(NamedTuple):
    """What the head of an image file says.

    Attributes:
        width: as stored, pixels; 0 where the head cannot be read.
        height: likewise.
        orientation: EXIF's number, 1 to 8.
        fault: why the head cannot be read.
    """

    width: int
    height: int
    orientation: int = UPRIGHT
    fault: str | None = None


def read(root: Path, names: Sequence[str]) -> list[Header]:
    """The heads of files below a folder, in their order."""
    found = []
    paths = [root / name for name in names]
    with (
        ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool,
        progress.bar("reading image sizes", len(paths), delay=2) as bar,
    ):
        for header in pool.map(_header, paths, chunksize=64):
            found.append(header)
            bar.update()
    return found


def _header(path: Path) -> Header:
    try:
        with Image.open(path) as picture:
            # Of a PNG, Pillow would decode all pixels to look for EXIF behind them.
            has_exif = picture.format != "PNG" or "exif" in picture.info
            orientation = picture.getexif().get(0x0112, UPRIGHT) if has_exif else UPRIGHT
            return Header(*picture.size, orientation if orientation in range(1, 9) else UPRIGHT)
    except UnidentifiedImageError:  # its message names the path, which the row has already
        return Header(0, 0, fault="it is no image that Pillow knows")
    except UNREADABLE_ERRORS as error:
        return Header(0, 0, fault=f"its head cannot be read: {error}")
