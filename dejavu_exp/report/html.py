"""The report as one HTML file: pictures inside, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import polars as pl

from dejavu_exp.report import plots
from dejavu_exp.report.gallery import GalleryItem
from dejavu_exp.report.terminal import coefficient, percent, rows_of, widest

MOST_CLASSES = 50


def render(figures: Mapping[str, Any], scores: pl.DataFrame, gallery: Sequence[GalleryItem]) -> str:
    """The whole report.

    Args:
        figures: what figures.json holds.
        scores: columns of `tables.SCORES`.
        gallery: most memorized images, best first.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "coefficient": coefficient, "jpeg": _jpeg, "number": _number}
    template = environment.from_string(
        resources.files("dejavu_exp.report").joinpath("template.html").read_text("utf-8")
    )
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
    fraction = widest(figures)
    return template.render(
        f=figures,
        rows=rows_of(figures),
        references=references,
        gaps=plots.gaps(figures, fraction),
        widest=fraction,
        agreement=_agreement(figures),
        measures=plots.MEASURES,
        costs=_costs(figures),
        gallery=gallery,
        config=json.dumps(figures["run"]["config"], indent=2),
        level=100 * figures["run"]["config"].get("scoring", {}).get("level", 0.95),
    )


def _agreement(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far the references agree, with the picture where there are two; None where a run has not compared them."""
    found = figures.get("agreement")
    if not found:
        return None
    share = found["correlated_by_all"]
    return {
        **found,
        "picture": plots.agreement(found["references"], found["matrix"]) if found["pairs"] else None,
        "count": None if share["value"] is None else round(share["value"] * share["n_used"]),
    }


def _costs(figures: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each reference, where the run has timed it."""
    seconds = figures["run"]["seconds"]
    return {name: seconds[f"references/{name}"] for name in figures["references"] if f"references/{name}" in seconds}


def _by_gap(row: Mapping[str, Any]) -> tuple[float, str]:
    """Largest gap first; undefined ones last."""
    value = row["gap"]["value"]
    return (float("inf") if value is None else -value, row["label"])


def _jpeg(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
