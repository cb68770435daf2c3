"""The figures of the label test as they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from dejavu_exp.report import plots
from dejavu_exp.report.wording import percent, rows_behind

MOST_CLASSES = 50


def widest(figures: Mapping[str, Any]) -> str:
    """The largest confident share the run reports, in %; "100" unless the scoring leaves it out."""
    shares: Iterable[str] = figures["references"][figures["headline"]]["roles"]["target"]["top1"]
    return max(shares, key=float)


def rows_of(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per reference and confident fraction: accuracies, gaps, and the rows behind them."""
    rows = []
    for name, found in figures["references"].items():
        for fraction, cell in found["roles"]["target"]["top1"].items():
            unseen = found["roles"].get("unseen", {}).get("top1", {}).get(fraction, {})
            rows.append(
                {
                    "reference": name,
                    "surest": f"{fraction} %",
                    "target": percent(cell["target"]),
                    "reference's": percent(cell["reference"]),
                    "gap": percent(cell["gap"]),
                    "gap, unseen": percent(unseen.get("gap")),
                    "corrected gap": percent(found.get("corrected_gap", {}).get("top1", {}).get(fraction)),
                    "rows": rows_behind(cell["gap"], unseen.get("gap")),
                }
            )
    return rows


def parts(figures: Mapping[str, Any], scores: pl.DataFrame) -> dict[str, Any]:
    """What the page needs beside the figures: tables, and plots as data URIs."""
    fraction = widest(figures)
    gaps = {
        name: (
            found["roles"]["target"]["top1"][fraction]["gap"],
            found["roles"].get("unseen", {}).get("top1", {}).get(fraction, {}).get("gap"),
            found.get("corrected_gap", {}).get("top1", {}).get(fraction),
        )
        for name, found in figures["references"].items()
    }
    references = {
        name: {
            **found,
            "curve": plots.curve(found["roles"]["target"], name),
            "quadrants": plots.quadrants(found["roles"]),
            "histogram": plots.histogram(scores.filter(pl.col("reference") == name)),
            "classes": sorted(found["per_class"], key=_by_gap)[:MOST_CLASSES],
            "more_classes": max(len(found["per_class"]) - MOST_CLASSES, 0),
        }
        for name, found in figures["references"].items()
    }
    return {
        "references": references,
        "gaps": plots.gaps(gaps, f"percentage points, {fraction} % most confident rows"),
        "widest": fraction,
    }


def _by_gap(row: Mapping[str, Any]) -> tuple[float, str]:
    """Largest gap first; undefined ones last."""
    value = row["gap"]["value"]
    return (float("inf") if value is None else -value, row["label"])
