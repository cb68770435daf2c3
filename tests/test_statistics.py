"""Intervals, tests and p-values against other implementations and planted truths."""

import numpy as np
import pytest
from scipy import stats

from dejavu_exp import statistics
from dejavu_exp.statistics import Rows
from dejavu_exp.tables import Estimate, FloatArray


@pytest.mark.parametrize(("successes", "rows"), [(0, 20), (20, 20), (7, 20), (3, 1000), (1, 1)])
def test_exact_intervals_are_scipys(successes: int, rows: int) -> None:
    expected = stats.binomtest(successes, rows).proportion_ci(0.9, "exact")
    found = statistics.proportion(successes / rows, rows, 0.9)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_difference_of_shares_is_newcombes() -> None:
    """Table II of the source, 56/70 against 48/80: with Wilson's intervals from 0.0524 to 0.3339."""
    shares = []
    for successes, rows in ((56, 70), (48, 80)):
        low, high = stats.binomtest(successes, rows).proportion_ci(0.95, "wilson")
        shares.append(Estimate(successes / rows, low, high, rows, 0))
    np.testing.assert_allclose(statistics.difference(shares[0], shares[1]), (0.0524, 0.3339), atol=5e-5)


def test_intervals_of_few_rows_hold_the_truth_as_often_as_they_say() -> None:
    """Twenty rows of which nearly all are right: here a bootstrap often has no width at all."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        parts = []
        for chance in (0.97, 0.3):
            share = rng.binomial(20, chance) / 20
            low, high = statistics.proportion(share, 20, 0.95)
            parts.append(Estimate(share, low, high, 20, 0))
        low, high = statistics.difference(parts[0], parts[1])
        held += low <= 0.67 <= high
    assert held >= 0.95 * 400 - 2 * np.sqrt(400 * 0.95 * 0.05)


def test_rows_of_a_class_that_go_together_widen_the_interval() -> None:
    """Ten classes of 50 rows that are all alike are ten observations: the interval is that of ten means."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 50)
    values = rng.normal(size=10)[groups]

    def mean(weights: FloatArray) -> FloatArray:
        return (weights @ values / len(values))[:, None]

    single = statistics.bootstrap(mean, 500, 2000, np.random.default_rng(1))
    whole = statistics.bootstrap(mean, Rows(500, groups=groups), 2000, np.random.default_rng(1))
    assert single.value == pytest.approx(whole.value)
    deviation = values[::50].std() / np.sqrt(10)
    assert whole.samples.std() == pytest.approx(deviation, rel=0.1)
    assert single.samples.std() < deviation / 5


def test_classes_of_unequal_size_give_weights_that_add_up() -> None:
    rows = Rows(6, groups=np.array([0, 0, 0, 0, 0, 1]))
    drawn = rows.resampled(50, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.sum(axis=1), 6)
    assert len(np.unique(drawn[:, :5])) > 1


def test_weighted_rows_give_the_weighted_mean_and_its_spread() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=400), rng.gamma(2, 1, 400)
    weights /= weights.mean()

    def mean(drawn: FloatArray) -> FloatArray:
        return (drawn @ values / len(values))[:, None]

    found = statistics.bootstrap(mean, Rows(400, weights), 4000, rng)
    assert found.value[0] == pytest.approx(np.average(values, weights=weights))
    # The linearised standard error of a ratio of sums.
    spread = np.sqrt((weights**2 * (values - found.value[0]) ** 2).sum()) / 400
    assert found.samples.std() == pytest.approx(spread, rel=0.05)


def test_mcnemar_is_the_binomial_test() -> None:
    assert statistics.mcnemar(12, 3) == pytest.approx(stats.binomtest(3, 15).pvalue)
    assert statistics.mcnemar(0, 0) == 1


def test_paired_permutations_are_scipys_for_few_rows() -> None:
    differences = np.array([0.3, -0.1, 0.5, 0.2, 0.4, -0.05, 0.6])
    exact = stats.permutation_test(
        (differences, np.zeros(7)), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples"
    )
    found = statistics.paired_permutation(differences, 50_000, np.random.default_rng(0))
    assert found == pytest.approx(exact.pvalue, abs=0.01)
    assert statistics.paired_permutation(np.zeros(5), 99, np.random.default_rng(0)) == 1


def test_p_values_of_null_rows_are_even_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(30, size=(200, 149)).astype(np.float64)
    p_values = np.concatenate([statistics.conformal_p_values(row[:50], row[50:]) for row in scores])
    for chance in (0.05, 0.2, 0.5):
        assert (p_values <= chance).mean() <= chance + 0.01
    assert (p_values <= 0.5).mean() > 0.4


def test_weighted_p_values_are_those_of_rows_repeated() -> None:
    null, times = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1, 2, 4, 1])
    scores = np.array([-1.0, 1.0, 2.5, 9.0])
    above = (np.repeat(null, times)[None] >= scores[:, None]).sum(axis=1)
    found = statistics.conformal_p_values(scores, null, times * 4 / 8)
    np.testing.assert_allclose(found, (1 + above / 2) / (1 + 4))


def test_the_smallest_detectable_difference_is_found_with_the_power_it_says() -> None:
    rng = np.random.default_rng(0)
    smallest = statistics.smallest_detectable(rng.normal(0, 0.02, 20_000), 0.95)
    found = rng.normal(smallest, 0.02, 20_000) - 1.96 * 0.02 > 0
    assert found.mean() == pytest.approx(0.8, abs=0.01)
