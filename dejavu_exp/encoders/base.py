"""What every encoder gives: a network ready for inference, its transform, and what identifies both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from dejavu_exp.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

Transform: TypeAlias = "Callable[[Image.Image], Tensor]"
TextTransform: TypeAlias = "Callable[[list[str]], Tensor | dict[str, Tensor]]"

IMAGES = frozenset({"images"})
TEXTS = frozenset({"texts"})
BOTH = IMAGES | TEXTS
"""What an encoder can embed: images, texts, or both in one space."""


@dataclass(frozen=True)
class LoadedEncoder:
    """A network ready for inference.

    The cache key of its outputs is `description`, `weights_hash` and `transform_text` together: the hash covers the
    tensors; what no tensor shows (the architecture's name and arguments, the layer, a softmax) is in the description.

    Attributes:
        module: in eval mode, without gradients; (B, 3, H, W) float32, or what `transform` gives of B texts, to
            (B, dim) float32.
        transform: the model's own; can be pickled. A `Transform` takes an RGB image and gives a (3, H, W) float32
            tensor; a `TextTransform`, where `reads` is "texts", takes B texts and gives a tensor, or a dict of tensors,
            of B rows.
        description: what is computed, e.g. "timm tf_efficientnet_lite0, features".
        weights: where the weights come from: "hub NAME", "file NAME", "folder NAME", "package NAME", "function NAME",
            "random (seed N)", or "none" where nothing is learned.
        weights_hash: BLAKE2b of the module's state dict: names, types, shapes, values; and of the code that computes
            with it, where that is not this package's or a library's. 32 hexadecimal digits.
        transform_text: the transform in full.
        random: True where the weights are random, so that no figure from them means anything.
        classes: names of the output columns, or None where they have none.
        reads: "images" or "texts".
        text: gives the tower that puts texts into the same space as images, or None where there is none. It is called
            at most once, when texts are asked for: its tokenizer may not be at hand where only images are.
    """

    module: nn.Module
    transform: Callable[[Any], Any]
    description: str
    weights: str
    weights_hash: str
    transform_text: str
    random: bool
    classes: tuple[str, ...] | None = None
    reads: str = "images"
    text: Callable[[], LoadedEncoder] | None = None

    def reading(self, what: str) -> LoadedEncoder:
        """The part that embeds "images" or "texts".

        Raises:
            ConfigError: there is none.
            WeightsError: the tokenizer of the text tower cannot be had.
        """
        found = self if what == self.reads else self._text_tower if what == "texts" else None
        if found is not None:
            return found
        raise ConfigError(f"{self.description} cannot embed {what}. Choose an encoder, or a probe, that goes with it.")

    @cached_property
    def _text_tower(self) -> LoadedEncoder | None:
        return None if self.text is None else self.text()


class Encoder(Protocol):
    """An encoder as configured: cheap to build; `load()` does the work.

    Attributes:
        reads: what it can embed, of "images" and "texts".
    """

    @property
    def reads(self) -> frozenset[str]:
        """See above."""
        ...

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


def plain(value: object) -> object:
    """Mappings and sequences of any kind, such as Hydra's, as dict and list, which libraries can copy and print."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


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
    transform: Transform | TextTransform,
    *,
    description: str,
    weights: str,
    transform_text: str,
    random: bool,
    classes: tuple[str, ...] | None = None,
    reads: str = "images",
    text: Callable[[], LoadedEncoder] | None = None,
    code: str = "",
) -> LoadedEncoder:
    """Put the module in inference mode and hash what it holds, and `code`, a hash of the code that is not ours."""
    module = module.float().eval().requires_grad_(False)
    state = hash_state(module)
    if code:
        state = hashlib.blake2b(f"{state} {code}".encode(), digest_size=16).hexdigest()
    return LoadedEncoder(
        module, transform, description, weights, state, transform_text, random, classes=classes, reads=reads, text=text
    )
