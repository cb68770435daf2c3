"""Are target and unseen rows alike in what can be seen of them without the encoder? Tests, and weights where not.

The corrected gap takes unseen rows for what target rows would be like, had the encoder not seen them. Where the two
differ in classes, sizes, tags, or in how much a background tells of its foreground, the difference of their gaps holds
that as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from dejavu_exp import provenance, statistics
from dejavu_exp.evidence import Evidence
from dejavu_exp.tables import BoolArray, FloatArray, IntArray, Role

PERMUTATIONS = 999
FOLDS = 5
SUREST = 5
"""Probabilities of a reference's answer that are looked at, the largest."""
FURTHEST = 0.01
"""A row's chance to be a target row, or not to be one, counts as at least this: one rare row is not to decide."""
SIZES = {"box_share": "box size", "crop_share": "crop size"}
BLOCK_CELLS = 20_000_000


@dataclass(frozen=True)
class Balance:
    """How far the two kinds of rows lie apart in one quantity.

    Attributes:
        name: of the quantity.
        before: difference of the means over the standard deviation, all rows alike.
        after: the same with the weights.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Likeness:
    """How target rows and unseen rows compare.

    Attributes:
        tests: as figures.json has them, with p-values and those adjusted for their number.
        level: a test with an adjusted p-value below 1 - level says that the rows differ.
        adjust: "none", "weight" or "match".
        weights: columns id and weight, of all measured rows; 1 for target rows, mean 1 over unseen rows.
        balance: of all that the weights are made from; empty without weights.
    """

    tests: list[dict[str, Any]]
    level: float
    adjust: str
    weights: pl.DataFrame
    balance: tuple[Balance, ...]

    @property
    def differing(self) -> list[dict[str, Any]]:
        """The tests that say that the rows differ."""
        return [test for test in self.tests if test["p_holm"] is not None and test["p_holm"] < 1 - self.level]

    @property
    def warning(self) -> str:
        """What must be said with a verdict; empty where the rows are alike."""
        if not self.differing:
            return ""
        shown = ", ".join(f"{test['name']} (p = {test['p_holm']:.2g})" for test in self.differing)
        if self.adjust == "none":
            return (
                f"Target and unseen rows differ in {shown}: a part of the corrected gap may be that difference. "
                "scoring.adjust=weight makes unseen rows count so that they resemble the target rows."
            )
        return (
            f"Target and unseen rows differ in {shown}; unseen rows count so that they resemble the target rows "
            f"(scoring.adjust={self.adjust}), and the means of what is known of both still differ by up to "
            f"{max(abs(item.after) for item in self.balance):.2f} standard deviations "
            f"({max(abs(item.before) for item in self.balance):.2f} before)."
        )

    def figures(self) -> dict[str, Any]:
        """What figures.json holds."""
        smallest = min((test["p_holm"] for test in self.tests if test["p_holm"] is not None), default=None)
        alike = f"{len(self.tests)} tests find no difference between target and unseen rows" + (
            "." if smallest is None else f" (smallest adjusted p-value {smallest:.2g})."
        )
        weights = self.weights.filter(pl.col("role") == Role.UNSEEN)["weight"].to_numpy()
        return {
            "tests": self.tests,
            "alike": not self.differing,
            "adjust": self.adjust,
            "effective_unseen": effective_rows(weights),
            "balance": [{"name": item.name, "before": item.before, "after": item.after} for item in self.balance],
            "sentence": self.warning or alike,
        }


def compare(rows: pl.DataFrame, reference: Evidence | None, adjust: str, level: float, seed: int) -> Likeness | None:
    """Compare target and unseen rows; None where there are no rows of one kind.

    Args:
        rows: measured rows, columns id, role, label (null where unknown), truth, tags (null where nobody tagged them),
            and box_share and crop_share (shares of the image, null where there are none).
        reference: what a reference that has nothing from the encoder says of them; None without one.
        adjust: "none", "weight" or "match", see `weigh`.
        level: of the tests.
        seed: of the permutations and folds.
    """
    rows = rows.filter(pl.col("role").is_in([Role.TARGET, Role.UNSEEN])).sort("id")
    is_target = (rows["role"] == Role.TARGET).to_numpy()
    if is_target.all() or not is_target.any():
        return None
    told = reference.spread_over(rows["id"].to_list()) if reference else None
    answers = _answers(rows, told) if told else {}
    tests = [
        *_class_balance(rows, is_target, seed),
        *_sizes(rows, is_target),
        *_tags(rows, is_target, seed),
        *_classifier(answers, is_target, seed),
    ]
    adjusted = statistics.holm(np.array([test["p_value"] for test in tests], dtype=np.float64))
    tests = [{**test, "p_holm": None if math.isnan(p) else float(p)} for test, p in zip(tests, adjusted, strict=True)]
    weights, balance = np.ones(len(rows)), list[Balance]()
    if adjust != "none":
        known = {**answers, **_numeric_sizes(rows)}
        weights = weigh(known, rows["label"], is_target, adjust, seed)
        balance = _balance(known, is_target, weights)
    return Likeness(tests, level, adjust, rows.select("id", "role").with_columns(weight=weights), tuple(balance))


def weigh(
    known: Mapping[str, FloatArray], labels: pl.Series, is_target: BoolArray, adjust: str, seed: int
) -> FloatArray:
    """Weights with which unseen rows resemble target rows in what is known of both.

    The chance of a row to be a target row (propensity) is estimated by logistic regression on rows that it is not asked
    of. "weight" takes its odds; "match" how many target rows have the unseen row as the nearest in it.

    Source: Rosenbaum and Rubin, Biometrika 70 (1983).

    Args:
        known: by name, shape (N,) each, NaN where it is not known.
        labels: of the rows; null where unknown.
        is_target: shape (N,).
        adjust: "weight" or "match".
        seed: of the folds.

    Returns:
        Shape (N,): 1 for target rows, mean 1 over unseen rows.
    """
    chance = np.clip(_propensity(known, labels, is_target, seed), FURTHEST, 1 - FURTHEST)
    logit = np.log(chance / (1 - chance))
    if adjust == "weight":
        unseen = np.exp(logit[~is_target])
    else:
        unseen = np.bincount(_nearest(logit[is_target], logit[~is_target]), minlength=int((~is_target).sum()))
    weights = np.ones(len(is_target))
    weights[~is_target] = unseen / unseen.mean()
    return weights


def effective_rows(weights: FloatArray) -> float:
    """How many rows that count alike would tell as much.

    Source: Kish, Survey Sampling (1965).

    >>> effective_rows(np.array([1.0, 1.0, 0.0]))
    2.0
    """
    return float(weights.sum() ** 2 / (weights**2).sum()) if len(weights) else 0.0


def coverage(rows: pl.DataFrame) -> dict[str, dict[str, float | None]]:
    """What the measured rows of each role hold, by name and role; null where a role has no rows or nothing is known.

    Args:
        rows: columns role, label, tags, target_tied (of usable rows) and weight.
    """
    found: dict[str, dict[str, float | None]] = {}
    for role in (Role.TARGET, Role.UNSEEN):
        part = rows.filter(pl.col("role") == role)
        classes = part["label"].drop_nulls().value_counts()["count"].to_numpy()
        shares = classes / classes.sum() if len(classes) else np.empty(0)
        tagged = part["tags"].drop_nulls()
        values = {
            "usable rows": len(part),
            "rows that count alike and tell as much": effective_rows(part["weight"].to_numpy()),
            "classes": len(classes),
            "classes of equal size that are as diverse": float(np.exp(-(shares * np.log(shares)).sum())),
            "rows of the smallest class": int(classes.min()) if len(classes) else None,
            "rows of the largest class": int(classes.max()) if len(classes) else None,
            "share with a tag": float((tagged.list.len() > 0).to_numpy().mean()) if len(tagged) else None,
            "share where the encoder's first label is tied": float(part["target_tied"].to_numpy().mean())
            if len(part)
            else None,
        }
        for name, value in values.items():
            found.setdefault(name, {})[str(role)] = value if len(part) else None
    return found


def _test(name: str, statistic: str, value: float, p_value: float, is_target: BoolArray, detail: str) -> dict[str, Any]:
    return {
        "name": name,
        "statistic": statistic,
        "value": float(value),
        "p_value": float(p_value),
        "n_target": int(is_target.sum()),
        "n_unseen": int((~is_target).sum()),
        "detail": detail,
    }


def _class_balance(rows: pl.DataFrame, is_target: BoolArray, seed: int) -> list[dict[str, Any]]:
    """Are the classes as frequent? Total variation of their shares; roles are dealt anew."""
    known = rows["label"].is_not_null().to_numpy()
    held = is_target[known]
    if not held.any() or held.all():
        return []
    codes = np.unique(rows["label"].drop_nulls().to_numpy(), return_inverse=True)[1]
    counts, n_target = np.bincount(codes), int(held.sum())
    if len(counts) < 2:
        return []
    rng = provenance.rng(seed, "likeness/classes")
    dealt = rng.multivariate_hypergeometric(counts, n_target, size=PERMUTATIONS, method="marginals")
    observed = np.bincount(codes[held], minlength=len(counts))
    found = _total_variation(np.vstack([observed, dealt]), counts)
    detail = f"{len(counts)} classes; {PERMUTATIONS} permutations"
    return [_test("class balance", "total variation", found[0], _permuted(found), held, detail)]


def _sizes(rows: pl.DataFrame, is_target: BoolArray) -> list[dict[str, Any]]:
    """Are boxes and crops as large? Kolmogorov and Smirnov's test."""
    from scipy.stats import ks_2samp

    result = []
    for column, name in SIZES.items():
        known = rows[column].is_not_null().to_numpy()
        values, held = rows[column].fill_null(0.0).to_numpy(), is_target[known]
        if not held.any() or held.all():
            continue
        found = ks_2samp(values[known & is_target], values[known & ~is_target])
        result.append(_test(name, "KS distance", found.statistic, found.pvalue, held, "share of the image's area"))
    return result


def _tags(rows: pl.DataFrame, is_target: BoolArray, seed: int) -> list[dict[str, Any]]:
    """Are the tags as frequent? Total variation of their shares among all tags; roles are dealt anew."""
    from scipy.sparse import csr_matrix

    known = rows["tags"].is_not_null().to_numpy()
    held = is_target[known]
    flat = rows.filter(known).select("tags").with_row_index("row").explode("tags").drop_nulls()
    if not len(flat) or not held.any() or held.all():
        return []
    codes = np.unique(flat["tags"].to_numpy(), return_inverse=True)[1]
    n_tags = int(codes.max()) + 1
    carried = csr_matrix((np.ones(len(codes), dtype=np.float32), (codes, flat["row"].to_numpy())), (n_tags, len(held)))
    total = np.asarray(carried.sum(axis=1)).ravel()
    rng = provenance.rng(seed, "likeness/tags")
    found = [_total_variation((carried @ held)[None], total)]
    block = max(1, BLOCK_CELLS // len(held))
    for start in range(0, PERMUTATIONS, block):
        dealt = np.stack([rng.permutation(held) for _ in range(min(block, PERMUTATIONS - start))], axis=1)
        found.append(_total_variation((carried @ dealt.astype(np.float32)).T, total))
    values = np.concatenate(found)
    detail = f"{n_tags} tags; {PERMUTATIONS} permutations"
    return [_test("background tags", "total variation", values[0], _permuted(values), held, detail)]


def _total_variation(counts: npt.NDArray[Any], total: npt.NDArray[Any]) -> FloatArray:
    """Between shares of categories in one part of the rows and in the rest, shape (B,).

    Args:
        counts: shape (B, C), how often each category is in the part.
        total: shape (C,), in both.
    """
    rest = total - counts
    sums = [np.maximum(part.sum(axis=1, keepdims=True), 1) for part in (counts, rest)]
    return np.asarray(np.abs(counts / sums[0] - rest / sums[1]).sum(axis=1) / 2, dtype=np.float64)


def _permuted(values: FloatArray) -> float:
    """The p-value of the first among values of permutations; those that differ by rounding alone are equal."""
    return float((values >= values[0] - 1e-9).mean())


def _classifier(answers: Mapping[str, FloatArray], is_target: BoolArray, seed: int) -> list[dict[str, Any]]:
    """Can a classifier tell from the reference's answers which rows are which?

    Source: Lopez-Paz and Oquab, ICLR 2017; with the rank test of the scores of rows that it was not trained on.
    """
    from scipy.stats import mannwhitneyu

    known = np.all([np.isfinite(values) for values in answers.values()], axis=0) if answers else np.zeros(0, bool)
    held = is_target[known] if answers else known
    if min(held.sum(), (~held).sum()) < FOLDS:
        return []
    part = {name: values[known] for name, values in answers.items()}
    chance = _propensity(part, pl.Series([None] * len(held), dtype=pl.String), held, seed)
    found = mannwhitneyu(chance[held], chance[~held], alternative="greater")
    auroc = found.statistic / (int(held.sum()) * int((~held).sum()))
    detail = f"logistic regression on {len(part)} numbers of the reference's answer, {FOLDS} folds"
    return [_test("two-sample classifier", "AUROC", auroc, found.pvalue, held, detail)]


def _propensity(known: Mapping[str, FloatArray], labels: pl.Series, is_target: BoolArray, seed: int) -> FloatArray:
    """The chance of each row to be a target row, were both kinds as frequent; from folds that do not hold it."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    numbers = np.stack([_standardized(values) for values in known.values()], axis=1)
    parts = [csr_matrix(numbers)]
    coded = labels.fill_null("")
    if coded.n_unique() > 1:
        codes = np.unique(coded.to_numpy(), return_inverse=True)[1]
        parts.append(csr_matrix((np.ones(len(codes)), (np.arange(len(codes)), codes))))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=provenance.hash_order(seed, "likeness", "folds") % 2**32)
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    found = cross_val_predict(model, hstack(parts).tocsr(), is_target, cv=folds, method="predict_proba")
    return np.asarray(found[:, 1])


def _standardized(values: FloatArray) -> FloatArray:
    """Mean 0 and deviation 1; what is not known is the mean."""
    spread = np.nanstd(values) if np.isfinite(values).any() else 0.0
    centred = values - np.nanmean(values) if spread > 0 else np.zeros(len(values))
    return np.nan_to_num(centred / (spread if spread > 0 else 1))


def _answers(rows: pl.DataFrame, told: Evidence) -> dict[str, FloatArray]:
    """What a reference says of each row as numbers: how sure it is, of what, and of the truth."""
    surest = -np.sort(-told.probabilities, axis=1)[:, :SUREST].astype(np.float64)
    truth = rows.select("truth").with_row_index("row").explode("truth").drop_nulls()
    place = {label: column for column, label in enumerate(told.labels)}
    columns = np.array([place.get(label, -1) for label in truth["truth"]], dtype=np.int64)
    holders = truth["row"].to_numpy().astype(np.int64)
    holders, columns = holders[columns >= 0], columns[columns >= 0]
    of_truth = np.zeros(len(rows))
    np.fmax.at(of_truth, holders, told.probabilities[holders, columns])
    of_truth[~told.answered()] = np.nan
    return {
        "confidence of the reference": np.asarray(told.confidence, dtype=np.float64),
        "probability of the truth": of_truth,
        **{f"probability of the label in place {rank + 1}": surest[:, rank] for rank in range(surest.shape[1])},
    }


def _numeric_sizes(rows: pl.DataFrame) -> dict[str, FloatArray]:
    return {
        name: rows[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
        for column, name in SIZES.items()
        if rows[column].null_count() < len(rows)
    }


def _nearest(asked: FloatArray, among: FloatArray) -> IntArray:
    """The position of the nearest number in `among` for each of `asked`."""
    order = np.argsort(among, kind="stable")
    ordered = among[order]
    right = np.clip(np.searchsorted(ordered, asked), 1, max(len(ordered) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(ordered) - 1)
    nearer = np.abs(ordered[left] - asked) <= np.abs(ordered[right] - asked)
    return np.asarray(order[np.where(nearer, left, right)])


def _balance(known: Mapping[str, FloatArray], is_target: BoolArray, weights: FloatArray) -> list[Balance]:
    result = []
    for name, values in known.items():
        scaled = _standardized(values)
        target, unseen = scaled[is_target].mean(), scaled[~is_target]
        result.append(
            Balance(
                name, float(target - unseen.mean()), float(target - np.average(unseen, weights=weights[~is_target]))
            )
        )
    return result
