"""Encoders that a function of one's own makes."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import logging
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dejavu_exp import provenance
from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import IMAGES, LoadedEncoder, Transform, finish, plain
from dejavu_exp.encoders.preprocess import Preprocess
from dejavu_exp.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
VERSIONED = frozenset({*sys.stdlib_module_names, "torch", "numpy", "__mp_main__"})
"""Packages whose version, which every cache key holds, says enough of their code."""


@dataclass(frozen=True)
class CallableEncoder:
    """What a Python function gives: a network of images, alone or with its transform.

    The function's module is imported from the current folder or wherever else Python finds it, and run. The cache key
    covers the source files of all classes and functions that network and transform are made of, and that of the
    function; code in other files is not seen.

    Attributes:
        function: "package.module:name"; gives a torch.nn.Module from (B, 3, H, W) to (B, dim), or the module and a
            transform of an RGB PIL image to a float32 tensor.
        weights: path of a state dict, which must fit strictly; null for the weights that the function gives; "random"
            for the same, where they mean nothing.
        arguments: keyword arguments of the function.
        preprocess: how images are shown to the network; null where the function gives a transform.
        prefix: what stands before the network's own names in the state dict, with its dot; null to have it found.
        output: where the network gives a tuple, a position in it; a dict or named tuple, a name; null for a tensor. An
            output of shape (B, dim, h, w) has its mean over all positions taken.
        seed: of random weights that the function makes.
        key: where the configuration has this encoder, for errors.
    """

    reads: ClassVar[frozenset[str]] = IMAGES
    function: str
    weights: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Preprocess | None = None
    prefix: str | None = None
    output: str | int | None = None
    seed: int = 0
    key: str = field(default="model", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", plain(self.arguments))
        if not NAME.fullmatch(self.function):
            raise self._bad("must be package.module:name")
        if self.weights == sources.HUB:
            raise ConfigError(
                f"{self.key}.weights=hub: nothing is published of a network of your own. Give the path of a state "
                "dict, or null for the weights that the function gives."
            )
        if self.prefix is not None and not self._has_file():
            raise ConfigError(
                f"{self.key}.prefix={self.prefix}: is of a state dict, and {self.key}.weights={self.weights} is none. "
                f"Leave it out, or give {self.key}.weights=PATH."
            )

    def check(self) -> None:
        """See `Encoder.check`; imports the function's module."""
        if self._has_file():
            sources.check_file(str(self.weights), f"{self.key}.weights", "a .safetensors, .pt, .pth or .bin file")
        try:
            signature = inspect.signature(self._find())
        except ValueError:  # a function written in C, which does not tell
            return
        try:
            signature.bind(**self.arguments)
        except TypeError as error:
            raise ConfigError(
                f"{self.key}.arguments={dict(self.arguments)}: {self.function}{signature} cannot be called with them "
                f"({error})."
            ) from error

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`; the network is run on two images."""
        from dejavu_exp.encoders.own_modules import OwnNetwork, OwnTransform, try_out

        self.check()
        module, transform = self._make()
        found = "" if not self._has_file() else self._fill(module)
        own_transform: Transform
        if transform is None:
            own_transform = self._preprocess().transform()
        elif self.preprocess is None:
            own_transform = OwnTransform(transform)
        else:
            raise ConfigError(
                f"{self.key}.preprocess is set, and {self.function} gives a transform. Set {self.key}.preprocess=null, "
                "or let the function give the network alone."
            )
        code, state = self._code(module, transform)
        network = OwnNetwork(module, self.output, self.key).float().eval()
        try_out(network, own_transform, f"{self.key}.function={self.function}")
        arguments = f", arguments {self.arguments}" if self.arguments else ""
        output = "" if self.output is None else f", output {self.output}"
        return finish(
            network,
            own_transform,
            description=f"{self.function}{arguments}{output}",
            weights=f"{self._label()}{found}",
            transform_text=str(own_transform) if transform is None else f"of {self.function}, {state}",
            random=self.weights == sources.RANDOM,
            code=code,
        )

    def _has_file(self) -> bool:
        return self.weights not in (None, sources.RANDOM)

    def _label(self) -> str:
        if self.weights is None:
            return f"function {self.function}"
        return sources.label(self.weights, "", self.seed)

    def _bad(self, problem: str) -> ConfigError:
        return ConfigError(
            f"{self.key}.function={self.function}: {problem}. Name a function of no arguments, or of those in "
            f"{self.key}.arguments, that gives a torch.nn.Module, e.g. {self.key}.function=package.module:encoder."
        )

    def _find(self) -> Callable[..., object]:
        name, _, attribute = self.function.partition(":")
        # `python -m` looks in the current folder, a script installed by pip does not.
        if os.getcwd() not in (os.path.abspath(entry) for entry in sys.path):
            sys.path.append(os.getcwd())
        try:
            found: Any = importlib.import_module(name)
        # A module of others may do anything when it is imported, also end the program.
        except (Exception, SystemExit) as error:
            lacking = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
            raise self._bad(
                f"there is no module {name} in {os.getcwd()} or among the installed packages"
                if lacking
                else f"its module cannot be imported ({_told(error)})"
            ) from error
        for part in attribute.split("."):
            if not hasattr(found, part):
                near = difflib.get_close_matches(part, dir(found), n=1)
                raise self._bad(f"{name} has no {attribute}{f' (did you mean {near[0]}?)' if near else ''}")
            found = getattr(found, part)
        if not callable(found):
            raise self._bad(f"is a {type(found).__name__}, not a function")
        return found  # type: ignore[no-any-return]

    def _make(self) -> tuple[nn.Module, Transform | None]:
        """Call the function."""
        from torch import nn

        function = self._find()
        try:
            with sources.seeded(self.seed):
                found: object = function(**self.arguments)
        # As above.
        except (Exception, SystemExit) as error:
            raise self._bad(f"it fails ({_told(error)})") from error
        module, transform = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if not isinstance(module, nn.Module) or isinstance(module, type):
            raise self._bad(f"it gives a {type(found).__name__}, not a torch.nn.Module, nor one with its transform")
        if transform is not None and not callable(transform):
            raise self._bad(f"the transform that it gives is a {type(transform).__name__}, which cannot be called")
        return module, transform

    def _preprocess(self) -> Preprocess:
        if self.preprocess is None:
            raise ConfigError(
                f"{self.key}.preprocess is null, and {self.function} gives no transform. Say how images are shown to "
                "the network with model/preprocess=imagenet, clip or half, or let the function give the network and "
                "its transform."
            )
        return self.preprocess

    def _fill(self, module: nn.Module) -> str:
        """Read the state dict into the network; in words, which part of the file it is."""
        path = sources.local_path(str(self.weights))
        whole = sources.as_state_dict(sources.read_checkpoint(path), path)
        part, prefix = sources.under_prefix(whole, list(module.state_dict()), path, self.prefix, f"{self.key}.prefix")
        sources.load_strictly(module, part, self.function, path)
        if not prefix:
            return ""
        log.info(
            "%s: read the %d tensors under %s, and left out %d others",
            *(path.name, len(part), prefix, len(whole) - len(part)),
        )
        return f", under {prefix}"

    def _code(self, module: nn.Module, transform: Transform | None) -> tuple[str, str]:
        """A hash of the code that the parts are made of, and the transform's state in words.

        Raises:
            ConfigError: they cannot be pickled, so that other processes could not have them.
        """
        function = inspect.unwrap(self._find())
        names = {self.function.partition(":")[0], getattr(function, "__module__", "")}
        state = ""
        for what, part in (("network", module), ("transform", transform)):
            inspector = _Inspector()
            try:
                inspector.dump(part)
            # Objects of others fail in any way.
            except Exception as error:
                raise self._bad(
                    f"the {what} that it gives cannot be pickled, which other processes need ({_told(error)}): it must "
                    "hold no lambda, and no function or class that is defined inside of another"
                ) from error
            names |= inspector.modules
            state = f"{type(part).__name__} {inspector.hexdigest()}"
        files = {str(path): provenance.hash_file(path) for path in map(_source, sorted(names)) if path is not None}
        # Neither files nor tensors show what arguments have made of a layer, its stride for example.
        return provenance.key_of({"files": sorted(files.values()), "layers": repr(module)}), state


class _Inspector(pickle.Pickler):
    """Pickles to nowhere: gives a hash of what was pickled, and the modules of all classes and functions in it."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self.modules: set[str] = set()
        super().__init__(self, pickle.HIGHEST_PROTOCOL)

    def write(self, content: bytes) -> int:
        """Take a piece of the pickle."""
        self._digest.update(content)
        return len(content)

    def persistent_id(self, value: object) -> None:
        """Called for every object on its way into the pickle."""
        for known in (value, type(value)):
            name = getattr(known, "__module__", None)
            if isinstance(name, str):
                self.modules.add(name)

    def hexdigest(self) -> str:
        """Of all that was pickled."""
        return self._digest.hexdigest()


def _source(module: str) -> Path | None:
    """The file of a module, where its code is not told by a version that every cache key holds."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return None if file is None or module.partition(".")[0] in VERSIONED else Path(file)


def _told(error: BaseException) -> str:
    """An error of code of others: its kind, its text and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)
    place = f", line {where[-1].lineno} of {Path(where[-1].filename).name}" if where else ""
    return f"{type(error).__name__}: {sources.why(error)}{place}"
