"""Figures as text."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
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


def p_value(value: float | None) -> str:
    """A probability with two digits that count; a dash where there is none.

    >>> p_value(0.000123), p_value(0.5), p_value(1.0), p_value(None)
    ('0.00012', '0.50', '1.0', '–')
    """
    if value is None:
        return "–"
    return f"{value:.1e}" if 0 < value < 1e-5 else f"{value:#.2g}"


def plain(value: Any) -> str:  # noqa: ANN401
    """A number, a claim or a text in a cell; a dash where there is none.

    >>> plain(12345), plain(0.123456), plain(True), plain(None)
    ('12345', '0.123456', 'yes', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown_cell(text: str) -> str:
    """Text that cannot break out of a Markdown table or bring tags along.

    >>> markdown_cell("a|b <i>")
    'a&#124;b &lt;i&gt;'
    """
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table; their keys are the heading."""
    if not rows:
        return "Nothing."
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(markdown_cell(cell) for cell in line)} |" for line in lines)
