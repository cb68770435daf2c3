"""Where weights come from: files read without running code in them, and hubs asked without long waits."""

from __future__ import annotations

import argparse
import pickle
import queue
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

HUB = "hub"
RANDOM = "random"
KEY = "model.weights"
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            raise WeightsError(
                f"{path} is a TorchScript archive, as OpenAI publishes CLIP: a program, which is not run here. Save "
                f'its tensors once, torch.save(torch.jit.load("{path.name}", map_location="cpu").state_dict(), '
                f'"model.pt"), and give that file, or use the published weights from the hub.'
            )
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} cannot be read as plain tensors and is not unpickled, since that would run code from the file "
            f"({_one_line(error)}). Save its state dict as a .safetensors file and give that."
        ) from error
    # torch.load meets a damaged file with many kinds of error.
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise WeightsError(
            f"{path} cannot be read as a weights file ({_one_line(error)}). It may be cut short or of another kind: "
            f"fetch or save it again, best as .safetensors."
        ) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def as_state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors by name, out of the wrappings that training scripts put around them.

    "state_dict" and "model" are opened (the trained weights, not their moving average), and the prefix "module." of
    data-parallel training is dropped.

    Raises:
        WeightsError: the file does not hold tensors by name.
    """
    import torch

    for wrapping in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no state dict: expected tensors by name, found {type(content).__name__}.")
    other = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise WeightsError(
            f"{path} holds no state dict: expected tensors by name, found also {_some(other)}. "
            f"Save the state dict alone and give that file."
        )
    return without_prefix({str(name): value for name, value in content.items()}, "module.")


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
    module.load_state_dict(dict(state), strict=False)


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
