"""What the scoring variants share: combinations of draws, the planted truth, the wording of a share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from dejavu_exp import metrics, provenance, statistics
from dejavu_exp.errors import ConfigError
from dejavu_exp.statistics import Draws
from dejavu_exp.tables import Estimate, FloatArray, IntArray, Role, Status

LEAST_RESAMPLES = 100
ADJUSTMENTS = ("none", "weight", "match")


def check_settings(level: float, resamples: int, false_discovery: float, adjust: str) -> None:
    """Refuse settings that give no interval, no list, or no weights.

    Raises:
        ConfigError: the level or the rate is no share, there are too few resamples, or the adjustment is not known.
    """
    if not 0 < false_discovery < 1:
        raise ConfigError(f"scoring.false_discovery={false_discovery}: must lie between 0 and 1, e.g. 0.1.")
    if adjust not in ADJUSTMENTS:
        raise ConfigError(f"scoring.adjust={adjust}: must be one of {', '.join(ADJUSTMENTS)}.")
    if not 0 < level < 1:
        raise ConfigError(f"scoring.level={level}: must lie between 0 and 1, e.g. 0.95.")
    if resamples < LEAST_RESAMPLES:
        raise ConfigError(
            f"scoring.resamples={resamples}: must be at least {LEAST_RESAMPLES} for an interval to mean anything."
        )


def with_p_values(scores: pl.DataFrame) -> pl.DataFrame:
    """Say of each target row how probable so large a memorization score is for a row that the encoder never saw.

    A row without a score, such as one that is not memorized under scoring.memorization_score=entropy, is below all.

    Args:
        scores: of one reference, with role, status, weight and memorization_score.

    Returns:
        The same with p_value and q_value; null where there are no usable unseen rows.
    """
    usable = pl.col("status") == Status.OK
    numbered = scores.with_row_index("row")
    target, unseen = (numbered.filter(pl.col("role") == role, usable) for role in (Role.TARGET, Role.UNSEEN))
    if not len(unseen):
        return scores.with_columns(p_value=pl.lit(None, pl.Float64), q_value=pl.lit(None, pl.Float64))
    score = pl.col("memorization_score").fill_null(-np.inf)
    of_rows, of_null = (part.select(score).to_series().to_numpy() for part in (target, unseen))
    p_values = statistics.conformal_p_values(of_rows, of_null, unseen["weight"].to_numpy())
    told = target.select("row").with_columns(p_value=p_values, q_value=statistics.false_discovery(p_values))
    return numbered.join(told, on="row", how="left", maintain_order="left").drop("row")


def detected(scores: pl.DataFrame, rate: float) -> dict[str, Any] | None:
    """How many target rows are listed as memorized at a rate of false discoveries; None without unseen rows.

    Args:
        scores: as `with_p_values` gives them, in any form that keeps role, status and the two columns.
        rate: of false discoveries, a fraction.
    """
    tested = scores.filter(pl.col("p_value").is_not_null())
    if not len(tested):
        return None
    return {
        "rate": rate,
        "n": int((tested["q_value"] <= rate).sum()),
        "n_tested": len(tested),
        "n_null": len(scores.filter(pl.col("role") == Role.UNSEEN, pl.col("status") == Status.OK)),
        "smallest_p": tested["p_value"].min(),
    }


def power(gap: Draws, corrected: Draws | None, level: float) -> dict[str, float | None]:
    """The smallest gap, and corrected gap, that so many rows would show, in the gap's unit.

    Args:
        gap: one figure, on target rows.
        corrected: one figure; None without unseen rows.
        level: of the intervals.
    """
    found = {"gap": gap, "corrected_gap": corrected}
    smallest = {
        name: None if draws is None else statistics.smallest_detectable(draws.samples[:, 0], level)
        for name, draws in found.items()
    }
    told = {name: None if value is None or np.isnan(value) else value for name, value in smallest.items()}
    return {**told, "level": level, "power": statistics.POWER}


def paired(first: Draws, second: Draws) -> Draws:
    """The difference of two figures on the same resamples of the same rows."""
    return Draws(first.value - second.value, first.samples - second.samples, first.n_used, first.n_excluded)


def mean_of(first: Draws, second: Draws) -> Draws:
    """The mean of a figure over two independent sets of rows."""
    return Draws(
        (first.value + second.value) / 2,
        (first.samples + second.samples) / 2,
        first.n_used + second.n_used,
        first.n_excluded + second.n_excluded,
    )


def mean_of_same(first: Draws, second: Draws) -> Draws:
    """The mean of two figures on the same resamples of the same rows."""
    return Draws((first.value + second.value) / 2, (first.samples + second.samples) / 2, first.n_used, first.n_excluded)


def columns(draws: Draws, start: int, end: int | None) -> Draws:
    """Some of the figures."""
    return Draws(draws.value[start:end], draws.samples[:, start:end], draws.n_used, draws.n_excluded)


CELLS = ("both", "target", "reference", "neither")
"""Who is right in a row: both, only one, or neither."""


def by_cells(
    counts: IntArray, n_excluded: IntArray, level: float, resamples: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Shares of rows where target and reference are right, and the gap, for each of many groups of rows.

    Args:
        counts: shape (G, 4), rows of each group in each of `CELLS`.
        n_excluded: shape (G,), carried into the estimates.
        level: of the intervals.
        resamples: of the bootstrap within each group.
        rng: the generator.

    Returns:
        For each group estimates of `target`, `reference` and `gap`, JSON-ready; undefined where it has no rows.
    """
    signs = np.array([[1, 1, 0], [1, 0, 1], [0, 1, -1], [0, 0, 0]])
    names = ("target", "reference", "gap")
    rows = counts.sum(axis=1)
    result = [dict.fromkeys(names, Estimate.undefined(int(n)).as_dict()) for n in n_excluded]
    some = np.flatnonzero(rows)
    block = max(1, statistics.BLOCK_ELEMENTS // (len(CELLS) * resamples))
    for group in (some[start : start + block] for start in range(0, len(some), block)):
        held = rows[group][:, None]
        values = counts[group] @ signs / held
        samples = statistics.resample_groups(counts[group], resamples, rng) @ signs / held
        low, high = (edge.reshape(-1, 3) for edge in statistics.intervals(samples.reshape(resamples, -1), level))
        for index, *edges in zip(group, values.tolist(), low.tolist(), high.tolist(), strict=True):
            used, excluded = int(rows[index]), int(n_excluded[index])
            result[index] = {
                name: Estimate(value, below, above, used, excluded).as_dict()
                for name, value, below, above in zip(names, *edges, strict=True)
            }
    return result


def points(estimate: Mapping[str, Any]) -> str:
    """A share as percentage points with its interval."""
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}] points"


@dataclass(frozen=True)
class Wording:
    """How a gap is said: what comes before its figure on target rows, and between the two where rows are unseen."""

    before: str
    between: str


def verdict(
    gaps: Mapping[str, Mapping[str, Any]],
    corrected: Mapping[str, Any] | None,
    said: Wording,
    level: float,
    *,
    random: bool,
) -> str:
    """One sentence: what a gap shows, and what it does not.

    Args:
        gaps: the headline gap of each role.
        corrected: on target rows less on unseen ones; None without unseen rows.
        said: the gap in words.
        level: of the intervals.
        random: True where the encoder's weights are random.
    """
    if random:
        return "Nothing is measured: the encoder's weights are random; its figures say nothing of a trained model."
    raw = gaps.get(Role.TARGET, {"value": None})
    if raw["value"] is None:
        return "Nothing is measured: no target row could be used; the counts by status say why."
    on_target = f"{said.before} {points(raw)} on target rows"
    if corrected is None or corrected["value"] is None:
        return (
            f"Memorization is not separated from knowledge: {on_target}, but without unseen rows this raw gap also "
            "contains whatever the encoder knows better than the reference."
        )
    found = (
        f"the corrected gap is {points(corrected)} ({corrected['n_used']} rows, {100 * level:g} % interval): "
        f"{on_target}{said.between} {points(gaps[Role.UNSEEN])} on rows it never saw"
    )
    if corrected["low"] > 0:
        return f"Memorization is shown: {found}."
    if corrected["high"] < 0:
        return (
            f"No memorization is shown: {found}; below zero, target and unseen rows differ in something else than "
            "having been seen."
        )
    return f"No memorization is shown: {found}; the interval holds zero."


def planted(
    scores: pl.DataFrame, means: Mapping[str, pl.Expr], level: float, resamples: int, seed: int
) -> dict[str, Any]:
    """How well the memorization score finds the rows that training repeated, and what each group looks like.

    Args:
        scores: target rows of one reference, joined with `planted_repeats` (more than 1: planted) and, where the data
            set tells it, `background`.
        means: further columns of the groups; what is averaged over the rows that could be used.
        level: of the interval.
        resamples: of the bootstrap, within the planted and within the other rows.
        seed: of the bootstrap.

    Returns:
        JSON-ready: `auroc`, and `groups` with rows, means and shares of the quadrants by background and planted.
    """
    scored = scores.filter(pl.col("memorization_score").is_not_null()).sort("id")
    values = scored["memorization_score"].to_numpy()
    repeated = (scored["planted_repeats"].fill_null(1) > 1).to_numpy()
    rng = provenance.rng(seed, "bootstrap/planted")
    value = metrics.auroc(values[repeated], values[~repeated])
    samples = _resampled_auroc(values[repeated], values[~repeated], resamples, rng)
    draws = Draws(np.array([value]), samples[:, None], len(scored), len(scores) - len(scored))
    keys = [column for column in ("background", "planted") if column == "planted" or column in scores.columns]
    groups = (
        scores.filter(pl.col("status") == Status.OK)
        .with_columns(planted=pl.col("planted_repeats").fill_null(1) > 1)
        .group_by(keys)
        .agg(
            rows=pl.len(),
            **{name: expression.mean() for name, expression in means.items()},
            **{name: (pl.col("quadrant") == name).mean() for name in metrics.QUADRANTS},
        )
        .sort(keys)
    )
    return {"auroc": draws.estimates(level)[0].as_dict(), "groups": groups.to_dicts()}


def _resampled_auroc(
    positive: FloatArray, negative: FloatArray, resamples: int, rng: np.random.Generator
) -> FloatArray:
    """`metrics.auroc` of resamples of both, shape (B,); the values are sorted once. One NaN where one is empty."""
    if not len(positive) or not len(negative):
        return np.array([np.nan])
    distinct, place = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    parts = place[: len(positive)], place[len(positive) :]
    found = np.empty(resamples)
    for row in range(resamples):
        above, below = (
            np.bincount(part[rng.integers(len(part), size=len(part))], minlength=len(distinct)) for part in parts
        )
        wins = above @ (np.cumsum(below) - below) + (above @ below) / 2
        found[row] = wins / (len(positive) * len(negative))
    return found
