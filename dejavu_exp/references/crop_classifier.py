"""A classifier of background crops as the reference: what other images teach about the label from the background."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from dejavu_exp import evidence, provenance
from dejavu_exp.encoders import Encoder, LoadedEncoder, TimmEncoder
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.references.base import OneDirection, ReferenceInputs, check_shows_images
from dejavu_exp.taggers import Tagger
from dejavu_exp.training import Job, Recipe, TrainedHere, TrainingInputs, training_views


@dataclass(frozen=True)
class CropClassifier(OneDirection):
    """A network trained to name the foreground label from the background crop, on crops of the heldout role.

    Source: arXiv 2504.05651, section 3.

    Attributes:
        network: architecture and transform; one output per class.
        recipe: how it is trained.
        seeds: networks, trained from different seeds, whose probabilities are averaged.
        validation_share: share of the heldout crops of each class that are not trained on but decide when to stop and
            which epoch is taken; 0 for the last epoch.
        patience: epochs without a better validation loss before training stops; null for never.
        key: where this node is, for errors.
    """

    network: TimmEncoder
    recipe: Recipe
    seeds: int = 1
    validation_share: float = 0.1
    patience: int | None = 10
    key: str = "references.crop_classifier"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"{self.key}.seeds={self.seeds}: must be at least 1.")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"{self.key}.validation_share={self.validation_share}: must lie in [0, 1).")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"{self.key}.patience={self.patience}: must be at least 1, or null.")
        if not self.recipe.supervised:
            raise ConfigError(f"{self.key}.recipe: a classifier needs a supervised recipe.")

    @property
    def is_trained(self) -> bool:
        """See `Reference.is_trained`."""
        return True

    def check(self, tagger: Tagger, model: Encoder | TrainedHere, probe: KnnProbe) -> None:
        """The probe shows images, and the architecture exists."""
        check_shows_images(probe, "crop_classifier")
        self.network.check()

    def train(self, inputs: TrainingInputs) -> list[LoadedEncoder]:
        """See `Reference.train`; one network for each seed, whose outputs are probabilities of the heldout classes."""
        lessons = inputs.heldout()
        labels = _classes(lessons)
        if len(labels) < 2:
            raise DataError(
                f"{self.key}: {len(lessons)} usable heldout crops of {len(labels)} classes are too few to learn from. "
                "Raise split.heldout, or lower split.min_side_px."
            )
        views = training_views(lessons, lessons.clear(), {}, labels)
        validates = validation_rows(lessons, self.validation_share, inputs.seed)
        return [self._train_one(number, views, validates, len(labels), inputs) for number in range(self.seeds)]

    def evidence(self, inputs: ReferenceInputs) -> Evidence:
        """See `Reference.evidence`. A query that cannot be read has no evidence."""
        found = [
            inputs.extractor.embed(network, inputs.queries, inputs.manifest.store, "classifying crops").values
            for network in self.train(inputs.training)
        ]
        columns = [inputs.labels.index(label) for label in _classes(inputs.training.heldout())]
        probabilities = np.zeros((len(inputs.queries), len(inputs.labels)))
        probabilities[:, columns] = np.mean(found, axis=0, dtype=np.float64)
        return evidence.from_probabilities(inputs.queries["id"].to_list(), inputs.labels, probabilities)

    def _train_one(
        self, number: int, views: pl.DataFrame, validates: pl.Series, classes: int, inputs: TrainingInputs
    ) -> LoadedEncoder:
        seed = provenance.hash_order(inputs.seed, "crop_classifier", str(number)) % 2**31
        arguments = {**self.network.arch_args, "num_classes": classes}
        network = replace(self.network, arch_args=arguments, output="probabilities", seed=seed)
        job = Job(
            network,
            self.recipe,
            views.filter(~validates),
            views.filter(validates),
            self.patience if validates.any() else None,
            seed,
            f"training the crop classifier{f', {number + 1} of {self.seeds}' if self.seeds > 1 else ''}",
        )
        return replace(network, weights=str(inputs.run(job) / "network.safetensors")).load()


def _classes(lessons: pl.DataFrame) -> list[str]:
    """The labels in the order of the classifier's outputs."""
    return sorted(lessons["label"].unique())


def validation_rows(lessons: pl.DataFrame, share: float, seed: int) -> pl.Series:
    """Which rows are for validation: a share of each class, rounded up where a class has two rows or more.

    Args:
        lessons: columns id and label.
        share: of each class, 0 to 1.
        seed: decides which; a row's place does not depend on the order of the rows.
    """
    order = pl.Series([provenance.hash_order(seed, "crop_classifier/validation", name) for name in lessons["id"]])
    places = lessons.select("label", place=order).select(
        pl.col("place").rank("ordinal").over("label"), count=pl.len().over("label")
    )
    kept = [0 if count < 2 else min(count - 1, math.ceil(share * count)) for count in places["count"]]
    return places["place"] <= pl.Series(kept)
