"""Evidence about labels: what one predictor, target or reference, says of each row. The one type all methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dejavu_exp import metrics
from dejavu_exp.errors import DataError
from dejavu_exp.tables import BoolArray, FloatArray, IntArray

TOP = 10
"""Labels that are ranked."""
NEAREST = 5
"""Bank rows that are kept by id, to be shown."""
BLOCK_CELLS = 1_000_000
"""Probabilities that are ranked at a time."""


@dataclass(frozen=True)
class Evidence:
    """What a predictor says of N rows among C labels.

    Attributes:
        ids: N row ids, unique.
        labels: C labels.
        probabilities: shape (N, C); how probable it is that the label holds, NaN in a row where the predictor has
            nothing to say. Each row sums to 1 where a truth is one label; of neighbours that carry sets of labels it is
            the share that carries the label. (Under `compat: authors` naive Bayes gives the released code's
            unnormalised products.)
        ranking: shape (N, min(10, C)), columns from the most probable down, ties broken as the predictor declares;
            -1 fills up where fewer labels have any evidence.
        confidence: shape (N,), larger is surer: minus the entropy in nats, unless the predictor declares another.
        tied: shape (N,), True where the most probable label shares its probability with another.
        distance: shape (N,), to the nearest bank entry, in the probe's unit; None for a predictor without a bank.
        nearest: shape (N, up to 5), ids of the nearest bank rows, nearest first, empty in a row without evidence; None
            where they are not known.
        entropy: shape (N,), nats, where the predictor tells it but not all of its probabilities; None: theirs.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    probabilities: npt.NDArray[Any]
    ranking: IntArray
    confidence: FloatArray
    tied: BoolArray
    distance: FloatArray | None = None
    nearest: npt.NDArray[Any] | None = None
    entropy: FloatArray | None = None

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            raise DataError("evidence: a row id occurs twice; ids must be unique.")
        shape = (len(self.ids), len(self.labels))
        if self.probabilities.shape != shape:
            raise ValueError(f"probabilities have shape {self.probabilities.shape}, expected {shape}")

    @classmethod
    def joined(cls, parts: Sequence[Evidence]) -> Evidence:
        """The evidence of all parts, one after the other; what not every part has is left out.

        Args:
            parts: one at least, of one predictor, about the same labels; no id twice.

        Raises:
            DataError: an id occurs twice.

        >>> labels, told = ("cat", "dog"), np.array([[0.75, 0.25]])
        >>> first = from_probabilities(["a"], labels, told, distance=np.array([0.5]))
        >>> both = Evidence.joined([first, from_probabilities(["b"], labels, told)])
        >>> both.ids, both.distance is None, Evidence.joined([first]).distance.tolist()
        (('a', 'b'), True, [0.5])
        """
        if len(parts) == 1:
            return parts[0]

        def together(name: str) -> npt.NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        def where_all_have_it(name: str) -> npt.NDArray[Any] | None:
            return None if any(getattr(part, name) is None for part in parts) else together(name)

        return cls(
            tuple(row_id for part in parts for row_id in part.ids),
            parts[0].labels,
            together("probabilities"),
            together("ranking"),
            together("confidence"),
            together("tied"),
            where_all_have_it("distance"),
            where_all_have_it("nearest"),
            where_all_have_it("entropy"),
        )

    def take(self, ids: Sequence[str]) -> Evidence:
        """The same evidence for the ids asked for, in their order.

        Raises:
            DataError: an id is not there.
        """
        if tuple(ids) == self.ids:
            return self
        position = {row_id: index for index, row_id in enumerate(self.ids)}
        missing = [row_id for row_id in ids if row_id not in position]
        if missing:
            raise DataError(f"evidence: {len(missing)} rows are missing, e.g. {missing[0]}.")
        rows = np.array([position[row_id] for row_id in ids], dtype=np.int64)
        return Evidence(
            tuple(ids),
            self.labels,
            self.probabilities[rows],
            self.ranking[rows],
            self.confidence[rows],
            self.tied[rows],
            None if self.distance is None else self.distance[rows],
            None if self.nearest is None else self.nearest[rows],
            None if self.entropy is None else self.entropy[rows],
        )

    def spread_over(self, ids: Sequence[str]) -> Evidence:
        """The evidence for the ids asked for, in their order; NaN, and no ranking, for those that are not there."""
        if tuple(ids) == self.ids:
            return self
        position = {row_id: index for index, row_id in enumerate(self.ids)}
        rows = np.array([position.get(row_id, -1) for row_id in ids], dtype=np.int64)
        found = rows >= 0

        def spread(values: npt.NDArray[Any], missing: float | str) -> npt.NDArray[Any]:
            result = np.full((len(rows), *values.shape[1:]), missing, dtype=values.dtype)
            result[found] = values[rows[found]]
            return result

        return Evidence(
            tuple(ids),
            self.labels,
            spread(self.probabilities, np.nan),
            spread(self.ranking, -1),
            spread(self.confidence, np.nan),
            spread(self.tied, False),
            None if self.distance is None else spread(self.distance, np.nan),
            None if self.nearest is None else spread(self.nearest, ""),
            None if self.entropy is None else spread(self.entropy, np.nan),
        )

    def nearest_by_id(self) -> dict[str, list[str]]:
        """Ids of the nearest bank rows of each row, nearest first; empty where they are not known."""
        if self.nearest is None:
            return {}
        return {name: [near for near in row if near] for name, row in zip(self.ids, self.nearest, strict=True)}

    def answered(self) -> BoolArray:
        """True where the predictor has something to say; shape (N,)."""
        # A row is finite as a whole or not at all, and its sum is finite then; no matrix of booleans is needed.
        with np.errstate(invalid="ignore"):
            return np.asarray(np.isfinite(self.probabilities.sum(axis=1)))

    def entropies(self, rows: BoolArray) -> FloatArray:
        """How unsure the predictor is of some rows, nats."""
        return metrics.entropy(self.probabilities[rows]) if self.entropy is None else self.entropy[rows]

    def correct(self, truth: IntArray, top: int = 1) -> BoolArray:
        """True where the true label is among the `top` first; shape (N,). `truth` holds columns, -1 for none."""
        return np.asarray(((self.ranking[:, :top] == truth[:, None]) & (truth[:, None] >= 0)).any(axis=1))

    def probability_of(self, truth: IntArray) -> FloatArray:
        """The probability given to the true label; shape (N,)."""
        return self.probabilities[np.arange(len(truth)), truth].astype(np.float64)


def from_probabilities(
    ids: Sequence[str],
    labels: Sequence[str],
    probabilities: npt.NDArray[Any],
    tie_order: npt.NDArray[Any] | None = None,
    confidence: FloatArray | None = None,
    distance: FloatArray | None = None,
) -> Evidence:
    """Build evidence from probabilities.

    Args:
        ids: N row ids.
        labels: C labels.
        probabilities: shape (N, C).
        tie_order: shape (C,) or (N, C); among equal probabilities the label with the smallest value comes first.
            None: the lowest column first.
        confidence: shape (N,); None: minus the entropy, nats.
        distance: shape (N,), to the nearest bank entry; None without a bank.

    >>> from_probabilities(["a"], ["x", "y"], np.array([[0.5, 0.5]])).tied.tolist()
    [True]
    """
    n_rows, n_labels = probabilities.shape
    order_of_ties = np.arange(n_labels) if tie_order is None else tie_order
    ranking = np.empty((n_rows, min(TOP, n_labels)), dtype=np.int64)
    tied = np.zeros(n_rows, dtype=np.bool_)
    block = max(1, BLOCK_CELLS // max(n_labels, 1))
    for start in range(0, n_rows, block):
        rows = slice(start, start + block)
        ties = order_of_ties if order_of_ties.ndim == 1 else order_of_ties[rows]
        ranking[rows], tied[rows] = _ranked(np.asarray(probabilities[rows]), ties)
    if confidence is None:
        confidence = -metrics.entropy(probabilities)
    return Evidence(tuple(ids), tuple(labels), probabilities, ranking, confidence, tied, distance)


def _ranked(probabilities: npt.NDArray[Any], ties: npt.NDArray[Any]) -> tuple[IntArray, BoolArray]:
    """Ranking and ties of some rows; see `from_probabilities`."""
    n_rows, n_labels = probabilities.shape
    keep = min(TOP, n_labels)
    # Negative, so that NaN comes last as the largest would.
    negative = -probabilities
    largest = np.partition(negative, keep - 1, axis=1)[:, :keep]
    # Only what is no smaller than the last that is kept needs to be sorted, and nothing without evidence.
    rows, columns = np.nonzero((negative <= largest[:, -1:]) & (negative < 0))
    order = np.lexsort((np.broadcast_to(ties, negative.shape)[rows, columns], negative[rows, columns], rows))
    counts = np.bincount(rows, minlength=n_rows)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    ranking = np.full((n_rows, keep), -1, dtype=np.int64)
    kept = place < keep
    ranking[rows[kept], place[kept]] = columns[order][kept]
    tied = (negative == largest.min(axis=1, keepdims=True)).sum(axis=1) > 1
    return ranking, np.asarray(tied)
