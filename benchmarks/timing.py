"""How the benchmarks time, and what one of them tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """One task done in several ways in one run, each checked to give the same.

    Attributes:
        task: what is done, with sizes.
        seconds: by way of doing it, the best of several tries; the first way is this package's.
        limit: what bounds the task on this hardware, with a figure measured in the same run.
        aim: what is asked for: a ratio to another way, or seconds.
        note: what a reader must know besides, such as how far the ways differ.
    """

    task: str
    seconds: Mapping[str, float]
    limit: str
    aim: str = ""
    note: str = ""


def seconds(action: Callable[[], Any], tries: int = 3) -> float:
    """The best of several tries."""
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)
