"""Encoders from transformers: vision towers, and models of images and texts in one space."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu_exp import provenance
from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import BOTH, IMAGES, LoadedEncoder, finish
from dejavu_exp.encoders.detectors import HUB_NAME, DetectorTransform, quiet
from dejavu_exp.encoders.text_encoders import FILES, describe_tokenizer
from dejavu_exp.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

OUTPUTS = ("pooled", "cls", "mean")
COMMIT = re.compile(r"[0-9a-f]{40}")
VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Entries of config.json that say nothing of what is computed."""
LONGEST_TEXT = 512
"""Tokens at most, where neither model nor tokenizer sets a limit."""


@dataclass(frozen=True)
class HuggingFaceEncoder:
    """A model of transformers with its own image processor, by AutoModel; of a CLIP-like model both towers.

    Only safetensors are read. Code that comes with a model is not run unless `trust_remote_code` says so.

    Attributes:
        weights: path of a folder that save_pretrained wrote, or a name on the Hugging Face hub.
        revision: branch, tag or commit of a hub model; null for main. Reports name the commit that it was.
        output: "pooled" is what the model itself pools: get_image_features of a CLIP-like model, otherwise
            pooler_output. "cls" is the class token and "mean" the mean of all tokens of the last layer, before any
            projection.
        trust_remote_code: True runs Python code that comes with the model; its texts are not embedded then. A hub model
            needs a commit as its revision, since code under a name may change.
        key: where the configuration has this encoder, for errors.
    """

    weights: str
    revision: str | None = None
    output: str = "pooled"
    trust_remote_code: bool = False
    key: str = field(default="model", compare=False)

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise ConfigError(f"{self.key}.output={self.output}: must be one of {', '.join(OUTPUTS)}.")
        if self.revision is not None and self._is_folder():
            raise ConfigError(
                f"{self.key}.revision={self.revision}: is of a model on the hub, and {self.weights} is a folder. Leave "
                "it out."
            )
        if self.trust_remote_code and not self._is_folder() and not COMMIT.fullmatch(self.revision or ""):
            raise ConfigError(
                f"{self.key}.trust_remote_code=true: code under a name may change, so {self.key}.revision must be the "
                f"commit that you have read, 40 hexadecimal digits, not {self.revision}."
            )

    @property
    def reads(self) -> frozenset[str]:
        """Images, and texts where the model has a text tower; both where the model is not here to be asked."""
        try:
            folder = self._here()
            if folder is None:
                return BOTH
            return BOTH if self._class_reads_texts(self._config(folder)) else IMAGES
        except (ConfigError, WeightsError, ImportError):
            return BOTH  # What is wrong is said by `check`, with the way out.

    def check(self) -> None:
        """See `Encoder.check`; a folder is looked into, and the hub's cache where HF_HUB_OFFLINE forbids downloads."""
        try:
            import transformers  # noqa: F401
            from huggingface_hub import constants
        except ImportError as error:
            raise ConfigError(
                f"{self.key}: a Hugging Face model needs the package transformers: pip install 'dejavu_exp[detect]'."
            ) from error
        folder = self._here()
        if folder is not None:
            self._config(folder)
        elif constants.HF_HUB_OFFLINE:
            raise self._unavailable("not in the cache, and HF_HUB_OFFLINE forbids downloads")

    def check_texts(self) -> None:
        """Find out whether texts can be embedded, where the model is here.

        Raises:
            WeightsError: the tokenizer cannot be had.
        """
        folder = self._here()
        if folder is not None and self._class_reads_texts(self._config(folder)):
            self._read(folder, "AutoTokenizer")

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`; the model is run on two images."""
        from dejavu_exp.encoders.own_modules import OwnNetwork, TransformersImages, try_out

        self.check()
        folder = self._here() or self._fetch()
        config = self._config(folder)
        model = self._build(folder, config)
        transform = DetectorTransform(self._read(folder, "AutoImageProcessor"), None)
        network = OwnNetwork(TransformersImages(model, self.output, self.key), None, self.key).float().eval()
        try_out(network, transform, f"{self.key}.weights={self.weights}")
        return finish(
            network,
            transform,
            description=f"transformers {config.model_type} {self._name()}, {self.output}",
            weights=self._label(folder),
            transform_text=transform.text(),
            random=False,
            text=partial(self._text_tower, model, folder) if self._class_reads_texts(config) else None,
            code=self._code(folder, config),
        )

    def _path(self) -> Path:
        return Path(self.weights).expanduser()

    def _is_folder(self) -> bool:
        return self._path().is_dir()

    def _name(self) -> str:
        """The model in a report: without the path of a folder, which says nothing about it."""
        return self._path().resolve().name if self._is_folder() else self.weights

    def _label(self, folder: Path) -> str:
        # A folder of the hub's cache has the name of its commit.
        return f"folder {self._name()}" if self._is_folder() else f"hub {self.weights}@{folder.name}"

    def _files(self) -> list[str]:
        return [*FILES, "*.py"] if self.trust_remote_code else list(FILES)

    def _here(self) -> Path | None:
        """The model's folder; None for a hub model that the cache does not hold whole."""
        if self._is_folder():
            return self._complete(self._path())
        if not HUB_NAME.fullmatch(self.weights):
            raise self._unavailable("there is no such folder, and it is no name on the hub")
        from huggingface_hub import errors, snapshot_download

        try:
            folder = Path(snapshot_download(self.weights, revision=self.revision, local_files_only=True))
        except (errors.LocalEntryNotFoundError, errors.HFValidationError):
            return None
        return None if _lacks(folder) else folder

    def _complete(self, folder: Path) -> Path:
        lacking = _lacks(folder)
        if lacking:
            raise self._unavailable(f"{folder} {lacking}")
        return folder

    def _fetch(self) -> Path:
        from huggingface_hub import constants, snapshot_download

        try:
            sources.require_answer(self.weights, f"{constants.ENDPOINT}/{self.weights}", f"{self.key}.weights")
        except WeightsError as error:
            raise self._unavailable(sources.why(error.__cause__ or error)) from error
        try:
            folder = snapshot_download(self.weights, revision=self.revision, allow_patterns=self._files())
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unavailable(sources.why(error)) from error
        return self._complete(Path(folder))

    def _read(self, folder: Path, kind: str, **options: Any) -> Any:  # noqa: ANN401
        """A part of the folder, through a class of transformers."""
        # Worker processes are forked after a first use here, which tokenizers would answer with warnings.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import transformers

        try:
            with sources.seeded(0), quiet():
                return getattr(transformers, kind).from_pretrained(
                    folder, local_files_only=True, trust_remote_code=self.trust_remote_code, **options
                )
        # A damaged file, or one that wants to run code of its own, fails in many ways.
        except Exception as error:
            raise self._unavailable(f"{kind}: {sources.why(error)}") from error

    def _config(self, folder: Path) -> Any:  # noqa: ANN401
        return self._read(folder, "AutoConfig")

    def _build(self, folder: Path, config: Any) -> Any:  # noqa: ANN401
        """The network with its weights, which must be complete."""
        found = self._read(folder, "AutoModel", config=config, use_safetensors=True, output_loading_info=True)
        model, report = found
        # transformers makes up what is missing. A pooler is missing from many, and then no other output needs it.
        unused = "pooler." if self.output != "pooled" else "\n"
        missing = sorted(name for name in report["missing_keys"] if unused not in name)
        if missing:
            pooler = all("pooler." in name for name in missing)
            out = f"; set {self.key}.output=cls or mean, which does without" if pooler else ""
            raise self._unavailable(f"{len(missing)} tensors are missing from its weights, the first {missing[0]}{out}")
        return model

    def _class_reads_texts(self, config: Any) -> bool:  # noqa: ANN401
        """True for a class of transformers itself that puts images and texts into one space."""
        from transformers import MODEL_MAPPING

        found: Any = MODEL_MAPPING.get(type(config), None) if not self.trust_remote_code else None
        return all(hasattr(found, name) for name in ("get_image_features", "get_text_features"))

    def _code(self, folder: Path, config: Any) -> str:  # noqa: ANN401
        """A hash of what no tensor shows: settings of the architecture, and the code that comes with the model."""
        settings = {name: value for name, value in config.to_dict().items() if name not in VOLATILE}
        scripts = sorted(folder.rglob("*.py")) if self.trust_remote_code else []
        return provenance.key_of(
            {
                "config": json.dumps(settings, sort_keys=True, default=str),
                "code": [provenance.hash_file(path) for path in scripts],
            }
        )

    def _text_tower(self, model: Any, folder: Path) -> LoadedEncoder:  # noqa: ANN401
        """The text half of a model that is already there."""
        import transformers

        from dejavu_exp.encoders.own_modules import TransformersTexts, check_outputs

        tokenizer = self._read(folder, "AutoTokenizer")
        config = model.config.get_text_config()
        length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", LONGEST_TEXT))
        tokens = PaddedTokens(tokenizer, length)
        network = TransformersTexts(model, self.key).float().eval()
        texts = ["a red circle", "two dogs that run along a beach"]
        what = f"{self.key}.weights={self.weights}, texts"
        check_outputs(network, tokens(texts), [tokens([text]) for text in texts], what)
        return finish(
            network,
            tokens,
            description=f"transformers {model.config.model_type} {self._name()}, text tower",
            weights=self._label(folder),
            transform_text=(
                f"{describe_tokenizer(tokenizer)}, padded to and cut at {length} tokens, transformers "
                f"{transformers.__version__}"
            ),
            random=False,
            reads="texts",
            code=self._code(folder, model.config),
        )

    def _unavailable(self, reason: str) -> WeightsError:
        return WeightsError(
            f"{self.key}.weights={self.weights}: cannot be had ({reason}): (1) connect to the network once, so that it "
            f"lands in the cache, (2) give a local copy with {self.key}.weights=FOLDER, as save_pretrained of "
            "transformers writes it, with config.json, preprocessor_config.json and model.safetensors, or (3) choose "
            "another model, e.g. model=clip_vitb32."
        )


@dataclass(frozen=True)
class PaddedTokens:
    """The transform of a text tower: T texts to the tokenizer's tensors, all of one length.

    SigLIP was trained with texts padded to its longest, and others do not mind.
    """

    tokenizer: Any
    length: int

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """See above."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": self.length}
        return dict(self.tokenizer(texts, return_tensors="pt", **options))


def _lacks(folder: Path) -> str:
    """What is wrong with a folder that must hold a model; an empty text if nothing."""
    if not (folder / "config.json").is_file():
        return "has no config.json"
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return "has no preprocessor_config.json"
    if any(folder.glob("*.safetensors")):
        return ""
    if any(folder.glob("pytorch_model*.bin")):
        return (
            "holds its weights as pytorch_model.bin alone, which is a pickle and is not read; load it once where you "
            "trust it and write it again with save_pretrained"
        )
    return "has no file of type .safetensors"
