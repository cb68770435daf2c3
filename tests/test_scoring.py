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
            gap = found["roles"][role][top]["100"]["gap"]
            assert (gap["value"], gap["low"], gap["high"]) == (0.0, 0.0, 0.0)
            few = found["roles"][role][top]["20"]["gap"]
            assert few["value"] == 0.0
            # Twenty rows cannot prove so much; that the two are right together still counts.
            assert -0.2 < few["low"] <= 0.0 <= few["high"] < 0.2
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


def test_rows_that_are_memorized_are_listed_and_hardly_any_other() -> None:
    """Forty of 400 target rows are surer than any unseen row can be; the list may hold a tenth of others."""
    rows = rows_of(400, 400)
    rng = np.random.default_rng(0)
    planted = np.arange(800) < 40
    sure = np.where(planted, 0.99, rng.uniform(0.3, 0.9, 800))
    target = guess(rows, planted | (rng.random(800) < 0.4), sure)
    scores, found = figures(rows, target, guess(rows, np.zeros(800, dtype=bool)))
    listed = scores.filter(pl.col("q_value") <= 0.1)
    assert set(rows["id"][:40]) <= set(listed["id"])
    assert len(listed) <= 40 / 0.8
    assert found["detected"] == {
        "rate": 0.1, "n": len(listed), "n_tested": 400, "n_null": 400, "smallest_p": pytest.approx(1 / 401),
    }  # fmt: skip
    assert scores.filter(role="unseen")["p_value"].null_count() == 400


def test_a_row_without_a_score_is_below_all() -> None:
    rows = rows_of(60, 60)
    rng = np.random.default_rng(0)
    scoring = LabelInference(resamples=100, memorization_score="entropy")
    scores, _ = figures(rows, guess(rows, rng.random(120) < 0.5), guess(rows, rng.random(120) < 0.5), scoring)
    without = scores.filter(pl.col("role") == "target", pl.col("memorization_score").is_null())
    assert len(without) > 10
    assert set(without["p_value"]) == {1.0}


def test_without_unseen_rows_no_row_has_a_p_value() -> None:
    rows = rows_of(20, 0)
    scores, found = figures(rows, guess(rows, np.ones(20, dtype=bool)), guess(rows, np.zeros(20, dtype=bool)))
    assert scores["p_value"].null_count() == 20
    assert found["detected"] is None
    assert found["power"]["corrected_gap"] is None
    assert found["power"]["gap"] == 0.0


def test_the_share_of_memorized_rows_is_recovered() -> None:
    """Of rows that the encoder would name half of, a fifth is memorized: the gap is a tenth, the rate a fifth."""
    rows = rows_of(4000, 4000)
    rng = np.random.default_rng(0)
    planted = np.arange(8000) < 800
    target = guess(rows, planted | (rng.random(8000) < 0.5))
    _, found = figures(rows, target, guess(rows, rng.random(8000) < 0.3))
    assert found["rate"]["low"] < 0.2 < found["rate"]["high"]
    assert found["rate"]["value"] == pytest.approx(2 * found["corrected_gap"]["top1"]["100"]["value"], rel=0.1)
    assert found["power"]["corrected_gap"] == pytest.approx(2.8 * np.sqrt((0.46 + 0.46) / 4000), rel=0.2)


def test_shares_have_exact_intervals() -> None:
    from scipy.stats import binomtest

    rows = rows_of(100, 100)
    _, found = figures(rows, guess(rows, np.ones(200, dtype=bool)), guess(rows, np.arange(200) % 5 == 0))
    cells = found["roles"]["target"]["top1"]
    exact = binomtest(20, 100).proportion_ci(0.95, "exact")
    assert (cells["100"]["reference"]["low"], cells["100"]["reference"]["high"]) == pytest.approx(tuple(exact))
    # Five rows that are all right do not prove that all are.
    low = binomtest(5, 5).proportion_ci(0.95, "exact").low
    assert cells["5"]["target"]["low"] == pytest.approx(low)
    assert cells["5"]["gap"]["low"] < cells["100"]["gap"]["low"]


def test_unseen_rows_count_as_much_as_their_weights_say() -> None:
    rows = rows_of(100, 100)
    right = np.arange(200) % 2 == 0
    heavy = np.where(np.arange(200) < 100, 1.0, np.where(right, 1.6, 0.4))
    scoring = LabelInference(resamples=300, adjust="weight")
    weighted = rows.with_columns(weight=heavy)
    scores, found = figures(weighted, guess(rows, right), guess(rows, np.zeros(200, dtype=bool)), scoring)
    assert found["roles"]["unseen"]["top1"]["100"]["target"]["value"] == pytest.approx(0.8)
    assert found["roles"]["unseen"]["quadrants"]["memorized"]["value"] == pytest.approx(0.8)
    assert found["corrected_gap"]["top1"]["100"]["value"] == pytest.approx(0.5 - 0.8)
    # A score that half of the rows reach, which count 0.8 of all.
    of_right = scores.filter(pl.col("role") == "target", pl.col("target_correct"))["p_value"]
    np.testing.assert_allclose(of_right.to_numpy(), (1 + 80) / 101)


def test_whole_classes_are_drawn_where_that_is_asked() -> None:
    """The encoder knows two of four classes whole: with classes drawn, that is all that is known of its accuracy."""
    rows = rows_of(400, 400)
    knows = rows["label"].is_in(["a", "b"]).to_numpy()
    answers = guess(rows, knows), guess(rows, np.zeros(800, dtype=bool))
    gaps = {
        cluster: figures(rows, *answers, LabelInference(resamples=500, cluster=cluster))[1]["roles"]["target"]["top1"]
        for cluster in ("row", "label")
    }
    assert gaps["row"]["100"]["gap"]["high"] < 0.56
    assert gaps["label"]["100"]["gap"]["low"] == 0.0
    assert gaps["label"]["100"]["gap"]["high"] == 1.0


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
