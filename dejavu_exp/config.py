"""The configuration: its schema, its check, the parts built from it. With `__main__` all that knows Hydra."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dejavu_exp import safety
from dejavu_exp.errors import ConfigError, DejavuError

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig

_PACKAGED = Path(__file__).parent / "conf"
CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "conf"
"""Where the configuration groups are: inside the package in a wheel, beside it in a source tree."""

NO_INFLUENCE = (
    ("run",),
    ("tracking",),
    ("report",),
    ("trainer", "cache"),
    ("trainer", "devices"),
    ("trainer", "shard_rows"),
    ("trainer", "workers"),
    ("trainer", "search_mb"),
    ("trainer", "lease_s"),
)
"""Keys that change no figure: two configurations that differ in nothing else are the same cell of a sweep."""

PARTS = (
    *("model", "dataset", "split", "leaks", "probe", "tagger", "scoring"),
    *("trainer", "training", "utility", "gate", "report", "tracking"),
)
NUMBERS = ("seed", "gallery", "reference_seeds")

TARGETS = "DEJAVU_TARGETS"
"""Environment variable with the packages, beside this one, whose classes a configuration may name; commas between."""
# Read before any configuration is: one from elsewhere can set the environment (hydra.job.env_set).
_TRUSTED = ("dejavu_exp", *filter(None, os.environ.get(TARGETS, "").split(",")))

LONGEST_REFERENCES = 60
"""Characters of the references' names in a folder's name; file systems allow 255 in all."""


@dataclass
class RunOptions:
    """What the command does with the configuration; written down nowhere, for no figure depends on it."""

    plan: bool = False
    again: bool = False


@dataclass
class Schema:
    """The top level of the configuration. Groups hold one part each, which checks its own keys."""

    seed: int = 0
    gallery: int = 12
    reference_seeds: int = 1
    model: Any = None
    dataset: Any = None
    split: Any = None
    leaks: Any = None
    probe: Any = None
    references: dict[str, Any] = field(default_factory=dict)
    tagger: Any = None
    scoring: Any = None
    trainer: Any = None
    training: Any = None
    utility: Any = None
    tracking: Any = None
    gate: Any = None
    report: Any = None
    run: RunOptions = field(default_factory=RunOptions)


@contextmanager
def spoken_errors() -> Iterator[None]:
    """End the program with one sentence for an error that has one; with HYDRA_FULL_ERROR=1, with the traceback.

    Every command does its work in here, and lets nobody but owner and group change what it writes.
    """
    safety.keep_others_from_writing()
    try:
        yield
    except DejavuError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"{type(error).__name__}: {error}")


def register() -> None:
    """Register the resolvers that configuration files use."""
    import omegaconf
    from omegaconf import OmegaConf
    from packaging.version import Version

    conf: Any = OmegaConf  # whose types here are those of one version
    add: Callable[..., None] = conf.register_new_resolver
    if Version(omegaconf.__version__) >= Version("2.4rc1"):
        # It has another name there, and evaluates annotations, of which ours name types that only type checkers import.
        add = functools.partial(conf.register_resolver, annotation_validation="off")
    add("weights_of_arch", _weights_of_arch, replace=True)
    add("cell", _cell_name, replace=True)


def _weights_of_arch(arch: str, *, _root_: DictConfig) -> str:
    """The weights given for the measured model, where it has this architecture; otherwise "hub"."""
    from omegaconf import OmegaConf

    if OmegaConf.select(_root_, "model.arch") == arch:
        return str(OmegaConf.select(_root_, "model.weights"))
    return "hub"


def _cell_name(*, _root_: DictConfig) -> str:
    """The folder of a cell in its sweep: readable, and the same for each task of a job and after a requeue."""
    from omegaconf import OmegaConf

    resolved = resolve(OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"]))
    model = OmegaConf.select(_root_, "hydra.runtime.choices.model") or "model"
    return f"{Path(str(model)).name}-{'+'.join(resolved['references'])[:LONGEST_REFERENCES]}-{content_hash(resolved)}"


def content_hash(resolved: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that change with every value of a resolved configuration that may change a figure."""
    return hashlib.blake2b(json.dumps(that_decides(resolved), sort_keys=True).encode(), digest_size=6).hexdigest()


def that_decides(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved configuration may change a figure."""
    kept: dict[str, Any] = json.loads(json.dumps(resolved, default=str))
    for *above, last in NO_INFLUENCE:
        node = kept
        for key in above:
            node = node.get(key, {})
        node.pop(last, None)
    return kept


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Check the composed configuration against the schema and resolve it.

    Raises:
        ConfigError: an unknown key (also one added with `+`), a missing value, a value of another type, or a secret
            among the values.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    register()
    try:
        # `+key=1` adds keys past Hydra's own check; merging onto a fresh schema refuses them.
        plain = OmegaConf.to_container(
            OmegaConf.merge(OmegaConf.structured(Schema), cfg), resolve=True, throw_on_missing=True
        )
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ConfigError(f"{key} is not set and has no default. Add {key}=... to the command line.") from error
    except ConfigKeyError as error:
        raise ConfigError(
            _unknown(str(error.full_key or error.key), [f.name for f in dataclasses.fields(Schema)])
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'configuration'}: {error.msg or error}") from error
    resolved = typing.cast(dict[str, Any], plain)
    if not resolved["references"]:
        raise ConfigError("reference is empty: choose at least one, e.g. reference=naive_bayes.")
    safety.refuse_secrets(resolved)
    return resolved


def compose(overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Compose a configuration as the command line does.

    Returns:
        The resolved configuration, and the name of its folder in a sweep.

    Raises:
        ConfigError: Hydra or the schema refuses it.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    register()
    try:
        with _other_hydra_aside(), hydra.initialize_config_dir(str(CONF_DIR.resolve()), version_base="1.3"):
            cfg = hydra.compose("config", list(overrides), return_hydra_config=True)
    except HydraException as error:
        raise ConfigError(f"{' '.join(overrides)}: {error}") from error
    plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    # First, for its errors name the key; those of an interpolation would name hydra.sweep.subdir.
    resolved = resolve(plain)
    return resolved, str(OmegaConf.select(cfg, "hydra.sweep.subdir"))


@contextmanager
def _other_hydra_aside() -> Iterator[None]:
    """Let Hydra be initialized where the program that calls this has already done so, and leave that as it was."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import VersionBase

    before, base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before
        VersionBase.instance().version_base = base


def build(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Build every part, the model and the data set unread; values are checked here, before any work.

    Returns:
        The parts by name, with the numbers of the top level and `references` (a dict).

    Raises:
        ConfigError: a part has an unknown or missing key, or a value it cannot work with.
    """
    parts: dict[str, Any] = {name: bind(resolved[name], name) for name in PARTS}
    parts["references"] = {name: bind(node, f"references.{name}") for name, node in resolved["references"].items()}
    return {**parts, **{name: resolved[name] for name in NUMBERS}}


def bind(node: object, key: str) -> Any:  # noqa: ANN401 - whatever `_target_` names
    """Build what a node's `_target_` names, after checking the node's keys and plain values against its signature.

    Args:
        node: the resolved configuration node.
        key: where it is, for errors.

    Raises:
        ConfigError: the node is wrong, or `_target_` is no class that may be built, see `TARGETS`.
    """
    if isinstance(node, list):
        return [bind(item, f"{key}.{index}") for index, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    arguments = {str(name): bind(value, f"{key}.{name}") for name, value in node.items() if name != "_target_"}
    if "_target_" not in node:
        return arguments
    target = _class_of(str(node["_target_"]), f"{key}._target_")
    _check_arguments(target, arguments, key)
    return target(**arguments)


def _class_of(name: str, key: str) -> type:
    """The class of a dotted name, unless importing or calling it would run code that nobody has said to trust."""
    from hydra.utils import get_object

    _refuse_strangers(name, key, name)
    try:
        found = get_object(name)
    except Exception as error:
        raise ConfigError(f"{key}={name}: cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{key}={name}: is no class. Parts of a configuration are classes.")
    # A trusted module also has names of what it imports.
    _refuse_strangers(f"{found.__module__}.{found.__qualname__}", key, name)
    return found


def _refuse_strangers(name: str, key: str, said: str) -> None:
    if not any(name == trusted or name.startswith(f"{trusted}.") for trusted in _TRUSTED):
        package = name.partition(".")[0]
        raise ConfigError(
            f"{key}={said}: {package} is not among the packages whose code a configuration may run "
            f"({', '.join(_TRUSTED)}). If you trust this configuration and {package}, set {TARGETS}={package} in the "
            "environment."
        )


def _check_arguments(target: type, arguments: Mapping[str, object], key: str) -> None:
    """Compare the keys of a node and their plain values with the signature of what it builds."""
    # A class from elsewhere that extends one of ours has fields whose annotations are names of our module.
    known = {name: value for part in reversed(target.__mro__) for name, value in vars(inspect.getmodule(part)).items()}
    hints = typing.get_type_hints(target.__init__, None, _KnownNames(known))  # type: ignore[misc]
    parameters = inspect.signature(target).parameters
    for name in arguments:
        if name not in parameters:
            raise ConfigError(_unknown(f"{key}.{name}", [f"{key}.{known}" for known in parameters]))
    for name, parameter in parameters.items():
        if name not in arguments and parameter.default is inspect.Parameter.empty:
            raise ConfigError(f"{key}.{name} is not set and has no default. Add {key}.{name}=... to the command line.")
    for name, value in arguments.items():
        if not _fits(value, hints.get(name, Any)):
            raise ConfigError(f"{key}.{name}={value}: must be {_spell(hints[name])}.")


class _KnownNames(dict[str, Any]):
    """Names that a module imports for its annotations only count as Any."""

    def __missing__(self, name: str) -> Any:  # noqa: ANN401
        if hasattr(__builtins__, name) or (isinstance(__builtins__, dict) and name in __builtins__):
            raise KeyError(name)
        return Any


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401
    """True where a plain value has the annotated type; annotations that are not plain types accept anything."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is types.NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, str)
    return isinstance(value, bool) if hint is bool else True


def _spell(hint: Any) -> str:  # noqa: ANN401
    """An annotation in words."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spell(option) for option in typing.get_args(hint))
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        Path: "a path",
        types.NoneType: "null",
    }
    return names.get(hint, str(hint))


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}."
    return f"{key} is not a key of the configuration: {hint}"
