"""Captions from tables to what an encoder takes: the views that show texts, and one embedding a view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import polars as pl
import pyarrow as pa

if TYPE_CHECKING:
    from torch import Tensor

Tokens: TypeAlias = "Tensor | dict[str, Tensor]"


@dataclass
class ViewTexts:
    """The views of a table as texts, a batch at a time: a data set for worker processes.

    Attributes:
        texts: a column with the texts of each view, one or more; not lists, of which each worker would get a copy.
        transform: of a list of T texts to a tensor, or a dict of tensors, of T rows.
    """

    texts: pa.Array
    transform: Callable[[list[str]], Tokens]

    @classmethod
    def of(cls, views: pl.DataFrame, transform: Callable[[list[str]], Tokens]) -> ViewTexts:
        """From a table with the columns `view_id` and `texts`.

        Raises:
            ValueError: a view has no text.
        """
        texts = pl.col("texts")
        silent = views.filter(texts.is_null() | (texts.list.len() == 0) | texts.list.contains(None))
        if len(silent):
            shown = silent["texts"].to_list()[0]
            raise ValueError(f"{silent['view_id'][0]}: a view of texts must have one or more, and has {shown}")
        return cls(views["texts"].to_arrow(), transform)

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tokens, Tensor, list[str]]:
        """The row numbers, the tokens of all texts, how many each view has, and no reasons."""
        import torch

        shown = self.texts.take(pa.array(rows)).to_pylist()
        tokens = self.transform([text for texts in shown for text in texts])
        return torch.tensor(rows), tokens, torch.tensor([len(texts) for texts in shown]), [""] * len(shown)


def mean_of_units(values: Tensor, counts: Sequence[int]) -> Tensor:
    """One embedding a view: as it is where the view has one text, else the mean of its texts' unit vectors.

    Args:
        values: shape (T, D), the embeddings of all texts, view by view.
        counts: how many of the T texts each of the B views has, at least 1.

    Returns:
        Shape (B, D).

    >>> import torch
    >>> mean_of_units(torch.tensor([[3.0, 4.0], [2.0, 0.0], [0.0, 8.0]]), [1, 2]).tolist()
    [[3.0, 4.0], [0.5, 0.5]]
    """
    import torch
    from torch.nn import functional

    if all(count == 1 for count in counts):
        return values
    views = torch.split(values, list(counts))
    return torch.stack([view[0] if len(view) == 1 else functional.normalize(view, dim=1).mean(dim=0) for view in views])
