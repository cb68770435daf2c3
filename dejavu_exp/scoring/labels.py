"""The label-inference test: is the one true label the first, and how sure is each predictor?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl

from dejavu_exp import metrics, provenance, statistics, tables
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.scoring import common
from dejavu_exp.statistics import Draws
from dejavu_exp.tables import BoolArray, Estimate, FloatArray, Role, Status

CURVE_PERCENT = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)
TOPS = {"top1": "", "top5": "_top5"}


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
    """

    fractions: tuple[float, ...] = (1.0, 0.2, 0.05)
    memorization_score: Literal["probability", "entropy"] = "probability"
    ties: Literal["shared", "first"] = "shared"
    level: float = 0.95
    resamples: int = 1000
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
        common.check_interval(self.level, self.resamples)

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
            rows: columns id, role, label, status: all rows of the roles measured.
            target: evidence of the encoder under test, for rows of status ok.
            reference: evidence of the reference, for the same rows; a row where it has none becomes "no_evidence".
            name: of the reference.

        Returns:
            Columns of `tables.SCORES`, one row for each of `rows`.
        """
        ok = rows.filter(pl.col("status") == Status.OK)
        has_evidence = np.isfinite(reference.take(ok["id"].to_list()).probabilities).all(axis=1)
        used = ok.filter(has_evidence)
        lost = pl.col("id").is_in(ok.filter(~has_evidence)["id"].implode())
        rows = rows.with_columns(
            status=pl.when(lost).then(pl.lit(str(Status.NO_EVIDENCE))).otherwise("status"), reference=pl.lit(name)
        )
        columns = self._columns(used, target.take(used["id"].to_list()), reference.take(used["id"].to_list()))
        joined = rows.join(
            used.select("id").hstack(columns), on="id", how="left", validate="1:1", maintain_order="left"
        )
        return joined.select(pl.col(column).cast(dtype) for column, dtype in tables.SCORES.items())

    def _columns(self, used: pl.DataFrame, target: Evidence, reference: Evidence) -> pl.DataFrame:
        columns: dict[str, Any] = {}
        for role, evidence in (("target", target), ("reference", reference)):
            code = {label: column for column, label in enumerate(evidence.labels)}
            truth = np.array([code[label] for label in used["label"]], dtype=np.int64)
            columns |= {
                f"{role}_label": [evidence.labels[column] for column in evidence.ranking[:, 0]],
                f"{role}_probability": evidence.probability_of(truth),
                f"{role}_confidence": evidence.confidence,
                f"{role}_correct": evidence.correct(truth),
                f"{role}_correct_top5": evidence.correct(truth, top=5),
                f"{role}_tied": evidence.tied,
            }
        quadrant = metrics.quadrant(columns["target_correct"], columns["reference_correct"])
        gained = metrics.entropy(reference.probabilities) - metrics.entropy(target.probabilities)
        confidence = np.where(quadrant == 0, gained, np.nan)
        by_name = {
            "probability": columns["target_probability"] - columns["reference_probability"],
            "entropy": confidence,
        }
        return pl.DataFrame(
            {
                **columns,
                "quadrant": [metrics.QUADRANTS[place] for place in quadrant],
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
            JSON-ready: per role accuracies and gaps, quadrants, curve; the corrected gap; with heldout rows, whose
            target is the reference's encoder, the gap averaged over both directions; per class; planted truth.
        """
        draws = {
            role: self._draws(scores.filter(pl.col("role") == role), seed, role)
            for role in (Role.TARGET, Role.UNSEEN, Role.HELDOUT)
            if len(scores.filter(pl.col("role") == role))
        }
        result: dict[str, Any] = {"roles": {str(role): self._role_figures(d) for role, d in draws.items()}}
        if Role.UNSEEN in draws and draws[Role.UNSEEN]["gaps"].n_used:
            corrected = draws[Role.TARGET]["gaps"] - draws[Role.UNSEEN]["gaps"]
            result["corrected_gap"] = self._by_top_and_percent(corrected.estimates(self.level))
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

    def _draws(self, scores: pl.DataFrame, seed: int, role: str) -> dict[str, Draws]:
        """Bootstrap of one role. All statistics of a role see the same resamples, whatever the reference."""
        used = scores.filter(pl.col("status") == Status.OK).sort("id")
        n_excluded = len(scores) - len(used)
        values = {column: used[column].to_numpy() for column in used.columns if used[column].dtype != pl.String}
        curve = [percent / 100 for percent in CURVE_PERCENT]

        def run(statistic: Callable[[FloatArray], FloatArray]) -> Draws:
            rng = provenance.rng(seed, f"bootstrap/{role}")
            return statistics.bootstrap(statistic, len(used), self.resamples, rng, n_excluded)

        accuracies = {
            f"{who}{ranked}": run(partial(self._accuracies, values, who, ranking))
            for who, ranked, ranking in (
                ("target", "", "target"), ("reference", "", "reference"), ("reference", "_same_rows", "target"),
            )
        }  # fmt: skip
        memorized = (used["quadrant"] == "memorized").to_numpy()
        curves = {
            who: run(partial(metrics.confident_means, values[f"{who}_correct"], values[f"{who}_confidence"], curve))
            for who in ("target", "reference")
        }
        return {
            **accuracies,
            "gaps": common.paired(accuracies["target"], accuracies["reference"]),
            "same_rows_gaps": common.paired(accuracies["target"], accuracies["reference_same_rows"]),
            "quadrants": run(lambda weights: _shares(used["quadrant"], weights)),
            "memorization_confidence": run(partial(_mean_where, values["memorization_confidence"], memorized)),
            "memorization_score": run(partial(_mean_where, values["memorization_score"], None)),
            **{f"curve_{who}": draws for who, draws in curves.items()},
            "curve_gap": common.paired(curves["target"], curves["reference"]),
        }

    def _accuracies(self, values: Mapping[str, Any], who: str, ranking: str, weights: FloatArray) -> FloatArray:
        """Top-1 then top-5 accuracy of `who` at each fraction; rows ranked by the confidence of `ranking`."""
        confidence = values[f"{ranking}_confidence"]
        if self.ties == "first":
            # Ranks instead of confidences: without ties, the order of rows decides.
            places = np.empty(len(confidence))
            places[np.argsort(-confidence, kind="stable")] = np.arange(len(confidence))
            confidence = -places
        return np.hstack(
            [
                metrics.confident_means(values[f"{who}_correct{suffix}"], confidence, self.fractions, weights)
                for suffix in TOPS.values()
            ]
        )

    def _by_top_and_percent(self, estimates: list[Estimate]) -> dict[str, dict[str, Any]]:
        percents = [metrics.percent_key(fraction) for fraction in self.fractions]
        rows = iter(estimates)
        return {top: {percent: next(rows).as_dict() for percent in percents} for top in TOPS}

    def _role_figures(self, draws: Mapping[str, Draws]) -> dict[str, Any]:
        parts = {
            name: self._by_top_and_percent(draws[source].estimates(self.level))
            for name, source in (
                ("target", "target"), ("reference", "reference"), ("gap", "gaps"), ("same_rows_gap", "same_rows_gaps"),
            )
        }  # fmt: skip
        result: dict[str, Any] = {
            top: {percent: {name: part[top][percent] for name, part in parts.items()} for percent in parts["gap"][top]}
            for top in TOPS
        }
        shares = draws["quadrants"].estimates(self.level)
        result["quadrants"] = {name: shares[place].as_dict() for place, name in enumerate(metrics.QUADRANTS)}
        for name in ("memorization_confidence", "memorization_score"):
            result[name] = draws[name].estimates(self.level)[0].as_dict()
        gaps = draws["curve_gap"].estimates(self.level)
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
        result = []
        for (label,), rows in scores.sort("label", "id").group_by("label", maintain_order=True):
            used = rows.filter(pl.col("status") == Status.OK)
            target, reference = used["target_correct"].to_numpy(), used["reference_correct"].to_numpy()
            estimates = self._estimate_means([target, reference, target.astype(float) - reference], len(rows), seed)
            names = ("target", "reference", "gap")
            result.append({"label": label, **{n: e.as_dict() for n, e in zip(names, estimates, strict=True)}})
        return result

    def _estimate_means(self, columns: list[Any], n_rows: int, seed: int) -> list[Estimate]:
        """Means over the same rows, with a paired bootstrap."""
        matrix = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
        if not len(matrix):
            return [Estimate.undefined(n_rows)] * len(columns)
        rng = provenance.rng(seed, "bootstrap/class")
        draws = statistics.bootstrap(
            lambda weights: weights @ matrix / len(matrix), len(matrix), self.resamples, rng, n_rows - len(matrix)
        )
        return draws.estimates(self.level)

    def verdict(self, figures: Mapping[str, Any], reference: str, *, random: bool) -> str:
        """One sentence: what the figures show, and what they do not."""
        top = metrics.percent_key(max(self.fractions))
        gaps = {role: found["top1"][top]["gap"] for role, found in figures["roles"].items()}
        corrected = figures.get("corrected_gap", {}).get("top1", {}).get(top)
        said = common.Wording(f"the encoder beats {reference} by", " and by")
        return common.verdict(gaps, corrected, said, self.level, random=random)


def _shares(quadrants: pl.Series, weights: FloatArray) -> FloatArray:
    member = np.stack([(quadrants == name).to_numpy() for name in metrics.QUADRANTS], axis=1).astype(np.float64)
    return weights @ member / len(member) if len(member) else np.full((len(weights), member.shape[1]), np.nan)


def _mean_where(values: FloatArray, chosen: BoolArray | None, weights: FloatArray) -> FloatArray:
    """Mean over the chosen rows that are defined; NaN in a resample without any."""
    values = np.asarray(values, dtype=np.float64)
    chosen = np.isfinite(values) if chosen is None else chosen & np.isfinite(values)
    weight = weights[:, chosen].sum(axis=1)
    total = weights[:, chosen] @ values[chosen]
    return (total / np.where(weight > 0, weight, np.nan))[:, None]


def _plain(values: Iterable[float]) -> list[float | None]:
    """Floats for JSON; None for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]
