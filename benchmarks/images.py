"""The input pipeline: from the bytes of a JPEG to the tensor of its background crop, on one core."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.timing import Comparison
from dejavu_exp import images, jpeg, transforms
from dejavu_exp.crops import BackgroundCrop, Rect
from dejavu_exp.datasets.coco import Coco
from dejavu_exp.tables import Status

PASSES = 3
SIDE_PX, SHORTER_PX = 224, 256
"""Input of the model, and the shorter side before its centre is cut out."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKGROUND = BackgroundCrop(min_side_px=16)
REAL = Path(os.environ.get("DEJAVU_REAL_DATA", "")) / "coco_mini.zip"
DRAWN, WIDTH, HEIGHT, QUALITY = 100, 640, 480, 92
"""Drawn images, where there are no real ones: how many, sizes in pixels, and a quality that gives files as large as
COCO's, about 160 kB."""

Way = Callable[[bytes, Rect], Tensor]


class View(NamedTuple):
    """A file and what is shown of it."""

    content: bytes
    region: Rect


def background_crops() -> Comparison:
    """Background crops at the input size of an encoder, as queries are."""
    shown, source = views()
    return _compare(shown, f"background crops of {source}", "1.5 times as fast as PIL, 2.5 times as the authors' path")


def whole_images() -> Comparison:
    """Whole images, as the bank's are."""
    shown, source = views()
    sizes = [Image.open(io.BytesIO(view.content)).size for view in shown]
    whole = [View(view.content, (0, 0, *size)) for view, size in zip(shown, sizes, strict=True)]
    return _compare(whole, f"whole {source}", "")


COMPARISONS = (background_crops, whole_images)


def _compare(views: Sequence[View], what: str, aim: str) -> Comparison:
    torch.set_num_threads(1)
    transform = _transform()
    exact, fast = transforms.on_pixels(transform, exact=True), transforms.on_pixels(transform, exact=False)

    def ours(content: bytes, region: Rect) -> Tensor:
        return fast(images.decode_view(content, region, "auto"))

    def ours_exact(content: bytes, region: Rect) -> Tensor:
        return exact(images.decode_view(content, region, "pillow"))

    def with_pillow(content: bytes, region: Rect) -> Tensor:
        result: Tensor = transform(images.decode(content).crop(region))
        return result

    def authors(content: bytes, region: Rect) -> Tensor:
        return _authors(content, region, transform)

    def last_pixel(content: bytes, region: Rect) -> Tensor:
        xmax, ymax = region[2:]
        return torch.from_numpy(images.decode_view(content, (xmax - 1, ymax - 1, xmax, ymax), "auto"))

    levels = _differences(views, ours, ours_exact, with_pillow)
    taken = _seconds(
        {
            "dejavu_exp": ours,
            "dejavu_exp, decoder=pillow": ours_exact,
            "PIL decode and crop, torchvision transform": with_pillow,
            "the authors' path: tensor of all, crop, PIL, transform": authors,
            "limit": last_pixel,
        },
        views,
    )
    least = taken.pop("limit")
    size = sum(len(view.content) for view in views) / len(views) / 1e3
    area = sum((xmax - xmin) * (ymax - ymin) for _, (xmin, ymin, xmax, ymax) in views) / len(views) / 1e6
    return Comparison(
        task=f"{len(views)} {what} to {SIDE_PX} x {SIDE_PX} tensors on one core; {size:.0f} kB a file, {area:.2f} "
        "megapixels a view",
        seconds=taken,
        limit=_limit(least, taken["dejavu_exp"]),
        aim=aim,
        note=f"{', '.join(f'{len(views) / spent:.0f}' for spent in taken.values())} images/s. Against PIL "
        f"{100 * (levels > 0).double().mean():.2f} % of the values differ by 1 of 255, {int((levels == 2).sum())} of "
        f"{len(levels):,} by 2, none by more; with decoder=pillow none. {images.decoder_text('auto')} "
        f"{torch.__version__}",
    )


def _differences(views: Sequence[View], ours: Way, ours_exact: Way, with_pillow: Way) -> Tensor:
    """How far ours is from PIL before normalising, in steps of 1/255; shape (values of all views,)."""
    levels = []
    for view in views:
        expected = with_pillow(*view)
        if not torch.equal(ours_exact(*view), expected):
            sys.exit("images: decoder=pillow gives other bits than PIL with torchvision.")
        apart = (ours(*view) - expected).abs() * (torch.tensor(STD).view(3, 1, 1) * 255)
        levels.append(apart.round().flatten().to(torch.uint8))
    found = torch.cat(levels)
    if found.max() > 2:
        sys.exit(f"images: decoder=auto is up to {found.max()} of 255 away from PIL with torchvision.")
    return found


def _authors(content: bytes, region: Rect, transform: Callable[[Any], Tensor]) -> Tensor:
    """The whole picture as floats, cut, and back to a picture."""
    from torchvision.transforms import functional

    xmin, ymin, xmax, ymax = region
    whole = functional.to_tensor(images.decode(content))
    return transform(functional.to_pil_image(whole[:, ymin:ymax, xmin:xmax]))


def _transform() -> Any:  # noqa: ANN401
    from torchvision import transforms as steps

    return steps.Compose(
        [
            steps.Resize(SHORTER_PX, interpolation=steps.InterpolationMode.BICUBIC),
            steps.CenterCrop(SIDE_PX),
            steps.ToTensor(),
            steps.Normalize(MEAN, STD),
        ]
    )


def _seconds(ways: Mapping[str, Way], views: Sequence[View]) -> dict[str, float]:
    """For all views; each view by each way in turn, the best of several passes, so that other load hits all alike."""
    best = np.full((len(ways), len(views)), np.inf)
    for _ in range(PASSES):
        for column, view in enumerate(views):
            for row, way in enumerate(ways.values()):
                start = time.perf_counter()
                way(*view)
                best[row, column] = min(best[row, column], time.perf_counter() - start)
    return dict(zip(ways, best.sum(axis=1).tolist(), strict=True))


def views() -> tuple[list[View], str]:
    """Files with their background, and what they are."""
    if REAL.is_file():
        manifest = Coco(REAL).manifest()
        shown = manifest.rows.select("path").hstack(BACKGROUND.show(manifest.rows))
        usable = shown.filter(status=str(Status.OK)).select("path", "xmin", "ymin", "xmax", "ymax")
        return [View(manifest.store.read(path), tuple(region)) for path, *region in usable.rows()], "images of COCO"
    rng = np.random.default_rng(0)
    drawn: list[View] = []
    while len(drawn) < DRAWN:
        corners = rng.integers(0, (WIDTH - 60, HEIGHT - 60), size=(3, 2))
        boxes = np.hstack([corners, np.minimum(corners + rng.integers(60, 260, size=(3, 2)), (WIDTH, HEIGHT))])
        region, status, _ = BACKGROUND.region(WIDTH, HEIGHT, boxes.tolist())
        if region is not None and status == Status.OK:
            drawn.append(View(_drawn(rng), region))
    return drawn, f"drawn images of {WIDTH} x {HEIGHT} pixels"


def _drawn(rng: np.random.Generator) -> bytes:
    """A JPEG with the detail of a photograph: amplitudes fall with the frequency, colours less sharp than light."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf
    planes = []
    for steepness, contrast in ((1.2, 50), (1.8, 12), (1.8, 12)):
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(phases / frequency**steepness, s=(HEIGHT, WIDTH))
        planes.append(128 + contrast * plane / plane.std())
    stream = io.BytesIO()
    pixels = np.clip(np.stack(planes, axis=2), 0, 255).astype(np.uint8)
    Image.fromarray(pixels, "YCbCr").save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _limit(least: float, ours: float) -> str:
    """What no decoder can leave out: the codes above the last pixel, each of which begins where the one before ends."""
    if jpeg.library() is None:
        return "not measured: without nvImageCodec whole pictures are decoded"
    return (
        f"Huffman decoding down to the last row of the view, measured by asking for its last pixel: {least:.3f} s, "
        f"{100 * least / ours:.0f} % of ours"
    )
