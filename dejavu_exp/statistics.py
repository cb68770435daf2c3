"""Intervals, tests and power: a paired bootstrap over rows, exact tests, permutations, p-values of rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from dejavu_exp.tables import Estimate, FloatArray, IntArray

BLOCK_ELEMENTS = 4_000_000
"""Weights held at a time by each thread; bounds the memory whatever the number of rows."""
POWER = 0.8
"""Probability with which an effect is to be found, where power is told."""
FEW_ROWS = 50
"""Below so many rows the interval of a difference of shares comes from exact intervals, not from the bootstrap."""
WORDS = 1 << 16
PART = WORDS
"""Rows whose weights are drawn at a time: what stays in the processor's cache, and what 16 random bits can name."""


@dataclass(frozen=True)
class Draws:
    """K figures with their bootstrap distribution.

    Attributes:
        value: shape (K,), on the rows themselves.
        samples: shape (B, K), on B resamples of the rows.
        n_used: rows behind the figures.
        n_excluded: rows that belong here and could not be used.
    """

    value: FloatArray
    samples: FloatArray
    n_used: int
    n_excluded: int

    def __sub__(self, other: Draws) -> Draws:
        """The difference of figures on two independent sets of rows."""
        return Draws(
            self.value - other.value,
            self.samples - other.samples,
            self.n_used + other.n_used,
            self.n_excluded + other.n_excluded,
        )

    def estimates(self, level: float) -> list[Estimate]:
        """Percentile intervals that hold `level` (a fraction) of the bootstrap distribution; NaN where undefined."""
        low, high = intervals(self.samples, level)
        return [
            Estimate(float(value), float(below), float(above), self.n_used, self.n_excluded)
            for value, below, above in zip(self.value, low, high, strict=True)
        ]


@dataclass(frozen=True)
class Rows:
    """Rows to be resampled.

    Attributes:
        count: N.
        weights: shape (N,), how much each counts, mean 1; None for all alike. They are taken as given: that they were
            estimated is not in the intervals.
        groups: shape (N,), the group of each, from 0 on without gaps; whole groups are then drawn, for rows of a group
            may resemble each other. None to draw single rows.
    """

    count: int
    weights: FloatArray | None = None
    groups: IntArray | None = None

    @classmethod
    def of(cls, weights: FloatArray, labels: npt.NDArray[Any] | None = None) -> Rows:
        """Rows with these weights, shape (N,), drawn by whole classes where their labels are given, shape (N,)."""
        groups = np.unique(labels, return_inverse=True)[1] if labels is not None and len(labels) else None
        return cls(len(weights), None if np.all(weights == 1) else weights, groups)

    @property
    def plain(self) -> bool:
        """True where single rows are drawn that count alike."""
        return self.weights is None and self.groups is None

    def weighted(self, drawn: FloatArray) -> FloatArray:
        """The weights of resamples from how often each row was drawn, shape (B, N); each sums to N."""
        if self.plain:
            return drawn
        weights = drawn if self.weights is None else drawn * self.weights
        total = weights.sum(axis=1, keepdims=True)
        return np.asarray(weights * (self.count / np.where(total > 0, total, 1)))

    def resampled(self, count: int, rng: np.random.Generator) -> FloatArray:
        """Weights of resamples, shape (count, N)."""
        if self.groups is None:
            return self.weighted(resample(self.count, count, rng))
        return self.weighted(resample(int(self.groups.max()) + 1, count, rng)[:, self.groups])


def intervals(samples: FloatArray, level: float) -> tuple[FloatArray, FloatArray]:
    """Percentile intervals that hold `level` (a fraction) of each column of `samples`, shape (B, K); NaN is left out.

    >>> [x.tolist() for x in intervals(np.array([[0.0], [1.0], [2.0], [np.nan]]), 0.5)]
    [[0.0], [2.0]]
    """
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.full((2, samples.shape[1]), np.nan)
    finite = np.isfinite(samples)
    whole = finite.all(axis=0)
    # The form that looks for NaN goes column by column, which is slow.
    for chosen, quantile in ((whole, np.quantile), (~whole & finite.any(axis=0), np.nanquantile)):
        if chosen.any():
            # Of few resamples NumPy's default gives ends that lie too far inside.
            low[chosen], high[chosen] = quantile(samples[:, chosen], tails, axis=0, method="weibull")
    return low, high


def bootstrap(
    statistic: Callable[[FloatArray], FloatArray],
    rows: int | Rows,
    resamples: int,
    rng: np.random.Generator,
    n_excluded: int = 0,
) -> Draws:
    """Resample rows with replacement; all figures of one call see the same resamples, so their differences are paired.

    Args:
        statistic: from weights of shape (b, N), each row summing to N, to figures of shape (b, K). Several threads call
            it.
        rows: how many rows there are to resample, N, or how they are to be.
        resamples: B.
        rng: the generator.
        n_excluded: carried into the estimates.

    >>> values = np.array([0.0, 1.0])
    >>> draws = bootstrap(lambda w: (w @ values / 2)[:, None], 2, 100, np.random.default_rng(0))
    >>> float(draws.value[0]), draws.samples.shape
    (0.5, (100, 1))
    """
    rows = Rows(rows) if isinstance(rows, int) else rows
    value = statistic(rows.weighted(np.ones((1, rows.count))))[0]
    if rows.count == 0:
        return Draws(value, np.full((1, len(value)), np.nan), 0, n_excluded)
    # A stream for each block, so that the number of threads changes nothing.
    block = max(1, BLOCK_ELEMENTS // rows.count)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    streams = rng.spawn(len(sizes))
    # Threads of BLAS below these would wait for each other.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        samples = list(pool.map(lambda stream, size: statistic(rows.resampled(size, stream)), streams, sizes))
    return Draws(value, np.concatenate(samples), rows.count, n_excluded)


def bootstrap_together(
    statistics: Mapping[str, Callable[[FloatArray], FloatArray]],
    rows: int | Rows,
    resamples: int,
    rng: np.random.Generator,
    n_excluded: int = 0,
) -> dict[str, Draws]:
    """`bootstrap` of several statistics on the same resamples, which are drawn once.

    Args:
        statistics: by name; each from weights of shape (b, N) to figures of shape (b, ...).
        rows: as in `bootstrap`; likewise the others.
        resamples: B.
        rng: the generator.
        n_excluded: carried into the estimates.

    Returns:
        For each name its draws, the figures of one resample side by side.
    """
    one = np.ones((1, rows if isinstance(rows, int) else rows.count))
    ends = np.cumsum([statistic(one).size for statistic in statistics.values()])

    def all_of(weights: FloatArray) -> FloatArray:
        return np.hstack([statistic(weights).reshape(len(weights), -1) for statistic in statistics.values()])

    draws = bootstrap(all_of, rows, resamples, rng, n_excluded)
    values, samples = np.split(draws.value, ends[:-1]), np.split(draws.samples, ends[:-1], axis=1)
    return {
        name: Draws(value, sample, draws.n_used, n_excluded)
        for name, value, sample in zip(statistics, values, samples, strict=True)
    }


def resample(n_rows: int, count: int, rng: np.random.Generator) -> FloatArray:
    """How often each row is drawn in each of several resamples with replacement; shape (count, n_rows).

    The counts of one resample are one multinomial number. It is drawn in two steps, how many draws fall into each part
    of the rows and which rows they are, for `Generator.multinomial` alone would take one binomial number a row.

    >>> resample(70_000, 2, np.random.default_rng(0)).sum(axis=1).tolist()
    [70000.0, 70000.0]
    """
    starts = range(0, n_rows, PART)
    widths = np.array([min(PART, n_rows - start) for start in starts])
    drawn = rng.multinomial(n_rows, widths / n_rows, size=count)
    weights = np.empty((count, n_rows))
    for row, numbers in zip(weights, drawn, strict=True):
        for start, width, number in zip(starts, widths, numbers, strict=True):
            rows = _words(int(number), rng) if width == WORDS else rng.integers(width, size=number, dtype=np.uint32)
            row[start : start + width] = np.bincount(rows, minlength=width)
    return weights


def _words(count: int, rng: np.random.Generator) -> npt.NDArray[np.uint16]:
    """Even random numbers below `WORDS`, four of each number of the generator."""
    return rng.integers(np.iinfo(np.uint64).max, size=-(-count // 4), dtype=np.uint64, endpoint=True).view(np.uint16)[
        :count
    ]


def resample_groups(counts: IntArray, resamples: int, rng: np.random.Generator) -> IntArray:
    """Sizes of the cells of a partition in resamples of each of several sets of rows; shape (B, G, cells).

    The weights of the rows of a cell add up to one number, and those of all cells are one multinomial number.

    Args:
        counts: shape (G, cells), rows of each set in each cell, at least one a set.
        resamples: B.
        rng: the generator.
    """
    rows = counts.sum(axis=1)
    return rng.multinomial(rows, counts / rows[:, None], size=(resamples, len(rows)))


def correlations(first: Draws, second: Draws) -> FloatArray:
    """How two figures on the same resamples move together, shape (K,), from -1 to 1; 0 where one of them does not move.

    >>> samples = np.array([[0.0], [1.0], [2.0]])
    >>> one = Draws(np.zeros(1), samples, 3, 0)
    >>> correlations(one, Draws(np.zeros(1), -samples, 3, 0)).round(3).tolist()
    [-1.0]
    """
    one, other = (draws.samples - draws.samples.mean(axis=0) for draws in (first, second))
    spread = np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))
    return np.asarray((one * other).sum(axis=0) / np.where(spread > 0, spread, np.inf))


def proportion(share: float, n_used: float, level: float) -> tuple[float, float]:
    """The exact interval of a share of rows, which holds the truth at least as often as `level` says.

    Source: Clopper and Pearson, Biometrika 26 (1934).

    Args:
        share: of the rows that count, from 0 to 1; tied rows that share a place may make it no whole number of rows.
        n_used: rows in all.
        level: of the interval, a fraction.

    Returns:
        Its ends; NaN without rows.

    >>> low, high = proportion(0, 20, 0.95)
    >>> low, round(high, 3)
    (0.0, 0.168)
    """
    from scipy.special import betaincinv

    if not n_used or math.isnan(share):
        return math.nan, math.nan
    tail, found = (1 - level) / 2, share * n_used
    low = betaincinv(found, n_used - found + 1, tail) if found > 0 else 0.0
    high = betaincinv(found + 1, n_used - found, 1 - tail) if found < n_used else 1.0
    return float(low), float(high)


def difference(first: Estimate, second: Estimate, correlation: float = 0.0) -> tuple[float, float]:
    """The interval of the difference of two figures from the intervals of both.

    Where few rows are behind a figure a bootstrap says too little: of five rows that are all right, every resample is.
    The ends of exact intervals do not have this fault, and these are made from them.

    Source: Newcombe, Statistics in Medicine 17 (1998), method 10; Zou and Donner, ibid. 27 (2008), with correlation.

    Args:
        first: less
        second: this.
        correlation: of the two figures, where they are of the same rows.

    >>> low, high = difference(Estimate(1.0, 0.5, 1.0, 5, 0), Estimate(0.2, 0.0, 0.7, 5, 0))
    >>> round(low, 2), round(high, 2)
    (0.09, 1.0)
    """
    value = first.value - second.value

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0))

    low = value - reach(first.value - first.low, second.high - second.value)
    return low, value + reach(first.high - first.value, second.value - second.low)


def mcnemar(only_first: int, only_second: int) -> float:
    """How probable rows are on which two judges differ so unevenly, were both right equally often; two-sided, exact.

    Source: McNemar, Psychometrika 12 (1947), with the binomial distribution.

    Args:
        only_first: rows that the first alone has right.
        only_second: rows that the second alone has right.

    Returns:
        From 0 to 1; 1 where no row tells them apart.

    >>> mcnemar(5, 0)
    0.0625
    """
    from scipy.stats import binomtest

    differing = only_first + only_second
    return float(binomtest(only_first, differing).pvalue) if differing else 1.0


def paired_permutation(differences: FloatArray, permutations: int, rng: np.random.Generator) -> float:
    """How probable a mean so far from zero is, were the two measurements of each row exchangeable; two-sided.

    Source: Fisher, The Design of Experiments (1935); with the observed order counted among the permutations.

    Args:
        differences: shape (N,), of the two measurements of each row.
        permutations: how many assignments of signs are drawn.
        rng: the generator.

    Returns:
        From 1 / (permutations + 1) to 1.

    >>> paired_permutation(np.ones(20), 999, np.random.default_rng(0))
    0.001
    """
    telling = differences[differences != 0]
    if not len(telling):
        return 1.0
    observed, as_far = abs(telling.sum()), 1
    block = max(1, BLOCK_ELEMENTS // len(telling))
    for start in range(0, permutations, block):
        signs = rng.integers(2, size=(min(block, permutations - start), len(telling)), dtype=np.int8)
        # Sums that differ by rounding alone are as far.
        sums = np.abs(2 * (signs @ telling) - telling.sum())
        as_far += int((sums >= observed * (1 - 1e-12)).sum())
    return as_far / (permutations + 1)


def holm(p_values: FloatArray) -> FloatArray:
    """P-values adjusted for their number: those at most a are, with probability 1 - a, all of effects that exist.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).

    Args:
        p_values: shape (N,), from 0 to 1; NaN is no test and stays.

    >>> holm(np.array([0.01, 0.04, 0.03, np.nan])).tolist()
    [0.03, 0.06, 0.06, nan]
    """
    adjusted = np.full(len(p_values), np.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    raised = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return adjusted


def conformal_p_values(scores: FloatArray, null: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """How probable a score so large is for a row that is like the null rows.

    Valid for a row that is exchangeable with them, whatever the distribution of scores is; several rows share the null
    rows, so that their p-values hang together, which the procedure of Benjamini and Hochberg allows.

    Source: Bates et al., Annals of Statistics 51 (2023).

    Args:
        scores: shape (N,).
        null: shape (M,), scores of null rows.
        weights: shape (M,), how much each null row counts, mean 1; None for all alike.

    Returns:
        Shape (N,), from 1 / (M + 1) to 1.

    >>> conformal_p_values(np.array([2.0, 0.0]), np.array([0.0, 1.0, 3.0])).tolist()
    [0.5, 1.0]
    """
    order = np.argsort(null)
    weights = np.ones(len(null)) if weights is None else weights
    # How much of the null is at least as large as what stands at a place, and nothing past the last.
    above = np.append(np.cumsum(weights[order][::-1])[::-1], 0.0)
    as_large = above[np.searchsorted(null[order], scores)]
    # Sums of weights in another order may differ by rounding.
    return np.asarray(np.minimum((1 + as_large) / (1 + weights.sum()), 1.0))


def false_discovery(p_values: FloatArray) -> FloatArray:
    """The rate of false discoveries at which each row would just be listed (q-value), shape (N,).

    Source: Benjamini and Hochberg, Journal of the Royal Statistical Society B 57 (1995).

    >>> false_discovery(np.array([0.01, 0.5])).tolist()
    [0.02, 0.5]
    """
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p_values)) if len(p_values) else np.empty(0)


def smallest_detectable(samples: FloatArray, level: float, power: float = POWER) -> float:
    """The smallest true difference that an interval of so many rows would hold apart from zero with some probability.

    Args:
        samples: shape (B,), the bootstrap distribution of the difference, which gives its standard error.
        level: of the interval, a fraction.
        power: that probability.

    Returns:
        In the unit of `samples`; NaN where they are undefined.

    >>> round(smallest_detectable(np.random.default_rng(0).normal(0, 1, 100_000), 0.95), 1)
    2.8
    """
    from scipy.stats import norm

    return float((norm.ppf((1 + level) / 2) + norm.ppf(power)) * np.std(samples))
