"""The default run against the planted truth."""

import polars as pl
import pytest
from conftest import Finished

pytestmark = pytest.mark.slow


def test_the_run_folder_holds_everything(default_run: Finished) -> None:
    names = {path.name for path in default_run.folder.iterdir()}
    assert {"scores.parquet", "figures.json", "report.html", "config.yaml"} <= names


def test_all_three_references_are_measured(default_run: Finished) -> None:
    assert set(default_run.figures()["references"]) == {"naive_bayes", "class_prior", "label_shuffle"}
    assert default_run.figures()["headline"] == "naive_bayes"


def test_the_score_finds_the_planted_rows(default_run: Finished) -> None:
    auroc = default_run.figures()["references"]["naive_bayes"]["planted"]["auroc"]
    assert auroc["value"] >= 0.95
    assert auroc["n_used"] == 400


def test_unseen_rows_show_no_gap(default_run: Finished) -> None:
    gap = default_run.figures()["references"]["naive_bayes"]["roles"]["unseen"]["top1"]["100"]["gap"]
    assert gap["low"] <= 0 <= gap["high"]
    assert gap["n_used"] + gap["n_excluded"] == 400


def test_the_corrected_gap_shows_memorization_and_the_verdict_says_so(default_run: Finished) -> None:
    figures = default_run.figures()
    assert figures["references"]["naive_bayes"]["corrected_gap"]["top1"]["100"]["low"] > 0
    assert figures["verdict"].startswith("Memorization is shown")


def test_typical_backgrounds_are_correlated_not_memorized(default_run: Finished) -> None:
    groups = default_run.figures()["references"]["naive_bayes"]["planted"]["groups"]
    (typical,) = [group for group in groups if group["background"] == "typical"]
    assert typical["correlated"] > 0.9
    assert typical["memorized"] < 0.1
    (planted,) = [group for group in groups if group["planted"]]
    assert planted["memorized"] > 0.8


def test_every_row_is_in_the_scores_and_counts_add_up(default_run: Finished) -> None:
    scores = default_run.scores()
    counts = default_run.figures()["counts"]
    for name, rows in scores.group_by("reference"):
        for role in ("target", "unseen"):
            of_role = rows.filter(pl.col("role") == role)
            assert len(of_role) == counts[role]["rows"] == of_role["id"].n_unique(), name
            assert (of_role["status"] == "ok").sum() == counts[role]["used"]
    for count in counts.values():
        assert count["used"] + count["excluded"] == count["rows"]
