"""What differs between reports of the label test and of the object test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import polars as pl

from dejavu_exp.report import labels, pairs
from dejavu_exp.report.settings import ReportSettings

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
        answer: what is inferred from a row; heads a column.
        rows_of: one row per reference and key, as text.
        gaps_of: the headline's gap to a reference, from figures and name: on target rows, on unseen ones, corrected.
        answers: that column, from the scores.
        parts: what the template needs beside the figures, from figures, scores and settings.
    """

    template: str
    title: str
    key: str
    values: tuple[str, ...]
    gaps: tuple[str, ...]
    compared: str
    answer: str
    rows_of: Callable[[Figures], list[dict[str, str]]]
    gaps_of: Callable[[Figures, str], tuple[Figures | None, ...]]
    answers: Callable[[Figures], pl.Expr]
    parts: Callable[[Figures, pl.DataFrame, ReportSettings], dict[str, Any]]


KINDS = {
    "label": Kind(
        template="labels.html",
        title="top-1 accuracy, %",
        key="surest",
        values=("target", "reference's"),
        gaps=("gap", "gap, unseen", "corrected gap"),
        compared="gap",
        answer="label",
        rows_of=labels.rows_of,
        gaps_of=labels.gaps_of,
        answers=labels.answers,
        parts=labels.parts,
    ),
    "objects": Kind(
        template="pairs.html",
        title="objects found, encoder less reference, points",
        key="predicted",
        values=("PPG", "AUCG"),
        gaps=("PRG", "PRG, unseen", "corrected PRG"),
        compared="PRG",
        answer="objects",
        rows_of=pairs.rows_of,
        gaps_of=pairs.gaps_of,
        answers=pairs.answers,
        parts=pairs.parts,
    ),
}
"""By what a run infers."""
