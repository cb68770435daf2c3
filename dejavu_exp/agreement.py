"""Agreement of references: do they give the same gap, and call the same images memorized? Pure NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dejavu_exp import metrics, provenance, statistics
from dejavu_exp.statistics import Draws, Rows
from dejavu_exp.tables import BoolArray, Estimate, FloatArray, Role, Status

MEASURES = ("kappa_memorized", "kappa_correct", "jaccard_memorized", "jaccard_correlated", "rank_correlation")
"""What is told of each pair, on target rows."""
SETS = ("memorized", "correct", "correlated")
ZERO = 1e-12
"""A divisor below this is zero but for rounding."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class _Judgement:
    """What one reference says of all rows of a role, in the order of their ids; rows it cannot judge are all NaN.

    Attributes:
        judged: shape (N,), True where the reference has a figure.
        confidence: shape (N,), of its answers.
        score: shape (N,), memorization score; NaN also where it is not defined.
        sets: 1 for the members of each of `SETS`, shape (N,); and "value", the reference's part of the gap.
        weight: shape (N,), how much each row counts.
        label: shape (N,), the class of each row; empty where it is not known.
    """

    judged: BoolArray
    confidence: FloatArray
    score: FloatArray
    sets: Mapping[str, FloatArray]
    weight: FloatArray
    label: npt.NDArray[Any]

    def take(self, rows: BoolArray) -> _Judgement:
        """The chosen rows."""
        sets = {name: member[rows] for name, member in self.sets.items()}
        return _Judgement(
            self.judged[rows], self.confidence[rows], self.score[rows], sets, self.weight[rows], self.label[rows]
        )


@dataclass(frozen=True)
class _Drawing:
    """How rows are resampled; `by_label` draws whole classes, the rest is as in `compare_references`."""

    fractions: tuple[float, ...]
    resamples: int
    seed: int
    by_label: bool

    def rows(self, judged: _Judgement) -> Rows:
        """The rows that a judgement is of."""
        return Rows.of(judged.weight, judged.label if self.by_label else None)


def compare_references(
    scores: pl.DataFrame,
    fractions: Sequence[float],
    level: float,
    resamples: int,
    seed: int,
    value: pl.Expr | None = None,
    *,
    by_label: bool = False,
) -> dict[str, Any]:
    """Compare every two references on the rows that both judge.

    A difference of gaps, first less second, is the accuracy of the second reference less that of the first, for the
    encoder's accuracy is the same in both. Each reference is ranked by its own confidence; rows tied at a cut share the
    places. All pairs that judge the same rows see the same resamples of them, and so do all figures of a pair.

    Args:
        scores: columns of `tables.SCORES` or `tables.OBJECT_SCORES`, all references; roles other than target and
            unseen play no part.
        fractions: most confident fractions, each in (0, 1].
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        value: what the reference's part of a gap is the mean of; None: its correctness.
        by_label: a resample draws whole classes and not single rows.

    Returns:
        JSON-ready. `references`: their names. `pairs`: for each the two names, the differences of gaps on `target` and
        `unseen` rows and of the `corrected` gaps by percentage of most confident rows (the last two only where there
        are unseen rows), and on target rows Cohen's kappa of being memorized and of the reference being right, the
        Jaccard index of the memorized and of the correlated sets, and Spearman's correlation of the memorization
        scores. Its ranks are taken once, among the rows where both scores are defined; Pearson's correlation of these
        ranks is then resampled. `mcnemar` tests whether both are right equally often. `matrix`: these measures in the
        order of `references`. `correlated_by_all`: share of target rows that all call correlated, among those that all
        judge. What is undefined, such as the kappa of a constant or the Jaccard index of two empty sets, is null with
        its counts.
    """
    answered = pl.col("reference_correct") if value is None else value
    scores = scores.with_columns(answered.cast(pl.Float64).alias("value"))
    names = scores["reference"].unique(maintain_order=True).to_list()
    on_target = _judgements(scores, Role.TARGET, names)
    draw = _Drawing(tuple(fractions), resamples, seed, by_label)
    pairs = _with_tests(_pairs(scores, on_target, draw, level), on_target)
    return {
        "references": names,
        "pairs": pairs,
        "matrix": {measure: _matrix(names, on_target, pairs, measure) for measure in MEASURES},
        "correlated_by_all": _share_of_all(scores, level, resamples, seed),
    }


def correlated_by_all(scores: pl.DataFrame, manifest: pl.DataFrame) -> pl.DataFrame:
    """The target rows that every reference calls correlated: the label follows from the background, by all accounts.

    Args:
        scores: columns of `tables.SCORES`, all references.
        manifest: columns of `tables.MANIFEST`, the whole data set.

    Returns:
        Columns id, label, origin and position: the row's place among those of its origin in the order of torchvision's
        ImageFolder, which released lists of image numbers count in. Sorted by origin and position.
    """
    shared = _by_all(scores).filter("correlated")
    # As splits.NpySplit counts. Rows without a label are in no class folder: they come last.
    places = manifest.sort("label", "path", nulls_last=True).select(
        "id", "origin", position=pl.int_range(pl.len(), dtype=pl.Int64).over("origin")
    )
    found = shared.select("id", "label").join(places, on="id", how="left", validate="1:1")
    return found.select("id", "label", "origin", "position").sort("origin", "position")


def _by_all(scores: pl.DataFrame) -> pl.DataFrame:
    """Target rows that every reference judges, and whether all call them correlated."""
    count = scores["reference"].n_unique()
    return (
        scores.filter(pl.col("role") == Role.TARGET, pl.col("status") == Status.OK)
        .group_by("id")
        .agg(pl.col("label").first(), judged=pl.len(), correlated=(pl.col("quadrant") == "correlated").all())
        .filter(pl.col("judged") == count)
        .sort("id")
    )


def _share_of_all(scores: pl.DataFrame, level: float, resamples: int, seed: int) -> dict[str, Any]:
    judged = _by_all(scores)
    n_rows, n_used = scores.filter(pl.col("role") == Role.TARGET)["id"].n_unique(), len(judged)
    if not n_used:
        return Estimate.undefined(n_rows).as_dict()
    share = float(judged["correlated"].to_numpy().mean())
    # The weights of a set's rows in a resample add up to a binomial number.
    counts = provenance.rng(seed, "bootstrap/correlated_by_all").binomial(n_used, share, size=(resamples, 1))
    draws = Draws(np.array([share]), counts / n_used, n_used, n_rows - n_used)
    return draws.estimates(level)[0].as_dict()


def _judgements(scores: pl.DataFrame, role: str, names: Sequence[str]) -> dict[str, _Judgement]:
    """What each reference says of the rows of a role, all in the same order."""
    of_role = scores.filter(pl.col("role") == role)
    ids = of_role.select("id").unique().sort("id")
    found = {}
    for name in names:
        usable = of_role.filter(pl.col("reference") == name, pl.col("status") == Status.OK)
        rows = ids.join(usable, on="id", how="left", validate="1:1", maintain_order="left")
        sets = {"correct": pl.col("reference_correct"), "value": pl.col("value")} | {
            quadrant: pl.col("quadrant") == quadrant for quadrant in ("memorized", "correlated")
        }
        found[name] = _Judgement(
            rows["reference"].is_not_null().to_numpy(),
            rows["reference_confidence"].fill_null(np.nan).to_numpy(),
            rows["memorization_score"].fill_null(np.nan).to_numpy(),
            {
                set_name: rows.select(member.cast(pl.Float64)).to_series().to_numpy()
                for set_name, member in sets.items()
            },
            rows["weight"].fill_null(0.0).to_numpy(),
            rows["label"].fill_null("").to_numpy(),
        )
    return found


def _pairs(
    scores: pl.DataFrame,
    on_target: Mapping[str, _Judgement],
    draw: _Drawing,
    level: float,
) -> list[dict[str, Any]]:
    """All figures of all pairs."""
    every, fractions = list(itertools.combinations(on_target, 2)), draw.fractions
    target = _draws(on_target, every, draw, Role.TARGET)
    has_unseen = bool((scores["role"] == Role.UNSEEN).any())
    on_unseen = _judgements(scores, Role.UNSEEN, list(on_target)) if has_unseen else {}
    unseen = _draws(on_unseen, every if has_unseen else [], draw, Role.UNSEEN)
    percents = [metrics.percent_key(fraction) for fraction in fractions]
    result = []
    for pair in every:
        differences = {"target": _columns(target[pair], 0, len(fractions))}
        if has_unseen:
            differences |= {"unseen": unseen[pair], "corrected": differences["target"] - unseen[pair]}
        measures = _columns(target[pair], len(fractions), None).estimates(level)
        measures[-1] = _counted(measures[-1], *(on_target[name] for name in pair))
        result.append(
            {"first": pair[0], "second": pair[1]}
            | {name: _named(percents, draws.estimates(level)) for name, draws in differences.items()}
            | _named(MEASURES, measures)
        )
    return result


def _with_tests(pairs: list[dict[str, Any]], on_target: Mapping[str, _Judgement]) -> list[dict[str, Any]]:
    """The pairs with McNemar's test of whether both are right equally often; its p-values adjusted for their number."""
    tests = []
    for pair in pairs:
        first, second = on_target[pair["first"]], on_target[pair["second"]]
        right = [(found.sets["correct"] == 1)[first.judged & second.judged] for found in (first, second)]
        only = [int((one & ~other).sum()) for one, other in (right, right[::-1])]
        tests.append({"only_first": only[0], "only_second": only[1], "p_value": statistics.mcnemar(*only)})
    adjusted = statistics.holm(np.array([test["p_value"] for test in tests]))
    return [
        {**pair, "mcnemar": {**test, "p_holm": float(p)}} for pair, test, p in zip(pairs, tests, adjusted, strict=True)
    ]


def _named(names: Sequence[str], estimates: Sequence[Estimate]) -> dict[str, Any]:
    return {name: estimate.as_dict() for name, estimate in zip(names, estimates, strict=True)}


def _columns(draws: Draws, start: int, end: int | None) -> Draws:
    return Draws(draws.value[start:end], draws.samples[:, start:end], draws.n_used, draws.n_excluded)


def _counted(found: Estimate, first: _Judgement, second: _Judgement) -> Estimate:
    """The rank correlation with the rows it rests on: a score need not be defined on every row that is judged."""
    used = int((np.isfinite(first.score) & np.isfinite(second.score)).sum())
    return replace(found, n_used=used, n_excluded=found.n_used + found.n_excluded - used)


def _draws(
    judgements: Mapping[str, _Judgement], pairs: Sequence[Pair], draw: _Drawing, role: Role
) -> dict[Pair, Draws]:
    """Bootstrap of each pair: differences of gaps and, on target rows, `MEASURES`.

    All pairs that judge the same rows, which nearly always are all pairs, share one call and its resamples.
    """
    groups: dict[bytes, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(_judged(judgements, pair).tobytes(), []).append(pair)
    found: dict[Pair, Draws] = {}
    for group in groups.values():
        rows = _judged(judgements, group[0])
        n_rows = int(rows.sum())
        kept = {name: judgements[name].take(rows) for name in dict.fromkeys(itertools.chain(*group))}
        parts = [_differences(kept, group, draw.fractions)]
        if role == Role.TARGET:
            parts.append(partial(_measures, len(group), _products(kept, group), n_rows))
        rng = provenance.rng(draw.seed, f"bootstrap/agreement/{role}")
        drawn = draw.rows(next(iter(kept.values())))
        draws = statistics.bootstrap(partial(_side_by_side, parts), drawn, draw.resamples, rng, len(rows) - n_rows)
        found |= _by_pair(draws, group)
    return found


def _judged(judgements: Mapping[str, _Judgement], pair: Pair) -> BoolArray:
    """The rows that both judge."""
    return judgements[pair[0]].judged & judgements[pair[1]].judged


def _side_by_side(parts: Sequence[Callable[[FloatArray], FloatArray]], weights: FloatArray) -> FloatArray:
    """The figures of each pair next to each other; each part gives shape (B, pairs, figures)."""
    return np.concatenate([part(weights) for part in parts], axis=2).reshape(len(weights), -1)


def _by_pair(draws: Draws, pairs: Sequence[Pair]) -> dict[Pair, Draws]:
    width = len(draws.value) // len(pairs)
    return {pair: _columns(draws, place * width, (place + 1) * width) for place, pair in enumerate(pairs)}


def _differences(
    judgements: Mapping[str, _Judgement], pairs: Sequence[Pair], fractions: Sequence[float]
) -> Callable[[FloatArray], FloatArray]:
    """Mean value of the second less that of the first at each fraction, as a function of weights.

    Its result has shape (B, pairs, fractions).
    """
    means = {
        name: metrics.TopMeans.of(found.sets["value"][:, None], found.confidence, fractions)
        for name, found in judgements.items()
    }

    def differences(weights: FloatArray) -> FloatArray:
        values = {name: mean(weights)[:, :, 0] for name, mean in means.items()}
        return np.stack([values[second] - values[first] for first, second in pairs], axis=1)

    return differences


def _products(judgements: Mapping[str, _Judgement], pairs: Sequence[Pair]) -> FloatArray:
    """The columns whose means over resampled rows all measures are made of, shape (N, 15 pairs).

    For each pair and each of `SETS` the members of the first, of the second and of both; then for the ranks of the
    scores the rows where both are defined, the two ranks, their squares and their product.
    """
    columns = []
    for first, second in ((judgements[first], judgements[second]) for first, second in pairs):
        for name in SETS:
            columns += [first.sets[name], second.sets[name], first.sets[name] * second.sets[name]]
        one, two, defined = _ranks(first.score, second.score)
        columns += [defined, one, two, one**2, two**2, one * two]
    return np.stack(columns, axis=1)


def _measures(n_pairs: int, products: FloatArray, n_rows: int, weights: FloatArray) -> FloatArray:
    """`MEASURES` of each pair, shape (B, pairs, measures). One product of matrices, however many pairs there are."""
    means = (weights @ products / max(n_rows, 1)).reshape(len(weights), n_pairs, -1).transpose(2, 0, 1)
    memorized, correct, correlated = means[0:3], means[3:6], means[6:9]
    found = (
        kappa(*memorized),
        kappa(*correct),
        jaccard(*memorized),
        jaccard(*correlated),
        correlation(*means[9:]),
    )
    return np.stack(found, axis=2)


def kappa(first: FloatArray, second: FloatArray, both: FloatArray) -> FloatArray:
    """Cohen's kappa of two yes-or-no judgements.

    Source: Cohen, Educational and Psychological Measurement 20 (1960).

    Args:
        first: share of rows that the first says yes to, any shape.
        second: likewise of the second, the same shape.
        both: share of rows that both say yes to, the same shape.

    Returns:
        From -1 to 1, the same shape; 0 where they agree as often as chance would; NaN where both are the same constant.

    >>> kappa(np.array([0.5]), np.array([0.25]), np.array([0.25])).tolist()
    [0.5]
    """
    observed = 1 - first - second + 2 * both
    expected = first * second + (1 - first) * (1 - second)
    return _ratio(observed - expected, 1 - expected)


def jaccard(first: FloatArray, second: FloatArray, both: FloatArray) -> FloatArray:
    """Size of the intersection of two sets over the size of their union; NaN where both are empty.

    Args:
        first: share of rows in the first set, any shape.
        second: likewise of the second, the same shape.
        both: share of rows in both, the same shape.

    Returns:
        From 0 to 1, the same shape.

    >>> jaccard(np.array([0.5, 0.0]), np.array([0.25, 0.0]), np.array([0.25, 0.0])).tolist()
    [0.5, nan]
    """
    return _ratio(both, first + second - both)


def correlation(
    defined: FloatArray,
    first: FloatArray,
    second: FloatArray,
    first_squared: FloatArray,
    second_squared: FloatArray,
    product: FloatArray,
) -> FloatArray:
    """Pearson's correlation from means over rows; a row that does not count is 0 in all six.

    Args:
        defined: share of rows that count, any shape; likewise the others.
        first: mean of the first quantity.
        second: mean of the second.
        first_squared: mean of its square.
        second_squared: mean of its square.
        product: mean of the product.

    Returns:
        From -1 to 1 but for rounding, the same shape; NaN where one of the two is constant or no row counts.

    >>> one, two = np.array([1.0, -1]), np.array([-1.0, 1])
    >>> float(correlation(*(np.mean(x) for x in (one**2, one, two, one**2, two**2, one * two))))
    -1.0
    """
    counted = np.where(defined > 0, defined, 1)
    one, two = first / counted, second / counted
    spreads = [np.maximum(first_squared / counted - one**2, 0), np.maximum(second_squared / counted - two**2, 0)]
    varied = (spreads[0] > ZERO) & (spreads[1] > ZERO)
    found = _ratio(product / counted - one * two, np.sqrt(spreads[0] * spreads[1]))
    return np.where(varied, found, np.nan)


def _ranks(first: FloatArray, second: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Average ranks of two scores among the rows where both are defined, centred and scaled; 0 elsewhere.

    Returns:
        The two, from -0.5 to 0.5, and 1 where both are defined, 0 elsewhere.
    """
    from scipy.stats import rankdata

    defined = np.isfinite(first) & np.isfinite(second)
    found = []
    for values in (first[defined], second[defined]):
        column = np.zeros(len(defined))
        if len(values):
            # Squares of large ranks would lose digits.
            column[defined] = (rankdata(values) - (len(values) + 1) / 2) / len(values)
        found.append(column)
    return found[0], found[1], defined.astype(np.float64)


def _ratio(numerator: FloatArray, divisor: FloatArray) -> FloatArray:
    """A quotient; NaN where it divides by what is zero but for rounding."""
    defined = divisor > ZERO
    return np.where(defined, numerator / np.where(defined, divisor, 1), np.nan)


def _matrix(
    names: Sequence[str], judgements: Mapping[str, _Judgement], pairs: Sequence[Mapping[str, Any]], measure: str
) -> list[list[float | None]]:
    """The measure of every two references; on the diagonal 1, null where a reference has nothing to agree on."""
    found = {(pair["first"], pair["second"]): pair[measure]["value"] for pair in pairs}
    place = MEASURES.index(measure)
    for name in names:
        own = judgements[name].take(judgements[name].judged)
        value = _measures(1, _products({name: own}, [(name, name)]), len(own.judged), np.ones((1, len(own.judged))))
        found[name, name] = None if np.isnan(value[0, 0, place]) else 1.0
    return [[found.get((one, two), found.get((two, one))) for two in names] for one in names]
