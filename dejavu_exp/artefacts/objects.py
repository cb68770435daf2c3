"""The vision-language test: neighbour lists of two encoders, and the objects annotated in each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

import numpy as np
import polars as pl

from dejavu_exp import neighbours
from dejavu_exp.artefacts import files
from dejavu_exp.artefacts.base import ROWS, Answers, Imported, Settings, data_of
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.pickles import Item
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.neighbours import Neighbours
from dejavu_exp.tables import FloatArray, IntArray, Role, Status

MEASURED = (Role.TARGET, Role.UNSEEN)
ROLES = (*MEASURED, Role.PUBLIC)


@dataclass(frozen=True)
class Asked:
    """Which files to import. A path FILE.npz:NAME is the array NAME of an .npz file.

    Attributes:
        neighbours: by role, positions of the public neighbours of each row under the encoder under test.
        reference: by role, the same under the reference.
        distances: by role, of the encoder under test.
        objects: by role (target, unseen, public), annotation pickles.
        names: text file with the object names, the name of number 0 first; null to take the numbers.
        images: by role, text files with one image a line.
    """

    neighbours: Mapping[str, str]
    reference: Mapping[str, str]
    objects: Mapping[str, Path]
    distances: Mapping[str, str] = field(default_factory=dict)
    names: Path | None = None
    images: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, found in (("--neighbours", self.neighbours), ("--reference", self.reference)):
            if set(found) != set(self.neighbours) or Role.TARGET not in found:
                raise ConfigError(
                    f"{option} is given for {', '.join(found) or 'no role'}, and --neighbours for "
                    f"{', '.join(self.neighbours) or 'no role'}; both are needed for target rows, and for unseen rows "
                    "where one is given."
                )
        missing = sorted({*self.neighbours, Role.PUBLIC} - set(self.objects))
        if missing:
            raise ConfigError(f"--objects: there are none of {missing[0]} rows; add --objects {missing[0]}=FILE.")
        unread = sorted({*self.distances, *self.objects, *self.images} - {*self.neighbours, Role.PUBLIC})
        if unread:
            raise ConfigError(f"files are given for {unread[0]} rows, but no --neighbours {unread[0]}=FILE.")


def read(asked: Asked, settings: Settings) -> Imported:
    """Read all files, check that they belong together, and make evidence of them.

    Raises:
        DejavuError: a file is missing or damaged, or files do not belong together; the message names them.
    """
    names = None if asked.names is None else _lines(asked.names)
    lists = {role: _named(files.read_objects(path), path, names) for role, path in asked.objects.items()}
    manifest = settings.manifest()
    ids = {role: _ids(role, len(found), asked, manifest) for role, found in lists.items()}
    labels = sorted({name for found in lists[Role.PUBLIC] for name in found})
    if not labels:
        raise DataError(f"{asked.objects[Role.PUBLIC]}: no public image holds an object, so none can be inferred.")
    public = pl.Series(lists[Role.PUBLIC], dtype=pl.List(pl.String))
    near = {
        (what, role): _near(path, asked, role, len(lists[role]), len(public), with_distances=what == "target")
        for what, given in (("target", asked.neighbours), ("reference", asked.reference))
        for role, path in given.items()
    }
    k = min(settings.voters(part.positions.shape[1], "a list of neighbours") for part in near.values())
    told = {}
    for what, given in (("target", asked.neighbours), ("reference", asked.reference)):
        parts = []
        for role in given:
            nearest = Neighbours(near[what, role].positions[:, :k], near[what, role].distances[:, :k])
            found = neighbours.infer(ids[role], nearest, public, labels, settings.probe.ties)
            known = what == "target" and role in asked.distances
            parts.append(replace(found, distance=found.distance if known else None))
        told[what] = Evidence.joined(parts)
    rows = pl.concat([_part(ids[role], lists[role], Role(role)) for role in lists])
    twice = rows.filter(pl.col("id").is_duplicated()).sort("id")
    if len(twice):
        raise DataError(f"--images: {twice['id'][0]} is listed as {twice['role'][0]} and as {twice['role'][1]}.")
    lost = sorted({name for role in asked.neighbours for found in lists[role] for name in found} - set(labels))
    reference = Path(asked.reference[Role.TARGET].split(".npz:")[0]).name
    paths = [_split(path)[0] for part in (asked.neighbours, asked.reference, asked.distances) for path in part.values()]
    return Imported(
        rows,
        told["target"],
        {"reference": Answers(f"Neighbours under a reference, imported from {reference}.", told["reference"])},
        k,
        len(public),
        len(labels),
        data_of(manifest, rows, f"the images of {asked.objects[Role.TARGET].name}", len(rows)),
        _notes(lost),
        list(dict.fromkeys([*paths, *asked.objects.values(), *([asked.names] if asked.names else [])])),
    )


def _notes(lost: Sequence[str]) -> list[str]:
    found = [
        "Imported from files of the released code: of encoders and images only these files are known, and copies of "
        "images between roles were not looked for."
    ]
    if lost:
        found.append(
            f"Objects of measured rows that no public row carries ({len(lost)}, e.g. {lost[0]}) cannot be found by any "
            "neighbour; they count in the recall."
        )
    return found


def _split(path: str) -> tuple[Path, str]:
    """A path FILE.npz:NAME in its two parts."""
    before, colon, member = path.partition(".npz:")
    return (Path(f"{before}.npz"), member) if colon else (Path(path), "")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give a text file with one name a line.") from error


def _named(entries: Sequence[Sequence[Item]], path: Path, names: Sequence[str] | None) -> list[list[str]]:
    """The objects of each image by name."""
    found = []
    for number, entry in enumerate(entries):
        objects = []
        for item in entry:
            if isinstance(item, int) and names is not None and not 0 <= item < len(names):
                raise DataError(
                    f"{path}, entry {number}: object {item} has no name; --names has {len(names)} lines, 0 to "
                    f"{len(names) - 1}. Give the names that the annotation was made with."
                )
            if isinstance(item, str):
                objects.append(item)
            else:
                objects.append(f"{item:05d}" if names is None else names[item])
        found.append(objects)
    return found


def _ids(role: str, count: int, asked: Asked, manifest: Manifest | None) -> list[str]:
    """An id for each entry."""
    if role not in asked.images:
        if manifest is not None:
            raise ConfigError(
                "--images: the data set has ids, and which entry is which image must be known: add --images "
                f"{role}=FILE, a text file with one id or file name a line."
            )
        return [f"{role}/{number:07d}" for number in range(count)]
    path = asked.images[role]
    names = _lines(path)
    if len(names) != count:
        raise DataError(
            f"{path} lists {len(names)} images, and {asked.objects[role]} has the objects of {count}. Give one line "
            "for each entry."
        )
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise DataError(f"{path}: {repeated[0]} is named more than once; keep one line for each image.")
    return names if manifest is None else _known(names, path, manifest)


def _known(names: Sequence[str], path: Path, manifest: Manifest) -> list[str]:
    """Ids of the data set, from ids or file names."""
    own = set(manifest.rows["id"])
    by_file: dict[str, list[str]] = {}
    for image, stored in manifest.rows.select("id", "path").iter_rows():
        by_file.setdefault(PurePath(stored).name, []).append(image)
    found = []
    for name in names:
        images = [name] if name in own else by_file.get(PurePath(name).name, [])
        if len(images) != 1:
            told = f"is {len(images)} images" if images else "is no image"
            raise DataError(f"{path}: {name} {told} of {manifest.name}. Write ids of the data set, one a line.")
        found += images
    return found


def _near(path: str, asked: Asked, role: str, count: int, n_public: int, *, with_distances: bool) -> Neighbours:
    """The neighbours of each row of a role, checked against the objects' files."""
    file, member = _split(path)
    positions = files.read_neighbours(file, member)
    if len(positions) != count:
        raise DataError(
            f"{path} has {len(positions)} rows, and {asked.objects[role]} the objects of {count} images. Take both of "
            f"the same {role} images."
        )
    if positions.size and not (positions.min() >= 0 and positions.max() < n_public):
        wrong = positions[(positions < 0) | (positions >= n_public)][0]
        raise DataError(
            f"{path}: {wrong} is no public image; {asked.objects[Role.PUBLIC]} has {n_public}, numbered from 0. (-1 "
            "stands for too few public images.) Take both from the same attack."
        )
    near = np.zeros(positions.shape)
    if with_distances and role in asked.distances:
        near = files.read_distances(*_split(asked.distances[role]))
        if near.shape != positions.shape:
            raise DataError(
                f"{asked.distances[role]} has the shape {near.shape}, and {path} {positions.shape}. Take both from one "
                "attack."
            )
    return _nearest_first(positions, near)


def _nearest_first(positions: IntArray, distances: FloatArray) -> Neighbours:
    """Each row nearest first; as they stand where distances are equal."""
    order = np.argsort(distances, axis=1, kind="stable")
    return Neighbours(
        np.take_along_axis(positions, order, axis=1),
        np.take_along_axis(distances, order, axis=1).astype(np.float32),
    )


def _part(ids: Sequence[str], objects: Sequence[Sequence[str]], role: Role) -> pl.DataFrame:
    empty = [Status.OK if found or role not in MEASURED else Status.NO_OBJECTS for found in objects]
    return pl.DataFrame(
        {
            "id": ids,
            "role": [str(role)] * len(ids),
            "label": [None] * len(ids),
            "truth": objects,
            "origin": [str(role)] * len(ids),
            "position": range(len(ids)),
            "status": [str(status) for status in empty],
        },
        schema=dict(ROWS),
    )
