"""An encoder's own transform on the pixels of a view: with the same result, or nearly so and several times faster.

Most are torchvision's Resize, CenterCrop, ToTensor and Normalize in this order; any other is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dejavu_exp.jpeg import Pixels

if TYPE_CHECKING:
    from torch import Tensor

INTERPOLATIONS = ("bilinear", "bicubic")
"""What Pillow and torch compute alike: both filter over the pixels that fall together, with weights as integers."""
TO_TENSOR = ("ToTensor", "MaybeToTensor")
"""Names of torchvision's class, and of timm's and open_clip's, which do the same to a picture."""
TO_RGB = "MaybeConvertMode"
"""Name of open_clip's class that makes a picture RGB, which views are."""


def on_pixels(transform: Callable[[Image.Image], Tensor], exact: bool) -> Callable[[Pixels], Tensor]:
    """A transform of pictures as one of pixels. It can be pickled where the transform can.

    Args:
        transform: an RGB picture to a (3, H, W) float32 tensor.
        exact: True for the same bits as `transform`. False lets torch resize, in integers, instead of Pillow: some
            values then differ by 1/255 before they are normalised, seldom by 2/255. `docs/benchmarks.md` has the
            share.

    Returns:
        From (height, width, 3) uint8 to what the transform gives.
    """
    from torchvision import transforms

    steps = list(transform.transforms) if isinstance(transform, transforms.Compose) else []
    if len(steps) < 2 or type(steps[-2]).__name__ not in TO_TENSOR or type(steps[-1]) is not transforms.Normalize:
        return OnPicture(transform)
    head = _tensor_steps(steps[:-2])
    if head is None:
        return OnPicture(transform)
    return Fused(tuple(steps[:-2]) if exact else head, exact, *_columns(steps[-1].mean, steps[-1].std))


def _tensor_steps(steps: Sequence[Any]) -> tuple[Callable[[Any], Any], ...] | None:
    """The steps before ToTensor as steps on tensors of integers, or None where one of them is not known."""
    from torchvision import transforms

    found: list[Callable[[Any], Any]] = []
    for step in steps:
        if type(step) is transforms.Resize and step.interpolation.value in INTERPOLATIONS:
            found.append(Resize(step))
        elif type(step) is transforms.CenterCrop:
            found.append(step)
        elif type(step).__name__ != TO_RGB:
            return None
    return tuple(found)


def _columns(mean: Any, std: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """As tensors of shape (3, 1, 1)."""
    import torch

    mean, std = (torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1).clone() for value in (mean, std))
    return mean, std


@dataclass(frozen=True)
class OnPicture:
    """A transform called as it is."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, pixels: Pixels) -> Tensor:
        """The transform of the pixels as a picture."""
        return self.transform(Image.fromarray(pixels))


@dataclass(frozen=True)
class Resize:
    """torchvision's Resize on integers: by torch where Pillow works in the same order, else by Pillow.

    Both filter along rows, round and clip to bytes, and filter along columns; but Pillow from version 13 on filters
    along columns first where height shrinks much more than width, as here where a tall picture shrinks. At sharp edges
    the order shows, by up to 20/255.
    """

    step: Any

    def __call__(self, pixels: Tensor) -> Tensor:
        """The resized pixels, shape (3, H, W)."""
        from torchvision.transforms.v2 import functional

        size, (height, width) = self.step.size, pixels.shape[1:]
        if not isinstance(size, int) or (size < width and height > 2 * width):
            return _channels_first(np.array(self.step(Image.fromarray(pixels.permute(1, 2, 0).numpy()))))
        resized: Tensor = functional.resize(pixels, size, self.step.interpolation, self.step.max_size, antialias=True)
        return resized


@dataclass(frozen=True)
class Fused:
    """Steps on a picture or on a tensor, then ToTensor and Normalize in one buffer.

    Attributes:
        head: the steps.
        pictures: True where they take pictures, False where they take (3, H, W) integers.
        mean: shape (3, 1, 1), of values in [0, 1].
        std: of the same.
    """

    head: tuple[Callable[[Any], Any], ...]
    pictures: bool
    mean: Tensor
    std: Tensor

    def __call__(self, pixels: Pixels) -> Tensor:
        """Shape (3, H, W), float32, contiguous."""
        import torch

        value: Any = Image.fromarray(pixels) if self.pictures else _channels_first(pixels)
        for step in self.head:
            value = step(value)
        if self.pictures:
            value = _channels_first(np.array(value))
        result = torch.empty(value.shape, dtype=torch.float32)
        return result.copy_(value).div_(255).sub_(self.mean).div_(self.std)


def _channels_first(pixels: Pixels) -> Tensor:
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1)
