"""What a run leaves behind: tables, figures.json, report.html, a model card; and what it says in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dejavu_exp import tables
from dejavu_exp.report import card, html, terminal
from dejavu_exp.report.gallery import GalleryItem
from dejavu_exp.report.settings import ReportSettings


def write(
    run_dir: Path,
    figures: Mapping[str, Any],
    scores: pl.DataFrame,
    gallery: Sequence[GalleryItem],
    correlated: pl.DataFrame,
    leaks: pl.DataFrame,
    settings: ReportSettings = html.DEFAULTS,
    pictures: Mapping[str, bytes] = html.NO_PICTURES,
) -> None:
    """Write the tables, figures.json, report.html, model_card.md and .json; each whole or not at all.

    Args:
        run_dir: the run's folder.
        figures: what figures.json holds.
        scores: columns of `tables.SCORES`.
        gallery: most memorized images.
        correlated: rows that all references call correlated, with the column position; the positions alone become
            correlated.npy, int64, the form of the released lists.
        leaks: columns of `leaks.PAIRS`, all copies between roles.
        settings: what report.html may show.
        pictures: JPEGs of copies between roles, by id.
    """
    made_by = {"commit": figures["run"]["commit"], "versions": figures["run"]["versions"]}
    tables.write(scores, run_dir / "scores.parquet", made_by)
    tables.write(correlated, run_dir / "correlated.parquet", made_by)
    tables.write(leaks, run_dir / "leaks.parquet", made_by)
    # Through an open file: given a name, np.save would add another ending to it.
    with tables.whole(run_dir / "correlated.npy") as partial, partial.open("wb") as file:
        np.save(file, correlated["position"].to_numpy().astype(np.int64), allow_pickle=False)
    tables.write_json(figures, run_dir / "figures.json")
    facts = card.card(figures)
    tables.write_json(facts, run_dir / "model_card.json")
    tables.write_text(card.markdown(facts), run_dir / "model_card.md")
    tables.write_text(html.render(figures, scores, gallery, settings, pictures), run_dir / "report.html")


def show(figures: Mapping[str, Any], run_dir: Path) -> None:
    """Say in the terminal what came out and where it lies."""
    terminal.show(figures, run_dir)


def show_training(curves: Mapping[str, pl.DataFrame], folders: Mapping[str, Path]) -> None:
    """Say in the terminal what was trained and where it lies; `curves` and `folders` by name of the network."""
    terminal.show_training(curves, folders)
