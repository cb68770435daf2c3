"""Self-supervised training: what is kept, what is seen, and that neither kills nor processes change the weights."""

import copy
import importlib.util
import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from dejavu_exp import config, crops, images
from dejavu_exp.datasets.shapes import Shapes
from dejavu_exp.encoders import TimmEncoder
from dejavu_exp.errors import ConfigError
from dejavu_exp.splits import PerClassSplit
from dejavu_exp.training import (
    Job,
    Optimizer,
    Recipe,
    Schedule,
    Supervised,
    TrainedEncoder,
    TrainingInputs,
    TrainingSettings,
    ssl,
)
from dejavu_exp.training.fit import trained
from dejavu_exp.training.recipe import Task
from dejavu_exp.training.views import TRAINING_VIEWS, AugmentedViews, seed_all

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
OVERLAY = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
NETWORK = TimmEncoder(
    "resnet18",
    "random",
    "features",
    {"layers": [1] * 4, "channels": [8] * 4, "num_classes": 0, "pretrained_cfg_overlay": OVERLAY},
)
SGD = Optimizer("sgd", 0.02)
SMALL: dict[str, Any] = {"projector_hidden": 16, "projector_out": 16}
RECIPES: dict[str, Any] = {
    "vicreg": ssl.VICReg(2, SGD, 16, **SMALL),
    "barlow_twins": ssl.BarlowTwins(2, SGD, 16, **SMALL),
    "simclr": ssl.SimCLR(2, SGD, 16, **SMALL),
    "byol": ssl.BYOL(2, SGD, 16, predictor_hidden=16, **SMALL),
    "dino": ssl.DINO(2, SGD, 16, projector_hidden=16, bottleneck=8, prototypes=32, local_crops=2),
}
ONE_NUMBER: Any = 0.5
EASY = ssl.Augmentation(min_area=0.2, jitter_strength=0, grayscale=0, blur=(0, 0), solarize=(0, 0))


@dataclass
class Memory:
    """A store of images in memory."""

    files: dict[str, bytes]

    def read(self, path: str) -> bytes:
        return self.files[path]


Data: TypeAlias = tuple[pl.DataFrame, Memory]


@pytest.fixture(scope="module")
def tinted() -> Data:
    """32 images of loud grey blobs, each with a faint tint of its own: all that two crops of one have in common."""
    rng = np.random.default_rng(0)
    files, rows = {}, []
    for index in range(32):
        blobs = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
        tint = rng.uniform(-1, 1, 3)
        tint -= tint.mean()
        pixels = 128 + (np.asarray(blobs, float)[..., None] - 128) * 0.6 + 40 * tint / np.abs(tint).max()
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "PNG")
        files[str(index)] = file.getvalue()
        rows.append((f"{index:02}", str(index), str(index), 0, 0, 48, 48, index % 2, index % 8 == 0, None))
    return pl.DataFrame(rows, schema=TRAINING_VIEWS, orient="row"), Memory(files)


def job(recipe: Recipe, views: pl.DataFrame, network: TimmEncoder = NETWORK) -> Job:
    return Job(network, recipe, views, views.clear(), patience=None, seed=0, title="test")


def train(
    recipe: Recipe, data: Data, cache: Path, epoch: int | None = None, devices: int = 1
) -> dict[str, dict[str, Tensor]]:
    """The weights at the end of an epoch, by file."""
    folder = trained(job(recipe, data[0]), TrainingSettings(devices=devices), data[1], "cpu", cache, epoch)
    return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[float]:
    """The largest difference of each tensor of numbers, as a share of its largest value where that is above 1."""
    assert first.keys() == second.keys()
    pairs = [(value, second[name]) for name, value in first.items() if value.is_floating_point()]
    return [float((one - two).abs().max() / max(1.0, float(one.abs().max()))) for one, two in pairs]


@dataclass(frozen=True)
class Together:
    """Several recipes at once, each with a network of its own: one start of processes tries them all."""

    parts: tuple[Any, ...]
    shares: tuple[float, ...]
    epochs: int
    batch_size: int
    optimizer: Optimizer

    supervised = False
    libraries = ()
    projector_layers = 0

    def projector(self, width: int) -> nn.Module:
        raise NotImplementedError

    def augment(self, config: Mapping[str, Any], *, validation: bool = False) -> Any:
        return AllViews(tuple(part.augment(config) for part in self.parts))

    def caption(self, config: Mapping[str, Any], *, validation: bool = False) -> None:
        return None

    def task(self, network: nn.Module, schedule: Schedule) -> Task:
        tasks = []
        for part in self.parts:
            own: Any = copy.deepcopy(network)
            if part.supervised:
                own.reset_classifier(2)
            tasks.append(part.task(own, schedule))
        return Tasks(tasks, self.shares, schedule)


@dataclass(frozen=True)
class AllViews:
    augments: tuple[Any, ...]

    def __call__(self, region: Image.Image, is_background: bool) -> list[Any]:
        return [augment(region, is_background) for augment in self.augments]


class Tasks(Task):
    def __init__(self, tasks: list[Task], shares: tuple[float, ...], *rest: Any) -> None:
        super().__init__(*rest)
        self.tasks, self.shares = nn.ModuleList(tasks), shares

    def loss(self, views: Any, codes: Tensor) -> Tensor:
        parts = [share * task.loss(own, codes) for task, share, own in self._each(views)]
        return torch.stack(parts).sum()

    def _each(self, views: Any) -> Any:
        return zip(self.tasks, self.shares, views, strict=True)

    def after_step(self, done: float) -> None:
        for task in self.tasks:
            task.after_step(done)  # type: ignore[operator]

    def on_after_backward(self) -> None:
        for task in self.tasks:
            task.on_after_backward()  # type: ignore[operator]

    def weights(self) -> dict[str, nn.Module]:
        return {
            f"{place}_{name}": part
            for place, task in enumerate(self.tasks)
            for name, part in task.weights().items()  # type: ignore[operator]
        }


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tinted: Data, tmp_path: Path) -> None:
    """Losses over all images, the center of DINO and moving averages included."""
    # So small that rounding does not grow over the four steps; in float64 the gradients agree to 1e-13.
    shares = (0.02, 0.01, 0.02, 0.05, 1.0, 1.0)
    recipe = Together((*RECIPES.values(), Supervised(2, SGD, 16)), shares, 2, 16, Optimizer("sgd", 0.05))
    one = train(recipe, tinted, tmp_path / "one")
    two = train(recipe, tinted, tmp_path / "two", devices=2)
    start = NETWORK.build().state_dict()
    for name in one:
        assert max(differences(one[name], two[name])) < 1e-4, name
        if name.endswith("network"):
            learned = {key: value for key, value in one[name].items() if key in start and "running" not in key}
            assert max(differences(learned, {key: start[key] for key in learned})) > 5e-3, name


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_goes_on_to_the_same_weights(name: str, tinted: Data, tmp_path: Path) -> None:
    """Killed in its second epoch, before the third of four steps has moved the averages; by the bit."""
    recipe = RECIPES[name]
    whole = train(recipe, tinted, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "optimizer_step", killed_after_half)
        with pytest.raises(KeyError, match="killed"):
            train(recipe, tinted, tmp_path / "killed")
    resumed = train(recipe, tinted, tmp_path / "killed")
    assert whole.keys() == resumed.keys() == {"network", "projector"}
    for part in whole:
        assert all(torch.equal(value, resumed[part][key]) for key, value in whole[part].items())


def killed_after_half(task: Any, *args: Any, **kwargs: Any) -> None:
    super(Task, task).optimizer_step(*args, **kwargs)
    done = (task.trainer.global_step + 1) / task.schedule.steps
    if done > 0.5:
        raise KeyError("killed")
    task.after_step(done)


def test_training_until_an_epoch_and_on_is_training_at_once(tinted: Data, tmp_path: Path) -> None:
    for name in ("byol", "dino"):
        whole = train(RECIPES[name], tinted, tmp_path / "whole")
        half = train(RECIPES[name], tinted, tmp_path / "parts", epoch=1)
        rest = train(RECIPES[name], tinted, tmp_path / "parts")
        assert max(differences(whole["network"], half["network"])) > 1e-4
        assert max(differences(whole["network"], rest["network"])) == 0


WIDE = replace(NETWORK, arch_args={**NETWORK.arch_args, "channels": [16, 16, 32, 64]})
HEADS: dict[str, Any] = {"projector_hidden": 64, "projector_out": 32}
LEARNERS: dict[str, Any] = {
    "vicreg": ssl.VICReg(20, SGD, 16, EASY, **HEADS),
    "barlow_twins": ssl.BarlowTwins(20, SGD, 16, EASY, **HEADS),
    "simclr": ssl.SimCLR(20, SGD, 16, EASY, **HEADS),
    "byol": ssl.BYOL(30, Optimizer("sgd", 0.1, warmup_epochs=2), 8, EASY, predictor_hidden=64, momentum=0.95, **HEADS),
    "dino": ssl.DINO(
        40,
        Optimizer("adamw", 0.005, warmup_epochs=2),
        16,
        replace(EASY, blur=(0, 0, 0), solarize=(0, 0, 0)),
        local_crops=0,
        momentum=0.9,
        projector_hidden=64,
        bottleneck=32,
        prototypes=64,
        freeze_prototypes=0,
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_two_crops_of_an_image_come_closer_than_those_of_others(name: str, tinted: Data, tmp_path: Path) -> None:
    views, store = tinted
    network: Any = WIDE.build()
    data = AugmentedViews(views, store, ssl.SimCLR(1, SGD, 2, EASY).augment(OVERLAY), seed=1)
    crops_of_all = [data[[(epoch, row) for row in range(len(views))]][0] for epoch in range(5)]
    before = closeness(network, crops_of_all)
    folder = trained(job(LEARNERS[name], views, WIDE), TrainingSettings(), store, "cpu", tmp_path)
    network.load_state_dict(load_file(folder / "network.safetensors"))
    after = closeness(network, crops_of_all)
    assert after > before + 0.1
    if name != "dino":  # its teacher moves the target
        losses = pl.read_parquet(folder.parent / "history.parquet")["loss"]
        assert losses[-1] < losses[0] / 1.5


@torch.no_grad()
def closeness(network: nn.Module, crops_of_all: list[list[Tensor]]) -> float:
    """Mean cosine of two crops of one image, less that of two images, about the mean embedding."""
    network.eval()
    values = []
    for pair in crops_of_all:
        first, second = (network(crop) for crop in pair)
        first, second = (nn.functional.normalize(part - part.mean(0)) for part in (first, second))
        cosines = first @ second.T
        others = (cosines.sum() - cosines.trace()) / (cosines.numel() - len(cosines))
        values.append(float(cosines.diag().mean() - others))
    return sum(values) / len(values)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", RECIPES)
def test_augmentation_draws_from_the_seeded_generators_only(name: str) -> None:
    augment: Any = pickle.loads(pickle.dumps(RECIPES[name].augment(CONFIG)))
    runs = []
    for seed in (3, 3, 4):
        seed_all(seed)
        runs.append([view for _ in range(5) for view in augment(picture(), False)])
    assert all(torch.equal(first, second) for first, second in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(first, second) for first, second in zip(runs[0], runs[2], strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])


def test_views_have_the_networks_size_mean_and_deviation() -> None:
    recipe = replace(RECIPES["simclr"], augmentation=replace(EASY, min_area=1, min_background_area=0.3))
    grey = Image.new("RGB", (50, 50), (191, 191, 191))
    for view in recipe.augment({**CONFIG, "input_size": (3, 24, 32)})(grey, False):
        assert view.shape == (3, 24, 32)
        torch.testing.assert_close(view, torch.full((3, 24, 32), (191 / 255 - 0.5) / 0.25))


def test_repeated_backgrounds_have_a_smallest_crop_of_their_own() -> None:
    """Of an image whose left half is black and right half white, only whole crops show both."""
    halves = Image.new("RGB", (64, 64))
    halves.paste((255, 255, 255), (32, 0, 64, 64))
    recipe = replace(RECIPES["simclr"], augmentation=replace(EASY, min_area=0.01, min_background_area=1.0))
    augment = recipe.augment(CONFIG)
    seed_all(0)
    spans = {
        flag: [float(v.max() - v.min()) for _ in range(20) for v in augment(halves, flag)] for flag in (False, True)
    }
    assert min(spans[True]) > 3.9
    assert min(spans[False]) == 0


@pytest.mark.parametrize(
    ("side", "chosen", "expected"), [(224, None, 96), (48, None, 24), (32, None, 16), (48, 20, 20)]
)
def test_small_crops_follow_the_networks_size(side: int, chosen: int | None, expected: int) -> None:
    recipe = replace(RECIPES["dino"], local_side=chosen, local_crops=3)
    views: Any = recipe.augment({**CONFIG, "input_size": (3, side, side)})(picture(), False)
    assert [view.shape[-1] for view in views] == [side, side, expected, expected, expected]


@pytest.mark.parametrize("name", ["byol", "dino"])
def test_the_moving_average_follows_the_papers_schedule(name: str, tinted: Data, tmp_path: Path) -> None:
    recipe = replace(RECIPES[name], momentum=0.5)
    task: Any = recipe.task(NETWORK.build(), Schedule(Optimizer("sgd", 0.1), 16, 5, 5))
    expected = {key: value.clone() for key, value in task.average.named_parameters()}
    for step in range(5):
        with torch.no_grad():
            for value in task.network.parameters():
                value.add_(torch.randn_like(value))
        momentum = 1 - (1 - 0.5) * (math.cos(math.pi * step / 4) + 1) / 2
        for key, value in task.network.named_parameters():
            expected[key] = momentum * expected[key] + (1 - momentum) * value.detach()
        task.after_step((step + 1) / 5)
    for key, value in task.average.named_parameters():
        torch.testing.assert_close(value, expected[key])
        assert not value.requires_grad


def test_byol_keeps_the_trained_network_and_dino_the_teacher() -> None:
    byol: Any = RECIPES["byol"].task(NETWORK.build(), Schedule(Optimizer("sgd", 0.1), 16, 4, 2))
    dino: Any = RECIPES["dino"].task(NETWORK.build(), Schedule(Optimizer("sgd", 0.1), 16, 4, 2))
    assert byol.weights() == {"network": byol.network, "projector": byol.head}
    assert dino.weights() == {"network": dino.average, "projector": dino.average_head}
    for key, value in dino.head.state_dict().items():
        assert torch.equal(value, dino.average_head.state_dict()[key])


def test_byol_of_perfect_predictions_is_zero_and_of_opposite_ones_eight() -> None:
    task: Any = RECIPES["byol"].task(NETWORK.build(), Schedule(Optimizer("sgd", 0.1), 16, 4, 2))
    views = [torch.randn(4, 3, 32, 32)] * 2
    task.average, task.average_head = task.network, task.head
    for sign, expected in ((1, 0.0), (-1, 8.0)):
        task.predictor = Times(sign)
        assert task.loss(views, torch.zeros(4)).item() == pytest.approx(expected, abs=1e-5)


class Times(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return self.factor * values


def test_prototypes_stay_while_they_are_frozen(tinted: Data, tmp_path: Path) -> None:
    kept = []
    for freeze in (0, 2):
        recipe = replace(RECIPES["dino"], freeze_prototypes=freeze, momentum=0.0)
        end = train(recipe, tinted, tmp_path / str(freeze))["projector"]["last_layer.weight_v"]
        start = train(recipe, tinted, tmp_path / str(freeze), epoch=1)["projector"]["last_layer.weight_v"]
        kept.append(torch.equal(start, end))
    assert kept == [False, True]


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_mambaout"])
def test_the_projector_fits_networks_that_widen_their_features_late(name: str) -> None:
    network: Any = timm.create_model(name, num_classes=0).eval()
    assert network.num_features != ssl.width_of(network)
    side = resolve_model_data_config(network)["input_size"]  # type: ignore[no-untyped-call]
    assert RECIPES["simclr"].projector(ssl.width_of(network)).eval()(network(torch.zeros(2, *side))).shape == (2, 16)


@pytest.mark.parametrize("name", RECIPES)
def test_the_number_of_linear_layers_is_what_is_said(name: str) -> None:
    recipes = [RECIPES[name]] if name == "dino" else [replace(RECIPES[name], projector_layers=n) for n in (1, 4)]
    for recipe in recipes:
        layers = [*recipe.projector(8).layers]
        assert sum(isinstance(layer, nn.Linear) for layer in layers) == recipe.projector_layers


def test_small_crops_need_a_network_that_takes_them() -> None:
    recipe = RECIPES["dino"]
    fixed, free = (timm.create_model("test_vit", num_classes=0, dynamic_img_size=free) for free in (False, True))
    with pytest.raises(ConfigError, match=r"local_crops=2.*dynamic_img_size=true"):
        recipe.task(fixed, Schedule(Optimizer("sgd", 0.1), 16, 4, 2))
    task = recipe.task(free, Schedule(Optimizer("sgd", 0.1), 16, 4, 2))
    views = [torch.randn(2, 3, side, side) for side in (160, 160, 64, 64)]
    assert task.loss(views, torch.zeros(2)).isfinite()
    replace(recipe, local_crops=0).task(fixed, Schedule(Optimizer("sgd", 0.1), 16, 4, 2))


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_changes_the_loss_little(name: str) -> None:
    torch.manual_seed(0)
    task = RECIPES[name].task(NETWORK.build(), Schedule(Optimizer("sgd", 0.1), 16, 4, 2))
    views = [torch.randn(16, 3, 32, 32) for _ in range(2)]
    exact = task.loss(views, torch.zeros(16))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = task.loss(views, torch.zeros(16))
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_features_can_be_read_behind_the_projector(layer: int, tmp_path: Path) -> None:
    """The same training for every layer; widths tell which one is read."""
    network = replace(NETWORK, arch_args={**NETWORK.arch_args, "channels": [8, 8, 8, 24]})
    recipe = replace(RECIPES["dino"], epochs=1)
    loaded = TrainedEncoder(network, recipe, layer=layer).train(inputs(tmp_path))
    assert loaded.module(torch.zeros(1, 3, 32, 32)).shape == (1, {0: 24, 1: 16, -1: 8}[layer])
    assert not loaded.random


def inputs(cache: Path) -> TrainingInputs:
    manifest = Shapes(classes=3, train_per_class=20, val_per_class=4, planted_share=0.5).manifest()
    roles = PerClassSplit(target=8, heldout=4, shared=2, public=6, unseen=4, min_side_px=8).assign(manifest.rows, 0)
    rows = images.inspect(manifest.rows.join(roles.select("id", "role"), on="id"), manifest.store)
    return TrainingInputs(
        model=NETWORK,
        images=crops.views(rows, crops.FullImage()),
        backgrounds=crops.views(rows, crops.BackgroundCrop(8)),
        labels=tuple(sorted(rows["label"].unique())),
        repeats={},
        store=manifest.store,
        cache=cache,
        device="cpu",
        seed=0,
        settings=TrainingSettings(),
        folders={},
        waits={},
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vicreg", {"epochs": 0}, r"model\.recipe\.epochs=0"),
        ("vicreg", {"batch_size": 1}, r"model\.recipe\.batch_size=1: must be at least 2"),
        ("vicreg", {"invariance": -1}, r"model\.recipe\.invariance=-1: must be at least 0"),
        ("vicreg", {"projector_layers": 0}, r"model\.recipe\.projector_layers=0: must be at least 1"),
        ("barlow_twins", {"off_diagonal": -0.1}, r"model\.recipe\.off_diagonal=-0\.1"),
        ("simclr", {"temperature": 0}, r"model\.recipe\.temperature=0: must be above 0"),
        ("byol", {"momentum": 1.1}, r"model\.recipe\.momentum=1\.1: must lie in \[0, 1\]"),
        ("dino", {"teacher_temperature": 0}, r"model\.recipe\.teacher_temperature=0"),
        ("dino", {"local_crops": -1}, r"model\.recipe\.local_crops=-1"),
        ("dino", {"local_min_area": 0.5}, r"model\.recipe\.local_min_area=0\.5: .*min_area=0\.4"),
        ("dino", {"augmentation": EASY}, r"augmentation\.blur=\[0, 0\]: must be 3 probabilities"),
        ("simclr", {"augmentation": replace(EASY, min_area=0)}, r"model\.recipe\.augmentation\.min_area=0"),
        ("simclr", {"augmentation": replace(EASY, grayscale=2)}, r"augmentation\.grayscale=2"),
        ("simclr", {"augmentation": replace(EASY, blur=ONE_NUMBER)}, r"augmentation\.blur=\[0\.5\]: must be 2"),
        ("simclr", {"augmentation": replace(EASY, jitter=(1, 1))}, r"augmentation\.jitter=\[1, 1\]: must be 4 shares"),
        ("simclr", {"augmentation": replace(EASY, jitter_strength=9)}, r"augmentation\.jitter_strength=9"),
    ],
)
def test_bad_settings_name_their_key(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RECIPES[name], **changes)


def test_without_lightly_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lightly.*dejavu_exp\[ssl\]"):
        ssl.SimCLR(1, SGD)


NETWORKS = ("resnet50", "resnet_small", "vit_small")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("recipe", [*RECIPES, "supervised"])
def test_every_recipe_goes_with_every_network(recipe: str, network: str) -> None:
    chosen = ["model=trained", f"model/recipe={recipe}", f"model/network={network}"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        model = config.build(config.resolve(compose("config", chosen)))["model"]
    assert type(model.recipe).__name__.lower() == recipe.replace("_", "")
    model.check()
    with torch.device("meta"):
        built: Any = timm.create_model(model.network.arch, num_classes=0, **model.network.arch_args)
        side = resolve_model_data_config(built)["input_size"]  # type: ignore[no-untyped-call]
        assert built.eval()(torch.zeros(2, *side)).shape == (2, built.num_features)
