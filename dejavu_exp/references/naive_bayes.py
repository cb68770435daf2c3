"""Naive Bayes on tags found in the crop: what the objects of the background say of the foreground label."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from dejavu_exp import evidence, provenance, taggers
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.references.base import OneDirection, ReferenceInputs, check_shows_images
from dejavu_exp.tables import BoolArray, FloatArray, IntArray
from dejavu_exp.taggers import Tagger

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Counts = Mapping[str, Mapping[str, float]]
FOLDS = 5
FLOOR = 1e-12
BLOCK_CELLS = 100_000
"""Probabilities that a thread works on at a time: they stay in the cache of its core."""
CALIBRATION_ROWS = 20_000
"""Held-out rows that the temperature is fitted to, at most."""
SAMPLE_ROWS = 8_000
"""Of these, the rows that a first root is sought with."""
NEWTON_STEPS = 20


@dataclass(frozen=True)
class NaiveBayes(OneDirection):
    """Class posterior from the tags of a crop, learned on the heldout role.

    Source: arXiv 2504.05651, section 3. The corrected form is naive Bayes proper: class prior, P(tag | class) with
    additive smoothing, a posterior that sums to 1, and a temperature fitted by cross-validation so that its confidence
    means something. Beyond 20,000 heldout crops the temperature is fitted to that many of them, drawn at random, while
    all are counted. A crop without known tags gets the prior. The released code multiplies P(class | tag) without prior
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
        questions = asked["tags"].list.head(self.top_tags)
        if self.compat == "authors":
            result = self._authors(inputs, known, questions.to_list())
        else:
            result = self._corrected(inputs, known, questions)
        lost = (asked["status_right"] != "ok").to_numpy()
        return _without(result, lost)

    def _corrected(self, inputs: ReferenceInputs, known: pl.DataFrame, questions: pl.Series) -> Evidence:
        return judge(
            inputs.queries["id"].to_list(),
            known["tags"].list.head(self.top_tags),
            known["label"],
            questions,
            inputs.labels,
            self.smoothing,
            seed=inputs.seed if self.calibrate else None,
        )

    def _authors(self, inputs: ReferenceInputs, known: pl.DataFrame, questions: list[list[str]]) -> Evidence:
        if self.frequencies is None:
            counts = count_tags(known["tags"].to_list(), known["label"].to_list(), inputs.labels)
        else:
            counts = _counts_from_files(Path(self.frequencies), inputs.labels)
        rule = {"smoothing": self.smoothing} if self.laplace else {}
        scores = authors_scores(questions, counts, self.top_tags, laplace=self.laplace, **rule)
        return authors_evidence(inputs.queries["id"].to_list(), list(counts), scores)


def posterior(
    lessons: Sequence[Sequence[str]] | pl.Series,
    truth: Sequence[str] | pl.Series,
    questions: Sequence[Sequence[str]] | pl.Series,
    labels: Sequence[str],
    smoothing: float,
    seed: int | None,
) -> npt.NDArray[np.float32]:
    """P(label | tags) by multinomial naive Bayes over the presence of tags.

    Args:
        lessons: tags of each training crop.
        truth: its label.
        questions: tags of each crop to judge; tags never seen in training say nothing.
        labels: C labels, the columns; a label without lessons gets probability 0.
        smoothing: pseudo-count per tag and label.
        seed: of the folds, and of the rows, that fit the temperature; None: no temperature.

    Returns:
        Shape (N, C), each row sums to 1, within 1e-6 of the exact one.

    Raises:
        DataError: no lesson has a tag.

    >>> found = posterior([["sea"], ["tree"]], ["boat", "fox"], [["sea"]], ["boat", "fox"], 1.0, None)
    >>> found.astype(float).round(3).tolist()
    [[0.667, 0.333]]
    """
    return _posterior(
        pl.Series(lessons, dtype=pl.List(pl.String)),
        pl.Series(truth, dtype=pl.String),
        pl.Series(questions, dtype=pl.List(pl.String)),
        labels,
        smoothing,
        seed,
    ).probabilities


def judge(
    ids: Sequence[str],
    lessons: pl.Series,
    truth: pl.Series,
    questions: pl.Series,
    labels: Sequence[str],
    smoothing: float,
    seed: int | None,
) -> Evidence:
    """The evidence of `posterior`, ties to the lowest column; `ids` are of the questions, the rest as there."""
    found = _posterior(lessons, truth, questions, labels, smoothing, seed)
    return Evidence(tuple(ids), tuple(labels), found.probabilities, found.ranking, -found.entropy, found.tied)


@dataclass(frozen=True)
class _Tags:
    """The known tags of rows as positions in a vocabulary, each once a row.

    Attributes:
        rows: shape (P,), ascending.
        codes: shape (P,).
        count: rows.
    """

    rows: IntArray
    codes: IntArray
    count: int

    @classmethod
    def of(cls, names: pl.Series, vocabulary: pl.DataFrame) -> _Tags:
        """From lists of names; `vocabulary` has the columns tag and code."""
        lists = pl.DataFrame({"tag": names.fill_null([])}).with_row_index("row")
        flat = lists.explode("tag", empty_as_null=False).unique(maintain_order=True)
        known = flat.join(vocabulary, on="tag", maintain_order="left")
        return cls(known["row"].cast(pl.Int64).to_numpy(), known["code"].to_numpy(), len(names))

    def take(self, rows: IntArray) -> _Tags:
        """The chosen rows, in their order."""
        starts = np.searchsorted(self.rows, np.arange(self.count + 1))
        lengths = (starts[1:] - starts[:-1])[rows]
        first = np.cumsum(lengths) - lengths
        places = np.arange(lengths.sum()) + np.repeat(starts[rows] - first, lengths)
        return _Tags(np.repeat(np.arange(len(rows)), lengths), self.codes[places], len(rows))

    def counted(self, classes: IntArray, n_classes: int, n_tags: int) -> IntArray:
        """How many rows of each class have each tag, shape (n_tags, n_classes)."""
        cells = self.codes * n_classes + classes[self.rows]
        return np.bincount(cells, minlength=n_tags * n_classes).reshape(n_tags, n_classes)


@dataclass(frozen=True)
class _Decided:
    """What `Evidence` holds of N rows, by the same names; entropy in nats."""

    probabilities: npt.NDArray[np.float32]
    ranking: IntArray
    entropy: FloatArray
    tied: BoolArray


def _posterior(
    lessons: pl.Series,
    truth: pl.Series,
    questions: pl.Series,
    labels: Sequence[str],
    smoothing: float,
    seed: int | None,
) -> _Decided:
    """See `posterior`."""
    vocabulary = pl.DataFrame({"tag": lessons.explode().drop_nulls().unique().sort()}).with_row_index("code")
    vocabulary = vocabulary.with_columns(pl.col("code").cast(pl.Int64))
    if not len(vocabulary):
        raise DataError(
            "naive Bayes: not one heldout crop has a tag, so there is nothing to learn. Choose another tagger, or "
            "lower its threshold (tagger.min_score)."
        )
    known, classes = _Tags.of(lessons, vocabulary), truth.unique().sort()
    codes = classes.search_sorted(truth).to_numpy().astype(np.int64)
    members = np.bincount(codes)
    counts = known.counted(codes, len(members), len(vocabulary))
    folds = min(FOLDS, int(members.min()))
    place = {label: column for column, label in enumerate(labels)}
    columns = np.array([place[label] for label in classes], dtype=np.int64)
    temperature = None
    with _pool() as pool:
        if seed is not None and folds >= 2 and len(members) >= 2:
            parts = _folds(codes, folds, seed)
            temperature = _inverse_temperature(known, codes, counts, smoothing, parts, seed, pool)
        elif seed is not None:
            log.warning("naive Bayes is not calibrated: a class has %d heldout crops, two are needed.", members.min())
        joint = _Joint.of(_Tags.of(questions, vocabulary), _weights(counts, members, smoothing))
        return _decided(joint, temperature, columns, len(labels), pool)


@contextmanager
def _pool() -> Iterator[Executor]:
    """Threads that take a block of rows each, in which Torch uses no others: those would wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Torch keeps the number for each thread.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _decided(joint: _Joint, inverse: float | None, columns: IntArray, n_labels: int, pool: Executor) -> _Decided:
    """Posterior and decisions.

    Args:
        joint: of the N rows asked.
        inverse: temperature; None for none.
        columns: shape (K,), the label of each class.
        n_labels: C.
        pool: see `_pool`.
    """
    import torch

    count, keep = joint.count, min(evidence.TOP, n_labels)
    probabilities = np.zeros((count, n_labels), dtype=np.float32)
    ranking = np.full((count, keep), -1, dtype=np.int64)
    entropy, tied = np.empty(count), np.zeros(count, dtype=np.bool_)
    # Choosing columns is slow: not where all are meant.
    chosen = slice(None) if np.array_equal(columns, np.arange(n_labels)) else columns
    order = torch.from_numpy(columns)

    def decide(rows: slice) -> None:
        scores = joint.scores(rows) if inverse is None else _floored(joint.scores(rows))
        scores.sub_(scores.amax(dim=1, keepdim=True))
        if inverse is not None:
            scores.mul_(inverse)
        chance = scores.softmax(dim=1)
        probabilities[rows, chosen] = chance.numpy()
        entropy[rows] = -(chance.amax(dim=1).log() + (chance * scores).sum(dim=1)).numpy()
        # How far a class is below the best, in bits that order as the numbers do, and its column: all keys differ, so
        # that one partial sort ranks, with ties to the lowest column.
        keys = torch.add(order, scores.abs_().view(torch.int32), alpha=1 << 32)
        first = keys.topk(min(keep, len(columns)), dim=1, largest=False).values
        ranking[rows, : first.shape[1]] = (first & 0xFFFFFFFF).numpy()
        tied[rows] = (first[:, 1:2] >> 32 == 0).any(dim=1).numpy()

    list(pool.map(decide, _blocks(count, len(columns))))
    return _Decided(probabilities, ranking, np.maximum(entropy, 0), tied)


def _folds(codes: IntArray, folds: int, seed: int) -> list[IntArray]:
    """Rows of each fold; every class is spread over all."""
    from sklearn.model_selection import StratifiedKFold

    state = provenance.hash_order(seed, "rng", "folds") % 2**32
    shuffled = StratifiedKFold(folds, shuffle=True, random_state=state).split(codes, codes)
    return [np.asarray(held_out, dtype=np.int64) for _, held_out in shuffled]


def _weights(counts: IntArray, members: IntArray, smoothing: float) -> npt.NDArray[np.float32]:
    """Log P(tag | class) of each tag, and log P(class) below, shape (T + 1, C); each row less its largest.

    What is the same for all classes changes no posterior, and without it single precision does: what is left is small
    for classes that are at all likely.
    """
    # Counts are small whole numbers: a table of logarithms does.
    weights = np.log(np.arange(counts.max() + 1) + smoothing)[counts]
    weights -= np.log(counts.sum(axis=0) + len(counts) * smoothing)
    weights = np.vstack([weights, np.log(members / members.sum())])
    weights -= weights.max(axis=1, keepdims=True)
    return weights.astype(np.float32)


@dataclass(frozen=True)
class _Joint:
    """Log P(class, tags) of N rows, up to a constant of each row: a sum of weights.

    Attributes:
        table: shape (T + 1, C), see `_weights`.
        codes: the tags of the rows side by side; every row has one more, which stands for the prior.
        bounds: shape (N + 1,), where each row begins.
    """

    table: Tensor
    codes: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, asked: _Tags, weights: npt.NDArray[np.float32]) -> _Joint:
        """Of the rows with these tags."""
        import torch

        starts = np.searchsorted(asked.rows, np.arange(asked.count + 1))
        codes = np.insert(asked.codes, starts[:-1], len(weights) - 1)
        bounds = starts + np.arange(asked.count + 1)
        return cls(torch.from_numpy(weights), torch.from_numpy(codes), torch.from_numpy(bounds))

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.bounds) - 1

    def scores(self, rows: slice) -> Tensor:
        """Of some rows, shape (rows, C)."""
        from torch.nn.functional import embedding_bag

        first, last = int(self.bounds[rows.start]), int(self.bounds[rows.stop])
        return embedding_bag(self.codes[first:last], self.table, self.bounds[rows] - first, mode="sum")


def _blocks(count: int, width: int) -> list[slice]:
    """All rows, cut into blocks of `BLOCK_CELLS`."""
    block = max(1, BLOCK_CELLS // width)
    return [slice(start, min(start + block, count)) for start in range(0, count, block)]


def _floored(joint: Tensor) -> Tensor:
    """log(P + 1e-12): as scikit-learn has it, so that one hopeless row does not decide the temperature."""
    return joint.softmax(dim=1).add_(FLOOR).log_()


def _inverse_temperature(
    known: _Tags,
    codes: IntArray,
    counts: IntArray,
    smoothing: float,
    folds: Sequence[IntArray],
    seed: int,
    pool: Executor,
) -> float:
    """What log probabilities are multiplied by so that those of held-out rows are likeliest, from e^-10 to e^10.

    The likelihood is concave in it, so that the root of its slope is the answer.

    Args:
        known: tags of the N training rows.
        codes: shape (N,), their classes.
        counts: rows of each class with each tag, shape (T, C).
        smoothing: pseudo-count.
        folds: rows that are held out in turn.
        seed: of the rows that are judged, where there are more than `CALIBRATION_ROWS`.
        pool: see `_pool`.
    """
    import torch
    from scipy.optimize import brentq

    members = np.bincount(codes, minlength=counts.shape[1])
    judged = np.ones(known.count, dtype=np.bool_)
    if known.count > CALIBRATION_ROWS:
        judged[provenance.rng(seed, "calibration").permutation(known.count)[CALIBRATION_ROWS:]] = False
    found = []
    for fold in folds:
        learned = counts - known.take(fold).counted(codes[fold], len(members), len(counts))
        left = members - np.bincount(codes[fold], minlength=len(members))
        joint = _Joint.of(known.take(fold[judged[fold]]), _weights(learned, left, smoothing))
        blocks = _blocks(joint.count, len(members))
        found += list(pool.map(lambda rows, joint=joint: _floored(joint.scores(rows)), blocks))
    scores = torch.cat(found)
    truth = torch.from_numpy(np.concatenate([codes[fold[judged[fold]]] for fold in folds]))
    # A part of the rows finds nearly the answer, and a few steps with all of them the rest.
    step = max(1, len(scores) // SAMPLE_ROWS)
    sample = scores[::step], truth[::step]
    low, high = np.exp(-10), np.exp(10)
    if _slope(high, *sample, pool)[0] <= 0:
        return float(high)
    # Where the tags tell less than chance, the flattest posterior is the likeliest.
    if _slope(low, *sample, pool)[0] >= 0:
        return float(low)
    root = brentq(
        lambda log_inverse: _slope(np.exp(log_inverse), *sample, pool)[0], np.log(low), np.log(high), xtol=1e-9
    )
    inverse = float(np.exp(root))
    for _ in range(NEWTON_STEPS if step > 1 else 0):
        slope, curvature = _slope(inverse, scores, truth, pool)
        previous, inverse = inverse, float(np.clip(inverse - slope / curvature, low, high))
        if abs(inverse - previous) < 1e-8 * previous:
            break
    return inverse


def _slope(inverse: float, scores: Tensor, truth: Tensor, pool: Executor) -> tuple[float, float]:
    """First and second derivative of minus the log likelihood by the inverse temperature."""

    def of_block(rows: slice) -> tuple[float, float]:
        part = scores[rows]
        chance = (part * inverse).softmax(dim=1)
        expected = chance.mul_(part).sum(dim=1)
        squared = chance.mul_(part).sum(dim=1)
        right = part.gather(1, truth[rows, None])[:, 0]
        return float((expected - right).double().sum()), float((squared - expected.square()).double().sum())

    slopes, curvatures = zip(*pool.map(of_block, _blocks(*scores.shape)), strict=True)
    return sum(slopes), sum(curvatures)


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
    """The evidence with the lost rows undefined, in place: a second matrix could be too much."""
    found.probabilities[lost] = np.nan
    return found
