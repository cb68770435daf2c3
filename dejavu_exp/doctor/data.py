"""The data set and the split of a configuration: is what a run would look at there, readable, and what it should be?"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from dejavu_exp import config, crops, provenance
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.doctor import pictures
from dejavu_exp.doctor.findings import Examination, Severity
from dejavu_exp.errors import DejavuError
from dejavu_exp.tables import Role, Status

PARTS = ("dataset", "split", "probe", "leaks", "tagger", "scoring")
QUERIED = (Role.TARGET, Role.UNSEEN, Role.HELDOUT)
TINY_PX = 16
"""Pixels of a shorter side that shows next to nothing, where no background crop asks for more."""
FEW = 0.5
"""Share of usable views below which a role is worth a look."""


def examine(overrides: Sequence[str], most: int | None) -> Examination:
    """Look at a data set as a run with this configuration would.

    Args:
        overrides: as `python -m dejavu_exp` takes them.
        most: images to read and decode; None for all that have a role.

    Raises:
        ConfigError: the configuration cannot work.
    """
    resolved, _ = config.compose(overrides)
    parts = {name: config.bind(resolved[name], name) for name in PARTS}
    found = Examination("data", " ".join(overrides) or "the default configuration")
    try:
        manifest: Manifest = parts["dataset"].manifest()
    except DejavuError as error:
        found.fault("dataset", str(error))
        return found
    _tell_manifest(found, manifest)
    rows = _dealt(found, manifest, parts["split"], resolved["seed"])
    chosen = _sample(rows, most, resolved["seed"])
    found.facts["images looked at"] = f"{len(chosen)} of {len(rows)}"
    looks = pictures.look_at(chosen["path"].to_list(), manifest.store)
    pictures.tell(found, looks.with_columns(path=chosen["path"]))
    seen = _seen(chosen, looks)
    _tell_sizes(found, chosen, looks, parts["probe"])
    _tell_copies(found, seen, parts["leaks"], manifest)
    _tell_boxes(found, seen, parts["probe"])
    if rows["role"].null_count() < len(rows):
        _tell_views(found, seen, parts)
        _tell_bank(found, rows, seen, parts)
    _tell_objects(found, seen, manifest, parts)
    return found


def _tell_manifest(found: Examination, manifest: Manifest) -> None:
    """What the reader understood, and what not."""
    rows = manifest.rows
    statuses = rows.group_by("status").len().sort("status")
    found.facts |= {
        "data set": manifest.name,
        "rows": len(rows),
        "rows by status": dict(statuses.iter_rows()),
        "rows by origin": dict(rows.group_by("origin").len().sort("origin").iter_rows()),
        "classes": rows["label"].drop_nulls().n_unique(),
    }
    found.warn(
        "reader", "The reader could not understand all of it; the rows concerned lack what was not understood.",
        "Mend these places.", list(manifest.problems),
    )  # fmt: skip
    for status in statuses["status"]:
        if status != Status.OK:
            concerned = rows.filter(pl.col("status") == status)
            places = concerned.select(pl.concat_str(["id", pl.col("detail").fill_null("")], separator=": ")).to_series()
            severity = Severity.NOTE if status == Status.NO_ANNOTATION else Severity.WARNING
            found.add(
                severity, f"status_{status}",
                f"Rows have the status {status}, and serve only where that does not matter.",
                "Mend them where you want them measured.", places.to_list(),
            )  # fmt: skip
    _tell_names(found, rows["label"].drop_nulls().unique().sort().to_list())


def _tell_names(found: Examination, labels: Sequence[str]) -> None:
    """Labels that look like one and count as several."""
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(unicodedata.normalize("NFKC", label).strip().casefold(), []).append(label)
    found.warn(
        "labels_alike", "Labels differ only in case, blanks or the form of a letter, and count as different classes.",
        "Give each class one name.", [" / ".join(map(repr, names)) for names in alike.values() if len(names) > 1],
    )  # fmt: skip


def _dealt(found: Examination, manifest: Manifest, split: Any, seed: int) -> pl.DataFrame:  # noqa: ANN401
    """The rows with their roles; all rows without one where the split cannot be dealt."""
    try:
        roles = split.assign(manifest.rows, seed)
    except DejavuError as error:
        found.fault("split", str(error))
        return manifest.rows.with_columns(role=pl.lit(None, pl.String))
    counts = dict(roles.group_by("role").len().iter_rows())
    found.facts["images by role"] = {str(role): counts.get(role, 0) for role in Role}
    per_class = roles.filter(pl.col("label").is_not_null()).group_by("label").len()
    if len(per_class):
        smallest = per_class.sort("len", "label").row(0)
        found.facts["smallest class"] = f"{smallest[0]}, {smallest[1]} images with a role"
    found.warn(
        "split_short", "The split asks for more than some classes or parts have.",
        "Lower these numbers, or add images.", split.report(roles, manifest.rows),
    )  # fmt: skip
    if not counts.get(Role.UNSEEN):
        found.warn(
            "no_unseen",
            "No image has the role unseen: the gap cannot be corrected for what the encoder knows better.",
            "Give the split images that the encoder never saw, e.g. origin val of a table of your own.",
        )
    return manifest.rows.join(roles.select("id", "role"), on="id", how="inner", validate="1:1")


def _sample(rows: pl.DataFrame, most: int | None, seed: int) -> pl.DataFrame:
    """Up to `most` rows, as many of each role as there are, drawn by a hash of their id."""
    order = provenance.hash_orders(seed, "doctor", rows["id"].to_list())
    drawn = rows.with_columns(order=pl.Series(order)).sort("order", "id")
    drawn = drawn.with_columns(place=pl.int_range(pl.len()).over("role")).sort("place", "order")
    return (drawn if most is None else drawn.head(most)).drop("order", "place")


def _seen(chosen: pl.DataFrame, looks: pl.DataFrame) -> pl.DataFrame:
    """The rows as a run has them after it has read and decoded their images."""
    broken = pl.col("fault") != ""
    reason = pl.format("{}: {}", "path", "reason")
    return (
        chosen.drop("width", "height")
        .hstack(looks.select("width", "height", "content", "fault", "reason"))
        .with_columns(
            status=pl.when(broken).then(pl.lit(str(Status.UNREADABLE))).otherwise("status"),
            detail=pl.when(broken).then(reason).otherwise("detail"),
        )
        .drop("fault", "reason")
    )


def _tell_sizes(found: Examination, chosen: pl.DataFrame, looks: pl.DataFrame, probe: Any) -> None:  # noqa: ANN401
    """Images that are too small for the view, or not of the size that the data set says."""
    known = chosen.select("id", told_width="width", told_height="height").hstack(looks.select("width", "height"))
    least = getattr(probe.query, "min_side_px", TINY_PX)
    tiny = known.filter(pl.min_horizontal("width", "height") <= least)
    found.warn(
        "image_tiny", f"The shorter side of the image is at most {least} px: too small for the view that is asked for.",
        "Leave these images out, or lower split.min_side_px.",
        tiny.select(pl.format("{}: {} x {} px", "id", "width", "height")).to_series().to_list(),
    )  # fmt: skip
    other = known.filter((pl.col("told_width") != pl.col("width")) | (pl.col("told_height") != pl.col("height")))
    found.fault(
        "image_size",
        "The image has another size than the data set says. A run goes by the image, so boxes may lie elsewhere.",
        "Scale the boxes to the images that are there, or fetch the images that the boxes were drawn on.",
        other.select(
            pl.format("{}: is {} x {} px, told {} x {} px", "id", "width", "height", "told_width", "told_height")
        )
        .to_series()
        .to_list(),
    )


def _tell_copies(found: Examination, seen: pl.DataFrame, leaks: Any, manifest: Manifest) -> None:  # noqa: ANN401
    """The same bytes under several labels, or in several roles."""
    files = seen.filter(pl.col("content").is_not_null())
    copies = (
        files.sort("id")
        .group_by("content", maintain_order=True)
        .agg(pl.col("id"), labels=pl.col("label").drop_nulls().unique().sort())
        .filter(pl.col("id").list.len() > 1)
    )
    told = pl.format("{} ({})", pl.col("id").list.join(", "), pl.col("labels").list.join(", "))
    found.fault(
        "copies_labels", "The same file, byte for byte, has different labels: at most one of them is right.",
        "Keep one row of each, with the right label.",
        copies.filter(pl.col("labels").list.len() > 1).select(told).to_series().to_list(),
    )  # fmt: skip
    if seen["role"].null_count():
        return
    search = replace(leaks, near=False, embeddings=False)
    # Exact copies need neither the cache nor another look at the files.
    exact = search.find(seen, manifest.store, Path())
    pairs = exact.pairs.select(pl.format("{} ({}) and {} ({})", "id", "role", "other_id", "other_role")).to_series()
    severity = Severity.NOTE if exact.action == "exclude" or not exact.to_exclude() else Severity.FAULT
    found.add(
        severity, "copies_roles", "The same file, byte for byte, is in two roles."
        + (" A run with leaks=exclude takes the rows out that would spoil a figure." if severity == Severity.NOTE
           else " Figures that rest on these rows are wrong."),
        "Remove one of each, or set leaks=exclude.", pairs.to_list(),
    )  # fmt: skip


def _tell_boxes(found: Examination, seen: pl.DataFrame, probe: Any) -> None:  # noqa: ANN401
    """Boxes that cannot be right."""
    needed = getattr(probe.query, "needs_boxes", False)
    severity = Severity.FAULT if needed else Severity.NOTE
    effect = "a run leaves these rows out" if needed else "this probe does not look at boxes"
    ends = {name: pl.col("boxes").list.get(place) for place, name in enumerate(("xmin", "ymin", "xmax", "ymax"))}
    boxes = (
        seen.filter(pl.col("width").is_not_null(), pl.col("boxes").list.len() > 0)
        .select("id", "width", "height", "boxes")
        .explode("boxes")
        .with_columns(**ends)
    )
    inside = (
        (pl.col("xmin") >= 0) & (pl.col("ymin") >= 0) & (pl.col("xmax") <= pl.col("width"))
        & (pl.col("ymax") <= pl.col("height"))
    )  # fmt: skip
    empty = (pl.col("xmin") >= pl.col("xmax")) | (pl.col("ymin") >= pl.col("ymax"))
    whole = (
        (pl.col("xmin") <= 0) & (pl.col("ymin") <= 0) & (pl.col("xmax") >= pl.col("width"))
        & (pl.col("ymax") >= pl.col("height"))
    )  # fmt: skip
    told = pl.format("{}: [{}, {}, {}, {}] in {} x {} px", "id", *ends, "width", "height")

    def places(of: pl.Expr) -> list[str]:
        return boxes.filter(of).select(told).to_series().to_list()

    way_out = "Boxes are [xmin, ymin, xmax, ymax] in pixels of the stored image, upper ends exclusive: mend these."
    found.add(severity, "box_empty", f"Boxes have no area; {effect}.", way_out, places(empty))
    found.add(severity, "box_outside", f"Boxes leave their image; {effect}.", way_out, places(~empty & ~inside))
    if needed:
        found.warn(
            "box_whole", "Boxes cover the whole image, and leave no background to look at.",
            "Nothing, where the object does fill the image: these rows are left out.", places(~empty & inside & whole),
        )  # fmt: skip


def _tell_views(found: Examination, seen: pl.DataFrame, parts: dict[str, Any]) -> None:
    """How many of the images looked at give the view that is asked for, and why the others do not."""
    by_label = not parts["scoring"].needs_tags
    for role in Role:
        of_role = seen.filter(pl.col("role") == role)
        rule = parts["probe"].query if role in QUERIED else parts["probe"].bank
        if of_role.is_empty() or role == Role.SHARED:
            continue
        views = crops.views(of_role, rule)
        if by_label:
            lost = (pl.col("status") == Status.OK) & pl.col("label").is_null()
            views = views.with_columns(status=pl.when(lost).then(pl.lit(str(Status.NO_LABEL))).otherwise("status"))
        counts = dict(views.group_by("status").len().sort("len", descending=True).iter_rows())
        found.facts[f"{rule.name} views, {role}"] = {"of": len(views), **counts}
        usable = counts.get(Status.OK, 0)
        bad = views.filter(pl.col("status") != Status.OK)
        told = pl.concat_str(["id", "status", pl.col("detail").fill_null("")], separator=": ")
        places = bad.select(told).to_series().to_list()
        if not usable:
            found.fault(
                f"no_view_{role}", f"No {role} image that was looked at gives a usable {rule.name} view.",
                "Check boxes, captions and labels; for background crops lower split.min_side_px.", places,
            )  # fmt: skip
        elif usable < FEW * len(views):
            found.warn(
                f"few_views_{role}", f"Only {usable} of {len(views)} {role} images give a usable {rule.name} view.",
                "Check boxes, captions and labels; for background crops lower split.min_side_px.", places,
            )  # fmt: skip


def _tell_bank(found: Examination, rows: pl.DataFrame, seen: pl.DataFrame, parts: dict[str, Any]) -> None:
    """Whether the public rows can answer: enough of them, of every class."""
    public = rows.filter(pl.col("role") == Role.PUBLIC)
    broken = seen.filter(pl.col("role") == Role.PUBLIC, pl.col("status") == Status.UNREADABLE)
    most, k = len(public) - len(broken), parts["probe"].k
    if k > most:
        found.fault(
            "bank_small", f"probe.k={k} is more than the bank holds: at most {most} public images are usable.",
            f"Set probe.k to at most {most}, or choose a larger split.",
        )  # fmt: skip
    if parts["scoring"].needs_tags:
        return
    measured = rows.filter(pl.col("role").is_in([Role.TARGET, Role.UNSEEN]))["label"].drop_nulls()
    lost = sorted(set(measured) - set(public["label"].drop_nulls()))
    try:
        parts["scoring"].check_bank(lost)
    except DejavuError as error:
        found.fault("bank_class", str(error), examples=lost)


def _tell_objects(found: Examination, seen: pl.DataFrame, manifest: Manifest, parts: dict[str, Any]) -> None:
    """What there is to be inferred, for the test of object sets."""
    tagger = parts["tagger"]
    if not parts["scoring"].needs_tags:
        return
    if tagger.encoder is not None:
        found.note("objects_detected", "The objects come from a network (tagger), which was not asked.")
        return
    whole = crops.views(seen, crops.FullImage()).filter(pl.col("status") == Status.OK)
    try:
        tagger.check()
        tags = tagger.tag(whole, manifest, None, None).hstack(whole.select("id"))
    except DejavuError as error:
        found.fault("tagger", str(error))
        return
    silent = (pl.col("status") != Status.OK) | (pl.col("tags").list.len() == 0)
    found.facts["objects an image"] = tags.filter(~silent)["tags"].list.len().mean()
    found.warn(
        "no_objects", "Nothing says which objects are in these images; they are not measured.",
        "Annotate them, or let a detector find the objects (tagger=rtdetr).", tags.filter(silent)["id"].to_list(),
    )  # fmt: skip
