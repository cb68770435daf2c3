"""What every reference is given, and what it must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import polars as pl

from dejavu_exp import crops
from dejavu_exp.crops import ViewRule
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.encoders import Encoder, LoadedEncoder
from dejavu_exp.errors import ConfigError
from dejavu_exp.evidence import Evidence
from dejavu_exp.extract import Extractor
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.tables import Status
from dejavu_exp.taggers import Tagger
from dejavu_exp.training import TrainedHere, TrainingInputs


@dataclass(frozen=True)
class ReferenceInputs:
    """All a reference may look at.

    Attributes:
        queries: views to judge, columns of `tables.VIEWS`, status ok, roles target and unseen; their label and truth
            must not be used.
        heldout: views of the heldout role, which references learn from; their truth may be used.
        bank: views of the public rows, status ok; their truth may be used.
        rows: the manifest's rows that have a role, for references that look at other views of them.
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
    rows: pl.DataFrame
    probe: KnnProbe
    target: Evidence
    encoder: LoadedEncoder
    labels: tuple[str, ...]
    manifest: Manifest
    extractor: Extractor
    tagger: Tagger
    training: TrainingInputs
    seed: int

    def shown(self, views: pl.DataFrame, made_by: ViewRule, rule: ViewRule) -> pl.DataFrame:
        """The rows of `views` as another rule shows them, with their truth; those that it cannot show are left out."""
        if rule == made_by:
            return views
        known = views.select("id", "role", "truth")
        rows = known.join(self.rows.drop("role"), on="id", how="left", validate="1:1", maintain_order="left")
        truth = known.select("id", "truth")
        other = crops.views(rows, rule).drop("truth").join(truth, on="id", validate="1:1", maintain_order="left")
        return other.filter(pl.col("status") == Status.OK).select(views.columns)


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

    def check(self, tagger: Tagger, model: Encoder | TrainedHere, probe: KnnProbe) -> None:
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


def check_shows_images(probe: KnnProbe, name: str) -> None:
    """Refuse a probe that shows captions to a reference that names the label of a region of an image.

    Raises:
        ConfigError: it does.
    """
    if probe.query.reads != "images":
        raise ConfigError(
            f"references.{name} infers the label from a region of an image, and the probe asks with a "
            f"{probe.query.name}. Choose reference=text_embedding or two_model, or a probe that shows images."
        )
