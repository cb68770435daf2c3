"""Taggers on planted scores, boxes and files."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dejavu_exp import config, tables
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.pickles import read_arrays
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.encoders import DetectorEncoder, TimmEncoder, ZeroShotEncoder
from dejavu_exp.encoders.open_clip_models import read_vocabulary
from dejavu_exp.errors import ConfigError, DataError, WeightsError
from dejavu_exp.taggers import (
    BLOCK,
    AuthorsAnnotations,
    DatasetObjects,
    DatasetTags,
    PrecomputedTags,
    ScoreTagger,
    read_authors_frequencies,
    read_authors_keys,
    read_authors_labels,
)

ROOT = Path(__file__).parents[1]
ENCODER = TimmEncoder("test_resnet", "random", output="probabilities")


def manifest(paths: list[str], **columns: list[Any]) -> Manifest:
    rows = pl.DataFrame(
        [
            {
                **dict.fromkeys(tables.MANIFEST),
                **{"id": path, "path": path, "status": "ok"},
                **{name: values[number] for name, values in columns.items()},
            }
            for number, path in enumerate(paths)
        ],
        schema=dict(tables.MANIFEST),
    )
    return Manifest("planted", rows, MemoryStore({}))


def views(ids: list[str], region: tuple[int, int, int, int] = (0, 0, 64, 64), view: str = "background") -> pl.DataFrame:
    box = dict(zip(("xmin", "ymin", "xmax", "ymax"), region, strict=True))
    return pl.DataFrame(
        [
            {
                **dict.fromkeys(tables.VIEWS),
                **{"view_id": f"{name}#{view}", "id": name, "view": view, "status": "ok", **box},
            }
            for name in ids
        ],
        schema=dict(tables.VIEWS),
    )


def found(table: pl.DataFrame) -> list[tuple[str, list[str], list[float], str]]:
    assert dict(table.schema) == dict(tables.TAGS)
    return [
        (view, tags, [round(score, 4) for score in scores], status) for view, tags, scores, status in table.iter_rows()
    ]


# Scores


def test_strongest_first_above_the_threshold_ties_to_the_lowest_column() -> None:
    scores = np.array(
        [[0.1, 0.5, 0.4, 0.0], [0.25, 0.25, 0.25, 0.25], [0.2, 0.2, 0.2, 0.2], [0.3, 0.2, 0.2, 0.3]], np.float32
    )
    tagger = ScoreTagger(ENCODER, top_tags=2, min_score=0.2)
    table = tagger.tag(views(["a", "b", "c", "d"]), manifest([]), scores, ("sea", "sky", "sand", "snow"))
    assert found(table) == [
        ("a#background", ["sky", "sand"], [0.5, 0.4], "ok"),
        ("b#background", ["sea", "sky"], [0.25, 0.25], "ok"),
        ("c#background", [], [], "ok"),
        ("d#background", ["sea", "snow"], [0.3, 0.3], "ok"),
    ]


def test_blocks_are_joined_in_order() -> None:
    count = 2 * BLOCK + 3
    best = np.random.default_rng(0).integers(0, 3, count)
    scores = np.eye(3, dtype=np.float32)[best]
    table = ScoreTagger(ENCODER, top_tags=1).tag(
        views([str(number) for number in range(count)]), manifest([]), scores, ("a", "b", "c")
    )
    assert table["tags"].list.first().to_list() == ["abc"[column] for column in best]
    assert table["view_id"].to_list() == [f"{number}#background" for number in range(count)]


def test_columns_without_names_or_rows_that_do_not_match_are_refused() -> None:
    tagger = ScoreTagger(ENCODER)
    with pytest.raises(ConfigError, match="columns without names"):
        tagger.tag(views(["a"]), manifest([]), np.zeros((1, 3), np.float32), None)
    with pytest.raises(DataError, match=r"\(2, 3\) for 1 views and 3 tags"):
        tagger.tag(views(["a"]), manifest([]), np.zeros((2, 3), np.float32), ("a", "b", "c"))
    with pytest.raises(ConfigError, match=r"tagger.top_tags=0"):
        ScoreTagger(ENCODER, top_tags=0)
    with pytest.raises(WeightsError, match="no such file"):
        ScoreTagger(TimmEncoder("test_resnet", "nowhere.pt", output="probabilities")).check()


# The data set's own


def test_tags_count_where_the_centre_of_their_box_is_in_the_view() -> None:
    boxes = {
        "inside": [12, 12, 18, 18],
        "edge below": [8, 10, 12, 14],  # centre at 10, the view's own first column
        "edge above": [18, 12, 22, 14],  # centre at 20, one past its last
        "overlapping": [0, 10, 14, 20],  # centre at 7, though it reaches into the view
        "under": [12, 30, 18, 40],
    }
    data = manifest(["a"], tags=[list(boxes)], tag_boxes=[list(boxes.values())])
    table = DatasetTags().tag(views(["a"], (10, 10, 20, 20)), data, None, None)
    assert found(table) == [("a#background", ["inside", "edge below"], [1.0, 1.0], "ok")]


def test_tags_without_places_count_everywhere_and_images_without_tags_are_unknown() -> None:
    data = manifest(["a", "b", "c"], tags=[["y", "x", "y", "z"], None, []], tag_boxes=[None, None, None])
    table = DatasetTags(top_tags=2).tag(views(["c", "b", "a"]), data, None, None)
    assert found(table) == [
        ("c#background", [], [], "ok"),
        ("b#background", [], [], "no_evidence"),
        ("a#background", ["y", "x"], [1.0, 1.0], "ok"),
    ]
    assert DatasetTags().encoder is None


def test_data_sets_without_tags_or_with_boxes_missing_are_refused() -> None:
    with pytest.raises(ConfigError, match="planted lists no tags"):
        DatasetTags().tag(views(["a"]), manifest(["a"]), None, None)
    data = manifest(["a"], tags=[["x", "y"]], tag_boxes=[[[0, 0, 1, 1]]])
    with pytest.raises(DataError, match="a has 2 tags but 1 tag_boxes"):
        DatasetTags().tag(views(["a"]), data, None, None)
    with pytest.raises(ConfigError, match="top_tags=0"):
        DatasetTags(top_tags=0)


# Files


def parquet(path: Path, columns: Mapping[str, Any]) -> PrecomputedTags:
    pl.DataFrame(dict(columns)).write_parquet(path)
    return PrecomputedTags(str(path))


@pytest.mark.parametrize("key", ["id", "view_id"])
def test_parquet_by_image_or_by_view(key: str, tmp_path: Path) -> None:
    names = ["b", "a", "elsewhere"] if key == "id" else ["b#background", "a#background", "a#corner"]
    columns = {key: names, "tags": [["low", "high", "same"], [], ["no"]], "scores": [[0.1, 0.9, 0.1], [], [1.0]]}
    tagger = parquet(tmp_path / "tags.parquet", columns)
    tagger.check()
    assert tagger.encoder is None
    assert found(tagger.tag(views(["a", "b", "c"]), manifest([]), None, None)) == [
        ("a#background", [], [], "ok"),
        ("b#background", ["high", "low", "same"], [0.9, 0.1, 0.1], "ok"),
        ("c#background", [], [], "no_evidence"),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"], "scores": [[1.0]]}, "missing column tags"),
        ({"id": ["a"], "tags": [[None]]}, "id a needs"),
        ({"id": ["a"], "tags": [None]}, "another type|id a needs"),
        ({"id": ["a", "a"], "tags": [["x"], ["y"]], "scores": [[1.0], [1.0]]}, "more than once, e.g. a"),
        ({"id": ["a"], "tags": [["x", "y"]], "scores": [[1.0]]}, "id a needs as many scores as tags"),
        ({"id": ["a"], "tags": [["x"]], "scores": [[float("nan")]]}, "id a needs"),
        ({"id": ["a"], "tags": [[None]], "scores": [[1.0]]}, "id a needs"),
        ({"id": ["a"], "tags": ["x"], "scores": [[1.0]]}, "another type"),
    ],
)
def test_parquet_is_validated(columns: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    tagger = parquet(tmp_path / "tags.parquet", columns)
    with pytest.raises(DataError, match=message) as error:
        tagger.tag(views(["a"]), manifest([]), None, None)
    assert "tags.parquet" in str(error.value)


def test_parquet_without_scores_has_the_order_of_its_tags(tmp_path: Path) -> None:
    tagger = parquet(tmp_path / "tags.parquet", {"id": ["b", "a"], "tags": [["y", "x"], []]})
    assert found(tagger.tag(views(["a", "b", "c"], view="full"), manifest([]), None, None)) == [
        ("a#full", [], [], "ok"),
        ("b#full", ["y", "x"], [1.0, 1.0], "ok"),
        ("c#full", [], [], "no_evidence"),
    ]


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tagger.path=nowhere"):
        PrecomputedTags("nowhere").check()
    with pytest.raises(DataError, match=r"labels.txt"):
        PrecomputedTags(str(tmp_path)).check()
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"a.parquet"):
        PrecomputedTags(str(tmp_path / "a.parquet")).tag(views(["a"]), manifest([]), None, None)


# The layout of the released code


def unpack(golden: str, folder: Path) -> dict[str, Any]:
    """Write the input of a golden file as the released code has it on disk."""
    content: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / golden).read_text())
    (folder / "labels.txt").write_text(content["input"]["labels_txt"], encoding="utf-8")
    for kind, suffix in (("labels", "labels"), ("frequencies", "freq")):
        (folder / kind).mkdir()
        for key, value in content["input"][kind].items():
            (folder / kind / f"{key}_{suffix}.json").write_text(json.dumps(value), encoding="utf-8")
    return content


@pytest.mark.parametrize("golden", ["nb_main.json", "nb_no_unseen.json", "nb_edge.json"])
def test_released_layout_is_read_as_it_is(golden: str, tmp_path: Path) -> None:
    content = unpack(golden, tmp_path)
    entries = read_authors_labels(tmp_path)
    assert [entry.image_path for entry in entries] == content["image_order"]
    for key, listed in content["input"]["labels"].items():
        own = [entry for entry in entries if entry.key == key]
        assert [entry.tags for entry in own] == [image["tags"] for image in listed]
        assert [entry.scores for entry in own] == [image["scores"] for image in listed]
    frequencies = read_authors_frequencies(tmp_path)
    assert list(frequencies) == read_authors_keys(tmp_path)
    assert frequencies == {
        key: {tag: tuple(pair) for tag, pair in tags.items()} for key, tags in content["input"]["frequencies"].items()
    }
    totals: dict[str, float] = {}
    for tags in frequencies.values():
        for tag, (count, _) in tags.items():
            totals[tag] = totals.get(tag, 0) + count
    assert {tag: total for tag, total in totals.items() if total} == {
        tag: total for tag, total in content["tag_totals"].items() if total
    }


def test_released_labels_tag_the_images_of_their_name(tmp_path: Path) -> None:
    content = unpack("nb_main.json", tmp_path)
    images = {image["image_path"]: image for listed in content["input"]["labels"].values() for image in listed}
    ids = [f"train/{name.split('_')[0]}/{name}" for name in images]
    table = PrecomputedTags(str(tmp_path)).tag(views([*ids, "other.JPEG"]), manifest([*ids, "other.JPEG"]), None, None)
    assert table["status"].to_list() == ["ok"] * len(ids) + ["no_evidence"]
    for image, tags, scores in zip(images.values(), table["tags"], table["scores"], strict=False):
        pairs = sorted(zip(image["scores"], image["tags"], strict=True), reverse=True)
        assert tags.to_list() == [tag for _, tag in pairs]
        assert scores.to_list() == pytest.approx([score for score, _ in pairs])


def released(folder: Path, labels: str, files: dict[str, Any], kind: str = "labels") -> Path:
    (folder / "labels.txt").write_text(labels)
    (folder / kind).mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / kind / name).write_text(text)
    return folder


def test_ambiguous_image_names_are_refused(tmp_path: Path) -> None:
    entry = {"image_path": "crops/1.png", "tags": ["sky"], "scores": [0.5]}
    folder = released(tmp_path, "n1,cat\n", {"n1_cat_labels.json": [entry]})
    tagger = PrecomputedTags(str(folder))
    table = tagger.tag(views(["cat/1.png"]), manifest(["cat/1.png", "dog/2.png"]), None, None)
    assert found(table) == [("cat/1.png#background", ["sky"], [0.5], "ok")]
    with pytest.raises(DataError, match=r"1.png is both cat/1.png and dog/1.png"):
        tagger.tag(views(["cat/1.png"]), manifest(["cat/1.png", "dog/1.png"]), None, None)
    released(tmp_path, "n1,cat\n", {"n1_cat_labels.json": [entry, entry]})
    with pytest.raises(DataError, match=r"1.png is named a second time"):
        tagger.tag(views(["cat/1.png"]), manifest(["cat/1.png"]), None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ([{"tags": [], "scores": []}], r"entry 0: needs image_path"),
        ([{"image_path": "a", "tags": ["x"], "scores": []}], r"entry 0: 1 tags but 0 scores"),
        ([{"image_path": "a", "tags": ["x"], "scores": ["much"]}], r"entry 0: needs"),
        ([7], r"entry 0: needs"),
    ],
)
def test_damaged_label_files_are_named(content: Any, message: str, tmp_path: Path) -> None:
    folder = released(tmp_path, "n1,cat\n", {"n1_cat_labels.json": content})
    with pytest.raises(DataError, match=message) as error:
        read_authors_labels(folder)
    assert "n1_cat_labels.json" in str(error.value)


def test_class_names_with_commas_need_quotes(tmp_path: Path) -> None:
    released(tmp_path, 'n1,"cat, tabby"\n\nn2,dog\n', {})
    assert read_authors_keys(tmp_path) == ["n1_cat, tabby", "n2_dog"]
    released(tmp_path, "n2,dog\nn1,cat, tabby\n", {})
    with pytest.raises(DataError, match=r"labels.txt, line 2: .*quote"):
        read_authors_keys(tmp_path)


def test_frequencies_of_every_class_are_needed(tmp_path: Path) -> None:
    counts = {"sky": [3, 2.5], " sea": [1, 0.5]}
    folder = released(tmp_path, "n1,cat\nn2,dog\n", {"n1_cat_freq.json": counts}, "frequencies")
    with pytest.raises(DataError, match=r"n2_dog_freq.json"):
        read_authors_frequencies(folder)
    released(tmp_path, "n1,cat\nn2,dog\n", {"n2_dog_freq.json": {"sky": 3}}, "frequencies")
    with pytest.raises(DataError, match=r"n2_dog_freq.json: must map each tag"):
        read_authors_frequencies(folder)
    (folder / "labels.txt").unlink()
    (folder / "frequencies" / "n2_dog_freq.json").unlink()
    assert read_authors_frequencies(folder / "frequencies") == {"n1_cat": {"sky": (3, 2.5), " sea": (1, 0.5)}}
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="neither"):
        read_authors_frequencies(folder / "empty")


# Objects of whole images


def test_objects_as_annotated_each_once() -> None:
    data = manifest(["a", "b", "c"], objects=[["dog", "cat", "dog"], None, []])
    tagger = DatasetObjects()
    tagger.check()
    assert tagger.encoder is None
    assert found(tagger.tag(views(["c", "b", "a", "d"], view="full"), data, None, None)) == [
        ("c#full", [], [], "ok"),
        ("b#full", [], [], "no_evidence"),
        ("a#full", ["dog", "cat"], [1.0, 1.0], "ok"),
        ("d#full", [], [], "no_evidence"),
    ]


def test_objects_of_crops_or_of_data_sets_without_them_are_refused(tmp_path: Path) -> None:
    data = manifest(["a"], objects=[["dog"]])
    mixed = pl.concat([views(["a"], view="full"), views(["a"])])
    for tagger in (DatasetObjects(), AuthorsAnnotations(str(pickled(tmp_path, [["dog"]])))):
        with pytest.raises(ConfigError, match="whole image, and a#background is a part of one"):
            tagger.tag(mixed, data, None, None)
    with pytest.raises(ConfigError, match="planted names no objects"):
        DatasetObjects().tag(views(["a"], view="full"), manifest(["a"]), None, None)


def pickled(folder: Path, content: Any, protocol: int = 4) -> Path:
    path = folder / "annotations.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def lines(path: Path, *names: str) -> str:
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
    return str(path)


def test_annotations_are_in_the_order_given_or_by_id(tmp_path: Path) -> None:
    path = str(pickled(tmp_path, [np.array([2, 0, 2]), np.array([], int), [1, "bus"]]))
    names = lines(tmp_path / "names.txt", "cat", "dog", "red bus")
    data = manifest(["val/3.jpg", "val/1.jpg", "val/2.jpg"])
    shown = views(["val/1.jpg", "val/2.jpg", "val/3.jpg"], view="full")
    tagger = AuthorsAnnotations(path)
    tagger.check()
    assert tagger.encoder is None
    assert found(tagger.tag(shown, data, None, None)) == [
        ("val/1.jpg#full", ["2", "0"], [1.0, 1.0], "ok"),
        ("val/2.jpg#full", [], [], "ok"),
        ("val/3.jpg#full", ["1", "bus"], [1.0, 1.0], "ok"),
    ]
    order = lines(tmp_path / "order.txt", "3.jpg", "elsewhere/9.jpg", "val/1.jpg")
    assert found(AuthorsAnnotations(path, order, names).tag(shown, data, None, None)) == [
        ("val/1.jpg#full", ["dog", "bus"], [1.0, 1.0], "ok"),
        ("val/2.jpg#full", [], [], "no_evidence"),
        ("val/3.jpg#full", ["red bus", "cat"], [1.0, 1.0], "ok"),
    ]


def test_annotation_files_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    path = str(pickled(tmp_path, [[0], [3]]))
    data, shown = manifest(["a/1.jpg", "b/1.jpg"]), views(["a/1.jpg"], view="full")
    order = lines(tmp_path / "order.txt", "a/1.jpg")
    with pytest.raises(DataError, match=r"annotations.pkl has 2 entries, and .*order.txt lists 1 images"):
        AuthorsAnnotations(path, order).tag(shown, data, None, None)
    with pytest.raises(DataError, match=r"has 2 entries, and planted has 1 images. Give with tagger.order"):
        AuthorsAnnotations(path).tag(shown, manifest(["a/1.jpg"]), None, None)
    with pytest.raises(DataError, match=r"1.jpg is both a/1.jpg and b/1.jpg"):
        AuthorsAnnotations(path, lines(tmp_path / "order.txt", "1.jpg", "a/1.jpg")).tag(shown, data, None, None)
    with pytest.raises(DataError, match=r"order.txt: a/1.jpg is named more than once"):
        AuthorsAnnotations(path, lines(tmp_path / "order.txt", "a/1.jpg", "a/1.jpg")).tag(shown, data, None, None)
    with pytest.raises(DataError, match=r"entry 1: object 3 has no name in .*names.txt, which has 2 lines, 0 to 1"):
        AuthorsAnnotations(path, None, lines(tmp_path / "names.txt", "cat", "dog")).tag(shown, data, None, None)
    for key in ("path", "order", "names"):
        with pytest.raises(ConfigError, match=rf"tagger.{key}=nowhere: there is no such file"):
            AuthorsAnnotations(**{"path": path, key: "nowhere"}).check()


# Pickles


def objects(*values: Any) -> Any:
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([[1, 2], (), ["a", "ä"]], [[1, 2], [], ["a", "ä"]]),
        ([np.array([1, 2]), np.array([], np.int64), np.array([-3], ">i2")], [[1, 2], [], [-3]]),
        (objects(np.array(["dog", "big bus"]), [], [7]), [["dog", "big bus"], [], [7]]),
        (np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)), [[0, 1, 2], [3, 4, 5]]),
        ([[np.int64(4), np.str_("cat")], np.arange(9)[::4]], [[4, "cat"], [0, 4, 8]]),
        (np.array([["cat", "dog"], ["bus", 5]], object), [["cat", "dog"], ["bus", 5]]),
        ([np.array([b"cat"])], [["cat"]]),
        ([], []),
    ],
)
def test_lists_and_arrays_are_read(content: Any, expected: Any, protocol: int, tmp_path: Path) -> None:
    assert read_arrays(pickled(tmp_path, content, protocol)) == expected


@pytest.mark.parametrize("protocol", range(6))
def test_both_names_of_numpys_modules_are_read(protocol: int, tmp_path: Path) -> None:
    written = pickle.dumps([np.arange(3), [np.int8(5)]], protocol)
    assert b"numpy._core" in written
    for core in (b"numpy._core", b"numpy.core"):
        data = written
        if core != b"numpy._core":
            # Short texts and frames carry their length.
            for function in (b"numeric", b"multiarray"):
                new, old = core + b"." + function, b"numpy._core." + function
                data = data.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
                data = data.replace(b"c" + old + b"\n", b"c" + new + b"\n")
            if protocol >= 4:
                data = data[:3] + (len(data) - 11).to_bytes(8, "little") + data[11:]
            assert b"numpy._core" not in data
        path = tmp_path / "a.pkl"
        path.write_bytes(data)
        assert read_arrays(path) == [[0, 1, 2], [5]]


class Harmless:
    pass


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([[Harm()]], rf"{os.mkdir.__module__}\.mkdir"),
        (Harm(), rf"{os.mkdir.__module__}\.mkdir"),
        ([[Harmless()]], rf"{Harmless.__module__}\.Harmless"),
        (objects(Harmless()), rf"{Harmless.__module__}\.Harmless"),
        ([Harmless], rf"{Harmless.__module__}\.Harmless"),
        (objects(Harm(), [1]), rf"{os.mkdir.__module__}\.mkdir"),
        ([np.datetime64("2020-01-01")], "NumPy values of the type 'M8'"),
        ([np.zeros(1, [("a", int)])], "NumPy values of the type 'V8'"),
        ([np.ndarray], r"the name numpy\.ndarray as entry 0"),
    ],
)
def test_classes_in_pickles_are_named_and_never_called(
    content: Any, named: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pickled(tmp_path, content, protocol)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=named) as error:
        read_arrays(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": [1]}, "a value of type dict as its content"),
        ([[{}]], "a value of type dict in entry 0"),
        ([1], "a value of type int as entry 0"),
        ([[], [1.5]], "a value of type float in entry 1"),
        ([np.array([0.5])], "a value of type float in entry 0"),
        ([[True]], "a value of type bool in entry 0"),
        ([[None]], "a value of type NoneType in entry 0"),
        ([[[1]]], "a value of type list in entry 0"),
        ([np.zeros((2, 2), int)], "a value of type list in entry 0"),
        (np.zeros((2, 2, 2), int), r"an array of shape \(2, 2, 2\)"),
        (np.zeros((2, 0), int), r"an array of shape \(2, 0\)"),
        (np.array(3), r"an array of shape \(\)"),
        ([[*range(5)] * 20] * 50, "more values than bytes"),
    ],
)
def test_other_content_of_pickles_is_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_arrays(pickled(tmp_path, content))


ARRAY = pickle.dumps([np.arange(3, dtype=np.int8)], 2)
TEXT = pickle.dumps([np.array(["ab"])], 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged"),
        (b"no pickle", "is damaged"),
        (pickle.dumps([[1, 2]])[:-1], "is damaged"),
        (TEXT[: len(TEXT) // 2], "is damaged"),
        (pickle.dumps([[1]]) + b"more", "holds 4 bytes after the end"),
        (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"abc.", "is damaged"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "the number 4294967295 for one of its parts"),
        (ARRAY.replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"), r"shape \(2147483647,\) and type int8 in 3 bytes"),
        (TEXT.replace("a".encode("utf-32-le"), b"\xff\xff\xff\x7f"), "texts of characters that do not exist"),
        (TEXT.replace(b"U2", b"U0"), "of no size"),
        (b"\x80\x02\x82\x01.", "the registered class 1"),
        (b"Pelsewhere\n.", "a reference to something outside of the file"),
        (b"\x80\x02cnumpy\ndtype\n}U\x04nameU\x01xsb.", r"a state for numpy\.dtype"),
        (b"\x80\x02c_codecs\nencode\nU\x01aU\x03zip\x86R.", "a text in the encoding 'zip'"),
        (b"\x80\x02cnumpy\ndtype\n)\x81.", "is damaged"),
    ],
)
def test_damaged_or_made_up_pickles_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read_arrays(path)
    assert str(path) in str(error.value)


def test_missing_pickles_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.pkl: cannot be read"):
        read_arrays(tmp_path / "nowhere.pkl")


# Configuration


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"arch": "tf_efficientnet_lite0", "weights": "mine.safetensors"}, "mine.safetensors"),
        ({"arch": "resnet50", "weights": "mine.safetensors"}, "hub"),
        ({"format": "dino"}, "hub"),
    ],
)
def test_classifier_shares_the_file_of_the_measured_model_of_its_architecture(
    model: dict[str, str], expected: str
) -> None:
    config.register()
    tagger = OmegaConf.load(ROOT / "conf" / "tagger" / "timm_classifier.yaml")
    node = OmegaConf.create({"model": model, "tagger": tagger})
    assert node.tagger.encoder.weights == expected


def test_every_shipped_tagger_builds(tmp_path: Path) -> None:
    config.register()
    for path in (ROOT / "conf" / "tagger").glob("*.yaml"):
        node = OmegaConf.create({"tagger": OmegaConf.load(path)})
        changes = {"path": str(tmp_path / "a.parquet")} if OmegaConf.is_missing(node.tagger, "path") else {}
        tagger = instantiate(node.tagger, **changes)
        if isinstance(tagger, PrecomputedTags | AuthorsAnnotations):
            (tmp_path / "a.parquet").touch()
        tagger.check()
        if isinstance(tagger, ScoreTagger):
            assert isinstance(tagger.encoder, ZeroShotEncoder | DetectorEncoder) or tagger.encoder == TimmEncoder(
                "tf_efficientnet_lite0", output="probabilities"
            )


def test_shipped_vocabulary_is_long_and_clean() -> None:
    tags = read_vocabulary("scenes")
    assert len(tags) >= 200
    assert [tag for tag in tags if tag != " ".join(tag.lower().split())] == []
