"""The report as one HTML file: pictures inside, nothing fetched, no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import polars as pl
from markupsafe import Markup

from dejavu_exp.report import plots
from dejavu_exp.report.gallery import GalleryItem
from dejavu_exp.report.kinds import KINDS, Kind
from dejavu_exp.report.settings import ReportSettings
from dejavu_exp.report.wording import coefficient, p_value, percent, plain
from dejavu_exp.tables import Role

if TYPE_CHECKING:
    import jinja2

SCRIPT = (resources.files("dejavu_exp.report") / "templates" / "page.js").read_text("utf-8")
"""All that runs in a page: sorting and filtering of tables."""
NO_PICTURES: Mapping[str, bytes] = MappingProxyType({})
DEFAULTS = ReportSettings()


def render(
    figures: Mapping[str, Any],
    scores: pl.DataFrame,
    gallery: Sequence[GalleryItem],
    settings: ReportSettings = DEFAULTS,
    pictures: Mapping[str, bytes] = NO_PICTURES,
) -> str:
    """The whole report.

    Args:
        figures: what figures.json holds.
        scores: columns of `tables.SCORES` or `tables.OBJECT_SCORES`, as the figures' kind has them.
        gallery: most memorized images or pairs, best first.
        settings: what may be shown; without images, neither pictures nor captions of the gallery are.
        pictures: JPEGs of copies between roles, by id.
    """
    kind = KINDS[figures["infers"]]
    return (
        environment()
        .get_template(kind.template)
        .render(
            f=figures,
            contents=[],
            rows=kind.rows_of(figures),
            tiles=_tiles(figures, kind),
            **kind.parts(figures, scores, settings),
            agreement=_agreement(figures),
            measures=plots.MEASURES,
            costs=_costs(figures),
            gallery=gallery,
            with_images=settings.with_images,
            pictures=pictures if settings.with_images else NO_PICTURES,
            most=settings.listed,
            listed=_listed(figures, scores, kind, settings.listed),
            answer=kind.answer,
            compared=kind.compared,
            config=json.dumps(figures["run"]["config"], indent=2),
            level=100 * figures["run"]["config"].get("scoring", {}).get("level", 0.95),
        )
    )


@cache
def environment() -> jinja2.Environment:
    """The templates, their filters, and what every page has."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("dejavu_exp.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "coefficient": coefficient,
        "jpeg": _jpeg,
        "number": _number,
        "p": p_value,
        "plain": plain,
        "short": _short,
    }
    # With this digest in its policy the page runs this script and no other, whatever its texts hold.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    made.globals |= {"script": Markup(SCRIPT), "script_digest": digest}
    return made


def _tiles(figures: Mapping[str, Any], kind: Kind) -> list[dict[str, str]]:
    """The headline in a few numbers: those that the run has."""
    name = figures["headline"]
    found = figures["references"][name]
    raw, _, corrected = kind.gaps_of(figures, name)
    told = "corrected " if corrected else ""
    shown = {f"{told}{kind.compared} to {name}, points": percent(corrected or raw)}
    if found.get("rate"):
        shown["target rows memorized, estimated, %"] = percent(found["rate"])
    detected = found.get("detected")
    if detected:
        rate = f"{100 * detected['rate']:g} %"
        shown[f"target rows listed at a false-discovery rate of {rate}"] = f"{detected['n']} of {detected['n_tested']}"
    smallest = found.get("power", {}).get("corrected_gap" if corrected else "gap")
    if smallest is not None:
        shown[f"smallest {told}{kind.compared} these rows can show, points"] = f"{100 * smallest:.1f}"
    parts = {title: text.partition(" [") for title, text in shown.items()}
    return [{"name": title, "value": part[0], "range": part[1].strip() + part[2]} for title, part in parts.items()]


def _listed(figures: Mapping[str, Any], scores: pl.DataFrame, kind: Kind, most: int) -> dict[str, list[dict[str, Any]]]:
    """The target rows whose q-value is at most the false-discovery rate, surest first, by reference; `most` of each."""
    found = {name: facts["detected"] for name, facts in figures["references"].items() if facts.get("detected")}
    if not found or "q_value" not in scores.columns:
        return {name: [] for name in found}
    targets = scores.filter(pl.col("role") == Role.TARGET, pl.col("q_value").is_not_null())
    return {
        name: targets.filter(pl.col("reference") == name, pl.col("q_value") <= detected["rate"])
        .sort(["p_value", "memorization_score", "id"], descending=[False, True, False])
        .head(most)
        .select("id", "memorization_score", "p_value", "q_value", answer=kind.answers(figures))
        .to_dicts()
        for name, detected in found.items()
    }


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


def _short(text: str, most: int = 80) -> str:
    """Text that stays one line, for names that a page says in a sentence."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
