"""The result in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dejavu_exp.report.kinds import KINDS
from dejavu_exp.report.wording import coefficient, percent

WIDTH = 120
"""Columns assumed where the output is a file."""
NAME_WIDTH = 16
"""Columns of a reference's name; longer ones go on below."""
MOST_PAIRS = 15
"""Pairs of references shown; six references have as many."""
COEFFICIENTS = {"kappa": "kappa_memorized", "rank corr.": "rank_correlation"}
"""Measures of agreement shown here; the report has all."""


def rows_of(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per reference and confident fraction, or prediction: figures, and the rows behind them."""
    return KINDS[figures["infers"]].rows_of(figures)


def pairs_of(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per two references: differences of their gaps at the largest confident share, and how far they agree."""
    return [
        {
            "first": pair["first"],
            "second": pair["second"],
            "target rows": percent(pair["target"].get(_widest(pair))),
            "corrected gaps": percent(pair.get("corrected", {}).get(_widest(pair))),
            **{name: coefficient(pair[measure]) for name, measure in COEFFICIENTS.items()},
        }
        for pair in figures.get("agreement", {}).get("pairs", [])
    ]


def _widest(pair: Mapping[str, Any]) -> str:
    """The largest confident share that two references are compared at, in %."""
    shares: Iterable[str] = pair["target"]
    return max(shares, key=float)


def show(figures: Mapping[str, Any], run_dir: Path, console: Console | None = None) -> None:
    """Print the verdict, the comparison of references, what to be aware of, and where the files are."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    if figures["encoder"]["random"]:
        console.print("[bold red]RANDOM WEIGHTS: these figures mean nothing[/]")
    console.print(_fitting([_table(figures, narrow=False), _table(figures, narrow=True)], console))
    _show_pairs(figures, console)
    _show_utility(figures, console)
    _show_counts(figures, console)
    for note in figures["notes"]:
        console.print(f"[yellow]Note: {escape(note)}[/]", highlight=False)
    if figures["problems"]:
        console.print(f"[yellow]{len(figures['problems'])} problems with the data set; the report lists them.[/]")
    console.print(f"\n[bold]{escape(figures['verdict'])}[/]", highlight=False)
    console.print(f"{run_dir / 'report.html'}", highlight=False, soft_wrap=True)


def show_training(
    curves: Mapping[str, pl.DataFrame], folders: Mapping[str, Path], console: Console | None = None
) -> None:
    """Say what was trained, or taken from the cache, and where it lies.

    Args:
        curves: columns step, epoch and loss, by name of the network.
        folders: of the networks' weights, by the same names.
        console: where to print.
    """
    console = console or Console()
    for name, folder in folders.items():
        curve = curves.get(name)
        told = ""
        if curve is not None and len(curve):
            first, last = curve["loss"][0], curve["loss"][-1]
            told = f": loss {first:.4g} at step {curve['step'][0]}, {last:.4g} at step {curve['step'][-1]}"
        console.print(f"[bold]{escape(name)}[/]{told}", highlight=False)
        console.print(escape(str(folder)), highlight=False, soft_wrap=True)


def _fitting(layouts: Sequence[Table], console: Console) -> Table:
    """The first layout that fits, or the last: a figure cut short would read as another figure."""
    for table in layouts[:-1]:
        if console.measure(table, options=console.options.update(width=10 * WIDTH)).maximum <= console.width:
            return table
    return layouts[-1]


def _table(figures: Mapping[str, Any], *, narrow: bool) -> Table:
    """All references; where it is narrow, intervals stand below their figure and other values are left out."""
    kind = KINDS[figures["infers"]]
    level = figures["run"]["config"].get("scoring", {}).get("level", 0.95)
    title = f"{escape(figures['title'])}: {kind.title} [{100 * level:g} % interval]"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    # The intervals of the values and the rows behind each figure are in the report; here the gaps need the room.
    columns = [kind.key, *(() if narrow else kind.values), *kind.gaps]
    table.add_column("reference", overflow="fold", max_width=NAME_WIDTH)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=not narrow, overflow="fold")
    previous = None
    for row in rows_of(figures):
        if previous not in (None, row["reference"]):
            table.add_section()
        cells = {column: row[column].split(" [")[0] if column in kind.values else row[column] for column in columns}
        if narrow:
            cells = {column: cell.replace(" [", "\n[") for column, cell in cells.items()}
        table.add_row("" if row["reference"] == previous else escape(row["reference"]), *map(escape, cells.values()))
        previous = row["reference"]
    return table


def _show_pairs(figures: Mapping[str, Any], console: Console) -> None:
    """How far every two references agree."""
    rows = pairs_of(figures)
    if not rows:
        return
    layouts = [_pair_table(figures, rows[:MOST_PAIRS], narrowed=narrowed) for narrowed in range(3)]
    console.print(_fitting(layouts, console))
    if len(rows) > MOST_PAIRS:
        console.print(f"The report has {len(rows) - MOST_PAIRS} more pairs of references.", highlight=False)


def _pair_table(figures: Mapping[str, Any], rows: list[dict[str, str]], *, narrowed: int) -> Table:
    """All pairs; narrowed once, names take two lines; twice, figures do too and coefficients lose their intervals."""
    narrow, separator = narrowed == 2, "\n" if narrowed else " "
    widest = _widest(figures["agreement"]["pairs"][0])
    share = "" if widest == "100" else f", surest {widest} %"
    gap = KINDS[figures["infers"]].compared
    title = f"Two references: {gap} to the first less {gap} to the second, points{share}; agreement"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("references", overflow="fold")
    for column in list(rows[0])[2:]:
        table.add_column(column.replace(" ", "\n") if narrow else column, justify="right", no_wrap=True)
    for row in rows:
        names = f"{row['first']}{separator}- {row['second']}"
        cells = {column: cell.replace(" [", "\n[") if narrow else cell for column, cell in list(row.items())[2:]}
        if narrow:
            cells |= {column: cells[column].split("\n")[0] for column in COEFFICIENTS}
        table.add_row(escape(names), *map(escape, cells.values()))
    return table


def _show_utility(figures: Mapping[str, Any], console: Console) -> None:
    """What the encoder is good for, a line per measure."""
    for found in figures.get("utility", []):
        shown = f"{found['measure']}: {percent(found['estimate'])} %"
        console.print(escape(shown), highlight=False)


def _show_counts(figures: Mapping[str, Any], console: Console) -> None:
    """How many images of each role were used, and why others were not."""
    for role in ("target", "unseen", "public"):
        counts = figures["counts"][role]
        why = ", ".join(f"{n} {status}" for status, n in counts["by_status"].items() if status != "ok")
        console.print(
            f"{role}: {counts['used']} of {counts['rows']} images used{f' ({why})' if why else ''}", highlight=False
        )
