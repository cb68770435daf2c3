"""Where weights come from: files read without running code in them, and hubs asked without long waits."""

from __future__ import annotations

import argparse
import logging
import pickle
import queue
import struct
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dejavu_exp.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

HUB = "hub"
RANDOM = "random"
KEY = "model.weights"
CONTAINERS = ("state_dict", "model_state_dict", "model", "network", "module", "teacher")
"""Keys under which training scripts keep a network, in the order in which they are looked for: the trained weights come
before their moving average, and of a teacher and its student the teacher, which such methods evaluate."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
ANSWER_SECONDS = 5.0
"""How long a hub may take to answer at all; the hub libraries themselves would try for most of a minute."""


def check_source(weights: str, key: str = KEY) -> None:
    """Check that `weights` is "hub", "random" or the path of a file.

    Raises:
        WeightsError: there is no such file.
    """
    if weights not in (HUB, RANDOM) and not local_path(weights).is_file():
        raise WeightsError(
            f"{key}={weights}: there is no such file. Give the path of a .safetensors, .pt, .pth or .bin file, or set "
            f"{key}={HUB} for the published weights, or {key}={RANDOM} for a trial whose numbers mean nothing."
        )


def check_file(weights: str, key: str, expected: str) -> None:
    """Check that `weights` is the path of a file.

    Args:
        weights: the value.
        key: its place in the configuration.
        expected: what the file must be, e.g. "a TorchScript archive".

    Raises:
        WeightsError: there is no such file.
    """
    if not local_path(weights).is_file():
        raise WeightsError(f"{key}={weights}: there is no such file. Give the path of {expected}.")


def local_path(weights: str) -> Path:
    """The path behind a `weights` value that is neither "hub" nor "random"."""
    return Path(weights).expanduser()


def label(weights: str, hub_name: str, seed: int) -> str:
    """What to call the weights in reports, e.g. "hub openai", "file model.safetensors", "random (seed 0)"."""
    if weights == HUB:
        return f"hub {hub_name}"
    return f"random (seed {seed})" if weights == RANDOM else f"file {local_path(weights).name}"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights from `seed` inside the block; the global generator goes on as if nothing had happened."""
    import torch

    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the accelerators, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        yield


def read_checkpoint(path: Path) -> object:
    """Whatever a weights file holds; no code in the file is run.

    `argparse.Namespace`, a bare holder of settings that several repositories save, is let through.

    Raises:
        WeightsError: the file is damaged, of another kind, or cannot be read without running code.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            raise WeightsError(
                f"{path} is a TorchScript archive, as OpenAI publishes CLIP: a program, which is not run here. Measure "
                f"it as it is with model=torchscript model.weights={path.name}, or save its tensors once, "
                f'torch.save(torch.jit.load("{path.name}", map_location="cpu").state_dict(), "model.pt"), and give '
                f"that file, or use the published weights from the hub."
            )
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} cannot be read as plain tensors and is not unpickled, since that would run code from the file "
            f"({_one_line(error)}). Save its state dict as a .safetensors file and give that."
        ) from error
    except WeightsError:
        raise
    # torch.load meets a damaged file with errors of a dozen kinds.
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as a weights file ({_one_line(error)}). It may be cut short or of another kind: "
            f"fetch or save it again, best as .safetensors."
        ) from error


def _is_torchscript(path: Path) -> bool:
    return archive_holds(path, "/constants.pkl")


def archive_holds(path: Path, *ends: str) -> bool:
    """True where a file is a zip archive with an entry of which the name ends in one of `ends`; nothing is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(ends) for name in archive.namelist())
    # A damaged directory raises more than BadZipFile.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return False


def as_state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors by name, out of the wrappings that training scripts put around them.

    `CONTAINERS` are opened, and the prefixes that data-parallel training and torch.compile put before every name are
    dropped; what was opened and dropped is logged.

    Raises:
        WeightsError: the file does not hold tensors by name.
    """
    import torch

    opened: list[str] = []
    # Not for ever: a file can hold a mapping that contains itself.
    while isinstance(content, Mapping) and len(opened) < len(CONTAINERS):
        wrapping = next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if wrapping is None:
            break
        opened.append(wrapping)
        content = content[wrapping]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no state dict: expected tensors by name, found {type(content).__name__}.")
    other = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise WeightsError(
            f"{path} holds no state dict: expected tensors by name, found also {_some(other)}. "
            f"Save the state dict alone and give that file."
        )
    state = {str(name): value for name, value in content.items()}
    dropped = ""
    while prefix := next((known for known in WRAPPERS if all(name.startswith(known) for name in state)), ""):
        state, dropped = without_prefix(state, prefix), dropped + prefix
    if opened or dropped:
        log.info("%s: read %s%s", path.name, ".".join(opened) or "the file", f" without {dropped}" if dropped else "")
    return state


def under_prefix(
    state: Mapping[str, Tensor], needed: Collection[str], path: Path, prefix: str | None, key: str
) -> tuple[dict[str, Tensor], str]:
    """The part of a state dict that belongs to a network, its names without what stands before them.

    Args:
        state: tensors by name.
        needed: the network's own names.
        path: the file, for errors.
        prefix: what stands before them; None to look for it: where the names do not fit as they are, it is whatever
            stands before all that are needed.
        key: of the prefix in the configuration, for errors.

    Returns:
        The tensors, and the prefix: empty where the names fit as they are, or fit nowhere.

    Raises:
        WeightsError: nothing stands under the prefix given, or several parts of the file have all names.
    """
    if prefix is None:
        # Batch norm's counters are of no use here, and old files lack them; see `load_strictly`.
        needed = [name for name in needed if not name.endswith("num_batches_tracked")]
        longest = max(needed, key=len, default="")
        found = [name.removesuffix(longest) for name in state if name.endswith(longest)]
        fitting = [before for before in found if all(before + name in state for name in needed)]
        if len(fitting) > 1 and "" not in fitting:
            told = " or ".join(f"{key}={before}" for before in fitting)
            raise WeightsError(f"{path} holds the network more than once. Say which to read: {told}.")
        prefix = "" if "" in fitting or not fitting else fitting[0]
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not part:
        raise WeightsError(
            f"{key}={prefix}: no name in {path} starts with it; there are {_some(list(state))}. Give what stands "
            f"before the network's own names, with its dot, or leave {key} out to have it found."
        )
    return part, prefix


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state dict with a prefix dropped that all of its names have."""
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], arch: str, path: Path, optional: Collection[str] = ()
) -> None:
    """Fill a module from a state dict that must fit it name by name and shape by shape.

    Args:
        module: what to fill.
        state: tensors by name.
        arch: what to call the architecture in an error.
        path: the file, for an error.
        optional: names that may be missing, but only all together. The batch counters of batch norms, which inference
            does not use and old files lack, may always be.

    Raises:
        WeightsError: the state dict does not fit.
    """
    own = module.state_dict()
    missing = {name for name in own if name not in state and not name.endswith("num_batches_tracked")}
    if missing == set(optional):
        missing = set()
    unexpected = [name for name in state if name not in own]
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or unexpected or reshaped:
        raise WeightsError(
            f"{path} does not fit arch={arch}: {len(missing)} tensors missing{_examples(sorted(missing))}, "
            f"{len(unexpected)} unexpected{_examples(unexpected)}, {len(reshaped)} of another shape"
            f"{_examples(reshaped)}. Set arch to the architecture that the file was saved from, or give another file."
        )
    try:
        module.load_state_dict(dict(state), strict=False)
    # Sparse and quantized tensors, and those of the device meta, which have no values.
    except RuntimeError as error:
        raise WeightsError(
            f"{path} does not fit arch={arch}: it holds tensors that cannot be copied ({_one_line(error)}). Save plain "
            f"tensors with values: not sparse, not quantized, not of the device meta."
        ) from error


def hub_error(name: str, reason: str, key: str = KEY) -> WeightsError:
    """The one error for published weights that cannot be had."""
    return WeightsError(
        f"cannot get the published weights {name} ({reason}): (1) connect to the network once, so that they land in "
        f"the cache, (2) give a local copy with {key}=PATH, or (3) set {key}={RANDOM} for a trial whose numbers mean "
        f"nothing."
    )


def why(error: BaseException) -> str:
    """An error in one line, for a sentence of ours."""
    return _one_line(error)


def require_hub_repository(name: str, repository: str, files: Sequence[str], key: str = KEY) -> None:
    """Check that one of the files is cached, or that the Hugging Face hub answers at all.

    Raises:
        WeightsError: neither; found out in seconds.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    repository, _, revision = repository.partition("@")
    if not any(isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str) for file in files):
        require_answer(name, f"{constants.ENDPOINT}/{repository}", key)


def require_answer(name: str, url: str, key: str = KEY) -> None:
    """Check that a server answers; HF_HUB_OFFLINE=1 forbids to ask, whoever the server is.

    Raises:
        WeightsError: it does not.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise hub_error(name, "not in the cache, and HF_HUB_OFFLINE forbids downloads", key)
    answer: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
    # The timeout holds for each address of a server, and not at all for finding its addresses: a thread can be left.
    threading.Thread(target=lambda: answer.put(_ask(url)), daemon=True).start()
    try:
        error = answer.get(timeout=2 * ANSWER_SECONDS)
    except queue.Empty:
        error = TimeoutError(f"nothing came within {2 * ANSWER_SECONDS:g} seconds")
    if error is not None:
        raise hub_error(name, f"{urlsplit(url).hostname} does not answer: {_one_line(error)}", key) from error


def _ask(url: str) -> OSError | None:
    """What keeps a server from answering; None where it answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # A refusal is an answer: the download itself will say more.
    except OSError as error:
        return error


def download(name: str, url: str, file_name: str) -> Path:
    """The local copy of a published file, in torch.hub's cache under `file_name`.

    Raises:
        WeightsError: it is not in the cache and cannot be downloaded.
    """
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.is_file():
        require_answer(name, url)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, RuntimeError) as error:
            raise hub_error(name, _one_line(error)) from error
    return path


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _examples(names: Sequence[str]) -> str:
    return f" ({_some(names)})" if names else ""
