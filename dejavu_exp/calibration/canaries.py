"""Canaries: target rows that an encoder's own training repeats, and how much of that is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dejavu_exp import pipeline, provenance, statistics
from dejavu_exp.calibration.planted import FALSE_POSITIVE_RATE, Roc
from dejavu_exp.datasets.base import Dataset, Manifest
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.splits import Split
from dejavu_exp.stages import Plan
from dejavu_exp.tables import Role, Status
from dejavu_exp.training import TrainedHere


@dataclass(frozen=True)
class Canaries:
    """A data set some of whose target rows are to be repeated in training, and no others.

    Attributes:
        dataset: any data set.
        split: deals its roles, so that target rows are known.
        seed: of the split and of the choice among target rows.
        share: of the target rows that are repeated, 0 to 1.
        repeats: how often, counts above 1; each for an equal part of these rows.
    """

    dataset: Dataset
    split: Split
    seed: int
    share: float
    repeats: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "repeats", tuple(self.repeats))
        if not 0 < self.share < 1:
            raise ConfigError(f"--share={self.share}: must lie between 0 and 1, e.g. 0.3.")
        if not self.repeats or min(self.repeats) < 2 or len(set(self.repeats)) < len(self.repeats):
            raise ConfigError(
                f"--canaries={','.join(map(str, self.repeats))}: must be different whole numbers above 1, e.g. 2,8,32."
            )

    def manifest(self) -> Manifest:
        """The data set's manifest; column `planted_repeats` is the canaries' number of repeats, and 1 for all others.

        Raises:
            DataError: there are fewer canaries than numbers of repeats; or as the data set's own.
        """
        plain = self.dataset.manifest()
        roles = self.split.assign(plain.rows, self.seed)
        target = roles.filter(pl.col("role") == Role.TARGET)["id"].to_list()
        order = sorted(target, key=lambda row_id: provenance.hash_order(self.seed, "canaries", row_id))
        chosen = order[: int(self.share * len(order))]
        if len(chosen) < len(self.repeats):
            raise DataError(
                f"{len(chosen)} of {len(target)} target rows would be canaries, fewer than there are numbers of "
                f"repeats ({len(self.repeats)}). Raise --share or split.target, or name fewer numbers."
            )
        repeats = [self.repeats[place % len(self.repeats)] for place in range(len(chosen))]
        count = pl.col("id").replace_strict(chosen, repeats, default=1, return_dtype=pl.Int64)
        return replace(plain, rows=plain.rows.with_columns(planted_repeats=count))


def with_canaries(resolved: Mapping[str, Any], share: float, repeats: Sequence[int]) -> dict[str, Any]:
    """A resolved configuration whose data set has canaries; it can be run again as any other."""
    target = f"{Canaries.__module__}.{Canaries.__name__}"
    parts = {key: resolved[key] for key in ("dataset", "split", "seed")}
    return {**resolved, "dataset": {"_target_": target, **parts, "share": share, "repeats": list(repeats)}}


def measure(plan: Plan, folder: Path, resolved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, Roc]]:
    """Train the encoder with the canaries, measure it as an ordinary run does, and look at the canaries.

    Args:
        plan: of `with_canaries`.
        folder: gets all that a run writes.
        resolved: the configuration the plan was built from.

    Returns:
        What was run and what `by_repeats` finds, JSON-ready; the ROC of each number of repeats.

    Raises:
        ConfigError: the encoder is not trained here.
        DataError: no unseen row could be used.
    """
    if not isinstance(plan.model, TrainedHere):
        raise ConfigError(
            "canaries are planted by training, and the model is not trained here. Choose model=trained, shapes_resnet, "
            "clip_trained, or a model of your own with a recipe; or leave --canaries out."
        )
    facts = pipeline.run(plan, folder, resolved)
    scores = pl.read_parquet(folder / "scores.parquet").filter(pl.col("reference") == facts["headline"])
    repeats = plan.dataset.manifest().rows.select("id", "planted_repeats")
    rows, rocs = by_repeats(plan, scores, repeats)
    found = {
        "title": facts["title"],
        "reference": facts["headline"],
        "encoder": f"{facts['encoder']['description'].split(',')[0]}, {facts['encoder']['weights']}",
        "dataset": facts["dataset"],
        "level": plan.scoring.level,
        "false_discovery": plan.scoring.false_discovery,
        "repeats": rows,
    }
    return found, rocs


def by_repeats(plan: Plan, scores: pl.DataFrame, repeats: pl.DataFrame) -> tuple[list[dict[str, Any]], dict[int, Roc]]:
    """What is measured of the target rows of each number of repeats, against the unseen rows.

    Args:
        plan: the run.
        scores: of one reference, target and unseen rows.
        repeats: columns id and planted_repeats.

    Returns:
        For each number, 1 for rows that are no canaries: rows used; shares that encoder and reference have right; the
        corrected gap, an estimate; AUROC of the memorization score, and the share found at a false-positive rate of
        1 %, with its interval; the share listed. And the ROC of each number.

    Raises:
        DataError: no unseen row could be used.
    """
    scores = scores.join(repeats, on="id", how="left", validate="1:1")
    usable = pl.col("status") == Status.OK
    unseen = scores.filter(pl.col("role") == Role.UNSEEN)
    if not len(unseen.filter(usable)):
        raise DataError("canaries are told from rows that no encoder saw, and no unseen row could be used. Add some.")
    others = _scores(unseen.filter(usable))
    groups = dict(scores.filter(pl.col("role") == Role.TARGET).partition_by("planted_repeats", as_dict=True))
    result, rocs = [], {}
    for (count,), rows in sorted(groups.items()):
        used = rows.filter(usable)
        if not len(used):
            raise DataError(f"none of the {len(rows)} target rows repeated {count} times could be used. Raise --share.")
        figures = plan.scoring.figures(pl.concat([rows, unseen]).drop("planted_repeats"), rows.select("id"), plan.seed)
        rocs[count] = Roc.of(_scores(used), others)
        found = rocs[count].found_at(FALSE_POSITIVE_RATE)
        low, high = statistics.proportion(found, len(used), plan.scoring.level)
        result.append(
            {
                "repeats": count,
                "rows": len(used),
                "excluded": len(rows) - len(used),
                "unseen": len(others),
                "target_right": float(used["target_correct"].mean()),
                "reference_right": float(used["reference_correct"].mean()),
                "corrected_gap": corrected(figures),
                "auroc": rocs[count].area,
                "found": {"value": found, "low": low, "high": high},
                "listed": float((used["q_value"] <= plan.scoring.false_discovery).mean()),
            }
        )
    return result, rocs


def corrected(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The headline's corrected gap of a label run, or of an object run."""
    if "corrected_gap" in figures:
        by_percent: Mapping[str, Any] = figures["corrected_gap"]["top1"]
        return dict(by_percent[max(by_percent, key=float)])
    return dict(next(iter(figures["corrected"].values()))["gap"])


def _scores(rows: pl.DataFrame) -> np.ndarray[Any, np.dtype[np.float64]]:
    return rows["memorization_score"].fill_null(np.nan).to_numpy()
