"""A comparison of runs as HTML, Markdown, plots and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dejavu_exp import metrics, tables
from dejavu_exp.report import plots
from dejavu_exp.report.html import environment
from dejavu_exp.report.terminal import WIDTH
from dejavu_exp.report.wording import markdown_cell, markdown_table, p_value, percent, plain

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 40
MOST_REFERENCES = 3
MOST_SWEEPS = 6
MOST_LINES = 8
MOST_ROWS = 40
MOST_SKIPPED = 20
LOG_RANGE = 30
"""A setting whose largest value is this many times the smallest is drawn on a logarithmic axis."""
LINE_COLOURS = (plots.TARGET, plots.REFERENCE, plots.CORRECTED, plots.BOTH, "#8064b8", "#2a8f9c", "#a06a35", "#c2508f")
TRAINED_HERE, READY_MADE = plots.TARGET, plots.REFERENCE
TWO_KINDS = (
    "Runs that infer labels and runs that infer objects stand in tables and plots of their own: accuracy and recall, "
    "gap and PRG are different quantities."
)


@dataclass(frozen=True)
class Wording:
    """How runs of one kind are told.

    Attributes:
        name: of the kind, where both are there.
        sentence: what the figures are.
        title: of the table in the terminal.
        rows: which rows of the table are shown.
        key: column of the table that tells rows of a reference apart, and its heading.
        accuracies: headings of target_accuracy and reference_accuracy.
        gaps: headings of gap, gap_unseen and corrected_gap.
        accuracy: of a plot's axis.
        shares: what the quadrants are.
    """

    name: str
    sentence: str
    title: str
    rows: pl.Expr
    key: tuple[str, str]
    accuracies: tuple[str, str]
    gaps: tuple[str, str, str]
    accuracy: str
    shares: str


WORDINGS = {
    "label": Wording(
        name="labels",
        sentence="Top-1 accuracy at naming the label from the view alone, in % with the runs' own bootstrap intervals. "
        "The gap is the encoder's accuracy less the reference's, each on its own most confident rows; the corrected "
        "gap is the gap on target rows less the gap on unseen rows, which holds what the encoder merely knows better.",
        title="Top-1 accuracy, % [interval]",
        rows=pl.col("top") == "top1",
        key=("surest", "surest"),
        accuracies=("target", "reference's"),
        gaps=("gap", "gap, unseen", "corrected gap"),
        accuracy="accuracy on target rows, %",
        shares="Memorized: the encoder alone names the label; correlated: both do; forgotten: the reference alone; "
        "unassociated: neither.",
    ),
    "objects": Wording(
        name="objects",
        sentence="Mean recall of the objects in an image named from the view alone, in % with the runs' own bootstrap "
        "intervals. PRG is the share of rows where the encoder finds more of the objects than the reference less the "
        "share where it finds fewer; the corrected PRG is that of target rows less that of unseen rows, which holds "
        "what the encoder merely knows better. Predicted: all objects with any evidence, or the 10 or the 1 with most.",
        title="Objects found: mean recall and PRG, % [interval]",
        rows=pl.lit(value=True),
        key=("top", "predicted"),
        accuracies=("recall", "reference's"),
        gaps=("PRG", "PRG, unseen", "corrected PRG"),
        accuracy="mean recall on target rows, %",
        shares="Memorized: the encoder finds more of the objects; correlated: both find equally many; forgotten: the "
        "reference finds more; unassociated: neither finds any.",
    ),
}
"""By what a run infers."""


@dataclass(frozen=True)
class Skipped:
    """A run folder that was left out, and why."""

    run: str
    reason: str


TESTS: tables.Schema = {
    "first": pl.String,
    "second": pl.String,
    "reference": pl.String,  # whose rows of scores.parquet were read
    "role": pl.String,
    "n_used": pl.Int64,  # rows that both runs measured
    "difference": pl.Float64,  # share of them the first has right less that of the second; of objects, mean recall
    "p_permutation": pl.Float64,
    "p_mcnemar": pl.Float64,  # null in object runs
    "p_holm": pl.Float64,  # p_permutation, adjusted for all tests of the table
}


@dataclass(frozen=True)
class Comparison:
    """Many runs in one table.

    Attributes:
        table: a row per run, reference, top and confident share; of an object run, `top` is the prediction.
        settings: columns of the table that are keys of the configuration: those that tell the runs apart.
        skipped: run folders left out.
        files: where it was written, the report first; none where it was not.
        tests: paired tests of two runs on the rows that both measured, columns of `TESTS`; none where there are none.
    """

    table: pl.DataFrame
    settings: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    files: tuple[Path, ...] = ()
    tests: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(TESTS)))

    def kinds(self) -> list[Comparison]:
        """A comparison of the runs that infer labels, and one of those that infer objects; those that there are."""
        parts = {kind: self.table.filter(pl.col("infers") == kind) for kind in WORDINGS}
        return [replace(self, table=table) for table in parts.values() if len(table)]

    @property
    def wording(self) -> Wording:
        """How the runs are told; of one kind only."""
        return WORDINGS[self.table["infers"][0]]

    def shown(self) -> pl.DataFrame:
        """The rows that are told, of one kind of runs."""
        return self.table.filter(self.wording.rows)

    def widest(self) -> pl.DataFrame:
        """One row per run and reference: top-1 at the largest confident share, or the headline's prediction."""
        return self.table.unique(["run", "reference"], keep="first", maintain_order=True)

    def runs(self) -> pl.DataFrame:
        """The first row of each run."""
        return self.table.unique("run", keep="first", maintain_order=True)

    def references(self) -> list[str]:
        """Those most often the headline of a run first, then the most frequent."""
        counts = self.widest().group_by("reference").agg(pl.col("headline").sum(), pl.len())
        return counts.sort(["headline", "len", "reference"], descending=[True, True, False])["reference"].to_list()


@dataclass(frozen=True)
class Series:
    """Runs that differ in one setting, in its order.

    Attributes:
        group: what they share and other series do not.
        rows: of the table, top-1 and the widest share; sorted by the setting, at least two values of it.
    """

    group: str
    rows: pl.DataFrame

    def gap(self) -> str:
        """The column of the gap that every row has: corrected where possible, else raw."""
        return "gap" if self.rows["corrected_gap"].null_count() else "corrected_gap"


@dataclass(frozen=True)
class Sweep:
    """What one setting does to the figures against one reference.

    Attributes:
        setting: the column of the table: a key of the configuration, or "epoch".
        reference: the reference's name.
        along: settings that change whenever this one does, so that their effects cannot be told apart.
        series: one per encoder and remaining configuration.
    """

    setting: str
    reference: str
    along: tuple[str, ...]
    series: tuple[Series, ...]


def sweeps(comparison: Comparison) -> list[Sweep]:
    """Each numeric setting with at least two values among otherwise equal runs, against each reference."""
    table = comparison.widest().with_columns(encoder_name=_encoder_names(comparison.widest()))
    found = []
    for setting in _axes(comparison):
        for reference in comparison.references():
            if setting.startswith("references.") and setting.split(".")[1] != reference:
                continue
            rows = table.filter(pl.col("reference") == reference, pl.col(setting).is_not_null())
            others = [
                key
                for key in comparison.settings
                if key != setting and (not key.startswith("references.") or key.split(".")[1] == reference)
            ]
            sweep = _sweep(rows, setting, reference, others)
            found += [sweep] if sweep.series else []
    return found


def _axes(comparison: Comparison) -> list[str]:
    """Settings that make an axis: numbers, but no seeds; and the epoch, where no setting says the same."""
    runs = comparison.runs()
    settings = [key for key in comparison.settings if runs[key].dtype.is_numeric() and key.rsplit(".", 1)[-1] != "seed"]
    epoch = runs["epoch"]
    said = any(runs[key].cast(pl.Float64).equals(epoch.cast(pl.Float64)) for key in settings)
    return settings if said or epoch.n_unique() < 2 else ["epoch", *settings]


def _sweep(rows: pl.DataFrame, setting: str, reference: str, others: Sequence[str]) -> Sweep:
    along = [key for key in others if _moves_along(rows, setting, key)]
    group = ["encoder_name", *(key for key in others if key not in along)]
    parts = [
        part.sort(setting, maintain_order=True)
        for _, part in rows.group_by(group, maintain_order=True)
        if part[setting].n_unique() > 1
    ]
    telling = [key for key in group if _tells(parts, key)]
    series = [Series(_group_name(part, telling), part) for part in parts]
    return Sweep(setting, reference, tuple(along), tuple(series))


def _tells(parts: Sequence[pl.DataFrame], key: str) -> bool:
    """True where a key tells series apart that the encoder's name does not."""
    pairs = {(part["encoder_name"][0], part[key][0]) for part in parts}
    return len(pairs) > (1 if key == "encoder_name" else len({name for name, _ in pairs}))


def _moves_along(rows: pl.DataFrame, setting: str, key: str) -> bool:
    """True where each value of `key` goes with one value of the setting, and the reverse, for every encoder.

    A checkpoint's path does so with its epoch: to hold it fixed would leave nothing to draw.
    """
    counts = rows.group_by("encoder_name").agg(
        pairs=pl.struct(setting, key).n_unique(), values=pl.col(setting).n_unique(), others=pl.col(key).n_unique()
    )
    counts = counts.filter(pl.col("others") > 1)
    return bool(len(counts) and (counts["pairs"].eq(counts["values"]) & counts["pairs"].eq(counts["others"])).all())


def _group_name(part: pl.DataFrame, telling: Sequence[str]) -> str:
    short = [key.rsplit(".", 1)[-1] for key in telling]
    names = [key if short.count(name) > 1 else name for key, name in zip(telling, short, strict=True)]
    values = [plain(part[key][0]) for key in telling]
    told = [
        value if key == "encoder_name" else f"{name} {value}"
        for key, name, value in zip(telling, names, values, strict=True)
    ]
    return ", ".join(told) or str(part["encoder_name"][0])


def _encoder_names(table: pl.DataFrame) -> pl.Series:
    return pl.Series([_encoder(row) for row in table.iter_rows(named=True)], dtype=pl.String)


def _encoder(row: Mapping[str, Any]) -> str:
    """The encoder in few words."""
    name = str(row["encoder"]).split(",")[0]
    return f"{name} (random weights)" if row["random_weights"] else name


def _estimate(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {"value": row[column], "low": row[f"{column}_low"], "high": row[f"{column}_high"]}


def headline_rows(table: pl.DataFrame, wording: Wording) -> list[dict[str, str]]:
    """Rows of a comparison to be read: the figures in % with their intervals."""
    optional = {"both directions": "both_directions", "planted AUROC": "planted_auroc"}
    shown = dict(zip(wording.accuracies, ("target_accuracy", "reference_accuracy"), strict=True))
    shown |= dict(zip(wording.gaps, ("gap", "gap_unseen", "corrected_gap"), strict=True))
    shown |= {name: column for name, column in optional.items() if table[column].count()}
    column, heading = wording.key
    return [
        {
            "run": row["run"],
            "encoder": _encoder(row),
            "reference": row["reference"],
            heading: row[column] if isinstance(row[column], str) else f"{row[column]:g} %",
            **{name: percent(_estimate(row, column)) for name, column in shown.items()},
            "rows": f"{plain(row['gap_n_used'])} ({plain(row['gap_n_excluded'])} excluded)",
        }
        for row in table.iter_rows(named=True)
    ]


def run_rows(comparison: Comparison) -> list[dict[str, str]]:
    """One row per run: what was measured, what it is good for, and the settings that tell the runs apart."""
    utility = [
        name.removesuffix("_n_used")
        for name in comparison.table.columns
        if name.startswith("utility_") and name.endswith("_n_used")
    ]
    return [
        {
            "run": row["run"],
            # Without the arguments of its architecture, which a run's own report has.
            "encoder": row["encoder"].split(", arch_args")[0] + (" (random weights)" if row["random_weights"] else ""),
            "weights": row["weights"],
            "trained here": plain(row["trained_here"]),
            "epoch": plain(row["epoch"]),
            "dataset": row["dataset"],
            "split": row["split"],
            **({"infers": row["infers"]} if len(comparison.kinds()) > 1 else {}),
            **{name.removeprefix("utility_"): _number(_estimate(row, name)) for name in utility},
            **{key: plain(row[key]) for key in comparison.settings},
        }
        for row in comparison.runs().iter_rows(named=True)
    ]


def test_rows(comparison: Comparison) -> list[dict[str, str]]:
    """One row per test of two runs."""
    return [
        {
            "first run": row["first"],
            "second run": row["second"],
            "reference": row["reference"],
            "role": row["role"],
            "rows": plain(row["n_used"]),
            "difference, points": "–" if row["difference"] is None else f"{100 * row['difference']:.1f}",
            "p, permutation": p_value(row["p_permutation"]),
            "p, McNemar": p_value(row["p_mcnemar"]),
            "p, adjusted": p_value(row["p_holm"]),
        }
        for row in comparison.tests.iter_rows(named=True)
    ]


def _number(estimate: Mapping[str, float | None]) -> str:
    """An estimate in its own unit with its interval."""
    if estimate["value"] is None:
        return "–"
    low, high = (_digits(estimate[end]) for end in ("low", "high"))
    return f"{_digits(estimate['value'])} [{low}, {high}]"


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def notes(comparison: Comparison) -> list[str]:
    """What to be aware of: sentences."""
    runs = comparison.runs()
    sentences = [TWO_KINDS] if len(comparison.kinds()) > 1 else []
    if runs["split"].n_unique() > 1:
        sentences.append(
            f"The runs measure {runs['split'].n_unique()} different sets of rows (column split): a difference between "
            "them may come from the rows."
        )
    if runs["random_weights"].any():
        sentences.append("Runs with random weights say nothing of a trained model.")
    if comparison.widest()["corrected_gap"].null_count():
        sentences.append(
            "Some runs have no unseen rows: their raw gap is not separated from what the encoder knows better."
        )
    return sentences


def markdown(comparison: Comparison) -> str:
    """The comparison to be read as text: the figures, the runs, and what was left out."""
    runs = len(comparison.runs())
    figures = [
        text
        for kind in comparison.kinds()
        for text in (kind.wording.sentence, markdown_table(headline_rows(kind.shown(), kind.wording)))
    ]
    parts = [
        f"# Comparison of {runs} run{'s' if runs != 1 else ''}",
        *notes(comparison),
        *figures,
        "## The runs",
        "After the split: utility measures, in their own units, and the settings that tell the runs apart.",
        markdown_table(run_rows(comparison)),
        "## Left out",
        "\n".join(f"- {markdown_cell(item.run)}: {markdown_cell(item.reason)}" for item in comparison.skipped)
        or "Nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def html(comparison: Comparison) -> str:
    """The comparison as one file: pictures inside, nothing fetched, no script but the page's own."""
    return (
        environment()
        .get_template("comparison.html")
        .render(
            notes=notes(comparison),
            kinds=[_kind_parts(kind) for kind in comparison.kinds()],
            tests=test_rows(comparison),
            runs=run_rows(comparison),
            skipped=comparison.skipped,
            most_lines=MOST_LINES,
        )
    )


def _kind_parts(comparison: Comparison) -> dict[str, Any]:
    """What the page shows of the runs of one kind."""
    names = comparison.references()
    drawn = names[:MOST_REFERENCES]
    found = [sweep for sweep in sweeps(comparison) if sweep.reference in drawn]
    by_reference = {name: comparison.widest().filter(pl.col("reference") == name) for name in drawn}
    return {
        "wording": comparison.wording,
        "rows": headline_rows(comparison.shown(), comparison.wording),
        "sweeps": [(sweep, accuracy_plot(sweep), gap_plot(sweep)) for sweep in found[:MOST_SWEEPS]],
        "more_sweeps": [f"{sweep.setting} against {sweep.reference}" for sweep in found[MOST_SWEEPS:]],
        "shares": [(name, share_plot(rows), _cap(len(rows))) for name, rows in by_reference.items()],
        "gaps": [(name, encoder_plot(rows), _cap(len(rows))) for name, rows in by_reference.items()],
        "more_references": names[MOST_REFERENCES:],
    }


def _cap(count: int) -> str:
    """Says so where not all bars are drawn."""
    return f"The {MOST_BARS} largest of {count}; the table has them all." if count > MOST_BARS else ""


def _points(rows: pl.DataFrame, column: str) -> tuple[list[float], list[float], list[float]]:
    """Values and interval ends in %; NaN where undefined."""
    value, low, high = (
        [math.nan if cell is None else 100 * cell for cell in rows[name]]
        for name in (column, f"{column}_low", f"{column}_high")
    )
    return value, low, high


def accuracy_plot(sweep: Sweep) -> Markup:
    """Accuracy of the encoder (solid, with its interval) and of the reference (dashed) by the setting."""
    drawn, axes = _figure(5.0, 2.9, 0.65, _legend_rows(sweep))
    lines = sweep.series[:MOST_LINES]
    for series, colour in zip(lines, LINE_COLOURS, strict=False):
        x = series.rows[sweep.setting].to_list()
        value, low, high = _points(series.rows, "target_accuracy")
        axes.fill_between(x, low, high, color=colour, alpha=0.18 / len(lines) ** 0.5, linewidth=0)
        axes.plot(x, value, color=colour, marker=".", label=plots.label(series.group))
        axes.plot(x, _points(series.rows, "reference_accuracy")[0], color=colour, linestyle="--", linewidth=1)
    axes.plot([], [], color=plots.INK, linestyle="--", linewidth=1, label=plots.label(sweep.reference))
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, 0), min(top, 102))
    _finish(axes, sweep, _wording(sweep.series[0].rows).accuracy)
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return plots.svg(drawn, sweep.reference)


def gap_plot(sweep: Sweep) -> Markup:
    """The corrected gap by the setting; raw and hollow where a series has no other. Colours as in `accuracy_plot`."""
    drawn, axes = _figure(5.0, 2.9, 0.65, _legend_rows(sweep))
    for series, colour in zip(sweep.series, LINE_COLOURS, strict=False):
        x, column = series.rows[sweep.setting].to_list(), series.gap()
        value, low, high = _points(series.rows, column)
        raw = column == "gap"
        axes.vlines(x, low, high, color=colour, linewidth=1.4, alpha=0.6)
        axes.plot(x, value, color=colour, marker="o", markersize=4, markerfacecolor=plots.PAGE if raw else colour)
    axes.axhline(0, color=plots.INK, linewidth=0.8)
    columns = {series.gap() for series in sweep.series[:MOST_LINES]}
    _finish(axes, sweep, _gap_title(columns, _wording(sweep.series[0].rows)))
    return plots.svg(drawn, sweep.reference)


def _finish(axes: Axes, sweep: Sweep, ylabel: str) -> None:
    values = sorted({value for series in sweep.series[:MOST_LINES] for value in series.rows[sweep.setting]})
    if values[0] > 0 and values[-1] / values[0] >= LOG_RANGE:
        axes.set_xscale("log")
        axes.minorticks_off()
    if len(values) <= MOST_LINES:
        axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xlabel(plots.label(sweep.setting))
    axes.set_ylabel(ylabel)


def _wording(rows: pl.DataFrame) -> Wording:
    return WORDINGS[rows["infers"][0]]


def _gap_title(columns: set[str], wording: Wording) -> str:
    """The columns that are drawn, the best first: a raw gap also holds what the encoder merely knows better."""
    raw, _, corrected = wording.gaps
    titles = {"corrected_gap": corrected, "gap": f"raw {raw}"}
    names = [name for column, name in titles.items() if column in columns]
    return f"{' (filled) or '.join(names)}{' (hollow)' if len(names) > 1 else ''}, points"


def share_plot(rows: pl.DataFrame) -> Markup:
    """Memorized, correlated, forgotten and unassociated shares of target rows, a bar per run.

    Args:
        rows: of one reference, a row per run; the runs with the largest memorized share are drawn.
    """
    rows = rows.sort("memorized", descending=True, nulls_last=True, maintain_order=True).head(MOST_BARS)
    drawn, axes = _bar_figure(rows)
    left = [0.0] * len(rows)
    for name, colour in zip(metrics.QUADRANTS, plots.QUADRANT_COLOURS, strict=True):
        shares = [0.0 if math.isnan(value) else value for value in _points(rows, name)[0]]
        _bars(axes, left, shares, color=colour, label=name)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_xlim(0, 100.5)
    axes.set_xlabel("% of target rows")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return plots.svg(drawn, rows["reference"][0])


def encoder_plot(rows: pl.DataFrame) -> Markup:
    """The gap of each run's encoder, those trained here in another colour than ready-made ones.

    Args:
        rows: of one reference, a row per run. The corrected gap is drawn filled; where a run has none, its raw gap is
            drawn hollow. The largest are drawn.
    """
    corrected = pl.col("corrected_gap").is_not_null()
    rows = rows.with_columns(
        raw=~corrected,
        **{
            f"shown{end}": pl.when(corrected).then(f"corrected_gap{end}").otherwise(f"gap{end}")
            for end in ("", "_low", "_high")
        },
    )
    rows = rows.sort("shown", descending=True, nulls_last=True, maintain_order=True).head(MOST_BARS)
    drawn, axes = _bar_figure(rows)
    values, lows, highs = _points(rows, "shown")
    colours = [TRAINED_HERE if here else READY_MADE for here in rows["trained_here"]]
    fills = [plots.PAGE if raw else colour for raw, colour in zip(rows["raw"], colours, strict=True)]
    places = range(len(rows))
    shown = [0.0 if math.isnan(value) else value for value in values]
    _bars(axes, [0.0] * len(rows), shown, facecolor=fills, edgecolor=colours)
    axes.hlines(places, lows, highs, color=plots.INK, linewidth=1.2)
    axes.axvline(0, color=plots.INK, linewidth=0.8)
    axes.grid(axis="x", color=plots.GRID, linewidth=0.8)
    axes.set_xlabel(_gap_title({"gap" if raw else "corrected_gap" for raw in rows["raw"]}, _wording(rows)))
    for here, name, colour in ((True, "trained here", TRAINED_HERE), (False, "ready-made", READY_MADE)):
        if here in rows["trained_here"].to_list():
            axes.barh(0, 0, color=colour, label=name)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return plots.svg(drawn, rows["reference"][0])


def _bars(axes: Axes, left: Sequence[float], length: Sequence[float], **style: Any) -> None:  # noqa: ANN401
    """A horizontal bar at each place; as one collection, which takes a fraction of the time that many patches take."""
    from matplotlib.collections import PolyCollection

    corners = [
        [(x, place - 0.37), (x + size, place - 0.37), (x + size, place + 0.37), (x, place + 0.37)]
        for place, (x, size) in enumerate(zip(left, length, strict=True))
    ]
    axes.add_collection(PolyCollection(corners, **style))
    axes.autoscale_view()


def _bar_figure(rows: pl.DataFrame) -> tuple[Figure, Axes]:
    """Room for a bar per row, run and encoder beside each, the first on top."""
    names = [plots.label(f"{row['run']}: {_encoder(row)}") for row in rows.iter_rows(named=True)]
    drawn, axes = _figure(8.0, 0.24 * len(rows), 0.3 + 0.075 * max(map(len, names)), 1)
    # Plain text: forty ticks with their lines take three times as long.
    axes.set_yticks([])
    for place, name in enumerate(names):
        axes.text(-0.01, place, name, fontsize=8, ha="right", va="center", transform=axes.get_yaxis_transform())
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return drawn, axes


def _figure(width: float, height: float, left: float, legend_rows: int) -> tuple[Figure, Axes]:
    """A figure as in the report of a run, with margins that are known beforehand: to find them costs a second drawing.

    Args:
        width: of the whole, inches.
        height: between the axis and the legend above, inches.
        left: margin for the labels, inches.
        legend_rows: lines of the legend.
    """
    above, below = 0.1 + 0.2 * legend_rows, 0.55
    whole = height + above + below
    drawn, axes = plots.figure(width, whole)
    drawn.set_layout_engine(None)
    drawn.subplots_adjust(left=left / width, right=1 - 0.15 / width, bottom=below / whole, top=1 - above / whole)
    return drawn, axes


def _legend_rows(sweep: Sweep) -> int:
    return math.ceil((min(len(sweep.series), MOST_LINES) + 1) / 2)


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print the figures, what was left out, and where the files are."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for kind in comparison.kinds():
        _show_kind(kind, console)
    for sentence in notes(comparison):
        console.print(f"[yellow]Note: {escape(sentence)}[/]", highlight=False)
    for item in comparison.skipped[:MOST_SKIPPED]:
        console.print(f"[yellow]Left out: {escape(item.run)}: {escape(item.reason)}[/]", highlight=False)
    if len(comparison.skipped) > MOST_SKIPPED:
        more = len(comparison.skipped) - MOST_SKIPPED
        console.print(f"[yellow]{more} more run folders are left out; the files list them.[/]", highlight=False)
    for path in comparison.files:
        console.print(str(path), highlight=False, soft_wrap=True, markup=False)


def _show_kind(comparison: Comparison, console: Console) -> None:
    """Print the figures of the runs of one kind."""
    wording = comparison.wording
    rows = headline_rows(comparison.widest(), wording)
    wide, narrow = (_table(rows[:MOST_ROWS], wording, narrow=narrow) for narrow in (False, True))
    needed = console.measure(wide, options=console.options.update(width=10 * WIDTH)).maximum
    console.print(wide if needed <= console.width else narrow)
    if len(rows) > MOST_ROWS:
        console.print(f"{len(rows) - MOST_ROWS} more rows are in the files.", highlight=False)


def _table(rows: Sequence[Mapping[str, str]], wording: Wording, *, narrow: bool) -> Table:
    """The headline; where it is narrow, intervals stand below their figure and the accuracies are left out."""
    accuracies, key = wording.accuracies, wording.key[1]
    # A share is a column of its own only where runs differ in it: at 100 % it would say nothing in every row.
    shares = {row[key] for row in rows}
    columns = [*((key,) if len(shares) > 1 else ()), *(() if narrow else accuracies), *wording.gaps]
    share = "" if len(shares) > 1 else f", {key} {next(iter(shares))}"
    table = Table(title=escape(f"{wording.title}{share}"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("run", "encoder", "reference"):
        table.add_column(column, overflow="fold", max_width=None if not narrow else 14)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=not narrow, overflow="fold")
    previous = None
    for row in rows:
        names = [row[column] for column in ("run", "encoder", "reference")]
        if row["run"] == previous:
            names[:2] = ["", ""]
        cells = [row[column].split(" [")[0] if column in accuracies else row[column] for column in columns]
        table.add_row(*(escape(cell.replace(" [", "\n[") if narrow else cell) for cell in (*names, *cells)))
        previous = row["run"]
    return table
