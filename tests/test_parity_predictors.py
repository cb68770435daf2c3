"""k-NN votes, naive Bayes, sample level and quadrants against the answers of the authors' own functions."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dejavu_exp import evidence, metrics, neighbours
from dejavu_exp.references import naive_bayes

GOLDEN = Path(os.environ.get("DEJAVU_GOLDEN", Path(__file__).parent / "golden"))


def load(name: str) -> tuple[Any, Any]:
    arrays = GOLDEN / f"{name}.npz"
    content = json.loads((GOLDEN / f"{name}.json").read_text())
    return content, dict(np.load(arrays)) if arrays.exists() else None


def names(count: int) -> list[str]:
    return [f"{index:06d}" for index in range(count)]


@pytest.mark.parametrize("name", ["knn_clean", "knn_ties"])
def test_search_finds_the_same_neighbours(name: Any) -> None:
    _, arrays = load(name)
    good = arrays["in_target_good"] != -1
    found = neighbours.search(arrays["in_target_emb"][good], arrays["in_public_emb"], k=100)
    # FAISS may swap equal distances at rounding level, so rows are compared as sets.
    assert (np.sort(found.positions, axis=1) == np.sort(arrays["out_neighb_pos"], axis=1)).all()
    np.testing.assert_allclose(found.distances, arrays["out_neighb_sqdist"], rtol=2e-5)


def votes(arrays: Any, tag: str) -> tuple[evidence.Evidence, int]:
    voters = int(tag.split("attk")[1])
    codes = arrays["in_public_label"][arrays["out_neighb_pos"][:, :voters]].astype(np.int64)
    return neighbours.vote(names(len(codes)), codes, names(1000), ties="lowest_label"), voters


@pytest.mark.parametrize("name", ["knn_clean", "knn_ties"])
def test_votes_entropy_and_top_labels(name: Any) -> None:
    content, arrays = load(name)
    for tag in content["runs"]:
        found, voters = votes(arrays, tag)
        assert (np.round(found.probabilities * voters) == arrays[f"out_{tag}_class_counts"]).all()
        np.testing.assert_allclose(-found.confidence, arrays[f"out_{tag}_attk_uncert"], atol=1e-12)
        assert (found.ranking[:, 0] == arrays[f"out_{tag}_top1"][:, 0]).all()
        clear = ~arrays[f"out_{tag}_vote_tie_at_5"]
        assert (np.sort(found.ranking[:, :5], axis=1) == np.sort(arrays[f"out_{tag}_top5"], axis=1))[clear].all()
        order = np.argsort(-found.confidence, kind="stable")
        theirs = arrays[f"out_{tag}_conf_order_stable"]
        # Entropies that are equal in theory may differ in the last bit, so the order is compared by value.
        np.testing.assert_allclose(found.confidence[order], found.confidence[theirs], atol=1e-9)


@pytest.mark.parametrize("name", ["knn_clean", "knn_ties"])
def test_accuracies(name: Any) -> None:
    content, arrays = load(name)
    for tag, run in content["runs"].items():
        found, _ = votes(arrays, tag)
        for top in (1, 5):
            correct = found.correct(arrays["out_true_label"].astype(np.int64).ravel(), top)
            for fraction, allowed in run["accuracy_range_over_tie_breaks"][f"top{top}"].items():
                shared = metrics.confident_means(correct, found.confidence, [float(fraction)])[0, 0]
                stable = metrics.accuracy_in_order(correct, found.confidence, float(fraction))
                for value in (shared, stable):
                    # Labels without votes never count here, so at top five less than their least can be right.
                    low = 0 if top == 5 and name == "knn_ties" else allowed["min"]
                    assert low - 1e-12 <= value <= allowed["max"] + 1e-12
                if name == "knn_clean":
                    assert stable == run["accuracy"][f"top{top}"]["fractions"][fraction]["accuracy"]
            if name == "knn_clean":
                sweep = run["accuracy"][f"top{top}"]["sweep_n_and_accuracy"]
                for fraction, (kept, accuracy) in zip(np.linspace(0.1, 1, 100), sweep, strict=True):
                    assert int(fraction * len(correct)) == kept
                    assert metrics.accuracy_in_order(correct, found.confidence, fraction) == pytest.approx(accuracy)


def bayes_case(name: str) -> tuple[Any, list[str], dict[str, Any], list[list[str]], list[str]]:
    content, _ = load(name)
    given = content["input"]
    keys = ["_".join(row) for row in csv.reader(given["labels_txt"].splitlines())]
    counts = {key: {tag: count for tag, (count, _) in given["frequencies"][key].items()} for key in keys}
    questions, truth = [], []
    for key in keys:
        for image in given["labels"].get(key, []):
            strongest_first = np.argsort(-np.array(image["scores"]), kind="stable")
            questions.append([image["tags"][index] for index in strongest_first])
            truth.append(key)
    return content, keys, counts, questions, truth


@pytest.mark.parametrize("name", ["nb_main", "nb_no_unseen", "nb_edge"])
def test_naive_bayes_scores_predictions_and_accuracies(name: Any) -> None:
    content, keys, counts, questions, truth = bayes_case(name)
    for tag, run in content["runs"].items():
        top_tags = int(tag.split("_")[0].removeprefix("topk"))
        scores = naive_bayes.authors_scores(questions, counts, top_tags, laplace=tag.endswith("True"))
        found = naive_bayes.authors_evidence(names(len(questions)), keys, scores)
        np.testing.assert_allclose(found.confidence, run["score"], rtol=1e-12)
        predicted = [keys[column] for column in found.ranking[:, 0]]
        for mine, theirs, tied in zip(predicted, run["pred"], run["best_classes_exact"], strict=True):
            if tied is None:
                assert mine == theirs
            elif tied != "all":
                assert keys.index(mine) in tied
        correct = np.array([mine == right for mine, right in zip(predicted, truth, strict=True)])
        for fraction, allowed in run["accuracy_range_over_all_ties"].items():
            value = metrics.accuracy_in_order(correct, found.confidence, float(fraction), later_first=True)
            low, high = (allowed["min"], allowed["max"]) if isinstance(allowed, dict) else allowed
            assert low - 1e-12 <= value <= high + 1e-12


def test_sample_level_scores() -> None:
    content, arrays = load("sample_level")
    codes = arrays["in_neighb_labels"].astype(np.int64)
    width = arrays["in_ref_softmax"].shape[1]
    ids = [str(image) for image in arrays["in_image_id"]]
    target = neighbours.vote(ids, codes, names(max(width, int(codes.max()) + 1)), ties="lowest_label")
    rows = arrays["in_ref_rows"]
    softmax = arrays["in_ref_softmax"][rows] if len(arrays["in_ref_softmax"]) == len(ids) else arrays["in_ref_softmax"]
    reference = evidence.from_probabilities([ids[row] for row in rows], names(width), softmax)
    joined = target.take(reference.ids)
    truth = arrays["in_label"][rows].astype(np.int64).ravel()
    memorized = metrics.quadrant(joined.correct(truth), reference.correct(truth)) == 0
    gained = metrics.entropy(reference.probabilities) - metrics.entropy(joined.probabilities)
    assert memorized.sum() == content["n_scored"]
    order = rows[memorized][np.argsort(-gained[memorized], kind="stable")]
    assert (order == arrays["out_scored_rows"]).all()
    np.testing.assert_allclose(np.sort(gained[memorized])[::-1], arrays["out_mem_final"], atol=3e-6)
    assert int((gained[memorized] >= 0).sum()) == content["n_positive"]
    assert gained[memorized].mean() == pytest.approx(content["mean"], abs=3e-6)


def attacked_by_both(arrays: Any, attacked: str, other: str) -> tuple[evidence.Evidence, evidence.Evidence, Any]:
    """Evidence of the model trained on the attacked set and of the other one on the same rows, and the true labels."""
    found = []
    for model in (attacked, other):
        prefix = f"in_{model}_attk_{attacked}"
        ids = [str(index) for index in arrays[f"{prefix}_attk_idxs"].ravel()]
        voted = neighbours.vote(
            ids, arrays[f"{prefix}_neighb_labels"].astype(np.int64), names(1000), ties="lowest_label"
        )
        theirs = np.abs(arrays[f"out_{model}_attk_{attacked}_neg_entropy"])
        np.testing.assert_allclose(-voted.confidence, theirs, atol=1e-9)
        found.append(voted)
    # The two models list the rows in different orders: joined by id.
    truth = arrays[f"in_{attacked}_attk_{attacked}_labels"].ravel().astype(np.int64)
    return found[0], found[1].take(found[0].ids), truth


def test_quadrant_shares_and_accuracies() -> None:
    content, arrays = load("quadrants")
    shares: dict[str, list[list[float]]] = {"top1": [], "top5": []}
    accuracies: dict[str, list[tuple[float, float]]] = {}
    for attacked, other in (("A", "B"), ("B", "A")):
        own, reference, truth = attacked_by_both(arrays, attacked, other)
        for top in (1, 5):
            quadrant = metrics.quadrant(own.correct(truth, top), reference.correct(truth, top))
            shares[f"top{top}"].append([float((quadrant == place).mean()) for place in range(4)])
            for key in (key for key in content["accuracies"] if key.startswith(f"top{top}_")):
                fraction = float(key.split("_")[1]) / 100
                mine, other_one = (
                    metrics.accuracy_in_order(e.correct(truth, top), e.confidence, fraction) for e in (own, reference)
                )
                accuracies.setdefault(key, []).append((mine, other_one))
    for name, values in shares.items():
        means = dict(zip(metrics.QUADRANTS, np.mean(values, axis=0), strict=True))
        assert means == pytest.approx(content["shares"][name], abs=1e-12)
    for key, pairs in accuracies.items():
        target, reference = np.mean(pairs, axis=0)
        assert target == pytest.approx(content["accuracies"][key]["target"], abs=1e-12)
        assert reference == pytest.approx(content["accuracies"][key]["reference"], abs=1e-12)
