"""The test of object sets: what is planted comes out, and nothing else."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from dejavu_exp import evidence, tables
from dejavu_exp.errors import ConfigError
from dejavu_exp.evidence import Evidence
from dejavu_exp.scoring import ObjectInference

LABELS = [f"o{code:02d}" for code in range(20)]
SCORING = ObjectInference(resamples=300)
GAPS = ("ppg", "prg", "aucg", "precision_gap", "f_gap", "gap")


def scoring_with(**changes: Any) -> ObjectInference:
    return ObjectInference(**changes)


def rows_of(n_target: int, n_unseen: int, seed: int = 0, n_objects: int = 4) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    count = n_target + n_unseen
    return pl.DataFrame(
        {
            "id": [f"{row:05d}" for row in range(count)],
            "role": ["target"] * n_target + ["unseen"] * n_unseen,
            "label": [None] * count,
            "status": ["ok"] * count,
            "truth": [sorted(rng.choice(LABELS, n_objects, replace=False)) for _ in range(count)],
        },
        schema_overrides={"label": pl.String, "truth": pl.List(pl.String)},
    )


def shares(rows: pl.DataFrame, probabilities: np.ndarray) -> Evidence:
    confidence = np.zeros(len(rows))
    distance = np.arange(len(rows), dtype=np.float64)
    return evidence.from_probabilities(
        rows["id"].to_list(), LABELS, probabilities, confidence=confidence, distance=distance
    )


def knows(rows: pl.DataFrame, chance: Any, seed: int = 0, false: float = 0.05) -> Evidence:
    """Names each true object with a chance, one for all rows or one a row, and others by mistake."""
    rng = np.random.default_rng(seed)
    true = np.array([[label in objects for label in LABELS] for objects in rows["truth"].to_list()])
    chance = np.broadcast_to(np.asarray(chance, dtype=float).reshape(-1, 1), (len(rows), 1))
    named = rng.random(true.shape) < np.where(true, chance, false)
    return shares(rows, np.where(named, rng.integers(1, 11, true.shape) / 10, 0))


def named(found: Evidence, ids: tuple[str, ...]) -> Evidence:
    return Evidence(ids, found.labels, found.probabilities, found.ranking, found.confidence, found.tied, found.distance)


def measure(
    rows: pl.DataFrame, target: Evidence, reference: Evidence, scoring: ObjectInference = SCORING
) -> tuple[pl.DataFrame, dict[str, Any]]:
    scores = scoring.score(rows, target, reference, "r")
    assert dict(scores.schema) == tables.OBJECT_SCORES
    return scores, scoring.figures(scores, rows, seed=0)


def ends(estimate: dict[str, Any]) -> tuple[Any, Any, Any]:
    return estimate["value"], estimate["low"], estimate["high"]


def test_the_same_evidence_twice_gives_exactly_zero() -> None:
    rows = rows_of(80, 80)
    same = knows(rows, 0.5)
    for compat in ("corrected", "authors"):
        scores, found = measure(rows, same, same, scoring_with(resamples=200, compat=compat))
        for role in ("target", "unseen"):
            for prediction in tables.PREDICTIONS:
                for gap in GAPS:
                    assert ends(found["roles"][role][prediction][gap]) == (0.0, 0.0, 0.0)
            for ranking in ("object_gap", "min_distance", "correct_objects", "split_half"):
                for percent in ("0.1", "1", "10"):
                    top = found["roles"][role]["fine_grained"][ranking][percent]
                    assert ends(top["recall_gap"]) == (0.0, 0.0, 0.0)
                    assert top["precision_gap"]["value"] in (0.0, None)
        assert ends(found["corrected"]["all"]["gap"]) == (0.0, 0.0, 0.0)
        assert all(ends(one["gap"]) == (0.0, 0.0, 0.0) for one in found["per_object"])
        assert scores["memorization_score"].abs().max() == 0.0
        assert set(scores["quadrant"]) <= {"correlated", "unassociated"}
        assert "no memorization" in SCORING.verdict(found, "r", random=False).lower()


def test_an_encoder_that_remembers_everything_has_prg_one() -> None:
    rows = rows_of(60, 60)
    is_target = (rows["role"] == "target").to_numpy()
    scores, found = measure(rows, knows(rows, is_target, false=0), shares(rows, np.zeros((120, 20))))
    for prediction in tables.PREDICTIONS:
        assert found["roles"]["target"][prediction]["prg"]["value"] == 1.0
        assert found["roles"]["unseen"][prediction]["prg"]["value"] == 0.0
        assert found["corrected"][prediction]["gap"]["value"] == 1.0
    assert found["roles"]["target"]["all"]["target_recall"]["value"] == 1.0
    assert found["roles"]["target"]["top1"]["target_recall"]["value"] == 0.25
    # The reference predicts nothing: its precision is undefined, and so is its gap.
    precision = found["roles"]["target"]["all"]["reference_precision"]
    assert (precision["value"], precision["n_used"], precision["n_excluded"]) == (None, 0, 60)
    assert found["roles"]["target"]["all"]["ppg"]["value"] is None
    target = scores.filter(role="target")
    assert set(target["quadrant"]) == {"memorized"}
    assert target["target_correct"].all()
    assert not target["reference_correct"].any()
    assert target["target_found"].to_list() == rows.filter(role="target")["truth"].to_list()
    assert all(one["gap"]["value"] == 1.0 for one in found["per_object"])
    assert SCORING.verdict(found, "r", random=False).startswith("Memorization is shown")
    assert SCORING.verdict(found, "r", random=True).startswith("Nothing is measured")


def test_prg_is_the_share_memorized_less_the_share_forgotten() -> None:
    rows = rows_of(300, 0)
    _, found = measure(rows, knows(rows, 0.6, seed=1), knows(rows, 0.4, seed=2))
    of_role = found["roles"]["target"]
    shares_of = {name: of_role["quadrants"][name]["value"] for name in of_role["quadrants"]}
    assert of_role["all"]["prg"]["value"] == pytest.approx(shares_of["memorized"] - shares_of["forgotten"], abs=1e-12)
    assert sum(shares_of.values()) == pytest.approx(1)
    assert of_role["all"]["gap"] == of_role["all"]["prg"]


def test_knowing_better_is_not_memorizing() -> None:
    rows = rows_of(300, 300)
    _, found = measure(rows, knows(rows, 0.8, seed=1), knows(rows, 0.4, seed=2))
    assert found["roles"]["target"]["all"]["prg"]["low"] > 0.3
    corrected = found["corrected"]["all"]["gap"]
    assert corrected["low"] <= 0 <= corrected["high"]
    assert SCORING.verdict(found, "r", random=False).startswith("No memorization is shown")


def test_shuffled_evidence_shows_nothing() -> None:
    """Of 40 runs of evidence dealt to other rows at most a few may show something at 95 %."""
    alarms = 0
    for seed in range(40):
        rows = rows_of(80, 80, seed)
        other = rows.with_columns(truth=pl.col("truth").shuffle(seed))
        _, found = measure(
            rows, knows(other, 1.0, seed=seed), knows(rows, 0.3, seed=seed + 100), scoring_with(resamples=100)
        )
        alarms += SCORING.verdict(found, "r", random=False).startswith("Memorization is shown")
    assert alarms <= 5


def oracle(predicted: set[str], true: set[str]) -> tuple[float | None, float, float]:
    right = len(predicted & true)
    precision = right / len(predicted) if predicted else None
    recall = right / len(true)
    return precision, recall, 2 * right / (len(predicted) + len(true))


def test_every_row_equals_a_loop_over_sets() -> None:
    rows = rows_of(60, 0, n_objects=3)
    # Repeats count once; an object that no column holds cannot be found.
    lists = [[*objects, objects[0]] + ["elsewhere"] * (row % 2) for row, objects in enumerate(rows["truth"].to_list())]
    rows = rows.with_columns(truth=pl.Series(lists))
    both = {"target": knows(rows, 0.5, seed=1, false=0.3), "reference": knows(rows, 0.2, seed=2, false=0.6)}
    both["target"].probabilities[0] = 0
    both["target"].ranking[0] = -1
    both["target"].probabilities[1] = 0.5
    scores, _ = measure(rows, both["target"], both["reference"])
    best = []
    for row, (line, objects) in enumerate(zip(scores.to_dicts(), map(set, lists), strict=True)):
        for who, found in both.items():
            ranked = [LABELS[code] for code in found.ranking[row] if code >= 0]
            every = {label for label, share in zip(LABELS, found.probabilities[row], strict=True) if share > 0}
            for prediction, predicted in (("all", every), ("top10", set(ranked[:10])), ("top1", set(ranked[:1]))):
                mine = tuple(line[f"{who}_{measure}_{prediction}"] for measure in ("precision", "recall", "f"))
                assert mine == pytest.approx(oracle(predicted, objects))
            assert line[f"{who}_found"] == sorted(every & objects)
        assert line["objects"] == sorted(objects)
        t, r = line["target_recall_all"], line["reference_recall_all"]
        expected = "memorized" if t > r else "forgotten" if t < r else "correlated" if t else "unassociated"
        assert line["quadrant"] == expected
        gained = [
            both["target"].probabilities[row, LABELS.index(one)]
            - both["reference"].probabilities[row, LABELS.index(one)]
            if one in LABELS
            else 0.0
            for one in objects
        ]
        best.append((max(gained), sum(gained) / len(gained), t - r))
    for place, name in enumerate(("object", "probability", "recall")):
        scores, _ = measure(
            rows, both["target"], both["reference"], scoring_with(memorization_score=name, resamples=100)
        )
        np.testing.assert_allclose(scores["memorization_score"], [row[place] for row in best], atol=1e-12)


def test_rows_without_objects_or_evidence_stay_and_say_so() -> None:
    rows = rows_of(6, 0).with_columns(
        status=pl.Series(["ok", "ok", "ok", "unreadable", "ok", "ok"]),
        truth=pl.Series([[], None, ["o01"], ["o01"], ["o02"], ["zz"]], dtype=pl.List(pl.String)),
    )
    ok = rows.filter(pl.col("status") == "ok").with_columns(truth=pl.col("truth").fill_null([]))
    target, reference = knows(ok, 1.0), knows(ok, 1.0)
    reference.probabilities[3] = np.nan
    scores, found = measure(rows, target, reference)
    assert scores["id"].to_list() == rows["id"].to_list()
    assert scores["status"].to_list() == ["no_objects", "no_annotation", "ok", "unreadable", "no_evidence", "ok"]
    assert scores["target_recall_all"].to_list() == [None, None, 1.0, None, None, 0.0]
    recall = found["roles"]["target"]["all"]["target_recall"]
    assert (recall["value"], recall["n_used"], recall["n_excluded"]) == (0.5, 2, 4)
    assert found["roles"]["target"]["fine_grained"]["split_half"]["10"]["recall_gap"]["n_used"] == 0
    assert [one["object"] for one in found["per_object"]] == ["o01", "zz"]


def test_without_usable_rows_everything_is_undefined() -> None:
    rows = rows_of(5, 5).with_columns(truth=pl.Series([[]] * 10, dtype=pl.List(pl.String)))
    for compat in ("corrected", "authors"):
        scoring = scoring_with(resamples=100, compat=compat)
        _, found = measure(rows, knows(rows, 1.0), knows(rows, 1.0), scoring)
        assert found["roles"]["target"]["all"]["gap"] == {
            "value": None, "low": None, "high": None, "n_used": 0, "n_excluded": 5
        }  # fmt: skip
        assert "corrected" not in found
        assert found["per_object"] == []
        assert scoring.verdict(found, "r", random=False).startswith("Nothing is measured")


def test_without_unseen_rows_the_verdict_says_what_the_raw_gap_may_contain() -> None:
    rows = rows_of(50, 0)
    _, found = measure(rows, knows(rows, 1.0), knows(rows, 0.1))
    assert "corrected" not in found
    assert "without unseen rows" in SCORING.verdict(found, "r", random=False)


def test_split_half_is_silent_where_ranking_by_the_gap_is_not() -> None:
    """Two equally noisy predictors: the rows with the largest gap have a gap, by selection alone."""
    rows = rows_of(600, 0, n_objects=6)
    covered = []
    for seed in range(20):
        _, found = measure(
            rows, knows(rows, 0.5, seed=seed), knows(rows, 0.5, seed=100 + seed), scoring_with(resamples=100)
        )
        top = found["roles"]["target"]["fine_grained"]
        assert top["object_gap"]["10"]["recall_gap"]["low"] > 0.2
        assert top["object_gap"]["10"]["optimistic"]
        assert top["correct_objects"]["10"]["recall_gap"]["low"] > 0.2
        honest = top["split_half"]["10"]
        assert not honest["optimistic"]
        covered.append(honest["recall_gap"]["low"] <= 0 <= honest["recall_gap"]["high"])
    assert sum(covered) >= 16


def test_split_half_finds_rows_that_are_remembered() -> None:
    rows = rows_of(500, 0, n_objects=6)
    remembered = np.arange(500) % 10 == 0
    _, found = measure(rows, knows(rows, np.where(remembered, 1.0, 0.2), seed=1), knows(rows, 0.2, seed=2))
    assert found["roles"]["target"]["fine_grained"]["split_half"]["10"]["recall_gap"]["low"] > 0.4


def test_top_rows_do_not_depend_on_the_order_of_rows_unless_as_the_authors_have_it() -> None:
    rows = rows_of(100, 0)
    target, reference = knows(rows, 0.5, seed=1), knows(rows, 0.5, seed=2)
    renamed = rows.with_columns(id=rows["id"].reverse())
    for compat, same in (("corrected", True), ("authors", False)):
        scoring = scoring_with(resamples=100, compat=compat)
        values = []
        for frame in (rows, renamed):
            ids = tuple(frame["id"])
            _, found = measure(frame, named(target, ids), named(reference, ids), scoring)
            values.append(found["roles"]["target"]["fine_grained"]["correct_objects"]["10"]["precision_gap"]["value"])
        assert (values[0] == pytest.approx(values[1], abs=1e-12)) == same


def test_per_object_equals_a_count() -> None:
    rows = rows_of(200, 0)
    scores, found = measure(rows, knows(rows, 0.7, seed=1), knows(rows, 0.4, seed=2))
    gaps = [one["gap"]["value"] for one in found["per_object"]]
    assert gaps == sorted(gaps, reverse=True)
    for one in found["per_object"]:
        holding = scores.filter(pl.col("objects").list.contains(one["object"]))
        assert one["rows"] == len(holding)
        for who in ("target", "reference"):
            assert one[who]["value"] == pytest.approx(holding[f"{who}_found"].list.contains(one["object"]).mean())
        assert one["gap"]["low"] <= one["gap"]["value"] <= one["gap"]["high"]
        difference = holding["target_found"].list.contains(one["object"]).cast(int) - holding[
            "reference_found"
        ].list.contains(one["object"]).cast(int)
        spread = difference.to_numpy().std() / np.sqrt(len(holding))
        assert (one["gap"]["high"] - one["gap"]["low"]) == pytest.approx(2 * 1.96 * spread, rel=0.25)


def test_planted_rows_are_found() -> None:
    rows = rows_of(200, 0)
    planted = np.arange(200) % 4 == 0
    images = rows.select("id", planted_repeats=pl.Series(np.where(planted, 8, 1)))
    scores = SCORING.score(rows, knows(rows, np.where(planted, 1.0, 0.05), seed=1), knows(rows, 0.05, seed=2), "r")
    found = SCORING.figures(scores, images, seed=0)["planted"]
    assert found["auroc"]["low"] > 0.9
    assert [(group["planted"], group["rows"]) for group in found["groups"]] == [(False, 150), (True, 50)]
    assert found["groups"][1]["target_recall"] == 1.0
    with_background = images.with_columns(background=pl.lit("unique"))
    groups = SCORING.figures(scores, with_background, seed=0)["planted"]["groups"]
    assert [group["background"] for group in groups] == ["unique", "unique"]


def test_heldout_rows_give_both_directions() -> None:
    rows = rows_of(100, 0)
    back = rows.with_columns(id="h" + pl.col("id"), role=pl.lit("heldout"))
    strong, weak = knows(rows, 0.9, seed=1), knows(rows, 0.1, seed=2)
    ids = tuple(back["id"])
    other = SCORING.score(back, named(strong, ids), named(weak, ids), "r")
    scores = pl.concat([SCORING.score(rows, strong, weak, "r"), other])
    found = SCORING.figures(scores, rows, seed=0)
    assert found["both_directions"]["all"]["gap"]["value"] == pytest.approx(
        found["roles"]["target"]["all"]["gap"]["value"]
    )
    assert found["both_directions"]["all"]["gap"]["n_used"] == 200


def test_predictors_with_other_columns_or_none() -> None:
    """A reference need not know the same objects, nor any."""
    rows = rows_of(30, 0)
    ids = rows["id"].to_list()
    target = knows(rows, 1.0)
    few = evidence.from_probabilities(ids, ["o03", "new"], np.full((30, 2), 0.5))
    none = Evidence(
        tuple(ids), (), np.zeros((30, 0)), np.zeros((30, 0), dtype=np.int64), np.zeros(30), np.zeros(30, dtype=bool)
    )
    scores, _ = measure(rows, target, few)
    assert scores["reference_found"].to_list() == [["o03"] * ("o03" in objects) for objects in rows["truth"]]
    scores, _ = measure(rows, target, none)
    assert scores["reference_recall_all"].to_list() == [0.0] * 30
    assert scores["reference_distance"].null_count() == 30


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"predictions": ()}, r"scoring\.predictions=\[\]: must be one or more of all, top10, top1"),
        ({"predictions": ("all", "all")}, "each once"),
        ({"predictions": ("top5",)}, r"scoring\.predictions=\['top5'\]"),
        ({"top_fractions": (0.0,)}, r"scoring\.top_fractions=\[0\.0\]: each must lie in"),
        ({"memorization_score": "entropy"}, r"scoring\.memorization_score=entropy: must be object"),
        ({"compat": "theirs"}, r"scoring\.compat=theirs"),
        ({"level": 2}, r"scoring\.level=2"),
        ({"resamples": 5}, r"scoring\.resamples=5"),
    ],
)
def test_settings_that_cannot_work_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectInference(**given)


def test_objects_that_the_bank_lacks_are_told() -> None:
    assert SCORING.check_bank([]) == []
    (note,) = SCORING.check_bank(["cat", "dog"])
    assert "(2: cat, dog)" in note
