"""Weights & Biases: with `dashboard` the only module that knows it. What is logged is on disk already.

A run is first written down as W&B's own offline records, which needs no network; only then, where that is wanted and
possible, a process of its own sends them, and is given so much time and no more.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import polars as pl

from dejavu_exp import cells, provenance
from dejavu_exp.errors import ConfigError
from dejavu_exp.tables import OBJECT_SCORES, PREDICTIONS, SCORES

if TYPE_CHECKING:
    import wandb

    from dejavu_exp.report.compared import Comparison
    from dejavu_exp.report.gallery import GalleryItem

log = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["disabled", "failed", "offline", "online"]
"""What became of a run: nothing was asked for, nothing could be written, records are kept here, records were sent."""

MEASURED, TRAINED, COMPARED_RUNS = "measure", "train", "compare"
"""Job types of W&B runs: a measurement, a training alone, a comparison of measurements."""
COMPARED = ("gap", "unseen_gap", "corrected_gap")
OBJECT_FIGURES = ("target_recall", "reference_recall", "ppg", "aucg", "precision_gap")
"""What the comparison of an object run has beside the gaps."""
MOST_OBJECTS = 1000
"""Rows of the table of objects, those with the largest gap."""
WHOLE_RUN = ("corrected_gap", "corrected", "both_directions", "planted", "rate")
"""Parts of a reference's figures that stand beside the roles."""
PLAIN_PARTS = ("power", "detected", "seeds")
"""Parts of a reference's figures that are plain numbers and words, and no estimates."""
RUN_PARTS = ("likeness", "leaks", "coverage", "gate")
"""The same of a whole run."""
NO_CURVES: Mapping[str, pl.DataFrame] = MappingProxyType({})
SCORE_COLUMNS = tuple(dict.fromkeys((*SCORES, *OBJECT_SCORES, "p_value", "q_value")))
"""Columns of scores.parquet that may leave: a list, so that a column added there does not leave by itself."""
MOST_ROWS = 10_000
"""Rows that W&B keeps of a table."""
ID_DIGITS = 16
RETRIES = {"WANDB_X_GRAPHQL_RETRY_MAX": "2"}
"""What sending does where the environment does not say otherwise: refused three times, it gives the reason and ends."""
LONGEST_REASON = 300
"""Characters of what W&B says of an error, which may quote all that a server answered."""
LOCAL_WAIT_S = 30
"""Longest that W&B's own process on this machine may take to start, or to write its records."""


@dataclass(frozen=True)
class WandbTracking:
    """A run in Weights & Biases: summary figures, tables, a comparison of references as table and chart, curves.

    No image, caption, folder or id of a row leaves unless that is asked for.

    Attributes:
        project: the W&B project.
        entity: user or team; null for the default one.
        group: groups runs; null: the folder of the sweep where the run is a cell of one, else none.
        mode: "auto" (what WANDB_MODE says where it is set, else online where logged in), "online", "offline" or
            "disabled". Where online cannot be had the run is kept offline; nobody is asked.
        images: also upload the gallery with its captions, and report.html. Off by default: what is memorized may be
            private.
        ids: ids of rows as they are, which for a folder of images are their paths; otherwise, see `hashed_id`.
        rows: of each reference's table of scores at most, a count; half are those with the largest memorization
            scores, half are drawn at random from the rest. 0: no such table.
        timeout_s: the longest that sending may take, seconds; what is not sent then is kept offline.
    """

    project: str = "dejavu_exp"
    entity: str | None = None
    group: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    images: bool = False
    ids: bool = False
    rows: int = 1000
    timeout_s: float = 40.0

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline", "disabled"):
            raise ConfigError(f"tracking.mode={self.mode}: must be auto, online, offline or disabled.")
        if not 0 <= self.rows <= MOST_ROWS:
            raise ConfigError(
                f"tracking.rows={self.rows}: must be from 0 (no table of scores) to {MOST_ROWS}, which is all that W&B "
                "shows. scores.parquet has every row."
            )
        if self.timeout_s <= 0:
            raise ConfigError(
                f"tracking.timeout_s={self.timeout_s}: must be above 0. To send nothing, set mode=offline."
            )

    def log(
        self,
        figures: Mapping[str, Any],
        scores: pl.DataFrame,
        run_dir: Path,
        gallery: Sequence[GalleryItem],
        config: Mapping[str, Any],
        training: Mapping[str, pl.DataFrame] = NO_CURVES,
    ) -> Outcome:
        """Log one run. A failure of W&B is a warning.

        The W&B run has an id that follows from the figures: logged again, it is the same run.

        Args:
            figures: what figures.json holds.
            scores: columns of `tables.SCORES` or `tables.OBJECT_SCORES`.
            run_dir: the run's folder; W&B writes below it.
            gallery: most memorized images, or pairs with their captions, uploaded only where `images` is set.
            config: the resolved configuration.
            training: loss curves of networks trained for this run, as for `log_training`.
        """

        def fill(run: wandb.Run) -> None:
            pictures = _pictures(gallery, run_dir) if self.images else {}
            run.log({**_media(figures, scores), **self._tables_of_rows(figures, scores), **pictures})
            _log_curves(run, training)
            run.summary.update({"verdict": figures["verdict"], "random_weights": figures["encoder"]["random"]})
            run.summary.update({**dict(headline(figures)), **dict(flat(figures)), **dict(plain(figures))})

        known = {**config, "provenance": origin(figures)}
        return self._log(fill, figures["title"], MEASURED, known, run_dir, run_id(figures))

    def log_training(self, training: Mapping[str, pl.DataFrame], config: Mapping[str, Any], folder: Path) -> Outcome:
        """Log loss curves alone, of a command that only trains. A failure of W&B is a warning.

        Args:
            training: by name of the network, with the columns step and any others, such as epoch, loss and
                learning_rate; logged as `training/<name>/<column>` against `training/<name>/step`.
            config: the resolved configuration.
            folder: W&B writes below it.
        """
        if not training:
            return "disabled"
        known = {**config, "provenance": {"commit": provenance.commit(), "versions": provenance.versions()}}
        return self._log(lambda run: _log_curves(run, training), ", ".join(training), TRAINED, known, folder)

    def log_comparison(self, comparison: Comparison, folder: Path) -> Outcome:
        """Log a comparison of runs: its table, its tests, a chart for each reference, and the page as it is.

        Args:
            comparison: of at least one run; its first file is the page.
            folder: W&B writes below it.
        """

        def fill(run: wandb.Run) -> None:
            run.log(_comparison_media(comparison))
            run.summary.update({"runs": len(names), "left_out": len(comparison.skipped)})

        names = comparison.runs()["run"].to_list()
        known = {"runs": names, "settings": list(comparison.settings)}
        return self._log(fill, f"comparison of {len(names)} runs", COMPARED_RUNS, known, folder)

    def _tables_of_rows(self, figures: Mapping[str, Any], scores: pl.DataFrame) -> dict[str, Any]:
        """Tables with a row for each row of the data, or for each pair of them."""
        tables: dict[str, Any] = {}
        for (name,), rows in scores.group_by("reference", maintain_order=True):
            if self.rows:
                chosen = sample(rows.drop("reference"), self.rows)
                tables[f"{name}/scores"] = _frame(self._without_ids(chosen, figures, "id"))
        pairs = (figures.get("leaks") or {}).get("pairs")
        if pairs:
            tables["leaks/pairs"] = _frame(self._without_ids(pl.DataFrame(pairs), figures, "id", "other_id"))
        return tables

    def _without_ids(self, frame: pl.DataFrame, figures: Mapping[str, Any], *columns: str) -> pl.DataFrame:
        """The rows, their ids hashed unless they may leave; with images the captions hold them anyway."""
        if self.ids or self.images:
            return frame
        key = str(figures["dataset"].get("hash", ""))
        return frame.with_columns(
            pl.Series(column, [hashed_id(name, key) for name in frame[column]], dtype=pl.String) for column in columns
        )

    def _log(
        self,
        fill: Callable[[wandb.Run], None],
        title: str,
        job_type: str,
        config: Mapping[str, Any],
        folder: Path,
        name: str | None = None,
    ) -> Outcome:
        """Open a run, fill it and send it, unless tracking is disabled."""
        if self._wanted() == "disabled":
            return "disabled"
        try:
            import wandb

            with wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group or sweep_of(folder),
                name=title,
                id=name,
                job_type=job_type,
                dir=str(folder),
                mode="offline",
                config=without_folders(dict(config)),
                settings=_settings(),
                reinit="finish_previous",
            ) as run:
                fill(run)
                records = Path(run.dir).parent
            # W&B's own process closes the records a moment after the run has ended; this waits for it.
            wandb.teardown()
        except Exception as error:
            log.warning("Weights & Biases: %s. The results are in %s all the same.", error, folder)
            return "failed"
        return self._deliver(records)

    def _deliver(self, records: Path) -> Outcome:
        """Send what was written down; where that cannot be, keep it and say why."""
        wanted = self._wanted()
        if wanted in ("offline", "dryrun"):
            return "offline"
        try:
            known = has_key()
            if not known and wanted != "online":
                return "offline"
            reason = send(records, self.timeout_s) if known else "not logged in"
        except Exception as error:
            reason = str(error)
        if reason is None:
            return "online"
        log.warning("Weights & Biases: %s; the run is kept offline, send it with `wandb sync %s`.", reason, records)
        return "offline"

    def _wanted(self) -> str:
        """The mode asked for: with "auto", W&B's own WANDB_MODE decides where it is set."""
        return os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode


def _settings() -> wandb.Settings:
    """Nothing of this machine, its folders and its packages is told."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=LOCAL_WAIT_S,
        finish_timeout=LOCAL_WAIT_S,
    )


def has_key() -> bool:
    """True where W&B finds a key, in the environment or a file; asks nobody, and no server, which may never answer."""
    import wandb

    # Not silent, a login asks the server for the user's name. And WANDB_MODE would speak against it.
    wandb.setup(wandb.Settings(silent=True, mode="online"))
    try:
        return bool(wandb.login(prompt=False, verify=False))
    finally:
        wandb.teardown()


def send(records: Path, timeout_s: float) -> str | None:
    """Send the records of an offline run with W&B's own command, in a process that ends in time.

    Args:
        records: the folder that W&B wrote.
        timeout_s: seconds; then the process is killed, and the records stay as they are.

    Returns:
        None where all was sent; else what went wrong.
    """
    # WANDB_MODE would speak against sending; whoever calls this has decided.
    environment = {**RETRIES, **{name: value for name, value in os.environ.items() if name != "WANDB_MODE"}}
    command = [sys.executable, "-m", "wandb", "sync", str(records.absolute())]
    # A file and no pipe: a pipe stays open as long as any process that W&B started lives.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=records,
            start_new_session=True,
        )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"not all was sent within {timeout_s:g} s"
        finally:
            # Also where this process is interrupted; and W&B's own process outlives a command that fails.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # The status is 0 also where nothing could be sent; a file beside the records is there only where all was.
        if any(records.glob("*.synced")):
            return None
        said.seek(0)
        return _reason(said.read())


def _reason(said: str) -> str:
    """The errors in what W&B's command said, else its last line."""
    lines = [line.removeprefix("wandb: ").strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR ").rstrip(": ") for line in lines if line.startswith("ERROR ")]
    return (" ".join(errors) or (lines or ["nothing was sent"])[-1])[:LONGEST_REASON]


def sweep_of(folder: Path) -> str | None:
    """The name of the sweep's folder where a run is a cell of a sweep; None for a single run.

    Raises:
        DataError: status.json is damaged.
    """
    status = cells.read(folder)
    return folder.resolve().parent.name if status and status.multirun else None


def run_id(figures: Mapping[str, Any]) -> str:
    """The id of the W&B run: the same whenever these figures are logged."""
    told = {key: figures["run"].get(key) for key in ("created", "config", "commit")}
    return provenance.key_of({**told, "dataset": figures["dataset"].get("hash"), "title": figures["title"]})[:ID_DIGITS]


def hashed_id(row_id: str, dataset_hash: str) -> str:
    """What stands for the id of a row that must not leave: 16 hexadecimal digits, for one data set always the same.

    A hash hides a name from those who do not know it. Whoever has the data set can hash its ids and find the row.

    Args:
        row_id: the id in scores.parquet.
        dataset_hash: `dataset.hash` in figures.json, and `provenance.dataset` in the config of the W&B run.

    >>> hashed_id("train/n01443537/images/n01443537_0.JPEG", "d") == hashed_id("another", "d")
    False
    """
    return hashlib.blake2b(row_id.encode(), key=dataset_hash.encode()[:64], digest_size=ID_DIGITS // 2).hexdigest()


def without_folders(value: Any) -> Any:  # noqa: ANN401
    """A configuration in which an absolute path is its last part: where data lie on a machine is nobody's business.

    >>> without_folders({"root": "/data/private/imagenet", "encoder": ["org/model", 1]})
    {'root': 'imagenet', 'encoder': ['org/model', 1]}
    """
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name  # which knows both separators
    return value


def origin(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Where figures come from: versions, and hashes of all that went in."""
    run = figures["run"]
    return {
        "commit": run.get("commit"),
        "versions": run.get("versions"),
        "created": run.get("created"),
        "schema": figures.get("schema"),
        "dataset": figures["dataset"].get("hash"),
        "split": figures.get("split", {}).get("hash"),
        "weights": figures["encoder"].get("weights_hash"),
    }


def sample(scores: pl.DataFrame, count: int) -> pl.DataFrame:
    """Rows of a table of scores: those with the largest memorization scores, and as many others at random.

    Args:
        scores: columns of `tables.SCORES` or `tables.OBJECT_SCORES`, one reference.
        count: how many rows at most.

    Returns:
        The columns that may leave, and `chosen`: "largest score", "random", or "all" where all rows are there.
    """
    order = pl.col("memorization_score").fill_nan(None)
    scores = scores.select(name for name in SCORE_COLUMNS if name in scores.columns)
    scores = scores.sort([order, "id"], descending=[True, False], nulls_last=True)
    if len(scores) <= count:
        return scores.with_columns(chosen=pl.lit("all"))
    largest = count - count // 2
    parts = {"largest score": scores.head(largest), "random": scores[largest:].sample(count - largest, seed=0)}
    return pl.concat(part.with_columns(chosen=pl.lit(name)) for name, part in parts.items())


def _suffix(percent: str) -> str:
    return "" if percent == "100" else f"_{percent}_percent"


def _chartable(figures: Mapping[str, Any]) -> tuple[str, str]:
    """Columns of the comparison to chart, the first that is there: at the largest confident share reported."""
    if figures["infers"] == "objects":
        return "corrected_gap", "gap"
    found = next(iter(figures["references"].values()))
    suffix = _suffix(max(found["roles"]["target"]["top1"], key=float))
    return f"corrected_gap{suffix}", f"gap{suffix}"


def comparison(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per reference: its gaps on target and unseen rows and the corrected one, each with its interval.

    Of an object run one row per reference and prediction, the headline first; its gap is PRG.
    """
    return _object_comparison(figures) if figures["infers"] == "objects" else _label_comparison(figures)


def _label_comparison(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, found in figures["references"].items():
        row: dict[str, Any] = {"reference": name}
        for percent, cell in found["roles"]["target"]["top1"].items():
            unseen = found["roles"].get("unseen", {}).get("top1", {}).get(percent, {}).get("gap")
            corrected = found.get("corrected_gap", {}).get("top1", {}).get(percent)
            row |= _compared((cell["gap"], unseen, corrected), _suffix(percent))
        rows.append({**row, "verdict": found["verdict"]})
    return rows


def _object_comparison(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, found in figures["references"].items():
        target = found["roles"]["target"]
        for prediction in (key for key in target if key in PREDICTIONS):
            cell = target[prediction]
            unseen = found["roles"].get("unseen", {}).get(prediction, {}).get("gap")
            corrected = found.get("corrected", {}).get(prediction, {}).get("gap")
            row = {"reference": name, "predicted": prediction, **_compared((cell["gap"], unseen, corrected), "")}
            row |= {figure: cell[figure]["value"] for figure in OBJECT_FIGURES}
            rows.append({**row, "verdict": found["verdict"]})
    return rows


def _compared(estimates: Sequence[Mapping[str, Any] | None], suffix: str) -> dict[str, Any]:
    """The columns of `COMPARED`, each with its interval, where there is one."""
    row: dict[str, Any] = {}
    for kind, estimate in zip(COMPARED, estimates, strict=True):
        if estimate is not None:
            row |= {f"{kind}{suffix}": estimate["value"]}
            row |= {f"{kind}{suffix}_{end}": estimate[end] for end in ("low", "high")}
    return row


def headline(figures: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The gaps that the verdict rests on as `headline/<gap>` and their ends, under one name for all runs."""
    row = next(row for row in comparison(figures) if row["reference"] == figures["headline"])
    suffix = _chartable(figures)[1].removeprefix("gap")
    yield "headline/reference", figures["headline"]
    for kind in COMPARED:
        for end in ("", "_low", "_high"):
            if f"{kind}{suffix}{end}" in row:
                yield f"headline/{kind}{end}", row[f"{kind}{suffix}{end}"]


def plain(figures: Mapping[str, Any]) -> Iterator[tuple[str, float | str | bool]]:
    """What the parts of figures.json that are no estimates say, by the path of its keys; lists are in tables."""
    stack: list[tuple[str, Any]] = [(part, figures.get(part)) for part in RUN_PARTS]
    for name, found in figures["references"].items():
        stack += [(f"{name}/{part}", found.get(part)) for part in PLAIN_PARTS]
    while stack:
        path, value = stack.pop()
        if isinstance(value, Mapping):
            stack += [(f"{path}/{key}", item) for key, item in value.items()]
        elif isinstance(value, bool | int | float | str):
            yield path, value


def flat(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every estimate as `<reference>/<role>/<top>/<percent>/<figure>` and its ends; utility as `utility/<measure>`.

    Figures of pairs of references are in tables instead, see `agreement` and `differences`.
    """
    stack: list[tuple[str, Any]] = [
        (name, {**found["roles"], **{part: found[part] for part in WHOLE_RUN if part in found}})
        for name, found in figures["references"].items()
    ]
    stack += [(f"utility/{item['measure']}", item["estimate"]) for item in figures.get("utility", [])]
    stack.append(("agreement/correlated_by_all", figures.get("agreement", {}).get("correlated_by_all")))
    while stack:
        path, value = stack.pop()
        if not isinstance(value, Mapping):
            continue
        if "n_used" in value:
            yield path, value["value"]
            yield from ((f"{path}_{end}", value[end]) for end in ("low", "high", "n_used", "n_excluded"))
        else:
            stack += [(f"{path}/{key}", item) for key, item in value.items() if key != "curve"]


def agreement(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per two references: each measure of how far they agree, with its interval and rows."""
    return [
        {"first": pair["first"], "second": pair["second"]}
        | {
            name if end == "value" else f"{name}_{end}": value
            for name, estimate in pair.items()
            if isinstance(estimate, Mapping) and "value" in estimate
            for end, value in estimate.items()
        }
        | {f"mcnemar_{key}": value for key, value in pair.get("mcnemar", {}).items()}
        for pair in figures.get("agreement", {}).get("pairs", [])
    ]


def differences(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per two references and confident share: gap to the first less gap to the second, with its interval."""
    rows = []
    for pair in figures.get("agreement", {}).get("pairs", []):
        for percent in pair["target"]:
            row: dict[str, Any] = {"first": pair["first"], "second": pair["second"], "percent": float(percent)}
            for kind in ("target", "unseen", "corrected"):
                if kind in pair:
                    estimate = pair[kind][percent]
                    row |= {kind: estimate["value"], **{f"{kind}_{end}": estimate[end] for end in ("low", "high")}}
            rows.append(row)
    return rows


def _log_curves(run: wandb.Run, training: Mapping[str, pl.DataFrame]) -> None:
    """Each curve against its own steps: networks are trained one after the other."""
    for name, curve in training.items():
        base = f"training/{name}"
        run.define_metric(f"{base}/step", hidden=True)
        for column in curve.columns:
            if column != "step":
                run.define_metric(f"{base}/{column}", step_metric=f"{base}/step")
        for row in curve.iter_rows(named=True):
            run.log({f"{base}/{column}": value for column, value in row.items() if value is not None})


def _media(figures: Mapping[str, Any], scores: pl.DataFrame) -> dict[str, Any]:
    """Tables, charts and histograms of a run; nothing in them is of a single row."""
    import wandb

    rows = comparison(figures)
    compared = _table(rows)
    # One bar a reference: of an object run the headline's, which comes first.
    charted = _table([row for row, last in zip(rows, [None, *rows], strict=False) if _begins(row, last)])
    paired = {
        "agreement": agreement(figures),
        "differences": differences(figures),
        "likeness/tests": (figures.get("likeness") or {}).get("tests", []),
        "leaks/counts": (figures.get("leaks") or {}).get("counts", []),
    }
    return {
        "comparison": compared,
        "comparison_chart": wandb.plot.bar(
            charted,
            "reference",
            next(column for column in _chartable(figures) if column in charted.columns),
            title="Gap by reference",
        ),
        **{name: _table(rows) for name, rows in paired.items() if rows},
        **(_object_media(figures) if figures["infers"] == "objects" else _label_media(figures)),
        **_histograms(scores),
    }


def _begins(row: Mapping[str, Any], last: Mapping[str, Any] | None) -> bool:
    """True for the first row of a reference."""
    return last is None or row["reference"] != last["reference"]


def _label_media(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "gap_curves": _gap_curves(figures),
        **{f"{name}/curve": _curve(name, found) for name, found in figures["references"].items()},
        **{f"{name}/per_class": _per_class(found) for name, found in figures["references"].items()},
    }


def _object_media(figures: Mapping[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for name, found in figures["references"].items():
        parts = {"per_object": _per_object(found), "fine_grained": _fine_grained(found)}
        tables |= {f"{name}/{part}": _table(rows) for part, rows in parts.items() if rows}
    return tables


def _per_object(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"object": row["object"], "rows": row["rows"]}
        | {key: row[key]["value"] for key in ("target", "reference", "gap")}
        | {f"gap_{end}": row["gap"][end] for end in ("low", "high")}
        for row in found["per_object"][:MOST_OBJECTS]
    ]


def _fine_grained(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per role, ranking and share of rows that the ranking puts first."""
    return [
        {"role": role, "ranking": ranking, "percent": float(percent), "n": cell["n"], "optimistic": cell["optimistic"]}
        | {gap: cell[gap]["value"] for gap in ("recall_gap", "precision_gap", "f_gap")}
        | {f"recall_gap_{end}": cell["recall_gap"][end] for end in ("low", "high")}
        for role, figures in found["roles"].items()
        for ranking, cells in figures.get("fine_grained", {}).items()
        for percent, cell in cells.items()
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> wandb.Table:
    """Rows as a table; a row may lack a column."""
    import wandb

    columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))
    return wandb.Table(columns=columns, data=[[row.get(str(column)) for column in columns] for row in rows])


def _frame(frame: pl.DataFrame) -> wandb.Table:
    """A table as it is; lists of words become text."""
    words = [name for name, kind in frame.schema.items() if kind == pl.List(pl.String)]
    return _table(frame.with_columns(pl.col(words).list.join(", ")).to_dicts())


def _comparison_media(comparison: Comparison) -> dict[str, Any]:
    """Table, tests, charts and page of a comparison."""
    import wandb

    text = [name for name, kind in comparison.table.schema.items() if kind == pl.String]
    shown = comparison.table.with_columns(
        pl.Series(name, without_folders(comparison.table[name].to_list()), dtype=pl.String) for name in text
    )
    charts = {}
    for kind in comparison.kinds():
        for reference in kind.references():
            rows = kind.widest().filter(pl.col("reference") == reference)
            gap = "gap" if rows["corrected_gap"].null_count() else "corrected_gap"
            bars = _frame(rows.select("run", gap))
            title = f"{gap.replace('_', ' ').capitalize()} against {reference}"
            charts[f"{kind.table['infers'][0]}/{reference}/gap_chart"] = wandb.plot.bar(bars, "run", gap, title=title)
    return {
        "runs": _frame(shown),
        **({"tests": _frame(comparison.tests)} if len(comparison.tests) else {}),
        **charts,
        **_page("page", comparison.files[0]),
    }


def _page(name: str, path: Path) -> dict[str, Any]:
    """A page as it is, where it was written."""
    import wandb

    return {name: wandb.Html(path.read_text("utf-8"), inject=False, data_is_not_path=True)} if path.exists() else {}


def _curve(name: str, found: Mapping[str, Any]) -> Any:  # noqa: ANN401
    import wandb

    curve = found["roles"]["target"]["curve"]
    return wandb.plot.line_series(
        xs=curve["percent"],
        ys=[curve["target"], curve["reference"]],
        keys=["target", name],
        title=f"Accuracy on target rows against {name}",
        xname="most confident rows, %",
    )


def _gap_curves(figures: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The gap to each reference over the most confident rows, on target rows and on unseen ones."""
    import wandb

    curves = {
        f"{name}, {role}": cells["curve"]
        for name, found in figures["references"].items()
        for role, cells in found["roles"].items()
        if "curve" in cells
    }
    return wandb.plot.line_series(
        xs=[curve["percent"] for curve in curves.values()],
        ys=[curve["gap"] for curve in curves.values()],
        keys=list(curves),
        title="Gap to each reference",
        xname="most confident rows, %",
    )


def _per_class(found: Mapping[str, Any]) -> wandb.Table:
    return _table(
        [
            {"label": row["label"], "name": row["name"], "n_used": row["gap"]["n_used"]}
            | {key: row[key]["value"] for key in ("target", "reference", "gap")}
            | {f"gap_{end}": row["gap"][end] for end in ("low", "high")}
            for row in found["per_class"]
        ]
    )


def _histograms(scores: pl.DataFrame) -> dict[str, Any]:
    import wandb

    defined = scores.filter(pl.col("memorization_score").fill_nan(None).is_not_null())
    return {
        f"{name}/{role}/memorization_score_histogram": wandb.Histogram(rows["memorization_score"].to_list())
        for (name, role), rows in defined.group_by("reference", "role", maintain_order=True)
    }


def _pictures(gallery: Sequence[GalleryItem], run_dir: Path) -> dict[str, Any]:
    """The gallery, and the report as it is."""
    pictures = [_picture(item) for item in gallery if item.seen.image is not None]
    return {**({"most_memorized": pictures} if pictures else {}), **_page("report", run_dir / "report.html")}


def _picture(item: GalleryItem) -> wandb.Image:
    import io

    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(item.seen.image or b"")), caption=item.told())
