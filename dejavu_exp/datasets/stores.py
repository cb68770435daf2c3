"""Where image bytes live: a folder, a zip archive, or memory. Stores are cheap to pickle and safe in worker processes."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dejavu_exp.errors import DataError


class ImageStore(Protocol):
    """Gives the bytes of one encoded image by the path its manifest row names."""

    def read(self, path: str) -> bytes:
        """The file's bytes.

        Raises:
            OSError or KeyError: there is no such file.
        """
        ...


@dataclass(frozen=True)
class FolderStore:
    """Images below a folder; absolute paths are taken as they stand."""

    root: Path

    def read(self, path: str) -> bytes:
        """The bytes of `root / path`."""
        return (self.root / path).read_bytes()


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
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"{self.archive}: cannot be read as a zip archive ({error}). Download it again, or give the unpacked folder."
                ) from error
        return self._opened[1]

    def names(self) -> list[str]:
        """All member names, sorted."""
        return sorted(self._open().namelist())

    def read(self, path: str) -> bytes:
        """The bytes of member `path`."""
        return self._open().read(path)
