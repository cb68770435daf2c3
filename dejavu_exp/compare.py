"""Many run folders to one comparison: `python -m dejavu_exp.compare DIR [DIR...] [--out FOLDER]`.

Of each run figures.json is read, and scores.parquet for paired tests between runs. A run that cannot stand beside the
others (killed, unreadable, of another version or of other data, or repeated) is listed with the reason and not merged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl

from dejavu_exp import config, metrics, provenance, statistics, tables, tracking
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.report import compared
from dejavu_exp.report.compared import Comparison, Skipped

Json: TypeAlias = Any
"""What a JSON file holds."""

RUN_FILES = ("config.yaml", "figures.json")
NOT_RUNS = ("cache", "wandb")
NO_INFLUENCE = ("gallery", "gate", "hydra", *(".".join(key) for key in config.NO_INFLUENCE))
"""Keys of a configuration that change no figure, with all below them."""
ENDS = ("low", "high", "n_used", "n_excluded")
HASH_DIGITS = 8
MOST_TESTED = 28
"""Pairs of runs that are tested, the most similar configurations first: all pairs of 8 runs."""
PERMUTATIONS = 9999

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a comparison takes from one figures.json.

    Attributes:
        name: the folder, relative to what was asked for.
        folder: the folder.
        created: when the run ended, ISO 8601 in UTC.
        data_hash: of the manifest measured.
        config: dotted keys of the resolved configuration and their values.
        rows: rows of the comparison, without the settings.
    """

    name: str
    folder: Path
    created: str
    data_hash: str
    config: Mapping[str, Json]
    rows: Sequence[Mapping[str, Json]]


def compare(folders: Sequence[Path], out: Path) -> Comparison:
    """Compare all runs below some folders and write the comparison down.

    Args:
        folders: each is a run folder or holds some, at any depth.
        out: gets comparison.parquet, comparison.csv, comparison.md, comparison.html and tests.parquet; made where it is
            missing.

    Raises:
        ConfigError: a folder does not exist or holds no run, or `out` is a file.
        DataError: no run can be used, or the files cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file. Give the folder to write to.")
    comparison = gather(folders)
    html, markdown, csv, parquet = (out / f"comparison.{kind}" for kind in ("html", "md", "csv", "parquet"))
    tests = out / "tests.parquet"
    tables.write(comparison.table, parquet, {"settings": comparison.settings})
    tables.write(comparison.tests, tests, {"permutations": PERMUTATIONS})
    with tables.whole(csv) as partial:
        comparison.table.write_csv(partial)
    tables.write_text(compared.markdown(comparison), markdown)
    tables.write_text(compared.html(comparison), html)
    return replace(comparison, files=(html, markdown, csv, parquet, tests))


def gather(folders: Sequence[Path]) -> Comparison:
    """Compare all runs below some folders; nothing is written.

    Returns:
        The table, one row per run, reference, top and confident share; and what was left out. Shares of rows are
        fractions, `surest` is in percent. Of an object run (column `infers`) `top` is the prediction, all rows count,
        accuracies are mean recalls and gaps are PRG. Quadrant shares, the planted AUROC, seconds and utility do not
        depend on `top` and `surest` and are repeated: the quadrants are those of all usable target rows, of a label run
        top-1, of an object run of the headline's prediction.

    Raises:
        ConfigError: a folder does not exist or holds no run.
        DataError: no run can be used.
    """
    found, skipped = find(folders)
    runs = []
    for folder, name in found.items():
        try:
            runs.append(read(folder, name))
        except DataError as error:
            skipped.append(Skipped(name, str(error)))
    runs, unlike = select(runs)
    skipped = sorted([*skipped, *unlike], key=lambda item: _natural(item.run))
    if not runs:
        reasons = "\n".join(f"  {item.run}: {item.reason}" for item in skipped)
        raise DataError(f"none of the {len(found)} run folders can be used:\n{reasons}")
    table, settings = merge(runs)
    return Comparison(table, tuple(settings), tuple(skipped), tests=paired_tests(runs, settings))


def find(folders: Sequence[Path]) -> tuple[dict[Path, str], list[Skipped]]:
    """All run folders below some folders, and how to call them; each once, "run 2" before "run 10".

    Hidden folders, caches and W&B's folders are not looked into, nor is what lies inside a run folder.

    Returns:
        Run folders with names, and the folders that could not be listed.
    """
    base = _base(folders)
    found, unlisted = [], []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder. Give folders that hold runs, such as outputs/runs.")
        errors: list[OSError] = []
        below = list(_run_folders(folder, errors))
        if not below and not errors:
            raise ConfigError(
                f"{folder}: no run folder below it; one has {' or '.join(RUN_FILES)} in it. "
                "Give folders that hold runs, such as outputs/runs."
            )
        found += below
        unlisted += [
            Skipped(_name(Path(error.filename), base), f"cannot be listed: {error.strerror}") for error in errors
        ]
    names = {path: _name(path, base) for path in dict.fromkeys(found)}
    return dict(sorted(names.items(), key=lambda item: _natural(item[1]))), list(dict.fromkeys(unlisted))


def _base(folders: Sequence[Path]) -> Path:
    """What names are relative to: the folder asked for, or the deepest one that holds all of them."""
    return Path(os.path.commonpath([folder.resolve() for folder in folders]))


def _run_folders(folder: Path, errors: list[OSError]) -> Iterator[Path]:
    for path, below, files in os.walk(folder.resolve(), onerror=errors.append):
        if any(name in files for name in RUN_FILES):
            below.clear()
            yield Path(path)
        below[:] = [name for name in below if not name.startswith(".") and name not in NOT_RUNS]


def _name(path: Path, base: Path) -> str:
    relative = path.relative_to(base)
    return _text(str(relative if relative.parts else path.name))


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts numbers inside names by their value."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts)


def _text(value: object) -> str:
    """Text that can be written: a folder's name may hold bytes, and JSON half characters, that UTF-8 has not."""
    return str(value).encode("utf-8", "replace").decode()


def read(folder: Path, name: str) -> Run:
    """Read figures.json of a run.

    Raises:
        DataError: it is missing, damaged, of another version or incomplete; the message is the reason alone.
    """
    try:
        figures = json.loads((folder / "figures.json").read_text("utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        raise DataError("no figures.json: the run has not finished. Repeat it, or delete its folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"figures.json cannot be read: {error}") from error
    schema = _get(figures, "schema") if isinstance(figures, dict) and "schema" in figures else None
    if schema != tables.FIGURES_VERSION:
        raise DataError(
            f"figures.json has schema {schema}, and this version reads {tables.FIGURES_VERSION}. Repeat the run."
        )
    settings = _mapping(figures, "run", "config")
    return Run(
        name=name,
        folder=folder,
        created=_text(_get(figures, "run", "created")),
        data_hash=_text(_get(figures, "dataset", "hash")),
        config=dict(_flat(settings)),
        rows=list(_rows(name, figures)),
    )


def _get(value: Json, *path: str) -> Json:
    """What lies at a path; a DataError names the part that is missing."""
    for depth, key in enumerate(path):
        if not isinstance(value, Mapping) or key not in value:
            raise DataError(f"figures.json has no {'.'.join(path[: depth + 1])}.")
        value = value[key]
    return value


def _maybe(value: Json, *path: str) -> Json:
    """What lies at a path, or None."""
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _mapping(value: Json, *path: str) -> Mapping[str, Json]:
    found = _get(value, *path)
    if not isinstance(found, Mapping):
        raise DataError(f"figures.json: {'.'.join(path)} is not a mapping.")
    return found


def _flat(value: Json, prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Dotted keys and values; a list is one value, as JSON."""
    for key, item in value.items() if isinstance(value, Mapping) else ():
        name = f"{prefix}{_text(key)}"
        if isinstance(item, Mapping):
            yield from _flat(item, f"{name}.")
        elif isinstance(item, list):
            yield name, _text(json.dumps(item))
        else:
            yield name, _text(item) if isinstance(item, str) else item


def _cells(column: str, estimate: Json) -> dict[str, float | int | None]:
    """An estimate as columns; without one all are null."""
    if estimate is None:
        return dict.fromkeys([column, *(f"{column}_{end}" for end in ENDS)])
    cells = {column: _get(estimate, "value"), **{f"{column}_{end}": _get(estimate, end) for end in ENDS}}
    for name, value in cells.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise DataError(f"figures.json: {name} is {value!r} and not a number.")
    return cells


def _rows(name: str, figures: Json) -> Iterator[dict[str, Json]]:
    """Rows of a run, without its settings: per reference (the headline first), top and share (the widest first)."""
    head = {
        "run": name,
        "encoder": _text(_get(figures, "encoder", "description")),
        "weights": _text(_get(figures, "encoder", "weights")),
        "random_weights": bool(_get(figures, "encoder", "random")),
        "trained_here": bool(_get(figures, "encoder", "trained_here")),
        "epoch": _number(_maybe(figures, "encoder", "epoch"), "encoder.epoch"),
        "dataset": _text(_get(figures, "dataset", "name")),
        "split": _text(_get(figures, "split", "hash"))[:HASH_DIGITS],
        "infers": _infers(figures),
    }
    rows_of = partial(_object_rows, _predictions(figures)) if head["infers"] == "objects" else _reference_rows
    utility: dict[str, Json] = {}
    for item in _list(_maybe(figures, "utility"), "utility"):
        utility |= _cells(f"utility_{_text(_get(item, 'measure'))}", _get(item, "estimate"))
    headline = _get(figures, "headline")
    references = _mapping(figures, "references")
    for reference in sorted(references, key=lambda key: key != headline):
        found = references[reference]
        tail = {
            **_whole_run_cells(found),
            "reference_seconds": _number(_maybe(figures, "run", "seconds", f"references/{reference}"), "run.seconds"),
            **utility,
            "created": _text(_get(figures, "run", "created")),
        }
        for row in rows_of(found):
            yield {**head, "reference": _text(reference), "headline": reference == headline, **row, **tail}


def _infers(figures: Json) -> str:
    kind = _get(figures, "infers")
    if kind not in compared.WORDINGS:
        raise DataError(f"figures.json: infers is {kind!r}; expected one of {', '.join(compared.WORDINGS)}.")
    return str(kind)


def _list(value: Json, name: str) -> list[Json]:
    if not isinstance(value, list | None):
        raise DataError(f"figures.json: {name} is not a list.")
    return value or []


def _number(value: Json, name: str) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise DataError(f"figures.json: {name} is {value!r} and not a number.")
    return value


def _whole_run_cells(found: Json) -> dict[str, Json]:
    """Figures of a reference that do not depend on top and share."""
    cells: dict[str, Json] = {}
    for quadrant in metrics.QUADRANTS:
        cells |= _cells(quadrant, _get(found, "roles", "target", "quadrants", quadrant))
    return cells | _cells("planted_auroc", _maybe(found, "planted", "auroc"))


def _reference_rows(found: Json) -> Iterator[dict[str, Json]]:
    """Rows of a reference of a label run, top-1 first."""
    target = _mapping(found, "roles", "target")
    for top in sorted(key for key in target if re.fullmatch("top[0-9]+", key)):
        for percent in sorted(_mapping(target, top), key=_share, reverse=True):
            cell = target[top][percent]
            yield {
                "top": top,
                "surest": _share(percent),
                **_cells("target_accuracy", _get(cell, "target")),
                **_cells("reference_accuracy", _get(cell, "reference")),
                **_cells("gap", _get(cell, "gap")),
                **_cells("gap_unseen", _maybe(found, "roles", "unseen", top, percent, "gap")),
                **_cells("corrected_gap", _maybe(found, "corrected_gap", top, percent)),
                **_cells("both_directions", _maybe(found, "both_directions", top, percent)),
            }


def _predictions(figures: Json) -> list[str]:
    """What an object run may have predicted, the headline's first."""
    configured = _maybe(figures, "run", "config", "scoring", "predictions")
    first = configured if isinstance(configured, list) else []
    return list(dict.fromkeys([*(name for name in first if name in tables.PREDICTIONS), *tables.PREDICTIONS]))


def _object_rows(predictions: Sequence[str], found: Json) -> Iterator[dict[str, Json]]:
    """Rows of a reference of an object run, the headline's prediction first; all rows count in each."""
    target = _mapping(found, "roles", "target")
    for prediction in (name for name in predictions if name in target):
        cell = target[prediction]
        yield {
            "top": prediction,
            "surest": 100.0,
            **_cells("target_accuracy", _get(cell, "target_recall")),
            **_cells("reference_accuracy", _get(cell, "reference_recall")),
            **_cells("gap", _get(cell, "gap")),
            **_cells("gap_unseen", _maybe(found, "roles", "unseen", prediction, "gap")),
            **_cells("corrected_gap", _maybe(found, "corrected", prediction, "gap")),
            **_cells("both_directions", _maybe(found, "both_directions", prediction, "gap")),
        }


def _share(percent: str) -> float:
    try:
        return float(percent)
    except ValueError:
        raise DataError(f"figures.json: {percent!r} stands where a confident share in % is expected.") from None


def select(runs: Sequence[Run]) -> tuple[list[Run], list[Skipped]]:
    """Leave out what must not stand in one table.

    Returns:
        The runs on the data most runs have (of the first, where two are as frequent), of equal configurations only the
        newest; and the others.
    """
    empty = [Skipped(run.name, "figures.json has no figures of any reference.") for run in runs if not run.rows]
    runs = [run for run in runs if run.rows]
    if not runs:
        return [], empty
    ((common, count),) = Counter(run.data_hash for run in runs).most_common(1)
    unlike = [
        Skipped(
            run.name,
            f"other data: the manifest's hash is {run.data_hash[:HASH_DIGITS]}, and {count} of {len(runs)} runs have "
            f"{common[:HASH_DIGITS]}. Compare these runs by themselves.",
        )
        for run in runs
        if run.data_hash != common
    ]
    newest: dict[str, Run] = {}
    same = [run for run in runs if run.data_hash == common]
    for run in same:
        key = _identity(run)
        if key not in newest or run.created > newest[key].created:
            newest[key] = run
    repeated = [
        Skipped(run.name, f"the same configuration as {newest[_identity(run)].name}, which is newer.")
        for run in same
        if newest[_identity(run)] is not run
    ]
    return [run for run in same if newest[_identity(run)] is run], [*empty, *unlike, *repeated]


def paired_tests(runs: Sequence[Run], settings: Sequence[str] = ()) -> pl.DataFrame:
    """Do two runs differ by more than the luck of the rows? Paired tests on the rows that both measured.

    What is compared is how often the encoder under test is right (of objects, its recall by the headline's prediction).
    The reference has no part in that but one: its table of scores is read, the headline's of the first run where the
    second has that reference too, else the first that both have. Runs without a readable scores.parquet are left out
    with a warning.

    Args:
        runs: of the same data.
        settings: keys of the configurations that tell the runs apart. Of many pairs those that differ in the fewest of
            them are tested, `MOST_TESTED` at most.

    Returns:
        Columns of `compared.TESTS`, a row for each pair and role (target, and unseen where there are such rows).
    """
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.rows[0]["infers"], []).append(run)
    pairs = sorted(
        (pair for some in kinds.values() for pair in itertools.combinations(some, 2) if _shared(*pair)),
        key=lambda pair: sum(pair[0].config.get(key) != pair[1].config.get(key) for key in settings),
    )
    read_once = cache(_correct)
    rows: list[dict[str, Json]] = []
    unread: dict[str, str] = {}
    tested = 0
    for first, second in pairs:
        reference = _shared(first, second)
        answers = [read_once(run.folder, reference, _right(run)) for run in (first, second)]
        unread |= {
            run.name: found for run, found in zip((first, second), answers, strict=True) if isinstance(found, str)
        }
        frames = [found for found in answers if isinstance(found, pl.DataFrame)]
        if len(frames) == 2:
            rows += _tests_of(first, second, reference, *frames)
            tested += 1
        if tested == MOST_TESTED:
            break
    for name in list(unread)[:1]:
        log.warning("no paired tests of %d runs, among them %s: %s", len(unread), name, unread[name])
    adjusted = statistics.holm(np.array([row["p_permutation"] for row in rows]))
    return pl.DataFrame(
        [{**row, "p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)], schema=dict(compared.TESTS)
    )


def _shared(first: Run, second: Run) -> str | None:
    """The first reference of the first run that the second has too."""
    others = {row["reference"] for row in second.rows}
    return next((row["reference"] for row in first.rows if row["reference"] in others), None)


def _right(run: Run) -> str:
    """The column of scores.parquet that says how right the target is."""
    return f"target_recall_{run.rows[0]['top']}" if run.rows[0]["infers"] == "objects" else "target_correct"


def _correct(folder: Path, reference: str, column: str) -> pl.DataFrame | str:
    """How right the target is on each usable row: columns id, role, right; or why that cannot be read."""
    usable = pl.col("status") == tables.Status.OK
    measured = pl.col("role").is_in([tables.Role.TARGET, tables.Role.UNSEEN])
    try:
        scores = pl.scan_parquet(folder / "scores.parquet").filter(
            pl.col("reference") == reference, usable, measured, pl.col(column).is_not_null()
        )
        found = scores.select("id", "role", right=pl.col(column).cast(pl.Float64)).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        return f"scores.parquet cannot be read: {error}"
    return f"scores.parquet repeats ids of {reference}" if found["id"].is_duplicated().any() else found


def _tests_of(
    first: Run, second: Run, reference: str | None, ours: pl.DataFrame, theirs: pl.DataFrame
) -> Iterator[dict[str, Json]]:
    """The tests of two runs, without the adjustment."""
    both = ours.join(theirs, on=["id", "role"], how="inner", validate="1:1").sort("role", "id")
    for (role,), rows in both.group_by("role", maintain_order=True):
        differences = (rows["right"] - rows["right_right"]).to_numpy()
        ahead, behind = int((differences > 0).sum()), int((differences < 0).sum())
        rng = provenance.rng(0, f"compare/{first.name}/{second.name}/{role}")
        yield {
            "first": first.name,
            "second": second.name,
            "reference": reference,
            "role": role,
            "n_used": len(rows),
            "difference": float(differences.mean()),
            "p_permutation": statistics.paired_permutation(differences, PERMUTATIONS, rng),
            "p_mcnemar": statistics.mcnemar(ahead, behind) if first.rows[0]["infers"] == "label" else None,
        }


def _identity(run: Run) -> str:
    return json.dumps(run.config, sort_keys=True)


def merge(runs: Sequence[Run]) -> tuple[pl.DataFrame, list[str]]:
    """The table of all rows, and its columns that are settings."""
    keys = differing([run.config for run in runs])
    rows = [row for run in runs for row in run.rows]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    names = {key: f"config.{key}" if key in columns else key for key in keys}
    split = columns.index("reference")
    series = {column: _series(column, [row.get(column) for row in rows]) for column in columns}
    for key, name in names.items():
        series[name] = _series(name, [run.config.get(key) for run in runs for _ in run.rows])
    return pl.DataFrame([series[name] for name in (*columns[:split], *names.values(), *columns[split:])]), [
        *names.values()
    ]


def _series(name: str, values: Sequence[Json]) -> pl.Series:
    """Whole numbers, numbers, claims, or text where kinds are mixed."""
    kinds = {_kind(value) for value in values if value is not None}
    if kinds <= {pl.Int64, pl.Float64}:
        kind = pl.Float64 if pl.Float64 in kinds or not kinds else pl.Int64
        return pl.Series(name, values, dtype=kind, strict=False)
    if len(kinds) == 1:
        return pl.Series(name, values, dtype=kinds.pop())
    return pl.Series(name, [None if value is None else str(value) for value in values], dtype=pl.String)


def _kind(value: bool | float | str) -> type[pl.DataType]:
    if isinstance(value, bool):
        return pl.Boolean
    if isinstance(value, int):
        return pl.Int64 if abs(value) < 2**63 else pl.String
    return pl.Float64 if isinstance(value, float) else pl.String


def differing(configs: Sequence[Mapping[str, Json]]) -> list[str]:
    """Dotted keys that tell the runs apart, in the order of the configurations.

    Left out are keys without influence on a figure; keys a run only lacks because it uses another part (the part's
    `_target_` says so); and a key that repeats an earlier one of the same name in every run, as
    `probe.query.min_side_px` does `split.min_side_px`.

    >>> differing([{"probe.k": 10, "seed": 0}, {"probe.k": 20, "seed": 0}])
    ['probe.k']
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    chosen: dict[tuple[str, str], str] = {}
    for key in keys:
        if not _differs(key, configs) or _under(key, NO_INFLUENCE):
            continue
        values = repr([config.get(key) for config in configs])
        chosen.setdefault((key.rsplit(".", 1)[-1], values), key)
    return list(chosen.values())


def _under(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _differs(key: str, configs: Sequence[Mapping[str, Json]]) -> bool:
    if len({config[key] for config in configs if key in config}) > 1:
        return True
    parts = key.split(".")
    owners = [".".join([*parts[:depth], "_target_"]) for depth in range(len(parts) - 1, 0, -1)]
    # The part a key belongs to, the innermost one: a run without that part lacks the key for no reason of its own.
    owner = next((name for name in owners if any(name in config for config in configs)), "")
    parts_with_key = {config.get(owner) for config in configs if key in config}
    return any(key not in config and config.get(owner) in parts_with_key for config in configs)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dejavu_exp.compare",
        description="Compare many runs: one table with a row per run, reference and confident share (of an object run: "
        "prediction), and plots.",
        epilog="Writes comparison.parquet, comparison.csv, comparison.md, comparison.html, and tests.parquet with "
        "paired tests between runs. Runs that were killed, "
        "that another version wrote, that measured other data or that repeat a configuration are left out and listed "
        "with the reason. HYDRA_FULL_ERROR=1 shows tracebacks.",
    )
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", type=Path, help="a run folder, or a folder that holds some"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write (default: the first DIR)")
    parser.add_argument(
        "--track",
        action="store_true",
        help="also log the comparison to Weights & Biases; comparison.html is sent as it is, with the names of the run "
        "folders and all settings that differ",
    )
    for option, meaning in (("project", "the W&B project"), ("entity", "user or team"), ("group", "of the W&B run")):
        parser.add_argument(f"--{option}", help=f"with --track: {meaning}")
    asked = parser.parse_args(arguments)
    out = asked.out or asked.folders[0]
    with config.spoken_errors():
        comparison = compare(asked.folders, out)
        compared.show(comparison)
        if asked.track:
            given = {key: getattr(asked, key) for key in ("project", "entity", "group") if getattr(asked, key)}
            if tracking.WandbTracking(**given).log_comparison(comparison, out) == "failed":
                sys.exit(1)


if __name__ == "__main__":
    main()
