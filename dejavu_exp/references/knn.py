"""A second encoder as the reference: the two-model test, or a text encoder that has seen no images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl

from dejavu_exp import neighbours
from dejavu_exp.encoders import Encoder, LoadedEncoder
from dejavu_exp.errors import ConfigError
from dejavu_exp.evidence import Evidence
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.references.base import OtherDirection, ReferenceInputs
from dejavu_exp.tables import Role
from dejavu_exp.taggers import Tagger
from dejavu_exp.training import TrainedHere, TrainingInputs


@dataclass(frozen=True)
class KnnReference:
    """A second encoder that has not seen the measured images.

    Source: arXiv 2304.13850 and 2402.02103, two-model tests; arXiv 2504.05651, a text encoder in the second's place.

    Attributes:
        encoder: any encoder; null trains the recipe of the encoder under test on the heldout role instead of target.
        probe: how it is asked; null: as the encoder under test is. Query and bank may be other views of the same rows:
            captions against captions, where the encoder under test goes from captions to images.
        directions: "both" also measures the second encoder on the images that it was trained on, with the encoder
            under test as its reference, and averages the two gaps: what one encoder knows better then cancels. It needs
            an encoder trained on the heldout role.
        key: where this node is, for errors.
    """

    encoder: Encoder | TrainedHere | None = None
    probe: KnnProbe | None = None
    directions: Literal["one", "both"] = "one"
    key: str = "references.two_model"

    def __post_init__(self) -> None:
        if self.directions not in ("one", "both"):
            raise ConfigError(f"{self.key}.directions={self.directions}: must be one or both.")
        if isinstance(self.encoder, TrainedHere) and Role.TARGET in self.encoder.roles:
            raise ConfigError(
                f"{self.key}.encoder.roles={list(self.encoder.roles)}: a reference must not be trained on target "
                "images."
            )

    @property
    def is_trained(self) -> bool:
        """See `Reference.is_trained`."""
        return self.encoder is None or isinstance(self.encoder, TrainedHere)

    def check(self, tagger: Tagger, model: Encoder | TrainedHere, probe: KnnProbe) -> None:
        """A second encoder can be had, and asked."""
        (self.probe or probe).check_encoder(model if self.encoder is None else self.encoder, f"{self.key}.encoder")
        if self.encoder is not None:
            self.encoder.check()
        elif not isinstance(model, TrainedHere):
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
        if encoder is None and isinstance(inputs.model, TrainedHere):
            roles = [Role.HELDOUT if role == Role.TARGET else role for role in inputs.model.roles]
            encoder = replace(inputs.model, roles=tuple(dict.fromkeys(roles)))
        if not isinstance(encoder, TrainedHere):
            raise TypeError("only an encoder trained here can be trained")
        return [encoder.train(inputs.for_reference(), "training the second encoder")]

    def evidence(self, inputs: ReferenceInputs) -> Evidence:
        """See `Reference.evidence`. A query that the probe cannot show, or that cannot be read, has no evidence."""
        return self._ask(self._second(inputs), self.probe or inputs.probe, inputs.queries, inputs)

    def other_direction(self, inputs: ReferenceInputs) -> OtherDirection | None:
        """See `Reference.other_direction`."""
        if self.directions == "one":
            return None
        known = pl.element().is_in(inputs.labels)
        rows = inputs.heldout.filter(pl.col("truth").list.eval(known).list.any())
        second = self._ask(self._second(inputs), self.probe or inputs.probe, rows, inputs)
        first = self._ask(inputs.encoder, inputs.probe, rows, inputs)
        both = np.isfinite(second.probabilities).all(axis=1) & np.isfinite(first.probabilities).all(axis=1)
        rows = rows.filter(pl.Series(both))
        ids = rows["id"].to_list()
        return OtherDirection(rows, second.take(ids), first.take(ids))

    def _second(self, inputs: ReferenceInputs) -> LoadedEncoder:
        if self.encoder is None or isinstance(self.encoder, TrainedHere):
            return self.train(inputs.training)[0]
        return self.encoder.load()

    def _ask(self, encoder: LoadedEncoder, probe: KnnProbe, queries: pl.DataFrame, inputs: ReferenceInputs) -> Evidence:
        """What the bank answers under an encoder."""
        asked = inputs.shown(queries, inputs.probe.query, probe.query)
        bank = inputs.shown(inputs.bank, inputs.probe.bank, probe.bank)
        answers = inputs.extractor.embed(encoder, asked, inputs.manifest.store, "embedding queries")
        entries = inputs.extractor.embed(encoder, bank, inputs.manifest.store, "embedding the bank")
        settings = inputs.extractor.search_settings
        near = neighbours.search(answers.readable_only(), entries.readable_only(), probe.k, probe.metric, **settings)
        ids = asked.filter(pl.Series(answers.readable, dtype=pl.Boolean))["id"].to_list()
        voters = bank.filter(pl.Series(entries.readable, dtype=pl.Boolean))
        found = neighbours.infer(ids, near, voters["truth"], inputs.labels, probe.ties, voters["id"].to_list())
        return found.spread_over(queries["id"].to_list())
