"""Exact nearest neighbours and their votes. The only module that knows FAISS."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dejavu_exp import evidence, metrics
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.tables import Float32Array, IntArray

Metric = Literal["l2", "cosine"]
Ties = Literal["nearest", "lowest_label"]
QUERY_BLOCK = 4096
"""Queries searched at a time; bounds the memory of distances and results in flight."""


@dataclass(frozen=True)
class Neighbours:
    """The k nearest bank rows of each query.

    Attributes:
        positions: shape (N, k), rows of the bank, nearest first; equal distances by lowest position.
        distances: shape (N, k), squared L2 for "l2" (the unit of the released code), 1 - cosine for "cosine".
    """

    positions: IntArray
    distances: Float32Array


def search(queries: Float32Array, bank: Float32Array, k: int, metric: Metric = "l2") -> Neighbours:
    """Exact search over the whole bank; on a GPU where FAISS was built for one and there is one.

    Args:
        queries: shape (N, D).
        bank: shape (M, D), M >= k.
        k: neighbours a query.
        metric: "l2" compares embeddings as they are, "cosine" only their directions.

    Raises:
        ConfigError: k is larger than the bank.
        DataError: a value is not finite; distances to it would be meaningless.

    >>> search(np.zeros((1, 2), np.float32), np.array([[1, 0], [0, 0]], np.float32), k=1).positions.tolist()
    [[1]]
    """
    # FAISS logs each build of itself that it looks for.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    import faiss

    if k > len(bank):
        raise ConfigError(
            f"probe.k={k} is more than the bank holds: there are {len(bank)} usable public images. "
            f"Set probe.k to at most {len(bank)}, or choose a larger split."
        )
    for name, values in (("query", queries), ("public", bank)):
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise DataError(
                f"{bad.sum()} {name} embeddings are not finite (first: row {bad.argmax()}); see the encoder."
            )
    queries, bank = _prepare(queries, metric), _prepare(bank, metric)
    index: Any = faiss.IndexFlatIP(bank.shape[1]) if metric == "cosine" else faiss.IndexFlatL2(bank.shape[1])
    if getattr(faiss, "get_num_gpus", lambda: 0)() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(bank)
    positions = np.empty((len(queries), k), dtype=np.int64)
    distances = np.empty((len(queries), k), dtype=np.float32)
    for start in range(0, len(queries), QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        distances[rows], positions[rows] = index.search(queries[rows], k)
    return Neighbours(positions, 1 - distances if metric == "cosine" else distances)


def _prepare(values: Float32Array, metric: Metric) -> Float32Array:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if metric == "l2":
        return values
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(length > 0, length, 1), dtype=np.float32)


def vote(ids: Sequence[str], codes: IntArray, labels: Sequence[str], ties: Ties = "nearest") -> Evidence:
    """Each neighbour votes for its label.

    Args:
        ids: N query ids.
        codes: shape (N, k), the label of each neighbour as a position in `labels`, nearest first.
        labels: C labels.
        ties: among labels with equally many votes, "nearest" puts the one whose nearest voter is nearer first;
            "lowest_label" the one that comes first in `labels`, as the released code does.

    Returns:
        Evidence with vote shares as probabilities. A label without votes never enters the ranking. (The released code
        fills the top five with arbitrary labels without votes, which can then count as hits.)

    >>> vote(["q"], np.array([[1, 0, 0, 1]]), ["x", "y"]).ranking.tolist()
    [[1, 0]]
    """
    n_rows, k = codes.shape
    counts = np.empty((n_rows, len(labels)), dtype=np.float32)
    tie_order = np.full(counts.shape, k, dtype=np.int16) if ties == "nearest" else None
    for start in range(0, n_rows, QUERY_BLOCK):
        block = codes[start : start + QUERY_BLOCK]
        rows = np.arange(len(block))
        flat = (rows[:, None] * len(labels) + block).ravel()
        counts[start : start + QUERY_BLOCK] = np.bincount(flat, minlength=counts[: len(block)].size).reshape(
            len(block), -1
        )
        if tie_order is not None:
            for column in range(k - 1, -1, -1):  # from the farthest to the nearest, so that the nearest stays
                tie_order[start + rows, block[:, column]] = column
    # From whole votes: the entropy of float32 shares would be off by 1e-8, and equal votes would not tie.
    return evidence.from_probabilities(ids, labels, counts / np.float32(k), tie_order, -metrics.entropy(counts))


def label_codes(bank_labels: Sequence[str], labels: Sequence[str], positions: IntArray) -> IntArray:
    """The label of each neighbour as a position in `labels`, shape as `positions`.

    Args:
        bank_labels: M labels, of the bank's rows.
        labels: C labels, sorted, that hold all of them.
        positions: rows of the bank.

    >>> label_codes(["fox", "boat"], ["boat", "fox"], np.array([[0, 1]])).tolist()
    [[1, 0]]
    """
    codes = np.searchsorted(np.array(labels), np.array(bank_labels))
    return np.asarray(codes[positions], dtype=np.int64)


@dataclass(frozen=True)
class KnnProbe:
    """What the adversary holds and how the bank answers: the query view, and k-nearest-neighbour votes.

    Attributes:
        query: view rule of the query, e.g. the background crop.
        bank: view rule of the public images.
        k: neighbours that vote.
        metric: "l2" or "cosine".
        ties: see `vote`.
    """

    query: Any
    bank: Any
    k: int = 100
    metric: Metric = "l2"
    ties: Ties = "nearest"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"probe.k={self.k}: must be at least 1.")
        if self.metric not in ("l2", "cosine"):
            raise ConfigError(f"probe.metric={self.metric}: must be l2 or cosine.")
        if self.ties not in ("nearest", "lowest_label"):
            raise ConfigError(f"probe.ties={self.ties}: must be nearest or lowest_label.")
