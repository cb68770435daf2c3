"""The label test: results of the k-NN attack, counts of naive Bayes, answers of the crop classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl

from dejavu_exp import neighbours, taggers
from dejavu_exp.artefacts import files
from dejavu_exp.artefacts.base import ROWS, Answers, Imported, Settings, data_of, matched, usable
from dejavu_exp.artefacts.files import Attack, Listing
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.neighbours import Ties
from dejavu_exp.tables import IntArray, Role, Status

MEASURED = (Role.TARGET, Role.UNSEEN)
ATTACKED = (*MEASURED, Role.HELDOUT)
TWO_MODELS: tuple[Mapping[str, str], Mapping[str, str]] = (
    {Role.TARGET: "A_attk_A", Role.HELDOUT: "B_attk_B"},
    {Role.TARGET: "B_attk_A", Role.HELDOUT: "A_attk_B"},
)
"""Attacks of the two-model test: encoder A on the set that it alone was trained on, and encoder B on the same set."""
ONE_MODEL: Mapping[str, str] = {Role.TARGET: "test_attk_A"}


@dataclass(frozen=True)
class Asked:
    """Which files to import.

    Attributes:
        folder: of the attack; names of attacks are relative to it.
        attacks: by role, attacks of the encoder under test; of heldout rows, of the second encoder, which was trained
            on them. Empty: those that the released attack saves.
        two_model: by role, attacks of the other encoder on the same images.
        naive_bayes: folder with labels.txt, frequencies/ and labels/.
        top_tags: strongest tags of an image that count.
        laplace: use the rule of the released code's --laplace.
        crop_classifier: the table that its evaluation saves.
        label_shuffle: add the floor.
        images: by origin, the images in the order that they are numbered in.
        origins: by role, the part of the data set that the numbers count in.
        indices: by role, index files such as bbox_A.npy.
    """

    folder: Path
    attacks: Mapping[str, str] = field(default_factory=dict)
    two_model: Mapping[str, str] = field(default_factory=dict)
    naive_bayes: Path | None = None
    top_tags: int = 5
    laplace: bool = False
    crop_classifier: Path | None = None
    label_shuffle: bool = False
    images: Mapping[str, Path] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    indices: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.top_tags < 1:
            raise ConfigError(f"--top-tags {self.top_tags}: must be at least 1.")

    def with_defaults(self) -> Asked:
        """The same with the attacks that the released code saves, where none are named.

        Raises:
            ConfigError: there are none, or no reference can be had.
        """
        there = files.attacks_in(self.folder)
        asked = self
        if not self.attacks:
            first, second = TWO_MODELS
            both = {role for role in first if {first[role], second[role]} <= set(there)}
            if Role.TARGET in both and not self.two_model:
                asked = replace(
                    self,
                    attacks={role: name for role, name in first.items() if role in both},
                    two_model={role: name for role, name in second.items() if role in both},
                )
            elif set(ONE_MODEL.values()) <= set(there):
                asked = replace(self, attacks=dict(ONE_MODEL))
        if Role.TARGET not in asked.attacks:
            raise ConfigError(
                f"{self.folder}: has the attacks {', '.join(there) or '(none)'}, and which of them is on target rows "
                "is not clear. Name it: --attack NAME."
            )
        references = (asked.two_model, asked.naive_bayes, asked.crop_classifier, asked.label_shuffle)
        if not any(references):
            raise ConfigError(
                f"{self.folder}: the attack {asked.attacks[Role.TARGET]} needs something to be compared with. Give one "
                "or more of --two-model NAME, --naive-bayes FOLDER, --crop-classifier FILE, --label-shuffle."
            )
        return asked


def read(asked: Asked, settings: Settings) -> Imported:
    """Read all files, check that they belong together, and make evidence of them.

    Raises:
        DejavuError: a file is missing or damaged, or files do not belong together; the message names them.
    """
    asked = asked.with_defaults()
    attacks = {role: files.read_attack(asked.folder / name) for role, name in asked.attacks.items()}
    others = {role: files.read_attack(asked.folder / name) for role, name in asked.two_model.items()}
    _check_pairs(attacks, others)
    manifest = settings.manifest()
    numbering = _Numbering.of(asked, [*attacks.values(), *others.values()], manifest)
    rows, indices = _rows(attacks, asked.indices, numbering)
    k = min(
        settings.voters(a.near_labels.shape[1], f"the attack {a.name}") for a in (*attacks.values(), *others.values())
    )
    voted = {role: numbering.voted(attack, role, k, settings.probe.ties) for role, attack in attacks.items()}
    target = Evidence.joined([voted[role] for role in MEASURED if role in voted])
    references = {}
    if others:
        told = {role: numbering.voted(attack, role, k, settings.probe.ties) for role, attack in others.items()}
        measured = Evidence.joined([told[role] for role in MEASURED if role in told])
        other = (voted[Role.HELDOUT], told[Role.HELDOUT]) if Role.HELDOUT in told else None
        names = ", ".join(attack.name for attack in others.values())
        references["two_model"] = Answers(f"Neighbours under a second encoder, imported from {names}.", measured, other)
    read_files = [path for attack in (*attacks.values(), *others.values()) for path in attack.files]
    read_files += list(asked.indices.values())
    measured_rows = usable(rows, *MEASURED)
    if asked.naive_bayes is not None:
        references["naive_bayes"] = _naive_bayes(asked, asked.naive_bayes, measured_rows, numbering)
        read_files += _bayes_files(asked.naive_bayes)
    if asked.crop_classifier is not None:
        references["crop_classifier"] = _crop_classifier(asked.crop_classifier, measured_rows, numbering)
        read_files.append(asked.crop_classifier)
    if asked.label_shuffle:
        from dejavu_exp.references import floors

        shuffled = floors.shuffled(target, measured_rows, settings.seed)
        references["label_shuffle"] = Answers(
            "The encoder's own answers, dealt to other rows at random: a floor.", shuffled
        )
    bank = indices.get(Role.PUBLIC)
    near = np.unique(np.concatenate([attack.near_indices.ravel() for attack in attacks.values()]))
    return Imported(
        rows,
        target,
        references,
        k,
        len(near) if bank is None else len(bank),
        len(numbering.labels),
        data_of(manifest, rows, f"the images of {asked.folder.name}", numbering.n_listed),
        _notes(rows, bank is None),
        read_files,
    )


def _notes(rows: pl.DataFrame, bank_unknown: bool) -> list[str]:
    found = [
        "Imported from files of the released code: of encoder, images and crops only these files are known, and copies "
        "of images between roles were not looked for."
    ]
    if bank_unknown:
        found.append("The number of public images is that of the images found near; --index public=FILE gives all.")
    lost = len(rows.filter(pl.col("status") == Status.NO_EVIDENCE))
    if lost:
        found.append(
            f"{lost} images of the index files are not in the attack, which drops those without a usable crop."
        )
    return found


def _check_pairs(attacks: Mapping[str, Attack], others: Mapping[str, Attack]) -> None:
    """Two attacks on one set are on the same images with the same classes, in any order."""
    for role, other in others.items():
        if role not in attacks:
            raise ConfigError(f"--two-model {role}={other.name}: there is no --attack {role}=NAME to compare it with.")
        attack = attacks[role]
        if len(attack.indices) != len(other.indices):
            raise DataError(
                f"{other.files[0]} has {len(other.indices)} images and {attack.files[0]} {len(attack.indices)}: they "
                "are of other sets. Take two attacks on one set."
            )
        unknown = np.setdiff1d(other.indices, attack.indices)
        if len(unknown):
            raise DataError(
                f"{other.files[0]}: image {unknown[0]} is not in {attack.files[0]} ({len(unknown)} are not). Take two "
                "attacks on one set."
            )
        place = np.argsort(attack.indices)[np.searchsorted(np.sort(attack.indices), other.indices)]
        differing = other.indices[attack.labels[place] != other.labels]
        if len(differing):
            raise DataError(
                f"{other.files[0]} and {attack.files[0]}: image {differing[0]} has one class in one attack and another "
                "in the other. Take labels and indices from the same attack."
            )


@dataclass(frozen=True)
class _Numbering:
    """How the numbers of images and classes become ids and labels.

    Attributes:
        origins: by role, the part of the data set that image numbers count in.
        listings: by origin; empty where nobody lists the images.
        labels: of the classes, in the order of their numbers.
        codes: shape (C,), their numbers, ascending.
    """

    origins: Mapping[str, str]
    listings: Mapping[str, Listing]
    labels: Sequence[str]
    codes: IntArray

    @classmethod
    def of(cls, asked: Asked, attacks: Sequence[Attack], manifest: Manifest | None) -> _Numbering:
        origins = {str(role): asked.origins.get(role, "train") for role in Role}
        if manifest is not None and asked.images:
            raise ConfigError("--images: the data set lists the images; leave out one of both.")
        if manifest is not None:
            listings = {origin: _of_manifest(manifest, origin) for origin in set(origins.values())}
        else:
            listings = {origin: files.read_listing(path, origin) for origin, path in asked.images.items()}
            for listing in listings.values():
                _check_order(listing)
        used = np.unique(np.concatenate([part for a in attacks for part in (a.labels, a.near_labels.ravel())]))
        if not listings:
            # Padded, so that labels sort as their numbers do, which breaks ties.
            width = max(4, len(str(used[-1])))
            return cls(origins, {}, [f"{number:0{width}d}" for number in used.tolist()], used)
        missing = sorted({origins[role] for role in asked.attacks} - set(listings))
        if missing:
            raise ConfigError(f"--images: lists no images of {missing[0]}; add --images {missing[0]}=PATH.")
        classes = sorted({str(label) for listing in listings.values() for label in listing.labels})
        if used[-1] >= len(classes):
            raise DataError(
                f"{attacks[0].files[0]}: there is a class number {used[-1]}, and the {len(classes)} classes of "
                f"{next(iter(listings.values())).source} are numbered from 0. List the images that were attacked."
            )
        return cls(origins, listings, classes, np.arange(len(classes)))

    @property
    def n_listed(self) -> int:
        return sum(len(listing.ids) for listing in self.listings.values())

    def ids(self, numbers: IntArray, role: str, asked_by: Path) -> list[str]:
        """Ids of images by their numbers."""
        origin = self.origins[role]
        if origin not in self.listings:
            return [f"{origin}/{number:07d}" for number in numbers.tolist()]
        return [self.listings[origin].id_of(number, asked_by) for number in numbers.tolist()]

    def labels_of(self, numbers: IntArray) -> list[str]:
        """Labels of classes by their numbers."""
        return [self.labels[place] for place in np.searchsorted(self.codes, numbers).tolist()]

    def check(self, attack: Attack, role: str) -> None:
        """The listed images have the classes that the attack says."""
        listing = self.listings.get(self.origins[role])
        if listing is None:
            return
        bank = self.listings.get(self.origins[Role.PUBLIC])
        parts = [(attack.indices, attack.labels, listing, "labels")]
        if bank is not None:
            public, first = np.unique(attack.near_indices, return_index=True)
            parts.append((public, attack.near_labels.ravel()[first], bank, "neighb_labels"))
        for numbers, classes, images, part in parts:
            for number, label in zip(numbers.tolist(), self.labels_of(classes), strict=True):
                image = images.id_of(number, attack.files[0])
                if images.labels[number] != label:
                    raise DataError(
                        f"{attack.file_of(part)}: image {number} has class {label}, and in {images.source} it is "
                        f"{image} of class {images.labels[number]}. List the images that the attack was run on, "
                        "classes and file names sorted."
                    )

    def voted(self, attack: Attack, role: str, k: int, ties: Ties) -> Evidence:
        """Evidence of the k nearest in one attack."""
        codes = np.searchsorted(self.codes, attack.near_labels[:, :k])
        ids = self.ids(attack.indices, role, attack.files[0])
        return neighbours.vote(ids, codes, self.labels, ties)


def _of_manifest(manifest: Manifest, origin: str) -> Listing:
    rows = manifest.rows.filter(pl.col("origin") == origin, pl.col("label").is_not_null()).sort("label", "path")
    if rows.is_empty():
        known = ", ".join(sorted(manifest.rows["origin"].unique().drop_nulls()))
        raise DataError(
            f"--origin {origin}: {manifest.name} has no labelled image of this origin; its origins are {known}."
        )
    return Listing(f"{manifest.name} ({origin})", rows["id"].to_list(), rows["label"].to_list())


def _check_order(listing: Listing) -> None:
    """Image folders are numbered with classes sorted, and file names sorted within."""
    for before, after in zip(listing.ids, listing.ids[1:], strict=False):
        if before.split("/") >= after.split("/"):
            raise DataError(
                f"{listing.source}: {after} stands after {before}; image folders are numbered with classes sorted, and "
                "file names sorted within. Sort the list by its bytes (LC_ALL=C sort), or give the folder."
            )


def _rows(
    attacks: Mapping[str, Attack], index_files: Mapping[str, Path], numbering: _Numbering
) -> tuple[pl.DataFrame, dict[str, IntArray]]:
    """Columns of `ROWS`, and the index files' numbers by role."""
    indices = {role: files.read_indices(path) for role, path in index_files.items()}
    parts = []
    for role in Role:
        numbers, known = indices.get(role, np.empty(0, dtype=np.int64)), np.empty(0, dtype=np.int64)
        if role in attacks:
            attack = attacks[role]
            numbering.check(attack, role)
            known = attack.indices
            if role in indices:
                _check_known(attack, known, "attk_idxs", numbers, index_files[role])
            labels = numbering.labels_of(attack.labels)
            ids = numbering.ids(known, role, attack.files[0])
            parts.append(_part(ids, labels, role, numbering, known, Status.OK))
        lost = np.setdiff1d(numbers, known)
        if len(lost):
            status = Status.NO_EVIDENCE if role in ATTACKED else Status.OK
            ids = numbering.ids(lost, role, index_files[role])
            parts.append(_part(ids, [None] * len(lost), role, numbering, lost, status))
    if Role.PUBLIC in indices:
        for attack in attacks.values():
            _check_known(attack, attack.near_indices, "neighb_idxs", indices[Role.PUBLIC], index_files[Role.PUBLIC])
    rows = pl.concat(parts)
    twice = rows.filter(pl.col("id").is_duplicated()).sort("id", "role")
    if len(twice):
        raise DataError(
            f"image {twice['id'][0]} is both {twice['role'][0]} and {twice['role'][1]} ({twice['id'].n_unique()} "
            f"images have two roles): {', '.join(attack.name for attack in attacks.values())} and the index files do "
            "not belong together. Where images are numbered in another folder, say so: --origin unseen=val."
        )
    return rows, indices


def _check_known(attack: Attack, numbers: IntArray, part: str, known: IntArray, known_by: Path) -> None:
    unknown = np.setdiff1d(numbers, known)
    if len(unknown):
        raise DataError(
            f"{attack.file_of(part)}: image {unknown[0]} is not in {known_by} ({len(unknown)} are not). "
            "Give the index file that the attack was run with."
        )


def _part(
    ids: Sequence[str],
    labels: Sequence[str | None],
    role: Role,
    numbering: _Numbering,
    numbers: IntArray,
    status: Status,
) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "id": ids,
            "role": [str(role)] * len(ids),
            "label": labels,
            "truth": [None if label is None else [label] for label in labels],
            "origin": [numbering.origins[role]] * len(ids),
            "position": numbers,
            "status": [str(status)] * len(ids),
        },
        schema=dict(ROWS),
    )


def _by_stem(rows: pl.DataFrame, numbering: _Numbering, asked_by: Path) -> dict[str, str]:
    """Ids of measured rows by the stem of their file."""
    if not numbering.listings:
        raise ConfigError(
            f"{asked_by} names images by file, and the attack numbers them. List the images in the order of the image "
            "folder: --images PATH, or dataset=imagenet dataset.root=... dataset.boxes=..."
        )
    found: dict[str, str] = {}
    for name in rows["id"]:
        other = found.setdefault(files.stem(name), name)
        if other != name:
            raise DataError(
                f"{asked_by} names images by file name alone, and {files.stem(name)} is both {other} and {name}."
            )
    return found


def _bayes_files(folder: Path) -> list[Path]:
    return [
        path
        for path in (
            folder / "labels.txt",
            *sorted((folder / "frequencies").glob("*.json")),
            *sorted((folder / "labels").glob("*.json")),
        )
        if path.is_file()
    ]


def _naive_bayes(asked: Asked, folder: Path, rows: pl.DataFrame, numbering: _Numbering) -> Answers:
    """The released code's naive Bayes, from its counts and the tags of the attacked images."""
    from dejavu_exp.references import naive_bayes

    ids = _by_stem(rows, numbering, folder)
    entries = taggers.read_authors_labels(folder)
    frequencies = taggers.read_authors_frequencies(folder)
    counts = {key: {tag: count for tag, (count, _) in found.items()} for key, found in frequencies.items()}
    truth = dict(rows.select("id", "label").iter_rows())
    places, images = zip(*matched(ids, [files.stem(entry.image_path) for entry in entries], folder), strict=True)
    questions = []
    for place, image in zip(places, images, strict=True):
        entry = entries[place]
        if entry.key.split("_", 1)[0] != truth[image]:
            raise DataError(
                f"{folder / 'labels' / entry.key}_labels.json: {entry.image_path} is of class {truth[image]} in the "
                "attack. Take both from the same images."
            )
        by_strength = sorted(zip(entry.scores, entry.tags, strict=True), key=lambda pair: -pair[0])
        questions.append([tag for _, tag in by_strength])
    keys = list(counts)
    missing = sorted(set(rows["label"]) - {key.split("_", 1)[0] for key in keys})
    if missing:
        raise DataError(
            f"{folder}: labels.txt has no class {missing[0]} ({len(missing)} classes of the attack are missing). Give "
            "the counts of all attacked classes."
        )
    scores = naive_bayes.authors_scores(questions, counts, asked.top_tags, laplace=asked.laplace)
    found = naive_bayes.authors_evidence(images, keys, scores)
    rule = "Laplace's rule" if asked.laplace else "1e-10 for absent tags"
    return Answers(
        f"The released naive Bayes on the {asked.top_tags} strongest tags of a crop, {rule}, from imported counts.",
        replace(found, labels=tuple(key.split("_", 1)[0] for key in keys)),
    )


def _crop_classifier(path: Path, rows: pl.DataFrame, numbering: _Numbering) -> Answers:
    """The answers of the crop classifier.

    The file has the first label alone, and the probabilities of that and of the true label; the others are 0 here and
    enter no figure: the entropy is the file's.
    """
    ids = _by_stem(rows, numbering, path)
    judged = files.read_judged(path)
    places_of = list(matched(ids, [files.stem(name) for name in judged.paths], path))
    places, images = np.array([place for place, _ in places_of]), [image for _, image in places_of]
    truth = dict(rows.select("id", "label").iter_rows())
    labels, predictions = judged.labels[places], judged.predictions[places]
    known = np.isin(np.concatenate([labels, predictions]), numbering.codes)
    if not known.all():
        number = np.concatenate([labels, predictions])[~known][0]
        raise DataError(f"{path}: class {number} is not among the classes of the attack's images. List all of them.")
    for row, (image, label) in enumerate(zip(images, numbering.labels_of(labels), strict=True)):
        if label != truth[image]:
            raise DataError(
                f"{path}, row {places[row]}: {judged.paths[places[row]]} has class {label}, and {truth[image]} in the "
                "attack. Evaluate crops of all classes, so that both number them alike."
            )
    count = np.arange(len(images))
    true, first = np.searchsorted(numbering.codes, labels), np.searchsorted(numbering.codes, predictions)
    probabilities = np.zeros((len(images), len(numbering.labels)), dtype=np.float32)
    probabilities[count, true] = judged.probability[places]
    probabilities[count, first] = judged.confidence[places]
    found = Evidence(
        tuple(images),
        tuple(numbering.labels),
        probabilities,
        first[:, None],
        judged.confidence[places],
        np.zeros(len(images), dtype=np.bool_),
        entropy=judged.entropy[places],
    )
    return Answers(f"A network that names the label of a crop, imported from {path.name}.", found, ranks=1)
