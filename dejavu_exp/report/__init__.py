"""What a run leaves behind: scores.parquet, figures.json, report.html; and what it says in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dejavu_exp import tables
from dejavu_exp.report import html, terminal
from dejavu_exp.report.gallery import GalleryItem


def write(run_dir: Path, figures: Mapping[str, Any], scores: pl.DataFrame, gallery: Sequence[GalleryItem]) -> None:
    """Write the three files of a run; each appears whole or not at all.

    Args:
        run_dir: the run's folder.
        figures: what figures.json holds.
        scores: columns of `tables.SCORES`.
        gallery: most memorized images.
    """
    tables.write(
        scores, run_dir / "scores.parquet", {"commit": figures["run"]["commit"], "versions": figures["run"]["versions"]}
    )
    tables.write_json(figures, run_dir / "figures.json")
    tables.write_text(html.render(figures, scores, gallery), run_dir / "report.html")


def show(figures: Mapping[str, Any], run_dir: Path) -> None:
    """Say in the terminal what came out and where it lies."""
    terminal.show(figures, run_dir)
