"""Does the conclusion hold with other choices? `python -m dejavu_exp.sensitivity [OVERRIDES] [--vary KEY=VALUES]`.

The chosen configuration is measured, and then variations of it that differ in one setting each. All share the cache, so
that only what a setting changes is computed again. Other confident shares, other tops and other references stand in the
figures of the chosen run and need no run of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from dejavu_exp import cells, config
from dejavu_exp.cells import State, Status
from dejavu_exp.errors import ConfigError, DejavuError
from dejavu_exp.report.kinds import KINDS
from dejavu_exp.report.sensitive import Holds, Outcome, Sensitivity

Row: TypeAlias = Mapping[str, Any]
"""A row of a comparison, see `compare.gather`."""

OUT = Path("outputs/sensitivity")
LOG = "dejavu_exp.log"
SHORTENED = ("tracking=none", "utility=none")
"""What a variation leaves out unless asked for: it says nothing of the gap."""
LONGEST_NAME = 60
"""Characters of a setting in a folder's name."""
GAPS = {"gap": "gap", "unseen": "gap_unseen", "corrected": "corrected_gap"}
"""Estimates of an outcome, and where a comparison has them."""
READINGS = {"reference": "reference", "top": "predictions", "surest": "surest rows"}
"""Columns of a comparison that tell the rows of one run apart, and what is said of them."""


@dataclass(frozen=True)
class Axis:
    """A setting that is varied where the chosen configuration has it.

    Attributes:
        key: dotted; `{reference}` stands for the first reference.
        values: tried as they are. Those that the chosen parts do not take are left out.
        factors: multiples of the chosen number that are tried; a whole number stays one, of at least 1.
    """

    key: str
    values: tuple[str | int, ...] = ()
    factors: tuple[float, ...] = ()

    def tried(self, chosen: object) -> list[str]:
        """The values beside the chosen one, as written on a command line."""
        found: list[str | int | float] = list(self.values)
        if isinstance(chosen, int | float) and not isinstance(chosen, bool):
            scaled = [factor * chosen for factor in self.factors]
            found += [max(1, round(value)) for value in scaled] if isinstance(chosen, int) else scaled
        texts = dict.fromkeys(f"{value:.6g}" if isinstance(value, float) else str(value) for value in found)
        return [text for text in texts if text != str(chosen)]


GRID = (
    Axis("probe.k", factors=(0.1, 0.5, 2)),
    Axis("probe.metric", values=("l2", "cosine")),
    Axis("probe.ties", values=("nearest", "lowest_label")),
    Axis("probe.query.compat", values=("corrected", "authors")),
    Axis("probe.query.min_side_px", factors=(0.5, 2)),
    Axis("probe.query.fraction", factors=(2 / 3, 4 / 3)),
    Axis("probe.query.corner", values=("top_left", "bottom_left")),
    Axis("probe.query.choose", values=("first", "random", "all")),
    Axis("model.layer", values=("backbone", "projector", 0, 1, 2, 3)),
    Axis("model.output", values=("features", "logits", "probabilities")),
    Axis("tagger.min_score", factors=(0.5, 2)),
    Axis("references.{reference}.top_tags", factors=(0.2, 0.6, 2)),
    Axis("references.{reference}.smoothing", factors=(0.1, 10)),
    Axis("leaks.action", values=("report", "exclude")),
    Axis("scoring.adjust", values=("none", "weight", "match")),
    Axis("scoring.cluster", values=("row", "label")),
)
"""What is varied unless `--vary` says otherwise."""


@dataclass(frozen=True)
class Variation:
    """A configuration that is measured.

    Attributes:
        setting: what it changes, a key or a group; empty for the chosen configuration.
        value: of the setting.
        chosen: its value in the chosen configuration, where that is one value.
        overrides: that make the configuration.
        folder: of its run.
        resolved: the configuration, without `run`.
    """

    setting: str
    value: str
    chosen: str
    overrides: tuple[str, ...]
    folder: Path
    resolved: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As on the command line, or in words where the figures of the chosen run have it."""
        if not self.setting:
            return "as chosen"
        return f"{self.setting}: {self.value}" if self.setting in READINGS.values() else f"{self.setting}={self.value}"


def plan(
    overrides: Sequence[str], asked: Sequence[str], out: Path, *, only: bool = False
) -> tuple[Variation, list[Variation]]:
    """The chosen configuration, and its variations: those of `GRID`, then those asked for; each once.

    Args:
        overrides: that make the chosen configuration.
        asked: settings with values, such as "probe.k=10,50"; each replaces what `GRID` has for its key, and no value
            ("probe.k=") leaves the key as chosen.
        out: gets a folder for the chosen configuration, which gets one for each variation.
        only: vary nothing else than `asked`.

    Raises:
        ConfigError: the chosen configuration, or a value that was asked for, cannot work.
    """
    resolved, name = config.compose([*SHORTENED, *overrides])
    resolved.pop("run")
    config.build(resolved)
    vary = partial(_vary, overrides=tuple(overrides), folder=out / name, resolved=resolved)
    chosen = Variation("", "", "", tuple(overrides), out / name / "chosen", resolved)
    wanted: dict[str, list[str]] = {}
    for key, values in map(_parsed, asked):
        wanted[key] = [*wanted.get(key, []), *values]
    found = []
    for key, values in ({} if only else grid(resolved)).items():
        # What the chosen parts cannot take is no variation of theirs.
        for value in () if key in wanted else values:
            with contextlib.suppress(ConfigError):
                found.append(vary(key, value))
    found += [vary(key, value) for key, values in wanted.items() for value in values]
    different = {config.content_hash(_first_alone(resolved)): chosen}
    for variation in found:
        different.setdefault(config.content_hash(variation.resolved), variation)
    return chosen, [variation for variation in different.values() if variation is not chosen]


def grid(resolved: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys of `GRID` that a configuration has, and the values to try."""
    reference = next(iter(resolved["references"]))
    values = {axis.key.format(reference=reference): axis for axis in GRID}
    return {key: axis.tried(value) for key, axis in values.items() if (value := _value(resolved, key)) is not None}


def _first_alone(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Without the other references, which stand in the figures of the chosen run."""
    first = next(iter(resolved["references"]))
    return {**resolved, "references": {first: resolved["references"][first]}}


def _value(resolved: Mapping[str, Any], key: str) -> object:
    """What stands at a dotted key; None where nothing does."""
    found: object = resolved
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _parsed(text: str) -> tuple[str, list[str]]:
    """A setting and its values, in the grammar of a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, values = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--vary {text}: expected a setting and its values, such as probe.k=10,50.")
    if not values:
        return key, []
    try:
        found = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"--vary {text}: {error}") from error
    return key, list(found.sweep_string_iterator()) if found.is_sweep_override() else [values]


def _vary(key: str, value: str, overrides: tuple[str, ...], folder: Path, resolved: Mapping[str, Any]) -> Variation:
    """The chosen configuration with another value, built once so that one that cannot work is found here."""
    given = (*overrides, f"{key}={value}")
    changed, _ = config.compose([*SHORTENED, *given])
    changed.pop("run")
    others = list(changed["references"])[1:]
    changed = _first_alone(changed)
    config.build(changed)
    slug = re.sub(r"[^A-Za-z0-9._=+-]+", "_", f"{key}={value}")[:LONGEST_NAME]
    chosen = _value(resolved, key)
    told = "" if chosen is None or isinstance(chosen, Mapping) else str(chosen)
    return Variation(
        key,
        value,
        told,
        (*given, *(f"~references.{other}" for other in others)),
        folder / f"{slug}-{config.content_hash(changed)}",
        changed,
    )


def measure(variation: Variation) -> None:
    """Run a variation; what it says goes into a log in its folder, beside all that a run leaves behind.

    Raises:
        DejavuError: it cannot be measured.
    """
    from dejavu_exp import launch, pipeline, ranks, stages

    folder, leads = variation.folder, launch.is_first_rank()
    given = (f"hydra.run.dir={folder}", *SHORTENED, *variation.overrides)
    status = Status.here(State.RUNNING, "dejavu_exp", given, False, folder / LOG)
    folder.mkdir(parents=True, exist_ok=True)

    def tell(found: Status) -> None:
        if leads:
            found.write(folder)

    tell(status)
    try:
        prepared = stages.Plan(**config.build(variation.resolved))
        with ranks.joined(prepared.trainer.device_count, prepared.trainer.cache) as lead:
            if lead:
                with (folder / LOG).open("w") as stream, contextlib.redirect_stdout(stream):
                    pipeline.run(prepared, folder, variation.resolved)
    except Exception as error:
        tell(status.ends(State.FAILED, f"{type(error).__name__}: {error}"))
        raise
    tell(status.ends(State.FINISHED))


def gather(chosen: Variation, variations: Sequence[Variation], failed: Mapping[str, str]) -> Sensitivity:
    """What came out of runs that have been measured.

    Args:
        chosen: the chosen configuration.
        variations: of it.
        failed: why some were not measured, by name.

    Raises:
        DataError: the figures of a run cannot be read.
    """
    from dejavu_exp import compare

    rows = compare.read(chosen.folder, chosen.name).rows
    found = [_outcome(chosen, rows[0], rows[0])]
    for one in variations:
        row = None if one.name in failed else compare.read(one.folder, one.name).rows[0]
        found.append(_outcome(one, rows[0], row, failed.get(one.name, "")))
    found += [_outcome(replace(chosen, **reading), rows[0], row) for reading, row in _readings(rows)]
    return Sensitivity(
        title=f"{rows[0]['encoder'].split(',')[0]} on {rows[0]['dataset']}",
        reference=rows[0]["reference"],
        compared=KINDS[rows[0]["infers"]].compared,
        corrected=rows[0]["corrected_gap"] is not None,
        random=rows[0]["random_weights"],
        level=chosen.resolved["scoring"].get("level", 0.95),
        outcomes=found,
        config=config.that_decides(chosen.resolved),
    )


def _outcome(of: Variation, chosen: Row, row: Row | None, reason: str = "") -> Outcome:
    """What a row says, of a variation or of the chosen run itself; None where it was not measured."""
    blank = Outcome(of.name, of.setting, of.value, of.chosen, str(of.folder), reason=reason)
    if row is None:
        return blank
    gaps: dict[str, Any] = {name: _estimate(row, column) for name, column in GAPS.items()}
    rests_on = "gap" if chosen["corrected_gap"] is None else "corrected_gap"
    holds = judge(_estimate(chosen, rests_on), _estimate(row, rests_on))
    if gaps == {name: _estimate(chosen, column) for name, column in GAPS.items()}:
        holds = Holds.NO_EFFECT if of.setting else Holds.CHOSEN
    retrained = row["trained_here"] and chosen["trained_here"] and row["weights"] != chosen["weights"]
    return replace(blank, holds=holds, retrained=retrained, **gaps)


def judge(chosen: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Holds:
    """Whether an estimate gives the same answer as the chosen one: above zero, or not.

    It is undecided where it is undefined, or where its interval holds zero but overlaps one that does not.

    >>> judge({"low": 0.1, "high": 0.3}, {"low": -0.1, "high": 0.2})
    <Holds.UNDECIDED: 'undecided'>
    >>> judge({"low": 0.1, "high": 0.3}, {"low": -0.1, "high": 0.05})
    <Holds.CHANGED: 'changed'>
    """
    if chosen is None or other is None or chosen["low"] is None or other["low"] is None:
        return Holds.UNDECIDED
    is_above, was_above = other["low"] > 0, chosen["low"] > 0
    if is_above == was_above:
        return Holds.SAME
    return Holds.UNDECIDED if was_above and other["high"] >= chosen["low"] else Holds.CHANGED


def _estimate(row: Row, column: str) -> dict[str, Any] | None:
    """The estimate that a row of a comparison holds in several columns."""
    if row[column] is None:
        return None
    return {"value": row[column], **{end: row[f"{column}_{end}"] for end in ("low", "high", "n_used", "n_excluded")}}


def _readings(rows: Sequence[Row]) -> Iterator[tuple[dict[str, Any], Row]]:
    """Rows of one run that differ from its first in one thing; what that is, as fields of a variation."""
    for column, setting in READINGS.items():
        for row in rows:
            if [key for key in READINGS if row[key] != rows[0][key]] == [column]:
                value, was = (f"{one[column]:g} %" if column == "surest" else one[column] for one in (row, rows[0]))
                yield {"setting": setting, "value": value, "chosen": was}, row


def run(overrides: Sequence[str], asked: Sequence[str], out: Path, *, only: bool) -> int:
    """Measure what is not measured yet, and write sensitivity.json and sensitivity.html.

    Args:
        overrides: that make the chosen configuration.
        asked: as `plan`.
        out: as `plan`.
        only: as `plan`.

    Returns:
        The exit status: 0, or with run.plan=true whether something is missing.
    """
    from rich.console import Console

    from dejavu_exp import launch, tables
    from dejavu_exp.report import sensitive

    leads = launch.is_first_rank()
    console = Console(quiet=not leads)
    options = config.compose([*SHORTENED, *overrides])[0]["run"]
    chosen, variations = plan(overrides, asked, out, only=only)
    everything = [chosen, *variations]
    if options["plan"]:
        return _survey(everything)
    # Looked at once: the ranks of a run must all do the same.
    done = [not options["again"] and cells.is_finished(one.folder, one.resolved) for one in everything]
    failed = {}
    for number, (one, is_done) in enumerate(zip(everything, done, strict=True), start=1):
        told = "measured before" if is_done else "measuring"
        console.print(f"{number}/{len(everything)} {one.name}: {told}", highlight=False, markup=False)
        if is_done:
            continue
        try:
            measure(one)
        except DejavuError as error:
            if one is chosen:
                raise
            failed[one.name] = str(error)
    if leads:
        found = gather(chosen, variations, failed)
        page = chosen.folder.parent / "sensitivity.html"
        tables.write_json(found.as_dict(), page.with_suffix(".json"))
        tables.write_text(sensitive.html(found), page)
        sensitive.show(found, console)
        console.print(str(page), highlight=False, markup=False, soft_wrap=True)
    return 0


def _survey(variations: Sequence[Variation]) -> int:
    """What each would need and cost; 1 where something is missing, else 0."""
    from dejavu_exp import launch

    status = 0
    for one in variations:
        sys.stdout.write(f"\n{one.name}\n")
        status = max(status, launch.survey([one.resolved]))
    return status


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dejavu_exp.sensitivity",
        description="Measures a configuration and variations of it, one setting at a time, and says whether the "
        "conclusion holds.",
        epilog=f"Varied by default, where the configuration has it: {', '.join(axis.key for axis in GRID)}; and, read "
        "from the chosen run, confident shares (scoring.fractions), tops or predictions, and references. Finished "
        "runs are not repeated (run.again=true: all are); run.plan=true says what is missing and what it will cost. "
        "Weights & Biases and utility are off unless given.",
    )
    parser.add_argument(
        "overrides", metavar="OVERRIDE", nargs="*", help="as python -m dejavu_exp takes them, e.g. model=clip_vitb32"
    )
    parser.add_argument(
        "--vary", metavar="KEY=VALUES", action="append", default=[],
        help="values of a setting or a group, e.g. probe.k=10,50 or tagger=open_clip,timm_classifier; in place of the "
        "default ones; none (probe.k=) leaves it alone; may be given several times",
    )  # fmt: skip
    parser.add_argument("--only", action="store_true", help="vary only what --vary names")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=OUT, help=f"gets a folder for each configuration; {OUT}"
    )
    asked = parser.parse_intermixed_args(arguments)
    with config.spoken_errors():
        sys.exit(run(asked.overrides, asked.vary, asked.out, only=asked.only))


if __name__ == "__main__":
    main()
