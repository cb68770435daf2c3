"""Captions as views."""

from typing import Any

import polars as pl
import pytest

from dejavu_exp import crops, tables
from dejavu_exp.captions import Caption
from dejavu_exp.datasets.annotations import rows_of
from dejavu_exp.errors import ConfigError


def manifest(captions: list[list[str] | None], status: str = "ok") -> pl.DataFrame:
    ids = [f"img{place}" for place in range(len(captions))]
    columns: dict[str, Any] = {"id": ids, "path": ids, "captions": captions, "status": [status] * len(ids)}
    return rows_of(columns).with_columns(role=pl.lit("target"), content=pl.lit("c"))


def texts(captions: list[list[str] | None], choose: Any = "first", seed: int = 0) -> list[Any]:
    return crops.views(manifest(captions), Caption(choose, seed))["texts"].to_list()


def test_first_random_and_all() -> None:
    five = [f"caption {number}" for number in range(5)]
    assert texts([five]) == [[five[0]]]
    assert texts([five], "all") == [five]
    drawn = {texts([five], "random", seed)[0][0] for seed in range(60)}
    assert drawn == set(five)
    assert texts([five] * 50, "random", 3) == texts([five] * 50, "random", 3)
    assert len({tuple(chosen) for chosen in texts([five] * 50, "random", 3)}) == 5, "the draw depends on the row"


def test_blank_captions_do_not_count() -> None:
    assert texts([["", "  \n", "a dog"]]) == [["a dog"]]


def test_a_row_without_caption_is_told() -> None:
    found = crops.views(manifest([None, [], [" "], ["a dog"]]), Caption())
    assert found["status"].to_list() == ["no_caption"] * 3 + ["ok"]
    assert found["detail"][0] == "the row has no caption"


@pytest.mark.parametrize("text", ["<script>alert('x')</script>", "word " * 2000, "naïve\ncafé \N{SNOWMAN}"])
def test_captions_are_taken_as_they_are(text: str) -> None:
    assert texts([[text]]) == [[text]]


@pytest.mark.parametrize("status", ["no_annotation", "bad_annotation"])
def test_boxes_play_no_part(status: str) -> None:
    assert crops.views(manifest([["a dog"]], status), Caption())["status"].to_list() == ["ok"]


def test_a_caption_whose_image_cannot_be_read_is_excluded() -> None:
    found = crops.views(manifest([["a dog"]], "unreadable"), Caption())
    assert found["status"].to_list() == ["unreadable"]
    assert found["texts"].to_list() == [None]


def test_views_have_the_columns_of_all_views() -> None:
    found = crops.views(manifest([["a dog"]]), Caption())
    assert found.schema == pl.Schema(dict(tables.VIEWS))
    assert found["view_id"].to_list() == ["img0#caption"]


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match="first, random or all"):
        Caption("last")  # type: ignore[arg-type]
