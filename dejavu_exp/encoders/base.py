"""What every encoder gives: a network ready for inference, its transform, and what identifies both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

Transform: TypeAlias = "Callable[[Image.Image], Tensor]"


@dataclass(frozen=True)
class LoadedEncoder:
    """A network ready for inference.

    The cache key of its outputs is `description`, `weights_hash` and `transform_text` together: the hash covers the
    tensors; what no tensor shows (the architecture's name and arguments, the layer, a softmax) is in the description.

    Attributes:
        module: in eval mode, without gradients; (B, 3, H, W) float32 to (B, dim) float32.
        transform: the model's own; takes an RGB image and gives a (3, H, W) float32 tensor; can be pickled.
        description: what is computed, e.g. "timm tf_efficientnet_lite0, features".
        weights: where the weights come from: "hub NAME", "file NAME" or "random (seed N)".
        weights_hash: BLAKE2b of the module's state dict: names, types, shapes, values; 32 hexadecimal digits.
        transform_text: the transform in full.
        random: True where the weights are random, so that no figure from them means anything.
        classes: names of the output columns, or None where they have none.
    """

    module: nn.Module
    transform: Transform
    description: str
    weights: str
    weights_hash: str
    transform_text: str
    random: bool
    classes: tuple[str, ...] | None = None


class Encoder(Protocol):
    """An encoder as configured: cheap to build; `load()` does the work."""

    def check(self) -> None:
        """Find what cannot work, without reading weights or touching the network.

        Raises:
            ConfigError: the architecture is unknown, or values do not go together.
            WeightsError: the weights file is not there.
        """
        ...

    def load(self) -> LoadedEncoder:
        """Build the network and fill it with its weights.

        Raises:
            ConfigError: as for `check`.
            WeightsError: the weights cannot be had, or do not fit the architecture.
        """
        ...


def hash_state(module: nn.Module) -> str:
    """BLAKE2b of all tensors of a module with their names, types and shapes, 32 hexadecimal digits."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def finish(
    module: nn.Module,
    transform: Transform,
    *,
    description: str,
    weights: str,
    transform_text: str,
    random: bool,
    classes: tuple[str, ...] | None = None,
) -> LoadedEncoder:
    """Put the module in inference mode and hash what it holds."""
    module = module.float().eval().requires_grad_(False)
    return LoadedEncoder(
        module, transform, description, weights, hash_state(module), transform_text, random=random, classes=classes
    )
