"""Intervals: a paired bootstrap over rows. Pure NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dejavu_exp.tables import Estimate, FloatArray

BLOCK_ELEMENTS = 20_000_000
"""Weights held at a time; bounds the memory whatever the number of rows."""


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
        tail = (1 - level) / 2
        low, high = np.full(len(self.value), np.nan), np.full(len(self.value), np.nan)
        defined = np.isfinite(self.samples).any(axis=0)
        if defined.any():
            low[defined], high[defined] = np.nanquantile(self.samples[:, defined], [tail, 1 - tail], axis=0)
        return [
            Estimate(float(value), float(below), float(above), self.n_used, self.n_excluded)
            for value, below, above in zip(self.value, low, high, strict=True)
        ]


def bootstrap(
    statistic: Callable[[FloatArray], FloatArray],
    n_rows: int,
    resamples: int,
    rng: np.random.Generator,
    n_excluded: int = 0,
) -> Draws:
    """Resample rows with replacement; all figures of one call see the same resamples, so their differences are paired.

    Args:
        statistic: from weights of shape (b, n_rows), each row summing to n_rows, to figures of shape (b, K).
        n_rows: rows to resample.
        resamples: B.
        rng: the generator.
        n_excluded: carried into the estimates.

    >>> values = np.array([0.0, 1.0])
    >>> draws = bootstrap(lambda w: (w @ values / 2)[:, None], 2, 100, np.random.default_rng(0))
    >>> float(draws.value[0]), draws.samples.shape
    (0.5, (100, 1))
    """
    value = statistic(np.ones((1, n_rows)))[0]
    if n_rows == 0:
        return Draws(value, np.full((1, len(value)), np.nan), 0, n_excluded)
    block = max(1, BLOCK_ELEMENTS // n_rows)
    uniform = np.full(n_rows, 1 / n_rows)
    samples = [
        statistic(rng.multinomial(n_rows, uniform, size=min(block, resamples - start)).astype(np.float64))
        for start in range(0, resamples, block)
    ]
    return Draws(value, np.concatenate(samples), n_rows, n_excluded)
