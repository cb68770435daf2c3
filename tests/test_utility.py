"""Utility: accuracies whose truth is planted, exact intervals, what is excluded, and nothing that row order changes."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import polars as pl
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from scipy import optimize, stats
from torch import nn

from dejavu_exp import provenance, tables, utility
from dejavu_exp.crops import FullImage
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.encoders import LoadedEncoder, OpenClipEncoder, TimmEncoder, weights
from dejavu_exp.errors import ConfigError
from dejavu_exp.extract import Extractor
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.tables import Float32Array
from dejavu_exp.utility import Utility

CONF = Path(__file__).parents[1] / "conf" / "utility"
KNN, LINEAR, ZERO_SHOT = "k-NN accuracy", "linear-probe accuracy", "zero-shot accuracy"
MODEL = TimmEncoder("resnet18", "random")
ANCHORS = {"ant": (220, 40, 40), "bee": (40, 220, 40), "cat": (40, 40, 220), "dog": (220, 220, 40)}


class MeanColour(nn.Module):
    """Mean of each channel, and how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return pixels.mean(dim=(2, 3))


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.resize((8, 8)), dtype=np.float32)).permute(2, 0, 1)


def encoder(module: nn.Module | None = None) -> LoadedEncoder:
    return LoadedEncoder(module or MeanColour(), to_tensor, "mean colour", "none", "0", "as it is", random=False)


class World:
    """Plain pictures of known colour; labels follow the colour, or not."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def add(
        self,
        role: str,
        count: int,
        seed: int,
        *,
        planted: bool = True,
        labels: tuple[str, ...] = tuple(ANCHORS),
        spread: int = 20,
    ) -> tuple[pl.DataFrame, Float32Array]:
        """Views of `count` images a label, and the colours that an encoder of mean colour finds."""
        rng = np.random.default_rng(seed)
        names, truth, colours = [], [], []
        for index in range(count * len(labels)):
            label = labels[index % len(labels)]
            middle = np.array(ANCHORS[label]) if planted else rng.integers(0, 256, 3)
            colour = np.clip(middle + rng.integers(-spread, spread + 1, 3), 0, 255)
            stream = io.BytesIO()
            Image.new("RGB", (8, 8), (int(colour[0]), int(colour[1]), int(colour[2]))).save(stream, "PNG")
            name = f"{role}-{index:04d}.png"
            self.files[name] = stream.getvalue()
            names.append(name)
            truth.append(label)
            colours.append(colour)
        return self.views(names, truth, role), np.array(colours, dtype=np.float32)

    def views(self, names: list[str], labels: list[str], role: str) -> pl.DataFrame:
        columns = {
            "view_id": [f"{name}#full" for name in names],
            "id": names,
            "truth": [[label] for label in labels],
            "texts": [None] * len(names),
            "view": "full",
            "role": role,
            "label": labels,
            "path": names,
            "content": [provenance.hash_bytes(self.files[name]) for name in names],
            **{"xmin": 0, "ymin": 0, "xmax": 8, "ymax": 8, "status": "ok", "detail": None},
        }
        return pl.DataFrame(columns, schema=dict(tables.VIEWS))

    def manifest(self, **names: str) -> Manifest:
        return Manifest("colours", pl.DataFrame(schema=dict(tables.MANIFEST)), MemoryStore(self.files), names)


Measure = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """`Utility.measure` by the name of the measure, with the usual inputs."""

    def run(
        world: World,
        bank_views: pl.DataFrame,
        bank: Float32Array,
        test_views: pl.DataFrame,
        *,
        what: Utility | None = None,
        model: object = MODEL,
        loaded: LoadedEncoder | None = None,
        k: int = 5,
        seed: int = 0,
        names: dict[str, str] | None = None,
    ) -> dict[str, dict[str, Any]]:
        extractor = Extractor(tmp_path, accelerator="cpu", batch_size=32, workers=0)
        probe = KnnProbe(FullImage(), FullImage(), k)
        found = (what or Utility()).measure(
            loaded or encoder(),
            model,
            bank_views,
            bank,
            test_views,
            extractor,
            world.manifest(**names or {}),
            probe,
            seed,
        )
        return {entry["measure"]: entry for entry in found}

    return run


def test_classes_that_the_encoder_separates_are_all_named(measure: Measure) -> None:
    world = World()
    found = measure(world, *world.add("public", 15, 0), world.add("unseen", 5, 1)[0])
    assert list(found) == [KNN, LINEAR]
    lowest = float(stats.beta.ppf(0.025, 20, 1))
    for entry in found.values():
        assert entry["estimate"] == pytest.approx(
            {"value": 1.0, "low": lowest, "high": 1.0, "n_used": 20, "n_excluded": 0}
        )
    assert found[KNN]["detail"] == "k = 5 public images, l2; 20 whole unseen images"
    assert re.fullmatch(
        r"logistic regression on 60 public images, C = \S+ \(the best of 6 in 3-fold cross-validation on 60 of them\); "
        r"20 whole unseen images",
        found[LINEAR]["detail"],
    )


def test_labels_that_colours_do_not_tell_give_chance(measure: Measure) -> None:
    world = World()
    found = measure(world, *world.add("public", 50, 2, planted=False), world.add("unseen", 50, 3, planted=False)[0])
    for entry in found.values():
        assert entry["estimate"]["low"] < 1 / len(ANCHORS) < entry["estimate"]["high"]


def test_knn_accuracy_is_that_of_brute_force(measure: Measure) -> None:
    world = World()
    views, bank = world.add("public", 30, 4, planted=False)
    tests, colours = world.add("unseen", 20, 5, planted=False)
    found = measure(world, views, bank, tests, what=Utility(linear_probe=False), k=1)
    nearest = ((colours[:, None] - bank[None]) ** 2).sum(axis=2).argmin(axis=1)
    correct = views["label"].to_numpy()[nearest] == tests["label"].to_numpy()
    assert found[KNN]["estimate"]["value"] == correct.mean()
    assert measure(world, views, bank, tests, k=1000)[KNN]["detail"].startswith("k = 120 public images")


def test_without_unseen_images_a_fifth_of_the_bank_is_held_out(measure: Measure) -> None:
    """With k = 1 a tested image that stayed in the bank would find itself, and random labels would score 1.0."""
    world = World()
    views, bank = world.add("public", 50, 6, planted=False)
    module = MeanColour()
    found = measure(world, views, bank, views.clear(), k=1, loaded=encoder(module))
    assert module.calls == 0
    for entry in found.values():
        assert entry["estimate"]["n_used"] == 40
        assert entry["estimate"]["low"] < 1 / len(ANCHORS) < entry["estimate"]["high"]
        assert entry["detail"].endswith(
            "; 40 public images, 20 % of the bank, held out of it for want of usable unseen ones"
        )
    assert found[LINEAR]["detail"].startswith("logistic regression on 160 public images")
    unusable = world.add("unseen", 2, 7)[0].with_columns(status=pl.lit("unreadable"))
    assert measure(world, views, bank, unusable, k=1) == found


def test_held_out_images_are_a_fifth_of_every_class() -> None:
    frame = pl.DataFrame({"view_id": [str(i) for i in range(65)], "label": ["a"] * 50 + ["b"] * 10 + ["c"] * 4 + ["d"]})
    for seed in range(5):
        held = frame.filter(pl.Series(utility._spread(frame, seed, "x") < utility.HELD_OUT))
        assert dict(held.group_by("label").len().iter_rows()) == {"a": 10, "b": 2, "c": 1}


def test_images_that_cannot_be_tested_are_excluded_and_counted(measure: Measure) -> None:
    world = World()
    views, bank = world.add("public", 10, 8, labels=("ant", "bee", "cat"))
    tests, _ = world.add("unseen", 5, 9)
    world.files["unseen-0000.png"] = world.files["unseen-0000.png"][:40]
    tests = tests.with_columns(
        status=pl.when(pl.col("id") == "unseen-0001.png").then(pl.lit("no_label")).otherwise("status")
    )
    found = measure(world, views, bank, tests)
    for entry in found.values():
        # 20 less 5 of a class that the bank lacks, one that does not decode and one without a label.
        assert (entry["estimate"]["n_used"], entry["estimate"]["n_excluded"]) == (13, 7)
        assert entry["estimate"]["value"] == 1.0
        assert entry["detail"].endswith("; 13 whole unseen images")


def test_nothing_to_test_on_is_undefined(measure: Measure) -> None:
    world = World()
    views, bank = world.add("public", 10, 8, labels=("ant", "bee"))
    strangers, _ = world.add("unseen", 3, 9, labels=("cat",))
    undefined = {"value": None, "low": None, "high": None, "n_used": 0, "n_excluded": 3}
    assert {name: entry["estimate"] for name, entry in measure(world, views, bank, strangers).items()} == {
        KNN: undefined,
        LINEAR: undefined,
    }


def test_one_class_teaches_a_linear_probe_nothing(measure: Measure) -> None:
    world = World()
    found = measure(world, *world.add("public", 10, 8, labels=("ant",)), world.add("unseen", 4, 9, labels=("ant",))[0])
    assert found[KNN]["estimate"]["value"] == 1.0
    assert found[LINEAR]["estimate"] == {"value": None, "low": None, "high": None, "n_used": 0, "n_excluded": 4}
    assert "one class only" in found[LINEAR]["detail"]


def test_row_order_and_repetition_change_nothing(measure: Measure) -> None:
    world = World()
    views, bank = world.add("public", 40, 10, planted=False)
    tests, _ = world.add("unseen", 30, 11, planted=False)
    what = Utility(max_train=90, max_test=70)
    first = measure(world, views, bank, tests, what=what, seed=3)
    order = np.random.default_rng(0).permutation(len(views))
    again = measure(world, views[order], bank[order], tests.sample(fraction=1, shuffle=True, seed=1), what=what, seed=3)
    assert again == first
    assert measure(world, views, bank, tests, what=what, seed=4) != first
    held = measure(world, views, bank, tests.clear(), seed=3)
    assert measure(world, views[order], bank[order], tests.clear(), seed=3) == held


def test_limits_draw_evenly_from_all_classes_and_are_told(measure: Measure) -> None:
    world = World()
    views, bank = world.add("public", 20, 12)
    found = measure(world, views, bank, world.add("unseen", 10, 13)[0], what=Utility(max_train=24, max_test=12))
    assert found[KNN]["detail"] == "k = 5 public images, l2; 12 whole unseen images, drawn from 40"
    assert found[LINEAR]["detail"].startswith("logistic regression on 24 public images, drawn from 80, C = ")
    assert {entry["estimate"]["n_used"] for entry in found.values()} == {12}
    drawn = views[utility._draw(views, 24, 0, "x")]
    assert drawn["label"].value_counts()["count"].to_list() == [6, 6, 6, 6]
    assert len(utility._draw(views, 3, 0, "x")) == 3


# The linear probe


def test_the_probe_is_linear_and_standardises() -> None:
    rng = np.random.default_rng(0)
    values = rng.choice([-1.0, 1.0], (400, 2)).astype(np.float32)
    noisy = values + rng.normal(0, 0.1, (400, 2)).astype(np.float32)
    exclusive_or, first = (values.prod(axis=1) > 0).astype(np.int64), (values[:, 0] > 0).astype(np.int64)
    answers, _ = utility.linear_probe(noisy[:300], exclusive_or[:300], noisy[300:], 0)
    assert stats.binomtest(int((answers == exclusive_or[300:]).sum()), 100).pvalue > 0.01
    # The column that tells the class is a million times smaller than the one that does not.
    scaled = noisy * np.array([1e-3, 1e3], dtype=np.float32)
    answers, _ = utility.linear_probe(scaled[:300], first[:300], scaled[300:], 0)
    assert (answers == first[300:]).all()


def test_the_probe_is_the_minimum_of_the_penalised_loss() -> None:
    rng = np.random.default_rng(1)
    codes = np.arange(90) % 3
    bank = (rng.normal(size=(3, 4))[codes] + rng.normal(0, 1.5, (90, 4))).astype(np.float32)
    test = rng.normal(0, 2, (200, 4)).astype(np.float32)
    answers, how = utility.linear_probe(bank, codes, test, 0)
    strength = float(how.split()[2])
    mean, scale = bank.mean(axis=0), bank.std(axis=0)

    def loss(flat: Any) -> float:
        weights, bias = flat[:12].reshape(4, 3), flat[12:]
        scores = (bank - mean) / scale @ weights + bias
        log_sum = np.log(np.exp(scores).sum(axis=1))
        return float((log_sum - scores[np.arange(90), codes]).sum() + (weights**2).sum() / 2 / strength)

    best = optimize.minimize(loss, np.zeros(15), tol=1e-8).x
    scores = np.sort((test - mean) / scale @ best[:12].reshape(4, 3) + best[12:], axis=1)
    expected = ((test - mean) / scale @ best[:12].reshape(4, 3) + best[12:]).argmax(axis=1)
    clear = scores[:, 2] - scores[:, 1] > 0.01  # both stop a little before the minimum
    assert clear.mean() > 0.95
    assert (answers == expected)[clear].all()


def test_the_probe_does_without_folds_where_classes_are_too_small() -> None:
    bank = np.array([[0, 0], [0, 1], [9, 9], [9, 8]], dtype=np.float32)
    answers, how = utility.linear_probe(bank, np.array([0, 0, 1, 1]), bank, 0)
    assert answers.tolist() == [0, 0, 1, 1]
    assert how == "C = 0.01 (as no two classes have images for every fold)"


# Intervals


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 10), (137, 400), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_intervals_are_clopper_pearson(successes: int, trials: int, level: float) -> None:
    found = utility.proportion(successes, trials, level, 7)
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    assert (found.value, found.n_used, found.n_excluded) == (successes / trials, trials, 7)
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-9)


def test_the_level_is_the_one_configured(measure: Measure) -> None:
    world = World()
    inputs = (*world.add("public", 15, 0), world.add("unseen", 5, 1)[0])
    found = measure(world, *inputs, what=Utility(linear_probe=False, level=0.5))
    assert found[KNN]["estimate"]["low"] == pytest.approx(stats.beta.ppf(0.25, 20, 1))


# Zero-shot

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
NAMES = {"ant": "ant, pismire", "bee": "bee", "cat": "pet", "dog": "pet"}


def prompts(*names: str) -> torch.Tensor:
    tokens: torch.Tensor = open_clip.get_tokenizer("tiny")([f"a photo of a {name}." for name in names])
    return tokens


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[OpenClipEncoder, Any]:
    """A small CLIP in a file; its last layer is solved so that an anchor colour points from all texts to its own."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
    with weights.seeded(0):
        model = open_clip.create_model("tiny").eval()
    random = tmp_path / "random.pt"
    torch.save(model.state_dict(), random)
    transform = OpenClipEncoder("tiny", None, str(random)).load().transform
    with torch.no_grad():
        texts = model.encode_text(prompts("ant", "bee", "cat", "dog"), True)
        solved, model.visual.proj = model.visual.proj, None
        colours = [Image.new("RGB", (8, 8), ANCHORS[name]) for name in ("ant", "bee", "cat", "dog")]
        features = model.visual(torch.stack([transform(colour) for colour in colours]))
        solved.copy_(torch.linalg.pinv(features) @ (texts - texts.mean(dim=0)))
        model.visual.proj = solved
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    return OpenClipEncoder("tiny", None, str(tmp_path / "tiny.pt")), model


def test_zero_shot_names_what_the_texts_say(measure: Measure, tiny: tuple[OpenClipEncoder, Any]) -> None:
    world = World()
    inputs = (*world.add("public", 5, 14, spread=5), world.add("unseen", 5, 15, spread=5)[0])
    found = measure(world, *inputs, model=tiny[0])
    assert list(found) == [KNN, LINEAR, ZERO_SHOT]
    assert (found[ZERO_SHOT]["estimate"]["value"], found[ZERO_SHOT]["estimate"]["n_used"]) == (1.0, 20)
    swapped = inputs[2].with_columns(label=pl.col("label").replace({"ant": "bee", "bee": "ant"}))
    assert measure(world, *inputs[:2], swapped, model=tiny[0])[ZERO_SHOT]["estimate"]["value"] == 0.5


def test_zero_shot_accuracy_is_that_of_open_clip_by_hand(measure: Measure, tiny: tuple[OpenClipEncoder, Any]) -> None:
    spec, model = tiny
    world = World()
    views, bank = world.add("public", 5, 14, planted=False)
    tests, _ = world.add("unseen", 20, 15, planted=False)
    what = Utility(knn=False, linear_probe=False)
    loaded = spec.load()
    found = measure(world, views, bank, tests, what=what, model=spec, loaded=loaded, names=NAMES)
    words = {"ant": "ant", "bee": "bee", "cat": "pet", "dog": "pet"}
    options = sorted(set(words.values()))
    pixels = torch.stack([loaded.transform(Image.open(io.BytesIO(world.files[path]))) for path in tests["path"]])
    with torch.no_grad():
        texts = model.encode_text(prompts(*options), True)
        answers = (model.encode_image(pixels, True) @ texts.T).argmax(dim=1).tolist()
    correct = [options[answer] == words[label] for answer, label in zip(answers, tests["label"], strict=True)]
    assert len(set(answers)) > 1
    assert 0 < sum(correct) < len(correct)
    assert list(found) == [ZERO_SHOT]
    assert found[ZERO_SHOT]["estimate"]["value"] == np.mean(correct)
    assert found[ZERO_SHOT]["detail"] == (
        "3 class names in 'a photo of a {}.', softmax over all; 4 classes share them, and any class of the right name "
        "counts; 80 whole unseen images"
    )
    unnamed = measure(world, views, bank, tests.clear(), what=what, model=spec, loaded=loaded)
    assert unnamed[ZERO_SHOT]["detail"] == (
        "4 class names in 'a photo of a {}.', softmax over all; 4 classes have no name in the data set, so their label "
        "stands for it; 4 public images, 20 % of the bank, held out of it for want of usable unseen ones"
    )


def test_a_missing_tokenizer_loses_the_zero_shot_accuracy_alone(
    measure: Measure, tiny: tuple[OpenClipEncoder, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: str) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(open_clip, "get_tokenizer", missing)
    world = World()
    found = measure(world, *world.add("public", 5, 14), world.add("unseen", 2, 15)[0], model=tiny[0], k=3)
    assert found[KNN]["estimate"]["value"] == found[LINEAR]["estimate"]["value"] == 1.0
    assert found[ZERO_SHOT]["estimate"] == {"value": None, "low": None, "high": None, "n_used": 0, "n_excluded": 8}
    assert found[ZERO_SHOT]["detail"].startswith("not measured: ")
    assert "no connection" in found[ZERO_SHOT]["detail"]


def test_class_texts_survive_a_file_of_lines() -> None:
    names = {"a": "#1  fan", "b": "##", "c": "crane\nbird", "d": ""}
    assert utility.class_texts(list("abcd"), names) == {"a": "1 fan", "b": "b", "c": "crane bird", "d": "d"}


# Configuration


def test_switched_off_nothing_is_embedded(measure: Measure) -> None:
    world = World()
    module = MeanColour()
    inputs = (*world.add("public", 5, 0), world.add("unseen", 2, 1)[0])
    off = instantiate(OmegaConf.load(CONF / "none.yaml"))
    assert measure(world, *inputs, what=off, loaded=encoder(module)) == {}
    assert measure(world, *inputs, what=replace(off, zero_shot=True), loaded=encoder(module)) == {}
    assert module.calls == 0
    assert list(measure(world, *inputs, what=replace(off, knn=True))) == [KNN]


def test_the_file_with_everything_on_states_the_defaults() -> None:
    node = OmegaConf.load(CONF / "probes.yaml")
    assert instantiate(node) == Utility()
    assert set(node) - {"_target_"} == set(Utility.__dataclass_fields__)


def test_bad_values_name_the_key_and_the_limit() -> None:
    with pytest.raises(ConfigError, match=r"utility\.max_train=0: must be at least 1"):
        Utility(max_train=0)
    with pytest.raises(ConfigError, match=r"utility\.max_test=-1: must be at least 1"):
        Utility(max_test=-1)
    with pytest.raises(ConfigError, match=r"utility\.level=95: must lie between 0 and 1"):
        Utility(level=95)


def test_a_bank_that_does_not_fit_its_views_is_refused(measure: Measure) -> None:
    world = World()
    views, bank = world.add("public", 5, 0)
    with pytest.raises(ValueError, match="bank has 19 rows, bank_views 20"):
        measure(world, views, bank[1:], views.clear())


def test_a_caption_that_finds_its_image_has_rank_0() -> None:
    images = np.eye(4, dtype=np.float32)
    captions = images + np.float32(0.1)
    assert utility.ranks_of_own(captions, images).tolist() == [0, 0, 0, 0]
    assert utility.ranks_of_own(captions[::-1], images).tolist() == [3, 3, 3, 3]


def test_ranks_equal_a_count_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts, images = (rng.normal(size=(50, 6)).astype(np.float32) for _ in range(2))
    units = [[row / np.linalg.norm(row) for row in rows.astype(float)] for rows in (texts, images)]
    cosines = [[float(text @ image) for image in units[1]] for text in units[0]]
    expected = [sum(value >= row[place] for value in row) - 1 for place, row in enumerate(cosines)]
    monkeypatch.setattr(utility, "RANK_BLOCK", 7)
    assert utility.ranks_of_own(texts, images).tolist() == expected


def test_images_that_look_the_same_are_not_found() -> None:
    assert utility.ranks_of_own(np.ones((3, 2), np.float32), np.ones((3, 2), np.float32)).tolist() == [2, 2, 2]
