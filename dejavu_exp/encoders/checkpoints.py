"""Encoders from the checkpoints that the self-supervised learning repositories publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import IMAGES, LoadedEncoder, Transform, finish
from dejavu_exp.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Format:
    """How one repository lays out a full checkpoint.

    Attributes:
        container: the key that holds the network in a full checkpoint.
        projector: the prefix of the projector's tensors.
        activation: between the projector's layers, a class of torch.nn.
        hidden: widths of the published projector, input excluded.
        bias: whether its hidden Linear layers have one; the last has one only where there is no batch norm.
        batch_norm: whether batch norm follows its hidden Linear layers.
        interpolation: of the repository's evaluation transform.
        backbone_url: the published file with the backbone alone.
        full_url: the published file with the projector.
    """

    container: str
    projector: str
    activation: str
    hidden: tuple[int, int, int]
    bias: bool
    batch_norm: bool
    interpolation: str
    backbone_url: str
    full_url: str


_SITE = "https://dl.fbaipublicfiles.com"
FORMATS = {
    "vicreg": _Format(
        "model", "projector.", "ReLU", (8192, 8192, 8192), True, True, "bilinear",
        f"{_SITE}/vicreg/resnet50.pth", f"{_SITE}/vicreg/resnet50_fullckpt.pth",
    ),
    "barlowtwins": _Format(
        "model", "projector.", "ReLU", (8192, 8192, 8192), False, True, "bilinear",
        f"{_SITE}/barlowtwins/ljng/resnet50.pth", f"{_SITE}/barlowtwins/ljng/checkpoint.pth",
    ),
    "dino": _Format(
        "teacher", "head.mlp.", "GELU", (2048, 2048, 256), True, False, "bicubic",
        f"{_SITE}/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
        f"{_SITE}/dino/dino_resnet50_pretrain/dino_resnet50_pretrain_full_checkpoint.pth",
    ),
}  # fmt: skip
ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
LAYERS = ("backbone", "projector")


@dataclass(frozen=True)
class CheckpointEncoder:
    """A torchvision ResNet, with the projector if asked for, from a checkpoint of VICReg, Barlow Twins or DINO.

    A full checkpoint and a file with the backbone alone are both read. The widths of the projector are those of the
    checkpoint. What "projector" means:
    - vicreg, barlowtwins: the projector's output, before the normalisation that is part of Barlow Twins' loss.
    - dino: the teacher's head up to its bottleneck, scaled to norm 1, which is what its last layer compares with the
      prototypes; the prototypes' scores themselves are not used.

    Attributes:
        format: "vicreg", "barlowtwins" or "dino".
        weights: "hub", "random" or the path of a checkpoint, which must fit strictly.
        arch: a torchvision ResNet; the published weights are of resnet50.
        layer: "backbone" (pooled) or "projector".
        seed: of random weights.
    """

    reads: ClassVar[frozenset[str]] = IMAGES
    format: str
    weights: str = sources.HUB
    arch: str = "resnet50"
    layer: str = "backbone"
    seed: int = 0

    def __post_init__(self) -> None:
        for key, known in (("format", tuple(FORMATS)), ("arch", ARCHS), ("layer", LAYERS)):
            if getattr(self, key) not in known:
                raise ConfigError(f"model.{key}={getattr(self, key)}: must be one of {', '.join(known)}.")

    def check(self) -> None:
        """See `Encoder.check`."""
        if self.weights == sources.HUB and self.arch != "resnet50":
            raise ConfigError(
                f"model.weights=hub: the published weights of {self.format} are of resnet50, not {self.arch}. "
                f"Set model.arch=resnet50, or give your own weights with model.weights=PATH."
            )
        sources.check_source(self.weights)

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        import torchvision
        from torch import nn

        self.check()
        path = self._path()
        with sources.seeded(self.seed):
            backbone: nn.Module = torchvision.models.get_model(self.arch, weights=None)
            features = int(backbone.fc.in_features)  # type: ignore[union-attr, arg-type]
            backbone.fc = nn.Identity()
            parts = {"backbone": backbone}
            if path is None and self.layer == "projector":
                parts["projector"] = _build_projector(_published_shapes(FORMATS[self.format], features), self.format)
        if path is not None:
            parts |= self._fill(backbone, features, path)
        transform = _imagenet_transform(FORMATS[self.format].interpolation)
        return finish(
            _chain(parts, self.format),
            transform,
            description=f"{self.format} {self.arch}, {self.layer}",
            weights=sources.label(self.weights, self._url(), self.seed),
            transform_text=str(transform),
            random=self.weights == sources.RANDOM,
        )

    def _url(self) -> str:
        published = FORMATS[self.format]
        return published.backbone_url if self.layer == "backbone" else published.full_url

    def _path(self) -> Path | None:
        """The weights file, downloaded first if it is the published one; None for random weights."""
        if self.weights == sources.RANDOM:
            return None
        if self.weights != sources.HUB:
            return sources.local_path(self.weights)
        url = self._url()
        # Two of the repositories call their file resnet50.pth, and the cache has one folder for all.
        return sources.download(url, url, f"{self.format}_{url.rpartition('/')[2]}")

    def _fill(self, backbone: nn.Module, features: int, path: Path) -> dict[str, nn.Module]:
        """Fill the backbone; the result holds the projector, filled, where it was asked for."""
        state = self._state(path)
        full = any(name.startswith("backbone.") for name in state)
        own = _part(state, "backbone.") if full else state
        sources.load_strictly(backbone, own, self.arch, path)
        if self.layer == "backbone":
            return {}
        tensors = _part(state, FORMATS[self.format].projector)
        if not tensors:
            raise WeightsError(
                f"{path} holds the backbone alone, and model.layer=projector needs the projector too. Give the full "
                f"checkpoint (published at {FORMATS[self.format].full_url}), or set model.layer=backbone."
            )
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        with sources.seeded(self.seed):
            projector = _build_projector(shapes, self.format, path)
        sources.load_strictly(projector, tensors, f"{self.format} projector", path)
        if shapes["0.weight"][1] != features:
            raise WeightsError(
                f"{path}: its projector takes {shapes['0.weight'][1]} features, and model.arch={self.arch} gives "
                f"{features}. Give a checkpoint whose two parts belong together, or set model.layer=backbone."
            )
        return {"projector": projector}

    def _state(self, path: Path) -> dict[str, Tensor]:
        content = sources.read_checkpoint(path)
        container = FORMATS[self.format].container
        if isinstance(content, Mapping) and any(isinstance(value, Mapping) for value in content.values()):
            if container not in content:
                raise WeightsError(
                    f"{path}: a checkpoint of model.format={self.format} keeps its network under {container!r}; this "
                    f"one has {', '.join(map(str, content))}. Set model.format to the repository that wrote the file."
                )
            content = content[container]
        return sources.as_state_dict(content, path)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _published_shapes(published: _Format, features: int) -> Shapes:
    """Shapes of the published projector's tensors, as far as they decide its layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    step = 3 if published.batch_norm else 2
    widths = (features, *published.hidden)
    for index in range(3):
        last = index == 2
        shapes[f"{index * step}.weight"] = (widths[index + 1], widths[index])
        if not published.batch_norm or (published.bias and not last):
            shapes[f"{index * step}.bias"] = (widths[index + 1],)
        if published.batch_norm and not last:
            shapes[f"{index * step + 1}.running_mean"] = (widths[index + 1],)
    return shapes


def _build_projector(shapes: Shapes, name: str, path: Path | None = None) -> nn.Module:
    """The sequence of Linear, batch norm and activation layers that has tensors of these shapes.

    Raises:
        WeightsError: the names are not those of such a sequence.
    """
    from torch import nn

    numbers = [key.partition(".")[0] for key in shapes]
    if len(shapes.get("0.weight", ())) != 2 or not all(number.isdigit() for number in numbers):
        raise WeightsError(
            f"{path}: the projector is not a sequence of Linear and batch norm layers as model.format={name} has it: "
            f"found {', '.join(list(shapes)[:3])}. Set model.layer=backbone, or model.format to the "
            f"repository of the file."
        )
    layers: list[nn.Module] = []
    for index in range(max(map(int, numbers)) + 1):
        weight = shapes.get(f"{index}.weight", ())
        if f"{index}.running_mean" in shapes:
            layers.append(nn.BatchNorm1d(shapes[f"{index}.running_mean"][0]))
        elif len(weight) == 2:
            layers.append(nn.Linear(weight[1], weight[0], bias=f"{index}.bias" in shapes))
        else:
            layers.append(getattr(nn, FORMATS[name].activation)())
    return nn.Sequential(*layers)


def _chain(parts: dict[str, nn.Module], name: str) -> nn.Module:
    """Backbone, then projector, then what the format does to its output."""
    from torch import nn

    from dejavu_exp.encoders.modules import Normalize

    chain = nn.Sequential()
    for key, part in parts.items():
        chain.add_module(key, part)
    if "projector" in parts and name == "dino":
        chain.add_module("normalize", Normalize())
    return chain


def _imagenet_transform(interpolation: str) -> Transform:
    """The ImageNet evaluation transform: shorter side to 256, central 224 x 224."""
    from torchvision import transforms

    transform: Transform = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    return transform
