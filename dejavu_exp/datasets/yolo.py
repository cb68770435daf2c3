"""Annotation files in the form of YOLO: one text file an image, and the names of the classes beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from dejavu_exp.datasets.annotations import storable, whole_box
from dejavu_exp.datasets.stores import read_file
from dejavu_exp.datasets.voc import Note
from dejavu_exp.errors import DataError

NAME_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
"""What files with the names of the classes are called."""
UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)
"""What PyYAML raises, beside its own errors, for a value that is not what its tag says, as in `!!bool dog`."""
MAX_BYTES = 1 << 24
"""A longer file is no annotation of one image, and no list of names."""


def find_names(folders: Sequence[Path]) -> Path | None:
    """The first file with names of classes in some folders, or None."""
    return next((folder / name for folder in folders for name in NAME_FILES if (folder / name).is_file()), None)


def read_names(path: Path) -> dict[int, str]:
    """Names of the classes by their numbers.

    Args:
        path: a YAML file with `names`, a list or a mapping of numbers; or a text file with one name a line, that of
            class 0 first.

    Raises:
        DataError: it cannot be read, or has another form.
    """
    try:
        text = _text(path)
        if path.suffix.lower() in (".yaml", ".yml"):
            content = yaml.safe_load(text)
            named = content.get("names") if isinstance(content, dict) else None
        else:
            named = text.rstrip().splitlines()
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise DataError(f"dataset.names={path}: cannot be read: {error}.") from error
    if isinstance(named, list):
        named = dict(enumerate(named))
    if not isinstance(named, dict) or not named:
        raise DataError(
            f"dataset.names={path}: must hold the names of the classes: in YAML a list or mapping `names`, in a text "
            "file one name a line."
        )
    for number, name in named.items():
        if type(number) is not int or not isinstance(name, str) or not name.strip():
            raise DataError(
                f"dataset.names={path}: the name of class {str(number)[:20]!r} must be a text, and classes have whole "
                "numbers; quote a name that YAML takes for something else."
            )
    return {number: storable(name.strip()) for number, name in named.items()}


def read(path: Path, names: Mapping[int, str], width: int, height: int) -> Note:
    """A note on one file; faults are returned, not raised.

    Args:
        path: of the file, with lines `class cx cy w h`; the centre and the sides are shares of the image's.
        names: of the classes.
        width: of the image, pixels.
        height: likewise.
    """
    boxes: list[list[int]] = []
    found: list[str] = []
    try:
        for number, line in enumerate(_text(path).splitlines(), start=1):
            if line.strip():
                name, box = _object(line.split(), f"line {number}", names, width, height)
                found.append(name)
                boxes.append(box)
    except (OSError, ValueError) as error:
        return Note(fault=str(error))
    # The file says no size, so there is none to compare with the image's.
    return Note(None, None, boxes, found)


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"is longer than {MAX_BYTES} bytes")
    return read_file(path).decode("utf-8-sig")


def _object(
    fields: Sequence[str], where: str, names: Mapping[int, str], width: int, height: int
) -> tuple[str, list[int]]:
    if len(fields) != 5:
        raise ValueError(f"{where}: must have 5 fields, class cx cy w h, not {len(fields)}")
    number, *texts = fields
    if not (number.isdecimal() and len(number) < 10 and int(number) in names):
        raise ValueError(f"{where}: class {number[:20]!r} is none of the {len(names)} classes")
    try:
        shares = [float(text) for text in texts]
    except ValueError:
        shares = []
    # Written so that NaN fails too.
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"{where}: cx cy w h must be shares from 0 to 1, got {' '.join(texts)[:80]!r}")
    x, y, wide, tall = shares
    ends = [(x - wide / 2) * width, (y - tall / 2) * height, (x + wide / 2) * width, (y + tall / 2) * height]
    # Thousandths of a pixel are what is left of the decimals that such files are written with.
    return names[int(number)], whole_box([round(end, 3) for end in ends])
