"""The Python API: a measurement as a function call, with a result instead of files alone."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from dejavu_exp import config, gate, safety, tables
from dejavu_exp.cells import State, Status
from dejavu_exp.errors import ConfigError
from dejavu_exp.tables import Estimate

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from dejavu_exp.encoders.in_memory import InMemoryEncoder

LOG = "dejavu_exp.log"
OWN_PROCESSES = "trainer.devices=1"
"""Where a call says nothing else: a program that calls this may not want to be several processes."""


@dataclass(frozen=True)
class Measurement:
    """What came out of `measure`.

    Attributes:
        folder: with all files that a run of the command line leaves behind.
        figures: what figures.json holds.
    """

    folder: Path
    figures: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """Whether memorization is shown, in words."""
        return str(self.figures["verdict"])

    @property
    def reference(self) -> str:
        """The first reference: the one that verdict and gaps are told of."""
        return str(self.figures["headline"])

    @property
    def gap(self) -> Estimate | None:
        """How much more the encoder infers of target rows than the reference, a share of rows; None without any."""
        return _estimate(gate.headline_gaps(self.figures)[0])

    @property
    def corrected_gap(self) -> Estimate | None:
        """The same less what it infers of rows that it never saw; None without unseen rows."""
        return _estimate(gate.headline_gaps(self.figures)[1])

    @property
    def passed(self) -> bool | None:
        """Whether the release gate lets the model through; None where gate.max_gap sets none."""
        judged = self.figures["gate"]
        return None if judged is None else bool(judged["passed"])

    @cached_property
    def scores(self) -> pl.DataFrame:
        """Every row of every reference, columns of `tables.SCORES` or `tables.OBJECT_SCORES`."""
        return pl.read_parquet(self.folder / "scores.parquet")


def _estimate(found: Mapping[str, Any] | None) -> Estimate | None:
    if found is None:
        return None
    value, low, high = (math.nan if found[key] is None else float(found[key]) for key in ("value", "low", "high"))
    return Estimate(value, low, high, found["n_used"], found["n_excluded"])


def measure(
    *overrides: str,
    out: str | Path,
    settings: Mapping[str, object] | None = None,
    encoder: nn.Module | None = None,
    transform: Callable[[Image.Image], Tensor] | None = None,
) -> Measurement:
    """Measure one encoder, as `python -m dejavu_exp` does, in this process.

    Args:
        overrides: as on the command line, e.g. "model=clip_vitb32", "reference=[naive_bayes,class_prior]".
        out: folder of the results; what an earlier measurement left there is replaced. What a run of the command line
            prints goes into dejavu_exp.log in it.
        settings: the same as values of Python, which need no quotes: {"dataset.path": Path("my images.csv"),
            "probe.k": 50, "reference": ["naive_bayes", "class_prior"]}. They come after the overrides.
        encoder: a network to measure instead of `model=`, from (B, 3, H, W) to (B, dim). It is copied, and measured in
            evaluation mode and float32.
        transform: an RGB image to the (3, H, W) float32 tensor that `encoder` takes.

    Returns:
        The verdict, the figures and the scores.

    Raises:
        DejavuError: the settings cannot work, or data or weights are missing; the message names the key and a way out.
    """
    given = [*overrides, *(f"{key}={_spelled(value)}" for key, value in (settings or {}).items())]
    folder = Path(out).absolute()
    held = _in_memory(given, encoder, transform)
    resolved, _ = config.compose([OWN_PROCESSES, *given])
    if resolved.pop("run")["plan"]:
        raise ConfigError("run.plan=true measures nothing. Use `python -m dejavu_exp run.plan=true ...`.")
    # Imported here: torch takes seconds, and a value that cannot work must not wait for it.
    from dejavu_exp import pipeline, ranks
    from dejavu_exp.stages import Plan

    if ranks.place().size > 1:
        raise ConfigError(
            "measure() is one process, and torchrun or srun has started several. Use `python -m dejavu_exp`, or start "
            "one; trainer.devices=N then starts the others."
        )
    if held is not None:
        resolved["model"] = held.as_config()
        plan = Plan(**{**config.build({**resolved, "model": None}), "model": held})
    else:
        plan = Plan(**config.build(resolved))
    if held is not None and plan.trainer.device_count > 1:
        raise ConfigError(
            f"trainer.devices={plan.trainer.device_count}: an encoder that is only in memory cannot be had by other "
            "processes. Set trainer.devices=1, or name it by model=callable."
        )
    joined = ranks.joined(plan.trainer.device_count, plan.trainer.cache)
    with safety.written_safely(), _told(folder, None if held else given), joined:
        return Measurement(folder, pipeline.run(plan, folder, resolved))


def _in_memory(
    given: Sequence[str], encoder: nn.Module | None, transform: Callable[[Image.Image], Tensor] | None
) -> InMemoryEncoder | None:
    """The encoder that was passed, ready to be measured; None where the settings name one."""
    if encoder is None:
        if transform is not None:
            raise ConfigError("transform is given without encoder. An encoder that is named by model= has its own.")
        return None
    named = [word for word in given if word.lstrip("+~").startswith(("model=", "model.", "model/"))]
    if named:
        raise ConfigError(f"{named[0]}: the encoder is given twice, as encoder=... and by a setting. Leave one out.")
    from dejavu_exp.encoders.in_memory import InMemoryEncoder

    return InMemoryEncoder.of(encoder, transform)


@contextlib.contextmanager
def _told(folder: Path, given: Sequence[str] | None) -> Iterator[None]:
    """Keep status.json and a log of what a run says.

    Args:
        folder: of the run.
        given: what repeats the run on a command line; None where nothing does, and then there is no status.json.
    """
    log = folder / LOG
    repeatable = (f"hydra.run.dir={folder}", OWN_PROCESSES, *(given or ()))
    status = Status.here(State.RUNNING, "dejavu_exp", repeatable, False, log)

    def tell(found: Status) -> None:
        if given is not None:
            found.write(folder)

    tell(status)
    tables.write_text("", log)  # makes the folder, or says why it cannot be
    try:
        with log.open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            yield
    except BaseException as error:
        tell(status.ends(State.FAILED, f"{type(error).__name__}: {error}"))
        raise
    tell(status.ends(State.FINISHED))


def _spelled(value: object) -> str:
    """A value in the grammar of the command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_spelled(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_spelled, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return _quoted(str(value))
    raise ConfigError(
        f"settings: {value!r} is a {type(value).__name__}; expected text, a path, a number, true or false, "
        "None, a list or a dict."
    )


def _quoted(text: str) -> str:
    """Text in quotes. Backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"
