"""Networks that others wrote, run as they are, and their trial on two images. This module imports torch."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import Transform
from dejavu_exp.errors import ConfigError, DejavuError, WeightsError

TOLERANCE = 0.01
"""Difference, as a share of the largest value, that an output may have with other images beside it: other kernels round
otherwise, in bfloat16 by this much; batch statistics and dropout change far more."""
SIZES = ((96, 64), (64, 160))
"""Width and height of the pictures of a trial."""
REPEATS = 4
"""How often a transform is called on a picture, to find one that draws at random."""
Output = str | int | None
"""Which element of what a network gives: by name, by position, or the whole of it."""


class OwnNetwork(nn.Module):
    """A network as its author wrote it, from images to (B, dim).

    Its images and weights keep torch's usual memory layout, for code that others wrote may call `view`.

    Args:
        program: the network.
        output: which element of its output counts, where that is no tensor.
        key: where the configuration has the encoder, for errors.
    """

    def __init__(self, program: nn.Module, output: Output, key: str) -> None:
        super().__init__()
        self.program, self.output, self.key = program, output, key

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, dim) float32; an output of shape (B, dim, h, w) has its mean over all positions taken."""
        found = _element(self.program(images.contiguous()), self.output, self.key)
        return (found.mean((2, 3)) if found.ndim == 4 else found).float()

    def to(self, *args: Any, **kwargs: Any) -> OwnNetwork:  # noqa: ANN401
        """As of any module, but without another memory layout; see above."""
        kwargs.pop("memory_format", None)
        return super().to(*args, **kwargs) if args or kwargs else self

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        # The path comes first: what follows names modules that only it leads to.
        return _again, (ImportPath(), type(self), self.program, self.output, self.key)


class ArchiveNetwork(OwnNetwork):
    """A program from an archive, which is pickled as the archive of itself that torch writes."""

    def forward(self, images: Tensor) -> Tensor:
        """See `OwnNetwork.forward`.

        Raises:
            WeightsError: it only works on the device that it was saved for.
        """
        try:
            return super().forward(images)
        except RuntimeError as error:
            if images.device.type == "cpu":
                raise
            raise WeightsError(
                f"{self.key}.weights: the program fails on {images.device.type} ({sources.why(error)}), and it works "
                "on the CPU. Constants or devices in it may be fixed to the CPU: save it again on this kind of "
                "device, or set trainer.accelerator=cpu."
            ) from error


class ScriptNetwork(ArchiveNetwork):
    """A TorchScript program."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        content = io.BytesIO()
        with hushed():
            torch.jit.save(self.program, content)
        return _script_again, (content.getvalue(), self.output, self.key)


class ExportedNetwork(ArchiveNetwork):
    """A program of torch.export. It is fixed in the mode that it was exported in, and takes no other.

    Args:
        exported: the program with its signature, a `torch.export.ExportedProgram`.
        output: as for `OwnNetwork`.
        key: as for `OwnNetwork`.
    """

    def __init__(self, exported: Any, output: Output, key: str) -> None:  # noqa: ANN401
        super().__init__(exported.module(), output, key)
        self._exported = exported

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Only notes the mode: torch refuses to change that of an exported program."""
        self.training = mode
        return self

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        content = io.BytesIO()
        with hushed():
            torch.export.save(self._exported, content)
        return _exported_again, (content.getvalue(), self.output, self.key)


class OwnTransform:
    """A transform as its author wrote it. Where it is unpickled, its module is found as it was here."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image to a tensor."""
        return self.transform(image)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _transform_again, (ImportPath(), self.transform)


class ImportPath:
    """Where this process looks for modules: pickled with what needs them, it makes another process look there too."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _looking_in, ([os.path.abspath(entry) for entry in sys.path],)


def _looking_in(entries: list[str]) -> ImportPath:
    sys.path.extend(entry for entry in entries if entry not in sys.path)
    return ImportPath()


def _again(_: ImportPath, kind: type[OwnNetwork], program: nn.Module, output: Output, key: str) -> OwnNetwork:
    network = kind(program, output, key)
    network.training = program.training
    return network


def _script_again(content: bytes, output: Output, key: str) -> nn.Module:
    with hushed():
        program = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
    return _ready(ScriptNetwork(program, output, key))


def _exported_again(content: bytes, output: Output, key: str) -> nn.Module:
    with hushed():
        return _ready(ExportedNetwork(torch.export.load(io.BytesIO(content)), output, key))


def _transform_again(_: ImportPath, transform: Transform) -> OwnTransform:
    return OwnTransform(transform)


def _ready(network: nn.Module) -> nn.Module:
    """As `base.finish` leaves a network."""
    return network.float().eval().requires_grad_(False)


@contextmanager
def hushed() -> Iterator[None]:
    """Silence torch's advice to use torch.export, which whoever has an archive cannot follow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        yield


def _element(found: object, output: Output, key: str) -> Tensor:
    """The tensor that was asked for.

    Raises:
        ConfigError: there is none.
    """
    parts = _parts(found)
    if output is None and isinstance(found, Tensor):
        return found
    chosen = parts.get(output) if output is not None else None
    if isinstance(chosen, Tensor):
        return chosen
    tensors = [f"{key}.output={name}" for name, value in parts.items() if isinstance(value, Tensor)]
    what = "a tensor" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    out = f"{key}.output=null" if isinstance(found, Tensor) else " or ".join(tensors)
    raise ConfigError(
        f"{key}.output={'null' if output is None else output}: the network gives {what}. "
        + (f"Set {out}." if out else "Let it give a tensor, or a tuple or dict of tensors.")
    )


def _parts(found: object) -> dict[str | int, object]:
    """The elements of an output by name, where they have names, and by position."""
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, Sequence) and not isinstance(found, str):
        return {**dict(zip(getattr(found, "_fields", ()), found, strict=False)), **dict(enumerate(found))}
    return {}


def try_out(network: nn.Module, transform: Transform, what: str) -> tuple[int, ...]:
    """Run a network once on two made-up images, as a run would.

    Args:
        network: in evaluation mode.
        transform: makes its inputs.
        what: what to call the encoder in an error, e.g. "model.weights=FILE".

    Returns:
        The shape of the images that it takes: channels, height, width.

    Raises:
        ConfigError: the transform does not give tensors of one form, or draws at random; the network fails, or gives
            something else than finite numbers of shape (B, dim), or an image's output depends on the others.
    """
    images = _shown(transform, what)
    check_outputs(network, images, [image[None] for image in images], what)
    return tuple(images.shape[1:])


def check_outputs(network: nn.Module, both: Any, each: Sequence[Any], what: str) -> int:  # noqa: ANN401
    """Check what a network gives for inputs together and one by one.

    Args:
        network: in evaluation mode.
        both: a batch of two.
        each: the same two, each as a batch.
        what: what to call the encoder in an error.

    Returns:
        The width of the output.

    Raises:
        ConfigError: see `try_out`.
    """
    together = _output(network, both, 2, what)
    if not bool(together.isfinite().all()):
        raise ConfigError(
            f"{what}: the network gives values that are not finite. Check its weights, and that it was not saved in "
            "half precision."
        )
    alone = torch.cat([_output(network, one, 1, what) for one in each])
    if not _alike(together, alone):
        if not _alike(together, _output(network, both, 2, what)):
            raise ConfigError(
                f"{what}: the network gives another output in every call, as dropout or random masks do. Save it in "
                "evaluation mode (.eval()), without anything that draws at random."
            )
        raise ConfigError(
            f"{what}: the output of an image depends on the other images of its batch, as with batch norm in training "
            "mode. Save the network in evaluation mode (.eval()), without anything that is computed over a batch."
        )
    return int(together.shape[1])


def _shown(transform: Transform, what: str) -> Tensor:
    """Two made-up pictures as inputs, shape (2, C, H, W)."""
    drawn = np.random.default_rng(0)
    shown = []
    for width, height in SIZES:
        picture = Image.fromarray(drawn.integers(0, 256, (height, width, 3), dtype=np.uint8))
        try:
            found = [transform(picture) for _ in range(REPEATS)]
        # Code that others wrote fails in any way.
        except Exception as error:
            raise ConfigError(
                f"{what}: its transform fails on an RGB picture of {width} x {height} pixels "
                f"({type(error).__name__}: {sources.why(error)}). It must take a PIL image."
            ) from error
        _check_input(found[0], what)
        if not all(torch.equal(found[0], other) for other in found[1:]):
            raise ConfigError(
                f"{what}: its transform gives another tensor in every call. Give the transform of evaluation, without "
                "random crops and flips."
            )
        shown.append(found[0])
    if shown[0].shape != shown[1].shape:
        raise ConfigError(
            f"{what}: its transform gives tensors of shapes {tuple(shown[0].shape)} and {tuple(shown[1].shape)} for "
            "pictures of two sizes, which cannot be stacked. Let it resize to one size, e.g. Resize((224, 224))."
        )
    return torch.stack(shown)


def _check_input(found: object, what: str) -> None:
    if isinstance(found, Tensor) and found.dtype == torch.float32 and found.ndim == 3:
        return
    kind = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise ConfigError(f"{what}: its transform gives {kind}, and must give a float32 tensor of shape (3, H, W).")


def _output(network: nn.Module, inputs: Any, size: int, what: str) -> Tensor:  # noqa: ANN401
    try:
        with torch.no_grad():
            found = network(inputs)
    except DejavuError:
        raise
    # Code that others wrote fails in any way.
    except Exception as error:
        form = f" of shape {tuple(inputs.shape[1:])}" if isinstance(inputs, Tensor) else ""
        raise ConfigError(
            f"{what}: the network fails on a batch of {size}{form} ({type(error).__name__}: {sources.why(error)}). "
            "It must take float32 batches of any number of images of the size that the transform gives; check "
            "the size, and save it in evaluation mode (.eval()) and for any number of images."
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != size:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"{what}: for a batch of {size} the network gives shape {shape}, and ({size}, dim) is expected, or "
            f"({size}, dim, height, width), of which the mean over positions is taken. Let it pool its output."
        )
    return found


def _alike(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    return bool((first - second).abs().max() <= TOLERANCE * first.abs().max())


class TransformersImages(nn.Module):
    """The image features of a model of transformers.

    Args:
        model: the whole model.
        output: "pooled", "cls" or "mean"; see `HuggingFaceEncoder`.
        key: where the configuration has the encoder, for errors.

    Raises:
        ConfigError: the class token is asked for, and the model has none.
    """

    def __init__(self, model: Any, output: str, key: str) -> None:  # noqa: ANN401
        super().__init__()
        self.model, self.output, self.key = model, output, key
        names = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
        if output == "cls" and not {"cls_token", "class_embedding"} & set(names):
            raise ConfigError(
                f"{key}.output=cls: a model of type {model.config.model_type} has no class token. Set "
                f"{key}.output=pooled or mean."
            )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, dim)."""
        if self.output == "pooled":
            of_images = getattr(self.model, "get_image_features", self.model)
            return _pooled(of_images(pixel_values=images), self.model, self.key).flatten(1)
        tokens: Tensor = getattr(self.model, "vision_model", self.model)(pixel_values=images).last_hidden_state
        if self.output == "cls":
            return tokens[:, 0]
        return tokens.mean((2, 3)) if tokens.ndim == 4 else tokens.mean(1)


class TransformersTexts(nn.Module):
    """The text features of a model of transformers that has images and texts in one space."""

    def __init__(self, model: Any, key: str) -> None:  # noqa: ANN401
        super().__init__()
        self.model, self.key = model, key

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """A tokenizer's tensors of T rows to (T, dim)."""
        return _pooled(self.model.get_text_features(**tokens), self.model, self.key)


def _pooled(found: Any, model: Any, key: str) -> Tensor:  # noqa: ANN401
    """What a model pools itself; some give it as it is."""
    pooled = found if isinstance(found, Tensor) else getattr(found, "pooler_output", None)
    if isinstance(pooled, Tensor):
        return pooled
    raise ConfigError(
        f"{key}.output=pooled: a model of type {model.config.model_type} pools nothing. Set {key}.output=mean, or cls "
        "where it has a class token."
    )
