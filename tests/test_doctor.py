"""The doctor: every fault planted is found, named and counted; what is well is called well."""

import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from conftest import SMALL
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from dejavu_exp import config, provenance, sensitivity, tables
from dejavu_exp.cells import State
from dejavu_exp.doctor import environment, model
from dejavu_exp.doctor.__main__ import main
from dejavu_exp.doctor.findings import Examination
from dejavu_exp.encoders import LoadedEncoder, TimmEncoder
from dejavu_exp.stages import Plan

BOX = [8, 8, 24, 24]
SIDE = 48
SPLIT = ("split.target=6", "split.heldout=6", "split.public=null", "split.unseen=4", "split.min_side_px=8", "probe.k=2")


@dataclass(frozen=True)
class Told:
    """What the command said and wrote."""

    status: int
    written: Any
    printed: str

    @property
    def kinds(self) -> dict[str, tuple[str, int]]:
        """Severity and count by kind."""
        found = [finding for one in self.written["examinations"] for finding in one["findings"]]
        return {finding["kind"]: (finding["severity"], finding["count"]) for finding in found}

    def finding(self, kind: str) -> Any:
        found = [item for one in self.written["examinations"] for item in one["findings"] if item["kind"] == kind]
        assert len(found) == 1, self.kinds
        return found[0]


@pytest.fixture
def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    def ask(*arguments: str | Path) -> Told:
        file = tmp_path / "told.json"
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--json", str(file)])
        assert isinstance(ended.value.code, int)
        return Told(ended.value.code, json.loads(file.read_text()), capsys.readouterr().out)

    return ask


# --- data ---------------------------------------------------------------------------------------------------------


def noise(seed: int, mode: str = "RGB", size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def encoded(picture: Image.Image, name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, name, **options)
    return stream.getvalue()


@dataclass
class Folder:
    """A table of images: two classes of 20 in train and 4 in val, all well until something is planted."""

    root: Path
    rows: list[dict[str, Any]]

    @classmethod
    def healthy(cls, root: Path) -> "Folder":
        rows = []
        root.mkdir()
        for number in range(48):
            name = f"{number:02d}.png"
            (root / name).write_bytes(encoded(noise(number), "PNG"))
            origin = "train" if number < 40 else "val"
            rows.append({"path": name, "label": "dog" if number % 2 else "cat", "origin": origin, "boxes": [BOX]})
        return cls(root, rows)

    def put(self, row: int, content: bytes, ending: str = "png") -> str:
        """Another file in a row's place."""
        name = f"{row:02d}x.{ending}"
        (self.root / name).write_bytes(content)
        self.rows[row]["path"] = name
        return name

    def save(self, **columns: Any) -> tuple[str, ...]:
        schema = {"boxes": pl.List(pl.List(pl.Int64))}
        pl.DataFrame(self.rows, schema_overrides=schema).with_columns(**columns).write_parquet(
            self.root / "images.parquet"
        )
        return ("dataset=manifest", f"dataset.path={self.root / 'images.parquet'}", *SPLIT)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.healthy(tmp_path / "images")


def test_a_healthy_data_set_is_called_well(doctor: Callable[..., Told], folder: Folder) -> None:
    told = doctor("data", *folder.save())
    assert (told.status, told.written["passed"], told.kinds) == (0, True, {})
    facts = told.written["examinations"][0]["facts"]
    assert facts["images by role"] == {"target": 12, "heldout": 12, "shared": 0, "public": 16, "unseen": 8}
    assert facts["images looked at"] == "48 of 48"
    assert facts["background views, target"] == {"of": 12, "ok": 12}
    assert "All well: 0 faults, 0 warnings, 0 notes." in told.printed
    sampled = doctor("data", "--images", "10", *folder.save()).written["examinations"][0]["facts"]
    # Of every role as many as there are.
    assert sampled["images looked at"] == "10 of 48"
    assert min(sampled[f"background views, {role}"]["of"] for role in ("target", "unseen", "heldout")) >= 2


def test_every_broken_image_is_found(doctor: Callable[..., Told], folder: Folder) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 20)
    moving = [noise(100 + frame) for frame in range(3)]
    whole = encoded(noise(90), "JPEG")
    folder.rows[0]["path"] = "away\n.png"
    names = {
        "image_not_an_image": folder.put(1, b"no image at all"),
        "image_not_decoded": folder.put(2, whole[: len(whole) // 2], "jpg"),
        "image_16_bit": folder.put(3, encoded(deep, "PNG")),
        "image_ending": folder.put(4, encoded(noise(91), "PNG"), "jpg"),
        "image_turned": folder.put(5, encoded(noise(92), "JPEG", exif=turned.tobytes()), "jpg"),
        "image_cmyk": folder.put(6, encoded(noise(93, "CMYK"), "JPEG"), "jpg"),
        "image_moving": folder.put(7, encoded(moving[0], "GIF", save_all=True, append_images=moving[1:]), "gif"),
        "image_transparent": folder.put(8, encoded(noise(94, "RGBA"), "PNG")),
        "image_tiny": folder.put(9, encoded(noise(95, size=(1, 1)), "PNG")),
        "image_large": folder.put(10, encoded(Image.new("L", (10_000, 5_001)), "PNG")),
    }
    told = doctor("data", *folder.save())
    assert told.status == 1
    assert told.kinds == {
        "image_missing": ("fault", 1),
        "image_not_an_image": ("fault", 1),
        "image_not_decoded": ("fault", 1),
        "image_16_bit": ("note", 1),
        "image_ending": ("warning", 1),
        "image_turned": ("warning", 1),
        "image_cmyk": ("note", 1),
        "image_moving": ("note", 1),
        "image_transparent": ("note", 1),
        "image_tiny": ("warning", 1),
        "image_large": ("warning", 1),
        "box_outside": ("fault", 1),  # of the tiny one
    }
    for kind, name in names.items():
        assert told.finding(kind)["examples"][0].startswith(name)
    # A name from a file stays in its line.
    assert r"away\n.png" in told.finding("image_missing")["examples"][0]
    assert r"away\n.png" in told.printed


def test_boxes_labels_and_copies(doctor: Callable[..., Told], folder: Folder) -> None:
    for row, boxes in enumerate(([[10, 10, 10, 20]], [[0, 0, 49, 20], [5, 5, 6, 6]], [[0, 0, 48, 48]])):
        folder.rows[row]["boxes"] = boxes
    # A dog and a cat with the same bytes; a val image that is also in train.
    (folder.root / "11.png").write_bytes((folder.root / "10.png").read_bytes())
    (folder.root / "41.png").write_bytes((folder.root / "21.png").read_bytes())
    width = pl.when(pl.col("path") == "15.png").then(64).otherwise(SIDE)
    told = doctor("data", *folder.save(width=width, height=pl.lit(SIDE)))
    assert told.status == 1
    kinds = told.kinds
    copies = kinds.pop("copies_roles")
    assert copies[0] == "fault"
    assert kinds == {
        "box_empty": ("fault", 1),
        "box_outside": ("fault", 1),
        "box_whole": ("warning", 1),
        "copies_labels": ("fault", 1),
        "image_size": ("fault", 1),
    }
    assert told.finding("box_outside")["examples"] == ["01.png: [0, 0, 49, 20] in 48 x 48 px"]
    assert told.finding("copies_labels")["examples"] == ["10.png, 11.png (cat, dog)"]
    assert any("41.png" in text and "unseen" in text for text in told.finding("copies_roles")["examples"])
    assert told.finding("image_size")["examples"] == ["15.png: is 48 x 48 px, told 64 x 48 px"]
    excluded = doctor("data", *folder.save(), "leaks=exclude")
    assert excluded.kinds["copies_roles"] == ("note", copies[1])


def test_where_boxes_play_no_part_they_are_no_fault(doctor: Callable[..., Told], folder: Folder) -> None:
    folder.rows[0]["boxes"] = [[0, 0, 49, 20]]
    told = doctor("data", *folder.save(), "probe=corner_knn", "probe.k=2")
    assert (told.status, told.kinds) == (0, {"box_outside": ("note", 1)})


def test_what_the_split_and_the_bank_lack(doctor: Callable[..., Told], folder: Folder) -> None:
    folder.rows[0]["label"] = "Cat"
    told = doctor("data", *folder.save())
    assert told.status == 1
    assert told.kinds == {"labels_alike": ("warning", 1), "split": ("fault", 1)}
    assert told.finding("split")["sentence"].startswith("class Cat: no target image is left")
    folder.rows[0]["label"] = "cat"
    given = folder.save()
    told = doctor("data", *given, "split.heldout=30", "split.public=10", "split.unseen=0", "probe.k=30")
    assert told.kinds == {"split_short": ("warning", 3), "no_unseen": ("warning", 1), "bank_small": ("fault", 1)}
    assert "at most 18 public images" in told.finding("bank_small")["sentence"] or "at most" in told.printed


def test_rows_that_give_no_view(doctor: Callable[..., Told], folder: Folder) -> None:
    given = folder.save()
    told = doctor("data", *given, "split.min_side_px=40")
    assert {kind: found[0] for kind, found in told.kinds.items()} == {
        "no_view_target": "fault",
        "no_view_unseen": "fault",
        "no_view_heldout": "fault",
    }
    asked = ("probe=caption_to_image", "scoring=object_inference", "tagger=dataset_objects", "split=pairs")
    pairs = (*given[:2], *asked, "split.target=10", "split.public=20", "split.unseen=10", "probe.k=2")
    told = doctor("data", *pairs)
    assert told.kinds == {
        "no_view_target": ("fault", 10),
        "no_view_unseen": ("fault", 10),
        "tagger": ("fault", 1),  # no image names objects
    }
    assert "no_caption" in told.finding("no_view_target")["examples"][0]
    objects = pl.when(pl.col("path") == "00.png").then(None).otherwise(pl.lit(["ball"], dtype=pl.List(pl.String)))
    folder.save(caption=pl.lit("a ball"), objects=objects)
    assert doctor("data", *pairs, "split.heldout=8").kinds == {"no_objects": ("warning", 1)}


def test_a_data_set_that_cannot_be_read(doctor: Callable[..., Told], folder: Folder, tmp_path: Path) -> None:
    told = doctor("data", "dataset=manifest", f"dataset.path={tmp_path / 'nowhere.csv'}")
    assert (told.status, told.kinds) == (1, {"dataset": ("fault", 1)})
    assert str(tmp_path / "nowhere.csv") in told.finding("dataset")["sentence"]
    folder.save(boxes=pl.lit("[[1,2]]"))
    told = doctor("data", *folder.save(boxes=pl.lit("[[1, 2]]")))
    assert told.kinds["reader"] == ("warning", 1)
    assert told.kinds["status_bad_annotation"] == ("warning", 48)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["patient"],
        ["data", "--images", "0"],
        ["data", "--images", "some"],
        ["model", "--images", "1"],
        ["run"],
        ["data", "probe.kk=3"],
        ["data", "split.target=0"],
        ["environment", "--inputs"],
    ],
)
def test_bad_usage_has_a_status_of_its_own(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.err.startswith(("usage: ", "ConfigError: "))
    assert not told.out


# --- model --------------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """A linear embedding of the pixels."""

    def __init__(self, columns: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 16 * 16, columns, generator=generator))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ self.weight


class Constant(Flat):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels * 0 + 1)


class Zero(Flat):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels) * (torch.arange(len(pixels)) != 1)[:, None]


class Line(Flat):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels)[:, :1] * torch.ones(24)


class NotFinite(Flat):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).where(pixels.flatten(1)[:, :1] != pixels[2, 0, 0, 0], torch.nan)


class Map(Flat):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels)[:, :, None, None]


class Tuple(Flat):
    def forward(self, pixels: Tensor) -> Tensor:
        return (super().forward(pixels),)  # type: ignore[return-value]


class Refusing(Flat):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels[:, :, :8])


def in_training(*after: nn.Module) -> nn.Module:
    return nn.Sequential(Flat(), *after).train()


class Batched(Flat):
    """Takes the mean of the batch away, whatever mode it is in."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels - pixels.mean(dim=0))


class Random(Flat):
    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(pixels), 0.5, training=True)


def damaged() -> nn.Module:
    network = Flat()
    with torch.no_grad():
        network.weight[0, 0] = torch.inf
    return network


RESIZED = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])


def loaded(module: nn.Module, transform: Callable[[Any], Any] = RESIZED, **options: Any) -> LoadedEncoder:
    return LoadedEncoder(module, transform, "planted", "file planted.pt", "0" * 32, "resize", random=False, **options)


@pytest.fixture(scope="module")
def plan() -> Plan:
    settings = (*SMALL, "model=efficientnet_lite0", "model.weights=random", "trainer=cpu", "reference=class_prior")
    resolved, _ = config.compose([item for item in settings if not item.startswith("model.recipe")])
    return Plan(**config.build(resolved))


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "TIMED_S", 0.0)


def looked(encoder: LoadedEncoder, plan: Plan) -> Examination:
    found = Examination("model", "planted")
    model.look(found, encoder, plan, 12)
    return found


def kinds(found: Examination) -> dict[str, str]:
    return {finding.kind: str(finding.severity) for finding in found.findings}


def test_a_healthy_encoder_is_called_well(plan: Plan) -> None:
    found = looked(loaded(Flat().eval()), plan)
    assert kinds(found) == {}
    assert found.facts["repeated call, images"] == "the same bits"
    assert re.fullmatch(r"\[3, 16, 16\], values from -(1|0\.9\d+) to (1|0\.9\d+)", str(found.facts["input"]))
    assert found.facts["parameters, images"] == 3 * 16 * 16 * 24
    assert found.facts["images a second, network on cpu, 12 at a time"] > 0


@pytest.mark.parametrize(
    ("module", "expected", "said"),
    [
        (Constant().eval(), {"constant": "fault"}, "same embedding"),
        (Zero().eval(), {"zero": "fault", "batch": "fault"}, "zero throughout"),
        (Line().eval(), {"collapsed": "warning"}, "1.0 directions"),
        (NotFinite().eval(), {"not_finite": "fault"}, "NaN or infinite"),
        (Map().eval(), {"output": "fault"}, "shape (12, 24, 1, 1)"),
        (Tuple().eval(), {"output": "fault"}, "a tuple"),
        (Refusing().eval(), {"forward": "fault"}, "RuntimeError"),
        (Batched().eval(), {"batch": "fault"}, "what else is in the batch"),
        (Random().eval(), {"chance": "fault"}, "other embeddings each time"),
        (in_training(nn.Dropout()), {"training_mode": "fault", "chance": "fault"}, "training mode"),
        (damaged().eval(), {"weights_not_finite": "fault", "not_finite": "fault"}, "NaN or infinite"),
    ],
)
def test_every_planted_fault_of_a_network_is_found(
    plan: Plan, module: nn.Module, expected: dict[str, str], said: str
) -> None:
    found = looked(loaded(module), plan)
    assert kinds(found) == expected
    assert any(said in finding.sentence for finding in found.findings)


def test_the_images_that_are_not_finite_are_named(plan: Plan) -> None:
    (finding,) = looked(loaded(NotFinite().eval()), plan).findings
    assert finding.count == 1
    assert finding.examples[0].startswith(("train", "val"))


@pytest.mark.parametrize(
    ("transform", "kind", "said"),
    [
        (transforms.Compose([transforms.Resize((16, 16)), transforms.PILToTensor()]), "transform", "uint8 tensor"),
        (transforms.Resize((16, 16)), "transform", "gives a Image and not"),
        (lambda _: 1 / 0, "transform", "fails on a picture of 640 x 480 px: ZeroDivisionError"),
        (
            transforms.Compose([*RESIZED.transforms[:2], transforms.Lambda(lambda pixels: pixels * 255)]),
            "normalised",
            "values up to 255",
        ),
    ],
)
def test_every_planted_fault_of_a_transform_is_found(
    plan: Plan, transform: Callable[[Any], Any], kind: str, said: str
) -> None:
    found = looked(loaded(Flat().eval(), transform), plan)
    assert [finding.kind for finding in found.findings] == [kind]
    assert said in found.findings[0].sentence


def test_a_transform_that_keeps_the_form_of_images_fits_into_no_batch(
    plan: Plan, folder: Folder, doctor: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put(0, encoded(noise(99, size=(96, 48)), "PNG"))
    encoder = loaded(Flat().eval(), transforms.Compose([transforms.Resize(16), *RESIZED.transforms[1:]]))
    monkeypatch.setattr(TimmEncoder, "load", lambda _: encoder)
    told = doctor("model", "model=efficientnet_lite0", "model.weights=random", "--images", "48", *folder.save())
    assert (told.status, told.kinds) == (1, {"transform": ("fault", 1)})
    assert "(3, 16, 16) and (3, 16, 32)" in told.finding("transform")["sentence"]


def test_images_that_cannot_be_read_are_told_and_the_rest_is_looked_at(
    folder: Folder, doctor: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoded(noise(90), "JPEG")
    folder.put(0, whole[: len(whole) // 2], "jpg")
    folder.put(1, b"no image")
    monkeypatch.setattr(TimmEncoder, "load", lambda _: loaded(Flat().eval()))
    told = doctor("model", "model=efficientnet_lite0", "model.weights=random", "--images", "48", *folder.save())
    assert (told.status, told.kinds) == (0, {"unreadable": ("warning", 2)})
    assert told.written["examinations"][0]["facts"]["output, images"].startswith("46 x 24")


def texts(columns: int, transform: Callable[[Any], Any]) -> Callable[[], LoadedEncoder]:
    return lambda: loaded(Flat(columns).eval(), transform, reads="texts")


def letters(lines: list[str]) -> Tensor:
    rows = [[float(ord(letter)) for letter in line[: 3 * 256].ljust(3 * 256)] for line in lines]
    return torch.tensor(rows) / 128


@pytest.mark.parametrize(
    ("columns", "transform", "expected"),
    [
        (24, letters, {}),
        (23, letters, {"towers": "fault"}),
        (24, lambda lines: letters(lines)[:, :9], {"forward": "fault"}),
    ],
)
def test_the_text_tower_is_looked_at_where_the_probe_shows_texts(
    plan: Plan, columns: int, transform: Callable[[Any], Any], expected: dict[str, str]
) -> None:
    probe = config.bind(config.compose(["probe=caption_to_image"])[0]["probe"], "probe")
    found = looked(loaded(Flat().eval(), text=texts(columns, transform)), replace(plan, probe=probe))
    assert kinds(found) == expected
    assert found.facts["parameters, texts"] == 3 * 256 * columns


def test_weights_that_are_missing_do_not_fit_or_are_random(
    doctor: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    told = doctor("model", "model=efficientnet_lite0")
    assert (told.status, told.kinds) == (1, {"weights": ("fault", 1)})
    assert "not in the local cache" in told.finding("weights")["sentence"]
    told = doctor("model", "model=efficientnet_lite0", "model.weights=nowhere.pt")
    assert told.finding("weights")["sentence"].startswith("model.weights=nowhere.pt: there is no such file.")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    told = doctor("model", "model=efficientnet_lite0", f"model.weights={tmp_path / 'other.pt'}")
    assert (told.status, told.kinds) == (1, {"load": ("fault", 1)})
    monkeypatch.setattr(TimmEncoder, "load", lambda _: replace(loaded(Flat().eval()), random=True))
    told = doctor(
        "model", "model=efficientnet_lite0", "model.weights=random", "dataset=manifest", "dataset.path=no.csv"
    )
    assert (told.status, told.kinds) == (0, {"random": ("warning", 1), "stand_ins": ("note", 1)})
    # A probe that the encoder cannot answer.
    told = doctor("model", "model=efficientnet_lite0", "model.weights=random", "probe=caption_to_image")
    assert "cannot embed texts" in told.finding("weights")["sentence"]
    assert doctor("model").kinds == {"trained_here": ("note", 1)}


# --- run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the whole instrument, in this process."""
    folder = tmp_path_factory.mktemp("doctor")
    cache = f"trainer.cache={folder / 'cache'}"
    given = (*SMALL, "trainer=cpu", cache, "utility=none", "gate.max_gap=0.05", "reference=[naive_bayes,class_prior]")
    resolved, _ = config.compose(given)
    resolved.pop("run")
    sensitivity.measure(sensitivity.Variation("", "", "", given, folder / "run", resolved))
    return folder / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def edit(folder: Path, change: Callable[[Any], object], name: str = "figures.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    tables.write_json(content, folder / name)


def set_to(value: object, *path: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        assert content[path[-1]] != value
        content[path[-1]] = value

    return change


def test_a_whole_run_is_called_well(doctor: Callable[..., Told], finished: Path) -> None:
    told = doctor("run", finished, "--inputs")
    assert (told.status, told.kinds) == (0, {})
    facts = told.written["examinations"][0]["facts"]
    assert (facts["state"], facts["dataset hash"], facts["split hash"]) == ("finished", "the same", "the same")
    assert facts["figures computed again"] > 1000


GAP = ("references", "naive_bayes", "roles", "target", "top1", "100", "gap")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*GAP, "value"), 0.5),
        ((*GAP, "high"), 0.9),
        ((*GAP, "n_used"), 7),
        (("references", "class_prior", "roles", "unseen", "quadrants", "memorized", "value"), 0.77),
        (("references", "naive_bayes", "corrected_gap", "top5", "20", "low"), -0.01234),
        (("agreement", "correlated_by_all", "value"), 0.99),
        (("references", "naive_bayes", "verdict"), "No memorization is shown."),
        (("gate", "passed"), True),
    ],
)
def test_one_edited_figure_is_found(
    doctor: Callable[..., Told], copied: Path, path: tuple[str, ...], value: object
) -> None:
    edit(copied, set_to(value, *path))
    told = doctor("run", copied)
    assert told.status == 1
    finding = told.finding("figures_other")
    assert finding["count"] == 1
    assert finding["examples"][0].startswith(".".join(path) + f": {value}")


def test_an_edited_interval_is_found_though_other_code_made_the_run(
    doctor: Callable[..., Told], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: "0" * 40)
    assert doctor("run", copied).kinds == {"other_code": ("note", 1)}
    edit(copied, set_to(0.9, *GAP, "high"))
    told = doctor("run", copied)
    assert told.status == 1
    assert told.kinds["figures_other"] == ("fault", 1)


def test_intervals_of_another_version_are_no_fault(
    doctor: Callable[..., Told], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copied, set_to("0.0.1", "run", "versions", "numpy"))
    before = config.bind

    def elsewhere(node: Any, key: str) -> Any:
        # The same figures from other draws, as another version of the generator would give.
        found = before(node, key)
        return replace(found, resamples=301) if key == "scoring" else found

    monkeypatch.setattr(config, "bind", elsewhere)
    told = doctor("run", copied)
    assert told.kinds["figures_other_intervals"][0] == "warning"
    # The level and the number of resamples do not move a value.
    assert not [text for text in told.printed.splitlines() if ".value" in text and "corrected_gap.top1" in text]


def change_scores(folder: Path, **columns: pl.Expr) -> None:
    frame = pl.read_parquet(folder / "scores.parquet")
    frame.with_columns(**columns).write_parquet(folder / "scores.parquet")


FIRST = pl.int_range(pl.len()) == 0


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"target_correct": pl.col("target_correct") ^ FIRST}, "scores_rows"),
        ({"quadrant": pl.when(FIRST).then(pl.lit("x")).otherwise("quadrant")}, "scores_rows"),
        ({"target_probability": pl.col("target_probability") + FIRST.cast(pl.Float64) * 2}, "scores_rows"),
        ({"memorization_score": pl.col("memorization_score") + FIRST.cast(pl.Float64)}, "scores_rows"),
        ({"p_value": pl.col("p_value") / 2}, "p_values"),
        ({"id": pl.when(FIRST).then(pl.col("id").get(1)).otherwise("id")}, "scores_ids"),
        ({"status": pl.when(FIRST).then(pl.lit("fine")).otherwise("status")}, "scores_status"),
        ({"role": pl.when(FIRST).then(pl.lit("measured")).otherwise("role")}, "scores_role"),
        ({"weight": pl.col("weight").cast(pl.Float32)}, "scores_columns"),
        ({"reference": pl.lit("class_prior")}, "scores_references"),
    ],
)
def test_edited_scores_are_found(
    doctor: Callable[..., Told], copied: Path, columns: dict[str, pl.Expr], kind: str
) -> None:
    change_scores(copied, **columns)
    told = doctor("run", copied)
    assert told.status == 1
    assert told.kinds[kind][0] == "fault"


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("spoil", "kind", "severity"),
    [
        (lambda folder: (folder / "report.html").unlink(), "files_missing", "fault"),
        (lambda folder: (folder / "leaks.parquet").write_bytes(b""), "files_empty", "fault"),
        (lambda folder: shortened(folder / "figures.json"), "damaged", "fault"),
        (lambda folder: shortened(folder / "scores.parquet"), "damaged", "fault"),
        (lambda folder: shortened(folder / "correlated.npy"), "damaged", "fault"),
        (lambda folder: shortened(folder / "report.html"), "report", "fault"),
        (lambda folder: (folder / "report.html").write_text("<html></html>"), "report", "fault"),
        (lambda folder: (folder / ".figures.json.1.partial").touch(), "files_partial", "warning"),
        (lambda folder: (folder / "figures.json").chmod(0o666), "files_open", "warning"),
        (lambda folder: (folder / "model_card.md").write_text("# Safe\n"), "card", "fault"),
        (lambda folder: edit(folder, set_to("Safe.", "verdict"), "model_card.json"), "card", "fault"),
        (lambda folder: edit(folder, set_to("Safe.", "verdict")), "verdict", "fault"),
        (lambda folder: edit(folder, set_to(99, "counts", "target", "used")), "counts", "fault"),
        (lambda folder: edit(folder, set_to(99, "leaks", "n_pairs")), "leaks", "fault"),
        (lambda folder: edit(folder, set_to(3, "schema")), "version", "fault"),
        (lambda folder: edit(folder, set_to(99, "schema")), "version", "fault"),
        (lambda folder: edit(folder, lambda figures: figures.pop("counts")), "figures", "fault"),
        (lambda folder: edit(folder, set_to([], "encoder")), "figures", "fault"),
        (lambda folder: edit(folder, set_to(7, "run", "config", "probe", "k")), "config_other", "fault"),
        (lambda folder: (folder / "config.yaml").write_text("probe: 3"), "config", "fault"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), "damaged", "fault"),
        (lambda folder: (folder / "status.json").write_text("{}"), "status", "fault"),
        (lambda folder: (folder / "status.json").unlink(), "no_status", "note"),
    ],
)
def test_spoiled_files_are_found(
    doctor: Callable[..., Told], copied: Path, spoil: Callable[[Path], object], kind: str, severity: str
) -> None:
    spoil(copied)
    told = doctor("run", copied)
    assert told.kinds[kind][0] == severity
    assert told.status == (1 if severity == "fault" else 0)


def test_positions_of_correlated_rows_must_fit(doctor: Callable[..., Told], copied: Path) -> None:
    kept = pl.read_parquet(copied / "correlated.parquet")
    with (copied / "correlated.npy").open("wb") as file:
        np.save(file, np.array([*kept["position"], 5]))
    assert "other positions" in doctor("run", copied).finding("correlated")["sentence"]
    kept.clear().write_parquet(copied / "correlated.parquet")
    if len(kept):
        assert "other rows" in doctor("run", copied).finding("correlated")["sentence"]


def test_the_age_of_a_folder_is_told(doctor: Callable[..., Told], copied: Path) -> None:
    edit(copied, set_to(3, "schema"))
    (copied / "leaks.parquet").unlink()
    told = doctor("run", copied)
    assert told.kinds == {"version": ("fault", 1)}
    assert told.finding("version")["sentence"].startswith(
        "The folder is of an older version: figures.json has schema 3"
    )


@pytest.mark.parametrize(
    ("state", "error", "kind", "status"),
    [
        (State.FAILED, "DataError: no room", "failed", 1),
        (State.RUNNING, None, "stopped", 1),  # by a process that is gone
        (State.QUEUED, None, "stopped", 1),
    ],
)
def test_a_run_that_did_not_finish_is_told_with_its_command(
    doctor: Callable[..., Told], copied: Path, state: State, error: str | None, kind: str, status: int
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    changes = {"state": str(state), "error": error, "pid": gone.pid, "ended": None}
    edit(copied, lambda content: content.update(changes), "status.json")
    for name in ("figures.json", "scores.parquet", "config.yaml"):
        (copied / name).unlink()
    told = doctor("run", copied)
    assert (told.status, list(told.kinds)) == (status, [kind])
    assert told.finding(kind)["way_out"].startswith("Run it again: python -m dejavu_exp hydra.run.dir=")
    assert (error or "did not say that it ended") in told.finding(kind)["sentence"]


def test_a_run_that_still_goes_on_is_left_alone(doctor: Callable[..., Told], copied: Path) -> None:
    edit(copied, lambda content: content.update(state="running", pid=os.getpid(), ended=None), "status.json")
    (copied / "figures.json").unlink()
    told = doctor("run", copied)
    assert (told.status, told.kinds) == (0, {"unfinished": ("note", 1)})


def test_changed_inputs_are_found(doctor: Callable[..., Told], copied: Path) -> None:
    edit(copied, set_to("f" * 32, "dataset", "hash"))
    told = doctor("run", copied, "--inputs")
    assert told.finding("inputs_dataset")["sentence"].startswith("The dataset has changed since the run")


def test_several_folders_and_none(
    doctor: Callable[..., Told], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "one")
    shutil.copytree(finished, tmp_path / "runs" / "two")
    (tmp_path / "runs" / "two" / "report.html").unlink()
    told = doctor("run", tmp_path / "runs", tmp_path / "runs" / "two")
    assert [len(one["findings"]) for one in told.written["examinations"]] == [0, 1]
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(SystemExit) as ended:
            main(["run", str(tmp_path / name)])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"ConfigError: {tmp_path / name}: no ")


# --- environment --------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine on which all is well, whatever the one that runs the tests is like."""
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(environment, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(environment, "LOW_GB", 0.0)
    monkeypatch.setattr(environment, "SHARED_GB", 0.0)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(environment, "_version", lambda name: {"faiss-cpu": "1.9"}.get(name, "999"))
    monkeypatch.setattr(environment, "FAISS", ("faiss-cpu",))
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["polars>=2.1", 'ray>=2 ; extra == "ray"'])
    return monkeypatch


def test_a_machine_on_which_all_is_well(
    doctor: Callable[..., Told], machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = doctor("environment", "trainer=cpu")
    assert [kind for kind, found in told.kinds.items() if found[0] != "note"] == []
    assert told.status == 0
    facts = told.written["examinations"][0]["facts"]
    assert facts["cache"].startswith(f"{tmp_path / 'cache'}, ")
    assert facts["Weights & Biases"] == "mode offline, not asked for"
    # It looked by writing, and left nothing.
    assert not (tmp_path / "cache").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["told.json"]


def test_what_is_wrong_with_a_machine(doctor: Callable[..., Told], machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setattr(environment, "FAISS", ("faiss-cpu", "faiss-gpu"))
    machine.setattr(importlib.metadata, "requires", lambda _: ["polars>=2.1,<3", "numpy"])
    machine.setattr(environment, "LOW_GB", 1e9)
    machine.setattr(environment, "SHARED_GB", 1e9)
    machine.setattr(torch, "get_num_threads", lambda: 10_000)
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    machine.setenv("WANDB_MODE", "online")
    machine.setattr("dejavu_exp.tracking.has_key", lambda: False)
    (tmp_path / "cache").touch()  # a file where the folder should be
    told = doctor("environment")
    shared = {"shared_memory": ("warning", 1)} if environment.SHARED.is_dir() else {}
    assert told.kinds == {
        "packages": ("fault", 1),
        "faiss": ("fault", 2),
        "threads": ("warning", 1),
        "cuda": ("warning", 1),
        "cache_closed": ("fault", 1),
        "outputs_full": ("warning", 1),
        **shared,
        "wandb": ("warning", 1),
    }
    assert told.status == 1
    assert told.finding("packages")["examples"] == ["polars<3,>=2.1: 999"]
    assert "pip uninstall -y faiss-cpu faiss-gpu" in told.finding("faiss")["way_out"]


def test_no_faiss_at_all(doctor: Callable[..., Told], machine: pytest.MonkeyPatch) -> None:
    machine.setattr(environment, "FAISS", ())
    assert doctor("environment", "trainer=cpu").kinds["faiss"] == ("fault", 1)


def test_no_secret_is_told(doctor: Callable[..., Told], machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secrets = {"WANDB_API_KEY": "a" * 40, "HF_TOKEN": "hf_secret_of_mine"}
    for name, value in secrets.items():
        machine.setenv(name, value)
    machine.setenv("WANDB_MODE", "online")
    machine.setattr("dejavu_exp.tracking.has_key", lambda: True)
    told = doctor("environment", "trainer=cpu")
    assert told.written["examinations"][0]["facts"]["Weights & Biases"] == "mode online, logged in"
    said = told.printed + (tmp_path / "told.json").read_text()
    assert not [value for value in secrets.values() if value in said]


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from dejavu_exp.doctor.__main__ import main\n"
        "try: main(['data', '--help'])\n"
        "except SystemExit: assert not {'torch', 'hydra', 'polars', 'rich'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--images N" in done.stdout
