"""Metrics of object sets against Python's own sets, and in cases worked out by hand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from dejavu_exp import metrics


def ragged(lists: Any) -> tuple[Any, Any]:
    lengths = [len(objects) for objects in lists]
    flat = np.array([number for objects in lists for number in objects], dtype=np.int64)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), flat


def oracle(positions: Any, bank: Any, truth: Any) -> list[list[int]]:
    rows = []
    for near, objects in zip(positions, truth, strict=True):
        predicted = set().union(*(bank[voter] for voter in near))
        rows.append([len(predicted & set(objects)), len(predicted), len(set(objects))])
    return rows


@pytest.mark.parametrize("vocabulary", [3, 64, 200, 10_000])
def test_set_counts_equal_pythons_sets(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where objects and rows come in several blocks."""
    monkeypatch.setattr(metrics, "ROW_BLOCK", 7)
    rng = np.random.default_rng(vocabulary)
    bank = [rng.integers(0, vocabulary, rng.integers(0, 9)).tolist() for _ in range(50)]
    truth = [rng.integers(0, vocabulary, rng.integers(0, 9)).tolist() for _ in range(40)]
    # Few objects in common would leave little to count.
    truth = [objects + bank[row][:2] for row, objects in enumerate(truth)]
    positions = rng.integers(0, 50, (40, 6))
    found = metrics.neighbour_set_counts(positions, ragged(bank), ragged(truth))
    assert np.stack(found, axis=1).tolist() == oracle(positions, bank, truth)


def test_set_counts_of_nothing() -> None:
    counts = metrics.neighbour_set_counts(np.zeros((2, 1), dtype=np.int64), ragged([[]]), ragged([[], []]))
    assert np.stack(counts).tolist() == [[0, 0]] * 3
    with pytest.raises(ValueError, match="2 rows of neighbours but 1"):
        metrics.neighbour_set_counts(np.zeros((2, 1), dtype=np.int64), ragged([[]]), ragged([[]]))


SETS = st.lists(st.integers(0, 70), max_size=5)


@examples(60)
@given(st.lists(SETS, min_size=1, max_size=4), st.lists(SETS, min_size=1, max_size=5))
def test_precision_recall_and_f_of_any_sets(truth: Any, bank: Any) -> None:
    positions = np.tile(np.arange(len(bank)), (len(truth), 1))
    counts = metrics.neighbour_set_counts(positions, ragged(bank), ragged(truth))
    predicted = set().union(*bank)
    for precision, recall, f, objects in zip(*metrics.set_scores(*counts), map(set, truth), strict=True):
        both = len(objects & predicted)
        assert precision == pytest.approx(both / len(predicted) if predicted else np.nan, nan_ok=True)
        assert recall == pytest.approx(both / len(objects) if objects else np.nan, nan_ok=True)
        harmonic = 2 * precision * recall / (precision + recall) if predicted and both else 0.0
        assert f == pytest.approx(harmonic if objects else np.nan, nan_ok=True)


def test_precision_without_prediction_is_undefined_or_zero_as_the_authors_have_it() -> None:
    none = np.zeros(1)
    assert np.isnan(metrics.set_scores(none, none, none + 2)[0]).all()
    assert metrics.set_scores(none, none, none + 2, unpredicted=0.0)[0].tolist() == [0.0]
    with pytest.raises(ValueError, match="more members are correct"):
        metrics.set_scores(none + 2, none + 1, none + 3)


def test_dominance_gap_leaves_out_what_is_undefined() -> None:
    assert metrics.dominance_gap(np.array([1.0, np.nan, 0.0, 0.5]), np.array([0.0, 0.0, 0.0, 0.0])) == 2 / 3
    assert np.isnan(metrics.dominance_gap(np.array([np.nan]), np.array([1.0])))
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.dominance_gap(np.zeros(2), np.zeros(3))


def test_area_between_curves_is_the_integral() -> None:
    rng = np.random.default_rng(0)
    target, reference = rng.choice([0, 0.25, 0.5, 1], 50), rng.random(60)
    edges = np.unique(np.concatenate([[0], target, reference, [1]]))
    area = sum(
        width * ((target > left).mean() - (reference > left).mean())
        for left, width in zip(edges[:-1], np.diff(edges), strict=True)
    )
    assert metrics.area_between_curves(target, reference) == pytest.approx(area, abs=1e-12)
    assert np.isnan(metrics.area_between_curves(np.array([np.nan]), reference))


def test_the_authors_area_is_one_bin_too_large() -> None:
    assert metrics.authors_area(np.full(5, 0.5)) == pytest.approx(0.51)
    values = np.linspace(0, 1, 1001)
    assert metrics.authors_area(values) == pytest.approx(values.mean() + 0.005, abs=1e-3)


def by_hand(values: Any, ranking: Any, fraction: float, weights: Any) -> float:
    """Rows one by one, each as often as its weight; ties share the places."""
    places = max(1, int(fraction * weights.sum() + 1e-9))
    total, left = 0.0, float(places)
    for level in sorted(set(ranking), reverse=True):
        group = ranking == level
        size = weights[group].sum()
        if size and left > 0:
            taken = min(left, size)
            total += taken * (weights[group] @ values[group]) / size
            left -= taken
    return total / places


@pytest.mark.parametrize("levels", [3, 10_000])
def test_top_means_equal_a_loop(levels: int) -> None:
    rng = np.random.default_rng(levels)
    n_rows, fractions = 900, [0.001, 0.01, 0.1, 0.15]
    ranking = rng.integers(0, levels, n_rows).astype(np.float64)
    values = rng.normal(size=(n_rows, 3))
    weights = rng.multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=5).astype(np.float64)
    # The best rows are missing in one resample: places must come from far down.
    weights[0, np.argsort(-ranking)[:600]] = 0
    weights[1] *= 2
    found = metrics.top_means(values, ranking, fractions, weights)
    for sample in range(5):
        for place, fraction in enumerate(fractions):
            for column in range(3):
                expected = by_hand(values[:, column], ranking, fraction, weights[sample])
                assert found[sample, place, column] == pytest.approx(expected, abs=1e-10)


def test_top_means_agree_with_confident_means_and_are_undefined_without_rows() -> None:
    rng = np.random.default_rng(1)
    values, ranking = rng.random(50), rng.integers(0, 5, 50).astype(np.float64)
    expected = metrics.confident_means(values, ranking, [0.29, 1.0])
    np.testing.assert_allclose(
        metrics.top_means(values[:, None], ranking, [0.29, 1.0], np.ones((1, 50)))[:, :, 0], expected
    )
    assert np.isnan(metrics.top_means(np.zeros((0, 2)), np.zeros(0), [0.1], np.ones((1, 0)))).all()
    assert np.isnan(metrics.top_means(values[:, None], ranking, [0.1], np.zeros((1, 50)))).all()
