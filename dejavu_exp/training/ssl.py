"""Self-supervised training of any timm network: VICReg, Barlow Twins, SimCLR, BYOL and DINO.

Losses, heads, augmentation and schedules are lightly's. What is added here makes the gradients of several processes
those of one process with the whole batch, and keeps the parts that lightly leaves to its user: which network is saved,
and when its moving average is updated.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dejavu_exp.errors import ConfigError
from dejavu_exp.training.recipe import Optimizer, Schedule, Task
from dejavu_exp.training.supervised import check_length
from dejavu_exp.training.views import Augment, ShowCaption


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip, colours, blur and solarization of the views of an image.

    Probabilities that differ between views are given for the first and the second one, and for DINO also for its small
    local crops.

    Attributes:
        min_area: smallest random crop of an image, share of its area.
        min_background_area: smallest random crop of a repeated background, share of its area.
        jitter: most by which brightness, contrast, saturation and hue change, as shares.
        jitter_strength: factor on all four.
        jitter_probability: of any such change, 0 to 1.
        grayscale: probability of a view without colours.
        blur: probabilities of a Gaussian blur. Its sigma is 0.1 to 2 pixels for networks that see 224 pixels, as in the
            papers, and in proportion for others.
        solarize: probabilities that bright pixels are inverted.
    """

    min_area: float = 0.08
    min_background_area: float = 0.8
    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1)
    jitter_strength: float = 1.0
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    blur: tuple[float, ...] = (1.0, 0.1)
    solarize: tuple[float, ...] = (0.0, 0.2)

    def __post_init__(self) -> None:
        for name in ("jitter", "blur", "solarize"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, Sequence) else (value,))

    def check(self, key: str, kinds: int) -> None:
        """Check all values.

        Args:
            key: where this node is.
            kinds: of views that have probabilities of their own: 2, or 3 with local crops.

        Raises:
            ConfigError: a value cannot work.
        """
        self._check_shares(key)
        for name in ("blur", "solarize"):
            values = getattr(self, name)
            if not _are_numbers(values, kinds) or min(values) < 0 or max(values) > 1:
                raise ConfigError(f"{key}.{name}={list(values)}: must be {kinds} probabilities, one a kind of view.")
        if not _are_numbers(self.jitter, 4) or min(self.jitter) < 0:
            raise ConfigError(
                f"{key}.jitter={list(self.jitter)}: must be 4 shares: of brightness, contrast, saturation and hue."
            )
        # Half of the colour circle is as far as a hue can go.
        if self.jitter_strength < 0 or self.jitter_strength * self.jitter[3] > 0.5:
            raise ConfigError(
                f"{key}.jitter_strength={self.jitter_strength}: must be 0 or more, and its product with the jitter of "
                f"hue ({self.jitter[3]}) at most 0.5."
            )

    def _check_shares(self, key: str) -> None:
        for name in ("min_area", "min_background_area"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{key}.{name}={getattr(self, name)}: must lie in (0, 1].")
        for name in ("jitter_probability", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{key}.{name}={getattr(self, name)}: must lie in [0, 1].")

    def view(self, config: Mapping[str, Any], kind: int, side: tuple[int, int], area: tuple[float, float]) -> Any:  # noqa: ANN401
        """One view.

        Args:
            config: timm's data configuration.
            kind: place of its probabilities.
            side: height and width of the view, pixels.
            area: smallest and largest crop, shares of the area.
        """
        # The most general of lightly's views, and the one that crops with the papers' bicubic filter.
        from lightly.transforms.dino_transform import DINOViewTransform

        brightness, contrast, saturation, hue = self.jitter
        scale = min(config["input_size"][-2:]) / 224
        return DINOViewTransform(
            crop_size=side,  # type: ignore[arg-type] # torchvision takes both sides
            crop_scale=area,
            cj_prob=self.jitter_probability,
            cj_strength=self.jitter_strength,
            cj_bright=brightness,
            cj_contrast=contrast,
            cj_sat=saturation,
            cj_hue=hue,
            random_gray_scale=self.grayscale,
            gaussian_blur=self.blur[kind],
            sigmas=(0.1 * scale, 2.0 * scale),
            solarization_prob=self.solarize[kind],
            normalize={"mean": list(config["mean"]), "std": list(config["std"])},
        )

    def pair(self, config: Mapping[str, Any], min_area: float) -> tuple[Any, ...]:
        """The two views that all methods have, at the network's own size."""
        side = tuple(config["input_size"][-2:])
        return tuple(self.view(config, kind, side, (min_area, 1.0)) for kind in (0, 1))


def _are_numbers(values: tuple[object, ...], count: int) -> bool:
    return len(values) == count and all(isinstance(value, int | float) for value in values)


@dataclass(frozen=True)
class _Views:
    """The views of an image, and those of a repeated background."""

    image: tuple[Any, ...]
    background: tuple[Any, ...]

    def __call__(self, region: Image.Image, is_background: bool) -> list[Tensor]:
        return [view(region) for view in (self.background if is_background else self.image)]


@dataclass(frozen=True)
class SelfSupervised:
    """What all five methods have.

    Attributes:
        epochs: passes over the training views.
        optimizer: how weights are changed.
        batch_size: images a step, over all processes; each gives as many views as the method wants.
        augmentation: of the views.
        key: where this node is, for errors.
    """

    epochs: int
    optimizer: Optimizer
    batch_size: int = 256
    augmentation: Augmentation = Augmentation()
    key: str = "model.recipe"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("lightly") is None:
            raise ConfigError(
                f'{self.key}={type(self).__name__}: needs lightly. Install it with pip install "dejavu_exp[ssl]".'
            )
        check_length(self.key, self.epochs, self.batch_size)
        if self.batch_size < 2:
            raise ConfigError(f"{self.key}.batch_size={self.batch_size}: must be at least 2, to compare images.")
        self.augmentation.check(f"{self.key}.augmentation", self._kinds)

    @property
    def _kinds(self) -> int:
        return 2

    @property
    def supervised(self) -> bool:
        """See `Recipe.supervised`."""
        return False

    def augment(self, config: Mapping[str, Any], *, validation: bool = False) -> Augment:
        """See `Recipe.augment`; validation views are augmented too, for the loss compares views."""
        of = self.augmentation
        return _Views(of.pair(config, of.min_area), of.pair(config, of.min_background_area))

    def caption(self, config: Mapping[str, Any], *, validation: bool = False) -> ShowCaption | None:
        """See `Recipe.caption`: none are read."""
        return None

    @property
    def libraries(self) -> tuple[str, ...]:
        """See `Recipe.libraries`."""
        return ("lightly",)

    def _at_least(self, least: float, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ConfigError(f"{self.key}.{name}={getattr(self, name)}: must be at least {least}.")

    def _above_zero(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{self.key}.{name}={getattr(self, name)}: must be above 0.")

    def _momentum(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{self.key}.{name}={getattr(self, name)}: must lie in [0, 1].")


@dataclass(frozen=True)
class VICReg(SelfSupervised):
    """Two views of an image agree, while every unit varies and no two vary together (arXiv 2105.04906).

    Attributes:
        invariance: weight of the squared distance between the views.
        variance: weight of what a unit's standard deviation lacks to 1.
        covariance: weight of the squared covariances of units.
        projector_layers: linear layers of the projector, count.
        projector_hidden: width of all but the last.
        projector_out: width of the last.
    """

    augmentation: Augmentation = Augmentation(blur=(0.5, 0.5), solarize=(0.1, 0.1))
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    projector_layers: int = 3
    projector_hidden: int = 8192
    projector_out: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "invariance", "variance", "covariance")
        self._at_least(1, "projector_layers", "projector_hidden", "projector_out")

    def projector(self, width: int) -> nn.Module:
        """See `Recipe.projector`."""
        # No loss on the covariances or differences of embeddings sees a last bias.
        return _head(width, self.projector_hidden, self.projector_out, self.projector_layers, last_bias=False)

    def task(self, network: nn.Module, schedule: Schedule) -> Task:
        """See `Recipe.task`."""
        from lightly.loss import VICRegLoss

        criterion = VICRegLoss(self.invariance, self.variance, self.covariance)
        projector = self.projector(width_of(network))
        return JointEmbedding(network, projector, criterion, schedule)


@dataclass(frozen=True)
class BarlowTwins(SelfSupervised):
    """The correlations of the units over two views are the unit matrix (arXiv 2103.03230).

    Attributes:
        off_diagonal: weight of the squared correlations of different units.
        projector_layers: linear layers of the projector, count.
        projector_hidden: width of all but the last.
        projector_out: width of the last.
    """

    off_diagonal: float = 0.005
    projector_layers: int = 3
    projector_hidden: int = 8192
    projector_out: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "off_diagonal")
        self._at_least(1, "projector_layers", "projector_hidden")
        self._at_least(2, "projector_out")

    def projector(self, width: int) -> nn.Module:
        """See `Recipe.projector`."""
        return _head(width, self.projector_hidden, self.projector_out, self.projector_layers, last_bias=False)

    def task(self, network: nn.Module, schedule: Schedule) -> Task:
        """See `Recipe.task`."""
        from lightly.loss import BarlowTwinsLoss

        criterion = BarlowTwinsLoss(self.off_diagonal)
        projector = self.projector(width_of(network))
        return JointEmbedding(network, projector, criterion, schedule)


@dataclass(frozen=True)
class SimCLR(SelfSupervised):
    """Each view finds the other one of its image among all views of the batch (arXiv 2002.05709).

    Attributes:
        temperature: of the softmax over cosine similarities.
        projector_layers: linear layers of the projector, count; each is followed by batch norm, also the last.
        projector_hidden: width of all but the last.
        projector_out: width of the last.
    """

    augmentation: Augmentation = Augmentation(jitter=(0.8, 0.8, 0.8, 0.2), blur=(0.5, 0.5), solarize=(0.0, 0.0))
    temperature: float = 0.1
    projector_layers: int = 2
    projector_hidden: int = 2048
    projector_out: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._above_zero("temperature")
        self._at_least(1, "projector_layers", "projector_hidden", "projector_out")

    def projector(self, width: int) -> nn.Module:
        """See `Recipe.projector`."""
        return _head(width, self.projector_hidden, self.projector_out, self.projector_layers, last_norm=True)

    def task(self, network: nn.Module, schedule: Schedule) -> Task:
        """See `Recipe.task`."""
        from lightly.loss import NTXentLoss

        criterion = NTXentLoss(self.temperature)
        projector = self.projector(width_of(network))
        return JointEmbedding(network, projector, criterion, schedule)


@dataclass(frozen=True)
class BYOL(SelfSupervised):
    """One view predicts what a moving average of the network makes of the other (arXiv 2006.07733).

    Attributes:
        momentum: of the moving average at the first step, 0 to 1; a cosine takes it to 1 at the last.
        projector_layers: linear layers of the projector, count.
        projector_hidden: width of all but the last.
        projector_out: width of the last.
        predictor_hidden: width of the first of the predictor's two linear layers.
    """

    momentum: float = 0.99
    projector_layers: int = 2
    projector_hidden: int = 4096
    projector_out: int = 256
    predictor_hidden: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        self._momentum("momentum")
        self._at_least(1, "projector_layers", "projector_hidden", "projector_out", "predictor_hidden")

    def projector(self, width: int) -> nn.Module:
        """See `Recipe.projector`."""
        return _head(width, self.projector_hidden, self.projector_out, self.projector_layers)

    def task(self, network: nn.Module, schedule: Schedule) -> Task:
        """See `Recipe.task`."""
        projector = self.projector(width_of(network))
        predictor = _head(self.projector_out, self.predictor_hidden, self.projector_out, 2)
        return Bootstrap(network, projector, predictor, self.momentum, schedule)


@dataclass(frozen=True)
class DINO(SelfSupervised):
    """Every crop predicts what a moving average of the network, the teacher, makes of large ones (arXiv 2104.14294).

    What is kept is the teacher, as in the paper.

    Attributes:
        local_crops: small crops besides the two large ones, count; 0 for none.
        local_side: height and width of a small crop, pixels; null for 3/7 of the network's own (96 of 224), to the
            nearest multiple of 8. A transformer must take it: see `dynamic_img_size` of timm.
        local_min_area: smallest small crop, share of the area; the largest has `augmentation.min_area`, where the large
            ones begin.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's softmax after its warm-up.
        warmup_teacher_temperature: of the teacher's softmax in the first epoch.
        warmup_teacher_epochs: passes over which the teacher's temperature changes, in equal steps.
        momentum: of the teacher's moving average at the first step, 0 to 1; a cosine takes it to 1 at the last.
        center_momentum: of the moving average of the teacher's outputs, 0 to 1, which is taken off them.
        projector_hidden: width of the projector's first two linear layers.
        bottleneck: width of the third, whose output is scaled to length 1.
        prototypes: outputs of the last layer, which the softmax is taken over.
        normalize_prototypes: keep the weights of every prototype at length 1, which is the stable choice.
        freeze_prototypes: passes in which the last layer does not change yet.
    """

    augmentation: Augmentation = Augmentation(min_area=0.4, blur=(1.0, 0.1, 0.5), solarize=(0.0, 0.2, 0.0))
    local_crops: int = 8
    local_side: int | None = None
    local_min_area: float = 0.05
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    warmup_teacher_temperature: float = 0.04
    warmup_teacher_epochs: int = 0
    momentum: float = 0.996
    center_momentum: float = 0.9
    projector_hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 65536
    normalize_prototypes: bool = True
    freeze_prototypes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._momentum("momentum", "center_momentum")
        self._above_zero("student_temperature", "teacher_temperature", "warmup_teacher_temperature", "local_min_area")
        self._at_least(0, "local_crops", "warmup_teacher_epochs", "freeze_prototypes")
        self._at_least(1, "projector_hidden", "bottleneck", "prototypes")
        if self.local_side is not None:
            self._at_least(1, "local_side")
        if self.local_min_area > self.augmentation.min_area:
            raise ConfigError(
                f"{self.key}.local_min_area={self.local_min_area}: must be at most augmentation.min_area="
                f"{self.augmentation.min_area}, up to which the small crops go."
            )

    @property
    def _kinds(self) -> int:
        return 3

    @property
    def projector_layers(self) -> int:
        """See `Recipe.projector_layers`: those before the prototypes."""
        return 3

    def augment(self, config: Mapping[str, Any], *, validation: bool = False) -> Augment:
        """See `Recipe.augment`: the large crops first."""
        of = self.augmentation
        side = self.local_side or max(8, round(min(config["input_size"][-2:]) * 3 / 7 / 8) * 8)
        local = (of.view(config, 2, (side, side), (self.local_min_area, of.min_area)),) * self.local_crops
        return _Views(of.pair(config, of.min_area) + local, of.pair(config, of.min_background_area) + local)

    def projector(self, width: int) -> nn.Module:
        """See `Recipe.projector`."""
        from lightly.models.modules.heads import DINOProjectionHead

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*weight_norm.*deprecated.*")
            head = DINOProjectionHead(
                width,
                self.projector_hidden,
                self.bottleneck,
                self.prototypes,
                freeze_last_layer=self.freeze_prototypes,
                norm_last_layer=self.normalize_prototypes,
            )
        # Weight norm keeps the product of direction and length, a tensor with a history: neither deepcopy nor pickle
        # take it. Each forward makes it anew.
        head.last_layer.weight = head.last_layer.weight.detach()
        projector: nn.Module = head
        return projector

    def task(self, network: nn.Module, schedule: Schedule) -> Task:
        """See `Recipe.task`."""
        from lightly.loss import DINOLoss

        if self.local_crops and getattr(getattr(network, "patch_embed", None), "strict_img_size", False):
            raise ConfigError(
                f"{self.key}.local_crops={self.local_crops}: this architecture takes images of one size only. Set "
                f"arch_args.dynamic_img_size=true of the network where timm has it, or {self.key}.local_crops=0."
            )
        criterion = DINOLoss(
            self.prototypes,
            self.warmup_teacher_temperature,
            self.teacher_temperature,
            self.warmup_teacher_epochs,
            self.student_temperature,
            self.center_momentum,
        )
        head = self.projector(width_of(network))
        return Distillation(network, head, criterion, self.momentum, schedule)


def width_of(network: nn.Module) -> int:
    """Width of what a timm model without a classifier gives."""
    width: Any = getattr(network, "head_hidden_size", None) or network.num_features
    return int(width)


def _head(
    width: int, hidden: int, out: int, layers: int, *, last_bias: bool = True, last_norm: bool = False
) -> nn.Module:
    """Linear layers with batch norm and ReLU between them."""
    from lightly.models.modules.heads import ProjectionHead

    widths = [width, *[hidden] * (layers - 1)]
    blocks: list[Any] = [
        (before, after, nn.BatchNorm1d(after), nn.ReLU()) for before, after in itertools.pairwise(widths)
    ]
    norm = nn.BatchNorm1d(out) if last_norm else None
    head: nn.Module = ProjectionHead([*blocks, (widths[-1], out, norm, None, last_bias and not last_norm)])
    return head


def _channels_last(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)


def _embed(network: nn.Module, head: nn.Module, views: Tensor) -> Tensor:
    embeddings: Tensor = head(network(views.contiguous(memory_format=torch.channels_last)))
    return embeddings


def _of_all(embeddings: Tensor) -> Tensor:
    """The embeddings of all processes, in float32.

    Every process takes the loss of all of them; gradients are summed on the way back, and averaged where processes
    meet: exactly those of one process. lightly's own `gather_distributed` normalises some terms by process.
    """
    from lightly.utils.dist import gather, world_size

    embeddings = embeddings.float()
    return torch.cat(gather(embeddings)) if world_size() > 1 else embeddings


def _frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that no gradient changes."""
    return copy.deepcopy(module).requires_grad_(False)


class JointEmbedding(Task):
    """A loss on the embeddings of two views, each passed through network and projector by itself."""

    def __init__(
        self,
        network: nn.Module,
        projector: nn.Module,
        criterion: nn.Module,
        schedule: Schedule,
    ) -> None:
        super().__init__(schedule)
        self.network, self.projector, self.criterion = _channels_last(network), projector, criterion

    def loss(self, views: list[Tensor], codes: Tensor) -> Tensor:
        """See `Task.loss`."""
        first, second = (_of_all(_embed(self.network, self.projector, view)) for view in views)
        # Correlations of thousands of units are too fine for bfloat16.
        with torch.autocast(first.device.type, enabled=False):
            loss: Tensor = self.criterion(first, second)
        return loss

    def weights(self) -> dict[str, nn.Module]:
        """See `Task.weights`."""
        return {"network": self.network, "projector": self.projector}


class _Averaged(Task):
    """A network and a head, each with a moving average that makes the targets."""

    def __init__(
        self,
        network: nn.Module,
        head: nn.Module,
        momentum: float,
        schedule: Schedule,
    ) -> None:
        super().__init__(schedule)
        self.network, self.head, self.momentum = _channels_last(network), head, momentum
        self.average, self.average_head = _frozen_copy(self.network), _frozen_copy(head)

    @torch.no_grad()
    def targets(self, views: Tensor) -> Tensor:
        """What the moving averages make of views, float32."""
        return _embed(self.average, self.average_head, views).float()

    def after_step(self, done: float) -> None:
        """Move the averages towards the new weights."""
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        momentum = cosine_schedule(round(done * self.schedule.steps) - 1, self.schedule.steps, self.momentum, 1.0)
        update_momentum(self.network, self.average, momentum)
        update_momentum(self.head, self.average_head, momentum)


class Bootstrap(_Averaged):
    """BYOL: the squared distance of predictions and targets, both scaled to length 1, summed over both directions."""

    def __init__(
        self,
        network: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        momentum: float,
        schedule: Schedule,
    ) -> None:
        from lightly.loss import NegativeCosineSimilarity

        super().__init__(network, projector, momentum, schedule)
        self.predictor, self.criterion = predictor, NegativeCosineSimilarity()

    def loss(self, views: list[Tensor], codes: Tensor) -> Tensor:
        """See `Task.loss`; 0 (all predicted) to 8."""
        predictions = [self.predictor(_embed(self.network, self.head, view)).float() for view in views]
        first, second = (self.targets(view) for view in views)
        # lightly averages negative cosines; the paper's learning rates are meant for this sum.
        loss: Tensor = 4 + 2 * (self.criterion(predictions[0], second) + self.criterion(predictions[1], first))
        return loss

    def weights(self) -> dict[str, nn.Module]:
        """See `Task.weights`: the network that is trained, not its average."""
        return {"network": self.network, "projector": self.head}


class Distillation(_Averaged):
    """DINO: cross-entropy of the student's softmax over prototypes against the teacher's, over all pairs of crops."""

    def __init__(
        self,
        network: nn.Module,
        head: nn.Module,
        criterion: nn.Module,
        momentum: float,
        schedule: Schedule,
    ) -> None:
        super().__init__(network, head, momentum, schedule)
        self.criterion = criterion

    def loss(self, views: list[Tensor], codes: Tensor) -> Tensor:
        """See `Task.loss`; the first two views are the large ones."""
        large, small = torch.cat(views[:2]), views[2:]
        students = list(_embed(self.network, self.head, large).float().chunk(2))
        if small:
            students += _embed(self.network, self.head, torch.cat(small)).float().chunk(len(small))
        teachers = list(self.targets(large).chunk(2))
        with torch.autocast(large.device.type, enabled=False):
            loss: Tensor = self.criterion(teachers, students, epoch=self.current_epoch)
        return loss

    def on_after_backward(self) -> None:
        """Leave the prototypes as they are for the first passes."""
        self.head.cancel_last_layer_gradients(self.current_epoch)  # type: ignore[operator]

    def weights(self) -> dict[str, nn.Module]:
        """See `Task.weights`: the teacher."""
        return {"network": self.average, "projector": self.average_head}
