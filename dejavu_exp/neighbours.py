"""Exact nearest neighbours and their votes. The only module that knows FAISS."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from dejavu_exp import evidence, metrics, ranks, tables
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.leases import POLL_S, Leases, Pieces
from dejavu_exp.shards import Embeddings
from dejavu_exp.tables import Float32Array, FloatArray, IntArray

Metric = Literal["l2", "cosine"]
Ties = Literal["nearest", "lowest_label"]
COUNTED_VOTERS = 100_000
"""Voters whose votes are counted at a time: what stays in the processor's cache."""
QUERY_BLOCK = 4096
"""Queries searched at a time; bounds the memory of distances and results in flight."""


SPARE = 16
"""Candidates a query beyond k: as long as the last of them is farther than rounding can explain, none is missed."""


@dataclass(frozen=True)
class Neighbours:
    """The k nearest bank rows of each query.

    Attributes:
        positions: shape (N, k), rows of the bank, nearest first; equal distances by lowest position.
        distances: shape (N, k), squared L2 for "l2" (the unit of the released code), 1 - cosine for "cosine".
    """

    positions: IntArray
    distances: Float32Array


def search(
    queries: Float32Array | Embeddings,
    bank: Float32Array | Embeddings,
    k: int,
    metric: Metric = "l2",
    memory_mb: int = 1024,
    lease_s: float = 60.0,
) -> Neighbours:
    """Exact search over the whole bank, of which only a part is in memory; shared among the ranks of the run.

    FAISS finds candidates, on a GPU where it was built for one and there is one. Their distances are then computed in
    float32 pair by pair, so they do not depend on how the bank is cut, on ranks or on threads; a query for which
    rounding in the first step could have hidden a neighbour is searched again without that step.

    Args:
        queries: shape (N, D).
        bank: shape (M, D), M >= k.
        k: neighbours a query.
        metric: "l2" compares embeddings as they are, "cosine" only their directions.
        memory_mb: of the bank held in memory at a time, MB; the queries and the results are held besides.
        lease_s: seconds after which a part of the bank whose rank is not heard of is searched by another.

    Raises:
        ConfigError: k is larger than the bank.
        DataError: a value is not finite; distances to it would be meaningless.

    >>> search(np.zeros((1, 2), np.float32), np.array([[1, 0], [0, 0]], np.float32), k=1).positions.tolist()
    [[1]]
    """
    if k > len(bank):
        raise ConfigError(
            f"probe.k={k} is more than the bank holds: there are {len(bank)} usable public images. "
            f"Set probe.k to at most {len(bank)}, or choose a larger split."
        )
    if isinstance(bank, Embeddings) and isinstance(queries, Embeddings) and ranks.here().place.size > 1:
        return _search_together(queries, bank, k, metric, memory_mb, lease_s)
    values = queries if isinstance(queries, np.ndarray) else queries.values
    found = _Nearest(values, k, metric)
    for places, part in _slices(bank, memory_mb):
        found.add(places, part)
    return Neighbours(found.positions, found.distances)


def _search_together(
    queries: Embeddings, bank: Embeddings, k: int, metric: Metric, memory_mb: int, lease_s: float
) -> Neighbours:
    """Search the bank in as many parts as there are ranks, and merge what they found."""
    with ranks.here().scratch() as folder:
        ranks.here().ask(help_search, queries, bank, k, metric, memory_mb, lease_s, folder)
        found = _Nearest(queries.values, k, metric)
        with Leases(lease_s) as leases:
            parts = _parts(folder, leases)
            while parts.missing():
                _search_free(queries.values, bank, k, metric, memory_mb, parts)
                time.sleep(POLL_S if parts.missing() else 0)
        for part in range(parts.count):
            with np.load(parts.path(part)) as archive:
                found.merge(archive["distances"], archive["positions"])
    return Neighbours(found.positions, found.distances)


def help_search(
    queries: Embeddings, bank: Embeddings, k: int, metric: Metric, memory_mb: int, lease_s: float, folder: Path
) -> None:
    """In a rank other than 0: search parts of the bank that nobody else searches, until there are none."""
    if folder.is_dir():
        with Leases(lease_s) as leases:
            parts = _parts(folder, leases)
            _search_free(queries.values, bank, k, metric, memory_mb, parts)


def _parts(folder: Path, leases: Leases) -> Pieces:
    return Pieces(ranks.here().place.size, lambda part: folder / f"{part}.npz", leases)


def _search_free(
    queries: Float32Array, bank: Embeddings, k: int, metric: Metric, memory_mb: int, parts: Pieces
) -> None:
    """Search the parts that are free, each into its file."""
    in_order = np.array_split(np.argsort(bank.rows, kind="stable"), parts.count)
    for part in parts.take():
        found = _Nearest(queries, k, metric)
        for places, values in _slices(bank.take(in_order[part]), memory_mb):
            found.add(in_order[part][places], values)
        with tables.whole(parts.path(part)) as partial, partial.open("wb") as stream:
            np.savez(stream, distances=found.distances, positions=found.positions)
        parts.release(part)


def _slices(bank: Float32Array | Embeddings, memory_mb: int) -> Iterator[tuple[IntArray, Float32Array]]:
    """The bank in pieces of a size in memory, with the positions of their rows."""
    if isinstance(bank, Embeddings):
        # As it is stored, in float32, and with unit length.
        yield from bank.slices(max(1024, memory_mb * 2**20 // (12 * max(1, bank.width))))
        return
    most = max(1024, memory_mb * 2**20 // (4 * bank.shape[1]))
    for start in range(0, len(bank), most):
        yield np.arange(start, min(start + most, len(bank))), bank[start : start + most]


def _prepare(values: Float32Array, metric: Metric, name: str) -> tuple[Float32Array, Float32Array]:
    """As float32, for "cosine" of unit length, not copied where they are so; and their lengths, shape (N,)."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    length = _lengths(values)
    # Not finite where a value is not; or where a length is too large for float32.
    for row in np.flatnonzero(~np.isfinite(length)):
        if not np.isfinite(values[row]).all():
            bad = ~np.isfinite(values).all(axis=1)
            raise DataError(f"{bad.sum()} {name} embeddings are not finite (first: row {row}); see the encoder.")
    if metric == "l2":
        return values, length
    return np.asarray(values / np.where(length > 0, length, 1)[:, None], dtype=np.float32), np.ones_like(length)


def _lengths(values: Float32Array) -> Float32Array:
    """Euclidean lengths of rows, shape (N,), without a copy of the squares."""
    return np.asarray(np.sqrt(np.einsum("nd,nd->n", values, values, optimize=False)))


class _Nearest:
    """The nearest rows of each query among the rows seen so far.

    Attributes:
        queries: shape (N, D), for "cosine" of unit length.
        distances: shape (N, k), each computed in float32 from its pair alone.
        positions: shape (N, k).
    """

    def __init__(self, queries: Float32Array, k: int, metric: Metric) -> None:
        # FAISS logs each build of itself that it looks for.
        logging.getLogger("faiss.loader").setLevel(logging.WARNING)
        import faiss

        self.faiss: Any = faiss
        self.queries, self._lengths = _prepare(queries, metric, "query")
        self.k, self.metric = k, metric
        self.distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        self.positions = np.full((len(queries), k), np.iinfo(np.int64).max)
        self._gpu = faiss.StandardGpuResources() if getattr(faiss, "get_num_gpus", lambda: 0)() > 0 else None

    def add(self, positions: IntArray, values: Float32Array) -> None:
        """See further rows of the bank.

        Args:
            positions: shape (S,), their places in the bank.
            values: shape (S, D).

        Raises:
            DataError: a value is not finite.
        """
        values, lengths = _prepare(values, self.metric, "public")
        longest = float(lengths.max(initial=0))
        self._add(np.arange(len(self.queries)), positions, values, longest, SPARE)

    def _add(self, rows: IntArray, positions: IntArray, values: Float32Array, longest: float, spare: int) -> None:
        """See rows of the bank for some queries, with so many candidates more than k."""
        count = min(self.k + spare, len(values))
        block = max(1, QUERY_BLOCK * (self.k + SPARE) // count)
        unsure = [
            self._add_block(rows[start : start + block], positions, values, longest, count)
            for start in range(0, len(rows), block)
        ]
        left = np.concatenate(unsure) if unsure else rows
        if len(left):
            self._add(left, positions, values, longest, 8 * spare)

    def _add_block(
        self, rows: IntArray, positions: IntArray, values: Float32Array, longest: float, count: int
    ) -> IntArray:
        """The same for a block of queries; returns those for which more candidates are needed."""
        queries = self.queries[rows]
        # What adding D products in any order can be off, twice: in the candidates' distances, and in the exact ones.
        lengths = self._lengths[rows]
        size = (lengths + longest) ** 2 if self.metric == "l2" else lengths * longest
        slack = np.finfo(np.float32).eps * (values.shape[1] + 8) * size
        near, rough = self._candidates(queries, values, count)
        # Left out, as -1, is what cannot be among the k nearest.
        wanted = np.where(rough - slack[:, None] <= self.distances[rows, -1:], near, -1)
        distances, found = self._nearest_of(rows, self._exact(queries, values, wanted), positions[near])
        sure = rough[:, -1] - slack > distances[:, -1] if count < len(values) else np.full(len(rows), True)
        self.distances[rows[sure]], self.positions[rows[sure]] = distances[sure], found[sure]
        return np.asarray(rows[~sure])

    def _candidates(self, queries: Float32Array, values: Float32Array, count: int) -> tuple[IntArray, Float32Array]:
        """The nearest rows by FAISS, and their distances up to rounding, nearest first."""
        metric = self.faiss.METRIC_L2 if self.metric == "l2" else self.faiss.METRIC_INNER_PRODUCT
        if self._gpu is None:
            rough, near = self.faiss.knn(queries, values, count, metric=metric)
        else:
            device = ranks.device_index()
            rough, near = self.faiss.knn_gpu(self._gpu, queries, values, count, metric=metric, device=device)
        return near, rough if self.metric == "l2" else 1 - rough

    def _exact(self, queries: Float32Array, values: Float32Array, near: IntArray) -> Float32Array:
        """Distances of pairs, each computed for itself; infinite where `near` is -1."""
        result = np.empty(near.shape, dtype=np.float32)
        by_pairs = self.faiss.fvec_L2sqr_by_idx if self.metric == "l2" else self.faiss.fvec_inner_products_by_idx
        pointers = [self.faiss.swig_ptr(part) for part in (result, queries, values, np.ascontiguousarray(near))]
        by_pairs(*pointers, values.shape[1], *near.shape)
        return result if self.metric == "l2" else 1 - result

    def _nearest_of(
        self, rows: IntArray, distances: Float32Array, positions: IntArray
    ) -> tuple[Float32Array, IntArray]:
        """The k nearest of those known and these, nearest first, equal distances by lowest position."""
        distances = np.hstack([self.distances[rows], distances])
        positions = np.hstack([self.positions[rows], positions])
        order = np.lexsort((positions, distances), axis=1)[:, : self.k]
        return np.take_along_axis(distances, order, axis=1), np.take_along_axis(positions, order, axis=1)

    def merge(self, distances: Float32Array, positions: IntArray) -> None:
        """Take over what was found in another part of the bank."""
        for start in range(0, len(self.queries), QUERY_BLOCK):
            rows = np.arange(start, min(start + QUERY_BLOCK, len(self.queries)))
            self.distances[rows], self.positions[rows] = self._nearest_of(rows, distances[rows], positions[rows])


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
    return _count(ids, partial(_single_votes, codes, len(labels)), codes.shape[1], labels, ties, distance)


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
    if (np.diff(offsets) == 1).all():
        found = vote(ids, values[near.positions], labels, ties, near.distances[:, 0])
    else:
        votes = partial(_votes_for_sets, near.positions, offsets, values, len(labels))
        found = _count(ids, votes, near.positions.shape[1], labels, ties, near.distances[:, 0])
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
    values = pl.Series(labels, dtype=pl.String).search_sorted(flat.cast(pl.String)).to_numpy()
    lengths = table["truth"].list.len().to_numpy()
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), values.astype(np.int64)


def _single_votes(codes: IntArray, width: int, rows: slice) -> IntArray:
    """The votes of neighbours that carry one of `width` labels each, `codes` of shape (N, k); see `_count`."""
    part = codes[rows]
    n_rows, k = part.shape
    cells = part + np.arange(n_rows)[:, None] * width
    votes = cells << k.bit_length() | np.arange(k)
    # The row comes first in the numbers, so that short sorts do for one long one.
    votes.sort(axis=1)
    return np.asarray(votes.ravel(), dtype=np.int64)


def _votes_for_sets(positions: IntArray, offsets: IntArray, values: IntArray, width: int, rows: slice) -> IntArray:
    """The votes of neighbours at `positions`, shape (N, k); m votes for each of `values[offsets[m]:offsets[m + 1]]`."""
    part = positions[rows]
    n_rows, k = part.shape
    voters = part.ravel()
    lengths = offsets[voters + 1] - offsets[voters]
    first = np.cumsum(lengths) - lengths
    which = np.arange(lengths.sum()) - np.repeat(first - offsets[voters], lengths)
    row, voter = np.divmod(np.repeat(np.arange(n_rows * k), lengths), k)
    votes = row * width + values[which] << k.bit_length() | voter
    votes.sort()
    return np.asarray(votes, dtype=np.int64)


def _count(
    ids: Sequence[str],
    votes: Callable[[slice], IntArray],
    k: int,
    labels: Sequence[str],
    ties: Ties,
    distance: Float32Array | None,
) -> Evidence:
    """Count votes and rank the labels by them.

    Args:
        ids: N query ids.
        votes: those of a slice of rows, each as one number, sorted: its cell in a flat matrix of rows by labels, and in
            the low bits its voter, where the nearest is 0.
        k: voters a row.
        labels: C labels.
        ties: as in `vote`.
        distance: as in `vote`.
    """
    n_rows, width, bits = len(ids), len(labels), k.bit_length()
    shares = np.zeros((n_rows, width), dtype=np.float32)
    ranking = np.full((n_rows, min(evidence.TOP, width)), -1, dtype=np.int64)
    tied = np.full(n_rows, width > 1)
    confidence = np.full(n_rows, -np.log(width))

    def count(rows: slice) -> None:
        found = votes(rows)
        cells = found >> bits
        first = np.flatnonzero(np.diff(cells, prepend=-1))
        number, held = np.diff(first, append=len(found)), cells[first]
        shares[rows].reshape(-1)[held] = number.astype(np.float32) / np.float32(k)
        nearest = found[first] & (1 << bits) - 1 if ties == "nearest" else 0
        # Again one number, by which labels sort: by row, most votes, nearest voter, first label.
        row, label = np.divmod(held, width)
        order = np.sort((((row << bits) + k - number << bits) + nearest) * width + label)
        _rank(order, k, width, ranking[rows], tied[rows], confidence[rows])

    size = max(1, COUNTED_VOTERS // k)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(count, [slice(start, start + size) for start in range(0, n_rows, size)]):
            pass
    far = None if distance is None else distance.astype(np.float64)
    return Evidence(tuple(ids), tuple(labels), shares, ranking, confidence, tied, far)


def _rank(
    order: IntArray, k: int, width: int, ranking: IntArray, tied: npt.NDArray[np.bool_], confidence: FloatArray
) -> None:
    """Fill in what follows from the sorted numbers of labels with votes; rows without votes are left alone."""
    bits = k.bit_length()
    above, label = np.divmod(order, width)
    by_votes = above >> bits
    row, number = by_votes >> bits, k - (by_votes & (1 << bits) - 1)
    first = np.flatnonzero(np.diff(row, prepend=-1))
    place = np.arange(len(row)) - np.repeat(first, np.diff(first, append=len(row)))
    kept = place < ranking.shape[1]
    ranking[row[kept], place[kept]] = label[kept]
    tied[row[first]] = np.append(np.diff(by_votes) == 0, False)[first]
    # From whole votes: the entropy of float32 shares would be off by 1e-8, and equal votes would not tie.
    confidence[row[first]] = -metrics.grouped_entropy(number, row, len(ranking))[row[first]]


class Reader(Protocol):
    """Whatever says what it can embed: an encoder as configured, or one that is trained here."""

    @property
    def reads(self) -> frozenset[str]:
        """What it can embed, of "images" and "texts"."""
        ...


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
