"""The plan of a run and the stages that join modules: what is prepared, trained, embedded, and told in figures.json."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from statistics import stdev
from typing import Any

import polars as pl

from dejavu_exp import agreement, crops, gate, images, likeness, provenance, tables, taggers
from dejavu_exp.captions import Caption
from dejavu_exp.config import that_decides
from dejavu_exp.datasets.base import Dataset, Manifest
from dejavu_exp.encoders import Encoder, LoadedEncoder
from dejavu_exp.encoders.base import BOTH
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.extract import Extractor
from dejavu_exp.gate import Thresholds
from dejavu_exp.leaks import CopySearch, Leaks
from dejavu_exp.likeness import Likeness
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.references.base import OtherDirection, Reference, ReferenceInputs
from dejavu_exp.references.floors import LabelShuffle
from dejavu_exp.references.naive_bayes import NaiveBayes
from dejavu_exp.report.settings import ReportSettings
from dejavu_exp.scoring import LabelInference, ObjectInference
from dejavu_exp.scoring.common import LEAST_RESAMPLES
from dejavu_exp.shards import Embeddings
from dejavu_exp.splits import Split
from dejavu_exp.tables import Role, Status
from dejavu_exp.taggers import Tagger
from dejavu_exp.tracking import WandbTracking
from dejavu_exp.training import TrainedHere, TrainingInputs, TrainingSettings, load_if_ready
from dejavu_exp.utility import Utility

MEASURED = (Role.TARGET, Role.UNSEEN)


@dataclass(frozen=True)
class Plan:
    """A checked configuration: every part built, nothing read yet."""

    model: Encoder | TrainedHere
    dataset: Dataset
    split: Split
    leaks: CopySearch
    probe: KnnProbe
    references: Mapping[str, Reference]
    tagger: Tagger
    scoring: LabelInference | ObjectInference
    trainer: Extractor
    training: TrainingSettings
    utility: Utility
    gate: Thresholds
    report: ReportSettings
    tracking: WandbTracking
    seed: int
    gallery: int
    reference_seeds: int

    def __post_init__(self) -> None:
        if self.reference_seeds < 1:
            raise ConfigError(f"reference_seeds={self.reference_seeds}: must be at least 1.")


@dataclass(frozen=True)
class Views:
    """The images of a run and their views; excluded rows stay, with a status.

    Attributes:
        manifest: the data set as read.
        rows: the manifest's rows that have a role, with `role` and `content`.
        queries: query views of roles target, unseen and heldout, columns of `tables.VIEWS`.
        bank: bank views of role public.
        leaks: images that are in two roles.
        shortfalls: what the split asked for and did not get.
    """

    manifest: Manifest
    rows: pl.DataFrame
    queries: pl.DataFrame
    bank: pl.DataFrame
    leaks: Leaks
    shortfalls: list[str]

    def measured(self) -> pl.DataFrame:
        """Usable query views of target and unseen rows."""
        return _usable(self.queries, *MEASURED)

    def heldout(self) -> pl.DataFrame:
        """Usable query views of heldout rows."""
        return _usable(self.queries, Role.HELDOUT)

    def public(self) -> pl.DataFrame:
        """Usable bank views."""
        return _usable(self.bank, Role.PUBLIC)

    def leaked(self) -> dict[str, Any]:
        """What figures.json holds of images in two roles."""
        return self.leaks.figures(int((self.rows["status"] == Status.LEAKED).sum()))

    def labels(self) -> tuple[str, ...]:
        """All labels, or objects, of the bank, sorted: the columns of evidence."""
        return tuple(self.public()["truth"].explode().drop_nulls().unique().sort())


def _usable(views: pl.DataFrame, *roles: Role) -> pl.DataFrame:
    return views.filter(pl.col("role").is_in(roles), pl.col("status") == Status.OK)


@dataclass
class Stopwatch:
    """Seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, training: TrainingInputs | None = None) -> Iterator[None]:
        """Time a stage; one that comes several times is added up.

        Args:
            name: of the stage.
            training: what the stage may train; a network from the cache counts with the seconds its training took.
        """
        start = time.perf_counter()
        known = set(training.folders) if training else set()
        yield
        spent = time.perf_counter() - start
        if training:
            spent = training.whole_cost(spent, known)
        self.seconds[name] = round(self.seconds.get(name, 0) + spent, 3)


def check(plan: Plan) -> LoadedEncoder | None:
    """Find what cannot work before any image is read; load the encoder where it needs no training.

    Raises:
        DejavuError: parts do not go together, or weights, files or libraries are missing.
    """
    plan.probe.check_encoder(plan.model, "model")
    if plan.scoring.needs_tags:
        plan.tagger.check()
    for reference in plan.references.values():
        reference.check(plan.tagger, plan.model, plan.probe)
    encoder = load_if_ready(plan.model)
    if plan.leaks.embeddings and encoder is None:
        raise ConfigError(
            "leaks.embeddings=true looks for copies before anything is trained, and the encoder under test is trained "
            "here. Leave it out, or give a model with weights."
        )
    if encoder is not None:
        for what in plan.probe.reads:
            encoder.reading(what)
    return encoder


def prepare(plan: Plan, encoder: LoadedEncoder | None = None) -> Views:
    """Read the data set, deal the roles, look for copies between them, make the views.

    Args:
        plan: the run.
        encoder: the one under test; None where it is still to be trained.

    Raises:
        DataError: the data set cannot be read, or the split cannot be dealt.
    """
    manifest = plan.dataset.manifest()
    roles = plan.split.assign(manifest.rows, plan.seed)
    rows = manifest.rows.join(roles.select("id", "role"), on="id", how="inner", validate="1:1")
    rows = images.inspect(rows, manifest.store)
    known = None
    if plan.leaks.embeddings and encoder is not None:
        whole = crops.views(rows, crops.FullImage()).filter(pl.col("status") == Status.OK)
        known = plan.trainer.embed(encoder, whole, manifest.store, "embedding whole images").readable_only()
    copies = plan.leaks.find(rows, manifest.store, plan.trainer.cache, known)
    leaving = pl.col("id").is_in(copies.to_exclude() if copies.action == "exclude" else [])
    rows = rows.with_columns(
        status=pl.when(leaving).then(pl.lit(str(Status.LEAKED))).otherwise("status"),
        detail=pl.when(leaving).then(pl.lit("the same image has another role too")).otherwise("detail"),
    )
    asked = pl.col("role").is_in([*MEASURED, Role.HELDOUT])
    return Views(
        manifest,
        rows,
        crops.views(rows.filter(asked), plan.probe.query),
        crops.views(rows.filter(pl.col("role") == Role.PUBLIC), plan.probe.bank),
        copies,
        plan.split.report(roles, manifest.rows),
    )


def name_truth(plan: Plan, views: Views) -> Views:
    """Say of every view what is to be inferred from it, or what it answers: its label, or the objects in its image.

    Raises:
        ConfigError: the bank is smaller than k.
        DataError: a role that is needed has no usable row, or a class has no usable public image.
    """
    truth = _truth(plan, views)
    views = replace(views, queries=_with_truth(views.queries, truth), bank=_with_truth(views.bank, truth))
    nothing = (pl.col("status") == Status.OK) & (pl.col("truth").list.len() == 0)
    queries = views.queries.with_columns(
        status=pl.when(nothing).then(pl.lit(str(Status.NO_OBJECTS))).otherwise("status")
    )
    views = replace(views, queries=queries)
    _check(views, plan)
    return views


def _truth(plan: Plan, views: Views) -> pl.DataFrame:
    """Columns id, truth (null where it is not known) and why: the status of a row without truth."""
    if not plan.scoring.needs_tags:
        labels = pl.when(pl.col("label").is_not_null()).then(pl.concat_list("label"))
        return views.rows.select("id", truth=labels, why=pl.lit(str(Status.NO_LABEL)))
    whole = crops.views(views.rows.filter(pl.col("role") != Role.SHARED), crops.FullImage())
    whole = whole.filter(pl.col("status") == Status.OK)
    tags = taggers.tag_views(plan.tagger, whole, views.manifest, plan.trainer)
    unreadable = tags["status"] == Status.UNREADABLE
    return whole.select("id").hstack(
        tags.select(
            truth=pl.when(pl.col("status") == Status.OK).then("tags"),
            why=pl.when(unreadable).then(pl.lit(str(Status.UNREADABLE))).otherwise(pl.lit(str(Status.NO_ANNOTATION))),
        )
    )


def _with_truth(views: pl.DataFrame, truth: pl.DataFrame) -> pl.DataFrame:
    known = views.drop("truth").join(truth, on="id", how="left", validate="1:1", maintain_order="left")
    lost = (pl.col("status") == Status.OK) & pl.col("truth").is_null()
    return known.with_columns(status=pl.when(lost).then("why").otherwise("status")).select(views.columns)


def _check(views: Views, plan: Plan) -> None:
    """Find what would fail after the device work."""
    public = views.public()
    if len(public) < plan.probe.k:
        raise ConfigError(
            f"probe.k={plan.probe.k} is more than the bank holds: the split has {len(public)} usable public rows"
            f"{_told(views.bank, Role.PUBLIC)}. Set probe.k to at most {len(public)}, or choose a larger split."
        )
    if not views.labels():
        raise DataError(
            "no public row carries anything that could be inferred: the tagger finds no object in any of them. Lower "
            "tagger.min_score, or check the annotation."
        )
    if not len(views.measured().filter(pl.col("role") == Role.TARGET)):
        raise DataError(
            f"no target row can be used{_told(views.queries, Role.TARGET)}. Lower split.min_side_px for background "
            "crops; check boxes, captions and objects."
        )
    _bank_notes(views, plan)


def _bank_notes(views: Views, plan: Plan) -> list[str]:
    """What a reader must know of measured labels or objects that no public row has; some scorings refuse them."""
    lost = set(views.measured()["truth"].explode()) - set(views.labels())
    return plan.scoring.check_bank(sorted(lost))


def _told(views: pl.DataFrame, role: Role) -> str:
    """The statuses of a role in brackets."""
    return f" ({', '.join(f'{count} {status}' for status, count in status_counts(views, role).items())})"


def training_inputs(plan: Plan, views: Views) -> TrainingInputs:
    """What training may look at.

    Raises:
        DataError: a reference would be trained on a copy of a measured image.
    """
    rows = views.rows
    if "planted_repeats" not in rows.columns:
        rows = rows.with_columns(planted_repeats=pl.lit(1))
    inputs = TrainingInputs(
        model=plan.model,
        images=crops.views(views.rows, crops.FullImage()),
        backgrounds=views.queries,
        labels=views.labels(),
        repeats=dict(rows.select("id", "planted_repeats").drop_nulls().iter_rows()),
        captions=dict(rows.select("id", "captions").drop_nulls().iter_rows()),
        store=views.manifest.store,
        cache=plan.trainer.cache,
        device=plan.trainer.device,
        seed=plan.seed,
        settings=plan.training,
        folders={},
        waits={},
    )
    if any(reference.is_trained for reference in plan.references.values()):
        # Found before any training, which may take days.
        inputs.heldout()
        inputs.for_reference()
    return inputs


def train(plan: Plan, inputs: TrainingInputs) -> LoadedEncoder:
    """Train the encoder that the configuration asks to train on this data set."""
    if not isinstance(plan.model, TrainedHere):
        raise TypeError("only an encoder trained here can be trained")
    return plan.model.train(inputs)


def embed(plan: Plan, views: Views, encoder: LoadedEncoder) -> tuple[Views, Embeddings, Embeddings]:
    """Embed the measured queries and the bank; views whose image does not decode become "unreadable".

    Returns:
        The views with the new statuses, and the embeddings of those that remain usable, in their order.
    """
    queries = plan.trainer.embed(encoder, views.measured(), views.manifest.store, "embedding queries")
    bank = plan.trainer.embed(encoder, views.public(), views.manifest.store, "embedding the bank")
    views = replace(
        views,
        queries=_without_unreadable(views.queries, queries.reasons),
        bank=_without_unreadable(views.bank, bank.reasons),
    )
    _check(views, plan)
    return views, queries.readable_only(), bank.readable_only()


def _without_unreadable(views: pl.DataFrame, reasons: Mapping[str, str]) -> pl.DataFrame:
    broken = pl.col("view_id").is_in(list(reasons))
    return views.with_columns(
        status=pl.when(broken).then(pl.lit(str(Status.UNREADABLE))).otherwise("status"),
        detail=pl.when(broken)
        .then(pl.col("view_id").replace_strict(dict(reasons), default=None, return_dtype=pl.String))
        .otherwise("detail"),
    )


def reference_inputs(
    plan: Plan, views: Views, encoder: LoadedEncoder, target: Evidence, training: TrainingInputs
) -> ReferenceInputs:
    """All a reference may look at."""
    return ReferenceInputs(
        queries=views.measured(),
        heldout=views.heldout(),
        bank=views.public(),
        rows=views.rows,
        probe=plan.probe,
        target=target,
        encoder=encoder,
        labels=views.labels(),
        manifest=views.manifest,
        extractor=plan.trainer,
        tagger=plan.tagger,
        training=training,
        seed=plan.seed,
    )


def likely(plan: Plan, views: Views, name: str, found: Evidence) -> Likeness | None:
    """Whether target and unseen rows are alike, and what unseen rows count; None without unseen rows.

    Args:
        plan: the run.
        views: after embedding.
        name: of the first reference, whose answers tell how much a background says of its foreground.
        found: these answers.
    """
    # What is made from the encoder's answers tells what it has memorized, and no weight must be made from that.
    from_elsewhere = None if isinstance(plan.references[name], LabelShuffle) else found
    return likeness.compare(described(plan, views), from_elsewhere, plan.scoring.adjust, plan.scoring.level, plan.seed)


def described(plan: Plan, views: Views) -> pl.DataFrame:
    """What is known of the measured rows without the encoder: columns as `likeness.compare` takes them."""
    measured = views.measured()
    if any(isinstance(reference, NaiveBayes) for reference in plan.references.values()):
        tagged = taggers.tag_views(plan.tagger, measured, views.manifest, plan.trainer)
        tags = pl.when(tagged["status"] == Status.OK).then(tagged["tags"])
        known = views.rows.select("id", "width", "height", "boxes")
        measured = measured.with_columns(tags=tags)
    else:
        known = views.rows.select("id", "width", "height", "boxes", "tags")
    joined = measured.join(known, on="id", how="left", validate="1:1", maintain_order="left")
    area = (pl.col("width") * pl.col("height")).cast(pl.Float64)
    of_box = pl.element()
    sides = [of_box.list.get(end) - of_box.list.get(end - 2) for end in (2, 3)]
    return joined.select(
        "id", "role", "label", "truth", "tags",
        box_share=pl.col("boxes").list.eval(sides[0] * sides[1]).list.sum() / area,
        crop_share=(pl.col("xmax") - pl.col("xmin")) * (pl.col("ymax") - pl.col("ymin")) / area,
    )  # fmt: skip


def score(
    plan: Plan,
    views: Views,
    alike: Likeness | None,
    target: Evidence,
    reference: Evidence,
    other: OtherDirection | None,
    name: str,
) -> pl.DataFrame:
    """Scores of the measured rows against one reference; with the other direction, of the heldout rows too.

    There the second encoder is the target, and the encoder under test is its reference.
    """
    rows = views.queries.filter(pl.col("role").is_in(MEASURED))
    if alike is not None:
        weights = alike.weights.select("id", "weight")
        rows = rows.join(weights, on="id", how="left", validate="1:1", maintain_order="left")
    scores = plan.scoring.score(rows, target, reference, name)
    if other is None:
        return scores
    heldout = views.queries.filter(pl.col("role") == Role.HELDOUT)
    lost = (pl.col("status") == Status.OK) & ~pl.col("id").is_in(other.rows["id"].implode())
    heldout = heldout.with_columns(status=pl.when(lost).then(pl.lit(str(Status.NO_EVIDENCE))).otherwise("status"))
    return pl.concat([scores, plan.scoring.score(heldout, other.target, other.reference, name)])


def over_seeds(
    plan: Plan, views: Views, alike: Likeness | None, inputs: ReferenceInputs, name: str, figures: Mapping[str, Any]
) -> dict[str, Any] | None:
    """How the gaps to a reference vary with the seed that it is made with; None where there is one seed.

    The split and the encoder under test stay. Intervals hold the chance of the rows, this is the chance of the
    reference; one that nothing random is in does not vary.

    Returns:
        `gap` and `corrected_gap`, each with its `values`, the configured seed's first, and their standard `deviation`.
    """
    if plan.reference_seeds == 1:
        return None
    told = [figures]
    # Values are what is asked for, and they need no resamples.
    scoring = replace(plan.scoring, resamples=LEAST_RESAMPLES)
    for number in range(1, plan.reference_seeds):
        seed = provenance.hash_order(plan.seed, "reference", str(number)) % 2**31
        training = replace(inputs.training, seed=seed, folders={}, waits={})
        found = plan.references[name].evidence(replace(inputs, seed=seed, training=training))
        scores = score(plan, views, alike, inputs.target, found, None, name)
        told.append(scoring.figures(scores, views.rows.select("id"), plan.seed))
    estimates = [plan.scoring.headline_gaps(found) for found in told]
    values = {
        "gap": [gaps[Role.TARGET]["value"] for gaps, _ in estimates],
        "corrected_gap": [corrected["value"] for _, corrected in estimates if corrected],
    }
    return {
        key: {"values": found, "deviation": stdev(found)}
        for key, found in values.items()
        if len(found) > 1 and None not in found
    }


def agree(plan: Plan, views: Views, scores: pl.DataFrame) -> tuple[dict[str, Any], pl.DataFrame]:
    """How far the references agree, and the rows that all call correlated; see `agreement`."""
    scoring = plan.scoring
    settings = (scoring.fractions, scoring.level, scoring.resamples, plan.seed)
    by_label = isinstance(scoring, LabelInference) and scoring.cluster == "label"
    found = agreement.compare_references(scores, *settings, scoring.reference_value(), by_label=by_label)
    return found, agreement.correlated_by_all(scores, views.manifest.rows)


def utility(plan: Plan, views: Views, encoder: LoadedEncoder, bank: Embeddings) -> list[dict[str, Any]]:
    """What the encoder is good for, on whole unseen images: where they have labels, and where they have captions."""
    rows = views.rows.filter(pl.col("role") == Role.UNSEEN)
    unseen = crops.views(rows, crops.FullImage())
    found = []
    if plan.probe.bank == crops.FullImage() and not views.public()["label"].null_count():
        found += plan.utility.measure(
            encoder,
            plan.model,
            views.public(),
            bank.values,
            unseen,
            plan.trainer,
            views.manifest,
            plan.probe,
            plan.seed,
        )
    if plan.model.reads == BOTH:
        texts = crops.views(rows, Caption())
        found += plan.utility.measure_retrieval(encoder, texts, unseen, plan.trainer, views.manifest, plan.seed)
    return found


def status_counts(views: pl.DataFrame, role: Role) -> dict[str, int]:
    """Rows of a role by status."""
    return dict(views.filter(pl.col("role") == role).group_by("status").len().sort("status").iter_rows())


def collect(
    plan: Plan,
    views: Views,
    encoder: LoadedEncoder,
    target: Evidence,
    measures: Mapping[str, dict[str, Any]],
    agreed: dict[str, Any],
    useful: list[dict[str, Any]],
    alike: Likeness | None,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """All that figures.json holds, but the times.

    Args:
        plan: the run.
        views: after embedding.
        encoder: as loaded.
        target: evidence of the encoder.
        measures: figures of each reference, in the order of the configuration.
        agreed: how far the references do.
        useful: accuracies of the encoder on whole images.
        alike: how target and unseen rows compare.
        config: resolved.
    """
    headline = next(iter(measures))
    names = views.manifest.class_names
    references = {
        name: {
            "description": _first_line(plan.references[name]),
            "verdict": plan.scoring.verdict(found, name, random=encoder.random),
            **found,
            "per_class": [{**row, "name": names.get(row["label"], row["label"])} for row in found["per_class"]],
        }
        for name, found in measures.items()
    }
    everyone = pl.concat([views.queries, views.bank])
    counts = {}
    for role in Role:
        by_status = status_counts(everyone, role)
        used = by_status.get(Status.OK, 0)
        if role == Role.SHARED:
            by_status = dict(views.rows.filter(pl.col("role") == role).group_by("status").len().iter_rows())
            used = by_status.get(Status.OK, 0)
        rows = sum(by_status.values())
        counts[str(role)] = {"rows": rows, "used": used, "excluded": rows - used, "by_status": by_status}
    trained = plan.model if isinstance(plan.model, TrainedHere) else None
    images_listed = views.manifest.rows.sort("id").drop("path")
    dealt = views.rows.select("id", "role", "content").sort("id")
    facts = {
        "schema": tables.FIGURES_VERSION,
        "title": f"{encoder.description.split(',')[0]} on {views.manifest.name}",
        "verdict": " ".join(filter(None, [references[headline]["verdict"], alike.warning if alike else ""])),
        "headline": headline,
        "notes": notes(plan, views, encoder),
        "problems": [*views.manifest.problems, *_unreadable(everyone)],
        "encoder": {
            "description": encoder.description,
            "weights": encoder.weights,
            "weights_hash": encoder.weights_hash,
            "random": encoder.random,
            "trained_here": trained is not None,
            "epoch": (trained.epoch or trained.recipe.epochs) if trained else None,
        },
        "dataset": {
            "name": views.manifest.name,
            "rows": len(views.manifest.rows),
            "labels": len(views.labels()),
            "hash": provenance.hash_table(images_listed),
        },
        "split": {"hash": provenance.hash_table(dealt)},
        "infers": plan.scoring.infers,
        "probe": {
            "view": plan.probe.query.name,
            "bank_view": plan.probe.bank.name,
            "k": plan.probe.k,
            "metric": plan.probe.metric,
            "ties": plan.probe.ties,
            "bank": len(views.public()),
            "bank_excluded": len(views.bank) - len(views.public()),
            "tied": float(target.tied.mean()),
        },
        "counts": counts,
        "references": references,
        "agreement": agreed,
        "likeness": alike and alike.figures(),
        "leaks": views.leaked(),
        "coverage": _coverage(plan, views, target, alike),
        "utility": useful,
        "run": {"versions": provenance.versions(), "commit": provenance.commit(), "config": that_decides(config)},
    }
    return {**facts, "gate": gate.check(facts, plan.gate)}


def _coverage(plan: Plan, views: Views, target: Evidence, alike: Likeness | None) -> dict[str, dict[str, float | None]]:
    rows = described(plan, views)
    tied = target.take(rows["id"].to_list()).tied
    weighted = rows.with_columns(target_tied=tied, weight=pl.lit(1.0))
    if alike is not None:
        weighted = weighted.drop("weight").join(alike.weights.select("id", "weight"), on="id", validate="1:1")
    return likeness.coverage(weighted)


def notes(plan: Plan, views: Views, encoder: LoadedEncoder) -> list[str]:
    """What a reader must know before believing a figure."""
    found = [*views.shortfalls, *_bank_notes(views, plan)]
    if encoder.random:
        found.append("The encoder's weights are random: no figure here says anything of a trained model.")
    roles = set(views.measured()["role"])
    if Role.UNSEEN not in roles:
        found.append(
            "There are no usable unseen rows, so the gap cannot be corrected for what the encoder knows better."
        )
    if _same_network(plan.tagger.encoder, plan.model):
        found.append("The tagger is the encoder under test: it may have memorized the images whose tags it names.")
    if len(views.leaks.pairs):
        found.append(views.leaked()["sentence"])
    return found


def _same_network(first: object, second: object) -> bool:
    """True where both have the same architecture and weights, whatever is read out of them."""
    parts = [(getattr(part, "arch", None), getattr(part, "weights", None)) for part in (first, second)]
    return parts[0] == parts[1] and None not in parts[0]


def _unreadable(views: pl.DataFrame, most: int = 20) -> list[str]:
    broken = views.filter(pl.col("status") == Status.UNREADABLE)["detail"].drop_nulls().to_list()
    more = [f"{len(broken) - most} more images could not be read."] if len(broken) > most else []
    return [*broken[:most], *more]


def _first_line(part: object) -> str:
    return (type(part).__doc__ or "").strip().splitlines()[0]


def timed(facts: dict[str, Any], clock: Stopwatch) -> dict[str, Any]:
    """The same figures with the times, which alone differ between two runs of one configuration."""
    facts["run"] |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": clock.seconds}
    return facts
