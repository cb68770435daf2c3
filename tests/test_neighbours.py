"""Exact search and votes."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from dejavu_exp import neighbours
from dejavu_exp.errors import ConfigError, DataError


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_search_equals_brute_force(metric: Any) -> None:
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(37, 8)).astype(np.float32), rng.normal(size=(91, 8)).astype(np.float32)
    if metric == "l2":
        distances = ((queries[:, None].astype(np.float64) - bank) ** 2).sum(axis=2)
    else:
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries.astype(np.float64), bank)]
        distances = 1 - unit[0] @ unit[1].T
    found = neighbours.search(queries, bank, k=10, metric=metric)
    assert (found.positions == np.argsort(distances, axis=1)[:, :10]).all()
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :10], atol=1e-5)


def test_equal_distances_go_to_the_first_bank_row() -> None:
    bank = np.zeros((5, 2), dtype=np.float32)
    assert neighbours.search(bank[:1], bank, k=5).positions.tolist() == [[0, 1, 2, 3, 4]]


def test_k_larger_than_the_bank_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"probe\.k=6 .*at most 5"):
        neighbours.search(np.zeros((1, 2), np.float32), np.zeros((5, 2), np.float32), k=6)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    bank = np.zeros((5, 2), dtype=np.float32)
    bank[3, 1] = np.nan
    with pytest.raises(DataError, match="row 3"):
        neighbours.search(bank[:1], bank, k=2)


def test_ties_go_to_the_nearest_voter_or_to_the_lowest_label() -> None:
    codes = np.array([[2, 0, 0, 2, 1]])
    nearest = neighbours.vote(["q"], codes, ["a", "b", "c"], "nearest")
    lowest = neighbours.vote(["q"], codes, ["a", "b", "c"], "lowest_label")
    assert nearest.ranking.tolist() == [[2, 0, 1]]
    assert lowest.ranking.tolist() == [[0, 2, 1]]
    assert nearest.tied.tolist() == lowest.tied.tolist() == [True]


def test_labels_without_votes_are_never_ranked() -> None:
    found = neighbours.vote(["q"], np.array([[0, 0]]), ["a", "b", "c"])
    assert found.ranking.tolist() == [[0, -1, -1]]
    assert not found.correct(np.array([1]), top=5).any()


def test_blocks_do_not_change_the_votes(monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (50, 7))
    ids, labels = [str(row) for row in range(50)], list("abcd")
    whole = neighbours.vote(ids, codes, labels)
    monkeypatch.setattr(neighbours, "QUERY_BLOCK", 8)
    parts = neighbours.vote(ids, codes, labels)
    assert (whole.ranking == parts.ranking).all()
    assert (whole.probabilities == parts.probabilities).all()


def test_each_neighbour_votes_once_for_everything_that_it_carries() -> None:
    truth = pl.Series([["cat", "sofa", "cat"], [], ["dog"], ["cat", "dog"]])
    near = neighbours.Neighbours(np.array([[3, 0, 1], [1, 1, 1]]), np.array([[0.5, 1, 2], [3, 3, 3]], np.float32))
    found = neighbours.infer(["q", "r"], near, truth, ["cat", "dog", "sofa"])
    np.testing.assert_allclose(found.probabilities[0], [2 / 3, 1 / 3, 1 / 3])
    assert found.ranking[0].tolist() == [0, 1, 2], "dog is carried by the nearer of the two"
    assert found.ranking[1].tolist() == [-1, -1, -1]
    assert found.probabilities[1].tolist() == [0, 0, 0]
    assert found.confidence[1] == -np.log(3)
    assert found.distance is not None
    assert found.distance.tolist() == [0.5, 3.0]


def test_sets_of_one_label_vote_as_labels_do() -> None:
    rng = np.random.default_rng(1)
    codes, positions = rng.integers(0, 7, 300), rng.integers(0, 300, (500, 20))
    labels = [f"l{number}" for number in range(7)]
    near = neighbours.Neighbours(positions, np.zeros(positions.shape, np.float32))
    ids = [str(number) for number in range(500)]
    ties: Any
    for ties in ("nearest", "lowest_label"):
        sets = neighbours.infer(ids, near, pl.Series([[labels[code]] for code in codes]), labels, ties)
        plain = neighbours.vote(ids, codes[positions], labels, ties)
        for field in ("probabilities", "ranking", "confidence", "tied"):
            np.testing.assert_array_equal(getattr(sets, field), getattr(plain, field))


def test_many_blocks_count_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    truth = pl.Series([rng.choice(["a", "b", "c", "d"], rng.integers(0, 4)).tolist() for _ in range(50)])
    near = neighbours.Neighbours(rng.integers(0, 50, (40, 6)), np.zeros((40, 6), np.float32))
    whole = neighbours.infer([str(n) for n in range(40)], near, truth, ["a", "b", "c", "d"])
    counts = [
        [np.mean([label in truth[int(place)] for place in row]) for label in "abcd"] for row in near.positions.tolist()
    ]
    np.testing.assert_allclose(whole.probabilities, counts, atol=1e-7)
    monkeypatch.setattr(neighbours, "QUERY_BLOCK", 7)
    parts = neighbours.infer([str(n) for n in range(40)], near, truth, ["a", "b", "c", "d"])
    np.testing.assert_array_equal(whole.ranking, parts.ranking)
    np.testing.assert_array_equal(whole.probabilities, parts.probabilities)
