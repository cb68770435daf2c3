"""How Lightning is run: on one kind of device, without banners, logs or checkpoints of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl_lightning


@contextmanager
def quiet_trainer(
    device: str, callback: pl_lightning.Callback, *more: pl_lightning.Callback, epochs: int = 1, bfloat16: bool = False
) -> Iterator[pl_lightning.Trainer]:
    """A Lightning trainer that says nothing: tables, caches and progress bars are ours to write.

    Args:
        device: "cpu" or "cuda".
        callback: called during the run.
        more: likewise.
        epochs: passes over the data, for training.
        bfloat16: run under bfloat16 autocast.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Whether more workers would help is for trainer.workers to say.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        yield pl_lightning.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if bfloat16 else "32-true",
            max_epochs=epochs,
            callbacks=[callback, *more],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
