"""The authors' rules against the answers of their own code.

DEJAVU_GOLDEN names another folder of the same schema; the default is the one in this repository.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dejavu_exp import crops, splits, tables

OWN = Path(__file__).parent / "golden"
GOLDEN = Path(os.environ.get("DEJAVU_GOLDEN", OWN))
DEFINED = {"zero_area", "out_right"}
"""Categories that agree although a box is not well inside; on the other ones their schema asks for no agreement."""


def load(name: str, folder: Path = GOLDEN) -> Any:
    return json.loads((folder / name).read_text())


def answer(case: dict[str, Any]) -> crops.AuthorsAnswer:
    return crops.authors_rectangle(case["width"], case["height"], case["boxes"], case["min_px"])


def recorded(case: dict[str, Any]) -> crops.AuthorsAnswer:
    crop = tuple(case["crop"]) if case["crop"] else None
    return crops.AuthorsAnswer(crop, case["n_candidates"], case["best_min_side"], case["n_tied_best"])


def test_authors_rectangle_gives_the_recorded_answers() -> None:
    required = [case for case in load("crop.json")["cases"] if case["boxes_inside"] or case["category"] in DEFINED]
    assert required
    differing = [(case, answer(case)) for case in required if answer(case) != recorded(case)]
    assert differing == []


def test_authors_view_is_the_recorded_crop() -> None:
    rows = [case for case in load("crop.json")["cases"] if case["boxes_inside"]]
    for case in rows:
        rule = crops.BackgroundCrop(case["min_px"], "authors")
        assert rule.region(case["width"], case["height"], case["boxes"])[0] == recorded(case).crop


def test_the_corrected_rule_is_never_smaller_and_touches_no_box() -> None:
    for case in load("crop.json")["cases"]:
        if not case["boxes_inside"]:
            continue
        rect = crops.largest_rectangle(case["width"], case["height"], case["boxes"])
        xmin, ymin, xmax, ymax = rect or (0, 0, 0, 0)
        assert min(xmax - xmin, ymax - ymin) >= case["best_min_side"]
        for box in case["boxes"]:
            assert not (xmin < box[2] and xmax > box[0] and ymin < box[3] and ymax > box[1])


def test_how_often_the_authors_rule_falls_short() -> None:
    """The counts published with the golden files, which somebody else computed, on the folder they belong to."""
    cases = [case for case in load("crop.json", OWN)["cases"] if case["boxes_inside"]]
    rects = [crops.largest_rectangle(case["width"], case["height"], case["boxes"]) for case in cases]
    sides = [min(rect[2] - rect[0], rect[3] - rect[1]) if rect else 0 for rect in rects]
    larger = sum(side > case["best_min_side"] for side, case in zip(sides, cases, strict=True))
    missed = sum(case["crop"] is None and side > case["min_px"] for side, case in zip(sides, cases, strict=True))
    assert (len(cases), larger, missed) == (486, 247, 25)


def test_partition_gives_the_recorded_lists() -> None:
    golden = load("partition.json")
    boxed, unboxed = golden["bbox_index_in_listing_order"], golden["non_bbox_in_set_order"]
    assert golden["num_per_class"]
    for count, classes in golden["num_per_class"].items():
        for label, expected in classes.items():
            part = splits.partition(boxed[label], unboxed[label], int(count))
            assert part.target == expected["bbox_A"]
            assert part.heldout == expected["bbox_B"]
            assert part.shared == expected["shared"]
            assert part.public == expected["public"]
            assert part.unseen == []


def test_index_files_of_the_authors_give_their_roles(tmp_path: Path) -> None:
    """Positions count in their order, through float64 files as their script leaves them."""
    golden = load("partition.json")
    names = golden["samples"]
    rows = pl.DataFrame(
        {
            "id": [name for name, _ in names],
            "path": [f"train/{golden['classes'][index]}/{name}" for name, index in names],
            "origin": ["train"] * len(names),
            "label": [golden["classes"][index] for _, index in names],
        }
    )
    rows = rows.with_columns(
        pl.lit(None, dtype=dtype).alias(name) for name, dtype in tables.MANIFEST.items() if name not in rows.columns
    ).with_columns(status=pl.lit("ok"))
    parts = {"target": "bbox_A", "heldout": "bbox_B", "shared": "shared", "public": "public"}
    for count, classes in golden["num_per_class"].items():
        paths = {}
        for role, key in parts.items():
            indices = [index for part in classes.values() for index in part[key]]
            paths[role] = str(tmp_path / f"{count}_{role}.npy")
            np.save(paths[role], np.array(indices, dtype=np.float64))
        split = splits.NpySplit(**paths, unseen=None, min_side_px=100)
        roles = split.assign(rows.sample(fraction=1.0, shuffle=True, seed=3), seed=0)
        for role, key in parts.items():
            expected = {names[index][0] for part in classes.values() for index in part[key]}
            assert set(roles.filter(pl.col("role") == role)["id"]) == expected
