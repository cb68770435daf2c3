"""Extraction: cache, resumption, damage, bad images, bad numbers, a full disk."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch import nn

from dejavu_exp import extract, provenance, tables
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.encoders import LoadedEncoder
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.extract import Extractor


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


def colour(index: int) -> tuple[int, int, int]:
    return index % 256, (7 * index) % 256, 30


def images(count: int, broken: int | None = None) -> tuple[pl.DataFrame, MemoryStore]:
    files: dict[str, bytes] = {}
    for index in range(count):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), colour(index)).save(stream, "PNG")
        files[f"{index:04d}.png"] = stream.getvalue() if index != broken else stream.getvalue()[:40]
    names = list(files)
    frame = pl.DataFrame(
        {
            "view_id": [f"{name}#full" for name in names],
            "id": names,
            "view": "full",
            "role": "public",
            "label": "x",
            "path": names,
            "content": [provenance.hash_bytes(content) for content in files.values()],
            "xmin": 0,
            "ymin": 0,
            "xmax": 8,
            "ymax": 8,
            "status": "ok",
            "detail": None,
        },
        schema=dict(tables.VIEWS),
    )
    return frame, MemoryStore(files)


@pytest.fixture
def extractor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extractor:
    monkeypatch.setattr(extract, "SHARD_ROWS", 8)
    return Extractor(tmp_path, accelerator="cpu", batch_size=4, workers=0)


def shard_files(extractor: Extractor) -> list[Path]:
    return sorted(extractor.cache.rglob("*.arrow"))


def test_each_row_gets_its_own_embedding_in_the_order_asked_for(extractor: Extractor) -> None:
    views, store = images(21)
    shuffled = views.sample(fraction=1.0, shuffle=True, seed=3)
    found = extractor.embed(encoder(), shuffled, store)
    expected = np.array([colour(int(name[:4])) for name in shuffled["id"]], dtype=np.float32)
    np.testing.assert_allclose(found.values, expected)
    assert list(found.view_ids) == shuffled["view_id"].to_list()
    assert len(shard_files(extractor)) == 3


def test_a_second_run_computes_nothing(extractor: Extractor) -> None:
    views, store = images(21)
    module = MeanColour()
    first = extractor.embed(encoder(module), views, store)
    calls = module.calls
    second = extractor.embed(encoder(module), views.reverse(), store)
    assert module.calls == calls
    assert (second.values == first.values[::-1]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"weights_hash": "1"},
        {"transform_text": "other"},
        {"description": "other"},
    ],
)
def test_the_cache_never_serves_another_encoder(extractor: Extractor, change: dict[str, str]) -> None:
    views, store = images(5)
    module = MeanColour()
    extractor.embed(encoder(module), views, store)
    extractor.embed(replace(encoder(module), **change), views, store)  # type: ignore[arg-type]
    assert module.calls == 4


def test_the_cache_never_serves_another_image(extractor: Extractor) -> None:
    views, store = images(5)
    extractor.embed(encoder(), views, store)
    changed = dict(store.files) | {"0002.png": store.files["0004.png"]}
    content = [provenance.hash_bytes(changed[path]) for path in views["path"]]
    found = extractor.embed(encoder(), views.with_columns(content=pl.Series(content)), MemoryStore(changed))
    assert found.values[2].tolist() == list(colour(4))


def test_a_killed_run_goes_on_where_it_stopped(extractor: Extractor) -> None:
    class Killed(MeanColour):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().forward(pixels)

    views, store = images(21)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        extractor.embed(encoder(Killed()), views, store)
    assert len(shard_files(extractor)) == 2
    module = MeanColour()
    found = extractor.embed(encoder(module), views, store)
    assert module.calls == 2  # five rows are left: two batches
    np.testing.assert_allclose(found.values[:, 0], np.arange(21))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_found_and_made_again(extractor: Extractor, damage: str) -> None:
    views, store = images(21)
    first = extractor.embed(encoder(), views, store)
    path = shard_files(extractor)[1]
    content = bytearray(path.read_bytes())
    # A float of colour, found by its bytes: the checksum must see a single flipped bit.
    place = content.find(np.float32(9).tobytes())
    content[place] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-300]), "empty": b""}[damage])
    module = MeanColour()
    again = extractor.embed(encoder(module), views, store)
    assert module.calls == 2
    assert (again.values == first.values).all()


def test_a_broken_image_is_undefined_and_named(extractor: Extractor) -> None:
    views, store = images(21, broken=6)
    found = extractor.embed(encoder(), views, store)
    assert list(found.reasons) == ["0006.png#full"]
    assert np.isnan(found.values[6]).all()
    assert np.isfinite(np.delete(found.values, 6, axis=0)).all()
    assert len(found.readable_only().view_ids) == 20


def test_nan_embeddings_are_refused_with_the_view(extractor: Extractor) -> None:
    class Broken(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            means = pixels.mean(dim=(2, 3))
            return torch.where(means[:, :1] == 5, torch.nan, means)

    views, store = images(8)
    with pytest.raises(DataError, match=r"NaN .* 0005\.png#full"):
        extractor.embed(encoder(Broken()), views, store)
    assert not shard_files(extractor)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full, on Linux")
def test_a_full_disk_is_told_and_finished_shards_stay(extractor: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    views, store = images(21)
    opened = Path.open

    def open_on_full_disk(path: Path, *arguments: Any, **more: Any) -> Any:
        full = path.name.startswith(".000001") and path.suffix == ".partial"
        return opened(Path("/dev/full") if full else path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(DataError, match=r"000001.*No space left.*trainer\.cache"):
            extractor.embed(encoder(), views, store)
    assert [path.name[:6] for path in shard_files(extractor)] == ["000000"]
    found = extractor.embed(encoder(), views, store)
    np.testing.assert_allclose(found.values[:, 0], np.arange(21))


def test_worker_processes_give_the_same_numbers(extractor: Extractor, tmp_path: Path) -> None:
    views, store = images(41)
    alone = extractor.embed(encoder(), views, store)
    together = replace(extractor, cache=tmp_path / "other", workers=2).embed(encoder(), views, store)
    assert (alone.values == together.values).all()


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 0), ("workers", -1), ("accelerator", "tpu"), ("precision", "8")]
)
def test_bad_settings_name_their_key(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{key}={value}"):
        Extractor(tmp_path, **{key: value})
