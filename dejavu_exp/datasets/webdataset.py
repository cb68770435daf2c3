"""Image-caption pairs in tar shards, as img2dataset writes them for LAION and the like."""

from __future__ import annotations

import glob
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from dejavu_exp import progress
from dejavu_exp.datasets.annotations import (
    IMAGE_SUFFIXES,
    Problems,
    captions_of,
    location,
    rows_of,
    status_of,
    storable,
)
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import TarMember, TarStore
from dejavu_exp.errors import DataError

T = TypeVar("T")

LAYOUT = "uncompressed .tar shards with members <key>.jpg (or .jpeg, .png, .webp) and <key>.txt or <key>.json"
MAX_TEXT_BYTES = 1 << 24
"""A longer .txt or .json member is no caption."""

_KINDS = {**dict.fromkeys((*IMAGE_SUFFIXES, ".webp"), "image"), ".txt": "text", ".json": "json"}


@dataclass(frozen=True)
class WebDataset:
    """Pairs of tar shards; nothing is unpacked, images are read where they lie in the shard.

    Members of one key (the member's path up to the first dot of its file name) belong together. The captions are the
    text of `<key>.txt`, or where there is none, "caption" of `<key>.json`, a text or a list of texts. "objects" of the
    JSON, a list of names, says what is in the image; without it the objects are not known. There are no boxes and no
    labels. Origin is "all"; ids are `<shard's name without .tar>/<key>`.

    A caption without image keeps its row, and is unreadable later; an image without caption keeps its row too. Where a
    shard has a member twice the last one counts, as on unpacking. Links and devices are not followed.

    Attributes:
        shards: a shard, a folder whose *.tar are taken, or a pattern such as "DIR/*.tar" or "DIR/**/*.tar".
    """

    shards: str | Path

    def __post_init__(self) -> None:
        location(self.shards, "shards")

    def manifest(self) -> Manifest:
        """List all shards, and read their texts.

        Raises:
            DataError: there is no shard, one is cut off or no tar archive, two have the same name, or no shard holds an
                image or a caption.
        """
        problems = Problems()
        shards = _shards(location(self.shards, "shards"))
        images: dict[str, TarMember] = {}
        rows: list[tuple[Any, ...]] = []
        with progress.bar("listing shards", len(shards), delay=2) as bar:
            for shard in shards:
                rows.extend(_rows(shard, images, problems))
                bar.update()
        if not rows:
            raise DataError(f"dataset.shards={self.shards}: there is no image and no caption; expected {LAYOUT}.")
        names = ("id", "path", "captions", "objects", "origin", "status", "detail")
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        return Manifest("webdataset", rows_of(columns), TarStore(images), {}, problems.sentences())


def _shards(place: Path) -> list[Path]:
    if place.is_dir():
        found = sorted(place.glob("*.tar"))
    else:
        found = [place] if place.is_file() else [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]
    if not found:
        raise DataError(
            f"dataset.shards={place}: there is no such shard, and no folder with *.tar. "
            "Give a file, a folder or a pattern such as 'DIR/*.tar' (braces are not understood)."
        )
    twice = [name for name, count in Counter(shard.stem for shard in found).items() if count > 1]
    if twice:
        raise DataError(
            f"dataset.shards={place}: {len(twice)} names belong to several shards, e.g. {twice[0]}.tar; "
            "rename them, since a name begins the ids of its pairs."
        )
    return found


def _rows(shard: Path, images: dict[str, TarMember], problems: Problems) -> Iterator[tuple[Any, ...]]:
    """The rows of a shard; the places of its images are added to `images`."""
    keys = _keys(shard, problems)
    lost = [key for key, kinds in keys.items() if "image" not in kinds]
    silent = []
    status, detail = status_of(None, None, "the shards have no boxes")
    with shard.open("rb") as stream:
        texts = _Texts(stream, str(shard), problems)
        for key, kinds in keys.items():
            path = f"{shard.stem}/{kinds['image'].name if 'image' in kinds else key}"
            if "image" in kinds:
                images[path] = kinds["image"].place
            captions, objects = texts.of(kinds)
            if captions is None:
                silent.append(key)
            yield f"{shard.stem}/{key}", path, captions, objects, "all", status, detail
    for kind, without in (("caption", silent), ("image", lost)):
        if without:
            detail = f"{len(without)} of {len(keys)} keys have no {kind}, e.g. {without[0]}"
            problems.add(f"keys without {kind}", str(shard), detail)


class _Member(NamedTuple):
    name: str
    place: TarMember


def _keys(shard: Path, problems: Problems) -> dict[str, dict[str, _Member]]:
    """The members of each key by kind: image, text, json."""
    keys: dict[str, dict[str, _Member]] = {}
    for member in _members(shard, problems):
        folder, slash, file = member.name.rpartition("/")
        stem, dot, ending = file.partition(".")
        kind = _KINDS.get((dot + ending).lower())
        if not stem or kind is None:
            continue
        kinds = keys.setdefault(folder + slash + stem, {})
        if kind in kinds:
            problems.add(
                "key with two members", str(shard), f"holds {kinds[kind].name} and {member.name}, the last counts"
            )
        kinds[kind] = member
    return keys


def _members(shard: Path, problems: Problems) -> Iterator[_Member]:
    """The files in a shard with their places.

    Raises:
        DataError: the shard cannot be read, is compressed, cut off or damaged.
    """
    way_out = f"expected {LAYOUT}. Download it again, or take it out of dataset.shards"
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if archive.offset <= member.offset:  # of a size below zero: the same members again, without end
                    raise tarfile.ReadError(f"{member.name!r:.80} has the size {member.size}")
                if member.isreg() and not member.issparse():
                    name = storable(member.name.removeprefix("./"))
                    yield _Member(name, TarMember(str(shard), member.offset_data, member.size))
                elif not member.isdir():
                    detail = f"{storable(member.name)} is a link, a device or the like, and is not read"
                    problems.add("member that is no file", str(shard), detail)
            ends = archive.offset
    except (ArithmeticError, LookupError, MemoryError, OSError, RecursionError, ValueError, tarfile.TarError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{shard}: cannot be read as a tar archive ({reason}); {way_out}.") from error
    # tarfile takes a broken header behind the first member for the end.
    with shard.open("rb") as stream:
        stream.seek(ends)
        if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise DataError(f"{shard}: is cut off or damaged: there is no end mark at byte {ends}; {way_out}.")


@dataclass(frozen=True)
class _Texts:
    """The text members of a shard; what is not understood is a problem and no caption."""

    stream: BinaryIO
    shard: str
    problems: Problems

    def of(self, kinds: Mapping[str, _Member]) -> tuple[list[str] | None, list[str] | None]:
        """The captions and objects of a key; None where it has none."""
        captions, objects = self._read(kinds.get("json"), _said) or (None, None)
        text = self._read(kinds.get("text"), str)
        return captions_of(captions or [] if text is None else [text]), objects

    def _read(self, member: _Member | None, parse: Callable[[str], T]) -> T | None:
        if member is None:
            return None
        try:
            if member.place.size > MAX_TEXT_BYTES:
                raise ValueError(f"must be a text of at most {MAX_TEXT_BYTES} bytes, not of {member.place.size}")
            self.stream.seek(member.place.offset)
            return parse(self.stream.read(member.place.size).decode("utf-8-sig", errors="replace"))
        except (ValueError, RecursionError) as error:
            self.problems.add("text not understood", self.shard, f"{member.name}: {error}")
            return None


def _said(text: str) -> tuple[list[str] | None, list[str] | None]:
    """The captions and objects that a JSON member names."""
    said = json.loads(text)
    if not isinstance(said, dict):
        raise ValueError(f"must be a JSON object, got {text[:80]!r}")
    caption, objects = said.get("caption"), _strings(said, "objects")
    captions = [caption] if isinstance(caption, str) else _strings(said, "caption")
    return captions, None if objects is None else sorted({storable(name) for name in objects})


def _strings(said: Mapping[str, object], key: str) -> list[str] | None:
    texts = said.get(key)
    if texts is None:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} must be a list of texts, got {str(texts)[:80]!r}")
    return texts
