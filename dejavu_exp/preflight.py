"""What a run would need, found out without doing it: missing files, images, device hours, disk and memory.

Nothing is estimated without a measurement or a formula shown. Times are measured by the run's own code, on the device
that the run would use, with a few of the run's own images: a start and a time a view, from two sizes.
"""

from __future__ import annotations

import logging
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from glob import glob
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from dejavu_exp import crops, stages
from dejavu_exp.captions import Caption
from dejavu_exp.encoders import (
    CallableEncoder,
    CheckpointEncoder,
    DetectorEncoder,
    HuggingFaceEncoder,
    LoadedEncoder,
    OpenClipEncoder,
    SentenceEncoder,
    TimmEncoder,
    TorchScriptEncoder,
    ZeroShotEncoder,
)
from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import BOTH
from dejavu_exp.encoders.checkpoints import FORMATS
from dejavu_exp.encoders.open_clip_models import URL_CACHE
from dejavu_exp.encoders.text_encoders import PACKAGE
from dejavu_exp.errors import DejavuError, WeightsError
from dejavu_exp.references.base import Reference
from dejavu_exp.references.crop_classifier import CropClassifier
from dejavu_exp.references.knn import KnnReference
from dejavu_exp.stages import Plan, Views
from dejavu_exp.tables import Role, Status
from dejavu_exp.training import Job, TrainedHere, TrainingInputs, fit, load_if_ready

BUDGET_SECONDS = 4.0
"""How long the larger of two timed samples may take, about."""
SMALL_SAMPLE = 16
"""Views of the smaller sample on a CPU; on a GPU it is as large as a run's first batches."""
LARGE_SAMPLE = 512
"""Views of the larger sample on a CPU at most."""
TRAINING_BATCH = 64
"""Views of a timed training step on a CPU at most, where time grows with the views; a GPU gets the recipe's batch."""
WIDTH = 120
"""Columns assumed where the output is a file."""


@dataclass(frozen=True)
class Line:
    """Seconds as a start and a slope, both measured.

    Attributes:
        start: seconds of a call, whatever its size.
        each: seconds a view.
    """

    start: float
    each: float

    def seconds(self, views: int, calls: int = 1) -> float:
        """Of `calls` calls with `views` views together.

        >>> Line(start=2.0, each=0.5).seconds(views=10, calls=3)
        11.0
        """
        return calls * self.start + views * self.each


@dataclass(frozen=True)
class Work:
    """A step of device work.

    Attributes:
        network: what works.
        step: "train" or "embed".
        views: that pass through it, over all epochs where it is trained.
        cached: how many of them are done already; None where that cannot be known.
        calls: runs over data that are not in the cache whole.
        line: of one call on `devices` devices; None where nothing was measured.
        devices: that share the step.
        note: how the time was measured, or why not.
    """

    network: str
    step: str
    views: int
    cached: int | None
    calls: int
    line: Line | None
    devices: int
    note: str

    @property
    def hours(self) -> float | None:
        """From start to end, where all devices do equal parts; None where nothing was measured."""
        todo = self.views - (self.cached or 0)
        if not todo:
            return 0.0
        return None if self.line is None else self.line.seconds(todo, self.calls) / 3600

    @property
    def device_hours(self) -> float | None:
        """Hours times devices."""
        return None if self.hours is None else self.hours * self.devices


@dataclass(frozen=True)
class Amount:
    """Bytes that something takes, with the formula; None where it could not be measured."""

    name: str
    size: int | None
    formula: str


@dataclass(frozen=True)
class Survey:
    """What a run would need.

    Attributes:
        missing: what keeps the run from being done, one sentence each; empty where nothing does.
        counts: by role: images, and usable views of the query or the bank.
        work: device work, in the order of the run.
        disk: what the run writes.
        memory: what the run holds at its peak.
        free_disk: bytes free where the cache is.
        free_memory: bytes that processes can have without swapping; None where the system does not tell.
        device: "cpu" or "cuda".
    """

    missing: tuple[str, ...]
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    work: tuple[Work, ...] = ()
    disk: tuple[Amount, ...] = ()
    memory: tuple[Amount, ...] = ()
    free_disk: int | None = None
    free_memory: int | None = None
    device: str = "cpu"


def missing(plan: Plan) -> list[str]:
    """All that keeps a run from being done, as far as can be seen without reading images or weights.

    Published weights count as missing where no local cache has them: a node without network could not fetch them.

    Returns:
        A sentence each, naming key, value and the way out.
    """
    with _offline():
        return _missing(plan)


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched: weights of gigabytes are no matter for a survey."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _missing(plan: Plan) -> list[str]:
    tagger = _AskedTagger()
    checks: list[Callable[[], object]] = [
        plan.model.check,
        partial(plan.probe.check_encoder, plan.model, "model"),
        *(partial(reference.check, tagger, plan.model, plan.probe) for reference in plan.references.values()),
    ]
    told = [_fault(check) for check in checks]
    parts: dict[str, object] = {"model": plan.model}
    if plan.scoring.needs_tags or tagger.asked:
        told.append(_fault(plan.tagger.check))
        parts["tagger"] = plan.tagger
    parts |= {f"references.{name}": reference for name, reference in plan.references.items()}
    found = _absent_files("dataset", plan.dataset) + _absent_files("split", plan.split)
    for key, part in parts.items():
        for where, encoder in _encoders(key, part):
            looks = next(looks for kind, looks in PUBLISHED.items() if isinstance(encoder, kind))
            found += [_fault(partial(look, where, encoder, plan)) for look in looks]
    # Of two sentences on one key the first stays, which does not blame a network that was not asked.
    heads = {sentence.partition("=")[0] for sentence in found}
    found += [sentence for sentence in told if sentence.partition("=")[0] not in heads]
    return list(dict.fromkeys(sentence for sentence in found if sentence))


def _fault(check: Callable[[], object]) -> str:
    """What a check says; an empty text where it finds nothing."""
    try:
        check()
    except DejavuError as error:
        return str(error)
    return ""


class _AskedTagger:
    """In the tagger's place while references check themselves: notes whether they need one, and finds no fault."""

    encoder = None

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        self.asked = True

    def tag(self, *_: object) -> pl.DataFrame:
        raise NotImplementedError("stands in for checks only")


def _absent_files(key: str, part: Any) -> list[str]:  # noqa: ANN401 - any frozen dataclass
    """A sentence for each file or folder that a part names and that is not there."""
    found = []
    for item in fields(part):
        value = getattr(part, item.name)
        if value is None or not ("Path" in str(item.type) or str(value).endswith(".npy")):
            continue
        path = Path(value).expanduser()
        if not path.exists() and not glob(str(path), recursive=True):
            found.append(
                f"{key}.{item.name}={value}: there is no such file or folder. Give the path where it lies with "
                f"{key}.{item.name}=PATH, or choose another {key}; dataset=shapes is embedded."
            )
    return found


def _encoders(key: str, part: object) -> Iterator[tuple[str, object]]:
    """The encoders that a part holds, with their places in the configuration."""
    if isinstance(part, tuple(PUBLISHED)):
        yield key, part
    elif is_dataclass(part):
        for item in fields(part):
            yield from _encoders(f"{key}.{item.name}", getattr(part, item.name))


def _in_hub_cache(repository: str, files: Sequence[str]) -> bool:
    """True where one of the files is cached."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = repository.partition("@")
    return any(isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str) for file in files)


def _in_torch_cache(file: str) -> bool:
    import torch

    return (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file()


NOT_CACHED = "not in the local cache"


def _check_timm(key: str, encoder: TimmEncoder, plan: Plan) -> None:
    import timm

    if encoder.weights != sources.HUB or not timm.is_model(encoder.arch):
        return
    overlay = encoder.arch_args.get("pretrained_cfg_overlay")
    try:
        published = timm.models.resolve_pretrained_cfg(encoder.arch, pretrained_cfg_overlay=overlay)
    except (RuntimeError, TypeError):
        return  # There are no weights of this name, which the encoder's own check says.
    if published.file:
        there, name = Path(published.file).is_file(), str(published.file)
    elif published.hf_hub_id:
        files = ("model.safetensors", "pytorch_model.bin")
        named = (published.hf_hub_filename,) if published.hf_hub_filename else files
        there, name = _in_hub_cache(published.hf_hub_id, named), str(published.hf_hub_id)
    else:
        there, name = _in_torch_cache(str(published.url).rpartition("/")[2]), str(published.url)
    if not there and (published.file or published.hf_hub_id or published.url):
        raise sources.hub_error(name, NOT_CACHED, f"{key}.weights")


def _check_tokenizer(key: str, encoder: OpenClipEncoder | ZeroShotEncoder, plan: Plan) -> None:
    import open_clip

    asked = isinstance(encoder, ZeroShotEncoder) or "texts" in plan.probe.reads
    if not asked or encoder.arch_config is not None or encoder.arch not in open_clip.list_models():
        return
    tokenizer = open_clip.get_model_config(encoder.arch)["text_cfg"].get("hf_tokenizer_name")
    if tokenizer and not _in_hub_cache(tokenizer, ("tokenizer.json", "tokenizer_config.json")):
        raise WeightsError(
            f"{key}.arch={encoder.arch}: its tokenizer {tokenizer} is {NOT_CACHED}. Connect to the network once, so "
            "that it lands there, or choose an arch with open_clip's own tokenizer, e.g. ViT-B-32-quickgelu."
        )


def _check_open_clip(key: str, encoder: OpenClipEncoder | ZeroShotEncoder, plan: Plan) -> None:
    import open_clip

    published = open_clip.get_pretrained_cfg(encoder.arch, encoder.pretrained) if encoder.pretrained else {}
    if encoder.weights != sources.HUB or not published:
        return
    name = f"{encoder.arch} {encoder.pretrained}"
    if "file" in published:
        there = Path(published["file"]).is_file()
    elif published.get("hf_hub"):
        repository, _, file = published["hf_hub"].rpartition("/")
        files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        if file.endswith((".bin", ".pth")):
            files.append(f"{file.rpartition('.')[0]}.safetensors")
        there, name = _in_hub_cache(repository, files), f"{name} ({repository})"
    else:
        url = str(published.get("url"))
        there, name = (URL_CACHE.expanduser() / url.rpartition("/")[2]).is_file(), f"{name} ({url})"
    if not there:
        raise sources.hub_error(name, NOT_CACHED, f"{key}.weights")


def _check_checkpoint(key: str, encoder: CheckpointEncoder, plan: Plan) -> None:
    published = FORMATS[encoder.format]
    url = published.backbone_url if encoder.layer == "backbone" else published.full_url
    if encoder.weights == sources.HUB and not _in_torch_cache(f"{encoder.format}_{url.rpartition('/')[2]}"):
        raise sources.hub_error(url, NOT_CACHED, f"{key}.weights")


def _check_folder(key: str, encoder: DetectorEncoder | SentenceEncoder, plan: Plan) -> None:
    """A model that is a folder, in the hub's cache or elsewhere."""
    from huggingface_hub import errors, snapshot_download

    if encoder.model.startswith(PACKAGE) or Path(encoder.model).expanduser().is_dir():
        return
    try:
        folder = Path(snapshot_download(encoder.model, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        folder = None
    if folder is None or not any(folder.rglob("*.safetensors")):
        raise WeightsError(
            f"{key}.model={encoder.model}: {NOT_CACHED}. Connect to the network once, so that it lands there, or give "
            f"the path of a folder with {key}.model=PATH."
        )


def _check_own(key: str, encoder: CallableEncoder | HuggingFaceEncoder | TorchScriptEncoder, plan: Plan) -> None:
    """An encoder of the user's own: whatever it needs, its own check finds, which fetches nothing here."""
    encoder.check()


def _check_texts(key: str, encoder: HuggingFaceEncoder, plan: Plan) -> None:
    if "texts" in plan.probe.reads:
        encoder.check_texts()


PUBLISHED: Mapping[type, tuple[Callable[[str, Any, Plan], None], ...]] = {
    TimmEncoder: (_check_timm,),
    OpenClipEncoder: (_check_open_clip, _check_tokenizer),
    ZeroShotEncoder: (_check_open_clip, _check_tokenizer),
    CheckpointEncoder: (_check_checkpoint,),
    DetectorEncoder: (_check_folder,),
    SentenceEncoder: (_check_folder,),
    TorchScriptEncoder: (_check_own,),
    CallableEncoder: (_check_own,),
    HuggingFaceEncoder: (_check_own, _check_texts),
}
"""What finds out, by raising WeightsError, that published parts of an encoder are in no local cache."""


@dataclass(frozen=True)
class Use:
    """A network and all that a run passes through it.

    Attributes:
        network: its name here.
        load: gives it; where it is trained first, as a rehearsal.
        asked: tables of views, one a call of `Extractor.embed`.
        networks: how many such networks do the same.
        lookup: False where what is in the cache cannot be told from this network, only its time.
    """

    network: str
    load: Callable[[], LoadedEncoder]
    asked: tuple[pl.DataFrame, ...]
    networks: int = 1
    lookup: bool = True


def survey(plan: Plan) -> Survey:
    """Count, time and add up what a run would do. Every image file is read once, as the run itself does.

    Args:
        plan: the run.

    Returns:
        Where files of the data set are missing, what is missing and no more; where weights are missing, all but the
        times of those networks.
    """
    holes = missing(plan)
    if any(hole.startswith(("dataset", "split")) for hole in holes):
        return Survey(tuple(holes))
    try:
        # To look for copies takes minutes; what it would take out changes little of the cost.
        views = stages.prepare(replace(plan, leaks=replace(plan.leaks, near=False, embeddings=False)))
        if not (plan.scoring.needs_tags and plan.tagger.encoder is not None):
            views = stages.name_truth(plan, views)
        lessons = stages.training_inputs(plan, views)
    except DejavuError as error:
        return Survey((*holes, str(error)))
    with tempfile.TemporaryDirectory() as name, _quietly(), _offline():
        desk = _Desk(plan, views, Path(name), cast(Any, _Rehearsal)(**vars(lessons), folder=Path(name)))
        for use in _uses(desk):
            desk.take(use)
    free = shutil.disk_usage(_existing(plan.trainer.cache)).free
    disk = desk.disk()
    needed = sum(amount.size or 0 for amount in disk)
    if needed > free:
        holes.append(
            f"trainer.cache={plan.trainer.cache}: the run writes {_bytes(needed)} there, and {_bytes(free)} are free. "
            "Free some space, or name another disk with trainer.cache=PATH."
        )
    return Survey(
        tuple(holes),
        _counts(views),
        tuple(desk.rehearsal.work + desk.work),
        disk,
        desk.memory(),
        free,
        _free_memory(),
        plan.trainer.device,
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the timed pieces say of themselves, such as a learning rate, which would not be the run's."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _counts(views: Views) -> dict[str, tuple[int, int]]:
    """By role: images, and usable views."""
    usable = pl.concat([views.queries, views.bank]).filter(pl.col("status") == Status.OK)
    found = {}
    for role in Role:
        images = views.rows.filter(pl.col("role") == role)
        shown = images.filter(pl.col("status") == Status.OK) if role == Role.SHARED else usable
        found[str(role)] = (len(images), len(shown.filter(pl.col("role") == role)))
    return found


def _uses(desk: _Desk) -> list[Use]:
    """Every network of the run, in the run's order."""
    plan, views = desk.plan, desk.views
    whole = crops.views(views.rows.filter(pl.col("role") != Role.SHARED), crops.FullImage())
    found = []
    if plan.scoring.needs_tags and plan.tagger.encoder is not None:
        found.append(Use("tagger", plan.tagger.encoder.load, (whole.filter(pl.col("status") == Status.OK),)))
    exam = _exam(plan, views)
    found.append(Use("encoder under test", desk.encoder, (views.measured(), views.public(), *exam)))
    if exam and plan.utility.zero_shot and isinstance(plan.model, OpenClipEncoder):
        found.append(Use("zero-shot classes", desk.encoder, (exam[0],), lookup=False))
    for name, reference in plan.references.items():
        found += _of_reference(desk, f"references.{name}", reference)
    return found


def _exam(plan: Plan, views: Views) -> list[pl.DataFrame]:
    """What the encoder's usefulness is measured on besides: whole unseen images, and their captions.

    Of more than `utility.max_test` rows others may be drawn, as many.
    """
    rows = views.rows.filter(pl.col("role") == Role.UNSEEN)
    images = crops.views(rows, crops.FullImage())
    usable = images.filter(pl.col("status") == Status.OK).sort("view_id")
    found = []
    labelled = plan.probe.bank == crops.FullImage() and not views.public()["label"].null_count()
    if labelled and (plan.utility.knn or plan.utility.linear_probe or plan.utility.zero_shot):
        known = pl.col("label").is_in(views.public()["label"].unique().implode())
        found.append(usable.filter(known).head(plan.utility.max_test))
    if plan.model.reads == BOTH and plan.utility.retrieval:
        texts = crops.views(rows, Caption()).filter(pl.col("status") == Status.OK)
        pairs = texts.filter(pl.col("id").is_in(usable["id"].implode())).head(plan.utility.max_test)
        found += [pairs, usable.filter(pl.col("id").is_in(pairs["id"].implode()))]
    return [part for part in found if len(part)]


def _of_reference(desk: _Desk, name: str, reference: Reference) -> list[Use]:
    """The networks of a reference; none where it needs none, or none but the tagger."""
    tagger = _AskedTagger()
    _fault(lambda: reference.check(tagger, desk.plan.model, desk.plan.probe))
    encoder = desk.plan.tagger.encoder
    measured, heldout = desk.views.measured(), desk.views.heldout()
    if tagger.asked and encoder is not None:
        lessons = heldout.clear() if getattr(reference, "frequencies", None) else heldout
        return [Use(f"{name}: tagger", encoder.load, (pl.concat([lessons, measured]),))]
    if isinstance(reference, CropClassifier):
        return [Use(name, lambda: reference.train(desk.rehearsal)[0], (measured,), reference.seeds)]
    if isinstance(reference, KnnReference):
        return [Use(name, lambda: desk.second(reference), desk.shown(reference, measured))]
    return []


@dataclass(frozen=True)
class _Rehearsal(TrainingInputs):
    """Training inputs that time a few steps of a job in its place; weights that are there already are taken.

    Attributes:
        folder: for what is trained here, which nobody may use.
        work: gets what each job would take.
        sizes: gets the bytes that each job would leave on disk, and how that was counted.
    """

    folder: Path = Path()
    work: list[Work] = field(default_factory=list)
    sizes: list[Amount] = field(default_factory=list)

    def run(self, job: Job, epoch: int | None = None) -> Path:
        """See `TrainingInputs.run`: the folder of weights of the right shapes."""
        until = epoch or job.recipe.epochs
        parts = self.settings.devices * self.settings.accumulate
        batch = min(job.recipe.batch_size, len(job.views) // parts * parts)
        views = until * (len(job.views) // max(batch, 1) * batch + len(job.validation))
        ready = self._ready(job, until)
        if ready is not None:
            self.work.append(Work(job.title, "train", views, views, 0, None, self.settings.devices, "in the cache"))
            return ready
        line, folder, note = self._time(job, batch, parts)
        if job.patience is not None:
            note = f"{note}; at most: it may stop early"
        self.work.append(Work(job.title, "train", views, 0, 1, line, self.settings.devices, note))
        self.sizes.append(self._size(job, folder, until))
        return folder

    def _ready(self, job: Job, until: int) -> Path | None:
        """The weights of an earlier run."""
        folder = self.cache / "trained" / fit.key_of_job(job, self.settings, self.device)
        if job.validation.is_empty():
            weights = fit.folder_of(folder, until)
            return weights if weights.exists() else None
        return folder / fit.BEST if (folder / fit.DONE).exists() else None

    def _time(self, job: Job, batch: int, parts: int) -> tuple[Line, Path, str]:
        """Seconds a view of real steps, and where weights of the network lie."""
        if self.device == "cpu":
            batch = min(batch, max(TRAINING_BATCH // parts * parts, parts))
        numbers = count()
        recipe = replace(cast(Any, job.recipe), batch_size=batch)

        def train(views: int) -> Path:
            folder = self.folder / f"{len(self.work)}-{next(numbers)}"
            folder.mkdir()
            # No validation: its views are counted like those that are trained on, though they cost less.
            small = replace(job, recipe=recipe, views=job.views[:views], validation=job.validation.clear())
            small = replace(small, patience=None, title=f"timing: {job.title}")
            fit.fit(small, self.settings, self.store, self.device, folder, until=1)
            return folder

        most = len(job.views) // batch * batch
        line, folder = _measure(train, min(2 * batch, most), most, batch)
        return line, fit.folder_of(folder, 1), f"steps of {batch} views, timed on {self.device}"

    def _size(self, job: Job, folder: Path, until: int) -> Amount:
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        every = self.settings.checkpoint_every
        kept = 1 if every is None or not job.validation.is_empty() else -(-until // every)
        last = folder.parent / fit.LAST
        resume = last.stat().st_size if last.exists() else 0
        formula = f"{kept} x {_bytes(weights)} of weights + {_bytes(resume)} to resume from, as written when timed"
        return Amount(job.title, kept * weights + resume, formula)


class _Desk:
    """Where the survey's sums are done.

    Args:
        plan: the run.
        views: its views.
        folder: for temporary caches.
        rehearsal: takes the place of training.
    """

    def __init__(self, plan: Plan, views: Views, folder: Path, rehearsal: _Rehearsal) -> None:
        self.plan, self.views, self.folder, self.rehearsal = plan, views, folder, rehearsal
        self.work: list[Work] = []
        self.sizes: list[Amount] = []
        self.held: dict[str, tuple[int, int]] = {}
        """By network: rows of its largest two calls, and columns."""
        self._numbers = count()

    def encoder(self) -> LoadedEncoder:
        """The encoder under test, or one of its architecture where it has to be trained."""
        found = load_if_ready(self.plan.model)
        return found or cast(TrainedHere, self.plan.model).train(self.rehearsal)

    def second(self, reference: KnnReference) -> LoadedEncoder:
        """A reference's own encoder, likewise."""
        if reference.is_trained:
            return reference.train(self.rehearsal)[0]
        return cast(Any, reference.encoder).load()  # type: ignore[no-any-return]

    def shown(self, reference: KnnReference, measured: pl.DataFrame) -> tuple[pl.DataFrame, ...]:
        """The views that a reference is asked about, and its bank."""
        # Of these inputs only the views are looked at.
        nothing = cast(Any, None)
        inputs = stages.reference_inputs(self.plan, self.views, nothing, nothing, self.rehearsal)
        own, other = self.plan.probe, reference.probe or self.plan.probe
        queries = [measured] if reference.directions == "one" else [measured, self.views.heldout()]
        asked = [inputs.shown(part, own.query, other.query) for part in queries]
        return (*asked, inputs.shown(self.views.public(), own.bank, other.bank))

    def take(self, use: Use) -> None:
        """Load a network, time it, and note what the run would pass through it."""
        loaded: LoadedEncoder | None = None
        why = ""
        try:
            loaded = use.load()
        except DejavuError as error:
            why = str(error)
        for what in ("images", "texts"):
            asked = [part for part in use.asked if len(part) and (what == "texts") == (not part["texts"].null_count())]
            name = use.network if what == "images" else f"{use.network}, texts"
            if asked and loaded is not None:
                self._time(replace(use, network=name, asked=tuple(asked)), loaded.reading(what))
            elif asked:
                views = use.networks * sum(map(len, asked))
                calls, note = use.networks * len(asked), f"not measured: {why.partition(':')[0]}"
                self.work.append(Work(name, "embed", views, None, calls, None, self._devices, note))

    @property
    def _devices(self) -> int:
        return self.plan.trainer.device_count

    def _time(self, use: Use, encoder: LoadedEncoder) -> None:
        trainer, total = self.plan.trainer, use.networks * sum(map(len, use.asked))
        cached = [self._cached(encoder, part) for part in use.asked] if use.lookup else [None] * len(use.asked)
        known = None if None in cached else use.networks * sum(found or 0 for found in cached)
        everything = pl.concat(use.asked).unique("view_id", maintain_order=True)
        line, size, width = self._embedding(encoder, everything)
        calls = use.networks * sum(found != len(part) for found, part in zip(cached, use.asked, strict=True))
        shared = Line(line.start, line.each / self._devices)
        note = f"{encoder.description.partition(',')[0]}, timed on {trainer.device}"
        self.work.append(Work(use.network, "embed", total, known, calls, shared, self._devices, note))
        todo = total - (known or 0)
        formula = f"{todo} views x {size:.0f} bytes, as written when timed"
        self.sizes.append(Amount(f"embeddings, {use.network}", round(todo * size), formula))
        self.held[use.network] = (sum(sorted(map(len, use.asked))[-2:]), width)

    def _cached(self, encoder: LoadedEncoder, views: pl.DataFrame) -> int:
        """How many views of a request are embedded already."""
        # Asked of another cache, for asking writes down what is asked for.
        elsewhere = self.folder / "requests"
        shards = replace(self.plan.trainer, cache=elsewhere).requested(encoder, views)
        there = replace(shards, folder=self.plan.trainer.cache / shards.folder.relative_to(elsewhere))
        return there.rows - there.missing_count()

    def _embedding(self, encoder: LoadedEncoder, views: pl.DataFrame) -> tuple[Line, float, int]:
        """Seconds a view, bytes a view on disk, and columns."""
        trainer, store = self.plan.trainer, self.views.manifest.store
        on_gpu = trainer.device == "cuda"
        # On a CPU, decoding in processes of its own takes from the network what it gains.
        workers = trainer.workers if on_gpu else 0
        small = 20 * trainer.batch_size if on_gpu else SMALL_SAMPLE

        def embed(rows: int) -> tuple[float, int]:
            cache = self.folder / f"embeddings-{next(self._numbers)}"
            sample = views[np.unique(np.linspace(0, len(views) - 1, rows).astype(int))]
            timer = replace(trainer, cache=cache, devices=1, workers=workers)
            width = timer.embed(encoder, sample, store, "timing: embedding").width
            written = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
            shutil.rmtree(cache)
            return written / rows, width

        most = min(len(views), 10 * small if on_gpu else LARGE_SAMPLE)
        line, (size, width) = _measure(embed, min(small, most), most)
        return line, size, width

    def disk(self) -> tuple[Amount, ...]:
        """What the run writes."""
        return (*self.rehearsal.sizes, *self.sizes)

    def memory(self) -> tuple[Amount, ...]:
        """What the run holds at its peak."""
        found = [Amount("process with networks", _peak(), "the largest so far, measured while timing")]
        if self.held:
            name, (rows, width) = max(self.held.items(), key=lambda item: item[1][0] * item[1][1])
            formula = f"2 x 4 bytes x {rows} views x {width} columns ({name}), where they are read whole, with a copy"
            found.append(Amount("embeddings", 2 * 4 * rows * width, formula))
            piece = min(self.plan.trainer.search_mb * 10**6, 4 * rows * width)
            formula = f"4 bytes x views x columns, in a search; trainer.search_mb={self.plan.trainer.search_mb} at most"
            found.append(Amount("a piece of the bank", piece, formula))
        measured, labels = len(self.views.measured()), _labels(self.views)
        if labels:
            formula = f"3 x 8 bytes x {measured} rows x {labels} labels: the encoder's, one reference's, and a copy"
            found.append(Amount("evidence", 3 * 8 * measured * labels, formula))
        else:
            found.append(Amount("evidence", None, "3 x 8 bytes x rows x objects, which only the tagger can tell"))
        if self.plan.trainer.device == "cuda":
            import torch

            found.append(
                Amount("on the GPU", torch.cuda.max_memory_allocated(), "the largest so far, measured while timing")
            )
        return tuple(found)


def _measure(run: Callable[[int], Any], small: int, most: int, step: int = 1) -> tuple[Line, Any]:
    """Seconds of a call as a line through two sizes, after a first call that warms up; and what the last one gave.

    Args:
        run: of a number of views.
        small: views of the first size.
        most: views of the second size at most; it takes about `BUDGET_SECONDS`.
        step: the second size is a multiple of this away from the first.
    """

    def timed(views: int) -> tuple[float, Any]:
        start = time.perf_counter()
        found = run(views)
        return time.perf_counter() - start, found

    run(small)
    first, found = timed(small)
    more = min(max(int(BUDGET_SECONDS / first * small), step), most - small) // step * step
    if not more:
        return Line(0.0, first / small), found
    second, found = timed(small + more)
    each = (second - first) / more
    # Noise larger than the difference: all of it counts as time a view, which is too much and never too little.
    if each <= 0:
        return Line(0.0, second / (small + more)), found
    return Line(max(0.0, first - each * small), each), found


def _labels(views: Views) -> int:
    return len(views.labels()) if views.public()["truth"].null_count() < len(views.public()) else 0


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _free_memory() -> int | None:
    """Bytes that processes can have without swapping, as Linux tells; the limit of a job may be lower."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _bytes(size: float | None) -> str:
    """A size for people, in powers of 1,000.

    >>> _bytes(1_536_000), _bytes(None)
    ('1.54 MB', 'not known')
    """
    if size is None:
        return "not known"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def show(found: Survey, console: Console | None = None) -> None:
    """Print what is missing, what the run would look at, its device work, disk and memory."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for hole in found.missing:
        console.print(f"[red]Missing: {escape(hole)}[/]", highlight=False)
    if found.counts:
        told = (f"{role} {images} ({usable})" for role, (images, usable) in found.counts.items() if images)
        console.print(f"Images by role, and their usable views: {', '.join(told)}", highlight=False)
    if found.work:
        _show_work(found, console)
        _show_amounts("disk", found.disk, found.free_disk, console)
        _show_amounts("memory", found.memory, found.free_memory, console)
    console.print(_verdict(found), style="bold", highlight=False)


def _show_work(found: Survey, console: Console) -> None:
    table = Table("network", "step", *(_right(name) for name in WORK_COLUMNS), "how", box=None, header_style="bold")
    for work in found.work:
        cells = [f"{work.views:,}", "not known" if work.cached is None else f"{work.cached:,}"]
        timed = work.line
        cells += ["", ""] if timed is None else [f"{1000 * timed.each:.3g}", f"{work.calls} x {timed.start:.2f}"]
        cells.append("not known" if work.device_hours is None else f"{work.device_hours:.3g}")
        table.add_row(escape(work.network), work.step, *cells, escape(work.note))
    console.print(table)
    console.print(
        "Device hours = (views not in the cache x ms + calls x start) x devices; ms a view on all devices together. "
        "Neighbours, scores, bootstrap and report come on top.",
        style="dim",
        highlight=False,
    )


WORK_COLUMNS = ("views", "cached", "ms a view", "start, s", "device hours")


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _show_amounts(what: str, amounts: Sequence[Amount], free: int | None, console: Console) -> None:
    table = Table(what, _right("bytes"), "how", box=None, header_style="bold")
    for amount in amounts:
        table.add_row(escape(amount.name), _bytes(amount.size), escape(amount.formula))
    total = sum(amount.size or 0 for amount in amounts)
    table.add_row("together", _bytes(total), f"{_bytes(free)} free")
    console.print(table)


def _verdict(found: Survey) -> str:
    if found.missing:
        return f"{len(found.missing)} things are missing; the run would fail."
    hours = [work.device_hours for work in found.work]
    known = sum(value for value in hours if value is not None)
    unknown = f", and {hours.count(None)} steps that could not be measured" if None in hours else ""
    return f"Nothing is missing. Device work: {known:.3g} hours on {found.device}{unknown}."
