"""Encoders from open_clip: both towers, and the image tower against a vocabulary.

`build_clip`, `tokenizer_of` and `transform_of` are for training: what they give, `OpenClipEncoder` loads again.
"""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import BOTH, IMAGES, LoadedEncoder, TextTransform, Transform, finish, plain
from dejavu_exp.encoders.text_encoders import describe_tokenizer, hash_text
from dejavu_exp.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

LOGIT_SCALE = 100.0
"""What CLIP's learned scale of the cosine similarity comes to, and is clipped at."""
URL_CACHE = Path("~/.cache/clip")
"""Where open_clip keeps weights that it fetches by their address."""
TOKENS = 49408
"""How many tokens open_clip's own tokenizer knows."""
PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""What may differ between weights of one architecture in how they were shown images."""
PARTS = ("embed_dim", "vision_cfg", "text_cfg")
OPTIONS = (
    "quick_gelu",
    "custom_text",
    "multimodal_cfg",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
)
"""What an architecture of one's own must and may say."""


@dataclass(frozen=True)
class OpenClipEncoder:
    """Any open_clip model: the image tower, `encode_image`, and on demand the text tower, `encode_text`.

    Neither is normalised. The transform and the activation are those of the published weights `pretrained`, also where
    the weights themselves are a local copy or random: open_clip alone would forget both.

    Attributes:
        arch: the open_clip architecture, e.g. "ViT-B-32-quickgelu"; with `arch_config` a name of one's own.
        pretrained: the tag of the published weights, e.g. "openai"; None for weights of one's own, which then get
            open_clip's default transform.
        weights: "hub", "random" or the path of a state dict of the whole model, which must fit strictly.
        seed: of random weights.
        arch_config: an architecture of one's own: embed_dim, vision_cfg and text_cfg as in open_clip's model configs,
            with open_clip's own tokenizer.
        preprocess: what to change in the transform: mean, std, interpolation, resize_mode, fill_color.
    """

    reads: ClassVar[frozenset[str]] = BOTH
    arch: str
    pretrained: str | None = None
    weights: str = sources.HUB
    seed: int = 0
    arch_config: Mapping[str, Any] | None = None
    preprocess: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _make_plain(self)

    def check(self) -> None:
        """See `Encoder.check`."""
        self._clip().check()

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        clip = self._clip()
        model = clip.build()
        transform, text = transform_of(model)
        return finish(
            _image_tower(model),
            transform,
            description=f"open_clip {clip.name}, image tower",
            weights=clip.label(),
            transform_text=text,
            random=self.weights == sources.RANDOM,
            text=partial(_load_text_tower, clip, model),
        )

    def _clip(self) -> _Clip:
        return _Clip(
            self.arch, self.pretrained, self.weights, self.seed, "model", self.arch_config, self.preprocess or {}
        )


@dataclass(frozen=True)
class ZeroShotEncoder:
    """An open_clip model as a classifier over a vocabulary: softmax of 100 times the cosine similarity to each text.

    Attributes:
        arch: as for `OpenClipEncoder`.
        pretrained: as for `OpenClipEncoder`.
        weights: as for `OpenClipEncoder`.
        vocabulary: path of a text file with one tag a line (lines that start with # are comments), or the name of a
            shipped one, e.g. "scenes".
        template: the text for a tag; "{}" stands for the tag.
        seed: of random weights.
        arch_config: as for `OpenClipEncoder`.
        preprocess: as for `OpenClipEncoder`.
    """

    reads: ClassVar[frozenset[str]] = IMAGES
    arch: str
    pretrained: str | None = None
    weights: str = sources.HUB
    vocabulary: str = "scenes"
    template: str = "a photo of {}"
    seed: int = 0
    arch_config: Mapping[str, Any] | None = None
    preprocess: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _make_plain(self)
        if self.template.count("{}") != 1:
            raise ConfigError(f"tagger.encoder.template={self.template!r}: must hold {{}} once, where the tag goes.")

    def check(self) -> None:
        """See `Encoder.check`."""
        self._clip().check()
        read_vocabulary(self.vocabulary)

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        from dejavu_exp.encoders.modules import ZeroShot

        clip = self._clip()
        tags = read_vocabulary(self.vocabulary)
        model = clip.build()
        texts = _encode_texts(model, clip.tokenizer(), [self.template.replace("{}", tag) for tag in tags])
        transform, text = transform_of(model)
        return finish(
            ZeroShot(_image_tower(model), texts, LOGIT_SCALE),
            transform,
            description=f"open_clip {clip.name}, zero-shot over {len(tags)} tags, template {self.template!r}",
            weights=clip.label(),
            transform_text=text,
            random=self.weights == sources.RANDOM,
            classes=tags,
        )

    def _clip(self) -> _Clip:
        more = (self.arch_config, self.preprocess or {})
        return _Clip(self.arch, self.pretrained, self.weights, self.seed, "tagger.encoder", *more)


def build_clip(
    arch: str,
    arch_config: Mapping[str, Any] | None = None,
    seed: int = 0,
    preprocess: Mapping[str, Any] | None = None,
) -> nn.Module:
    """An untrained open_clip model: `encode_image`, `encode_text`, `logit_scale`; random weights from `seed`.

    Its state dict, saved as a .safetensors file, is what `OpenClipEncoder(arch, weights=PATH, arch_config=...)` reads.

    Args:
        arch: as for `OpenClipEncoder`.
        arch_config: as for `OpenClipEncoder`.
        seed: of the weights.
        preprocess: as for `OpenClipEncoder`; `transform_of` reads it from the model.

    Raises:
        ConfigError: there is no such architecture, or `arch_config` does not describe one.
        WeightsError: open_clip lacks a package or a file for the text tower.
    """
    config = None if arch_config is None else _plain_mapping(arch_config)
    return _Clip(arch, None, sources.RANDOM, seed, "model", config, _plain_mapping(preprocess or {})).build()


def tokenizer_of(arch: str, arch_config: Mapping[str, Any] | None = None) -> TextTransform:
    """The tokenizer of an architecture: a list of T texts to tokens of shape (T, context length), int64.

    Longer texts are cut at the end. It can be pickled.

    Raises:
        ConfigError: as for `build_clip`.
        WeightsError: its files are neither here nor to be had.
    """
    config = None if arch_config is None else _plain_mapping(arch_config)
    clip = _Clip(arch, None, sources.RANDOM, 0, "model", config, {})
    clip.check()
    return clip.tokenizer()


def transform_of(model: nn.Module) -> tuple[Transform, str]:
    """The inference transform noted on an open_clip model, and its full text."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(**model.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
    transform: Transform = image_transform_v2(config, is_train=False)
    return transform, f"{transform}\n{asdict(config)}"


def read_vocabulary(vocabulary: str) -> tuple[str, ...]:
    """The tags of a vocabulary file, or of a shipped one by its name.

    Raises:
        ConfigError: there is no such file, it holds no tags, or a tag twice.
    """
    path = Path(vocabulary).expanduser()
    if not path.is_file():
        from dejavu_exp.config import CONF_DIR

        folder = CONF_DIR / "tagger" / "vocabulary"
        path = folder / f"{vocabulary}.txt"
        if not path.is_file():
            shipped = ", ".join(sorted(file.stem for file in folder.glob("*.txt")))
            raise ConfigError(
                f"tagger.encoder.vocabulary={vocabulary}: there is no such file, and the shipped ones are {shipped}. "
                f"Give the path of a text file with one tag a line."
            )
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    tags = tuple(line for line in lines if line and not line.startswith("#"))
    repeated = sorted({tag for tag in tags if tags.count(tag) > 1})
    if repeated or not tags:
        problem = f"names {repeated[0]!r} more than once" if repeated else "holds no tags"
        raise ConfigError(f"tagger.encoder.vocabulary: {path} {problem}; write each tag once, one a line.")
    return tags


@dataclass(frozen=True)
class _Clip:
    """A whole open_clip model, text tower included; `key` is the configuration node that it comes from."""

    arch: str
    pretrained: str | None
    weights: str
    seed: int
    key: str
    arch_config: Mapping[str, Any] | None
    preprocess: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The architecture in a description; one of the user's own is known by its content."""
        if self.arch_config is None:
            return self.arch
        return f"{self.arch} (own architecture {hash_text(json.dumps(self.arch_config, sort_keys=True))[:12]})"

    def check(self) -> None:
        unknown = sorted(set(self.preprocess) - set(PREPROCESS))
        if unknown:
            raise ConfigError(f"{self.key}.preprocess.{unknown[0]}: must be one of {', '.join(PREPROCESS)}.")
        sources.check_source(self.weights, f"{self.key}.weights")
        if self.arch_config is None:
            self._check_published()
        else:
            self._check_own(self.arch_config)

    def _check_own(self, config: Mapping[str, Any]) -> None:
        """Check an architecture of one's own as far as that goes without building it."""
        import open_clip

        key = f"{self.key}.arch_config"
        if self.pretrained is not None or self.weights == sources.HUB:
            raise ConfigError(
                f"{key} describes an architecture of your own, which has no published weights. Set {self.key}.weights "
                f"to a file or to {sources.RANDOM}, and {self.key}.pretrained to null."
            )
        _check_names(config, PARTS, (*PARTS, *OPTIONS), key)
        for part, known in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
            _check_names(config[part], (), [field.name for field in fields(known)], f"{key}.{part}")
        text = config["text_cfg"]
        if text.get("hf_tokenizer_name") or text.get("hf_model_name"):
            raise ConfigError(f"{key}.text_cfg: an architecture of your own has open_clip's tokenizer; leave hf_* out.")
        if text.get("vocab_size", TOKENS) < TOKENS:
            raise ConfigError(
                f"{key}.text_cfg.vocab_size={text['vocab_size']}: open_clip's tokenizer has {TOKENS} tokens; set it to "
                f"{TOKENS}, or leave it out."
            )

    def _check_published(self) -> None:
        import open_clip

        if self.arch not in open_clip.list_models():
            near = difflib.get_close_matches(self.arch.replace("/", "-"), open_clip.list_models(), n=3)
            raise ConfigError(
                f"{self.key}.arch={self.arch}: open_clip has no such model"
                f"{' (did you mean ' + ', '.join(near) + '?)' if near else ''}. open_clip.list_models() lists all."
            )
        if self.pretrained is not None:
            self._check_tag(self.pretrained)
        elif self.weights == sources.HUB:
            raise ConfigError(
                f"{self.key}.weights=hub needs {self.key}.pretrained, the tag of the weights; {self.arch} has: "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(self.arch)) or 'none'}."
            )

    def _check_tag(self, tag: str) -> None:
        """Check that the tag belongs to the architecture and was trained with its activation."""
        import open_clip

        if not open_clip.is_pretrained_cfg(self.arch, tag):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(self.arch)) or "none"
            archs = ", ".join(open_clip.list_pretrained_models_by_tag(tag)[:5])
            raise ConfigError(
                f"{self.key}.pretrained={tag}: {self.key}.arch={self.arch} has no such weights; it has: {tags}."
                + (f" {tag} exists for {archs}." if archs else "")
            )
        published = bool(open_clip.get_pretrained_cfg(self.arch, tag).get("quick_gelu", False))
        if published == bool(open_clip.get_model_config(self.arch).get("quick_gelu", False)):
            return
        right = f"{self.arch}-quickgelu" if published else self.arch.removesuffix("-quickgelu")
        if right == self.arch or not open_clip.is_pretrained_cfg(right, tag):
            return  # No architecture has the tag's activation: the tag's record is what lacks it (roberta-ViT-B-32).
        raise ConfigError(
            f"{self.key}.arch={self.arch}: {tag} was trained with{'' if published else 'out'} QuickGELU, and with the "
            f"other activation every embedding is off. Set {self.key}.arch={right}."
        )

    def _published(self) -> dict[str, Any]:
        import open_clip

        cfg: dict[str, Any] = open_clip.get_pretrained_cfg(self.arch, self.pretrained) if self.pretrained else {}
        return cfg

    def label(self) -> str:
        return sources.label(self.weights, str(self.pretrained), self.seed)

    def build(self) -> nn.Module:
        """The model in float32 with the published preprocessing noted on it.

        Raises:
            ConfigError: see `check`.
            WeightsError: the weights, or a part that open_clip fetches from the hub, cannot be had or do not fit.
        """
        self.check()
        if self.weights == sources.HUB:
            return self._from_hub()
        model = self._untrained()
        if self.weights != sources.RANDOM:
            path = sources.local_path(self.weights)
            state = sources.as_state_dict(sources.read_checkpoint(path), path)
            sources.load_strictly(model, _for_open_clip(model, state), self.arch, path)
        return model

    def _from_hub(self) -> nn.Module:
        import open_clip

        published = self._published()
        name, key = f"{self.arch} {self.pretrained}", f"{self.key}.weights"
        if "file" not in published:
            if published.get("hf_hub"):
                repository, _, file = published["hf_hub"].rpartition("/")
                files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
                if file.endswith((".bin", ".pth")):
                    files.append(f"{file.rpartition('.')[0]}.safetensors")
                name = f"{name} ({repository})"
                sources.require_hub_repository(name, repository, files, key)
            else:
                name = f"{name} ({published['url']})"
                if not (URL_CACHE.expanduser() / published["url"].rpartition("/")[2]).is_file():
                    sources.require_answer(name, published["url"], key)
        try:
            with sources.seeded(self.seed):
                model: nn.Module = open_clip.create_model(
                    self.arch, pretrained=self.pretrained, force_preprocess_cfg=dict(self.preprocess)
                )
        except (ImportError, OSError, RuntimeError) as error:
            raise sources.hub_error(name, sources.why(error), key) from error
        return model

    def _untrained(self) -> nn.Module:
        import open_clip

        published = self._published()
        preprocess = {name: published[name] for name in PREPROCESS if name in published} | dict(self.preprocess)
        try:
            with sources.seeded(self.seed), _hushed_open_clip(), self._as_open_clip_names_it() as name:
                model: nn.Module = open_clip.create_model(name, pretrained_text=False, force_preprocess_cfg=preprocess)
        except (ImportError, OSError, RuntimeError) as error:
            raise WeightsError(
                f"{self.key}.arch={self.arch}: open_clip cannot build it ({sources.why(error)}). Its text tower needs "
                f"files or packages that are not here; install them, or choose an arch with open_clip's own text tower."
            ) from error
        # What open_clip and torch say, in many kinds of error, to numbers that do not go together.
        except (AssertionError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            if self.arch_config is None:
                raise
            raise ConfigError(
                f"{self.key}.arch_config: open_clip cannot build it ({sources.why(error)}). Check that the widths are "
                "multiples of head_width and heads, and image_size of patch_size."
            ) from error
        return model

    @contextmanager
    def _as_open_clip_names_it(self) -> Iterator[str]:
        """The name under which open_clip finds the architecture; one's own lies in a folder meanwhile."""
        if self.arch_config is None:
            yield self.arch
            return
        with tempfile.TemporaryDirectory() as folder:
            content = json.dumps({"model_cfg": self.arch_config, "preprocess_cfg": {}})
            Path(folder, "open_clip_config.json").write_text(content, encoding="utf-8")
            yield f"local-dir:{folder}"

    def tokenizer(self) -> TextTransform:
        """See `tokenizer_of`."""
        import open_clip

        try:
            with _hushed_open_clip(), self._as_open_clip_names_it() as name:
                tokenizer: TextTransform = open_clip.get_tokenizer(name)
        # transformers answers a file that cannot be had with several kinds of error.
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise WeightsError(
                f"{self.key}.arch={self.arch}: its tokenizer cannot be had ({sources.why(error)}). Connect to the "
                f"network once, or choose an arch with open_clip's own tokenizer, e.g. ViT-B-32-quickgelu."
            ) from error
        return tokenizer


@contextmanager
def _hushed_open_clip() -> Iterator[None]:
    """Silence open_clip's account of what it does, and its warnings that no weights were loaded before we load them."""
    warnings = ("No pretrained weights loaded for model", "Local config loaded, but no CLIP weights found")

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not record.getMessage().startswith(warnings)

    root = logging.getLogger()
    # open_clip logs through the root logger; without a handler its first message would set one up for everybody.
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _for_open_clip(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the names of open_clip's present version; no tensor is resized or made up."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    # OpenAI's files also hold three numbers that describe the model, older ones the positions 0, 1, 2, ...
    extra = {"input_resolution", "context_length", "vocab_size", "text.transformer.embeddings.position_ids"}
    own = model.state_dict()
    state = convert_state_dict(model, {k: v for k, v in state.items() if k in own or k not in extra})
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == 1:
            state[name] = state[name].reshape(own[name].shape)
    return state


def _image_tower(model: nn.Module) -> nn.Module:
    """The image half alone where that is all `encode_image` uses."""
    import open_clip

    from dejavu_exp.encoders.modules import ImageTower

    if isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP):
        tower: nn.Module = model.visual
        return tower
    return ImageTower(model)


def _load_text_tower(clip: _Clip, model: nn.Module) -> LoadedEncoder:
    """The text half of a model that is already there."""
    from dejavu_exp.encoders.modules import TextTower

    tokenizer = clip.tokenizer()
    return finish(
        TextTower(model),
        tokenizer,
        description=f"open_clip {clip.name}, text tower",
        weights=clip.label(),
        transform_text=_describe(tokenizer),
        random=clip.weights == sources.RANDOM,
        reads="texts",
    )


def _describe(tokenizer: Any) -> str:  # noqa: ANN401
    """Everything that decides what one of open_clip's three kinds of tokenizer gives."""
    options = {name: getattr(tokenizer, name, None) for name in ("tokenizer_mode", "strip_sep_token")}
    clean = getattr(getattr(tokenizer, "clean_fn", None), "__name__", None)
    if hasattr(tokenizer, "tokenizer"):
        vocabulary = describe_tokenizer(tokenizer.tokenizer)
    else:
        vocabulary = f"{len(tokenizer.encoder)} tokens {hash_text(repr(sorted(tokenizer.encoder.items())))}"
    return (
        f"{type(tokenizer).__name__}, {vocabulary}, context length {tokenizer.context_length}, cleaning {clean}, "
        f"{options}"
    )


def _encode_texts(model: nn.Module, tokenizer: TextTransform, texts: list[str], batch: int = 64) -> Tensor:
    """Text embeddings, shape (len(texts), dim), not normalised."""
    import torch

    from dejavu_exp.encoders.modules import TextTower

    tower = TextTower(model).eval()
    with torch.no_grad():
        parts = [tower(tokenizer(texts[start : start + batch])) for start in range(0, len(texts), batch)]
    return torch.cat(parts)


def _check_names(config: object, required: Iterable[str], known: Iterable[str], key: str) -> None:
    """Check the keys of a part of a configuration."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"{key}={config}: must be a mapping, as in open_clip's model configs.")
    missing = [name for name in required if name not in config]
    unknown = sorted(set(config) - set(known))
    if missing or unknown:
        problem = f"{key}.{missing[0]} is missing" if missing else f"{key}.{unknown[0]}: open_clip knows no such key"
        raise ConfigError(f"{problem}. The keys are {', '.join(known)}.")


def _make_plain(encoder: OpenClipEncoder | ZeroShotEncoder) -> None:
    for name in ("arch_config", "preprocess"):
        value = getattr(encoder, name)
        object.__setattr__(encoder, name, None if value is None else _plain_mapping(value))


def _plain_mapping(value: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = plain(value)  # type: ignore[assignment]
    return content
