"""The instrument from images to a report: the stages in order, no maths, no branch on a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from dejavu_exp import neighbours, report, stages, tables, training
from dejavu_exp.references.base import ReferenceInputs
from dejavu_exp.report import gallery
from dejavu_exp.stages import MEASURED, Plan, Stopwatch


def run(plan: Plan, run_dir: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one encoder.

    Args:
        plan: what to do.
        run_dir: gets scores.parquet, figures.json, report.html and config.yaml.
        config: the resolved configuration the plan was built from; written down with the results.

    Returns:
        What figures.json holds.
    """
    clock = Stopwatch()
    tables.write_text(yaml.safe_dump(dict(config), sort_keys=False), run_dir / "config.yaml")
    with clock.stage("check"):
        encoder = training.load_if_ready(plan.model)
        for reference in plan.references.values():
            reference.check(plan.tagger)
    with clock.stage("data"):
        views = stages.prepare(plan)
    with clock.stage("encoder"):
        encoder = encoder or stages.train(plan, views)
    with clock.stage("embeddings"):
        views, queries, bank = stages.embed(plan, views, encoder)
        measured = views.measured()
    with clock.stage("neighbours"):
        near = neighbours.search(queries.values, bank.values, plan.probe.k, plan.probe.metric)
        codes = stages.label_codes(views, near.positions)
        target = neighbours.vote(measured["id"].to_list(), codes, views.labels(), plan.probe.ties)
    with clock.stage("references"):
        inputs = ReferenceInputs(
            queries=measured,
            heldout=views.heldout(),
            target=target,
            labels=views.labels(),
            manifest=views.manifest,
            extractor=plan.trainer,
            tagger=plan.tagger,
            seed=plan.seed,
        )
        evidence = {name: reference.evidence(inputs) for name, reference in plan.references.items()}
    with clock.stage("scores"):
        rows = views.queries.filter(pl.col("role").is_in(MEASURED))
        scores = {name: plan.scoring.score(rows, target, found, name) for name, found in evidence.items()}
        measures = {name: plan.scoring.figures(found, views.rows, plan.seed) for name, found in scores.items()}
    facts = stages.timed(stages.collect(plan, views, encoder, target, measures, config), clock)
    shown = gallery.most_memorized(
        scores[facts["headline"]], measured, views.public(), near, views.manifest, views.rows, plan.gallery
    )
    everything = pl.concat(scores.values())
    report.write(run_dir, facts, everything, shown)
    report.show(facts, run_dir)
    plan.tracking.log(facts, everything, run_dir, shown, config)
    return facts
