"""Metrics as pure NumPy functions: no state, no device, no row ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dejavu_exp.tables import BoolArray, FloatArray, IntArray

QUADRANTS = ("memorized", "correlated", "forgotten", "unassociated")
OBJECT_BLOCK = 4096
"""Objects that are packed into bits at a time; bounds the memory of a large vocabulary."""
ROW_BLOCK = 8192
BLOCK_CELLS = 100_000
"""Cells of a matrix that are worked on at a time."""
AUTHORS_F_GUARD = 1e-5
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
    result = np.empty(len(distribution))
    # Temporary arrays of a large matrix would be several times its size; these stay in the processor's cache.
    block = max(1, BLOCK_CELLS // max(1, distribution.shape[1]))
    for start in range(0, len(distribution), block):
        values = np.asarray(distribution[start : start + block], dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = values / values.sum(axis=1, keepdims=True)
            terms = np.where(share > 0, share * np.log(share), 0.0 * share)
        result[start : start + block] = np.abs(-terms.sum(axis=1))
    return result


def grouped_entropy(counts: npt.NDArray[Any], groups: IntArray, n_groups: int) -> FloatArray:
    """`entropy` of rows that are given by their positive entries alone.

    Args:
        counts: shape (E,), the entries. Summed in this order: equal entries in equal order give equal entropies.
        groups: shape (E,), the row of each.
        n_groups: N rows.

    Returns:
        Shape (N,), nats; NaN where a row has no entry.

    >>> grouped_entropy(np.array([1, 1, 2]), np.array([0, 0, 1]), 3).round(4).tolist()
    [0.6931, 0.0, nan]
    """
    total = np.bincount(groups, counts, n_groups)
    share = counts / total[groups]
    found = np.abs(-np.bincount(groups, share * np.log(share), n_groups))
    return np.where(total > 0, found, np.nan)


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
        weights: shape (B, N), a non-negative weight of each row in each of B resamples, each summing to N; None for one
            plain sample.

    Returns:
        Shape (B, F), the mean for each resample and fraction; NaN where N = 0.

    >>> confident_means(np.array([1, 0, 1]), np.array([0.0, -1.0, -1.0]), [1 / 3, 2 / 3]).tolist()
    [[1.0, 0.75]]
    """
    weights = np.ones((1, len(values))) if weights is None else weights
    columns = np.asarray(values, dtype=np.float64)[:, None]
    return top_means(columns, confidence, fractions, weights)[:, :, 0]


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


def set_scores(
    n_correct: npt.NDArray[Any], n_predicted: npt.NDArray[Any], n_true: npt.NDArray[Any], unpredicted: float = np.nan
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Precision, recall and F of predicted sets against true sets.

    Source: arXiv 2402.02103, the vision-language test. F is the harmonic mean of the two, as
    2 |true and predicted| / (|true| + |predicted|), which stays defined where nothing is predicted.

    Args:
        n_correct: shape (N,), members that are both true and predicted.
        n_predicted: shape (N,), members predicted.
        n_true: shape (N,), members that are true.
        unpredicted: precision where nothing is predicted. The released code has 0 there, which is no ratio of counts.

    Returns:
        Three times shape (N,), fractions in [0, 1]. Recall and F are NaN where nothing is true.

    Raises:
        ValueError: more are correct than predicted or true.

    >>> [x.tolist() for x in set_scores(np.array([1, 0]), np.array([2, 0]), np.array([1, 3]))]
    [[0.5, nan], [1.0, 0.0], [0.6666666666666666, 0.0]]
    """
    correct, predicted, true = (np.asarray(x, dtype=np.float64) for x in (n_correct, n_predicted, n_true))
    if (correct > np.minimum(predicted, true)).any():
        raise ValueError("more members are correct than predicted or true")
    precision = np.where(predicted > 0, correct / np.maximum(predicted, 1), unpredicted)
    recall = np.where(true > 0, correct / np.maximum(true, 1), np.nan)
    f = np.where(true > 0, 2 * correct / np.maximum(predicted + true, 1), np.nan)
    return precision, recall, f


def dominance_gap(target: FloatArray, reference: FloatArray) -> float:
    """Share of rows where the target is larger less the share where it is smaller: P(a > b) - P(a < b).

    Source: arXiv 2402.02103; PPG on precision, PRG on recall. Rows where both are equal count for neither side but stay
    in the divisor; rows where one is NaN are left out.

    Args:
        target: shape (N,), a value of each row.
        reference: shape (N,), the same rows in the same order.

    Returns:
        A fraction in [-1, 1]; NaN where no row has both values.

    Raises:
        ValueError: shapes differ.

    >>> dominance_gap(np.array([1.0, 0.5, 0.5, 1.0]), np.array([0.5, 0.5, 1.0, 0.0]))
    0.25
    """
    if target.shape != reference.shape:
        raise ValueError(f"need two equal shapes, got {target.shape} and {reference.shape}")
    signs = np.sign(target - reference)
    signs = signs[np.isfinite(signs)]
    return float(signs.mean()) if len(signs) else float("nan")


def area_between_curves(target: FloatArray, reference: FloatArray) -> float:
    """Area between the survival curves P(value >= x) of target and reference, x from 0 to 1: the AUCG of recalls.

    The area under such a curve is the mean, so this is the mean difference, without a histogram.

    Source: arXiv 2402.02103. `authors_area` is the released code's form, which depends on its bins.

    Args:
        target: shape (N,), fractions in [0, 1]; NaN is left out.
        reference: shape (M,), likewise.

    Returns:
        In [-1, 1]; NaN where one has no value.

    >>> area_between_curves(np.array([1.0, 0.5]), np.array([0.5, 0.5]))
    0.25
    """
    areas = [values[np.isfinite(values)] for values in (target, reference)]
    if not all(map(len, areas)):
        return float("nan")
    return float(areas[0].mean() - areas[1].mean())


def authors_area(values: FloatArray, bins: int = 100) -> float:
    """Area under the survival curve as the released code has it.

    A histogram from the least to the largest value; the survival share of a bin is that of its left edge, so the result
    is the mean rounded up by up to one bin, and by 0.01 where all values are equal.

    Args:
        values: shape (N,), finite.
        bins: of the histogram.

    Returns:
        Up to 1.01; NaN where N = 0.

    >>> round(authors_area(np.ones(3)), 9)
    1.01
    """
    if not len(values):
        return float("nan")
    counts, edges = np.histogram(values, bins=bins)
    survival = counts[::-1].cumsum()[::-1] / len(values)
    return float(edges[0] + (survival * np.diff(edges)).sum())


def authors_top(ranking: npt.NDArray[Any], fraction: float) -> IntArray:
    """Rows that the released code puts into its top fraction: the largest first, among equals the earlier row first.

    The released code's sort is not stable, so its own choice among equals depends on the processor.

    Args:
        ranking: shape (N,), larger comes first.
        fraction: in (0, 1].

    Returns:
        Shape (n,), n = max(1, int(fraction * N)) positions.

    >>> authors_top(np.array([1, 3, 3, 0]), 0.5).tolist()
    [1, 2]
    """
    return np.argsort(-ranking, kind="stable")[: max(1, int(fraction * len(ranking)))].astype(np.int64)


def authors_f(precision: npt.NDArray[Any], recall: npt.NDArray[Any]) -> FloatArray:
    """The released code's F: of mean precision and mean recall, not the mean of F, and with 1e-5 in the divisor.

    Args:
        precision: any shape, fractions.
        recall: the same shape.

    Returns:
        The same shape, in [0, 1).

    >>> authors_f(np.array([0.5]), np.array([0.5])).round(6).tolist()
    [0.499995]
    """
    return np.asarray(2 * precision * recall / (precision + recall + AUTHORS_F_GUARD), dtype=np.float64)


def top_means(
    values: FloatArray,
    ranking: FloatArray,
    fractions: Sequence[float],
    weights: FloatArray,
    tolerance: float = CONFIDENCE_TOLERANCE,
) -> FloatArray:
    """Means of several values over the top fractions of rows by a ranking; rows tied at a cut share the free places.

    As `confident_means`, but for several values at once and for weights whose sums differ.

    Args:
        values: shape (N, K), finite.
        ranking: shape (N,), larger comes first; differences below 1e-9 count as ties.
        fractions: F of them, each in (0, 1]; of a resample's weights, and never less than one place.
        weights: shape (B, N), a non-negative weight of each row in each of B resamples.
        tolerance: added before the number of places is truncated, so that 0.29 of 100 are 29.

    Returns:
        Shape (B, F, K); NaN for a resample without weight.

    >>> top_means(np.array([[1.0], [0], [1]]), np.array([0.0, -1, -1]), [2 / 3], np.ones((1, 3))).tolist()
    [[[0.75]]]
    """
    return TopMeans.of(values, ranking, fractions, tolerance)(weights)


@dataclass(frozen=True)
class TopMeans:
    """`top_means` with all that does not depend on the weights done once, for many blocks of resamples.

    Attributes:
        order: shape (M,), the ranked rows from the first to the last.
        ranked: shape (N,), 1 for a row that is ranked, 0 for one that is not.
        starts: shape (M,), for each place in that order where its group of ties starts.
        ends: shape (M,), and where it ends, exclusive.
        values: shape (K, M), what is averaged, in that order.
        fractions: as in `top_means`.
        tolerance: as in `top_means`.
    """

    order: IntArray
    ranked: FloatArray
    starts: IntArray
    ends: IntArray
    values: FloatArray
    fractions: tuple[float, ...]
    tolerance: float

    @classmethod
    def of(
        cls,
        values: FloatArray,
        ranking: FloatArray,
        fractions: Sequence[float],
        tolerance: float = CONFIDENCE_TOLERANCE,
        rows: BoolArray | None = None,
    ) -> TopMeans:
        """Sort the rows.

        Args:
            values: as in `top_means`, of the ranked rows.
            ranking: likewise.
            fractions: as in `top_means`.
            tolerance: as in `top_means`.
            rows: shape (N,), True for the M rows that are ranked, where the weights are of more than these; None: all.
        """
        ranked = np.ones(len(ranking), dtype=np.bool_) if rows is None else rows
        order = np.argsort(-ranking, kind="stable")
        is_first = np.append(True, np.diff(-ranking[order]) > CONFIDENCE_TOLERANCE)[: len(order)]
        firsts = np.flatnonzero(is_first)
        sizes = np.diff(np.append(firsts, len(order)))
        starts = np.repeat(firsts, sizes)
        ends = starts + np.repeat(sizes, sizes)
        ordered = np.ascontiguousarray(np.asarray(values, dtype=np.float64)[order].T)
        order = np.flatnonzero(ranked)[order]
        return cls(order, ranked.astype(np.float64), starts, ends, ordered, tuple(fractions), tolerance)

    def __call__(self, weights: FloatArray) -> FloatArray:
        """The means; see `top_means`."""
        total = weights @ self.ranked
        places = np.maximum(1, np.floor(np.outer(total, self.fractions) + self.tolerance))
        result = np.full((len(weights), len(self.fractions), len(self.values)), np.nan)
        for row in np.flatnonzero(total > 0):
            result[row] = self._of_resample(weights[row], places[row])
        return result

    def _of_resample(self, weights: FloatArray, places: FloatArray) -> FloatArray:
        """The means of one resample, shape (F, K); its numbers stay in the processor's cache."""
        taken, reached = self._reached(weights, float(places.max()))
        last = np.minimum(np.searchsorted(reached, places), len(reached) - 1)
        # The group where the places run out, and the share of it that still finds one.
        start, end = self.starts[last], self.ends[last]
        before = np.where(start > 0, reached[start - 1], 0)
        size = reached[end - 1] - before
        share = (places - before) / np.where(size > 0, size, 1)
        bounds = np.unique(np.concatenate([[0], start, end]))
        sums = [self.values[:, low:high] @ taken[low:high] for low, high in itertools.pairwise(bounds)]
        earned = np.cumsum([np.zeros(len(self.values)), *sums], axis=0)
        first, then = (earned[np.searchsorted(bounds, edge)] for edge in (start, end))
        return np.asarray((first + share[:, None] * (then - first)) / places[:, None])

    def _reached(self, weights: FloatArray, places: float) -> tuple[FloatArray, FloatArray]:
        """Weights in order and their cumulated sums, of whole groups, as far as the places reach."""
        # Few rows decide a small fraction: look at all only where a resample needs them.
        likely = int(max(self.fractions) * len(self.order) * 1.1) + 100
        stops = [int(self.ends[likely])] if likely < len(self.order) else []
        for stop in [*stops, len(self.order)]:
            taken = weights[self.order[:stop]]
            reached = np.cumsum(taken)
            if reached[-1] >= places:
                break
        return taken, reached


def neighbour_set_counts(
    positions: IntArray, bank: tuple[IntArray, IntArray], truth: tuple[IntArray, IntArray]
) -> tuple[IntArray, IntArray, IntArray]:
    """Sizes of the predicted and true sets of each row; predicted is all that one of the k neighbours carries.

    Sets are packed into bits, 64 objects a word, so that a union is a handful of operations whatever the sets hold.

    Source: arXiv 2402.02103.

    Args:
        positions: shape (N, k), rows of the bank.
        bank: offsets, shape (M + 1,), and values: bank row m carries `values[offsets[m]:offsets[m + 1]]`, object ids
            from 0 on; repeats count once.
        truth: the same for the N rows.

    Returns:
        Three times shape (N,): members both true and predicted, predicted, and true.

    Raises:
        ValueError: the truth is not of N rows.

    >>> bank, truth = (np.array([0, 2, 3]), np.array([5, 7, 7])), (np.array([0, 2]), np.array([7, 9]))
    >>> [x.tolist() for x in neighbour_set_counts(np.array([[0, 1]]), bank, truth)]
    [[1], [2], [2]]
    """
    if len(truth[0]) != len(positions) + 1:
        raise ValueError(f"{len(positions)} rows of neighbours but {len(truth[0]) - 1} rows of truth")
    n_objects = 1 + max((int(values.max()) for _, values in (bank, truth) if len(values)), default=0)
    counts = np.zeros((3, len(positions)), dtype=np.int64)
    for first in range(0, n_objects, OBJECT_BLOCK):
        carried, true = (_packed(*sets, first, min(OBJECT_BLOCK, n_objects - first)) for sets in (bank, truth))
        for start in range(0, len(positions), ROW_BLOCK):
            rows = slice(start, start + ROW_BLOCK)
            near = positions[rows]
            union = np.zeros_like(true[rows])
            for voter in range(near.shape[1]):
                union |= carried[near[:, voter]]
            for place, sets in enumerate((union & true[rows], union, true[rows])):
                counts[place, rows] += np.bitwise_count(sets).sum(axis=1, dtype=np.int64)
    return counts[0], counts[1], counts[2]


def _packed(offsets: IntArray, values: IntArray, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Membership of the objects `first` to `first + count` as bits, shape (M, words)."""
    bits = np.zeros((len(offsets) - 1, -(-count // 64)), dtype=np.uint64)
    objects = np.asarray(values, dtype=np.int64) - first
    rows = np.repeat(np.arange(len(bits)), np.diff(offsets))
    inside = (objects >= 0) & (objects < count)
    rows, objects = rows[inside], objects[inside]
    np.bitwise_or.at(bits, (rows, objects >> 6), np.uint64(1) << (objects & 63).astype(np.uint64))
    return bits
