"""Votes of neighbours, and what the test of object sets makes of evidence."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import polars as pl

from benchmarks.timing import Comparison, seconds
from dejavu_exp import evidence, neighbours
from dejavu_exp.evidence import Evidence
from dejavu_exp.scoring import ObjectInference

ROWS, K, LABELS = 139_183, 100, 1_000
"""The measured images of the paper, neighbours, and classes of ImageNet."""
SCORED, OBJECTS, HELD = 1_000_000, 80, 10
"""Rows, objects of the vocabulary, and objects of a row."""
BY_ROW = 4_000
"""Rows that are done row by row; the time is scaled to all."""


def votes() -> Comparison:
    """Votes, entropies and the ten first labels of the neighbours of ImageNet's measured images."""
    from scipy.stats import entropy

    rng = np.random.default_rng(0)
    # Neighbours of one image share few labels, and which is another matter for each image.
    codes = (rng.zipf(1.4, size=(ROWS, K)) % LABELS * 7 + rng.integers(0, LABELS, size=(ROWS, 1))) % LABELS
    ids, labels = [str(row) for row in range(ROWS)], [f"{label:04d}" for label in range(LABELS)]

    def by_row() -> list[tuple[float, Any]]:
        counts = [np.bincount(row, minlength=LABELS) for row in codes[:BY_ROW]]
        return [(float(entropy(row)), np.argsort(-row, kind="stable")[:10]) for row in counts]

    found, plain = neighbours.vote(ids, codes, labels, "lowest_label"), by_row()
    same = all(
        (ranked[ranked >= 0] == expected[: (ranked >= 0).sum()]).all()
        for ranked, (_, expected) in zip(found.ranking, plain, strict=False)
    )
    if not same or not np.allclose(-found.confidence[:BY_ROW], [one[0] for one in plain]):
        sys.exit("votes: the ranking or the entropies differ from those of NumPy and SciPy row by row")
    sorting = seconds(lambda: np.sort(codes, axis=1))
    return Comparison(
        f"votes, entropy and decisions: {ROWS:,} rows, k = {K}, {LABELS:,} labels",
        {
            "dejavu_exp": seconds(lambda: neighbours.vote(ids, codes, labels)),
            "NumPy and SciPy row by row": seconds(by_row, 1) * ROWS / BY_ROW,
        },
        f"sorting the {codes.size:,} votes row by row, on one core: {sorting:.2f} s",
        "under 1 s",
        f"row by row timed on {BY_ROW:,} rows and scaled",
    )


def objects() -> Comparison:
    """Scores and figures of the test of object sets."""
    rows, answers, member = _object_rows(SCORED)
    scoring, twice = ObjectInference(resamples=100), ObjectInference(resamples=200)
    start = time.perf_counter()
    scores = scoring.score(rows, answers[0], answers[1], "reference")
    scored = time.perf_counter() - start
    images = rows.select("id")
    with_intervals = seconds(lambda: scoring.figures(scores, images, 0), 1)
    # What a hundred more resamples take is what the hundred took.
    intervals = seconds(lambda: twice.figures(scores, images, 0), 1) - with_intervals
    figures = with_intervals - intervals

    def by_row() -> list[float]:
        recall = []
        for row in range(BY_ROW):
            predicted = set(np.flatnonzero(answers[0].probabilities[row] > 0))
            recall.append(len(predicted & set(member[row])) / HELD)
        return recall

    if not np.allclose(by_row(), scores["target_recall_all"][:BY_ROW].to_numpy()):
        sys.exit("objects: the recalls differ from those of sets row by row")
    reading = seconds(lambda: answers[0].probabilities.sum())
    return Comparison(
        f"object sets: {SCORED:,} rows, {HELD} objects each, {OBJECTS} in all",
        {
            "dejavu_exp, all metrics of each row": scored,
            "dejavu_exp, figures of them, with two halves of objects": figures,
            "sets row by row, recall of one predictor only": seconds(by_row, 1) * SCORED / BY_ROW,
        },
        f"reading the evidence of one predictor once: {reading:.2f} s",
        "metrics of each row under 10 s",
        f"{intervals:.1f} s more for each 100 resamples of intervals; sets timed on {BY_ROW:,} rows and scaled",
    )


def _object_rows(count: int) -> tuple[pl.DataFrame, list[Evidence], Any]:
    """Rows with their true objects, evidence of a better and of a worse predictor, and the objects as numbers."""
    rng = np.random.default_rng(0)
    labels = [f"object {place:02d}" for place in range(OBJECTS)]
    member = rng.random((count, OBJECTS), dtype=np.float32).argpartition(HELD, axis=1)[:, :HELD]
    ids = [f"{row:07d}" for row in range(count)]
    truth = pl.Series(labels)[member.ravel()].reshape((count, HELD)).arr.to_list()
    rows = pl.DataFrame({"id": ids, "truth": truth}).with_columns(
        role=pl.lit("target"), label=pl.lit(None, dtype=pl.String), status=pl.lit("ok")
    )
    answers = []
    for chance in (0.5, 0.3):
        shares = np.where(rng.random((count, OBJECTS)) < 0.05, rng.integers(1, 100, (count, OBJECTS)) / 100, 0)
        found = np.where(rng.random(member.shape) < chance, rng.integers(1, 100, member.shape) / 100, 0)
        np.put_along_axis(shares, member, found, axis=1)
        distance = rng.random(count)
        answers.append(evidence.from_probabilities(ids, labels, shares.astype(np.float32), distance=distance))
    return rows, answers, member


COMPARISONS = (votes, objects)
