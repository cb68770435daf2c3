"""Boxes for images that have none: `python -m dejavu_exp.boxes dataset=folder dataset.root=DIR tagger=rtdetr`."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from dejavu_exp import config, tables
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.tables import Float32Array, Status

if TYPE_CHECKING:
    from dejavu_exp.encoders import DetectorEncoder
    from dejavu_exp.extract import Extractor
    from dejavu_exp.taggers import ScoreTagger

OUT = Path("boxes.parquet")


class Detected(NamedTuple):
    """What is found in one image.

    Attributes:
        boxes: as in `tables.MANIFEST`; None where nobody knows where the foreground is.
        objects: names of what is in the boxes, sorted, each once; None where the image was not looked at.
        status: of the row.
        detail: why it is not ok.
    """

    boxes: list[list[int]] | None
    objects: list[str] | None
    status: Status
    detail: str | None = None


def boxes_of(
    values: Float32Array, size: tuple[int, int], classes: Sequence[str], min_score: float, *, square: bool
) -> Detected:
    """The boxes of an image above a score, whatever they show.

    An image in which no box is found is not taken for background: what a detector does not know is missed by it.

    Args:
        values: shape (N,), a row of what `detector_modules.surest_boxes` gives.
        size: width and height of the image, pixels.
        classes: names of the columns.
        min_score: a box needs a score above this, 0 to 1.
        square: True where places are shares of the image's longer side, and not of the side along which they run.
    """
    from dejavu_exp.datasets.annotations import whole_box
    from dejavu_exp.encoders.detector_modules import BOX_VALUES, MOST_BOXES

    found = values.reshape(-1, BOX_VALUES)
    found = found[found[:, 4] > min_score]
    if len(found) == MOST_BOXES:
        detail = f"there are {MOST_BOXES} boxes above tagger.min_score={min_score}, and may be more"
        return Detected(None, None, Status.BAD_ANNOTATION, detail)
    width, height = size
    across, down = (max(size), max(size)) if square else size
    boxes: list[list[int]] = []
    names = set()
    for x, y, wide, tall, _, column in found.tolist():
        ends = ((x - wide / 2) * across, (y - tall / 2) * down, (x + wide / 2) * across, (y + tall / 2) * down)
        xmin, ymin, xmax, ymax = whole_box([round(end, 3) for end in ends])
        box = [max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height)]
        if box[0] < box[2] and box[1] < box[3]:
            boxes.append(box)
            names.add(classes[int(column)])
    if not boxes:
        return Detected(None, [], Status.NO_ANNOTATION, f"no box has a score above tagger.min_score={min_score}")
    return Detected(boxes, sorted(names), Status.OK)


def detect(parts: Mapping[str, Any]) -> tuple[pl.DataFrame, Path]:
    """Run a detector over all images of a data set, through the cache: a killed run goes on where it stopped.

    Args:
        parts: `dataset`, `tagger` and `trainer`, built.

    Returns:
        The data set's table with these boxes and objects in place of any that it had, and the folder that its paths are
        relative to.

    Raises:
        ConfigError: the tagger is no detector, or the images lie in no folder.
        DataError: the data set cannot be read.
        WeightsError: the detector's weights cannot be had.
    """
    from dejavu_exp import crops, images
    from dejavu_exp.datasets.stores import FolderStore

    tagger, encoder = _detector(parts["tagger"])
    encoder.check()
    manifest = parts["dataset"].manifest()
    if not isinstance(manifest.store, FolderStore):
        raise ConfigError(
            f"dataset: the images of {manifest.name} are not files in a folder, and dataset=manifest reads no others. "
            "Unpack the archive, and name its folder."
        )
    rows = images.inspect(manifest.rows, manifest.store)
    views = crops.views(rows.with_columns(role=pl.lit(None, dtype=pl.String)), crops.FullImage())
    views = views.filter(pl.col("status") == Status.OK)
    if views.is_empty():
        raise DataError(f"dataset: none of the {len(rows)} images of {manifest.name} can be read.")
    # The last digits of places matter more than those of scores.
    trainer: Extractor = dataclasses.replace(parts["trainer"], storage="float32", precision="float32")
    found = trainer.embed(encoder.load_boxes(), views, manifest.store, "detecting")
    square, classes = encoder.boxes_square, found.classes or ()
    sizes = dict(zip(rows["id"], rows.select("width", "height").iter_rows(), strict=True))
    known = {
        image: boxes_of(values, sizes[image], classes, tagger.min_score, square=square)
        if readable
        else Detected(None, None, Status.UNREADABLE, found.reasons[f"{image}#{crops.FullImage().name}"])
        for image, values, readable in zip(views["id"], found.values, found.readable, strict=True)
    }
    return _with_boxes(rows, known), manifest.store.root


def _detector(tagger: object) -> tuple[ScoreTagger, DetectorEncoder]:
    from dejavu_exp.encoders import DetectorEncoder
    from dejavu_exp.taggers import ScoreTagger

    if isinstance(tagger, ScoreTagger) and isinstance(tagger.encoder, DetectorEncoder):
        return tagger, tagger.encoder
    raise ConfigError("tagger: is no detector, and others give no boxes. Choose tagger=rtdetr, detr or owlv2.")


def _with_boxes(rows: pl.DataFrame, known: Mapping[str, Detected]) -> pl.DataFrame:
    """The rows with what was found; those that were not looked at keep their status."""
    columns: dict[str, list[Any]] = {name: [] for name in Detected._fields}
    for image, status, detail in rows.select("id", "status", "detail").iter_rows():
        found = known.get(image, Detected(None, None, Status(status), detail))
        for name in columns:
            columns[name].append(getattr(found, name))
    replaced = [pl.Series(name, values, dtype=tables.MANIFEST[name]) for name, values in columns.items()]
    return rows.with_columns(replaced).drop("content")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dejavu_exp.boxes",
        description="Runs an object detector over a data set and writes a table with its boxes, which dataset=manifest "
        "reads. All boxes above tagger.min_score count, whatever they show; ids, labels and origins stay as they are.",
        epilog="KEY=VALUE are overrides of `python -m dejavu_exp`; of the configuration dataset, tagger and trainer "
        "count. A detector in a local folder: tagger.encoder.model=DIR. A killed run goes on where it stopped.",
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="e.g. dataset=folder dataset.root=images")
    parser.add_argument("--out", type=Path, metavar="FILE", default=OUT, help=f"what to write (default: {OUT})")
    asked = parser.parse_intermixed_args(arguments)
    with config.spoken_errors():
        _run(asked.overrides, asked.out)


def _run(overrides: Sequence[str], out: Path) -> None:
    if out.suffix.lower() != ".parquet":
        raise ConfigError(f"--out={out}: must end in .parquet.")
    chosen = any(override.split("=")[0] == "tagger" for override in overrides)
    resolved, _ = config.compose([*(() if chosen else ("tagger=rtdetr",)), *overrides])
    # Imported here: torch takes seconds, and --help must not.
    from dejavu_exp import provenance, ranks

    parts = {name: config.bind(resolved[name], name) for name in ("dataset", "tagger", "trainer")}
    with ranks.joined(parts["trainer"].device_count, parts["trainer"].cache) as lead:
        if not lead:
            return
        rows, root = detect(parts)
        told = {name: resolved[name] for name in ("dataset", "tagger")}
        tables.write(rows, out, {"root": str(root.resolve()), "config": told, "versions": provenance.versions()})
    _show(rows, root, out)


def _show(rows: pl.DataFrame, root: Path, out: Path) -> None:
    from rich.console import Console

    statuses = Counter(rows["status"].to_list())
    boxes = int(rows["boxes"].list.len().sum())
    console = Console(highlight=False, soft_wrap=True)
    told = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    console.print(f"{boxes} boxes in {len(rows)} images ({told})", markup=False)
    console.print(f"Read it with: dataset=manifest dataset.path={out} dataset.root={root.resolve()}", markup=False)


if __name__ == "__main__":
    main()
