"""The figures of the object test as they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from dejavu_exp.report import plots
from dejavu_exp.report.settings import ReportSettings
from dejavu_exp.report.wording import percent, rows_behind
from dejavu_exp.scoring.objects import OPTIMISTIC_WARNING
from dejavu_exp.tables import PREDICTIONS

PREDICTED = {"all": "all objects", "top10": "10 objects", "top1": "1 object"}
"""Predictions in words."""
RANKINGS = {
    "object_gap": "objects found, encoder less reference",
    "min_distance": "distance to the nearest public row",
    "correct_objects": "objects found by the encoder",
    "split_half": "one half of the objects, measured on the other",
}
"""Rankings of the fine-grained figures in words."""
MEASURES = {
    "target_recall": "recall, encoder",
    "reference_recall": "recall, reference",
    "target_precision": "precision, encoder",
    "reference_precision": "precision, reference",
    "target_f": "F, encoder",
    "reference_f": "F, reference",
    "prg": "PRG, by recall",
    "ppg": "PPG, by precision",
    "aucg": "AUCG, mean recall difference",
    "precision_gap": "mean precision difference",
    "f_gap": "mean F difference",
}
"""Figures of a role and prediction in words."""


def predictions(figures: Mapping[str, Any]) -> list[str]:
    """The run's predictions, the headline first."""
    role = figures["references"][figures["headline"]]["roles"]["target"]
    return [name for name in role if name in PREDICTIONS]


def rows_of(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per reference and prediction: gaps, and the rows behind them."""
    rows = []
    for name, found in figures["references"].items():
        for prediction in predictions(figures):
            cell = found["roles"]["target"][prediction]
            raw, unseen, corrected = _gaps_at(found, prediction)
            rows.append(
                {
                    "reference": name,
                    "predicted": PREDICTED[prediction],
                    "PRG": percent(raw),
                    "PRG, unseen": percent(unseen),
                    "corrected PRG": percent(corrected),
                    "PPG": percent(cell["ppg"]),
                    "AUCG": percent(cell["aucg"]),
                    "rows": rows_behind(cell["prg"], unseen),
                }
            )
    return rows


def gaps_of(figures: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any] | None, ...]:
    """The headline's PRG to a reference: on target rows, on unseen rows, and corrected; None where there is none."""
    return _gaps_at(figures["references"][name], predictions(figures)[0])


def _gaps_at(found: Mapping[str, Any], prediction: str) -> tuple[Mapping[str, Any] | None, ...]:
    return (
        found["roles"]["target"][prediction]["prg"],
        found["roles"].get("unseen", {}).get(prediction, {}).get("prg"),
        found.get("corrected", {}).get(prediction, {}).get("prg"),
    )


def parts(figures: Mapping[str, Any], scores: pl.DataFrame, settings: ReportSettings) -> dict[str, Any]:
    """What the page needs beside the figures: tables and plots."""
    headline = predictions(figures)[0]
    references = {
        name: {
            **found,
            "recalls": plots.recalls(scores.filter(pl.col("reference") == name), headline, name),
            "quadrants": plots.quadrants(found["roles"], name),
            "histogram": plots.histogram(scores.filter(pl.col("reference") == name), name),
            "fine": _fine_grained(found["roles"]),
            "objects": found["per_object"][: settings.classes],
            "n_objects": len(found["per_object"]),
            "n_gained": sum(1 for row in found["per_object"] if (row["gap"]["low"] or 0) > 0),
        }
        for name, found in figures["references"].items()
    }
    gaps = {name: gaps_of(figures, name) for name in references}
    return {
        "references": references,
        "gaps": plots.gaps(gaps, f"PRG, percentage points, {PREDICTED[headline]} predicted"),
        "means": _means(figures),
        "predictions": {name: PREDICTED[name] for name in predictions(figures)},
        "told": MEASURES,
        "rankings": RANKINGS,
        "optimistic": OPTIMISTIC_WARNING,
    }


def answers(figures: Mapping[str, Any]) -> pl.Expr:
    """What is to be inferred from a row of the scores, in words."""
    return pl.col("objects").list.join(", ")


def _means(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per reference and prediction: mean precision, recall and F of target rows."""
    return [
        {
            "reference": name,
            "predicted": PREDICTED[prediction],
            **{
                title: percent(found["roles"]["target"][prediction][measure])
                for measure, title in MEASURES.items()
                if measure.startswith(("target_", "reference_"))
            },
        }
        for name, found in figures["references"].items()
        for prediction in predictions(figures)
    ]


def _fine_grained(roles: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per ranking and share: gaps of the rows that the ranking puts first, and what unseen rows give."""
    unseen = roles.get("unseen", {}).get("fine_grained", {})
    return [
        {
            "ranking": ranking,
            "optimistic": cell["optimistic"],
            "percent": share,
            "n": cell["n"],
            "recall_gap": percent(cell["recall_gap"]),
            "precision_gap": percent(cell["precision_gap"]),
            "f_gap": percent(cell["f_gap"]),
            "unseen": percent(unseen.get(ranking, {}).get(share, {}).get("recall_gap")),
        }
        for ranking, cells in roles["target"].get("fine_grained", {}).items()
        for share, cell in cells.items()
    ]
