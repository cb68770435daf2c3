"""Encoders from timm."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import IMAGES, LoadedEncoder, finish, plain
from dejavu_exp.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from timm.models import PretrainedCfg
    from torch import nn

OUTPUTS = ("features", "logits", "probabilities")


@dataclass(frozen=True)
class TimmEncoder:
    """Any timm model with the transform of its own configuration.

    Attributes:
        arch: the timm name, with or without the tag of its weights, e.g. "resnet50.tv_in1k".
        weights: "hub", "random" or the path of a state dict of the whole model, which must fit strictly; a file without
            the classifier will do where features are asked for.
        output: "features" (pooled, before the classifier), "logits" or "probabilities" (softmax of the logits).
        arch_args: further arguments of timm.create_model.
        seed: of random weights.
        key: where the configuration has this encoder, for errors.
    """

    reads: ClassVar[frozenset[str]] = IMAGES
    arch: str
    weights: str = sources.HUB
    output: str = "features"
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    key: str = field(default="model", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch_args", plain(self.arch_args))
        if self.output not in OUTPUTS:
            raise ConfigError(f"{self.key}.output={self.output}: must be one of {', '.join(OUTPUTS)}.")
        taken = {"pretrained", "pretrained_cfg", "checkpoint_path", "features_only"} & set(self.arch_args)
        if taken:
            raise ConfigError(
                f"{self.key}.arch_args.{min(taken)}: weights and output decide this; take the argument out."
            )

    def check(self) -> None:
        """See `Encoder.check`."""
        import timm

        if not timm.is_model(self.arch):
            near = difflib.get_close_matches(self.arch, timm.list_models(), n=3)
            raise ConfigError(
                f"{self.key}.arch={self.arch}: timm has no such model"
                f"{' (did you mean ' + ', '.join(near) + '?)' if near else ''}. timm.list_models() lists all."
            )
        sources.check_source(self.weights, f"{self.key}.weights")
        self._check_classes(self._published())

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        import timm
        from torch import nn

        from dejavu_exp.encoders.modules import PooledFeatures

        self.check()
        model = self._from_hub() if self.weights == sources.HUB else self.build()
        head = [name for name in _classifiers(model) if name in dict(model.named_modules())]
        if self.weights not in (sources.HUB, sources.RANDOM):
            self._fill(model, head)
        data: Any = timm.data
        config = data.resolve_model_data_config(model)
        transform = data.create_transform(**config, is_training=False)
        classes = None
        if self.output == "features":
            for name in head:
                model.set_submodule(name, nn.Identity())
            model = PooledFeatures(model)
        else:
            classes = _class_names(model.num_classes)  # type: ignore[arg-type]
            model = model if self.output == "logits" else nn.Sequential(model, nn.Softmax(dim=-1))
        arguments = f", arch_args {self.arch_args}" if self.arch_args else ""
        return finish(
            model,
            transform,
            description=f"timm {self.arch}, {self.output}{arguments}",
            weights=sources.label(self.weights, self._hub_name(), self.seed),
            transform_text=f"{transform}\n{config}",
            random=self.weights == sources.RANDOM,
            classes=classes,
        )

    def _published(self) -> PretrainedCfg:
        """Timm's record of the published weights, with the overlay of `arch_args`."""
        import timm

        try:
            return timm.models.resolve_pretrained_cfg(
                self.arch, pretrained_cfg_overlay=self.arch_args.get("pretrained_cfg_overlay")
            )
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"{self.key}.arch={self.arch}: {error} timm.list_pretrained() lists all names with their tags."
            ) from error

    def _check_classes(self, published: PretrainedCfg) -> None:
        """Check that the published weights and the classifier asked for exist."""
        if self.weights == sources.HUB and not (published.hf_hub_id or published.url or published.file):
            raise ConfigError(
                f"{self.key}.weights=hub: timm has no published weights for arch={self.arch}. "
                f"Give a local file with {self.key}.weights=PATH, or choose a name from timm.list_pretrained()."
            )
        if self.output == "features":
            return
        classes = self.arch_args.get("num_classes", published.num_classes)
        if not classes:
            raise ConfigError(
                f"{self.key}.output={self.output}: arch={self.arch} has no classifier. Choose another, "
                f"or set output=features."
            )
        if self.weights == sources.HUB and classes != published.num_classes:
            # timm would put a random classifier on top of the published weights without a word.
            raise ConfigError(
                f"{self.key}.arch_args.num_classes={classes}: the published weights of {self.arch} name "
                f"{published.num_classes} classes. Leave it out, or give your own weights with "
                f"{self.key}.weights=PATH."
            )

    def _hub_name(self) -> str:
        published = self._published()
        return str(published.hf_hub_id or published.url or published.file)

    def build(self, *, pretrained: bool = False) -> nn.Module:
        """The whole model with its classifier; random weights from `seed` unless `pretrained`."""
        import timm

        try:
            with sources.seeded(self.seed):
                model: nn.Module = timm.create_model(self.arch, pretrained=pretrained, **self.arch_args)
        except (TypeError, AssertionError) as error:
            raise ConfigError(
                f"{self.key}.arch_args={dict(self.arch_args)}: timm cannot build {self.arch} with them "
                f"({sources.why(error)})."
            ) from error
        return model

    def start(self) -> nn.Module:
        """The whole model that training starts from: with its weights, but for the classifier, if of other classes.

        Raises:
            WeightsError: the weights cannot be had, or do not fit the architecture.
        """
        if self.weights == sources.HUB:
            return self._from_hub()
        model = self.build()
        if self.weights != sources.RANDOM:
            path = sources.local_path(self.weights)
            state = sources.as_state_dict(sources.read_checkpoint(path), path)
            heads = tuple(f"{name}." for name in _classifiers(model))
            body = {name: value for name, value in state.items() if not name.startswith(heads)}
            own_head = [name for name in model.state_dict() if name.startswith(heads)]
            sources.load_strictly(model, body, self.arch, path, own_head)
        return model

    def _from_hub(self) -> nn.Module:
        published = self._published()
        name = self._hub_name()
        if published.hf_hub_id and not published.file:
            files = (
                (published.hf_hub_filename,)
                if published.hf_hub_filename
                else ("model.safetensors", "pytorch_model.bin")
            )
            sources.require_hub_repository(name, published.hf_hub_id, files, f"{self.key}.weights")
        try:
            return self.build(pretrained=True)
        except (OSError, RuntimeError) as error:
            raise sources.hub_error(name, sources.why(error), f"{self.key}.weights") from error

    def _fill(self, model: nn.Module, head: Sequence[str]) -> None:
        path = sources.local_path(self.weights)
        state = sources.as_state_dict(sources.read_checkpoint(path), path)
        own_head = [key for key in model.state_dict() if any(key.startswith(f"{name}.") for name in head)]
        sources.load_strictly(model, state, self.arch, path, own_head if self.output == "features" else ())


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Module names of the classifier; some models have two."""
    names = model.pretrained_cfg.get("classifier") or ()  # type: ignore[operator, union-attr]
    return (names,) if isinstance(names, str) else tuple(names)


def _class_names(count: int) -> tuple[str, ...]:
    """ImageNet's names where there are 1000 classes: the first synonym, or more where that is not unique."""
    if count != 1000:
        return tuple(f"class_{index}" for index in range(count))
    import timm

    data: Any = timm.data
    info = data.ImageNetInfo()
    synonyms = [text.split(",")[0].strip() for text in info.label_descriptions()]
    uses = Counter(name.lower() for name in synonyms)
    names = tuple(
        name if uses[name.lower()] == 1 else f"{name} ({synset})"
        for name, synset in zip(synonyms, info.label_names(), strict=True)
    )
    if len(set(names)) != count:
        raise WeightsError(
            f"timm names {len(set(names))} ImageNet classes instead of {count}; install another version."
        )
    return names
