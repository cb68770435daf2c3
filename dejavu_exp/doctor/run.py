"""A run folder: is it whole, and do its figures follow from its scores?"""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import yaml
from markupsafe import escape

from dejavu_exp import agreement, cells, compare, config, gate, provenance, tables
from dejavu_exp.cells import State
from dejavu_exp.doctor.findings import Examination
from dejavu_exp.errors import DataError, DejavuError
from dejavu_exp.report import card
from dejavu_exp.scoring import LabelInference, ObjectInference, common
from dejavu_exp.tables import OBJECT_SCORES, SCORES, Role, Status

Scoring: TypeAlias = LabelInference | ObjectInference

FILES = (
    *("config.yaml", "figures.json", "scores.parquet", "report.html", "model_card.json", "model_card.md"),
    *("correlated.parquet", "correlated.npy", "leaks.parquet"),
)
"""What a finished run leaves behind."""
AGREES = 1e-9
"""Absolute and relative; the files hold every digit."""
RESAMPLED = ("low", "high", "gap_low", "gap_high", "power", "verdict")
"""Keys of figures that come from random resamples, or name their ends: another version may draw others."""
REPEAT = "Repeat the run: the same command takes embeddings and weights from the cache."
NEEDED = (
    *("schema", "verdict", "headline", "encoder", "dataset", "split", "infers", "probe", "counts"),
    *("references", "agreement", "leaks", "run"),
)
"""Keys of figures.json that are looked at."""


@dataclass(frozen=True)
class Held:
    """The files of a finished run that belong together.

    Attributes:
        folder: of the run.
        figures: figures.json.
        scores: scores.parquet.
        config: config.yaml.
        scoring: as configured.
        same_code: True where this version of everything made the figures.
    """

    folder: Path
    figures: Mapping[str, Any]
    scores: pl.DataFrame
    config: Mapping[str, Any]
    scoring: Scoring
    same_code: bool


def find(folders: Sequence[Path]) -> list[Path]:
    """The run folders among some folders and below them, each once; one that has only a status counts too.

    Raises:
        ConfigError: a folder does not exist, or holds no run.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        own = any((folder / name).exists() for name in (cells.STATUS, *compare.RUN_FILES))
        found |= dict.fromkeys([folder.resolve()] if own else compare.find([folder])[0])
    return list(found)


def examine(folder: Path, *, inputs: bool) -> Examination:
    """Look at a run folder.

    Args:
        folder: of a run.
        inputs: also read the data set and the weights again, and compare their hashes with those of the run.
    """
    found = Examination("run", str(folder))
    state = _tell_state(found, folder)
    ended = state is None or state == State.FINISHED
    if not ended and (state in (State.QUEUED, State.RUNNING) or not (folder / "figures.json").exists()):
        return found
    figures = _read(found, folder / "figures.json", lambda path: json.loads(path.read_text("utf-8")))
    if isinstance(figures, dict) and not _tell_version(found, figures):
        return found
    _tell_files(found, folder)
    try:
        held = _held(found, folder, figures)
        if held is not None:
            if _tell_scores(found, held):
                _tell_figures(found, held)
            _tell_beside(found, held)
            if inputs:
                _tell_inputs(found, held)
    except (LookupError, TypeError, ValueError, AttributeError, pl.exceptions.PolarsError) as error:
        found.fault("figures", f"figures.json is not what a run writes: {type(error).__name__}: {error}.", REPEAT)
    return found


def _tell_state(found: Examination, folder: Path) -> State | None:
    """What status.json says; None where there is none."""
    try:
        status = cells.read(folder)
    except DataError as error:
        found.fault("status", str(error))
        return None
    if status is None:
        found.note("no_status", "There is no status.json: the run was not started by the command line, or is old.")
        return None
    state = status.now(cells.slurm_jobs())
    found.facts |= {"state": str(state), "started": status.started, "ended": status.ended or "-"}
    again = f"Run it again: {status.repeat()}"
    if state == State.FAILED:
        found.fault("failed", f"The run failed: {status.error}", again)
    elif state == State.STOPPED:
        found.fault(
            "stopped", "The run was stopped: its process or job is gone, and it did not say that it ended.", again
        )
    elif state != State.FINISHED:
        found.note("unfinished", f"The run is {state}; look again when it has ended.")
    return state


def _tell_files(found: Examination, folder: Path) -> None:
    """Files that are missing, empty, unreadable, half written or open to everybody."""
    paths = [folder / name for name in FILES]
    there = [path for path in paths if path.exists()]
    found.fault(
        "files_missing", "Files of a finished run are missing.", REPEAT, [p.name for p in paths if p not in there]
    )
    found.fault("files_empty", "Files are empty.", REPEAT, [path.name for path in there if not path.stat().st_size])
    found.fault(
        "files_closed", "Files may not be read.", f"chmod -R u+r {shlex.quote(str(folder))}",
        [path.name for path in there if not os.access(path, os.R_OK)],
    )  # fmt: skip
    found.warn(
        "files_partial", "Files were begun and never finished, by a process that was killed.", "Remove them.",
        sorted(path.name for path in folder.glob(".*.partial")),
    )  # fmt: skip
    found.warn(
        "files_open", "Anybody on this machine may change these files, and so the figures.",
        f"chmod -R o-w {shlex.quote(str(folder))}",
        [path.name for path in (folder, *there) if path.stat().st_mode & stat.S_IWOTH],
    )  # fmt: skip


def _held(found: Examination, folder: Path, figures: Any) -> Held | None:  # noqa: ANN401 - checked here
    """The files that the rest is about; None where one cannot be used, which is then noted."""
    scores = _read(found, folder / "scores.parquet", tables.read)
    resolved = _read(found, folder / "config.yaml", lambda path: yaml.safe_load(path.read_text("utf-8")))
    if not isinstance(figures, dict) or not isinstance(resolved, dict):
        return None
    lacking = [key for key in NEEDED if key not in figures]
    found.fault("figures", "figures.json lacks keys.", REPEAT, lacking)
    if lacking:
        return None
    if scores is not None:
        # JSON files have their keys sorted; the order of the references is that of the scores.
        order = [name for name in scores["reference"].unique(maintain_order=True) if name in figures["references"]]
        figures["references"] = {name: figures["references"][name] for name in (*order, *figures["references"])}
    made_by = figures["run"]
    code = {"versions": made_by["versions"], "commit": made_by["commit"]}
    here = {"versions": provenance.versions(), "commit": provenance.commit()}
    found.facts |= {"title": figures.get("title"), "made by": f"dejavu_exp {code['versions'].get('dejavu_exp')}"}
    found.note(
        "other_code", "The run was made by other versions than are installed here.", "",
        [f"{name}: {_get(code, name)}, here {_get(here, name)}" for name, _, _ in unlike(code, here)],
    )  # fmt: skip
    try:
        _tell_config(found, resolved, figures)
        scoring = config.bind(resolved["scoring"], "scoring")
    except DejavuError as error:
        found.fault("config", f"config.yaml: {error}", REPEAT)
        return None
    return None if scores is None else Held(folder, figures, scores, resolved, scoring, code == here)


def _read(found: Examination, path: Path, read: Callable[[Path], Any]) -> Any:  # noqa: ANN401 - checked by the caller
    """What a file holds; None where it is missing, which is noted elsewhere, or damaged."""
    if not path.exists():
        return None
    try:
        return read(path)
    except (OSError, ValueError, RecursionError, DataError, yaml.YAMLError) as error:
        found.fault("damaged", f"{path.name} cannot be read: {' '.join(str(error).split())[:300]}.", REPEAT)
        return None


def _tell_version(found: Examination, figures: Mapping[str, Any]) -> bool:
    """Whether figures.json is of this version."""
    schema = figures.get("schema")
    if schema != tables.FIGURES_VERSION:
        age = "a newer" if isinstance(schema, int) and schema > tables.FIGURES_VERSION else "an older"
        found.fault(
            "version",
            f"The folder is of {age} version: figures.json has schema {schema}, this version reads "
            f"{tables.FIGURES_VERSION}.",
            REPEAT if age == "an older" else "Use the version of dejavu_exp that made it.",
        )
    return bool(schema == tables.FIGURES_VERSION)


def _tell_config(found: Examination, resolved: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Whether config.yaml is complete and the one that the figures name.

    Raises:
        ConfigError: a key is unknown or missing.
    """
    from omegaconf import OmegaConf

    config.resolve(OmegaConf.create(dict(resolved)))
    lacking = [name for name in (*config.PARTS, *config.NUMBERS, "references") if resolved.get(name) is None]
    found.fault("config_lacks", "config.yaml lacks parts of the configuration.", REPEAT, lacking)
    decides, told = config.that_decides(resolved), figures["run"]["config"]
    found.fault(
        "config_other", "config.yaml is not the configuration that figures.json was made with.", REPEAT,
        [f"{path}: {_get(decides, path)}, in figures.json {_get(told, path)}" for path, _, _ in unlike(decides, told)],
    )  # fmt: skip


def unlike(first: object, second: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Where two JSON values differ: dotted key, and what each has there.

    Numbers agree up to rounding; a key that one of them lacks counts as null there.

    >>> list(unlike({"a": {"b": 1.0}, "c": [2]}, {"a": {"b": 1.5}, "c": [2]}))
    [('a.b', 1.0, 1.5)]
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys((*first, *second)):
            yield from unlike(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for place, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from unlike(one, other, f"{path}.{place}")
    elif not _agrees(first, second):
        yield path, first, second


def _agrees(first: object, second: object) -> bool:
    numbers = [value for value in (first, second) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == 2:
        return math.isclose(*numbers, rel_tol=AGREES, abs_tol=AGREES)
    return first == second


def _get(value: Any, path: str) -> object:  # noqa: ANN401
    """What stands at a dotted key; keys may hold dots themselves, so the longest that fits is taken."""
    if not path:
        return value
    if isinstance(value, list):
        place, _, rest = path.partition(".")
        return _get(value[int(place)], rest)
    if isinstance(value, Mapping):
        fitting = [str(key) for key in value if path == str(key) or path.startswith(f"{key}.")]
        if fitting:
            key = max(fitting, key=len)
            return _get(value[key], path[len(key) + 1 :])
    return None


def _tell_scores(found: Examination, held: Held) -> bool:
    """Whether scores.parquet has the columns, types, ids and statuses of a run, and rows that make sense.

    Returns:
        False where figures cannot be computed from it.
    """
    schema = OBJECT_SCORES if held.figures["infers"] == "objects" else SCORES
    scores = held.scores
    found.facts["rows of scores"] = len(scores)
    has = dict(scores.schema)
    wrong = [
        f"{name}: is {has.get(name, 'missing')}, must be {kind}"
        for name, kind in schema.items()
        if has.get(name) != kind
    ]
    found.fault("scores_columns", "Columns of scores.parquet are missing or of another type.", REPEAT, wrong)
    if wrong:
        return False
    keys = scores.select("reference", "id")
    twice = keys.filter(keys.is_duplicated() | pl.Series(scores["id"].is_null())).unique().sort("reference", "id")
    found.fault(
        "scores_ids", "Rows of scores.parquet have the same id for the same reference, or none.", REPEAT,
        [f"{name}: {reference}" for reference, name in twice.iter_rows()],
    )  # fmt: skip
    for column, known in (("status", Status), ("role", Role)):
        strange = scores.filter(~pl.col(column).is_in([str(value) for value in known]))[column].unique().sort()
        found.fault(f"scores_{column}", f"Unknown values of {column} in scores.parquet.", REPEAT, strange.to_list())
    other = sorted(set(scores["reference"]) ^ set(held.figures["references"]))
    found.fault("scores_references", "References are only in one of scores.parquet and figures.json.", REPEAT, other)
    rules = _object_rules(held) if held.figures["infers"] == "objects" else _label_rules(held)
    used = scores.filter(pl.col("status") == Status.OK)
    for name, holds in rules.items():
        bad = used.filter(~holds.fill_null(False))
        found.fault(
            "scores_rows", f"Rows of scores.parquet contradict themselves: {name}.", REPEAT,
            bad.select(pl.format("{}: {}", "id", "reference")).to_series().to_list(),
        )  # fmt: skip
    return twice.is_empty() and not other


def _label_rules(held: Held) -> dict[str, pl.Expr]:
    """What holds in every used row of a label run."""
    both = pl.col("target_correct"), pl.col("reference_correct")
    rules = {
        f"{who}_correct says whether {who}_label is the label": pl.col(f"{who}_correct")
        == (pl.col(f"{who}_label") == pl.col("label"))
        for who in ("target", "reference")
    }
    rules |= {f"{who}_probability is a share": _is_share(f"{who}_probability") for who in ("target", "reference")}
    rules["quadrant says who is right"] = pl.col("quadrant") == _quadrant(*both, correlated=both[0] & both[1])
    if isinstance(held.scoring, LabelInference) and held.scoring.memorization_score == "probability":
        gained = pl.col("target_probability") - pl.col("reference_probability")
        rules["memorization_score is the difference of the probabilities"] = _is_near("memorization_score", gained)
    return rules


def _object_rules(held: Held) -> dict[str, pl.Expr]:
    """What holds in every used row of an object run."""
    first = held.scoring.headline if isinstance(held.scoring, ObjectInference) else tables.PREDICTIONS[0]
    recalls = [pl.col(f"{who}_recall_{first}") for who in ("target", "reference")]
    rules = {
        f"{who}_found are the objects that {who}_recall_{first} counts": _is_near(
            f"{who}_recall_{first}", pl.col(f"{who}_found").list.len() / pl.col("objects").list.len()
        )
        for who in ("target", "reference")
    }
    more, fewer = recalls[0] > recalls[1], recalls[0] < recalls[1]
    rules["quadrant says who finds more"] = pl.col("quadrant") == _quadrant(more, fewer, correlated=recalls[0] > 0)
    return rules


def _quadrant(target: pl.Expr, reference: pl.Expr, correlated: pl.Expr) -> pl.Expr:
    """The quadrant of a row: by who alone is ahead, else by whether both are right."""
    told = pl.when(target & ~reference).then(pl.lit("memorized")).when(reference & ~target).then(pl.lit("forgotten"))
    return told.when(correlated).then(pl.lit("correlated")).otherwise(pl.lit("unassociated"))


def _is_share(column: str) -> pl.Expr:
    return pl.col(column).is_between(-AGREES, 1 + AGREES)


def _is_near(column: str, other: pl.Expr) -> pl.Expr:
    return (pl.col(column) - other).abs() <= AGREES


def _tell_figures(found: Examination, held: Held) -> None:
    """Compute the figures from the scores again, with the run's own scoring, and compare."""
    figures, scores, scoring = held.figures, held.scores, held.scoring
    seed, random = held.config["seed"], figures["encoder"]["random"]
    again: dict[str, Any] = {"references": {}}
    for name in figures["references"]:
        rows = scores.filter(pl.col("reference") == name)
        # Without the data set the planted truth is not known, and that part is left out.
        computed = scoring.figures(rows, rows.select("id"), seed)
        computed["verdict"] = scoring.verdict(computed, name, random=random)
        again["references"][name] = computed
    by_label = isinstance(scoring, LabelInference) and scoring.cluster == "label"
    settings = (scoring.fractions, scoring.level, scoring.resamples, seed)
    again["agreement"] = agreement.compare_references(scores, *settings, scoring.reference_value(), by_label=by_label)
    again["gate"] = gate.check(figures, config.bind(held.config["gate"], "gate"))
    told = _same_keys(figures, again)
    found.facts["figures computed again"] = sum(1 for _ in leaves(again))
    _tell_unlike(found, held, "figures_other", "figures.json does not follow from scores.parquet.", again, told)
    parts = [name for name, rows in scores.partition_by("reference", as_dict=True).items() if not _p_values_hold(rows)]
    found.fault(
        "p_values", "p_value or q_value in scores.parquet does not follow from the scores.", REPEAT,
        [str(name[0]) for name in parts],
    )  # fmt: skip
    if not figures["verdict"].startswith(figures["references"][figures["headline"]]["verdict"]):
        found.fault("verdict", "The verdict in figures.json is not that of its first reference.", REPEAT)
    _tell_counts(found, held)


def _p_values_hold(rows: pl.DataFrame) -> bool:
    again = common.with_p_values(rows.drop("p_value", "q_value"))
    return all(
        np.allclose(again[name].fill_null(-1.0), rows[name].fill_null(-1.0), rtol=AGREES, atol=AGREES)
        for name in ("p_value", "q_value")
    )


def _same_keys(told: Any, again: Any) -> Any:  # noqa: ANN401 - any JSON
    """What is told, without keys that were not computed again (names of classes, planted truth, seeds)."""
    if isinstance(told, Mapping) and isinstance(again, Mapping):
        return {key: _same_keys(told[key], value) for key, value in again.items() if key in told}
    if isinstance(told, list) and isinstance(again, list) and len(told) == len(again):
        return [_same_keys(one, other) for one, other in zip(told, again, strict=True)]
    return told


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """All values of a JSON value that are neither objects nor lists, each with its dotted key.

    >>> list(leaves({"a": [1, None], "b": {"c": "x"}}))
    [('a.0', 1), ('a.1', None), ('b.c', 'x')]
    """
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _is_resampled(path: str) -> bool:
    return any(key in RESAMPLED for key in path.split("."))


def _tell_unlike(
    found: Examination, held: Held, kind: str, sentence: str, again: Mapping[str, Any], told: Mapping[str, Any]
) -> None:
    """Note where what is told differs from what was computed; only a warning where other code draws other resamples."""
    found_here = {path: f"{path}: {written}, computed {computed}" for path, computed, written in unlike(again, told)}
    drawn = [text for path, text in found_here.items() if _is_resampled(path)]
    # Other resamples change all intervals that are not exact: where few differ, they were not drawn otherwise.
    elsewhere = not held.same_code and 4 * len(drawn) > sum(_is_resampled(path) for path, _ in leaves(again))
    faults = [text for path, text in found_here.items() if not (elsewhere and _is_resampled(path))]
    found.fault(kind, f"{sentence} Something was edited, or is damaged.", REPEAT, faults)
    found.warn(
        f"{kind}_intervals", "Intervals and what else rests on resamples come out differently here; the run was made "
        "by other versions.",
        "To be sure, repeat the run here, or look at it with the versions that made it.", drawn if elsewhere else [],
    )  # fmt: skip


def _tell_counts(found: Examination, held: Held) -> None:
    """Whether the counts by role add up, and are those of the rows of scores."""
    wrong = []
    first = held.scores.filter(pl.col("reference") == held.figures["headline"])
    rows_of = dict(first.group_by("role").len().iter_rows())
    for role, told in held.figures["counts"].items():
        sums = sum(told["by_status"].values()), told["used"] + told["excluded"]
        if set(sums) != {told["rows"]}:
            wrong.append(f"{role}: {told['rows']} rows, {sums[1]} used and excluded, {sums[0]} by status")
        if role in (Role.TARGET, Role.UNSEEN) and rows_of.get(role, 0) != told["rows"]:
            wrong.append(f"{role}: {told['rows']} rows, {rows_of.get(role, 0)} in scores.parquet")
    found.fault("counts", "Counts in figures.json do not add up.", REPEAT, wrong)


def _tell_beside(found: Examination, held: Held) -> None:
    """Whether the files beside figures.json and scores.parquet say the same."""
    figures, folder = held.figures, held.folder
    facts = _read(found, folder / "model_card.json", lambda path: json.loads(path.read_text("utf-8")))
    if facts is not None:
        expected = card.card(figures)
        told = [f"{path}: {written}, by figures.json {right}" for path, right, written in unlike(expected, facts)]
        found.fault("card", "model_card.json does not say what figures.json says.", REPEAT, told)
        text = _read(found, folder / "model_card.md", lambda path: path.read_text("utf-8"))
        if text is not None and text != card.markdown(expected):
            found.fault("card", "model_card.md does not say what figures.json says.", REPEAT)
    page = _read(found, folder / "report.html", lambda path: path.read_text("utf-8"))
    if page is not None and not page.rstrip().endswith("</html>"):
        found.fault("report", "report.html breaks off before its end.", REPEAT)
    elif page is not None:
        lacking = [name for name, one in figures["references"].items() if str(escape(one["verdict"])) not in page]
        found.fault("report", "report.html does not have the verdicts of figures.json.", REPEAT, lacking)
    _tell_tables(found, held)


def _tell_tables(found: Examination, held: Held) -> None:
    """Whether correlated.* and leaks.parquet are those of the scores and figures."""
    correlated = _read(found, held.folder / "correlated.parquet", tables.read)
    pairs = _read(found, held.folder / "leaks.parquet", tables.read)
    positions = _read(found, held.folder / "correlated.npy", lambda path: np.load(path, allow_pickle=False))
    if correlated is not None:
        columns = ("id", "label", "origin", "position")
        nowhere = pl.DataFrame(schema={"id": pl.String, "label": pl.String, "origin": pl.String, "path": pl.String})
        expected = agreement.correlated_by_all(held.scores, nowhere)["id"].sort().to_list()
        if tuple(correlated.columns) != columns or correlated["id"].sort().to_list() != expected:
            found.fault("correlated", "correlated.parquet has other rows than scores.parquet calls correlated.", REPEAT)
        elif positions is not None and positions.tolist() != correlated["position"].to_list():
            found.fault("correlated", "correlated.npy has other positions than correlated.parquet.", REPEAT)
    if pairs is not None and len(pairs) != held.figures["leaks"]["n_pairs"]:
        found.fault(
            "leaks",
            f"leaks.parquet has {len(pairs)} pairs, figures.json counts {held.figures['leaks']['n_pairs']}.",
            REPEAT,
        )


def _tell_inputs(found: Examination, held: Held) -> None:
    """Read data and weights again and compare their hashes with those that the run wrote down."""
    # Imported here: torch takes seconds, and no other check of a run needs it.
    from dejavu_exp import images
    from dejavu_exp.training import load_if_ready

    told, here = held.figures, {}
    try:
        manifest = config.bind(held.config["dataset"], "dataset").manifest()
        here["dataset"] = provenance.hash_table(manifest.rows.sort("id").drop("path"))
        roles = config.bind(held.config["split"], "split").assign(manifest.rows, held.config["seed"])
        dealt = manifest.rows.join(roles.select("id", "role"), on="id", how="inner", validate="1:1")
        dealt = images.inspect(dealt, manifest.store)
        here["split"] = provenance.hash_table(dealt.select("id", "role", "content").sort("id"))
    except DejavuError as error:
        found.warn("inputs_data", f"The data set cannot be read again, so its hash was not compared: {error}")
    try:
        encoder = load_if_ready(config.bind(held.config["model"], "model"))
        if encoder is not None:
            here["encoder"] = encoder.weights_hash
    except DejavuError as error:
        found.warn("inputs_weights", f"The weights cannot be loaded again, so their hash was not compared: {error}")
    for name, found_hash in here.items():
        written = told[name]["weights_hash" if name == "encoder" else "hash"]
        found.facts[f"{name} hash"] = "the same" if found_hash == written else "another"
        if found_hash != written:
            found.fault(
                f"inputs_{name}", f"The {name} has changed since the run: its hash was {written} and is {found_hash}.",
                "Measure again, or bring back what the run was made with.",
            )  # fmt: skip
