"""What an import hands over to be scored, whichever test it is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from dejavu_exp import provenance
from dejavu_exp.datasets.base import Dataset, Manifest
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.tables import Role, Schema, Status

ROWS: Schema = {
    "id": pl.String,
    "role": pl.String,
    "label": pl.String,  # null in the test of objects
    "truth": pl.List(pl.String),  # the label, or the objects
    "origin": pl.String,  # the part of the data set that the number counts in
    "position": pl.Int64,  # the image's number
    "status": pl.String,
}


@dataclass(frozen=True)
class Answers:
    """What a reference says.

    Attributes:
        description: what it is and where it is from, one sentence.
        evidence: of measured rows; it may lack some, and hold others.
        other: evidence of the second encoder and of the encoder under test on heldout rows; None where there is none.
        ranks: how many labels it ranks: a file may tell only the first.
    """

    description: str
    evidence: Evidence
    other: tuple[Evidence, Evidence] | None = None
    ranks: int = 5


@dataclass(frozen=True)
class Imported:
    """Everything that figures are made from.

    Attributes:
        rows: columns of `ROWS`, every image with a role.
        target: evidence of the encoder under test for the usable target and unseen rows.
        references: by name, the headline's first.
        k: public neighbours that voted.
        n_public: images in the bank, as far as the files tell.
        n_labels: labels or objects that can be inferred.
        data: what the rows are of.
        notes: what a reader must know.
        files: that were read.
    """

    rows: pl.DataFrame
    target: Evidence
    references: Mapping[str, Answers]
    k: int
    n_public: int
    n_labels: int
    data: Data
    notes: Sequence[str]
    files: Sequence[Path]


@dataclass(frozen=True)
class Data:
    """The data set behind an import.

    Attributes:
        name: for titles.
        n_rows: its images, as far as the files tell.
        hash: of a data set that was read as in a run, so that both can be compared; else of the imported rows.
        class_names: readable name of a label, where there is one.
        problems: of its reading.
    """

    name: str
    n_rows: int
    hash: str
    class_names: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class Settings:
    """What an import is configured with, as a run is.

    Attributes:
        probe: its view, which the released files do not tell, and how ties are broken.
        k: neighbours that vote; null for all that were saved.
        dataset: null for none: then rows are known by their numbers.
        seed: of all that is random.
    """

    probe: KnnProbe
    k: int | None
    dataset: Dataset | None
    seed: int

    def voters(self, saved: int, saved_by: str) -> int:
        """How many neighbours of each row vote.

        Raises:
            ConfigError: more than were saved.
        """
        if self.k is not None and self.k > saved:
            raise ConfigError(
                f"probe.k={self.k}: {saved_by} has {saved} neighbours a row. Set probe.k to at most {saved}."
            )
        return self.k or saved

    def manifest(self) -> Manifest | None:
        """The data set, read; None where none is given."""
        return None if self.dataset is None else self.dataset.manifest()


def data_of(manifest: Manifest | None, rows: pl.DataFrame, name: str, n_listed: int) -> Data:
    """The data set, or what stands for it.

    Args:
        manifest: as read; None without a data set.
        rows: columns of `ROWS`.
        name: where there is no data set.
        n_listed: images of its lists; 0 without a list.
    """
    if manifest is None:
        measured = rows.filter(pl.col("role") != Role.PUBLIC).select("id", "label", "truth").sort("id")
        return Data(name, n_listed or len(rows), provenance.hash_table(measured))
    # As `stages.collect` has it: the same data set gives the same hash.
    listed = manifest.rows.sort("id").drop("path")
    return Data(
        manifest.name, len(listed), provenance.hash_table(listed), manifest.class_names, tuple(manifest.problems)
    )


def usable(rows: pl.DataFrame, *roles: Role) -> pl.DataFrame:
    """The rows of some roles that can be measured."""
    return rows.filter(pl.col("role").is_in(roles), pl.col("status") == Status.OK)


def by_key(option: str, values: Sequence[str], keys: Sequence[str], default: str) -> dict[str, str]:
    """Values of an option given as KEY=VALUE, or as VALUE for the default key.

    Raises:
        ConfigError: a key is given twice.

    >>> by_key("--attack", ["A_attk_A", "unseen=C"], ["target", "unseen"], "target")
    {'target': 'A_attk_A', 'unseen': 'C'}
    """
    found: dict[str, str] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or key not in keys:
            key, value = default, text
        if key in found:
            raise ConfigError(
                f"{option}: {found[key]} and {value} are both given for {key}; give one, and others as KEY=VALUE with "
                f"KEY one of {', '.join(keys)}."
            )
        found[key] = value
    return found


def matched(ids: Mapping[str, str], names: Sequence[str], named_by: Path) -> Iterator[tuple[int, str]]:
    """Places in a file, and the ids of the images they are of; those of no image are left out.

    Args:
        ids: id of each image by the stem of its file.
        names: stems in the file.
        named_by: the file.

    Raises:
        DataError: none is of an image, or two are of one.
    """
    found: dict[str, int] = {}
    for place, name in enumerate(names):
        if name in ids and ids[name] in found:
            raise DataError(f"{named_by}: {name} is named a second time; keep one entry for each image.")
        if name in ids:
            found[ids[name]] = place
    if not found:
        told = f", e.g. {names[0]}," if names else ""
        raise DataError(
            f"{named_by} does not belong to the attack: none of its {len(names)} images{told} is attacked. Give the "
            "file that was made from the crops of the attacked set, and list the images the attack was run on."
        )
    yield from ((place, image) for image, place in found.items())
