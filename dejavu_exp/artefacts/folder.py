"""From evidence to a run folder: scores, figures and report as a run of the instrument has them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import yaml

import dejavu_exp.artefacts.files as read_files
from dejavu_exp import agreement, leaks, likeness, provenance, report, tables
from dejavu_exp.artefacts.base import Answers, Imported, Settings, usable
from dejavu_exp.config import that_decides
from dejavu_exp.likeness import Likeness
from dejavu_exp.report.settings import ReportSettings
from dejavu_exp.scoring import LabelInference, ObjectInference
from dejavu_exp.tables import Estimate, Role, Status

MEASURED = (Role.TARGET, Role.UNSEEN)


def write(
    found: Imported,
    settings: Settings,
    scoring: LabelInference | ObjectInference,
    shown: ReportSettings,
    encoder: Mapping[str, Any],
    config: Mapping[str, Any],
    run_dir: Path,
) -> dict[str, Any]:
    """Score what was imported, and write the run folder.

    Args:
        found: what was imported.
        settings: it was imported with.
        scoring: makes the figures.
        shown: what the report shows.
        encoder: what is told of the encoder: description and epoch.
        config: the resolved configuration, written down with the results.
        run_dir: gets the files.

    Returns:
        What figures.json holds.
    """
    hashes = read_files.hashes(found.files)
    config = {
        **config,
        "probe": {**config["probe"], "k": found.k},
        "artefacts": {**config["artefacts"], "hash": provenance.key_of(hashes)},
    }
    measured = usable(found.rows, *MEASURED)
    first = next(iter(found.references.items()))
    alike = likeness.compare(
        _described(measured), _from_elsewhere(*first), scoring.adjust, scoring.level, settings.seed
    )
    scores, measures = {}, {}
    for name, answers in found.references.items():
        scores[name] = _scored(found, answers, scoring, alike, name)
        measures[name] = scoring.figures(scores[name], found.rows.select("id"), settings.seed)
        if answers.ranks == 1:
            scores[name] = scores[name].with_columns(reference_correct_top5=pl.lit(None, pl.Boolean))
            measures[name] = _without_top5(measures[name])
    everything = pl.concat(scores.values())
    by_label = isinstance(scoring, LabelInference) and scoring.cluster == "label"
    agreed = agreement.compare_references(
        everything,
        scoring.fractions,
        scoring.level,
        scoring.resamples,
        settings.seed,
        scoring.reference_value(),
        by_label=by_label,
    )
    rows = found.rows.with_columns(status=_statuses(everything, found.rows))
    facts = _facts(found, rows, settings, scoring, measures, agreed, alike, encoder, config, hashes)
    tables.write_text(yaml.safe_dump(dict(config), sort_keys=False), run_dir / "config.yaml")
    no_pairs = pl.DataFrame(schema=dict(leaks.PAIRS))
    report.write(run_dir, facts, everything, [], _correlated(everything, found.rows), no_pairs, shown)
    return facts


def _described(measured: pl.DataFrame) -> pl.DataFrame:
    """What is known of the measured rows without the encoder, for `likeness.compare`: neither sizes nor tags."""
    return measured.select(
        "id", "role", "label", "truth",
        tags=pl.lit(None, pl.List(pl.String)),
        box_share=pl.lit(None, pl.Float64),
        crop_share=pl.lit(None, pl.Float64),
    )  # fmt: skip


def _from_elsewhere(name: str, answers: Answers) -> Any:  # noqa: ANN401
    """A reference's evidence where it is not made from the encoder's, from which no weight must be made."""
    return None if name == "label_shuffle" else answers.evidence


def _scored(
    found: Imported, answers: Answers, scoring: LabelInference | ObjectInference, alike: Likeness | None, name: str
) -> pl.DataFrame:
    rows = found.rows.filter(pl.col("role").is_in(MEASURED))
    if alike is not None:
        weights = alike.weights.select("id", "weight")
        rows = rows.join(weights, on="id", how="left", validate="1:1", maintain_order="left")
    asked = usable(rows, *MEASURED)["id"].to_list()
    scores = scoring.score(rows, found.target, answers.evidence.spread_over(asked), name)
    if answers.other is None:
        return scores
    target, reference = answers.other
    heldout = found.rows.filter(pl.col("role") == Role.HELDOUT)
    return pl.concat([scores, scoring.score(heldout, target, reference, name)])


def _without_top5(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures without those that need more than the reference's first label."""

    def lost(estimate: Mapping[str, Any]) -> dict[str, Any]:
        return Estimate.undefined(estimate["n_used"] + estimate["n_excluded"]).as_dict()

    roles = {
        role: {
            **told,
            "top5": {
                percent: {key: value if key == "target" else lost(value) for key, value in cell.items()}
                for percent, cell in told["top5"].items()
            },
        }
        for role, told in figures["roles"].items()
    }
    gaps = {
        name: {**figures[name], "top5": {percent: lost(value) for percent, value in figures[name]["top5"].items()}}
        for name in ("corrected_gap",)
        if name in figures
    }
    return {**figures, "roles": roles, **gaps}


def _statuses(scores: pl.DataFrame, rows: pl.DataFrame) -> pl.Series:
    """Of each row as the first reference has it; as imported where it has none."""
    first = scores.filter(pl.col("reference") == scores["reference"][0]).select("id", scored="status")
    joined = rows.join(first, on="id", how="left", validate="1:1", maintain_order="left")
    return joined.select(pl.coalesce("scored", "status")).to_series()


def _correlated(scores: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """As `agreement.correlated_by_all`, with the positions that the released code counts in."""
    manifest = rows.with_columns(path=pl.col("id"))
    found = agreement.correlated_by_all(scores, manifest).drop("position")
    known = rows.select("id", "position")
    return found.join(known, on="id", how="left", validate="1:1").sort("origin", "position")


def _facts(
    found: Imported,
    rows: pl.DataFrame,
    settings: Settings,
    scoring: LabelInference | ObjectInference,
    measures: Mapping[str, dict[str, Any]],
    agreed: Mapping[str, Any],
    alike: Likeness | None,
    encoder: Mapping[str, Any],
    config: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """What figures.json holds, by the keys of `stages.collect`."""
    headline = next(iter(measures))
    names, probe = found.data.class_names, settings.probe
    references = {
        name: {
            "description": found.references[name].description,
            "verdict": scoring.verdict(figures, name, random=False),
            **figures,
            "per_class": [{**row, "name": names.get(row["label"], row["label"])} for row in figures["per_class"]],
        }
        for name, figures in measures.items()
    }
    dealt = rows.select("id", "role").sort("id")
    counts = {str(role): _counts(rows.filter(pl.col("role") == role)) for role in Role}
    bank = counts[Role.PUBLIC]
    counts[Role.PUBLIC] = {**bank, "rows": found.n_public, "used": found.n_public, "by_status": {"ok": found.n_public}}
    return {
        "schema": tables.FIGURES_VERSION,
        "title": f"{encoder['description']} on {found.data.name}",
        "verdict": " ".join(filter(None, [references[headline]["verdict"], alike.warning if alike else ""])),
        "headline": headline,
        "notes": [*found.notes, *_no_unseen(rows)],
        "problems": list(found.data.problems),
        "encoder": {
            "description": encoder["description"],
            "weights": "unknown: imported results",
            "weights_hash": "unknown",
            "random": False,
            "trained_here": False,
            "epoch": encoder["epoch"],
        },
        "dataset": {
            "name": found.data.name,
            "rows": found.data.n_rows,
            "labels": found.n_labels,
            "hash": found.data.hash,
        },
        "split": {"hash": provenance.hash_table(dealt)},
        "infers": scoring.infers,
        "probe": {
            "view": probe.query.name,
            "bank_view": probe.bank.name,
            "k": found.k,
            "metric": probe.metric,
            "ties": probe.ties,
            "bank": found.n_public,
            "bank_excluded": 0,
            "tied": float(found.target.tied.mean()),
        },
        "counts": counts,
        "references": references,
        "agreement": agreed,
        "likeness": alike and alike.figures(),
        "leaks": None,
        "coverage": _coverage(found, rows, alike),
        "utility": [],
        "gate": None,
        "run": {
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "config": that_decides(config),
            "files": dict(hashes),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {},
        },
    }


def _counts(rows: pl.DataFrame) -> dict[str, Any]:
    by_status = dict(rows.group_by("status").len().sort("status").iter_rows())
    used = by_status.get(Status.OK, 0)
    return {"rows": len(rows), "used": used, "excluded": len(rows) - used, "by_status": by_status}


def _no_unseen(rows: pl.DataFrame) -> list[str]:
    if len(usable(rows, Role.UNSEEN)):
        return []
    return ["There are no usable unseen rows, so the gap cannot be corrected for what the encoder knows better."]


def _coverage(found: Imported, rows: pl.DataFrame, alike: Likeness | None) -> dict[str, dict[str, float | None]]:
    described = _described(usable(rows, *MEASURED))
    tied = found.target.take(described["id"].to_list()).tied
    weighted = described.with_columns(target_tied=tied, weight=pl.lit(1.0))
    if alike is not None:
        weighted = weighted.drop("weight").join(alike.weights.select("id", "weight"), on="id", validate="1:1")
    return likeness.coverage(weighted)
