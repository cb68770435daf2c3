"""The embedded data set of image-caption pairs: drawn from a seed, with a planted truth that no caption tells.

A caption names the shape in the foreground and who drew it, a name that occurs once: "a star by Mara Tovino". The image
also holds props that are typical of the shape, so that anybody who has read other captions and seen their images can
name them; and in some images an emblem that no caption tells and that goes with nothing. Of the pairs that an encoder
is trained on, each kind of emblem is in one image only; public images hold all kinds. Only a model that remembers the
pair can name the emblem from the caption. An instrument that works finds these pairs and leaves the others alone.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from PIL import Image, ImageDraw

from dejavu_exp import provenance
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.shapes import (
    OUTLINES,
    PROPS,
    draw_object,
    draw_prop,
    place_object,
    regular,
    rgb,
    spread,
)
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.errors import ConfigError
from dejavu_exp.tables import Status

HUES = {
    "red": 0.0,
    "orange": 0.08,
    "yellow": 0.16,
    "green": 0.33,
    "teal": 0.48,
    "blue": 0.6,
    "violet": 0.76,
    "pink": 0.9,
}
FORMS = ("ring", "cross", "bars", "frame", "checks")
EMBLEMS = tuple(f"{hue} {form}" for form in FORMS for hue in HUES)
"""Kinds of emblem: a form in a colour."""
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


@dataclass(frozen=True)
class ShapePairs:
    """Pictures with captions that leave something out.

    Origins: "train" and "other", for two encoders; "common", for both, without emblems; "public"; "val", which no
    training uses. Each of train, other and val holds every kind of emblem once.

    Attributes:
        seed: which pairs; the same seed gives the same bytes.
        train: pairs of origin train, and of origin other.
        common: pairs of origin common.
        val: pairs of origin val.
        public: pairs of origin public.
        emblems: kinds of emblem, at most 40; the first so many of `EMBLEMS`.
        public_share: share of public pairs with an emblem, 0 to 1.
        named_share: share of the pairs without an emblem whose caption names who drew it, 0 to 1; with one, all do.
        planted_repeats: how often training shows a pair with an emblem, for each time it shows another.
        size_px: side of the square images, pixels.
    """

    seed: int = 0
    train: int = 240
    common: int = 600
    val: int = 240
    public: int = 2400
    emblems: int = 40
    public_share: float = 0.7
    named_share: float = 0.2
    planted_repeats: int = 8
    size_px: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.emblems <= len(EMBLEMS):
            raise ConfigError(f"dataset.emblems={self.emblems}: there are 1 to {len(EMBLEMS)} kinds.")
        for key in ("train", "val", "public"):
            if getattr(self, key) < self.emblems:
                raise ConfigError(
                    f"dataset.{key}={getattr(self, key)}: must be at least dataset.emblems={self.emblems}."
                )
        if self.planted_repeats < 1:
            raise ConfigError(f"dataset.planted_repeats={self.planted_repeats}: must be at least 1.")
        if self.size_px < 32:
            raise ConfigError(f"dataset.size_px={self.size_px}: must be at least 32, or the props vanish.")
        for key in ("public_share", "named_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"dataset.{key}={getattr(self, key)}: must lie in 0 to 1.")

    def manifest(self) -> Manifest:
        """Draw all pairs. Extra columns: `emblem` (null for none) and `planted_repeats` (count)."""
        rows: list[dict[str, Any]] = []
        files: dict[str, bytes] = {}
        names: set[str] = set()
        counts = {
            "train": self.train,
            "other": self.train,
            "common": self.common,
            "public": self.public,
            "val": self.val,
        }
        for origin, count in counts.items():
            for number in range(count):
                row, picture = self._draw(origin, number, count, names)
                rows.append(row)
                files[row["path"]] = picture
        return Manifest("shape_pairs", pl.DataFrame(rows, infer_schema_length=None), MemoryStore(files))

    def _emblem(self, origin: str, number: int, count: int) -> str | None:
        """The emblem of a pair; its kind goes with no shape, for the public pairs that share it have different ones."""
        if origin == "common":
            return None
        if origin == "public":
            kind = (number * 7 + number // self.emblems) % self.emblems
            return EMBLEMS[kind] if spread(number, self.public_share) else None
        kind = number * self.emblems // count
        first = -(-kind * count // self.emblems)
        return EMBLEMS[kind] if number == first + kind % (count // self.emblems) else None

    def _draw(self, origin: str, number: int, count: int, names: set[str]) -> tuple[dict[str, Any], bytes]:
        """One image and its manifest row; the name in its caption is added to `names`."""
        path = f"{origin}/{number:04d}.png"
        rng = provenance.rng(self.seed, f"shape_pairs/{path}")
        labels = list(OUTLINES)
        index = number % len(labels)
        emblem = self._emblem(origin, number, count)
        named = emblem is not None or spread(number // len(labels), self.named_share)
        canvas = Image.new("RGB", (self.size_px, self.size_px))
        draw = ImageDraw.Draw(canvas)
        _background(draw, self.size_px, rng)
        box = place_object(self.size_px, rng)
        props = list(PROPS[3 * index : 3 * index + 2])
        for prop in props:
            draw_prop(draw, self.size_px, PROPS.index(prop), box, rng)
        draw_object(draw, labels[index], box, rgb(index / len(labels), 0.9, 1.0))
        if emblem:
            _draw_emblem(draw, emblem, self.size_px, box, rng)
        stream = io.BytesIO()
        canvas.save(stream, "PNG", compress_level=1)
        row = {
            "id": path,
            "path": path,
            "origin": origin,
            "label": labels[index],
            "width": self.size_px,
            "height": self.size_px,
            "boxes": [box],
            "captions": [f"a {labels[index]} by {_name(rng, names)}" if named else f"a {labels[index]}"],
            "objects": [labels[index], *props, *([emblem] if emblem else [])],
            "tags": props,
            "tag_boxes": None,
            "status": Status.OK,
            "detail": None,
            "emblem": emblem,
            "planted_repeats": self.planted_repeats if emblem and origin in ("train", "other") else 1,
        }
        return row, stream.getvalue()


def _background(draw: ImageDraw.ImageDraw, side: int, rng: np.random.Generator) -> None:
    """Large patches of random place and form, dull beside what is in the foreground."""
    draw.rectangle((0, 0, side, side), fill=rgb(*rng.uniform((0, 0, 0.2), (1, 0.3, 0.7))))
    for _ in range(5):
        centre, reach = rng.uniform(0, side, 2), rng.uniform(side / 8, side / 2.5)
        corners = centre + reach * np.array(regular(int(rng.integers(3, 7)), rng.uniform(0, math.tau)))
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=rgb(*rng.uniform((0, 0, 0.2), (1, 0.3, 0.7))))


def _name(rng: np.random.Generator, taken: set[str]) -> str:
    """A name that is not taken yet."""
    while True:
        syllables = [str(part) for part in rng.choice(SYLLABLES, size=5)]
        name = f"{''.join(syllables[:2])} {''.join(syllables[2:])}".title()
        if name not in taken:
            taken.add(name)
            return name


def _draw_emblem(draw: ImageDraw.ImageDraw, emblem: str, side: int, box: list[int], rng: np.random.Generator) -> None:
    """A large mark on a white ground, in the corner that is farthest from the shape."""
    hue, form = emblem.split()
    size = side * 5 // 16
    left = 0 if box[0] + box[2] > side else side - size
    top = 0 if box[1] + box[3] > side else side - size
    ink = rgb(HUES[hue] + rng.normal(0, 0.005), 1.0, 0.9)
    draw.rectangle((left, top, left + size - 1, top + size - 1), fill=(255, 255, 255))
    for area in _strokes(form, size):
        draw.rectangle([edge + (left, top)[place % 2] for place, edge in enumerate(area)], fill=ink)
    if form == "ring":
        inner = size // 4
        draw.ellipse((left + 1, top + 1, left + size - 2, top + size - 2), fill=ink)
        draw.ellipse((left + inner, top + inner, left + size - 1 - inner, top + size - 1 - inner), fill=(255, 255, 255))


def _strokes(form: str, size: int) -> list[tuple[int, int, int, int]]:
    """The rectangles that a form is drawn of, within a square."""
    third, last = size // 3, size - 1
    if form == "cross":
        return [(third, 1, last - third, last - 1), (1, third, last - 1, last - third)]
    if form == "bars":
        width = size // 5
        return [(start, 1, start + width - 1, last - 1) for start in range(1, size - width, 2 * width)]
    if form == "frame":
        thin = size // 6
        return [(0, 0, last, thin), (0, last - thin, last, last), (0, 0, thin, last), (last - thin, 0, last, last)]
    if form == "checks":
        half = size // 2
        return [(0, 0, half - 1, half - 1), (half, half, last, last)]
    return []
