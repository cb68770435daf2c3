"""Exact search: against brute force in float64, however the bank is cut, stored and shared; ties; rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dejavu_exp import neighbours
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.neighbours import Metric, Neighbours
from dejavu_exp.shards import Embeddings, ShardFolder
from dejavu_exp.tables import Float32Array, IntArray


def stored(folder: Path, values: Float32Array, storage: str = "float32", rows_per_shard: int = 100) -> Embeddings:
    """Embeddings on disk, in an order of their own."""
    shards = ShardFolder(folder, "key", len(values), rows_per_shard, storage)  # type: ignore[arg-type]
    shards.write_request(pl.DataFrame({"view_id": [f"{row:06d}" for row in range(len(values))]}))
    order = np.random.default_rng(1).permutation(len(values))
    by_id = np.empty_like(values)
    by_id[order] = values
    for shard in range(len(shards)):
        rows = shards.span(shard)
        shards.write(shard, by_id[rows.start : rows.stop], [""] * len(rows))
    return Embeddings(shards, order, np.full(len(values), True), {}, None)


def brute_force(queries: Float32Array, bank: Float32Array, k: int, metric: Metric) -> Neighbours:
    asked, known = queries.astype(np.float64), bank.astype(np.float64)
    if metric == "cosine":
        asked, known = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (asked, known))
        distances = 1 - asked @ known.T
    else:
        distances = ((asked[:, None] - known[None]) ** 2).sum(axis=2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return Neighbours(order, np.take_along_axis(distances, order, axis=1).astype(np.float32))


def drawn(rows: int, seed: int) -> Float32Array:
    return np.random.default_rng(seed).normal(size=(rows, 24)).astype(np.float32)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_nearest_are_those_of_brute_force(metric: Metric) -> None:
    queries, bank = drawn(40, 0), drawn(3000, 1)
    found, expected = neighbours.search(queries, bank, 10, metric), brute_force(queries, bank, 10, metric)
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_bank_read_in_pieces_gives_the_same_bits(
    metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, bank = drawn(40, 0), drawn(5000, 1)
    whole = neighbours.search(queries, bank, 10, metric)
    on_disk = stored(tmp_path, bank)
    np.testing.assert_array_equal(on_disk.values, bank)
    seen, add = [], neighbours._Nearest.add

    def watched(self: Any, places: IntArray, values: Float32Array) -> None:
        seen.append(len(values))
        add(self, places, values)

    monkeypatch.setattr(neighbours._Nearest, "add", watched)
    pieces = neighbours.search(queries, on_disk, 10, metric, memory_mb=0)
    assert seen == [1024] * 4 + [904]
    np.testing.assert_array_equal(pieces.positions, whole.positions)
    np.testing.assert_array_equal(pieces.distances, whole.distances)


def test_half_precision_is_searched_as_it_is_stored(tmp_path: Path) -> None:
    queries, bank = drawn(20, 0), drawn(1500, 1)
    found = neighbours.search(queries, stored(tmp_path, bank, "float16"), 10)
    expected = neighbours.search(queries, bank.astype(np.float16).astype(np.float32), 10)
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_array_equal(found.distances, expected.distances)


def test_values_beyond_half_precision_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"65504.*1 views, first 00000[01]\. Set trainer\.storage=float32"):
        stored(tmp_path, np.array([[1.0], [70_000.0]], dtype=np.float32)[::-1].copy(), "float16")


def test_copies_tie_by_position_also_where_they_are_more_than_the_candidates(tmp_path: Path) -> None:
    """Far more rows at one distance than candidates are looked at, in every piece of the bank."""
    bank = np.zeros((4000, 3), dtype=np.float32)
    bank[:, 0] = 1
    bank[::7, 0] = 2
    queries = np.zeros((2, 3), dtype=np.float32)
    expected = np.flatnonzero(bank[:, 0] == 1)[:5]
    for found in (
        neighbours.search(queries, bank, 5),
        neighbours.search(queries, stored(tmp_path, bank), 5, memory_mb=0),
    ):
        np.testing.assert_array_equal(found.positions, [expected, expected])
        assert (found.distances == 1).all()


def test_a_neighbour_that_rounding_hides_is_found() -> None:
    """Far from the origin a distance by lengths and products is off by more than the distances themselves."""
    rng = np.random.default_rng(0)
    bank = (1000 + rng.normal(scale=0.01, size=(2000, 64))).astype(np.float32)
    queries = (1000 + rng.normal(scale=0.01, size=(30, 64))).astype(np.float32)
    found, expected = neighbours.search(queries, bank, 5), brute_force(queries, bank, 5, "l2")
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-4)
    assert (found.positions == expected.positions).mean() > 0.99


def test_k_beyond_the_bank_and_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"probe\.k=4.*at most 3"):
        neighbours.search(drawn(1, 0), drawn(3, 1), 4)
    bank = drawn(3, 1)
    bank[1, 0] = np.nan
    with pytest.raises(DataError, match=r"1 public embeddings are not finite \(first: row 1\)"):
        neighbours.search(drawn(1, 0), bank, 2)
