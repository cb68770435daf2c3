"""Encoders trained here: what they see, how they are kept, that kills and processes change nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl_lightning
import polars as pl
import pytest
import torch
from conftest import SMALL, measure
from safetensors.torch import save_file
from torch import Tensor, nn

from dejavu_exp import crops, images
from dejavu_exp.datasets.shapes import Shapes
from dejavu_exp.encoders import TimmEncoder
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.splits import PerClassSplit
from dejavu_exp.training import (
    Optimizer,
    Schedule,
    Supervised,
    TrainedEncoder,
    TrainingInputs,
    TrainingSettings,
    curves,
    fit,
    load_if_ready,
    training_views,
)
from dejavu_exp.training.synchronized import SynchronizedBatchNorm, synchronize
from dejavu_exp.training.views import AugmentedViews, Place, StepBatches

ARGUMENTS = {
    "layers": [1, 1, 1, 1],
    "channels": [8, 8, 8, 8],
    "pretrained_cfg_overlay": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
}
OPTIMIZER = Optimizer("adamw", 0.01)
RECIPE = Supervised(epochs=1, batch_size=8, optimizer=OPTIMIZER)
ENCODER = TrainedEncoder(TimmEncoder("resnet18", "random", "features", ARGUMENTS), RECIPE)


@pytest.fixture
def inputs(tmp_path: Path) -> TrainingInputs:
    manifest = Shapes(classes=3, train_per_class=20, val_per_class=4, planted_share=0.5).manifest()
    roles = PerClassSplit(target=8, heldout=4, shared=2, public=6, unseen=4, min_side_px=8).assign(manifest.rows, 0)
    rows = images.inspect(manifest.rows.join(roles.select("id", "role"), on="id"), manifest.store)
    return TrainingInputs(
        model=ENCODER,
        images=crops.views(rows, crops.FullImage()),
        backgrounds=crops.views(rows, crops.BackgroundCrop(8)),
        labels=tuple(sorted(rows["label"].unique())),
        repeats=dict(rows.select("id", "planted_repeats").iter_rows()),
        store=manifest.store,
        cache=tmp_path,
        device="cpu",
        seed=0,
        settings=TrainingSettings(),
        folders={},
        waits={},
    )


def weights(inputs: TrainingInputs) -> list[Path]:
    return sorted(inputs.cache.rglob("*.safetensors"))


def elsewhere(inputs: TrainingInputs, folder: Path, **settings: Any) -> TrainingInputs:
    return replace(inputs, cache=folder, settings=TrainingSettings(**settings), folders={}, waits={})


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Over parameters, and over running statistics as shares of their size."""
    others = second.state_dict()
    return max(
        float(((value - others[name]).abs() / value.abs().clamp(min=1)).max())
        for name, value in first.state_dict().items()
        if "num_batches" not in name
    )


def test_training_again_gives_the_same_weights(inputs: TrainingInputs, tmp_path: Path) -> None:
    first = ENCODER.train(inputs)
    again = ENCODER.train(elsewhere(inputs, tmp_path / "other"))
    assert first.weights_hash == again.weights_hash
    assert not first.random
    assert "trained here on 30 images of target and shared, epoch 1" in first.weights


def test_trained_weights_are_kept_and_changed_inputs_train_anew(inputs: TrainingInputs) -> None:
    ENCODER.train(inputs)
    stamps = {path: path.stat().st_mtime_ns for path in weights(inputs)}
    ENCODER.train(inputs)
    assert {path: path.stat().st_mtime_ns for path in weights(inputs)} == stamps
    ENCODER.train(replace(inputs, seed=1))
    ENCODER.train(replace(inputs, repeats={}))
    replace(ENCODER, recipe=replace(RECIPE, epochs=2)).train(inputs)
    assert len(weights(inputs)) == 4
    # What is read out afterwards is no reason to train again.
    replace(ENCODER, network=replace(ENCODER.network, output="logits")).train(inputs)
    assert len(weights(inputs)) == 4


def test_only_the_roles_asked_for_are_trained_on(inputs: TrainingInputs) -> None:
    assert "on 24 images" in replace(ENCODER, roles=("target",)).train(inputs).weights
    with pytest.raises(ConfigError, match=r"model\.roles"):
        replace(ENCODER, roles=("unseen",))


def test_nothing_to_train_on_is_an_error(inputs: TrainingInputs) -> None:
    with pytest.raises(DataError, match="two classes"):
        ENCODER.train(replace(inputs, images=inputs.images.clear()))


def test_an_encoder_that_must_be_trained_is_not_loaded_early() -> None:
    assert load_if_ready(ENCODER) is None
    assert load_if_ready(TimmEncoder("test_resnet.r160_in1k", "random")) is not None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: replace(RECIPE, epochs=0), r"model\.recipe\.epochs=0"),
        (lambda: replace(RECIPE, batch_size=0), r"model\.recipe\.batch_size=0"),
        (lambda: replace(RECIPE, min_area=0), r"model\.recipe\.min_area=0"),
        (lambda: replace(RECIPE, min_background_area=0), r"model\.recipe\.min_background_area=0"),
        (lambda: replace(RECIPE, max_ratio=0.5), r"model\.recipe\.max_ratio=0\.5"),
        (lambda: replace(RECIPE, label_smoothing=1.0), r"model\.recipe\.label_smoothing=1\.0"),
        (lambda: Optimizer("adam", 0.1), r"optimizer\.name=adam"),  # type: ignore[arg-type]
        (lambda: Optimizer("sgd", 0), r"optimizer\.learning_rate=0"),
        (lambda: Optimizer("sgd", 0.1, weight_decay=-1), r"optimizer\.weight_decay=-1"),
        (lambda: Optimizer("sgd", 0.1, per=0), r"optimizer\.per=0"),
        (lambda: TrainingSettings(devices=0), r"training\.devices=0"),
        (lambda: TrainingSettings(checkpoint_every=0), r"training\.checkpoint_every=0"),
        (lambda: TrainingSettings(copies="keep"), r"training\.copies=keep"),  # type: ignore[arg-type]
        (lambda: replace(ENCODER, epoch=2), r"model\.epoch=2: the recipe has epochs 1 to 1"),
        (lambda: replace(ENCODER, layer=1), r"model\.layer=1: the recipe's projector has 0"),
    ],
)
def test_bad_settings_name_key_and_value(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_the_peak_grows_with_the_batch_and_the_log_says_so(
    inputs: TrainingInputs, caplog: pytest.LogCaptureFixture
) -> None:
    scaled = replace(RECIPE, optimizer=Optimizer("lars", 0.2, per=256, weight_decay=0.1))
    with caplog.at_level("INFO"):
        replace(ENCODER, recipe=scaled).train(replace(inputs, settings=TrainingSettings(accumulate=2)))
    assert "peak learning rate 0.00625 (0.2 per 256 images) at a global batch of 8" in caplog.text
    assert "1 processes times 2 accumulated batches of 4" in caplog.text


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    layer = nn.Linear(2, 2)
    built = Schedule(Optimizer("sgd", 1.0, warmup_epochs=1), 8, 30, 10).build(layer)
    rates = []
    for _ in range(30):
        rates.append(built["optimizer"].param_groups[0]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert built["optimizer"].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_weight_decay_spares_biases_and_norms() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    built = Schedule(Optimizer("sgd", 0.1, weight_decay=0.5), 8, 10, 5).build(network)
    groups = built["optimizer"].param_groups
    assert {(len(group["params"]), group["weight_decay"]) for group in groups} == {(3, 0.0), (1, 0.5)}


def test_ranks_and_accumulated_batches_share_each_step() -> None:
    whole = StepBatches(37, 12, 0, Place())
    whole.set_epoch(3)
    steps = list(whole)
    assert len(steps) == len(whole) == 3
    assert len({row for step in steps for _, row in step}) == 36
    parts = []
    for rank in range(2):
        part = StepBatches(37, 12, 0, Place(rank, 2, accumulate=3))
        part.set_epoch(3)
        parts.append(list(part))
        assert len(part) == 9
    for step, rows in enumerate(steps):
        shared = [row for rank in parts for batch in rank[3 * step : 3 * step + 3] for row in batch]
        assert sorted(shared) == sorted(rows)
    whole.set_epoch(4)
    assert list(whole) != steps


def test_an_augmented_view_depends_on_seed_epoch_and_row_alone(inputs: TrainingInputs) -> None:
    usable = inputs.images.filter(pl.col("role") == "target").sort("id")
    views = training_views(usable, inputs.backgrounds, {}, list(inputs.labels))
    augment = RECIPE.augment({"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3})
    first = AugmentedViews(views, inputs.store, augment, 0)
    torch.manual_seed(5)
    pixels, codes = first[[(0, 3), (0, 7)]]
    drawn = torch.rand(1)
    again = AugmentedViews(views, inputs.store, augment, 0)
    torch.manual_seed(5)
    assert torch.equal(again[[(0, 7)]][0][0], pixels[1])
    assert torch.equal(torch.rand(1), drawn)  # the stream of others is left alone
    assert not torch.equal(again[[(1, 7)]][0][0], pixels[1])
    assert codes.tolist() == [views["code"][3], views["code"][7]]


def test_repeated_backgrounds_are_seen_as_often_as_planted(inputs: TrainingInputs) -> None:
    target = inputs.images.filter(pl.col("role") == "target").sort("id")
    views = training_views(target, inputs.backgrounds, inputs.repeats, list(inputs.labels))
    counts = dict(views.filter("background").group_by("id").len().iter_rows())
    assert counts == {name: 8 for name in target["id"] if inputs.repeats[name] == 8}
    assert len(views.filter(~pl.col("background"))) == len(target)


def test_a_file_that_breaks_off_is_named(inputs: TrainingInputs) -> None:
    class Broken:
        def read(self, path: str) -> bytes:
            return inputs.store.read(path)[:200]

    with pytest.raises(DataError, match=r"train/.*cannot be trained on"):
        ENCODER.train(replace(inputs, store=Broken()))


class Killed(Exception):  # noqa: N818 - not an error of the package
    """Stands for kill -9 inside one process."""


@pytest.mark.parametrize("step", [1, 6, 7, 13])
def test_a_run_killed_at_any_step_ends_with_the_same_weights(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    encoder = replace(ENCODER, recipe=replace(RECIPE, epochs=3, optimizer=Optimizer("lars", 0.5, 0.1, 1)))
    whole = encoder.train(elsewhere(inputs, tmp_path / "whole"))
    killed = elsewhere(inputs, tmp_path / "killed")
    original = fit.Keeper.on_train_batch_end

    def kill(self: fit.Keeper, trainer: pl_lightning.Trainer, *arguments: Any) -> None:
        original(self, trainer, *arguments)
        if trainer.global_step == step:
            raise Killed

    monkeypatch.setattr(fit.Keeper, "on_train_batch_end", kill)
    with pytest.raises(Killed):
        encoder.train(killed)
    monkeypatch.undo()
    assert weights(killed) == []
    resumed = encoder.train(killed)
    assert resumed.weights_hash == whole.weights_hash
    (curve,) = curves(killed).values()
    (expected,) = (tmp_path / "whole").rglob("history.parquet")
    assert curve.equals(pl.read_parquet(expected))


@pytest.mark.slow
def test_kill_9_while_training_changes_nothing(tmp_path: Path) -> None:
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    overrides = [*SMALL, "model.recipe.epochs=12", "model.recipe.optimizer.warmup_epochs=2", "reference=class_prior"]
    command = [sys.executable, "-m", "dejavu_exp.train", "hydra.run.dir=run", *overrides]

    def start(name: str) -> subprocess.Popen[bytes]:
        (tmp_path / name).mkdir(exist_ok=True)
        environment = settings | {"DEJAVU_CACHE": "cache"}
        return subprocess.Popen(command, cwd=tmp_path / name, env=environment, stderr=subprocess.DEVNULL)

    assert start("whole").wait(timeout=300) == 0
    killed = start("killed")
    deadline = time.monotonic() + 200
    while not list((tmp_path / "killed").glob("cache/trained/*/last.ckpt")) and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "killed").rglob("*.safetensors"))
    assert start("killed").wait(timeout=300) == 0
    whole, resumed = (next((tmp_path / name).rglob("network.safetensors")) for name in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert not list(tmp_path.rglob("last.ckpt"))
    told = json.loads((tmp_path / "killed" / "run" / "training.json").read_text())
    assert list(told) == ["training the encoder"]


def test_the_command_that_trains_says_so_where_there_is_nothing_to_train(tmp_path: Path) -> None:
    overrides = ["hydra.run.dir=run", "tracking=none", "model=clip_vitb32", "reference=naive_bayes"]
    command = [sys.executable, "-m", "dejavu_exp.train", *overrides]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ConfigError: nothing to train")
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_no_obstacle(inputs: TrainingInputs, tmp_path: Path) -> None:
    encoder = replace(ENCODER, recipe=replace(RECIPE, epochs=2))
    expected = encoder.train(elsewhere(inputs, tmp_path / "whole")).weights_hash
    replace(encoder, epoch=1).train(inputs)
    (checkpoint,) = inputs.cache.rglob(fit.LAST)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert encoder.train(inputs).weights_hash == expected


def test_epochs_are_kept_on_request_and_read_by_number(inputs: TrainingInputs, tmp_path: Path) -> None:
    long = replace(ENCODER, recipe=replace(RECIPE, epochs=4))
    kept = replace(inputs, settings=TrainingSettings(checkpoint_every=2), folders={}, waits={})
    last = long.train(kept)
    (folder,) = kept.folders.values()
    assert sorted(path.name for path in folder.glob("epoch-*")) == ["epoch-0002", "epoch-0004"]
    second = replace(long, epoch=2).train(kept)
    assert second.weights_hash != last.weights_hash
    # Without having been kept, an epoch is trained again, up to it, and is the same.
    other = elsewhere(inputs, tmp_path / "other")
    assert long.train(other).weights_hash == last.weights_hash
    assert replace(long, epoch=2).train(other).weights_hash == second.weights_hash
    # And a later one goes on from there.
    assert replace(long, epoch=3).train(other).weights_hash != second.weights_hash


def test_the_loss_curve_is_kept_and_falls(inputs: TrainingInputs) -> None:
    replace(ENCODER, recipe=replace(RECIPE, epochs=12)).train(inputs)
    (curve,) = curves(inputs).values()
    assert curve.columns == list(fit.HISTORY)
    assert curve["step"].to_list() == list(range(1, len(curve) + 1))
    assert curve["loss"][-6:].mean() < curve["loss"][:6].mean()  # type: ignore[operator]


def test_a_batch_that_cannot_be_shared_is_refused(inputs: TrainingInputs) -> None:
    with pytest.raises(ConfigError, match=r"training\.devices=1 times training\.accumulate=3"):
        ENCODER.train(replace(inputs, settings=TrainingSettings(accumulate=3)))


def test_accumulated_batches_give_the_step_of_the_whole_batch(inputs: TrainingInputs, tmp_path: Path) -> None:
    """Without batch norm, which sees one batch at a time, gradients simply add up."""
    network = TimmEncoder(
        "test_vit.r160_in1k",
        "random",
        "features",
        {"img_size": 32, "pretrained_cfg_overlay": {"input_size": [3, 32, 32]}},
    )
    encoder = TrainedEncoder(network, replace(RECIPE, epochs=2, optimizer=Optimizer("sgd", 0.01)))
    one = encoder.train(elsewhere(inputs, tmp_path / "one"))
    four = encoder.train(elsewhere(inputs, tmp_path / "four", accumulate=4))
    assert largest_difference(one.module, four.module) < 1e-5
    assert one.weights_hash != four.weights_hash


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(inputs: TrainingInputs, tmp_path: Path) -> None:
    """Each sees half of every batch; batch norm is shared. Float32 sums in another order: 1e-4, relative above 1."""
    recipe = replace(RECIPE, epochs=1, batch_size=24, optimizer=Optimizer("sgd", 0.05))
    encoder = replace(ENCODER, recipe=recipe)
    start = replace(ENCODER.network, arch_args={**ARGUMENTS, "num_classes": 3}).load()
    one = encoder.train(elsewhere(inputs, tmp_path / "one"))
    two = encoder.train(elsewhere(inputs, tmp_path / "two", devices=2))
    assert largest_difference(one.module, two.module) < 1e-4
    assert largest_difference(one.module, start.module) > 1e-2


def test_shared_batch_norm_is_plain_batch_norm_in_one_process() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False))
    pixels = torch.randn(5, 3, 6, 6)
    expected: Tensor = network(pixels)
    shared = synchronize(network)
    assert sum(isinstance(part, SynchronizedBatchNorm) for part in shared.modules()) == 2
    assert torch.allclose(shared(pixels), expected)


def test_batch_norms_that_do_more_are_refused_on_several_cpus() -> None:
    import timm

    network = timm.create_model("test_efficientnet.r160_in1k")
    with pytest.raises(ConfigError, match="BatchNormAct2d"):
        synchronize(network)


def test_a_copy_of_a_measured_image_is_refused_or_dropped(inputs: TrainingInputs) -> None:
    target = inputs.images.filter(pl.col("role") == "target").row(0, named=True)
    twin = inputs.images.filter(pl.col("role") == "heldout").row(0, named=True)["id"]
    planted = replace(
        inputs,
        images=inputs.images.with_columns(
            content=pl.when(pl.col("id") == twin).then(pl.lit(target["content"])).otherwise("content")
        ),
    )
    with pytest.raises(DataError, match=rf"1 images that are measured, e\.g\. {twin}.*{target['id']}"):
        planted.for_reference()
    dropped = replace(planted, settings=TrainingSettings(copies="drop")).for_reference()
    assert twin not in dropped.images["id"]
    assert set(dropped.images["role"]) == {"heldout", "shared"}


@pytest.mark.slow
def test_a_run_trains_with_two_processes_without_starting_itself_again(tmp_path: Path) -> None:
    done = measure(tmp_path, *SMALL, "reference=class_prior", "training.devices=2")
    assert done.code == 0, done.stderr
    assert "2 processes times 1 accumulated batches of 28" in (tmp_path / "dejavu_exp.log").read_text()
    assert len(list(tmp_path.rglob("figures.json"))) == 1


def test_a_network_from_the_cache_costs_what_its_training_took(inputs: TrainingInputs) -> None:
    ENCODER.train(inputs)
    (folder,) = inputs.folders.values()
    (folder / fit.COST).write_text('{"epochs": 1, "seconds": 1000.0}')
    again = replace(inputs, folders={}, waits={})
    ENCODER.train(again)
    assert again.whole_cost(again.waits["training the encoder"] + 5, ()) == pytest.approx(1005)
    assert again.whole_cost(5, again.folders) == 5


def test_training_starts_from_the_weights_given_and_knows_them_by_content(
    inputs: TrainingInputs, tmp_path: Path
) -> None:
    path = tmp_path / "start.safetensors"
    still = replace(RECIPE, optimizer=Optimizer("sgd", 1e-12))

    def trained_from(seed: int) -> tuple[nn.Module, nn.Module]:
        # A classifier of another size, as published weights have.
        given = replace(ENCODER.network, arch_args={**ARGUMENTS, "num_classes": 7}, seed=seed).build()
        save_file(given.state_dict(), path)
        loaded = replace(ENCODER, network=replace(ENCODER.network, weights=str(path)), recipe=still).train(inputs)
        return given, loaded.module

    for seed in (5, 6):
        given, found = trained_from(seed)
        parameters = dict(found.named_parameters())
        for name, value in given.named_parameters():
            if not name.startswith("fc."):
                assert torch.allclose(parameters[f"model.{name}"], value, atol=1e-7), name
