"""Encoders trained here, on the roles of the data set that is then measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import polars as pl
from filelock import FileLock

from dejavu_exp import provenance, tables
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.encoders import Encoder, LoadedEncoder, TimmEncoder
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.tables import Role, Status
from dejavu_exp.training.supervised import Supervised, View


@dataclass(frozen=True)
class TrainingInputs:
    """What training may look at.

    Attributes:
        images: full-image views of all roles, columns of `tables.VIEWS`.
        backgrounds: background views of all roles; excluded ones have a status other than ok.
        repeats: planted repeats by image id; images not named are shown once.
        store: gives the images.
        cache: folder of trained weights.
        device: "cpu" or "cuda".
        seed: of initialisation, order and augmentation.
    """

    images: pl.DataFrame
    backgrounds: pl.DataFrame
    repeats: dict[str, int]
    store: ImageStore
    cache: Path
    device: str
    seed: int


@dataclass(frozen=True)
class TrainedEncoder:
    """A timm network trained here; its features are the encoder.

    Attributes:
        network: architecture and transform; the number of classes is the data set's.
        recipe: how it is trained.
        roles: whose images are trained on; "unseen" and "public" never are.
    """

    network: TimmEncoder
    recipe: Supervised
    roles: tuple[str, ...] = (Role.TARGET, Role.SHARED)

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))
        allowed = (Role.TARGET, Role.SHARED, Role.HELDOUT)
        if not self.roles or not set(self.roles) <= set(allowed):
            raise ConfigError(f"model.roles={list(self.roles)}: choose among {', '.join(allowed)}.")

    def check(self) -> None:
        """The architecture exists."""
        self.network.check()

    def train(self, inputs: TrainingInputs) -> LoadedEncoder:
        """Train, or take the weights that the same inputs gave before, and load the result.

        Raises:
            DataError: no image has a role to train on.
        """
        images = inputs.images.filter(pl.col("role").is_in(self.roles), pl.col("status") == Status.OK).sort("id")
        labels = sorted(images["label"].unique())
        if len(labels) < 2:
            raise DataError(
                f"training needs images of two classes in roles {', '.join(self.roles)}; found {len(labels)}."
            )
        views = self._views(images, inputs, labels)
        network = replace(
            self.network, arch_args={**self.network.arch_args, "num_classes": len(labels)}, seed=inputs.seed
        )
        key = provenance.key_of(
            {
                # What is read out afterwards does not change the weights.
                "network": asdict(replace(network, output="logits")),
                "recipe": asdict(self.recipe),
                "views": provenance.hash_bytes(repr((views, images["content"].to_list())).encode()),
                "seed": inputs.seed,
                "device": inputs.device,
                "versions": provenance.versions(),
            }
        )
        path = inputs.cache / "trained" / f"{key}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                self._fit(network, views, inputs, path)
        loaded = replace(network, weights=str(path)).load()
        return replace(loaded, weights=f"trained here on {len(images)} images ({type(self.recipe).__name__}, {key})")

    def _views(self, images: pl.DataFrame, inputs: TrainingInputs, labels: list[str]) -> list[View]:
        """Every image once, and the background of each repeated one as often as it is repeated."""
        code = {label: number for number, label in enumerate(labels)}
        region = ("xmin", "ymin", "xmax", "ymax")
        views: list[View] = [
            (row["path"], tuple(row[end] for end in region), code[row["label"]], False)
            for row in images.iter_rows(named=True)
        ]
        repeated = inputs.backgrounds.filter(
            pl.col("id").is_in(images["id"].implode()), pl.col("status") == Status.OK
        ).sort("id")
        for row in repeated.iter_rows(named=True):
            times = inputs.repeats.get(row["id"], 1)
            if times > 1:
                views += [(row["path"], tuple(row[end] for end in region), code[row["label"]], True)] * times
        return views

    def _fit(self, network: TimmEncoder, views: list[View], inputs: TrainingInputs, path: Path) -> None:
        from safetensors.torch import save_file
        from timm.data.config import resolve_model_data_config

        module = network.build()
        config = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
        self.recipe.train(module, config, views, inputs.store, seed=inputs.seed, device=inputs.device)
        with tables.whole(path) as partial:
            save_file({name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}, partial)


def load_if_ready(encoder: Encoder | TrainedEncoder) -> LoadedEncoder | None:
    """Load an encoder whose weights exist; None for one that has to be trained first.

    Called before any image is read, so that missing weights end a run at once.
    """
    encoder.check()
    return None if isinstance(encoder, TrainedEncoder) else encoder.load()
