"""A folder of images of one's own, with boxes in the form of COCO, Pascal VOC or YOLO, or without any."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dejavu_exp.datasets import headers, instances, voc, yolo
from dejavu_exp.datasets.annotations import IMAGE_SUFFIXES, Problems, location, rows_of, storable
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.headers import UPRIGHT, Header
from dejavu_exp.datasets.stores import FolderStore, read_file
from dejavu_exp.datasets.voc import Note
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.tables import Status

SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".tif", ".tiff", ".webp")
"""Endings of image files, lower case."""
FORMS = ("auto", "coco", "voc", "yolo")
LABELS = ("largest_box", "only_class", "folder")
SLACK_PX = 1
"""A box may leave its image by so much, and is cut at the border: tools round, and some count pixels from 1."""

_ORIGIN = re.compile(r"(?:(train)(?:ing)?|(val)(?:id|idation)?|(test)(?:ing)?)(?:\d{4})?", re.IGNORECASE)
_NO_CLASS = re.compile(r"images?|img|imgs|jpegimages|labels?|annotations?|xmls?|boxes", re.IGNORECASE)


@dataclass(frozen=True)
class BoxedImages:
    """Images below a folder, at any depth; ids are their paths in it.

    Origin: the folder train, val (valid, validation) or test, or one with a year behind it as train2017, that an image
    lies in, at the top or below a folder images; "train" where there is none. An image of origin test gets no role
    unless the split names it.

    Boxes belong to an image
        coco: by `file_name`, a path below `root`; a name without folders also means the one image of that file name.
        voc, yolo: where the annotation file has the same path but for the ending; folders called images, labels,
            Annotations, JPEGImages and the like do not count. A file without other folders also means the one image
            of that stem.
    Paths that lead out of `root` are never followed. Coordinates are taken as they stand, with upper ends exclusive;
    fractions are rounded outwards; what leaves the image by up to a pixel is cut at its border.

    The head of every image is read. A row whose boxes cannot be trusted says why: a box without area (bad_annotation)
    or outside (box_outside); an image of another size than the annotation says, or one that EXIF turns, where nobody
    knows which way up it was annotated (bad_annotation).

    Objects are the names of all boxes, sorted, each once. An image whose annotation lists no box is all background,
    unless its label comes from its folder: then nobody knows where the foreground is (no_annotation).

    Attributes:
        root: the folder.
        boxes: COCO: the JSON file; VOC and YOLO: the folder with a file for each image, `root` itself if they lie
            together; null for none.
        form: coco, voc or yolo; auto: coco for a file, voc for a folder with .xml files, yolo for one with .txt files.
        label: largest_box: the class of the largest box, by area; none where two classes share that place.
            only_class: the class of all boxes; none where there are several. folder: the first folder on the image's
            path that is no origin and not called images or the like.
        names: YOLO's names of the classes: data.yaml or a text file; null: data.yaml, dataset.yaml, classes.txt or
            obj.names in `boxes`, the folder above it, or `root`.
    """

    root: str | Path
    boxes: str | Path | None
    form: Literal["auto", "coco", "voc", "yolo"] = "auto"
    label: Literal["largest_box", "only_class", "folder"] = "largest_box"
    names: str | Path | None = None

    def __post_init__(self) -> None:
        location(self.root, "root")
        for key in ("boxes", "names"):
            if getattr(self, key) is not None:
                location(getattr(self, key), key)
        for key, allowed in (("form", FORMS), ("label", LABELS)):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"dataset.{key}={getattr(self, key)}: must be one of {', '.join(allowed)}.")
        if self.boxes is None and self.label != "folder":
            raise ConfigError(
                f"dataset.label={self.label} is told by boxes, and dataset.boxes is null. Set dataset.label=folder, "
                "or name the boxes."
            )

    def manifest(self) -> Manifest:
        """Read the data set.

        Raises:
            ConfigError: the form of the boxes cannot be told.
            DataError: a folder or file is missing or of another form, there is no image, or no box belongs to one.
        """
        root = location(self.root, "root")
        problems = Problems()
        images = _images(root)
        heads = dict(zip(images, headers.read(root, images), strict=True))
        found = Found({}, "no boxes are given")
        if self.boxes is not None:
            boxes = location(self.boxes, "boxes")
            found = self._read(boxes, heads, problems)
            if not found.notes and not found.missing:
                raise DataError(
                    f"dataset.boxes={boxes}: nothing in it belongs to an image below dataset.root={root}, e.g. "
                    f"{shown(images[0])}. COCO's file_name, and the paths of VOC and YOLO files but for the ending, "
                    "must be those of images below dataset.root."
                )
        rows = [self._row(name, heads[name], found, problems) for name in images]
        rows += [_missing_row(name, why) for name, why in found.missing.items()]
        self._tell(root, rows, problems)
        columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True))
        manifest = rows_of({**columns, "path": columns["id"]})
        return Manifest(root.resolve().name or "images", manifest, FolderStore(root), {}, problems.sentences())

    def _read(self, boxes: Path, heads: Mapping[str, Header], problems: Problems) -> Found:
        """The annotations of all images."""
        form = self._form(boxes)
        if self.names is not None and form != "yolo":
            raise ConfigError(f"dataset.names={self.names} is for YOLO, and the boxes are {form}. Leave it out.")
        if form == "coco":
            return _read_coco(boxes, list(heads), problems)
        ending = ".xml" if form == "voc" else ".txt"
        names_file = self._names_file(boxes) if form == "yolo" else None
        ignored = {"classes.txt", *(name for name in [names_file and names_file.name] if name)}
        files = _annotation_files(boxes, ending, list(heads), ignored, problems)
        if names_file is None:
            notes = dict(zip(files, voc.read_all([str(boxes / file) for file in files.values()]), strict=True))
        else:
            names = yolo.read_names(names_file)
            notes = {
                image: yolo.read(boxes / file, names, heads[image].width, heads[image].height)
                for image, file in files.items()
            }
        for image, note in notes.items():
            if note.fault:
                problems.add("annotation not understood", shown(files[image]), note.fault)
        return Found(notes, f"it has no {ending} file")

    def _form(self, boxes: Path) -> str:
        """The form of the boxes, where it must be found out by what there is."""
        if not boxes.exists():
            raise DataError(f"dataset.boxes={boxes}: there is no such file or folder.")
        form = ("coco" if boxes.is_file() else _form_of(boxes)) if self.form == "auto" else self.form
        if boxes.is_file() != (form == "coco"):
            expected = "the JSON file" if form == "coco" else "a folder with a file for each image"
            raise DataError(f"dataset.boxes={boxes}: must be {expected} for dataset.form={form}.")
        return form

    def _names_file(self, boxes: Path) -> Path:
        if self.names is not None:
            return location(self.names, "names")
        places = (boxes, boxes.parent, location(self.root, "root"))
        found = yolo.find_names(places)
        if found is None:
            raise DataError(
                f"dataset.names=null: none of {', '.join(yolo.NAME_FILES)} is in {', '.join(map(str, places))}. Name "
                "the file with the names of the classes: a data.yaml, or a text file with one name a line."
            )
        return found

    def _row(self, name: str, head: Header, found: Found, problems: Problems) -> Row:
        note = found.notes.get(name)
        label = _folder_label(name) if self.label == "folder" else None
        row = Row(name, _origin(name), label, head.width or None, head.height or None)
        if head.fault is not None:
            return row._replace(status=Status.UNREADABLE, detail=f"{shown(name)}: {head.fault}")
        if note is None:
            return row._replace(status=Status.NO_ANNOTATION, detail=found.absent)
        fault = note.fault or _distrust(note, head)
        if fault is not None or note.boxes is None or note.names is None:
            if note.fault is None:
                problems.add("boxes not trusted", shown(name), str(fault))
            return row._replace(status=Status.BAD_ANNOTATION, detail=fault)
        names = [" ".join(storable(text).split()) for text in note.names]
        if self.label != "folder":
            row = row._replace(label=self._label_of(note.boxes, names))
        # Where a box has no name, nobody can say what else is in the image.
        row = row._replace(objects=sorted(set(names)) if all(names) else None)
        boxes = [_trimmed(box, head) for box in note.boxes]
        outside = next((box for box in boxes if not _inside(box, head)), None)
        if outside is not None:
            detail = f"box {outside} leaves the image of {head.width} x {head.height} px"
            problems.add("box outside", shown(name), detail)
            return row._replace(status=Status.BOX_OUTSIDE, detail=detail)
        if not boxes and self.label == "folder":
            detail = "no box is listed, so nobody knows where the foreground is"
            return row._replace(objects=None, status=Status.NO_ANNOTATION, detail=detail)
        return row._replace(boxes=boxes)

    def _label_of(self, boxes: Sequence[Sequence[int]], names: Sequence[str]) -> str | None:
        """The label that the boxes of an image tell."""
        chosen = set(names)
        if self.label == "largest_box" and boxes:
            areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in boxes]
            chosen = {name for name, area in zip(names, areas, strict=True) if area == max(areas)}
        return (chosen.pop() or None) if len(chosen) == 1 else None

    def _tell(self, root: Path, rows: Sequence[Row], problems: Problems) -> None:
        """Problems of the data set as a whole."""
        unlabelled = [row.id for row in rows if row.label is None and row.status != Status.UNREADABLE]
        if unlabelled:
            detail = f"{len(unlabelled)} of {len(rows)} images have no label, e.g. {shown(unlabelled[0])}"
            problems.add("images without label", str(root), f"{detail} (dataset.label={self.label})")
        labels = {row.label for row in rows} - {None}
        if len(labels) == 1:
            detail = f"all labels are {labels.pop()!r} (dataset.label={self.label}), so there is nothing to infer"
            problems.add("one label", str(root), detail)


class Row(NamedTuple):
    """A row of the manifest."""

    id: str
    origin: str
    label: str | None
    width: int | None
    height: int | None
    boxes: list[list[int]] | None = None
    objects: list[str] | None = None
    status: str = Status.OK
    detail: str | None = None


@dataclass(frozen=True)
class Found:
    """What annotations say.

    Attributes:
        notes: by image.
        absent: the detail of an image without a note.
        missing: why images that are annotated are not there, by name.
    """

    notes: Mapping[str, Note]
    absent: str
    missing: Mapping[str, str] = field(default_factory=dict)


def shown(name: str) -> str:
    r"""A file's name in a sentence: line breaks and the like as escapes.

    >>> print(shown("a\nb.jpg"))
    a\nb.jpg
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


def _images(root: Path) -> list[str]:
    if not root.is_dir():
        raise DataError(f"dataset.root={root}: there is no such folder.")
    files = FolderStore(root).names()
    images = [name for name in files if name.lower().endswith(SUFFIXES) and not _file_name(name).startswith(".")]
    if not images:
        raise DataError(
            f"dataset.root={root}: there is no image among {len(files)} files; an image ends in {', '.join(SUFFIXES)}."
        )
    return images


def _file_name(name: str) -> str:
    return name.rpartition("/")[2]


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.rpartition(".")[0]


def _split_origin(name: str) -> tuple[str | None, list[str]]:
    """The origin that a path tells, and its other folders but those called images or the like."""
    folders = name.split("/")[:-1]
    place = 1 if len(folders) > 1 and _NO_CLASS.fullmatch(folders[0]) else 0
    found = _ORIGIN.fullmatch(folders[place]) if folders else None
    others = [folder for at, folder in enumerate(folders) if not (found and at == place)]
    origin = next((part.lower() for part in found.groups() if part), None) if found else None
    return origin, [folder for folder in others if not _NO_CLASS.fullmatch(folder)]


def _origin(name: str) -> str:
    return _split_origin(name)[0] or "train"


def _folder_label(name: str) -> str | None:
    return next(iter(_split_origin(name)[1]), None)


def _key(name: str) -> str:
    """A path by which files of an image are found: without folders called images or the like, accents composed."""
    *folders, file = unicodedata.normalize("NFC", name.replace("\\", "/")).split("/")
    return "/".join([*(folder for folder in folders if folder != "." and not _NO_CLASS.fullmatch(folder)), file])


class Lookup:
    """Images by path, and by file name alone."""

    def __init__(self, names: Iterable[str], part: Callable[[str], str]) -> None:
        """Index the names.

        Args:
            names: paths of images.
            part: what of a path is looked up: all of it, or the path without ending.
        """
        self._exact, self._by_key, self._by_file = set(names), defaultdict(list), defaultdict(list)
        for name in sorted(self._exact):
            key = _key(part(name))
            self._by_key[key].append(name)
            self._by_file[_file_name(key)].append(name)

    def find(self, path: str) -> list[str]:
        """The images that a path means: none, one, or several where it does not tell."""
        if path in self._exact:
            return [path]
        key = _key(path)
        return self._by_key.get(key) or ([] if "/" in key else self._by_file.get(key, []))


def _form_of(boxes: Path) -> str:
    endings = {Path(name).suffix.lower() for name in FolderStore(boxes).names()}
    found = [form for form, ending in (("voc", ".xml"), ("yolo", ".txt")) if ending in endings]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"dataset.form=auto: dataset.boxes={boxes} holds .xml and .txt files. Set dataset.form to voc or yolo."
        )
    hint = " For COCO name the .json file itself." if ".json" in endings else ""
    raise DataError(f"dataset.boxes={boxes}: there is no .xml file (VOC) and no .txt file (YOLO).{hint}")


def _annotation_files(
    boxes: Path, ending: str, images: Sequence[str], ignored: set[str], problems: Problems
) -> dict[str, str]:
    """The annotation file of each image that has one, both as paths below their folders."""
    lookup = Lookup(images, _stem)
    found: dict[str, str] = {}
    orphans = []
    for file in FolderStore(boxes).names():
        if not file.lower().endswith(ending) or _file_name(file).startswith(".") or _file_name(file) in ignored:
            continue
        meant = lookup.find(_stem(file))
        if not meant:
            orphans.append(file)
        elif len(meant) > 1:
            detail = f"may belong to {len(meant)} images, e.g. {shown(meant[0])} and {shown(meant[1])}, so to none"
            problems.add("file of several images", shown(file), detail)
        elif found.setdefault(meant[0], file) != file:
            detail = f"not read, since {shown(found[meant[0]])} is for the same image"
            problems.add("second file of an image", shown(file), detail)
    if orphans:
        detail = f"{len(orphans)} {ending} files belong to no image, e.g. {shown(orphans[0])}"
        problems.add("files without image", str(boxes), detail)
    return found


def _read_coco(file: Path, images: Sequence[str], problems: Problems) -> Found:
    """The boxes of an instances file."""
    name = str(file)
    try:
        content = read_file(file)
    except OSError as error:
        raise DataError(f"dataset.boxes={file}: cannot be read: {error}.") from error
    read = instances.parsed(name, content, "Give an instances file as COCO has them.")
    listing = _Listing(name, problems, Lookup(images, str))
    for number, entry in instances.entries(name, read, "images", problems):
        listing.add(number, entry)
    listing.check_ids()
    categories = instances.categories(name, read, problems)
    for number, entry in instances.entries(name, read, "annotations", problems):
        listing.annotate(number, entry, categories)
    for image, fault in listing.faults.items():
        listing.notes[image] = Note(fault=fault)
    if listing.missing:
        detail = f"{len(listing.missing)} images that it lists are not there, e.g. {shown(next(iter(listing.missing)))}"
        problems.add("missing images", name, detail)
    return Found(listing.notes, f"{file.name} does not list it", listing.missing)


class _Listing:
    """The images of an instances file, as they are found in the folder."""

    def __init__(self, file: str, problems: Problems, lookup: Lookup) -> None:
        self.file, self.problems, self.lookup = file, problems, lookup
        self.images: dict[instances.Key, set[str]] = defaultdict(set)
        self.notes: dict[str, Note] = {}
        self.faults: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    def add(self, number: int, entry: Mapping[str, Any]) -> None:
        """An entry of the list of images; one that cannot be used is a problem."""
        key, name = entry.get("id"), entry.get("file_name")
        where = f"entry {number} of images"
        if not instances.is_key(key) or not isinstance(name, str) or not name.strip():
            detail = f"{where} must have an id and a file_name, got {str(key)[:20]!r}, {str(name)[:80]!r}"
            self.problems.add("bad entry of images", self.file, detail)
            return
        if _leads_out(name):
            detail = f"{where} names {storable(name)[:80]!r}, which is not below dataset.root; it is left out"
            self.problems.add("image outside the folder", self.file, detail)
            # Known, so that its boxes are no problem of their own.
            self.images[key].add("")
            return
        meant = self.lookup.find(name)
        if len(meant) > 1:
            detail = f"{where} names {shown(name)[:80]!r}, which may be {shown(meant[0])} or {shown(meant[1])}"
            self.problems.add("image not certain", self.file, detail)
            self.faults |= dict.fromkeys(meant, f"{Path(self.file).name}, {detail}")
        image = meant[0] if len(meant) == 1 else ""
        self.images[key].add(image)
        if not meant:
            self.missing[storable(name)] = f"{Path(self.file).name} lists it, and it is not there"
        if image in self.notes:
            self.problems.add("image listed twice", self.file, f"{where} lists {shown(image)} again")
        elif image:
            self.notes[image] = Note(instances.side(entry.get("width")), instances.side(entry.get("height")), [], [])

    def check_ids(self) -> None:
        """An id of several images says of no box whose it is."""
        for key, images in self.images.items():
            if len(images) > 1:
                detail = f"the image id {str(key)[:20]!r} is given to several images"
                self.problems.add("image id given twice", self.file, detail)
                self.faults |= dict.fromkeys(images - {""}, f"{Path(self.file).name}: {detail}")

    def annotate(self, number: int, entry: Mapping[str, Any], categories: Mapping[instances.Key, str]) -> None:
        """An entry of the list of annotations; what is wrong with it is a fault of its image."""
        key = entry.get("image_id")
        if not instances.is_key(key) or key not in self.images:
            detail = f"annotation {number} is for the unknown image id {str(key)[:20]!r}"
            self.problems.add("annotation without image", self.file, detail)
            return
        try:
            name, box = instances.category(entry.get("category_id"), categories), instances.box(entry.get("bbox"))
        except ValueError as error:
            detail = f"annotation {number}: {error}"
            self.problems.add("malformed annotation", self.file, detail)
            for image in self.images[key] - {""}:
                self.faults.setdefault(image, f"{Path(self.file).name}, {detail}")
            return
        for image in self.images[key] - {""}:
            boxes, names = self.notes[image].boxes, self.notes[image].names
            if boxes is not None and names is not None:
                boxes.append(box)
                names.append(name)


def _leads_out(name: str) -> bool:
    """True for an absolute path, on any system, and for one that leads out of its folder."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or parts[0].endswith(":") or "\0" in name


def _distrust(note: Note, head: Header) -> str | None:
    """Why the boxes of an image say nothing of the pixels that are stored; None where they can be trusted."""
    said, stored = (note.width, note.height), (head.width, head.height)
    if None not in said and said != stored:
        turned = " (EXIF turns it)" if said == stored[::-1] and head.orientation != UPRIGHT else ""
        return (
            f"it is annotated at {said[0]} x {said[1]} px, and is stored with {stored[0]} x {stored[1]} px{turned}; "
            "scale the boxes, or take the images that were annotated"
        )
    if head.orientation != UPRIGHT and note.boxes and (said != stored or head.width == head.height):
        return (
            f"EXIF turns it (orientation {head.orientation}), and nobody knows which way up it was annotated; store "
            "it upright"
        )
    for box in note.boxes or []:
        if box[0] >= box[2] or box[1] >= box[3]:
            return f"box {box} has no area"
    return None


def _trimmed(box: Sequence[int], head: Header) -> list[int]:
    """The box without what leaves the image by up to `SLACK_PX`."""
    xmin, ymin, xmax, ymax = box
    return [
        0 if -SLACK_PX <= xmin < 0 else xmin,
        0 if -SLACK_PX <= ymin < 0 else ymin,
        head.width if head.width < xmax <= head.width + SLACK_PX else xmax,
        head.height if head.height < ymax <= head.height + SLACK_PX else ymax,
    ]


def _inside(box: Sequence[int], head: Header) -> bool:
    return 0 <= box[0] < box[2] <= head.width and 0 <= box[1] < box[3] <= head.height


def _missing_row(name: str, why: str) -> Row:
    return Row(name, _origin(name), None, None, None, status=Status.UNREADABLE, detail=f"{shown(name)}: {why}")
