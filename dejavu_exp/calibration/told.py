"""A calibration in words, tables and one picture: for the terminal, as Markdown and SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from dejavu_exp import statistics, tables
from dejavu_exp.calibration.planted import ALL_ROWS, FALSE_POSITIVE_RATE, UNGUESSED, Roc

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Json = Mapping[str, Any]
ALTERNATIVE = "Left: what was measured against what was planted. Right: ROC of the memorization score."
MOST_NAMED = 5
LEAST_SHARE = 1e-3
"""Of false positives, where the ROC begins."""
WIDTH = 140
"""Columns where the output is a file."""
COLOURS = {"anywhere": "#1f5fa8", "unguessed": "#b3261e"}
LINES = {"probability": "-", "entropy": "--"}
WHERE = {"anywhere": "any row", "unguessed": "rows the reference gets wrong"}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what it shows.
        columns: their names; the first is aligned left, the others right.
        rows: one cell a column.
        notes: how it is to be read.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: str = ""

    def markdown(self) -> str:
        """The table under its title."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return "\n\n".join(part for part in (f"## {self.title}", body, self.notes) if part)

    def rich(self) -> RichTable:
        """The table for a terminal."""
        table = RichTable(title=escape(self.title), title_justify="left", box=box.SIMPLE_HEAD)
        for place, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if place else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


def _points(value: float | None) -> str:
    """A share in points or per cent.

    >>> _points(0.125), _points(None)
    ('12.5', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{100 * value + 0.0:.1f}"


def _share(count: int, of: int, level: float) -> str:
    """A count as a percentage, with the exact interval that so many draws leave."""
    if not of:
        return "–"
    low, high = statistics.proportion(count / of, of, level)
    return f"{_points(count / of)} [{_points(low)}, {_points(high)}]"


def planted_tables(found: Json) -> list[Table]:
    """The tables of a calibration with planted evidence."""
    return [_recovered(found), _false_positives(found), _detection(found), _lists(found), _checks(found)]


def _said(planted: Json) -> str:
    """How much is planted and where."""
    return f"{100 * planted['rate']:g} %{UNGUESSED if planted['where'] == 'unguessed' else ''}"


def _recovered(found: Json) -> Table:
    level, rows = found["level"], []
    for planted in found["planted"]:
        for figure in planted["figures"]:
            ends = f"[{_points(figure['mean_low'])}, {_points(figure['mean_high'])}]"
            rows.append(
                [
                    _said(planted),
                    figure["figure"],
                    _points(figure["truth"]),
                    f"{_points(figure['mean'])} {ends}",
                    _points(figure["deviation"]),
                    _share(figure["held"], figure["seeds"], level),
                    str(figure["held_of_100"]),
                ]
            )
    return Table(
        "Planted and recovered",
        (
            "planted",
            "figure",
            "true",
            "measured",
            "deviation",
            "interval holds the truth, %",
            f"of the first {min(100, found['seeds'])}",
        ),
        rows,
        f"In points and %. *Measured* is the mean over {found['seeds']} trials of the estimate and of the ends of its "
        f"{100 * level:g} % interval, *deviation* the standard deviation of the estimates. Behind each share of "
        "trials stands the exact interval that so many trials leave. A right interval holds the truth in 95 of 100 "
        "trials on average; of many series of 100, four in ten have fewer. A corrected gap is the planted rate times "
        "the share of planted rows that the encoder would otherwise have got wrong. *Memorized rows* divides it by "
        "the encoder's errors on unseen rows: right where memorization may hit any row alike, too high where it hits "
        f"rows that could not be guessed, as the rows of that kind show. Where fewer than {statistics.FEW_ROWS} rows "
        "of a role are behind a figure, its interval is made from exact ones, which hold the truth more often than "
        "they promise: it is wider than it need be.",
    )


def _false_positives(found: Json) -> Table:
    level, rows = found["level"], []
    for planted in found["planted"]:
        for figure in planted["figures"]:
            if figure["figure"] == ALL_ROWS:
                seeds = figure["seeds"]
                above, below = (_share(figure[side], seeds, level) for side in ("above_zero", "below_zero"))
                either = _share(figure["above_zero"] + figure["below_zero"], seeds, level)
                rows.append([_said(planted), above, below, either])
    return Table(
        "What the verdict says",
        ("planted", "memorization is shown, %", "interval below zero, %", "interval without zero, %"),
        rows,
        f"Share of {found['seeds']} trials. With nothing planted the verdict is false in the first column, for which "
        f"{100 * (1 - level) / 2:g} % are to be expected, and the last column is the false-positive rate at the "
        f"{100 * (1 - level):g} % level. With something planted the first column is the power of so many rows.",
    )


def _detection(found: Json) -> Table:
    rows = [
        [row["score"], WHERE[row["where"]], f"{row['auroc']:.3f}", _points(row["found"])] for row in found["detection"]
    ]
    return Table(
        "Which rows are planted",
        ("memorization score", "planted", "AUROC", f"found at {100 * FALSE_POSITIVE_RATE:g} % false positives, %"),
        rows,
        "Planted rows against all rows that are not, over the whole population. A planted row whose label anybody "
        "could have guessed looks like one that was guessed: no score can tell it, and it is no privacy loss either. "
        "The score `entropy` is defined on memorized rows only; the others stand below them. The scores of object "
        "inference are not calibrated here; `--canaries` with a CLIP does that.",
    )


def _lists(found: Json) -> Table:
    rows = []
    for planted in found["planted"]:
        listed = planted["listed"]
        error = "" if listed["false_share_error"] is None else f" ± {_points(2 * listed['false_share_error'])}"
        rows.append(
            [
                _said(planted),
                f"{listed['planted']:.1f}",
                f"{listed['listed']:.1f}",
                f"{_points(listed['false_share'])}{error}",
                _points(listed["found_share"]),
            ]
        )
    return Table(
        f"The list at a false-discovery rate of {100 * found['false_discovery']:g} %",
        ("planted", "rows planted", "rows listed", "false share of the list, %", "planted rows that are listed, %"),
        rows,
        "Means over the trials; an empty list has no false share, which counts as 0. The smallest p-value is 1 / "
        "(unseen rows + 1), so that a few rows among many cannot be listed, however clear they are.",
    )


def _checks(found: Json) -> Table:
    rows = [
        [
            check["name"],
            f"{_points(check['value'])} [{_points(check['low'])}, {_points(check['high'])}]",
            f"{_points(check['least'])} to {_points(check['most'])}",
            "passed" if check["passed"] else "FAILED",
        ]
        for check in found["checks"]
    ]
    return Table(
        "Checks",
        ("check", "measured, %", "allowed, %", "result"),
        rows,
        "In brackets what so many trials leave possible. A check fails where all of that is outside of what is "
        "allowed, so that few trials fail little.",
    )


def summary(checks: Sequence[Json], seeds: int) -> str:
    """One sentence: does the instrument pass?

    >>> summary([{"name": "a", "passed": True}, {"name": "b", "passed": False}], 200)
    'NOT CALIBRATED: 1 of 2 checks failed: b.'
    """
    failed = [check["name"] for check in checks if not check["passed"]]
    if not failed:
        return f"Calibrated, as far as {seeds} trials of each kind can tell: all {len(checks)} checks passed."
    more = f"; and {len(failed) - MOST_NAMED} more" if len(failed) > MOST_NAMED else ""
    return f"NOT CALIBRATED: {len(failed)} of {len(checks)} checks failed: {'; '.join(failed[:MOST_NAMED])}{more}."


def planted_text(found: Json) -> str:
    """What a calibration with planted evidence did, in words."""
    population = found["population"]
    return (
        f"{population['rows']} rows that no encoder saw; each trial deals {found['rows']} of them as target rows and "
        "as many others as unseen rows, at random, so that nothing is memorized. Then memorization is planted: "
        "target rows, each by chance, get the encoder's answer for another row of their class in place of their own, "
        f"one that its training really repeated and whose label it names ({population['donors']} of "
        f"{population['repeated']} repeated rows). The reference ({found['reference']}) stays as it is. All that "
        f"follows is measured as in any run, with {found['resamples']} resamples for an interval. Encoder: "
        f"{found['encoder']}. Data: {found['data']}."
    )


def canary_tables(found: Json) -> list[Table]:
    """The table of a calibration with canaries."""
    rows = []
    for row in found["repeats"]:
        gap, share = row["corrected_gap"], row["found"]
        rows.append(
            [
                _repeated(row["repeats"]),
                f"{row['rows']} ({row['excluded']} excluded)" if row["excluded"] else str(row["rows"]),
                _points(row["target_right"]),
                _points(row["reference_right"]),
                _interval(gap),
                f"{row['auroc']:.3f}",
                _interval(share),
                _points(row["listed"]),
            ]
        )
    level, unseen = 100 * found["level"], found["repeats"][0]["unseen"]
    columns = (
        "canaries",
        "target rows",
        "encoder right, %",
        "reference right, %",
        "corrected gap, points",
        "AUROC",
        f"found at {100 * FALSE_POSITIVE_RATE:g} % false positives, %",
        f"listed at {100 * found['false_discovery']:g} % false discoveries, %",
    )
    notes = (
        f"With {level:g} % intervals, against {found['reference']} and {unseen} rows that no encoder saw. A canary is "
        "a target row that training shows again, as many times as the first column says: its background where a "
        "supervised recipe learns, the whole example otherwise. What an ordinary row leaves behind stands in the "
        "first line; a line that looks like it means that so many repeats leave nothing that could be found. "
        "Canaries that the reference has right too look like rows that were guessed. A share of false positives is a "
        f"whole number of the {unseen} unseen rows."
    )
    return [Table("Canaries by how often training repeats them", columns, rows, notes)]


def _repeated(count: int) -> str:
    return "no canaries" if count == 1 else f"repeated {count} times"


def _interval(found: Json) -> str:
    return f"{_points(found['value'])} [{_points(found['low'])}, {_points(found['high'])}]"


def canary_text(found: Json) -> str:
    """What a calibration with canaries did, in words."""
    return (
        f"{found['title']}: the encoder was trained with canaries among its target rows. Encoder: {found['encoder']}."
    )


def document(name: str, command: str, text: str, parts: Sequence[Table], last: str = "") -> str:
    """The Markdown of a calibration, whose picture lies beside it.

    Args:
        name: of its files, without ending.
        command: that was run.
        text: what was done.
        parts: the tables.
        last: what comes of it; none where nothing is checked.
    """
    head = [
        f"# {name.capitalize()}",
        f"    {command}",
        text,
        f"**{last}**" if last else "",
        f"![{ALTERNATIVE}]({name}.svg)",
    ]
    return "\n\n".join(part for part in [*head, *(part.markdown() for part in parts)] if part) + "\n"


def show(text: str, parts: Sequence[Table], folder: Path, last: str = "") -> None:
    """Print all of it."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(escape(text), highlight=False)
    for part in parts:
        console.print(part.rich())
    if last:
        console.print(f"[bold]{escape(last)}[/]", highlight=False)
    console.print(escape(str(folder)), highlight=False, soft_wrap=True)


def planted_picture(found: Json, rocs: Mapping[tuple[str, str], Roc], path: Path) -> None:
    """Measured against planted, and the ROC of each score."""
    named = [(f"{score}, {WHERE[where]}", LINES[score], COLOURS[where], roc) for (score, where), roc in rocs.items()]

    def draw(axes: Axes) -> None:
        figures = [
            (planted["where"], figure)
            for planted in found["planted"]
            for figure in planted["figures"]
            if figure["figure"] == ALL_ROWS
        ]
        for where, colour in COLOURS.items():
            shown = [figure for place, figure in figures if place == where]
            _errorbars(
                axes, [figure["truth"] for figure in shown], shown, ("mean_low", "mean_high"), colour, WHERE[where]
            )
        most = max(figure["mean_high"] for _, figure in figures) * 105
        axes.plot([0, most], [0, most], color="#7a7a7a", linewidth=0.8, linestyle=":", label="what was planted")
        axes.set_xlabel("planted corrected gap, points")
        axes.set_ylabel("measured, points (mean, with its mean interval)")

    _picture(draw, named, path)


def canary_picture(found: Json, rocs: Mapping[int, Roc], path: Path) -> None:
    """The corrected gap by repeats, and the ROC of each number of repeats."""
    shades = [f"{0.75 - 0.75 * place / max(1, len(rocs) - 1):.2f}" for place in range(len(rocs))]
    named = [(_repeated(count), "-", shade, roc) for (count, roc), shade in zip(rocs.items(), shades, strict=True)]

    def draw(axes: Axes) -> None:
        gaps = [{"mean": row["corrected_gap"]["value"], **row["corrected_gap"]} for row in found["repeats"]]
        repeats = [row["repeats"] / 100 for row in found["repeats"]]
        _errorbars(axes, repeats, gaps, ("low", "high"), COLOURS["anywhere"], "target rows")
        axes.axhline(0, color="#7a7a7a", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("times training repeats a row (1: no canary)")
        axes.set_ylabel("corrected gap, points")

    _picture(draw, named, path)


def _errorbars(
    axes: Axes, at: Sequence[float], found: Sequence[Json], ends: tuple[str, str], colour: str, label: str
) -> None:
    """Estimates with their intervals; shares at shares, shown in per cent."""
    values = [100 * figure["mean"] for figure in found]
    low, high = ([100 * figure[end] for figure in found] for end in ends)
    spread = [
        [v - edge for v, edge in zip(values, low, strict=True)],
        [e - v for v, e in zip(values, high, strict=True)],
    ]
    axes.errorbar(
        [100 * place for place in at], values, yerr=spread, fmt="o", markersize=4, capsize=3, color=colour, label=label
    )


def _picture(draw: Callable[[Axes], None], named: Sequence[tuple[str, str, str, Roc]], path: Path) -> None:
    """Two panels: what `draw` puts into the first, and ROC curves (name, line, colour, curve)."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    first, second = figure.subplots(1, 2)
    draw(first)
    for name, line, colour, roc in named:
        inside = np.geomspace(LEAST_SHARE, 1, 200)
        # The curve as steps, where a share of false positives allows no more than its own.
        place = np.searchsorted(roc.false_positive, inside, side="right") - 1
        label = f"{name}: {roc.area:.3f}"
        second.plot(100 * inside, 100 * roc.true_positive[place], color=colour, linestyle=line, label=label)
    second.axvline(100 * FALSE_POSITIVE_RATE, color="#7a7a7a", linewidth=0.8, linestyle=":")
    second.set_xscale("log")
    second.xaxis.set_major_formatter("{x:g}")
    second.set_xlabel("false positives, %")
    second.set_ylabel("planted rows found, %")
    second.legend(title="AUROC", fontsize="small", loc="lower right")
    first.legend(fontsize="small", loc="upper left")
    for axes in (first, second):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    # Dates and random ids are left out: the same figures give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "dejavu_exp"}), tables.whole(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
