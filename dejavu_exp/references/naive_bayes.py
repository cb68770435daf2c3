"""Naive Bayes on tags found in the crop: what the objects of the background say of the foreground label."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from dejavu_exp import evidence, provenance, taggers
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.references.base import OneDirection, ReferenceInputs, check_shows_images
from dejavu_exp.tables import BoolArray, FloatArray
from dejavu_exp.taggers import Tagger

log = logging.getLogger(__name__)

Counts = Mapping[str, Mapping[str, float]]
FOLDS = 5


@dataclass(frozen=True)
class NaiveBayes(OneDirection):
    """Class posterior from the tags of a crop, learned on the heldout role.

    Source: arXiv 2504.05651, section 3. The corrected form is naive Bayes proper: class prior, P(tag | class) with
    additive smoothing, a posterior that sums to 1, and a temperature fitted by cross-validation so that its confidence
    means something. A crop without known tags gets the prior. The released code multiplies P(class | tag) without prior
    or normalisation, vetoes a class for a tag it lacks, and is surest of crops without known tags; `compat: authors`
    gives exactly that.

    Attributes:
        top_tags: strongest tags of a query crop that count.
        smoothing: pseudo-count per tag and class.
        calibrate: fit the temperature (corrected form only).
        compat: "corrected" or "authors".
        laplace: authors' form only: add `smoothing` to counts, instead of 1e-10 for absent ones.
        frequencies: authors' form only: folder of the released frequency files, which then replace counting on the
            heldout role; null to count.
    """

    top_tags: int = 5
    smoothing: float = 1.0
    calibrate: bool = True
    compat: Literal["corrected", "authors"] = "corrected"
    laplace: bool = False
    frequencies: str | None = None

    def __post_init__(self) -> None:
        if self.top_tags < 1:
            raise ConfigError(f"references.naive_bayes.top_tags={self.top_tags}: must be at least 1.")
        if self.smoothing <= 0:
            raise ConfigError(f"references.naive_bayes.smoothing={self.smoothing}: must be above 0.")
        if self.compat not in ("corrected", "authors"):
            raise ConfigError(f"references.naive_bayes.compat={self.compat}: must be corrected or authors.")
        if self.frequencies is not None and self.compat != "authors":
            raise ConfigError(
                "references.naive_bayes.frequencies is read by compat=authors only; set that, or null here."
            )

    def check(self, tagger: Tagger, model: object, probe: KnnProbe) -> None:
        """The probe shows images, the tagger can work, and the frequency files are there."""
        check_shows_images(probe, "naive_bayes")
        tagger.check()
        if self.frequencies is not None and not Path(self.frequencies).is_dir():
            raise ConfigError(f"references.naive_bayes.frequencies={self.frequencies}: there is no such folder.")

    def evidence(self, inputs: ReferenceInputs) -> Evidence:
        """See `Reference.evidence`. A query whose image the tagger could not read has no evidence."""
        learn = inputs.heldout if self.frequencies is None else inputs.heldout.clear()
        tags = taggers.tag_views(inputs.tagger, pl.concat([learn, inputs.queries]), inputs.manifest, inputs.extractor)
        known = learn.join(tags, on="view_id", validate="1:1", maintain_order="left").filter(
            pl.col("status_right") == "ok"
        )
        asked = inputs.queries.join(tags, on="view_id", validate="1:1", maintain_order="left")
        questions = [names[: self.top_tags] for names in asked["tags"].to_list()]
        if self.compat == "authors":
            result = self._authors(inputs, known, questions)
        else:
            result = self._corrected(inputs, known, questions)
        lost = (asked["status_right"] != "ok").to_numpy()
        return _without(result, lost)

    def _corrected(self, inputs: ReferenceInputs, known: pl.DataFrame, questions: list[list[str]]) -> Evidence:
        lessons = [names[: self.top_tags] for names in known["tags"].to_list()]
        probabilities = posterior(
            lessons,
            known["label"].to_list(),
            questions,
            inputs.labels,
            self.smoothing,
            seed=inputs.seed if self.calibrate else None,
        )
        return evidence.from_probabilities(inputs.queries["id"].to_list(), inputs.labels, probabilities)

    def _authors(self, inputs: ReferenceInputs, known: pl.DataFrame, questions: list[list[str]]) -> Evidence:
        if self.frequencies is None:
            counts = count_tags(known["tags"].to_list(), known["label"].to_list(), inputs.labels)
        else:
            counts = _counts_from_files(Path(self.frequencies), inputs.labels)
        rule = {"smoothing": self.smoothing} if self.laplace else {}
        scores = authors_scores(questions, counts, self.top_tags, laplace=self.laplace, **rule)
        return authors_evidence(inputs.queries["id"].to_list(), list(counts), scores)


def posterior(
    lessons: Sequence[Sequence[str]],
    truth: Sequence[str],
    questions: Sequence[Sequence[str]],
    labels: Sequence[str],
    smoothing: float,
    seed: int | None,
) -> FloatArray:
    """P(label | tags) by multinomial naive Bayes over the presence of tags.

    Args:
        lessons: tags of each training crop.
        truth: its label.
        questions: tags of each crop to judge; tags never seen in training say nothing.
        labels: C labels, the columns; a label without lessons gets probability 0.
        smoothing: pseudo-count per tag and label.
        seed: of the folds that fit the temperature; None: no temperature.

    Returns:
        Shape (N, C), each row sums to 1.

    Raises:
        DataError: no lesson has a tag.

    >>> posterior([["sea"], ["tree"]], ["boat", "fox"], [["sea"]], ["boat", "fox"], 1.0, None).round(3).tolist()
    [[0.667, 0.333]]
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.model_selection import StratifiedKFold
    from sklearn.naive_bayes import MultinomialNB

    if not any(lessons):
        raise DataError(
            "naive Bayes: not one heldout crop has a tag, so there is nothing to learn. Choose another tagger, or "
            "lower its threshold (tagger.min_score)."
        )
    columns = DictVectorizer()
    matrix = columns.fit_transform([dict.fromkeys(names, 1.0) for names in lessons])
    model: Any = MultinomialNB(alpha=smoothing)
    members = np.unique(np.array(truth), return_counts=True)[1]
    folds = min(FOLDS, int(members.min()))
    if seed is not None and folds >= 2 and len(members) >= 2:
        shuffled = StratifiedKFold(
            folds, shuffle=True, random_state=provenance.hash_order(seed, "rng", "folds") % 2**32
        )
        model = CalibratedClassifierCV(model, method="temperature", cv=shuffled, ensemble=False)
    elif seed is not None:
        log.warning("naive Bayes is not calibrated: a class has %d heldout crops, two are needed.", members.min())
    model.fit(matrix, np.array(truth))
    found = model.predict_proba(columns.transform([dict.fromkeys(names, 1.0) for names in questions]))
    code = {label: column for column, label in enumerate(labels)}
    result = np.zeros((len(questions), len(labels)))
    result[:, [code[label] for label in model.classes_]] = found
    return result


def count_tags(
    tags: Sequence[Sequence[str]], truth: Sequence[str], labels: Sequence[str]
) -> dict[str, dict[str, float]]:
    """How many crops of each label have each tag: label -> tag -> count."""
    counts: dict[str, dict[str, float]] = {label: {} for label in labels}
    for names, label in zip(tags, truth, strict=True):
        for name in names:
            counts[label][name] = counts[label].get(name, 0) + 1
    return counts


def authors_scores(
    questions: Sequence[Sequence[str]],
    counts: Counts,
    top_tags: int,
    *,
    laplace: bool,
    smoothing: float = 1.0,
    absent: float = 1e-10,
) -> FloatArray:
    """The released code's class scores: a product over the tags of n(class, tag) / N(tag), bit for bit.

    With `laplace` a factor is (n + smoothing) / (N + top_tags * smoothing), which is not a distribution over classes.
    The product is taken in float64 from the weakest of the tags to the strongest, since rounding decides among classes
    that tie in exact arithmetic. N(tag) leaves out classes with non-positive counts.

    Args:
        questions: tags of each image, strongest first; the first `top_tags` count. Blanks around a tag are dropped
            here, but not in `counts`, as in the released code.
        counts: key -> tag -> count.
        top_tags: K.
        laplace: which rule.
        smoothing: the pseudo-count of the Laplace rule.
        absent: stands for a count that is missing, without Laplace.

    Returns:
        Shape (N, C), columns in the order of `counts`; 0 for an image without tags.
    """
    totals: dict[str, float] = {}
    for found in counts.values():
        for tag, count in found.items():
            if count > 0:
                totals[tag] = totals.get(tag, 0) + count
    factors: dict[str, FloatArray] = {}
    scores = np.zeros((len(questions), len(counts)))
    for row, names in enumerate(questions):
        weakest_first = [name.strip() for name in names[:top_tags]][::-1]
        if not weakest_first:
            continue
        product = np.ones(len(counts))
        for tag in weakest_first:
            if tag not in factors:
                factors[tag] = _factor(tag, counts, totals.get(tag), top_tags, laplace, smoothing, absent)
            product = product * factors[tag]
        scores[row] = product
    return scores


def _factor(
    tag: str, counts: Counts, total: float | None, top_tags: int, laplace: bool, smoothing: float, absent: float
) -> FloatArray:
    """The factor of one tag for each class."""
    if laplace:
        found = np.array([classes.get(tag, 0) for classes in counts.values()], dtype=np.float64)
        return (found + smoothing) / ((total or 0) + top_tags * smoothing)
    found = np.array([classes.get(tag, absent) for classes in counts.values()], dtype=np.float64)
    return found / (absent if total is None else total)


def authors_evidence(ids: Sequence[str], keys: Sequence[str], scores: FloatArray) -> Evidence:
    """Evidence as the released code decides: confidence is the best score, and the last key by name wins ties."""
    last_first = np.empty(len(keys), dtype=np.int64)
    last_first[sorted(range(len(keys)), key=lambda column: keys[column], reverse=True)] = np.arange(len(keys))
    found = evidence.from_probabilities(ids, keys, scores, last_first, scores.max(axis=1))
    # An image without tags scores 0 everywhere, and the released code still names a class for it.
    ranking = np.where(found.ranking[:, :1] < 0, int(np.argmin(last_first)), found.ranking[:, :1])
    return Evidence(
        found.ids, found.labels, scores, np.hstack([ranking, found.ranking[:, 1:]]), found.confidence, found.tied
    )


def _counts_from_files(folder: Path, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """The released frequency files, their keys `<id>_<name>` turned into labels."""
    found = taggers.read_authors_frequencies(folder)
    by_id = {key.split("_", 1)[0]: tags for key, tags in found.items()}
    missing = [label for label in labels if label not in by_id]
    if missing:
        raise DataError(
            f"{folder}: no frequencies of class {missing[0]} ({len(missing)} of {len(labels)} are missing)."
        )
    return {label: {tag: count for tag, (count, _) in by_id[label].items()} for label in labels}


def _without(found: Evidence, lost: BoolArray) -> Evidence:
    """The evidence with the lost rows undefined."""
    probabilities = np.where(lost[:, None], np.nan, found.probabilities)
    return Evidence(found.ids, found.labels, probabilities, found.ranking, found.confidence, found.tied)
