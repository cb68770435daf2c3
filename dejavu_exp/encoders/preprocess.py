"""How images are shown to a network that brings no transform of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dejavu_exp.errors import ConfigError

if TYPE_CHECKING:
    from dejavu_exp.encoders.base import Transform

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
RESIZES = ("crop", "squash")


@dataclass(frozen=True)
class Preprocess:
    """Resize, scale to [0, 1], then (x - mean) / std in each channel; the network gets squares.

    Attributes:
        side_px: side of the square, pixels.
        mean: of red, green and blue, of values in [0, 1].
        std: likewise. For a network that takes values in [0, 1] the mean is 0 and the std 1; for one that takes values
            in [0, 255] the std is 1/255.
        interpolation: "nearest", "bilinear" or "bicubic", of Pillow.
        resize: "crop" keeps the proportions and cuts the central square; "squash" does neither.
        crop_fraction: share of the shorter side that the square shows; the common 0.875 is 224 of 256 pixels. With
            "squash" the image is shown whole, and this must be 1.
        key: where the configuration has this, for errors.
    """

    side_px: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str = "bilinear"
    resize: str = "crop"
    crop_fraction: float = 0.875
    key: str = field(default="model.preprocess", compare=False)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, self._three(name))
        if not 1 <= self.side_px <= 4096:
            raise ConfigError(f"{self.key}.side_px={self.side_px}: must be a number of pixels from 1 to 4096.")
        if min(self.std) <= 0:
            raise ConfigError(f"{self.key}.std={list(self.std)}: must be above 0 in each channel.")
        for name, known in (("interpolation", INTERPOLATIONS), ("resize", RESIZES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{self.key}.{name}={getattr(self, name)}: must be one of {', '.join(known)}.")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"{self.key}.crop_fraction={self.crop_fraction}: must be above 0 and at most 1.")
        if self.resize == "squash" and self.crop_fraction != 1:
            raise ConfigError(
                f"{self.key}.crop_fraction={self.crop_fraction}: {self.key}.resize=squash shows the whole image. Set "
                f"{self.key}.crop_fraction=1, or {self.key}.resize=crop."
            )

    def _three(self, name: str) -> tuple[float, ...]:
        values = getattr(self, name)
        plain = isinstance(values, Sequence) and all(isinstance(value, int | float) for value in values)
        if not plain or len(values) != 3:
            raise ConfigError(f"{self.key}.{name}={values}: must be three numbers, e.g. [0.5, 0.5, 0.5].")
        return tuple(float(value) for value in values)

    def transform(self) -> Transform:
        """The transform, of torchvision."""
        from torchvision import transforms

        mode = transforms.InterpolationMode(self.interpolation)
        if self.resize == "squash":
            steps = [transforms.Resize((self.side_px, self.side_px), interpolation=mode)]
        else:
            shorter = round(self.side_px / self.crop_fraction)
            steps = [transforms.Resize(shorter, interpolation=mode), transforms.CenterCrop(self.side_px)]
        composed: Transform = transforms.Compose(
            [*steps, transforms.ToTensor(), transforms.Normalize(mean=self.mean, std=self.std)]
        )
        return composed
