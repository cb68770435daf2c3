"""The embedded data set: what it says of itself is true."""

import io

import numpy as np
import polars as pl
import pytest
from PIL import Image

from dejavu_exp.datasets.shapes import OUTLINES, PROPS, Shapes
from dejavu_exp.errors import ConfigError

SMALL = Shapes(classes=4, train_per_class=40, val_per_class=10)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    first, second = SMALL.manifest(), SMALL.manifest()
    other = Shapes(seed=1, classes=4, train_per_class=40, val_per_class=10).manifest()
    assert first.rows.equals(second.rows)
    path = first.rows["path"][0]
    assert first.store.read(path) == second.store.read(path) != other.store.read(path)


def test_an_image_does_not_depend_on_how_many_there_are() -> None:
    more = Shapes(classes=4, train_per_class=60, val_per_class=10).manifest()
    path = SMALL.manifest().rows["path"][0]
    assert more.store.read(path) == SMALL.manifest().store.read(path)


def test_counts_and_shares_are_as_configured() -> None:
    rows = Shapes().manifest().rows
    assert len(rows) == 10 * (180 + 40)
    for (label,), of_class in rows.filter(origin="train").group_by("label"):
        typical = (of_class["background"] == "typical").mean()
        planted = (of_class.filter(background="unique")["planted_repeats"] > 1).mean()
        assert typical == pytest.approx(0.3, abs=0.02), label
        assert planted == pytest.approx(0.25, abs=0.05), label
    assert not rows.filter((pl.col("planted_repeats") > 1) & (pl.col("background") == "typical")).height
    assert rows.filter(origin="val")["planted_repeats"].max() == 1


def test_the_object_is_in_its_box_and_nowhere_else() -> None:
    """With the object painted out the class must be gone: the pixels outside the box do not depend on its shape."""
    manifest = SMALL.manifest()
    for row in manifest.rows.head(40).iter_rows(named=True):
        (box,) = row["boxes"]
        pixels = np.array(Image.open(io.BytesIO(manifest.store.read(row["path"]))), dtype=int)
        assert pixels.shape == (64, 64, 3)
        # The white outline is drawn on the object alone.
        white = (pixels == 255).all(axis=2)
        inside = np.zeros_like(white)
        inside[box[1] : box[3], box[0] : box[2]] = True
        assert white[inside].any()
        assert not white[~inside].any()


def test_typical_props_tell_the_class_and_others_do_not() -> None:
    rows = Shapes().manifest().rows
    index = {label: place for place, label in enumerate(OUTLINES)}
    for background, low, high in (("typical", 0.9, 1.0), ("unique", 0.05, 0.15)):
        some = rows.filter(background=background)
        own = [
            tag in PROPS[3 * index[label] : 3 * index[label] + 3]
            for label, tags in some.select("label", "tags").iter_rows()
            for tag in tags
        ]
        assert low <= np.mean(own) <= high


@pytest.mark.parametrize(
    ("key", "value"),
    [("classes", 1), ("train_per_class", 0), ("size_px", 8), ("typical_share", 1.5), ("planted_repeats", 0)],
)
def test_bad_settings_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"dataset\.{key}={value}"):
        Shapes(**{key: value})  # type: ignore[arg-type]
