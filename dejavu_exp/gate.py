"""The release gate: whether a run's figures let a model through, by an end of the interval of its gap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from dejavu_exp.errors import ConfigError
from dejavu_exp.tables import PREDICTIONS

Figures: TypeAlias = Mapping[str, Any]

ENDS = {"high": "upper", "low": "lower"}


@dataclass(frozen=True)
class Thresholds:
    """How large a gap may be for a model to be released.

    Attributes:
        max_gap: of the first reference, all rows it can be told of (the widest confident share, top-1; for objects the
            first prediction); a share from 0 to 1. Null: there is no gate.
        bound: end of the interval that must not lie above it. "high" lets a model through only where the interval shows
            the gap to be that small; "low" stops it only where the interval shows the gap to be larger, so that too few
            rows let anything through.
        gap: "corrected" by unseen rows, or "raw", which also holds what the encoder merely knows better.
    """

    max_gap: float | None = None
    bound: Literal["high", "low"] = "high"
    gap: Literal["corrected", "raw"] = "corrected"

    def __post_init__(self) -> None:
        if self.max_gap is not None and not 0 <= self.max_gap <= 1:
            raise ConfigError(
                f"gate.max_gap={self.max_gap}: is a share of rows and must lie between 0 and 1; 5 points are 0.05. "
                "null sets no gate."
            )
        if self.bound not in ENDS:
            raise ConfigError(f"gate.bound={self.bound}: must be high or low, an end of the interval.")
        if self.gap not in ("corrected", "raw"):
            raise ConfigError(f"gate.gap={self.gap}: must be corrected or raw.")


def check(figures: Figures, thresholds: Thresholds) -> dict[str, Any] | None:
    """Hold figures against thresholds. What is undefined does not pass, nor do random weights.

    Args:
        figures: what figures.json holds; `gate` itself is not read.
        thresholds: of the configuration.

    Returns:
        JSON-ready: `passed`, `reason` (one sentence) and `thresholds`; None where there is no gate.
    """
    if thresholds.max_gap is None:
        return None
    passed, reason = _judge(figures, thresholds, thresholds.max_gap)
    return {"passed": passed, "reason": reason, "thresholds": asdict(thresholds)}


def _judge(figures: Figures, thresholds: Thresholds, most: float) -> tuple[bool, str]:
    if figures["encoder"]["random"]:
        return False, "The encoder's weights are random, so nothing was measured."
    raw, corrected = headline_gaps(figures)
    found = corrected if thresholds.gap == "corrected" else raw
    if found is None or found[thresholds.bound] is None:
        return False, _undefined(thresholds)
    passed = bool(found[thresholds.bound] <= most)
    measure = "PRG" if figures["infers"] == "objects" else "gap"
    told = f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}] points"
    end = f"the interval's {ENDS[thresholds.bound]} end is {'not ' if passed else ''}above"
    return passed, (
        f"The {thresholds.gap} {measure} to {figures['headline']} is {told}, and {end} gate.max_gap={most:g} "
        f"({100 * most:g} points)."
    )


def _undefined(thresholds: Thresholds) -> str:
    """Why there is no figure, and the way out."""
    if thresholds.gap == "raw":
        return "The gap is undefined, for no target row could be used."
    return (
        "The corrected gap is undefined, for there are no usable unseen rows (or no target rows). Give the split "
        "unseen rows, or let the raw gap count: gate.gap=raw."
    )


def headline_gaps(figures: Figures) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The gap of the first reference on target rows, and the corrected one; None where there is none.

    Of a label run top-1 at the widest confident share, of an object run PRG of the first prediction.
    """
    found = figures["references"][figures["headline"]]
    target = found["roles"].get("target", {})
    if figures["infers"] == "objects":
        # The order of keys in figures.json says nothing.
        first = (figures["run"]["config"].get("scoring", {}).get("predictions") or PREDICTIONS)[0]
        return target.get(first, {}).get("gap"), found.get("corrected", {}).get(first, {}).get("gap")
    by_share = target.get("top1", {})
    widest = max(by_share, key=float, default="")
    return by_share.get(widest, {}).get("gap"), found.get("corrected_gap", {}).get("top1", {}).get(widest)
