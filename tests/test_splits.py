"""Roles on planted manifests: counts, independence of order, and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from dejavu_exp import splits, tables
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.splits import AuthorsSplit, NpySplit, OriginSplit, PerClassSplit, RandomSplit
from dejavu_exp.tables import Role, Status


def manifest(classes: dict[str, tuple[int, int]], origin: str = "train") -> pl.DataFrame:
    """Rows from {label: (images with boxes, images without)}."""
    rows = []
    for label, (boxed, unboxed) in classes.items():
        for number in range(boxed + unboxed):
            name = f"{origin}/{label}/{number:03d}.png"
            known = number < boxed
            rows.append(
                {
                    **dict.fromkeys(tables.MANIFEST),
                    **{"id": name, "path": name, "origin": origin, "label": label},
                    **{"boxes": [[0, 0, 5, 5]] if known else None},
                    **{"status": Status.OK if known else Status.NO_ANNOTATION},
                }
            )
    return pl.DataFrame(rows, schema=dict(tables.MANIFEST))


def counts(roles: pl.DataFrame, label: str) -> tuple[int, ...]:
    found: dict[str, int] = dict(roles.filter(pl.col("label") == label).group_by("role").len().iter_rows())
    return tuple(found.get(role, 0) for role in Role)


def ids(roles: pl.DataFrame, role: str) -> set[str]:
    return set(roles.filter(pl.col("role") == role)["id"])


SPLIT = PerClassSplit(target=3, heldout=4, shared=2, public=5, unseen=2, min_side_px=8)
ROWS = pl.concat([manifest({"cat": (10, 6), "dog": (14, 0)}), manifest({"cat": (5, 1), "dog": (3, 0)}, "val")])


def test_every_role_has_its_count() -> None:
    roles = SPLIT.assign(ROWS, seed=0)
    assert dict(roles.schema) == dict(tables.ROLES)
    assert roles["id"].is_sorted()
    assert roles["id"].is_unique().all()
    assert counts(roles, "cat") == (3, 4, 2, 5, 2)
    assert counts(roles, "dog") == (3, 4, 2, 5, 2)
    assert SPLIT.report(roles, ROWS) == []


def test_measured_images_have_boxes_and_the_others_go_to_shared_first() -> None:
    roles = SPLIT.assign(ROWS, seed=0).join(ROWS, on="id", suffix="_row")
    needing = roles.filter(pl.col("role").is_in([Role.TARGET, Role.HELDOUT, Role.UNSEEN]))
    assert needing["boxes"].null_count() == 0
    cats = roles.filter(pl.col("label") == "cat")
    assert cats.filter(pl.col("role") == Role.SHARED)["boxes"].null_count() == 2
    assert cats.filter(pl.col("role") == Role.PUBLIC)["boxes"].null_count() == 4
    assert set(roles.filter(pl.col("role") == Role.UNSEEN)["origin"]) == {"val"}
    assert set(roles.filter(pl.col("role") != Role.UNSEEN)["origin"]) == {"train"}


def test_listing_order_does_not_matter() -> None:
    shuffled = ROWS.sample(fraction=1.0, shuffle=True, seed=5)
    assert SPLIT.assign(shuffled, seed=0).equals(SPLIT.assign(ROWS, seed=0))


def test_another_seed_is_another_draw() -> None:
    assert ids(SPLIT.assign(ROWS, seed=0), Role.TARGET) != ids(SPLIT.assign(ROWS, seed=1), Role.TARGET)


def test_another_class_leaves_the_others_as_they_are() -> None:
    more = pl.concat([ROWS, manifest({"ant": (30, 3)}), manifest({"ant": (9, 0)}, "val")])
    roles = SPLIT.assign(more, seed=0)
    assert counts(roles, "ant") == (3, 4, 2, 5, 2)
    assert roles.filter(pl.col("label") != "ant").equals(SPLIT.assign(ROWS, seed=0))


def test_a_class_only_in_the_unseen_origin_gets_no_role() -> None:
    more = pl.concat([ROWS, manifest({"ant": (9, 0)}, "val")])
    assert SPLIT.assign(more, seed=0).equals(SPLIT.assign(ROWS, seed=0))


def test_null_counts_take_all_that_is_left() -> None:
    split = PerClassSplit(target=3, heldout=4, shared=2, public=None, unseen=None, min_side_px=8)
    assert counts(split.assign(ROWS, seed=0), "cat") == (3, 4, 2, 7, 5)


@pytest.mark.parametrize(("public", "unseen", "expected"), [(None, 2, (3, 4, 0, 7, 2)), (6, None, (3, 4, 0, 6, 3))])
def test_unseen_from_the_same_origin(public: int | None, unseen: int | None, expected: Any) -> None:
    split = PerClassSplit(3, 4, 0, public, unseen, min_side_px=8, unseen_origin="train")
    roles = split.assign(manifest({"cat": (10, 6)}), seed=0)
    assert counts(roles, "cat") == expected
    boxed = {f"train/cat/{number:03d}.png" for number in range(10)}
    assert ids(roles, Role.UNSEEN) < boxed


def test_unusable_rows_get_no_role() -> None:
    number = pl.int_range(pl.len())
    rows = manifest({"cat": (12, 4)}).with_columns(
        status=pl.when(number == 0).then(pl.lit("unreadable")).otherwise("status"),
        label=pl.when(number == 1).then(None).otherwise("label"),
    )
    split = PerClassSplit(3, 4, 0, None, 0, min_side_px=8)
    roles = split.assign(rows, seed=0)
    assert set(rows["id"][2:]) == set(roles["id"])


def test_too_few_boxes_are_shared_out_and_reported() -> None:
    split = PerClassSplit(target=10, heldout=20, shared=5, public=None, unseen=0, min_side_px=8)
    rows = manifest({"cat": (9, 7), "dog": (40, 0)})
    roles = split.assign(rows, seed=0)
    assert counts(roles, "cat") == (3, 6, 5, 2, 0)
    target, heldout = split.report(roles, rows)
    assert target == "target: 1 of 2 classes have fewer than the 10 images asked for; the fewest has cat, 3."
    assert heldout.startswith("heldout: 1 of 2")


def test_report_counts_classes_without_unseen_images() -> None:
    split = PerClassSplit(3, 4, 0, 3, None, min_side_px=8)
    rows = pl.concat([manifest({"cat": (12, 0), "dog": (12, 0)}), manifest({"cat": (2, 0), "dog": (0, 2)}, "val")])
    assert split.report(split.assign(rows, seed=0), rows) == [
        "unseen: 1 of 2 classes have fewer than the 1 images asked for; the fewest has dog, 0."
    ]


@pytest.mark.parametrize(
    ("classes", "role"), [({"cat": (20, 5), "dog": (7, 0)}, "public"), ({"cat": (20, 5), "dog": (0, 30)}, "target")]
)
def test_a_class_without_public_or_target_images_is_named(classes: dict[str, tuple[int, int]], role: str) -> None:
    split = PerClassSplit(target=3, heldout=4, shared=0, public=5, unseen=0, min_side_px=8)
    with pytest.raises(DataError, match=rf"class dog: no {role} image[^$]*split\.target"):
        split.assign(manifest(classes), seed=0)


def test_the_authors_split_names_its_own_key() -> None:
    with pytest.raises(DataError, match=r"class dog: no public image[^$]*split\.num_per_class"):
        AuthorsSplit(3, 0, 8).assign(manifest({"dog": (6, 0)}), seed=0)


def test_a_wrong_origin_is_named_with_those_there_are() -> None:
    with pytest.raises(DataError, match=r"split\.fit_origin=training.*train, val"):
        PerClassSplit(3, 4, 0, 5, 0, 8, fit_origin="training").assign(ROWS, seed=0)
    with pytest.raises(DataError, match=r"split\.unseen_origin=test.*train, val"):
        PerClassSplit(3, 4, 0, 5, 1, 8, unseen_origin="test").assign(ROWS, seed=0)


def test_authors_split_fills_both_training_sets_to_the_same_size() -> None:
    rows = pl.concat([manifest({"cat": (7, 20), "dog": (30, 4)}), manifest({"cat": (5, 0), "dog": (5, 0)}, "val")])
    split = AuthorsSplit(num_per_class=8, unseen=2, min_side_px=100)
    roles = split.assign(rows, seed=0)
    assert counts(roles, "cat") == (3, 3, 5, 16, 2)
    assert counts(roles, "dog") == (8, 8, 0, 18, 2)
    assert split.assign(rows.reverse(), seed=0).equals(roles)
    assert [sentence.split(":")[0] for sentence in split.report(roles, rows)] == ["target", "heldout"]


def test_authors_split_reports_a_small_training_set() -> None:
    split = AuthorsSplit(num_per_class=8, unseen=0, min_side_px=100)
    rows = manifest({"cat": (7, 2)})
    roles = split.assign(rows, seed=0)
    assert counts(roles, "cat") == (3, 3, 2, 1, 0)
    assert split.report(roles, rows)[-1].startswith("target + shared: 1 of 1 classes have fewer than the 8")


def pairs(origin: str, count: int) -> pl.DataFrame:
    """Rows of image-caption pairs: no label, no boxes."""
    return manifest({"": (0, count)}, origin).with_columns(label=pl.lit(None, dtype=pl.String))


PAIRS = pl.concat([pairs("train", 30), pairs("val", 12)])


def sizes(roles: pl.DataFrame) -> dict[str, int]:
    return dict(roles.group_by("role").len().iter_rows())


def test_an_origin_gives_all_its_rows_one_role() -> None:
    lost = PAIRS.with_columns(
        status=pl.when(pl.int_range(pl.len()) == 3).then(pl.lit("unreadable")).otherwise("status")
    )
    split = OriginSplit("train", None, None, "val", None, 8)
    roles = split.assign(lost, seed=0)
    assert ids(roles, Role.TARGET) == set(PAIRS["id"][:30]) - {PAIRS["id"][3]}
    assert ids(roles, Role.PUBLIC) == set(PAIRS["id"][30:])
    assert roles["label"].null_count() == len(roles)
    assert roles["id"].is_sorted()
    assert split.report(roles, PAIRS) == []


def test_labels_are_kept_where_there_are_some() -> None:
    roles = OriginSplit("train", None, None, "val", None, 8).assign(ROWS, seed=0)
    assert roles.equals(roles.drop("label").join(ROWS, on="id", maintain_order="left").select(roles.columns))


def test_the_limits_of_origins_are_drawn_by_the_seed() -> None:
    split = OriginSplit("train", None, None, "val", None, 8, {"target": 5, "public": 40, "heldout": None})
    roles = split.assign(PAIRS, seed=0)
    assert sizes(roles) == {"target": 5, "public": 12}
    assert split.assign(PAIRS.reverse(), seed=0).equals(roles)
    assert ids(split.assign(PAIRS, seed=1), Role.TARGET) != ids(roles, Role.TARGET)
    assert split.report(roles, PAIRS) == ["public: origin val has 12 images, split.limits.public is 40."]


def test_roles_share_an_origin_where_limits_say_how() -> None:
    split = OriginSplit("train", None, None, "val", "val", 8, {"unseen": 5})
    roles = split.assign(PAIRS, seed=0)
    assert sizes(roles) == {"target": 30, "public": 7, "unseen": 5}
    assert split.assign(PAIRS.reverse(), seed=0).equals(roles)
    greedy = OriginSplit("train", None, None, "val", "val", 8, {"unseen": 12})
    with pytest.raises(DataError, match=r"split\.public=val: other roles take all rows"):
        greedy.assign(PAIRS, seed=0)


def test_random_roles_have_their_sizes_whatever_the_listing() -> None:
    split = RandomSplit(target=10, heldout=6, shared=5, public=12, unseen=9, min_side_px=8)
    roles = split.assign(PAIRS, seed=0)
    assert sizes(roles) == {"target": 10, "heldout": 6, "shared": 5, "public": 12, "unseen": 9}
    assert roles["id"].is_unique().all()
    assert split.assign(PAIRS.sample(fraction=1.0, shuffle=True, seed=5), seed=0).equals(roles)
    assert ids(split.assign(PAIRS, seed=1), Role.TARGET) != ids(roles, Role.TARGET)
    assert split.report(roles, PAIRS) == []


@pytest.mark.parametrize(
    ("fit", "unseen", "expected"),
    [
        ("train", "val", {"target": 10, "public": 20, "unseen": 4}),
        (None, "val", {"target": 10, "public": 20, "unseen": 4}),
        ("train", "train", {"target": 10, "public": 16, "unseen": 4}),
        ("train", None, {"target": 10, "public": 16, "unseen": 4}),
        (None, None, {"target": 10, "public": 28, "unseen": 4}),
    ],
)
def test_the_pools_of_random_roles(fit: str | None, unseen: str | None, expected: dict[str, int]) -> None:
    split = RandomSplit(10, 0, 0, None, 4, 8, fit_origin=fit, unseen_origin=unseen)
    roles = split.assign(PAIRS, seed=0).join(PAIRS.select("id", "origin"), on="id")
    assert sizes(roles) == expected
    if unseen == "val":
        assert set(roles.filter(pl.col("origin") == "val")["role"]) == {Role.UNSEEN}
    elif fit == "train":
        assert set(roles["origin"]) == {"train"}


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            RandomSplit(30, 0, 5, 10, 2, 8),
            r"asks for 47 images \(target 30 \+ shared 5 \+ public 10 \+ unseen 2\), but there are 42 .* train, val\. "
            r"Lower split\.target, split\.shared, split\.public, split\.unseen\.",
        ),
        (
            RandomSplit(30, 0, 0, None, 0, 8, "train"),
            r"31 images \(target 30 \+ public 1\), .* 30 .* of origin train\.",
        ),
        (RandomSplit(5, 0, 0, 5, 13, 8, "train", "val"), r"13 images \(unseen 13\), but there are 12 .*origin val\."),
        (RandomSplit(5, 0, 0, 5, 1, 8, "all"), r"split\.fit_origin=all: .* no readable image .* are: train, val"),
        (RandomSplit(5, 0, 0, 5, 1, 8, "train", "test"), r"unseen_origin=test: .*or ask for no unseen images"),
        (OriginSplit("all", None, None, "val", None, 8), r"split\.target=all: .* no readable image .* are: train, val"),
        (OriginSplit("train", None, None, "val", "test", 8), r"split\.unseen=test: .*or ask for no unseen images"),
    ],
)
def test_pools_that_are_too_small_or_absent_are_named(split: splits.Split, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split.assign(PAIRS, seed=0)


COUNT = st.integers(0, 12)


@examples(300)
@given(COUNT, COUNT, COUNT, COUNT, COUNT, st.none() | COUNT, st.none() | COUNT)
def test_dealing_gives_each_image_at_most_once_and_no_more_than_asked(
    boxed: int, unboxed: int, target: int, heldout: int, shared: int, public: int | None, unseen: int | None
) -> None:
    with_boxes, without = [("box", i) for i in range(boxed)], [("plain", i) for i in range(unboxed)]
    if public is None and unseen is None:
        unseen = 0
    part = splits.deal(with_boxes, without, target, heldout, shared, public, unseen)
    dealt = [*part.target, *part.heldout, *part.shared, *part.public, *part.unseen]
    assert len(dealt) == len(set(dealt))
    assert set(dealt) <= set(with_boxes + without)
    assert {kind for kind, _ in [*part.target, *part.heldout, *part.unseen]} <= {"box"}
    if public is None:
        assert set(dealt) == set(with_boxes + without)
    if boxed >= target + heldout + (unseen or 0):
        assert (len(part.target), len(part.heldout)) == (target, heldout)
        assert unseen is None or len(part.unseen) == unseen
        left = boxed + unboxed - target - heldout - (unseen or 0)
        assert len(part.shared) == min(shared, left)
        assert public is None or len(part.public) == min(public, left - len(part.shared))
    else:
        assert len(part.target) == target * boxed // (target + heldout + (unseen or 0))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., NpySplit]:
    def save(**parts: Any) -> NpySplit:
        paths = {}
        for role, values in parts.items():
            np.save(tmp_path / f"{role}.npy", values)
            paths[role] = str(tmp_path / f"{role}.npy")
        target, heldout, shared, public, unseen = (paths.get(role) for role in Role)
        return NpySplit(target, heldout, shared, public, unseen, min_side_px=100)

    return save


FOLDER = pl.concat([manifest({"dog": (3, 0), "cat": (2, 2)}), manifest({"cat": (2, 0)}, "val")])


def test_index_files_count_in_image_folder_order(saved: Callable[..., NpySplit]) -> None:
    """Cats stand before dogs whatever the listing; an unreadable image keeps its place."""
    rows = FOLDER.with_columns(
        status=pl.when(pl.int_range(pl.len()) == 3).then(pl.lit("unreadable")).otherwise("status")
    )
    split = saved(target=np.array([1.0, 5.0]), heldout=np.array([4]), shared=np.array([]), public=np.array([0, 6]))
    roles = split.assign(rows, seed=9)
    assert roles.rows() == [
        ("train/cat/000.png", "cat", "public"),
        ("train/cat/001.png", "cat", "target"),
        ("train/dog/000.png", "dog", "heldout"),
        ("train/dog/001.png", "dog", "target"),
        ("train/dog/002.png", "dog", "public"),
        ("val/cat/000.png", "cat", "unseen"),
        ("val/cat/001.png", "cat", "unseen"),
    ]
    assert split.assign(rows.reverse(), seed=0).equals(roles)
    assert split.report(roles, rows) == ["shared: the split gives no image this role (split.shared)."]


def test_public_without_a_file_is_the_rest(saved: Callable[..., NpySplit]) -> None:
    roles = saved(target=np.array([1, 5]), unseen=np.array([1])).assign(FOLDER, seed=0)
    assert ids(roles, Role.PUBLIC) == set(FOLDER["id"][:7]) - {"train/cat/001.png", "train/dog/001.png"}
    assert ids(roles, Role.UNSEEN) == {"val/cat/001.png"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"target": np.array([1, 2]), "heldout": np.array([2, 3])},
            "train/cat/002.png occurs twice: as target and as heldout",
        ),
        ({"target": np.array([1, 1])}, "train/cat/001.png occurs twice: as target and as target"),
        ({"target": np.array([7])}, r"target\.npy \(split\.target\): index 7 is out of range.*7 rows"),
        ({"target": np.array([0, -1])}, r"index -1 is out of range"),
        ({"target": np.array([0]), "unseen": np.array([2])}, r"unseen\.npy.*index 2 is out of range.*2 rows"),
        ({"target": np.array([0.5])}, r"target\.npy.*not whole"),
        ({"target": np.array([np.nan])}, r"target\.npy.*not whole"),
        ({"target": np.array([["a"]])}, r"target\.npy.*one array of indices"),
        ({"target": np.array([None], dtype=object)}, r"target\.npy.*cannot be read"),
    ],
)
def test_wrong_index_files_are_named(saved: Callable[..., NpySplit], parts: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        saved(**parts).assign(FOLDER, seed=0)


def test_missing_index_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.npy \(split\.target\)"):
        NpySplit(str(tmp_path / "nowhere.npy"), None, None, None, None, 100).assign(FOLDER, seed=0)
    with pytest.raises(ConfigError, match=r"split\.target=null"):
        NpySplit(None, None, None, None, None, 100).assign(FOLDER, seed=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PerClassSplit(0, 4, 0, 5, 0, 8), r"split\.target=0"),
        (lambda: PerClassSplit(3, -1, 0, 5, 0, 8), r"split\.heldout=-1"),
        (lambda: PerClassSplit(3, 4, -1, 5, 0, 8), r"split\.shared=-1"),
        (lambda: PerClassSplit(3, 4, 0, 0, 0, 8), r"split\.public=0"),
        (lambda: PerClassSplit(3, 4, 0, 5, -1, 8), r"split\.unseen=-1"),
        (lambda: PerClassSplit(3, 4, 0, 5, 0, 0), r"split\.min_side_px=0"),
        (lambda: PerClassSplit(3, 4, 0, None, None, 8, unseen_origin="train"), r"split\.public=null"),
        (lambda: AuthorsSplit(0, 0, 8), r"split\.num_per_class=0"),
        (lambda: AuthorsSplit(5, None, 8, unseen_origin="train"), r"split\.unseen_origin=train"),
        (lambda: NpySplit(None, None, None, None, None, 8, unseen_origin="train"), r"split\.unseen=null"),
        (lambda: OriginSplit("train", None, None, "val", None, 0), r"split\.min_side_px=0"),
        (lambda: OriginSplit("train", None, None, "train", None, 8), r"split\.target and split\.public are both train"),
        (lambda: OriginSplit("train", "b", "b", "val", None, 8), r"split\.heldout and split\.shared are both b"),
        (lambda: OriginSplit("train", None, None, None, None, 8), r"split\.public=null"),  # type: ignore[arg-type]
        (lambda: OriginSplit("train", None, None, "val", None, 8, {"target": 0}), r"split\.limits\.target=0"),
        (lambda: OriginSplit("train", None, None, "val", None, 8, {"target": True}), r"split\.limits\.target=True"),
        (lambda: OriginSplit("train", None, None, "val", None, 8, {"bank": 5}), r"limits\.bank=5.*target, public"),
        (lambda: OriginSplit("train", None, None, "val", None, 8, {"unseen": 5}), r"limits\.unseen=5.*target, public"),
        (lambda: RandomSplit(0, 0, 0, 1, 0, 8), r"split\.target=0"),
        (lambda: RandomSplit(1, -1, 0, 1, 0, 8), r"split\.heldout=-1"),
        (lambda: RandomSplit(1, 0, -1, 1, 0, 8), r"split\.shared=-1"),
        (lambda: RandomSplit(1, 0, 0, 0, 0, 8), r"split\.public=0"),
        (lambda: RandomSplit(1, 0, 0, 1, -1, 8), r"split\.unseen=-1"),
        (lambda: RandomSplit(1, 0, 0, 1, 0, 0), r"split\.min_side_px=0"),
    ],
)
def test_bad_splits_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
