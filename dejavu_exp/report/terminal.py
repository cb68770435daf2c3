"""The result in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 120
"""Columns assumed where the output is a file."""
NAME_WIDTH = 16
"""Columns of a reference's name; longer ones go on below."""


def percent(estimate: Mapping[str, Any] | None) -> str:
    """An estimate as a percentage with its interval; a dash where there is none.

    >>> percent({"value": 0.25, "low": 0.2, "high": 0.3})
    '25.0 [20.0, 30.0]'
    """
    if estimate is None or estimate["value"] is None:
        return "–"
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def widest(figures: Mapping[str, Any]) -> str:
    """The largest confident share the run reports, in %; "100" unless the scoring leaves it out."""
    shares: Iterable[str] = figures["references"][figures["headline"]]["roles"]["target"]["top1"]
    return max(shares, key=float)


def rows_of(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per reference and confident fraction: accuracies, gaps, and the rows behind them."""
    rows = []
    for name, found in figures["references"].items():
        for fraction, cell in found["roles"]["target"]["top1"].items():
            unseen = found["roles"].get("unseen", {}).get("top1", {}).get(fraction, {})
            rows.append(
                {
                    "reference": name,
                    "surest": f"{fraction} %",
                    "target": percent(cell["target"]),
                    "reference's": percent(cell["reference"]),
                    "gap": percent(cell["gap"]),
                    "gap, unseen": percent(unseen.get("gap")),
                    "corrected gap": percent(found.get("corrected_gap", {}).get("top1", {}).get(fraction)),
                    "rows": _rows_behind(cell["gap"], unseen.get("gap")),
                }
            )
    return rows


def _rows_behind(target: Mapping[str, Any], unseen: Mapping[str, Any] | None) -> str:
    """Rows used, target + unseen, and how many more could not be."""
    gaps = [gap for gap in (target, unseen) if gap is not None]
    excluded = sum(gap["n_excluded"] for gap in gaps)
    used = " + ".join(str(gap["n_used"]) for gap in gaps)
    return f"{used} ({excluded} excluded)" if excluded else used


def show(figures: Mapping[str, Any], run_dir: Path, console: Console | None = None) -> None:
    """Print the verdict, the comparison of references, what to be aware of, and where the files are."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    if figures["encoder"]["random"]:
        console.print("[bold red]RANDOM WEIGHTS: these figures mean nothing[/]")
    console.print(_comparison(figures, console))
    _show_counts(figures, console)
    for note in figures["notes"]:
        console.print(f"[yellow]Note: {escape(note)}[/]", highlight=False)
    if figures["problems"]:
        console.print(f"[yellow]{len(figures['problems'])} problems with the data set; the report lists them.[/]")
    console.print(f"\n[bold]{escape(figures['verdict'])}[/]", highlight=False)
    console.print(f"{run_dir / 'report.html'}", highlight=False, soft_wrap=True)


def _comparison(figures: Mapping[str, Any], console: Console) -> Table:
    """The table of references in the layout that fits: a figure cut short would read as another figure."""
    table = _table(figures, narrow=False)
    needed = console.measure(table, options=console.options.update(width=10 * WIDTH)).maximum
    return table if needed <= console.width else _table(figures, narrow=True)


def _table(figures: Mapping[str, Any], *, narrow: bool) -> Table:
    """All references; where it is narrow, intervals stand below their figure and the accuracies are left out."""
    level = figures["run"]["config"].get("scoring", {}).get("level", 0.95)
    title = f"{escape(figures['title'])}: top-1 accuracy, % [{100 * level:g} % interval]"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    # The intervals of the accuracies and the rows behind each figure are in the report; here the gaps need the room.
    accuracies, gaps = ("target", "reference's"), ("gap", "gap, unseen", "corrected gap")
    columns = ["surest", *(() if narrow else accuracies), *gaps]
    table.add_column("reference", overflow="fold", max_width=NAME_WIDTH)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=not narrow, overflow="fold")
    previous = None
    for row in rows_of(figures):
        if previous not in (None, row["reference"]):
            table.add_section()
        cells = {column: row[column].split(" [")[0] if column in accuracies else row[column] for column in columns}
        if narrow:
            cells = {column: cell.replace(" [", "\n[") for column, cell in cells.items()}
        table.add_row("" if row["reference"] == previous else escape(row["reference"]), *map(escape, cells.values()))
        previous = row["reference"]
    return table


def _show_counts(figures: Mapping[str, Any], console: Console) -> None:
    """How many images of each role were used, and why others were not."""
    for role in ("target", "unseen", "public"):
        counts = figures["counts"][role]
        why = ", ".join(f"{n} {status}" for status, n in counts["by_status"].items() if status != "ok")
        console.print(
            f"{role}: {counts['used']} of {counts['rows']} images used{f' ({why})' if why else ''}", highlight=False
        )
