"""The vision-language figures against the answers of the authors' own functions."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dejavu_exp import evidence, metrics
from dejavu_exp.scoring import ObjectInference

GOLDEN = Path(os.environ.get("DEJAVU_GOLDEN", Path(__file__).parent / "golden"))
RANKINGS = {"max_pred_gap": "object_gap", "min_dist": "min_distance", "crct_pred": "correct_objects"}
FRACTIONS = (0.001, 0.01, 0.1)
EDGE = sorted(json.loads((GOLDEN / "vlm_edge.json").read_text())["cases"])


def ragged(lists: Any) -> tuple[Any, Any]:
    lengths = [len(objects) for objects in lists]
    flat = np.array([number for objects in lists for number in objects], dtype=np.int64)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), flat


def case(name: str) -> tuple[Any, Any, Any]:
    """Inputs, outputs by array name without `in_` and `out_`, and results."""
    if name == "vlm_main":
        arrays = dict(np.load(GOLDEN / "vlm_main.npz"))
        given = {key.removeprefix("in_"): value for key, value in arrays.items() if key.startswith("in_")}
        for side in ("tgt", "pub"):
            offsets, values = given[f"{side}_label_offsets"], given[f"{side}_label_values"]
            given[f"{side}_labels"] = offsets.astype(np.int64), values.astype(np.int64)
        outputs = {key: value for key, value in arrays.items() if key.startswith("out_")}
        return given, outputs, json.loads((GOLDEN / "vlm_main.json").read_text())["results"]
    content = json.loads((GOLDEN / "vlm_edge.json").read_text())["cases"][name]
    given = {key: np.array(value) for key, value in content["input"].items() if "labels" not in key}
    given |= {key: ragged(content["input"][key]) for key in ("tgt_labels", "pub_labels")}
    return given, content["outputs"], content["results"]


def set_scores(counts: Any) -> tuple[Any, Any, Any]:
    n_correct, n_predicted, n_true = counts
    return metrics.set_scores(n_correct, n_predicted, n_true, unpredicted=0.0)


def floats(values: Any) -> Any:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


@pytest.fixture(params=["vlm_main", *EDGE], scope="module")
def golden(request: pytest.FixtureRequest) -> Any:
    given, outputs, results = case(request.param)
    sets = {
        who: metrics.neighbour_set_counts(
            given[f"{who}_neighbors"].astype(np.int64), given["pub_labels"], given["tgt_labels"]
        )
        for who in ("tgt", "ref")
    }
    return given, outputs, results, sets


def test_precision_and_recall_of_every_target(golden: Any) -> None:
    _, outputs, _, sets = golden
    for who in ("tgt", "ref"):
        precision, recall, _ = set_scores(sets[who])
        precision[np.isnan(recall)] = np.nan
        np.testing.assert_allclose(precision, floats(outputs[f"out_{who}_prec"]), atol=1e-12)
        np.testing.assert_allclose(recall, floats(outputs[f"out_{who}_rec"]), atol=1e-12)


def test_population_gaps_and_areas(golden: Any) -> None:
    _, _, results, sets = golden
    precision, recall, _ = zip(*(set_scores(sets[who]) for who in ("tgt", "ref")), strict=True)
    used = np.isfinite(recall[0])
    areas = [metrics.authors_area(values[used]) for values in recall]
    for modes in results.values():
        for theirs in modes.values():
            gap = metrics.dominance_gap(precision[0][used], precision[1][used])
            assert gap == pytest.approx(theirs["population_precision_gap"], abs=1e-12)
            gap = metrics.dominance_gap(recall[0][used], recall[1][used])
            assert gap == pytest.approx(theirs["population_recall_gap"], abs=1e-12)
            expected = [theirs["tgt_auc"], theirs["ref_auc"], theirs["auc_gap"]]
            assert [*areas, areas[0] - areas[1]] == pytest.approx(expected, abs=1e-9)


def test_order_and_top_rows(golden: Any) -> None:
    given, outputs, results, sets = golden
    rankings = {
        "max_pred_gap": sets["tgt"][0] - sets["ref"][0],
        "min_dist": -given["tgt_dist"][:, 0],
        "crct_pred": sets["tgt"][0],
    }
    used = np.flatnonzero(sets["tgt"][2] > 0)
    scores = {who: set_scores([counts[used] for counts in sets[who]]) for who in ("tgt", "ref")}
    for name, ranking in rankings.items():
        assert metrics.authors_top(ranking, 1.0).tolist() == list(outputs[f"out_{name}_stable_argsort"])
        assert used[metrics.authors_top(ranking[used], 1.0)].tolist() == list(outputs[f"out_{name}_stable_sorted_idx"])
        for fraction, theirs in zip(FRACTIONS, results[name]["stable"]["top"], strict=True):
            rows = metrics.authors_top(ranking[used], fraction)
            assert len(rows) == theirs["n"]
            means = {who: (scores[who][0][rows].mean(), scores[who][1][rows].mean()) for who in ("tgt", "ref")}
            assert means["tgt"][0] - means["ref"][0] == pytest.approx(theirs["precision_gap"], abs=1e-12)
            assert means["tgt"][1] - means["ref"][1] == pytest.approx(theirs["recall_gap"], abs=1e-12)
            f_gap = metrics.authors_f(*means["tgt"]) - metrics.authors_f(*means["ref"])
            assert f_gap == pytest.approx(theirs["fscore_gap"], abs=1e-12)
            for who in ("tgt", "ref"):
                for mean, measure in zip(means[who], ("prec", "rec"), strict=True):
                    low, high = theirs["tie_range"][f"{who}_{measure}"]
                    assert low - 1e-9 <= mean <= high + 1e-9


def as_evidence(given: Any, who: str, ids: list[str], n_labels: int) -> evidence.Evidence:
    """Shares of the neighbours that carry each object, counted one by one."""
    offsets, values = given["pub_labels"]
    positions = given[f"{who}_neighbors"].astype(np.int64)
    shares = np.zeros((len(ids), n_labels))
    for row, near in enumerate(positions):
        for voter in near:
            shares[row, np.unique(values[offsets[voter] : offsets[voter + 1]])] += 1 / positions.shape[1]
    labels = [f"{code:04d}" for code in range(n_labels)]
    distance = given["tgt_dist"][:, 0].astype(np.float64) if who == "tgt" else None
    return evidence.from_probabilities(ids, labels, shares, confidence=np.zeros(len(ids)), distance=distance)


def test_figures_under_compat_authors(golden: Any) -> None:
    given, _, results, sets = golden
    offsets, values = given["tgt_labels"]
    ids = [f"{row:06d}" for row in range(len(offsets) - 1)]
    lists = [[f"{code:04d}" for code in values[start:end]] for start, end in itertools.pairwise(offsets)]
    rows = pl.DataFrame(
        {"id": ids, "role": "target", "label": None, "status": "ok", "truth": lists},
        schema_overrides={"label": pl.String, "truth": pl.List(pl.String)},
    )
    n_labels = 1 + max(
        (int(objects.max()) for _, objects in (given["pub_labels"], given["tgt_labels"]) if len(objects))
    )
    scoring = ObjectInference(predictions=("all",), compat="authors", resamples=100)
    target, reference = (as_evidence(given, who, ids, n_labels) for who in ("tgt", "ref"))
    scores = scoring.score(rows, target, reference, "r")
    assert (scores["status"] == "no_objects").sum() == (sets["tgt"][2] == 0).sum()
    found = scoring.figures(scores, rows.select("id"), seed=0)["roles"]["target"]
    for name, ranking in RANKINGS.items():
        theirs = results[name]["stable"]
        authors = found["all"]["authors"]
        assert authors["ppg"] == pytest.approx(theirs["population_precision_gap"], abs=1e-12)
        assert authors["prg"] == pytest.approx(theirs["population_recall_gap"], abs=1e-12)
        for area in ("tgt_auc", "ref_auc", "auc_gap"):
            assert authors[area] == pytest.approx(theirs[area], abs=1e-9)
        assert found["all"]["prg"]["value"] == pytest.approx(theirs["population_recall_gap"], abs=1e-12)
        assert found["all"]["ppg"]["value"] == pytest.approx(theirs["population_precision_gap"], abs=1e-12)
        for percent, expected in zip(("0.1", "1", "10"), theirs["top"], strict=True):
            mine = found["fine_grained"][ranking][percent]
            assert mine["n"] == expected["n"]
            for measure, theirs_name in (("precision", "precision"), ("recall", "recall"), ("f", "fscore")):
                value = mine[f"{measure}_gap"]["value"]
                assert value == pytest.approx(expected[f"{theirs_name}_gap"], abs=1e-12)
