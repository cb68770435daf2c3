"""Encoders and classifiers trained here, on the roles of the data set that is then measured."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import polars as pl

from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.encoders import Encoder, LoadedEncoder, TimmEncoder
from dejavu_exp.encoders.base import IMAGES, finish
from dejavu_exp.encoders.weights import as_state_dict, load_strictly, read_checkpoint
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.tables import Role, Status
from dejavu_exp.training.fit import COST, Job, Network, TrainingSettings, trained
from dejavu_exp.training.recipe import Recipe
from dejavu_exp.training.views import TRAINING_VIEWS

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TrainingInputs:
    """What training may look at.

    Attributes:
        model: the encoder under test, as configured; a reference may need its recipe.
        images: full-image views of all roles, columns of `tables.VIEWS`.
        backgrounds: query views of roles target, unseen and heldout; excluded ones have a status other than ok.
        labels: all labels of the bank, sorted.
        repeats: planted repeats by image id; images not named are shown once.
        store: gives the images.
        cache: folder of trained weights.
        device: "cpu" or "cuda".
        seed: of initialisation, order and augmentation.
        settings: processes, precision, checkpoints.
        folders: gets the folder of each network trained or taken, by name.
        waits: gets the seconds that this run spent on each of them.
        captions: by image id; images not named have none.
    """

    model: Encoder | TrainedHere
    images: pl.DataFrame
    backgrounds: pl.DataFrame
    labels: tuple[str, ...]
    repeats: dict[str, int]
    store: ImageStore
    cache: Path
    device: str
    seed: int
    settings: TrainingSettings
    folders: dict[str, Path]
    waits: dict[str, float]
    captions: dict[str, list[str]] = field(default_factory=dict)

    def run(self, job: Job, epoch: int | None = None) -> Path:
        """The folder of a job's weights, trained where they are missing; see `fit.trained`."""
        start = time.perf_counter()
        found = trained(job, self.settings, self.store, self.device, self.cache, epoch)
        self.folders[job.title] = found.parent
        self.waits[job.title] = self.waits.get(job.title, 0) + time.perf_counter() - start
        return found

    def whole_cost(self, seconds: float, known: Collection[str]) -> float:
        """Seconds of a stage as if it had trained its networks whole, and not taken them, or a part, from the cache.

        Args:
            seconds: that the stage took.
            known: the names in `folders` before it.
        """
        new = self.folders.keys() - set(known)
        recorded = sum(self._recorded_cost(title) for title in new)
        return seconds - sum(self.waits[title] for title in new) + recorded

    def _recorded_cost(self, title: str) -> float:
        path = self.folders[title] / COST
        return float(json.loads(path.read_text())["seconds"]) if path.exists() else self.waits[title]

    def lessons(self, views: pl.DataFrame) -> pl.DataFrame:
        """The views that a reference may be trained on: none whose image is measured.

        A caption that a measured image has too is no copy: captions such as "a dog" repeat, and what memorization
        joins to them is the image.

        Args:
            views: columns of `tables.VIEWS`.

        Raises:
            DataError: some are, by id or byte for byte, and `settings.copies` is not "drop".
        """
        is_measured = pl.col("role").is_in([Role.TARGET, Role.UNSEEN]), pl.col("status") != Status.LEAKED
        measured = self.backgrounds.filter(*is_measured)
        content = measured["content"].drop_nulls().implode()
        copies = pl.col("id").is_in(measured["id"].implode()) | pl.col("content").is_in(content)
        found = views.filter(copies)
        if len(found) and self.settings.copies == "refuse":
            first = found.row(0, named=True)
            twin = measured.filter((pl.col("id") == first["id"]) | (pl.col("content") == first["content"]))
            raise DataError(
                f"a reference would be trained on {len(found)} images that are measured, e.g. {first['id']} "
                f"({first['role']}), which is {twin['id'][0]} ({twin['role'][0]}). It would then remember them too, "
                "and memorization would be missed. Take the copies out of the data set, or set training.copies=drop to "
                "leave them out of training."
            )
        return views.filter(~copies)

    def heldout(self) -> pl.DataFrame:
        """Usable heldout crops of classes that the bank knows, sorted by id; raises as `lessons`."""
        usable = (pl.col("role") == Role.HELDOUT) & (pl.col("status") == Status.OK)
        return self.lessons(self.backgrounds.filter(usable, pl.col("label").is_in(self.labels))).sort("id")

    def for_reference(self) -> TrainingInputs:
        """The inputs for training a reference: without the measured roles, without copies of their images."""
        others = self.images.filter(pl.col("role").is_in([Role.HELDOUT, Role.SHARED]))
        return replace(self, images=self.lessons(others))


class TrainableNetwork(Network, Protocol):
    """A network of an encoder trained here."""

    def check(self) -> None:
        """Find what cannot work; see `Encoder.check`."""
        ...


@dataclass(frozen=True)
class TrainedHere:
    """An encoder that is trained on roles of the data set; subclasses say on what of them, and how it is loaded.

    Attributes:
        network: architecture, transform, and where training starts.
        recipe: how it is trained.
        roles: whose images are trained on; "unseen" and "public" never are.
        epoch: read the weights at the end of this epoch of the recipe; null for the last.
        key: where this node is, for errors.
    """

    reads: ClassVar[frozenset[str]]
    network: TrainableNetwork
    recipe: Recipe
    roles: tuple[str, ...] = (Role.TARGET, Role.SHARED)
    epoch: int | None = None
    key: str = "model"

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))
        allowed = (Role.TARGET, Role.SHARED, Role.HELDOUT)
        if not self.roles or not set(self.roles) <= set(allowed):
            raise ConfigError(f"{self.key}.roles={list(self.roles)}: choose among {', '.join(allowed)}.")
        if self.epoch is not None and not 1 <= self.epoch <= self.recipe.epochs:
            raise ConfigError(
                f"{self.key}.epoch={self.epoch}: the recipe has epochs 1 to {self.recipe.epochs} "
                f"({self.key}.recipe.epochs)."
            )

    def check(self) -> None:
        """The architecture exists."""
        self.network.check()

    def train(self, inputs: TrainingInputs, title: str = "training the encoder") -> LoadedEncoder:
        """Train, or take the weights that the same inputs gave before, and load the result.

        Args:
            inputs: what training may look at.
            title: for the progress bar.

        Raises:
            DataError: no image has a role to train on, or none what the recipe needs.
        """
        images = inputs.images.filter(pl.col("role").is_in(self.roles), pl.col("status") == Status.OK).sort("id")
        job = self._job(images, inputs, title)
        folder = inputs.run(job, self.epoch)
        count = job.views["id"].n_unique()
        what = f"{count} images of {' and '.join(self.roles)}, epoch {self.epoch or self.recipe.epochs}"
        return self._load(job, folder, f"trained here on {what} ({type(self.recipe).__name__}, {folder.parent.name})")

    def _job(self, images: pl.DataFrame, inputs: TrainingInputs, title: str) -> Job:
        """What is trained on these images, which are readable and sorted by id."""
        raise NotImplementedError

    def _load(self, job: Job, folder: Path, weights: str) -> LoadedEncoder:
        """The encoder out of a folder of trained weights, which it calls `weights`."""
        raise NotImplementedError


@dataclass(frozen=True)
class TrainedEncoder(TrainedHere):
    """A timm network trained here; its features are the encoder.

    Attributes:
        network: architecture, transform, and where training starts; a classifier has one output per class.
        recipe: how it is trained.
        roles: whose images are trained on; "unseen" and "public" never are.
        epoch: read the weights at the end of this epoch of the recipe; null for the last.
        key: where this node is, for errors.
        layer: linear layers of the projector that the features pass, 0 for none, -1 for all; self-supervision only.
    """

    reads: ClassVar[frozenset[str]] = IMAGES
    network: TimmEncoder
    layer: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.layer <= self.recipe.projector_layers:
            raise ConfigError(
                f"{self.key}.layer={self.layer}: the recipe's projector has {self.recipe.projector_layers} linear "
                "layers; 0 reads the encoder itself, -1 passes all of them."
            )
        if not self.recipe.supervised and self.network.output != "features":
            raise ConfigError(
                f"{self.key}.network.output={self.network.output}: without labels there is no classifier; set features."
            )

    def _job(self, images: pl.DataFrame, inputs: TrainingInputs, title: str) -> Job:
        labels = sorted(images["label"].unique())
        if len(labels) < 2:
            raise DataError(
                f"training needs images of two classes in roles {', '.join(self.roles)}; found {len(labels)}."
            )
        # Without labels it is crops of one image that are drawn together: its background must come with the rest.
        repeated = inputs.backgrounds if self.recipe.supervised else images
        return Job(
            self._trained_network(len(labels), inputs.seed),
            self.recipe,
            training_views(images, repeated, inputs.repeats, labels),
            pl.DataFrame(schema=TRAINING_VIEWS),
            patience=None,
            seed=inputs.seed,
            title=title,
        )

    def _trained_network(self, classes: int, seed: int) -> TimmEncoder:
        outputs = classes if self.recipe.supervised else 0
        return replace(self.network, arch_args={**self.network.arch_args, "num_classes": outputs}, seed=seed)

    def _load(self, job: Job, folder: Path, weights: str) -> LoadedEncoder:
        network = self._trained_network(job.views["code"].n_unique(), job.seed)
        loaded = replace(network, weights=str(folder / "network.safetensors")).load()
        return replace(self._through_projector(loaded, folder), weights=weights)

    def _through_projector(self, loaded: LoadedEncoder, folder: Path) -> LoadedEncoder:
        """The encoder followed by the layers of the projector that were asked for."""
        if not self.layer:
            return loaded
        from torch import nn

        path = folder / "projector.safetensors"
        state = as_state_dict(read_checkpoint(path), path)
        projector = self.recipe.projector(state["layers.0.weight"].shape[1])
        load_strictly(projector, state, "the projector", path)
        return finish(
            nn.Sequential(loaded.module, first_layers(projector, self.layer)),
            loaded.transform,
            description=f"{loaded.description}, projector layer {self.layer}",
            weights=loaded.weights,
            transform_text=loaded.transform_text,
            random=loaded.random,
        )


def first_layers(projector: nn.Module, count: int) -> nn.Module:
    """The first linear layers of a projector, each with the normalisation and activation after it; -1 for all."""
    from torch import nn

    layers = list(projector.get_submodule("layers").children())
    starts = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    return nn.Sequential(*layers[: len(layers) if count in (-1, len(starts)) else starts[count]])


def training_views(
    images: pl.DataFrame,
    backgrounds: pl.DataFrame,
    repeats: Mapping[str, int],
    labels: Sequence[str] | None,
    captions: Mapping[str, Sequence[str]] | None = None,
) -> pl.DataFrame:
    """Every image once, and each repeated one as often as it is repeated: its background, or the whole image again.

    Args:
        images: views to train on, columns of `tables.VIEWS`, status ok.
        backgrounds: views to repeat, which may be of other images too: background crops, or whole images.
        repeats: by image id.
        labels: in the order of the class numbers; null where nothing is learned of classes: all have number 0.
        captions: of every image, by id; null where none are read.

    Returns:
        Columns of `views.TRAINING_VIEWS`.
    """
    planted = pl.DataFrame(list(repeats.items()), schema={"id": pl.String, "repeats": pl.Int64}, orient="row").filter(
        pl.col("repeats") > 1
    )
    repeated = (
        backgrounds.filter(pl.col("id").is_in(images["id"].implode()), pl.col("status") == Status.OK)
        .join(planted, on="id", how="inner", validate="1:1")
        .sort("id")
        .select(pl.exclude("repeats").repeat_by("repeats").explode())
    )
    code = pl.lit(0)
    if labels is not None:
        code = pl.col("label").replace_strict(labels, list(range(len(labels))), return_dtype=pl.Int64)
    shown = pl.lit(None)
    if captions is not None:
        shown = pl.col("id").replace_strict(list(captions), list(captions.values()), return_dtype=pl.List(pl.String))
    parts = [
        part.with_columns(code=code, background=pl.lit(value), captions=shown).select(
            pl.col(name).cast(dtype) for name, dtype in TRAINING_VIEWS.items()
        )
        for part, value in ((images, False), (repeated, backgrounds is not images))
    ]
    return pl.concat(parts)


def load_if_ready(encoder: Encoder | TrainedHere) -> LoadedEncoder | None:
    """Load an encoder whose weights exist; None for one that has to be trained first.

    Called before any image is read, so that missing weights end a run at once.
    """
    encoder.check()
    return None if isinstance(encoder, TrainedHere) else encoder.load()


def curves(inputs: TrainingInputs) -> dict[str, pl.DataFrame]:
    """The loss curve of each network that was trained or taken from the cache, columns of `fit.HISTORY`, by title."""
    found = {title: folder / "history.parquet" for title, folder in inputs.folders.items()}
    return {title: pl.read_parquet(path) for title, path in found.items() if path.exists()}
