"""Figures as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def percent(estimate: Mapping[str, Any] | None) -> str:
    """An estimate as a percentage with its interval; a dash where there is none.

    >>> percent({"value": 0.25, "low": 0.2, "high": 0.3})
    '25.0 [20.0, 30.0]'
    """
    if estimate is None or estimate["value"] is None:
        return "–"
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def coefficient(estimate: Mapping[str, Any] | None) -> str:
    """An estimate in its own unit with its interval; a dash where there is none.

    >>> coefficient({"value": 0.25, "low": -0.001, "high": 0.3})
    '0.25 [0.00, 0.30]'
    """
    if estimate is None or estimate["value"] is None:
        return "–"
    value, low, high = (f"{round(estimate[key], 2) + 0.0:.2f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def rows_behind(target: Mapping[str, Any], unseen: Mapping[str, Any] | None) -> str:
    """Rows used, target + unseen, and how many more could not be.

    >>> rows_behind({"n_used": 8, "n_excluded": 1}, {"n_used": 5, "n_excluded": 2})
    '8 + 5 (3 excluded)'
    """
    gaps = [gap for gap in (target, unseen) if gap is not None]
    excluded = sum(gap["n_excluded"] for gap in gaps)
    used = " + ".join(str(gap["n_used"]) for gap in gaps)
    return f"{used} ({excluded} excluded)" if excluded else used
