"""Supervised training of a classifier, whose features then serve as an encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl_lightning
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dejavu_exp import progress
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.devices import quiet_trainer
from dejavu_exp.errors import ConfigError
from dejavu_exp.images import cut, decode

View = tuple[str, tuple[int, int, int, int], int, bool]
"""Path, region in pixels, class number, and whether it is a repeated background."""


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy on random crops, AdamW, one-cycle schedule.

    Images marked as repeated are shown again by their background crop, as multi-crop training does by chance: that is
    what plants memorization.

    Attributes:
        epochs: passes over the training views.
        batch_size: views a step.
        learning_rate: peak of the schedule.
        weight_decay: of AdamW.
        min_area: smallest random crop of an image, share of its area.
        min_background_area: smallest random crop of a repeated background, share of its area.
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 0.01
    weight_decay: float = 0.02
    min_area: float = 0.3
    min_background_area: float = 0.8

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "learning_rate"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"model.recipe.{key}={getattr(self, key)}: must be above 0.")
        for key in ("min_area", "min_background_area"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"model.recipe.{key}={getattr(self, key)}: must lie in (0, 1].")

    def train(
        self,
        network: nn.Module,
        config: dict[str, Any],
        views: list[View],
        store: ImageStore,
        *,
        seed: int,
        device: str,
    ) -> None:
        """Train a classifier in place.

        Args:
            network: (B, 3, H, W) to (B, classes).
            config: timm's data configuration: input_size, mean, std.
            views: what to train on.
            store: gives the images.
            seed: of order and augmentation.
            device: "cpu" or "cuda".
        """
        images = TrainingViews(
            views, store, self._augment(config, self.min_area), self._augment(config, self.min_background_area)
        )
        order = torch.Generator().manual_seed(seed)
        batch_size = min(self.batch_size, len(views))
        # Decoded in this process: augmentation then draws from one seeded stream.
        loader: DataLoader[Any] = DataLoader(
            images,  # type: ignore[arg-type]
            batch_size,
            shuffle=True,
            generator=order,
            drop_last=True,
        )
        steps = self.epochs * len(loader)
        module = SupervisedModule(network, self.learning_rate, self.weight_decay, steps)
        bar = ViewsBar("training the encoder", steps * batch_size)
        with torch.random.fork_rng(), quiet_trainer(device, bar, epochs=self.epochs) as trainer:
            torch.manual_seed(seed)
            trainer.fit(module, loader)

    def _augment(self, config: dict[str, Any], min_area: float) -> Callable[[Image.Image], Tensor]:
        from torchvision.transforms import v2

        transform: Callable[[Image.Image], Tensor] = v2.Compose(
            [
                v2.PILToTensor(),
                # The ratio lets elongated backgrounds through whole.
                v2.RandomResizedCrop(
                    config["input_size"][-2:], scale=(min_area, 1.0), ratio=(1 / 3, 3), antialias=True
                ),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config["mean"], config["std"]),
            ]
        )
        return transform


@dataclass
class TrainingViews:
    """Augmented views with their class numbers: a map-style data set that keeps decoded images."""

    views: list[View]
    store: ImageStore
    augment: Callable[[Image.Image], Tensor]
    augment_background: Callable[[Image.Image], Tensor]

    def __post_init__(self) -> None:
        self._decoded: dict[str, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, region, label, is_background = self.views[index]
        if path not in self._decoded:
            self._decoded[path] = decode(self.store.read(path))
        augment = self.augment_background if is_background else self.augment
        return augment(cut(self._decoded[path], region)), label


class SupervisedModule(pl_lightning.LightningModule):
    """Cross-entropy of a classifier."""

    def __init__(self, network: nn.Module, learning_rate: float, weight_decay: float, steps: int) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.steps = steps

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        pixels, labels = batch
        return nn.functional.cross_entropy(self.network(pixels.contiguous(memory_format=torch.channels_last)), labels)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """AdamW under a one-cycle schedule, step by step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ViewsBar(pl_lightning.Callback):
    """Views done, rate and time left."""

    def __init__(self, title: str, total: int) -> None:
        self.bar = progress.bar(title, total)

    def on_train_batch_end(
        self,
        trainer: pl_lightning.Trainer,
        module: pl_lightning.LightningModule,
        outputs: object,
        batch: tuple[Tensor, Tensor],
        index: int,
    ) -> None:
        """Move the bar."""
        self.bar.update(len(batch[0]))

    def on_train_end(self, trainer: pl_lightning.Trainer, module: pl_lightning.LightningModule) -> None:
        """Leave the bar as it is."""
        self.bar.close()
