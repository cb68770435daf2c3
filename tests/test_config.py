"""Every configuration file composes and binds; bad values fail with key, value and a way out."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException

from dejavu_exp import config
from dejavu_exp.errors import ConfigError

FILES = sorted(path.relative_to(config.CONF_DIR) for path in config.CONF_DIR.rglob("*.yaml"))
GROUPS = [path for path in FILES if len(path.parts) > 1 and path.parts[0] != "hydra"]
NEEDED = {
    ("model", "torchscript"): ["model.weights=/nowhere.pt"],
    ("model", "huggingface"): ["model.weights=/nowhere"],
    ("model", "callable"): ["model.function=nowhere:encoder"],
    ("dataset", "tiny_imagenet"): ["dataset.root=/nowhere"],
    ("dataset", "imagenet"): ["dataset.root=/nowhere", "dataset.boxes=/nowhere"],
    ("dataset", "manifest"): ["dataset.path=/nowhere.csv"],
    ("dataset", "boxed"): ["dataset.root=/nowhere", "dataset.boxes=/nowhere"],
    ("dataset", "folder"): ["dataset.root=/nowhere"],
    ("dataset", "coco"): ["dataset.root=/nowhere"],
    ("dataset", "flickr8k"): ["dataset.root=/nowhere"],
    ("dataset", "webdataset"): ["dataset.shards=/nowhere"],
    ("tagger", "precomputed"): ["tagger.path=/nowhere.parquet"],
    ("tagger", "authors_annotations"): ["tagger.path=/nowhere.pkl"],
    ("experiment", "replicate"): ["dataset.root=/nowhere"],
    ("experiment", "coco"): ["dataset.root=/nowhere"],
    ("experiment", "flickr8k"): ["dataset.root=/nowhere"],
}
"""Values that have no default."""


def resolved(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        return config.resolve(compose("config", list(overrides)))


def choosing(path: Path) -> list[str]:
    """The overrides that choose a file of the configuration, with the values that have no default."""
    group, name = path.parent.as_posix(), path.stem
    needed = NEEDED.get((group, name), [])
    if group == "crop_classifier":
        return ["reference=crop_classifier", f"crop_classifier@references.crop_classifier={name}"]
    if group == "text_encoder":
        return ["reference=text_embedding", f"text_encoder@references.text_embedding.encoder={name}"]
    if group == "model/preprocess":
        return [*choosing(Path("model/torchscript.yaml")), f"{group}={name}"]
    if group.startswith("model/"):
        return ["model=trained", f"{group}={name}", *needed]
    return [f"{group}={name}", *needed]


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_every_file_composes_and_binds(path: Path) -> None:
    parts = config.build(resolved(*choosing(path)))
    assert set(parts) == {*config.PARTS, "references", *config.NUMBERS}


@pytest.mark.parametrize("dataset", ["shapes", "tiny_imagenet", "imagenet", "manifest"])
def test_the_crop_classifier_suits_the_data_set(dataset: str) -> None:
    needed = NEEDED.get(("dataset", dataset), [])
    found = resolved(f"dataset={dataset}", "reference=crop_classifier", *needed)["references"]["crop_classifier"]
    assert found["network"]["arch"] == {"shapes": "resnet18", "tiny_imagenet": "resnet18"}.get(dataset, "resnet50")


@pytest.mark.parametrize("path", [path for path in GROUPS if path.parts[0] == "experiment"], ids=str)
def test_every_sweep_names_keys_that_exist_and_values_that_pass(path: Path) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        params = compose("config", choosing(path), return_hydra_config=True).hydra.sweeper.params or {}
    for key, values in params.items():
        for value in str(values).split(","):
            config.build(resolved(*choosing(path), f"{key}={value}"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_opens_with_what_it_is_for(path: Path) -> None:
    head = (config.CONF_DIR / path).read_text().splitlines()
    text = "\n".join(line for line in head[:8] if line.startswith("#"))
    assert "python -m dejavu_exp" in text
    for word in ("Cost:", "Expect:"):
        assert word in text


def test_the_promised_command_composes_and_checks() -> None:
    parts = config.build(resolved("model=clip_vitl14", "reference=naive_bayes"))
    assert list(parts["references"]) == ["naive_bayes"]
    assert parts["model"].arch.startswith("ViT-L-14")


def test_reference_is_a_list_group() -> None:
    assert list(resolved("reference=[label_shuffle,naive_bayes]")["references"]) == ["label_shuffle", "naive_bayes"]


def test_a_tagger_of_the_models_architecture_takes_its_weights() -> None:
    chosen = ["model=efficientnet_lite0", "model.weights=/some/file.safetensors", "tagger=timm_classifier"]
    assert resolved(*chosen)["tagger"]["encoder"]["weights"] == "/some/file.safetensors"
    assert (
        resolved("model=clip_vitb32", "model.weights=/f.pt", "tagger=timm_classifier")["tagger"]["encoder"]["weights"]
        == "hub"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+probe.kk=3", r"probe\.kk is not a key of the configuration: did you mean probe\.k\?"),
        ("+nonsense=1", r"nonsense is not a key of the configuration"),
        ("+references.naive_bayes.smoothin=1", r"did you mean references\.naive_bayes\.smoothing\?"),
        ("probe.k=many", r"probe\.k=many: must be a whole number"),
        ("probe.k=0", r"probe\.k=0: must be at least 1"),
        ("probe.k=1.5", r"probe\.k=1\.5: must be a whole number"),
        ("probe.metric=l3", r"probe\.metric=l3: must be one of l2, cosine"),
        ("scoring.level=2", r"scoring\.level=2: must lie between 0 and 1"),
        ("trainer.accelerator=tpu", r"trainer\.accelerator=tpu: must be one of auto, cpu, cuda"),
        ("dataset=tiny_imagenet", r"dataset\.root is not set"),
        ("dataset.classes=99", r"dataset\.classes=99"),
        ("seed=x", r"seed"),
        ("reference=[]", r"reference is empty"),
        (
            "model._target_=dejavu_exp.nothing.Nothing",
            r"model\._target_=dejavu_exp\.nothing\.Nothing: cannot be imported",
        ),
    ],
)
def test_a_bad_value_names_key_value_and_limit(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build(resolved(override))


def test_an_unknown_key_without_plus_is_refused_by_hydra() -> None:
    with pytest.raises(ConfigCompositionException, match=r"probe\.kk"):
        resolved("probe.kk=3")


@pytest.mark.parametrize("flag", [["--help"], ["--cfg", "job"]])
def test_the_command_line_answers_at_once(flag: list[str]) -> None:
    """Under a second; of three tries the best counts, for a machine may be busy.

    On a slow one it must not take longer than six imports of Hydra alone; an import of torch takes eleven.
    """
    seconds: list[float] = []
    bare: list[float] = []
    for _ in range(3):
        for command, times in ((["-m", "dejavu_exp", *flag], seconds), (["-c", "import hydra"], bare)):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
            times.append(time.perf_counter() - start)
            assert done.returncode == 0, done.stderr
            assert "naive_bayes" in done.stdout or times is bare
    assert min(seconds) < max(1.0, 6 * min(bare))


def test_help_shows_every_group() -> None:
    done = subprocess.run([sys.executable, "-m", "dejavu_exp", "--help"], capture_output=True, text=True)
    for group in {path.parts[0] for path in GROUPS}:
        assert f"{group}: " in done.stdout


def test_a_reference_may_be_asked_in_another_way_than_the_encoder() -> None:
    parts = config.build(
        resolved("experiment=captions", "reference=two_model", "+probe@references.two_model.probe=caption_to_caption")
    )
    assert parts["probe"].reads == {"images", "texts"}
    assert parts["references"]["two_model"].probe.reads == {"texts"}


def test_text_encoders_side_by_side_are_asked_like_the_encoder() -> None:
    named = ["text_ngrams", "text_minilm", "text_gte_large", "text_e5_base"]
    parts = config.build(resolved("experiment=captions", f"reference=[{','.join(named)}]", "probe.k=7"))
    assert list(parts["references"]) == named
    for name, reference in parts["references"].items():
        assert (reference.key, reference.probe.k, reference.probe.query) == (
            f"references.{name}",
            7,
            parts["probe"].query,
        )
    assert parts["references"]["text_e5_base"].encoder.prompt == "query: "
