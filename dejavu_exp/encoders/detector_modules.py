"""Detectors as networks that give one score a class. Imports torch, so it is imported only when one is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def best_scores(scores: Tensor, *, one_class: bool) -> Tensor:
    """The largest score of each class over the boxes of an image.

    Args:
        scores: shape (B, boxes, classes), 0 to 1.
        one_class: True where a box counts for its best class alone.

    Returns:
        Shape (B, classes); with `one_class`, 0 for a class that is no box's best.
    """
    if not one_class:
        return scores.amax(dim=1)
    best, labels = scores.max(dim=2)
    return scores.new_zeros(len(scores), scores.shape[2]).scatter_reduce(1, labels, best, "amax")


class ClassDetector(nn.Module):
    """A detector of fixed classes."""

    kept: Tensor
    columns: Tensor

    def __init__(self, model: nn.Module, columns: list[int | None], *, one_class: bool) -> None:
        """Take the model apart from the names of its classes.

        Args:
            model: of transformers, for object detection.
            columns: of each class of the model, the output column; None for a class that is none.
            one_class: True for a softmax over the classes and "no object", False for a sigmoid a class.
        """
        super().__init__()
        self.model = model
        self.one_class = one_class
        kept = [index for index, column in enumerate(columns) if column is not None]
        self.register_buffer("kept", torch.tensor(kept))
        self.register_buffer("columns", torch.tensor([column for column in columns if column is not None]))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), or (B, 4, H, W) with the mask of valid pixels last, to (B, columns), 0 to 1."""
        mask = images[:, 3] if images.shape[1] == 4 else None
        logits = self.model(pixel_values=images[:, :3], pixel_mask=mask).logits.float()
        scores = logits.softmax(dim=-1)[..., :-1] if self.one_class else logits.sigmoid()
        best = best_scores(scores, one_class=self.one_class)[:, self.kept]
        merged = best.new_zeros(len(best), int(self.columns.max()) + 1)
        return merged.scatter_reduce(1, self.columns.expand(len(best), -1), best, "amax")


class TextDetector(nn.Module):
    """A detector of what a list of texts names (OWL-ViT, OWLv2)."""

    texts: Tensor

    def __init__(self, model: Any, texts: Tensor) -> None:  # noqa: ANN401
        super().__init__()
        self.model = model
        self.register_buffer("texts", texts)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, number of texts), 0 to 1."""
        features = self.model.image_embedder(pixel_values=images)[0].flatten(1, 2)
        logits = self.model.class_predictor(features, self.texts.expand(len(images), -1, -1))[0]
        return best_scores(logits.float().sigmoid(), one_class=True)


MOST_BOXES = 300
"""Boxes of an image that are kept, the surest first; RT-DETR gives no more."""
BOX_VALUES = 6
"""Numbers of a box: the centre's x and y, width, height, score, and the column of its class."""


def surest_boxes(boxes: Tensor, scores: Tensor) -> Tensor:
    """The surest boxes of each image with their best class, in one row an image.

    Args:
        boxes: shape (B, boxes, 4): centre and sides, as shares.
        scores: shape (B, boxes, columns), 0 to 1.

    Returns:
        Shape (B, kept x `BOX_VALUES`), float32, where kept is `MOST_BOXES` or all there are, by descending score.
    """
    best, columns = scores.max(dim=2)
    best, order = best.topk(min(MOST_BOXES, best.shape[1]), dim=1)
    placed = boxes.float().gather(1, order[..., None].expand(-1, -1, 4))
    return torch.cat([placed, best[..., None], columns.gather(1, order).float()[..., None]], dim=2).flatten(1)


class ClassBoxes(ClassDetector):
    """A detector of fixed classes, with its boxes."""

    def forward(self, images: Tensor) -> Tensor:
        """As for `ClassDetector`, to what `surest_boxes` gives."""
        mask = images[:, 3] if images.shape[1] == 4 else None
        found = self.model(pixel_values=images[:, :3], pixel_mask=mask)
        logits = found.logits.float()
        scores = (logits.softmax(dim=-1)[..., :-1] if self.one_class else logits.sigmoid())[..., self.kept]
        merged = scores.new_zeros(*scores.shape[:2], int(self.columns.max()) + 1)
        columns = self.columns.expand(*scores.shape[:2], -1)
        return surest_boxes(found.pred_boxes, merged.scatter_reduce(2, columns, scores, "amax"))


class TextBoxes(TextDetector):
    """A detector of what a list of texts names, with its boxes."""

    def forward(self, images: Tensor) -> Tensor:
        """As for `TextDetector`, to what `surest_boxes` gives."""
        grid = self.model.image_embedder(pixel_values=images)[0]
        features = grid.flatten(1, 2)
        logits = self.model.class_predictor(features, self.texts.expand(len(images), -1, -1))[0]
        return surest_boxes(self.model.box_predictor(features, grid), logits.float().sigmoid())
