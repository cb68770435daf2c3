"""Scoring: what is planted comes out, and nothing else."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from dejavu_exp import evidence
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.scoring import LabelInference

LABELS = ["a", "b", "c", "d"]
SCORING = LabelInference(resamples=300)


def rows_of(n_target: int, n_unseen: int, excluded: int = 0) -> pl.DataFrame:
    count = n_target + n_unseen
    return pl.DataFrame(
        {
            "id": [f"{row:05d}" for row in range(count)],
            "role": ["target"] * n_target + ["unseen"] * n_unseen,
            "label": [LABELS[row % 4] for row in range(count)],
            "status": ["too_small" if row < excluded else "ok" for row in range(count)],
        }
    )


def guess(rows: pl.DataFrame, right: np.ndarray, sure: np.ndarray | None = None) -> Evidence:
    """Evidence that names the true label where `right`, and the next one elsewhere."""
    truth = np.array([LABELS.index(label) for label in rows["label"]])
    sure = np.full(len(rows), 0.7) if sure is None else sure
    probabilities = np.tile(((1 - sure) / 3)[:, None], (1, 4))
    probabilities[np.arange(len(rows)), np.where(right, truth, (truth + 1) % 4)] = sure
    return evidence.from_probabilities(rows["id"].to_list(), LABELS, probabilities)


def figures(
    rows: pl.DataFrame, target: Evidence, reference: Evidence, scoring: LabelInference = SCORING
) -> tuple[pl.DataFrame, dict[str, Any]]:
    scores = scoring.score(rows, target, reference, "r")
    return scores, scoring.figures(scores, rows, seed=0)


def test_an_encoder_that_memorizes_all_scores_one() -> None:
    rows = rows_of(100, 100)
    is_target = (rows["role"] == "target").to_numpy()
    scores, found = figures(rows, guess(rows, is_target), guess(rows, np.zeros(200, dtype=bool)))
    for percent in ("100", "20", "5"):
        assert found["roles"]["target"]["top1"][percent]["gap"]["value"] == 1.0
        assert found["roles"]["unseen"]["top1"][percent]["gap"]["value"] == 0.0
        assert found["corrected_gap"]["top1"][percent]["value"] == 1.0
    assert set(scores.filter(role="target")["quadrant"]) == {"memorized"}
    assert SCORING.verdict(found, "r", random=False).startswith("Memorization is shown")


def test_a_model_as_its_own_reference_scores_exactly_zero() -> None:
    rows = rows_of(100, 100)
    rng = np.random.default_rng(0)
    same = guess(rows, rng.random(200) < 0.5, rng.uniform(0.4, 0.9, 200))
    scores, found = figures(rows, same, same)
    for role in ("target", "unseen"):
        for top in ("top1", "top5"):
            gap = found["roles"][role][top]["20"]["gap"]
            assert (gap["value"], gap["low"], gap["high"]) == (0.0, 0.0, 0.0)
    assert scores["memorization_score"].abs().max() == 0.0
    assert "no memorization" in SCORING.verdict(found, "r", random=False).lower()


def test_knowing_better_is_not_memorizing() -> None:
    """A strong encoder that never saw any row beats a weak reference everywhere: the corrected gap must not show it."""
    rows = rows_of(400, 400)
    rng = np.random.default_rng(0)
    strong, weak = guess(rows, rng.random(800) < 0.8), guess(rows, rng.random(800) < 0.3)
    _, found = figures(rows, strong, weak)
    assert found["roles"]["target"]["top1"]["100"]["gap"]["low"] > 0.3
    corrected = found["corrected_gap"]["top1"]["100"]
    assert corrected["low"] <= 0 <= corrected["high"]
    assert SCORING.verdict(found, "r", random=False).startswith("No memorization is shown")


def test_null_runs_are_silent_at_the_level_of_the_interval() -> None:
    """Of 60 runs without memorization at most a few may show some at 95 %."""
    false_alarms = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = rows_of(100, 100)
        _, found = figures(rows, guess(rows, rng.random(200) < 0.4), guess(rows, rng.random(200) < 0.4))
        false_alarms += SCORING.verdict(found, "r", random=False).startswith("Memorization is shown")
    assert false_alarms <= 6


def test_without_unseen_rows_the_verdict_says_what_the_raw_gap_may_contain() -> None:
    rows = rows_of(50, 0)
    _, found = figures(rows, guess(rows, np.ones(50, dtype=bool)), guess(rows, np.zeros(50, dtype=bool)))
    assert "corrected_gap" not in found
    assert "without unseen rows" in SCORING.verdict(found, "r", random=False)


def test_random_weights_are_never_a_measurement() -> None:
    rows = rows_of(50, 50)
    _, found = figures(rows, guess(rows, np.ones(100, dtype=bool)), guess(rows, np.zeros(100, dtype=bool)))
    assert SCORING.verdict(found, "r", random=True).startswith("Nothing is measured")


def test_excluded_rows_stay_and_are_counted() -> None:
    rows = rows_of(60, 40, excluded=10)
    ok = rows.filter(pl.col("status") == "ok")
    scores, found = figures(rows, guess(ok, np.ones(90, dtype=bool)), guess(ok, np.zeros(90, dtype=bool)))
    assert len(scores) == 100
    assert scores["target_correct"].null_count() == 10
    gap = found["roles"]["target"]["top1"]["100"]["gap"]
    assert (gap["n_used"], gap["n_excluded"]) == (50, 10)


def test_a_row_without_reference_evidence_is_excluded_and_says_so() -> None:
    rows = rows_of(20, 20)
    reference = guess(rows, np.zeros(40, dtype=bool))
    reference.probabilities[3] = np.nan
    scores, found = figures(rows, guess(rows, np.ones(40, dtype=bool)), reference)
    assert scores.filter(id="00003")["status"].item() == "no_evidence"
    assert found["roles"]["target"]["top1"]["100"]["gap"]["n_excluded"] == 1


def test_evidence_is_joined_by_id_not_by_position() -> None:
    rows = rows_of(30, 30)
    rng = np.random.default_rng(0)
    target, reference = guess(rows, rng.random(60) < 0.5), guess(rows, rng.random(60) < 0.5)
    order = rng.permutation(60)
    moved = target.take([target.ids[row] for row in order])
    first, second = (SCORING.score(rows, evidence_, reference, "r") for evidence_ in (target, moved))
    assert first.equals(second)


def test_a_missing_row_is_named() -> None:
    rows = rows_of(5, 5)
    found = guess(rows, np.ones(10, dtype=bool))
    with pytest.raises(DataError, match="00004"):
        SCORING.score(rows, found.take([i for i in found.ids if i != "00004"]), found, "r")


def test_the_entropy_score_is_defined_on_memorized_rows_only() -> None:
    rows = rows_of(40, 40)
    right = np.arange(80) % 2 == 0
    scoring = LabelInference(resamples=300, memorization_score="entropy", ties="first")
    scores, found = figures(rows, guess(rows, right), guess(rows, ~right, np.full(80, 0.4)), scoring)
    defined = scores["memorization_score"].is_not_null()
    assert (defined == (scores["quadrant"] == "memorized")).all()
    assert (scores.filter(defined)["memorization_score"] > 0).all()
    assert found["roles"]["target"]["memorization_confidence"]["n_used"] == 40


def test_per_class_figures_split_the_rows() -> None:
    rows = rows_of(40, 0)
    _, found = figures(rows, guess(rows, (rows["label"] == "b").to_numpy()), guess(rows, np.zeros(40, dtype=bool)))
    gaps = {row["label"]: row["gap"]["value"] for row in found["per_class"]}
    assert gaps == {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fractions", ()),
        ("fractions", (0.0,)),
        ("memorization_score", "x"),
        ("ties", "x"),
        ("level", 1.0),
        ("resamples", 1),
    ],
)
def test_bad_settings_name_their_key(key: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"scoring\.{key}"):
        LabelInference(**{key: value})
