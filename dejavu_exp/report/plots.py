"""Plots as inline SVG pictures; no pyplot, so nothing global is touched."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from dejavu_exp import metrics
from dejavu_exp.tables import Role, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

TARGET, REFERENCE, UNSEEN = "#b3261e", "#1f5fa8", "#7a7a7a"
CORRECTED, INTERVAL = "#3f6b4f", "#000000"
QUADRANT_COLOURS = ("#b3261e", "#e8a33d", "#1f5fa8", "#d9d9d9")
UNDEFINED = "#ededed"
MEASURES = {
    "kappa_memorized": "kappa of memorized",
    "kappa_correct": "kappa of being right",
    "jaccard_memorized": "Jaccard of memorized",
    "jaccard_correlated": "Jaccard of correlated",
    "rank_correlation": "rank correlation",
}
"""Measures of agreement and their titles."""
PANELS_IN_A_ROW = 3
ROUNDING = 1e-9
"""Recalls this close are equal: 2/3 is not below a grid's 0.66666."""


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _uri(figure: Figure) -> str:
    """The picture as a data URI. Dates and random ids are left out: the same figures give the same bytes."""
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "dejavu_exp"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def gaps(found: Mapping[str, Sequence[Mapping[str, Any] | None]], xlabel: str) -> str:
    """Gap on target rows, on unseen rows and the corrected one, with intervals.

    Args:
        found: these three estimates by name of the reference; None where there is none.
        xlabel: what they are.
    """
    names = list(found)
    figure, axes = _figure(7.2, 1.0 + 0.62 * len(names))
    kinds = (("gap, target rows", TARGET), ("gap, unseen rows", UNSEEN), ("corrected gap", CORRECTED))
    for offset, (title, colour) in enumerate(kinds):
        for place, name in enumerate(names):
            estimate = found[name][offset]
            if estimate is None or estimate["value"] is None:
                continue
            value, low, high = (_percent(estimate[key]) for key in ("value", "low", "high"))
            y = place + 0.26 * (offset - 1)
            axes.barh(y, value, 0.24, color=colour)
            axes.plot([low, high], [y, y], color=INTERVAL, linewidth=1.4)
        axes.barh(0, 0, color=colour, label=title)  # in the legend even where no reference has this gap
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel(xlabel)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _uri(figure)


def recalls(scores: pl.DataFrame, prediction: str, name: str) -> str:
    """Share of target rows whose recall is at least x, for encoder and reference; the area between them is the AUCG.

    Args:
        scores: columns of `tables.OBJECT_SCORES`, one reference.
        prediction: one of `tables.PREDICTIONS`.
        name: of the reference.
    """
    figure, axes = _figure(5.0, 3.0)
    used = scores.filter(pl.col("role") == Role.TARGET, pl.col("status") == Status.OK)
    curves = []
    grid = np.linspace(0, 1, 201)
    for who in ("target", "reference"):
        recall = np.sort(used[f"{who}_recall_{prediction}"].drop_nulls().to_numpy())
        below = np.searchsorted(recall, grid - ROUNDING)
        curves.append(100 * (1 - below / len(recall)) if len(recall) else np.full(len(grid), np.nan))
    axes.fill_between(100 * grid, curves[0], curves[1], color=TARGET, alpha=0.15, linewidth=0)
    for curve_of, colour, label in zip(curves, (TARGET, REFERENCE), ("encoder under test", name), strict=True):
        axes.plot(100 * grid, curve_of, color=colour, label=label)
    axes.set_xlabel("recall of a row, at least, %")
    axes.set_ylabel("% of target rows")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, fontsize=8)
    return _uri(figure)


def curve(role: Mapping[str, Any], name: str) -> str:
    """Accuracy of target and reference against the most confident share of rows; the band is the gap's interval."""
    figure, axes = _figure(5.0, 3.0)
    found = role["curve"]
    x = found["percent"]
    reference = np.array([_percent(value) for value in found["reference"]])
    low, high = (np.array([_percent(value) for value in found[key]]) for key in ("gap_low", "gap_high"))
    band = np.clip([reference + low, reference + high], 0, 100)
    axes.fill_between(x, band[0], band[1], color=TARGET, alpha=0.15, linewidth=0)
    axes.plot(x, [_percent(value) for value in found["target"]], color=TARGET, marker=".", label="encoder under test")
    axes.plot(x, reference, color=REFERENCE, marker=".", label=name)
    axes.set_xlabel("most confident rows, %")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, min(axes.get_ylim()[1], 102))
    axes.legend(frameon=False, fontsize=8)
    return _uri(figure)


def quadrants(roles: Mapping[str, Any]) -> str:
    """Shares of memorized, correlated, forgotten and unassociated rows."""
    figure, axes = _figure(5.0, 0.7 + 0.55 * len(roles))
    for place, role in enumerate(reversed(list(roles))):
        left = 0.0
        for name, colour in zip(metrics.QUADRANTS, QUADRANT_COLOURS, strict=True):
            share = _percent(roles[role]["quadrants"][name]["value"])
            axes.barh(place, share, left=left, color=colour, label=name if place == 0 else None)
            if share >= 6:
                dark = name in ("memorized", "forgotten")
                axes.text(
                    left + share / 2,
                    place,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                )
            left += share
    axes.set_yticks(range(len(roles)), list(reversed(list(roles))))
    axes.set_xlabel("% of rows")
    axes.grid(visible=False)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _uri(figure)


def histogram(scores: pl.DataFrame) -> str:
    """Memorization scores of target and unseen rows, as shares of their role."""
    figure, axes = _figure(5.0, 2.6)
    defined = scores.filter(pl.col("memorization_score").is_not_null())
    if len(defined):
        values = defined["memorization_score"]
        edges = np.linspace(float(values.min()) - 1e-9, float(values.max()) + 1e-9, 31)  # type: ignore[arg-type]
        for role, colour in (("unseen", UNSEEN), ("target", TARGET)):
            part = defined.filter(pl.col("role") == role)["memorization_score"].to_numpy()
            if len(part):
                weights = np.full(len(part), 100 / len(part))
                axes.hist(
                    part, edges.tolist(), weights=weights, color=colour, alpha=0.55, label=f"{role}, {len(part)} rows"
                )
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("memorization score of a row")
    axes.set_ylabel("% of rows")
    return _uri(figure)


def agreement(names: Sequence[str], matrix: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Heat maps of how far every two references agree, a small one per measure, with the values in the cells.

    Args:
        names: of the references, in the order of the matrices.
        matrix: by measure, of values from -1 to 1; None where undefined.
    """
    from matplotlib import colors
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = {measure: title for measure, title in MEASURES.items() if measure in matrix}
    rows = -(-len(shown) // PANELS_IN_A_ROW)
    side = 0.45 * len(names) + 0.4
    margin = 0.075 * max(map(len, names), default=0)
    figure = Figure(
        figsize=(margin + PANELS_IN_A_ROW * max(side, 2.0), rows * (side + 0.7 * margin + 0.4)), layout="constrained"
    )
    FigureCanvasSVG(figure)
    panels = figure.subplots(rows, PANELS_IN_A_ROW, squeeze=False).flat
    # Red and blue as elsewhere are target and reference: agreement has colours of its own.
    colours = colors.LinearSegmentedColormap.from_list("agreement", ["#7a4a9e", "#ffffff", CORRECTED]).with_extremes(
        bad=UNDEFINED
    )
    for place, axes in enumerate(panels):
        if place >= len(shown):
            axes.set_axis_off()
            continue
        measure, title = list(shown.items())[place]
        _heat_map(axes, names, matrix[measure], colours)
        axes.set_title(title, fontsize=9)
        axes.tick_params(
            length=0, labelleft=place % PANELS_IN_A_ROW == 0, labelbottom=place + PANELS_IN_A_ROW >= len(shown)
        )
    return _uri(figure)


def _heat_map(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float | None]], colours: Colormap) -> None:
    cells = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=np.float64)
    axes.imshow(np.ma.masked_invalid(cells), cmap=colours, vmin=-1, vmax=1)
    for (row, column), value in np.ndenumerate(cells):
        text = "–" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # no minus before a zero
        colour = "white" if abs(value) > 0.75 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.spines[:].set_visible(False)
