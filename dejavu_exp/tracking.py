"""Weights & Biases: the only module that imports wandb. What it logs is on disk already: failures lose nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from dejavu_exp.errors import ConfigError
from dejavu_exp.tables import PREDICTIONS

if TYPE_CHECKING:
    import wandb

    from dejavu_exp.report.gallery import GalleryItem

log = logging.getLogger(__name__)

COMPARED = ("gap", "unseen_gap", "corrected_gap")
OBJECT_FIGURES = ("target_recall", "reference_recall", "ppg", "aucg", "precision_gap")
"""What the comparison of an object run has beside the gaps."""
MOST_OBJECTS = 1000
"""Rows of the table of objects, those with the largest gap."""
WHOLE_RUN = ("corrected_gap", "corrected", "both_directions", "planted")
"""Parts of a reference's figures that stand beside the roles."""
NO_CURVES: Mapping[str, pl.DataFrame] = MappingProxyType({})


@dataclass(frozen=True)
class WandbTracking:
    """A run in Weights & Biases: summary figures, a comparison of references as table and chart, curves.

    Attributes:
        project: the W&B project.
        entity: user or team; null for the default one.
        group: groups the runs of a sweep.
        mode: "auto" (what WANDB_MODE says where it is set, else online where logged in), "online", "offline" or
            "disabled". Where online cannot be had the run is kept offline; nobody is asked.
        images: also upload the gallery, with its captions. Off by default: what is memorized may be private.
    """

    project: str = "dejavu_exp"
    entity: str | None = None
    group: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    images: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline", "disabled"):
            raise ConfigError(f"tracking.mode={self.mode}: must be auto, online, offline or disabled.")

    def log(
        self,
        figures: Mapping[str, Any],
        scores: pl.DataFrame,
        run_dir: Path,
        gallery: Sequence[GalleryItem],
        config: Mapping[str, Any],
        training: Mapping[str, pl.DataFrame] = NO_CURVES,
    ) -> None:
        """Log one run. A failure of W&B is a warning.

        Args:
            figures: what figures.json holds.
            scores: columns of `tables.SCORES` or `tables.OBJECT_SCORES`; histograms of the memorization score are made
                from it.
            run_dir: the run's folder; W&B writes below it.
            gallery: most memorized images, or pairs with their captions, uploaded only where `images` is set.
            config: the resolved configuration.
            training: loss curves of networks trained for this run, as for `log_training`.
        """

        def fill(run: wandb.Run) -> None:
            run.log(_media(figures, scores))
            if self.images:
                run.log({"most_memorized": [_picture(item) for item in gallery if item.seen.image is not None]})
            _log_curves(run, training)
            run.summary.update({"verdict": figures["verdict"], "random_weights": figures["encoder"]["random"]})
            run.summary.update(dict(flat(figures)))

        self._log(fill, figures["title"], None, config, run_dir)

    def log_training(self, training: Mapping[str, pl.DataFrame], config: Mapping[str, Any], folder: Path) -> None:
        """Log loss curves alone, of a command that only trains. A failure of W&B is a warning.

        Args:
            training: by name of the network, with the columns step and any others, such as epoch, loss and
                learning_rate; logged as `training/<name>/<column>` against `training/<name>/step`.
            config: the resolved configuration.
            folder: W&B writes below it.
        """
        if training:
            self._log(lambda run: _log_curves(run, training), ", ".join(training), "train", config, folder)

    def _log(
        self,
        fill: Callable[[wandb.Run], None],
        title: str,
        job_type: str | None,
        config: Mapping[str, Any],
        folder: Path,
    ) -> None:
        """Open a run and fill it, unless tracking is disabled."""
        if self._wanted() == "disabled":
            return
        try:
            import wandb

            settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
            with wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group,
                name=title,
                job_type=job_type,
                dir=str(folder),
                mode=self._mode(),
                config=dict(config),
                settings=settings,
                reinit="finish_previous",
            ) as run:
                fill(run)
        except Exception as error:
            log.warning("Weights & Biases: %s. The results are in %s all the same.", error, folder)

    def _wanted(self) -> str:
        """The mode asked for: with "auto", W&B's own WANDB_MODE decides where it is set."""
        return os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode

    def _mode(self) -> Literal["online", "offline"]:
        """Online where that is wanted and possible, offline otherwise; asks nobody."""
        import wandb

        wanted = self._wanted()
        if wanted in ("offline", "dryrun"):
            return "offline"
        try:
            if wandb.login(prompt=False):
                return "online"
            reason = "not logged in" if wanted == "online" else None
        except Exception as error:  # no network, or a key that W&B refuses: an offline run can still be sent later
            reason = str(error)
        if reason:
            log.warning("Weights & Biases: %s; the run is kept offline, send it with `wandb sync`.", reason)
        return "offline"


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
    """Tables, charts and histograms of a run."""
    import wandb

    rows = comparison(figures)
    compared = _table(rows)
    # One bar a reference: of an object run the headline's, which comes first.
    charted = _table([row for row, last in zip(rows, [None, *rows], strict=False) if _begins(row, last)])
    paired = {"agreement": agreement(figures), "differences": differences(figures)}
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

    defined = scores.filter(pl.col("memorization_score").is_not_null())
    return {
        f"{name}/{role}/memorization_score_histogram": wandb.Histogram(rows["memorization_score"].to_list())
        for (name, role), rows in defined.group_by("reference", "role", maintain_order=True)
    }


def _picture(item: GalleryItem) -> wandb.Image:
    import io

    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(item.seen.image or b"")), caption=item.told())
