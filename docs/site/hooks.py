"""What MkDocs does beyond its configuration: the README as the first page, the reference made from the code, formulas.

Formulas become MathML while the pages are built, so that no page loads a script from elsewhere.
"""

from __future__ import annotations

import html
import re

import latex2mathml.converter
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made: the README, and the reference."""
    made = {f"reference/{name}": text for name, text in reference.pages().items()}
    made["index.md"] = from_readme((reference.ROOT / "README.md").read_text(encoding="utf-8"))
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML."""
    return FORMULA.sub(_mathml, content)


def from_readme(text: str) -> str:
    """The README as a page: its links start in `docs/`; what lies elsewhere is named and not linked."""
    inside = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|[\w/-]+\.(?:md|svg|png)(?:#|\)))[^)]*\)", r"\1", inside)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    return str(latex2mathml.converter.convert(html.unescape(found[2]).strip(), display=display))
