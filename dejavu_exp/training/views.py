"""What training looks at: a table of views, their order in every epoch, and augmentation that any rank repeats."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch.utils.data import Sampler, default_collate

from dejavu_exp import provenance
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.errors import DataError
from dejavu_exp.images import UNREADABLE_ERRORS, cut, decode

Augment: TypeAlias = Callable[[Image.Image, bool], Any]
"""From a region, and whether it is a repeated background, to a tensor or a list of tensors."""

ShowCaption: TypeAlias = Callable[[Sequence[str], np.random.Generator], torch.Tensor]
"""From the captions of an image, and what to draw from, to the tokens of one of them, shape (context length,)."""

TRAINING_VIEWS: dict[str, pl.DataType | type[pl.DataType]] = {
    "id": pl.String,
    "path": pl.String,
    "content": pl.String,
    "xmin": pl.Int32,
    "ymin": pl.Int32,
    "xmax": pl.Int32,
    "ymax": pl.Int32,
    "code": pl.Int64,  # class number
    "background": pl.Boolean,  # True for a background crop that is shown besides its image
    "captions": pl.List(pl.String),  # null where the recipe reads none
}
KEEP_PIXELS = 200_000_000
"""Decoded images are kept where all views together have at most this many pixels (0.6 GB)."""


@dataclass(frozen=True)
class Place:
    """Where one process stands: its rank among `ranks`, each taking `accumulate` batches a step."""

    rank: int = 0
    ranks: int = 1
    accumulate: int = 1


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The batches of an epoch for one rank, as lists of (epoch, row): a sampler of whole batches.

    The rows of a step depend on the seed and the epoch alone. Ranks and accumulated batches take equal parts of them,
    so any number of ranks sees the same rows in the same step.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, place: Place) -> None:
        self.rows, self.batch_size, self.seed, self.place = rows, batch_size, seed, place
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch_size * self.place.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = provenance.rng(self.seed, f"training/order/{self.epoch}").permutation(self.rows)
        part = self.batch_size // (self.place.ranks * self.place.accumulate)
        for step in range(self.rows // self.batch_size):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            for turn in range(self.place.accumulate):
                start = (turn * self.place.ranks + self.place.rank) * part
                yield [(self.epoch, int(row)) for row in rows[start : start + part]]


@dataclass
class AugmentedViews:
    """Batches of augmented views: a map-style data set whose items are whole batches.

    Every view is augmented from a seed of its own, made of the run's seed, the epoch and the row: the result depends
    neither on the number of ranks or worker processes nor on where a killed run started again. Captions are drawn from
    a stream of their own, so that the images are the same with and without them.

    Attributes:
        views: columns of `TRAINING_VIEWS`.
        store: gives the images.
        augment: of the images.
        seed: of the run.
        caption: what is shown of an image's captions; null: a batch holds views and codes. Else it holds views and
            tokens, together, and codes.
    """

    views: pl.DataFrame
    store: ImageStore
    augment: Augment
    seed: int
    caption: ShowCaption | None = None

    def __post_init__(self) -> None:
        self._captions = None if self.caption is None else self.views["captions"].to_list()
        self._rows = list(self.views.select("path", "xmin", "ymin", "xmax", "ymax", "code", "background").iter_rows())
        area = ((pl.col("xmax") - pl.col("xmin")) * (pl.col("ymax") - pl.col("ymin"))).sum()
        self._keeps = int(self.views.select(area).item()) <= KEEP_PIXELS
        self._regions: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, batch: list[tuple[int, int]]) -> Any:  # noqa: ANN401 - as many tensors as views
        with random_states_kept():
            return default_collate([self._item(epoch, row) for epoch, row in batch])

    def _item(self, epoch: int, row: int) -> tuple[Any, int]:
        *_, code, background = self._rows[row]
        seed_all(provenance.hash_order(self.seed, "training/augment", f"{epoch}/{row}"))
        view = self.augment(self._region(row), background)
        if self.caption is None or self._captions is None:
            return view, code
        return (view, self.caption(self._captions[row], self._caption_rng(epoch, row))), code

    def _caption_rng(self, epoch: int, row: int) -> np.random.Generator:
        return provenance.rng(self.seed, f"training/caption/{epoch}/{row}")

    def _region(self, row: int) -> Image.Image:
        if row in self._regions:
            return self._regions[row]
        path, *region, _, _ = self._rows[row]
        try:
            picture = cut(decode(self.store.read(path)), tuple(region))
        except UNREADABLE_ERRORS as error:
            raise DataError(f"{path}: cannot be trained on: {error}. Mend the file or take it out.") from error
        if self._keeps:
            self._regions[row] = picture
        return picture


def seed_all(seed: int) -> None:
    """Seed what augmentations draw from: torch's generator of the CPU, NumPy's and Python's global ones."""
    # Not torch.manual_seed: it looks for devices each time, which takes longer than most augmentations.
    torch.default_generator.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from it
    random.seed(seed)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put all that `seed_all` changes back afterwards."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - see above
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
