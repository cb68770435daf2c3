"""An encoder that the caller of the Python API holds in memory."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
import sys
import sysconfig
import types
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import dejavu_exp
from dejavu_exp import provenance
from dejavu_exp.encoders.base import IMAGES, LoadedEncoder, Transform, finish
from dejavu_exp.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

WHAT = "encoder"
"""What the argument is called, for errors."""
_INSTALLED = (
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")),
    Path(dejavu_exp.__file__).resolve().parent,  # also where it is used from its source tree
)


@dataclass(frozen=True, eq=False)
class InMemoryEncoder:
    """A network that is there already, and its transform.

    Attributes:
        loaded: as `of` made it.
    """

    reads: ClassVar[frozenset[str]] = IMAGES
    loaded: LoadedEncoder

    @classmethod
    def of(cls, module: nn.Module, transform: Transform | None) -> InMemoryEncoder:
        """Copy a network, put the copy in inference mode and run it on two images.

        The cache key of its embeddings covers all tensors, all other state of network and transform, and the source
        files of their classes and functions, with those of the caller's own modules that these use. Where one of these
        cannot be read, as of code that was typed into a session, nothing is taken from the cache.

        Args:
            module: from (B, 3, H, W) float32 to (B, dim), or to (B, dim, h, w), of which the mean over positions is
                taken.
            transform: an RGB image to a (3, H, W) float32 tensor.

        Raises:
            ConfigError: one of them is something else, the network cannot be copied, or its output cannot be used.
        """
        from torch import nn

        from dejavu_exp.encoders.own_modules import OwnNetwork, OwnTransform, try_out

        if not isinstance(module, nn.Module):
            raise ConfigError(f"{WHAT}={type(module).__name__}: must be a torch.nn.Module.")
        if transform is None or not callable(transform):
            raise ConfigError(
                f"{WHAT} needs transform=..., which makes of an RGB image what the network takes, e.g. the transform "
                "that it was evaluated with."
            )
        try:
            module = copy.deepcopy(module).cpu().float().eval()
        # Code that others wrote fails in any way.
        except Exception as error:
            raise ConfigError(f"{WHAT}={type(module).__name__}: it cannot be copied ({error}).") from error
        network, own_transform = OwnNetwork(module, None, WHAT).eval(), OwnTransform(transform)
        try_out(network, own_transform, WHAT)
        title, of_transform = f"{type(module).__name__} in memory", fingerprint(transform)
        loaded = finish(
            network,
            own_transform,
            description=title,
            weights="in memory",
            transform_text=f"{getattr(transform, '__qualname__', type(transform).__name__)}, {of_transform}",
            random=False,
            code=fingerprint(module),
        )
        return cls(loaded)

    def check(self) -> None:
        """See `Encoder.check`; done when it was made."""

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        return self.loaded

    def as_config(self) -> dict[str, str]:
        """What stands for it in config.yaml."""
        loaded = self.loaded
        return {
            "in_memory": loaded.description,
            "weights_hash": loaded.weights_hash,
            "transform": loaded.transform_text,
        }


def fingerprint(value: object) -> str:
    """A hash of all that decides what an object computes: its state, with tensors by content, and its code.

    Args:
        value: a network, a transform, or any other object.

    Returns:
        Hexadecimal digits; other ones in every call where the state cannot be pickled or the code cannot be read.
    """
    state = _State()
    try:
        state.dump(value)
        sources = _source_hashes(state.modules)
    # Objects that others wrote fails in any way.
    except Exception as error:
        log.warning("%s: nothing of it is taken from the cache, for %s", type(value).__name__, error)
        return uuid.uuid4().hex
    return provenance.key_of({"state": provenance.hash_bytes(state.content.getvalue()), "sources": sources})


class _State(pickle.Pickler):
    """Writes an object's state for its hash alone, and notes the modules of its classes and functions."""

    def __init__(self) -> None:
        self.content = io.BytesIO()
        self.modules: set[str] = set()
        super().__init__(self.content, protocol=5)

    def persistent_id(self, value: Any) -> tuple[str, ...] | None:  # noqa: ANN401
        """Stands for a tensor: pickled as such it would tell where it lies in memory."""
        import torch

        if not isinstance(value, torch.Tensor):
            return None
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return str(value.dtype), str(tuple(value.shape)), provenance.hash_bytes(content.tobytes())

    def reducer_override(self, value: Any) -> Any:  # noqa: ANN401
        """Called for classes and functions, and for objects of all but the plainest classes."""
        named = value if isinstance(value, type | types.FunctionType) else type(value)
        self.modules.add(named.__module__)
        return NotImplemented


def _source_hashes(names: Iterable[str]) -> dict[str, str]:
    """Hashes of the source files of modules; of those that are not installed, also of what they use."""
    found: dict[str, str] = {}
    waiting = sorted(names)
    while waiting:
        name = waiting.pop()
        if name in found or name in sys.builtin_module_names:
            continue
        module = sys.modules[name]
        file = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
        if file is None:
            if _is_compiled(module):
                continue
            raise OSError(f"the code of {name} is in no file")
        found[name] = provenance.hash_file(Path(file))
        if not any(Path(file).resolve().is_relative_to(place) for place in _INSTALLED):
            waiting += _used_by(module)
    return dict(sorted(found.items()))


def _is_compiled(module: types.ModuleType) -> bool:
    """True for a module that never had Python code; the versions of those that count are in every cache key."""
    if getattr(module, "__spec__", None) is not None:
        return True
    # Modules that compiled code makes inside itself, as torch._C does, have no specification.
    around = sys.modules.get(module.__name__.rpartition(".")[0])
    file = getattr(around, "__file__", None)
    return around is not None and file is not None and inspect.getsourcefile(around) is None


def _used_by(module: types.ModuleType) -> set[str]:
    """The modules of what a module's globals name."""
    names = set()
    # What the import adds, such as the loader, or pytest's "@pytest_ar", is no part of the code.
    for value in (item for name, item in vars(module).items() if name.isidentifier() and not name.startswith("__")):
        owner = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        if isinstance(owner, str) and owner in sys.modules:
            names.add(owner)
    return names
