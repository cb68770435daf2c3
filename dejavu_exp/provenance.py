"""Content hashes, cache keys, versions, and one seeded generator per stage."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

import dejavu_exp
from dejavu_exp.tables import SCHEMA_VERSION

PACKAGES = ("torch", "torchvision", "lightning", "timm", "open_clip_torch", "polars", "numpy", "scikit-learn", "pillow")

HASHED_ROWS = 65_536
"""Rows of a table that are hashed at a time."""


def key_of(parts: Mapping[str, Any]) -> str:
    """A cache key: 24 hexadecimal digits that change when any part changes.

    >>> key_of({"k": 1}) == key_of({"k": 2})
    False
    """
    text = json.dumps({**parts, "schema_version": SCHEMA_VERSION}, sort_keys=True, default=str)
    return hash_bytes(text.encode())[:24]


def hash_bytes(content: bytes) -> str:
    """BLAKE2b of bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def hash_file(path: Path) -> str:
    """BLAKE2b of a file's content, 32 hexadecimal digits; the file is read in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_table(frame: pl.DataFrame) -> str:
    """Hash of a table's content, column names and row order, 32 hexadecimal digits; the table is read in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, max(1, len(frame)), HASHED_ROWS):
        digest.update(frame[start : start + HASHED_ROWS].write_json().encode())
    digest.update(str(frame.schema).encode())
    return digest.hexdigest()


def hash_order(seed: int, stage: str, name: str) -> int:
    """A number that puts names in a random order which depends on the seed and the name alone.

    Sorting by it shuffles without a generator, so the order does not depend on how the names were listed.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stage}/{name}".encode(), digest_size=8).digest())


def hash_orders(seed: int, stage: str, names: Iterable[str]) -> npt.NDArray[np.uint64]:
    """`hash_order` of many names, with less between the hashes.

    >>> hash_orders(0, "split", ["a"]).tolist() == [hash_order(0, "split", "a")]
    True
    """
    begin = f"{seed}/{stage}/"
    hashes = [hashlib.blake2b((begin + name).encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)


def rng(seed: int, stage: str) -> np.random.Generator:
    """A generator of its own for each stage, so that stages do not share a stream.

    >>> bool(rng(0, "split").integers(1 << 40) == rng(0, "bootstrap").integers(1 << 40))
    False
    """
    return np.random.default_rng(hash_order(seed, "rng", stage))


def versions() -> dict[str, str]:
    """Version of this package and of those that decide the numbers."""
    return {"dejavu_exp": dejavu_exp.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}


def commit() -> str | None:
    """The git commit of the source tree, or None where the package was installed from a wheel."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
