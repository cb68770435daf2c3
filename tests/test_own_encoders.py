"""Encoders of one's own: the embeddings are those of the network itself, and what cannot work is one clear sentence."""

import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
import transformers
from conftest import SMALL, measure
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from dejavu_exp import config, preflight, stages
from dejavu_exp.encoders import (
    CallableEncoder,
    HuggingFaceEncoder,
    LoadedEncoder,
    Preprocess,
    TimmEncoder,
    TorchScriptEncoder,
    own_modules,
)
from dejavu_exp.errors import ConfigError, WeightsError
from dejavu_exp.transforms import on_pixels

HALF = Preprocess(side_px=32, mean=[0.5] * 3, std=[0.5] * 3, resize="squash", crop_fraction=1.0)
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch\.jit:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An empty cache, and a failure instead of a connection."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a test went to the network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr("socket.socket.connect", refuse)


class Net(nn.Module):
    """Small, with all that can go wrong: batch norm, dropout, and a view that only one memory layout allows."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4 * 8 * 8, dim)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.conv(images)).relu())
        out: Tensor = self.last(hidden.view(hidden.size(0), -1))
        return out


class Several(Net):
    """Gives a dict of tensors."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        hidden = self.conv(images)
        return {"map": hidden, "first": hidden.mean((2, 3)) * 2, "tokens": hidden.flatten(2)}


class Pair(Net):
    """Gives a tuple."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.conv(images)
        return hidden, hidden.mean((2, 3))


def filled(module: nn.Module, seed: int = 3) -> nn.Module:
    """Every tensor random, batch statistics included."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.2 * torch.randn(tensor.shape, generator=drawn)
                tensor.copy_(1 + noise.abs() if name.endswith("running_var") else noise)
    return module.eval()


def scripted(module: nn.Module, path: Path) -> str:
    torch.jit.save(torch.jit.script(module), path)
    return str(path)


def exported(module: nn.Module, path: Path, size: int = 4, *, fixed: bool = False) -> str:
    shapes = None if fixed else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (torch.randn(size, 3, 32, 32),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return str(path)


def images(count: int = 3, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def run(encoder: LoadedEncoder, inputs: Tensor) -> Tensor:
    """As a run does: in the layout that convolutions like."""
    module = encoder.module.to(memory_format=torch.channels_last)
    with torch.no_grad():
        output: Tensor = module(inputs.contiguous(memory_format=torch.channels_last))
    assert output.dtype == torch.float32
    assert not encoder.module.training
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    return output


def eager(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = module(inputs)
    return output


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def again(module: nn.Module) -> nn.Module:
    """As another process gets it."""
    found: nn.Module = pickle.loads(pickle.dumps(module))
    return found


# Preprocessing


def test_preprocessing_is_that_of_torchvision_and_is_fused() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
    crop = Preprocess(28, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "bicubic", "crop", 0.875)
    sized = transforms.functional.resize(picture, 32, transforms.InterpolationMode.BICUBIC)
    pixels = torch.from_numpy(np.array(transforms.functional.center_crop(sized, 28))).permute(2, 0, 1) / 255
    by_hand = (pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    close(crop.transform()(picture), by_hand)
    squashed = transforms.functional.to_tensor(picture.resize((32, 32), Image.Resampling.BILINEAR)) * 2 - 1
    close(HALF.transform()(picture), squashed)
    assert type(on_pixels(crop.transform(), exact=False)).__name__ == "Fused"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side_px": 0}, "side_px=0: must be a number of pixels"),
        ({"mean": [0.5]}, r"mean=\[0.5\]: must be three numbers"),
        ({"std": "half"}, "std=half: must be three numbers"),
        ({"std": [1.0, 0.0, 1.0]}, "std=.*must be above 0"),
        ({"interpolation": "lanczos"}, "interpolation=lanczos: must be one of nearest, bilinear, bicubic"),
        ({"resize": "pad"}, "resize=pad: must be one of crop, squash"),
        ({"crop_fraction": 0.0, "resize": "crop"}, "crop_fraction=0.0: must be above 0"),
        ({"crop_fraction": 0.5}, "resize=squash shows the whole image"),
    ],
)
def test_preprocessing_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.preprocess.{message}"):
        replace(HALF, **change)


# TorchScript and torch.export


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return filled(Net())


def test_torchscript_gives_the_embeddings_of_the_network(net: nn.Module, tmp_path: Path) -> None:
    found = TorchScriptEncoder(scripted(net, tmp_path / "own.pt"), HALF).load()
    close(run(found, images()), eager(net, images()))
    close(eager(again(found.module), images()), eager(net, images()))
    assert found.description == "TorchScript own, 32 px"
    assert found.weights == "file own.pt"
    assert "Normalize(mean=(0.5, 0.5, 0.5)" in found.transform_text
    assert not found.random


def test_exported_program_needs_leave_and_gives_the_embeddings_of_the_network(net: nn.Module, tmp_path: Path) -> None:
    path = exported(net, tmp_path / "own.pt2")
    with pytest.raises(WeightsError, match=r"runs whatever code its pickled parts hold.*model\.trust_file=true"):
        TorchScriptEncoder(path, HALF).check()
    found = TorchScriptEncoder(path, HALF, trust_file=True).load()
    close(run(found, images()), eager(net, images()))
    close(run(found, images(1)), eager(net, images(1)))
    close(eager(again(found.module), images()), eager(net, images()))
    assert found.description == "torch.export own, 32 px"
    fixed = exported(net, tmp_path / "fixed.pt2", fixed=True)
    with pytest.raises(WeightsError, match=r"takes batches of 4 images alone.*torch\.export\.Dim"):
        TorchScriptEncoder(fixed, HALF, trust_file=True).load()


def test_frozen_program_without_a_tensor_is_run_and_hashed(net: nn.Module, tmp_path: Path) -> None:
    def frozen(module: nn.Module, name: str) -> LoadedEncoder:
        torch.jit.save(torch.jit.freeze(torch.jit.script(module)), tmp_path / name)
        return TorchScriptEncoder(str(tmp_path / name), HALF).load()

    first, other = frozen(net, "a.pt"), frozen(filled(Net(), seed=4), "b.pt")
    assert not first.module.state_dict()
    close(run(first, images()), eager(net, images()))
    assert first.weights_hash != other.weights_hash


def test_the_hash_follows_the_program_and_not_the_tensors_alone(net: nn.Module, tmp_path: Path) -> None:
    class Squared(Net):
        def forward(self, images: Tensor) -> Tensor:
            hidden = self.norm(self.conv(images)).relu()
            out: Tensor = self.last(hidden.flatten(1))
            return out * out

    squared = Squared().eval()
    squared.load_state_dict(net.state_dict())
    plain = TorchScriptEncoder(scripted(net, tmp_path / "a.pt"), HALF).load()
    other = TorchScriptEncoder(scripted(squared, tmp_path / "b.pt"), HALF).load()
    same = TorchScriptEncoder(str(tmp_path / "a.pt"), HALF).load()
    assert plain.weights_hash == same.weights_hash != other.weights_hash


@pytest.mark.parametrize(
    ("make", "output", "key"),
    [(Several, "first", "first"), (Several, "map", "map"), (Pair, 1, 1), (Pair, 0, 0)],
)
def test_an_element_is_taken_and_a_map_is_averaged(
    make: type[Net], output: str | int, key: Any, tmp_path: Path
) -> None:
    network = filled(make())
    with torch.no_grad():
        wanted = network(images())[key]
    found = TorchScriptEncoder(scripted(network, tmp_path / "own.pt"), HALF, output=output).load()
    close(run(found, images()), wanted.mean((2, 3)) if wanted.ndim == 4 else wanted)
    assert found.description.endswith(f"output {output}")


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (Several, None, r"model\.output=null: the network gives a dict\. Set model\.output=map or model\.output=first"),
        (Several, "last", r"model\.output=last: the network gives a dict\. Set model\.output=map or"),
        (Several, "tokens", r"gives shape \(2, 4, 64\), and \(2, dim\) is expected"),
        (Pair, 2, r"model\.output=2: the network gives a tuple\. Set model\.output=0 or model\.output=1"),
        (Net, 0, r"model\.output=0: the network gives a tensor\. Set model\.output=null"),
    ],
)
def test_an_output_that_is_not_there_is_told(make: type[Net], output: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchScriptEncoder(scripted(filled(make()), tmp_path / "own.pt"), HALF, output=output).load()


def traced(module: nn.Module, path: Path, size: int = 2) -> str:
    """What torch.jit.trace keeps of a network: the mode that it was in."""
    example = torch.randn(size, 3, 32, 32)
    torch.jit.save(torch.jit.trace(module, example, check_trace=False), path)  # type: ignore[no-untyped-call]
    return str(path)


class Shared(nn.Module):
    """Takes the mean over the batch away."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)[:, :8]
        return flat - flat.mean(0)


class Noisy(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.dropout(images.flatten(1)[:, :64], 0.5, True)


class Infinite(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return 1 / (0 * images.flatten(1)[:, :8])


class Fixed(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.view(2, 3072)


class Two(nn.Module):
    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return images.flatten(1) + texts


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Shared(), r"depends on the other images of its batch"),
        (Noisy(), r"another output in every call"),
        (Infinite(), r"values that are not finite"),
        (Fixed(), r"fails on a batch of 1 of shape \(3, 32, 32\).*any number of images"),
        (Two(), r"fails on a batch of 2"),
        (Net().double(), None),
    ],
)
def test_a_trial_on_two_images_finds_what_would_spoil_a_run(module: nn.Module, message: str, tmp_path: Path) -> None:
    encoder = TorchScriptEncoder(scripted(module.eval(), tmp_path / "own.pt"), HALF)
    if message is None:
        encoder.load()  # double precision is read as float32, like all weights
        return
    with pytest.raises(ConfigError, match=message) as error:
        encoder.load()
    assert str(error.value).startswith(f"model.weights={encoder.weights}: ")


def test_batch_norm_traced_in_training_mode_is_found(tmp_path: Path) -> None:
    network = filled(Net())
    network.drop = nn.Identity()
    path = traced(network.train(), tmp_path / "train.pt")
    with pytest.raises(ConfigError, match="batch norm in training mode"):
        TorchScriptEncoder(path, HALF).load()
    TorchScriptEncoder(traced(filled(Net()), tmp_path / "eval.pt"), HALF).load()


def test_another_size_than_the_program_was_made_for_is_told(net: nn.Module, tmp_path: Path) -> None:
    encoder = TorchScriptEncoder(scripted(net, tmp_path / "own.pt"), replace(HALF, side_px=64))
    with pytest.raises(ConfigError, match=r"fails on a batch of 2 of shape \(3, 64, 64\).*check the size"):
        encoder.load()


def test_a_program_fixed_to_the_cpu_is_told_on_another_device() -> None:
    class Elsewhere(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("expected all tensors on the same device")

    network = own_modules.ArchiveNetwork(Elsewhere(), None, "model")
    with pytest.raises(WeightsError, match=r"fails on meta.*trainer\.accelerator=cpu"):
        network(torch.empty(1, 3, 8, 8, device="meta"))
    with pytest.raises(RuntimeError, match="same device"):
        network(torch.empty(1, 3, 8, 8))


# Files that are broken or hostile


class Attack:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def zipped(path: Path, entries: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return str(path)


def entries_of(path: str) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_archives_that_are_cut_short_or_of_another_kind_are_named(net: nn.Module, tmp_path: Path) -> None:
    whole = Path(scripted(net, tmp_path / "whole.pt"))
    content, parts = whole.read_bytes(), entries_of(str(whole))
    torch.save(net.state_dict(), tmp_path / "state.pt")
    cut = {name: value[: len(value) // 2] for name, value in parts.items()}
    broken = {
        "half.pt": content[: len(content) // 2],
        "empty.pt": b"",
        "page.pt": b"<html>not found</html>",
        "garbled.pt": bytes(255 - byte if index % 97 == 0 else byte for index, byte in enumerate(content)),
    }
    for name, value in broken.items():
        (tmp_path / name).write_bytes(value)
    zipped(tmp_path / "cut.pt", cut)
    zipped(tmp_path / "without.pt", {name: value for name, value in parts.items() if "/code/" not in name})
    for name in (*broken, "state.pt", "cut.pt", "without.pt"):
        with pytest.raises(WeightsError, match=re.escape(f"model.weights={tmp_path / name}")) as error:
            TorchScriptEncoder(str(tmp_path / name), HALF).load()
        assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match=r"model=callable with model\.function=package\.module:name"):
        TorchScriptEncoder(str(tmp_path / "state.pt"), HALF).check()
    with pytest.raises(WeightsError, match="there is no such file"):
        TorchScriptEncoder(str(tmp_path / "nowhere.pt"), HALF).check()
    with pytest.raises(WeightsError, match="there is no such file"):
        TorchScriptEncoder("random", HALF).check()


def test_entries_that_name_other_folders_are_not_unpacked(net: nn.Module, tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    parts = entries_of(scripted(net, inside / "whole.pt"))
    path = zipped(inside / "up.pt", {**parts, "../escaped": b"x", "whole/../../escaped": b"x"})
    bare = zipped(inside / "bare.pt", {"../constants.pkl": b"x", "../data.pkl": b"x"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightsError, match=r"bare\.pt cannot be read as an archive"):
        TorchScriptEncoder(bare, HALF).load()
    close(run(TorchScriptEncoder(path, HALF).load(), images()), eager(net, images()))
    state = zipped(inside / "state.pt", {"../data.pkl": b"\x80\x02}.", "../version": b"3"})
    with pytest.raises(WeightsError, match=r"state\.pt holds no state dict"):
        TimmEncoder("test_resnet", state).load()
    assert sorted([*before, Path(state)]) == sorted(tmp_path.rglob("*"))


def test_python_pickled_into_an_archive_is_not_run(net: nn.Module, tmp_path: Path) -> None:
    parts = entries_of(scripted(net, tmp_path / "whole.pt"))
    attack = pickle.dumps(Attack(tmp_path / "harmed"))
    for name in ("data.pkl", "constants.pkl"):
        path = zipped(tmp_path / f"in_{name}.pt", {**parts, f"whole/{name}": attack})
        with pytest.raises(WeightsError, match="cannot be read as an archive"):
            TorchScriptEncoder(path, HALF).load()
    inputs = entries_of(exported(net, tmp_path / "own.pt2"))
    named = next(name for name in inputs if "sample_inputs" in name)
    path = zipped(tmp_path / "attack.pt2", {**inputs, named: attack})
    with pytest.raises(WeightsError, match="trust_file"):
        TorchScriptEncoder(path, HALF).load()
    assert not (tmp_path / "harmed").exists()


# State dicts


def test_containers_and_wrappers_of_training_scripts_are_opened_for_every_loader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = TimmEncoder("test_resnet", "random").build()
    state = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    for content in (
        {"epoch": 3, "state_dict": state},
        {"model_state_dict": state, "optimizer": {"lr": 1}},
        {"student": {"other": torch.zeros(1)}, "teacher": {"module": state}},
    ):
        torch.save(content, tmp_path / "own.pt")
        with caplog.at_level("INFO"):
            found = TimmEncoder("test_resnet", str(tmp_path / "own.pt")).load()
        close(run(found, images(2, 160)), run(TimmEncoder("test_resnet", "random").load(), images(2, 160)))
    assert "own.pt: read state_dict without module._orig_mod." in caplog.text
    assert "own.pt: read teacher.module without module._orig_mod." in caplog.text


def test_a_mapping_that_contains_itself_comes_to_an_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "loop.pt")
    with pytest.raises(WeightsError, match="holds no state dict"):
        TimmEncoder("test_resnet", str(tmp_path / "loop.pt")).load()


# Functions


SOURCE = """
import torch
from torch import nn
from torchvision import transforms

NUMBER = 3

class Net(nn.Module):
    def __init__(self, dim=6, stride=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=stride)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, dim)

    def forward(self, images):
        return self.last(self.norm(self.conv(images)).mean((2, 3)))

class Crop:
    def __init__(self, side):
        self.side = side
    def __call__(self, image):
        return transforms.functional.to_tensor(image.resize((self.side, self.side)))

def encoder(dim=6, stride=4):
    return Net(dim, stride)

def both(side=32):
    return Net(), Crop(side)

def anonymous():
    return Net(), lambda image: Crop(32)(image)

def hidden():
    class Inner(Net):
        pass
    return Inner(), Crop(32)

def augmenting():
    return Net(), transforms.Compose([transforms.RandomResizedCrop(32), transforms.ToTensor()])

def ragged():
    return Net(), transforms.ToTensor()

def whole_numbers():
    return Net(), transforms.PILToTensor()

def picky():
    return Net(), transforms.Normalize(0.5, 0.5)

def a_number():
    return 3

def a_class():
    return Net

def bad_transform():
    return Net(), 3

def fails():
    raise KeyError("no such layer")

def ends():
    raise SystemExit(2)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module into the current folder, under a name that no other test has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str) -> str:
        name = f"own_{abs(hash(tmp_path))}_{len(list(tmp_path.glob('own_*')))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def test_a_function_gives_a_network_and_its_transform(package: Callable[[str], str], tmp_path: Path) -> None:
    name = package(SOURCE)
    found = CallableEncoder(f"{name}:both").load()
    module = sys.modules[name]
    assert isinstance(found.module, own_modules.OwnNetwork)
    close(run(found, images()), eager(found.module.program, images()))
    picture = Image.new("RGB", (50, 40), (255, 0, 51))
    assert torch.equal(found.transform(picture), module.Crop(32)(picture))
    assert found.weights == f"function {name}:both"
    assert not found.random
    assert CallableEncoder(f"{name}:both", weights="random").load().random


def test_another_process_finds_the_functions_module(
    package: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = package(SOURCE)
    found = CallableEncoder(f"{name}:both").load()
    wanted = eager(found.module, images())
    content = pickle.dumps((found.module, found.transform))
    # A process that was started elsewhere, and has imported nothing.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != tmp_path])
    monkeypatch.chdir("/")
    sys.modules.pop(name)
    module, transform = pickle.loads(content)
    close(eager(module, images()), wanted)
    assert not module.training
    assert transform(Image.new("RGB", (9, 9))).shape == (3, 32, 32)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.encoder.", "module.backbone."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_state_dict_is_found_under_whatever_stands_before_it(
    prefix: str, suffix: str, package: Callable[[str], str], tmp_path: Path
) -> None:
    name = package(SOURCE)
    made = CallableEncoder(f"{name}:encoder", preprocess=HALF, seed=5).load()
    state = {key.removeprefix("program."): value for key, value in made.module.state_dict().items()}
    stored = {f"{prefix}{key}": value for key, value in state.items()}
    inner = prefix.removeprefix("module.")
    if inner:
        stored[prefix.replace(inner, "head.weight")] = torch.zeros(2)
    path = tmp_path / f"own{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 1, "state_dict": stored}, path)
    else:
        safetensors.torch.save_file(stored, path)
    found = CallableEncoder(f"{name}:encoder", str(path), preprocess=HALF).load()
    close(run(found, images()), run(made, images()))
    assert found.weights == f"file own{suffix}" + (f", under {inner}" if inner else "")


def test_a_network_that_is_there_twice_needs_a_prefix(package: Callable[[str], str], tmp_path: Path) -> None:
    name = package(SOURCE)
    query, momentum = (CallableEncoder(f"{name}:encoder", preprocess=HALF, seed=seed).load() for seed in (1, 2))
    stored = {
        f"{prefix}{key.removeprefix('program.')}": value
        for prefix, made in (("encoder_q.", query), ("encoder_k.", momentum))
        for key, value in made.module.state_dict().items()
    }
    torch.save(stored, tmp_path / "moco.pt")
    encoder = CallableEncoder(f"{name}:encoder", str(tmp_path / "moco.pt"), preprocess=HALF)
    with pytest.raises(WeightsError, match=r"more than once.*model\.prefix=encoder_q\. or model\.prefix=encoder_k\."):
        encoder.load()
    close(run(replace(encoder, prefix="encoder_k.").load(), images()), run(momentum, images()))
    with pytest.raises(WeightsError, match=r"model\.prefix=encoder\.: no name in .*moco\.pt starts with it"):
        replace(encoder, prefix="encoder.").load()
    with pytest.raises(WeightsError, match=r"does not fit arch=own_.*tensors missing"):
        replace(encoder, prefix="encoder_").load()


def test_other_and_damaged_state_dicts_are_refused(package: Callable[[str], str], tmp_path: Path) -> None:
    name = package(SOURCE)

    def load(path: Path) -> None:
        CallableEncoder(f"{name}:encoder", str(path), preprocess=HALF).load()

    made = CallableEncoder(f"{name}:encoder", preprocess=HALF, arguments={"dim": 7}).load()
    state = {key.removeprefix("program."): value for key, value in made.module.state_dict().items()}
    torch.save(state, tmp_path / "wide.pt")
    with pytest.raises(WeightsError, match=r"wide\.pt does not fit.*2 of another shape \(last\.weight \(7, 4\)"):
        load(tmp_path / "wide.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other\.pt does not fit.*missing"):
        load(tmp_path / "other.pt")
    torch.save({"model": Attack(tmp_path / "harmed")}, tmp_path / "code.pt")
    with pytest.raises(WeightsError, match="is not unpickled, since that would run code"):
        load(tmp_path / "code.pt")
    safetensors.torch.save_file(state, tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    for number, bad in enumerate((b"\xff" * 8 + content[8:], content[:-4], content[:8] + b"{" + content[9:])):
        path = tmp_path / f"bad{number}.safetensors"
        path.write_bytes(bad if number < 2 else bad.replace(b'"dtype":"F32"', b'"dtype":"F99"'))
        with pytest.raises(WeightsError, match=rf"bad{number}\.safetensors cannot be read"):
            load(path)
    scripted(filled(Net()), tmp_path / "program.pt")
    with pytest.raises(WeightsError, match=r"model=torchscript model\.weights=program\.pt"):
        load(tmp_path / "program.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("anonymous", r"the transform that it gives cannot be pickled.*no lambda"),
        ("hidden", r"the network that it gives cannot be pickled.*no function or class that is defined inside"),
        ("augmenting", r"its transform gives another tensor in every call"),
        ("ragged", r"shapes \(3, 64, 96\) and \(3, 160, 64\).*which cannot be stacked"),
        ("whole_numbers", r"its transform gives torch\.uint8 \(3, 64, 96\), and must give a float32"),
        ("picky", r"its transform fails on an RGB picture of 96 x 64 pixels"),
        ("a_number", r"it gives a int, not a torch\.nn\.Module"),
        ("a_class", r"it gives a type, not a torch\.nn\.Module"),
        ("bad_transform", r"the transform that it gives is a int"),
        ("fails", r"it fails \(KeyError: 'no such layer', line \d+ of own_\w+\.py\)"),
        ("ends", r"it fails \(SystemExit: 2"),
        ("encodr", r"has no encodr \(did you mean encoder\?\)"),
        ("NUMBER", r"is a int, not a function"),
        ("encoder", r"model\.preprocess is null.*model/preprocess=imagenet, clip or half"),
    ],
)
def test_a_function_that_cannot_serve_is_told(function: str, message: str, package: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match=message):
        CallableEncoder(f"{package(SOURCE)}:{function}").load()


def test_what_does_not_go_together_is_refused(package: Callable[[str], str]) -> None:
    name = package(SOURCE)
    with pytest.raises(ConfigError, match=r"model\.preprocess is set, and .*:both gives a transform"):
        CallableEncoder(f"{name}:both", preprocess=HALF).load()
    with pytest.raises(ConfigError, match=r"model\.arguments=\{'width': 3\}: .*cannot be called with them"):
        CallableEncoder(f"{name}:encoder", arguments={"width": 3}).check()
    with pytest.raises(ConfigError, match=r"model\.prefix=a\.: is of a state dict"):
        CallableEncoder(f"{name}:encoder", prefix="a.")
    with pytest.raises(ConfigError, match=r"model\.weights=hub"):
        CallableEncoder(f"{name}:encoder", weights="hub")
    for bad in ("encoder", "a/b.py:encoder", "a:", "a:b c"):
        with pytest.raises(ConfigError, match=r"must be package\.module:name"):
            CallableEncoder(bad)
    with pytest.raises(ConfigError, match="there is no module nowhere_at_all"):
        CallableEncoder("nowhere_at_all:encoder").check()
    broken = package("import nothing_of_this_name")
    with pytest.raises(ConfigError, match=r"cannot be imported \(ModuleNotFoundError.*nothing_of_this_name"):
        CallableEncoder(f"{broken}:encoder").check()
    with pytest.raises(WeightsError, match=r"model\.weights=no\.pt: there is no such file"):
        CallableEncoder(f"{name}:encoder", weights="no.pt").check()


def test_the_cache_key_follows_code_arguments_and_transform(package: Callable[[str], str]) -> None:
    def key(encoder: CallableEncoder) -> tuple[str, ...]:
        found = encoder.load()
        return found.description.partition(":")[2], found.weights_hash, found.transform_text.partition(",")[2]

    first, commented = package(SOURCE), package(SOURCE + "# the same code, but who can tell\n")
    plain = key(CallableEncoder(f"{first}:encoder", preprocess=HALF))
    assert plain == key(CallableEncoder(f"{first}:encoder", preprocess=HALF))
    assert plain[1] != key(CallableEncoder(f"{commented}:encoder", preprocess=HALF))[1]
    # The stride is in no tensor.
    assert plain[1] != key(CallableEncoder(f"{first}:encoder", preprocess=HALF, arguments={"stride": 2}))[1]
    small, large = (key(CallableEncoder(f"{first}:both", arguments={"side": side})) for side in (32, 40))
    assert small[1] == large[1]
    assert small[2] != large[2]
    assert small == key(CallableEncoder(f"{first}:both", arguments={"side": 32}))


# Hugging Face


PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}
WORDS = ["[UNK]", "[PAD]", "[EOS]", "two", "dogs", "circle", "red", "a"]


def saved(model: Any, folder: Path) -> str:
    filled(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    model = transformers.ViTModel(transformers.ViTConfig(**VISION))
    return saved(model, tmp_path_factory.mktemp("vit")), model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    text = {**VISION, "vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1}
    text = {key: value for key, value in text.items() if key not in ("image_size", "patch_size")}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))
    folder = Path(saved(model, tmp_path_factory.mktemp("clip")))
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    fast: Any = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )
    fast.save_pretrained(folder)
    return str(folder), model


def test_a_vision_model_gives_what_it_pools_its_class_token_or_the_mean(vit: tuple[str, Any]) -> None:
    folder, model = vit
    with torch.no_grad():
        wanted = model(pixel_values=images())
    for output, values in (
        ("pooled", wanted.pooler_output),
        ("cls", wanted.last_hidden_state[:, 0]),
        ("mean", wanted.last_hidden_state.mean(1)),
    ):
        found = HuggingFaceEncoder(folder, output=output).load()
        close(run(found, images()), values)
        close(eager(again(found.module), images()), values)
        assert found.description == f"transformers vit {Path(folder).name}, {output}"
    assert found.weights == f"folder {Path(folder).name}"
    picture = Image.new("RGB", (50, 40), (255, 0, 51))
    close(found.transform(picture)[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))
    assert HuggingFaceEncoder(folder).reads == {"images"}
    with pytest.raises(ConfigError, match="cannot embed texts"):
        found.reading("texts")


def test_a_clip_has_both_towers(clip: tuple[str, Any]) -> None:
    folder, model = clip
    encoder = HuggingFaceEncoder(folder)
    assert encoder.reads == {"images", "texts"}
    found = encoder.load()
    with torch.no_grad():
        close(run(found, images()), model.get_image_features(pixel_values=images()).pooler_output)
        close(
            run(HuggingFaceEncoder(folder, output="cls").load(), images()),
            model.vision_model(pixel_values=images()).last_hidden_state[:, 0],
        )
        texts = found.reading("texts")
        tokens = texts.transform(["a red circle", "two dogs"])
        # Alone, a text needs no padding.
        alone = model.get_text_features(input_ids=torch.tensor([[3, 4, 2]]), attention_mask=torch.ones(1, 3))
        close(texts.module(tokens)[1:], alone.pooler_output)
    assert tokens["input_ids"].shape == (2, 12)
    assert texts.reads == "texts"
    assert "padded to and cut at 12 tokens" in texts.transform_text


def test_what_a_model_does_not_have_is_told(tmp_path: Path, clip: tuple[str, Any]) -> None:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    resnet = saved(transformers.ResNetModel(transformers.ResNetConfig(**sizes)), tmp_path / "resnet")
    assert run(HuggingFaceEncoder(resnet, output="mean").load(), images()).shape == (3, 8)
    assert run(HuggingFaceEncoder(resnet).load(), images()).shape == (3, 8)
    with pytest.raises(ConfigError, match=r"model\.output=cls: a model of type resnet has no class token"):
        HuggingFaceEncoder(resnet, output="cls").load()
    bare = transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False)
    folder = saved(bare, tmp_path / "bare")
    with pytest.raises(WeightsError, match=r"2 tensors are missing.*pooler.*set model\.output=cls or mean"):
        HuggingFaceEncoder(folder).load()
    with torch.no_grad():
        wanted = bare(pixel_values=images()).last_hidden_state[:, 0]
    close(run(HuggingFaceEncoder(folder, output="cls").load(), images()), wanted)
    mae = saved(transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION)), tmp_path / "mae")
    with pytest.raises(ConfigError, match="another output in every call, as dropout or random masks do"):
        HuggingFaceEncoder(mae, output="cls").load()
    text = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
    with pytest.raises(ConfigError, match="the network fails on a batch of 2"):
        HuggingFaceEncoder(saved(text, tmp_path / "bert")).load()
    path = Path(clip[0], "tokenizer.json")
    content = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(WeightsError, match="AutoTokenizer"):
            HuggingFaceEncoder(clip[0]).load().reading("texts")
    finally:
        path.write_bytes(content)


def test_a_folder_of_pickles_damaged_or_incomplete_is_refused(vit: tuple[str, Any], tmp_path: Path) -> None:
    folder, model = vit
    whole = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    weights = whole["model.safetensors"]
    pickled = io.BytesIO()
    torch.save(model.state_dict(), pickled)
    lacking = {name: value for name, value in whole.items() if name != "model.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode()
    cases: dict[str, tuple[dict[str, bytes], str]] = {
        "pickle": ({**lacking, "pytorch_model.bin": pickled.getvalue()}, r"pytorch_model\.bin alone.*save_pretrained"),
        "nothing": (lacking, r"has no file of type \.safetensors"),
        "config": ({**whole, "config.json": b"{"}, "AutoConfig"),
        "type": ({**whole, "config.json": b'{"model_type": "nonsense"}'}, "AutoConfig"),
        "processor": ({**whole, "preprocessor_config.json": b"{"}, "AutoImageProcessor"),
        "cut": ({**whole, "model.safetensors": weights[:-40]}, "AutoModel"),
        "header": ({**whole, "model.safetensors": b"\xff" * 8 + weights[8:]}, "AutoModel"),
        "shard": ({**lacking, "model.safetensors.index.json": index, "model-00002-of-00002.safetensors": b""}, "Auto"),
    }
    for name, (files, message) in cases.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        with pytest.raises(WeightsError, match=message) as error:
            HuggingFaceEncoder(str(tmp_path / name)).load()
        text = str(error.value)
        assert text.startswith(f"model.weights={tmp_path / name}: cannot be had (")
        assert all(way in text for way in ("(1) connect", "(2) give a local copy", "(3) choose another"))
        assert HuggingFaceEncoder(str(tmp_path / name)).reads <= {"images", "texts"}


REMOTE = """
import pathlib
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

pathlib.Path({ran!r}).touch()

class OwnConfig(PreTrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(3, 2, bias=False)
        self.post_init()

    def forward(self, pixel_values):
        return BaseModelOutputWithPooling(pooler_output=self.layer(pixel_values.mean((2, 3))))
"""


def test_code_that_comes_with_a_model_is_run_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    weight = torch.arange(6.0).reshape(2, 3)
    safetensors.torch.save_file({"layer.weight": weight}, folder / "model.safetensors", {"format": "pt"})
    (folder / "own.py").write_text(REMOTE.format(ran=str(tmp_path / "ran")))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(WeightsError, match="AutoConfig"):
        HuggingFaceEncoder(str(folder)).load()
    assert not (tmp_path / "ran").exists()
    found = HuggingFaceEncoder(str(folder), trust_remote_code=True).load()
    assert (tmp_path / "ran").exists()
    close(run(found, images()), images().mean((2, 3)) @ weight.T)
    close(eager(again(found.module), images()), images().mean((2, 3)) @ weight.T)
    with (folder / "own.py").open("a") as stream:
        stream.write("# changed\n")
    changed = HuggingFaceEncoder(str(folder), trust_remote_code=True).load()
    assert changed.weights_hash != found.weights_hash


def test_hub_models_are_pinned_and_looked_for_in_the_cache(
    vit: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = HuggingFaceEncoder("somebody/vit")
    with pytest.raises(
        WeightsError, match=r"model\.weights=somebody/vit: cannot be had \(not in the cache, and HF_HUB"
    ):
        encoder.check()
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--somebody--vit"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    for path in Path(vit[0]).iterdir():
        (place / "snapshots" / commit / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert encoder.load().weights == f"hub somebody/vit@{commit}"
    assert replace(encoder, revision=commit).load().weights == f"hub somebody/vit@{commit}"
    with pytest.raises(WeightsError, match="not in the cache"):
        replace(encoder, revision="other").check()
    with pytest.raises(ConfigError, match=r"model\.revision must be the commit that you have read.*not main"):
        replace(encoder, revision="main", trust_remote_code=True)
    with pytest.raises(ConfigError, match=r"model\.revision=main: is of a model on the hub"):
        HuggingFaceEncoder(vit[0], revision="main")
    with pytest.raises(WeightsError, match="there is no such folder, and it is no name on the hub"):
        HuggingFaceEncoder("./no/such/folder").check()
    with pytest.raises(ConfigError, match=r"model\.output=last: must be one of pooled, cls, mean"):
        HuggingFaceEncoder(vit[0], output="last")


# The command line


OTHERS = tuple(setting for setting in SMALL if not setting.startswith("model."))


def planned(folder: Path, *overrides: str) -> stages.Plan:
    config.register()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        cfg = compose("config", overrides=[f"trainer.cache={folder}", *overrides])
    parts = config.build(config.resolve(cfg))
    return stages.Plan(**{name: parts[name] for name in stages.Plan.__dataclass_fields__})


def test_a_plan_says_what_is_missing(tmp_path: Path, clip: tuple[str, Any], vit: tuple[str, Any]) -> None:
    for overrides, message in (
        (["model=torchscript", "model.weights=no.pt"], r"model\.weights=no\.pt: there is no such file"),
        (["model=huggingface", "model.weights=a/b"], r"model\.weights=a/b: cannot be had \(not in the cache"),
        (["model=callable", "model.function=nowhere:net"], r"model\.function=nowhere:net: there is no module"),
        (
            ["experiment=captions", "model=huggingface", f"model.weights={vit[0]}"],
            r"model is a HuggingFaceEncoder, which cannot embed texts",
        ),
    ):
        holes = preflight.missing(planned(tmp_path, *overrides))
        assert [hole for hole in holes if hole.startswith("model")]
        assert re.match(message, next(hole for hole in holes if hole.startswith("model")))
    asked = ["experiment=captions", "model=huggingface", f"model.weights={clip[0]}", "reference=class_prior"]
    assert preflight.missing(planned(tmp_path, *asked)) == []
    (Path(clip[0]) / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        assert re.search("AutoTokenizer", preflight.missing(planned(tmp_path, *asked))[0])
    finally:
        (tmp_path / "tokenizer.json").rename(Path(clip[0]) / "tokenizer.json")


@pytest.mark.slow
def test_a_whole_run_with_a_torchscript_encoder(net: nn.Module, tmp_path: Path) -> None:
    path = scripted(net, tmp_path / "own.pt")
    done = measure(
        tmp_path / "run",
        *OTHERS,
        "model=torchscript",
        f"model.weights={path}",
        "model/preprocess=half",
        "model.preprocess.side_px=32",
    )
    assert done.code == 0, done.stderr
    figures = done.figures()
    preprocess = Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash", 1.0)
    loaded = TorchScriptEncoder(path, preprocess).load()
    assert figures["encoder"] == {
        **figures["encoder"],
        "description": "TorchScript own, 32 px",
        "weights": "file own.pt",
        "weights_hash": loaded.weights_hash,
        "random": False,
    }
    scores = done.scores().filter(pl.col("role") == "target")
    assert scores["status"].unique().to_list() == ["ok"]
