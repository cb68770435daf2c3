"""An encoder that stops in the middle of an extraction until a file lets it go on."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from dejavu_exp import cells
from dejavu_exp.encoders import LoadedEncoder, TimmEncoder

PATIENCE_S = 300
"""Seconds after which the encoder gives up: a test that has failed must not leave jobs behind."""


@dataclass(frozen=True)
class GatedEncoder:
    """A timm model of random weights that waits for `gate` before it embeds anything after the first shard is written.

    Attributes:
        arch: timm's name.
        gate: the file to wait for; a file "waiting-JOB" beside it says which job has come so far.
        shards: the folder of the shards of all requests.
    """

    reads: ClassVar[frozenset[str]] = TimmEncoder.reads
    arch: str
    gate: str
    shards: str

    def check(self) -> None:
        self._inner().check()

    def load(self) -> LoadedEncoder:
        loaded = self._inner().load()
        return replace(loaded, module=Gate(loaded.module, Path(self.gate), Path(self.shards)))

    def _inner(self) -> TimmEncoder:
        return TimmEncoder(self.arch, weights="random")


class Gate(nn.Module):
    def __init__(self, module: nn.Module, gate: Path, shards: Path) -> None:
        super().__init__()
        self.module, self.gate, self.shards = module, gate, shards

    def forward(self, inputs: Tensor) -> Tensor:
        until = time.monotonic() + PATIENCE_S
        while not self.gate.exists() and any(self.shards.glob("*/*.arrow")):
            self.gate.with_name(f"waiting-{cells.slurm_job()}").touch()
            if time.monotonic() > until:
                raise TimeoutError(f"{self.gate} did not come")
            time.sleep(0.05)
        embedded: Tensor = self.module(inputs)
        return embedded
