"""What every reference is given, and what it must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import polars as pl

from dejavu_exp.datasets.base import Manifest
from dejavu_exp.encoders import Encoder, LoadedEncoder
from dejavu_exp.evidence import Evidence
from dejavu_exp.extract import Extractor
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.taggers import Tagger
from dejavu_exp.training import TrainedEncoder, TrainingInputs


@dataclass(frozen=True)
class ReferenceInputs:
    """All a reference may look at.

    Attributes:
        queries: views to judge, columns of `tables.VIEWS`, status ok, roles target and unseen; labels must not be used.
        heldout: views of the heldout role, which references learn from; their labels may be used.
        bank: views of the public images, status ok; their labels may be used.
        probe: how the encoder under test is asked.
        target: evidence of the encoder under test for the queries; for floors only.
        encoder: the encoder under test, for a test in both directions only.
        labels: all labels, the columns of evidence.
        manifest: the data set.
        extractor: embeds views.
        tagger: names things in views.
        training: for references that are trained here.
        seed: of everything random.
    """

    queries: pl.DataFrame
    heldout: pl.DataFrame
    bank: pl.DataFrame
    probe: KnnProbe
    target: Evidence
    encoder: LoadedEncoder
    labels: tuple[str, ...]
    manifest: Manifest
    extractor: Extractor
    tagger: Tagger
    training: TrainingInputs
    seed: int


@dataclass(frozen=True)
class OtherDirection:
    """The same test with the two encoders in each other's place, on the rows that the second was trained on.

    Attributes:
        rows: heldout views, status ok.
        target: evidence of the second encoder.
        reference: evidence of the encoder under test.
    """

    rows: pl.DataFrame
    target: Evidence
    reference: Evidence


class Reference(Protocol):
    """A reference as configured."""

    def check(self, tagger: Tagger, model: Encoder | TrainedEncoder) -> None:
        """Find what cannot work before any image is read.

        Raises:
            DejavuError: a file or a library is missing, or the parts do not go together.
        """
        ...

    @property
    def is_trained(self) -> bool:
        """True where a network is trained on heldout images, which must then hold no copy of a measured one."""
        ...

    def train(self, inputs: TrainingInputs) -> list[LoadedEncoder]:
        """Train the reference's networks, or take what the same inputs gave before; none where none is trained.

        Raises:
            DataError: there is too little to learn from, or a copy of a measured image among it.
        """
        ...

    def evidence(self, inputs: ReferenceInputs) -> Evidence:
        """Evidence about the label of each query; ids are image ids."""
        ...

    def other_direction(self, inputs: ReferenceInputs) -> OtherDirection | None:
        """The test in the other direction, where the reference has one and it was asked for."""
        ...


class OneDirection:
    """What a reference is that trains no network and has no other direction."""

    @property
    def is_trained(self) -> bool:
        """See `Reference.is_trained`."""
        return False

    def train(self, inputs: TrainingInputs) -> list[LoadedEncoder]:
        """See `Reference.train`."""
        return []

    def other_direction(self, inputs: ReferenceInputs) -> OtherDirection | None:
        """See `Reference.other_direction`."""
        return None
