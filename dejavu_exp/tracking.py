"""Weights & Biases: the only module that imports wandb. What it logs is on disk already: failures lose nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from dejavu_exp.errors import ConfigError

if TYPE_CHECKING:
    from dejavu_exp.report.gallery import GalleryItem

log = logging.getLogger(__name__)

COMPARED = ("gap", "unseen_gap", "corrected_gap")


@dataclass(frozen=True)
class WandbTracking:
    """A run in Weights & Biases: summary figures, a comparison of references as table and chart, curves.

    Attributes:
        project: the W&B project.
        entity: user or team; null for the default one.
        group: groups the runs of a sweep.
        mode: "auto" (what WANDB_MODE says where it is set, else online where logged in), "online", "offline" or
            "disabled". Where online cannot be had the run is kept offline; nobody is asked.
        images: also upload the gallery. Off by default: memorized images may be private.
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
    ) -> None:
        """Log one run. A failure of W&B is a warning.

        Args:
            figures: what figures.json holds.
            scores: columns of `tables.SCORES`; histograms of the memorization score are made from it.
            run_dir: the run's folder; W&B writes below it.
            gallery: most memorized images, uploaded only where `images` is set.
            config: the resolved configuration.
        """
        if self._wanted() == "disabled":
            return
        try:
            self._log(figures, scores, run_dir, gallery, config)
        except Exception as error:
            log.warning("Weights & Biases: %s. The results are in %s all the same.", error, run_dir)

    def _log(
        self,
        figures: Mapping[str, Any],
        scores: pl.DataFrame,
        run_dir: Path,
        gallery: Sequence[GalleryItem],
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
        with wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=figures["title"],
            dir=str(run_dir),
            mode=self._mode(),
            config=dict(config),
            settings=settings,
            reinit="finish_previous",
        ) as run:
            table = comparison(figures)
            columns: list[str | int] = list(dict.fromkeys(column for row in table for column in row))
            compared = wandb.Table(
                columns=columns, data=[[row.get(str(column)) for column in columns] for row in table]
            )
            run.log(
                {
                    "comparison": compared,
                    "comparison_chart": wandb.plot.bar(
                        compared,
                        "reference",
                        next(column for column in _chartable(figures) if column in columns),
                        title="Gap by reference",
                    ),
                    **{f"{name}/curve": _curve(wandb, name, found) for name, found in figures["references"].items()},
                    **{f"{name}/per_class": _per_class(wandb, found) for name, found in figures["references"].items()},
                    **_histograms(wandb, scores),
                }
            )
            if self.images:
                run.log({"most_memorized": [_picture(wandb, item) for item in gallery]})
            run.summary.update({"verdict": figures["verdict"], "random_weights": figures["encoder"]["random"]})
            run.summary.update(dict(flat(figures)))

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
    found = next(iter(figures["references"].values()))
    suffix = _suffix(max(found["roles"]["target"]["top1"], key=float))
    return f"corrected_gap{suffix}", f"gap{suffix}"


def comparison(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per reference: its gaps on target and unseen rows and the corrected one, each with its interval."""
    rows = []
    for name, found in figures["references"].items():
        row: dict[str, Any] = {"reference": name}
        for percent, cell in found["roles"]["target"]["top1"].items():
            suffix = _suffix(percent)
            unseen = found["roles"].get("unseen", {}).get("top1", {}).get(percent, {}).get("gap")
            corrected = found.get("corrected_gap", {}).get("top1", {}).get(percent)
            for kind, estimate in zip(COMPARED, (cell["gap"], unseen, corrected), strict=True):
                if estimate is not None:
                    row |= {f"{kind}{suffix}": estimate["value"]}
                    row |= {f"{kind}{suffix}_{end}": estimate[end] for end in ("low", "high")}
        rows.append({**row, "verdict": found["verdict"]})
    return rows


def flat(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every estimate as `<reference>/<role>/<top>/<percent>/<figure>` and its ends."""
    stack: list[tuple[str, Any]] = [
        (name, {**found["roles"], "corrected_gap": found.get("corrected_gap", {}), "planted": found.get("planted", {})})
        for name, found in figures["references"].items()
    ]
    while stack:
        path, value = stack.pop()
        if not isinstance(value, Mapping):
            continue
        if "n_used" in value:
            yield path, value["value"]
            yield from ((f"{path}_{end}", value[end]) for end in ("low", "high", "n_used", "n_excluded"))
        else:
            stack += [(f"{path}/{key}", item) for key, item in value.items() if key != "curve"]


def _curve(wandb: Any, name: str, found: Mapping[str, Any]) -> Any:  # noqa: ANN401
    curve = found["roles"]["target"]["curve"]
    return wandb.plot.line_series(
        xs=curve["percent"],
        ys=[curve["target"], curve["reference"]],
        keys=["target", name],
        title=f"Accuracy on target rows against {name}",
        xname="most confident rows, %",
    )


def _per_class(wandb: Any, found: Mapping[str, Any]) -> Any:  # noqa: ANN401
    columns = ["label", "name", "n_used", "target", "reference", "gap", "gap_low", "gap_high"]
    data = [
        [row["label"], row["name"], row["gap"]["n_used"]]
        + [row[key]["value"] for key in ("target", "reference", "gap")]
        + [row["gap"][end] for end in ("low", "high")]
        for row in found["per_class"]
    ]
    return wandb.Table(columns=columns, data=data)


def _histograms(wandb: Any, scores: pl.DataFrame) -> dict[str, Any]:  # noqa: ANN401
    defined = scores.filter(pl.col("memorization_score").is_not_null())
    return {
        f"{name}/{role}/memorization_score_histogram": wandb.Histogram(rows["memorization_score"].to_list())
        for (name, role), rows in defined.group_by("reference", "role", maintain_order=True)
    }


def _picture(wandb: Any, item: GalleryItem) -> Any:  # noqa: ANN401
    import io

    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(item.image)), caption=f"{item.id}: {item.label_name}, {item.score:.2f}")
