"""The instrument from images to a report: the stages in order, no maths, no branch on a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from dejavu_exp import neighbours, report, stages, tables, training
from dejavu_exp.report import gallery
from dejavu_exp.stages import Plan, Stopwatch


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
        encoder = stages.check(plan)
    with clock.stage("data"):
        views = stages.prepare(plan, encoder)
    with clock.stage("truth"):
        views = stages.name_truth(plan, views)
        lessons = stages.training_inputs(plan, views)
    with clock.stage("encoder", lessons):
        encoder = encoder or stages.train(plan, lessons)
    with clock.stage("embeddings"):
        views, queries, bank = stages.embed(plan, views, encoder)
    with clock.stage("neighbours"):
        near = neighbours.search(queries, bank, plan.probe.k, plan.probe.metric, **plan.trainer.search_settings)
        measured, public = views.measured(), views.public()
        target = neighbours.infer(measured["id"].to_list(), near, public["truth"], views.labels(), plan.probe.ties)
    inputs = stages.reference_inputs(plan, views, encoder, target, lessons)
    scores, measures, nearest, alike = {}, {}, {}, None
    for name, reference in plan.references.items():
        with clock.stage(f"references/{name}", lessons):
            found = reference.evidence(inputs)
            other = reference.other_direction(inputs)
            nearest[name] = found.nearest_by_id()
        with clock.stage("scores"):
            alike = alike or stages.likely(plan, views, name, found)
            scores[name] = stages.score(plan, views, alike, target, found, other, name)
            measures[name] = plan.scoring.figures(scores[name], views.rows, plan.seed)
        with clock.stage(f"reference_seeds/{name}"):
            measures[name]["seeds"] = stages.over_seeds(plan, views, alike, inputs, name, measures[name])
    everything = pl.concat(scores.values())
    with clock.stage("agreement"):
        agreed, correlated = stages.agree(plan, views, everything)
    with clock.stage("utility"):
        useful = stages.utility(plan, views, encoder, bank)
    facts = stages.timed(stages.collect(plan, views, encoder, target, measures, agreed, useful, alike, config), clock)
    shown = gallery.most_memorized(
        scores[facts["headline"]],
        measured,
        public,
        near,
        views.manifest,
        views.rows,
        plan.gallery,
        nearest[facts["headline"]],
        with_images=plan.report.with_images,
    )
    report.write(
        run_dir,
        facts,
        everything,
        shown,
        correlated,
        views.leaks.pairs,
        plan.report,
        gallery.of_copies(facts["leaks"]["pairs"], views.manifest, plan.report.pictured),
    )
    report.show(facts, run_dir)
    plan.tracking.log(facts, everything, run_dir, shown, config, training.curves(lessons))
    return facts
