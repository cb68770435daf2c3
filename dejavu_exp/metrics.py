"""Metrics as pure NumPy functions: no state, no device, no row ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dejavu_exp.tables import BoolArray, FloatArray, IntArray

QUADRANTS = ("memorized", "correlated", "forgotten", "unassociated")
CONFIDENCE_TOLERANCE = 1e-9
"""Confidences closer than this are tied: sums of the same terms in another order differ by less."""


def entropy(distribution: npt.NDArray[Any]) -> FloatArray:
    """Shannon entropy of each row after normalisation, in nats.

    Args:
        distribution: shape (N, C), non-negative: probabilities or counts.

    Returns:
        Shape (N,), from 0 to ln C; NaN where a row has no mass or is not finite.

    >>> entropy(np.array([[1, 1], [2, 0]])).round(4).tolist()
    [0.6931, 0.0]
    """
    values = np.asarray(distribution, dtype=np.float64)
    total = values.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = values / total
        terms = np.where(share > 0, share * np.log(share), 0.0 * share)
    return np.asarray(np.abs(-terms.sum(axis=1)), dtype=np.float64)


def accuracy_gap(target_correct: BoolArray, reference_correct: BoolArray) -> float:
    """Accuracy of the target less accuracy of the reference on the same rows.

    Source: arXiv 2304.13850, the label-inference test.

    Args:
        target_correct: shape (N,), True where the target's top label is the true one.
        reference_correct: shape (N,), the same rows in the same order.

    Returns:
        A fraction in [-1, 1]; 0 where the target infers nothing beyond the reference.

    Raises:
        ValueError: shapes differ, or N = 0, where the gap is undefined.

    >>> accuracy_gap(np.array([True, True]), np.array([True, False]))
    0.5
    """
    if target_correct.shape != reference_correct.shape or not len(target_correct):
        raise ValueError(f"need two equal shapes with rows, got {target_correct.shape} and {reference_correct.shape}")
    return float(target_correct.mean() - reference_correct.mean())


def n_confident(n_rows: int, fraction: float) -> int:
    """How many rows the most confident fraction keeps: truncated, and at least one.

    The tolerance keeps 0.29 of 100 at 29; the released code gives 28 there.

    >>> n_confident(100, 0.29), n_confident(3, 0.05)
    (29, 1)
    """
    return max(1, int(fraction * n_rows + CONFIDENCE_TOLERANCE))


def percent_key(fraction: float) -> str:
    """A confident fraction as the figures name it, in %.

    >>> percent_key(1.0), percent_key(0.05), percent_key(0.125)
    ('100', '5', '12.5')
    """
    return f"{100 * fraction:g}"


def confident_means(
    values: npt.NDArray[Any], confidence: FloatArray, fractions: Sequence[float], weights: FloatArray | None = None
) -> FloatArray:
    """Mean of `values` over the most confident fraction of rows; rows tied at the cut share the free places equally.

    So the result does not depend on row order: it is the mean over all ways to break the ties. (The released code
    takes whatever an unstable sort leaves first.)

    Args:
        values: shape (N,), what is averaged, e.g. correctness.
        confidence: shape (N,), larger is more confident; differences below 1e-9 count as ties.
        fractions: each in (0, 1].
        weights: shape (B, N), a non-negative weight of each row in each of B resamples, all with the same sum;
            None for one plain sample.

    Returns:
        Shape (B, F), the mean for each resample and fraction; NaN where N = 0.

    >>> confident_means(np.array([1, 0, 1]), np.array([0.0, -1.0, -1.0]), [1 / 3, 2 / 3]).tolist()
    [[1.0, 0.75]]
    """
    if not len(values):
        return np.full((1 if weights is None else len(weights), len(fractions)), np.nan)
    weights = np.ones((1, len(values))) if weights is None else weights
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    ends = np.append(np.flatnonzero(np.diff(-sorted_confidence) > CONFIDENCE_TOLERANCE), len(values) - 1)
    cumulated = np.cumsum(weights[:, order], axis=1)[:, ends]
    earned = np.cumsum(weights[:, order] * np.asarray(values, dtype=np.float64)[order], axis=1)[:, ends]
    zero = np.zeros((len(weights), 1))
    cumulated, earned = np.hstack([zero, cumulated]), np.hstack([zero, earned])
    rows = np.arange(len(weights))
    result = np.empty((len(weights), len(fractions)))
    for column, fraction in enumerate(fractions):
        places = n_confident(len(values), fraction)
        last = np.minimum((cumulated < places).sum(axis=1), cumulated.shape[1] - 1)
        group = cumulated[rows, last] - cumulated[rows, last - 1]
        share = (places - cumulated[rows, last - 1]) / np.where(group > 0, group, 1)
        taken = earned[rows, last - 1] + share * (earned[rows, last] - earned[rows, last - 1])
        result[:, column] = taken / places
    return result


def accuracy_in_order(
    correct: BoolArray, confidence: FloatArray, fraction: float, *, later_first: bool = False
) -> float:
    """Accuracy on the most confident `int(fraction * N)` rows as the released code sorts them, with a stable sort.

    Args:
        correct: shape (N,).
        confidence: shape (N,), larger is more confident.
        fraction: in (0, 1].
        later_first: among equal confidences later rows come first (their naive Bayes), not earlier ones (their k-NN).

    Returns:
        A fraction; NaN where no row is kept.
    """
    order = np.argsort(confidence, kind="stable")[::-1] if later_first else np.argsort(-confidence, kind="stable")
    kept = order[: int(fraction * len(correct))]
    return float(correct[kept].mean()) if len(kept) else float("nan")


def quadrant(target_correct: BoolArray, reference_correct: BoolArray) -> IntArray:
    """Position in `QUADRANTS` of each row: memorized (target only), correlated (both), forgotten, unassociated.

    >>> quadrant(np.array([True, True, False, False]), np.array([False, True, True, False])).tolist()
    [0, 1, 2, 3]
    """
    return np.where(target_correct, np.where(reference_correct, 1, 0), np.where(reference_correct, 2, 3)).astype(
        np.int64
    )


def auroc(positive: FloatArray, negative: FloatArray) -> float:
    """Probability that a random positive scores above a random negative, ties counted half; NaN where one is empty.

    >>> auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    from scipy.stats import rankdata

    if not len(positive) or not len(negative):
        return float("nan")
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))
