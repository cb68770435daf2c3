"""Training of image and text towers together on pairs of an image and a caption: CLIP (arXiv 2103.00020).

Networks, tokenizers and the loss are open_clip's. What is added here: the caption that each showing draws, the masking
of its tokens (arXiv 2402.02103), and that several processes give the weights of one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from dejavu_exp.encoders import LoadedEncoder, OpenClipEncoder
from dejavu_exp.encoders.base import BOTH, TextTransform, plain
from dejavu_exp.encoders.open_clip_models import build_clip, tokenizer_of
from dejavu_exp.encoders.weights import HUB, RANDOM, as_state_dict, load_strictly, local_path, read_checkpoint
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.training.encoder import TrainedHere, TrainingInputs, training_views
from dejavu_exp.training.fit import Job
from dejavu_exp.training.recipe import Optimizer, Schedule, Task
from dejavu_exp.training.supervised import check_length
from dejavu_exp.training.views import TRAINING_VIEWS, Augment, ShowCaption

log = logging.getLogger(__name__)

HIGHEST_SCALE = 100.0
"""What CLIP clips its learned factor on the cosine similarities at."""


@dataclass(frozen=True)
class ClipNetwork:
    """An open_clip model to train.

    Attributes:
        arch: the open_clip architecture, e.g. "ViT-B-32"; with `arch_config` a name of one's own.
        weights: where training starts: "random", or the path of a state dict of the whole model with the names of
            open_clip's present version, such as training here writes. It must fit strictly.
        seed: of random weights; training takes that of the run.
        arch_config: an architecture of one's own; see `OpenClipEncoder`.
        preprocess: what to change in the transform; see `OpenClipEncoder`.
        key: where this node is, for errors.
    """

    arch: str
    weights: str = RANDOM
    seed: int = 0
    arch_config: Mapping[str, Any] | None = None
    preprocess: Mapping[str, Any] | None = None
    key: str = "model.network"

    def __post_init__(self) -> None:
        for name in ("arch_config", "preprocess"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if self.weights == HUB:
            raise ConfigError(
                f"{self.key}.weights=hub: training starts from random weights or from a file. Save the state dict of "
                f"the published model once and give {self.key}.weights=PATH."
            )

    def check(self) -> None:
        """The architecture exists, its tokenizer is at hand, and the weights file is there.

        Raises:
            ConfigError: there is no such architecture, or values do not go together.
            WeightsError: a file is missing.
        """
        self.encoder(self.weights).check()
        tokenizer_of(self.arch, self.arch_config)

    def start(self) -> nn.Module:
        """See `fit.Network.start`."""
        model = build_clip(self.arch, self.arch_config, self.seed, self.preprocess)
        if self.weights != RANDOM:
            path = local_path(self.weights)
            load_strictly(model, as_state_dict(read_checkpoint(path), path), self.arch, path)
        return model

    def data_config(self, model: nn.Module) -> Mapping[str, Any]:
        """See `fit.Job.data_config`."""
        found: Any = model.visual
        preprocess = found.preprocess_cfg
        size = preprocess["size"]
        return {
            "input_size": (3, *((size, size) if isinstance(size, int) else size)),
            "mean": tuple(preprocess["mean"]),
            "std": tuple(preprocess["std"]),
            "tokenizer": tokenizer_of(self.arch, self.arch_config),
        }

    def encoder(self, weights: str) -> OpenClipEncoder:
        """The same architecture and transform as an encoder with these weights."""
        return OpenClipEncoder(
            self.arch, weights=weights, seed=self.seed, arch_config=self.arch_config, preprocess=self.preprocess
        )


@dataclass(frozen=True)
class ClipRecipe:
    """Each image finds its caption among those of the batch, and each caption its image.

    As in CLIP, all other pairs of a batch count as wrong, also where they are right: another showing of the same image
    (planted repeats), or an equal caption. In large batches of varied pairs that is rare; in small data sets with many
    repeats it bounds the loss from below.

    Attributes:
        epochs: passes over the training views.
        optimizer: how weights are changed.
        batch_size: pairs a step, over all processes, which share their negatives.
        min_area: smallest random crop of an image, share of its area.
        flip: probability that an image is mirrored; 0 where captions tell left from right.
        masking_rate: probability that a token of a caption gives way to padding, drawn anew at every showing; the start
            and the end of the text stay. Text randomization of arXiv 2402.02103, a mitigation.
        captions: which of an image's captions is shown: "first", or a "random" one, drawn anew at every showing.
        key: where this node is, for errors.
    """

    epochs: int
    optimizer: Optimizer
    batch_size: int = 256
    min_area: float = 0.9
    flip: float = 0.0
    masking_rate: float = 0.0
    captions: Literal["first", "random"] = "first"
    key: str = "model.recipe"

    def __post_init__(self) -> None:
        check_length(self.key, self.epochs, self.batch_size)
        if self.batch_size < 2:
            raise ConfigError(f"{self.key}.batch_size={self.batch_size}: must be at least 2, to compare pairs.")
        if not 0 < self.min_area <= 1:
            raise ConfigError(f"{self.key}.min_area={self.min_area}: must lie in (0, 1].")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"{self.key}.flip={self.flip}: must lie in [0, 1].")
        if not 0 <= self.masking_rate < 1:
            raise ConfigError(
                f"{self.key}.masking_rate={self.masking_rate}: must lie in [0, 1); at 1 no caption would say anything."
            )
        if self.captions not in ("first", "random"):
            raise ConfigError(f"{self.key}.captions={self.captions}: must be first or random.")

    @property
    def supervised(self) -> bool:
        """See `Recipe.supervised`."""
        return False

    @property
    def projector_layers(self) -> int:
        """See `Recipe.projector_layers`: the towers end in the space of both."""
        return 0

    def projector(self, width: int) -> nn.Module:
        """Never asked for."""
        raise NotImplementedError("CLIP has no projector")

    @property
    def libraries(self) -> tuple[str, ...]:
        """See `Recipe.libraries`: what open_clip's tokenizer cleans and cuts texts with."""
        return ("ftfy", "regex")

    def augment(self, config: Mapping[str, Any], *, validation: bool = False) -> Augment:
        """See `Recipe.augment`; validation views are only scaled."""
        from torchvision.transforms import v2

        side, filtering = config["input_size"][-2:], v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(side, scale=(self.min_area, 1.0), interpolation=filtering, antialias=True)
        steps = (
            [v2.Resize(side, filtering, antialias=True)] if validation else [crop, v2.RandomHorizontalFlip(self.flip)]
        )
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
        return _Whole(v2.Compose([v2.PILToTensor(), *steps, *finish]))

    def caption(self, config: Mapping[str, Any], *, validation: bool = False) -> ShowCaption:
        """See `Recipe.caption`; for validation the first one, unmasked."""
        if validation:
            return OneCaption(config["tokenizer"], "first", 0.0)
        return OneCaption(config["tokenizer"], self.captions, self.masking_rate)

    def task(self, network: nn.Module, schedule: Schedule) -> Task:
        """See `Recipe.task`.

        Raises:
            ConfigError: the architecture is made for another loss.
        """
        if any(getattr(network, part, None) is not None for part in ("logit_bias", "text_decoder")):
            raise ConfigError(
                f"{self.key}=ClipRecipe: SigLIP and CoCa are trained with other losses. Choose an architecture of CLIP "
                "for the network."
            )
        return Contrast(network, schedule)


@dataclass(frozen=True)
class _Whole:
    """One augmentation for all images; planted repeats show the whole image again."""

    steps: Any

    def __call__(self, region: Image.Image, is_background: bool) -> Tensor:
        result: Tensor = self.steps(region)
        return result


@dataclass(frozen=True)
class OneCaption:
    """One caption of an image as tokens.

    Attributes:
        tokenizer: of the network.
        captions: "first" or "random".
        masking_rate: see `ClipRecipe`.
    """

    tokenizer: TextTransform
    captions: Literal["first", "random"]
    masking_rate: float
    _kept: Tensor = field(init=False, repr=False, compare=False)
    _padding: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kept, padding = _marks(self.tokenizer)
        object.__setattr__(self, "_kept", torch.tensor(kept))
        object.__setattr__(self, "_padding", padding)

    def __call__(self, captions: Sequence[str], rng: np.random.Generator) -> Tensor:
        """The tokens, shape (context length,); longer captions are cut at the end."""
        chosen = captions[int(rng.integers(len(captions)))] if self.captions == "random" else captions[0]
        tokens = self.tokenizer([chosen])
        if not isinstance(tokens, Tensor):
            raise TypeError("open_clip's tokenizers give a tensor")
        tokens = tokens[0]
        if not self.masking_rate:
            return tokens
        masked = torch.from_numpy(rng.random(len(tokens)) < self.masking_rate) & ~torch.isin(tokens, self._kept)
        return tokens.masked_fill(masked, self._padding)


def _marks(tokenizer: Any) -> tuple[list[int], int]:  # noqa: ANN401 - open_clip's kinds have no common type
    """The tokens that begin, end and fill up a text, and the last of these alone."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        # open_clip's own tokenizer fills up with 0, which is also its exclamation mark.
        return [tokenizer.sot_token_id, tokenizer.eot_token_id], 0
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")
    return [getattr(inner, name) for name in names if getattr(inner, name) is not None], int(inner.pad_token_id)


class Contrast(Task):
    """Cross-entropy of each image over the captions of all processes' batches and of each caption over the images."""

    def __init__(self, network: nn.Module, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.network: Any = network.to(memory_format=torch.channels_last).train()

    def loss(self, views: list[Tensor], codes: Tensor) -> Tensor:
        """See `Task.loss`."""
        from open_clip.loss import ClipLoss

        pixels, tokens = views
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        images = self.network.encode_image(pixels, normalize=True).float()
        texts = self.network.encode_text(tokens, normalize=True).float()
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        # Every process takes the loss of all pairs; gradients are summed on the way back, and averaged where processes
        # meet: exactly those of one process.
        criterion = ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=ranks)
        with torch.autocast(images.device.type, enabled=False):
            loss: Tensor = criterion(images, texts, self.network.logit_scale.exp())
        return loss

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """Clip the factor on the similarities."""
        self.network.logit_scale.clamp_(0, math.log(HIGHEST_SCALE))

    def weights(self) -> dict[str, nn.Module]:
        """See `Task.weights`: both towers and the factor."""
        return {"network": self.network}


@dataclass(frozen=True)
class TrainedClip(TrainedHere):
    """A CLIP model trained here on the captioned images of its roles; both towers are the encoder.

    Planted repeats are the whole image again, each time with a caption.

    Attributes:
        network: architecture, transform, and where training starts.
        recipe: how it is trained.
        roles: whose pairs are trained on; "unseen" and "public" never are. Images without a caption are left out.
        epoch: read the weights at the end of this epoch of the recipe; null for the last.
        key: where this node is, for errors.
    """

    reads: ClassVar[frozenset[str]] = BOTH
    network: ClipNetwork
    recipe: ClipRecipe

    def _job(self, images: pl.DataFrame, inputs: TrainingInputs, title: str) -> Job:
        captions = {name: _usable(inputs.captions.get(name)) for name in images["id"]}
        captions = {name: texts for name, texts in captions.items() if texts}
        captioned = images.filter(pl.col("id").is_in(list(captions)))
        if len(captioned) < 2:
            raise DataError(
                f"training on pairs needs two images with captions in roles {', '.join(self.roles)}; found "
                f"{len(captioned)} among {len(images)} images. Choose a data set with captions, or a recipe that needs "
                "none."
            )
        if len(captioned) < len(images):
            log.info("%s: %d of %d images have no caption.", title, len(images) - len(captioned), len(images))
        network = replace(self.network, seed=inputs.seed)
        return Job(
            network,
            self.recipe,
            training_views(captioned, captioned, inputs.repeats, None, captions),
            pl.DataFrame(schema=TRAINING_VIEWS),
            patience=None,
            seed=inputs.seed,
            title=title,
            data_config=network.data_config,
        )

    def _load(self, job: Job, folder: Path, weights: str) -> LoadedEncoder:
        network = replace(self.network, seed=job.seed)
        loaded = network.encoder(str(folder / "network.safetensors")).load()
        return replace(loaded, weights=weights, text=partial(_text_tower, loaded, weights))


def _text_tower(loaded: LoadedEncoder, weights: str) -> LoadedEncoder:
    return replace(loaded.reading("texts"), weights=weights)


def _usable(captions: Sequence[str | None] | None) -> list[str]:
    """The captions that say something."""
    return [text for text in captions or () if text and text.strip()]
