"""Encoders trained here."""

from dataclasses import replace
from pathlib import Path

import pytest

from dejavu_exp import crops, images
from dejavu_exp.datasets.shapes import Shapes
from dejavu_exp.encoders import TimmEncoder
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.splits import PerClassSplit
from dejavu_exp.training import Supervised, TrainedEncoder, TrainingInputs, load_if_ready

ARGUMENTS = {
    "layers": [1, 1, 1, 1],
    "channels": [8, 8, 8, 8],
    "pretrained_cfg_overlay": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
}
ENCODER = TrainedEncoder(TimmEncoder("resnet18", "random", "features", ARGUMENTS), Supervised(epochs=1, batch_size=8))


@pytest.fixture
def inputs(tmp_path: Path) -> TrainingInputs:
    manifest = Shapes(classes=3, train_per_class=20, val_per_class=4, planted_share=0.5).manifest()
    roles = PerClassSplit(target=8, heldout=4, shared=2, public=6, unseen=4, min_side_px=8).assign(manifest.rows, 0)
    rows = images.inspect(manifest.rows.join(roles.select("id", "role"), on="id"), manifest.store)
    return TrainingInputs(
        images=crops.views(rows, crops.FullImage()),
        backgrounds=crops.views(rows, crops.BackgroundCrop(8)),
        repeats=dict(rows.select("id", "planted_repeats").iter_rows()),
        store=manifest.store,
        cache=tmp_path,
        device="cpu",
        seed=0,
    )


def weights(inputs: TrainingInputs) -> list[Path]:
    return sorted(inputs.cache.rglob("*.safetensors"))


def test_training_again_gives_the_same_weights(inputs: TrainingInputs, tmp_path: Path) -> None:
    first = ENCODER.train(inputs)
    again = ENCODER.train(replace(inputs, cache=tmp_path / "other"))
    assert first.weights_hash == again.weights_hash
    assert not first.random
    assert "trained here on 30 images" in first.weights


def test_trained_weights_are_kept_and_changed_inputs_train_anew(inputs: TrainingInputs) -> None:
    ENCODER.train(inputs)
    stamps = {path: path.stat().st_mtime_ns for path in weights(inputs)}
    ENCODER.train(inputs)
    assert {path: path.stat().st_mtime_ns for path in weights(inputs)} == stamps
    ENCODER.train(replace(inputs, seed=1))
    ENCODER.train(replace(inputs, repeats={}))
    replace(ENCODER, recipe=Supervised(epochs=2, batch_size=8)).train(inputs)
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


@pytest.mark.parametrize("key", ["epochs", "batch_size", "learning_rate", "min_area", "min_background_area"])
def test_bad_settings_name_their_key(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.recipe\.{key}=0"):
        replace(Supervised(epochs=1), **{key: 0})
