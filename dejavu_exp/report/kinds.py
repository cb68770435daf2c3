"""What differs between reports of the label test and of the object test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import polars as pl

from dejavu_exp.report import labels, pairs

Figures: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """How the figures of one kind of run are shown.

    Attributes:
        template: the page, in `templates`.
        title: what the terminal's table shows.
        key: column that tells the rows of a reference apart.
        values: columns shown without their interval; left out where there is little room.
        gaps: columns shown with it.
        compared: what references are compared by.
        rows_of: one row per reference and key, as text.
        parts: what the template needs beside the figures, from figures and scores.
    """

    template: str
    title: str
    key: str
    values: tuple[str, ...]
    gaps: tuple[str, ...]
    compared: str
    rows_of: Callable[[Figures], list[dict[str, str]]]
    parts: Callable[[Figures, pl.DataFrame], dict[str, Any]]


KINDS = {
    "label": Kind(
        template="labels.html",
        title="top-1 accuracy, %",
        key="surest",
        values=("target", "reference's"),
        gaps=("gap", "gap, unseen", "corrected gap"),
        compared="gap",
        rows_of=labels.rows_of,
        parts=labels.parts,
    ),
    "objects": Kind(
        template="pairs.html",
        title="objects found, encoder less reference, points",
        key="predicted",
        values=("PPG", "AUCG"),
        gaps=("PRG", "PRG, unseen", "corrected PRG"),
        compared="PRG",
        rows_of=pairs.rows_of,
        parts=pairs.parts,
    ),
}
"""By what a run infers."""
