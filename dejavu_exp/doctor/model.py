"""The encoder of a configuration: are its weights there, and does it give what an embedding must be?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import Tensor

from dejavu_exp import config, crops, images, preflight, provenance
from dejavu_exp.datasets.shapes import Shapes
from dejavu_exp.doctor.findings import Examination
from dejavu_exp.encoders import LoadedEncoder
from dejavu_exp.errors import DejavuError
from dejavu_exp.images import ViewImages
from dejavu_exp.scoring import LabelInference
from dejavu_exp.splits import PerClassSplit
from dejavu_exp.stages import Plan
from dejavu_exp.tables import FloatArray, Role, Status
from dejavu_exp.training import TrainedHere

Inputs: TypeAlias = "Tensor | dict[str, Tensor]"

SAME = 1e-3
"""Largest difference, as a share of the embedding's length, that the order of float32 sums can explain."""
SAME_BFLOAT16 = 5e-2
"""The same under bfloat16 autocast."""
CONSTANT = 1e-4
"""Spread of embeddings around their mean, as a share of their length, below which they say nothing of the image."""
LINE = 2.0
"""Directions, counted by their variance, along which embeddings that are not collapsed differ."""
ENOUGH = 8
"""Images from which on the number of directions says something."""
LARGEST_INPUT = 30.0
"""No normalisation in use gives larger values; pixels as bytes do."""
TIMED_S = 1.0
"""Seconds that the network is timed for, at least."""
WORDS = ("a dog runs on the grass", "two red cars", "nothing", "an old house by the sea, and a boat " * 20)
"""Texts for a data set without captions; the last is longer than most text towers read."""


@dataclass(frozen=True)
class Trial:
    """What an encoder is given.

    Attributes:
        what: "images" or "texts".
        names: of the inputs.
        make: gives the network's inputs of some of them, by place.
        device: "cpu" or "cuda".
        autocast: whether bfloat16 autocast is used, as in the run.
    """

    what: str
    names: Sequence[str]
    make: Callable[[Sequence[int]], Inputs]
    device: str
    autocast: bool

    def answers(self, encoder: LoadedEncoder, places: Sequence[int]) -> Tensor:
        """The network's outputs, on the CPU."""
        made = self.make(places)
        inputs = made.to(self.device) if isinstance(made, Tensor) else {k: v.to(self.device) for k, v in made.items()}
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            outputs: Tensor = encoder.module(inputs)
        return outputs.float().cpu() if isinstance(outputs, Tensor) else outputs


def examine(overrides: Sequence[str], count: int) -> Examination:
    """Load the encoder of a configuration and embed a few images, and texts where the probe shows some.

    Args:
        overrides: as `python -m dejavu_exp` takes them.
        count: images, and texts, to embed.

    Raises:
        ConfigError: the configuration cannot work.
    """
    resolved, _ = config.compose(overrides)
    plan = Plan(**config.build(resolved))
    found = Examination("model", " ".join(overrides) or "the default configuration")
    # Only the encoder is looked at: other parts get values that need no file and no network.
    split = PerClassSplit(target=1, heldout=0, shared=0, public=1, unseen=0, min_side_px=1)
    alone = replace(plan, dataset=Shapes(), split=split, references={}, scoring=LabelInference())
    for hole in preflight.missing(alone):
        found.fault("weights", hole)
    if isinstance(plan.model, TrainedHere):
        found.note(
            "trained_here", "The encoder is trained here, by the run or beforehand; there are no weights to look at.",
            f"python -m dejavu_exp.train {' '.join(overrides)}".rstrip(),
        )  # fmt: skip
        return found
    if not found.findings:
        try:
            look(found, plan.model.load(), plan, count)
        except DejavuError as error:
            found.fault("load", str(error))
    return found


def look(found: Examination, encoder: LoadedEncoder, plan: Plan, count: int) -> None:
    """Look at a loaded encoder.

    Args:
        found: gets the findings.
        encoder: as loaded.
        plan: the run; gives images, device and precision.
        count: images, and texts, to embed.

    Raises:
        DejavuError: its text tower cannot be had.
    """
    trainer = plan.trainer
    found.facts |= {"encoder": encoder.description, "weights": encoder.weights, "weights hash": encoder.weights_hash}
    found.facts["device"] = f"{trainer.device}{', bfloat16 autocast' if trainer.autocast else ''}"
    if encoder.random:
        found.warn(
            "random", "The weights are random: no figure from them says anything of a trained model.",
            "Give the trained weights with model.weights=PATH, or model.weights=hub.",
        )  # fmt: skip
    rows, store = _rows(found, plan, count)
    widths = {}
    for what in sorted(plan.probe.reads):
        part = encoder.reading(what)
        part.module.to(trainer.device)
        _tell_module(found, part, what)
        maker = _images(found, part, plan, rows, store) if what == "images" else _texts(part, rows, count)
        if maker is not None:
            widths[what] = _tell_outputs(found, part, Trial(what, *maker, trainer.device, trainer.autocast))
    if None not in widths.values() and len(set(widths.values())) > 1:
        found.fault(
            "towers", f"Images have {widths['images']} columns and texts {widths['texts']}: they share no space.",
            "Choose an encoder whose towers were trained together.",
        )  # fmt: skip


def _rows(found: Examination, plan: Plan, count: int) -> tuple[pl.DataFrame, Any]:
    """Some rows of the run's own data set, or of the embedded one where that cannot be read; and their store."""
    try:
        manifest = plan.dataset.manifest()
    except DejavuError as error:
        found.note("stand_ins", f"Drawn shapes stand in for images of the data set, which cannot be read: {error}")
        manifest = Shapes().manifest()
    order = pl.Series(provenance.hash_orders(plan.seed, "doctor", manifest.rows["id"].to_list()))
    chosen = manifest.rows.with_columns(order=order).sort("order", "id").head(count).drop("order")
    return images.inspect(chosen.with_columns(role=pl.lit(str(Role.TARGET))), manifest.store), manifest.store


def _tell_module(found: Examination, encoder: LoadedEncoder, what: str) -> None:
    """What can be seen of a network without using it."""
    parameters = list(encoder.module.parameters())
    found.facts[f"parameters, {what}"] = sum(value.numel() for value in parameters)
    lost = [name for name, value in encoder.module.named_parameters() if not bool(value.isfinite().all())]
    # A mask of attention is a buffer of minus infinity, and right.
    lost += [name for name, value in encoder.module.named_buffers() if bool(value.isnan().any())]
    found.fault(
        "weights_not_finite", "The weights hold values that are NaN or infinite.",
        "Take an earlier checkpoint, or save the weights again in float32.", lost,
    )  # fmt: skip
    found.fault(
        "training_mode", "Parts of the network are in training mode: dropout and batch norm then depend on chance and "
        "on the other images.",
        "Call .eval() on the network before it is handed over.",
        [name or type(part).__name__ for name, part in encoder.module.named_modules() if part.training],
    )  # fmt: skip


Maker: TypeAlias = tuple[Sequence[str], Callable[[Sequence[int]], Inputs]]


def _images(found: Examination, encoder: LoadedEncoder, plan: Plan, rows: pl.DataFrame, store: Any) -> Maker | None:  # noqa: ANN401
    """Images as the run would pass them in; None where none can be made."""
    views = crops.views(rows, crops.FullImage()).filter(pl.col("status") == Status.OK)
    try:
        probe = encoder.transform(Image.new("RGB", (640, 480)))
    except Exception as error:  # the transform is anybody's code
        found.fault("transform", f"The transform fails on a picture of 640 x 480 px: {_told(error)}")
        return None
    if not isinstance(probe, Tensor) or probe.ndim != 3 or probe.dtype != torch.float32:
        found.fault(
            "transform", f"The transform gives {_form(probe)} and not a float32 tensor of shape (3, H, W).",
            "End it with ToTensor and Normalize.",
        )  # fmt: skip
        return None
    start = time.perf_counter()
    data = ViewImages.of(views, store, encoder.transform, plan.trainer.decoder)
    made = [data[row] for row in range(len(data))]
    found.facts["images a second, decoded by one process"] = len(made) / (time.perf_counter() - start)
    usable = [(name, pixels) for name, (_, pixels, why) in zip(views["id"], made, strict=True) if not why]
    found.warn(
        "unreadable", "Images cannot be read; `doctor data` says more.", "",
        [*rows.filter(pl.col("status") == Status.UNREADABLE)["detail"].drop_nulls(), *(why for *_, why in made if why)],
    )  # fmt: skip
    return _uniform(found, usable)


def _uniform(found: Examination, usable: Sequence[tuple[str, Tensor]]) -> Maker | None:
    """The inputs, where they have one form; None, and a fault, where they have not."""
    shapes = {tuple(pixels.shape) for _, pixels in usable}
    if len(usable) < 2:
        found.fault("no_images", "Fewer than two images can be read, so the network was not tried.", "Check the data.")
        return None
    if len(shapes) > 1:
        found.fault(
            "transform", f"The transform gives tensors of several sizes, {' and '.join(map(str, sorted(shapes)[:2]))}, "
            "which fit into no batch.",
            "Let it end with a crop, or a resize of both sides, to one size.",
        )  # fmt: skip
        return None
    pixels = torch.stack([pixels for _, pixels in usable])
    found.facts["input"] = f"{list(pixels.shape[1:])}, values from {pixels.min():.3g} to {pixels.max():.3g}"
    if not bool(pixels.isfinite().all()) or float(pixels.abs().max()) > LARGEST_INPUT:
        found.warn(
            "normalised",
            f"The transform gives values up to {float(pixels.abs().max()):.3g}: pixels are not normalised.",
            "Divide by 255 and use the mean and standard deviation that the network was trained with.",
        )  # fmt: skip
    return [name for name, _ in usable], lambda places: pixels[list(places)]


def _texts(encoder: LoadedEncoder, rows: pl.DataFrame, count: int) -> Maker:
    """Captions of the rows, or sentences of ours where there are none."""
    captions = rows["captions"].explode().drop_nulls().unique(maintain_order=True).head(count).to_list()
    texts = captions if len(captions) > 1 else list(WORDS)
    return texts, lambda places: encoder.transform([texts[place] for place in places])


def _tell_outputs(found: Examination, encoder: LoadedEncoder, trial: Trial) -> int | None:
    """Embed everything, twice and one by one; the columns, or None where there is no usable output."""
    everything = range(len(trial.names))
    try:
        values = trial.answers(encoder, everything)
    except Exception as error:  # the network is anybody's code
        found.fault(
            "forward", f"The network fails on {trial.what} that its own transform has made: {_told(error)}",
            "Check that the transform's size is the one the network was made for.",
        )  # fmt: skip
        return None
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(everything):
        found.fault(
            "output",
            f"The network gives {_form(values)} for {len(everything)} {trial.what}, and not one row for each.",
            "Pool the output to shape (B, D).",
        )  # fmt: skip
        return None
    bad = ~values.isfinite().all(dim=1)
    found.fault(
        "not_finite", f"Embeddings of {trial.what} are NaN or infinite.",
        "Check the weights, or set trainer.precision=float32.",
        [name for name, is_bad in zip(trial.names, bad.tolist(), strict=True) if is_bad],
    )  # fmt: skip
    if not bool(bad.any()):
        _tell_repeats(found, encoder, trial, values)
        _tell_spread(found, values.numpy().astype(np.float64), trial)
        _tell_speed(found, encoder, trial)
    return int(values.shape[1])


def _tell_repeats(found: Examination, encoder: LoadedEncoder, trial: Trial, values: Tensor) -> None:
    """Whether an embedding depends on chance, or on what else is in the batch."""
    limit = SAME_BFLOAT16 if trial.autocast else SAME
    again = trial.answers(encoder, range(len(values)))
    apart = _apart(values, again)
    if apart > limit:
        found.fault(
            "chance",
            f"The same batch of {trial.what} gives other embeddings each time, {apart:.2g} of their length apart.",
            "Switch off dropout and everything else that is random: call .eval() on the network.",
        )  # fmt: skip
        return
    found.facts[f"repeated call, {trial.what}"] = (
        "the same bits" if torch.equal(values, again) else f"{apart:.2g} apart"
    )
    alone = torch.cat([trial.answers(encoder, [place]) for place in range(min(len(values), ENOUGH))])
    apart = _apart(values[: len(alone)], alone)
    found.facts[f"alone or in a batch, {trial.what}"] = f"{apart:.2g} of the length apart"
    if apart > limit:
        found.fault(
            "batch", f"The embedding of one of the {trial.what} depends on what else is in the batch: alone it lies "
            f"{apart:.2g} of its length apart.",
            "Let batch norm use its stored statistics: call .eval() on the network.",
        )  # fmt: skip


def _apart(first: Tensor, second: Tensor) -> float:
    """Largest distance of two rows, as a share of the mean length of rows."""
    length = float(first.norm(dim=1).mean())
    return float((first - second).norm(dim=1).max()) / length if length else 0.0


def _tell_spread(found: Examination, values: FloatArray, trial: Trial) -> None:
    """Whether embeddings tell one input from another."""
    norms = np.linalg.norm(values, axis=1)
    spread, directions = _spread(values)
    found.facts |= {
        f"output, {trial.what}": f"{len(values)} x {values.shape[1]}, norms {norms.min():.3g} to {norms.max():.3g}",
        f"spread, {trial.what}": f"{spread:.3g} of the length, along {directions:.1f} directions",
        f"constant columns, {trial.what}": int((np.ptp(values, axis=0) == 0).sum()),
    }
    found.fault(
        "zero", f"Embeddings of {trial.what} are zero throughout.", "Check the layer that is read and the weights.",
        [name for name, norm in zip(trial.names, norms, strict=True) if norm == 0],
    )  # fmt: skip
    if spread < CONSTANT:
        found.fault(
            "constant", f"All {trial.what} have the same embedding (they spread by {spread:.2g} of its length).",
            "Check that the weights are the trained ones, and that the transform does not make all inputs alike.",
        )  # fmt: skip
    elif directions < LINE and min(len(values) - 1, values.shape[1]) >= ENOUGH:
        found.warn(
            "collapsed",
            f"Embeddings of {trial.what} differ along {directions:.1f} directions only: they have collapsed.",
            "Check that the weights are the trained ones, and which layer is read.",
        )  # fmt: skip


def _spread(values: FloatArray) -> tuple[float, float]:
    """Root mean square distance from the mean as a share of the length; and the effective number of directions.

    The latter is the exponential of the entropy of the shares of variance along the principal axes.
    """
    centred = values - values.mean(axis=0)
    length = float(np.sqrt((values**2).sum(axis=1).mean()))
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    if not length or not variances.sum():
        return 0.0, 0.0
    shares = variances[variances > 0] / variances.sum()
    directions = float(np.exp(-(shares * np.log(shares)).sum()))
    return float(np.sqrt((centred**2).sum(axis=1).mean())) / length, directions


def _tell_speed(found: Examination, encoder: LoadedEncoder, trial: Trial) -> None:
    """How fast the network is, without decoding and transform; the first calls above have warmed it up."""
    everything, calls, start = range(len(trial.names)), 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - start < TIMED_S:
        trial.answers(encoder, everything)  # ends on the CPU, so the device has done all of it
        calls += 1
    rate = calls * len(everything) / (time.perf_counter() - start)
    found.facts[f"{trial.what} a second, network on {trial.device}, {len(everything)} at a time"] = rate


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}."


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
