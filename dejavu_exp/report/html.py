"""The report as one HTML file: pictures inside, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from dejavu_exp.report import plots
from dejavu_exp.report.gallery import GalleryItem
from dejavu_exp.report.kinds import KINDS
from dejavu_exp.report.wording import coefficient, percent


def render(figures: Mapping[str, Any], scores: pl.DataFrame, gallery: Sequence[GalleryItem]) -> str:
    """The whole report.

    Args:
        figures: what figures.json holds.
        scores: columns of `tables.SCORES` or `tables.OBJECT_SCORES`, as the figures' kind has them.
        gallery: most memorized images or pairs, best first.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dejavu_exp.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "coefficient": coefficient, "jpeg": _jpeg, "number": _number}
    kind = KINDS[figures["infers"]]
    return environment.get_template(kind.template).render(
        f=figures,
        rows=kind.rows_of(figures),
        **kind.parts(figures, scores),
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


def _jpeg(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
