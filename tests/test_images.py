"""Decoding a view and transforming it, against Pillow and torchvision on the whole picture."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from properties import examples
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from dejavu_exp import images, jpeg, transforms
from dejavu_exp.crops import BackgroundCrop, Rect
from dejavu_exp.datasets.coco import Coco
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.errors import DataError
from dejavu_exp.images import ViewImages
from dejavu_exp.jpeg import Pixels
from dejavu_exp.tables import Status

REAL = Path(os.environ.get("DEJAVU_REAL_DATA", "")) / "coco_mini.zip"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
needs_regions = pytest.mark.skipif(jpeg.library() is None, reason="nvImageCodec is not installed")


def photograph(width: int, height: int, seed: int = 0) -> Pixels:
    """Detail at all scales, as photographs have it; a plain surface would hide every error."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = [np.fft.ifft2(np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency).real for _ in range(3)]
    return np.stack([np.clip(128 + 60 * plane / (plane.std() + 1e-9), 0, 255) for plane in planes], 2).astype(np.uint8)


def encoded(pixels: Pixels, kind: str = "JPEG", mode: str = "RGB", **how: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **how)
    return stream.getvalue()


ROTATED = Image.Exif()
ROTATED[274] = 6  # a quarter turn

PLAIN: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "gray": {"mode": "L"},
    "restart markers": {"restart_marker_blocks": 2},
    "RGB inside": {"keep_rgb": True},
    "rotated by its EXIF": {"exif": ROTATED.tobytes()},
}
OTHERS: dict[str, bytes] = {
    "progressive": encoded(photograph(40, 30), progressive=True),
    "CMYK": encoded(photograph(40, 30), mode="CMYK"),
    "PNG": encoded(photograph(40, 30), "PNG"),
    "PNG with a palette": encoded(photograph(40, 30), "PNG", "P"),
    "PNG of 16 bits": encoded(photograph(40, 30), "PNG", "I;16"),
    "GIF": encoded(photograph(40, 30), "GIF", "P"),
    "bytes after the end": encoded(photograph(40, 30)) + b"\0\0",
}


@st.composite
def views_of(draw: st.DrawFn) -> tuple[int, int, Rect]:
    """A size, and a region in it that often lies at a border and may be one pixel."""
    width, height = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    xmin, ymin = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return width, height, (xmin, ymin, draw(st.integers(xmin + 1, width)), draw(st.integers(ymin + 1, height)))


@needs_regions
@pytest.mark.parametrize("how", PLAIN.values(), ids=PLAIN)
@examples(25)
@given(view=views_of(), quality=st.sampled_from([30, 90, 100]))
def test_a_region_has_the_pixels_that_pillow_gives_for_the_whole_picture(
    how: dict[str, Any], view: tuple[int, int, Rect], quality: int
) -> None:
    width, height, region = view
    content = encoded(photograph(width, height), quality=quality, **how)
    found = jpeg.decode_region(content, region)
    assert found is not None
    np.testing.assert_array_equal(found, np.asarray(images.decode(content).crop(region)))


@needs_regions
@pytest.mark.parametrize("name", OTHERS)
def test_pillow_decodes_what_is_no_plain_jpeg(name: str) -> None:
    region = (3, 5, 20, 29)
    assert jpeg.decode_region(OTHERS[name], region) is None
    found = images.decode_view(OTHERS[name], region, "auto")
    np.testing.assert_array_equal(found, np.asarray(images.decode(OTHERS[name]).crop(region)))


def test_exif_does_not_rotate() -> None:
    content = encoded(photograph(40, 30), **PLAIN["rotated by its EXIF"])
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size == (30, 40)
    assert images.decode_view(content, (0, 0, 40, 30), "auto").shape == (30, 40, 3)


def test_a_region_beyond_the_picture_is_black_there_as_with_pillow() -> None:
    found = images.decode_view(encoded(photograph(40, 30)), (30, 20, 50, 40), "auto")
    assert found.shape == (20, 20, 3)
    assert found[:10, :10].any()
    assert not found[10:].any()
    assert not found[:, 10:].any()


@pytest.mark.parametrize("decoder", images.DECODERS)
def test_a_picture_too_large_for_pillow_is_refused(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(Image.DecompressionBombError):
        images.decode_view(encoded(photograph(40, 30)), (0, 0, 5, 5), decoder)


def outcome(content: bytes, region: Rect, decoder: str) -> list[Any] | str:
    try:
        pixels: list[Any] = images.decode_view(content, region, decoder).tolist()
    except images.UNREADABLE_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    return pixels


@needs_regions
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("end", [b"", jpeg.END], ids=["cut off", "cut off, with an end"])
@pytest.mark.parametrize("region", [(0, 0, 20, 20), (60, 60, 96, 80)], ids=["top", "bottom"])
def test_a_broken_off_jpeg_fares_as_with_pillow(kept: float, end: bytes, region: Rect) -> None:
    content = encoded(photograph(96, 80), subsampling=2)
    content = content[: int(kept * len(content))] + end
    assert outcome(content, region, "auto") == outcome(content, region, "pillow")


@needs_regions
@examples(80)
@given(data=st.data())
def test_a_damaged_jpeg_fares_as_with_pillow(data: st.DataObject) -> None:
    content = bytearray(encoded(photograph(96, 80), restart_marker_blocks=4))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    region = data.draw(st.sampled_from([(0, 0, 20, 20), (30, 17, 61, 55), (60, 60, 96, 80), (0, 0, 96, 80)]))
    assert outcome(bytes(content), region, "auto") == outcome(bytes(content), region, "pillow")


def imagenet(interpolation: str = "bicubic", size: Any = 48, crop: int = 40) -> tv.Compose:
    resize = tv.Resize(size, interpolation=tv.InterpolationMode(interpolation))
    return tv.Compose([resize, tv.CenterCrop(crop), tv.ToTensor(), tv.Normalize(MEAN, STD)])


def of_timm() -> Any:
    from timm.data.transforms_factory import create_transform

    return create_transform(
        (3, 40, 40), interpolation="bicubic", mean=(0.5, 0.4, 0.5), std=(0.5, 0.5, 0.3), crop_pct=0.9
    )


def of_open_clip() -> Any:
    from open_clip.transform import image_transform

    return image_transform(40, is_train=False)


KNOWN: dict[str, Any] = {
    "torchvision, bicubic": imagenet(),
    "torchvision, bilinear": imagenet("bilinear"),
    "sides given": imagenet(size=(44, 50)),
    "smaller than the centre": imagenet(size=20),
    "timm": of_timm(),
    "open_clip": of_open_clip(),
}
UNKNOWN: dict[str, Any] = {
    "nearest": imagenet("nearest"),
    "another step": tv.Compose([tv.Grayscale(3), *imagenet().transforms]),
    "no Normalize": tv.Compose(imagenet().transforms[:-1]),
    "another end": tv.Compose([*imagenet().transforms, tv.Lambda(lambda value: value * 2)]),
    "no Compose": tv.ToTensor(),
}


@pytest.mark.parametrize("transform", KNOWN.values(), ids=KNOWN)
@examples(15)
@given(width=st.integers(1, 90), height=st.integers(1, 90), seed=st.integers(0, 9))
def test_a_known_transform_gives_the_same_bits_where_exact(transform: Any, width: int, height: int, seed: int) -> None:
    pixels = photograph(width, height, seed)
    on_pixels = transforms.on_pixels(transform, exact=True)
    assert isinstance(on_pixels, transforms.Fused)
    assert torch.equal(on_pixels(pixels), transform(Image.fromarray(pixels)))


def levels_apart(first: Tensor, second: Tensor, std: Any) -> Tensor:
    """In steps of 1/255, before normalising."""
    return (first - second).abs() * torch.as_tensor(std).view(3, 1, 1) * 255


@pytest.mark.parametrize("transform", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("size", [(233, 219), (219, 120), (120, 239), (120, 600), (40, 40), (31, 57), (640, 480)])
def test_a_known_transform_is_at_most_two_levels_away_where_not_exact(transform: Any, size: tuple[int, int]) -> None:
    pixels = photograph(*size)
    found = transforms.on_pixels(transform, exact=False)(pixels)
    apart = levels_apart(found, transform(Image.fromarray(pixels)), transform.transforms[-1].std)
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    assert apart.max() < 2.01
    assert (apart > 0.5).double().mean() < 0.03


@pytest.mark.parametrize("transform", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("exact", [True, False])
def test_any_other_transform_is_called_as_it_is(transform: Any, exact: bool) -> None:
    pixels = photograph(70, 60)
    assert torch.equal(transforms.on_pixels(transform, exact)(pixels), transform(Image.fromarray(pixels)))


def test_all_values_of_a_pixel_are_normalised_with_the_same_bits() -> None:
    pixels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    transform = tv.Compose([tv.ToTensor(), tv.Normalize(MEAN, STD)])
    for exact in (True, False):
        assert torch.equal(transforms.on_pixels(transform, exact)(pixels), transform(Image.fromarray(pixels)))


def planted() -> tuple[pl.DataFrame, MemoryStore]:
    """Readable views, a PNG with the wrong name, one that breaks off and one that is not there."""
    whole = encoded(photograph(96, 80))
    files = {"a.jpg": whole, "b.jpg": encoded(photograph(96, 80, 1), "PNG"), "c.jpg": whole[: len(whole) // 2]}
    rows = [
        ("a.jpg", 0, 0, 96, 80),
        ("b.jpg", 5, 7, 60, 61),
        ("c.jpg", 0, 0, 9, 9),
        ("d.jpg", 0, 0, 9, 9),
        ("a.jpg", 50, 8, 96, 31),
    ]
    return pl.DataFrame(rows, schema=["path", "xmin", "ymin", "xmax", "ymax"], orient="row"), MemoryStore(files)


@pytest.mark.parametrize("decoder", images.DECODERS)
def test_views_are_what_the_transform_gives_for_the_cut_picture(decoder: str) -> None:
    table, store = planted()
    views = ViewImages.of(table, store, imagenet(), decoder)
    found = [views[row] for row in range(len(views))]
    assert [row for row, _, _ in found] == [0, 1, 2, 3, 4]
    assert [bool(reason) for _, _, reason in found] == [False, False, True, True, False]
    for row in (0, 1, 4):
        path, *corners = table.row(row)
        region: Rect = tuple(corners)
        expected = imagenet()(images.decode(store.read(path)).crop(region))
        assert levels_apart(found[row][1], expected, STD).max() < (0.01 if decoder == "pillow" else 2.01)
    for row in (2, 3):
        assert found[row][1].shape == (3, 40, 40)
        assert not found[row][1].any()
        assert found[row][2].startswith(f"{table['path'][row]}: ")


def test_reasons_do_not_depend_on_the_decoder() -> None:
    table, store = planted()
    auto, pillow = (ViewImages.of(table, store, imagenet(), decoder) for decoder in images.DECODERS)
    assert [auto[row][2] for row in range(5)] == [pillow[row][2] for row in range(5)]


def test_worker_processes_give_what_one_process_gives() -> None:
    table, store = planted()
    views = ViewImages.of(table, store, imagenet())
    alone = [views[row] for row in range(len(views))]  # first, so that the workers inherit a decoder they cannot use
    shared: DataLoader[Any] = DataLoader(views, batch_size=None, num_workers=2)  # type: ignore[arg-type]
    for (row, pixels, reason), (other_row, other_pixels, other_reason) in zip(alone, shared, strict=True):
        assert (row, reason) == (other_row, other_reason)
        assert torch.equal(pixels, other_pixels)


def test_a_million_views_are_small() -> None:
    table, store = planted()
    many = table[:1].select(pl.all().repeat_by(1_000_000).explode())
    views = ViewImages.of(many, store, imagenet())
    assert views.paths.nbytes + views.regions.nbytes < 40_000_000
    assert len(pickle.dumps(views)) < 40_000_000
    assert torch.equal(views[999_999][1], views[0][1])


def test_the_key_names_what_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "library", lambda: "nvimgcodec 0.9")
    texts = {images.decoder_text(decoder) for decoder in images.DECODERS}
    monkeypatch.setattr(jpeg, "library", lambda: None)
    texts |= {images.decoder_text(decoder) for decoder in images.DECODERS}
    assert len(texts) == 3  # "pillow" does not depend on the library
    assert all(f"Pillow {PIL.__version__}" in text for text in texts)


def test_without_the_library_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "library", lambda: None)
    monkeypatch.setattr(jpeg, "decode_region", None)
    content = encoded(photograph(40, 30))
    assert outcome(content, (3, 4, 20, 21), "auto") == outcome(content, (3, 4, 20, 21), "pillow")


@needs_regions
def test_the_library_writes_nothing_to_the_terminal() -> None:
    code = """
import io
from PIL import Image
from dejavu_exp import jpeg
stream = io.BytesIO()
Image.new("RGB", (40, 30), (9, 99, 200)).save(stream, "JPEG")
content = stream.getvalue()
print(jpeg.decode_region(content, (0, 0, 4, 4)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(4, 4, 3)\n"
    assert done.stderr == ""


def test_a_thumbnail_shows_the_region_at_the_size_asked_for() -> None:
    pixels = np.zeros((80, 96, 3), dtype=np.uint8)
    pixels[20:60, 30:90] = (250, 120, 10)
    store = MemoryStore({"a.png": encoded(pixels, "PNG"), "b.png": encoded(pixels, "PNG")[:60]})
    shown = np.asarray(Image.open(io.BytesIO(images.thumbnail(store, "a.png", (30, 20, 90, 60), 30))))
    assert shown.shape == (20, 30, 3)
    assert np.abs(shown.astype(int) - (250, 120, 10)).max() <= 3
    with pytest.raises(DataError, match=r"b\.png: cannot be shown"):
        images.thumbnail(store, "b.png", None, 30)


@pytest.mark.real_data
@needs_regions
@pytest.mark.skipif(not REAL.is_file(), reason="DEJAVU_REAL_DATA has no coco_mini.zip")
def test_regions_of_real_photographs_have_the_pixels_of_pillow() -> None:
    manifest = Coco(REAL).manifest()
    shown = manifest.rows.select("path").hstack(BackgroundCrop(1).show(manifest.rows)).filter(status=str(Status.OK))
    decoded = 0
    for path, *corners in shown.select("path", "xmin", "ymin", "xmax", "ymax").iter_rows():
        content, region = manifest.store.read(path), tuple(corners)
        found = jpeg.decode_region(content, region)
        decoded += found is not None
        expected = np.asarray(images.decode(content).crop(region))
        np.testing.assert_array_equal(images.decode_view(content, region, "auto"), expected)
    assert decoded > 0.9 * len(shown)
