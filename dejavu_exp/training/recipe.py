"""What a training recipe is: how views are augmented, what the loss is, how the optimizer and its schedule are set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import lightning.pytorch as pl_lightning
import torch
from torch import Tensor, nn

from dejavu_exp.errors import ConfigError
from dejavu_exp.training.views import Augment, ShowCaption


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of timm under linear warm-up and a cosine to zero, step by step.

    Attributes:
        name: "adamw", "sgd" or "lars"; the latter two with momentum 0.9.
        learning_rate: peak, for a batch of `per` images.
        weight_decay: of all weights but biases and those of normalisation layers.
        warmup_epochs: passes until the peak; may be a fraction.
        per: images a step that `learning_rate` is meant for: the peak grows in proportion to the global batch. null:
            the learning rate is taken as it is.
        key: where this node is, for errors.
    """

    name: Literal["adamw", "sgd", "lars"]
    learning_rate: float
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    per: int | None = None
    key: str = "model.recipe.optimizer"

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd", "lars"):
            raise ConfigError(f"{self.key}.name={self.name}: must be adamw, sgd or lars.")
        if self.learning_rate <= 0:
            raise ConfigError(f"{self.key}.learning_rate={self.learning_rate}: must be above 0.")
        for name in ("weight_decay", "warmup_epochs"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{self.key}.{name}={getattr(self, name)}: must be 0 or more.")
        if self.per is not None and self.per < 1:
            raise ConfigError(f"{self.key}.per={self.per}: must be at least 1, or null.")

    def peak(self, batch_size: int) -> float:
        """The peak learning rate at this global batch size.

        >>> Optimizer("lars", 0.2, per=256).peak(1024)
        0.8
        """
        return self.learning_rate if self.per is None else self.learning_rate * batch_size / self.per


@dataclass(frozen=True)
class Schedule:
    """An optimizer and how long it runs.

    Attributes:
        optimizer: how weights are changed.
        batch_size: images a step, over all processes.
        steps: of the whole recipe.
        steps_per_epoch: steps of a pass.
    """

    optimizer: Optimizer
    batch_size: int
    steps: int
    steps_per_epoch: int

    def build(self, module: nn.Module) -> dict[str, Any]:
        """Optimizer and schedule as Lightning takes them; the trainable parameters of the module are optimised."""
        import timm.optim

        given = self.optimizer
        peak = given.peak(self.batch_size)
        create: Any = timm.optim.create_optimizer_v2  # type: ignore[attr-defined]
        momentum = {} if given.name == "adamw" else {"momentum": 0.9}
        optimizer = create(
            module, opt=given.name, lr=peak, weight_decay=given.weight_decay, filter_bias_and_bn=True, **momentum
        )
        warmup = min(round(given.warmup_epochs * self.steps_per_epoch), self.steps - 1)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps - warmup)
        if not warmup:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}
        linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [linear, cosine], [warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Task(pl_lightning.LightningModule):
    """A network and its loss. Subclasses give `loss`, and whatever follows a step in `after_step`.

    Args:
        schedule: how weights are changed, and for how long.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def loss(self, views: Any, codes: Tensor) -> Tensor:  # noqa: ANN401 - a tensor, or a list of them
        """The mean loss of a batch.

        Args:
            views: what the recipe's augmentation gives, stacked: (B, 3, H, W), or a list of such; where the recipe
                reads captions, a list of that and of tokens, (B, context length).
            codes: shape (B,), class numbers.
        """
        raise NotImplementedError

    def after_step(self, done: float) -> None:
        """What follows each optimizer step; `done` is the share of the schedule that is over, 0 to 1."""

    def weights(self) -> Mapping[str, nn.Module]:
        """What is kept, by file name: "network", and for self-supervision on images "projector"."""
        raise NotImplementedError

    def training_step(self, batch: tuple[Any, Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        return self.loss(*batch)

    def validation_step(self, batch: tuple[Any, Tensor], _: int) -> None:
        """Log the loss of a validation batch; its mean decides when to stop early."""
        value = self.loss(*batch)
        self.log("validation_loss", value, on_epoch=True, batch_size=len(batch[1]), sync_dist=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """The step, and what follows it."""
        super().optimizer_step(*args, **kwargs)
        self.after_step(min(1.0, (self.trainer.global_step + 1) / self.schedule.steps))

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """See `Schedule.build`."""
        return self.schedule.build(self)


class Recipe(Protocol):
    """How a network is trained; a frozen dataclass.

    Attributes:
        epochs: passes over the training views.
        batch_size: images a step, over all processes and accumulated batches.
        optimizer: see `Optimizer`.
    """

    @property
    def epochs(self) -> int: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def optimizer(self) -> Optimizer: ...  # noqa: D102

    @property
    def supervised(self) -> bool:
        """True where the network has a classifier and labels are used."""
        ...

    def augment(self, config: Mapping[str, Any], *, validation: bool = False) -> Augment:
        """The augmentation; `config` is the network's data configuration, see `fit.Job.data_config`."""
        ...

    def caption(self, config: Mapping[str, Any], *, validation: bool = False) -> ShowCaption | None:
        """What is shown of an image's captions; None where none are read."""
        ...

    @property
    def libraries(self) -> tuple[str, ...]:
        """Packages that decide the weights besides those of `provenance.versions`."""
        ...

    def task(self, network: nn.Module, schedule: Schedule) -> Task:
        """The network with its loss."""
        ...

    @property
    def projector_layers(self) -> int:
        """Linear layers of the network that follows the encoder in training; 0 where there is none."""
        ...

    def projector(self, width: int) -> nn.Module:
        """That network, for an encoder of this width; its module `layers` is a sequence."""
        ...
