"""Readers on small data sets written here in each published layout: exact boxes, statuses, problems and refusals."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from omegaconf import OmegaConf

from dejavu_exp import config, tables
from dejavu_exp.datasets.annotations import SHOWN_PER_KIND, Problems
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.imagenet import Imagenet
from dejavu_exp.datasets.manifest import ManifestFile
from dejavu_exp.datasets.stores import FolderStore, ZipStore
from dejavu_exp.datasets.tiny_imagenet import TinyImagenet
from dejavu_exp.errors import ConfigError, DataError

Files = Mapping[str, str | bytes]


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def pack(archive: Path, files: Files) -> Path:
    with zipfile.ZipFile(archive, "w") as stream:
        for name, content in files.items():
            stream.writestr(name, content)
    return archive


def row(manifest: Manifest, name: str) -> dict[str, Any]:
    return manifest.rows.row(by_predicate=pl.col("id") == name, named=True)


def statuses(manifest: Manifest) -> dict[str, str]:
    return dict(manifest.rows.select("id", "status").iter_rows())


# Tiny ImageNet

TINY: dict[str, str | bytes] = {
    "tiny-imagenet-200/wnids.txt": "n01\nn02\nn03\n",
    "tiny-imagenet-200/words.txt": "n00\tentity\nn01\tbee, wasp\nn02\tcandle\nn03\ttarn\n",
    "tiny-imagenet-200/train/n01/n01_boxes.txt": "n01_0.JPEG\t16\t10\t35\t26\nn01_1.JPEG\t0\t0\t63\t63\n",
    "tiny-imagenet-200/train/n01/images/n01_0.JPEG": b"first",
    "tiny-imagenet-200/train/n01/images/n01_1.JPEG": b"second",
    "tiny-imagenet-200/train/n02/n02_boxes.txt": "n02_0.JPEG\t5\t6\t5\t6\r\n\r\n",
    "tiny-imagenet-200/train/n02/images/n02_0.JPEG": b"third",
    "tiny-imagenet-200/val/val_annotations.txt": "val_0.JPEG\tn02\t1\t2\t3\t4\nval_1.JPEG\tn01\t0\t0\t9\t9\n",
    "tiny-imagenet-200/val/images/val_0.JPEG": b"fourth",
    "tiny-imagenet-200/val/images/val_1.JPEG": b"fifth",
    "tiny-imagenet-200/test/images/test_0.JPEG": b"has no label",
}


def tiny(folder: Path, changes: Mapping[str, str | bytes | None] | None = None) -> Manifest:
    """The small data set with files changed, or left out where the new content is None."""
    named = {f"tiny-imagenet-200/{name}": content for name, content in (changes or {}).items()}
    return TinyImagenet(write(folder, {k: v for k, v in {**TINY, **named}.items() if v is not None})).manifest()


def test_tiny_rows_have_half_open_boxes_labels_and_stable_ids(tmp_path: Path) -> None:
    manifest = tiny(tmp_path)
    assert manifest.rows.select("id", "path", "origin", "label", "boxes", "objects").rows() == [
        ("train/n01/n01_0.JPEG", "train/n01/images/n01_0.JPEG", "train", "n01", [[16, 10, 36, 27]], ["n01"]),
        ("train/n01/n01_1.JPEG", "train/n01/images/n01_1.JPEG", "train", "n01", [[0, 0, 64, 64]], ["n01"]),
        ("train/n02/n02_0.JPEG", "train/n02/images/n02_0.JPEG", "train", "n02", [[5, 6, 6, 7]], ["n02"]),
        ("val/val_0.JPEG", "val/images/val_0.JPEG", "val", "n02", [[1, 2, 4, 5]], ["n02"]),
        ("val/val_1.JPEG", "val/images/val_1.JPEG", "val", "n01", [[0, 0, 10, 10]], ["n01"]),
    ]
    assert set(statuses(manifest).values()) == {"ok"}
    assert manifest.rows["width"].null_count() == manifest.rows["height"].null_count() == 5
    assert manifest.class_names == {"n01": "bee, wasp", "n02": "candle", "n03": "tarn"}
    assert manifest.problems == ()


@pytest.mark.parametrize("top", ["tiny-imagenet-200/", "", "data/copy/"])
def test_tiny_zip_equals_folder(tmp_path: Path, top: str) -> None:
    broken = {"tiny-imagenet-200/train/n02/n02_boxes.txt": "n02_0.JPEG\t5\n"}
    files = {**TINY, **broken}
    write(tmp_path / "unpacked", files)
    noise = {"__MACOSX/tiny-imagenet-200/train/n01/images/._n01_0.JPEG": "", "tiny-imagenet-200/train/": ""}
    renamed = {name.replace("tiny-imagenet-200/", top): content for name, content in files.items()}
    archive = pack(tmp_path / "any.zip", {**noise, **renamed})
    readers = [TinyImagenet(tmp_path / "unpacked" / "tiny-imagenet-200"), TinyImagenet(str(archive))]
    first = TinyImagenet(tmp_path / "unpacked").manifest()
    for other in [reader.manifest() for reader in readers]:
        assert other.rows.equals(first.rows)
        assert (other.name, other.class_names, other.problems) == (first.name, first.class_names, first.problems)
        contents = [other.store.read(path) for path in other.rows["path"]]
        assert contents == [b"first", b"second", b"third", b"fourth", b"fifth"]
    assert len(first.problems) == 1


def test_tiny_without_the_boxes_file_of_one_class(tmp_path: Path) -> None:
    manifest = tiny(tmp_path, {"train/n02/n02_boxes.txt": None})
    assert row(manifest, "train/n02/n02_0.JPEG")["status"] == "no_annotation"
    assert row(manifest, "train/n02/n02_0.JPEG")["boxes"] is None
    assert row(manifest, "train/n02/n02_0.JPEG")["label"] == "n02"
    assert row(manifest, "train/n01/n01_0.JPEG")["status"] == "ok"
    assert manifest.problems == ("train/n02/n02_boxes.txt: is not there, so 1 images have no box.",)


def test_tiny_malformed_lines_cost_their_rows_only(tmp_path: Path) -> None:
    lines = "n01_0.JPEG\t16\t10\tx\t26\nn01_1.JPEG\t0\t0\t63\n"
    manifest = tiny(tmp_path, {"train/n01/n01_boxes.txt": lines})
    assert statuses(manifest) == {
        "train/n01/n01_0.JPEG": "bad_annotation",
        "train/n01/n01_1.JPEG": "bad_annotation",
        "train/n02/n02_0.JPEG": "ok",
        "val/val_0.JPEG": "ok",
        "val/val_1.JPEG": "ok",
    }
    assert row(manifest, "train/n01/n01_1.JPEG")["detail"] == (
        "train/n01/n01_boxes.txt, line 2: a line must have 5 fields, separated by tabs, not 4"
    )
    assert manifest.problems == (
        "train/n01/n01_boxes.txt: line 1: a box must be four whole numbers: xmin, ymin, xmax, ymax, "
        r"got 'n01_0.JPEG\t16\t10\tx\t26' (and 1 more like it).",
    )


def test_tiny_lines_and_images_that_do_not_meet(tmp_path: Path) -> None:
    lines = "n01_0.JPEG\t1\t1\t2\t2\nn01_9.JPEG\t1\t1\t2\t2\n"
    manifest = tiny(tmp_path, {"train/n01/n01_boxes.txt": lines})
    assert row(manifest, "train/n01/n01_1.JPEG")["status"] == "no_annotation"
    assert len(manifest.rows) == 5
    assert manifest.problems == (
        "train/n01/n01_boxes.txt: line 2 names the image 'n01_9.JPEG', which is not there; "
        "has no line for 1 of 2 images, e.g. n01_1.JPEG.",
    )


def test_tiny_two_lines_of_an_image_are_two_boxes(tmp_path: Path) -> None:
    lines = "n02_0.JPEG\t1\t2\t3\t4\nn02_0.JPEG\t5\t6\t7\t8\n"
    manifest = tiny(tmp_path, {"train/n02/n02_boxes.txt": lines})
    assert row(manifest, "train/n02/n02_0.JPEG")["boxes"] == [[1, 2, 4, 5], [5, 6, 8, 9]]


@pytest.mark.parametrize(
    ("line", "status", "label"),
    [
        ("val_0.JPEG\tn02\t1\t2\t3\tx", "bad_annotation", "n02"),
        ("val_0.JPEG\tn02\t1\t2\t3", "bad_annotation", "n02"),
        ("val_0.JPEG\t1\t2\t3\t4", "bad_annotation", None),
        ("val_0.JPEG\tn77\t1\t2\t3\t4", "bad_annotation", None),
        ("val_0.JPEG\tn01\t1\t2\t3\t4\nval_0.JPEG\tn02\t1\t2\t3\t4", "bad_annotation", None),
        ("", "no_annotation", None),
    ],
)
def test_tiny_val_lines(tmp_path: Path, line: str, status: str, label: str | None) -> None:
    manifest = tiny(tmp_path, {"val/val_annotations.txt": f"{line}\nval_1.JPEG\tn01\t0\t0\t9\t9\n"})
    found = row(manifest, "val/val_0.JPEG")
    assert (found["status"], found["label"]) == (status, label)
    assert "val_annotations.txt" in found["detail"]
    assert row(manifest, "val/val_1.JPEG")["status"] == "ok"


def test_tiny_without_val_annotations_or_lists(tmp_path: Path) -> None:
    manifest = tiny(tmp_path, {"val/val_annotations.txt": None, "wnids.txt": None, "words.txt": None})
    assert row(manifest, "val/val_0.JPEG")["status"] == "no_annotation"
    assert manifest.rows.filter(origin="val")["label"].null_count() == 2
    assert manifest.class_names == {}
    assert {problem.split(":")[0] for problem in manifest.problems} == {
        "val/val_annotations.txt",
        "wnids.txt",
        "words.txt",
    }


def test_tiny_without_val_images_says_so(tmp_path: Path) -> None:
    manifest = tiny(tmp_path, dict.fromkeys(["val/images/val_0.JPEG", "val/images/val_1.JPEG"]))
    assert set(manifest.rows["origin"]) == {"train"}
    assert "val/images: there are no images." in manifest.problems


def test_tiny_bytes_that_are_no_text_cost_their_line_only(tmp_path: Path) -> None:
    manifest = tiny(tmp_path, {"train/n01/n01_boxes.txt": b"n01_0.JPEG\t\xff\t1\t2\t2\nn01_1.JPEG\t1\t1\t2\t2\n"})
    assert row(manifest, "train/n01/n01_0.JPEG")["status"] == "bad_annotation"
    assert row(manifest, "train/n01/n01_1.JPEG")["boxes"] == [[1, 1, 3, 3]]


def test_tiny_without_any_boxes_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no boxes file .*n01_boxes\.txt"):
        tiny(tmp_path, dict.fromkeys(["train/n01/n01_boxes.txt", "train/n02/n02_boxes.txt"]))


def test_tiny_roots_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root=.*nowhere: is not there"):
        TinyImagenet(tmp_path / "nowhere").manifest()
    with pytest.raises(DataError, match=r"holds nothing of the kind; expected .*tiny-imagenet-200"):
        TinyImagenet(write(tmp_path / "other", {"a/b.JPEG": b""})).manifest()
    with pytest.raises(DataError, match="there are no images"):
        TinyImagenet(write(tmp_path / "bare", {"train/n01/n01_boxes.txt": ""})).manifest()
    with pytest.raises(DataError, match="holds nothing of the kind"):
        TinyImagenet(pack(tmp_path / "other.zip", {"a/b.JPEG": b""})).manifest()
    with pytest.raises(ConfigError, match=r"dataset\.root is empty"):
        TinyImagenet("")


def test_tiny_bad_zip_is_refused(tmp_path: Path) -> None:
    cut_off = tmp_path / "tiny.zip"
    cut_off.write_bytes(pack(tmp_path / "whole.zip", TINY).read_bytes()[:500])
    with pytest.raises(DataError, match=r"tiny\.zip: cannot be read as a zip archive"):
        TinyImagenet(cut_off).manifest()


def test_tiny_damaged_boxes_file_in_a_zip_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "tiny.zip", TINY)
    archive.write_bytes(archive.read_bytes().replace(b"n01_0.JPEG\t16", b"n01_0.JPEG\t17", 1))
    with pytest.raises(DataError, match=r"n01_boxes\.txt: cannot be read \(Bad CRC-32"):
        TinyImagenet(archive).manifest()


# ImageNet


def xml(*things: tuple[str, tuple[Any, ...]], size: tuple[Any, Any] | None = (500, 375)) -> str:
    """A Pascal VOC file, as the localization task publishes them."""
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    ends = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{end}>{value}</{end}>" for end, value in zip(ends, box, strict=False))
        + "</bndbox></object>"
        for name, box in things
    )
    return f"<annotation><filename>x</filename>{sides}{objects}</annotation>"


IMAGES: dict[str, str | bytes] = {
    "train/n01/n01_1.JPEG": b"first",
    "train/n01/n01_2.JPEG": b"second",
    "train/n02/n02_1.jpg": b"third",
    "train/n02/readme.txt": b"no image",
    "val/n01/ILSVRC2012_val_00000001.JPEG": b"fourth",
    "val/n02/ILSVRC2012_val_00000002.JPEG": b"fifth",
    "test/ILSVRC2012_test_00000001.JPEG": b"has no label",
}
TRAIN_XML = {
    "n01/n01_1.xml": xml(("n01", (10, 20, 110, 220)), ("n99", (0, 0, 5, 5)), ("n01", (1, 1, 2, 2))),
    "n02/n02_1.xml": xml(("n02", (7, 8, 9, 10)), size=(0, 375)),
    "n03/n03_1.xml": "the image of this file is not there, so it is not opened",
}
VAL_XML = {
    "ILSVRC2012_val_00000001.xml": xml(("n01", (1, 2, 3, 4))),
    "ILSVRC2012_val_00000002.xml": xml(("n02", (5, 6, 7, 8)), ("n02", (0, 1, 2, 3))),
}


def voc(folder: Path, train: str, val: str, changes: Mapping[str, str] | None = None) -> Path:
    files = {f"{train}{name}": content for name, content in TRAIN_XML.items()}
    files |= {f"{val}{name}": content for name, content in VAL_XML.items()}
    return write(folder, {**files, **(changes or {})})


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train/", "val/"),
        ("bbox_train/", "bbox_val/"),
        ("Annotation/", "val/"),
        ("", "val/"),
        ("", ""),
        ("train/Annotation/", "ILSVRC2012_bbox_val_v3/val/"),
        ("CLS-LOC/train/", "CLS-LOC/val/"),
    ],
)
def test_imagenet_in_each_layout_of_the_boxes(tmp_path: Path, train: str, val: str) -> None:
    manifest = Imagenet(write(tmp_path / "images", IMAGES), voc(tmp_path / "boxes", train, val)).manifest()
    columns = ("id", "origin", "label", "width", "height", "boxes", "objects", "status")
    one, two = ("val/n01/ILSVRC2012_val_00000001.JPEG", "val/n02/ILSVRC2012_val_00000002.JPEG")
    first = [[10, 20, 110, 220], [0, 0, 5, 5], [1, 1, 2, 2]]
    assert manifest.rows.select(columns).rows() == [
        ("train/n01/n01_1.JPEG", "train", "n01", 500, 375, first, ["n01", "n99"], "ok"),
        ("train/n01/n01_2.JPEG", "train", "n01", None, None, None, None, "no_annotation"),
        ("train/n02/n02_1.jpg", "train", "n02", None, 375, [[7, 8, 9, 10]], ["n02"], "ok"),
        (one, "val", "n01", 500, 375, [[1, 2, 3, 4]], ["n01"], "ok"),
        (two, "val", "n02", 500, 375, [[5, 6, 7, 8], [0, 1, 2, 3]], ["n02"], "ok"),
    ]
    assert manifest.problems == ()
    assert manifest.class_names == {}
    assert [manifest.store.read(path) for path in manifest.rows["path"]] == [
        b"first",
        b"second",
        b"third",
        b"fourth",
        b"fifth",
    ]


def test_imagenet_flat_val_takes_its_class_from_the_xml(tmp_path: Path) -> None:
    flat = {f"val/ILSVRC2012_val_0000000{number}.JPEG": b"" for number in (1, 2, 3, 4)}
    mixed = {"val/ILSVRC2012_val_00000003.xml": xml(("n01", (1, 2, 3, 4)), ("n02", (1, 2, 3, 4)))}
    images = write(tmp_path / "images", {"train/n01/n01_1.JPEG": b"", **flat})
    manifest = Imagenet(images, voc(tmp_path / "boxes", "train/", "val/", mixed)).manifest()
    found = [row(manifest, name) for name in sorted(flat)]
    assert [(one["label"], one["status"]) for one in found] == [
        ("n01", "ok"),
        ("n02", "ok"),
        (None, "ok"),
        (None, "no_annotation"),
    ]
    assert found[1]["boxes"] == [[5, 6, 7, 8], [0, 1, 2, 3]]
    assert found[2]["boxes"] == [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert found[3]["detail"] == "it has no class folder and no XML file"
    assert manifest.problems == (
        "val/ILSVRC2012_val_00000003.JPEG: has no label, as its XML must name one class, not n01, n02.",
    )


def test_imagenet_equal_stems_of_other_classes_and_origins_are_told_apart(tmp_path: Path) -> None:
    names = ["train/a/1", "train/b/1", "val/a/1", "val/b/1"]
    images = write(tmp_path / "images", {f"{name}.png": b"" for name in names})
    files = {f"{name}.xml": xml(("x", (number, 0, 9, 9))) for number, name in enumerate(names) if name != "val/b/1"}
    manifest = Imagenet(images, write(tmp_path / "boxes", files)).manifest()
    assert manifest.rows["boxes"].to_list() == [[[0, 0, 9, 9]], [[1, 0, 9, 9]], [[2, 0, 9, 9]], None]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<annotation><object>", "no element found"),
        ("", "no element found"),
        ("<!DOCTYPE a [<!ENTITY e 'boom'>]><annotation>&e;</annotation>", "EntitiesForbidden"),
        ("<?xml version='1.0' encoding='none-such'?><annotation/>", "unknown encoding"),
        (xml(), "no object is listed"),
        (xml(("n01", (1, 2, 3))), "object 1: a box must be four numbers.* got 1, 2, 3, None"),
        (xml(("n01", (1, 2, 3, 4)), ("n01", (1, 2, 3, "four"))), "object 2: a box must be four numbers"),
        (xml(("n01", (1, 2, 3, "1e30"))), "coordinates that an image can have"),
        (xml(("n01", (1, 2, 3, "nan"))), "coordinates that an image can have"),
    ],
)
def test_imagenet_broken_xml_costs_its_row_only(tmp_path: Path, content: str, reason: str) -> None:
    boxes = voc(tmp_path / "boxes", "train/", "val/", {"train/n01/n01_1.xml": content})
    manifest = Imagenet(write(tmp_path / "images", IMAGES), boxes).manifest()
    broken = row(manifest, "train/n01/n01_1.JPEG")
    assert (broken["status"], broken["label"], broken["boxes"]) == ("bad_annotation", "n01", None)
    assert pl.Series([broken["detail"]]).str.contains(reason).all()
    assert manifest.problems == (f"train/n01/n01_1.xml: {broken['detail']}.",)
    assert row(manifest, "train/n02/n02_1.jpg")["status"] == "ok"


def test_imagenet_fractions_are_rounded_outwards(tmp_path: Path) -> None:
    changes = {"train/n01/n01_1.xml": xml(("n01", (1.9, 2.5, 10.1, 20)))}
    boxes = voc(tmp_path / "boxes", "train/", "val/", changes)
    manifest = Imagenet(write(tmp_path / "images", IMAGES), boxes).manifest()
    assert row(manifest, "train/n01/n01_1.JPEG")["boxes"] == [[1, 2, 11, 20]]


def test_imagenet_many_files_are_shared_among_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Imagenet(write(tmp_path / "images", IMAGES), voc(tmp_path / "boxes", "train/", "val/"))
    alone = reader.manifest()
    monkeypatch.setattr("dejavu_exp.datasets.voc.POOL_FROM", 1)
    assert reader.manifest().rows.equals(alone.rows)


def test_imagenet_class_names(tmp_path: Path) -> None:
    listing = write(tmp_path, {"LOC_synset_mapping.txt": "n01 tench, Tinca tinca\nn02\tgoldfish\nn03\n\n"})
    images, boxes = write(tmp_path / "images", IMAGES), voc(tmp_path / "boxes", "train/", "val/")
    manifest = Imagenet(images, boxes, listing / "LOC_synset_mapping.txt").manifest()
    assert manifest.class_names == {"n01": "tench, Tinca tinca", "n02": "goldfish"}
    assert [problem.partition("mapping.txt: ")[2] for problem in manifest.problems] == ["line 3 has no name for n03."]
    with pytest.raises(DataError, match=r"dataset\.class_names=.*none\.txt: cannot be read"):
        Imagenet(images, boxes, tmp_path / "none.txt").manifest()


def test_imagenet_what_is_missing_or_double_is_a_problem(tmp_path: Path) -> None:
    images = write(tmp_path / "images", IMAGES)
    twice = {"Annotation/n01/n01_1.xml": xml(("n01", (9, 9, 10, 10)))}
    train_only = write(tmp_path / "boxes", {f"train/{name}": content for name, content in TRAIN_XML.items()} | twice)
    manifest = Imagenet(images, train_only).manifest()
    assert row(manifest, "train/n01/n01_1.JPEG")["boxes"] == [[9, 9, 10, 10]]
    assert set(manifest.rows.filter(pl.col("origin") == "val")["status"]) == {"no_annotation"}
    assert manifest.problems == (
        "train/n01/n01_1.xml: not read, since Annotation/n01/n01_1.xml is for the same image.",
        f"{train_only} (val): no XML file belongs to an image of origin val.",
    )


def test_imagenet_roots_that_cannot_work_are_refused(tmp_path: Path) -> None:
    images, boxes = write(tmp_path / "images", IMAGES), voc(tmp_path / "boxes", "train/", "val/")
    (tmp_path / "empty").mkdir()
    expected = r"expected train/<class>/<image>\.xml and val/<image>\.xml"
    with pytest.raises(DataError, match=rf"dataset\.boxes=.*empty: there is no XML file; {expected}"):
        Imagenet(images, tmp_path / "empty").manifest()
    with pytest.raises(DataError, match=r"dataset\.boxes=.*nowhere: the folder is not there"):
        Imagenet(images, tmp_path / "nowhere").manifest()
    with pytest.raises(DataError, match=rf"none of its 1 XML files, e\.g\. train/n9/n9_1\.xml, belongs.*{expected}"):
        Imagenet(images, write(tmp_path / "others", {"train/n9/n9_1.xml": xml()})).manifest()
    with pytest.raises(DataError, match=r"dataset\.root=.*empty: there are no images; expected train/<class>"):
        Imagenet(tmp_path / "empty", boxes).manifest()


# A file of one's own

OWN: list[dict[str, Any]] = [
    {
        "path": "a.png",
        "label": "dog",
        "id": "one",
        "origin": "train",
        "boxes": [[10, 20, 50, 60], [0, 0, 5, 5]],
        "captions": ["a dog, on grass", "an \u201canimal\u201d\nof 2 lines"],
        "objects": ["dog", "ball"],
        "tags": ["grass"],
        "tag_boxes": [[1, 2, 3, 4]],
        "width": 64,
        "height": 48,
        "planted_repeats": 8,
    },
    {"path": "b.png", "label": "007", "id": "two", "origin": "val", "boxes": []},
    {"path": "c.png", "label": "cat"},
    {"path": "d.png", "label": None, "boxes": [[1, 1, 2, 2]]},
]
OWN_SCHEMA = {
    **{name: tables.MANIFEST[name] for name in ("path", "label", "id", "origin", "boxes", "captions", "objects")},
    **{name: tables.MANIFEST[name] for name in ("tags", "tag_boxes", "width", "height")},
    "planted_repeats": pl.Int64,
}


def own(folder: Path, rows: list[dict[str, Any]], ending: str, schema: Any = None) -> Path:
    """Write rows as Parquet, or as CSV with JSON in the list columns; and an image for each path."""
    frame = pl.DataFrame(rows, schema=schema or OWN_SCHEMA)
    path = write(folder, {f"{one['path']}": b"" for one in rows if one.get("path")}) / f"images{ending}"
    if ending == ".parquet":
        frame.write_parquet(path)
        return path
    texts = {
        name: [None if cell is None else json.dumps(cell) for cell in frame[name].to_list()]
        for name, dtype in frame.schema.items()
        if isinstance(dtype, pl.List)
    }
    frame.with_columns(pl.Series(name, cells, dtype=pl.String) for name, cells in texts.items()).write_csv(path)
    return path


def csv(folder: Path, text: str) -> Path:
    return write(folder, {"images.csv": text, "a.png": b"", "b.png": b""}) / "images.csv"


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_own_file_rows(tmp_path: Path, ending: str) -> None:
    manifest = ManifestFile(own(tmp_path, OWN, ending)).manifest()
    assert manifest.name == "images"
    one = row(manifest, "one")
    assert {name: one[name] for name in OWN[0]} == OWN[0]
    assert manifest.rows.select("id", "path", "origin", "label", "boxes", "status").rows() == [
        ("c.png", "c.png", "train", "cat", None, "no_annotation"),
        ("d.png", "d.png", "train", None, [[1, 1, 2, 2]], "ok"),
        ("one", "a.png", "train", "dog", [[10, 20, 50, 60], [0, 0, 5, 5]], "ok"),
        ("two", "b.png", "val", "007", [], "ok"),
    ]
    assert manifest.problems == ()
    assert manifest.store == FolderStore(tmp_path)


def test_own_csv_equals_parquet(tmp_path: Path) -> None:
    first, second = (ManifestFile(own(tmp_path, OWN, ending)).manifest() for ending in (".csv", ".parquet"))
    assert first.rows.equals(second.rows)
    assert first.rows.schema == second.rows.schema


def test_own_file_with_the_required_columns_alone(tmp_path: Path) -> None:
    manifest = ManifestFile(csv(tmp_path, "\ufefflabel,path\ndog,a.png\n , b.png \n")).manifest()
    assert manifest.rows.select("id", "path", "origin", "label", "boxes", "status").rows() == [
        ("a.png", "a.png", "train", "dog", None, "no_annotation"),
        ("b.png", "b.png", "train", None, None, "no_annotation"),
    ]


def test_own_parquet_may_hold_numbers_fractions_and_json(tmp_path: Path) -> None:
    frame = pl.DataFrame({"path": ["a.png", "b.png"], "label": [3, 4], "boxes": [[[1.5, 2.0, 3.5, 4.0]], []]})
    frame.write_parquet(write(tmp_path, {"a.png": b""}) / "numbers.parquet")
    manifest = ManifestFile(tmp_path / "numbers.parquet").manifest()
    assert manifest.rows["label"].to_list() == ["3", "4"]
    assert manifest.rows["boxes"].to_list() == [[[1, 2, 4, 4]], []]
    texts = frame.with_columns(boxes=pl.Series(["[[1, 2, 3, 4]]", None]))
    texts.write_parquet(tmp_path / "texts.parquet")
    assert ManifestFile(tmp_path / "texts.parquet").manifest().rows["boxes"].to_list() == [[[1, 2, 3, 4]], None]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("[[1, 2, 3", "must be a list of boxes, e.g. [[10, 20, 50, 60]]"),
        ("[1, 2, 3, 4]", "must be a list of boxes"),
        ('{"xmin": 1}', "must be a list of boxes"),
        ("[[1, 2, 3]]", "a box must be four numbers"),
        ("[[1, 2, 3, null]]", "a box must be four numbers"),
        ("[[1, 2, 3, true]]", "a box must be four numbers"),
        ('[[1, 2, 3, "4"]]', "a box must be four numbers"),
        ("[[1, 2, 3, NaN]]", "coordinates that an image can have"),
        ("[[1, 2, 3, 1e30]]", "coordinates that an image can have"),
        (f"[[1, 2, 3, {10**400}]]", "a box must be four numbers"),
        ("[" * 20000, ""),
    ],
)
def test_own_boxes_that_do_not_parse_cost_their_row_only(tmp_path: Path, cell: str, reason: str) -> None:
    quoted = cell.replace('"', '""')
    path = csv(tmp_path, f'path,label,boxes\na.png,dog,"[[1, 2, 3, 4]]"\nb.png,cat,"{quoted}"\n')
    manifest = ManifestFile(path).manifest()
    broken = row(manifest, "b.png")
    assert (broken["status"], broken["label"], broken["boxes"]) == ("bad_annotation", "cat", None)
    assert broken["detail"].startswith("row 2: boxes: ")
    assert reason in broken["detail"]
    assert cell[:80] in broken["detail"]
    assert manifest.problems == (f"{path}: {broken['detail']}.",)
    assert row(manifest, "a.png")["status"] == "ok"


def test_own_names_tags_and_sizes_that_do_not_parse(tmp_path: Path) -> None:
    text = (
        "path,label,boxes,objects,tags,tag_boxes,width,height\n"
        "a.png,dog,[],dog,,,64.5,0\n"
        'b.png,cat,[],"[""cat""]","[""grass"", ""sky""]","[[1, 2, 3, 4]]",64,48\n'
    )
    manifest = ManifestFile(csv(tmp_path, text)).manifest()
    first, second = row(manifest, "a.png"), row(manifest, "b.png")
    assert (first["status"], first["objects"], first["width"], first["height"]) == ("bad_annotation", None, None, None)
    assert first["detail"] == "row 1: objects: must be a list of names, e.g. [\"dog\"], got 'dog'"
    assert (second["status"], second["tags"], second["tag_boxes"]) == ("bad_annotation", ["grass", "sky"], None)
    assert second["detail"] == "row 2: 1 tag_boxes for 2 tags"
    assert (second["width"], second["height"]) == (64, 48)
    assert len(manifest.problems) == 1
    assert "row 1: width: must be a whole number of pixels above 0, got '64.5'" in manifest.problems[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image,label\na.png,dog\n", "missing column path; there are: image, label"),
        ("path,label,id\na.png,x,7\nb.png,x,7\nc.png,x,8\n", "1 values of id occur more than once, e.g. 7;"),
        ("path,label\na.png,x\na.png,y\n", "no column id, so the path is the id.*a.png"),
        ("path,label\n,x\na.png,y\n", "1 rows have no path, e.g. row 1"),
        ("path,label,role\na.png,x,target\n", "column role: later stages add a column of this name"),
        ("path,label\n", "there are no rows"),
        ("", "cannot be read.*empty"),
        ("path,label,boxes\na.png,x,[[1, 2, 3, 4]]\n", "cannot be read.*a cell with commas needs quotes"),
    ],
)
def test_own_files_that_cannot_work_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)images\.csv.*{reason}"):
        ManifestFile(csv(tmp_path, text)).manifest()


def test_own_files_that_are_unreadable_or_unknown_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"broken.parquet": b"PAR1 and no more"})
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read"):
        ManifestFile(tmp_path / "broken.parquet").manifest()
    with pytest.raises(DataError, match=r"nowhere\.csv: cannot be read"):
        ManifestFile(tmp_path / "nowhere.csv").manifest()
    with pytest.raises(ConfigError, match=r"dataset\.path=.*unknown file ending '\.json'; must be \.parquet or \.csv"):
        ManifestFile(tmp_path / "images.json")


def test_own_file_with_a_wrong_root_is_refused_and_with_the_right_one_read(tmp_path: Path) -> None:
    path = own(tmp_path / "images", OWN, ".parquet").rename(tmp_path / "images.parquet")
    with pytest.raises(DataError, match=r"(?s)dataset\.root=.*none of the first 4 images .*a\.png.*Set dataset\.root"):
        ManifestFile(path).manifest()
    assert ManifestFile(path, tmp_path / "images").manifest().store == FolderStore(tmp_path / "images")


def test_own_file_with_some_images_missing_is_read(tmp_path: Path) -> None:
    path = own(tmp_path, OWN, ".parquet")
    (tmp_path / "a.png").unlink()
    assert len(ManifestFile(path).manifest().rows) == len(OWN)


def test_a_manifest_written_by_this_package_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-imagenet-200"
    first = tiny(tmp_path).rows
    first.write_parquet(tmp_path / "rows.parquet")
    assert ManifestFile(tmp_path / "rows.parquet", folder).manifest().rows.equals(first)


# What all readers share


def test_problems_do_not_flood() -> None:
    problems = Problems()
    for number in range(SHOWN_PER_KIND):
        problems.add("broken file", f"{number}.txt", "is broken")
    assert problems.sentences()[-1] == f"{SHOWN_PER_KIND - 1}.txt: is broken."
    for number in range(500):
        problems.add("broken file", f"{number}.txt", "is broken again")
        problems.add("rare fault", "rare.txt", f"line {number} is odd")
    sentences = problems.sentences()
    assert len(sentences) == SHOWN_PER_KIND + 2
    assert sentences[0] == "0.txt: is broken (and 1 more like it)."
    assert sentences[SHOWN_PER_KIND] == "broken file: 480 more like the 20 named, 500 in all."
    assert sentences[-1] == "rare.txt: line 0 is odd (and 499 more like it)."


def test_a_reader_with_many_broken_files_stays_short(tmp_path: Path) -> None:
    images = {f"train/n01/n01_{number}.JPEG": b"" for number in range(100)}
    files = {f"train/n01/n01_{number}.xml": "<broken" for number in range(100)}
    manifest = Imagenet(write(tmp_path / "images", images), write(tmp_path / "boxes", files)).manifest()
    assert manifest.rows["status"].to_list() == ["bad_annotation"] * 100
    assert manifest.problems[-1] == "XML file not understood: 80 more like the 20 named, 100 in all."
    assert len(manifest.problems) == 22  # the 21st: there are no val images


def test_folder_names_follow_links_and_end(tmp_path: Path) -> None:
    write(tmp_path / "data", {"a/1.txt": "", "0.txt": ""})
    write(tmp_path / "elsewhere", {"2.txt": ""})
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    assert FolderStore(tmp_path / "data").names() == ["0.txt", "a/1.txt", "linked/2.txt"]
    with pytest.raises(DataError, match="nowhere: cannot be listed"):
        FolderStore(tmp_path / "nowhere").names()


@pytest.mark.parametrize(
    ("name", "given", "reader"),
    [
        ("tiny_imagenet", {"root": "x.zip"}, TinyImagenet("x.zip")),
        ("imagenet", {"root": "x", "boxes": "y"}, Imagenet("x", "y")),
        ("manifest", {"path": "x.csv"}, ManifestFile("x.csv")),
    ],
)
def test_config_files_bind_and_ask_for_what_has_no_default(name: str, given: dict[str, str], reader: object) -> None:
    node = OmegaConf.load(config.CONF_DIR / "dataset" / f"{name}.yaml")
    assert OmegaConf.missing_keys(node) == set(given)
    assert config.bind(OmegaConf.to_container(OmegaConf.merge(node, given)), "dataset") == reader


@pytest.mark.real_data
def test_the_real_subset_of_tiny_imagenet() -> None:
    folder = os.environ.get("DEJAVU_REAL_DATA")
    if not folder:
        pytest.skip("DEJAVU_REAL_DATA names no folder")
    archive = Path(folder) / "tiny_imagenet_20.zip"
    manifest = TinyImagenet(archive).manifest()
    assert dict(manifest.rows.group_by("origin").len().iter_rows()) == {"train": 10_000, "val": 1_000}
    assert manifest.rows["label"].n_unique() == len(manifest.class_names) == 20
    assert set(manifest.rows["status"]) == {"ok"}
    assert manifest.problems == ()
    boxes = manifest.rows["boxes"].list.first()
    assert boxes.list.max().max() == 64  # the last pixel of 64 is inside a box that reaches the edge
    assert boxes.list.min().min() == 0
    lines = ZipStore(archive).read("tiny-imagenet-200/train/n02165456/n02165456_boxes.txt").decode().splitlines()
    name, xmin, ymin, xmax, ymax = lines[0].split("\t")
    wanted = [[int(xmin), int(ymin), int(xmax) + 1, int(ymax) + 1]]
    assert row(manifest, f"train/n02165456/{name}")["boxes"] == wanted
