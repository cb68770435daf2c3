"""Annotation files in the form of COCO: JSON with the lists images, annotations and categories."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from dejavu_exp.datasets.annotations import MAX_PIXELS, Problems, storable, whole_box
from dejavu_exp.errors import DataError

Key = int | str
"""What images and categories are numbered with; some tools write text."""


def parsed(file: str, content: bytes, way_out: str) -> dict[str, Any]:
    """The file's content; segmentations, nine tenths of it, are dropped while it is read.

    Args:
        file: its name, for errors.
        content: its bytes.
        way_out: what a user can do where it is no JSON; a sentence.

    Raises:
        DataError: it is no JSON, or no JSON object.
    """
    try:
        found = json.loads(content, object_hook=_lean)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is no JSON ({error}). {way_out}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: must hold one object with the lists images and annotations.")
    return found


def _lean(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


def entries(
    file: str, content: Mapping[str, Any], key: str, problems: Problems
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The entries of a list, numbered from 1; one that is no object is a problem.

    Raises:
        DataError: there is no such list.
    """
    found = content.get(key)
    if not isinstance(found, list):
        raise DataError(f"{file}: must hold a list {key}, as COCO publishes it.")
    for number, entry in enumerate(found, start=1):
        if isinstance(entry, dict):
            yield number, entry
        else:
            problems.add(f"bad entry of {key}", file, f"entry {number} of {key} is no object")


def categories(file: str, content: Mapping[str, Any], problems: Problems) -> dict[Key, str]:
    """Names of the categories by their numbers.

    Raises:
        DataError: there is no list of categories.
    """
    return {
        category["id"]: storable(category["name"])
        for _, category in entries(file, content, "categories", problems)
        if is_key(category.get("id")) and isinstance(category.get("name"), str)
    }


def is_key(value: object) -> TypeGuard[Key]:
    """True for what may number an image or a category."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def side(value: object) -> int | None:
    """Width or height; where it is no number of pixels, the image tells."""
    return value if type(value) is int and 0 < value <= MAX_PIXELS else None


def category(key: object, names: Mapping[Key, str]) -> str:
    """The name of an annotation's category.

    Raises:
        ValueError: there is no such category.
    """
    if not is_key(key) or key not in names:
        raise ValueError(f"its category_id {str(key)[:20]!r} is none of the {len(names)} categories")
    return names[key]


def box(values: object) -> list[int]:
    """[x, y, width, height] with fractions as whole pixels that hold all of the object.

    Raises:
        ValueError: they are not four numbers that an image can have.

    >>> box([1, 2.5, 10, 20])
    [1, 2, 11, 23]
    """
    if not isinstance(values, list) or len(values) != 4 or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"its bbox must be four numbers: x, y, width, height, got {str(values)[:80]!r}")
    try:
        x, y, width, height = map(float, values)
    except OverflowError:
        raise ValueError("a box must have coordinates that an image can have") from None
    # Published with two decimals, whose sum in binary can lie a hair above the image's border.
    return whole_box([x, y, round(x + width, 3), round(y + height, 3)])
