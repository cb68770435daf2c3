"""Every file of `tests/corpus`, and what else a hostile world brings: a clear error or a status, and no wrong figure.

What is tested elsewhere: COCO's JSON and tar shards piece by piece (test_pairs.py), lines and layouts of data sets
(test_datasets.py), pickles (test_taggers.py), checkpoints of other architectures (test_encoders.py), damaged shards of
embeddings (test_extract.py), dead holders of leases (test_leases.py).
"""

import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from corpus import FOLDER, GROUPS, RED, named_over_and_over, voc
from PIL import Image

from dejavu_exp import config, images, launch, leaks, pipeline, stages, tables
from dejavu_exp.cells import State, Status
from dejavu_exp.crops import BackgroundCrop, FullImage
from dejavu_exp.datasets.annotations import rows_of
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.flickr8k import Flickr8k
from dejavu_exp.datasets.imagenet import Imagenet
from dejavu_exp.datasets.manifest import ManifestFile
from dejavu_exp.datasets.stores import FolderStore, MemoryStore, ZipStore, read_file
from dejavu_exp.datasets.webdataset import WebDataset
from dejavu_exp.encoders import weights
from dejavu_exp.errors import ConfigError, DataError, WeightsError
from dejavu_exp.leases import Leases
from dejavu_exp.shards import ShardFolder
from dejavu_exp.splits import NpySplit
from dejavu_exp.sweep import Row, show
from dejavu_exp.taggers import PrecomputedTags


@pytest.mark.parametrize("group", GROUPS)
def test_the_corpus_is_whole_and_every_file_is_expected(group: str) -> None:
    kept = {path.name for path in (FOLDER / group).iterdir()}
    assert kept == set(GROUPS[group]) == set(EXPECTED[group])


# Images: the mean colour of the whole picture with its size, or the reason why there is none

IMAGES: dict[str, tuple[tuple[int, int], tuple[float, ...]] | str] = {
    "good.png": ((16, 16), RED),
    "truncated.jpg": "truncated",
    "truncated.png": "truncated|broken",
    "header_only.jpg": "cannot identify|Truncated|truncated",
    "empty.jpg": "cannot identify",
    "text.jpg": "cannot identify",
    "page.jpg": "cannot identify",
    "postscript.jpg": "cannot identify",
    "png_called.jpg": ((16, 16), RED),
    "cmyk.jpg": ((16, 16), RED),
    "grey.jpg": ((16, 16), (90, 90, 90)),
    "bilevel.png": ((16, 16), (255, 255, 255)),
    "grey16.png": ((16, 16), (127.5, 127.5, 127.5)),
    "grey16.tiff": ((16, 16), (127.5, 127.5, 127.5)),
    "colour16.png": ((16, 16), RED),
    "grey32.tiff": "32 bits",
    "float.tiff": "32 bits",
    "alpha.png": ((16, 16), RED),
    "grey_alpha.png": ((16, 16), (90, 90, 90)),
    "clear_palette.png": ((16, 16), RED),
    "moving.gif": ((16, 16), RED),
    "moving.webp": ((16, 16), RED),
    "moving.png": ((16, 16), RED),
    "rotated.jpg": ((16, 8), RED),
    "one_pixel.png": ((1, 1), RED),
    "no_width.png": ".",
    "claims_30000.png": "decompression bomb",
    "claims_all.png": "decompression bomb",
    "bad_checksum.png": "broken PNG|cannot identify",
    "too_few_rows.png": "truncated",
    "text_bomb.png": "[Tt]oo [Ll]arge|[Dd]ecompressed",
}


def rows_for(names: list[str]) -> pl.DataFrame:
    return rows_of({"id": names, "path": names, "origin": ["all"] * len(names), "status": ["ok"] * len(names)})


@pytest.mark.parametrize("decoder", images.DECODERS)
def test_images(decoder: str) -> None:
    store = FolderStore(FOLDER / "images")
    inspected = images.inspect(rows_for(list(IMAGES)), store).with_columns(role=pl.lit("public"))
    told = dict(zip(inspected["id"], inspected["detail"], strict=True))
    views = FullImage().show(inspected)
    shown = inspected.drop("status", "detail").hstack(views).filter(pl.col("status") == "ok")
    data = images.ViewImages.of(shown, store, lambda picture: np.asarray(picture), decoder)  # type: ignore[arg-type, return-value]
    for row, (name, width, height) in enumerate(shown.select("id", "width", "height").iter_rows()):
        path = str(name)
        expected = IMAGES[path]
        try:
            pixels = images.decode_view(store.read(path), (0, 0, width, height), decoder)
        except images.UNREADABLE_ERRORS as error:
            told[path] = f"{path}: {error}"
            assert data[row][2] == told[path]
            continue
        assert not isinstance(expected, str), f"{path} was read"
        assert (width, height) == expected[0], path
        assert pixels.shape == (height, width, 3), path
        np.testing.assert_allclose(pixels.mean(axis=(0, 1)), expected[1], atol=4, err_msg=path)
    for path, reason in told.items():
        if isinstance(IMAGES[path], str):
            assert reason is not None, path
            assert re.search(str(IMAGES[path]), str(reason)), path
        else:
            assert reason is None, path


def test_no_program_reads_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript is drawn by Ghostscript, whatever the file is called."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(OSError, match="cannot identify"):
        images.decode((FOLDER / "images" / "postscript.jpg").read_bytes())


def test_grey_of_16_bits_is_no_copy_of_another() -> None:
    """Cut off at 255, as Pillow does it, all pictures of 16 bits would be white, and copies of each other."""
    files = {}
    for number in range(4):
        grey = np.random.default_rng(number).integers(1 << 12, 1 << 16, (16, 16)).astype(np.uint16)
        image = Image.fromarray(grey).resize((64, 64), Image.Resampling.NEAREST)
        path = Path(os.devnull).with_name(f"{number}.png").name
        files[path] = _png(image)
    rows = images.inspect(rows_for(list(files)), MemoryStore(files))
    rows = rows.with_columns(role=pl.Series(["target", "target", "unseen", "unseen"]))
    prints = leaks._prints(rows.select("content", "path"), MemoryStore(files))
    hashes = prints["hashes"].to_list()
    assert len({tuple(found) for found in hashes}) == 4
    assert all(len(set(grey)) > 20 for grey in prints["grey"].to_list())


def _png(image: Image.Image) -> bytes:
    import io

    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_pipes_devices_and_files_of_any_size_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.jpg"))
    with (tmp_path / "large.jpg").open("wb") as stream:
        stream.truncate(1 << 33)  # a hole, no bytes on the disk
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "link.jpg").symlink_to("link.jpg")
    names = ["pipe.jpg", "folder.jpg", "socket.jpg", "large.jpg", "zero.jpg", "link.jpg", "a\0b.jpg", "x" * 300]
    found = images.inspect(rows_for(names), FolderStore(tmp_path))
    assert found["status"].to_list() == ["unreadable"] * len(names)
    reasons = dict(zip(names, found["detail"], strict=True))
    assert "no file" in reasons["pipe.jpg"]
    assert "no file" in reasons["zero.jpg"]
    assert "8589934592 bytes, more than the 4294967296" in reasons["large.jpg"]
    (tmp_path / "three").write_bytes(b"123")
    with pytest.raises(OSError, match="it has 3 bytes, more than the 2"):
        read_file(tmp_path / "three", 2)


# Boxes, up to the view: the status, and what is left of the background for one that is ok

LEFT = (8, 0, 16, 16)
BOXES: dict[str, tuple[str, Any]] = {
    "inside": ("ok", LEFT),
    "touching": ("ok", (0, 8, 16, 16)),
    "fraction": ("ok", LEFT),
    "minus_zero": ("ok", LEFT),
    "twice": ("ok", LEFT),
    "none": ("ok", (0, 0, 16, 16)),
    "all": ("too_small", "best shorter side 0 px"),
    "inverted": ("box_outside", "has no area"),
    "inverted_y": ("box_outside", "has no area"),
    "no_width": ("box_outside", "has no area"),
    "negative": ("box_outside", "leaves the image of 16 x 16 px"),
    "right": ("box_outside", "leaves the image"),
    "below": ("box_outside", "leaves the image"),
    "far": ("box_outside", "leaves the image"),
    "one_of_two": ("box_outside", "has no area"),
    **dict.fromkeys(
        ("nan", "infinite", "overflow", "2^31", "2^63"), ("bad_annotation", "coordinates that an image can have")
    ),
    **dict.fromkeys(("10^400", "three", "five", "text", "null", "true"), ("bad_annotation", "must be four numbers")),
    "nested": ("bad_annotation", "must be four numbers"),
    **dict.fromkeys(("5000_digits", "flat", "object"), ("bad_annotation", "must be a list of boxes")),
}


def test_boxes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((FOLDER / "images" / "good.png").read_bytes())
    manifest = ManifestFile(FOLDER / "tables" / "boxes.csv", tmp_path).manifest()
    rows = images.inspect(manifest.rows, manifest.store)
    shown = dict(zip(rows["id"], BackgroundCrop(4).show(rows).iter_rows(named=True), strict=True))
    assert shown.keys() == BOXES.keys()
    for name, (status, expected) in BOXES.items():
        found = shown[name]
        assert found["status"] == status, name
        if status == "ok":
            assert tuple(found[end] for end in ("xmin", "ymin", "xmax", "ymax")) == expected, name
        else:
            assert found["xmin"] is None, name
            assert expected in found["detail"], name


# XML: the box and the name, or the reason

XML: dict[str, tuple[list[int], str] | str] = {
    "good.xml": ([1, 2, 3, 4], "dog"),
    "utf16.xml": ([1, 2, 3, 4], "dog"),
    "billion_laughs.xml": "Entit",
    "quadratic.xml": "Entit",
    "external_entity.xml": "Entit",
    "external_dtd.xml": ([1, 2, 3, 4], "dog"),  # what it names is not fetched
    "parameter_entity.xml": "Entit",
    "deep.xml": "no object is listed",
    "unknown_encoding.xml": "encoding",
    "latin1_unsaid.xml": "not well-formed",
    "zero_byte.xml": "not well-formed",
    "half.xml": "no element found|unclosed",
    "empty.xml": "no element found",
    "page.xml": "mismatched tag",
    "nan.xml": "coordinates that an image can have",
    "infinite.xml": "coordinates that an image can have",
    "digits.xml": "coordinates that an image can have",
    "words.xml": "must be four numbers",
}


def test_xml(tmp_path: Path) -> None:
    (tmp_path / "train" / "dog").mkdir(parents=True)
    for name in XML:
        (tmp_path / "train" / "dog" / name.replace(".xml", ".jpg")).touch()
    manifest = Imagenet(tmp_path, FOLDER / "xml").manifest()
    found = {Path(row["id"]).stem: row for row in manifest.rows.iter_rows(named=True)}
    said = " ".join(manifest.problems) + " ".join(str(row["detail"]) for row in found.values())
    assert "root:" not in said, "a file of this machine was read"
    for name, expected in XML.items():
        row = found[Path(name).stem]
        if isinstance(expected, str):
            assert row["status"] == "bad_annotation", name
            assert row["boxes"] is None, name
            assert re.search(expected, str(row["detail"])), name
        else:
            assert (row["status"], row["boxes"], row["objects"]) == ("ok", [expected[0]], [expected[1]]), name


def test_an_annotation_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "dog"
    folder.mkdir(parents=True)
    (folder / "a.jpg").touch()
    with (folder / "a.xml").open("wb") as stream:
        stream.truncate(1 << 30)
    row = Imagenet(tmp_path, tmp_path).manifest().rows.row(0, named=True)
    assert row["status"] == "bad_annotation"
    assert "1073741824 bytes, more than the 16777216" in row["detail"]


# Tables: the labels of a.png and b.png, or the error

TABLES: dict[str, list[str | None] | str] = {
    "good.csv": ["dog", "cat"],
    "bom_crlf.csv": ["dog", "cat"],
    "quoted_line_breaks.csv": ["do\ng", "cat"],
    "composed_and_not.csv": ["caf\u00e9", "caf\u00e9"],
    "lone_surrogate.csv": ["dog", "cat"],
    "zero_byte.csv": ["d\0g", "cat"],
    "fewer_cells_than_columns.csv": [None, "cat"],
    "deep_cell.csv": [None, None],
    "latin1.csv": "cannot be read.*utf-8.*It must be UTF-8",
    "utf16.csv": "missing column path",
    "semicolons.csv": "missing column path; there are: path;label",
    "open_quote.csv": "cannot be read",
    "more_cells_than_columns.csv": "cannot be read.*a cell with commas needs quotes",
    "column_twice.csv": "there are several columns label; keep one of them",
    "no_path.csv": "missing column path",
    "id_twice.csv": "1 values of id occur more than once",
    "no_rows.csv": "there are no rows",
    "empty.csv": "cannot be read",
    "picture.csv": "cannot be read|missing column path",
    "cut_off.parquet": "cannot be read as Parquet",
    "damaged.parquet": "cannot be read as Parquet",
    "no_utf8.parquet": "cannot be read as Parquet",
    "boxes.csv": [None] * len(BOXES),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    expected, table = TABLES[name], ManifestFile(FOLDER / "tables" / name, tmp_path)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=rf"(?s){name}.*({expected})"):
            table.manifest()
    else:
        assert table.manifest().rows["label"].to_list() == expected
    assert expected != ["dog", "cat"] or not table.manifest().problems


def test_texts_of_a_table_are_taken_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    rows = ManifestFile(FOLDER / "tables" / "quoted_line_breaks.csv", tmp_path).manifest().rows
    assert rows["captions"].to_list() == [['two\r\nlines, "quoted"'], ["x"]]
    rows = ManifestFile(FOLDER / "tables" / "lone_surrogate.csv", tmp_path).manifest().rows
    assert rows["tags"].to_list() == [["?", "ok"], None]


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("label", [b"\xe9", b"x"], "column label must hold text, not Binary"),
        ("caption", [b"\xff", b"x"], "column caption must hold text, not Binary"),
        ("label", [{"a": 1}, {"a": 2}], "column label must hold text, not Struct"),
        ("id", [["1"], ["2"]], "column id must hold text, not List"),
        ("id", ["1", "1"], "occur more than once"),
        ("path", [None, "a.png"], "1 rows have no path"),
    ],
)
def test_columns_of_other_types_are_refused(column: str, values: list[Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    pl.DataFrame({"path": ["a.png", "b.png"], column: values}, strict=False).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=reason):
        ManifestFile(tmp_path / "t.parquet").manifest()


@pytest.mark.parametrize("name", [name for name in TABLES if name.endswith(".parquet")])
def test_precomputed_tags_of_broken_files(name: str) -> None:
    views = pl.DataFrame({"view_id": ["a#full"], "id": ["a"]})
    with pytest.raises(DataError, match=rf"{name}: cannot be read as Parquet"):
        PrecomputedTags(str(FOLDER / "tables" / name)).tag(views, None, None, None)  # type: ignore[arg-type]


NPY: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "text": (b"1\n2\n3\n", "cannot be read"),
    "magic alone": (b"\x93NUMPY\x01\x00", "cannot be read"),
    "unknown version": (b"\x93NUMPY\x09\x00" + b"\0" * 20, "cannot be read"),
    "half a header": (b"{'descr': '<i8',", "cannot be read"),
    "brackets": (b"(" * 5000, "cannot be read"),
    "minuses": (b"-" * 9000 + b"1", "cannot be read"),
    "code": (
        b"{'descr': '<i8', 'shape': (__import__('os').mkdir('it_ran'),), 'fortran_order': False}",
        "cannot be read",
    ),
    "objects": (b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "cannot be read"),
    "petabytes": (b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,)}", "cannot be read"),
    "below zero": (b"{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}", "cannot be read|one axis"),
    "no size": (b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,)}", "cannot be read|one axis"),
    "true": (b"{'descr': '<i8', 'fortran_order': False, 'shape': (True,)}", "cannot be read"),
    "not whole": (b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}" + np.float64(0.5).tobytes(), "not whole"),
    "nan": (b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}" + np.float64("nan").tobytes(), "not whole"),
    "1e30": (b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}" + np.float64(1e30).tobytes(), "not whole"),
    "2^64 - 1": (b"{'descr': '<u8', 'fortran_order': False, 'shape': (1,)}" + b"\xff" * 8, "not whole"),
    "-1": (b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,)}" + b"\xff" * 8, "out of range"),
    "an archive": (b"PK\x03\x04" + b"\0" * 40, "cannot be read"),
}


@pytest.mark.parametrize("name", NPY)
def test_index_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, reason = NPY[name]
    if content[:1] in b"{(-" and content:
        text, _, body = content.partition(b"}")
        head = text + (b"}" if text[:1] == b"{" and b"}" in content else b"")
        content = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + body
    (tmp_path / "target.npy").write_bytes(content)
    split = NpySplit(str(tmp_path / "target.npy"), None, None, None, None, min_side_px=1)
    rows = rows_for([f"{number}.jpg" for number in range(4)]).with_columns(label=pl.lit("dog"), origin=pl.lit("train"))
    with pytest.raises(DataError, match=rf"target\.npy.*({reason})"):
        split.assign(rows, 0)
    assert not (tmp_path / "it_ran").exists()


# Weights


WEIGHTS: dict[str, str | None] = {
    "good.pt": None,
    "good.safetensors": None,
    "code.pkl.pt": "is not unpickled",
    "code.pt": "is not unpickled",
    "code_old_format.pt": "is not unpickled",
    **{
        f"{name}.{ending}": "cannot be read as a weights file|is not unpickled"
        for ending, names in {
            "pt": ("half", "half_old_format", "no_directory", "empty", "page"),
            "safetensors": (
                "half", "header_of_gigabytes", "header_of_exabytes", "header_no_json", "shape_overflow",
                "shape_and_size", "empty",
            ),
        }.items()
        for name in names
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    monkeypatch.chdir(tmp_path)
    path, module, reason = FOLDER / "weights" / name, nn.Sequential(nn.Linear(3, 2, bias=False)), WEIGHTS[name]
    if reason is None:
        state = weights.as_state_dict(weights.read_checkpoint(path), path)
        weights.load_strictly(module, state, "linear", path)
        assert module.get_parameter("0.weight").tolist() == [[0, 1, 2], [3, 4, 5]]
        return
    with pytest.raises(WeightsError, match=rf"{name}.*({reason})"):
        weights.read_checkpoint(path)
    assert not (tmp_path / "it_ran").exists()


def test_every_cut_and_many_changes_of_a_checkpoint_are_told(tmp_path: Path) -> None:
    """A file that is still read has other values at most; load_strictly sees to names and shapes."""
    rng = np.random.default_rng(0)
    for name in ("good.pt", "good.safetensors"):
        whole = (FOLDER / "weights" / name).read_bytes()
        path = tmp_path / name
        changed = [whole[:end] for end in range(0, len(whole), 1 + len(whole) // 60)]
        for _ in range(150):
            other = bytearray(whole)
            other[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            changed.append(bytes(other))
        refused = 0
        for content in changed:
            path.write_bytes(content)
            try:
                weights.as_state_dict(weights.read_checkpoint(path), path)
            except WeightsError:
                refused += 1
        assert refused >= 60, name


# Archives: what is read, or the error

ARCHIVES: dict[str, list[str] | str] = {
    "good.tar": ["a: ok"],
    "traversal.tar": ["../../outside: ok", "/etc/absolute: ok", "a: ok"],
    "links_and_devices.tar": ["a: ok"],
    "twice.tar": ["a: ok"],
    "sparse.tar": r"as a tar archive|cut off or damaged",
    "negative_size.tar": "as a tar archive|cut off or damaged",
    "huge_extended_header.tar": "as a tar archive",
    "huge_long_name.tar": "as a tar archive",
    "compressed.tar": "as a tar archive",
    "cut_off.tar": "as a tar archive|cut off or damaged",
    "good.zip": ["a.jpg: ok", "b.jpg: ok"],
    "traversal.zip": ["a.jpg: ok", "b.jpg: ok"],
    "twice.zip": ["a.jpg: ok", "b.jpg: ok"],
    "damaged_member.zip": ["a.jpg: ok", "b.jpg: .+"],
    "encrypted_member.zip": ["a.jpg: ok", "b.jpg: .*password"],
    "unknown_compression.zip": ["a.jpg: ok", "b.jpg: .*not supported"],
    "claims_gigabytes.zip": ["a.jpg: ok", "b.jpg: ok", "c.jpg: .*1099511627776 bytes, more than the 4294967296"],
    "unpacks_to_more.zip": ["a.jpg: ok", "b.jpg: ok", "c.jpg: .*Bad CRC-32"],
    "name_no_utf8.zip": "cannot be read as a zip archive",
    "no_directory.zip": "cannot be read as a zip archive",
    "empty.zip": "cannot be read as a zip archive",
}


def outcomes(manifest: Manifest) -> list[str]:
    found = images.inspect(manifest.rows, manifest.store)
    return [
        f"{name.removeprefix('twice/')}: {detail if status == 'unreadable' else 'ok'}"
        for name, status, detail in found.select("id", "status", "detail").iter_rows()
    ]


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, expected = FOLDER / "archives" / name, ARCHIVES[name]
    reader: Any = WebDataset(path) if name.endswith(".tar") else Flickr8k(path)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=rf"{name}.*({expected})"):
            reader.manifest()
    else:
        found = [line.removeprefix(f"{path.stem}/") for line in outcomes(reader.manifest())]
        assert len(found) == len(expected)
        for line, pattern in zip(found, expected, strict=True):
            assert re.search(f"^({pattern})", line), line
    assert list(tmp_path.iterdir()) == [], "nothing is unpacked"


def test_what_counts_where_a_member_is_there_twice() -> None:
    rows = WebDataset(FOLDER / "archives" / "twice.tar").manifest().rows
    assert rows["captions"].to_list() == [["a second text"]]
    content = ZipStore(FOLDER / "archives" / "twice.zip").read("Images/b.jpg")
    np.testing.assert_allclose(np.asarray(images.decode(content)).mean(axis=(0, 1)), RED, atol=4)


def test_links_out_of_an_archive_are_told_and_not_followed() -> None:
    manifest = WebDataset(FOLDER / "archives" / "links_and_devices.tar").manifest()
    assert "passwd.txt is a link" in manifest.problems[0]
    assert "root:" not in str(manifest.rows["captions"].to_list())


def test_names_of_names_do_not_end_the_program(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(named_over_and_over())
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own; some libraries raise it
    try:
        with pytest.raises(DataError, match=r"a\.tar: cannot be read as a tar archive"):
            WebDataset(tmp_path).manifest()
    finally:
        sys.setrecursionlimit(limit)


# Names


def test_names_that_are_no_unicode_cost_their_row_only(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "dog"
    folder.mkdir(parents=True)
    good = (FOLDER / "images" / "good.png").read_bytes()
    for name in (b"a.png", b"caf\xe9.png", b"caf\xe8.png"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(good)
    (folder / "a.xml").write_text(voc(("1", "2", "3", "4")))
    manifest = Imagenet(tmp_path, tmp_path).manifest()
    found = images.inspect(manifest.rows, manifest.store)
    assert dict(found.select("id", "status").iter_rows()) == {
        "train/dog/a.png": "ok",
        "train/dog/caf\\xe8.png": "unreadable",
        "train/dog/caf\\xe9.png": "unreadable",
    }


def test_accents_in_another_form_are_the_same_class_and_file(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    good = (FOLDER / "images" / "good.png").read_bytes()
    for image, label, stem in ((tmp_path, composed, "1" + composed), (tmp_path, apart, "2" + composed)):
        (image / "train" / label).mkdir(parents=True)
        (image / "train" / label / f"{stem}.png").write_bytes(good)
    boxes = tmp_path / "boxes"
    boxes.mkdir()
    for number in "12":
        (boxes / f"{number}{apart}.xml").write_text(voc(("1", "2", "3", "4"), name=apart), encoding="utf-8")
    rows = Imagenet(tmp_path, boxes).manifest().rows
    assert rows["label"].to_list() == [composed] * 2
    assert rows["objects"].to_list() == [[composed]] * 2
    assert rows["status"].to_list() == ["ok"] * 2
    assert {unicodedata.is_normalized("NFC", path) for path in rows["path"]} == {True, False}, "files keep their names"
    tags = tmp_path / "tags.parquet"
    pl.DataFrame({"id": rows["id"], "tags": [[composed], [apart]]}).write_parquet(tags)
    views = rows.select("id", view_id="id")
    assert PrecomputedTags(str(tags)).tag(views, None, None, None)["tags"].to_list() == [[composed]] * 2  # type: ignore[arg-type]


# Places that cannot be written


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes of each file; Python ignores the signal, and writing fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_says_at_once_that_its_folder_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "dejavu_exp", f"hydra.run.dir={tmp_path}/file/run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"ConfigError: hydra.run.dir={tmp_path}/file/run: cannot be written (")
    assert done.stderr.count("\n") == 1


def test_folders_without_room_are_found_before_the_work(tmp_path: Path) -> None:
    launch._check_writable("hydra.run.dir", str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []
    with (
        files_of_at_most(1000),
        pytest.raises(ConfigError, match=r"hydra\.sweep\.dir=.*new: cannot be written \(.*Free"),
    ):
        launch._check_writable("hydra.sweep.dir", str(tmp_path / "new"))


def test_tables_weights_and_shards_without_room_are_told(tmp_path: Path) -> None:
    rows = pl.DataFrame({"view_id": [f"{number:06d}" for number in range(5000)]})
    shards = ShardFolder(tmp_path / "shards", "key", 5000, 5000)
    with files_of_at_most(1000):
        with pytest.raises(DataError, match=r"cannot write .*t\.parquet: .*Free some space"):
            tables.write(rows, tmp_path / "t.parquet")
        with pytest.raises(DataError, match=r"cannot write .*request\.feather: .*Free some space"):
            shards.write_request(rows)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [], "no half file is left"
    shards.write_request(rows)
    with files_of_at_most(1000), pytest.raises(DataError, match=r"cannot write .*arrow: .*trainer\.cache"):
        shards.write(0, np.zeros((5000, 4), np.float32), [""] * 5000)
    shards.write(0, np.zeros((5000, 4), np.float32), [""] * 5000)
    assert shards.gather(np.arange(5000)).shape == (5000, 4)


def test_training_without_room_is_told(tmp_path: Path) -> None:
    from test_training import ENCODER

    from dejavu_exp.datasets.shapes import Shapes
    from dejavu_exp.splits import PerClassSplit
    from dejavu_exp.training import TrainingInputs, TrainingSettings

    manifest = Shapes(classes=2, train_per_class=8, val_per_class=1).manifest()
    roles = PerClassSplit(target=4, heldout=0, shared=2, public=2, unseen=1, min_side_px=8).assign(manifest.rows, 0)
    rows = images.inspect(manifest.rows.join(roles.select("id", "role"), on="id"), manifest.store)
    from dejavu_exp import crops

    inputs = TrainingInputs(
        model=ENCODER,
        images=crops.views(rows, crops.FullImage()),
        backgrounds=crops.views(rows, crops.BackgroundCrop(8)),
        labels=tuple(sorted(rows["label"].unique())),
        repeats={},
        store=manifest.store,
        cache=tmp_path,
        device="cpu",
        seed=0,
        settings=TrainingSettings(),
        folders={},
        waits={},
    )
    with files_of_at_most(20_000), pytest.raises(DataError, match=r"cannot write .*trained.*Free some space"):
        ENCODER.train(inputs)
    assert not list(tmp_path.rglob("*.safetensors")) or not list(tmp_path.rglob("epoch-*"))
    assert not ENCODER.train(inputs).random


def test_a_damaged_table_of_what_was_asked_for_is_written_again(tmp_path: Path) -> None:
    rows = pl.DataFrame({"view_id": [f"{number:06d}" for number in range(100)]})
    whole = None
    for damage in (lambda content: content[:300], lambda _: b"", lambda content: content.replace(b"000042", b"000043")):
        shards = ShardFolder(tmp_path, "key", 100, 100)
        shards.write_request(rows)
        path = tmp_path / "request.feather"
        whole = whole or path.read_bytes()
        path.write_bytes(damage(whole))
        again = ShardFolder(tmp_path, "key", 100, 100)
        again.write_request(rows)
        assert again.ids(range(100)) == rows["view_id"].to_list()


def test_damaged_shards_are_never_read_as_others(tmp_path: Path) -> None:
    """Any change is found, also of the offsets of texts, which Arrow itself would follow out of the file."""
    shards = ShardFolder(tmp_path, "key", 6, 6)
    shards.write_request(pl.DataFrame({"view_id": [f"view {number}" for number in range(6)]}))
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    shards.write(0, values, ["", "", "lost", "", "", ""])
    whole = shards.path(0).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(400):
        changed = bytearray(whole)
        for place in rng.integers(len(whole), size=rng.choice([1, 1, 4])):
            changed[place] = rng.integers(256)
        shards.path(0).write_bytes(bytes(changed))
        found = shards._load(0)
        if found is not None:
            np.testing.assert_array_equal(found[0], values)
            assert found[1] == ["", "", "lost", "", "", ""]


# Clocks


@pytest.mark.parametrize("jump_s", [-36_000, 36_000])
def test_a_clock_that_jumps_takes_no_lease_from_its_holder(
    jump_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, now = tmp_path / "result", time.time()
    # The other machine holds it, so that only what it writes can tell.
    lease = tmp_path / ".result.lease.1"
    facts = {"owner": "x", "host": "far", "machine": "another", "pid": 1, "started": "1"}
    monkeypatch.setattr("dejavu_exp.leases._machine", lambda: "this one")
    with Leases(expiry_s=30) as mine:
        lease.write_text(json.dumps({**facts, "beat": now}))
        assert not mine.claim(work)
        monkeypatch.setattr(time, "time", lambda: now + jump_s)
        assert not mine.claim(work)
        lease.write_text(json.dumps({**facts, "beat": now + jump_s}))
        os.utime(lease, (now - 10 * jump_s, now - 10 * jump_s))
        assert not mine.claim(work)
        assert mine.claim(tmp_path / "other"), "what is free can be taken"


@pytest.mark.parametrize("said", [b"7", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"machine": {}}'])
def test_a_lease_of_nonsense_is_held_until_it_expires(
    said: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    (tmp_path / ".result.lease.1").write_bytes(said)
    with Leases(expiry_s=10) as mine:
        assert not mine.claim(tmp_path / "result")
        assert mine.holder(tmp_path / "result") == "another process"
        clock[0] = 11.0
        assert mine.claim(tmp_path / "result")


def test_files_from_the_future_and_the_past_are_as_good(tmp_path: Path) -> None:
    shards = ShardFolder(tmp_path, "key", 2, 2)
    shards.write_request(pl.DataFrame({"view_id": ["a", "b"]}))
    shards.write(0, np.ones((2, 3), np.float32), ["", ""])
    for stamp in (0, time.time() + 1e9):
        os.utime(shards.path(0), (stamp, stamp))
        assert shards.missing_count() == 0
        assert shards.check() == {}
        assert shards.gather(np.arange(2)).tolist() == [[1, 1, 1]] * 2


def test_a_run_that_ended_before_it_began_took_no_time_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    began, ended = "2026-01-01T10:00:00+00:00", "2026-01-01T09:00:00+00:00"
    status = Status(State.FINISHED, "dejavu_exp", (), False, "here", 1, None, 0, began, ended, None, None)
    show([Row("cell", State.FINISHED, status, "")])
    shown = capsys.readouterr().out
    assert "? s" in shown
    assert "-3600" not in shown


# A whole run

LABELS = ("caf\u00e9", 'line\nbreak, "quotes"', "<script>alert(1)</script>")


def squares(folder: Path) -> list[dict[str, Any]]:
    """Pictures whose names and labels are as odd as can be, and whose boxes leave half of each."""
    rng, rows = np.random.default_rng(0), []
    for number in range(60):
        label, origin = LABELS[number % 3], "train" if number < 45 else "val"
        name = f"{number:02d} \u202e\n'\"&<b>,;\u0000.png".replace("\0", "") if number % 2 else f"{number:02d}.png"
        pixels = rng.integers(256, size=(24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        label = unicodedata.normalize("NFC", label) if number % 4 < 2 else unicodedata.normalize("NFD", label)
        place = number // 3  # among those of the label: 5 target, 4 heldout, 6 public, then val
        role = "target" if place < 5 else "heldout" if place < 9 else "public" if origin == "train" else "unseen"
        rows.append({"path": name, "label": label, "origin": origin, "boxes": [[0, 0, 24, 12]], "role": role})
    return rows


def measured(rows: list[dict[str, Any]], folder: Path) -> tuple[dict[str, Any], pl.DataFrame, str]:
    """Measure images whose roles are given, so that which are dealt does not depend on how many there are."""
    table, run = folder / "images.parquet", folder / f"run of {len(rows)}"
    run.mkdir()
    frame = pl.DataFrame(rows)
    frame.drop("role").write_parquet(table)
    # Positions in the order of labels and paths, of the rows of each origin.
    form = pl.col("label").str.normalize("NFC")
    ordered = (
        frame.with_columns(form, id="path")
        .sort("label", "path")
        .with_columns(place=pl.int_range(pl.len()).over("origin"))
    )
    for (role,), part in ordered.group_by("role"):
        np.save(run / f"{role}.npy", part["place"].to_numpy())
    resolved, _ = config.compose(
        [
            "model=efficientnet_lite0", "model.arch=test_resnet", "model.weights=random", "dataset=manifest",
            f"dataset.path={table}", "split=npy", "split.min_side_px=4", "probe.k=3", "reference=class_prior",
            *(f"split.{role}='{run / role}.npy'" for role in ("target", "heldout", "public", "unseen")),
            "utility=none", "tracking=none", "scoring.resamples=200", "trainer.workers=0",
            f"trainer.cache={folder}/cache",
        ]
    )  # fmt: skip
    resolved.pop("run")
    pipeline.run(stages.Plan(**config.build(resolved)), run, resolved)
    figures = json.loads((run / "figures.json").read_text())
    return figures, pl.read_parquet(run / "scores.parquet"), (run / "report.html").read_text()


def roles_of(figures: dict[str, Any]) -> Any:
    return figures["references"]["class_prior"]["roles"]


def without_exclusions(value: Any) -> Any:
    """Figures without how many rows were left out."""
    if isinstance(value, dict):
        return {key: without_exclusions(item) for key, item in value.items() if key != "n_excluded"}
    return value


def test_broken_images_among_good_ones_change_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = squares(tmp_path)
    broken = [name for name, expected in IMAGES.items() if isinstance(expected, str)]
    assert len(broken) > 12
    more = []
    for number, name in enumerate([*broken, "not there.png", "\n.png"]):
        if name in broken:
            (tmp_path / name).write_bytes((FOLDER / "images" / name).read_bytes())
        # Of heldout images class_prior counts labels alone.
        role = ("target", "public", "unseen")[number % 3]
        origin = "val" if role == "unseen" else "train"
        more.append(
            {"path": name, "label": LABELS[number % 3], "origin": origin, "boxes": [[0, 0, 24, 12]], "role": role}
        )
    clean, good, _ = measured(rows, tmp_path)
    mixed, scores, page = measured([*more, *rows], tmp_path)
    assert without_exclusions(roles_of(clean)) == without_exclusions(roles_of(mixed))
    assert clean["verdict"] == mixed["verdict"]
    left_out = {role: sum(row["role"] == role for row in more) for role in ("target", "public", "unseen")}
    assert {role: mixed["counts"][role]["excluded"] for role in left_out} == left_out
    of_broken = pl.col("id").is_in([row["path"] for row in more])
    assert scores.filter(of_broken)["status"].unique().sort().to_list() == ["box_outside", "unreadable"]
    assert scores.filter(~of_broken).sort("id", "role").equals(good.sort("id", "role"))
    assert sorted(scores["label"].unique()) == sorted(LABELS), "one class for each, whatever the form of its accents"
    assert "<script>alert(1)" not in page
    capsys.readouterr()


EXPECTED: dict[str, Mapping[str, Any]] = {
    "images": IMAGES,
    "xml": XML,
    "tables": TABLES,
    "weights": WEIGHTS,
    "archives": ARCHIVES,
}
