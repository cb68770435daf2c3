"""A second encoder as the reference: the two-model test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import polars as pl

from dejavu_exp import neighbours
from dejavu_exp.encoders import Encoder, LoadedEncoder
from dejavu_exp.errors import ConfigError
from dejavu_exp.evidence import Evidence
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.references.base import OtherDirection, ReferenceInputs
from dejavu_exp.tables import Role
from dejavu_exp.taggers import Tagger
from dejavu_exp.training import TrainedEncoder, TrainingInputs


@dataclass(frozen=True)
class KnnReference:
    """A second encoder that has not seen the measured images, asked in the same way as the encoder under test.

    Source: arXiv 2304.13850, the two-model test.

    Attributes:
        encoder: any encoder; null trains the recipe of the encoder under test on the heldout role instead of target.
        probe: how it is asked; null: as the encoder under test is.
        directions: "both" also measures the second encoder on the images that it was trained on, with the encoder
            under test as its reference, and averages the two gaps: what one encoder knows better then cancels. It needs
            an encoder trained on the heldout role.
        key: where this node is, for errors.
    """

    encoder: Encoder | TrainedEncoder | None = None
    probe: KnnProbe | None = None
    directions: Literal["one", "both"] = "one"
    key: str = "references.two_model"

    def __post_init__(self) -> None:
        if self.directions not in ("one", "both"):
            raise ConfigError(f"{self.key}.directions={self.directions}: must be one or both.")
        if isinstance(self.encoder, TrainedEncoder) and Role.TARGET in self.encoder.roles:
            raise ConfigError(
                f"{self.key}.encoder.roles={list(self.encoder.roles)}: a reference must not be trained on target "
                "images."
            )

    @property
    def is_trained(self) -> bool:
        """See `Reference.is_trained`."""
        return self.encoder is None or isinstance(self.encoder, TrainedEncoder)

    def check(self, tagger: Tagger, model: Encoder | TrainedEncoder) -> None:
        """A second encoder can be had."""
        if self.encoder is not None:
            self.encoder.check()
        elif not isinstance(model, TrainedEncoder):
            raise ConfigError(
                f"{self.key}.encoder is null, which trains the model's own recipe on the heldout role, but the model "
                "is not trained here. Give a second encoder that has not seen the target images "
                f"({self.key}.encoder=...), choose model=trained, or leave two_model out."
            )
        if self.directions == "both" and not self.is_trained:
            raise ConfigError(
                f"{self.key}.directions=both needs to know what the second encoder was trained on; set it to one, or "
                "train it here."
            )

    def train(self, inputs: TrainingInputs) -> list[LoadedEncoder]:
        """See `Reference.train`."""
        encoder = self.encoder
        if encoder is None and isinstance(inputs.model, TrainedEncoder):
            roles = [Role.HELDOUT if role == Role.TARGET else role for role in inputs.model.roles]
            encoder = replace(inputs.model, roles=tuple(dict.fromkeys(roles)))
        if not isinstance(encoder, TrainedEncoder):
            raise TypeError("only an encoder trained here can be trained")
        return [encoder.train(inputs.for_reference(), "training the second encoder")]

    def evidence(self, inputs: ReferenceInputs) -> Evidence:
        """See `Reference.evidence`."""
        return self._ask(self._second(inputs), self.probe or inputs.probe, inputs.queries, inputs)

    def other_direction(self, inputs: ReferenceInputs) -> OtherDirection | None:
        """See `Reference.other_direction`."""
        if self.directions == "one":
            return None
        rows = inputs.heldout.filter(pl.col("label").is_in(inputs.labels))
        broken = inputs.extractor.embed(inputs.encoder, rows, inputs.manifest.store, "embedding heldout views").reasons
        rows = rows.filter(~pl.col("view_id").is_in(list(broken)))
        second = self._ask(self._second(inputs), self.probe or inputs.probe, rows, inputs)
        return OtherDirection(rows, second, self._ask(inputs.encoder, inputs.probe, rows, inputs))

    def _second(self, inputs: ReferenceInputs) -> LoadedEncoder:
        if self.encoder is None or isinstance(self.encoder, TrainedEncoder):
            return self.train(inputs.training)[0]
        return self.encoder.load()

    def _ask(self, encoder: LoadedEncoder, probe: KnnProbe, queries: pl.DataFrame, inputs: ReferenceInputs) -> Evidence:
        """What the bank answers under an encoder."""
        store = inputs.manifest.store
        asked = inputs.extractor.embed(encoder, queries, store, "embedding query views")
        bank = inputs.extractor.embed(encoder, inputs.bank, store, "embedding public images")
        near = neighbours.search(asked.values, bank.values, probe.k, probe.metric)
        codes = neighbours.label_codes(inputs.bank["label"].to_list(), inputs.labels, near.positions)
        return neighbours.vote(queries["id"].to_list(), codes, inputs.labels, probe.ties)
