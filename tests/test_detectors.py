"""Detectors against the post-processing of transformers, on tiny random models saved as published ones are."""

import json
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dejavu_exp import tables
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.encoders import DetectorEncoder, LoadedEncoder
from dejavu_exp.encoders.detector_modules import best_scores
from dejavu_exp.encoders.open_clip_models import read_vocabulary
from dejavu_exp.errors import ConfigError, WeightsError
from dejavu_exp.extract import Extractor
from dejavu_exp.taggers import ScoreTagger, tag_views

T = cast(Any, transformers)
NAMES = {0: "cat", 1: "N/A", 2: "dog", 3: "cat", 4: "bus"}
WORDS = ("cat", "dog", "red bus")
SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2} | {
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
TIMM = {"backbone": "resnet18", "use_timm_backbone": True, "use_pretrained_backbone": False, "num_queries": 10}


def save(model: Any, folder: Path) -> None:
    """Save with standard normal weights: as they are made, boxes and images hardly differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_()
    model.save_pretrained(folder)


def rt_detr(folder: Path) -> None:
    backbone = T.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    options = SMALL | {
        "backbone_config": backbone,
        "encoder_hidden_dim": 16,
        "encoder_in_channels": [12, 16, 20],
        "decoder_in_channels": [16, 16, 16],
        "num_queries": 10,
        "num_denoising": 0,
    }
    save(T.RTDetrForObjectDetection(T.RTDetrConfig(**options, id2label=NAMES)), folder)
    T.RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def detr(folder: Path) -> None:
    save(T.DetrForObjectDetection(T.DetrConfig(**SMALL, **TIMM, id2label=NAMES)), folder)
    T.DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 80}).save_pretrained(folder)


def conditional_detr(folder: Path) -> None:
    config = T.ConditionalDetrConfig(**SMALL, **TIMM, id2label=NAMES)
    save(T.ConditionalDetrForObjectDetection(config), folder)
    T.ConditionalDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 80}).save_pretrained(folder)


def owl(folder: Path, kind: str) -> None:
    """OWL-ViT or OWLv2 with a tokenizer of whole words."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(T, f"{kind}Config")(
        text_config=size | {"vocab_size": 12, "max_position_embeddings": 8, "bos_token_id": 10, "eos_token_id": 11},
        vision_config=size | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    getattr(T, f"{kind}ForObjectDetection")(config).save_pretrained(folder)
    getattr(T, f"{kind}ImageProcessor")(size={"height": 32, "width": 32}).save_pretrained(folder)
    words = ["!", "a", "photo", "of", "cat", "dog", "red", "bus", "<unk>", "x", "<start>", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", 10), ("<end>", 11)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", unk_token="<unk>", pad_token="!"
    ).save_pretrained(folder)


KINDS: dict[str, Callable[[Path], None]] = {
    "rt_detr": rt_detr,
    "detr": detr,
    "conditional_detr": conditional_detr,
    "owlvit": lambda folder: owl(folder, "OwlViT"),
    "owlv2": lambda folder: owl(folder, "Owlv2"),
}


SEEDS = {"rt_detr": 8, "detr": 4}
"""With which the boxes of the pictures below are of several classes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a kind of detector, named by it."""
    folder = tmp_path_factory.mktemp("detectors")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng():
        for name, make in KINDS.items():
            torch.manual_seed(SEEDS.get(name, 0))
            make(folder / name)
    (folder / "words.txt").write_text("\n".join(WORDS))
    return folder


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection, even the attempt, is an error."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def encoder(folders: Path, kind: str, **changes: Any) -> DetectorEncoder:
    vocabulary = str(folders / "words.txt") if kind.startswith("owl") else None
    return DetectorEncoder(str(folders / kind), **{"vocabulary": vocabulary, **changes})


def pictures(count: int = 4) -> list[Image.Image]:
    """Of several sizes and proportions."""
    rng = np.random.default_rng(0)
    sizes = [(60, 40), (40, 90), (3, 30), (200, 120)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes[:count]]


def scores(loaded: LoadedEncoder, images: list[Image.Image]) -> torch.Tensor:
    transform = cast(Callable[[Image.Image], torch.Tensor], pickle.loads(pickle.dumps(loaded.transform)))
    with torch.no_grad():
        found: torch.Tensor = loaded.module(torch.stack([transform(image) for image in images]))
    return found


def expected(folder: Path, kind: str, images: list[Image.Image]) -> list[tuple[dict[str, float], float]]:
    """For each image the largest score of each name by transformers' own way, and the smallest of any box."""
    processor = T.AutoImageProcessor.from_pretrained(folder)
    names = dict(enumerate(WORDS)) if kind.startswith("owl") else NAMES
    padding = {} if kind in ("rt_detr", "owlvit", "owlv2") else {"pad_size": {"height": 80, "width": 80}}
    if kind.startswith("owl"):
        model = T.AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
        texts = [f"a photo of a {word}" for word in WORDS]
        tokens = T.AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", max_length=8, return_tensors="pt")
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    else:
        model, inputs = T.AutoModelForObjectDetection.from_pretrained(folder).eval(), {}
    result = []
    for image in images:
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt", **padding), **inputs)
        found = processor.post_process_object_detection(outputs, threshold=0.0)[0]
        best: dict[str, float] = {}
        for score, label in zip(found["scores"].tolist(), found["labels"].tolist(), strict=True):
            best[names[label]] = max(best.get(names[label], 0.0), score)
        result.append((best, float(found["scores"].min())))
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_the_best_scores_that_transformers_finds(kind: str, folders: Path) -> None:
    spec = encoder(folders, kind)
    spec.check()
    loaded = spec.load()
    names = WORDS if kind.startswith("owl") else ("cat", "dog", "bus")
    assert loaded.classes == names
    assert (loaded.weights, loaded.random, loaded.reads) == (f"folder {kind}", False, "images")
    oracle = expected(folders / kind, kind, pictures())
    assert len({name for best, _ in oracle for name in best} - {"N/A"}) > 1
    for row, (best, smallest) in zip(scores(loaded, pictures()).tolist(), oracle, strict=True):
        for name, score in zip(names, row, strict=True):
            if name in best:
                assert score == pytest.approx(best[name], abs=1e-5)
            else:
                # A pair of box and class that RT-DETR leaves out; else no box's best.
                assert score <= (smallest if kind in ("rt_detr", "conditional_detr") else 0)


def test_one_class_a_box_or_all() -> None:
    boxes = torch.tensor([[[0.5, 0.4, 0.1], [0.2, 0.3, 0.1]], [[0.9, 0.8, 0.7], [0.6, 0.1, 0.2]]])
    assert best_scores(boxes, one_class=True).tolist() == torch.tensor([[0.5, 0.3, 0.0], [0.9, 0.0, 0.0]]).tolist()
    assert best_scores(boxes, one_class=False).tolist() == torch.tensor([[0.5, 0.4, 0.1], [0.9, 0.8, 0.7]]).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_single_images_give(kind: str, folders: Path) -> None:
    loaded = encoder(folders, kind).load()
    single = torch.cat([scores(loaded, [image]) for image in pictures()])
    torch.testing.assert_close(scores(loaded, pictures()), single, atol=1e-5, rtol=0)


def test_tagger_names_objects_through_the_cache(folders: Path, tmp_path: Path) -> None:
    spec = encoder(folders, "detr")
    contents: dict[str, bytes] = {}
    for number, image in enumerate(pictures()):
        image.save(tmp_path / "a.png")
        contents[f"{number}.png"] = (tmp_path / "a.png").read_bytes()
    contents["4.png"] = b"broken"
    rows = [
        dict.fromkeys(tables.VIEWS)
        | {"view_id": f"{path}#full", "id": path, "path": path, "view": "full", "content": path, "status": "ok"}
        | {"xmin": 0, "ymin": 0, "xmax": 60, "ymax": 40}
        for path in contents
    ]
    for row, image in zip(rows, pictures(), strict=False):
        row |= {"xmax": image.width, "ymax": image.height}
    views = pl.DataFrame(rows, schema=dict(tables.VIEWS))
    manifest = Manifest("planted", pl.DataFrame(schema=dict(tables.MANIFEST)), MemoryStore(contents))
    extractor = Extractor(tmp_path / "cache", accelerator="cpu", batch_size=2, workers=0)
    best = [best for best, _ in expected(folders / "detr", "detr", pictures())]
    threshold = sorted(score for found in best for name, score in found.items() if name != "N/A")[1] - 1e-4
    found = tag_views(ScoreTagger(spec, top_tags=100, min_score=threshold), views, manifest, extractor)
    wanted = [{name for name, score in one.items() if score > threshold and name != "N/A"} for one in best]
    assert [set(tags) for tags in found["tags"]] == [*wanted, set()]
    assert any(wanted)
    assert found["status"].to_list() == ["ok"] * 4 + ["unreadable"]


def test_what_goes_into_the_cache_key(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("dog\nred bus\ncat")
    first, again = encoder(folders, "owlv2").load(), encoder(folders, "owlv2").load()
    assert (first.weights_hash, first.description) == (again.weights_hash, again.description)
    other = encoder(folders, "owlv2", vocabulary=str(tmp_path / "other.txt")).load()
    assert (other.classes, other.weights_hash == first.weights_hash) == (("dog", "red bus", "cat"), False)
    template = encoder(folders, "owlv2", template="{}").load()
    assert template.description != first.description
    assert template.weights_hash != first.weights_hash
    moved = shutil.copytree(folders / "detr", tmp_path / "detr")
    processor = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps(processor | {"resample": 3}))
    here, there = encoder(folders, "detr").load(), DetectorEncoder(str(moved)).load()
    assert (here.description, here.weights_hash) == (there.description, there.weights_hash)
    assert here.transform_text != there.transform_text


def test_random_weights_follow_the_seed_and_need_only_the_settings(folders: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(folders / "rt_detr" / name, tmp_path / name)
    with pytest.raises(WeightsError, match=r"has no file of type .safetensors"):
        DetectorEncoder(str(tmp_path)).check()
    state = torch.random.get_rng_state()
    loaded = [DetectorEncoder(str(tmp_path), weights="random", seed=seed).load() for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    hashes = [one.weights_hash for one in loaded]
    assert (hashes[0] == hashes[1], hashes[0] == hashes[2]) == (True, False)
    assert (loaded[0].random, loaded[0].weights) == (True, "random (seed 1)")
    with pytest.raises(ConfigError, match=r"weights=random: is for the folder of a model"):
        DetectorEncoder("facebook/detr-resnet-50", weights="random").check()


def test_bin_files_are_read_as_plain_tensors_alone(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "rt_detr", tmp_path / "bin")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert DetectorEncoder(str(folder)).load().weights_hash == encoder(folders, "rt_detr").load().weights_hash
    torch.save({**state, "more": Harm(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="weights cannot be read"):
        DetectorEncoder(str(folder)).load()
    assert not (tmp_path / "ran").exists()


class Harm:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_incomplete_weights_are_refused(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "detr", tmp_path / "detr")
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "class_labels" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(WeightsError, match=r"2 tensors are missing from its weights, the first class_labels"):
        DetectorEncoder(str(folder)).load()
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(WeightsError, match="weights cannot be read"):
        DetectorEncoder(str(folder)).load()


def changed(folders: Path, target: Path, **settings: Any) -> Path:
    """A copy of the DETR with other settings in config.json."""
    folder = shutil.copytree(folders / "detr", target)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_other_models_are_refused(folders: Path, tmp_path: Path) -> None:
    T.ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path / "vit")
    for name in ("preprocessor_config.json", "model.safetensors"):
        shutil.copy(folders / "detr" / name, tmp_path / "vit" / name)
    with pytest.raises(ConfigError, match="a model of type vit is no object detector"):
        DetectorEncoder(str(tmp_path / "vit")).check()
    code = changed(folders, tmp_path / "code", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    (code / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(WeightsError, match="AutoConfig"):
        DetectorEncoder(str(code)).check()
    assert not (tmp_path / "ran").exists()
    numbers = changed(folders, tmp_path / "numbers", id2label={"1": "a", "2": "b", "3": "c", "4": "d", "5": "e"})
    with pytest.raises(ConfigError, match="must name the classes 0 to 4"):
        DetectorEncoder(str(numbers)).load()
    softmax = shutil.copytree(folders / "rt_detr", tmp_path / "softmax")
    config = json.loads((softmax / "config.json").read_text())
    (softmax / "config.json").write_text(json.dumps(config | {"use_focal_loss": False}))
    with pytest.raises(ConfigError, match="use_focal_loss is false"):
        DetectorEncoder(str(softmax)).load()


def test_sizes_must_be_bounded(folders: Path, tmp_path: Path) -> None:
    for number, changes in enumerate(({"size": {"shortest_edge": 48}}, {"do_resize": False})):
        folder = shutil.copytree(folders / "rt_detr", tmp_path / str(number))
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | changes))
        with pytest.raises(ConfigError, match="sets no largest size"):
            DetectorEncoder(str(folder)).load()


def test_settings_that_cannot_work_are_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"my\.node\.template='x'"):
        DetectorEncoder("a/b", template="x", key="my.node")
    with pytest.raises(ConfigError, match=r"tagger\.encoder\.weights=mine\.pt: must be hub or random"):
        DetectorEncoder("a/b", weights="mine.pt")
    with pytest.raises(WeightsError, match=r"tagger\.encoder\.model=.*nowhere: .*there is no such folder"):
        DetectorEncoder(str(tmp_path / "nowhere")).check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"has no config\.json.*give the path of a folder"):
        DetectorEncoder(str(tmp_path / "empty")).check()
    with pytest.raises(ConfigError, match="vocabulary is null, and owlv2"):
        encoder(folders, "owlv2", vocabulary=None).check()
    with pytest.raises(ConfigError, match="vocabulary=coco: rt_detr knows its own classes"):
        encoder(folders, "rt_detr", vocabulary="coco").check()
    with pytest.raises(ConfigError, match="there is no such file, and the shipped ones are coco"):
        encoder(folders, "owlv2", vocabulary="nothing").check()


def test_hub_models_out_of_reach_are_found_before_any_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = DetectorEncoder("nobody/detector")
    spec.check()
    with pytest.raises(
        WeightsError,
        match=r"model=nobody/detector: cannot be had .*OFFLINE forbids downloads.*give the path of a folder",
    ):
        spec.load()


def test_hub_models_are_read_from_the_cache(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folders / name.partition("/")[2]))
    loaded = DetectorEncoder("somebody/rt_detr").load()
    assert loaded.weights == "hub somebody/rt_detr"
    assert loaded.weights_hash == encoder(folders, "rt_detr").load().weights_hash


def test_missing_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'dejavu_exp\[detect\]'"):
        DetectorEncoder("a/b").check()


def test_coco_vocabulary() -> None:
    names = read_vocabulary("coco")
    assert (len(names), names[0], names[-1]) == (80, "person", "toothbrush")
