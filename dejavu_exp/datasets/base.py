"""The manifest: what every reader of a data set returns."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import polars as pl

from dejavu_exp import tables
from dejavu_exp.datasets.stores import ImageStore

_LISTS = ("objects", "tags")
_NAME = pl.element().str.normalize("NFC")


@dataclass(frozen=True)
class Manifest:
    """All images of a data set with what is known of them.

    Names of classes, objects and tags are brought into Unicode's form NFC: in another form they look the same, and
    would be counted as others.

    Attributes:
        name: the data set's name, for titles and cache folders.
        rows: one row an image, columns as in `tables.MANIFEST`; sorted by id.
        store: gives the bytes of a row's `path`.
        class_names: readable name of a label, where there is one.
        problems: what the reader could not read, one sentence each, naming the file.
    """

    name: str
    rows: pl.DataFrame
    store: ImageStore
    class_names: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows = tables.validate(self.rows, tables.MANIFEST, f"manifest of {self.name}").sort("id")
        label, lists = pl.col("label").str.normalize("NFC"), [pl.col(name).list.eval(_NAME) for name in _LISTS]
        object.__setattr__(self, "rows", rows.with_columns(label, *lists))
        names = {unicodedata.normalize("NFC", label): name for label, name in self.class_names.items()}
        object.__setattr__(self, "class_names", names)


class Dataset(Protocol):
    """A data set as configured: cheap to build; `manifest()` reads it."""

    def manifest(self) -> Manifest:
        """Read the data set.

        Raises:
            DataError: a file that must be there is missing or cannot be understood.
        """
        ...
