"""The manifest: what every reader of a data set returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import polars as pl

from dejavu_exp import tables
from dejavu_exp.datasets.stores import ImageStore


@dataclass(frozen=True)
class Manifest:
    """All images of a data set with what is known of them.

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
        object.__setattr__(
            self, "rows", tables.validate(self.rows, tables.MANIFEST, f"manifest of {self.name}").sort("id")
        )


class Dataset(Protocol):
    """A data set as configured: cheap to build; `manifest()` reads it."""

    def manifest(self) -> Manifest:
        """Read the data set.

        Raises:
            DataError: a file that must be there is missing or cannot be understood.
        """
        ...
