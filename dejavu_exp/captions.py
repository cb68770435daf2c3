"""Captions as views: what an adversary holds who has the text of a pair and not its image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import polars as pl

from dejavu_exp import provenance
from dejavu_exp.errors import ConfigError
from dejavu_exp.tables import NEVER_SHOWN, Status


@dataclass(frozen=True)
class Caption:
    """The caption of an image; where it has several, the first, one drawn at random, or all of them.

    Blank captions do not count. A row whose image cannot be read is excluded like any other: nobody can say what is in
    it, and no encoder was trained on it.

    Attributes:
        choose: "first", "random" (drawn by `seed` and the row's id) or "all", whose embedding is the mean of their unit
            vectors.
        seed: of the draw.
    """

    choose: Literal["first", "random", "all"] = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.choose not in ("first", "random", "all"):
            raise ConfigError(f"view.choose={self.choose}: must be first, random or all.")

    @property
    def name(self) -> str:
        """The view's short name."""
        return "caption"

    @property
    def reads(self) -> str:
        """See `crops.ViewRule.reads`."""
        return "texts"

    def show(self, rows: pl.DataFrame) -> pl.DataFrame:
        """See `crops.ViewRule.show`. Annotations of the image play no part; a row without a caption has no view."""
        texts = [self._chosen(*row) for row in rows.select("id", "captions").iter_rows()]
        table = rows.select("status", "detail").with_columns(
            texts=pl.Series(texts, dtype=pl.List(pl.String)),
            **{name: pl.lit(None, dtype=pl.Int32) for name in ("xmin", "ymin", "xmax", "ymax")},
        )
        lost, silent = pl.col("status").is_in(list(NEVER_SHOWN)), pl.col("texts").is_null()
        status = pl.when(silent).then(pl.lit(str(Status.NO_CAPTION))).otherwise(pl.lit(str(Status.OK)))
        detail = pl.when(silent).then(pl.lit("the row has no caption")).otherwise(pl.lit(None))
        return table.select(
            pl.when(lost).then(None).otherwise("texts").alias("texts"),
            *("xmin", "ymin", "xmax", "ymax"),
            status=pl.when(lost).then("status").otherwise(status),
            detail=pl.when(lost).then("detail").otherwise(detail),
        )

    def _chosen(self, name: str, captions: list[str | None] | None) -> list[str] | None:
        usable = [text for text in captions or [] if text and text.strip()]
        if not usable:
            return None
        if self.choose == "all":
            return usable
        place = provenance.hash_order(self.seed, "caption", name) % len(usable) if self.choose == "random" else 0
        return [usable[place]]
