"""One training run: it resumes exactly where it was killed, and gives the same weights on any number of processes."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning.pytorch as pl_lightning
import polars as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dejavu_exp import progress, provenance, tables
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.devices import hush, quiet_trainer
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.leases import Leases
from dejavu_exp.training.recipe import Recipe, Schedule, Task
from dejavu_exp.training.synchronized import synchronize
from dejavu_exp.training.views import AugmentedViews, Place, StepBatches

log = logging.getLogger(__name__)

HISTORY: dict[str, type[pl.DataType]] = {
    "step": pl.Int64,
    "epoch": pl.Int64,
    "loss": pl.Float64,
    "learning_rate": pl.Float64,
    "validation_loss": pl.Float64,  # null between the ends of epochs, and without validation views
}
MOST_POINTS = 2000
"""Points of a loss curve that are kept."""
BEST = "best"
LAST = "last.ckpt"
DONE = "done.json"
COST = "cost.json"


@dataclass(frozen=True)
class TrainingSettings:
    """How training is done; what is trained and on what, recipes and roles say.

    Attributes:
        devices: processes that share each batch, one a device of this machine.
        accumulate: batches whose gradients make one step; a recipe's batch size counts all of them. Batch norm and
            contrastive losses see one of these batches at a time.
        precision: "auto" (bfloat16 autocast on GPUs that have it, else float32), "float32" or "bfloat16".
        workers: processes that decode and augment, for each device; 0 to do it in the training process.
        checkpoint_every: keep the weights every so many epochs, for sweeps over training time; null for the last only.
        copies: what happens where an image that a reference would be trained on is measured too, under its own id or
            byte for byte under another: "refuse" ends the run, "drop" leaves it out of training.
    """

    devices: int = 1
    accumulate: int = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: int = 0
    checkpoint_every: int | None = None
    copies: Literal["refuse", "drop"] = "refuse"

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("accumulate", 1), ("workers", 0), ("checkpoint_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"training.{name}={value}: must be at least {least}.")
        for name, allowed in (("precision", ("auto", "float32", "bfloat16")), ("copies", ("refuse", "drop"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"training.{name}={getattr(self, name)}: must be one of {', '.join(allowed)}.")

    def bfloat16(self, device: str) -> bool:
        """True where bfloat16 autocast is used on this kind of device."""
        if self.precision == "auto":
            return device == "cuda" and torch.cuda.is_bf16_supported()
        return self.precision == "bfloat16"


class Network(Protocol):
    """A network as configured, a frozen dataclass: architecture and where training starts.

    Attributes:
        weights: "random", "hub" or the path of a file.
    """

    @property
    def weights(self) -> str: ...  # noqa: D102

    def start(self) -> nn.Module:
        """The module that is trained.

        Raises:
            WeightsError: the weights cannot be had, or do not fit the architecture.
        """
        ...


def timm_data_config(module: nn.Module) -> Mapping[str, Any]:
    """What a timm model says of the images it takes."""
    from timm.data.config import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    return config


@dataclass(frozen=True)
class Job:
    """What is trained on what.

    Attributes:
        network: architecture and where training starts.
        recipe: how it is trained.
        views: columns of `views.TRAINING_VIEWS`, sorted.
        validation: likewise; the weights with the least loss on them are taken. Empty for none.
        patience: epochs without a better validation loss after which training stops; null for never.
        seed: of initialisation, order and augmentation.
        title: for the progress bar.
        data_config: from the module to what it takes: input_size (channels, height, width), mean and std, and where
            it reads captions its tokenizer.
    """

    network: Network
    recipe: Recipe
    views: pl.DataFrame
    validation: pl.DataFrame
    patience: int | None
    seed: int
    title: str
    data_config: Callable[[nn.Module], Mapping[str, Any]] = timm_data_config


def fit(job: Job, settings: TrainingSettings, store: ImageStore, device: str, folder: Path, until: int) -> None:
    """Train until the end of an epoch, from where an earlier call stopped or was killed.

    Args:
        job: what to train.
        settings: how.
        store: gives the images.
        device: "cpu" or "cuda".
        folder: of this job alone; gets the weights of the epochs kept, and the loss curve.
        until: epochs to train; the schedule is that of the whole recipe.
    """
    batch_size = _batch_size(job, settings)
    network = job.network.start()
    config = job.data_config(network)
    steps_per_epoch = len(job.views) // batch_size
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        steps = job.recipe.epochs * steps_per_epoch
        task = job.recipe.task(network, Schedule(job.recipe.optimizer, batch_size, steps, steps_per_epoch))
        if settings.devices > 1 and device == "cpu":
            synchronize(task)
        _say_learning_rate(job, settings, batch_size)
        keeper = Keeper(job, settings, folder, until, batch_size)
        loaders = Loaders if job.validation.is_empty() else ValidatedLoaders
        with quiet_trainer(
            device,
            keeper,
            bfloat16=settings.bfloat16(device),
            devices=settings.devices,
            max_epochs=until,
            accumulate_grad_batches=settings.accumulate,
            num_sanity_val_steps=0,
        ) as trainer:
            data = loaders(job, config, store, settings, batch_size)
            trainer.fit(task, datamodule=data, ckpt_path=_checkpoint(folder, until), weights_only=True)
    if until == job.recipe.epochs or (folder / DONE).exists():
        (folder / LAST).unlink(missing_ok=True)


def _batch_size(job: Job, settings: TrainingSettings) -> int:
    """The recipe's batch size, or as much of it as there are views; it must fall into equal parts."""
    parts = settings.devices * settings.accumulate
    batch_size = min(job.recipe.batch_size, len(job.views) // parts * parts)
    if batch_size % parts or not batch_size:
        raise ConfigError(
            f"a batch of {job.recipe.batch_size} out of {len(job.views)} views cannot be shared equally by "
            f"training.devices={settings.devices} times training.accumulate={settings.accumulate}. Choose a batch size "
            "that is a multiple of their product."
        )
    return batch_size


def _say_learning_rate(job: Job, settings: TrainingSettings, batch_size: int) -> None:
    optimizer = job.recipe.optimizer
    scaled = f"{optimizer.learning_rate:g} per {optimizer.per} images" if optimizer.per else "not scaled"
    log.info(
        "%s: peak learning rate %g (%s) at a global batch of %d: %d processes times %d accumulated batches of %d.",
        job.title,
        optimizer.peak(batch_size),
        scaled,
        batch_size,
        settings.devices,
        settings.accumulate,
        batch_size // (settings.devices * settings.accumulate),
    )


def _checkpoint(folder: Path, until: int) -> Path | None:
    """Where to go on from; None for the beginning, also where training is past the epoch whose weights are wanted."""
    path = folder / LAST
    if not path.exists():
        return None
    try:
        finished = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"] + 1
    except Exception as error:  # whatever a damaged file raises
        log.warning("%s is damaged, so training begins anew: %s", path, error)
        return None
    return path if finished < until else None


class Loaders(pl_lightning.LightningDataModule):
    """The loaders of each process."""

    def __init__(
        self, job: Job, config: Mapping[str, Any], store: ImageStore, settings: TrainingSettings, batch_size: int
    ) -> None:
        super().__init__()
        self.job, self.config, self.store = job, dict(config), store
        self.settings, self.batch_size = settings, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's part of every batch."""
        trainer: Any = self.trainer
        place = Place(trainer.global_rank, trainer.world_size, self.settings.accumulate)
        augment, caption = self.job.recipe.augment(self.config), self.job.recipe.caption(self.config)
        return DataLoader(
            AugmentedViews(self.job.views, self.store, augment, self.job.seed, caption),  # type: ignore[arg-type]
            batch_size=None,
            sampler=StepBatches(len(self.job.views), self.batch_size, self.job.seed, place),
            num_workers=self.settings.workers,
        )


class ValidatedLoaders(Loaders):
    """The loaders of a job with validation views."""

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation views, for every rank the same."""
        augment = self.job.recipe.augment(self.config, validation=True)
        caption = self.job.recipe.caption(self.config, validation=True)
        rows = [(0, row) for row in range(len(self.job.validation))]
        return DataLoader(
            AugmentedViews(self.job.validation, self.store, augment, self.job.seed, caption),  # type: ignore[arg-type]
            batch_size=None,
            sampler=[rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)],
        )


class Keeper(pl_lightning.Callback):
    """Keeps checkpoints, weights and the loss curve; stops early; shows progress."""

    def __init__(self, job: Job, settings: TrainingSettings, folder: Path, until: int, batch_size: int) -> None:
        self.folder, self.until, self.every = folder, until, settings.checkpoint_every
        self.seed, self.title, self.patience = job.seed, job.title, job.patience
        self.validates = not job.validation.is_empty()
        self.last_epoch = job.recipe.epochs
        self.batch_size, self.devices = batch_size, settings.devices
        self.steps_per_epoch = len(job.views) // batch_size
        self.stride = max(1, self.last_epoch * self.steps_per_epoch // MOST_POINTS)
        self.history: list[dict[str, Any]] = []
        self.best: float | None = None
        self.best_epoch = 0
        self.waited = 0
        self.seconds = 0.0
        self._epoch_began = 0.0
        self._bar: tqdm[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {name: getattr(self, name) for name in ("history", "best", "best_epoch", "waited", "seconds")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what the checkpoint holds."""
        vars(self).update(state)

    @property
    def _finished(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def setup(self, trainer: pl_lightning.Trainer, module: pl_lightning.LightningModule, stage: str) -> None:
        """In a spawned process, be as quiet as the process that spawned it."""
        hush()

    def on_train_start(self, trainer: pl_lightning.Trainer, module: pl_lightning.LightningModule) -> None:
        """Show the bar; processes on one CPU share its cores."""
        if self.devices > 1 and module.device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.devices))
        trainer.should_stop = self._finished
        if trainer.is_global_zero:
            done = trainer.current_epoch * self.steps_per_epoch * self.batch_size
            self._bar = progress.bar(self.title, self.until * self.steps_per_epoch * self.batch_size, done=done)

    def on_train_epoch_start(self, trainer: pl_lightning.Trainer, module: pl_lightning.LightningModule) -> None:
        """Give dropout and the like the same stream, whether or not the run was killed before."""
        self._epoch_began = time.perf_counter()
        torch.manual_seed(
            provenance.hash_order(self.seed, "training/epoch", f"{trainer.current_epoch}/{trainer.global_rank}") % 2**63
        )

    def on_train_batch_end(
        self,
        trainer: pl_lightning.Trainer,
        module: pl_lightning.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own union
        batch: object,
        index: int,
    ) -> None:
        """Move the bar; keep a point of the loss curve."""
        step = trainer.global_step
        accumulate = trainer.accumulate_grad_batches
        if (index + 1) % accumulate:
            return
        if step % self.stride == 0:
            # Each process has the loss of its own part of the batch.
            loss = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")) * accumulate
            if loss != loss:
                raise DataError(
                    f"{self.title}: the loss is not a number at step {step}. Lower the learning rate, or set "
                    "training.precision=float32."
                )
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self.history.append(
                {"step": step, "epoch": trainer.current_epoch, "loss": loss, "learning_rate": rate}
                | {"validation_loss": None}
            )
        if self._bar is not None:
            self._bar.update(self.batch_size)

    def on_train_epoch_end(self, trainer: pl_lightning.Trainer, module: pl_lightning.LightningModule) -> None:
        """Compare the validation loss, write what is kept, then the checkpoint that a killed run goes on from."""
        from safetensors import SafetensorError

        task: Any = module
        epoch = trainer.current_epoch + 1
        # torch.save has RuntimeError for a full disk.
        with tables.writing(self.folder, RuntimeError, SafetensorError, pl.exceptions.PolarsError):
            if self.validates:
                self._validate(trainer, task, epoch)
            elif epoch == self.until or (self.every and epoch % self.every == 0):
                self._write(trainer, task, folder_of(self.folder, epoch))
            self.seconds += time.perf_counter() - self._epoch_began
            partial = self.folder / f".{LAST}.partial"
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                os.replace(partial, self.folder / LAST)
                pl.DataFrame(self.history, schema=HISTORY).write_parquet(self.folder / "history.parquet")
                tables.write_json({"epochs": epoch, "seconds": round(self.seconds, 1)}, self.folder / COST)
        trainer.strategy.barrier()

    def _validate(self, trainer: pl_lightning.Trainer, task: Task, epoch: int) -> None:
        loss = float(trainer.callback_metrics["validation_loss"])
        if self.history:
            self.history[-1]["validation_loss"] = loss
        if self.best is None or loss < self.best:
            self.best, self.best_epoch, self.waited = loss, epoch, 0
            self._write(trainer, task, self.folder / BEST)
        else:
            self.waited += 1
        trainer.should_stop = self._finished

    def on_train_end(self, trainer: pl_lightning.Trainer, module: pl_lightning.LightningModule) -> None:
        """Say that the best weights are final; leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
        if trainer.is_global_zero and self.validates and (self._finished or self.until == self.last_epoch):
            tables.write_json({"best_epoch": self.best_epoch, "validation_loss": self.best}, self.folder / DONE)

    def _write(self, trainer: pl_lightning.Trainer, task: Task, folder: Path) -> None:
        """Write the weights to a folder that appears whole or not at all."""
        from safetensors.torch import save_file

        if not trainer.is_global_zero:
            return
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, part in task.weights().items():
            state = {key: value.detach().contiguous().cpu() for key, value in part.state_dict().items()}
            save_file(state, partial / f"{name}.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)


def folder_of(folder: Path, epoch: int) -> Path:
    """Where the weights at the end of an epoch lie."""
    return folder / f"epoch-{epoch:04d}"


def trained(
    job: Job, settings: TrainingSettings, store: ImageStore, device: str, cache: Path, epoch: int | None = None
) -> Path:
    """The folder of a job's weights; trains what is missing.

    Training is addressed by content: recipe, network, views and all that decides the numbers. Runs that want the same
    weights wait for the one that trains them.

    Args:
        job: what is trained on what.
        settings: how.
        store: gives the images.
        device: "cpu" or "cuda".
        cache: folder of all trained weights.
        epoch: whose end is asked for; null for the last. A job with validation views has its best one only.
    """
    key = key_of_job(job, settings, device)
    folder = cache / "trained" / key
    with tables.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    until = epoch or job.recipe.epochs
    wanted = folder_of(folder, until) if job.validation.is_empty() else folder / BEST
    ready = wanted if job.validation.is_empty() else folder / DONE
    with Leases() as leases, leases.held(folder, f"{job.title} on the same", ready.exists) as mine:
        if mine:
            tables.write_json(_facts(job), folder / "job.json")
            fit(job, settings, store, device, folder, until)
    return wanted


def _facts(job: Job) -> dict[str, Any]:
    """What identifies the weights, for people: the recipe, and how many views it sees."""
    return {
        "title": job.title,
        "network": _plain(job.network),
        "recipe": {"kind": type(job.recipe).__name__, **_plain(job.recipe)},
        "views": len(job.views),
        "images": job.views["id"].n_unique(),
        "validation_views": len(job.validation),
        "patience": job.patience,
        "seed": job.seed,
    }


def key_of_job(job: Job, settings: TrainingSettings, device: str) -> str:
    """The cache key of a job's weights: a hash of all that decides them."""
    facts = {name: value for name, value in _facts(job).items() if name != "title"}
    # A path says nothing of what lies there.
    start = Path(job.network.weights).expanduser()
    libraries = {name: importlib.metadata.version(name) for name in job.recipe.libraries}
    return provenance.key_of(
        {
            **facts,
            "start": provenance.hash_file(start) if start.is_file() else job.network.weights,
            "views": provenance.hash_table(job.views),
            "validation": provenance.hash_table(job.validation),
            "devices": settings.devices,
            "accumulate": settings.accumulate,
            "bfloat16": settings.bfloat16(device),
            "device": device,
            "versions": {**provenance.versions(), **libraries},
        }
    )


def _plain(part: Any) -> dict[str, Any]:  # noqa: ANN401 - any frozen dataclass
    """A part's settings, without what is read out afterwards or is for errors only."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(part), default=str))
    for name in ("key", "output"):
        found.pop(name, None)
    if isinstance(found.get("optimizer"), dict):
        found["optimizer"].pop("key", None)
    return found
