"""Encoders: weights fit exactly or are refused, transforms follow the weights, and no code in a file is run."""

import argparse
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from dejavu_exp.encoders import (
    CheckpointEncoder,
    Encoder,
    LoadedEncoder,
    OpenClipEncoder,
    TimmEncoder,
    ZeroShotEncoder,
    checkpoints,
    open_clip_models,
    weights,
)
from dejavu_exp.errors import ConfigError, WeightsError

CONF = Path(__file__).parents[1] / "conf"
State: TypeAlias = dict[str, Tensor]
Networks: TypeAlias = dict[str, Any]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Empty caches, and a failure instead of a connection."""
    empty = tmp_path_factory.mktemp("cache")

    def refuse(*_: Any) -> None:
        raise AssertionError("a test went to the network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(empty))
    monkeypatch.setenv("TORCH_HOME", str(empty))
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def built(make: Callable[[], nn.Module], seed: int = 7) -> nn.Module:
    """A module with every tensor random, batch statistics included, so that no forgotten one goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    module = make().eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.1 * torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    return module


def picture(width: int = 200, height: int = 120) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def run(encoder: LoadedEncoder, side: int) -> Tensor:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output: Tensor = encoder.module(images)
    assert output.dtype == torch.float32
    assert not encoder.module.training
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    return output


def expected(function: Callable[[Tensor], Tensor], side: int) -> Tensor:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return function(images)


def saved(state: Any, path: Path) -> str:
    """Write a state dict or checkpoint in the format of the suffix."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


# timm


@pytest.fixture(scope="module", params=["test_resnet.r160_in1k", "test_vit.r160_in1k"])
def timm_model(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, built(lambda: timm.create_model(request.param))


def test_timm_file_gives_the_outputs_of_the_model_it_was_saved_from(
    timm_model: tuple[str, Any], tmp_path: Path
) -> None:
    arch, model = timm_model
    path = saved(model.state_dict(), tmp_path / "model.safetensors")
    features = TimmEncoder(arch, path).load()
    logits = TimmEncoder(arch, path, output="logits").load()
    probabilities = TimmEncoder(arch, path, output="probabilities").load()
    pooled = expected(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), 160)
    assert pooled.shape == (2, model.num_features)
    torch.testing.assert_close(run(features, 160), pooled, rtol=0, atol=0)
    torch.testing.assert_close(run(logits, 160), expected(model, 160), rtol=0, atol=0)
    torch.testing.assert_close(run(probabilities, 160), expected(model, 160).softmax(dim=1))
    assert features.weights == "file model.safetensors"
    assert not features.random
    assert features.classes is None
    assert {features.description, logits.description, probabilities.description} == {
        f"timm {arch}, {output}" for output in ("features", "logits", "probabilities")
    }
    assert features.weights_hash != logits.weights_hash


def test_timm_hub_weights_are_loaded_like_a_file(timm_model: tuple[str, Any], tmp_path: Path) -> None:
    arch, model = timm_model
    path = saved(model.state_dict(), tmp_path / "model.safetensors")
    hub = TimmEncoder(arch, arch_args={"pretrained_cfg_overlay": {"file": path}}).load()
    torch.testing.assert_close(run(hub, 160), run(TimmEncoder(arch, path).load(), 160), rtol=0, atol=0)
    assert hub.weights.startswith("hub ")


def test_file_without_a_classifier_serves_features_alone(timm_model: tuple[str, Any], tmp_path: Path) -> None:
    arch, model = timm_model
    head = model.pretrained_cfg["classifier"]
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{head}.")}
    path = saved(state, tmp_path / "headless.pt")
    whole = saved(model.state_dict(), tmp_path / "whole.pt")
    torch.testing.assert_close(
        run(TimmEncoder(arch, path).load(), 160), run(TimmEncoder(arch, whole).load(), 160), rtol=0, atol=0
    )
    with pytest.raises(WeightsError, match="2 tensors missing"):
        TimmEncoder(arch, path, output="logits").load()
    del state[next(iter(state))]
    with pytest.raises(WeightsError, match="3 tensors missing"):
        TimmEncoder(arch, saved(state, tmp_path / "short.pt")).load()


def test_training_checkpoints_are_opened(timm_model: tuple[str, Any], tmp_path: Path) -> None:
    arch, model = timm_model
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    settings = argparse.Namespace(lr=0.1)
    plain = TimmEncoder(arch, saved(model.state_dict(), tmp_path / "plain.safetensors")).load()
    for key in ("state_dict", "model"):
        content = {key: wrapped, "optimizer": {"state": {}}, "epoch": 3, "args": settings}
        found = TimmEncoder(arch, saved(content, tmp_path / f"{key}.pth")).load()
        assert found.weights_hash == plain.weights_hash


def test_wrong_architecture_is_named_with_counts_and_examples(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    path = saved(state, tmp_path / "other.safetensors")
    own = timm.create_model("test_vit").state_dict()
    with pytest.raises(WeightsError) as error:
        TimmEncoder("test_vit", path).load()
    text = str(error.value)
    assert "arch=test_vit" in text
    assert "other.safetensors" in text
    assert f"{len(own.keys() - state.keys())} tensors missing (" in text
    assert f"{len(state.keys() - own.keys())} unexpected (" in text
    shapes = sum(state[name].shape != own[name].shape for name in state.keys() & own.keys())
    assert f"{shapes} of another shape" in text


def test_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    state["fc.bias"] = torch.zeros(10)
    with pytest.raises(WeightsError, match=r"1 of another shape \(fc.bias \(10,\) instead of \(1000,\)\)"):
        TimmEncoder("test_resnet", saved(state, tmp_path / "a.pt"), output="logits").load()


def test_imagenet_columns_have_unique_names() -> None:
    classes = TimmEncoder("test_resnet", "random", output="probabilities").load().classes
    assert classes is not None
    assert len(set(classes)) == 1000
    assert classes[0] == "tench"
    # ImageNet has two cranes and two maillots.
    assert {"crane (n02012849)", "crane (n03126707)", "maillot (n03710637)", "maillot (n03710721)"} < set(classes)


def test_other_class_counts_are_numbered() -> None:
    encoder = TimmEncoder("test_resnet", "random", output="logits", arch_args={"num_classes": 3})
    assert encoder.load().classes == ("class_0", "class_1", "class_2")


def test_transform_is_the_models_own_and_can_be_pickled() -> None:
    loaded = TimmEncoder("test_vit.r160_in1k", "random").load()
    model = timm.create_model("test_vit.r160_in1k")
    own: Any = timm.data
    reference = own.create_transform(**own.resolve_model_data_config(model), is_training=False)
    torch.testing.assert_close(loaded.transform(picture()), reference(picture()), rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(loaded.transform))
    torch.testing.assert_close(again(picture()), reference(picture()), rtol=0, atol=0)
    assert "CenterCrop" in loaded.transform_text
    assert "'crop_pct': 0.95" in loaded.transform_text


def test_arch_args_reach_timm_and_the_description() -> None:
    overlay = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3]}
    node = OmegaConf.create(
        {
            "_target_": "dejavu_exp.encoders.TimmEncoder",
            "arch": "test_resnet",
            "weights": "random",
            "arch_args": {"channels": [8, 8, 8, 16], "pretrained_cfg_overlay": overlay},
        }
    )
    loaded = instantiate(node).load()
    assert loaded.transform(picture()).shape == (3, 96, 96)
    assert "(0.1, 0.2, 0.3)" in loaded.transform_text or "[0.1, 0.2, 0.3]" in loaded.transform_text
    assert "'channels': [8, 8, 8, 16]" in loaded.description
    assert loaded.description != TimmEncoder("test_resnet", "random").load().description


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "test_resnett"}, "did you mean test_resnet"),
        ({"arch": "resnet50.no_such_tag"}, "no_such_tag"),
        ({"arch": "vit_base_patch32_plus_256"}, "no published weights"),
        ({"arch": "vit_base_patch16_224.dino", "output": "logits"}, "no classifier"),
        ({"arch": "test_resnet", "output": "logits", "arch_args": {"num_classes": 10}}, "num_classes=10"),
    ],
)
def test_timm_refuses_before_loading(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimmEncoder(**arguments).check()


def test_timm_refuses_bad_values() -> None:
    with pytest.raises(ConfigError, match="output=pixels"):
        TimmEncoder("test_resnet", output="pixels")
    with pytest.raises(ConfigError, match=r"arch_args.checkpoint_path"):
        TimmEncoder("test_resnet", arch_args={"checkpoint_path": "x"})
    with pytest.raises(ConfigError, match=r"arch_args=.*colour"):
        TimmEncoder("test_resnet", "random", arch_args={"colour": 1}).load()


# Files


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}, "extra": Payload(marker)}, path)
    for encoder in (TimmEncoder("test_resnet", str(path)), CheckpointEncoder("vicreg", str(path), arch="resnet18")):
        with pytest.raises(WeightsError, match=r"evil.pt .*run code from the file.*safetensors"):
            encoder.load()
    raw = tmp_path / "evil.bin"
    raw.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(WeightsError, match=r"evil.bin"):
        TimmEncoder("test_resnet", str(raw)).load()
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut{suffix}"
    saved(timm.create_model("test_resnet").state_dict(), path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(broken)
        with pytest.raises(WeightsError, match=f"cut{suffix}"):
            TimmEncoder("test_resnet", str(path)).load()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {}, {"epoch": 3, "fc.weight": torch.zeros(1)}])
def test_files_without_a_state_dict_are_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no state dict"):
        TimmEncoder("test_resnet", saved(content, tmp_path / "a.pt")).load()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(WeightsError, match=r"TorchScript.*torch\.jit\.load\(\"ViT-B-32\.pt\""):
        weights.read_checkpoint(path)


@pytest.mark.parametrize(
    "encoder",
    [
        TimmEncoder("test_resnet", "nowhere/model.pt"),
        OpenClipEncoder("ViT-B-32", "laion2b_s34b_b79k", "nowhere/model.pt"),
        CheckpointEncoder("dino", "nowhere/model.pt"),
    ],
)
def test_missing_file_is_found_by_check(encoder: Encoder) -> None:
    with pytest.raises(WeightsError, match=r"model.weights=nowhere/model.pt: there is no such file"):
        encoder.check()


def test_hash_follows_every_tensor_and_not_the_file_format(tmp_path: Path) -> None:
    model = built(lambda: timm.create_model("test_resnet"))
    first = TimmEncoder("test_resnet", saved(model.state_dict(), tmp_path / "a.pt"), output="logits").load()
    same = TimmEncoder("test_resnet", saved(model.state_dict(), tmp_path / "b.safetensors"), output="logits").load()
    assert first.weights_hash == same.weights_hash
    for name in ("fc.bias", "bn1.running_mean"):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state[name][0] += 1e-3
        other = TimmEncoder("test_resnet", saved(state, tmp_path / "c.pt"), output="logits").load()
        assert other.weights_hash != first.weights_hash


# Hubs


def three_ways(error: pytest.ExceptionInfo[WeightsError], name: str, key: str = "model.weights") -> bool:
    text = str(error.value)
    parts = (name, "(1) connect", f"(2) give a local copy with {key}=PATH", f"(3) set {key}=random")
    return all(part in text for part in parts) and ". " not in text.replace("...", "")


@pytest.mark.parametrize(
    ("encoder", "name", "key"),
    [
        (TimmEncoder("tf_efficientnet_lite0"), "timm/tf_efficientnet_lite0.in1k", "model.weights"),
        (OpenClipEncoder("ViT-B-32-quickgelu", "openai"), "ViT-B-32-quickgelu openai", "model.weights"),
        (ZeroShotEncoder("ViT-B-32-quickgelu", "openai"), "ViT-B-32-quickgelu openai", "tagger.encoder.weights"),
        (CheckpointEncoder("vicreg"), "vicreg/resnet50.pth", "model.weights"),
        (CheckpointEncoder("barlowtwins", layer="projector"), "barlowtwins/ljng/checkpoint.pth", "model.weights"),
    ],
)
def test_hub_without_a_network_is_one_sentence_with_three_ways_on(encoder: Encoder, name: str, key: str) -> None:
    encoder.check()
    with pytest.raises(WeightsError) as error:
        encoder.load()
    assert three_ways(error, name, key)
    assert "HF_HUB_OFFLINE" in str(error.value)


@pytest.mark.parametrize("encoder", [TimmEncoder("test_resnet"), CheckpointEncoder("dino")])
def test_server_that_does_not_answer_is_not_waited_for(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "_ask", lambda _: OSError("no route to host"))
    with pytest.raises(WeightsError, match=r"does not answer: no route to host") as error:
        encoder.load()
    assert three_ways(error, "")


def test_server_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "ANSWER_SECONDS", 0.01)
    done = threading.Event()
    monkeypatch.setattr(weights, "_ask", lambda _: done.wait(60))
    with pytest.raises(WeightsError, match=r"does not answer: nothing came within 0.02 seconds"):
        TimmEncoder("test_resnet").load()
    done.set()


def test_published_checkpoints_keep_apart_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """VICReg and Barlow Twins both publish a resnet50.pth, and the cache has one folder."""
    fetched: dict[str, str] = {}

    def fetch(url: str, path: str) -> None:
        fetched[url] = Path(path).name
        torch.save({"tensor": torch.zeros(1)}, path)

    monkeypatch.setattr(weights, "require_answer", lambda *_: None)
    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    for name in ("vicreg", "barlowtwins", "dino"):
        for layer in ("backbone", "projector"):
            with pytest.raises(WeightsError, match="does not fit"):
                CheckpointEncoder(name, layer=layer).load()
    assert len(set(fetched.values())) == len(fetched) == 6


# Random weights


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: TimmEncoder("test_vit", "random", seed=seed),
        lambda seed: CheckpointEncoder("dino", "random", arch="resnet18", layer="projector", seed=seed),
        lambda seed: OpenClipEncoder("tiny", None, "random", seed=seed),
    ],
)
def test_random_weights_are_labelled_reproducible_and_leave_the_generator_alone(
    make: Callable[[int], Encoder], tiny_clip: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = make(3).load(), make(3).load(), make(4).load()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.weights_hash == same.weights_hash != other.weights_hash
    assert first.random
    assert first.weights == "random (seed 3)"


# open_clip

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}


@pytest.fixture
def tiny_clip(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Small architectures: plain, with QuickGELU, and with the text tower apart as SigLIP has it."""
    architectures = {
        "tiny": CLIP,
        "tiny-quickgelu": {**CLIP, "quick_gelu": True},
        "tiny-custom": {**CLIP, "custom_text": True},
        "tiny-last": {
            **CLIP,
            "custom_text": True,
            "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True},
        },
        "tiny-siglip": {**CLIP, "custom_text": True, "init_logit_bias": -10},
        "tiny-wide": {**CLIP, "embed_dim": 24},
        "tiny-coca": {
            **CLIP,
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
            "custom_text": True,
        },
    }
    for name, config in architectures.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    return monkeypatch


def clip(arch: str) -> Any:
    return built(lambda: open_clip.create_model(arch))


def publish(monkeypatch: pytest.MonkeyPatch, arch: str, tag: str, **record: Any) -> None:
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, arch, {tag: record})


@pytest.mark.parametrize("arch", ["tiny", "tiny-quickgelu", "tiny-siglip", "tiny-coca"])
def test_open_clip_file_gives_encode_image(arch: str, tiny_clip: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = clip(arch)
    loaded = OpenClipEncoder(arch, None, saved(model.state_dict(), tmp_path / "clip.safetensors")).load()
    features = expected(lambda images: model.encode_image(images, normalize=False), 32)
    torch.testing.assert_close(run(loaded, 32), features)
    assert not torch.allclose(features.norm(dim=1), torch.ones(2))
    assert loaded.classes is None


def test_open_clip_hub_file_and_training_checkpoint_agree(tiny_clip: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = clip("tiny")
    path = saved(model.state_dict(), tmp_path / "clip.pt")
    publish(tiny_clip, "tiny", "tag", file=path, mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))
    training = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    hub = OpenClipEncoder("tiny", "tag").load()
    file = OpenClipEncoder("tiny", "tag", path).load()
    wrapped = OpenClipEncoder("tiny", "tag", saved(training, tmp_path / "epoch_3.pt")).load()
    assert hub.weights == "hub tag"
    assert hub.weights_hash == file.weights_hash == wrapped.weights_hash
    assert hub.transform_text == file.transform_text == wrapped.transform_text
    assert "0.3" in file.transform_text


def test_openai_layout_is_read(tiny_clip: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OpenAI's tensors come with three numbers about the model, and a scalar scale."""
    model = clip("tiny")
    extra = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    path = saved(model.state_dict() | extra, tmp_path / "openai.pt")
    torch.testing.assert_close(
        run(OpenClipEncoder("tiny", None, path).load(), 32), expected(model.encode_image, 32), rtol=0, atol=0
    )
    # The same file also serves where open_clip keeps the text tower apart.
    torch.testing.assert_close(
        run(OpenClipEncoder("tiny-custom", None, path).load(), 32), expected(model.encode_image, 32), rtol=0, atol=0
    )


def test_open_clip_other_architecture_is_refused(tiny_clip: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(clip("tiny").state_dict(), tmp_path / "clip.pt")
    with pytest.raises(WeightsError, match=r"clip.pt does not fit arch=tiny-wide.*visual.proj"):
        OpenClipEncoder("tiny-wide", None, path).load()


def test_position_embeddings_are_not_resized_in_silence(tiny_clip: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = clip("tiny").state_dict()
    state["visual.positional_embedding"] = torch.zeros(10, 32)
    with pytest.raises(WeightsError, match=r"visual.positional_embedding \(10, 32\) instead of \(5, 32\)"):
        OpenClipEncoder("tiny", None, saved(state, tmp_path / "larger.pt")).load()


def test_siglip_preprocessing_follows_the_tag_wherever_the_weights_are_from(
    tiny_clip: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = saved(clip("tiny-siglip").state_dict(), tmp_path / "siglip.safetensors")
    record = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    publish(tiny_clip, "tiny-siglip", "webli", **record, file=path)
    hub = OpenClipEncoder("tiny-siglip", "webli").load()
    for source in (path, "random"):
        loaded = OpenClipEncoder("tiny-siglip", "webli", source).load()
        assert loaded.transform_text == hub.transform_text
        # Squashed to 32 x 32, values in -1 to 1: the left half black, the right half white, nothing cropped.
        image = Image.new("RGB", (128, 32))
        image.paste((255, 255, 255), (64, 0, 128, 32))
        found = loaded.transform(image)
        assert found.shape == (3, 32, 32)
        torch.testing.assert_close(found[:, :, :14], -torch.ones(3, 32, 14))
        torch.testing.assert_close(found[:, :, 18:], torch.ones(3, 32, 14))
    own = OpenClipEncoder("tiny-siglip", None, path).load()
    assert own.transform_text != hub.transform_text


def test_quick_gelu_is_refused_where_it_does_not_belong(tiny_clip: pytest.MonkeyPatch) -> None:
    publish(tiny_clip, "tiny", "fast", quick_gelu=True)
    publish(tiny_clip, "tiny-quickgelu", "fast", quick_gelu=True)
    for source in ("hub", "random", __file__):
        with pytest.raises(ConfigError, match=r"Set model.arch=tiny-quickgelu"):
            OpenClipEncoder("tiny", "fast", source).check()
        OpenClipEncoder("tiny-quickgelu", "fast", source).check()


@pytest.mark.parametrize("arch", ["ViT-B-32", "ViT-L-14", "RN50"])
def test_openai_weights_need_the_quickgelu_name(arch: str) -> None:
    with pytest.raises(ConfigError, match=f"Set model.arch={arch}-quickgelu"):
        OpenClipEncoder(arch, "openai").check()
    OpenClipEncoder(f"{arch}-quickgelu", "openai").check()


def test_every_published_pair_is_accepted_or_sent_to_one_that_is() -> None:
    archs = set(open_clip.list_models())
    pairs = [(arch, tag) for arch, tag in open_clip.list_pretrained() if arch in archs]
    refused = []
    for arch, tag in pairs:
        try:
            OpenClipEncoder(arch, tag).check()
        except ConfigError as error:
            refused.append((arch, tag))
            OpenClipEncoder(str(error).rpartition("arch=")[2].rstrip("."), tag).check()
    assert ("ViT-B-16", "dfn2b") in refused
    assert ("ViT-B-32", "laion2b_s34b_b79k") not in refused


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (OpenClipEncoder("ViT-B/32", "openai"), "did you mean ViT-B-32"),
        (OpenClipEncoder("ViT-B-32", "webli"), "webli exists for ViT-B-16-SigLIP"),
        (OpenClipEncoder("ViT-B-32"), "needs model.pretrained"),
    ],
)
def test_open_clip_refuses_before_loading(encoder: Encoder, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder.check()


def test_local_weights_give_no_false_warning(
    tiny_clip: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(clip("tiny").state_dict(), tmp_path / "clip.pt")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        OpenClipEncoder("tiny", None, path).load()
    assert [record.getMessage() for record in caplog.records] == []
    assert logging.getLogger().filters == []


def test_zero_shot_is_the_softmax_over_the_vocabulary(tiny_clip: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = clip("tiny")
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("# a comment\nred sky\n\n  wet sand \nsnow\n")
    path = saved(model.state_dict(), tmp_path / "clip.pt")
    loaded = ZeroShotEncoder("tiny", None, path, str(vocabulary), "a picture of {}.").load()
    texts = open_clip.get_tokenizer("tiny")(["a picture of red sky.", "a picture of wet sand.", "a picture of snow."])

    def by_hand(images: Tensor) -> Tensor:
        image = model.encode_image(images, normalize=True)
        scores: Tensor = 100 * image @ model.encode_text(texts, normalize=True).T
        return scores.softmax(dim=1)

    assert loaded.classes == ("red sky", "wet sand", "snow")
    torch.testing.assert_close(run(loaded, 32), expected(by_hand, 32))
    assert loaded.module(torch.zeros(1, 3, 32, 32)).sum().item() == pytest.approx(1)
    other = ZeroShotEncoder("tiny", None, path, str(vocabulary), "{}").load()
    assert other.weights_hash != loaded.weights_hash


# The text tower

CAPTIONS = ["a dog", "", "<p>two &amp; three</p>", "a red bus on a wet street " * 400]


def texts_of(encoder: LoadedEncoder) -> Tensor:
    tower = encoder.reading("texts")
    transform: Any = pickle.loads(pickle.dumps(tower.transform))
    with torch.no_grad():
        output: Tensor = tower.module(transform(CAPTIONS))
    assert not tower.module.training
    assert not any(parameter.requires_grad for parameter in tower.module.parameters())
    return output


@pytest.mark.parametrize("arch", ["tiny", "tiny-quickgelu", "tiny-custom", "tiny-last", "tiny-coca"])
def test_the_text_tower_gives_encode_text(arch: str, tiny_clip: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = clip(arch)
    encoder = OpenClipEncoder(arch, None, saved(model.state_dict(), tmp_path / "clip.safetensors"))
    loaded = encoder.load()
    with torch.no_grad():
        wanted = model.encode_text(open_clip.get_tokenizer("tiny")(CAPTIONS), normalize=False)
    torch.testing.assert_close(texts_of(loaded), wanted)
    # The image half is whole beside it.
    torch.testing.assert_close(run(loaded, 32), expected(lambda x: model.encode_image(x, normalize=False), 32))
    tower = loaded.reading("texts")
    assert not [name for name in tower.module.state_dict() if "visual" in name or "text_decoder" in name]
    assert tower is loaded.reading("texts")
    assert tower.weights_hash == encoder.load().reading("texts").weights_hash != loaded.weights_hash
    assert (tower.reads, tower.weights, tower.random) == ("texts", "file clip.safetensors", False)
    assert tower.description == f"open_clip {arch}, text tower"
    assert "SimpleTokenizer, 49408 tokens" in tower.transform_text
    assert "context length 77" in tower.transform_text


def test_the_text_hash_follows_the_text_tower_alone(tiny_clip: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = clip("tiny")
    first = OpenClipEncoder("tiny", None, saved(model.state_dict(), tmp_path / "first.pt")).load()
    with torch.no_grad():
        model.visual.proj += 1
    second = OpenClipEncoder("tiny", None, saved(model.state_dict(), tmp_path / "second.pt")).load()
    assert first.reading("texts").weights_hash == second.reading("texts").weights_hash
    assert first.weights_hash != second.weights_hash
    with torch.no_grad():
        model.text_projection += 1
    third = OpenClipEncoder("tiny", None, saved(model.state_dict(), tmp_path / "third.pt")).load()
    assert second.reading("texts").weights_hash != third.reading("texts").weights_hash
    assert second.weights_hash == third.weights_hash


def test_a_missing_tokenizer_keeps_no_image_from_being_embedded(tiny_clip: pytest.MonkeyPatch) -> None:
    tiny_clip.setitem(
        open_clip.factory._MODEL_CONFIGS,
        "tiny-hf",
        {**CLIP, "text_cfg": {**TEXT, "hf_tokenizer_name": "nobody/no-tokenizer"}},
    )
    loaded = OpenClipEncoder("tiny-hf", None, "random").load()
    assert run(loaded, 32).shape == (2, 16)
    with pytest.raises(WeightsError, match=r"model.arch=tiny-hf: its tokenizer cannot be had"):
        loaded.reading("texts")


# Architectures of one's own

OWN: dict[str, Any] = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}


def test_an_architecture_of_ones_own_is_built_saved_and_loaded_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model: Any = open_clip_models.build_clip("small", OWN, seed=3)
        path = saved(built(lambda: model).state_dict(), tmp_path / "small.safetensors")
        loaded = OpenClipEncoder("small", weights=path, arch_config=OmegaConf.create(OWN)).load()
    assert not caplog.records
    model.eval()
    torch.testing.assert_close(run(loaded, 32), expected(model.encode_image, 32), rtol=0, atol=0)
    tokens: Any = open_clip_models.tokenizer_of("small", OWN)
    with torch.no_grad():
        torch.testing.assert_close(texts_of(loaded), model.encode_text(tokens(CAPTIONS)))
    assert loaded.description.startswith("open_clip small (own architecture ")
    assert str(tmp_path) not in loaded.description
    assert loaded.transform_text == open_clip_models.transform_of(model)[1]


def test_what_no_tensor_shows_of_an_own_architecture_is_in_its_description(tmp_path: Path) -> None:
    heads = {**OWN, "text_cfg": {**OWN["text_cfg"], "heads": 4}}
    first, second = (
        OpenClipEncoder("small", weights="random", arch_config=config).load().reading("texts")
        for config in (OWN, heads)
    )
    assert first.weights_hash == second.weights_hash
    assert first.description != second.description


def test_random_weights_of_an_own_architecture_follow_the_seed() -> None:
    def state(seed: int) -> State:
        return open_clip_models.build_clip("small", OWN, seed).state_dict()

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert all(torch.equal(value, state(3)[name]) for name, value in state(3).items())
    assert not torch.equal(state(3)["text_projection"], state(4)["text_projection"])
    assert torch.equal(torch.get_rng_state(), before)


def test_zero_shot_works_with_an_architecture_of_ones_own(tmp_path: Path) -> None:
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("red sky\nsnow\n")
    loaded = ZeroShotEncoder("small", None, "random", str(vocabulary), arch_config=OWN).load()
    assert loaded.classes == ("red sky", "snow")
    assert run(loaded, 32).shape == (2, 2)


def test_preprocessing_can_be_changed(tiny_clip: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(clip("tiny").state_dict(), tmp_path / "clip.pt")
    publish(tiny_clip, "tiny", "tag", file=path, mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))
    change = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "resize_mode": "squash"}
    image = Image.new("RGB", (128, 32))
    image.paste((255, 255, 255), (64, 0, 128, 32))
    transforms = set()
    for tag, source in (("tag", "hub"), ("tag", path), (None, path)):
        loaded = OpenClipEncoder("tiny", tag, source, preprocess=change).load()
        found = loaded.transform(image)
        torch.testing.assert_close(found[:, :, :14], torch.zeros(3, 32, 14))
        torch.testing.assert_close(found[:, :, 18:], torch.ones(3, 32, 14))
        transforms.add(loaded.transform_text)
    assert len(transforms) == 1
    half = OpenClipEncoder("tiny", "tag", path, preprocess={"std": (1.0, 1.0, 1.0)}).load()
    assert "0.3" in half.transform_text
    with pytest.raises(ConfigError, match=r"model\.preprocess\.size: must be one of mean, std"):
        OpenClipEncoder("tiny", "tag", preprocess={"size": 64}).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dims": 16}, r"model\.arch_config\.embed_dims: open_clip knows no such key"),
        ({"vision_cfg": {**VISION, "depth": 2}}, r"model\.arch_config\.vision_cfg\.depth: open_clip knows no such key"),
        ({"vision_cfg": 3}, r"model\.arch_config\.vision_cfg=3: must be a mapping"),
        ({"text_cfg": {"vocab_size": 1000}}, r"model\.arch_config\.text_cfg\.vocab_size=1000"),
        ({"text_cfg": {"hf_tokenizer_name": "bert-base-uncased"}}, "has open_clip's tokenizer"),
    ],
)
def test_a_bad_architecture_is_found_by_check(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OpenClipEncoder("small", weights="random", arch_config={**OWN, **change}).check()


def test_an_own_architecture_has_no_published_weights_and_must_be_whole() -> None:
    with pytest.raises(ConfigError, match="no published weights"):
        OpenClipEncoder("small", arch_config=OWN).check()
    with pytest.raises(ConfigError, match=r"model\.arch_config\.text_cfg is missing"):
        OpenClipEncoder("small", weights="random", arch_config={"embed_dim": 16, "vision_cfg": VISION}).check()
    with pytest.raises(ConfigError, match=r"model\.arch_config: open_clip cannot build it"):
        open_clip_models.build_clip("small", {**OWN, "text_cfg": {"width": 32, "heads": 5, "layers": 1}})


def test_vocabularies_are_checked(tmp_path: Path) -> None:
    twice, empty = tmp_path / "twice.txt", tmp_path / "empty.txt"
    twice.write_text("sky\nsea\nsky\n")
    empty.write_text("# nothing\n")
    for vocabulary, message in ((twice, "'sky' more than once"), (empty, "holds no tags"), ("no_such", "scenes")):
        with pytest.raises(ConfigError, match=message):
            ZeroShotEncoder("ViT-B-32-quickgelu", "openai", "random", str(vocabulary)).check()
    with pytest.raises(ConfigError, match="template"):
        ZeroShotEncoder("ViT-B-32-quickgelu", "openai", template="a photo")


def test_shipped_vocabulary_is_found_by_its_name() -> None:
    ZeroShotEncoder("ViT-B-32-quickgelu", "openai", "random", "scenes").check()


# Checkpoints of the self-supervised repositories

WIDTH = 24


def projector(name: str) -> nn.Sequential:
    """The published definitions, narrow."""
    if name == "dino":
        return nn.Sequential(nn.Linear(512, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8))
    bias = name == "vicreg"
    return nn.Sequential(
        nn.Linear(512, WIDTH, bias=bias),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH, bias=bias),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH, bias=False),
    )


def resnet18() -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(weights=None)
    model.fc = nn.Identity()
    return model


@pytest.fixture(scope="module")
def networks() -> Networks:
    return {"backbone": built(resnet18)} | {
        name: built(partial(projector, name)) for name in ("vicreg", "barlowtwins", "dino")
    }


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def full_checkpoint(name: str, networks: Networks) -> dict[str, Any]:
    """What the repository writes after an epoch."""
    backbone, head = networks["backbone"].state_dict(), networks[name].state_dict()
    if name == "dino":
        last = {"head.last_layer.weight_g": torch.ones(50, 1), "head.last_layer.weight_v": torch.zeros(50, 8)}
        teacher = prefixed(backbone, "backbone.") | prefixed(head, "head.mlp.") | last
        student = {f"module.{key}": value + 1 for key, value in teacher.items()}
        rest = {"optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(arch="resnet50")}
        return {"student": student, "teacher": teacher, "dino_loss": {"center": torch.zeros(1, 50)}, **rest}
    state = prefixed(backbone, "module.backbone.") | prefixed(head, "module.projector.")
    if name == "barlowtwins":
        state |= {"module.bn.running_mean": torch.ones(WIDTH), "module.bn.running_var": torch.ones(WIDTH)}
    return {"epoch": 3, "model": state, "optimizer": {"state": {}}}


@pytest.mark.parametrize("name", ["vicreg", "barlowtwins", "dino"])
def test_full_checkpoint_gives_backbone_and_projector(name: str, networks: Networks, tmp_path: Path) -> None:
    path = saved(full_checkpoint(name, networks), tmp_path / "full.pth")
    backbone = CheckpointEncoder(name, path, arch="resnet18").load()
    head = CheckpointEncoder(name, path, arch="resnet18", layer="projector").load()
    features = expected(networks["backbone"], 64)
    torch.testing.assert_close(run(backbone, 64), features, rtol=0, atol=0)
    projected = networks[name](features)
    if name == "dino":
        projected = projected / projected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(run(head, 64), projected.detach())
    assert head.description == f"{name} resnet18, projector"
    assert backbone.weights == "file full.pth"
    assert backbone.weights_hash != head.weights_hash


@pytest.mark.parametrize("name", ["vicreg", "barlowtwins", "dino"])
def test_file_with_the_backbone_alone_has_no_projector(name: str, networks: Networks, tmp_path: Path) -> None:
    path = saved(networks["backbone"].state_dict(), tmp_path / "resnet.pth")
    loaded = CheckpointEncoder(name, path, arch="resnet18").load()
    torch.testing.assert_close(run(loaded, 64), expected(networks["backbone"], 64), rtol=0, atol=0)
    with pytest.raises(WeightsError, match=r"resnet.pth holds the backbone alone.*model.layer=projector"):
        CheckpointEncoder(name, path, arch="resnet18", layer="projector").load()


def test_dino_teacher_may_be_wrapped(networks: Networks, tmp_path: Path) -> None:
    content = full_checkpoint("dino", networks)
    content["teacher"] = prefixed(content["teacher"], "module.")
    loaded = CheckpointEncoder("dino", saved(content, tmp_path / "a.pth"), arch="resnet18").load()
    torch.testing.assert_close(run(loaded, 64), expected(networks["backbone"], 64), rtol=0, atol=0)


def test_checkpoint_of_another_format_or_architecture_is_refused(networks: Networks, tmp_path: Path) -> None:
    dino = saved(full_checkpoint("dino", networks), tmp_path / "dino.pth")
    vicreg = saved(full_checkpoint("vicreg", networks), tmp_path / "vicreg.pth")
    with pytest.raises(WeightsError, match=r"model.format=vicreg keeps its network under 'model'"):
        CheckpointEncoder("vicreg", dino, arch="resnet18").load()
    with pytest.raises(WeightsError, match=r"model.format=dino keeps its network under 'teacher'"):
        CheckpointEncoder("dino", vicreg, arch="resnet18").load()
    with pytest.raises(WeightsError, match=r"vicreg.pth does not fit arch=resnet34: 80 tensors missing .layer1.2"):
        CheckpointEncoder("vicreg", vicreg, arch="resnet34").load()


@pytest.mark.parametrize("name", ["vicreg", "barlowtwins", "dino"])
def test_published_sizes(name: str) -> None:
    """VICReg and Barlow Twins end in 8192 columns, DINO's bottleneck in 256."""
    shapes = checkpoints._published_shapes(checkpoints.FORMATS[name], 2048)
    with torch.device("meta"):
        head: Any = checkpoints._build_projector(shapes, name)
        narrow = projector(name)
    assert [type(layer) for layer in head] == [type(layer) for layer in narrow]
    assert head.state_dict().keys() == narrow.state_dict().keys()
    assert head(torch.empty(2, 2048, device="meta")).shape == (2, 256 if name == "dino" else 8192)


def test_checkpoint_encoder_refuses_bad_values() -> None:
    for arguments, message in (
        ({"format": "moco"}, "model.format=moco"),
        ({"format": "dino", "arch": "vgg16"}, "model.arch=vgg16"),
        ({"format": "dino", "layer": "head"}, "model.layer=head"),
    ):
        with pytest.raises(ConfigError, match=message):
            CheckpointEncoder(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model.arch=resnet50"):
        CheckpointEncoder("dino", arch="resnet18").check()


def test_checkpoint_transform_is_the_imagenet_one() -> None:
    loaded = CheckpointEncoder("vicreg", "random", arch="resnet18").load()
    reference = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    torch.testing.assert_close(loaded.transform(picture(300, 280)), reference(picture(300, 280)))
    assert pickle.loads(pickle.dumps(loaded.transform))(picture()).shape == (3, 224, 224)
    assert "bicubic" in CheckpointEncoder("dino", "random", arch="resnet18").load().transform_text


# Configuration


def presets() -> Iterator[str]:
    for path in sorted((CONF / "model").glob("*.yaml")):
        if "\n_target_: dejavu_exp.encoders." in path.read_text() and "\nweights: hub" in path.read_text():
            yield path.stem


def test_presets_are_those_promised() -> None:
    promised = """clip_vitb32 clip_vitl14 clip_rn50_yfcc15m clip_rn50_cc12m metaclip siglip dino_vitb16 dinov2_vitl14
        mae_vitb16 vicreg_resnet50 barlowtwins_resnet50 dino_resnet50 supervised_resnet50 efficientnet_lite0"""
    assert set(promised.split()) <= set(presets())


@pytest.mark.parametrize("preset", list(presets()))
def test_every_preset_builds_and_checks(preset: str) -> None:
    node = OmegaConf.load(CONF / "model" / f"{preset}.yaml")
    assert node.weights == "hub"
    for source in ("hub", "random"):
        instantiate(node, weights=source).check()


def test_import_is_light() -> None:
    code = "import sys, dejavu_exp.encoders, dejavu_exp.taggers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
