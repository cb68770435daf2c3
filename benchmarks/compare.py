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

from dejavu_exp import crops, metrics, neighbours
from dejavu_exp.references import naive_bayes

QUERIES, BANK, WIDTH, LABELS, K = 4_000, 50_000, 512, 1_000, 100
"""Queries, public images, embedding width, labels, neighbours."""


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


def votes(rng: np.random.Generator) -> tuple[str, dict[str, float]]:
    """Votes, entropies and ranking of neighbours."""
    from scipy.stats import entropy

    codes = rng.zipf(1.4, size=(QUERIES, K)) % LABELS
    ids, labels = [str(row) for row in range(QUERIES)], [f"{label:04d}" for label in range(LABELS)]

    def by_row() -> list[tuple[float, Any]]:
        counts = [np.bincount(row, minlength=LABELS) for row in codes]
        return [(float(entropy(row)), np.argsort(-row, kind="stable")[:5]) for row in counts]

    found = neighbours.vote(ids, codes, labels, "lowest_label")
    if not np.allclose(-found.confidence, [row[0] for row in by_row()]):
        sys.exit("votes: the entropies differ from scipy's")
    return f"votes and entropy: {QUERIES} rows, k = {K}, {LABELS} labels", {
        "dejavu_exp": seconds(lambda: neighbours.vote(ids, codes, labels, "lowest_label")),
        "numpy and scipy row by row": seconds(by_row),
    }


def rectangles(rng: np.random.Generator) -> tuple[str, dict[str, float]]:
    """The largest rectangle outside four boxes."""
    corners = rng.integers(0, 380, size=(2_000, 4, 2))
    boxes = np.concatenate([corners, corners + rng.integers(20, 120, size=corners.shape)], axis=2).tolist()
    return "background rectangle: 2,000 images of 500 by 500 pixels, 4 boxes each", {
        "dejavu_exp, the true largest": seconds(lambda: [crops.largest_rectangle(500, 500, image) for image in boxes]),
        "dejavu_exp, the authors' rule": seconds(lambda: [crops.authors_rectangle(500, 500, image) for image in boxes]),
    }


def bayes(rng: np.random.Generator) -> tuple[str, dict[str, float]]:
    """Class scores of the released rule from tag counts."""
    tags = [f"tag{index}" for index in range(500)]
    counts = {f"{label:04d}": {tag: int(rng.integers(1, 50)) for tag in tags[::3]} for label in range(200)}
    questions = [[str(tag) for tag in rng.choice(tags, 5, replace=False)] for _ in range(1_000)]

    def plainly() -> list[list[float]]:
        totals: dict[str, int] = {}
        for found in counts.values():
            for tag, count in found.items():
                totals[tag] = totals.get(tag, 0) + count
        result = []
        for names in questions:
            row = []
            for found in counts.values():
                product = 1.0
                for tag in reversed(names):
                    product *= found.get(tag, 1e-10) / totals.get(tag, 1e-10)
                row.append(product)
            result.append(row)
        return result

    if not np.array_equal(plainly(), naive_bayes.authors_scores(questions, counts, 5, laplace=False)):
        sys.exit("naive Bayes: the scores differ from the plain loops")
    return "naive Bayes, the authors' rule: 1,000 images, 200 classes, 5 tags", {
        "dejavu_exp": seconds(lambda: naive_bayes.authors_scores(questions, counts, 5, laplace=False)),
        "plain loops": seconds(plainly),
    }


def curves(rng: np.random.Generator) -> tuple[str, dict[str, float]]:
    """Accuracy at the most confident 20 % on bootstrap resamples."""
    correct, confidence = rng.integers(0, 2, 5_000), rng.integers(0, 400, 5_000) / 100
    weights = rng.multinomial(5_000, np.full(5_000, 1 / 5_000), size=200).astype(np.float64)

    def one_by_one() -> list[float]:
        result = []
        for row in weights.astype(int):
            index = np.repeat(np.arange(5_000), row)
            order = np.argsort(-confidence[index], kind="stable")[:1_000]
            result.append(float(correct[index][order].mean()))
        return result

    return "bootstrap of accuracy at 20 %: 5,000 rows, 200 resamples", {
        "dejavu_exp, ties shared": seconds(lambda: metrics.confident_means(correct, confidence, [0.2], weights)),
        "numpy resample by resample": seconds(one_by_one),
    }


def main() -> None:
    """Print one table."""
    table = Table("task", "way", "seconds", "times dejavu_exp")
    for part in (search, votes, rectangles, bayes, curves):
        title, found = part(np.random.default_rng(0))
        first = next(iter(found.values()))
        for way, taken in found.items():
            table.add_row(title, way, f"{taken:.3f}", f"{taken / first:.2f}")
            title = ""
        table.add_section()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
