"""A region of a JPEG file without the rest of the picture, where nvImageCodec is installed (it needs no GPU).

libjpeg-turbo, which it contains, then leaves out what takes longest for all pixels outside the region: the inverse
transform and the colours. Pillow uses the same library, and the pixels are the same bit by bit.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from dejavu_exp.crops import Rect

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""RGB, shape (height, width, 3)."""

START, END = b"\xff\xd8\xff", b"\xff\xd9"
SEQUENTIAL = frozenset({0xC0, 0xC1})
"""Markers of a frame that is stored from top to bottom, Huffman coded."""
SCAN = 0xDA
"""Marker of a scan, after whose header the coded pixels follow."""
SEGMENTS = SEQUENTIAL | {SCAN, 0xC4, 0xDB, 0xDD, 0xFE} | frozenset(range(0xE0, 0xF0))
"""Markers of segments that such a file has: also tables, a comment, and what belongs to an application. Others are of
progressive, lossless and arithmetically coded frames, or are damage, with which decoders fare differently."""
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""What ends the coded pixels. Before the end of the file it is damage, which only a decoder of all of it would meet."""
LEAST_WIDTH = 16
"""Pixels. libjpeg-turbo does not interpolate the colours of a strip of one or two columns at a picture's border."""
DISTRIBUTIONS = ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13")
"""What brings nvImageCodec. Its decoder for CPUs is the same in both."""


@functools.cache
def library() -> str | None:
    """Name and version of the library that decodes regions, or None where it is not installed."""
    for name in DISTRIBUTIONS:
        try:
            found = f"nvimgcodec {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
        return found if importlib.util.find_spec("nvidia.nvimgcodec") else None
    return None


def plain_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that can be decoded in part, or None where a file needs Pillow.

    A file that is not whole is Pillow's: it is unreadable even where the region lies in the part that is there. So are
    progressive files, of which all must be read first, and CMYK.
    """
    if not (content.startswith(START) and content.endswith(END)):
        return None
    size, at = None, len(START) - 1
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker not in SEGMENTS:
            return None
        if marker in SEQUENTIAL:
            precision, height, width, components = struct.unpack_from(">BHHB", content, at + 4)
            size = (width, height) if precision == 8 and components in (1, 3) else None
        at += 2 + length
        if marker == SCAN:
            stop = MARKER.search(content, at)
            return size if stop is not None and stop.start() == len(content) - len(END) else None
    return None


def decode_region(content: bytes, region: Rect) -> Pixels | None:
    """The pixels of a region, or None where the file needs Pillow, which also knows what is wrong with it."""
    size = plain_size(content)
    xmin, ymin, xmax, ymax = region
    if size is None or not (0 <= xmin < xmax <= size[0] and 0 <= ymin < ymax <= size[1]):
        return None
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        return None  # Pillow warns of such a picture, or refuses it
    left = max(0, min(xmin, size[0] - LEAST_WIDTH))
    right = min(size[0], max(xmax, left + LEAST_WIDTH))
    codec = _codec()
    # The decoder's threads do not survive a fork, and nothing says that two threads may share one.
    decoder, parameters = _decoder(os.getpid(), threading.get_ident())
    stream = codec.CodeStream(content).get_sub_code_stream(region=codec.Region(ymin, left, ymax, right))
    decoded = decoder.decode(stream, params=parameters)
    return None if decoded is None else np.asarray(decoded.cpu())[:, xmin - left : xmax - left]


@functools.lru_cache(maxsize=64)
def _decoder(_process: int, _thread: int) -> tuple[Any, Any]:
    """A decoder that works in the calling thread, and its parameters."""
    codec = _codec()
    with _silent_stderr():
        decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[codec.Backend(codec.CPU_ONLY)],
            options=":fancy_upsampling=1",  # colours between the stored ones are interpolated, as Pillow does
        )
    return decoder, codec.DecodeParams(color_spec=codec.ColorSpec.SRGB, apply_exif_orientation=False)


@functools.cache
def _codec() -> Any:  # noqa: ANN401
    """The module of nvImageCodec."""
    # It says on loading that it lacks the libraries for GPUs, and later of damaged files what Pillow says better.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    with _silent_stderr():
        from nvidia import nvimgcodec
    return nvimgcodec


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep native code from writing to the terminal: it does not go through `sys.stderr`."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
