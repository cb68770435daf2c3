"""Exact nearest neighbours and their votes. The only module that knows FAISS."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import polars as pl

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


def vote(
    ids: Sequence[str],
    codes: IntArray,
    labels: Sequence[str],
    ties: Ties = "nearest",
    distance: Float32Array | None = None,
) -> Evidence:
    """Each neighbour votes for its one label.

    Args:
        ids: N query ids.
        codes: shape (N, k), the label of each neighbour as a position in `labels`, nearest first.
        labels: C labels.
        ties: among labels with equally many votes, "nearest" puts the one whose nearest voter is nearer first;
            "lowest_label" the one that comes first in `labels`, as the released code does.
        distance: shape (N,), to the nearest neighbour, where it matters.

    Returns:
        Evidence with vote shares as probabilities. A label without votes never enters the ranking. (The released code
        fills the top five with arbitrary labels without votes, which can then count as hits.)

    >>> vote(["q"], np.array([[1, 0, 0, 1]]), ["x", "y"]).ranking.tolist()
    [[1, 0]]
    """
    everyone = np.arange(len(labels) + 1)
    return _count(ids, codes, everyone, everyone[:-1], labels, ties, distance)


def infer(
    ids: Sequence[str],
    near: Neighbours,
    truth: pl.Series,
    labels: Sequence[str],
    ties: Ties = "nearest",
    bank_ids: Sequence[str] | None = None,
) -> Evidence:
    """Each neighbour votes once for every label that it carries: its class, or the objects in it.

    Args:
        ids: N query ids.
        near: their neighbours among M bank rows.
        truth: M lists of labels, without null; a list may be empty, and repeats count once.
        labels: C labels, sorted, that hold all of them.
        ties: as in `vote`.
        bank_ids: M ids, where the evidence shall name the nearest bank rows.

    Returns:
        Evidence whose probabilities are the share of neighbours that carry the label. Where no neighbour carries any,
        all are 0 and the confidence is that of an even spread.

    >>> near = Neighbours(np.array([[0, 1]]), np.zeros((1, 2), np.float32))
    >>> infer(["q"], near, pl.Series([["cat", "sofa"], ["cat"]]), ["cat", "dog", "sofa"]).probabilities.tolist()
    [[1.0, 0.0, 0.5]]
    """
    offsets, values = membership(truth, labels)
    found = _count(ids, near.positions, offsets, values, labels, ties, near.distances[:, 0])
    if bank_ids is None:
        return found
    return replace(found, nearest=np.array(bank_ids, dtype=object)[near.positions[:, : evidence.NEAREST]])


def membership(truth: pl.Series, labels: Sequence[str]) -> tuple[IntArray, IntArray]:
    """Lists of labels as positions in `labels`: those of row m are `values[offsets[m]:offsets[m + 1]]`.

    Args:
        truth: M lists, without null; repeats count once.
        labels: C labels, sorted, that hold all of them.

    Returns:
        Offsets, shape (M + 1,), and values.
    """
    table = pl.DataFrame({"truth": truth.list.unique(maintain_order=True)}).with_row_index("row")
    flat = table.explode("truth", empty_as_null=False)["truth"]
    values = np.searchsorted(np.array(labels, dtype=object), flat.to_numpy()) if len(flat) else np.empty(0)
    lengths = table["truth"].list.len().to_numpy()
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), values.astype(np.int64)


def _count(
    ids: Sequence[str],
    positions: IntArray,
    offsets: IntArray,
    values: IntArray,
    labels: Sequence[str],
    ties: Ties,
    distance: Float32Array | None,
) -> Evidence:
    """Count the votes of voters at `positions`, shape (N, k); voter m votes for `values[offsets[m]:offsets[m + 1]]`."""
    n_rows, k = positions.shape
    counts = np.empty((n_rows, len(labels)), dtype=np.float32)
    tie_order = np.full(counts.shape, k, dtype=np.int16) if ties == "nearest" else None
    # From the farthest to the nearest: of several writes to one place the last stays, and that is the nearest.
    ranks = np.arange(k - 1, -1, -1, dtype=np.int16)
    lengths = np.diff(offsets)
    for start in range(0, n_rows, QUERY_BLOCK):
        voters = positions[start : start + QUERY_BLOCK, ::-1].ravel()
        block = len(positions[start : start + QUERY_BLOCK])
        votes = lengths[voters]
        first = np.cumsum(votes) - votes
        which = np.arange(votes.sum()) - np.repeat(first - offsets[voters], votes)
        places = np.repeat(np.repeat(np.arange(block), k) * len(labels), votes) + values[which]
        cells = np.bincount(places, minlength=block * len(labels))
        counts[start : start + block] = cells.reshape(block, -1)
        if tie_order is not None:
            tie_order[start : start + block].reshape(-1)[places] = np.repeat(np.tile(ranks, block), votes)
    # From whole votes: the entropy of float32 shares would be off by 1e-8, and equal votes would not tie.
    confidence = -metrics.entropy(counts)
    confidence[~counts.any(axis=1)] = -np.log(len(labels))
    far = None if distance is None else distance.astype(np.float64)
    return evidence.from_probabilities(ids, labels, counts / np.float32(k), tie_order, confidence, far)


class Reader(Protocol):
    """Whatever says what it can embed: an encoder as configured, or one that is trained here."""

    reads: ClassVar[frozenset[str]]


@dataclass(frozen=True)
class KnnProbe:
    """What the adversary holds and how the bank answers: the query view, and k-nearest-neighbour votes.

    Attributes:
        query: view rule of the query: the background crop, or the caption.
        bank: view rule of the public rows: the whole image, or the caption.
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

    @property
    def reads(self) -> frozenset[str]:
        """What an encoder must be able to embed: "images", "texts" or both."""
        return frozenset({self.query.reads, self.bank.reads})

    def check_encoder(self, encoder: Reader, key: str) -> None:
        """Find an encoder that cannot be asked in this way.

        Args:
            encoder: as configured.
            key: where it is in the configuration.

        Raises:
            ConfigError: it cannot embed what the probe shows.
        """
        missing = sorted(self.reads - encoder.reads)
        if missing:
            raise ConfigError(
                f"{key} is a {type(encoder).__name__}, which cannot embed {missing[0]}, and its probe asks from "
                f"{self.query.name} to {self.bank.name}. Choose a model that can, e.g. a CLIP, or another probe."
            )
