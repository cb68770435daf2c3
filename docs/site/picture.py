"""The picture of the README from a finished run: `python docs/site/picture.py RUN_FOLDER` writes docs/gaps.svg."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from dejavu_exp.report import labels, plots

DOCS = Path(__file__).resolve().parents[1]
FONT = "text { font-family: system-ui, sans-serif; }"


def picture(figures: dict[str, object], style_sheet: str) -> str:
    """The plot of gaps as a file of its own, light or dark as the reader's screen is.

    Args:
        figures: what figures.json of a label run holds.
        style_sheet: of the report's pages; its colours are taken.
    """
    references = figures["references"]
    if not isinstance(references, dict):
        raise TypeError("figures.json has no references")
    gaps = {name: labels.gaps_of(figures, name) for name in references}
    drawn = str(plots.gaps(gaps, "percentage points, all rows, 95 % intervals"))
    light, dark = (";".join(re.findall(r"--[\w-]+: #[0-9a-f]{6}", part)) for part in _roots(style_sheet))
    style = f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }} {FONT}</style>"
    opened = re.sub(r"(<svg[^>]*>)", rf"\1{style}", drawn, count=1)
    return opened + "\n"


def _roots(style_sheet: str) -> tuple[str, str]:
    """The rules of :root for light and for dark screens."""
    light, dark = re.findall(r":root\s*\{(.*?)\}", style_sheet, flags=re.DOTALL)[:2]
    return light, dark


if __name__ == "__main__":
    sheet = Path(labels.__file__).parent / "templates" / "page.css"
    read = json.loads((Path(sys.argv[1]) / "figures.json").read_text(encoding="utf-8"))
    (DOCS / "gaps.svg").write_text(picture(read, sheet.read_text(encoding="utf-8")), encoding="utf-8")
