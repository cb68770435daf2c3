"""Cells of a sweep as a SLURM job array: Hydra's submitit launcher, but a cell that is cancelled ends no sweep."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

from dejavu_exp import cells, tables
from dejavu_exp.cells import Cell, State

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""How often SLURM's queue is looked at; a cluster with many users will not notice."""


class SlurmLauncher(submitit_launcher.SlurmLauncher):  # type: ignore[misc]
    """Queues the cells that are not done and waits until SLURM has none of their jobs left.

    Hydra's own launcher waits for a result of each job: for ever where one was cancelled and the cluster keeps no
    accounts, and otherwise it ends at the first such job with a traceback. How each cell went is in its status.json.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Queue a batch of cells and wait for them; the results are in their folders."""
        waiting = self._waiting(job_overrides, initial_job_idx)
        if waiting:
            jobs = self._submit([number for number, _ in waiting], [cell for _, cell in waiting])
            log.info("python -m dejavu_exp.sweep %s shows how far they are", self.config.hydra.sweep.dir)
            _wait(jobs)
        return []

    def _waiting(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[tuple[int, Cell]]:
        """The cells that are neither finished nor the job of another call of the same command."""
        # The callback that checked the sweep has composed every cell.
        composed = (getattr(one, "cells", []) for one in self.hydra_context.callbacks.callbacks)
        known = {cell.overrides: cell for found in composed for cell in found}
        jobs = cells.slurm_jobs()
        waiting = []
        for number, overrides in enumerate(job_overrides, first):
            cell = known[tuple(overrides)]
            status = cells.read(cell.folder)
            if cell.is_done():
                log.info("finished before, not queued: %s", cell.folder)
            elif status and status.job and status.now(jobs) in (State.QUEUED, State.RUNNING):
                log.info("job %s of an earlier call is still at it, not queued: %s", status.job, cell.folder)
            else:
                waiting.append((number, cell))
        return waiting

    def _submit(self, numbers: Sequence[int], waiting: Sequence[Cell]) -> list[str]:
        """Queue cells as one array; the ids of their jobs."""
        import submitit

        options = dict(self.params)
        folder = options.pop("submitit_folder")
        executor = submitit.AutoExecutor(
            cluster="slurm", folder=folder, slurm_max_num_timeout=options.pop("max_num_timeout")
        )
        common = {field.name for field in fields(BaseQueueConf)}
        executor.update_parameters(
            **{key if key in common else f"slurm_{key}": value for key, value in options.items() if value is not None}
        )
        # The job composes its configuration when it starts: given the folder, it finds it even if conf/ was edited.
        calls: list[tuple[Any, ...]] = [
            (
                [*cell.overrides, f"hydra.sweep.subdir='{cell.folder.name}'"],
                "hydra.sweep.dir",
                number,
                f"job_id_for_{number}",
                Singleton.get_state(),
            )
            for number, cell in zip(numbers, waiting, strict=True)
        ]
        queued = executor.map_array(self, *zip(*calls, strict=True))
        for one, cell in zip(queued, waiting, strict=True):
            tables.write_json({"job": one.job_id}, cell.folder / cells.SUBMITTED)
            log.info("job %s: %s", one.job_id, " ".join(filter_overrides(cell.overrides)))
        return [one.job_id for one in queued]


def _wait(jobs: Sequence[str]) -> None:
    """Wait until no job is in the queue any more; a controller that does not answer is asked again."""
    while True:
        queue = cells.slurm_jobs()
        if queue is not None and not queue.keys() & set(jobs):
            return
        time.sleep(POLL_SECONDS)
