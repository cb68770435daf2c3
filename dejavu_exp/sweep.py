"""How far the cells of a sweep are: `python -m dejavu_exp.sweep DIR [DIR...] [--failed]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dejavu_exp import cells, config
from dejavu_exp.cells import State, Status
from dejavu_exp.errors import ConfigError
from dejavu_exp.report import terminal
from dejavu_exp.report.kinds import KINDS

COLOURS = {State.FINISHED: "green", State.RUNNING: "cyan", State.FAILED: "red", State.STOPPED: "red"}
WIDTH = 160
"""Columns where the output is a file."""


@dataclass(frozen=True)
class Row:
    """A cell as it stands in the table.

    Attributes:
        name: its folder, relative to the one asked for.
        state: as found now.
        status: what the cell wrote.
        figure: the headline, e.g. "corrected gap 19.7 [14.0, 25.8]"; empty before the end.
    """

    name: str
    state: State
    status: Status
    figure: str


def rows(folders: Sequence[Path]) -> list[Row]:
    """All cells, and single runs, below some folders, by name.

    Raises:
        ConfigError: a folder does not exist, or none holds a cell.
        DataError: a status.json cannot be read.
    """
    jobs = cells.slurm_jobs()
    found = [_row(folder, base, status, jobs) for base in folders for folder, status in _statuses(base)]
    if not found:
        raise ConfigError(
            f"{', '.join(map(str, folders))}: no {cells.STATUS} below it. Give the folder of a sweep, such as "
            "outputs/sweeps."
        )
    return sorted(found, key=lambda row: row.name)


def _statuses(base: Path) -> Iterator[tuple[Path, Status]]:
    if not base.is_dir():
        raise ConfigError(f"{base}: no such folder. Give the folder of a sweep, such as outputs/sweeps.")
    for path in base.rglob(cells.STATUS):
        status = cells.read(path.parent)
        if status is not None:
            yield path.parent, status


def _row(folder: Path, base: Path, status: Status, jobs: Mapping[str, str] | None) -> Row:
    state = status.now(jobs)
    name = folder.name if folder == base else folder.relative_to(base).as_posix()
    return Row(name, state, status, _headline(folder) if state == State.FINISHED else "")


def _headline(folder: Path) -> str:
    """The corrected gap of the first reference, or the raw one where nothing corrects it."""
    try:
        figures = json.loads((folder / "figures.json").read_text())
    except FileNotFoundError:
        return ""
    row = terminal.rows_of(figures)[0]
    raw, _, corrected = KINDS[figures["infers"]].gaps
    shown = corrected if "[" in row[corrected] else raw
    return f"{shown} {row[shown]}"


def show(found: Sequence[Row], console: Console | None = None) -> None:
    """Print the table, the errors below it, and how many cells there are of each state."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("cell", overflow="fold")
    for column in ("state", "figure", "time"):
        table.add_column(column, no_wrap=True)
    table.add_column("log", overflow="fold")
    for row in found:
        colour = COLOURS.get(row.state, "yellow")
        state = f"[{colour}]{row.state}[/]"
        table.add_row(escape(row.name), state, escape(row.figure), _time(row), escape(_log(row)))
    console.print(table)
    for row in found:
        if row.status.error and row.state == State.FAILED:
            console.print(f"{escape(row.name)}: {escape(row.status.error)}", highlight=False, soft_wrap=True)
    counts = {state: sum(row.state == state for row in found) for state in State}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count), highlight=False)


def _time(row: Row) -> str:
    """How long the cell took, or has been at it; and the job with its restarts."""
    job = f" job {row.status.job}" if row.status.job else ""
    again = f", requeued {row.status.restarts}x" if row.status.restarts else ""
    if row.state not in (State.FINISHED, State.FAILED, State.RUNNING):
        return f"{job}{again}".strip()
    end = datetime.fromisoformat(row.status.ended) if row.status.ended else datetime.now(UTC)
    seconds = (end - datetime.fromisoformat(row.status.started)).total_seconds()
    # The clock of a machine may have been set back since, or another machine's be slow.
    return f"{f'{seconds:.0f}' if seconds >= 0 else '?'} s{job}{again}"


def _log(row: Row) -> str:
    """The log file, from where the command is given if it lies below."""
    path, here = Path(row.status.log or ""), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path) if row.status.log else ""


def commands(found: Sequence[Row]) -> list[str]:
    """Command lines that run the cells again, each alone, that failed or were stopped."""
    return [row.status.repeat() for row in found if row.state in (State.FAILED, State.STOPPED)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dejavu_exp.sweep",
        description="The state of every cell of a sweep: queued, running, finished, failed, or stopped, which is one "
        "whose process is gone or whose job was cancelled.",
        epilog="Exit status 1 unless all cells are finished.",
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="hydra.sweep.dir of the sweep")
    parser.add_argument(
        "--failed", action="store_true", help="print only the commands that run failed and stopped cells, each alone"
    )
    asked = parser.parse_args(arguments)
    with config.spoken_errors():
        found = rows(asked.folders)
        if asked.failed:
            sys.stdout.writelines(f"{command}\n" for command in commands(found))
        else:
            show(found)
    sys.exit(any(row.state != State.FINISHED for row in found))


if __name__ == "__main__":
    main()
