"""Extraction from end to end beside the bare network: what decoding, passing batches on and writing shards cost."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import torch
from PIL import Image

from benchmarks import images as pipeline
from benchmarks.timing import Comparison, seconds
from dejavu_exp import images, provenance, tables
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.encoders import TimmEncoder
from dejavu_exp.extract import Extractor
from dejavu_exp.images import ViewImages

IMAGES, BATCH = 256, 32
"""Images embedded, and those of a forward pass."""
ROUNDS = 3
BARE = "the bare network, batches ready"


def end_to_end() -> Comparison:
    """ResNet50 at 224 px on whole images of COCO's size, with decoding in worker processes."""
    encoder = TimmEncoder("resnet50", weights="random").load()
    views, store = _views()
    data = ViewImages.of(views, store, encoder.transform)
    batches = [torch.stack([data[row][1] for row in range(start, start + BATCH)]) for start in range(0, IMAGES, BATCH)]
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    module = encoder.module.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = torch.cat([module(batch) for batch in batches]).numpy()

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                module(batch)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as cache:
            extractor = Extractor(Path(cache), batch_size=BATCH, workers=1)
            found = extractor.embed(encoder, views, store, "embedding")
            if not np.array_equal(found.values, expected):
                sys.exit("extraction: the embeddings are not those of the bare network")

    def by_hand() -> None:
        pictures = [(store.files[path], encoder.transform) for path in views["path"]]
        with torch.inference_mode():
            for start in range(0, IMAGES, BATCH):
                pixels = [change(images.decode(content)) for content, change in pictures[start : start + BATCH]]
                module(torch.stack(pixels).contiguous(memory_format=torch.channels_last))

    best = _best({"dejavu_exp, from bytes to shards": ours, BARE: bare, "a loop with Pillow": by_hand})
    share = best[BARE] / best["dejavu_exp, from bytes to shards"]
    return Comparison(
        f"extraction: ResNet50 at 224 px, {IMAGES} JPEGs of 640 x 480, batches of {BATCH}, one decoding worker",
        best,
        f"the bare network: {IMAGES / best[BARE]:.1f} images a second, of which ours reach {share:.3f}",
        "at least 0.95 of the bare network's images a second",
        "Same embeddings bit by bit. Without a GPU the worker shares the cores with the network.",
    )


def _best(ways: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of each way; in turn, so that what else the machine does meets all alike."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            best[name] = min(best[name], seconds(way, tries=1))
    return best


def _views() -> tuple[pl.DataFrame, MemoryStore]:
    contents = [view.content for view in pipeline.views()[0]]
    files = {f"{row:04d}.jpg": contents[row % len(contents)] for row in range(IMAGES)}
    sizes = [Image.open(io.BytesIO(content)).size for content in files.values()]
    frame = pl.DataFrame(
        {
            "view_id": [f"{name}#full" for name in files],
            "id": list(files),
            "view": "full",
            "role": "public",
            "label": None,
            "path": list(files),
            "content": [provenance.hash_bytes(content) for content in files.values()],
            "truth": None,
            "texts": None,
            "xmin": 0,
            "ymin": 0,
            "xmax": [size[0] for size in sizes],
            "ymax": [size[1] for size in sizes],
            "status": "ok",
            "detail": None,
        },
        schema=dict(tables.VIEWS),
    )
    return frame, MemoryStore(files)


COMPARISONS = (end_to_end,)
