"""Metrics worked by hand or against an independent rewrite."""

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from dejavu_exp import metrics, statistics
from dejavu_exp.statistics import bootstrap
from dejavu_exp.tables import FloatArray


def mean_over_all_orders(values: list[int], confidence: list[float], keep: int) -> float:
    """The mean over every way to break ties, by going through all of them."""
    found = set()
    for order in itertools.permutations(range(len(values))):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            found.add(order)
    return float(np.mean([np.mean([values[row] for row in order[:keep]]) for order in found]))


@examples(60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=6),
    fraction=st.sampled_from([0.05, 0.2, 0.5, 0.75, 1.0]),
)
def test_confident_means_are_the_mean_over_all_tie_breaks(rows: list[tuple[int, int]], fraction: float) -> None:
    values, confidence = [row[0] for row in rows], [float(row[1]) for row in rows]
    keep = metrics.n_confident(len(rows), fraction)
    found = metrics.confident_means(np.array(values), np.array(confidence), [fraction])[0, 0]
    assert found == pytest.approx(mean_over_all_orders(values, confidence, keep))


def test_confident_means_with_weights_equal_repeated_rows() -> None:
    values, confidence = np.array([1, 0, 1, 0]), np.array([3.0, 2.0, 2.0, 1.0])
    weights = np.array([[2.0, 0.0, 1.0, 1.0]])
    repeated = np.repeat(np.arange(4), weights[0].astype(int))
    expected = metrics.confident_means(values[repeated], confidence[repeated], [0.5, 0.75, 1.0])
    found = metrics.confident_means(values, confidence, [0.5, 0.75, 1.0], weights)
    np.testing.assert_allclose(found, expected)


def test_confident_means_do_not_depend_on_row_order() -> None:
    rng = np.random.default_rng(0)
    values, confidence = rng.integers(0, 2, 50), rng.integers(0, 5, 50).astype(float)
    order = rng.permutation(50)
    fractions = [0.05, 0.2, 0.37, 1.0]
    np.testing.assert_allclose(
        metrics.confident_means(values, confidence, fractions),
        metrics.confident_means(values[order], confidence[order], fractions),
    )


def test_a_model_that_is_its_own_reference_has_no_gap() -> None:
    correct = np.array([True, False, True])
    assert metrics.accuracy_gap(correct, correct) == 0.0
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.accuracy_gap(correct, correct[:2])


def test_entropy_is_undefined_without_mass() -> None:
    assert np.isnan(metrics.entropy(np.zeros((1, 3)))).all()
    assert np.isnan(metrics.entropy(np.array([[np.nan, 1.0]]))).all()


def test_auroc_equals_counting_pairs() -> None:
    rng = np.random.default_rng(1)
    positive, negative = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 30).astype(float)
    wins = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    assert metrics.auroc(positive, negative) == pytest.approx(wins)
    assert np.isnan(metrics.auroc(positive, negative[:0]))


def mean_of(rows: FloatArray, weights: FloatArray) -> FloatArray:
    return (weights @ rows / len(rows))[:, None]


def test_bootstrap_interval_covers_a_known_mean() -> None:
    """Of 200 samples of a fair coin, about 95 % of the intervals must hold one half."""
    held = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        rows = rng.integers(0, 2, 200).astype(float)
        draws = bootstrap(partial(mean_of, rows), 200, 400, rng)
        held += draws.estimates(0.95)[0].contains(0.5)
    assert 180 <= held <= 198


def test_differences_of_equal_columns_have_no_width() -> None:
    rows = np.random.default_rng(0).integers(0, 2, 100).astype(float)
    draws = bootstrap(
        lambda weights: weights @ np.stack([rows, rows], axis=1) / 100, 100, 200, np.random.default_rng(0)
    )
    assert (draws.samples[:, 0] == draws.samples[:, 1]).all()


def test_no_rows_give_an_undefined_estimate_with_its_count() -> None:
    draws = bootstrap(
        lambda weights: np.full((len(weights), 1), np.nan), 0, 200, np.random.default_rng(0), n_excluded=7
    )
    (estimate,) = draws.estimates(0.95)
    assert np.isnan(estimate.value)
    assert (estimate.n_used, estimate.n_excluded) == (0, 7)
    assert estimate.as_dict()["value"] is None


def test_top_means_of_some_rows_are_those_of_these_rows_alone() -> None:
    rng = np.random.default_rng(0)
    values, ranking, rows = rng.random((60, 2)), rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.5
    weights = rng.integers(0, 3, (7, 60)).astype(float)
    some = metrics.TopMeans.of(values[rows], ranking[rows], [0.1, 0.5, 1.0], rows=rows)
    expected = metrics.top_means(values[rows], ranking[rows], [0.1, 0.5, 1.0], weights[:, rows])
    np.testing.assert_allclose(some(weights), expected)


def test_the_entropy_of_groups_is_that_of_rows() -> None:
    counts = np.random.default_rng(0).integers(0, 4, (50, 6))
    rows, columns = np.nonzero(counts)
    np.testing.assert_allclose(metrics.grouped_entropy(counts[rows, columns], rows, 50), metrics.entropy(counts))


def test_resampled_weights_are_multinomial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in parts of rows: each row has the mean, the variance and the covariances of one multinomial number."""
    monkeypatch.setattr(statistics, "PART", 4)
    count = 200_000
    found = statistics.resample(6, count, np.random.default_rng(0))
    assert (found.sum(axis=1) == 6).all()
    np.testing.assert_allclose(found.mean(axis=0), 1, atol=0.01)
    np.testing.assert_allclose(np.cov(found.T), np.eye(6) - 1 / 6, atol=0.02)
    shares = [(found[:, row] == 0).mean() for row in (0, 5)]
    np.testing.assert_allclose(shares, (5 / 6) ** 6, atol=0.005)


def test_all_bits_of_a_random_number_are_used() -> None:
    """A full part takes its rows from 16 bits each."""
    found = statistics.resample(statistics.PART + 1, 20, np.random.default_rng(0))
    assert (found.sum(axis=1) == statistics.PART + 1).all()
    assert found.sum(axis=0).min() > 0
    halves = found[:, :-1].reshape(20, 2, -1).sum(axis=(0, 2))
    np.testing.assert_allclose(halves[0] / halves.sum(), 0.5, atol=0.002)


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(500)
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 5_000)

    def run(threads: int) -> np.ndarray:
        monkeypatch.setattr("os.cpu_count", lambda: threads)
        rng = np.random.default_rng(0)
        return statistics.bootstrap(lambda weights: (weights @ values)[:, None], 500, 200, rng).samples

    np.testing.assert_array_equal(run(1), run(4))
