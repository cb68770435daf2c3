"""Readers of image-caption pairs on small data sets written here in each published layout."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl
import pytest
from PIL import Image

from dejavu_exp import captions, crops, images
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.coco import Coco
from dejavu_exp.datasets.flickr8k import Flickr8k
from dejavu_exp.datasets.manifest import ManifestFile
from dejavu_exp.datasets.webdataset import WebDataset
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.splits import RandomSplit

FOLDER = Path(os.environ.get("DEJAVU_REAL_DATA", ""))
HTML = "<b>a dog</b> &amp; <script>alert('x')</script>"
LONG = "a dog and " * 1000
ODD = ["émile 写真 🐕", 'two\nlines, "quoted"', HTML, LONG, "said twice", "said twice"]
"""Captions that a reader must hand on as they are."""


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def pack(archive: Path, files: Mapping[str, str | bytes]) -> Path:
    with zipfile.ZipFile(archive, "w") as stream:
        for name, content in files.items():
            stream.writestr(name, content)
    return archive


def picture(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 6), shade).save(stream, "PNG")
    return stream.getvalue()


def row(manifest: Manifest, name: str) -> dict[str, Any]:
    return manifest.rows.row(by_predicate=pl.col("id") == name, named=True)


def caption_views(manifest: Manifest) -> dict[str, tuple[str, list[str] | None]]:
    """Status and texts by id of what a caption test would show, all captions of a row at once."""
    rows = images.inspect(manifest.rows.with_columns(role=pl.lit("target")), manifest.store)
    shown = crops.views(rows, captions.Caption("all"))
    return {name: (status, texts) for name, status, texts in shown.select("id", "status", "texts").iter_rows()}


# COCO


def listed(number: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.jpg", "width": 640, "height": 480, **changes}


def said(number: object, caption: object) -> dict[str, Any]:
    return {"id": 1, "image_id": number, "caption": caption}


def thing(number: object, category: object, bbox: object, iscrowd: int = 0) -> dict[str, Any]:
    outline = {"counts": [1, 2], "size": [3, 4]} if iscrowd else [[1.0, 2.0, 3.0]]
    return {"image_id": number, "category_id": category, "bbox": bbox, "iscrowd": iscrowd, "segmentation": outline}


CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 44, "name": "bottle"}]
CAPTIONS: dict[str, Any] = {
    "images": [listed(9), listed(25, width=500), listed(30, height=0, width="x")],
    "annotations": [said(25, "b first"), said(9, "a first"), said(25, "b second"), said(9, " "), said(9, "a second\n")],
}
INSTANCES: dict[str, Any] = {
    "images": CAPTIONS["images"],
    "annotations": [
        thing(9, 18, [0.1, 2.5, 639.9, 10]),
        thing(25, 44, [10, 20, 30, 40]),
        thing(9, 1, [1.2, 3.0, 5.5, 6.25], iscrowd=1),
        thing(9, 18, [5, 6, 7, 8]),
    ],
    "categories": CATEGORIES,
}
COCO: dict[str, Any] = {
    "coco/annotations/captions_train2017.json": CAPTIONS,
    "coco/annotations/instances_train2017.json": INSTANCES,
    "coco/train2017/000000000009.jpg": b"nine",
    "coco/train2017/000000000025.jpg": b"twenty-five",
    "coco/train2017/000000000030.jpg": b"thirty",
    "coco/annotations/captions_val2017.json": {"images": [listed(9)], "annotations": [said(9, "of val")]},
    "coco/annotations/instances_val2017.json": {"images": [], "annotations": [], "categories": CATEGORIES},
    "coco/val2017/000000000009.jpg": b"val nine",
}
NINE, TWENTY_FIVE, THIRTY = (f"train2017/{number:012d}.jpg" for number in (9, 25, 30))


def files(changes: Mapping[str, Any] | None = None) -> dict[str, str | bytes]:
    """The small data set with files changed, or left out where the new content is None."""
    changed = {**COCO, **{f"coco/{name}": content for name, content in (changes or {}).items()}}
    return {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in changed.items() if v is not None}


def coco(folder: Path, changes: Mapping[str, Any] | None = None) -> Manifest:
    return Coco(write(folder, files(changes))).manifest()


def captioned(*annotations: Any, listing: Any = None) -> dict[str, Any]:
    return {"annotations/captions_train2017.json": {**CAPTIONS, "annotations": list(annotations), **(listing or {})}}


def with_things(*annotations: Any) -> dict[str, Any]:
    return {"annotations/instances_train2017.json": {**INSTANCES, "annotations": list(annotations)}}


def test_coco_rows(tmp_path: Path) -> None:
    manifest = coco(tmp_path)
    columns = ("id", "path", "origin", "label", "width", "height", "captions", "objects", "boxes", "status")
    nine = [[0, 2, 640, 13], [1, 3, 7, 10], [5, 6, 12, 14]]
    val = "val2017/000000000009.jpg"
    assert manifest.rows.select(columns).rows() == [
        (NINE, NINE, "train", None, 640, 480, ["a first", "a second\n"], ["dog", "person"], nine, "ok"),
        (
            TWENTY_FIVE,
            TWENTY_FIVE,
            "train",
            None,
            500,
            480,
            ["b first", "b second"],
            ["bottle"],
            [[10, 20, 40, 60]],
            "ok",
        ),
        (THIRTY, THIRTY, "train", None, None, None, None, [], [], "ok"),
        (val, val, "val", None, 640, 480, ["of val"], [], [], "ok"),
    ]
    assert manifest.problems == ()
    assert [manifest.store.read(path) for path in manifest.rows["path"]] == [
        b"nine",
        b"twenty-five",
        b"thirty",
        b"val nine",
    ]


@pytest.mark.parametrize("top", ["coco/", "", "data/copy/"])
def test_coco_zip_equals_folder(tmp_path: Path, top: str) -> None:
    first = coco(tmp_path / "unpacked")
    renamed = {name.replace("coco/", top, 1): content for name, content in files().items()}
    archive = pack(tmp_path / "any.zip", {"__MACOSX/._x": "", f"{top}annotations/": "", **renamed})
    for other in (Coco(tmp_path / "unpacked" / "coco").manifest(), Coco(str(archive)).manifest()):
        assert other.rows.equals(first.rows)
        assert other.problems == first.problems
        store = pickle.loads(pickle.dumps(other.store))
        assert [store.read(path) for path in other.rows["path"]] == [
            first.store.read(path) for path in first.rows["path"]
        ]


def test_coco_captions_are_handed_on_as_they_are(tmp_path: Path) -> None:
    manifest = coco(tmp_path, captioned(*[said(25, caption) for caption in ODD], said(9, "half \ud83d of it")))
    assert row(manifest, TWENTY_FIVE)["captions"] == ODD
    assert len(LONG) == 10_000
    assert row(manifest, NINE)["captions"] == ["half ? of it"]
    assert manifest.problems == ()


def test_coco_images_and_lists_that_do_not_meet(tmp_path: Path) -> None:
    changes = {"train2017/000000000025.jpg": None, "train2017/000000000007.jpg": b"", "train2017/._9.jpg": b""}
    manifest = coco(tmp_path, changes)
    unlisted = row(manifest, "train2017/000000000007.jpg")
    assert [unlisted[name] for name in ("captions", "objects", "boxes", "status")] == [
        None,
        None,
        None,
        "no_annotation",
    ]
    assert row(manifest, TWENTY_FIVE)["captions"] == ["b first", "b second"]
    assert manifest.problems == (
        "annotations/captions_train2017.json: 1 of the 3 images it lists are not there, e.g. "
        "train2017/000000000025.jpg; does not list 1 of the 3 images that are there, e.g. 000000000007.jpg.",
    )


def test_coco_each_row_of_a_caption_test_has_its_status(tmp_path: Path) -> None:
    """The caption without image, the image without caption and the image without objects keep their rows."""
    there = {name.removeprefix("coco/"): picture() for name in COCO if name.endswith(".jpg")}
    views = caption_views(coco(tmp_path, {**there, "train2017/000000000025.jpg": None}))
    assert views == {
        NINE: ("ok", ["a first", "a second\n"]),
        TWENTY_FIVE: ("unreadable", None),
        THIRTY: ("no_caption", None),
        "val2017/000000000009.jpg": ("ok", ["of val"]),
    }


def test_coco_without_instances_has_unknown_objects(tmp_path: Path) -> None:
    manifest = coco(tmp_path, {"annotations/instances_val2017.json": None})
    found = row(manifest, "val2017/000000000009.jpg")
    assert [found[name] for name in ("captions", "objects", "boxes", "status")] == [
        ["of val"],
        None,
        None,
        "no_annotation",
    ]
    assert row(manifest, THIRTY)["objects"] == []
    assert manifest.problems == (
        "annotations/instances_val2017.json: is not there, so its images have no objects and boxes.",
    )


@pytest.mark.parametrize(
    ("gone", "fault"),
    [
        ("val2017/000000000009.jpg", "there are no images"),
        ("annotations/captions_val2017.json", "annotations/captions_val2017.json is not there"),
    ],
)
def test_coco_a_part_that_is_missing_is_left_out(tmp_path: Path, gone: str, fault: str) -> None:
    manifest = coco(tmp_path, {gone: None})
    assert set(manifest.rows["origin"]) == {"train"}
    assert manifest.problems == (f"val2017/: {fault}, so the part is left out.",)


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (said(77, "of nobody"), "annotation 2 is for the unknown image id '77'"),
        (said([9], "of nobody"), r"annotation 2 is for the unknown image id '\[9\]'"),
        (said("9", "of nobody"), "annotation 2 is for the unknown image id '9'"),
        (said(9, None), "annotation 2 must have a caption, got 'None'"),
        (said(9, ["a"]), r"annotation 2 must have a caption, got"),
        ("text", "entry 2 of annotations is no object"),
    ],
)
def test_coco_bad_captions_cost_themselves_only(tmp_path: Path, annotation: Any, reason: str) -> None:
    manifest = coco(tmp_path, captioned(said(9, "good"), annotation))
    assert row(manifest, NINE)["captions"] == ["good"]
    assert len(manifest.problems) == 1
    assert pl.Series(manifest.problems).str.contains(f"^annotations/captions_train2017.json: {reason}").all()


def test_coco_an_image_listed_twice_counts_once(tmp_path: Path) -> None:
    """Under the same id, or under two ids, whose captions then belong to one image."""
    again = [listed(9), listed(25), listed(9), listed(26, file_name="000000000025.jpg")]
    manifest = coco(tmp_path, captioned(said(25, "one"), said(26, "two"), listing={"images": again}))
    assert row(manifest, TWENTY_FIVE)["captions"] == ["one", "two"]
    assert row(manifest, TWENTY_FIVE)["width"] == 640
    assert "entry 3 of images lists 000000000009.jpg or its id again (and 1 more like it)" in manifest.problems[0]


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/secret.jpg", "9.txt", None, 9, ".jpg"])
def test_coco_file_names_that_name_no_image_of_the_part(tmp_path: Path, name: Any) -> None:
    manifest = coco(tmp_path, captioned(said(9, "x"), listing={"images": [listed(9), listed(5, file_name=name)]}))
    assert len(manifest.rows) == 4
    assert "entry 2 of images must have an id and the plain name of an image file" in manifest.problems[0]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (thing(9, 18, [1, 2, 3]), "its bbox must be four numbers: x, y, width, height, got '[1, 2, 3]'"),
        (thing(9, 18, [1, 2, 3, "4"]), "its bbox must be four numbers"),
        (thing(9, 18, [1, 2, 3, True]), "its bbox must be four numbers"),
        (thing(9, 18, None), "its bbox must be four numbers"),
        (thing(9, 18, [1, 2, 3, float("nan")]), "coordinates that an image can have"),
        (thing(9, 18, [1, 2, 3, 1e30]), "coordinates that an image can have"),
        (thing(9, 99, [1, 2, 3, 4]), "its category_id '99' is none of the 3 categories"),
        (thing(9, None, [1, 2, 3, 4]), "its category_id 'None' is none"),
    ],
)
def test_coco_bad_objects_cost_their_image_only(tmp_path: Path, annotation: Any, reason: str) -> None:
    manifest = coco(tmp_path, with_things(thing(25, 1, [0, 0, 1, 1]), annotation, thing(9, 1, [0, 0, 1, 1])))
    broken = row(manifest, NINE)
    assert [broken[name] for name in ("objects", "boxes", "status")] == [None, None, "bad_annotation"]
    assert broken["detail"].startswith("annotations/instances_train2017.json, annotation 2: ")
    assert reason in broken["detail"]
    assert broken["captions"] == ["a first", "a second\n"]
    assert len(manifest.problems) == 1
    assert row(manifest, TWENTY_FIVE)["objects"] == ["person"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"images": [', r"is no JSON \(Expecting value"),
        (b"\xff\xfe\x00", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "must hold one object"),
        ({"annotations": []}, "must hold a list images"),
        ({"images": []}, "must hold a list annotations"),
        ({"images": {}, "annotations": []}, "must hold a list images"),
    ],
)
def test_coco_broken_json_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"annotations/captions_train2017\.json: {reason}"):
        coco(tmp_path, {"annotations/captions_train2017.json": content})


def test_coco_roots_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root=.*nowhere: is not there; expected .*coco/ with"):
        Coco(tmp_path / "nowhere").manifest()
    with pytest.raises(DataError, match="holds nothing of the kind"):
        Coco(pack(tmp_path / "other.zip", {"a/b.jpg": b""})).manifest()
    bare = {name: content for name, content in files().items() if name.endswith(".json")}
    with pytest.raises(DataError, match="there are no images with captions"):
        Coco(write(tmp_path / "bare", bare)).manifest()
    with pytest.raises(ConfigError, match=r"dataset\.root is empty"):
        Coco(" ")


# Flickr8k


def flickr(folder: Path, lines: str | bytes, names: tuple[str, ...] = ("a.jpg", "b.jpg")) -> Manifest:
    there = {f"flickr8k/Images/{name}": name.encode() for name in names}
    return Flickr8k(write(folder, {"flickr8k/captions.txt": lines, **there})).manifest()


def test_flickr_rows(tmp_path: Path) -> None:
    text = 'image,caption\nb.jpg,A dog .\na.jpg,"A man , and ""a"" dog"\nb.jpg,"two\nlines"\nb.jpg,A dog .\na.jpg, \n'
    manifest = flickr(tmp_path, text)
    columns = ("id", "path", "origin", "label", "captions", "objects", "boxes", "status")
    assert manifest.rows.select(columns).rows() == [
        ("a.jpg", "Images/a.jpg", "all", None, ['A man , and "a" dog'], None, None, "no_annotation"),
        ("b.jpg", "Images/b.jpg", "all", None, ["A dog .", "two\nlines", "A dog ."], None, None, "no_annotation"),
    ]
    assert manifest.problems == ()
    assert manifest.store.read("Images/a.jpg") == b"a.jpg"


def test_flickr_zip_equals_folder_and_odd_captions_are_handed_on(tmp_path: Path) -> None:
    quoted = [caption.replace('"', '""') for caption in ODD]
    text = "\ufeffimage,caption\r\n" + "".join(f'a.jpg,"{caption}"\r\n' for caption in quoted)
    first = flickr(tmp_path, text, ("a.jpg",))
    assert row(first, "a.jpg")["captions"] == ODD
    archive = pack(tmp_path / "any.zip", {"x/captions.txt": text, "x/Images/a.jpg": b"a.jpg", "x/Images/.a.jpg": b""})
    other = Flickr8k(archive).manifest()
    assert other.rows.equals(first.rows)
    assert other.store.read("Images/a.jpg") == b"a.jpg"


def test_flickr_images_and_lines_that_do_not_meet(tmp_path: Path) -> None:
    manifest = flickr(tmp_path, "image,caption\nb.jpg,here\nc.jpg,lost\nb.jpg,a,b\n../d.jpg,x\n\nb.jpg\n")
    assert row(manifest, "a.jpg")["captions"] is None
    assert row(manifest, "b.jpg")["captions"] == ["here"]
    assert row(manifest, "c.jpg")["captions"] == ["lost"]
    assert manifest.rows["id"].to_list() == ["a.jpg", "b.jpg", "c.jpg"]
    assert manifest.problems == (
        "captions.txt: line 4 must be a file name and a caption, quoted where it has commas, got 'b.jpg,a,b' "
        "(and 2 more like it); 1 of the 2 images it names are not there, e.g. Images/c.jpg; "
        "has no caption for 1 of the 2 images that are there, e.g. a.jpg.",
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "must begin with the line image,caption"),
        ("a.jpg#0\tA dog .\n", "must begin with the line image,caption"),
        ('image,caption\na.jpg,"never closed\nb.jpg,x\n', r"line 3: is no CSV"),
        (b"image,caption\nb.jpg,caf\xe9\n", None),
    ],
)
def test_flickr_captions_files_that_cannot_work(tmp_path: Path, content: Any, reason: str | None) -> None:
    if reason is None:
        assert row(flickr(tmp_path, content), "b.jpg")["captions"] == ["caf\ufffd"]
        return
    with pytest.raises(DataError, match=rf"captions\.txt.*{reason}"):
        flickr(tmp_path, content)


def test_flickr_roots_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root=.*nowhere: is not there; expected .*flickr8k/ with"):
        Flickr8k(tmp_path / "nowhere").manifest()
    with pytest.raises(DataError, match="there are no images"):
        flickr(tmp_path, "image,caption\n", ())
    with pytest.raises(ConfigError, match=r"dataset\.root is empty"):
        Flickr8k("")


# Tar shards

Member: TypeAlias = tuple[str, str | bytes]


def shard(path: Path, members: Sequence[Member], special: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for info in special:
            archive.addfile(info)
        for name, text in members:
            content = text if isinstance(text, bytes) else text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


PAIR: list[Member] = [
    ("0001.jpg", b"one"),
    ("0001.txt", "a dog"),
    ("0001.json", '{"caption": "of the JSON", "objects": ["dog", "ball"]}'),
]


def test_web_rows(tmp_path: Path) -> None:
    texts = ("a.png", b"a"), ("a.json", json.dumps({"caption": ["one", "", "two"], "objects": []}))
    shard(
        tmp_path / "00000.tar", [*PAIR, ("./in/0002.WEBP", b"two"), ("in/0002.txt", "\ufeffa cat\n"), ("0003.cls", "7")]
    )
    shard(tmp_path / "00001.tar", texts)
    manifest = WebDataset(tmp_path).manifest()
    columns = ("id", "path", "origin", "label", "captions", "objects", "boxes", "status")
    assert manifest.rows.select(columns).rows() == [
        ("00000/0001", "00000/0001.jpg", "all", None, ["a dog"], ["ball", "dog"], None, "no_annotation"),
        ("00000/in/0002", "00000/in/0002.WEBP", "all", None, ["a cat\n"], None, None, "no_annotation"),
        ("00001/a", "00001/a.png", "all", None, ["one", "two"], [], None, "no_annotation"),
    ]
    assert manifest.problems == ()
    store = pickle.loads(pickle.dumps(manifest.store))
    assert [store.read(path) for path in manifest.rows["path"]] == [b"one", b"two", b"a"]


def test_web_shards_by_folder_pattern_and_name(tmp_path: Path) -> None:
    for name in ("x/1.tar", "x/2.tar", "y/3.tar"):
        shard(tmp_path / name, PAIR)
    for place, names in (("x", "12"), ("*/?.tar", "123"), ("**/*.tar", "123"), ("y/3.tar", "3")):
        found = WebDataset(str(tmp_path / place)).manifest()
        assert found.rows["id"].to_list() == [f"{name}/0001" for name in names]


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_web_captions_are_handed_on_as_they_are(tmp_path: Path, kind: str) -> None:
    members: list[Member] = []
    for number, caption in enumerate(ODD):
        members.append((f"{number}.jpg", b""))
        members.append((f"{number}.{kind}", caption if kind == "txt" else json.dumps({"caption": caption})))
    manifest = WebDataset(shard(tmp_path / "s.tar", members)).manifest()
    assert manifest.rows["captions"].to_list() == [[caption] for caption in ODD]


def test_web_halves_of_pairs_keep_their_rows(tmp_path: Path) -> None:
    half: list[Member] = [
        ("1.png", picture()),
        ("2.txt", "a caption"),
        ("3.png", picture(9)),
        ("3.txt", "both"),
        ("4.txt", " "),
    ]
    manifest = WebDataset(shard(tmp_path / "s.tar", half)).manifest()
    assert manifest.problems == (
        f"{tmp_path}/s.tar: 2 of 4 keys have no caption, e.g. 1; 2 of 4 keys have no image, e.g. 2.",
    )
    assert caption_views(manifest) == {
        "s/1": ("no_caption", None),
        "s/2": ("unreadable", None),
        "s/3": ("ok", ["both"]),
        "s/4": ("unreadable", None),
    }
    seen = images.inspect(manifest.rows, manifest.store)
    assert "no image of this key" in seen["detail"][1]


def test_web_a_member_twice_counts_as_on_unpacking(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [*PAIR, ("0001.jpg", b"newer"), ("0001.txt", "newer")])
    manifest = WebDataset(path).manifest()
    assert len(manifest.rows) == 1
    assert manifest.store.read("s/0001.jpg") == b"newer"
    assert manifest.rows["captions"].to_list() == [["newer"]]
    assert "holds 0001.jpg and 0001.jpg, the last counts (and 1 more like it)" in manifest.problems[0]


def test_web_links_and_devices_are_not_read(tmp_path: Path) -> None:
    secret = write(tmp_path, {"secret.txt": "secret"}) / "secret.txt"
    special = [tarfile.TarInfo(name) for name in ("1.txt", "2.txt", "3.txt", "4.txt", "folder")]
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    for info, kind in zip(special, kinds, strict=True):
        info.type, info.linkname = kind, str(secret)
    manifest = WebDataset(shard(tmp_path / "s.tar", [("1.jpg", b""), *PAIR], tuple(special))).manifest()
    assert row(manifest, "s/1")["captions"] is None
    assert manifest.rows["id"].to_list() == ["s/0001", "s/1"]
    assert "1.txt is a link, a device or the like, and is not read (and 3 more like it)" in manifest.problems[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be a JSON object, got"),
        ('{"caption": 7}', "caption must be a list of texts, got '7'"),
        ('{"objects": "dog"}', "objects must be a list of texts, got 'dog'"),
        ('{"objects": ["dog", 7]}', "objects must be a list of texts"),
        ("[" * 100_000, ""),
    ],
)
def test_web_json_that_is_not_understood_costs_itself_only(tmp_path: Path, text: str, reason: str) -> None:
    path = shard(tmp_path / "s.tar", [("1.json", text), ("1.txt", "good"), ("1.jpg", b"")])
    manifest = WebDataset(path).manifest()
    assert manifest.rows.select("captions", "objects").rows() == [(["good"], None)]
    assert manifest.problems[0].startswith(f"{path}: 1.json: ")
    assert reason in manifest.problems[0]


def test_web_damaged_shards_are_named(tmp_path: Path) -> None:
    """Cut within a file, within a header, at the end of a file; a broken header; compressed; no tar archive."""
    whole = shard(tmp_path / "whole.tar", [("1.jpg", b"x" * 600), ("2.jpg", b"y" * 600)]).read_bytes()
    broken = bytearray(whole)
    broken[1536 + 150] ^= 1
    squeezed = io.BytesIO()
    with tarfile.open(fileobj=squeezed, mode="w:gz"):
        pass
    damaged = {"a": whole[:900], "b": whole[:1800], "c": whole[:1536], "d": bytes(broken), "e": squeezed.getvalue()}
    for name, content in {**damaged, "f": b"no tar", "g": b"", "h": whole[:2300]}.items():
        path = write(tmp_path / name, {f"{name}.tar": content}) / f"{name}.tar"
        with pytest.raises(DataError, match=rf"{name}\.tar: .*expected uncompressed"):
            WebDataset(path).manifest()
    assert len(WebDataset(tmp_path / "whole.tar").manifest().rows) == 2


def test_web_a_shard_that_changes_later_is_unreadable(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [("1.png", picture())])
    manifest = WebDataset(path).manifest()
    path.write_bytes(path.read_bytes()[:530])
    assert images.inspect(manifest.rows, manifest.store)["status"].to_list() == ["unreadable"]
    path.unlink()
    assert images.inspect(manifest.rows, manifest.store)["status"].to_list() == ["unreadable"]


def test_web_places_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.shards=.*\{0\.\.9\}\.tar: there is no such shard.*braces"):
        WebDataset(str(tmp_path / "{0..9}.tar")).manifest()
    with pytest.raises(DataError, match="there is no image and no caption"):
        WebDataset(shard(tmp_path / "empty" / "s.tar", [("readme.md", "")]).parent).manifest()
    for name in ("x/1.tar", "y/1.tar"):
        shard(tmp_path / name, PAIR)
    with pytest.raises(DataError, match=r"1 names belong to several shards, e\.g\. 1\.tar"):
        WebDataset(str(tmp_path / "*" / "1.tar")).manifest()
    with pytest.raises(ConfigError, match=r"dataset\.shards is empty"):
        WebDataset("")


# A file of one's own


def csv(folder: Path, text: str) -> ManifestFile:
    return ManifestFile(write(folder, {"pairs.csv": text, "a.png": b"", "b.png": b"", "c.png": b""}) / "pairs.csv")


def test_own_pairs_need_no_label(tmp_path: Path) -> None:
    quoted = [caption.replace('"', '""') for caption in ODD]
    for number, caption in enumerate(quoted):
        manifest = csv(tmp_path / str(number), f'path,caption\na.png,"{caption}"\nb.png, \nc.png,\n').manifest()
        assert manifest.rows["captions"].to_list() == [[ODD[number]], None, None]
        assert manifest.rows["label"].null_count() == 3
        assert set(manifest.rows["status"]) == {"no_annotation"}
        assert manifest.problems == ()
        assert "caption" not in manifest.rows.columns


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_own_lists_of_captions(tmp_path: Path, ending: str) -> None:
    lists = [ODD, [], None]
    write(tmp_path, {"a.png": b""})
    if ending == "csv":
        texts = [None if one is None else json.dumps(one) for one in lists]
        pl.DataFrame({"path": ["a.png", "b.png", "c.png"], "captions": texts}).write_csv(tmp_path / "own.csv")
    else:
        pl.DataFrame({"path": ["a.png", "b.png", "c.png"], "captions": lists}).write_parquet(tmp_path / "own.parquet")
    manifest = ManifestFile(tmp_path / f"own.{ending}").manifest()
    assert manifest.rows["captions"].to_list() == [ODD, None, None]


def test_own_captions_that_do_not_parse_leave_the_rest_of_the_row(tmp_path: Path) -> None:
    manifest = csv(tmp_path, 'path,captions,boxes\na.png,a dog,[]\nb.png,"[""a"", 7]",[]\n').manifest()
    assert manifest.rows.select("captions", "status").rows() == [(None, "ok"), (None, "ok")]
    assert (
        'row 1: captions: must be a list of texts, e.g. ["a dog runs"] (a single text goes into' in manifest.problems[0]
    )
    assert "(and 1 more like it)" in manifest.problems[0]


def test_own_captions_in_columns_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.csv: there are the columns caption and captions"):
        csv(tmp_path, "path,caption,captions\na.png,x,\n").manifest()
    with pytest.raises(
        DataError, match=r"e\.g\. a\.png; make them unique; several captions of an image go into one row"
    ):
        csv(tmp_path, "path,caption\na.png,x\na.png,y\n").manifest()
    write(tmp_path, {"a.png": b""})
    pl.DataFrame({"path": ["a.png"], "caption": [["x"]]}).write_parquet(tmp_path / "lists.parquet")
    with pytest.raises(DataError, match=r"column caption must hold text, not List\(String\); lists go into.*captions"):
        ManifestFile(tmp_path / "lists.parquet").manifest()


# Real data


@pytest.mark.real_data
@pytest.mark.skipif(not os.environ.get("DEJAVU_REAL_DATA"), reason="DEJAVU_REAL_DATA names no folder")
def test_real_pairs_are_read_whole() -> None:
    found = Coco(FOLDER / "coco_mini.zip").manifest()
    assert dict(found.rows.group_by("origin").len().iter_rows()) == {"train": 80, "val": 79}
    assert set(found.rows["captions"].list.len()) == {5}
    assert set(found.rows["status"]) == {"ok"}
    assert found.problems == ()
    ends = found.rows.explode("boxes").filter(pl.col("boxes").is_not_null())
    inside = (pl.col("boxes").list.get(2) <= pl.col("width")) & (pl.col("boxes").list.get(3) <= pl.col("height"))
    assert ends.select(inside.all()).item()
    other = Flickr8k(FOLDER / "flickr8k_1000.zip").manifest()
    assert (len(other.rows), set(other.rows["captions"].list.len()), other.problems) == (1000, {5}, ())
    roles = RandomSplit(400, 0, 0, 400, 200, 100).assign(other.rows, seed=0)
    assert dict(roles.group_by("role").len().iter_rows()) == {"target": 400, "public": 400, "unseen": 200}
