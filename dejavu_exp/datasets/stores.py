"""Where image bytes live: a folder, a zip archive, tar shards, or memory. Stores are safe in threads and processes."""

from __future__ import annotations

import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from dejavu_exp.errors import DataError

MAX_FILE_BYTES = 1 << 32
"""A larger file is not read into memory. The largest annotation file of COCO has a ninth of it; archives and shards may
have any size."""


class ImageStore(Protocol):
    """Gives the bytes of one encoded image by the path its manifest row names."""

    def read(self, path: str) -> bytes:
        """The file's bytes.

        Raises:
            OSError or KeyError: there is no such file.
        """
        ...


class ListedStore(ImageStore, Protocol):
    """A store that can say what it holds."""

    def names(self) -> list[str]:
        """Paths of all files, sorted."""
        ...


@dataclass(frozen=True)
class FolderStore:
    """Images below a folder; absolute paths are taken as they stand."""

    root: Path

    def read(self, path: str) -> bytes:
        """The bytes of `root / path`."""
        return read_file(self.root / path)

    def names(self) -> list[str]:
        r"""Paths of all files below the folder, sorted, with "/"; links are followed, each folder is listed once.

        A name that is no UTF-8 cannot stand in a table: its bytes are shown as \xff, and the file is not found later.

        Raises:
            DataError: a folder cannot be listed.
        """
        found: list[str] = []
        listed: set[str] = set()
        for folder, below, files in os.walk(self.root, followlinks=True, onerror=_unlisted):
            real = os.path.realpath(folder)
            if real in listed:  # a link that leads back up would never end
                below.clear()
                continue
            listed.add(real)
            start = Path(folder).relative_to(self.root).as_posix()
            found.extend(files if start == "." else [f"{start}/{name}" for name in files])
        return sorted(map(_shown, found))


def read_file(path: Path, most: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: it is not there, too large, or no file: reading a pipe or a device may never end.
    """
    # Opening a pipe would wait for one who writes.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no file")
        _check_size(found.st_size, most)
        return stream.read()


def _check_size(size: int, most: int = MAX_FILE_BYTES) -> None:
    if size > most:
        raise OSError(f"it has {size} bytes, more than the {most} that are read")


def _shown(name: str) -> str:
    return name.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")


def _unlisted(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}). Check the path and its rights.") from error


@dataclass(frozen=True)
class MemoryStore:
    """Images held in memory."""

    files: Mapping[str, bytes] = field(repr=False)

    def read(self, path: str) -> bytes:
        """The bytes kept under `path`."""
        return self.files[path]


class ZipStore:
    """Members of a zip archive. Each process opens the archive for itself: file positions must not be shared."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> Path:
        return self.archive

    def __setstate__(self, archive: Path) -> None:
        self.__init__(archive)  # type: ignore[misc]

    def _open(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(self.archive))
            except (OSError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile) as error:
                raise DataError(
                    f"{self.archive}: cannot be read as a zip archive ({error}). "
                    "Download it again, or give the unpacked folder."
                ) from error
        return self._opened[1]

    def names(self) -> list[str]:
        """All member names, sorted."""
        return sorted(self._open().namelist())

    def read(self, path: str) -> bytes:
        """The bytes of member `path`.

        Raises:
            KeyError: there is no such member.
            OSError: it is damaged, encrypted, compressed in a way that is not known, or unpacks to too much.
        """
        archive = self._open()
        # No more than the archive says is unpacked, so that what it says is the limit.
        _check_size(archive.getinfo(path).file_size)
        try:
            return archive.read(path)
        except (
            EOFError,
            RuntimeError,
            ValueError,
            struct.error,
            lzma.LZMAError,
            zlib.error,
            zipfile.BadZipFile,
        ) as error:
            raise OSError(str(error)) from error


@dataclass(frozen=True)
class PartStore:
    """What a store holds below one folder; paths are relative to it.

    Attributes:
        store: the whole.
        folder: the folder's path in it, ending with "/"; empty for all.
    """

    store: ListedStore
    folder: str

    def names(self) -> list[str]:
        """Paths of all files below the folder, sorted."""
        return [name.removeprefix(self.folder) for name in self.store.names() if name.startswith(self.folder)]

    def read(self, path: str) -> bytes:
        """The bytes of `folder + path`."""
        return self.store.read(self.folder + path)


class TarMember(NamedTuple):
    """Where a file lies in an uncompressed tar archive.

    Attributes:
        shard: path of the archive.
        offset: of the file's first byte, bytes.
        size: of the file, bytes.
    """

    shard: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarStore:
    """Members of tar shards, read where an index says they lie; each read opens its shard for itself."""

    members: Mapping[str, TarMember] = field(repr=False)

    def read(self, path: str) -> bytes:
        """The bytes of the member `path`.

        Raises:
            KeyError: the index has no such member.
            OSError: the shard is gone or was cut off since, or the member is too large.
        """
        if path not in self.members:
            raise KeyError("the shard holds no image of this key")
        shard, offset, size = self.members[path]
        _check_size(size)
        with open(shard, "rb") as stream:
            stream.seek(offset)
            content = stream.read(size)
        if len(content) != size:
            raise OSError(f"{shard} ends within the file")
        return content


def published(root: Path, folder: str, sign: re.Pattern[str], parts: Sequence[str], layout: str) -> ListedStore:
    """The store of a data set as published: a zip archive, the folder that holds its folder, or that folder itself.

    Args:
        root: what the user gave.
        folder: name of the publisher's top folder.
        sign: matches a whole path in the archive by which its top is known; the group `top` ends with "/" or is empty.
        parts: files or folders of which the right folder has at least one.
        layout: what is expected, for the error.

    Returns:
        A store whose paths begin below the publisher's top folder.

    Raises:
        DataError: there is nothing of the kind, or the archive cannot be read.
    """
    if root.is_file():
        archive = ZipStore(root)
        tops = Counter(match["top"] for match in map(sign.fullmatch, archive.names()) if match)
        if tops:
            return PartStore(archive, tops.most_common(1)[0][0])
    for place in (root, root / folder):
        if any((place / part).exists() for part in parts):
            return FolderStore(place)
    fault = "holds nothing of the kind" if root.exists() else "is not there"
    raise DataError(f"dataset.root={root}: {fault}; expected the published zip archive or its content, {layout}.")


def read_needed(store: ImageStore, file: str) -> bytes:
    """The bytes of a file that the data set cannot do without.

    Raises:
        DataError: it is not there, or damaged.
    """
    try:
        return store.read(file)
    except (OSError, KeyError) as error:
        raise DataError(f"{file}: cannot be read ({error}). Download or unpack the data set again.") from error
