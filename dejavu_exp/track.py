"""Log finished runs to Weights & Biases, from their files alone: `python -m dejavu_exp.track DIR [DIR...]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from rich.console import Console
from rich.markup import escape

from dejavu_exp import compare, config, tables
from dejavu_exp.errors import DataError, DejavuError
from dejavu_exp.tracking import Outcome, WandbTracking

TOLD: Mapping[Outcome, str] = {
    "online": "sent",
    "offline": "kept offline",
    "failed": "not logged",
    "disabled": "not logged, for tracking is disabled",
}


def track(folder: Path, given: Mapping[str, Any]) -> Outcome:
    """Log one finished run.

    What tracking the run was configured with decides, but for its mode: a run without tracking is logged too. Loss
    curves and the gallery are not among a run's files; with `images`, report.html is sent, which holds the gallery.

    Args:
        folder: of the run.
        given: fields of `WandbTracking` that go before the run's own.

    Raises:
        DejavuError: a file of the run is missing or damaged, or a value given cannot work.
    """
    figures, scores, resolved = read(folder)
    node = {"_target_": f"{WandbTracking.__module__}.{WandbTracking.__name__}", **(resolved.get("tracking") or {})}
    tracking: WandbTracking = config.bind({**node, "mode": "auto", **given}, "tracking")
    return tracking.log(figures, scores, folder, [], resolved)


def read(folder: Path) -> tuple[dict[str, Any], pl.DataFrame, dict[str, Any]]:
    """figures.json, scores.parquet and config.yaml of a finished run.

    Raises:
        DataError: one is missing, damaged or of another version.
    """
    try:
        figures = json.loads((folder / "figures.json").read_text("utf-8"))
        scores = pl.read_parquet(folder / "scores.parquet")
        resolved = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, pl.exceptions.PolarsError, yaml.YAMLError) as error:
        raise DataError(f"{folder} holds no finished run: {error}. Repeat the run, or leave its folder out.") from error
    schema = figures.get("schema") if isinstance(figures, dict) else None
    if schema != tables.FIGURES_VERSION or not isinstance(resolved, dict):
        raise DataError(
            f"{folder}: figures.json has schema {schema}, and this version reads {tables.FIGURES_VERSION}. "
            "Repeat the run."
        )
    return figures, scores, resolved


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dejavu_exp.track",
        description="Log finished runs to Weights & Biases, from their files.",
        epilog="What is not given is as the run was configured (tracking.project, ...). A run that was logged before "
        "is the same W&B run again. Status 1 where a run could not be logged, or was not sent despite --mode online.",
    )
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", type=Path, help="a run folder, or a folder that holds some"
    )
    parser.add_argument("--project", help="the W&B project")
    parser.add_argument("--entity", help="user or team")
    parser.add_argument("--group", help="groups runs (default: the sweep's folder for cells of a sweep)")
    parser.add_argument("--mode", choices=("auto", "online", "offline"), help="auto: online where you are logged in")
    parser.add_argument("--images", action="store_true", default=None, help="also send report.html, with its images")
    parser.add_argument("--ids", action="store_true", default=None, help="ids of rows as they are and not hashed")
    parser.add_argument("--rows", type=int, help="most rows of each reference's table of scores")
    asked = vars(parser.parse_args(arguments))
    folders = asked.pop("folders")
    given = {key: value for key, value in asked.items() if value is not None}
    with config.spoken_errors():
        sys.exit(_track_all(folders, given))


def _track_all(folders: Sequence[Path], given: Mapping[str, Any]) -> int:
    """Log every run below some folders and say what became of each; 1 where one was not logged as asked."""
    console = Console(highlight=False, soft_wrap=True)
    found, unlisted = compare.find(folders)
    wrong = len(unlisted)
    for item in unlisted:
        console.print(escape(f"{item.run}: {item.reason}"))
    for folder, name in found.items():
        try:
            outcome = track(folder, given)
        except DejavuError as error:
            wrong += 1
            console.print(escape(f"{name}: not logged: {error}"))
            continue
        wrong += outcome == "failed" or (outcome == "offline" and given.get("mode") == "online")
        console.print(escape(f"{name}: {TOLD[outcome]}"))
    return int(wrong > 0)


if __name__ == "__main__":
    main()
