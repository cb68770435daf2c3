"""Who works on what, agreed by files alone, so that processes of several jobs and machines share a folder.

A lease is a small file beside the result it stands for. Its holder rewrites it as long as it lives; a file that does
not change for the expiry stands for a dead holder, and another process takes over with a lease of the next number.
Files are created exclusively and results are renamed into place, which holds on network file systems too; no lock is
taken that a file system must support. A holder that was only asleep may then do work twice; as results are addressed
by content, both write the same.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu_exp.errors import DataError

log = logging.getLogger(__name__)

BEATS = 6
"""Times a lease is rewritten within its expiry."""
POLL_S = 0.2
"""Seconds between two looks at a lease that another process holds."""


class Leases:
    """The leases that this process holds, and what it saw of those of others.

    Args:
        expiry_s: seconds without a sign of life after which a lease counts as left behind. A holder on this machine
            that has died is noticed at once.
    """

    def __init__(self, expiry_s: float = 60.0) -> None:
        self.expiry_s = expiry_s
        self._held: dict[Path, Path] = {}
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._me = {"owner": uuid.uuid4().hex, **_this_process()}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim(self, work: Path) -> bool:
        """Take the lease of a piece of work; False where a process that lives has it.

        The caller must then look whether the work is done already, by one that has just given the lease back.

        Args:
            work: the file, or folder, that will be the result; the lease lies beside it.

        Raises:
            DataError: the folder cannot be written.
        """
        number = 1
        while True:
            path = _lease(work, number)
            if self._create(work, path):
                return True
            if not self._is_left_behind(path):
                return False
            number += 1

    def release(self, work: Path) -> None:
        """Give a lease back, with those of dead holders before it."""
        with self._lock:
            path = self._held.pop(work, None)
        if path is None:
            return
        # The last number first: while an earlier one is there, a newcomer counts on from it.
        for number in range(int(path.suffix[1:]), 0, -1):
            _lease(work, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Give all leases back."""
        self._closed.set()
        for work in list(self._held):
            self.release(work)

    def holder(self, work: Path) -> str:
        """Who holds a lease, in words."""
        number = 1
        while _lease(work, number + 1).exists():
            number += 1
        said = _read(_lease(work, number))
        try:
            facts = json.loads(said or b"")
            return f"process {facts['pid']} on {facts['host']}"
        except (ValueError, KeyError, TypeError, RecursionError):
            return "another process"

    @contextmanager
    def held(self, work: Path, doing: str, done: Callable[[], bool]) -> Iterator[bool]:
        """Hold the lease of a piece of work, after waiting for a process that has it.

        Args:
            work: the result.
            doing: what the other process does, for the log.
            done: whether the work is done, so that there is nothing to wait for.

        Yields:
            True where this process is to do the work; False where it is done.
        """
        said = False
        while not done():
            if self.claim(work):
                try:
                    yield not done()
                finally:
                    self.release(work)
                return
            if not said:
                log.info("waiting for %s, which is %s", self.holder(work), doing)
                said = True
            time.sleep(POLL_S)
        yield False

    def _create(self, work: Path, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise DataError(f"cannot write {path}: {error}. Free some space or choose another folder.") from error
        os.close(descriptor)
        with self._lock:
            self._held[work] = path
        self._beat(path)
        if self._heart is None:
            self._heart = threading.Thread(target=self._live, daemon=True, name="leases")
            self._heart.start()
        return True

    def _live(self) -> None:
        """Rewrite the leases held, until closed."""
        while not self._closed.wait(self.expiry_s / BEATS):
            with self._lock:
                paths = list(self._held.values())
            for path in paths:
                self._beat(path)

    def _beat(self, path: Path) -> None:
        """Say that this process lives. Written, not touched: what a file says is current on a network file system."""
        said = json.dumps({**self._me, "beat": time.time()})
        try:
            with path.open("r+b") as stream:
                stream.write(said.encode())
                stream.truncate()
        except OSError as error:  # given back in between, or a full disk: then others take over, and nothing is lost
            log.debug("%s: %s", path, error)

    def _is_left_behind(self, path: Path) -> bool:
        """True where the holder of an existing lease is dead, or has not been heard of for the expiry."""
        said = _read(path)
        if said is None:  # given back in between; the next look finds it free
            return False
        if _has_died(said, path):
            return True
        before, since = self._seen.get(path, (None, 0.0))
        now = time.monotonic()
        if said != before:
            self._seen[path] = (said, now)
            return False
        return now - since > self.expiry_s


def _lease(work: Path, number: int) -> Path:
    return work.with_name(f".{work.name}.lease.{number}")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _this_process() -> dict[str, Any]:
    """What identifies a process among those that share a file system."""
    return {"host": platform.node(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> str | None:
    """The running system and its process numbers; None where that cannot be told, as outside Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks; None where it is dead or cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _has_died(said: bytes, path: Path) -> bool:
    """True where a lease names a process of this machine and user that is no more."""
    try:
        facts = json.loads(said)
        if facts["machine"] is None or facts["machine"] != _machine() or path.stat().st_uid != os.getuid():
            return False
        return bool(_started(facts["pid"]) != facts["started"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@dataclass(frozen=True)
class Pieces:
    """Work in pieces, each with a file as its result: done once, by whichever process takes it first.

    Attributes:
        count: of pieces, numbered from 0.
        path: where the result of a piece appears, whole.
        leases: of this process.
    """

    count: int
    path: Callable[[int], Path]
    leases: Leases

    def missing(self) -> list[int]:
        """The pieces without a result, also those that other processes work on."""
        return [piece for piece in range(self.count) if not self.path(piece).exists()]

    def take(self) -> Iterator[int]:
        """Claim pieces, one after another, until every one is done or held by a process that lives."""
        for piece in range(self.count):
            if self.path(piece).exists() or not self.leases.claim(self.path(piece)):
                continue
            if self.path(piece).exists():
                self.leases.release(self.path(piece))
                continue
            yield piece

    def release(self, piece: int) -> None:
        """Give back what `take` gave, when its result is there."""
        self.leases.release(self.path(piece))
