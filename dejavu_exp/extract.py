"""Embedding extraction: a Lightning predict run that writes checksummed shards, cached by content and resumable."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl_lightning
import numpy as np
import polars as pl
import pyarrow as pa
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dejavu_exp import progress, provenance, tables, texts
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.devices import quiet_trainer
from dejavu_exp.encoders import LoadedEncoder
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.images import ViewImages
from dejavu_exp.tables import BoolArray, Float32Array
from dejavu_exp.texts import Tokens, ViewTexts

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tokens, Tensor, list[str]]
Outputs = tuple[Tensor, Tensor, list[str]]
GOES_IN = {"images": ("path", "content", "xmin", "ymin", "xmax", "ymax"), "texts": ("texts",)}
"""What an embedding depends on, by what the view shows."""
SHARD_ROWS = 1024
"""Rows a shard holds at least; what a killed run loses at most, on each device."""


@dataclass(frozen=True)
class Embeddings:
    """The encoder's output for each view asked for.

    Attributes:
        view_ids: N ids, in the order asked for.
        values: shape (N, D), float32; NaN where the image could not be decoded.
        readable: shape (N,), False where the image could not be decoded.
        reasons: why not, by view id.
        classes: names of the D columns, or None.
    """

    view_ids: tuple[str, ...]
    values: Float32Array
    readable: BoolArray
    reasons: dict[str, str]
    classes: tuple[str, ...] | None

    def readable_only(self) -> Embeddings:
        """The rows whose image could be decoded."""
        ids = tuple(view_id for view_id in self.view_ids if view_id not in self.reasons)
        return Embeddings(ids, self.values[self.readable], self.readable[self.readable], {}, self.classes)


@dataclass(frozen=True)
class Extractor:
    """How embeddings are computed and where they are kept.

    Attributes:
        cache: folder of the embeddings; any number of runs may share it.
        accelerator: "auto", "cpu" or "cuda".
        precision: "auto" (bfloat16 autocast on GPUs that have it, else float32), "float32" or "bfloat16".
        batch_size: images a forward pass; of captions, the views whose texts are in it.
        workers: processes that decode; null for one a core, at most 8.
    """

    cache: Path
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_size: int = 64
    workers: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", Path(self.cache))
        if self.batch_size < 1:
            raise ConfigError(f"trainer.batch_size={self.batch_size}: must be at least 1.")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"trainer.workers={self.workers}: must be 0 or more, or null for one a core.")
        for key, allowed in (("accelerator", ("auto", "cpu", "cuda")), ("precision", ("auto", "float32", "bfloat16"))):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"trainer.{key}={getattr(self, key)}: must be one of {', '.join(allowed)}.")
        if self.accelerator == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "trainer.accelerator=cuda, but torch finds no CUDA device. Set trainer.accelerator=cpu or auto."
            )

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """The kind of device that will be used."""
        return "cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu"

    @property
    def autocast(self) -> bool:
        """True where bfloat16 autocast is used. Not by default on CPUs, many of which are 10 times slower with it."""
        if self.precision == "auto":
            return self.device == "cuda" and torch.cuda.is_bf16_supported()
        return self.precision == "bfloat16"

    def embed(
        self, encoder: LoadedEncoder, views: pl.DataFrame, store: ImageStore, title: str = "embedding"
    ) -> Embeddings:
        """Embed views, of images or of texts, or read them from the cache where they were embedded before.

        A view of several texts has the mean of their unit vectors. The batches depend only on the views asked for,
        never on what a killed run had finished, so a resumed run gives the same bits.

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
        what = _shown(views, encoder)
        encoder = encoder.reading(what)
        wanted = views.select("view_id", *GOES_IN[what]).sort("view_id")
        key = provenance.key_of(self._what_goes_in(encoder, wanted))
        shards = ShardFolder(self.cache / "embeddings" / key, key, wanted["view_id"].to_list(), self._rows_per_shard())
        shards.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(shards.folder / ".lock"):
            missing = shards.missing()
            if missing:
                self._run(encoder, _data(encoder, wanted, store), shards, missing, title)
            sorted_values, reasons = shards.read()
        position = {view_id: row for row, view_id in enumerate(wanted["view_id"])}
        ids = tuple(views["view_id"])
        order = np.array([position[view_id] for view_id in ids], dtype=np.int64)
        readable = np.array([view_id not in reasons for view_id in ids], dtype=np.bool_)
        return Embeddings(ids, sorted_values[order], readable, reasons, encoder.classes)

    def _rows_per_shard(self) -> int:
        return self.batch_size * -(-SHARD_ROWS // self.batch_size)

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
            "versions": provenance.versions(),
        }

    def _run(
        self,
        encoder: LoadedEncoder,
        views: ViewImages | ViewTexts,
        shards: ShardFolder,
        missing: list[int],
        title: str,
    ) -> None:
        """Compute the missing shards."""
        planned = [rows for shard in missing for rows in shards.batches(shard, self.batch_size)]
        workers = min(os.cpu_count() or 1, 8) if self.workers is None else self.workers
        loader: DataLoader[Any] = DataLoader(
            PlannedBatches(views, planned),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers if len(planned) > 2 * workers else 0,
            pin_memory=self.device == "cuda",
        )
        writer = ShardWriter(shards)
        unit = "text" if isinstance(views, ViewTexts) else "img"
        bar = ProgressBar(title, sum(len(rows) for rows in planned), unit)
        with quiet_trainer(self.device, writer, bar, bfloat16=self.autocast) as trainer:
            trainer.predict(EmbeddingModule(encoder.module), loader, return_predictions=False)


def _shown(views: pl.DataFrame, encoder: LoadedEncoder) -> str:
    """Whether the views are of images or of texts; where there are none, what the encoder reads."""
    silent = views["texts"].null_count()
    if 0 < silent < len(views):
        raise ValueError(f"{silent} of {len(views)} views have no texts: images and texts are embedded apart")
    if not len(views):
        return encoder.reads
    return "images" if silent else "texts"


def _data(encoder: LoadedEncoder, wanted: pl.DataFrame, store: ImageStore) -> ViewImages | ViewTexts:
    if encoder.reads == "texts":
        return ViewTexts.of(wanted, encoder.transform)
    return ViewImages.of(wanted, store, encoder.transform)


@dataclass(frozen=True)
class PlannedBatches:
    """Batches whose rows are fixed beforehand: a map-style data set of whole batches."""

    views: ViewImages | ViewTexts
    rows: list[list[int]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        if isinstance(self.views, ViewTexts):
            return self.views.batch(self.rows[index])
        rows, pixels, reasons = zip(*(self.views[row] for row in self.rows[index]), strict=True)
        return torch.tensor(rows), torch.stack(pixels), torch.ones(len(rows), dtype=torch.int64), list(reasons)


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


@dataclass(frozen=True)
class ShardFolder:
    """The shards of one request: Arrow files of ids, values and reasons, each with its key and checksum.

    Shard s holds the rows from s * rows_per_shard on, in the order of the ids.
    """

    folder: Path
    key: str
    view_ids: list[str]
    rows_per_shard: int

    def __len__(self) -> int:
        return -(-len(self.view_ids) // self.rows_per_shard)

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{shard:06d}-of-{len(self):06d}.arrow"

    def span(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, len(self.view_ids)))

    def batches(self, shard: int, batch_size: int) -> Iterator[list[int]]:
        """The rows of a shard, a batch at a time."""
        rows = list(self.span(shard))
        return (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))

    def missing(self) -> list[int]:
        """Shards that are not there, or whose content is not what was written."""
        return [shard for shard in range(len(self)) if self._load(shard) is None]

    def read(self) -> tuple[Float32Array, dict[str, str]]:
        """All values, shape (N, D), NaN where unreadable; and the reasons by view id.

        Raises:
            DataError: a shard is missing or damaged.
        """
        parts: list[Float32Array] = []
        reasons: dict[str, str] = {}
        for shard in range(len(self)):
            loaded = self._load(shard)
            if loaded is None:
                raise DataError(f"{self.path(shard)}: the shard is missing or damaged. Run the same command again.")
            values, why = loaded
            reasons.update({self.view_ids[row]: text for row, text in zip(self.span(shard), why, strict=True) if text})
            parts.append(np.where(np.array(why) == "", 1, np.float32("nan"))[:, None] * values)
        return np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32), reasons

    def write(self, shard: int, values: Float32Array, reasons: list[str]) -> None:
        """Write a shard under a temporary name, then rename it.

        Raises:
            DataError: an embedding is not finite, or there is no room.
        """
        ids = [self.view_ids[row] for row in self.span(shard)]
        bad = ~np.isfinite(values).all(axis=1) & (np.array(reasons) == "")
        if bad.any():
            raise DataError(
                f"the encoder gave NaN or infinite embeddings for {bad.sum()} views, first {ids[int(bad.argmax())]}. "
                "Check the weights, or set trainer.precision=float32."
            )
        table = pa.table(
            {
                "view_id": ids,
                "values": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1]),
                "reason": reasons,
            }
        ).replace_schema_metadata({"key": self.key, "checksum": checksum(ids, values, reasons)})
        try:
            with (
                tables.whole(self.path(shard)) as partial,
                partial.open("wb") as stream,
                pa.ipc.new_file(stream, table.schema) as writer,
            ):
                writer.write_table(table)
        except DataError as error:
            raise DataError(
                f"{error} Finished shards are kept; trainer.cache can name another disk. Then run the command again."
            ) from error

    def _load(self, shard: int) -> tuple[Float32Array, list[str]] | None:
        """Values and reasons of a shard, or None where it is missing or damaged."""
        try:
            with pa.memory_map(str(self.path(shard))) as stream, pa.ipc.open_file(stream) as reader:
                table = reader.read_all()
                metadata = table.schema.metadata
                ids, reasons = table["view_id"].to_pylist(), table["reason"].to_pylist()
                values = np.array(table["values"].combine_chunks().flatten()).reshape(len(ids), -1)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowInvalid, KeyError, ValueError, UnicodeDecodeError) as error:
            log.warning("%s is damaged and will be made again: %s", self.path(shard), error)
            return None
        expected = [self.view_ids[row] for row in self.span(shard)]
        if ids != expected or metadata[b"checksum"].decode() != checksum(ids, values, reasons):
            log.warning("%s is damaged and will be made again: its checksum does not fit", self.path(shard))
            return None
        return values, reasons


def checksum(ids: Sequence[str], values: Float32Array, reasons: Sequence[str]) -> str:
    """BLAKE2b over everything a shard holds."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((list(ids), values.shape, list(reasons), tables.SCHEMA_VERSION)).encode())
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


class ShardWriter(pl_lightning.Callback):
    """Collects batches until a shard is full, then writes it: memory does not grow with the number of rows."""

    def __init__(self, shards: ShardFolder) -> None:
        self.shards = shards
        self._values: list[Float32Array] = []
        self._reasons: list[str] = []

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
            self._values, self._reasons = [], []


class ProgressBar(pl_lightning.Callback):
    """Images or texts done, rate and time left."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self._bar: tqdm[Any] | None = None

    def on_predict_start(self, trainer: pl_lightning.Trainer, module: pl_lightning.LightningModule) -> None:
        """Show the bar."""
        self._bar = progress.bar(self.title, self.total, unit=self.unit)

    def on_predict_batch_end(
        self,
        trainer: pl_lightning.Trainer,
        module: pl_lightning.LightningModule,
        outputs: object,
        batch: object,
        index: int,
        loader: int = 0,
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(len(cast(Outputs, outputs)[0]))

    def on_predict_end(self, trainer: pl_lightning.Trainer, module: pl_lightning.LightningModule) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
