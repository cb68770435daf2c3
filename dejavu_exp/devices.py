"""How Lightning is run: on one kind of device, without banners, logs or checkpoints of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl_lightning
from lightning.pytorch.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]

NOISE = (
    "does not have many workers",  # whether more would help is for the configuration to say
    "LeafSpec",
    "have no `val_dataloader`",
    "lr_scheduler.step.*before.*optimizer.step",
    "The `srun` command is available",
    "The epoch parameter in `scheduler.step",
)
"""Warnings of Lightning and PyTorch that a user can do nothing about."""


def hush() -> None:
    """Silence Lightning in this process; a spawned one has to do so for itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}.*")


@contextmanager
def quiet_trainer(
    device: str,
    *callbacks: pl_lightning.Callback,
    bfloat16: bool = False,
    devices: int = 1,
    index: int = 0,
    **options: Any,  # noqa: ANN401
) -> Iterator[pl_lightning.Trainer]:
    """A Lightning trainer that says nothing: tables, caches and progress bars are ours to write.

    Args:
        device: "cpu" or "cuda".
        callbacks: called during the run.
        bfloat16: run under bfloat16 autocast.
        devices: processes, one a device. Several are spawned, never by running the command line again, which would
            start a sweep a second time.
        index: of the GPU, where there is one process; see `ranks`.
        options: further options of Lightning's trainer.
    """
    with warnings.catch_warnings():
        hush()
        yield pl_lightning.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=[index] if device == "cuda" and devices == 1 else devices,
            # Whoever started this process, SLURM or torchrun: Lightning starts its own processes, or none.
            plugins=[LightningEnvironment()],
            strategy="ddp_spawn" if devices > 1 else "auto",
            sync_batchnorm=devices > 1 and device == "cuda",
            precision="bf16-mixed" if bfloat16 else "32-true",
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )
