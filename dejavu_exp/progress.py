"""The progress bar of everything that takes long: images done, rate and time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(title: str, total: int, delay: float = 0, done: int = 0, unit: str = "img") -> tqdm[Any]:
    """A bar that counts images, or what `unit` says; in a log file it writes a line every ten seconds.

    Args:
        title: what is being done.
        total: how many images there are.
        delay: seconds before it shows.
        done: images done before, by a run that was killed.
        unit: what is counted.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=title, total=total, unit=unit, delay=delay, mininterval=interval, smoothing=0.1, initial=done)
