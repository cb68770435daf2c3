"""The most memorized images or pairs, with what the encoder was shown and the public images that gave them away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import polars as pl

from dejavu_exp.datasets.base import Manifest
from dejavu_exp.errors import DataError
from dejavu_exp.evidence import NEAREST
from dejavu_exp.images import thumbnail
from dejavu_exp.tables import Role, Status

if TYPE_CHECKING:
    from dejavu_exp.neighbours import Neighbours

IMAGE_SIDE_PX = 192
NEIGHBOUR_SIDE_PX = 96
TOLD_LENGTH = 200
"""Characters of a caption in the one line that tells an item."""
NOWHERE: Mapping[str, Sequence[str]] = MappingProxyType({})


@dataclass(frozen=True)
class NearImage:
    """A public image near a query.

    Attributes:
        image: a JPEG; None where it cannot be read, which a bank of captions does not notice.
        truth: its label's name, or the objects in it.
        captions: of the pair; none in a data set without captions.
        distance: in the probe's unit; None where it was not kept.
        same: True where it carries what gave the item away: the true label, or an object that only the target found.
    """

    image: bytes | None
    truth: tuple[str, ...]
    captions: tuple[str, ...]
    distance: float | None
    same: bool


@dataclass(frozen=True)
class Seen:
    """What an encoder was shown of an image, and the image.

    Attributes:
        image: the whole image, a JPEG; None where it cannot be read, which a caption view does not notice, or must not
            be shown.
        captions: what a caption view shows; none for a view of the image.
        crop: what a view of the image shows, a JPEG; None for a caption view.
        region: of the crop: left, top, right, bottom as shares of the image; None for a caption view.
    """

    image: bytes | None
    captions: tuple[str, ...] = ()
    crop: bytes | None = None
    region: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class LabelItem:
    """A memorized image of the label test; `neighbours` are the target's nearest public images."""

    id: str
    label_name: str
    score: float
    target_label: str
    target_probability: float
    reference_label: str
    reference_probability: float
    seen: Seen
    neighbours: tuple[NearImage, ...]

    def told(self) -> str:
        """The item in one line."""
        return f"{self.id}: {self.label_name}, {self.score:.2f}"


@dataclass(frozen=True)
class PairItem:
    """A memorized pair of the object test.

    Attributes:
        id: of the row.
        score: memorization score.
        target_only: true objects that the target found and the reference did not; sorted, like the other three.
        both: found by both.
        reference_only: found by the reference and not by the target.
        missed: found by neither.
        seen: what was shown, and the image.
        neighbours: the target's nearest public images, nearest first.
        reference_neighbours: the reference's; none for a reference that looks at no public image.
    """

    id: str
    score: float
    target_only: tuple[str, ...]
    both: tuple[str, ...]
    reference_only: tuple[str, ...]
    missed: tuple[str, ...]
    seen: Seen
    neighbours: tuple[NearImage, ...]
    reference_neighbours: tuple[NearImage, ...]

    def told(self) -> str:
        """The item in one line."""
        found = ", ".join(self.target_only)
        return f"{self.id}: {found}, {self.score:.2f}; {' / '.join(self.seen.captions)[:TOLD_LENGTH]}"


GalleryItem: TypeAlias = LabelItem | PairItem


@dataclass(frozen=True)
class _Rows:
    """Where the pictures and words of a row are found: manifest, query views, bank views and the manifest's rows.

    `shows` is False where neither pixels nor captions may be told.
    """

    manifest: Manifest
    queries: pl.DataFrame
    public: pl.DataFrame
    images: Mapping[str, Mapping[str, Any]]
    shows: bool

    def name(self, label: str) -> str:
        """A class in words."""
        return self.manifest.class_names.get(label, label)

    def picture(self, path: str, side_px: int) -> bytes | None:
        """The whole image; None where it cannot be read."""
        return _picture(self.manifest, path, side_px)

    def seen(self, query: int) -> Seen:
        """What a query shows; nothing where that may not be told."""
        if not self.shows:
            return Seen(None)
        view = self.queries.row(query, named=True)
        image = self.picture(view["path"], IMAGE_SIDE_PX)
        if view["xmin"] is None:
            return Seen(image, tuple(view["texts"] or ()))
        region = (view["xmin"], view["ymin"], view["xmax"], view["ymax"])
        width, height = (self.images[view["id"]][side] for side in ("width", "height"))
        crop = thumbnail(self.manifest.store, view["path"], region, IMAGE_SIDE_PX)
        return Seen(
            image, crop=crop, region=(region[0] / width, region[1] / height, region[2] / width, region[3] / height)
        )

    def near(self, wanted: Iterable[str], position: int, distance: float | None) -> NearImage:
        """A public row; `wanted` are labels or objects that mark it."""
        view = self.public.row(position, named=True)
        captions = view["texts"] or (self.images[view["id"]]["captions"] or [])[:1]
        truth = view["truth"] or []
        return NearImage(
            self.picture(view["path"], NEIGHBOUR_SIDE_PX),
            tuple(map(self.name, truth)),
            tuple(text for text in captions if text),
            distance,
            not set(wanted).isdisjoint(truth),
        )


def most_memorized(
    scores: pl.DataFrame,
    queries: pl.DataFrame,
    public: pl.DataFrame,
    near: Neighbours,
    manifest: Manifest,
    images: pl.DataFrame,
    count: int,
    reference_near: Mapping[str, Sequence[str]] = NOWHERE,
    *,
    with_images: bool = True,
) -> list[GalleryItem]:
    """The memorized target rows with the largest memorization scores; ids break ties.

    Args:
        scores: columns of `tables.SCORES` or `tables.OBJECT_SCORES`, one reference.
        queries: measured query views, status ok, in the order of `near`.
        public: bank views, status ok, in the order searched.
        near: neighbours of the queries.
        manifest: the data set.
        images: the manifest's rows with known width and height.
        count: how many at most.
        reference_near: ids of the reference's nearest public rows, nearest first, by id of the query; shown for pairs.
        with_images: False leaves out pictures, captions and the public images near: no image is opened.
    """
    best = (
        scores.filter(
            pl.col("role") == Role.TARGET,
            pl.col("status") == Status.OK,
            pl.col("quadrant") == "memorized",
            pl.col("memorization_score").is_not_null(),
        )
        .sort(["memorization_score", "id"], descending=[True, False])
        .head(count)
    )
    query_of = {name: place for place, name in enumerate(queries["id"])}
    places = [query_of[name] for name in best["id"]]
    public_of = {name: place for place, name in enumerate(public["id"])}
    found = [[public_of[name] for name in reference_near.get(row, ())[:NEAREST]] for row in best["id"]]
    shown = {*best["id"], *(public["id"][int(place)] for place in near.positions[places, :NEAREST].flat)}
    shown |= {public["id"][place] for row in found for place in row}
    facts = images.filter(pl.col("id").is_in(list(shown))).select("id", "width", "height", "captions")
    rows = _Rows(manifest, queries, public, {row["id"]: row for row in facts.iter_rows(named=True)}, with_images)
    item = partial(_pair_item, rows) if "objects" in scores.columns else partial(_label_item, rows)
    return [
        item(row, query, near, others)
        for row, query, others in zip(best.iter_rows(named=True), places, found, strict=True)
    ]


def _nearest(rows: _Rows, wanted: Iterable[str], near: Neighbours, query: int) -> tuple[NearImage, ...]:
    if not rows.shows:
        return ()
    nearest = zip(near.positions[query, :NEAREST], near.distances[query, :NEAREST], strict=True)
    return tuple(rows.near(wanted, int(position), float(distance)) for position, distance in nearest)


def _label_item(rows: _Rows, row: Mapping[str, Any], query: int, near: Neighbours, others: Sequence[int]) -> LabelItem:
    return LabelItem(
        id=row["id"],
        label_name=rows.name(row["label"]),
        score=row["memorization_score"],
        target_label=rows.name(row["target_label"]),
        target_probability=row["target_probability"],
        reference_label=rows.name(row["reference_label"]),
        reference_probability=row["reference_probability"],
        seen=rows.seen(query),
        neighbours=_nearest(rows, [row["label"]], near, query),
    )


def _pair_item(rows: _Rows, row: Mapping[str, Any], query: int, near: Neighbours, others: Sequence[int]) -> PairItem:
    truth, target, reference = (set(row[name]) for name in ("objects", "target_found", "reference_found"))
    gained = target - reference
    return PairItem(
        id=row["id"],
        score=row["memorization_score"],
        target_only=tuple(sorted(gained)),
        both=tuple(sorted(target & reference)),
        reference_only=tuple(sorted(reference - target)),
        missed=tuple(sorted(truth - target - reference)),
        seen=rows.seen(query),
        neighbours=_nearest(rows, gained, near, query),
        reference_neighbours=tuple(rows.near(gained, position, None) for position in others if rows.shows),
    )


def of_copies(pairs: Iterable[Mapping[str, Any]], manifest: Manifest, count: int) -> dict[str, bytes]:
    """Pictures of rows that are copies of each other, by id; none of what cannot be read.

    Args:
        pairs: with `id` and `other_id`, as in the figures of leaks.
        manifest: the data set.
        count: how many pairs at most, the first ones.
    """
    wanted = {name for pair in islice(pairs, count) for name in (pair["id"], pair["other_id"])}
    paths = manifest.rows.filter(pl.col("id").is_in(list(wanted))).select("id", "path")
    found = {name: _picture(manifest, path, NEIGHBOUR_SIDE_PX) for name, path in paths.sort("id").iter_rows()}
    return {name: picture for name, picture in found.items() if picture is not None}


def _picture(manifest: Manifest, path: str, side_px: int) -> bytes | None:
    """The whole image, or None where it cannot be read: that must not end a run whose figures are there."""
    try:
        return thumbnail(manifest.store, path, None, side_px)
    except DataError:
        return None
