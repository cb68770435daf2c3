"""Supervised training of a classifier; its features can then serve as an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dejavu_exp.errors import ConfigError
from dejavu_exp.training.recipe import Optimizer, Schedule, Task
from dejavu_exp.training.views import Augment, ShowCaption


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy on random crops.

    Images marked as repeated are shown again by their background crop, as multi-crop training does by chance: that is
    what plants memorization.

    Attributes:
        epochs: passes over the training views.
        optimizer: how weights are changed.
        batch_size: views a step, over all processes.
        min_area: smallest random crop of an image, share of its area.
        min_background_area: smallest random crop of a repeated background, share of its area.
        max_ratio: longest shape of a random crop, long side over short side.
        label_smoothing: share of the label given to all classes alike, 0 to 1.
        key: where this node is, for errors.
    """

    epochs: int
    optimizer: Optimizer
    batch_size: int = 64
    min_area: float = 0.3
    min_background_area: float = 0.8
    max_ratio: float = 3.0
    label_smoothing: float = 0.0
    key: str = "model.recipe"

    def __post_init__(self) -> None:
        check_length(self.key, self.epochs, self.batch_size)
        for name in ("min_area", "min_background_area"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{self.key}.{name}={getattr(self, name)}: must lie in (0, 1].")
        if self.max_ratio < 1:
            raise ConfigError(f"{self.key}.max_ratio={self.max_ratio}: must be at least 1, which is a square.")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"{self.key}.label_smoothing={self.label_smoothing}: must lie in [0, 1).")

    @property
    def supervised(self) -> bool:
        """See `Recipe.supervised`."""
        return True

    def augment(self, config: Mapping[str, Any], *, validation: bool = False) -> Augment:
        """See `Recipe.augment`; validation views are only scaled."""
        side = config["input_size"][-2:]
        if validation:
            return _Either(_pipeline(config, [_resize(side)]), _pipeline(config, [_resize(side)]))
        return _Either(
            *(
                _pipeline(config, [_crop(side, area, self.max_ratio), *_flip()])
                for area in (self.min_area, self.min_background_area)
            )
        )

    def caption(self, config: Mapping[str, Any], *, validation: bool = False) -> ShowCaption | None:
        """See `Recipe.caption`: none are read."""
        return None

    @property
    def libraries(self) -> tuple[str, ...]:
        """See `Recipe.libraries`."""
        return ()

    def task(self, network: nn.Module, schedule: Schedule) -> Task:
        """See `Recipe.task`."""
        return Classification(network, self.label_smoothing, schedule)

    @property
    def projector_layers(self) -> int:
        """See `Recipe.projector_layers`: what follows the features is the classifier."""
        return 0

    def projector(self, width: int) -> nn.Module:
        """Never asked for."""
        raise NotImplementedError("supervised training has no projector")


def check_length(key: str, epochs: int, batch_size: int) -> None:
    """Raise ConfigError where the number of passes or the batch size is below 1."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{key}.{name}={value}: must be at least 1.")


@dataclass(frozen=True)
class _Either:
    """One augmentation for images, one for repeated backgrounds."""

    image: Any
    background: Any

    def __call__(self, region: Any, is_background: bool) -> Tensor:  # noqa: ANN401
        result: Tensor = self.background(region) if is_background else self.image(region)
        return result


def _crop(side: Any, min_area: float, max_ratio: float) -> Any:  # noqa: ANN401 - torchvision is untyped
    from torchvision.transforms import v2

    return v2.RandomResizedCrop(side, scale=(min_area, 1.0), ratio=(1 / max_ratio, max_ratio), antialias=True)


def _resize(side: Any) -> Any:  # noqa: ANN401
    from torchvision.transforms import v2

    return v2.Resize(side, antialias=True)


def _flip() -> list[Any]:
    from torchvision.transforms import v2

    return [v2.RandomHorizontalFlip()]


def _pipeline(config: Mapping[str, Any], steps: list[Any]) -> Any:  # noqa: ANN401
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.PILToTensor(),
            *steps,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )


class Classification(Task):
    """Cross-entropy of a classifier."""

    def __init__(
        self,
        network: nn.Module,
        label_smoothing: float,
        schedule: Schedule,
    ) -> None:
        super().__init__(schedule)
        self.network = network.to(memory_format=torch.channels_last)
        self.label_smoothing = label_smoothing

    def loss(self, views: Tensor, codes: Tensor) -> Tensor:
        """See `Task.loss`."""
        logits = self.network(views.contiguous(memory_format=torch.channels_last))
        # Smoothed labels train; what is compared between epochs is the plain loss.
        smoothing = self.label_smoothing if self.training else 0.0
        return nn.functional.cross_entropy(logits, codes, label_smoothing=smoothing)

    def weights(self) -> dict[str, nn.Module]:
        """See `Task.weights`."""
        return {"network": self.network}
