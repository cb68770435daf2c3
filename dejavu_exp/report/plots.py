"""Plots as SVG to stand in a page, in the colours of its style sheet; no pyplot, so nothing global is touched."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from markupsafe import Markup

from dejavu_exp import metrics
from dejavu_exp.tables import Role, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

TARGET, REFERENCE, UNSEEN, CORRECTED = "#b3261e", "#1f5fa8", "#7a7a7a", "#3f6b4f"
INK, PAGE, GRID = "#000000", "#ffffff", "#e6e6e6"
BOTH, NEITHER = "#e8a33d", "#d9d9d9"
QUADRANT_COLOURS = (TARGET, BOTH, REFERENCE, NEITHER)
ON_DARK, ON_LIGHT = "#fffffe", "#111111"
"""Of text on the two darker and on the two lighter of these."""
VARIABLES = {
    INK: "ink",
    PAGE: "page",
    GRID: "grid",
    TARGET: "target",
    REFERENCE: "reference",
    UNSEEN: "unseen",
    CORRECTED: "corrected",
    BOTH: "both",
    NEITHER: "neither",
    ON_DARK: "on-dark",
    ON_LIGHT: "on-light",
}
"""Colours that the page's style sheet decides, which has other values for dark screens."""
UNDEFINED = "#ededed"
LABEL_LENGTH = 52
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


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty plot; inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(made)
    axes = made.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return made, axes


def svg(drawn: Figure, name: str) -> Markup:
    """The plot as an element of a page: its text is text, its colours are the page's, nothing else is around it.

    Dates and random ids are left out: the same figures give the same bytes. An id that something refers to is this
    plot's own, for a page holds many, and some of them alike.

    Args:
        drawn: the plot.
        name: what it shows; no two plots of a page show the same and have the same name.
    """
    import matplotlib as mpl

    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": "dejavu_exp", "svg.fonttype": "none"}):
        drawn.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # The rules in it would hold for the whole page; the page's style sheet has them.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _variable, text)
    text = re.sub(r" ?font-family: [^;\"]*;| transform=\"rotate\(-0 [^\"]*\"", "", text)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", text))
    own = f"p{hashlib.sha256(f'{name} {text}'.encode()).hexdigest()[:8]}"
    text = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{own}{found[1]}"' if found[1] in used else "", text)
    return Markup(re.sub(r"(url\(|href=\")#", rf"\1#{own}", text))


def _variable(found: re.Match[str]) -> str:
    name = VARIABLES.get(found[2])
    return f"{found[1]}: var(--{name})" if name else found[0]


def label(text: str) -> str:
    """Text for a plot: matplotlib takes $ for formulas and hides what begins with _."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(shown) > LABEL_LENGTH:
        shown = f"{shown[: LABEL_LENGTH // 2]}…{shown[-LABEL_LENGTH // 2 + 1 :]}"
    return f"{' ' if shown.startswith('_') else ''}{shown}".replace("$", r"\$")


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def gaps(found: Mapping[str, Sequence[Mapping[str, Any] | None]], xlabel: str) -> Markup:
    """Gap on target rows, on unseen rows and the corrected one, with intervals.

    Args:
        found: these three estimates by name of the reference; None where there is none.
        xlabel: what they are.
    """
    names = list(found)
    drawn, axes = figure(5.4, 1.0 + 0.62 * len(names))
    kinds = (("gap, target rows", TARGET), ("gap, unseen rows", UNSEEN), ("corrected gap", CORRECTED))
    for offset, (title, colour) in enumerate(kinds):
        for place, name in enumerate(names):
            estimate = found[name][offset]
            if estimate is None or estimate["value"] is None:
                continue
            value, low, high = (_percent(estimate[key]) for key in ("value", "low", "high"))
            y = place + 0.26 * (offset - 1)
            axes.barh(y, value, 0.24, color=colour)
            axes.plot([low, high], [y, y], color=INK, linewidth=1.4)
        axes.barh(0, 0, color=colour, label=title)  # in the legend even where no reference has this gap
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_xlabel(xlabel)
    drawn.legend(frameon=False, fontsize=9, ncols=3, loc="outside upper center")
    return svg(drawn, "gaps")


def recalls(scores: pl.DataFrame, prediction: str, name: str) -> Markup:
    """Share of target rows whose recall is at least x, for encoder and reference; the area between them is the AUCG.

    Args:
        scores: columns of `tables.OBJECT_SCORES`, one reference.
        prediction: one of `tables.PREDICTIONS`.
        name: of the reference.
    """
    drawn, axes = figure(5.0, 3.0)
    used = scores.filter(pl.col("role") == Role.TARGET, pl.col("status") == Status.OK)
    curves = []
    grid = np.linspace(0, 1, 201)
    for who in ("target", "reference"):
        recall = np.sort(used[f"{who}_recall_{prediction}"].drop_nulls().to_numpy())
        below = np.searchsorted(recall, grid - ROUNDING)
        curves.append(100 * (1 - below / len(recall)) if len(recall) else np.full(len(grid), np.nan))
    axes.fill_between(100 * grid, curves[0], curves[1], color=TARGET, alpha=0.15, linewidth=0)
    for curve_of, colour, who in zip(curves, (TARGET, REFERENCE), ("encoder under test", label(name)), strict=True):
        axes.plot(100 * grid, curve_of, color=colour, label=who)
    axes.set_xlabel("recall of a row, at least, %")
    axes.set_ylabel("% of target rows")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, fontsize=9)
    return svg(drawn, name)


def curve(role: Mapping[str, Any], name: str) -> Markup:
    """Accuracy of target and reference against the most confident share of rows; the band is the gap's interval."""
    drawn, axes = figure(5.0, 3.0)
    found = role["curve"]
    x = found["percent"]
    reference = np.array([_percent(value) for value in found["reference"]])
    low, high = (np.array([_percent(value) for value in found[key]]) for key in ("gap_low", "gap_high"))
    band = np.clip([reference + low, reference + high], 0, 100)
    axes.fill_between(x, band[0], band[1], color=TARGET, alpha=0.15, linewidth=0)
    axes.plot(x, [_percent(value) for value in found["target"]], color=TARGET, marker=".", label="encoder under test")
    axes.plot(x, reference, color=REFERENCE, marker=".", label=label(name))
    axes.set_xlabel("most confident rows, %")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, min(axes.get_ylim()[1], 102))
    axes.legend(frameon=False, fontsize=9)
    return svg(drawn, name)


def quadrants(roles: Mapping[str, Any], name: str) -> Markup:
    """Shares of memorized, correlated, forgotten and unassociated rows against the reference `name`."""
    drawn, axes = figure(5.0, 0.7 + 0.55 * len(roles))
    for place, role in enumerate(reversed(list(roles))):
        left = 0.0
        for quadrant, colour in zip(metrics.QUADRANTS, QUADRANT_COLOURS, strict=True):
            share = _percent(roles[role]["quadrants"][quadrant]["value"])
            axes.barh(place, share, left=left, color=colour, label=quadrant if place == 0 else None)
            if share >= 6:
                dark = quadrant in ("memorized", "forgotten")
                axes.text(
                    left + share / 2,
                    place,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    color=ON_DARK if dark else ON_LIGHT,
                )
            left += share
    axes.set_yticks(range(len(roles)), list(reversed(list(roles))))
    axes.set_xlabel("% of rows")
    axes.grid(visible=False)
    drawn.legend(frameon=False, fontsize=9, ncols=4, loc="outside upper center")
    return svg(drawn, name)


def histogram(scores: pl.DataFrame, name: str) -> Markup:
    """Memorization scores of target and unseen rows against the reference `name`, as shares of their role."""
    drawn, axes = figure(5.0, 2.6)
    defined = scores.filter(pl.col("memorization_score").is_not_null())
    if len(defined):
        values = defined["memorization_score"]
        edges = np.linspace(float(values.min()) - 1e-9, float(values.max()) + 1e-9, 31)  # type: ignore[arg-type]
        for role, colour in (("unseen", UNSEEN), ("target", TARGET)):
            part = defined.filter(pl.col("role") == role)["memorization_score"].to_numpy()
            if len(part):
                shares = 100 * np.histogram(part, edges)[0] / len(part)
                axes.stairs(shares, edges, fill=True, color=colour, alpha=0.5, label=f"{role}, {len(part)} rows")
        axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("memorization score of a row")
    axes.set_ylabel("% of rows")
    return svg(drawn, name)


def agreement(names: Sequence[str], matrix: Mapping[str, Sequence[Sequence[float | None]]]) -> Markup:
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
    drawn = Figure(
        figsize=(margin + PANELS_IN_A_ROW * max(side, 2.0), rows * (side + 0.7 * margin + 0.4)), layout="constrained"
    )
    FigureCanvasSVG(drawn)
    panels = drawn.subplots(rows, PANELS_IN_A_ROW, squeeze=False).flat
    # Red and blue as elsewhere are target and reference: agreement has colours of its own.
    colours = colors.LinearSegmentedColormap.from_list("agreement", ["#7a4a9e", "#fdfdfd", "#2f6b45"]).with_extremes(
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
    return svg(drawn, "agreement")


def _heat_map(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float | None]], colours: Colormap) -> None:
    cells = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=np.float64)
    # Cells as shapes: `imshow` would put a bitmap into the page.
    axes.pcolormesh(np.ma.masked_invalid(cells), cmap=colours, vmin=-1, vmax=1)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(cells):
        text = "–" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # no minus before a zero
        # Cells keep their colours on dark screens, so their text does too.
        colour = "#fcfcfc" if abs(value) > 0.6 else "#101010"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=colour)
    places, shown = np.arange(len(names)) + 0.5, [label(name) for name in names]
    axes.set_xticks(places, shown, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(places, shown, fontsize=8)
    axes.spines[:].set_visible(False)
