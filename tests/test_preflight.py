"""What a run would need: holes are all found, counts are exact, times are lines, and nothing is left behind."""

import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SMALL
from hydra import compose, initialize_config_dir
from rich.console import Console

from dejavu_exp import config, preflight, stages
from dejavu_exp.datasets.shapes import Shapes
from dejavu_exp.preflight import Line, Survey, Work

QUICK = (*SMALL, "trainer=cpu", "model.recipe.epochs=2")
OTHERS = tuple(setting for setting in QUICK if not setting.startswith("model."))
"""The same without what only the default network has."""


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., stages.Plan]:
    """Builds a plan; caches of published weights are empty folders."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(preflight, "URL_CACHE", tmp_path / "clip")
    monkeypatch.setattr(preflight, "BUDGET_SECONDS", 0.1)

    def build(*overrides: str) -> stages.Plan:
        config.register()
        with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
            cfg = compose("config", overrides=[f"trainer.cache={tmp_path / 'cache'}", *overrides])
        parts = config.build(config.resolve(cfg))
        return stages.Plan(**{name: parts[name] for name in stages.Plan.__dataclass_fields__})

    return build


def in_hub_cache(folder: Path, repository: str, *files: str) -> None:
    place = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a1")
    (place / "snapshots" / "a1").mkdir(parents=True)
    for file in files:
        (place / "snapshots" / "a1" / file).write_text("{}")


def heads(holes: list[str]) -> list[str]:
    return [hole.partition(":")[0] for hole in holes]


def test_all_holes_are_told_at_once(planned: Callable[..., stages.Plan], tmp_path: Path) -> None:
    plan = planned(
        "model=clip_vitl14",
        "dataset=imagenet",
        "split=imagenet_300",
        f"dataset.root={tmp_path / 'images'}",
        f"dataset.boxes={tmp_path / 'boxes'}",
        "tagger=rtdetr",
        "reference=[naive_bayes_authors,two_model]",
        f"references.naive_bayes_authors.frequencies={tmp_path / 'counts'}",
        "references.two_model.encoder={_target_: dejavu_exp.encoders.CheckpointEncoder, format: dino}",
    )
    told = preflight.missing(plan)
    assert heads(told) == [
        f"dataset.root={tmp_path / 'images'}",
        f"dataset.boxes={tmp_path / 'boxes'}",
        "cannot get the published weights ViT-L-14-quickgelu openai (timm/vit_large_patch14_clip_224.openai) (not in "
        "the local cache)",
        "tagger.encoder.model=PekingU/rtdetr_r50vd",
        "cannot get the published weights https",
        f"references.naive_bayes.frequencies={tmp_path / 'counts'}",
    ]
    assert "references.two_model.encoder.weights=PATH" in told[-2]
    assert preflight.survey(plan) == Survey(tuple(told))


def test_what_is_in_the_caches_is_not_missing(planned: Callable[..., stages.Plan], tmp_path: Path) -> None:
    timm = ("model=dinov2_vitl14", "reference=class_prior")
    (hole,) = preflight.missing(planned(*timm))
    repository = hole.split("weights ")[1].split(" ")[0]
    in_hub_cache(tmp_path, repository, "model.safetensors")
    assert preflight.missing(planned(*timm)) == []

    clip = ("model=clip_vitl14", "reference=class_prior")
    assert len(preflight.missing(planned(*clip))) == 1
    in_hub_cache(tmp_path, "timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")
    assert preflight.missing(planned(*clip)) == []

    checkpoint = ("model=vicreg_resnet50", "reference=class_prior")
    assert len(preflight.missing(planned(*checkpoint))) == 1
    for name in ("vicreg_resnet50.pth", "vicreg_resnet50_fullckpt.pth"):
        (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "torch" / "hub" / "checkpoints" / name).write_text("")
    assert preflight.missing(planned(*checkpoint)) == []

    detector = ("model=dinov2_vitl14", "tagger=rtdetr", "reference=naive_bayes")
    assert len(preflight.missing(planned(*detector))) == 1
    in_hub_cache(tmp_path, "PekingU/rtdetr_r50vd", "config.json", "model.safetensors")
    assert preflight.missing(planned(*detector)) == []
    # A tagger that no reference asks is not missed.
    assert preflight.missing(planned("tagger=owlv2", "reference=class_prior")) == []


def test_tokenizers_and_text_encoders_are_looked_for_too(planned: Callable[..., stages.Plan], tmp_path: Path) -> None:
    settings = (
        *("model=siglip", "dataset=shape_pairs", "split=shape_pairs", "probe=caption_to_image"),
        *("reference=text_gte_base", "tagger=dataset_objects", "scoring=object_inference"),
    )
    assert heads(preflight.missing(planned(*settings))) == [
        "cannot get the published weights ViT-B-16-SigLIP webli (timm/ViT-B-16-SigLIP) (not in the local cache)",
        "model.arch=ViT-B-16-SigLIP",
        "references.text_gte_base.encoder.model=thenlper/gte-base",
    ]
    in_hub_cache(tmp_path, "timm/ViT-B-16-SigLIP", "open_clip_model.safetensors", "tokenizer.json")
    in_hub_cache(tmp_path, "thenlper/gte-base", "modules.json", "model.safetensors")
    assert preflight.missing(planned(*settings)) == []


def test_a_name_that_nobody_published_is_told_once(planned: Callable[..., stages.Plan]) -> None:
    for model, key in (("dinov2_vitl14", "arch"), ("clip_vitl14", "pretrained")):
        (hole,) = preflight.missing(planned(f"model={model}", f"model.{key}=nothing", "reference=class_prior"))
        assert hole.startswith(f"model.{key}=nothing")


def test_missing_looks_at_no_image(planned: Callable[..., stages.Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(Shapes, "manifest", refuse)
    assert preflight.missing(planned(*QUICK)) == []


def test_a_survey_counts_exactly_and_leaves_nothing(planned: Callable[..., stages.Plan], tmp_path: Path) -> None:
    plan = planned(*QUICK, "reference=[naive_bayes,two_model,crop_classifier]", "references.two_model.directions=both")
    found = preflight.survey(plan)
    assert not list((tmp_path / "cache").rglob("*"))
    assert found.missing == ()
    assert found.counts == {
        "target": (24, 24),
        "heldout": (24, 24),
        "shared": (0, 0),
        "public": (42, 42),
        "unseen": (24, 24),
    }
    views = {work.network: work.views for work in found.work}
    # 48 measured, 42 of the bank, 24 whole unseen images for the encoder's usefulness; both directions: 24 heldout.
    assert views["encoder under test"] == 48 + 42 + 24
    assert views["references.two_model"] == 48 + 24 + 42
    assert views["references.crop_classifier"] == 48
    lessons = stages.training_inputs(plan, stages.name_truth(plan, stages.prepare(plan)))
    repeats = sum(n for name, n in lessons.repeats.items() if n > 1 and name in _targets(lessons))
    assert views["training the encoder"] == 2 * ((24 + repeats) // 64 or 1) * min(64, 24 + repeats)
    trained = [work for work in found.work if work.step == "train"]
    assert [work.cached for work in trained] == [0, 0, 0]
    assert all(work.line is not None and work.line.each > 0 for work in found.work)
    assert {amount.name for amount in found.disk} >= {"training the encoder", "embeddings, references.two_model"}
    assert found.free_disk is not None


def _targets(lessons: Any) -> set[str]:
    return set(lessons.images.filter(lessons.images["role"] == "target")["id"])


def test_what_was_trained_before_costs_nothing(planned: Callable[..., stages.Plan]) -> None:
    plan = planned(*QUICK, "reference=class_prior")
    encoder = stages.train(plan, stages.training_inputs(plan, stages.name_truth(plan, stages.prepare(plan))))
    training, embedding = preflight.survey(plan).work
    assert (training.views, training.hours) == (training.cached, 0.0)
    assert embedding.cached == 0
    views = stages.name_truth(plan, stages.prepare(plan))
    plan.trainer.embed(encoder, views.measured(), views.manifest.store)
    assert preflight.survey(plan).work[1].cached == 48


def test_a_network_that_cannot_be_loaded_is_not_estimated(planned: Callable[..., stages.Plan]) -> None:
    plan = planned(*OTHERS, "model=efficientnet_lite0", "reference=class_prior")
    found = preflight.survey(plan)
    assert len(found.missing) == 1
    assert found.counts["public"] == (42, 42)
    (work,) = found.work
    assert work.hours is None
    assert work.note.startswith("not measured: cannot get the published weights")


def test_what_would_fail_later_is_a_hole(
    planned: Callable[..., stages.Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (hole,) = preflight.survey(planned(*QUICK, "probe.k=500", "reference=class_prior")).missing
    assert hole.startswith("probe.k=500 is more than the bank holds")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    (hole,) = preflight.survey(planned(*QUICK, "reference=class_prior")).missing
    assert hole.startswith(f"trainer.cache={tmp_path / 'cache'}: the run writes ")
    assert "10 B are free" in hole


def test_a_line_through_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    sizes: list[int] = []

    def run(views: int) -> int:
        # The first call is slower, which must not count.
        now[0] += 2 + 0.5 * views + (100 if not sizes else 0)
        sizes.append(views)
        return views

    line, last = preflight._measure(run, small=8, most=1000, step=4)
    # 4 seconds of budget at 6 seconds for 8 views: 5 more, in steps of 4.
    assert sizes == [8, 8, 12]
    assert (line, last) == (Line(start=2.0, each=0.5), 12)
    sizes.append(0)
    assert preflight._measure(run, small=8, most=8)[0] == Line(start=0.0, each=6 / 8)


def test_hours_are_of_what_is_left_and_of_all_devices() -> None:
    work = Work("n", "embed", views=7200, cached=3600, calls=2, line=Line(1800.0, 1.0), devices=4, note="")
    assert work.hours == 2.0
    assert work.device_hours == 8.0
    assert replace(work, line=None).hours is None
    assert replace(work, line=None, cached=7200).hours == 0.0


def test_the_survey_is_shown() -> None:
    work = Work("encoder [x]", "embed", 7200, None, 1, Line(0.0, 0.5), 1, "timed on cpu")
    found = Survey((), {"target": (5, 4)}, (work, replace(work, line=None)), (), (), 10**9, None)
    stream = io.StringIO()
    preflight.show(found, Console(file=stream))
    told = stream.getvalue()
    assert "target 5 (4)" in told
    assert "encoder [x]" in told
    assert "Nothing is missing. Device work: 1 hours on cpu, and 1 steps that could not be measured." in told
    preflight.show(Survey(("a.b=c: not there.",)), Console(file=stream))
    assert "Missing: a.b=c: not there." in stream.getvalue()
    assert "1 things are missing; the run would fail." in stream.getvalue()
