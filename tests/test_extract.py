"""Extraction: cache, resumption, damage, bad images, bad numbers, a full disk; images and texts."""

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

from dejavu_exp import progress, provenance, ranks, tables
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.encoders import CharNgramEncoder, LoadedEncoder
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
            "truth": None,
            "texts": None,
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
def extractor(tmp_path: Path) -> Extractor:
    return Extractor(tmp_path, accelerator="cpu", batch_size=4, workers=0, shard_rows=8)


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


# Texts


class Spread(nn.Module):
    """A vector that tells a number: (number, 2 number + 1); and how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return torch.stack([tokens["number"], 2 * tokens["number"] + 1], dim=1).float()


def to_numbers(texts: list[str]) -> dict[str, torch.Tensor]:
    """Integers, as tokens are; without a batch's padding, as a text's embedding must not depend on its neighbours."""
    return {"number": torch.tensor([int(text or "0") for text in texts])}


def text_encoder(module: nn.Module | None = None) -> LoadedEncoder:
    return LoadedEncoder(
        module or Spread(), to_numbers, "numbers", "none", "0", "as it is", random=False, reads="texts"
    )


def captions(texts: list[list[str] | None]) -> pl.DataFrame:
    names = [f"{index:04d}" for index in range(len(texts))]
    return pl.DataFrame(
        {
            **dict.fromkeys(tables.VIEWS),
            "view_id": [f"{name}#caption" for name in names],
            "id": names,
            "view": "caption",
            "texts": texts,
            "status": "ok",
        },
        schema=dict(tables.VIEWS),
    )


NOTHING = MemoryStore({})


def unit(number: int) -> np.ndarray[Any, Any]:
    vector = np.array([number, 2 * number + 1], dtype=np.float32)
    return np.asarray(vector / np.linalg.norm(vector))


def test_a_view_of_one_text_has_its_embedding_and_one_of_several_the_mean_of_unit_vectors(extractor: Extractor) -> None:
    texts: list[list[str] | None] = [["3"], ["1", "4", "1"], [""], ["5", "9"], *([str(n)] for n in range(17))]
    views = captions(texts).sample(fraction=1.0, shuffle=True, seed=3)
    found = extractor.embed(text_encoder(), views, NOTHING)
    expected = {
        "0000": np.array([3, 7]),
        "0001": (unit(1) + unit(4) + unit(1)) / 3,
        "0002": np.array([0, 1]),
        "0003": (unit(5) + unit(9)) / 2,
    } | {f"{n + 4:04d}": np.array([n, 2 * n + 1]) for n in range(17)}
    np.testing.assert_allclose(found.values, np.array([expected[name] for name in views["id"]]), rtol=1e-6)
    assert found.readable.all()
    assert len(shard_files(extractor)) == 3


def test_texts_are_cached_by_what_they_say(extractor: Extractor) -> None:
    views = captions([[str(n)] for n in range(21)])
    module = Spread()
    first = extractor.embed(text_encoder(module), views, NOTHING)
    calls = module.calls
    elsewhere = views.with_columns(path=pl.lit("moved.png"), content=pl.lit("1"), role=pl.lit("target"))
    second = extractor.embed(text_encoder(module), elsewhere.reverse(), NOTHING)
    assert module.calls == calls
    assert (second.values == first.values[::-1]).all()
    changed = captions([["7"], *([str(n)] for n in range(1, 21))])
    assert extractor.embed(text_encoder(module), changed, NOTHING).values[0].tolist() == [7, 15]
    other = replace(text_encoder(module), transform_text="another tokenizer")
    extractor.embed(other, views, NOTHING)
    assert module.calls == 3 * calls


def test_a_killed_run_over_texts_goes_on_where_it_stopped(extractor: Extractor) -> None:
    class Killed(Spread):
        def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().forward(tokens)

    views = captions([[str(n), str(n)] for n in range(21)])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        extractor.embed(text_encoder(Killed()), views, NOTHING)
    assert len(shard_files(extractor)) == 2
    module = Spread()
    found = extractor.embed(text_encoder(module), views, NOTHING)
    assert module.calls == 2
    np.testing.assert_allclose(found.values, [unit(n) for n in range(21)], rtol=1e-6)


def test_worker_processes_give_the_same_numbers_for_texts(extractor: Extractor, tmp_path: Path) -> None:
    views = captions([[str(n)] if n % 3 else [str(n), "8"] for n in range(41)])
    alone = extractor.embed(text_encoder(), views, NOTHING)
    together = replace(extractor, cache=tmp_path / "other", workers=2).embed(text_encoder(), views, NOTHING)
    assert (alone.values == together.values).all()


def test_long_and_marked_up_captions_are_embedded_like_any_other(extractor: Extractor) -> None:
    texts = ["a dog " * 2000, "<p>a <b>dog</b> &amp; a cat</p>", "", "a dog"]
    views = captions([[text] for text in texts])
    found = extractor.embed(CharNgramEncoder(dimensions=64).load(), views, NOTHING)
    np.testing.assert_allclose(np.linalg.norm(found.values, axis=1), [1, 1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(found.values[0], found.values[3], atol=1e-6)


def test_an_encoder_of_both_embeds_what_the_views_show(extractor: Extractor) -> None:
    asked = []

    def tower() -> LoadedEncoder:
        asked.append(1)
        return text_encoder()

    both = replace(encoder(), text=tower)
    pictures, store = images(3)
    assert extractor.embed(both, pictures, store).values.shape == (3, 3)
    assert not asked
    for number in ("3", "4"):
        found = extractor.embed(both, captions([[number]]), NOTHING)
        assert found.values.tolist() == [[int(number), 2 * int(number) + 1]]
    assert len(asked) == 1


def test_what_an_encoder_cannot_embed_is_refused(extractor: Extractor) -> None:
    pictures, store = images(3)
    with pytest.raises(ConfigError, match="mean colour cannot embed texts"):
        extractor.embed(encoder(), captions([["1"]]), NOTHING)
    with pytest.raises(ConfigError, match="numbers cannot embed images"):
        extractor.embed(text_encoder(), pictures, store)
    with pytest.raises(ValueError, match="1 of 2 views have no texts"):
        extractor.embed(text_encoder(), captions([["1"], None]), NOTHING)
    with pytest.raises(ValueError, match="0001#caption: a view of texts must have one or more"):
        extractor.embed(text_encoder(), captions([["1"], []]), NOTHING)


@pytest.mark.parametrize("loaded", [encoder(), text_encoder()])
def test_no_views_are_no_embeddings(extractor: Extractor, loaded: LoadedEncoder) -> None:
    found = extractor.embed(loaded, captions([]), NOTHING)
    assert found.view_ids == ()
    assert len(found.values) == 0


@pytest.mark.parametrize(("views", "unit_shown"), [(captions([["1"]]), "text"), (images(1)[0], "img")])
def test_the_bar_says_what_it_counts(
    extractor: Extractor, monkeypatch: pytest.MonkeyPatch, views: pl.DataFrame, unit_shown: str
) -> None:
    seen = []
    shown = progress.bar

    def look(*arguments: Any, **more: Any) -> Any:
        seen.append(more["unit"])
        return shown(*arguments, **more)

    monkeypatch.setattr(progress, "bar", look)
    extractor.embed(replace(encoder(), text=text_encoder), views, images(1)[1])
    assert seen == [unit_shown]


def test_tasks_on_several_machines_may_be_more_than_the_gpus_that_one_of_them_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"trainer\.devices=16.*finds 1 CUDA"):
        Extractor(tmp_path, devices=16)
    monkeypatch.setattr(ranks, "place", lambda: ranks.Place(rank=3, size=16))
    assert Extractor(tmp_path, devices=16).device_count == 16
