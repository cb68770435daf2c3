"""The figures of the label test as they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from dejavu_exp.report import plots
from dejavu_exp.report.settings import ReportSettings
from dejavu_exp.report.wording import percent, rows_behind


def widest(figures: Mapping[str, Any]) -> str:
    """The largest confident share the run reports, in %; "100" unless the scoring leaves it out."""
    shares: Iterable[str] = figures["references"][figures["headline"]]["roles"]["target"]["top1"]
    return max(shares, key=float)


def rows_of(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per reference and confident fraction: accuracies, gaps, and the rows behind them."""
    rows = []
    for name, found in figures["references"].items():
        for fraction, cell in found["roles"]["target"]["top1"].items():
            raw, unseen, corrected = _gaps_at(found, fraction)
            rows.append(
                {
                    "reference": name,
                    "surest": f"{fraction} %",
                    "target": percent(cell["target"]),
                    "reference's": percent(cell["reference"]),
                    "gap": percent(raw),
                    "gap, unseen": percent(unseen),
                    "corrected gap": percent(corrected),
                    "rows": rows_behind(cell["gap"], unseen),
                }
            )
    return rows


def gaps_of(figures: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any] | None, ...]:
    """The headline's gap to a reference: on target rows, on unseen rows, and corrected; None where there is none."""
    return _gaps_at(figures["references"][name], widest(figures))


def _gaps_at(found: Mapping[str, Any], fraction: str) -> tuple[Mapping[str, Any] | None, ...]:
    return (
        found["roles"]["target"]["top1"][fraction]["gap"],
        found["roles"].get("unseen", {}).get("top1", {}).get(fraction, {}).get("gap"),
        found.get("corrected_gap", {}).get("top1", {}).get(fraction),
    )


def parts(figures: Mapping[str, Any], scores: pl.DataFrame, settings: ReportSettings) -> dict[str, Any]:
    """What the page needs beside the figures: tables and plots."""
    fraction = widest(figures)
    references = {
        name: {
            **found,
            "curve": plots.curve(found["roles"]["target"], name),
            "quadrants": plots.quadrants(found["roles"], name),
            "histogram": plots.histogram(scores.filter(pl.col("reference") == name), name),
            "classes": sorted(found["per_class"], key=_by_gap)[: settings.classes],
            "n_classes": len(found["per_class"]),
        }
        for name, found in figures["references"].items()
    }
    gaps = {name: gaps_of(figures, name) for name in references}
    return {
        "references": references,
        "gaps": plots.gaps(gaps, f"percentage points, {fraction} % most confident rows"),
        "widest": fraction,
    }


def answers(figures: Mapping[str, Any]) -> pl.Expr:
    """What is to be inferred from a row of the scores, in words."""
    names = {
        row["label"]: row.get("name", row["label"])
        for found in figures["references"].values()
        for row in found["per_class"]
    }
    return pl.col("label").replace(names)


def _by_gap(row: Mapping[str, Any]) -> tuple[float, str]:
    """Largest gap first; undefined ones last."""
    value = row["gap"]["value"]
    return (float("inf") if value is None else -value, row["label"])
