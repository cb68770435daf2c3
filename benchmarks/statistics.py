"""Bootstrap intervals of all figures, and the agreement of references."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import polars as pl

from benchmarks.timing import Comparison, seconds
from dejavu_exp import agreement, evidence, metrics, statistics, tables
from dejavu_exp.scoring import LabelInference, ObjectInference

ROWS, CLASSES, RESAMPLES = 139_183, 1_000, 1_000
"""The measured images of the paper, classes of ImageNet, and resamples."""
FEW = 20
"""Resamples that are done one by one, with scipy.stats.bootstrap; the time is scaled to all."""


def _scores(name: str, seed: int) -> pl.DataFrame:
    """Scores of one reference, columns of `tables.SCORES`."""
    rng = np.random.default_rng(seed)
    target, reference = np.random.default_rng(0).random(ROWS) < 0.4, rng.random(ROWS) < 0.2
    memorized = target & ~reference
    columns = {
        "id": [f"{row:07d}" for row in range(ROWS)],
        "label": [f"{row % CLASSES:04d}" for row in range(ROWS)],
        "target_confidence": np.round(-rng.gamma(2, 1, ROWS), 3),
        "target_correct": target,
        "target_correct_top5": target | (rng.random(ROWS) < 0.1),
        "reference_confidence": -rng.gamma(2, 1, ROWS),
        "reference_correct": reference,
        "reference_correct_top5": reference | (rng.random(ROWS) < 0.1),
        "quadrant": pl.Series(metrics.QUADRANTS)[metrics.quadrant(target, reference)],
        "memorization_score": rng.normal(size=ROWS),
        "weight": np.ones(ROWS),
        "memorization_confidence": pl.Series(np.where(memorized, rng.normal(size=ROWS), np.nan), nan_to_null=True),
    }
    same: dict[str, Any] = {"role": "target", "reference": name, "status": "ok"}
    frame = pl.DataFrame(columns).with_columns(**{column: pl.lit(value) for column, value in same.items()})
    missing = {column: pl.lit(None) for column in tables.SCORES if column not in frame.columns}
    frame = frame.with_columns(**missing)
    return frame.select(pl.col(column).cast(dtype) for column, dtype in tables.SCORES.items())


def _by_scipy(values: Any, resamples: int) -> Any:  # noqa: ANN401
    """The interval of one mean as most people take it."""
    from scipy.stats import bootstrap

    return bootstrap((values,), np.mean, n_resamples=resamples, method="percentile", batch=1, rng=0).confidence_interval


def _agrees_with_scipy(estimate: Any, values: Any) -> None:  # noqa: ANN401
    found, other = (estimate["low"], estimate["high"]), _by_scipy(values[:ROWS], 200)
    width = other.high - other.low
    if max(abs(found[0] - other.low), abs(found[1] - other.high)) > width / 4:
        sys.exit(f"bootstrap: the interval {found} is not scipy's {tuple(other)}")


def _limit() -> str:
    """What drawing the resamples alone takes."""
    drawn = seconds(lambda: statistics.resample(ROWS, FEW, np.random.default_rng(0))) * RESAMPLES / FEW
    return f"drawing the resamples, on one core: {drawn:.1f} s"


def label_figures() -> Comparison:
    """All figures of the label test, and those of each class."""
    scores = _scores("r", 1)
    scoring, images = LabelInference(resamples=RESAMPLES), scores.select("id")
    start = time.perf_counter()
    figures = scoring.figures(scores, images, 0)
    taken = time.perf_counter() - start
    values = scores["target_correct"].to_numpy().astype(np.float64)
    _agrees_with_scipy(figures["roles"]["target"]["top1"]["100"]["target"], values)
    return Comparison(
        f"all figures of the label test: {ROWS:,} rows, {CLASSES:,} classes, {RESAMPLES:,} resamples",
        {
            "dejavu_exp": taken,
            "scipy.stats.bootstrap, one mean only": seconds(lambda: _by_scipy(values, FEW), 1) * RESAMPLES / FEW,
        },
        _limit(),
        "under 10 s",
        f"scipy timed with {FEW} resamples and scaled; there are about 60 such figures and {3 * CLASSES:,} of classes",
    )


def object_figures() -> Comparison:
    """All figures of the test of object sets."""
    rng = np.random.default_rng(0)
    labels = [f"object {place:02d}" for place in range(80)]
    held = rng.random((ROWS, 80)) < 0.1
    held[np.arange(ROWS), rng.integers(0, 80, ROWS)] = True
    ids = [f"{row:07d}" for row in range(ROWS)]
    truth = [[labels[place] for place in np.flatnonzero(row)] for row in held]
    rows = pl.DataFrame({"id": ids, "truth": truth}).with_columns(
        role=pl.lit("target"), label=pl.lit(None, dtype=pl.String), status=pl.lit("ok")
    )
    shares = [np.where(held, rng.random(held.shape) < chance, rng.random(held.shape) < 0.05) for chance in (0.5, 0.3)]
    answers = [
        evidence.from_probabilities(ids, labels, share.astype(np.float32), distance=rng.random(ROWS))
        for share in shares
    ]
    scoring = ObjectInference(resamples=RESAMPLES)
    scores = scoring.score(rows, answers[0], answers[1], "r")
    start = time.perf_counter()
    figures = scoring.figures(scores, rows.select("id"), 0)
    taken = time.perf_counter() - start
    values = scores["target_recall_all"].to_numpy()
    _agrees_with_scipy(figures["roles"]["target"]["all"]["target_recall"], values)
    return Comparison(
        f"all figures of the test of object sets: {ROWS:,} rows, 80 objects, {RESAMPLES:,} resamples",
        {
            "dejavu_exp": taken,
            "scipy.stats.bootstrap, one mean only": seconds(lambda: _by_scipy(values, FEW), 1) * RESAMPLES / FEW,
        },
        _limit(),
        "under 10 s",
        f"scipy timed with {FEW} resamples and scaled; there are about 70 such figures",
    )


def references() -> Comparison:
    """Agreement of three references."""
    from sklearn.metrics import cohen_kappa_score

    names = ("one", "two", "three")
    scores = pl.concat([_scores(name, seed) for seed, name in enumerate(names, start=1)])
    start = time.perf_counter()
    found = agreement.compare_references(scores, (1.0, 0.2, 0.05), 0.95, RESAMPLES, 0)
    taken = time.perf_counter() - start
    first, second = (scores.filter(reference=name)["reference_correct"].to_numpy() for name in names[:2])
    if abs(found["pairs"][0]["kappa_correct"]["value"] - cohen_kappa_score(first, second)) > 1e-9:
        sys.exit("agreement: Cohen's kappa differs from scikit-learn's")

    def resampled() -> None:
        rng = np.random.default_rng(0)
        for _ in range(FEW):
            rows = rng.integers(ROWS, size=ROWS)
            cohen_kappa_score(first[rows], second[rows])

    return Comparison(
        f"agreement of {len(names)} references: {ROWS:,} rows, {RESAMPLES:,} resamples",
        {
            "dejavu_exp": taken,
            "scikit-learn's kappa on each resample, one pair only": seconds(resampled, 1) * RESAMPLES / FEW,
        },
        _limit(),
        "under 20 s",
        f"scikit-learn timed with {FEW} resamples and scaled; there are 8 such figures for each of 3 pairs",
    )


def confident_accuracy() -> Comparison:
    """Accuracy at the most confident 20 % on bootstrap resamples."""
    rng = np.random.default_rng(0)
    correct, confidence = rng.integers(0, 2, 5_000), rng.permutation(5_000) / 100
    weights = statistics.resample(5_000, 200, rng)

    def one_by_one() -> list[float]:
        result = []
        for row in weights.astype(int):
            index = np.repeat(np.arange(5_000), row)
            order = np.argsort(-confidence[index], kind="stable")[:1_000]
            result.append(float(correct[index][order].mean()))
        return result

    def ours() -> Any:  # noqa: ANN401
        return metrics.confident_means(correct, confidence, [0.2], weights)[:, 0]

    if not np.allclose(ours(), one_by_one()):
        sys.exit("bootstrap: the accuracy at 20 % differs from that of resampled rows")
    return Comparison(
        "accuracy at the most confident 20 %: 5,000 rows, 200 resamples",
        {"dejavu_exp": seconds(ours), "NumPy resample by resample": seconds(one_by_one)},
        f"cumulating the weights once: {seconds(lambda: np.cumsum(weights, axis=1)):.4f} s",
    )


COMPARISONS = (label_figures, object_figures, references, confident_accuracy)
