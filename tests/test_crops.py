"""The crop rules against a pixel-by-pixel oracle, and their status on planted images."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from dejavu_exp import crops, extract, provenance, tables
from dejavu_exp.crops import BackgroundCrop, CornerCrop, FullImage
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.tables import Status

Image: TypeAlias = tuple[int, int, list[list[int]]]


@st.composite
def images(draw: st.DrawFn) -> Image:
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    boxes = []
    for _ in range(draw(st.integers(0, 5))):
        xmin, ymin = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append([xmin, ymin, draw(st.integers(xmin + 1, width)), draw(st.integers(ymin + 1, height))])
    return width, height, boxes


def every_empty_rectangle(width: int, height: int, boxes: list[list[int]]) -> Iterator[crops.Rect]:
    """All rectangles of unmarked pixels, by counting the marked ones: knows nothing of edges."""
    marked = np.zeros((height, width), dtype=bool)
    for xmin, ymin, xmax, ymax in boxes:
        marked[ymin:ymax, xmin:xmax] = True
    for xmin in range(width):
        for xmax in range(xmin + 1, width + 1):
            for ymin in range(height):
                for ymax in range(ymin + 1, height + 1):
                    if not marked[ymin:ymax, xmin:xmax].any():
                        yield xmin, ymin, xmax, ymax


def declared_rank(rect: crops.Rect) -> tuple[int, ...]:
    xmin, ymin, xmax, ymax = rect
    wide, tall = xmax - xmin, ymax - ymin
    return min(wide, tall), wide * tall, -ymin, -xmin, wide


@examples(150)
@given(images())
def test_the_largest_rectangle_is_the_best_of_all_empty_ones(image: Image) -> None:
    expected = max(every_empty_rectangle(*image), key=declared_rank, default=None)
    assert crops.largest_rectangle(*image) == expected


@examples(100)
@given(images())
def test_the_order_of_boxes_does_not_matter(image: Image) -> None:
    width, height, boxes = image
    assert crops.largest_rectangle(width, height, boxes[::-1]) == crops.largest_rectangle(width, height, boxes)
    assert crops.authors_rectangle(width, height, boxes[::-1]) == crops.authors_rectangle(width, height, boxes)


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], (0, 0, 100, 100)),
        ([[0, 0, 100, 100]], None),
        ([[0, 0, 60, 100], [50, 0, 100, 100]], None),
        ([[30, 0, 100, 100]], (0, 0, 30, 100)),
        # Equal on the left and on the right: the lower xmin.
        ([[40, 0, 60, 100]], (0, 0, 40, 100)),
        # Equal above and below: the lower ymin.
        ([[0, 40, 100, 60]], (0, 0, 100, 40)),
        # The same corner, 40 x 100 or 100 x 40: the wider one.
        ([[40, 40, 100, 100]], (0, 0, 100, 40)),
        # Shorter side 40 twice: the larger area, although it lies lower.
        ([[0, 40, 100, 60], [90, 0, 100, 40]], (0, 60, 100, 100)),
    ],
)
def test_planted_rectangles(boxes: list[list[int]], expected: Any) -> None:
    assert crops.largest_rectangle(100, 100, boxes) == expected


def largest_side(width: int, height: int, boxes: list[list[int]]) -> int:
    """The largest shorter side of all empty rectangles, by counting marked pixels in every one of them at once."""
    marked = np.zeros((height + 1, width + 1), dtype=int)
    for xmin, ymin, xmax, ymax in boxes:
        marked[ymin + 1 : ymax + 1, xmin + 1 : xmax + 1] = 1
    below = marked.cumsum(axis=0).cumsum(axis=1)
    (left, right), (top, bottom) = np.triu_indices(width + 1, 1), np.triu_indices(height + 1, 1)
    inside = below[bottom][:, right] - below[top][:, right] - below[bottom][:, left] + below[top][:, left]
    sides = np.minimum.outer(bottom - top, right - left)
    return int(sides[inside == 0].max(initial=0))


def test_on_500_random_cases_how_often_the_authors_rule_finds_less() -> None:
    """The counts that the docstring of `BackgroundCrop` states; a usable crop has a quarter of the shorter side."""
    rng = np.random.default_rng(0)
    larger = missed = 0
    for _ in range(500):
        width, height = rng.integers(12, 33, size=2).tolist()
        boxes = []
        for _ in range(rng.integers(1, 4)):
            xmin, ymin = int(rng.integers(width)), int(rng.integers(height))
            boxes.append([xmin, ymin, int(rng.integers(xmin + 1, width + 1)), int(rng.integers(ymin + 1, height + 1))])
        best = largest_side(width, height, boxes)
        rect = crops.largest_rectangle(width, height, boxes)
        assert (min(rect[2] - rect[0], rect[3] - rect[1]) if rect else 0) == best
        least = min(width, height) // 4
        theirs = crops.authors_rectangle(width, height, boxes, least)
        larger += best > theirs.best_min_side
        missed += theirs.crop is None and best > least
    assert (larger, missed) == (280, 6)


def test_the_choice_of_the_rule_is_in_what_the_cache_of_embeddings_is_keyed_by(rows: pl.DataFrame) -> None:
    """By the region of each view: rules that show the same share what was embedded, others do not."""
    image = rows.filter(pl.col("id") == "good").with_columns(boxes=pl.Series([[[20, 0, 30, 30]]], dtype=tables.BOXES))
    shown = [crops.views(image, BackgroundCrop(5, compat)) for compat in ("corrected", "authors")]
    hashes = {provenance.hash_table(views.select("view_id", *extract.GOES_IN["images"])) for views in shown}
    assert [views["status"].to_list() for views in shown] == [["ok"], ["ok"]]
    assert len(hashes) == 2


def test_the_authors_rule_misses_what_crosses_an_edge() -> None:
    boxes = [[40, 0, 60, 30]]
    assert crops.authors_rectangle(100, 100, boxes).best_min_side == 40
    assert crops.largest_rectangle(100, 100, boxes) == (0, 30, 100, 100)


def test_background_threshold_must_be_exceeded() -> None:
    boxes = [[30, 0, 100, 100]]
    assert BackgroundCrop(29).region(100, 100, boxes) == ((0, 0, 30, 100), Status.OK, "")
    assert BackgroundCrop(29, "authors").region(100, 100, boxes) == ((0, 0, 30, 100), Status.OK, "")
    for rule in (BackgroundCrop(30), BackgroundCrop(30, "authors")):
        region, status, detail = rule.region(100, 100, boxes)
        assert (region, status) == (None, Status.TOO_SMALL)
        assert "30 px" in detail


@pytest.mark.parametrize("compat", ["corrected", "authors"])
def test_no_annotation_differs_from_no_object(compat: Literal["corrected", "authors"]) -> None:
    rule = BackgroundCrop(10, compat)
    assert rule.region(20, 30, None)[:2] == (None, Status.NO_ANNOTATION)
    assert rule.region(20, 30, []) == ((0, 0, 20, 30), Status.OK, "")


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ([-1, 2, 5, 8], "leaves"),
        ([1, -2, 5, 8], "leaves"),
        ([1, 2, 51, 8], "leaves"),
        ([1, 2, 5, 41], "leaves"),
        ([5, 2, 5, 8], "no area"),
        ([5, 2, 1, 8], "no area"),
        ([1, 8, 5, 8], "no area"),
    ],
)
def test_misplaced_boxes_are_refused_and_named(box: list[int], fault: str) -> None:
    region, status, detail = BackgroundCrop(3).region(50, 40, [[0, 0, 2, 2], box])
    assert (region, status) == (None, Status.BOX_OUTSIDE)
    assert fault in detail
    assert str(box) in detail


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([[1, 2, 51, 8]], (None, Status.BOX_OUTSIDE)),
        # The strip before the only box is missing, as that box starts left of the image.
        ([[-5, 0, 30, 40]], ((30, 0, 50, 40), Status.OK)),
        # The best candidate starts left of the image, where slicing gives nothing.
        ([[-20, 0, 45, 2]], (None, Status.BOX_OUTSIDE)),
        # A run that starts above the image, and one that ends below and is cut at the border.
        ([[0, -9, 50, -2]], (None, Status.BOX_OUTSIDE)),
        ([[0, 45, 50, 48]], ((0, 0, 50, 40), Status.OK)),
        # Blocks nothing, splits the strips at 20 and 30.
        ([[30, 0, 20, 40]], ((30, 0, 50, 40), Status.OK)),
    ],
)
def test_authors_compat_on_boxes_outside(boxes: list[list[int]], expected: Any) -> None:
    assert BackgroundCrop(5, "authors").region(50, 40, boxes)[:2] == expected


def test_corner_and_full() -> None:
    assert CornerCrop().region(200, 100, None) == ((0, 0, 60, 30), Status.OK, "")
    assert CornerCrop(0.25, "bottom_left").region(200, 100, None) == ((0, 75, 50, 100), Status.OK, "")
    assert CornerCrop(0.01).region(20, 20, None)[0] == (0, 0, 1, 1)
    assert FullImage().region(200, 100, [[500, 0, 600, 9]]) == ((0, 0, 200, 100), Status.OK, "")
    assert [rule.name for rule in (BackgroundCrop(1), CornerCrop(), FullImage())] == ["background", "corner", "full"]


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: BackgroundCrop(0), "view.min_side_px=0"),
        (lambda: BackgroundCrop(5, "theirs"), "view.compat=theirs"),  # type: ignore[arg-type]
        (lambda: CornerCrop(0.0), "view.fraction=0.0"),
        (lambda: CornerCrop(1.5), "view.fraction=1.5"),
        (lambda: CornerCrop(0.3, "middle"), "view.corner=middle"),  # type: ignore[arg-type]
    ],
)
def test_bad_rules_are_refused(build: Callable[[], object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build()


def row(
    name: str,
    status: Status = Status.OK,
    boxes: list[list[int]] | None = None,
    detail: str | None = None,
    size: tuple[int | None, int | None] = (50, 40),
) -> dict[str, Any]:
    known = {"id": name, "path": f"{name}.png", "origin": "train", "label": "cat", "boxes": boxes}
    rest = dict.fromkeys(("captions", "objects", "tags", "tag_boxes"))
    place = {"width": size[0], "height": size[1], "role": "target", "content": f"hash of {name}"}
    return {**known, **rest, **place, "status": status, "detail": detail}


@pytest.fixture
def rows() -> pl.DataFrame:
    planted = [
        row("good", boxes=[[20, 0, 50, 40]]),
        row("unknown", Status.NO_ANNOTATION, detail="no file"),
        row("broken", Status.BAD_ANNOTATION, detail="not XML"),
        row("covered", boxes=[[0, 0, 50, 40]]),
        row("outside", boxes=[[0, 0, 51, 40]]),
        row("unreadable", Status.UNREADABLE, detail="truncated", size=(None, None)),
        row("unannotated", boxes=None),
    ]
    return pl.DataFrame(planted, schema={**tables.MANIFEST, "role": pl.String, "content": pl.String})


def test_background_views_keep_every_row_with_its_reason(rows: pl.DataFrame) -> None:
    views = crops.views(rows, BackgroundCrop(10))
    assert dict(views.schema) == dict(tables.VIEWS)
    assert views["view_id"].to_list() == [f"{name}#background" for name in rows["id"]]
    assert views["status"].to_list() == [
        "ok",
        "no_annotation",
        "bad_annotation",
        "too_small",
        "box_outside",
        "unreadable",
        "no_annotation",
    ]
    assert views.filter(pl.col("status") == "ok").select("xmin", "ymin", "xmax", "ymax").rows() == [(0, 0, 20, 40)]
    assert views.filter(pl.col("status") != "ok")["xmin"].null_count() == 6
    assert views["detail"].to_list()[:3] == [None, "no file", "not XML"]
    assert views["content"].to_list() == rows["content"].to_list()


def test_a_whole_image_needs_no_annotation(rows: pl.DataFrame) -> None:
    views = crops.views(rows, FullImage())
    shown = views.filter(pl.col("status") == "ok")
    assert shown["id"].to_list() == ["good", "unknown", "broken", "covered", "outside", "unannotated"]
    assert set(shown.select("xmin", "ymin", "xmax", "ymax").rows()) == {(0, 0, 50, 40)}
    assert set(shown["detail"]) == {None}


def test_views_of_no_rows_have_the_schema(rows: pl.DataFrame) -> None:
    assert dict(crops.views(rows.clear(), FullImage()).schema) == dict(tables.VIEWS)


def test_a_row_without_size_is_named() -> None:
    frame = pl.DataFrame(
        [row("sizeless", size=(None, 40))], schema={**tables.MANIFEST, "role": pl.String, "content": pl.String}
    )
    with pytest.raises(DataError, match="sizeless"):
        crops.views(frame, FullImage())
