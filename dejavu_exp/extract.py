"""Embedding extraction: Lightning predict runs, one a device, that share the shards of a request; cached, resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl_lightning
import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from dejavu_exp import images, progress, provenance, ranks, texts
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.devices import quiet_trainer
from dejavu_exp.encoders import LoadedEncoder
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.images import ViewImages
from dejavu_exp.leases import POLL_S, Leases, Pieces
from dejavu_exp.shards import Embeddings, ShardFolder, Storage
from dejavu_exp.tables import Float32Array
from dejavu_exp.texts import Tokens, ViewTexts

Batch = tuple[Tensor, Tokens, Tensor, list[str]]
Outputs = tuple[Tensor, Tensor, list[str]]
GOES_IN = {"images": ("path", "content", "xmin", "ymin", "xmax", "ymax"), "texts": ("texts",)}
"""What an embedding depends on, by what the view shows."""
LOOK_S = 2.0
"""Seconds between two counts of what other ranks have done."""
TRIES = 3
"""Times that damaged shards are made again before the disk is given up."""


@dataclass(frozen=True)
class Extractor:
    """How embeddings are computed and where they are kept.

    Attributes:
        cache: folder of the embeddings; any number of runs, of any machines that see it, may share it.
        accelerator: "auto", "cpu" or "cuda".
        devices: processes that share the work, one a device of this machine; "auto" for one a GPU. Tasks that SLURM or
            torchrun has started are taken as they are.
        precision: "auto" (bfloat16 autocast on GPUs that have it, else float32), "float32" or "bfloat16".
        storage: type of the embeddings on disk, "float32" or "float16".
        batch_size: images a forward pass; of captions, the views whose texts are in it.
        shard_rows: rows that are written at a time, rounded up to whole batches; what a killed process loses at most.
        workers: processes that decode, for each device; null for one a core, at most 8.
        decoder: how images are decoded, one of `images.DECODERS`.
        search_mb: of the public rows held in memory at a time by a search for neighbours, MB.
        lease_s: seconds without a sign of life after which another process takes over what a process works on.
    """

    cache: Path
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | Literal["auto"] = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    storage: Storage = "float32"
    batch_size: int = 64
    shard_rows: int = 1024
    workers: int | None = None
    decoder: Literal["auto", "pillow"] = "auto"
    search_mb: int = 1024
    lease_s: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", Path(self.cache))
        if self.devices != "auto" and (isinstance(self.devices, str) or self.devices < 1):
            raise ConfigError(f"trainer.devices={self.devices}: must be at least 1, or auto for all GPUs.")
        for name, least in (("batch_size", 1), ("shard_rows", 1), ("search_mb", 1), ("lease_s", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"trainer.{name}={getattr(self, name)}: must be at least {least}.")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"trainer.workers={self.workers}: must be 0 or more, or null for one a core.")
        self._check_choices()
        if self.accelerator == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "trainer.accelerator=cuda, but torch finds no CUDA device. Set trainer.accelerator=cpu or auto."
            )
        # Tasks of SLURM or torchrun each see their own GPUs, and may be of several machines.
        alone = ranks.place().size == 1
        if alone and self.device == "cuda" and self.device_count > torch.cuda.device_count():
            raise ConfigError(
                f"trainer.devices={self.devices}, but torch finds {torch.cuda.device_count()} CUDA devices. Set "
                "trainer.devices=auto."
            )

    def _check_choices(self) -> None:
        for key, allowed in (
            ("accelerator", ("auto", "cpu", "cuda")),
            ("precision", ("auto", "float32", "bfloat16")),
            ("storage", ("float32", "float16")),
            ("decoder", images.DECODERS),
        ):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"trainer.{key}={getattr(self, key)}: must be one of {', '.join(allowed)}.")

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """The kind of device that will be used."""
        return "cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu"

    @property
    def device_count(self) -> int:
        """Devices of this machine that will be used."""
        if self.devices == "auto":
            return torch.cuda.device_count() if self.device == "cuda" else 1
        return self.devices

    @property
    def autocast(self) -> bool:
        """True where bfloat16 autocast is used. Not by default on CPUs, many of which are 10 times slower with it."""
        if self.precision == "auto":
            return self.device == "cuda" and torch.cuda.is_bf16_supported()
        return self.precision == "bfloat16"

    @property
    def search_settings(self) -> dict[str, Any]:
        """What a search for neighbours must know of it."""
        return {"memory_mb": self.search_mb, "lease_s": self.lease_s}

    def embed(
        self, encoder: LoadedEncoder, views: pl.DataFrame, store: ImageStore, title: str = "embedding"
    ) -> Embeddings:
        """Embed views, of images or of texts, or read them from the cache where they were embedded before.

        A view of several texts has the mean of their unit vectors. The batches depend only on the views asked for,
        never on what a killed run had finished or on who does which shard, so the bits are the same with any number of
        processes. Other jobs that want the same take part: each shard is done by whoever takes it first.

        Args:
            encoder: the loaded encoder.
            views: columns of `tables.VIEWS`, all of status ok; order and roles do not matter to the cache. Either all
                have texts or none has.
            store: gives the images.
            title: for the progress bar.

        Raises:
            ConfigError: the encoder cannot embed what the views show.
            DataError: an embedding is not finite, or a shard cannot be written.
            ValueError: some views have texts and some have not.
            WeightsError: the text tower lacks its tokenizer.
        """
        encoder = encoder.reading(_shown(views, encoder))
        shards = self.requested(encoder, views)
        reasons = self._complete(encoder, shards, store, title)
        order = views.select("view_id").with_row_index("asked").sort("view_id")["asked"].to_numpy()
        rows = np.empty(len(order), dtype=np.int64)
        rows[order] = np.arange(len(order))
        readable = ~views["view_id"].is_in(pl.Series([list(reasons)], dtype=pl.List(pl.String))).to_numpy()
        return Embeddings(shards, rows, readable, reasons, encoder.classes)

    def requested(self, encoder: LoadedEncoder, views: pl.DataFrame) -> ShardFolder:
        """The shards of a request, some of which may be there; writes down what is asked for.

        Args:
            encoder: the part of it that reads what the views show.
            views: as for `embed`.

        Raises:
            DataError: the folder cannot be written.
        """
        wanted = views.select("view_id", *GOES_IN[encoder.reads]).sort("view_id")
        key = provenance.key_of(self._what_goes_in(encoder, wanted))
        rows_per_shard = self.batch_size * -(-self.shard_rows // self.batch_size)
        shards = ShardFolder(self.cache / "embeddings" / key, key, len(wanted), rows_per_shard, self.storage)
        shards.write_request(wanted)
        return shards

    def _what_goes_in(self, encoder: LoadedEncoder, wanted: pl.DataFrame) -> dict[str, Any]:
        return {
            "encoder": encoder.description,
            "weights": encoder.weights_hash,
            "transform": encoder.transform_text,
            "classes": encoder.classes,
            "views": provenance.hash_table(wanted),
            "batch_size": self.batch_size,
            "device": self.device,
            "autocast": self.autocast,
            "storage": self.storage,
            "decoder": images.decoder_text(self.decoder) if encoder.reads == "images" else None,
            "versions": provenance.versions(),
        }

    def _complete(self, encoder: LoadedEncoder, shards: ShardFolder, store: ImageStore, title: str) -> dict[str, str]:
        """See to it that every shard is there and whole; why images could not be read, by view id."""
        for _ in range(TRIES):
            if shards.missing_count():
                how = How(self.batch_size, self.workers, self.device, self.autocast, self.decoder, self.lease_s)
                # Apart, for what stays the same from one request to the next is passed on once.
                parts = (encoder.module, encoder.transform, encoder.reads, store, shards, how)
                ranks.here().ask(help_embed, *parts)
                Embedding(*parts).do_all(title)
            reasons = shards.check()
            if not shards.missing_count():
                shards.forget_killed()
                return reasons
        raise DataError(
            f"{shards.folder}: shards were damaged as soon as they had been written, {TRIES} times. Check the disk, or "
            "let trainer.cache name another one."
        )


def _shown(views: pl.DataFrame, encoder: LoadedEncoder) -> str:
    """Whether the views are of images or of texts; where there are none, what the encoder reads."""
    silent = views["texts"].null_count()
    if 0 < silent < len(views):
        raise ValueError(f"{silent} of {len(views)} views have no texts: images and texts are embedded apart")
    if not len(views):
        return encoder.reads
    return "images" if silent else "texts"


@dataclass(frozen=True)
class How:
    """What of an `Extractor` the ranks must know.

    Attributes:
        batch_size: see there.
        workers: see there.
        device: "cpu" or "cuda".
        autocast: whether bfloat16 autocast is used.
        decoder: see there.
        lease_s: see there.
    """

    batch_size: int
    workers: int | None
    device: str
    autocast: bool
    decoder: str
    lease_s: float


@dataclass(frozen=True)
class Embedding:
    """One request for embeddings as a rank works on it.

    Attributes:
        module: the network.
        transform: what makes its inputs of pictures or texts.
        reads: "images" or "texts".
        store: gives the images.
        shards: what is asked for, and what is there.
        how: of the extractor.
    """

    module: nn.Module
    transform: Callable[[Any], Any]
    reads: str
    store: ImageStore
    shards: ShardFolder
    how: How

    def do_all(self, title: str) -> None:
        """Embed what nobody else works on; then wait for the others, and take over what they leave behind."""
        unit, done = "text" if self.reads == "texts" else "img", self.shards.rows - self.shards.missing_count()
        with Leases(self.how.lease_s) as leases, progress.bar(title, self.shards.rows, done=done, unit=unit) as bar:
            data = self._data()
            while True:
                self._do_free(data, leases, bar)
                missing = self.shards.missing_count()
                _move(bar, self.shards.rows - missing)
                if not missing:
                    return
                time.sleep(POLL_S)

    def help(self) -> None:
        """Embed shards that nobody else works on, until there are none."""
        if self.shards.missing_count():
            with Leases(self.how.lease_s) as leases:
                self._do_free(self._data(), leases, None)

    def _data(self) -> ViewImages | ViewTexts:
        views = cast(pl.DataFrame, pl.from_arrow(self.shards.request))
        if self.reads == "texts":
            return ViewTexts.of(views, self.transform)
        return ViewImages.of(views, self.store, self.transform, self.how.decoder)

    def _do_free(self, data: ViewImages | ViewTexts, leases: Leases, bar: tqdm[Any] | None) -> None:
        """Embed the shards that are free, by one predict run of Lightning on this rank's device."""
        pieces = Pieces(len(self.shards), self.shards.path, leases)
        taken = pieces.take()
        first = next(taken, None)
        if first is None:
            return
        how = self.how
        workers = min(ranks.here().cores, 8) if how.workers is None else how.workers
        loader: DataLoader[Any] = DataLoader(
            PlannedBatches(data),  # type: ignore[arg-type]
            batch_size=None,
            sampler=ShardBatches(self.shards, how.batch_size, first, taken),
            num_workers=workers if self.shards.missing_count() > 2 * workers * how.batch_size else 0,
            pin_memory=how.device == "cuda",
            worker_init_fn=_step_back if how.device == "cpu" else None,
        )
        writer = ShardWriter(self.shards, pieces, bar)
        with quiet_trainer(how.device, writer, bfloat16=how.autocast, index=ranks.device_index()) as trainer:
            trainer.predict(EmbeddingModule(self.module), loader, return_predictions=False)


def help_embed(*parts: Any) -> None:  # noqa: ANN401
    """In a rank other than 0: help with an `Embedding` of these parts."""
    Embedding(*parts).help()


def _step_back(_: int) -> None:
    """Let a worker run where the network leaves cores free: a thread that waits for a core holds up all of them."""
    os.nice(10)


class ShardBatches(Sampler[list[int]]):
    """The batches of one shard after another, each shard claimed when it is its turn."""

    def __init__(self, shards: ShardFolder, batch_size: int, first: int, others: Iterator[int]) -> None:
        self.shards, self.batch_size = shards, batch_size
        self._first, self._others = first, others

    def __iter__(self) -> Iterator[list[int]]:
        """Rows of each batch."""
        yield from self.shards.batches(self._first, self.batch_size)
        while ranks.here().is_led():
            shard = next(self._others, None)
            if shard is None:
                return
            yield from self.shards.batches(shard, self.batch_size)


@dataclass(frozen=True)
class PlannedBatches:
    """Batches whose rows are fixed beforehand: a map-style data set that is asked for whole batches."""

    views: ViewImages | ViewTexts

    def __getitem__(self, rows: list[int]) -> Batch:
        if isinstance(self.views, ViewTexts):
            return self.views.batch(rows)
        numbers, pixels, reasons = zip(*(self.views[row] for row in rows), strict=True)
        return torch.tensor(numbers), torch.stack(pixels), torch.ones(len(rows), dtype=torch.int64), list(reasons)


class EmbeddingModule(pl_lightning.LightningModule):
    """Passes batches through a frozen encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        # Convolutions were 1.2 to 1.35 times faster in this layout on CPUs; transformers do not mind.
        self.encoder = encoder.to(memory_format=torch.channels_last)

    def predict_step(self, batch: Batch, _: int = 0) -> Outputs:
        """Row numbers, embeddings of shape (B, D) as float32, and why images could not be read."""
        rows, inputs, counts, reasons = batch
        if isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        values = self.encoder(inputs).float().cpu()
        return rows.cpu(), texts.mean_of_units(values, counts.tolist()), reasons


class ShardWriter(pl_lightning.Callback):
    """Collects batches until a shard is full, then writes it and gives back its lease; moves the bar.

    Memory does not grow with the number of rows.
    """

    def __init__(self, shards: ShardFolder, pieces: Pieces, bar: tqdm[Any] | None) -> None:
        self.shards, self.pieces, self.bar = shards, pieces, bar
        self._values: list[Float32Array] = []
        self._reasons: list[str] = []
        self._looked = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: pl_lightning.Trainer,
        module: pl_lightning.LightningModule,
        outputs: object,
        batch: object,
        index: int,
        loader: int = 0,
    ) -> None:
        """Keep the batch; write when its shard is complete."""
        rows, values, reasons = cast(Outputs, outputs)
        self._values.append(values.numpy())
        self._reasons += reasons
        shard = int(rows[-1]) // self.shards.rows_per_shard
        if int(rows[-1]) == self.shards.span(shard)[-1]:
            self.shards.write(shard, np.concatenate(self._values), self._reasons)
            self.pieces.release(shard)
            self._values, self._reasons = [], []
        if self.bar is not None:
            self.bar.update(len(rows))
            self._count_others()

    def _count_others(self) -> None:
        """Now and then, let the bar show what other processes have done."""
        if self.bar is not None and ranks.here().place.size > 1 and time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            _move(self.bar, self.shards.rows - self.shards.missing_count() + len(self._reasons))


def _move(bar: tqdm[Any], to: int) -> None:
    """Move a bar forward."""
    bar.update(max(0, to - bar.n))
