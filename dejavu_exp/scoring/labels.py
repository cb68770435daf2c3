"""The label-inference test: is the one true label the first, and how sure is each predictor?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import polars as pl

from dejavu_exp import metrics, provenance, statistics, tables
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.scoring import common
from dejavu_exp.statistics import Draws, Rows
from dejavu_exp.tables import Estimate, FloatArray, Role, Status

CURVE_PERCENT = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)
TOPS = {"top1": "", "top5": "_top5"}

RoleDraws: TypeAlias = dict[str, Draws]


@dataclass(frozen=True)
class LabelInference:
    """Is the true label the predictor's first (or among its first five), and how sure is the predictor of it?

    Attributes:
        fractions: most confident fractions to report, each in (0, 1].
        memorization_score: per row, "probability": the target's probability of the true label less the reference's,
            in [-1, 1], defined on every row; "entropy": entropy of the reference less entropy of the target, nats, on
            memorized rows only, as the authors' sample-level test has it.
        ties: rows tied at a confidence cut share the free places ("shared", independent of row order), or earlier rows
            come first ("first", the authors' rule with a stable sort).
        level: of the intervals.
        resamples: of the bootstrap.
        cluster: what a resample draws: single rows ("row"), or whole classes ("label"), for rows of a class may
            resemble each other and then tell less than their number says.
        adjust: unseen rows count alike ("none"), or so that they resemble the target rows: by the odds of being one
            ("weight"), or as often as they are the likest to one ("match"). See `dejavu_exp.likeness`.
        false_discovery: expected share of false ones among the target rows that are listed as memorized.
    """

    fractions: tuple[float, ...] = (1.0, 0.2, 0.05)
    memorization_score: Literal["probability", "entropy"] = "probability"
    ties: Literal["shared", "first"] = "shared"
    level: float = 0.95
    resamples: int = 1000
    cluster: Literal["row", "label"] = "row"
    adjust: Literal["none", "weight", "match"] = "none"
    false_discovery: float = 0.1
    infers: ClassVar[str] = "label"
    needs_tags: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", tuple(self.fractions))
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ConfigError(f"scoring.fractions={list(self.fractions)}: each must lie in (0, 1].")
        if self.memorization_score not in ("probability", "entropy"):
            raise ConfigError(f"scoring.memorization_score={self.memorization_score}: must be probability or entropy.")
        if self.ties not in ("shared", "first"):
            raise ConfigError(f"scoring.ties={self.ties}: must be shared or first.")
        if self.cluster not in ("row", "label"):
            raise ConfigError(f"scoring.cluster={self.cluster}: must be row or label.")
        common.check_settings(self.level, self.resamples, self.false_discovery, self.adjust)

    def check_bank(self, lost: Sequence[str]) -> list[str]:
        """Refuse measured labels that no public image has.

        Raises:
            DataError: there is one.
        """
        if lost:
            raise DataError(
                f"class {lost[0]} has no usable public image ({len(lost)} such classes), so its label cannot be "
                "inferred. Raise split.public, lower split.target, or leave the class out."
            )
        return []

    def reference_value(self) -> pl.Expr:
        """What a reference's share of the gap is the mean of: its correctness."""
        return pl.col("reference_correct")

    def score(self, rows: pl.DataFrame, target: Evidence, reference: Evidence, name: str) -> pl.DataFrame:
        """Score every row; a row that cannot be measured keeps its status and has no figures.

        Args:
            rows: columns id, role, label, status, and weight where rows do not count alike: all rows of the roles
                measured.
            target: evidence of the encoder under test, for rows of status ok.
            reference: evidence of the reference, for the same rows; a row where it has none becomes "no_evidence".
            name: of the reference.

        Returns:
            Columns of `tables.SCORES`, one row for each of `rows`.
        """
        ok = rows.filter(pl.col("status") == Status.OK)
        reference = reference.take(ok["id"].to_list())
        has_evidence = reference.answered()
        used = ok.filter(has_evidence)
        lost = pl.col("id").is_in(ok.filter(~has_evidence)["id"].implode())
        rows = rows.with_columns(
            status=pl.when(lost).then(pl.lit(str(Status.NO_EVIDENCE))).otherwise("status"), reference=pl.lit(name)
        )
        columns = self._columns(used, target.take(used["id"].to_list()), reference.take(used["id"].to_list()))
        weight = pl.col("weight") if "weight" in used.columns else pl.lit(1.0)
        columns = used.select("id", weight=weight).hstack(columns)
        others = [column for column in rows.columns if column != "weight"]
        joined = rows.select(others).join(columns, on="id", how="left", validate="1:1", maintain_order="left")
        return common.with_p_values(joined).select(
            pl.col(column).cast(dtype) for column, dtype in tables.SCORES.items()
        )

    def _columns(self, used: pl.DataFrame, target: Evidence, reference: Evidence) -> pl.DataFrame:
        columns: dict[str, Any] = {}
        for role, evidence in (("target", target), ("reference", reference)):
            code = {label: column for column, label in enumerate(evidence.labels)}
            truth = used["label"].replace_strict(code, return_dtype=pl.Int64).to_numpy()
            columns |= {
                f"{role}_label": pl.Series(evidence.labels)[evidence.ranking[:, 0]],
                f"{role}_probability": evidence.probability_of(truth),
                f"{role}_confidence": evidence.confidence,
                f"{role}_correct": evidence.correct(truth),
                f"{role}_correct_top5": evidence.correct(truth, top=5),
                f"{role}_tied": evidence.tied,
            }
        quadrant = metrics.quadrant(columns["target_correct"], columns["reference_correct"])
        memorized = quadrant == 0
        entropies = [evidence.entropies(memorized) for evidence in (target, reference)]
        confidence = np.full(len(used), np.nan)
        confidence[memorized] = entropies[1] - entropies[0]
        by_name = {
            "probability": columns["target_probability"] - columns["reference_probability"],
            "entropy": confidence,
        }
        return pl.DataFrame(
            {
                **columns,
                "quadrant": pl.Series(metrics.QUADRANTS)[quadrant],
                "memorization_score": pl.Series(by_name[self.memorization_score], nan_to_null=True),
                "memorization_confidence": pl.Series(confidence, nan_to_null=True),
            }
        )

    def figures(self, scores: pl.DataFrame, images: pl.DataFrame, seed: int) -> dict[str, Any]:
        """All figures of one reference.

        Args:
            scores: columns of `tables.SCORES`, one reference.
            images: the manifest's rows; `planted_repeats` and `background` tell the planted truth, where there is one.
            seed: of the bootstrap.

        Returns:
            JSON-ready: per role accuracies and gaps, quadrants, curve; the corrected gap, and the share of target rows
            that it makes memorized; how many rows are listed; the smallest gaps that would show; with heldout rows,
            whose target is the reference's encoder, the gap averaged over both directions; per class; planted truth.
        """
        draws = {
            role: self._draws(scores.filter(pl.col("role") == role), seed, role)
            for role in (Role.TARGET, Role.UNSEEN, Role.HELDOUT)
            if len(scores.filter(pl.col("role") == role))
        }
        result: dict[str, Any] = {"roles": {str(role): self._role_figures(d, role) for role, d in draws.items()}}
        target, unseen, corrected = draws[Role.TARGET], draws.get(Role.UNSEEN), None
        if unseen and unseen["gaps"].n_used:
            corrected = target["gaps"] - unseen["gaps"]
            result["corrected_gap"] = self._by_top_and_percent(self._corrected(corrected, target, unseen))
            result["rate"] = self._rate(corrected, target, unseen).as_dict()
        widest = self.fractions.index(max(self.fractions))
        result["power"] = common.power(
            common.columns(target["gaps"], widest, widest + 1),
            corrected and common.columns(corrected, widest, widest + 1),
            self.level,
        )
        result["detected"] = common.detected(scores, self.false_discovery)
        if Role.HELDOUT in draws:
            both = common.mean_of(draws[Role.TARGET]["gaps"], draws[Role.HELDOUT]["gaps"])
            result["both_directions"] = self._by_top_and_percent(both.estimates(self.level))
        target_scores = scores.filter(pl.col("role") == Role.TARGET)
        result["per_class"] = self._per_class(target_scores, seed)
        if {"planted_repeats", "background"} <= set(images.columns):
            truth = images.select("id", "background", "planted_repeats")
            joined = target_scores.join(truth, on="id", how="left", validate="1:1")
            means = {"target_accuracy": pl.col("target_correct")}
            result["planted"] = common.planted(joined, means, self.level, self.resamples, seed)
        return result

    def _draws(self, scores: pl.DataFrame, seed: int, role: str) -> RoleDraws:
        """Bootstrap of one role. All statistics of a role see the same resamples, whatever the reference."""
        used = scores.filter(pl.col("status") == Status.OK).sort("id")
        values = {column: used[column].to_numpy() for column in used.columns if used[column].dtype != pl.String}
        parts: dict[str, Callable[[FloatArray], FloatArray]] = {
            "by_target": self._accuracies(values, "target", ("target", "reference")),
            "reference": self._accuracies(values, "reference", ("reference",)),
            "means": partial(_means, _mean_columns(used)),
        }
        curve = [percent / 100 for percent in CURVE_PERCENT]
        for who in ("target", "reference"):
            correct = np.asarray(values[f"{who}_correct"])[:, None]
            parts[f"curve_{who}"] = metrics.TopMeans.of(correct, values[f"{who}_confidence"], curve)
        rng = provenance.rng(seed, f"bootstrap/{role}")
        rows = Rows.of(values["weight"], used["label"].to_numpy() if self.cluster == "label" else None)
        draws = statistics.bootstrap_together(parts, rows, self.resamples, rng, len(scores) - len(used))
        width = len(TOPS) * len(self.fractions)
        target = common.columns(draws["by_target"], 0, width)
        same_rows = common.columns(draws["by_target"], width, None)
        return {
            "target": target,
            "reference": draws["reference"],
            "same_rows": same_rows,
            "gaps": common.paired(target, draws["reference"]),
            "quadrants": common.columns(draws["means"], 0, len(metrics.QUADRANTS)),
            "memorization_confidence": common.columns(draws["means"], -2, -1),
            "memorization_score": common.columns(draws["means"], -1, None),
            "curve_target": draws["curve_target"],
            "curve_reference": draws["curve_reference"],
        }

    def _accuracies(
        self, values: Mapping[str, Any], ranking: str, judged: Sequence[str]
    ) -> Callable[[FloatArray], FloatArray]:
        """For each of `judged` top-1 then top-5 accuracy at each fraction; rows ranked by confidence of `ranking`."""
        confidence = values[f"{ranking}_confidence"]
        if self.ties == "first":
            # Ranks instead of confidences: without ties, the order of rows decides.
            places = np.empty(len(confidence))
            places[np.argsort(-confidence, kind="stable")] = np.arange(len(confidence))
            confidence = -places
        correct = np.stack([values[f"{who}_correct{suffix}"] for who in judged for suffix in TOPS.values()], axis=1)
        means = metrics.TopMeans.of(correct, confidence, self.fractions)
        return lambda weights: means(weights).transpose(0, 2, 1)

    def _by_top_and_percent(self, estimates: list[Estimate]) -> dict[str, dict[str, Any]]:
        percents = [metrics.percent_key(fraction) for fraction in self.fractions]
        rows = iter(estimates)
        return {top: {percent: next(rows).as_dict() for percent in percents} for top in TOPS}

    def _is_exact(self, role: str) -> bool:
        """True where rows are drawn one by one and count alike, so that shares have exact intervals."""
        return self.cluster == "row" and (role != Role.UNSEEN or self.adjust == "none")

    def _shares(self, draws: Draws, fractions: Sequence[float], role: str) -> list[Estimate]:
        """Shares of the rows at each fraction, once or for each of `TOPS`."""
        found = draws.estimates(self.level)
        if not self._is_exact(role):
            return found
        counts = [metrics.n_confident(draws.n_used, fraction) for fraction in fractions] if draws.n_used else [0]
        result = []
        for place, share in enumerate(found):
            low, high = statistics.proportion(share.value, counts[place % len(counts)], self.level)
            result.append(replace(share, low=low, high=high))
        return result

    def _differences(self, first: Draws, second: Draws, fractions: Sequence[float], role: str) -> list[Estimate]:
        """Differences of such shares; of few rows from exact intervals."""
        found = common.paired(first, second).estimates(self.level)
        if not self._is_exact(role):
            return found
        shares = zip(self._shares(first, fractions, role), self._shares(second, fractions, role), strict=True)
        together = statistics.correlations(first, second)
        return self._from_few(found, shares, [first.n_used], fractions, together)

    def _corrected(self, corrected: Draws, target: RoleDraws, unseen: RoleDraws) -> list[Estimate]:
        """The corrected gap for each of `TOPS` and fractions; of few rows from the intervals of both gaps."""
        of_roles = [
            self._differences(draws["target"], draws["reference"], self.fractions, role)
            for role, draws in ((Role.TARGET, target), (Role.UNSEEN, unseen))
        ]
        n_used = [draws["gaps"].n_used for draws in (target, unseen)]
        found = corrected.estimates(self.level)
        exact = self._is_exact(Role.UNSEEN)
        return self._from_few(found, zip(*of_roles, strict=True), n_used, self.fractions) if exact else found

    def _from_few(
        self,
        found: Sequence[Estimate],
        parts: Iterable[tuple[Estimate, Estimate]],
        n_used: Sequence[int],
        fractions: Sequence[float],
        correlations: FloatArray | None = None,
    ) -> list[Estimate]:
        """Differences, with intervals from those of their parts where few rows of a role are behind them."""
        counts = [min(metrics.n_confident(n, fraction) if n else 0 for n in n_used) for fraction in fractions]
        result = []
        for place, (estimate, (first, second)) in enumerate(zip(found, parts, strict=True)):
            if counts[place % len(counts)] < statistics.FEW_ROWS:
                together = 0.0 if correlations is None else float(correlations[place])
                low, high = statistics.difference(first, second, together)
                estimate = replace(estimate, low=low, high=high)
            result.append(estimate)
        return result

    def _rate(self, corrected: Draws, target: RoleDraws, unseen: RoleDraws) -> Estimate:
        """The share of target rows that memorization must make right for the corrected gap, top-1 of all rows.

        What the encoder would have right without it is what it has right of unseen rows, and what the reference has
        right of target rows more than of those; the corrected gap, over what is then still wrong, is the share.
        """
        place = self.fractions.index(max(self.fractions))
        gap, *accuracies = (
            common.columns(draws, place, place + 1)
            for draws in (corrected, unseen["target"], target["reference"], unseen["reference"])
        )
        values = _share_of_wrong(gap.value, *(draws.value for draws in accuracies))
        samples = _share_of_wrong(gap.samples, *(draws.samples for draws in accuracies))
        return Draws(values, samples, gap.n_used, gap.n_excluded).estimates(self.level)[0]

    def _role_figures(self, draws: RoleDraws, role: str) -> dict[str, Any]:
        shares = {name: self._shares(draws[name], self.fractions, role) for name in ("target", "reference")}
        differences = {
            name: self._differences(draws["target"], draws[other], self.fractions, role)
            for name, other in (("gap", "reference"), ("same_rows_gap", "same_rows"))
        }
        parts = {name: self._by_top_and_percent(found) for name, found in (shares | differences).items()}
        result: dict[str, Any] = {
            top: {percent: {name: part[top][percent] for name, part in parts.items()} for percent in parts["gap"][top]}
            for top in TOPS
        }
        quadrants = self._shares(draws["quadrants"], [1.0], role)
        result["quadrants"] = {name: quadrants[place].as_dict() for place, name in enumerate(metrics.QUADRANTS)}
        for name in ("memorization_confidence", "memorization_score"):
            result[name] = draws[name].estimates(self.level)[0].as_dict()
        curve = [percent / 100 for percent in CURVE_PERCENT]
        gaps = self._differences(draws["curve_target"], draws["curve_reference"], curve, role)
        result["curve"] = {
            "percent": list(CURVE_PERCENT),
            "target": _plain(draws["curve_target"].value),
            "reference": _plain(draws["curve_reference"].value),
            "gap": _plain([gap.value for gap in gaps]),
            "gap_low": _plain([gap.low for gap in gaps]),
            "gap_high": _plain([gap.high for gap in gaps]),
        }
        return result

    def _per_class(self, scores: pl.DataFrame, seed: int) -> list[dict[str, Any]]:
        """Top-1 accuracies and gap of each class, all usable rows of the class."""
        target, reference = pl.col("target_correct"), pl.col("reference_correct")
        is_cell = {
            "both": target & reference,
            "target": target & ~reference,
            "reference": ~target & reference,
            "neither": ~target & ~reference,
        }
        used = pl.col("status") == Status.OK
        counted = {name: (used & member).sum().cast(pl.Int64) for name, member in is_cell.items()}
        known = scores.filter(pl.col("label").is_not_null())  # of a row that was dropped before, it may not be
        table = known.group_by("label").agg(n_excluded=(~used).sum().cast(pl.Int64), **counted).sort("label")
        estimates = common.by_cells(
            table.select(common.CELLS).to_numpy(),
            table["n_excluded"].to_numpy(),
            self.level,
            self.resamples,
            provenance.rng(seed, "bootstrap/class"),
        )
        return [{"label": label, **found} for label, found in zip(table["label"], estimates, strict=True)]

    def headline_gaps(self, figures: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
        """What the verdict rests on: the gap of each role, and the corrected one, None where undefined."""
        top = metrics.percent_key(max(self.fractions))
        gaps = {role: found["top1"][top]["gap"] for role, found in figures["roles"].items()}
        return gaps, figures.get("corrected_gap", {}).get("top1", {}).get(top)

    def verdict(self, figures: Mapping[str, Any], reference: str, *, random: bool) -> str:
        """One sentence: what the figures show, and what they do not."""
        gaps, corrected = self.headline_gaps(figures)
        said = common.Wording(f"the encoder beats {reference} by", " and by")
        return common.verdict(gaps, corrected, said, self.level, random=random)


def _share_of_wrong(gap: FloatArray, unseen: FloatArray, reference: FloatArray, other: FloatArray) -> FloatArray:
    """A gap over what is wrong without it; NaN where nothing is."""
    wrong = 1 - (unseen + reference - other)
    return np.asarray(gap / np.where(wrong > 0, wrong, np.nan))


def _mean_columns(used: pl.DataFrame) -> FloatArray:
    """What is averaged over all rows, shape (N, 8): a column and whether it is defined, for two; then the quadrants."""
    columns = []
    for name, chosen in (
        ("memorization_confidence", pl.col("quadrant") == "memorized"),
        ("memorization_score", pl.lit(True)),
    ):
        value = pl.when(chosen).then(pl.col(name)).fill_nan(None)
        columns += [value.fill_null(0.0).alias(name), value.is_not_null().cast(pl.Float64).alias(f"has_{name}")]
    quadrants = [(pl.col("quadrant") == name).cast(pl.Float64).alias(name) for name in metrics.QUADRANTS]
    return used.select(*columns, *quadrants).to_numpy()


def _means(columns: FloatArray, weights: FloatArray) -> FloatArray:
    """Shares of the quadrants, then the means of the two others over the rows where they are defined."""
    sums = weights @ columns
    total = weights.sum(axis=1, keepdims=True)
    shares = sums[:, 4:] / np.where(total > 0, total, np.nan)
    defined = sums[:, [1, 3]]
    return np.hstack([shares, sums[:, [0, 2]] / np.where(defined > 0, defined, np.nan)])


def _plain(values: Iterable[float]) -> list[float | None]:
    """Floats for JSON; None for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]
