"""Floors: what can be had without looking at the image. An encoder that does not beat them infers nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from dejavu_exp import evidence, provenance
from dejavu_exp.evidence import Evidence
from dejavu_exp.references.base import OneDirection, ReferenceInputs
from dejavu_exp.taggers import Tagger


@dataclass(frozen=True)
class ClassPrior(OneDirection):
    """Every query gets the label frequencies of the heldout role; with equal frequencies all labels tie.

    Where the truth is a set, a label's frequency is the share of heldout rows that carry it.
    """

    def check(self, tagger: Tagger, model: object, probe: object) -> None:
        """Nothing can fail."""

    def evidence(self, inputs: ReferenceInputs) -> Evidence:
        """See `Reference.evidence`; ties go to the label that comes first."""
        carried = inputs.heldout.select(pl.col("truth").list.unique()).explode("truth", empty_as_null=False)
        counts = dict(carried.group_by("truth").len().iter_rows())
        prior = np.array([counts.get(label, 0) for label in inputs.labels], dtype=np.float64)
        prior = prior / len(inputs.heldout) if prior.any() else np.full(len(prior), 1 / len(prior))
        probabilities = np.tile(prior.astype(np.float32), (len(inputs.queries), 1))
        return evidence.from_probabilities(inputs.queries["id"].to_list(), inputs.labels, probabilities)


@dataclass(frozen=True)
class LabelShuffle(OneDirection):
    """Every query gets the target's evidence for another query of the same role, drawn at random.

    The predictions keep their frequencies and confidences and lose their tie to the image, so the accuracy is chance
    for this encoder on these labels.
    """

    def check(self, tagger: Tagger, model: object, probe: object) -> None:
        """Nothing can fail."""

    def evidence(self, inputs: ReferenceInputs) -> Evidence:
        """See `Reference.evidence`."""
        return shuffled(inputs.target, inputs.queries, inputs.seed)


def shuffled(target: Evidence, queries: pl.DataFrame, seed: int) -> Evidence:
    """The target's evidence dealt to other rows of the same role at random.

    Args:
        target: of all queries.
        queries: columns id and role.
        seed: of the deal.
    """
    dealt = []
    for (role,), rows in queries.select("id", "role").sort("role", "id").group_by("role", maintain_order=True):
        order = provenance.rng(seed, f"label_shuffle/{role}").permutation(len(rows))
        dealt.append(rows.with_columns(giver=rows["id"].gather(order)))
    pairs = pl.concat(dealt)
    given = target.take(pairs["giver"].to_list())
    return Evidence(
        tuple(pairs["id"]),
        given.labels,
        given.probabilities,
        given.ranking,
        given.confidence,
        given.tied,
        given.distance,
    ).take(queries["id"].to_list())
