"""Memory and time against size, each size in a process of its own: `python -m benchmarks.scale`, with a plot.

Extraction is measured with an encoder that does next to nothing on images of a few pixels, so that what is left is
this package's own work; the search with a bank in float16 that is larger than the memory it may take.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import Tensor, nn

from dejavu_exp import neighbours, tables
from dejavu_exp.encoders import LoadedEncoder
from dejavu_exp.extract import Extractor
from dejavu_exp.shards import Embeddings, ShardFolder

PLOT = Path(__file__).resolve().parents[1] / "docs" / "scale.png"
EXTRACTED = (100_000, 200_000, 500_000, 1_000_000)
SEARCHED = (250_000, 500_000, 1_000_000, 2_000_000)
WIDTH, QUERIES, K, SEARCH_MB = 512, 500, 100, 256
"""Of the searched bank, what is asked of it, and what of it may be in memory."""


class Sums(nn.Module):
    """Eight numbers an image."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Shape (B, 8)."""
        return pixels.mean(dim=(1, 2, 3))[:, None].expand(-1, 8).contiguous()


class OneImage:
    """A store that has the same small image everywhere."""

    def __init__(self) -> None:
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (1, 2, 3)).save(stream, "PNG")
        self.content = stream.getvalue()

    def read(self, path: str) -> bytes:
        """The image."""
        return self.content


def to_tensor(picture: Image.Image) -> Tensor:
    """Shape (3, 8, 8)."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)


def peak_mb() -> float:
    """The most memory that this process has had, MB."""
    found = Path("/proc/self/status").read_text()
    return int(found.split("VmHWM:")[1].split()[0]) / 1024


def extract(rows: int, folder: Path) -> dict[str, float]:
    """Embed so many views; seconds, the peak, and what of it the table of views took."""
    names = pl.Series("id", np.arange(rows)).cast(pl.String).str.zfill(9)
    views = pl.DataFrame({"view_id": names + "#full", "id": names, "path": names, "content": names}).with_columns(
        view=pl.lit("full"), role=pl.lit("public"), label=pl.lit(None), truth=pl.lit(None), texts=pl.lit(None),
        xmin=pl.lit(0), ymin=pl.lit(0), xmax=pl.lit(8), ymax=pl.lit(8), status=pl.lit("ok"), detail=pl.lit(None),
    )  # fmt: skip
    views = tables.validate(views, tables.VIEWS, "views", key="view_id")
    before, start = peak_mb(), time.perf_counter()
    encoder = LoadedEncoder(Sums(), to_tensor, "sums", "none", "0", "as it is", random=False)
    extractor = Extractor(folder, accelerator="cpu", batch_size=256, workers=0)
    found = extractor.embed(encoder, views, OneImage())
    if not found.readable.all() or len(found) != rows:
        sys.exit("extraction: rows are missing")
    return {"rows": rows, "seconds": time.perf_counter() - start, "peak_mb": peak_mb(), "views_mb": before}


def search(rows: int, folder: Path) -> dict[str, float]:
    """Search a bank of so many rows in float16 on disk; seconds, and the peak."""
    shards = ShardFolder(folder, "bank", rows, 8192, "float16")
    shards.write_request(pl.DataFrame({"view_id": pl.Series(np.arange(rows)).cast(pl.String).str.zfill(9)}))
    rng = np.random.default_rng(0)
    for shard in range(len(shards)):
        count = len(shards.span(shard))
        shards.write(shard, rng.standard_normal((count, WIDTH), dtype=np.float32), [""] * count)
    bank = Embeddings(shards, np.arange(rows), np.full(rows, True), {}, None)
    queries = rng.standard_normal((QUERIES, WIDTH), dtype=np.float32)
    start = time.perf_counter()
    found = neighbours.search(queries, bank, K, memory_mb=SEARCH_MB)
    if not (np.diff(found.distances, axis=1) >= 0).all():
        sys.exit("search: neighbours are not in order")
    bank_mb = rows * WIDTH * 2 / 2**20
    return {"rows": rows, "seconds": time.perf_counter() - start, "peak_mb": peak_mb(), "bank_mb": bank_mb}


def measured(what: str, rows: int) -> dict[str, float]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.scale", what, str(rows), folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run() -> str:
    """Measure all sizes and draw the plot; the table in Markdown."""
    found = {
        "extract": [measured("extract", rows) for rows in EXTRACTED],
        "search": [measured("search", rows) for rows in SEARCHED],
    }
    _plot(found)
    lines = ["| task | rows | seconds | rows a second | peak memory, MB | of it data |", "|---|---|---|---|---|---|"]
    for row in found["extract"]:
        lines.append(
            _line("extraction, an encoder that does nothing", row, f"{row['views_mb']:.0f} before, with the views")
        )
    for row in found["search"]:
        lines.append(
            _line(f"search of {QUERIES} queries", row, f"{SEARCH_MB} of the bank's {row['bank_mb']:.0f} on disk")
        )
    return "\n".join(lines)


def _line(task: str, row: dict[str, float], data: str) -> str:
    rate = row["rows"] / row["seconds"]
    return f"| {task} | {row['rows']:,.0f} | {row['seconds']:.1f} | {rate:,.0f} | {row['peak_mb']:.0f} | {data} |"


def _plot(found: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex="row", layout="constrained")
    for row, (what, title) in enumerate((("extract", "extraction"), ("search", "search, bank in float16"))):
        rows = [point["rows"] / 1e6 for point in found[what]]
        for column, (key, unit) in enumerate((("seconds", "seconds"), ("peak_mb", "peak memory, MB"))):
            axis: Any = axes[row][column]
            axis.plot(rows, [point[key] for point in found[what]], "o-")
            axis.set(title=title, xlabel="million rows", ylabel=unit, ylim=(0, None), xlim=(0, None))
            axis.grid(alpha=0.3)
    figure.savefig(PLOT, dpi=100)


def main() -> None:
    """Measure one size, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("extract", "search"))
    parser.add_argument("rows", nargs="?", type=int)
    parser.add_argument("folder", nargs="?", type=Path)
    asked = parser.parse_args()
    if asked.what is None:
        print(run())
    else:
        print(json.dumps({"extract": extract, "search": search}[asked.what](asked.rows, asked.folder)))


if __name__ == "__main__":
    main()
