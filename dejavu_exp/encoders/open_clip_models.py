"""Encoders from open_clip: the image tower, and the image tower against a vocabulary."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import LoadedEncoder, Transform, finish
from dejavu_exp.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

LOGIT_SCALE = 100.0
"""What CLIP's learned scale of the cosine similarity comes to, and is clipped at."""
URL_CACHE = Path("~/.cache/clip")
"""Where open_clip keeps weights that it fetches by their address."""


@dataclass(frozen=True)
class OpenClipEncoder:
    """The image tower of any open_clip model: `encode_image`, not normalised.

    The transform and the activation are those of the published weights `pretrained`, also where the weights
    themselves are a local copy or random: open_clip alone would forget both.

    Attributes:
        arch: the open_clip architecture, e.g. "ViT-B-32-quickgelu".
        pretrained: the tag of the published weights, e.g. "openai"; None for weights of one's own, which then get
            open_clip's default transform.
        weights: "hub", "random" or the path of a state dict of the whole model, which must fit strictly.
        seed: of random weights.
    """

    arch: str
    pretrained: str | None = None
    weights: str = sources.HUB
    seed: int = 0

    def check(self) -> None:
        """See `Encoder.check`."""
        _Clip(self.arch, self.pretrained, self.weights, self.seed, "model").check()

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        clip = _Clip(self.arch, self.pretrained, self.weights, self.seed, "model")
        model = clip.build()
        transform, text = _transform(model)
        return finish(
            _image_tower(model),
            transform,
            description=f"open_clip {self.arch}, image tower",
            weights=clip.label(),
            transform_text=text,
            random=self.weights == sources.RANDOM,
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
    """

    arch: str
    pretrained: str | None = None
    weights: str = sources.HUB
    vocabulary: str = "scenes"
    template: str = "a photo of {}"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ConfigError(f"tagger.encoder.template={self.template!r}: must hold {{}} once, where the tag goes.")

    def check(self) -> None:
        """See `Encoder.check`."""
        _Clip(self.arch, self.pretrained, self.weights, self.seed, "tagger.encoder").check()
        read_vocabulary(self.vocabulary)

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        from dejavu_exp.encoders.modules import ZeroShot

        clip = _Clip(self.arch, self.pretrained, self.weights, self.seed, "tagger.encoder")
        tags = read_vocabulary(self.vocabulary)
        model = clip.build()
        texts = _encode_texts(model, self.arch, [self.template.replace("{}", tag) for tag in tags])
        transform, text = _transform(model)
        return finish(
            ZeroShot(_image_tower(model), texts, LOGIT_SCALE),
            transform,
            description=f"open_clip {self.arch}, zero-shot over {len(tags)} tags, template {self.template!r}",
            weights=clip.label(),
            transform_text=text,
            random=self.weights == sources.RANDOM,
            classes=tags,
        )


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

    def check(self) -> None:
        import open_clip

        if self.arch not in open_clip.list_models():
            near = difflib.get_close_matches(self.arch.replace("/", "-"), open_clip.list_models(), n=3)
            raise ConfigError(
                f"{self.key}.arch={self.arch}: open_clip has no such model"
                f"{' (did you mean ' + ', '.join(near) + '?)' if near else ''}. open_clip.list_models() lists all."
            )
        sources.check_source(self.weights, f"{self.key}.weights")
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
                model: nn.Module = open_clip.create_model(self.arch, pretrained=self.pretrained)
        except (ImportError, OSError, RuntimeError) as error:
            raise sources.hub_error(name, sources.why(error), key) from error
        return model

    def _untrained(self) -> nn.Module:
        import open_clip

        published = self._published()
        preprocess = {k: published[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in published}
        try:
            with sources.seeded(self.seed), _without_open_clip_warning():
                model: nn.Module = open_clip.create_model(
                    self.arch, pretrained_text=False, force_preprocess_cfg=preprocess
                )
        except (ImportError, OSError, RuntimeError) as error:
            raise WeightsError(
                f"{self.key}.arch={self.arch}: open_clip cannot build it ({sources.why(error)}). Its text tower needs "
                f"files or packages that are not here; install them, or choose an arch with open_clip's own text tower."
            ) from error
        return model


@contextmanager
def _without_open_clip_warning() -> Iterator[None]:
    """Silence open_clip's warning that no weights were loaded, which it gives before we load them."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded for model")

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


def _transform(model: nn.Module) -> tuple[Transform, str]:
    """The inference transform noted on the model, and its full text."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(**model.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
    transform: Transform = image_transform_v2(config, is_train=False)
    return transform, f"{transform}\n{asdict(config)}"


def _encode_texts(model: nn.Module, arch: str, texts: list[str], batch: int = 64) -> Tensor:
    """Text embeddings, shape (len(texts), dim), not normalised."""
    import open_clip
    import torch

    try:
        tokenizer = open_clip.get_tokenizer(arch)
    except (ImportError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"tagger.encoder.arch={arch}: its tokenizer cannot be had ({sources.why(error)}). "
            f"Connect to the network once, or choose an arch with open_clip's own tokenizer, e.g. ViT-B-32-quickgelu."
        ) from error
    model.eval()
    with torch.no_grad():
        parts = [
            model.encode_text(tokenizer(texts[start : start + batch]))  # type: ignore[operator]
            for start in range(0, len(texts), batch)
        ]
    return torch.cat(parts)
