"""ImageNet (ILSVRC 2012), or any data set of image folders with Pascal VOC boxes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dejavu_exp.datasets import voc
from dejavu_exp.datasets.annotations import IMAGE_SUFFIXES, Problems, location, rows_of, status_of
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import FolderStore
from dejavu_exp.datasets.voc import Note
from dejavu_exp.errors import DataError
from dejavu_exp.tables import Status

LAYOUT = "train/<class>/*.JPEG and val/<class>/*.JPEG or val/*.JPEG (of the Kaggle archive: ILSVRC/Data/CLS-LOC)"
BOXES_LAYOUT = (
    "train/<class>/<image>.xml and val/<image>.xml (of the Kaggle archive: ILSVRC/Annotations/CLS-LOC), "
    "or the published train archives unpacked: <class>/<image>.xml or Annotation/<class>/<image>.xml"
)

_VAL_FOLDER = re.compile(r"(.*[_-])?val(idation)?([_-].*)?", re.IGNORECASE)
_NO_CLASS = re.compile(r"train(ing)?|val(idation)?|.*bbox.*|annotations?|cls-loc|boxes", re.IGNORECASE)


@dataclass(frozen=True)
class Imagenet:
    """Origins train and val of an ImageNet folder, with the boxes of its localization task.

    Images: `train/<class>/*.JPEG` and `val/<class>/*.JPEG`, or `val/*.JPEG` as the val archive unpacks: then the XML
    names the class. Ids are these paths. Endings .jpg, .jpeg and .png in any case are taken.

    Boxes: all .xml files below `boxes`, at any depth. One belongs to the image of the same stem and class, its class
    being the name of its folder; in a folder called train, val, Annotation(s), CLS-LOC, boxes or *bbox* the stem alone
    decides. It is of origin val where a folder above is called val, bbox_val and the like, or its name begins with
    ILSVRC2012_val_. So these are taken: train/<class>/, bbox_train/<class>/, Annotation/<class>/, <class>/, val/,
    bbox_val/, and their combinations; val/<class>/ where the val images are in class folders too.

    All boxes of an image count, whatever object they name, since a background crop must avoid them all. Coordinates are
    taken as they stand, with upper ends exclusive.

    Attributes:
        root: the folder with train/ and val/.
        boxes: the folder with the XML files.
        class_names: a text file with lines "<class> <name>", such as LOC_synset_mapping.txt; null for none.
    """

    root: str | Path
    boxes: str | Path
    class_names: str | Path | None = None

    def __post_init__(self) -> None:
        location(self.root, "root")
        location(self.boxes, "boxes")
        if self.class_names is not None:
            location(self.class_names, "class_names")

    def manifest(self) -> Manifest:
        """Read the data set; only XML files of images that are there are opened.

        Raises:
            DataError: a folder is missing, holds no image or no XML file, or the class names cannot be read.
        """
        root, boxes = location(self.root, "root"), location(self.boxes, "boxes")
        problems = Problems()
        names = _class_names(self.class_names, problems)
        images = _images(root, problems)
        notes = _notes(images, _xml_files(boxes, problems), boxes, problems)
        rows = [_row(image, note, problems) for image, note in zip(images, notes, strict=True)]
        columns = dict(zip(_Row._fields, zip(*rows, strict=True), strict=True))
        return Manifest("imagenet", rows_of(columns), FolderStore(root), names, problems.sentences())


class _Key(NamedTuple):
    """What an image and its XML file have in common; the label is empty where the folder does not tell."""

    origin: str
    label: str
    stem: str


def _key(origin: str, label: str, stem: str) -> _Key:
    """The key of a file, with accents written in one way: archives packed on a Mac have another."""
    return _Key(origin, unicodedata.normalize("NFC", label), unicodedata.normalize("NFC", stem))


class _Image(NamedTuple):
    path: str
    key: _Key


class _Row(NamedTuple):
    id: str
    path: str
    origin: str
    label: str | None
    width: int | None
    height: int | None
    boxes: list[list[int]] | None
    objects: list[str] | None
    status: str
    detail: str | None


def _images(root: Path, problems: Problems) -> list[_Image]:
    images: list[_Image] = []
    for origin in ("train", "val"):
        found = _images_of(root, origin) if (root / origin).is_dir() else []
        if not found:
            problems.add("missing part", str(root / origin), "there are no images")
        images.extend(found)
    if not images:
        raise DataError(f"dataset.root={root}: there are no images; expected {LAYOUT}.")
    return images


def _images_of(root: Path, origin: str) -> list[_Image]:
    """Images directly below an origin's folder and in its class folders."""
    images: list[_Image] = []
    for name in FolderStore(root / origin).names():
        *folders, file = name.split("/")
        if len(folders) <= 1 and not file.startswith(".") and file.lower().endswith(IMAGE_SUFFIXES):
            images.append(_Image(f"{origin}/{name}", _key(origin, "".join(folders), file.rpartition(".")[0])))
    return images


def _xml_files(boxes: Path, problems: Problems) -> dict[_Key, str]:
    """Paths below `boxes` of all XML files; of two for the same image the first counts."""
    fault = "the folder is not there" if not boxes.is_dir() else ""
    files: dict[_Key, str] = {}
    for name in FolderStore(boxes).names() if not fault else []:
        *folders, file = name.split("/")
        if file.startswith(".") or not file.lower().endswith(".xml"):
            continue
        val = file.startswith("ILSVRC2012_val_") or any(_VAL_FOLDER.fullmatch(folder) for folder in folders)
        label = "" if not folders or _NO_CLASS.fullmatch(folders[-1]) else folders[-1]
        first = files.setdefault(_key("val" if val else "train", label, file[:-4]), name)
        if first != name:
            problems.add("second XML file of an image", name, f"not read, since {first} is for the same image")
    if not files:
        raise DataError(f"dataset.boxes={boxes}: {fault or 'there is no XML file'}; expected {BOXES_LAYOUT}.")
    return files


def _notes(images: Sequence[_Image], files: Mapping[_Key, str], boxes: Path, problems: Problems) -> list[Note | None]:
    """One note an image, in their order; None where it has no XML file."""
    found = [files.get(image.key) or files.get(image.key._replace(label="")) for image in images]
    wanted = [name for name in found if name is not None]
    if not wanted:
        raise DataError(
            f"dataset.boxes={boxes}: none of its {len(files)} XML files, e.g. {next(iter(files.values()))}, belongs to "
            f"an image, e.g. {images[0].path}; expected {BOXES_LAYOUT}."
        )
    for origin in sorted({image.key.origin for image in images}):
        if not any(name for name, image in zip(found, images, strict=True) if image.key.origin == origin):
            problems.add("missing part", f"{boxes} ({origin})", f"no XML file belongs to an image of origin {origin}")
    read = iter(map(_with_objects, voc.read_all([str(boxes / name) for name in wanted])))
    notes = [None if name is None else next(read) for name in found]
    for name, note in zip(found, notes, strict=True):
        if name is not None and note is not None and note.fault is not None:
            problems.add("XML file not understood", name, note.fault)
    return notes


def _with_objects(note: Note) -> Note:
    """The note as a fault where it lists no object."""
    if note.fault is None and not note.boxes:
        # Every image shows its class somewhere, so an empty list would let a crop show the foreground.
        return Note(fault="no object is listed")
    return note


def _row(image: _Image, note: Note | None, problems: Problems) -> _Row:
    said = note or Note()
    objects = None if said.names is None else list(dict.fromkeys(name for name in said.names if name))
    label = image.key.label or (objects[0] if objects and len(objects) == 1 else None)
    if label is None and said.boxes is not None:
        named = ", ".join(objects or []) or "none"
        problems.add("image without label", image.path, f"has no label, as its XML must name one class, not {named}")
    status, detail = status_of(
        said.boxes, said.fault, "it has no XML file" if label else "it has no class folder and no XML file"
    )
    boxes = None if status == Status.BAD_ANNOTATION else said.boxes
    return _Row(
        image.path, image.path, image.key.origin, label, said.width, said.height, boxes, objects, status, detail
    )


def _class_names(file: str | Path | None, problems: Problems) -> dict[str, str]:
    if file is None:
        return {}
    path = location(file, "class_names")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"dataset.class_names={path}: cannot be read ({error}). Give a file with lines '<class> <name>', or null."
        ) from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        label, _, name = line.strip().replace("\t", " ").partition(" ")
        if label and name.strip():
            names[label] = name.strip()
        elif label:
            problems.add("line without name", str(path), f"line {number} has no name for {label}")
    return names
