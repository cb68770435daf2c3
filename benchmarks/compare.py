"""The measurement's own parts beside other ways of doing the same, in one run: `make bench`.

Every pair is first checked to agree. Times vary with the machine; the ratios are what to look at.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dejavu_exp import crops, neighbours

QUERIES, BANK, WIDTH, K = 4_000, 50_000, 512, 100
"""Queries, public images, embedding width, neighbours."""


def seconds(action: Callable[[], Any], tries: int = 3) -> float:
    """The best of several tries."""
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)


def search(rng: np.random.Generator) -> tuple[str, dict[str, float]]:
    """Exact k nearest neighbours."""
    import torch
    from sklearn.neighbors import NearestNeighbors

    bank = rng.normal(size=(BANK, WIDTH)).astype(np.float32)
    queries = rng.normal(size=(QUERIES // 4, WIDTH)).astype(np.float32)
    tree = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(bank)

    def by_torch() -> Any:  # noqa: ANN401
        return torch.cdist(torch.from_numpy(queries), torch.from_numpy(bank)).topk(K, largest=False)

    ours = neighbours.search(queries, bank, K).positions
    agree = np.mean([len(set(a) & set(b)) for a, b in zip(ours, by_torch().indices.numpy(), strict=True)]) / K
    if agree < 0.999:
        sys.exit(f"search: only {agree:.4f} of the neighbours agree with torch")
    return f"search: {len(queries)} queries, {BANK} public images, width {WIDTH}, k = {K}", {
        "dejavu_exp": seconds(lambda: neighbours.search(queries, bank, K)),
        "torch.cdist + topk": seconds(by_torch),
        "scikit-learn brute force": seconds(lambda: tree.kneighbors(queries)),
    }


def rectangles(rng: np.random.Generator) -> tuple[str, dict[str, float]]:
    """The largest rectangle outside four boxes."""
    corners = rng.integers(0, 380, size=(2_000, 4, 2))
    boxes = np.concatenate([corners, corners + rng.integers(20, 120, size=corners.shape)], axis=2).tolist()
    return "background rectangle: 2,000 images of 500 by 500 pixels, 4 boxes each", {
        "dejavu_exp, the true largest": seconds(lambda: [crops.largest_rectangle(500, 500, image) for image in boxes]),
        "dejavu_exp, the authors' rule": seconds(lambda: [crops.authors_rectangle(500, 500, image) for image in boxes]),
    }


def main() -> None:
    """Print one table."""
    table = Table("task", "way", "seconds", "times dejavu_exp")
    for part in (search, rectangles):
        title, found = part(np.random.default_rng(0))
        first = next(iter(found.values()))
        for way, taken in found.items():
            table.add_row(title, way, f"{taken:.3f}", f"{taken / first:.2f}")
            title = ""
        table.add_section()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
