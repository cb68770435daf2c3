"""Naive Bayes on tags."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import polars as pl

from benchmarks.timing import Comparison, seconds
from dejavu_exp.references import naive_bayes

ROWS, LABELS, TAGS, TOP = 139_183, 1_000, 4_585, 5
"""Heldout crops to learn from, and as many to judge; classes, tags, and tags of a crop."""
SMALL_ROWS, SMALL_LABELS = 10_000, 100
"""What scikit-learn is timed on."""


def corrected() -> Comparison:
    """The calibrated posterior and what is decided from it, at the size of ImageNet."""
    lessons, truth, questions, labels = _crops(SMALL_ROWS, SMALL_LABELS)
    ours = naive_bayes.posterior(lessons, truth, questions, labels, 1.0, 0)
    if not np.allclose(ours, _scikit_learn(lessons, truth, questions), atol=1e-6):
        sys.exit("naive Bayes: the posterior differs from scikit-learn's")
    usual = seconds(lambda: _scikit_learn(lessons, truth, questions), 1)
    large = _crops(ROWS, LABELS)

    ids = [str(row) for row in range(ROWS)]

    def whole() -> None:
        naive_bayes.judge(ids, *large, 1.0, 0)

    scores = np.full((ROWS // 10, LABELS), -1.0)
    exponentials = 10 * seconds(lambda: np.exp(scores, out=scores))
    return Comparison(
        f"naive Bayes, calibrated, with evidence: {ROWS:,} crops to learn from and to judge, {LABELS:,} classes, "
        f"{TAGS:,} tags",
        {
            "dejavu_exp": seconds(whole, 1),
            "scikit-learn, MultinomialNB + CalibratedClassifierCV": usual
            * (ROWS * LABELS)
            / (SMALL_ROWS * SMALL_LABELS),
        },
        f"one exponential a probability, on one core: {exponentials:.2f} s; the posterior takes two and a logarithm",
        "under 5 s",
        f"scikit-learn timed on {SMALL_ROWS:,} crops and {SMALL_LABELS} classes, and scaled by rows times classes",
    )


def released_rule() -> Comparison:
    """Class scores of the released rule from tag counts."""
    rng = np.random.default_rng(0)
    tags = [f"tag{index}" for index in range(500)]
    counts = {f"{label:04d}": {tag: int(rng.integers(1, 50)) for tag in tags[::3]} for label in range(200)}
    questions = [[str(tag) for tag in rng.choice(tags, 5, replace=False)] for _ in range(1_000)]

    def ours() -> Any:  # noqa: ANN401
        return naive_bayes.authors_scores(questions, counts, 5, laplace=False)

    if not np.array_equal(_plainly(questions, counts), ours()):
        sys.exit("naive Bayes: the scores of the released rule differ from the plain loops")
    factors = np.random.default_rng(0).random((1_000, 200))

    def products() -> None:
        product = np.ones(factors.shape)
        for _ in range(TOP):
            product *= factors

    return Comparison(
        "naive Bayes, the released rule: 1,000 crops, 200 classes, 5 tags",
        {"dejavu_exp": seconds(ours), "plain loops, as released": seconds(lambda: _plainly(questions, counts))},
        f"five products a score: {seconds(products):.4f} s",
    )


def _plainly(questions: list[list[str]], counts: dict[str, dict[str, int]]) -> list[list[float]]:
    """The released rule in plain loops."""
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


def labels_of(count: int) -> list[str]:
    """Class names, sorted."""
    return [f"{label:04d}" for label in range(count)]


def _crops(rows: int, n_labels: int) -> tuple[Any, Any, Any, list[str]]:
    """Tags of crops to learn from, their labels, tags of crops to judge, and all labels; a quarter of tags tell."""
    rng = np.random.default_rng(0)
    labels, names = labels_of(n_labels), pl.Series([f"tag{index}" for index in range(TAGS)])

    def tags_of(truth: Any) -> pl.Series:  # noqa: ANN401
        common = (rng.zipf(1.3, (rows, TOP)) - 1) % TAGS
        own = (truth[:, None] * 7 + rng.integers(0, 6, (rows, TOP))) % TAGS
        return names[np.where(rng.random((rows, TOP)) < 0.25, own, common).ravel()].reshape((rows, TOP)).arr.to_list()

    truth = np.arange(rows) % n_labels
    return tags_of(truth), pl.Series(labels)[truth], tags_of(truth), labels


def _scikit_learn(lessons: pl.Series, truth: pl.Series, questions: pl.Series) -> Any:  # noqa: ANN401
    """The same posterior by scikit-learn alone."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.model_selection import StratifiedKFold
    from sklearn.naive_bayes import MultinomialNB

    from dejavu_exp import provenance

    columns, state = DictVectorizer(), provenance.hash_order(0, "rng", "folds") % 2**32
    matrix = columns.fit_transform([dict.fromkeys(names, 1.0) for names in lessons.to_list()])
    folds = StratifiedKFold(naive_bayes.FOLDS, shuffle=True, random_state=state)
    model = CalibratedClassifierCV(MultinomialNB(alpha=1.0), method="temperature", cv=folds, ensemble=False)
    model.fit(matrix, truth.to_numpy())
    return model.predict_proba(columns.transform([dict.fromkeys(names, 1.0) for names in questions.to_list()]))


COMPARISONS = (corrected, released_rule)
