"""The result in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 120
"""Columns assumed where the output is a file."""


def percent(estimate: Mapping[str, Any] | None) -> str:
    """An estimate as a percentage with its interval; a dash where there is none.

    >>> percent({"value": 0.25, "low": 0.2, "high": 0.3})
    '25.0 [20.0, 30.0]'
    """
    if estimate is None or estimate["value"] is None:
        return "–"
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


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
                }
            )
    return rows


def show(figures: Mapping[str, Any], run_dir: Path, console: Console | None = None) -> None:
    """Print the verdict, the comparison of references, what to be aware of, and where the files are."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    if figures["encoder"]["random"]:
        console.print("[bold red]RANDOM WEIGHTS: these figures mean nothing[/]")
    rows = rows_of(figures)
    title = f"{escape(figures['title'])}: top-1 accuracy, % [95 % interval]"
    level = figures["run"]["config"].get("scoring", {}).get("level", 0.95)
    table = Table(title=title.replace("95 %", f"{100 * level:g} %"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in rows[0]:
        name = column == "reference"
        table.add_column(column, justify="left" if name else "right", no_wrap=True, overflow="fold")
    previous = None
    for row in rows:
        if previous not in (None, row["reference"]):
            table.add_section()
        shown = {**row, "reference": "" if row["reference"] == previous else escape(row["reference"])}
        # The intervals of the accuracies are in the report; here the gaps need the room.
        shown |= {key: row[key].split(" [")[0] for key in ("target", "reference's")}
        table.add_row(*shown.values())
        previous = row["reference"]
    console.print(table)
    _show_counts(figures, console)
    for note in figures["notes"]:
        console.print(f"[yellow]Note: {escape(note)}[/]", highlight=False)
    if figures["problems"]:
        console.print(f"[yellow]{len(figures['problems'])} problems with the data set; the report lists them.[/]")
    console.print(f"\n[bold]{escape(figures['verdict'])}[/]", highlight=False)
    console.print(f"{run_dir / 'report.html'}", highlight=False, soft_wrap=True)


def _show_counts(figures: Mapping[str, Any], console: Console) -> None:
    """How many images of each role were used, and why others were not."""
    for role in ("target", "unseen", "public"):
        counts = figures["counts"][role]
        why = ", ".join(f"{n} {status}" for status, n in counts["by_status"].items() if status != "ok")
        console.print(
            f"{role}: {counts['used']} of {counts['rows']} images used{f' ({why})' if why else ''}", highlight=False
        )
