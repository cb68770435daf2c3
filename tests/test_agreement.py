"""How far references agree: against libraries, a slow bootstrap, and planted sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import binom, binomtest, pearsonr, rankdata, spearmanr
from sklearn.metrics import cohen_kappa_score, jaccard_score

from dejavu_exp import agreement, metrics, provenance, statistics, tables
from dejavu_exp.splits import NpySplit

FRACTIONS = (1.0, 0.2)


def scores(n_rows: int = 60, references: tuple[str, ...] = ("one", "two"), seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    frames = []
    for role in ("target", "unseen"):
        target = rng.random(n_rows) < 0.6
        for name in references:
            reference = rng.random(n_rows) < 0.4
            places = metrics.quadrant(target, reference)
            frames.append(
                pl.DataFrame(
                    {
                        "id": [f"{role}{row:03d}" for row in range(n_rows)],
                        "role": role,
                        "label": ["fox" if row % 2 else "boat" for row in range(n_rows)],
                        "reference": name,
                        "status": "ok",
                        "target_correct": target,
                        "reference_correct": reference,
                        "reference_confidence": -rng.random(n_rows),
                        "quadrant": [metrics.QUADRANTS[place] for place in places],
                        "memorization_score": rng.normal(size=n_rows).round(1),
                    }
                )
            )
    found = pl.concat(frames)
    found = found.with_columns(weight=pl.lit(1.0))
    missing = [pl.lit(None, dtype).alias(name) for name, dtype in tables.SCORES.items() if name not in found.columns]
    return found.with_columns(missing).select(list(tables.SCORES))


def compare(frame: pl.DataFrame, resamples: int = 200) -> Any:
    """Rounded: a product with more columns may add up in another order."""
    found = agreement.compare_references(frame, FRACTIONS, 0.9, resamples, 0)
    return json.loads(json.dumps(found, allow_nan=False), parse_float=lambda text: round(float(text), 12))


def column(frame: pl.DataFrame, name: str, reference: str, role: str = "target") -> np.ndarray:
    return frame.filter(pl.col("reference") == reference, pl.col("role") == role).sort("id")[name].to_numpy()


def test_coefficients_are_those_of_the_libraries() -> None:
    frame = scores()
    (pair,) = compare(frame)["pairs"]
    sets = {
        (kind, name): column(frame, "quadrant", name) == kind
        for kind in ("memorized", "correlated")
        for name in ("one", "two")
    }
    correct = [column(frame, "reference_correct", name) for name in ("one", "two")]
    assert pair["kappa_memorized"]["value"] == pytest.approx(
        cohen_kappa_score(sets["memorized", "one"], sets["memorized", "two"])
    )
    assert pair["kappa_correct"]["value"] == pytest.approx(cohen_kappa_score(*correct))
    for kind in ("memorized", "correlated"):
        assert pair[f"jaccard_{kind}"]["value"] == pytest.approx(jaccard_score(sets[kind, "one"], sets[kind, "two"]))
    ranked = spearmanr(*(column(frame, "memorization_score", name) for name in ("one", "two")))
    assert pair["rank_correlation"]["value"] == pytest.approx(ranked.statistic)


def test_differences_of_gaps_are_paired_and_corrected_by_unseen_rows() -> None:
    frame = scores()
    (pair,) = compare(frame)["pairs"]
    gaps = {
        (role, name): metrics.accuracy_gap(
            column(frame, "target_correct", name, role), column(frame, "reference_correct", name, role)
        )
        for role in ("target", "unseen")
        for name in ("one", "two")
    }
    difference = {role: gaps[role, "one"] - gaps[role, "two"] for role in ("target", "unseen")}
    assert pair["target"]["100"]["value"] == pytest.approx(difference["target"])
    assert pair["unseen"]["100"]["value"] == pytest.approx(difference["unseen"])
    assert pair["corrected"]["100"]["value"] == pytest.approx(difference["target"] - difference["unseen"])
    assert list(pair["target"]) == ["100", "20"]
    assert pair["target"]["100"]["n_used"] == 60


def test_intervals_are_those_of_a_bootstrap_row_by_row() -> None:
    """One stream of resamples serves all pairs: the last one's intervals come from the first draws of the generator."""
    names = ("one", "two", "three")
    frame = scores(references=names)
    resamples = 300
    pair = compare(frame, resamples)["pairs"][-1]
    rng = provenance.rng(0, "bootstrap/agreement/target")
    sets = [[column(frame, "quadrant", name) == kind for name in names[1:]] for kind in ("memorized", "correlated")]
    correct = [column(frame, "reference_correct", name) for name in names[1:]]
    confidence = [column(frame, "reference_confidence", name) for name in names[1:]]
    ranks = [rankdata(column(frame, "memorization_score", name)) for name in names[1:]]
    samples: dict[str, list[float]] = {name: [] for name in (*agreement.MEASURES, "100", "20")}
    for counts in statistics.resample(60, resamples, rng.spawn(1)[0]):
        rows = np.repeat(np.arange(60), counts.astype(int))
        samples["kappa_memorized"].append(cohen_kappa_score(sets[0][0][rows], sets[0][1][rows]))
        samples["kappa_correct"].append(cohen_kappa_score(correct[0][rows], correct[1][rows]))
        for place, kind in enumerate(("memorized", "correlated")):
            samples[f"jaccard_{kind}"].append(jaccard_score(sets[place][0][rows], sets[place][1][rows]))
        samples["rank_correlation"].append(pearsonr(ranks[0][rows], ranks[1][rows]).statistic)
        surest = [(correct[who][rows][np.argsort(-confidence[who][rows], kind="stable")[:12]]) for who in (0, 1)]
        samples["100"].append(correct[1][rows].mean() - correct[0][rows].mean())
        samples["20"].append(surest[1].mean() - surest[0].mean())
    for name, values in samples.items():
        estimate = pair["target"].get(name) or pair[name]
        assert [estimate["low"], estimate["high"]] == pytest.approx(
            np.quantile(values, [0.05, 0.95], method="weibull").tolist()
        )


def test_mcnemars_test_counts_the_rows_that_tell_two_references_apart() -> None:
    frame = scores(references=("one", "two", "three"))
    pairs = compare(frame)["pairs"]
    right = {name: column(frame, "reference_correct", name).astype(bool) for name in ("one", "two", "three")}
    for pair in pairs:
        first, second = right[pair["first"]], right[pair["second"]]
        only = [int((first & ~second).sum()), int((second & ~first).sum())]
        assert [pair["mcnemar"][key] for key in ("only_first", "only_second")] == only
        assert pair["mcnemar"]["p_value"] == pytest.approx(binomtest(only[0], sum(only)).pvalue)
    smallest = min(pairs, key=lambda pair: pair["mcnemar"]["p_value"])["mcnemar"]
    assert smallest["p_holm"] == pytest.approx(min(1, 3 * smallest["p_value"]))


def test_weights_of_unseen_rows_and_whole_classes_decide_the_corrected_difference() -> None:
    frame = scores()
    heavy = pl.when(pl.col("label") == "fox").then(1.5).otherwise(0.5)
    weighted = frame.with_columns(weight=pl.when(pl.col("role") == "unseen").then(heavy).otherwise(1.0))
    (plain,), (pair,) = compare(frame)["pairs"], compare(weighted)["pairs"]
    assert pair["target"] == plain["target"]
    weights = column(weighted, "weight", "one", "unseen")
    means = [np.average(column(frame, "reference_correct", name, "unseen"), weights=weights) for name in ("one", "two")]
    assert pair["unseen"]["100"]["value"] == pytest.approx(means[1] - means[0])
    # Two classes that are drawn whole: a resample holds one of them or both.
    (classes,) = agreement.compare_references(frame, (1.0,), 0.9, 200, 0, by_label=True)["pairs"]
    gaps = [
        column(frame.filter(pl.col("label").is_in(labels)), "reference_correct", name).mean()
        for labels in (["fox"], ["boat"])
        for name in ("two", "one")
    ]
    ends = sorted([gaps[0] - gaps[1], gaps[2] - gaps[3]])
    assert [classes["target"]["100"][end] for end in ("low", "high")] == pytest.approx(ends)


def test_a_reference_agrees_with_itself() -> None:
    frame = scores(references=("one",))
    twin = pl.concat([frame, frame.with_columns(reference=pl.lit("twin"))])
    (pair,) = compare(twin)["pairs"]
    for measure in agreement.MEASURES:
        assert pair[measure]["value"] == pytest.approx(1.0)
        assert pair[measure]["low"] == pytest.approx(1.0)
    assert pair["target"]["100"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n_used": 60, "n_excluded": 0}


def test_what_is_undefined_is_null_with_its_counts() -> None:
    frame = scores().with_columns(
        quadrant=pl.lit("unassociated"), memorization_score=pl.lit(0.5), reference_correct=pl.lit(False)
    )
    (pair,) = compare(frame)["pairs"]
    for measure in agreement.MEASURES:
        assert {pair[measure][key] for key in ("value", "low", "high")} == {None}
        assert pair[measure]["n_used"] == 60
    assert compare(frame)["matrix"] == {measure: [[None, None], [None, None]] for measure in agreement.MEASURES}


def test_ranks_are_of_the_rows_where_both_scores_are_defined() -> None:
    frame = scores()
    memorized = frame.with_columns(
        memorization_score=pl.when(pl.col("quadrant") == "memorized").then("memorization_score")
    )
    (pair,) = compare(memorized)["pairs"]
    values = [column(memorized, "memorization_score", name) for name in ("one", "two")]
    both = np.isfinite(values[0]) & np.isfinite(values[1])
    found = pair["rank_correlation"]
    assert found["value"] == pytest.approx(spearmanr(values[0][both], values[1][both]).statistic)
    assert (found["n_used"], found["n_excluded"]) == (both.sum(), 60 - both.sum())


def test_scores_that_are_never_both_defined_have_no_correlation() -> None:
    frame = scores().with_columns(memorization_score=pl.when(pl.col("reference") == "one").then("memorization_score"))
    found = compare(frame)
    (pair,) = found["pairs"]
    assert pair["rank_correlation"] == {"value": None, "low": None, "high": None, "n_used": 0, "n_excluded": 60}
    assert found["matrix"]["rank_correlation"] == [[1.0, None], [None, None]]


def test_rows_that_one_reference_cannot_judge_are_left_out_and_counted() -> None:
    frame = scores()
    lost = (pl.col("reference") == "two") & pl.col("id").is_in(["target000", "target001"])
    partial = frame.with_columns(status=pl.when(lost).then(pl.lit("no_evidence")).otherwise("status"))
    (pair,) = compare(partial)["pairs"]
    assert (pair["kappa_memorized"]["n_used"], pair["kappa_memorized"]["n_excluded"]) == (58, 2)
    without = frame.filter(~pl.col("id").is_in(["target000", "target001"]))
    (expected,) = compare(without)["pairs"]
    for measure in agreement.MEASURES:
        assert pair[measure] == {**expected[measure], "n_excluded": 2}
    assert pair["target"]["20"] == {**expected["target"]["20"], "n_excluded": 2}


def test_pairs_that_judge_different_rows_keep_their_own() -> None:
    frame = scores(references=("one", "two", "three"))
    lost = (pl.col("reference") == "two") & pl.col("id").is_in(["target000", "unseen001"])
    partial = frame.with_columns(status=pl.when(lost).then(pl.lit("no_evidence")).otherwise("status"))
    found, whole = compare(partial)["pairs"], compare(frame)["pairs"]
    assert found[1] == whole[1]
    for place, names in ((0, ("one", "two")), (2, ("two", "three"))):
        (alone,) = compare(partial.filter(pl.col("reference").is_in(names)))["pairs"]
        # The p-value alone depends on how many pairs there are.
        adjusted = [pair["mcnemar"].pop("p_holm") for pair in (found[place], alone)]
        assert adjusted[0] >= adjusted[1]
        assert found[place] == alone
        assert found[place]["corrected"]["100"]["n_used"] == 118
        assert found[place]["corrected"]["100"]["n_excluded"] == 2


def test_rows_that_nobody_can_judge_are_undefined_not_zero() -> None:
    found = compare(scores().with_columns(status=pl.lit("no_evidence")))
    (pair,) = found["pairs"]
    for estimate in (pair["target"]["20"], pair["corrected"]["100"], pair["jaccard_memorized"]):
        assert estimate["value"] is None
        assert estimate["n_used"] == 0
    assert found["correlated_by_all"] == {"value": None, "low": None, "high": None, "n_used": 0, "n_excluded": 60}


def test_row_order_plays_no_part() -> None:
    frame = scores()
    shuffled = frame.sample(fraction=1, shuffle=True, seed=3).sort("reference", maintain_order=True)
    assert compare(shuffled) == compare(frame.sort("reference", maintain_order=True))


def test_the_matrix_is_symmetric_and_names_its_order() -> None:
    found = compare(scores(references=("one", "two", "three")))
    assert found["references"] == ["one", "two", "three"]
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [
        ("one", "two"),
        ("one", "three"),
        ("two", "three"),
    ]
    for measure in agreement.MEASURES:
        matrix = np.array(found["matrix"][measure])
        np.testing.assert_array_equal(matrix, matrix.T)
        assert (matrix.diagonal() == 1).all()
    assert found["matrix"]["kappa_correct"][0][2] == found["pairs"][1]["kappa_correct"]["value"]


def test_one_reference_or_no_unseen_rows_are_no_obstacle() -> None:
    alone = compare(scores(references=("one",)))
    assert alone["pairs"] == []
    (pair,) = compare(scores().filter(pl.col("role") == "target"))["pairs"]
    assert "corrected" not in pair


def test_rows_of_another_role_count_nowhere() -> None:
    frame = scores()
    other = frame.filter(pl.col("role") == "target").with_columns(role=pl.lit("heldout"), id="h" + pl.col("id"))
    assert compare(pl.concat([frame, other])) == compare(frame)


def test_the_list_of_correlated_rows_counts_as_an_image_folder_does() -> None:
    frame = scores(6)
    correlated = {"target001", "target004"}
    frame = frame.with_columns(
        quadrant=pl.when(pl.col("id").is_in(list(correlated))).then(pl.lit("correlated")).otherwise(pl.lit("memorized"))
    )
    names = [f"{role}{row:03d}" for role in ("target", "unseen") for row in range(6)]
    manifest = pl.DataFrame(
        {
            "id": names,
            "path": [f"{name}.png" for name in names],
            "origin": ["train"] * 6 + ["val"] * 6,
            "label": ["fox" if row % 2 else "boat" for row in range(12)],
        }
    )
    found = agreement.correlated_by_all(frame, manifest.sample(fraction=1, shuffle=True, seed=1))
    # boat: 000, 002, 004, then fox: 001, 003, 005.
    assert found.rows() == [("target004", "boat", "train", 2), ("target001", "fox", "train", 3)]
    share = compare(frame)["correlated_by_all"]
    assert (share["value"], share["n_used"]) == (pytest.approx(2 / 6), 6)


def test_a_row_that_one_reference_disputes_is_not_correlated_by_all() -> None:
    frame = scores(6).with_columns(quadrant=pl.lit("correlated"))
    disputed = (pl.col("reference") == "two") & (pl.col("id") == "target003")
    frame = frame.with_columns(quadrant=pl.when(disputed).then(pl.lit("memorized")).otherwise("quadrant"))
    manifest = pl.DataFrame(
        {"id": [f"target{row:03d}" for row in range(6)], "path": list("abcdef"), "origin": "train", "label": "fox"}
    )
    assert set(agreement.correlated_by_all(frame, manifest)["position"]) == {0, 1, 2, 4, 5}


def test_the_list_of_correlated_rows_is_read_back_by_the_split_of_released_lists(tmp_path: Path) -> None:
    frame = scores(12)
    rows: list[dict[str, Any]] = [
        {"id": f"{role}{row:03d}", "path": f"{row % 5}/{role}{row:03d}.png", "origin": origin, "label": "abc"[row % 3]}
        for role, origin in (("target", "train"), ("public", "train"), ("unseen", "val"))
        for row in range(12)
    ]
    rows[12] |= {"label": None}
    rows[13] |= {"status": "unreadable"}
    manifest = pl.DataFrame(
        [{**dict.fromkeys(tables.MANIFEST), "status": "ok", **row} for row in rows], schema=tables.MANIFEST
    )
    disputed = (pl.col("reference") == "one") & (pl.col("id") >= "target006")
    frame = frame.with_columns(quadrant=pl.when(disputed).then("quadrant").otherwise(pl.lit("correlated")))
    found = agreement.correlated_by_all(frame, manifest)
    np.save(tmp_path / "correlated.npy", found["position"].to_numpy(), allow_pickle=False)
    split = NpySplit(str(tmp_path / "correlated.npy"), None, None, None, None, min_side_px=1)
    roles = split.assign(manifest, seed=0)
    assert set(roles.filter(role="target")["id"]) == set(found["id"])
    assert len(found) >= 6


def test_the_share_that_all_call_correlated_has_a_binomial_interval() -> None:
    frame = scores(200)
    judged = pl.concat([frame.filter(pl.col("reference") == name) for name in ("one", "two")])
    share = agreement.compare_references(judged, FRACTIONS, 0.9, 4000, 0)["correlated_by_all"]
    both = [column(frame, "quadrant", name) == "correlated" for name in ("one", "two")]
    expected = float((both[0] & both[1]).mean())
    assert share["value"] == pytest.approx(expected)
    ends = binom.ppf([0.05, 0.95], 200, expected) / 200
    assert [share["low"], share["high"]] == pytest.approx(ends.tolist(), abs=1.01 / 200)
