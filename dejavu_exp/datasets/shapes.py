"""The embedded data set: small pictures drawn from a seed, with everything about them known.

A class is the shape of the foreground object. The background is either unique to the image, and then says nothing about
the class, or typical of the class in colour and props, and then anybody who has seen other images of the class can name
it. Some images with a unique background are planted: training is to repeat them, background crops included, so that an
encoder remembers them. An instrument that works finds the planted ones and leaves the typical ones alone.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from PIL import Image, ImageDraw

from dejavu_exp import provenance
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.errors import ConfigError
from dejavu_exp.tables import Status

Point = tuple[float, float]
Colour = tuple[int, int, int]


def regular(corners: int, turn: float = 0.0) -> list[Point]:
    """Corners of a regular polygon within the unit circle, turned by an angle in radians."""
    angles = [2 * math.pi * i / corners + turn for i in range(corners)]
    return [(math.sin(a), -math.cos(a)) for a in angles]


def _star(corners: int) -> list[Point]:
    return [
        (x * (1.0 if i % 2 == 0 else 0.45), y * (1.0 if i % 2 == 0 else 0.45))
        for i, (x, y) in enumerate(regular(2 * corners))
    ]


_THIRD = 1 / 3
OUTLINES: dict[str, list[Point]] = {
    "disc": regular(24),
    "square": regular(4, math.pi / 4),
    "triangle": regular(3),
    "diamond": [(0, -1), (0.55, 0), (0, 1), (-0.55, 0)],
    "star": _star(5),
    "plus": [
        (-_THIRD, -1), (_THIRD, -1), (_THIRD, -_THIRD), (1, -_THIRD), (1, _THIRD), (_THIRD, _THIRD),
        (_THIRD, 1), (-_THIRD, 1), (-_THIRD, _THIRD), (-1, _THIRD), (-1, -_THIRD), (-_THIRD, -_THIRD),
    ],
    "hexagon": regular(6),
    "bar": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.9), (1, 0), (0.1, 0.9), (0.1, 0.3), (-1, 0.3)],
    "hourglass": [(-0.8, -1), (0.8, -1), (-0.8, 1), (0.8, 1)],
}  # fmt: skip
"""Outline of each class in a square from -1 to 1."""

PROPS = (
    *("acorn", "anchor", "apple", "bell", "brick", "bucket", "candle", "clock", "coin", "drum"),
    *("egg", "fern", "flag", "gate", "glove", "hat", "ink", "jug", "kite", "lamp"),
    *("mug", "nut", "oar", "pear", "pin", "quill", "rope", "spoon", "tile", "urn"),
)
"""Names of the background props; each is drawn as a small mark of its own colour and form."""


@dataclass(frozen=True)
class Shapes:
    """Pictures of coloured shapes on backgrounds that are unique or typical of the class.

    Attributes:
        seed: which pictures; the same seed gives the same bytes.
        classes: how many classes, 2 to 10.
        train_per_class: images a class in origin "train".
        val_per_class: images a class in origin "val", which no training uses.
        size_px: side of the square images, pixels.
        typical_share: share of images whose background is typical of the class, 0 to 1.
        planted_share: share of the train images with a unique background that are planted, 0 to 1.
        planted_repeats: how often training shows a planted image for each time it shows a plain one.
    """

    seed: int = 0
    classes: int = 10
    train_per_class: int = 180
    val_per_class: int = 40
    size_px: int = 64
    typical_share: float = 0.3
    planted_share: float = 0.25
    planted_repeats: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(OUTLINES):
            raise ConfigError(f"dataset.classes={self.classes}: shapes has 2 to {len(OUTLINES)} classes.")
        for key in ("train_per_class", "val_per_class", "planted_repeats"):
            if getattr(self, key) < 1:
                raise ConfigError(f"dataset.{key}={getattr(self, key)}: must be at least 1.")
        if self.size_px < 32:
            raise ConfigError(f"dataset.size_px={self.size_px}: must be at least 32, or the props vanish.")
        for key in ("typical_share", "planted_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"dataset.{key}={getattr(self, key)}: must lie in 0 to 1.")

    def manifest(self) -> Manifest:
        """Draw all images. Extra columns: `background` ("unique" or "typical") and `planted_repeats` (count)."""
        names = list(OUTLINES)[: self.classes]
        rows: list[dict[str, Any]] = []
        files: dict[str, bytes] = {}
        for origin, count in (("train", self.train_per_class), ("val", self.val_per_class)):
            for index, label in enumerate(names):
                for number in range(count):
                    row, picture = self._draw(origin, index, label, number)
                    rows.append(row)
                    files[row["path"]] = picture
        frame = pl.DataFrame(rows, infer_schema_length=None)
        return Manifest("shapes", frame, MemoryStore(files), {name: name for name in names})

    def _draw(self, origin: str, index: int, label: str, number: int) -> tuple[dict[str, Any], bytes]:
        """One image and its manifest row."""
        path = f"{origin}/{label}/{number:04d}.png"
        rng = provenance.rng(self.seed, f"shapes/{path}")
        # The number alone decides the kind, so that every class has the same shares.
        typical = spread(number, self.typical_share)
        planted = origin == "train" and not typical and spread(number * 7 + 3, self.planted_share)
        canvas = Image.new("RGB", (self.size_px, self.size_px))
        draw = ImageDraw.Draw(canvas)
        (typical_background if typical else unique_background)(draw, self.size_px, index / self.classes, rng)
        box = place_object(self.size_px, rng)
        tags = choose_props(index, typical, rng)
        tag_boxes = [draw_prop(draw, self.size_px, PROPS.index(tag), box, rng) for tag in tags]
        # A bright colour that says nothing about the class.
        draw_object(draw, label, box, rgb(rng.random(), 0.9, 1.0))
        stream = io.BytesIO()
        canvas.save(stream, "PNG", compress_level=1)
        row = {
            "id": path,
            "path": path,
            "origin": origin,
            "label": label,
            "width": self.size_px,
            "height": self.size_px,
            "boxes": [box],
            "captions": [f"a {label} among {', '.join(tags)}"],
            "objects": [label, *tags],
            "tags": tags,
            "tag_boxes": tag_boxes,
            "status": Status.OK,
            "detail": None,
            "background": "typical" if typical else "unique",
            "planted_repeats": self.planted_repeats if planted else 1,
        }
        return row, stream.getvalue()


def spread(number: int, share: float) -> bool:
    """True for `share` of all numbers, evenly spread over them (the golden-ratio sequence)."""
    return (number * 0.6180339887498949) % 1.0 < share


def rgb(hue: float, saturation: float, value: float) -> Colour:
    """Hue, saturation and value as whole red, green and blue; a hue of 1 is 0 again, the others are cut to 0 to 1."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def unique_background(draw: ImageDraw.ImageDraw, side: int, _: float, rng: np.random.Generator) -> None:
    """A plain ground and large patches, all of random colour, place and form."""
    draw.rectangle((0, 0, side, side), fill=rgb(*rng.uniform((0, 0.2, 0.2), (1, 1, 0.9))))
    for _patch in range(7):
        colour = rgb(*rng.uniform((0, 0.2, 0.2), (1, 1, 0.9)))
        centre, reach = rng.uniform(0, side, 2), rng.uniform(side / 8, side / 2.5)
        corners = centre + reach * np.array(regular(int(rng.integers(3, 7)), rng.uniform(0, math.tau)))
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=colour)


def typical_background(draw: ImageDraw.ImageDraw, side: int, hue: float, rng: np.random.Generator) -> None:
    """Stripes whose hue and slope belong to the class; shade, width and offset vary."""
    ground = rgb(hue + rng.normal(0, 0.01), rng.uniform(0.55, 0.8), rng.uniform(0.6, 0.85))
    stripe = rgb(hue + rng.normal(0, 0.01), rng.uniform(0.3, 0.5), rng.uniform(0.75, 0.95))
    draw.rectangle((0, 0, side, side), fill=ground)
    direction = np.array([math.cos(math.pi * hue), math.sin(math.pi * hue)])
    along, width = np.array([-direction[1], direction[0]]), int(rng.integers(2, 5))
    for offset in np.arange(-2 * side + rng.uniform(0, 10), 2 * side, 10):
        start, end = direction * offset - along * 2 * side, direction * offset + along * 2 * side
        draw.line((*start.tolist(), *end.tolist()), fill=stripe, width=width)


def place_object(side: int, rng: np.random.Generator) -> list[int]:
    """A box for the object, off the centre so that a wide strip of background is left beside it."""
    width = int(rng.integers(side * 3 // 10, side * 4 // 10))
    corner = [int(rng.integers(1, side // 8)), int(rng.integers(1, side - width))]
    if rng.random() < 0.5:
        corner[0] = side - width - corner[0]
    if rng.random() < 0.5:
        corner.reverse()
    return [*corner, corner[0] + width, corner[1] + width]


def draw_object(draw: ImageDraw.ImageDraw, label: str, box: Sequence[int], ink: Colour) -> None:
    """The shape, filling its box."""
    centre, reach = np.array([box[0] + box[2] - 1, box[1] + box[3] - 1]) / 2, (box[2] - box[0] - 1) / 2
    corners = centre + reach * np.array(OUTLINES[label])
    draw.polygon([tuple(c) for c in corners.tolist()], fill=ink, outline=(255, 255, 255))


def choose_props(index: int, typical: bool, rng: np.random.Generator) -> list[str]:
    """Six props, nearly all of the class's own three, where the background is typical; otherwise any three."""
    if not typical:
        return [str(name) for name in rng.choice(PROPS, size=3, replace=False)]
    own = PROPS[3 * index : 3 * index + 3]
    weights = np.array([9.0 if name in own else 0.05 for name in PROPS])
    return [str(name) for name in rng.choice(PROPS, size=6, p=weights / weights.sum())]


_MARKS: tuple[Callable[[ImageDraw.ImageDraw, tuple[int, int, int, int], Colour], None], ...] = (
    lambda draw, area, colour: draw.ellipse(area, fill=colour, outline=(0, 0, 0)),
    lambda draw, area, colour: draw.rectangle(area, fill=colour, outline=(0, 0, 0)),
    lambda draw, area, colour: draw.line((area[0], area[1], area[2], area[3]), fill=colour, width=2),
)


def draw_prop(
    draw: ImageDraw.ImageDraw, side: int, prop: int, box: Sequence[int], rng: np.random.Generator
) -> list[int]:
    """A small mark outside the object's box; returns where it is."""
    size = max(side // 9, 4)
    for _ in range(20):
        x, y = (int(value) for value in rng.integers(0, side - size, 2))
        if x + size <= box[0] or x >= box[2] or y + size <= box[1] or y >= box[3]:
            break
    _MARKS[prop % 3](draw, (x, y, x + size - 1, y + size - 1), rgb(prop / len(PROPS), 1.0, 0.55 + 0.4 * (prop % 2)))
    return [x, y, x + size, y + size]
