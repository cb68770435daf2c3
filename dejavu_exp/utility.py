"""How useful an encoder is beside what it memorizes: accuracies on whole images, and retrieval by caption."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dejavu_exp import neighbours, provenance
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.encoders import LoadedEncoder, OpenClipEncoder, ZeroShotEncoder
from dejavu_exp.errors import ConfigError, WeightsError
from dejavu_exp.extract import Extractor
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.tables import BoolArray, Estimate, Float32Array, FloatArray, IntArray, Status

log = logging.getLogger(__name__)

HELD_OUT = 0.2
"""Share of every class of the bank that is tested on where there are no unseen images."""
STRENGTHS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Inverse strengths of the L2 penalty that the linear probe chooses from, for the sum of losses over the images."""
FOLDS = 3
SEARCH_ROWS = 5000
"""Images that the choice among `STRENGTHS` rests on at most; the probe itself learns from all."""
ITERATIONS = 500
RANK_BLOCK = 1024
"""Captions compared at a time."""
NO_ANSWERS: BoolArray = np.zeros(0, dtype=np.bool_)
TEMPLATE = "a photo of a {}."
"""The text for a class, as in arXiv 2103.00020, section 3.1.4."""


@dataclass(frozen=True)
class Utility:
    """Accuracy of an encoder's embeddings of whole images, by k-NN, a linear probe and, for CLIP, class names.

    Tested on unseen images. Without any, on a part of the bank that is then left out of it; a published encoder may
    have been trained on those.

    Attributes:
        linear_probe: measure a logistic regression on standardised embeddings.
        knn: measure the votes of the nearest public images, with k, metric and ties of the probe.
        zero_shot: measure class names as texts; open_clip models only.
        retrieval: measure how often a caption finds its own image; for encoders of images and texts, and pairs.
        max_train: most public images that the linear probe learns from, drawn evenly from all classes.
        max_test: most images tested on, drawn evenly from all classes.
        level: of the exact binomial intervals.
    """

    linear_probe: bool = True
    knn: bool = True
    zero_shot: bool = True
    retrieval: bool = True
    max_train: int = 20000
    max_test: int = 10000
    level: float = 0.95

    def __post_init__(self) -> None:
        for key in ("max_train", "max_test"):
            if getattr(self, key) < 1:
                raise ConfigError(
                    f"utility.{key}={getattr(self, key)}: must be at least 1 image; utility=none measures nothing."
                )
        if not 0 < self.level < 1:
            raise ConfigError(f"utility.level={self.level}: must lie between 0 and 1, e.g. 0.95.")

    def measure(
        self,
        encoder: LoadedEncoder,
        model: object,
        bank_views: pl.DataFrame,
        bank: Float32Array,
        test_views: pl.DataFrame,
        extractor: Extractor,
        manifest: Manifest,
        probe: KnnProbe,
        seed: int,
    ) -> list[dict[str, Any]]:
        """Measure whatever is switched on. The order of rows plays no part.

        Args:
            encoder: as loaded.
            model: the encoder as configured; an `OpenClipEncoder` has a text tower, so it gets a zero-shot accuracy.
            bank_views: M usable whole public images, columns of `tables.VIEWS`.
            bank: shape (M, D), their embeddings, in the same order.
            test_views: whole unseen images, columns of `tables.VIEWS`; those not of status ok count as excluded.
            extractor: embeds views.
            manifest: the data set.
            probe: k, metric and ties of the votes; k is lowered to the size of the bank.
            seed: of the images drawn and of the folds.

        Returns:
            For each measure its name (`measure`), how it was taken (`detail`) and `estimate`, a fraction in [0, 1] with
            a Clopper-Pearson interval as `Estimate.as_dict` gives it. `n_excluded` counts test images that cannot be
            read, or whose label is not in the bank.

        Raises:
            ValueError: `bank` and `bank_views` differ in length.
        """
        with_texts = model if self.zero_shot and isinstance(model, OpenClipEncoder) else None
        if not (self.knn or self.linear_probe or with_texts):
            return []
        exam = self._exam(encoder, bank_views, bank, test_views, extractor, manifest, seed)
        found = []
        if self.knn:
            found.append(self._knn(exam, probe))
        if self.linear_probe:
            found.append(self._linear_probe(exam, seed))
        if with_texts:
            found.append(self._zero_shot(exam, with_texts, extractor, manifest))
        return found

    def measure_retrieval(
        self,
        encoder: LoadedEncoder,
        captions: pl.DataFrame,
        images: pl.DataFrame,
        extractor: Extractor,
        manifest: Manifest,
        seed: int,
    ) -> list[dict[str, Any]]:
        """How often the image of a caption is the nearest, and among the five nearest, of all images by cosine.

        Args:
            encoder: of images and texts.
            captions: caption views of unseen rows, columns of `tables.VIEWS`; those not of status ok are excluded.
            images: whole images of the same rows, in the same order.
            extractor: embeds views.
            manifest: the data set.
            seed: of the pairs drawn where there are more than `max_test`.

        Returns:
            As `measure`. An image as near as the caption's own counts as nearer: what looks the same is not found.
        """
        both = (captions["status"] == Status.OK) & (images["status"] == Status.OK)
        if not (self.retrieval and both.any()):
            return []
        order = np.array(
            [provenance.hash_order(seed, "utility pairs", name) for name in captions["id"]], dtype=np.uint64
        )
        drawn = np.flatnonzero(both.to_numpy())
        drawn = np.sort(drawn[np.argsort(order[drawn])][: self.max_test])
        texts = extractor.embed(encoder, captions[drawn], manifest.store, "embedding unseen captions")
        pixels = extractor.embed(encoder, images[drawn], manifest.store, "embedding unseen images")
        ranks = ranks_of_own(texts.values[pixels.readable], pixels.values[pixels.readable])
        told = f"caption to {len(ranks)} images of unseen pairs, cosine"
        excluded = len(both) - int(both.sum()) + len(pixels.reasons)
        return [
            _told(f"retrieval at {top}", told, proportion(int((ranks < top).sum()), len(ranks), self.level, excluded))
            for top in (1, 5)
        ]

    def _exam(
        self,
        encoder: LoadedEncoder,
        bank_views: pl.DataFrame,
        bank: Float32Array,
        test_views: pl.DataFrame,
        extractor: Extractor,
        manifest: Manifest,
        seed: int,
    ) -> _Exam:
        """Put the bank in the order of its ids and choose what to test on."""
        if len(bank) != len(bank_views):
            raise ValueError(f"bank has {len(bank)} rows, bank_views {len(bank_views)}")
        order = bank_views["view_id"].arg_sort().to_numpy()
        lessons, values = bank_views[order], bank[order]
        usable = test_views.filter(pl.col("status") == Status.OK).sort("view_id")
        if not len(usable):
            return self._held_out(lessons, values, seed)
        known = usable.filter(pl.col("label").is_in(lessons["label"].unique().implode()))
        asked = known[_draw(known, self.max_test, seed, "utility test")]
        found = extractor.embed(encoder, asked, manifest.store, "embedding whole unseen images")
        drawn = f", drawn from {len(known)}" if len(asked) < len(known) else ""
        return _Exam(
            lessons=lessons,
            bank=values,
            questions=asked.filter(pl.Series(found.readable, dtype=pl.Boolean)),
            test=found.values[found.readable],
            n_excluded=len(test_views) - len(known) + len(found.reasons),
            tested_on=f"whole unseen images{drawn}",
        )

    def _held_out(self, lessons: pl.DataFrame, values: Float32Array, seed: int) -> _Exam:
        candidates = np.flatnonzero(_spread(lessons, seed, "utility held out") < HELD_OUT)
        rows = candidates[_draw(lessons[candidates], self.max_test, seed, "utility test")]
        stays = np.ones(len(lessons), dtype=np.bool_)
        stays[rows] = False
        share = 100 * len(rows) / max(len(lessons), 1)
        return _Exam(
            lessons=lessons[np.flatnonzero(stays)],
            bank=values[stays],
            questions=lessons[rows],
            test=values[rows],
            n_excluded=0,
            tested_on=f"public images, {share:.0f} % of the bank, held out of it for want of usable unseen ones",
        )

    def _knn(self, exam: _Exam, probe: KnnProbe) -> dict[str, Any]:
        k = min(probe.k, len(exam.bank))
        detail = f"k = {k} public images, {probe.metric}"
        if not len(exam.test):
            return self._entry("k-NN accuracy", detail, NO_ANSWERS, exam)
        near = neighbours.search(exam.test, exam.bank, k, probe.metric)
        codes = exam.codes(exam.lessons)[near.positions]
        votes = neighbours.vote(exam.questions["view_id"].to_list(), codes, exam.labels, probe.ties)
        return self._entry("k-NN accuracy", detail, votes.correct(exam.codes(exam.questions)), exam)

    def _linear_probe(self, exam: _Exam, seed: int) -> dict[str, Any]:
        name = "linear-probe accuracy"
        rows = _draw(exam.lessons, self.max_train, seed, "utility train")
        codes = exam.codes(exam.lessons)[rows]
        drawn = f", drawn from {len(exam.bank)}" if len(rows) < len(exam.bank) else ""
        learned = f"logistic regression on {len(rows)} public images{drawn}"
        if not len(exam.test):
            return self._entry(name, learned, NO_ANSWERS, exam)
        if len(np.unique(codes)) < 2:
            detail = f"{learned}: they have one class only, so there is nothing to learn"
            return _told(name, detail, Estimate.undefined(exam.n_excluded + len(exam.test)))
        answers, how = linear_probe(exam.bank[rows], codes, exam.test, seed)
        return self._entry(name, f"{learned}, {how}", answers == exam.codes(exam.questions), exam)

    def _zero_shot(
        self, exam: _Exam, model: OpenClipEncoder, extractor: Extractor, manifest: Manifest
    ) -> dict[str, Any]:
        name = "zero-shot accuracy"
        texts = class_texts(exam.labels, manifest.class_names)
        detail = _describe_texts(texts, manifest.class_names)
        if not len(exam.test):
            return self._entry(name, detail, NO_ANSWERS, exam)
        try:
            classifier = _classifier(model, sorted(set(texts.values())))
        except WeightsError as error:
            # The memorization is measured by now; a missing tokenizer must not lose it.
            log.warning("zero-shot accuracy is not measured: %s", error)
            return _told(name, f"not measured: {error}", Estimate.undefined(exam.n_excluded + len(exam.test)))
        # Under bfloat16 the scores of the best classes would tie: at 100 times the cosine its step is 0.125.
        exact = replace(extractor, precision="float32")
        found = exact.embed(classifier, exam.questions, manifest.store, "zero-shot")
        answers = np.array(classifier.classes)[found.values[found.readable].argmax(axis=1)]
        asked = exam.questions["label"].filter(pl.Series(found.readable))
        correct = answers == np.array([texts[label] for label in asked])
        return self._entry(name, detail, correct, exam, len(found.reasons))

    def _entry(self, name: str, detail: str, correct: BoolArray, exam: _Exam, lost: int = 0) -> dict[str, Any]:
        estimate = proportion(int(correct.sum()), len(correct), self.level, exam.n_excluded + lost)
        return _told(name, f"{detail}; {len(correct)} {exam.tested_on}", estimate)


@dataclass(frozen=True)
class _Exam:
    """What the measures learn from and are asked; both parts sorted by view id.

    Attributes:
        lessons: M views of the bank.
        bank: shape (M, D), their embeddings.
        questions: N views whose label is to be named.
        test: shape (N, D), their embeddings.
        n_excluded: images that belong among the questions and cannot be used.
        tested_on: the questions in words.
    """

    lessons: pl.DataFrame
    bank: Float32Array
    questions: pl.DataFrame
    test: Float32Array
    n_excluded: int
    tested_on: str

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels of the bank, sorted."""
        return tuple(self.lessons["label"].unique().sort())

    def codes(self, views: pl.DataFrame) -> IntArray:
        """The label of each view as a position in `labels`."""
        return np.searchsorted(np.array(self.labels, dtype=str), views["label"].to_numpy().astype(str))


def ranks_of_own(queries: Float32Array, bank: Float32Array) -> IntArray:
    """How many entries are at least as near to each query as its own, by cosine.

    Args:
        queries: shape (N, D).
        bank: shape (N, D); the entry of a query has its row.

    Returns:
        Shape (N,); 0 where its own is the nearest.

    >>> ranks_of_own(np.eye(2, dtype=np.float32), np.array([[1, 0], [1, 0.5]], np.float32)).tolist()
    [0, 0]
    """
    near, far = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (queries, bank))
    ranks = np.empty(len(near), dtype=np.int64)
    for start in range(0, len(near), RANK_BLOCK):
        rows = np.arange(start, min(start + RANK_BLOCK, len(near)))
        cosines = near[rows] @ far.T
        own = cosines[rows - start, rows]
        ranks[rows] = (cosines >= own[:, None]).sum(axis=1) - 1
    return ranks


def proportion(successes: int, trials: int, level: float, n_excluded: int = 0) -> Estimate:
    """A fraction with its exact binomial interval.

    Source: Clopper and Pearson, Biometrika 26 (1934).

    Args:
        successes: 0 to `trials`.
        trials: independent rows.
        level: the interval covers the true fraction at least this often.
        n_excluded: carried into the estimate.

    Returns:
        A fraction in [0, 1]; undefined without trials.

    Raises:
        ValueError: there are more successes than trials.

    >>> found = proportion(10, 10, 0.95)
    >>> found.value, round(found.low, 4), found.high
    (1.0, 0.6915, 1.0)
    """
    from scipy import stats

    if not trials:
        return Estimate.undefined(n_excluded)
    interval = stats.binomtest(successes, trials).proportion_ci(confidence_level=level, method="exact")
    return Estimate(successes / trials, float(interval.low), float(interval.high), trials, n_excluded)


def linear_probe(bank: Float32Array, codes: IntArray, test: Float32Array, seed: int) -> tuple[IntArray, str]:
    """The class of each test row by L2-penalised logistic regression on standardised embeddings.

    The penalty is the one with the best accuracy in a cross-validation within the bank; of equal ones the strongest.

    Args:
        bank: shape (M, D).
        codes: shape (M,), at least two classes.
        test: shape (N, D).
        seed: of the folds.

    Returns:
        Classes, shape (N,), and how the penalty was chosen.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    strength, how = STRENGTHS[len(STRENGTHS) // 2 - 1], "as no two classes have images for every fold"
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS))
    rows = _search_rows(codes, seed)
    with warnings.catch_warnings():
        # Told in words, once, for the fit that counts.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if len(rows):
            folds = StratifiedKFold(
                FOLDS, shuffle=True, random_state=provenance.hash_order(seed, "rng", "utility folds") % 2**32
            )
            grid = {"logisticregression__C": list(STRENGTHS)}
            search: Any = GridSearchCV(model, grid, scoring="accuracy", cv=folds, refit=False)
            strength = search.fit(bank[rows], codes[rows]).best_params_["logisticregression__C"]
            how = f"the best of {len(STRENGTHS)} in {FOLDS}-fold cross-validation on {len(rows)} of them"
        model.set_params(logisticregression__C=strength).fit(bank, codes)
    stopped = f", stopped after {ITERATIONS} steps" if model[-1].n_iter_.max() >= ITERATIONS else ""
    return model.predict(test).astype(np.int64), f"C = {strength:g} ({how}){stopped}"


def _search_rows(codes: IntArray, seed: int) -> IntArray:
    """At most `SEARCH_ROWS` rows whose classes each fill all folds; none where that leaves fewer than two classes."""
    views = pl.DataFrame({"view_id": [str(row) for row in range(len(codes))], "label": codes})
    drawn = _draw(views, SEARCH_ROWS, seed, "utility search")
    classes, members = np.unique(codes[drawn], return_counts=True)
    enough = classes[members >= FOLDS]
    return drawn[np.isin(codes[drawn], enough)] if len(enough) >= 2 else drawn[:0]


def _spread(views: pl.DataFrame, seed: int, stage: str) -> FloatArray:
    """Places in (0, 1), even within each class and in a random order that depends on seed and id alone; shape (N,).

    The rows below x are x of each class, whatever its size.
    """
    order = [provenance.hash_order(seed, stage, name) for name in views["view_id"].to_list()]
    place = (pl.col("order").rank("ordinal").over("label") - 0.5) / pl.len().over("label")
    table = views.select("label", order=pl.Series(order, dtype=pl.UInt64)).select(place=place)
    return table["place"].to_numpy().astype(np.float64)


def _draw(views: pl.DataFrame, most: int, seed: int, stage: str) -> IntArray:
    """At most `most` rows, each class in proportion; ascending row numbers."""
    if len(views) <= most:
        return np.arange(len(views))
    # Classes of equal size have equal places, so that a second random number decides between them.
    other = [provenance.hash_order(seed, f"{stage} ties", name) for name in views["view_id"].to_list()]
    order = np.lexsort((np.array(other, dtype=np.uint64), _spread(views, seed, stage)))
    return np.sort(order[:most])


def class_texts(labels: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """What a class is called in a prompt: its first name, or its label where the data set has no name.

    >>> class_texts(["n01", "fire_truck"], {"n01": "tench, Tinca tinca"})
    {'n01': 'tench', 'fire_truck': 'fire truck'}
    """
    # A vocabulary is read from lines, and one that starts with # would be a comment.
    first = {label: names.get(label, label).partition(",")[0].replace("_", " ") for label in labels}
    return {label: " ".join(text.split()).lstrip("# ") or label for label, text in first.items()}


def _describe_texts(texts: Mapping[str, str], names: Mapping[str, str]) -> str:
    """The prompts in words, with what makes their accuracy hard to read."""
    different = set(texts.values())
    told = f"{len(different)} class names in {TEMPLATE!r}, softmax over all"
    if len(different) < len(texts):
        told += f"; {len(texts)} classes share them, and any class of the right name counts"
    unnamed = [label for label in texts if label not in names]
    if unnamed:
        told += f"; {len(unnamed)} classes have no name in the data set, so their label stands for it"
    return told


def _classifier(model: OpenClipEncoder, texts: Sequence[str]) -> LoadedEncoder:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "classes.txt"
        vocabulary.write_text("\n".join(texts), encoding="utf-8")
        return ZeroShotEncoder(
            model.arch,
            model.pretrained,
            model.weights,
            str(vocabulary),
            TEMPLATE,
            model.seed,
            arch_config=model.arch_config,
            preprocess=model.preprocess,
        ).load()


def _told(name: str, detail: str, estimate: Estimate) -> dict[str, Any]:
    return {"measure": name, "detail": detail, "estimate": estimate.as_dict()}
