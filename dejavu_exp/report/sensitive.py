"""Whether a conclusion holds with other choices, in the terminal and as one HTML file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dejavu_exp.report.html import environment
from dejavu_exp.report.wording import percent

WIDTH = 120
"""Columns assumed where the output is a file."""
MOST_NAMED = 5
"""Variations that the sentence names; the table has all."""
TICKS = 6


class Holds(StrEnum):
    """What a variation does to the conclusion."""

    CHOSEN = "chosen"
    SAME = "same"
    CHANGED = "changed"
    UNDECIDED = "undecided"
    NO_EFFECT = "no effect"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Outcome:
    """What one configuration gave.

    Attributes:
        name: what it changes, in a few words.
        setting: a key of the configuration, or what is read from the figures of the chosen run.
        value: of the setting.
        chosen: its value in the chosen configuration; empty where that is not one value.
        folder: of the run that the figures are from.
        holds: what becomes of the conclusion.
        gap: estimate on target rows, a share; None where it was not measured.
        unseen: the same on unseen rows; None without any.
        corrected: the difference of both; None without unseen rows.
        retrained: True where the setting also changes what the encoder is trained on, so that another was measured.
        reason: why it was not measured; otherwise empty.
    """

    name: str
    setting: str
    value: str
    chosen: str
    folder: str
    holds: Holds = Holds.NOT_MEASURED
    gap: Mapping[str, Any] | None = None
    unseen: Mapping[str, Any] | None = None
    corrected: Mapping[str, Any] | None = None
    retrained: bool = False
    reason: str = ""

    @property
    def word(self) -> str:
        """What becomes of the conclusion, as a table says it."""
        return f"{self.holds}, retrained" if self.retrained else str(self.holds)


@dataclass(frozen=True)
class Sensitivity:
    """A conclusion and what other choices make of it.

    Attributes:
        title: encoder and data set.
        reference: the first one.
        compared: what the gap is called: gap, or PRG where objects are inferred.
        corrected: True where the conclusion rests on the corrected gap, False where there are no unseen rows.
        random: True where the encoder's weights are random.
        level: of each interval.
        outcomes: the chosen configuration's first.
        config: the chosen configuration.
    """

    title: str
    reference: str
    compared: str
    corrected: bool
    random: bool
    level: float
    outcomes: Sequence[Outcome]
    config: Mapping[str, Any]

    def of(self, *kinds: Holds) -> list[Outcome]:
        """The outcomes of some kinds."""
        return [outcome for outcome in self.outcomes if outcome.holds in kinds]

    def figure(self, outcome: Outcome) -> Mapping[str, Any] | None:
        """The gap that the conclusion rests on."""
        return outcome.corrected if self.corrected else outcome.gap

    @property
    def rests_on(self) -> str:
        """The same in words."""
        return f"corrected {self.compared}" if self.corrected else self.compared

    @property
    def judged(self) -> list[Outcome]:
        """The variations that can tell whether the conclusion holds."""
        return self.of(Holds.SAME, Holds.CHANGED, Holds.UNDECIDED)

    @property
    def conclusion(self) -> str:
        """What the chosen configuration shows."""
        found = self.figure(self.outcomes[0])
        above = found is not None and found["low"] > 0
        if self.corrected:
            return "memorization is shown" if above else "no memorization is shown"
        return f"the raw {self.compared} is {'' if above else 'not '}shown to be above zero"

    @property
    def sentence(self) -> str:
        """Whether the conclusion holds, and with what it does not."""
        if self.random:
            return "Nothing is measured: the encoder's weights are random."
        if not self.judged:
            return f"The conclusion ({self.conclusion}) was not put to the test: no variation changes a figure."
        parts = [f"holds in {len(self.of(Holds.SAME))} of {len(self.judged)} variations"]
        for kind, before in (
            (Holds.CHANGED, "it changes with"),
            (Holds.UNDECIDED, "the interval is too wide to tell with"),
            (Holds.NOT_MEASURED, "not measured were"),
        ):
            if named := self.of(kind):
                parts.append(f"{before} {_named(named)}")
        if same := self.of(Holds.NO_EFFECT):
            parts.append(f"{len(same)} more change no figure and are not counted")
        return f"The conclusion ({self.conclusion}) {'; '.join(parts)}."

    @property
    def warnings(self) -> list[str]:
        """How not to read it."""
        count, tail = len(self.judged) + 1, (1 - self.level) / 2
        told = [
            f"{count} intervals of {100 * self.level:g} % each were looked at, on the same rows. Where nothing is "
            f"memorized, each lies above zero in about {100 * tail:.2g} % of measurements, so {count * tail:.1f} of "
            "them on average, and several at once. Do not choose a setting by this table, and do not report the "
            "largest gap.",
            "Same: the interval gives the same answer as the chosen one, above zero or not. Undecided: it holds zero "
            "but overlaps the chosen one, so it is too wide to tell. Changed: any other answer. A conclusion that "
            "holds, holds for these choices; other images, splits or training runs were not tried.",
        ]
        if retrained := [outcome for outcome in self.outcomes if outcome.retrained]:
            told.append(
                f"With {_named(retrained)} the encoder was trained anew, for the setting changes what it is trained "
                "on: the difference may be that of two trainings."
            )
        if self.conclusion.startswith("no "):
            told.append(
                "That no memorization is shown does not mean that there is none: the report of the chosen run tells "
                "the smallest gap that so many rows can show."
            )
        if not self.corrected:
            raw = (
                "There are no unseen rows: a raw gap above zero also contains what the encoder merely knows better "
                "than the reference, so it shows no memorization."
            )
            return [raw, *told]
        return told

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "title": self.title,
            "sentence": self.sentence,
            "conclusion": self.conclusion,
            "reference": self.reference,
            "rests_on": self.rests_on,
            "random": self.random,
            "level": self.level,
            "counts": {str(kind): len(self.of(kind)) for kind in Holds},
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "warnings": self.warnings,
            "config": dict(self.config),
        }


def _named(outcomes: Sequence[Outcome]) -> str:
    names = [outcome.name for outcome in outcomes[:MOST_NAMED]]
    more = len(outcomes) - MOST_NAMED
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def show(found: Sensitivity, console: Console | None = None) -> None:
    """Print the table and the sentence."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    of = f"{found.compared} to {escape(found.reference)}, points [{100 * found.level:g} % interval]"
    title = f"{escape(found.title)}: {of}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("variation", overflow="fold")
    for column in (found.compared, f"corrected {found.compared}"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("conclusion")
    colours = {Holds.CHANGED: "[bold red]", Holds.UNDECIDED: "[yellow]", Holds.NOT_MEASURED: "[yellow]"}
    for outcome in found.outcomes:
        holds = f"{colours.get(outcome.holds, '[default]')}{outcome.word}[/]"
        table.add_row(escape(outcome.name), percent(outcome.gap), percent(outcome.corrected), holds)
    console.print(table)
    for outcome in found.of(Holds.NOT_MEASURED):
        console.print(f"{escape(outcome.name)}: {escape(outcome.reason)}", highlight=False, soft_wrap=True)
    for warning in found.warnings:
        console.print(f"[yellow]{escape(warning)}[/]", highlight=False)
    console.print(f"\n[bold]{escape(found.sentence)}[/]", highlight=False)


def html(found: Sensitivity) -> str:
    """The whole page: a forest plot of the gap by variation."""
    scale = Scale.of([figure for outcome in found.outcomes if (figure := found.figure(outcome))])
    return (
        environment()
        .get_template("sensitivity.html")
        .render(
            s=found,
            scale=scale,
            figure=found.figure,
            config=json.dumps(found.config, indent=2, default=str),
            level=100 * found.level,
        )
    )


@dataclass(frozen=True)
class Scale:
    """The axis of the forest plot.

    Attributes:
        low: of the axis, a share.
        high: of the axis.
        step: between ticks.
    """

    low: float
    high: float
    step: float

    @classmethod
    def of(cls, estimates: Sequence[Mapping[str, Any]]) -> Scale:
        """Wide enough for all intervals and zero, with ticks at round numbers."""
        ends = [value for one in estimates for value in (one["low"], one["value"], one["high"]) if value is not None]
        least, most = min(0.0, *ends, 0.0), max(0.0, *ends, 0.01)
        raw = (most - least) / TICKS
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
        return cls(math.floor(least / step) * step, math.ceil(most / step) * step, step)

    def place(self, value: float) -> str:
        """Where a value stands, in % of the width; the borders stay free for the marks."""
        return f"{6 + 88 * (value - self.low) / (self.high - self.low):.2f}%"

    @property
    def ticks(self) -> list[float]:
        """Where the axis is labelled."""
        count = round((self.high - self.low) / self.step)
        return [self.low + number * self.step for number in range(count + 1)]
