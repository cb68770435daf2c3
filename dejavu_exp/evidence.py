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

TOP = 5


@dataclass(frozen=True)
class Evidence:
    """What a predictor says of N rows among C labels.

    Attributes:
        ids: N row ids, unique.
        labels: C labels.
        probabilities: shape (N, C); each row sums to 1, or is NaN where the predictor has nothing to say. (Under
            `compat: authors` naive Bayes gives the released code's unnormalised products.)
        ranking: shape (N, min(5, C)), columns from the most probable down, ties broken as the predictor declares;
            -1 fills up where fewer labels have any evidence.
        confidence: shape (N,), larger is surer: minus the entropy in nats, unless the predictor declares another.
        tied: shape (N,), True where the most probable label shares its probability with another.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    probabilities: npt.NDArray[Any]
    ranking: IntArray
    confidence: FloatArray
    tied: BoolArray

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            raise DataError("evidence: a row id occurs twice; ids must be unique.")
        shape = (len(self.ids), len(self.labels))
        if self.probabilities.shape != shape:
            raise ValueError(f"probabilities have shape {self.probabilities.shape}, expected {shape}")

    def take(self, ids: Sequence[str]) -> Evidence:
        """The same evidence for the ids asked for, in their order.

        Raises:
            DataError: an id is not there.
        """
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
        )

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
) -> Evidence:
    """Build evidence from probabilities.

    Args:
        ids: N row ids.
        labels: C labels.
        probabilities: shape (N, C).
        tie_order: shape (C,) or (N, C); among equal probabilities the label with the smallest value comes first.
            None: the lowest column first.
        confidence: shape (N,); None: minus the entropy, nats.

    >>> from_probabilities(["a"], ["x", "y"], np.array([[0.5, 0.5]])).tied.tolist()
    [True]
    """
    n_rows, n_labels = probabilities.shape
    order_of_ties = np.arange(n_labels) if tie_order is None else tie_order
    keep = min(TOP, n_labels)
    ranking = np.empty((n_rows, keep), dtype=np.int64)
    tied = np.zeros(n_rows, dtype=np.bool_)
    block = max(1, 20_000_000 // max(n_labels, 1))
    for start in range(0, n_rows, block):
        part = np.asarray(probabilities[start : start + block])
        ties = np.broadcast_to(
            order_of_ties if order_of_ties.ndim == 1 else order_of_ties[start : start + block], part.shape
        )
        ranks = np.lexsort((ties, -part), axis=1)[:, :keep]
        best = np.take_along_axis(part, ranks, axis=1)
        ranking[start : start + block] = np.where(best > 0, ranks, -1)
        tied[start : start + block] = (part == best[:, :1]).sum(axis=1) > 1
    if confidence is None:
        confidence = -metrics.entropy(probabilities)
    return Evidence(tuple(ids), tuple(labels), probabilities, ranking, confidence, tied)
