"""Taggers: what things are in a crop, for the naive Bayes reference; or in a whole image, as objects to be inferred."""

from __future__ import annotations

import csv
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from dejavu_exp import tables
from dejavu_exp.datasets import pickles
from dejavu_exp.datasets.annotations import storable
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.encoders import Encoder
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.tables import Status

if TYPE_CHECKING:
    from dejavu_exp.extract import Extractor

BLOCK = 8192
"""Rows whose scores are put in order at a time."""
WHOLE = "full"
"""The view of a whole image."""
FREQUENCIES = "_freq.json"
"""How the released code's frequency files end."""


class Tagger(Protocol):
    """Names things in views."""

    @property
    def encoder(self) -> Encoder | None:
        """What views are passed through before `tag`; None where no network is needed."""
        ...

    def check(self) -> None:
        """Find what cannot work before any image is read.

        Raises:
            DejavuError: a file or weights are missing.
        """
        ...

    def tag(
        self,
        views: pl.DataFrame,
        manifest: Manifest,
        outputs: npt.NDArray[Any] | None,
        classes: tuple[str, ...] | None,
    ) -> pl.DataFrame:
        """Tags of each view.

        Args:
            views: columns of `tables.VIEWS`, status ok, N rows.
            manifest: the data set.
            outputs: shape (N, C), what the encoder gave for each view; None without an encoder.
            classes: names of its C columns.

        Returns:
            Columns of `tables.TAGS`, N rows in the order of `views`; status "no_evidence" where nothing is known.
        """
        ...


def _table(view_ids: pl.Series, tags: list[list[str] | None], scores: list[list[float] | None]) -> pl.DataFrame:
    """Tags and scores of each view; None where nothing is known."""
    status = [Status.NO_EVIDENCE if names is None else Status.OK for names in tags]
    return pl.DataFrame(
        {
            "view_id": view_ids,
            "tags": [names or [] for names in tags],
            "scores": [values or [] for values in scores],
            "status": [str(value) for value in status],
        },
        schema=dict(tables.TAGS),
    )


@dataclass(frozen=True)
class ScoreTagger:
    """The strongest output columns of an encoder whose columns are named scores.

    Attributes:
        encoder: a classifier, or an image encoder against a vocabulary.
        top_tags: most tags a view gets.
        min_score: a tag needs a score above this; the encoder's own scale, probabilities for the shipped ones.
    """

    encoder: Encoder
    top_tags: int = 5
    min_score: float = 0.0

    def __post_init__(self) -> None:
        if self.top_tags < 1:
            raise ConfigError(f"tagger.top_tags={self.top_tags}: must be at least 1.")

    def check(self) -> None:
        """See `Tagger.check`."""
        self.encoder.check()

    def tag(
        self,
        views: pl.DataFrame,
        manifest: Manifest,
        outputs: npt.NDArray[Any] | None,
        classes: tuple[str, ...] | None,
    ) -> pl.DataFrame:
        """See `Tagger.tag`; equal scores go to the lowest column."""
        if outputs is None or classes is None:
            raise ConfigError(
                "tagger.encoder gives columns without names, so they are no tags. Choose a classifier "
                "(output=probabilities) or a vocabulary, e.g. tagger=timm_classifier."
            )
        if outputs.shape != (len(views), len(classes)):
            raise DataError(
                f"tagger.encoder gave an array of shape {outputs.shape} for {len(views)} views and {len(classes)} tags."
            )
        tags: list[list[str] | None] = []
        scores: list[list[float] | None] = []
        # Block by block, since the order of all columns takes twice the memory of float32 outputs.
        for start in range(0, len(outputs), BLOCK):
            block = outputs[start : start + BLOCK]
            order = np.argsort(-block, axis=1, kind="stable")[:, : self.top_tags]
            best = np.take_along_axis(block, order, axis=1)
            counts = (best > self.min_score).sum(axis=1)
            tags += [[classes[column] for column in row[:count]] for row, count in zip(order, counts, strict=True)]
            scores += [row[:count].tolist() for row, count in zip(best, counts, strict=True)]
        return _table(views["view_id"], tags, scores)


@dataclass(frozen=True)
class DatasetTags:
    """The tags that the data set itself lists; where it says where they are, only those inside the view.

    Attributes:
        top_tags: most tags a view gets, in the order listed.
    """

    top_tags: int = 20

    def __post_init__(self) -> None:
        if self.top_tags < 1:
            raise ConfigError(f"tagger.top_tags={self.top_tags}: must be at least 1.")

    @property
    def encoder(self) -> None:
        """No network is needed."""
        return

    def check(self) -> None:
        """Nothing can fail before the data set is read."""

    def tag(
        self,
        views: pl.DataFrame,
        manifest: Manifest,
        outputs: npt.NDArray[Any] | None,
        classes: tuple[str, ...] | None,
    ) -> pl.DataFrame:
        """See `Tagger.tag`; every score is 1, and a tag counts where its box has its centre in the view.

        Raises:
            ConfigError: the data set lists no tags at all.
            DataError: an image has another number of tags than of boxes for them.
        """
        listed = manifest.rows.select("id", "tags", "tag_boxes")
        if len(listed) and listed["tags"].null_count() == len(listed):
            raise ConfigError(
                f"tagger=dataset_tags: {manifest.name} lists no tags. Choose another, e.g. tagger=timm_classifier."
            )
        rows = views.join(listed, on="id", how="left", validate="m:1", maintain_order="left")
        found: list[list[str] | None] = []
        columns = ("id", "tags", "tag_boxes", "xmin", "ymin", "xmax", "ymax")
        for image, tags, boxes, *region in rows.select(columns).iter_rows():
            if tags is not None and boxes is not None and len(tags) != len(boxes):
                raise DataError(
                    f"manifest of {manifest.name}: {image} has {len(tags)} tags but {len(boxes)} tag_boxes. "
                    f"List one box a tag, or null where the places are not known."
                )
            found.append(None if tags is None else _inside(tags, boxes, region)[: self.top_tags])
        return _table(views["view_id"], found, [None if names is None else [1.0] * len(names) for names in found])


def _inside(tags: list[str], boxes: list[list[int]] | None, region: list[int]) -> list[str]:
    """Tags whose box centre lies in the region, each once, in the order listed."""
    if boxes is not None:
        xmin, ymin, xmax, ymax = region
        tags = [
            tag
            for tag, (left, top, right, bottom) in zip(tags, boxes, strict=True)
            if xmin <= (left + right) / 2 < xmax and ymin <= (top + bottom) / 2 < ymax
        ]
    return list(dict.fromkeys(tags))


@dataclass(frozen=True)
class DatasetObjects:
    """The objects that the data set's own annotations name, for whole images; of a crop they say nothing."""

    @property
    def encoder(self) -> None:
        """No network is needed."""
        return

    def check(self) -> None:
        """Nothing can fail before the data set is read."""

    def tag(
        self,
        views: pl.DataFrame,
        manifest: Manifest,
        outputs: npt.NDArray[Any] | None,
        classes: tuple[str, ...] | None,
    ) -> pl.DataFrame:
        """See `Tagger.tag`; each object once, in the order listed, with the score 1.

        Raises:
            ConfigError: a view is not of a whole image, or no image of the data set is annotated.
        """
        _require_whole(views, "dataset_objects")
        listed = manifest.rows.select("id", "objects")
        if len(listed) and listed["objects"].null_count() == len(listed):
            raise ConfigError(
                f"tagger=dataset_objects: {manifest.name} names no objects. Choose another, e.g. tagger=rtdetr, or "
                f"tagger=precomputed with a file of your own."
            )
        rows = views.join(listed, on="id", how="left", validate="m:1", maintain_order="left")
        return _named(views["view_id"], rows["objects"].to_list())


def _require_whole(views: pl.DataFrame, tagger: str) -> None:
    """Refuse crops, of which annotations of whole images say nothing."""
    other = views.filter(pl.col("view").ne_missing(WHOLE))
    if len(other):
        raise ConfigError(
            f"tagger={tagger} names what is in a whole image, and {other['view_id'][0]} is a part of one. Choose a "
            f"tagger that looks at the part, e.g. tagger=dataset_tags or tagger=open_clip."
        )


def _named(view_ids: pl.Series, names: list[list[str] | None]) -> pl.DataFrame:
    """Names without scores, each once."""
    tags = [None if row is None else list(dict.fromkeys(row)) for row in names]
    return _table(view_ids, tags, [None if row is None else [1.0] * len(row) for row in tags])


@dataclass(frozen=True)
class AuthorsAnnotations:
    """Objects of whole images from a pickle of the vision-language test's released annotation step.

    The pickle is a list with the object numbers or names of one image each. It names no images, so their order must be
    known. Nothing in it is run, see `datasets.pickles`.

    Attributes:
        path: the pickle.
        order: path of a text file with the image of each entry, one a line: its id in the data set, or its file name;
            null where the entries are all images of the data set, sorted by id.
        names: path of a text file with the object names, one a line, the name of number 0 first; null to take the
            numbers themselves as names.
    """

    path: str
    order: str | None = None
    names: str | None = None

    @property
    def encoder(self) -> None:
        """No network is needed."""
        return

    def check(self) -> None:
        """See `Tagger.check`."""
        for key, path in (("path", self.path), ("order", self.order), ("names", self.names)):
            if path is not None and not Path(path).expanduser().is_file():
                raise ConfigError(f"tagger.{key}={path}: there is no such file.")

    def tag(
        self,
        views: pl.DataFrame,
        manifest: Manifest,
        outputs: npt.NDArray[Any] | None,
        classes: tuple[str, ...] | None,
    ) -> pl.DataFrame:
        """See `Tagger.tag`; each object once, in the order of the file, with the score 1.

        Raises:
            ConfigError: a view is not of a whole image.
            DataError: a file is not as it must be, or the files do not go together.
        """
        _require_whole(views, "authors_annotations")
        entries = pickles.read_arrays(Path(self.path).expanduser())
        images = self._images(manifest, len(entries))
        names = None if self.names is None else _lines(self.names)
        known = {
            image: [self._object(item, names, number) for item in entry]
            for number, (image, entry) in enumerate(zip(images, entries, strict=True))
        }
        return _named(views["view_id"], [known.get(image) for image in views["id"]])

    def _images(self, manifest: Manifest, count: int) -> list[str]:
        """The image of each entry; one that the data set does not have keeps its name."""
        listed = manifest.rows["id"].to_list() if self.order is None else _lines(self.order)
        if len(listed) != count:
            told = f"{manifest.name} has" if self.order is None else f"{self.order} lists"
            raise DataError(
                f"{self.path} has {count} entries, and {told} {len(listed)} images. Give with tagger.order a text file "
                f"with the image of each entry, one a line."
            )
        if self.order is None:
            return listed
        by_file = _ids_by_file(manifest)
        own = set(manifest.rows["id"])
        images = [name if name in own else _one_image(name, by_file, self.order, manifest) for name in listed]
        repeated = sorted({image for image, times in Counter(images).items() if times > 1})
        if repeated:
            raise DataError(f"{self.order}: {repeated[0]} is named more than once; keep one line for each image.")
        return images

    def _object(self, item: pickles.Item, names: list[str] | None, entry: int) -> str:
        if isinstance(item, str) or names is None:
            return str(item)
        if not 0 <= item < len(names):
            raise DataError(
                f"{self.path}, entry {entry}: object {item} has no name in {self.names}, which has {len(names)} lines, "
                f"0 to {len(names) - 1}."
            )
        return names[item]


def _one_image(name: str, by_file: Mapping[str, list[str]], order: str, manifest: Manifest) -> str:
    """The id of the image with this file name, or the name where there is none."""
    images = by_file.get(PurePosixPath(name).name, [name])
    if len(images) > 1:
        raise DataError(
            f"{order}: {name} is both {images[0]} and {images[1]} in {manifest.name}. Write the ids instead."
        )
    return images[0]


def _ids_by_file(manifest: Manifest) -> dict[str, list[str]]:
    """Image ids by file name, which alone is the same everywhere."""
    ids: dict[str, list[str]] = {}
    for image, name in manifest.rows.select("id", "path").iter_rows():
        ids.setdefault(PurePosixPath(name).name, []).append(image)
    return ids


def _lines(path: str) -> list[str]:
    """The lines of a text file, without blanks around them and without empty ones at the end."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it must be a text file with one name a line.") from error
    return [line.strip() for line in lines]


@dataclass(frozen=True)
class PrecomputedTags:
    """Tags from a file: Parquet (id or view_id, tags, scores), or a folder in the layout of the released code.

    Rows with an id hold for every view of an image, so give view_id where tags of crops are meant. Without the column
    scores every score is 1.

    Attributes:
        path: the Parquet file, or the folder with labels.txt and labels/<id>_<name>_labels.json.
    """

    path: str

    @property
    def encoder(self) -> None:
        """No network is needed."""
        return

    def check(self) -> None:
        """See `Tagger.check`."""
        if not self._path().exists():
            raise ConfigError(
                f"tagger.path={self.path}: there is no such file or folder. Give a Parquet file with id or view_id, "
                f"tags and, where known, scores, or a folder with labels.txt and labels/."
            )
        if self._path().is_dir():
            read_authors_keys(self._path())

    def tag(
        self,
        views: pl.DataFrame,
        manifest: Manifest,
        outputs: npt.NDArray[Any] | None,
        classes: tuple[str, ...] | None,
    ) -> pl.DataFrame:
        """See `Tagger.tag`; tags are put in descending order of their scores.

        Raises:
            DataError: the file lacks a column, or names an image twice; or an image's file name is not unique in the
                data set, and the file has nothing else.
        """
        path = self._path()
        key, known = _from_folder(path, manifest) if path.is_dir() else _from_parquet(path)
        rows = [known.get(value) for value in views[key]]
        tags = [None if row is None else row[0] for row in rows]
        return _table(views["view_id"], tags, [None if row is None else row[1] for row in rows])

    def _path(self) -> Path:
        return Path(self.path).expanduser()


Known: TypeAlias = dict[str, tuple[list[str], list[float]]]


def _from_parquet(path: Path) -> tuple[str, Known]:
    """The key column, and the tags and scores by its values."""
    frame = tables.read(path)
    key = "view_id" if "view_id" in frame.columns else "id"
    schema: dict[str, pl.DataType | type[pl.DataType]] = {key: pl.String, "tags": pl.List(pl.String)}
    frame = tables.validate(frame, schema, str(path), key)
    if "scores" not in frame.columns:
        frame = frame.with_columns(scores=pl.col("tags").list.eval(pl.lit(1.0)))
    schema["scores"] = pl.List(pl.Float32)
    frame = tables.validate(frame, schema, str(path), key).select(list(schema))
    whole = (
        (pl.col("tags").list.len() == pl.col("scores").list.len())
        & pl.col("tags").list.eval(pl.element().is_not_null()).list.all()
        & pl.col("scores").list.eval(pl.element().is_not_nan().fill_null(value=False)).list.all()
    )
    bad = frame.filter(~whole.fill_null(value=False))
    if len(bad):
        raise DataError(
            f"{path}: {key} {bad[key][0]} needs as many scores as tags, none null or NaN ({len(bad)} such rows). "
            f"Leave a row out where nothing is known of it."
        )
    return key, {name: _descending(tags, scores) for name, tags, scores in frame.iter_rows()}


def _from_folder(path: Path, manifest: Manifest) -> tuple[str, Known]:
    """The same by image id; the folder names images by path, of which the file name alone is the same everywhere."""
    ids = _ids_by_file(manifest)
    found: Known = {}
    for entry in read_authors_labels(path):
        file = PurePosixPath(entry.image_path).name
        images = ids.get(file, [])
        if len(images) > 1:
            raise DataError(
                f"{path} names images by file name alone, and {file} is both {images[0]} and {images[1]} in "
                f"{manifest.name}. Give a Parquet file with ids instead."
            )
        if images and images[0] in found:
            raise DataError(f"{path}, {entry.key}: {file} is named a second time; keep one entry for each image.")
        if images:
            found[images[0]] = _descending(entry.tags, entry.scores)
    return "id", found


def _descending(tags: list[str], scores: list[float]) -> tuple[list[str], list[float]]:
    """Tags by falling score, written as those of a manifest."""
    order = sorted(range(len(tags)), key=lambda index: -scores[index])
    return [unicodedata.normalize("NFC", tags[index]) for index in order], [scores[index] for index in order]


class AuthorsTags(NamedTuple):
    """One image in a label file of the released code."""

    key: str
    image_path: str
    tags: list[str]
    scores: list[float]


def read_authors_keys(folder: Path) -> list[str]:
    """The keys `<id>_<name>` in the order of labels.txt (`id,name` lines).

    Raises:
        DataError: the file is missing, or a line has no comma.
    """
    path = folder / "labels.txt"
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); it must hold one `id,name` a line.") from error
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise DataError(
                f"{path}, line {number}: {','.join(row)!r} is not `id,name`; quote a name that has a comma."
            )
    return ["_".join(row) for row in rows]


def read_authors_labels(folder: Path) -> list[AuthorsTags]:
    """Tags of all images, in the order of labels.txt and then of each file; a class without a file is skipped.

    Args:
        folder: holds labels.txt and labels/<id>_<name>_labels.json, each a list of {image_path, tags, scores}.

    Returns:
        One entry an image; tags as they are written, blanks included, in the file's order.

    Raises:
        DataError: a file is not what the released code writes.
    """
    found = []
    for key in read_authors_keys(folder):
        path = folder / "labels" / f"{key}_labels.json"
        if path.exists():
            entries = _read_json(path)
            if not isinstance(entries, list):
                raise DataError(f"{path}: must hold a list with image_path, tags and scores of each image.")
            found += [_authors_tags(key, entry, f"{path}, entry {n}") for n, entry in enumerate(entries)]
    return found


def _authors_tags(key: str, entry: Any, where: str) -> AuthorsTags:  # noqa: ANN401 - from a file, checked here
    try:
        tags, scores = [storable(str(tag)) for tag in entry["tags"]], [float(score) for score in entry["scores"]]
        found = AuthorsTags(key, storable(str(entry["image_path"])), tags, scores)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"{where}: needs image_path, tags and scores ({error!r}).") from error
    if len(tags) != len(scores):
        raise DataError(f"{where}: {len(tags)} tags but {len(scores)} scores.")
    if any(map(math.isnan, scores)):
        raise DataError(f"{where}: a score is NaN; leave out a tag of which nothing is known.")
    return found


def read_authors_frequencies(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Tag frequencies of each class: key -> tag -> (count, sum of scores).

    Args:
        folder: holds <id>_<name>_freq.json, each a mapping of tag to [count, score sum], in frequencies/ or itself.
            With a labels.txt the keys are its, in its order; without one they are the names of the files, sorted.

    Raises:
        DataError: a file is missing or is not what the released code writes.
    """
    files = folder / "frequencies" if (folder / "frequencies").is_dir() else folder
    if (folder / "labels.txt").exists():
        keys = read_authors_keys(folder)
    else:
        keys = sorted(path.name.removesuffix(FREQUENCIES) for path in files.glob(f"*{FREQUENCIES}"))
    if not keys:
        raise DataError(f"{folder}: holds neither labels.txt nor a file <id>_<name>{FREQUENCIES}.")
    found = {}
    for key in keys:
        path = files / f"{key}{FREQUENCIES}"
        content = _read_json(path)
        try:
            found[key] = {tag: (float(count), float(total)) for tag, (count, total) in content.items()}
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise DataError(f"{path}: must map each tag to [count, score sum] ({error!r}).") from error
        if not all(math.isfinite(number) for numbers in found[key].values() for number in numbers):
            raise DataError(f"{path}: a count or a score sum is not finite; count the tags again.")
    return found


def _read_json(path: Path) -> Any:  # noqa: ANN401 - the callers check it
    try:
        content: list[Any] | Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error
    return content


def tag_views(tagger: Tagger, views: pl.DataFrame, manifest: Manifest, extractor: Extractor) -> pl.DataFrame:
    """Tags of views; the tagger's network runs once, through the cache.

    Args:
        tagger: as configured.
        views: columns of `tables.VIEWS`, status ok.
        manifest: the data set.
        extractor: runs the network.

    Returns:
        Columns of `tables.TAGS`, in the order of `views`; status "unreadable" where the image does not decode.
    """
    if tagger.encoder is None:
        return tagger.tag(views, manifest, None, None)
    found = extractor.embed(tagger.encoder.load(), views, manifest.store, "tagging")
    tags = tagger.tag(views, manifest, np.nan_to_num(found.values), found.classes)
    readable = pl.Series(found.readable, dtype=pl.Boolean)
    return tags.with_columns(status=pl.when(readable).then("status").otherwise(pl.lit(str(Status.UNREADABLE))))
