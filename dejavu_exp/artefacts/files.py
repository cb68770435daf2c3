"""The released code's files: read without unpickling, checked one by one and against each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from dejavu_exp import provenance
from dejavu_exp.datasets import pickles
from dejavu_exp.errors import DataError
from dejavu_exp.splits import WHOLE_BELOW
from dejavu_exp.tables import BoolArray, FloatArray, IntArray

PARTS = ("attk_idxs", "labels", "neighb_labels", "neighb_idxs")
"""What the k-NN attack saves of one attack, each as NAME_<part>.npy."""
JUDGED = ("label", "prediction", "confidence", "probability of the label", "entropy", "path")
"""Columns of the table that the evaluation of the crop classifier saves."""


@dataclass(frozen=True)
class Attack:
    """What the k-NN attack of one encoder saves of one set of images.

    Attributes:
        name: such as A_attk_B: encoder A, set B.
        indices: shape (N,), the number of each attacked image in the order of its image folder.
        labels: shape (N,), the number of its class.
        near_labels: shape (N, k), class numbers of its public neighbours, nearest first.
        near_indices: shape (N, k), the neighbours' image numbers.
        files: that it was read from.
    """

    name: str
    indices: IntArray
    labels: IntArray
    near_labels: IntArray
    near_indices: IntArray
    files: tuple[Path, ...]

    def __post_init__(self) -> None:
        for other in (self.labels, self.near_labels, self.near_indices):
            if len(other) != len(self.indices):
                raise DataError(
                    f"{self.file_of('attk_idxs')} has {len(self.indices)} rows, and another file of {self.name} has "
                    f"{len(other)}. Take all four files from one attack."
                )
        if not len(self.indices):
            raise DataError(f"{self.file_of('attk_idxs')} holds no row: nothing was attacked. Repeat the attack.")
        if self.near_labels.shape != self.near_indices.shape:
            raise DataError(
                f"{self.file_of('neighb_labels')} has {self.near_labels.shape[1]} neighbours a row and "
                f"{self.file_of('neighb_idxs')} {self.near_indices.shape[1]}. Take both from one attack."
            )
        values, counts = np.unique(self.indices, return_counts=True)
        if counts.max() > 1:
            raise DataError(
                f"{self.file_of('attk_idxs')}: image {values[counts > 1][0]} occurs {counts.max()} times; an image is "
                "attacked once. Repeat the attack with an index file that names each image once."
            )
        for part, found in (("labels", self.labels), ("neighb_labels", self.near_labels)):
            if found.min() < 0:
                raise DataError(
                    f"{self.file_of(part)}: {found.min()} is no class. The released attack drops images without a "
                    "usable crop; drop these rows from all four files."
                )
        self._check_public()

    def file_of(self, part: str) -> str:
        """The file that one of `PARTS` was read from."""
        named = [str(path) for path in self.files if path.name == f"{self.name}_{part}.npy"]
        return named[0] if named else f"{self.files[0]} ({part})"

    def _check_public(self) -> None:
        """A public image has one class: where it has two, labels and indices are of different runs."""
        indices, first = np.unique(self.near_indices, return_index=True)
        known = self.near_labels.ravel()[first]
        wrong = known[np.searchsorted(indices, self.near_indices)] != self.near_labels
        if wrong.any():
            image = self.near_indices[wrong][0]
            raise DataError(
                f"{self.file_of('neighb_labels')} does not belong to {self.file_of('neighb_idxs')}: public image "
                f"{image} has several classes. Take both from one attack."
            )


def read_attack(path: Path) -> Attack:
    """One attack.

    Args:
        path: folder and name, such as DIR/A_attk_A, of the four files <path>_attk_idxs.npy, _labels, _neighb_labels
            and _neighb_idxs; or an .npz file that holds these four arrays by the names behind the path.

    Raises:
        DataError: a file is missing, is no array of whole numbers, or they do not go together.
    """
    archive = path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
    if archive.is_file():
        files = [(archive, part) for part in PARTS]
    else:
        files = [(path.with_name(f"{path.name}_{part}.npy"), "") for part in PARTS]
        if not files[0][0].is_file():
            known = attacks_in(path.parent)
            told = f"that folder has the attacks {', '.join(known)}" if known else "that folder has no attack"
            raise DataError(
                f"{files[0][0]}: there is no such file; {told}. The released attack saves "
                f"{', '.join(f'NAME_{part}.npy' for part in PARTS)}: give the folder and the name."
            )
    indices, labels, near_labels, near_indices = (whole_numbers(*file) for file in files)
    return Attack(
        archive.stem if archive.is_file() else path.name,
        _flat(indices, *files[0]),
        _flat(labels, *files[1]),
        _with_axes(near_labels, 2, *files[2]),
        _with_axes(near_indices, 2, *files[3]),
        tuple(dict.fromkeys(file for file, _ in files)),
    )


def attacks_in(folder: Path) -> list[str]:
    """Names of the attacks saved in a folder."""
    found = {path.name.removesuffix("_attk_idxs.npy") for path in folder.glob("*_attk_idxs.npy")}
    return sorted(found | {path.stem for path in folder.glob("*_attk_*.npz")})


def read_indices(path: Path) -> IntArray:
    """Image numbers of an index file such as bbox_A.npy, shape (N,).

    Raises:
        DataError: it cannot be read, or names an image twice.
    """
    found = _with_axes(whole_numbers(path), 1, path)
    values, counts = np.unique(found, return_counts=True)
    if len(found) and counts.max() > 1:
        raise DataError(f"{path}: image {values[counts > 1][0]} is named {counts.max()} times; name each image once.")
    return found


def read_neighbours(path: Path, member: str = "") -> IntArray:
    """Positions of the public neighbours of each row, shape (N, k), nearest first."""
    return _with_axes(whole_numbers(path, member), 2, path, member)


def read_distances(path: Path, member: str = "") -> FloatArray:
    """Distances to the neighbours of each row, shape (N, k); raises as `whole_numbers`."""
    values = _with_axes(_load(path, member), 2, path, member)
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise DataError(f"{_where(path, member)}: holds something else than finite distances. Save them as numbers.")
    return values.astype(np.float64)


def read_objects(path: Path) -> list[list[pickles.Item]]:
    """The objects of each image, from a pickle of the released annotation step; nothing in it is run.

    Raises:
        DataError: as `pickles.read_arrays`.
    """
    return pickles.read_arrays(path)


@dataclass(frozen=True)
class Judged:
    """What the evaluation of the crop classifier saves of each crop.

    Attributes:
        paths: N paths of crops.
        labels: shape (N,), the number of the true class; likewise predictions.
        predictions: shape (N,).
        confidence: shape (N,), probability of the prediction.
        probability: shape (N,), of the true class.
        entropy: shape (N,), of all classes, nats.
    """

    paths: list[str]
    labels: IntArray
    predictions: IntArray
    confidence: FloatArray
    probability: FloatArray
    entropy: FloatArray


def read_judged(path: Path) -> Judged:
    """The table that the evaluation of the crop classifier saves: texts, one row a crop, the path in the last column.

    Raises:
        DataError: it cannot be read, has other columns, or texts that are no numbers.
    """
    found = _load(path)
    if found.ndim != 2 or found.shape[1] != len(JUDGED) or found.dtype.kind not in "US":
        raise DataError(
            f"{path}: has the shape {found.shape} and the type {found.dtype}; expected one row of texts a crop with "
            f"{', '.join(JUDGED)}. Give the file that the evaluation of the crop classifier saves."
        )
    texts = _texts(found, path)
    numbers = np.empty((len(texts), len(JUDGED) - 1))
    for column, name in enumerate(JUDGED[:-1]):
        try:
            numbers[:, column] = texts[:, column].astype(np.float64)
        except ValueError as error:
            raise DataError(f"{path}: column {column} ({name}) holds texts that are no numbers: {error}.") from error
    if not np.isfinite(numbers).all():
        row, column = np.argwhere(~np.isfinite(numbers))[0]
        raise DataError(f"{path}, row {row}: the {JUDGED[column]} is not finite. Evaluate the crop classifier again.")
    if not _whole(numbers[:, :2]).all():
        row, column = np.argwhere(~_whole(numbers[:, :2]))[0]
        raise DataError(
            f"{path}, row {row}: the {JUDGED[column]} is no whole number. Evaluate the crop classifier again."
        )
    return Judged(texts[:, -1].tolist(), *numbers[:, :2].T.astype(np.int64), *numbers[:, 2:].T.copy())


def _texts(found: npt.NDArray[Any], path: Path) -> npt.NDArray[np.str_]:
    """The texts of an array; NumPy keeps numbers as characters that are none, and meets them with a SystemError."""
    try:
        texts = found.astype(str)
        "".join(texts.ravel().tolist()).encode()
    except (SystemError, ValueError) as error:
        raise DataError(
            f"{path}: holds texts with characters that do not exist ({error}). Evaluate the crop classifier again."
        ) from error
    return texts


def _whole(values: npt.NDArray[Any]) -> BoolArray:
    """Where values are whole numbers that an array of int64 holds as they are."""
    whole: BoolArray = (values == np.floor(values)) & (values > -WHOLE_BELOW) & (values < WHOLE_BELOW)
    return whole


def whole_numbers(path: Path, member: str = "") -> IntArray:
    """An array of whole numbers; those stored as floats are cast back, as the released code makes such files.

    Args:
        path: an .npy file, or an .npz file.
        member: the name of the array in an .npz file.

    Raises:
        DataError: it is missing or damaged, or holds anything else; Python objects are refused, for reading them can
            run programs.
    """
    values = _load(path, member)
    if values.dtype.kind not in "iuf" or not _whole(values).all():
        raise DataError(
            f"{_where(path, member)}: holds {values.dtype} values that are not all whole numbers; expected numbers of "
            "images or classes. Give the file that the released code saves."
        )
    numbers: IntArray = values.astype(np.int64)
    return numbers


def _load(path: Path, member: str = "") -> npt.NDArray[Any]:
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            with found as archive:
                found = archive[member] if member else _only(archive)
    # NumPy meets a damaged file with errors of a dozen kinds, down to those of Python's tokenizer.
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        wanted = f"an .npz file with the array {member}" if member else "an .npy file of numbers"
        out = (
            "Python objects can run programs when they are read: save it as np.array(values, dtype=int)."
            if "allow_pickle" in told
            else "Save it again, or correct the path."
        )
        raise DataError(f"{path}: cannot be read as {wanted} ({told}). {out}") from error
    return np.asarray(found)


def _only(archive: Any) -> npt.NDArray[Any]:  # noqa: ANN401 - NumPy's archive
    if len(archive.files) != 1:
        raise KeyError(f"it holds {', '.join(archive.files) or 'no array'}; name one as FILE.npz:NAME")
    return np.asarray(archive[archive.files[0]])


def _where(path: Path, member: str) -> str:
    return f"{path} ({member})" if member else str(path)


def _flat(values: IntArray, path: Path, member: str) -> IntArray:
    """One number a row; the released code saves labels with an axis of length 1 besides."""
    return _with_axes(
        values.reshape(len(values)) if values.ndim == 2 and values.shape[1] == 1 else values, 1, path, member
    )


def _with_axes(values: npt.NDArray[Any], axes: int, path: Path, member: str = "") -> npt.NDArray[Any]:
    if values.ndim != axes or (axes == 2 and not values.shape[1]):
        expected = "one number for each image" if axes == 1 else "a row of neighbours for each image"
        raise DataError(
            f"{_where(path, member)}: has the shape {values.shape}; expected {expected}. An attack on a classifier's "
            "own outputs saves no neighbours and cannot be imported."
        )
    return values


@dataclass(frozen=True)
class Listing:
    """Images in the order in which the released code numbers them.

    Attributes:
        source: where it is from, for errors.
        ids: of the images.
        labels: of the images; the class folder.
    """

    source: str
    ids: Sequence[str]
    labels: Sequence[str | None]

    def id_of(self, number: int, asked_by: Path) -> str:
        """The id of an image.

        Raises:
            DataError: there is no image with this number.
        """
        if not 0 <= number < len(self.ids):
            raise DataError(
                f"{asked_by}: image {number} is not among the {len(self.ids)} of {self.source}, numbered from 0. List "
                "the images that the file was made with."
            )
        return self.ids[number]


def read_listing(path: Path, origin: str) -> Listing:
    """Images of a text file, one path a line, or of a folder of class folders as torchvision numbers them.

    Args:
        path: the file or folder.
        origin: comes first in the ids: <origin>/<class folder>/<file name>, as `datasets.imagenet` has them.

    Raises:
        DataError: nothing can be listed.
    """
    if path.is_dir():
        from torchvision.datasets import ImageFolder

        try:
            found: list[str] = [image for image, _ in ImageFolder(str(path)).samples]
        except FileNotFoundError as error:
            raise DataError(f"{path}: cannot be listed as a folder of class folders: {error}") from error
    else:
        try:
            found = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}). Give a folder of class folders, or a text file, one path a line."
            ) from error
    parts = [PurePath(line.strip()) for line in found]
    short = next((n for n, part in enumerate(parts) if len(part.parts) < 2), None)
    if short is not None:
        raise DataError(f"{path}, line {short + 1}: {found[short]!r} is not <class folder>/<file name>.")
    labels = [part.parent.name for part in parts]
    return Listing(
        str(path), [f"{origin}/{label}/{part.name}" for label, part in zip(labels, parts, strict=True)], labels
    )


def stem(path: str) -> str:
    """What the file names of an image and of its crop have in common: all before the first dot.

    >>> stem("crops/n01440764/n01440764_36.JPEG")
    'n01440764_36'
    """
    return PurePath(path).name.split(".")[0]


def hashes(files: Iterable[Path]) -> dict[str, str]:
    """Content hash of each file by its name; of files of one name the hash of all their hashes."""
    found: dict[str, list[str]] = {}
    for path in files:
        found.setdefault(path.name, []).append(provenance.hash_file(path))
    return {
        name: parts[0] if len(parts) == 1 else provenance.hash_bytes("".join(parts).encode())
        for name, parts in found.items()
    }
