"""What every reference is given, and what it must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import polars as pl

from dejavu_exp.datasets.base import Manifest
from dejavu_exp.evidence import Evidence
from dejavu_exp.extract import Extractor
from dejavu_exp.taggers import Tagger


@dataclass(frozen=True)
class ReferenceInputs:
    """All a reference may look at.

    Attributes:
        queries: views to judge, columns of `tables.VIEWS`, status ok, roles target and unseen; labels must not be used.
        heldout: views of the heldout role, which references learn from; their labels may be used.
        target: evidence of the encoder under test for the queries; for floors only.
        labels: all labels, the columns of evidence.
        manifest: the data set.
        extractor: embeds views.
        tagger: names things in views.
        seed: of everything random.
    """

    queries: pl.DataFrame
    heldout: pl.DataFrame
    target: Evidence
    labels: tuple[str, ...]
    manifest: Manifest
    extractor: Extractor
    tagger: Tagger
    seed: int


class Reference(Protocol):
    """A reference as configured."""

    def check(self, tagger: Tagger) -> None:
        """Find what cannot work before any image is read.

        Raises:
            DejavuError: a file or a library is missing.
        """
        ...

    def evidence(self, inputs: ReferenceInputs) -> Evidence:
        """Evidence about the label of each query; ids are image ids."""
        ...
