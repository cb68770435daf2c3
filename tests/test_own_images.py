"""Folders of images of one's own: the same truth in three forms, what cannot be trusted, shares, a detector's boxes."""

import json
import re
import socket
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from conftest import measure
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from properties import examples
from safetensors.torch import load_file, save_file
from test_detectors import KINDS, NAMES, SEEDS, WORDS

from dejavu_exp import boxes, config, crops, images, splits, stages
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.boxed import BoxedImages
from dejavu_exp.datasets.manifest import ManifestFile
from dejavu_exp.encoders import DetectorEncoder
from dejavu_exp.encoders.detector_modules import BOX_VALUES, MOST_BOXES, surest_boxes
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.splits import SharesSplit
from dejavu_exp.tables import Role, Status

CLASSES = ("cat", "dog")
SIZE = (40, 30)
TRUTH: dict[str, list[tuple[str, tuple[int, int, int, int]]]] = {
    "train/cat/1.jpg": [("cat", (4, 3, 20, 18))],
    "train/dog/1.png": [("dog", (0, 0, 20, 15)), ("cat", (30, 15, 40, 30))],
    "train/dog/2.png": [],
    "val/dog/1.jpg": [("dog", (10, 6, 30, 30))],
}
"""Boxes of each image; those of the same name in other folders differ, so a wrong match shows."""


def picture(path: Path, size: tuple[int, int] = SIZE, exif: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = Image.Exif()
    if exif is not None:
        turned[0x0112] = exif
    Image.new("RGB", size, (90, 120, 30)).save(path, exif=turned)


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def root(folder: Path) -> Path:
    for name in TRUTH:
        picture(folder / "images" / name)
    return folder / "images"


def coco_json(**changes: Any) -> str:
    """The truth as an instances file, with lists replaced."""
    listed = [
        {"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for number, name in enumerate(TRUTH)
    ]
    found = [
        {"id": 1, "image_id": number, "category_id": CLASSES.index(name), "bbox": [x, y, right - x, bottom - y]}
        for number, things in enumerate(TRUTH.values())
        for name, (x, y, right, bottom) in things
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
    return json.dumps({"images": listed, "annotations": found, "categories": categories} | changes)


def voc_xml(things: list[tuple[str, tuple[object, ...]]], size: tuple[int, int] = SIZE) -> str:
    ends = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{end}>{value}</{end}>" for end, value in zip(ends, box, strict=True))
        + "</bndbox></object>"
        for name, box in things
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>"


def coco(folder: Path) -> BoxedImages:
    return BoxedImages(root(folder), text(folder / "instances.json", coco_json()))


def voc(folder: Path) -> BoxedImages:
    for name, things in TRUTH.items():
        text(folder / "Annotations" / Path(name).with_suffix(".xml"), voc_xml(cast(Any, things)))
    return BoxedImages(root(folder), folder / "Annotations")


def yolo(folder: Path) -> BoxedImages:
    for name, things in TRUTH.items():
        lines = [
            f"{CLASSES.index(kind)} {(x + right) / 2 / SIZE[0]:.6f} {(y + bottom) / 2 / SIZE[1]:.6f} "
            f"{(right - x) / SIZE[0]:.6f} {(bottom - y) / SIZE[1]:.6f}"
            for kind, (x, y, right, bottom) in things
        ]
        text(folder / "labels" / Path(name).with_suffix(".txt"), "\n".join(lines))
    text(folder / "labels" / "classes.txt", "\n".join(CLASSES))
    return BoxedImages(root(folder), folder / "labels")


FORMS: dict[str, Callable[[Path], BoxedImages]] = {"coco": coco, "voc": voc, "yolo": yolo}


def row(manifest: Manifest, name: str) -> dict[str, Any]:
    return manifest.rows.row(by_predicate=pl.col("id") == name, named=True)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_tells_the_same_truth(form: str, tmp_path: Path) -> None:
    manifest = FORMS[form](tmp_path).manifest()
    rows = manifest.rows
    assert rows["id"].to_list() == rows["path"].to_list() == sorted(TRUTH)
    assert rows["boxes"].to_list() == [[list(box) for _, box in TRUTH[name]] for name in sorted(TRUTH)]
    assert rows["objects"].to_list() == [["cat"], ["cat", "dog"], [], ["dog"]]
    assert rows["label"].to_list() == ["cat", "dog", None, "dog"]
    assert rows["origin"].to_list() == ["train", "train", "train", "val"]
    assert set(rows.select("width", "height").iter_rows()) == {SIZE}
    assert set(rows["status"]) == {"ok"}
    assert manifest.problems == (
        f"{tmp_path / 'images'}: 1 of 4 images have no label, e.g. train/dog/2.png (dataset.label=largest_box).",
    )
    assert manifest.store.read("train/cat/1.jpg") == (tmp_path / "images/train/cat/1.jpg").read_bytes()


@pytest.mark.parametrize(
    ("label", "expected"),
    [("only_class", ["cat", None, None, "dog"]), ("folder", ["cat", "dog", "dog", "dog"])],
)
def test_where_labels_come_from(label: Any, expected: list[str | None], tmp_path: Path) -> None:
    made = coco(tmp_path)
    rows = BoxedImages(made.root, made.boxes, label=label).manifest().rows
    assert rows["label"].to_list() == expected
    # An empty list of boxes is background only where no folder claims a foreground.
    assert rows["status"].to_list()[2] == ("no_annotation" if label == "folder" else "ok")
    assert (rows["boxes"].to_list()[2] is None) == (label == "folder")


def test_two_largest_boxes_of_different_classes_give_no_label(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    text(tmp_path / "boxes" / "a.xml", voc_xml([("cat", (0, 0, 10, 10)), ("dog", (20, 0, 30, 10))]))
    found = row(BoxedImages(tmp_path / "images", tmp_path / "boxes").manifest(), "a.png")
    assert (found["label"], found["objects"], found["status"]) == (None, ["cat", "dog"], "ok")


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("images/train/a.jpg", "labels/train/a.txt"),
        ("train/images/a.jpg", "train/labels/a.txt"),
        ("train2017/a.jpg", "train2017/a.txt"),
        ("JPEGImages/a.jpg", "Annotations/a.txt"),
        ("deep/er/a.jpg", "flat/../a.txt"),
    ],
)
def test_layouts_in_which_boxes_belong_to_images(image: str, file: str, tmp_path: Path) -> None:
    picture(tmp_path / image)
    text(tmp_path / file, "0 0.5 0.5 0.5 0.5")
    text(tmp_path / "data.yaml", "names: [cat]\n")
    manifest = BoxedImages(tmp_path, tmp_path).manifest()
    assert row(manifest, image)["boxes"] == [[10, 7, 30, 23]]
    assert row(manifest, image)["label"] == "cat"


def test_a_file_that_may_belong_to_two_images_belongs_to_none(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "c/2.png", "c/2.jpg", "c/3.png"):
        picture(tmp_path / "images" / name)
    for name in ("1.xml", "c/2.xml", "c/3.xml", "d/4.xml"):
        text(tmp_path / "boxes" / name, voc_xml([("cat", (0, 0, 5, 5))]))
    manifest = BoxedImages(tmp_path / "images", tmp_path / "boxes").manifest()
    assert dict(manifest.rows.select("id", "status").iter_rows()) == {
        **dict.fromkeys(("a/1.png", "b/1.png", "c/2.png", "c/2.jpg"), "no_annotation"),
        "c/3.png": "ok",
    }
    assert any("1.xml: may belong to 2 images, e.g. a/1.png and b/1.png" in one for one in manifest.problems)
    assert any("1 .xml files belong to no image, e.g. d/4.xml" in one for one in manifest.problems)


def test_origins_and_the_folders_that_are_no_class(tmp_path: Path) -> None:
    names = ("training/car/1.png", "valid/car/1.png", "test/car/1.png", "images/val2017/car/1.png", "car/train/1.png")
    for name in names:
        picture(tmp_path / name)
    rows = BoxedImages(tmp_path, None, label="folder").manifest().rows
    assert {
        name: row(BoxedImages(tmp_path, None, label="folder").manifest(), name)["origin"] for name in names
    } == dict(zip(names, ("train", "val", "test", "val", "train"), strict=True))
    assert set(rows["label"]) == {"car"}


# What cannot be trusted


def first(manifest: Manifest) -> dict[str, Any]:
    return row(manifest, "train/cat/1.jpg")


def annotated(bbox: object, category: object = 0) -> list[dict[str, object]]:
    return [{"image_id": 0, "category_id": category, "bbox": bbox}]


@pytest.mark.parametrize(
    ("annotations", "status", "detail"),
    [
        (annotated([20, 3, -16, 15]), "bad_annotation", r"box \[20, 3, 4, 18\] has no area"),
        (annotated([4, 3, 0, 15]), "bad_annotation", r"box \[4, 3, 4, 18\] has no area"),
        (annotated([float("nan"), 3, 4, 15]), "bad_annotation", r"annotation 1: a box must have coordinates"),
        (annotated([0, 3, float("inf"), 15]), "bad_annotation", r"annotation 1: a box must have coordinates"),
        (annotated([10**400, 3, 1, 15]), "bad_annotation", r"annotation 1: a box must"),
        (annotated([-5, 3, 16, 15]), "box_outside", r"box \[-5, 3, 11, 18\] leaves the image of 40 x 30 px"),
        (annotated([4, 3, 90, 15]), "box_outside", r"box \[4, 3, 94, 18\] leaves the image"),
        (annotated("4 3 16 15"), "bad_annotation", r"its bbox must be four numbers"),
        (annotated([4, 3, True, 15]), "bad_annotation", r"its bbox must be four numbers"),
        (annotated(None), "bad_annotation", r"its bbox must be four numbers"),
        (annotated([4, 3, 16, 15], 9), "bad_annotation", r"its category_id '9' is none of the 2 categories"),
        (annotated([4, 3, 16, 15], [0]), "bad_annotation", r"its category_id '\[0\]' is none"),
        (annotated([4, 3, 16, 15]) + annotated([1, 1, 1, 1], None), "bad_annotation", r"annotation 2: its category_id"),
    ],
)
def test_coco_boxes_that_cannot_be_trusted_cost_their_row_only(
    annotations: object, status: str, detail: str, tmp_path: Path
) -> None:
    file = text(tmp_path / "instances.json", coco_json(annotations=annotations))
    manifest = BoxedImages(root(tmp_path), file).manifest()
    found = first(manifest)
    assert (found["status"], found["boxes"]) == (status, None)
    assert pl.Series([found["detail"]]).str.contains(detail).all()
    assert row(manifest, "val/dog/1.jpg")["status"] == "ok"
    assert len([problem for problem in manifest.problems if "no label" not in problem]) == 1


@pytest.mark.parametrize(
    ("bbox", "expected"), [([-0.6, 3, 20, 15], [0, 3, 20, 18]), ([4, 3, 36.9, 27.001], [4, 3, 40, 30])]
)
def test_a_pixel_beyond_the_border_is_cut(bbox: list[float], expected: list[int], tmp_path: Path) -> None:
    file = text(tmp_path / "instances.json", coco_json(annotations=annotated(bbox)))
    found = first(BoxedImages(root(tmp_path), file).manifest())
    assert (found["boxes"], found["status"]) == ([expected], "ok")


def entry(number: object, name: object, **more: object) -> dict[str, object]:
    return {"id": number, "file_name": name, **more}


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/hosts.jpg", "C:\\x.jpg", "train\\..\\..\\x.jpg", "a\0.jpg"])
def test_coco_names_that_lead_out_are_never_followed(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "outside.jpg")
    content = json.loads(coco_json())
    content["images"].append(entry(77, name))
    content["annotations"] += [{"image_id": 77, "category_id": 0, "bbox": [1, 1, 5, 5]}]
    file = text(tmp_path / "instances.json", json.dumps(content))
    manifest = BoxedImages(root(tmp_path), file).manifest()
    assert set(manifest.rows["path"]) == set(TRUTH)
    assert any("entry 5 of images names" in one and "not below dataset.root" in one for one in manifest.problems)


def test_coco_images_that_are_missing_twice_or_uncertain(tmp_path: Path) -> None:
    listed = [
        entry(0, "train/cat/1.jpg"),
        entry(0, "train/dog/2.png"),
        entry(2, "2.png"),
        entry(3, "1.jpg"),
        entry(4, "gone/1.jpg"),
        entry(5, 7),
        entry(True, "train/dog/1.png"),
        "nothing",
    ]
    file = text(tmp_path / "instances.json", coco_json(images=listed, annotations=annotated([1, 1, 5, 5])))
    manifest = BoxedImages(root(tmp_path), file).manifest()
    told = " ".join(manifest.problems)
    # The id is of two images, so the box is of neither; train/cat/1.jpg may besides be what 1.jpg means.
    assert (first(manifest)["status"], first(manifest)["boxes"]) == ("bad_annotation", None)
    assert row(manifest, "train/dog/2.png")["detail"].endswith("the image id '0' is given to several images")
    assert row(manifest, "val/dog/1.jpg")["status"] == "bad_annotation"
    assert row(manifest, "train/dog/1.png")["status"] == "no_annotation"
    assert row(manifest, "gone/1.jpg")["status"] == "unreadable"
    assert row(manifest, "gone/1.jpg")["detail"] == "gone/1.jpg: instances.json lists it, and it is not there"
    for part in (
        "'1.jpg', which may be train/cat/1.jpg or val/dog/1.jpg",
        "1 images that it lists are not there, e.g. gone/1.jpg",
        "entry 6 of images must have an id and a file_name, got '5', '7' (and 2 more like it)",
    ):
        assert part in told


def test_an_image_that_is_listed_and_lost_gets_no_role(tmp_path: Path) -> None:
    content = json.loads(coco_json())
    content["images"].append(entry(77, "train/cat/lost.jpg"))
    file = text(tmp_path / "instances.json", json.dumps(content))
    roles = splits.RandomSplit(2, 0, 0, None, 0, 8).assign(BoxedImages(root(tmp_path), file).manifest().rows, seed=0)
    assert set(roles["id"]) == set(TRUTH)


def test_names_with_accents_backslashes_and_line_breaks(tmp_path: Path) -> None:
    names = ("caf\u00e9/u\u0308.png", "a\nb/c d.png", "sub/x.png")
    for name in names:
        picture(tmp_path / "images" / name)
    listed = [entry(0, "cafe\u0301/\u00fc.png"), entry(1, names[1]), entry(2, "sub\\x.png")]
    things = [{"image_id": number, "category_id": 0, "bbox": [1, 2, 3, 4]} for number in range(3)]
    content = coco_json(images=listed, annotations=things, categories=[{"id": 0, "name": " sea\nlion "}])
    manifest = BoxedImages(tmp_path / "images", text(tmp_path / "i.json", content)).manifest()
    assert set(manifest.rows["id"]) == set(names)
    assert manifest.rows["boxes"].to_list() == [[[1, 2, 4, 6]]] * 3
    assert set(manifest.rows["label"]) == {"sea lion"}
    assert manifest.problems == (
        f"{tmp_path / 'images'}: all labels are 'sea lion' (dataset.label=largest_box), so there is nothing to infer.",
    )
    (tmp_path / "images" / names[1]).write_bytes(b"broken")
    told = BoxedImages(tmp_path / "images", tmp_path / "i.json").manifest()
    assert row(told, names[1])["detail"] == "a\\nb/c d.png: it is no image that Pillow knows"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must hold one object with the lists images and annotations"),
        ("{", r"is no JSON \(.*\)\. Give an instances file as COCO has them"),
        ("[" * 100_000, "is no JSON"),
        ('{"images": 3}', "must hold a list images"),
        ('{"images": [], "annotations": []}', "must hold a list categories"),
        (coco_json(annotations=None), "must hold a list annotations"),
        (coco_json(images=[], annotations=[]), "nothing in it belongs to an image below dataset.root"),
    ],
)
def test_json_that_is_not_coco_is_refused(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        BoxedImages(root(tmp_path), text(tmp_path / "i.json", content)).manifest()


@pytest.mark.parametrize(
    ("content", "status", "detail"),
    [
        (voc_xml([("cat", (20, 3, 4, 18))]), "bad_annotation", r"box \[20, 3, 4, 18\] has no area"),
        (voc_xml([("cat", (4, 3, 50, 18))]), "box_outside", "leaves the image of 40 x 30 px"),
        (voc_xml([("cat", (4, 3, "nan", 18))]), "bad_annotation", "object 1: a box must have coordinates"),
        (voc_xml([("cat", (4, 3, 20, 18))], (80, 60)), "bad_annotation", "annotated at 80 x 60 px, and is stored with"),
        ("<html><object/></html>", "bad_annotation", "its root must be <annotation>, not <html>"),
        ("<annotation>", "bad_annotation", "no element found"),
        (
            "<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><annotation>&e;</annotation>",
            "bad_annotation",
            "EntitiesForbidden",
        ),
        (
            "<!DOCTYPE a [<!ENTITY b 'ha'><!ENTITY c '&b;&b;&b;'>]><annotation>&c;</annotation>",
            "bad_annotation",
            "EntitiesForbidden",
        ),
        (f"<annotation>{' ' * (1 << 24)}</annotation>", "bad_annotation", "more than the 16777216 that are read"),
    ],
)
def test_xml_that_cannot_be_trusted_costs_its_row_only(content: str, status: str, detail: str, tmp_path: Path) -> None:
    made = voc(tmp_path)
    text(tmp_path / "Annotations" / "train/cat/1.xml", content)
    manifest = made.manifest()
    found = first(manifest)
    assert (found["status"], found["boxes"]) == (status, None)
    assert pl.Series([found["detail"]]).str.contains(detail).all()
    assert row(manifest, "train/dog/1.png")["status"] == "ok"


def test_an_object_without_name_is_a_box_and_no_object(tmp_path: Path) -> None:
    made = voc(tmp_path)
    text(tmp_path / "Annotations" / "train/cat/1.xml", voc_xml([("", (4, 3, 20, 18)), ("dog", (0, 0, 2, 2))]))
    found = first(made.manifest())
    assert (found["label"], found["objects"], found["status"]) == (None, None, "ok")
    assert found["boxes"] == [[4, 3, 20, 18], [0, 0, 2, 2]]


@pytest.mark.parametrize(
    ("content", "status", "detail"),
    [
        ("0 1.5 0.5 0.1 0.1", "bad_annotation", "line 1: cx cy w h must be shares from 0 to 1, got '1.5 0.5 0.1 0.1'"),
        ("0 0.5 0.5 0.1 0.1\n0 -0.5 0.5 0.1 0.1", "bad_annotation", "line 2: cx cy w h must be shares"),
        ("0 0.5 nan 0.1 0.1", "bad_annotation", "must be shares from 0 to 1"),
        ("0 0.5 half 0.1 0.1", "bad_annotation", "must be shares from 0 to 1"),
        ("0 200 100 30 40", "bad_annotation", "must be shares from 0 to 1"),
        ("0 0.5 0.5 0.1", "bad_annotation", "line 1: must have 5 fields, class cx cy w h, not 4"),
        ("2 0.5 0.5 0.1 0.1", "bad_annotation", "line 1: class '2' is none of the 2 classes"),
        ("-1 0.5 0.5 0.1 0.1", "bad_annotation", "line 1: class '-1' is none of the 2 classes"),
        ("cat 0.5 0.5 0.1 0.1", "bad_annotation", "line 1: class 'cat' is none"),
        ("0 0.5 0.5 0 0.1", "bad_annotation", "has no area"),
        ("0 0.9 0.5 0.4 0.1", "box_outside", "leaves the image of 40 x 30 px"),
        ("\n \n", "ok", ""),
    ],
)
def test_yolo_lines_that_cannot_be_trusted_cost_their_row_only(
    content: str, status: str, detail: str, tmp_path: Path
) -> None:
    made = yolo(tmp_path)
    text(tmp_path / "labels" / "train/cat/1.txt", content)
    manifest = made.manifest()
    found = first(manifest)
    assert (found["status"], found["boxes"]) == (status, [] if status == "ok" else None)
    assert pl.Series([found["detail"] or ""]).str.contains(detail).all()
    assert row(manifest, "train/dog/1.png")["status"] == "ok"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("data.yaml", "names: [cat, dog]"),
        ("data.yaml", "nc: 2\nnames: {0: cat, 1: dog}"),
        ("names.txt", "cat\r\ndog\r\n\n"),
    ],
)
def test_forms_of_the_names_of_classes(file: str, content: str, tmp_path: Path) -> None:
    made = yolo(tmp_path)
    (tmp_path / "labels" / "classes.txt").unlink()
    named = text(tmp_path / file, content)
    rows = BoxedImages(made.root, made.boxes, names=named if file == "names.txt" else None).manifest().rows
    assert rows["objects"].to_list() == [["cat"], ["cat", "dog"], [], ["dog"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: 7", "must hold the names of the classes"),
        ("names: [cat, 7]", "the name of class '1' must be a text"),
        ("names: {one: cat}", "classes have whole numbers"),
        ("names: [cat", "cannot be read"),
        ("names: !!python/object/apply:os.system ['touch ran']", "cannot be read"),
    ],
)
def test_names_of_classes_that_cannot_work_are_refused(content: str, message: str, tmp_path: Path) -> None:
    made = yolo(tmp_path)
    named = text(tmp_path / "mine.yaml", content)
    with pytest.raises(DataError, match=rf"dataset\.names=.*mine\.yaml.*{message}"):
        BoxedImages(made.root, made.boxes, names=named).manifest()


def test_yolo_without_names_is_refused(tmp_path: Path) -> None:
    made = yolo(tmp_path)
    (tmp_path / "labels" / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"dataset\.names=null: none of data\.yaml.*classes\.txt.* is in .*labels"):
        made.manifest()


@pytest.mark.parametrize(
    ("orientation", "size", "said", "status"),
    [
        (1, SIZE, SIZE, "ok"),
        (6, SIZE, SIZE, "ok"),  # its size says that it was annotated as it is stored
        (6, SIZE, SIZE[::-1], "bad_annotation"),
        (6, SIZE, (0, 0), "bad_annotation"),
        (3, (30, 30), (30, 30), "bad_annotation"),  # a square says nothing
    ],
)
def test_images_that_exif_turns(
    orientation: int, size: tuple[int, int], said: tuple[int, int], status: str, tmp_path: Path
) -> None:
    picture(tmp_path / "images" / "a.jpg", size, orientation)
    text(tmp_path / "boxes" / "a.xml", voc_xml([("cat", (1, 2, 12, 14))], said))
    found = row(BoxedImages(tmp_path / "images", tmp_path / "boxes").manifest(), "a.jpg")
    assert (found["status"], (found["width"], found["height"])) == (status, size)
    assert status == "ok" or "EXIF turns it" in found["detail"]


def test_places_and_values_that_cannot_work_are_refused(tmp_path: Path) -> None:
    made, nothing = coco(tmp_path), tmp_path / "nothing"
    (tmp_path / "empty").mkdir()
    mixed = tmp_path / "mixed"
    for name in ("a.xml", "a.txt"):
        text(mixed / name, "")
    for refused, message in (
        (BoxedImages(nothing, made.boxes), r"dataset\.root=.*nothing: there is no such folder"),
        (BoxedImages(tmp_path / "empty", made.boxes), r"there is no image among 0 files; an image ends in \.jpeg"),
        (BoxedImages(made.root, nothing), r"dataset\.boxes=.*nothing: there is no such file or folder"),
        (BoxedImages(made.root, tmp_path / "empty"), r"no \.xml file \(VOC\) and no \.txt file \(YOLO\)"),
        (BoxedImages(made.root, text(tmp_path / "json" / "i.json", "{}").parent), r"For COCO name the \.json"),
        (BoxedImages(made.root, mixed), r"holds \.xml and \.txt files\. Set dataset\.form"),
        (BoxedImages(made.root, made.boxes, form="voc"), r"must be a folder with a file for each image"),
        (BoxedImages(made.root, mixed, form="coco"), r"must be the JSON file for dataset\.form=coco"),
        (BoxedImages(made.root, made.boxes, names="x.txt"), r"dataset\.names=x\.txt is for YOLO"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            refused.manifest()
    for values, message in (
        ({"root": " ", "boxes": None}, r"dataset\.root is empty"),
        ({"root": "x", "boxes": ""}, r"dataset\.boxes is empty"),
        ({"root": "x", "boxes": None}, r"dataset\.label=largest_box is told by boxes"),
        ({"root": "x", "boxes": "y", "form": "cvat"}, r"dataset\.form=cvat: must be one of auto, coco, voc, yolo"),
        ({"root": "x", "boxes": "y", "label": "name"}, r"dataset\.label=name: must be one of largest_box"),
    ):
        with pytest.raises(ConfigError, match=message):
            BoxedImages(**cast(Any, values))


# Shares


def shares(**changes: Any) -> SharesSplit:
    return SharesSplit(
        **{"target": 0.25, "heldout": 0.25, "shared": 0, "public": 0.5, "unseen": 1, "min_side_px": 8, **changes}
    )


def rows(classes: Mapping[str, tuple[int, int]], origin: str = "train") -> pl.DataFrame:
    """Rows of the manifest from {label: (images with boxes, images without)}."""
    found = [
        (f"{origin}/{label}/{number:03d}.png", origin, label, [[0, 0, 5, 5]] if number < boxed else None)
        for label, (boxed, plain) in classes.items()
        for number in range(boxed + plain)
    ]
    columns = dict(zip(("id", "origin", "label", "boxes"), map(list, zip(*found, strict=True)), strict=True))
    status = [str(Status.OK if known else Status.NO_ANNOTATION) for known in columns["boxes"]]
    return images_table(**columns, path=columns["id"], status=status)


def images_table(**columns: list[Any]) -> pl.DataFrame:
    from dejavu_exp.datasets.annotations import rows_of

    return rows_of(columns)


def counts(roles: pl.DataFrame, label: str) -> dict[str, int]:
    return dict(roles.filter(pl.col("label") == label).group_by("role").len().iter_rows())


def test_shares_of_classes_of_unlike_sizes_and_what_is_said_of_them() -> None:
    known = pl.concat(
        [
            rows({"ant": (100, 0), "bee": (7, 0), "cow": (3, 0), "dog": (2, 0), "elk": (1, 30), "fox": (2, 9)}),
            rows({"ant": (5, 1), "bee": (2, 0), "dog": (4, 0)}, "val"),
        ]
    )
    roles = shares().assign(known, seed=0)
    assert counts(roles, "ant") == {"target": 25, "heldout": 25, "public": 50, "unseen": 5}
    assert counts(roles, "bee") == {"target": 2, "heldout": 2, "public": 3, "unseen": 2}
    assert counts(roles, "cow") == {"target": 1, "heldout": 1, "public": 1}
    assert counts(roles, "fox") == {"target": 1, "heldout": 1, "public": 5}
    assert set(roles["label"]) == {"ant", "bee", "cow", "fox"}
    assert shares().assign(known.sample(fraction=1, shuffle=True, seed=3), seed=0).equals(roles)
    assert not shares().assign(known, seed=1).equals(roles)
    left, target, heldout = shares().report(roles, known)
    assert left == (
        "classes: 2 of 6 are left out, with 33 images, for they have too few images, or images with boxes, for the "
        "shares of the split; the smallest has dog, 2."
    )
    assert (
        target
        == "target: 1 of 4 classes have fewer images with boxes than split.target=0.25 asks for, e.g. fox, 1 of 3."
    )
    assert heldout.startswith("heldout: 1 of 4")


def test_no_image_that_the_encoder_saw_is_unseen_unless_it_is_listed(tmp_path: Path) -> None:
    known = rows({"ant": (40, 0), "bee": (20, 0)})
    alone = shares().assign(known, seed=0)
    assert Role.UNSEEN not in set(alone["role"])
    assert shares().report(alone, known) == [
        "unseen: no image with boxes is of origin val (split.unseen_origin) or listed (split.unseen_list), so none is "
        "known to be unseen."
    ]
    listed = text(tmp_path / "unseen.txt", "\ufefftrain/ant/003.png\r\ntrain/bee/001.png\n\ntrain/bee/002.png\n")
    split = shares(unseen_list=str(listed))
    roles = split.assign(known, seed=0)
    assert set(roles.filter(role="unseen")["id"]) == {"train/ant/003.png", "train/bee/001.png", "train/bee/002.png"}
    assert roles["id"].is_unique().all()
    assert split.report(roles, known) == []
    half = shares(unseen_list=str(listed), unseen=0.5).assign(known, seed=0)
    assert counts(half, "bee")["unseen"] == 1
    assert "train/bee/001.png" not in set(half.filter(pl.col("role") != "unseen")["id"])
    for content, message in (
        ("", "is empty"),
        ("train/ant/003.png\nant/1.png\n", r"1 of its lines are no id of the data set, e\.g\. 'ant/1\.png'"),
    ):
        with pytest.raises(DataError, match=rf"split\.unseen_list=.*{message}"):
            shares(unseen_list=str(text(tmp_path / "bad.txt", content))).assign(known, seed=0)
    with pytest.raises(DataError, match=r"split\.unseen_list=.*none\.txt: cannot be read"):
        shares(unseen_list=str(tmp_path / "none.txt")).assign(known, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0}, r"split\.target=0: must be a share, above 0 and at most 1"),
        ({"heldout": -0.1}, r"split\.heldout=-0\.1: must be a share, at least 0"),
        ({"public": 1.5}, r"split\.public=1\.5"),
        ({"unseen": float("nan")}, r"split\.unseen=nan"),
        ({"shared": 0.1}, r"the shares target 0\.25 \+ heldout 0\.25 \+ shared 0\.1 \+ public 0\.5 are more than 1"),
        ({"unseen_origin": "train"}, r"split\.unseen_origin=train is also split\.fit_origin, whose images the encoder"),
        ({"min_side_px": 0}, r"split\.min_side_px=0"),
    ],
)
def test_shares_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shares(**changes)


def test_shares_that_add_up_in_decimals_are_taken() -> None:
    assert shares(target=0.1, heldout=0.2, shared=0.3, public=0.4).target == 0.1


@pytest.mark.parametrize("classes", [{"ant": (40, 0)}, {"ant": (40, 0), "bee": (2, 0)}, {"ant": (1, 0), "bee": (2, 0)}])
def test_one_class_is_nothing_to_infer(classes: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(DataError, match=r"classes of origin train have images for each of target, heldout, public"):
        shares().assign(rows(classes), seed=0)


@examples(100)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=5), st.integers(0, 500), st.integers(0, 50))
def test_apportioned_counts_are_as_near_as_can_be(parts: list[int], count: int, rest: int) -> None:
    whole = sum(parts) + rest + 1
    asked = {role: Fraction(part, whole) for role, part in zip(Role, parts, strict=False)}
    found = splits.apportion(asked, count)
    assert all(abs(found[role] - share * count) < 1 for role, share in asked.items())
    assert sum(found.values()) <= count
    # No other way to share them out is nearer in sum: Hamilton's method is the one that minimises it.
    if sum(found.values()) > 0:
        left = count - sum(found.values())
        gained = [role for role in asked if found[role] > asked[role] * count]
        kept = (1 - sum(asked.values())) * count
        assert all(asked[role] * count - (found[role] - 1) >= kept - left for role in gained)


@pytest.mark.parametrize("split", ["split=shares", "split=tiny_imagenet"])
def test_a_corner_needs_no_boxes(split: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(32):
        path = tmp_path / ("val" if number % 8 > 5 else "train") / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    given = [] if split == "split=shares" else ["split.target=3", "split.heldout=3", "split.public=4"]
    resolved, _ = config.compose(
        [
            *("dataset=folder", f"dataset.root={tmp_path}", split, *given, "probe=corner_knn", "probe.k=4"),
            *("reference=class_prior", "tracking=none", f"trainer.cache={tmp_path / 'cache'}"),
        ]
    )
    resolved.pop("run")
    plan = stages.Plan(**config.build(resolved))
    views = stages.name_truth(plan, stages.prepare(plan))
    used = dict(views.measured().group_by("role").len().iter_rows())
    assert used == {"target": 6, "unseen": 8}
    assert set(views.measured()["view"]) == {"corner"}
    assert views.shortfalls == []


# Boxes of a detector


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detectors")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng():
        for name in ("rt_detr", "detr", "owlvit", "owlv2"):
            torch.manual_seed(SEEDS.get(name, 0))
            KINDS[name](folder / name)
            within(folder / name / "model.safetensors")
    text(folder / "words.txt", "\n".join(WORDS))
    return folder


def within(weights: Path) -> None:
    """Let a random model's boxes lie within the image: the last layer that places them says little."""
    state = load_file(weights)
    for name in state:
        if re.search(r"(bbox_predictor|bbox_embed.*)\.layers\.2\.weight|box_head\.dense2\.weight", name):
            state[name] = state[name] * 0.02
    save_file(state, weights, {"format": "pt"})


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in ((60, 40), (40, 90))]


def of_transformers(
    folder: Path, kind: str, image: Image.Image, threshold: float
) -> list[tuple[tuple[float, ...], str]]:
    """Boxes with the best class of each, by transformers' own way; of RT-DETR a box once, with its best class."""
    auto = cast(Any, transformers)
    processor = auto.AutoImageProcessor.from_pretrained(folder)
    padding = {"pad_size": {"height": 80, "width": 80}} if kind == "detr" else {}
    inputs: dict[str, Any] = {}
    if kind.startswith("owl"):
        model = auto.AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
        texts = [f"a photo of a {word}" for word in WORDS]
        tokens = auto.AutoTokenizer.from_pretrained(folder)(
            texts, padding="max_length", max_length=8, return_tensors="pt"
        )
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    else:
        model = auto.AutoModelForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt", **padding), **inputs)
    found = processor.post_process_object_detection(
        outputs, threshold=threshold, target_sizes=torch.tensor([image.size[::-1]])
    )[0]
    names = dict(enumerate(WORDS)) if kind.startswith("owl") else NAMES
    best: dict[tuple[float, ...], tuple[float, str]] = {}
    for box, score, label in zip(
        found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
    ):
        if names[label] != "N/A":
            best[tuple(box)] = max(best.get(tuple(box), (0.0, "")), (score, names[label]))
    return [(box, name) for box, (_, name) in best.items()]


@pytest.mark.parametrize("kind", ["rt_detr", "detr", "owlvit", "owlv2"])
@pytest.mark.usefixtures("without_network")
def test_boxes_are_those_that_transformers_finds(kind: str, detectors: Path) -> None:
    vocabulary = str(detectors / "words.txt") if kind.startswith("owl") else None
    spec = DetectorEncoder(str(detectors / kind), vocabulary)
    loaded = spec.load_boxes()
    seen = 0
    for image in pictures():
        with torch.no_grad():
            values = loaded.module(loaded.transform(image)[None])[0].numpy()
        scores = np.sort(values.reshape(-1, BOX_VALUES)[:, 4])
        # Of RT-DETR transformers keeps as many pairs of box and class as there are boxes.
        threshold = float(scores[-2] - 1e-4)
        expected = of_transformers(detectors / kind, kind, image, threshold)
        found = boxes.boxes_of(values, image.size, loaded.classes or (), threshold, square=spec.boxes_square)
        width, height = image.size
        wanted = []
        for (xmin, ymin, xmax, ymax), _ in expected:
            # Outwards, so that no part of the object is left outside.
            low, high = [int(max(end, 0)) for end in (xmin, ymin)], [-int(-end // 1) for end in (xmax, ymax)]
            cut = [*low, min(high[0], width), min(high[1], height)]
            if cut[0] < cut[2] and cut[1] < cut[3]:
                wanted.append(cut)
        assert sorted(found.boxes or []) == sorted(wanted)
        seen += len(wanted)
        assert set(found.objects or []) == {name for _, name in expected}
    assert seen


def test_no_box_is_no_background_and_too_many_are_not_trusted() -> None:
    one = np.array([0.5, 0.5, 0.5, 0.5, 0.4, 1], dtype=np.float32)
    found = boxes.boxes_of(one, (40, 20), ("cat", "dog"), 0.3, square=False)
    assert found == boxes.Detected([[10, 5, 30, 15]], ["dog"], Status.OK)
    assert boxes.boxes_of(one, (40, 20), ("cat", "dog"), 0.3, square=True).boxes == [[10, 10, 30, 20]]
    none = boxes.boxes_of(one, (40, 20), ("cat", "dog"), 0.5, square=False)
    assert (none.boxes, none.objects, none.status) == (None, [], Status.NO_ANNOTATION)
    many = boxes.boxes_of(np.tile(one, MOST_BOXES), (40, 20), ("cat", "dog"), 0.3, square=False)
    assert (many.boxes, many.status) == (None, Status.BAD_ANNOTATION)


def test_the_surest_boxes_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    placed = torch.rand(2, MOST_BOXES + 50, 4, generator=generator)
    scores = torch.rand(2, MOST_BOXES + 50, 3, generator=generator)
    kept = surest_boxes(placed, scores).reshape(2, MOST_BOXES, BOX_VALUES)
    for image in range(2):
        ranked = sorted(range(MOST_BOXES + 50), key=lambda box: -float(scores[image, box].max()))[:MOST_BOXES]
        assert kept[image, :, :4].equal(placed[image, ranked])
        assert kept[image, :, 4].equal(scores[image, ranked].max(dim=1).values)
        assert kept[image, :, 5].tolist() == scores[image, ranked].argmax(dim=1).tolist()


@pytest.mark.usefixtures("without_network")
def test_the_command_writes_what_dataset_manifest_reads(
    detectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("train/ant/1.png", "val/bee/ü\n1.png"), pictures(), strict=True):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        image.save(tmp_path / "images" / name)
    text(tmp_path / "images/train/ant/2.png", "broken")
    whole = Image.open(tmp_path / "images/train/ant/1.png")
    whole.save(tmp_path / "images/train/ant/3.png")
    content = (tmp_path / "images/train/ant/3.png").read_bytes()
    (tmp_path / "images/train/ant/3.png").write_bytes(content[: len(content) // 2])
    given = ["dataset=folder", f"dataset.root={tmp_path / 'images'}", "tagger=rtdetr"]
    given += [f"tagger.encoder.model={detectors / 'rt_detr'}", "tagger.min_score=0.9", "trainer.workers=0"]
    boxes.main([*given, f"trainer.cache={tmp_path / 'cache'}", "--out", "found.parquet"])
    told = capsys.readouterr().out
    assert f"dataset=manifest dataset.path=found.parquet dataset.root={tmp_path / 'images'}" in told
    source = BoxedImages(tmp_path / "images", None, label="folder").manifest().rows
    read = ManifestFile(tmp_path / "found.parquet", tmp_path / "images").manifest()
    assert read.rows.select("id", "path", "origin", "label").equals(source.select("id", "path", "origin", "label"))
    loaded = DetectorEncoder(str(detectors / "rt_detr")).load_boxes()
    for name, image in zip(("train/ant/1.png", "val/bee/ü\n1.png"), pictures(), strict=True):
        with torch.no_grad():
            values = loaded.module(loaded.transform(image)[None])[0].numpy()
        expected = boxes.boxes_of(values, image.size, loaded.classes or (), 0.9, square=False)
        assert row(read, name)["boxes"] == expected.boxes
        assert row(read, name)["objects"] == expected.objects
        assert row(read, name)["status"] == "ok"
    for name in ("train/ant/2.png", "train/ant/3.png"):
        assert (row(read, name)["boxes"], row(read, name)["objects"]) == (None, None)
    shards = list((tmp_path / "cache").rglob("*.arrow"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    boxes.main([*given, f"trainer.cache={tmp_path / 'cache'}", "--out", "again.parquet"])
    assert pl.read_parquet("again.parquet").equals(pl.read_parquet("found.parquet"))
    assert shards
    assert [shard.stat().st_mtime_ns for shard in shards] == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["dataset=shapes", "tagger=dataset_tags"], "tagger: is no detector"),
        (["dataset=folder", "dataset.root=x", "tagger=open_clip"], "tagger: is no detector"),
        (["--out", "boxes.csv"], r"--out=boxes\.csv: must end in \.parquet"),
        (
            [
                *("dataset.classes=2", "dataset.train_per_class=2", "dataset.val_per_class=1"),
                *("tagger=rtdetr", "tagger.encoder.model=DETECTOR"),
            ],
            "are not files in a folder",
        ),
    ],
)
def test_what_the_command_refuses(given: list[str], message: str, detectors: Path) -> None:
    filled = [value.replace("DETECTOR", str(detectors / "rt_detr")) for value in given]
    with pytest.raises(SystemExit, match=message):
        boxes.main(filled)


# From a folder to a report


@pytest.mark.slow
def test_two_hundred_images_with_one_coco_file_to_a_report(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = {"cat": (255, 0, 0), "dog": (0, 255, 0), "bus": (0, 0, 255), "car": (255, 255, 0)}
    listed, things = [], []
    for number in range(200):
        size = int(rng.integers(60, 90)), int(rng.integers(60, 90))
        image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
        kind = number % 4
        ImageDraw.Draw(image).rectangle((5, 5, 24, 19), fill=list(colours.values())[kind])
        name = f"{'val' if number >= 160 else 'train'}/part{number % 3}/image {number}.{'jpg' if number % 2 else 'png'}"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / name)
        listed.append(entry(number, name, width=size[0], height=size[1]))
        things.append({"image_id": number, "category_id": kind, "bbox": [5, 5, 20, 15]})
    categories = [{"id": number, "name": name} for number, name in enumerate(colours)]
    file = text(tmp_path / "i.json", coco_json(images=listed, annotations=things, categories=categories))
    done = measure(
        tmp_path / "run",
        *("dataset=boxed", f"dataset.root={tmp_path / 'images'}", f"dataset.boxes={file}", "split=shares"),
        *("model=efficientnet_lite0", "model.arch=resnet10t", "model.weights=random", "probe.k=10"),
        "+model.arch_args={pretrained_cfg_overlay: {input_size: [3, 64, 64]}}",
        *("reference=class_prior", "scoring.resamples=200", "utility=none", "tracking=none"),
    )
    assert done.code == 0, done.stderr
    figures = done.figures()
    used = {role: found["used"] for role, found in figures["counts"].items()}
    assert used == {"target": 40, "heldout": 40, "shared": 0, "public": 80, "unseen": 40}
    assert figures["dataset"] == {"name": "images", "rows": 200, "labels": 4, "hash": figures["dataset"]["hash"]}
    assert figures["problems"] == []
    assert (done.folder / "report.html").stat().st_size > 10_000
    # The crop that is shown leaves out the box: nothing of the object's colour is left in it.
    manifest = BoxedImages(tmp_path / "images", file).manifest()
    looked = images.inspect(manifest.rows.with_columns(role=pl.lit("target")), manifest.store)
    views = crops.views(looked, crops.BackgroundCrop(32))
    assert set(views["status"]) == {"ok"}
    assert all(xmin >= 25 or ymin >= 20 for xmin, ymin in views.select("xmin", "ymin").iter_rows())
