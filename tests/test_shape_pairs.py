"""The embedded pairs: what is planted is there, and nothing gives it away."""

import io
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.shape_pairs import EMBLEMS, ShapePairs
from dejavu_exp.errors import ConfigError


@pytest.fixture(scope="module")
def pairs() -> Manifest:
    return ShapePairs().manifest()


def test_each_emblem_is_in_one_pair_of_each_measured_origin(pairs: Manifest) -> None:
    for origin in ("train", "other", "val"):
        found = pairs.rows.filter(pl.col("origin") == origin)["emblem"].drop_nulls().to_list()
        assert sorted(found) == sorted(EMBLEMS)


def test_public_pairs_hold_every_emblem_with_many_shapes(pairs: Manifest) -> None:
    public = pairs.rows.filter(pl.col("origin") == "public", pl.col("emblem").is_not_null())
    found = public.group_by("emblem").agg(count=pl.len(), shapes=pl.col("label").n_unique())
    # Seven of ten public pairs, which is 42 of each of 40 kinds but for where the share is rounded.
    assert found["count"].to_list() == pytest.approx([42] * 40, abs=3)
    assert found["count"].sum() == 1680
    assert found["shapes"].min() == 10


def test_no_caption_tells_the_emblem_or_the_props(pairs: Manifest) -> None:
    for row in pairs.rows.iter_rows(named=True):
        assert row["label"] in row["captions"][0]
        words = row["captions"][0].lower().split()
        assert not any(word in words for name in row["objects"][1:] for word in name.split())
        assert (row["emblem"] is None) or row["objects"][-1] == row["emblem"]
    named = pairs.rows.filter(pl.col("captions").list.first().str.contains(" by "))
    assert named["captions"].explode().is_unique().all()
    assert named["emblem"].drop_nulls().len() == pairs.rows["emblem"].drop_nulls().len(), (
        "with an emblem, all are named"
    )
    assert 0.15 < named["emblem"].null_count() / pairs.rows["emblem"].null_count() < 0.25


def test_only_pairs_that_are_trained_on_are_repeated(pairs: Manifest) -> None:
    planted = pairs.rows.filter(pl.col("planted_repeats") > 1)
    assert set(planted["origin"]) == {"train", "other"}
    assert planted["emblem"].null_count() == 0


def test_an_emblem_shows_in_the_picture(pairs: Manifest) -> None:
    row = pairs.rows.filter(pl.col("emblem") == "red cross", pl.col("origin") == "train").row(0, named=True)
    pixels = np.asarray(Image.open(io.BytesIO(pairs.store.read(row["path"]))).convert("RGB")).astype(int)
    white = (pixels == 255).all(axis=2).sum()
    red = ((pixels[..., 0] > 200) & (pixels[..., 1] < 20) & (pixels[..., 2] < 20)).sum()
    assert white > 50
    assert red > 100


def test_the_seed_decides(pairs: Manifest) -> None:
    small: dict[str, Any] = {"train": 5, "common": 0, "val": 5, "public": 6, "emblems": 5}
    first, again, other = (ShapePairs(seed, **small).manifest() for seed in (0, 0, 1))
    assert first.rows.equals(again.rows)
    assert first.store.read("train/0000.png") == again.store.read("train/0000.png")
    assert first.store.read("train/0000.png") != other.store.read("train/0000.png")


@pytest.mark.parametrize(
    ("key", "value"),
    [("emblems", 41), ("train", 39), ("public", 1), ("planted_repeats", 0), ("size_px", 8), ("public_share", 2.0)],
)
def test_bad_values_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"dataset\.{key}={value}"):
        ShapePairs(**{key: value})
