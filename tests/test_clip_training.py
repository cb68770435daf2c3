"""CLIP trained here: what it is shown, that it learns, and that neither kills nor processes change the weights."""

import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dejavu_exp import config, tables
from dejavu_exp.encoders import LoadedEncoder
from dejavu_exp.encoders.base import BOTH
from dejavu_exp.encoders.open_clip_models import build_clip, tokenizer_of
from dejavu_exp.errors import ConfigError, DataError, WeightsError
from dejavu_exp.training import (
    ClipNetwork,
    ClipRecipe,
    Optimizer,
    Schedule,
    TrainedClip,
    TrainedHere,
    TrainingInputs,
    TrainingSettings,
    curves,
    load_if_ready,
)
from dejavu_exp.training.clip import OneCaption
from dejavu_exp.training.recipe import Task
from dejavu_exp.training.views import AugmentedViews

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
NETWORK = ClipNetwork("tiny", arch_config={"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT})
RECIPE = ClipRecipe(2, Optimizer("adamw", 1e-3), batch_size=8)
MODEL = TrainedClip(NETWORK, RECIPE)
LONG = "a red cat on a mat, " * 500
HTML = "a <b>dog</b> &amp;lt; a &quot;cat&quot; </body><end_of_text> <start_of_text>"
BEGIN, END = 49406, 49407


@dataclass
class Memory:
    """A store of images in memory."""

    files: dict[str, bytes]

    def read(self, path: str) -> bytes:
        return self.files[path]


def pairs(cache: Path, count: int = 16, **changes: Any) -> TrainingInputs:
    """Blocks of random colours, each with a caption that names it by two words of its own."""
    rng = np.random.default_rng(0)
    animals, places = ("cat", "dog", "bird", "fish"), ("house", "river", "mountain", "garden")
    files, rows, captions = {}, [], {}
    for index in range(count):
        blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        file = io.BytesIO()
        blocks.resize((32, 32), Image.Resampling.NEAREST).save(file, "PNG")
        name = f"{index:02}"
        files[name] = file.getvalue()
        rows.append({"view_id": f"{name}#full", "id": name, "role": "target", "path": name, "content": name})
        captions[name] = [f"a {animals[index % 4]} by the {places[index // 4 % 4]}", f"number {index}"]
    views = pl.DataFrame(rows).with_columns(
        view=pl.lit("full"), status=pl.lit("ok"), xmin=pl.lit(0), ymin=pl.lit(0), xmax=pl.lit(32), ymax=pl.lit(32)
    )
    missing = [pl.lit(None, dtype=kind).alias(name) for name, kind in tables.VIEWS.items() if name not in views.columns]
    views = views.with_columns(missing).select(pl.col(name).cast(kind) for name, kind in tables.VIEWS.items())
    given: dict[str, Any] = {
        "model": MODEL,
        "images": views,
        "backgrounds": views.clear(),
        "labels": (),
        "repeats": {},
        "store": Memory(files),
        "cache": cache,
        "device": "cpu",
        "seed": 0,
        "settings": TrainingSettings(),
        "folders": {},
        "waits": {},
        "captions": captions,
    }
    return TrainingInputs(**(given | changes))


def saved(inputs: TrainingInputs) -> bytes:
    (path,) = inputs.cache.rglob("network.safetensors")
    return path.read_bytes()


def shown(inputs: TrainingInputs, recipe: ClipRecipe, batch: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """What a batch holds: pixels and tokens."""
    job = replace(MODEL, recipe=recipe)._job(inputs.images, inputs, "test")
    settings = job.data_config(job.network.start())
    data = AugmentedViews(job.views, inputs.store, recipe.augment(settings), job.seed, recipe.caption(settings))
    (pixels, tokens), codes = data[list(batch)]
    assert codes.tolist() == [0] * len(batch)
    return pixels, tokens


def test_it_learns_which_caption_goes_with_which_image(tmp_path: Path) -> None:
    inputs = pairs(tmp_path)
    recipe = replace(RECIPE, epochs=80, batch_size=16, optimizer=Optimizer("adamw", 3e-3, warmup_epochs=2))
    loaded = replace(MODEL, recipe=recipe).train(inputs)
    images, texts = embedded(loaded, inputs)
    own = list(range(len(images)))
    assert (images @ texts.T).argmax(1).tolist() == own
    assert (texts @ images.T).argmax(1).tolist() == own
    (curve,) = curves(inputs).values()
    # Guessing among 16 costs ln 16.
    assert curve["loss"][-5:].max() < 0.2 < math.log(16) < curve["loss"][0]  # type: ignore[operator]


@torch.no_grad()
def embedded(loaded: LoadedEncoder, inputs: TrainingInputs) -> tuple[Tensor, Tensor]:
    """Both towers' unit vectors of all pairs, in order."""
    tower = loaded.reading("texts")
    pictures = [Image.open(io.BytesIO(inputs.store.read(name))).convert("RGB") for name in inputs.images["path"]]
    images = loaded.module(torch.stack([loaded.transform(picture) for picture in pictures]))
    texts = tower.module(tower.transform([inputs.captions[name][0] for name in inputs.images["id"]]))
    return nn.functional.normalize(images, dim=-1), nn.functional.normalize(texts, dim=-1)


def test_both_towers_say_where_their_weights_come_from(tmp_path: Path) -> None:
    loaded = MODEL.train(pairs(tmp_path))
    assert loaded.weights.startswith("trained here on 16 images of target and shared, epoch 2 (ClipRecipe, ")
    assert loaded.reading("texts").weights == loaded.weights
    assert not loaded.random
    assert not loaded.reading("texts").random
    assert isinstance(MODEL, TrainedHere)
    assert MODEL.reads == BOTH
    assert load_if_ready(MODEL) is None


def test_training_again_gives_the_same_weights(tmp_path: Path) -> None:
    first, again = pairs(tmp_path / "first"), pairs(tmp_path / "again")
    MODEL.train(first)
    MODEL.train(again)
    assert saved(first) == saved(again)
    # Captions are part of what identifies a training.
    MODEL.train(replace(first, captions={name: texts[::-1] for name, texts in first.captions.items()}))
    assert len(list(first.cache.rglob("network.safetensors"))) == 2


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(step: int, tmp_path: Path) -> None:
    """Killed in its first and in its second epoch, with captions and masks that are drawn anew in each."""
    model = replace(MODEL, recipe=replace(RECIPE, captions="random", masking_rate=0.3))
    whole, killed = pairs(tmp_path / "whole"), pairs(tmp_path / "killed")
    model.train(whole)
    original = Task.optimizer_step

    def kill(task: Any, *args: Any, **kwargs: Any) -> None:
        original(task, *args, **kwargs)
        if task.trainer.global_step + 1 == step:
            raise KeyError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "optimizer_step", kill)
        with pytest.raises(KeyError, match="killed"):
            model.train(killed)
    assert not list(killed.cache.rglob("*.safetensors"))
    model.train(killed)
    assert saved(whole) == saved(killed)


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    """Each sees half of every batch, and contrasts it with all of it. Float32 sums in another order: 1e-4.

    One thread in each: with two, one process alone differs from itself with one by up to 1e-3.
    """
    recipe = replace(RECIPE, optimizer=Optimizer("sgd", 0.02), masking_rate=0.2, captions="random")
    arch = {"embed_dim": 16, "vision_cfg": VISION | {"image_size": 64}, "text_cfg": TEXT}
    model = replace(MODEL, network=replace(NETWORK, arch_config=arch), recipe=recipe)
    states = []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for devices in (1, 2):
            inputs = pairs(tmp_path / str(devices), settings=TrainingSettings(devices=devices))
            model.train(inputs)
            (path,) = inputs.cache.rglob("network.safetensors")
            states.append(load_file(path))
    finally:
        torch.set_num_threads(threads)
    start = model.network.start().state_dict()
    for name, value in states[0].items():
        if value.is_floating_point():
            assert float((value - states[1][name]).abs().max()) < 1e-4 * max(1.0, float(value.abs().max())), name
    moved = [float((states[0][name] - start[name]).abs().max()) for name in ("logit_scale", "text_projection")]
    assert min(moved) > 1e-2


def test_masking_blanks_as_many_tokens_as_the_rate_says_and_never_the_ends() -> None:
    tokenizer = tokenizer_of("tiny", NETWORK.arch_config)
    caption = OneCaption(tokenizer, "first", 0.3)
    plain: Any = tokenizer(["a cat by the river"])
    rng = np.random.default_rng(0)
    draws = torch.stack([caption(["a cat by the river"], rng) for _ in range(4000)])
    assert torch.equal(draws[:, 0], torch.full((4000,), BEGIN))
    assert torch.equal(draws[:, 6], torch.full((4000,), END))
    assert not draws[:, 7:].any()
    changed = draws[:, 1:6] != plain[0, 1:6]
    assert not draws[:, 1:6][changed].any()  # open_clip's padding
    # Five standard deviations of a share of 4,000.
    assert changed.float().mean(0).tolist() == pytest.approx([0.3] * 5, abs=5 * math.sqrt(0.3 * 0.7 / 4000))
    # Tokens are masked one by one: two at once as often as the product says.
    both = (changed[:, 0] & changed[:, 1]).float().mean()
    assert float(both) == pytest.approx(0.09, abs=5 * math.sqrt(0.09 * 0.91 / 4000))


def test_a_mask_is_drawn_anew_in_every_epoch_and_leaves_the_image_alone(tmp_path: Path) -> None:
    inputs = pairs(tmp_path)
    plain, masked = RECIPE, replace(RECIPE, masking_rate=0.5)
    pixels, tokens = shown(inputs, masked, [(epoch, 3) for epoch in range(6)])
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    expected, whole = shown(inputs, plain, [(epoch, 3) for epoch in range(6)])
    assert torch.equal(pixels, expected)
    assert torch.equal(whole, whole[:1].expand(6, -1))
    again = shown(inputs, masked, [(4, 3), (1, 7), (2, 3)])[1]
    assert torch.equal(again[[0, 2]], tokens[[4, 2]])


def test_without_masking_tokens_are_the_tokenizers() -> None:
    tokenizer = tokenizer_of("tiny", NETWORK.arch_config)
    texts = ["a cat!", "a dog by the house"]
    for text in texts:
        shown_tokens = OneCaption(tokenizer, "first", 0.0)([text, "another"], np.random.default_rng(0))
        assert torch.equal(shown_tokens, tokenizer([text])[0])  # type: ignore[index]


def test_a_random_caption_varies_by_epoch_and_depends_on_seed_epoch_and_row_alone(tmp_path: Path) -> None:
    inputs = pairs(tmp_path)
    recipe = replace(RECIPE, captions="random")
    tokenizer = tokenizer_of("tiny", NETWORK.arch_config)
    choices = tokenizer(inputs.captions["05"])
    epochs = range(200)
    tokens = shown(inputs, recipe, [(epoch, 5) for epoch in epochs])[1]
    second = [torch.equal(row, choices[1]) for row in tokens]  # type: ignore[index]
    first = [torch.equal(row, choices[0]) for row in tokens]  # type: ignore[index]
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert sum(second) == pytest.approx(100, abs=5 * math.sqrt(50))
    alone = shown(inputs, recipe, [(7, 5)])[1]
    assert torch.equal(alone[0], tokens[7])
    # The mask does not change which caption is drawn: both differ in single tokens only.
    masked = shown(inputs, replace(recipe, masking_rate=0.2), [(epoch, 5) for epoch in epochs])[1]
    assert torch.equal(torch.where(masked == 0, 0, tokens), masked)
    other = shown(replace(inputs, seed=1), recipe, [(epoch, 5) for epoch in epochs])[1]
    assert not torch.equal(other, tokens)


def test_what_shows_captions_goes_to_other_processes() -> None:
    caption = OneCaption(tokenizer_of("tiny", NETWORK.arch_config), "random", 0.5)
    again = pickle.loads(pickle.dumps(caption))
    first, second = (show(["a cat", "a dog"], np.random.default_rng(3)) for show in (caption, again))
    assert torch.equal(first, second)


def test_long_captions_and_markup_are_shown(tmp_path: Path) -> None:
    inputs = pairs(tmp_path)
    captions = {**inputs.captions, "00": [LONG], "01": [HTML], "02": ["\N{ZERO WIDTH JOINER}\U0001f600" * 20]}
    inputs = replace(inputs, captions=captions)
    tokens = shown(inputs, replace(RECIPE, masking_rate=0.9), [(0, 0), (0, 1)])[1]
    assert tokens.shape == (2, 16)
    assert tokens[:, 0].tolist() == [BEGIN, BEGIN]
    assert tokens[0, -1] == END
    MODEL.train(inputs)
    (curve,) = curves(inputs).values()
    assert np.isfinite(curve["loss"].to_numpy()).all()


def test_images_without_a_caption_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = pairs(tmp_path)
    silent: dict[str, Any] = {"00": [], "01": [" ", ""], "02": [None, "a bird"]}
    captions = {**inputs.captions, **silent}
    del captions["03"]
    with caplog.at_level("INFO"):
        loaded = MODEL.train(replace(inputs, captions=captions))
    assert "on 13 images" in loaded.weights
    assert "3 of 16 images have no caption" in caplog.text
    for few in ({}, {"05": ["a cat"]}):
        with pytest.raises(DataError, match=rf"two images with captions.*found {len(few)} among 16"):
            MODEL.train(replace(inputs, captions=few))


def test_a_planted_repeat_is_the_whole_pair_again(tmp_path: Path) -> None:
    inputs = pairs(tmp_path, repeats={"04": 3, "05": 1})
    views = MODEL._job(inputs.images, inputs, "test").views
    counts = dict(views.group_by("id").len().iter_rows())
    assert counts == {name: 4 if name == "04" else 1 for name in inputs.captions}
    assert not views["background"].any()
    assert views.select("captions", "xmin", "xmax").row(-1) == (inputs.captions["04"], 0, 32)


def test_only_the_roles_asked_for_are_trained_on(tmp_path: Path) -> None:
    inputs = pairs(tmp_path)
    role = pl.when(pl.col("id") < "04").then(pl.lit("unseen")).when(pl.col("id") < "06").then(pl.lit("heldout"))
    inputs = replace(inputs, images=inputs.images.with_columns(role=role.otherwise("role")))
    assert "on 10 images" in MODEL.train(inputs).weights
    assert "on 2 images" in replace(MODEL, roles=("heldout",)).train(inputs).weights
    with pytest.raises(ConfigError, match=r"model\.roles"):
        replace(MODEL, roles=("unseen",))


def test_the_factor_on_the_similarities_is_clipped() -> None:
    task: Any = RECIPE.task(NETWORK.start(), Schedule(RECIPE.optimizer, 8, 4, 2))
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            task.network.logit_scale.fill_(value)
        task.after_step(0.5)
        assert task.network.logit_scale.item() == pytest.approx(expected)


def test_the_loss_is_the_mean_cross_entropy_of_both_directions() -> None:
    torch.manual_seed(0)
    task: Any = RECIPE.task(NETWORK.start(), Schedule(RECIPE.optimizer, 4, 4, 2)).eval()
    pixels, tokens = torch.randn(4, 3, 32, 32), tokenizer_of("tiny", NETWORK.arch_config)(["a", "b c", "d", "e f g"])
    loss = task.loss([pixels, tokens], torch.zeros(4))
    images, texts = task.network.encode_image(pixels), task.network.encode_text(tokens)
    cosines = torch.stack([torch.stack([torch.cosine_similarity(one, two, 0) for two in texts]) for one in images])
    odds = (cosines * math.exp(task.network.logit_scale.item())).exp()
    chances = torch.stack([odds.diag() / odds.sum(0), odds.diag() / odds.sum(1)])
    assert loss.item() == pytest.approx(-chances.log().mean().item(), rel=1e-5)


def test_training_starts_from_the_weights_given(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    given = build_clip("tiny", NETWORK.arch_config, seed=5)
    save_file(given.state_dict(), path)
    still = replace(RECIPE, optimizer=Optimizer("sgd", 1e-12))
    loaded = replace(MODEL, network=replace(NETWORK, weights=str(path)), recipe=still).train(pairs(tmp_path / "cache"))
    parameters = dict(given.named_parameters())
    for name, value in loaded.module.named_parameters():
        assert torch.allclose(value, parameters[f"visual.{name}"], atol=1e-7), name


def test_features_are_normalised_as_measured(tmp_path: Path) -> None:
    """The transform of measuring and the augmentation of training scale pixels alike."""
    inputs = pairs(tmp_path)
    network = replace(NETWORK, preprocess={"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]})
    model = replace(MODEL, network=network, recipe=replace(RECIPE, min_area=1.0, epochs=1))
    settings = network.data_config(network.start())
    grey = Image.new("RGB", (32, 32), (90, 120, 150))
    for view in (model.recipe.augment(settings), model.recipe.augment(settings, validation=True)):
        torch.testing.assert_close(view(grey, False), model.train(inputs).transform(grey), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"model\.recipe\.epochs=0"),
        ({"batch_size": 1}, r"model\.recipe\.batch_size=1: must be at least 2"),
        ({"min_area": 0}, r"model\.recipe\.min_area=0"),
        ({"flip": 1.5}, r"model\.recipe\.flip=1\.5"),
        ({"masking_rate": 1.0}, r"model\.recipe\.masking_rate=1\.0: must lie in \[0, 1\)"),
        ({"captions": "all"}, r"model\.recipe\.captions=all: must be first or random"),
    ],
)
def test_bad_settings_name_key_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RECIPE, **changes)


def test_a_network_that_cannot_be_trained_is_refused_early() -> None:
    with pytest.raises(ConfigError, match=r"model\.network\.weights=hub.*weights=PATH"):
        replace(NETWORK, weights="hub")
    with pytest.raises(ConfigError, match="did you mean ViT-B-32"):
        replace(MODEL, network=ClipNetwork("ViT-B-33")).check()
    with pytest.raises(WeightsError, match="no such file"):
        replace(MODEL, network=replace(NETWORK, weights="missing.pt")).check()
    with pytest.raises(ConfigError, match=r"model\.epoch=3"):
        replace(MODEL, epoch=3)
    siglip = replace(NETWORK, arch_config={**(NETWORK.arch_config or {}), "init_logit_bias": -10.0})
    with pytest.raises(ConfigError, match="SigLIP"):
        RECIPE.task(siglip.start(), Schedule(RECIPE.optimizer, 8, 4, 2))


@pytest.mark.parametrize("name", ["clip_trained", "shapes_clip"])
def test_the_configurations_build_what_they_say(name: str) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        model = config.bind(config.resolve(compose("config", [f"model={name}"]))["model"], "model")
    assert isinstance(model, TrainedClip)
    model.check()
    if model.network.arch_config is not None:
        built: Any = model.network.start()
        settings = model.network.data_config(built)
        assert settings["tokenizer"](["a disc by Gezo Monigo"]).shape == (1, built.context_length)
        assert built.encode_image(torch.zeros(2, *settings["input_size"])).shape == (2, 128)
