"""What an examination finds: how bad it is, how often, where, and the way out; in the terminal and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
"""Stands in the JSON file as `schema`: raise it when a key or its meaning changes."""
EXAMPLES = 5
LONGEST_EXAMPLE = 200
"""Characters."""
WIDTH = 120
"""Columns assumed where the output is a file."""


class Severity(StrEnum):
    """How bad a finding is."""

    FAULT = "fault"
    """Something is wrong: a run would fail, would lose what it was given, or its figures could not be believed."""
    WARNING = "warning"
    """Worth a look: it may be meant."""
    NOTE = "note"
    """Nothing is wrong; this is how the instrument takes it."""


STYLES = {Severity.FAULT: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: how bad it is.
        kind: a short name that programs can rely on, e.g. "image_not_decoded".
        sentence: what is wrong.
        way_out: what to do; empty where the sentence says it, or nothing needs to be done.
        count: how often it occurs.
        examples: up to `EXAMPLES` places.
    """

    severity: Severity
    kind: str
    sentence: str
    way_out: str
    count: int
    examples: tuple[str, ...]


@dataclass
class Examination:
    """What was looked at, what it is like, and what was found.

    Attributes:
        subject: "data", "model", "run" or "environment".
        of: which one.
        facts: what it is like, by name, in the order to be shown; ready for JSON.
        findings: in the order found.
    """

    subject: str
    of: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(
        self,
        severity: Severity,
        kind: str,
        sentence: str,
        way_out: str = "",
        examples: Sequence[str] | None = None,
        count: int | None = None,
    ) -> None:
        """Note a finding; nothing is noted where there are examples to be named and there is none.

        Args:
            severity: how bad it is.
            kind: see `Finding`.
            sentence: see `Finding`.
            way_out: see `Finding`.
            examples: all places; None where the finding has none.
            count: where it is not the number of examples, or 1.
        """
        if examples is not None and not examples:
            return
        places = examples or ()
        shown = tuple(printable(text) for text in places[:EXAMPLES])
        self.findings.append(Finding(severity, kind, sentence, way_out, count or len(places) or 1, shown))

    def fault(self, kind: str, sentence: str, way_out: str = "", examples: Sequence[str] | None = None) -> None:
        """Note a fault; see `add`."""
        self.add(Severity.FAULT, kind, sentence, way_out, examples)

    def warn(self, kind: str, sentence: str, way_out: str = "", examples: Sequence[str] | None = None) -> None:
        """Note a warning; see `add`."""
        self.add(Severity.WARNING, kind, sentence, way_out, examples)

    def note(self, kind: str, sentence: str, way_out: str = "", examples: Sequence[str] | None = None) -> None:
        """Note how the instrument takes something; see `add`."""
        self.add(Severity.NOTE, kind, sentence, way_out, examples)


def printable(text: str) -> str:
    r"""Text from a file in one line: a name may hold line breaks, or codes that move the cursor.

    >>> printable("two\nlines")
    'two\\nlines'
    """
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return shown if len(shown) <= LONGEST_EXAMPLE else f"{shown[: LONGEST_EXAMPLE - 1]}…"


def counted(examinations: Sequence[Examination]) -> dict[str, int]:
    """How many findings there are of each severity."""
    found = Counter(finding.severity for one in examinations for finding in one.findings)
    return {str(severity): found[severity] for severity in Severity}


def as_json(examinations: Sequence[Examination], versions: Mapping[str, str]) -> dict[str, Any]:
    """All that was found, ready for JSON."""
    counts = counted(examinations)
    return {
        "schema": SCHEMA,
        "passed": not counts[Severity.FAULT],
        "counts": counts,
        "versions": dict(versions),
        "examinations": [asdict(one) for one in examinations],
    }


def show(examinations: Sequence[Examination], console: Console) -> None:
    """Print what was found, and how much of it in the last line."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for one in examinations:
        console.print(f"\n{one.subject}: {printable(one.of)}", style="bold", markup=False, highlight=False)
        _show_facts(one, console)
        _show_findings(one, console)
    counts = counted(examinations)
    told = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    console.print(
        f"\n{'All well' if not counts[Severity.FAULT] else 'Not well'}: {told}.", style="bold", highlight=False
    )


def _show_facts(one: Examination, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    if one.facts:
        table = Table.grid(padding=(0, 2))
        for name, value in one.facts.items():
            table.add_row(Text(f"  {name}", style="dim"), Text(printable(_told(value))))
        console.print(table)


def _told(value: object) -> str:
    """A fact in words.

    >>> _told({"ok": 3, "too_small": 1})
    'ok 3, too_small 1'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(item)}" for name, item in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _show_findings(one: Examination, console: Console) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    if not one.findings:
        return
    table = Table("", Column("what", ratio=3), Column("count", justify="right"), Column("way out", ratio=2), box=None)
    for finding in sorted(one.findings, key=lambda item: list(Severity).index(item.severity)):
        what = Text(printable_sentence(finding.sentence))
        for example in finding.examples:
            what.append(f"\n  {example}", style="dim")
        style = STYLES[finding.severity]
        way_out = Text(printable_sentence(finding.way_out))
        table.add_row(Text(finding.severity, style=style), what, Text(f"{finding.count:,}"), way_out)
    console.print(table)


def printable_sentence(text: str) -> str:
    """A sentence of ours, of any length, that may quote a file."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)
