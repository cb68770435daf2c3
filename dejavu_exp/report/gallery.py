"""The most memorized images, with their crops and the public images that gave them away."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from dejavu_exp.datasets.base import Manifest
from dejavu_exp.images import thumbnail
from dejavu_exp.neighbours import Neighbours
from dejavu_exp.tables import Role, Status

IMAGE_SIDE_PX = 192
NEIGHBOUR_SIDE_PX = 96
N_NEIGHBOURS = 5


@dataclass(frozen=True)
class NearImage:
    """A public image near the crop; `image` is a JPEG, `distance` in the probe's unit."""

    image: bytes
    label: str
    label_name: str
    distance: float


@dataclass(frozen=True)
class GalleryItem:
    """A memorized image. Pictures are JPEGs; `region` is the crop: left, top, right, bottom as shares of the image."""

    id: str
    label: str
    label_name: str
    score: float
    target_label: str
    target_probability: float
    reference_label: str
    reference_probability: float
    image: bytes
    crop: bytes
    region: tuple[float, float, float, float]
    neighbours: tuple[NearImage, ...]


def most_memorized(
    scores: pl.DataFrame,
    queries: pl.DataFrame,
    public: pl.DataFrame,
    near: Neighbours,
    manifest: Manifest,
    images: pl.DataFrame,
    count: int,
) -> list[GalleryItem]:
    """The memorized target rows with the largest memorization scores.

    Args:
        scores: columns of `tables.SCORES`, one reference.
        queries: measured query views, status ok, in the order of `near`.
        public: bank views, status ok, in the order searched.
        near: neighbours of the queries.
        manifest: the data set.
        images: the manifest's rows with known width and height.
        count: how many at most.
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
    row_of = {image_id: row for row, image_id in enumerate(queries["id"])}
    sizes = {name: size for name, *size in images.select("id", "width", "height").iter_rows()}
    items = []
    for row in best.iter_rows(named=True):
        query = row_of[row["id"]]
        view = queries.row(query, named=True)
        width, height = sizes[row["id"]]
        region = (view["xmin"], view["ymin"], view["xmax"], view["ymax"])
        neighbours = tuple(
            _near(public.row(int(position), named=True), float(distance), manifest)
            for position, distance in zip(
                near.positions[query, :N_NEIGHBOURS], near.distances[query, :N_NEIGHBOURS], strict=True
            )
        )
        items.append(
            GalleryItem(
                id=row["id"],
                label=row["label"],
                label_name=manifest.class_names.get(row["label"], row["label"]),
                score=row["memorization_score"],
                target_label=manifest.class_names.get(row["target_label"], row["target_label"]),
                target_probability=row["target_probability"],
                reference_label=manifest.class_names.get(row["reference_label"], row["reference_label"]),
                reference_probability=row["reference_probability"],
                image=thumbnail(manifest.store, view["path"], None, IMAGE_SIDE_PX),
                crop=thumbnail(manifest.store, view["path"], region, IMAGE_SIDE_PX),
                region=(region[0] / width, region[1] / height, region[2] / width, region[3] / height),
                neighbours=neighbours,
            )
        )
    return items


def _near(view: dict[str, str], distance: float, manifest: Manifest) -> NearImage:
    name = manifest.class_names.get(view["label"], view["label"])
    return NearImage(thumbnail(manifest.store, view["path"], None, NEIGHBOUR_SIDE_PX), view["label"], name, distance)
