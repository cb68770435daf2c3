"""Leaks: copies of an image in two roles, byte for byte, re-encoded, mirrored or slightly cropped."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import imagehash
import numpy as np
import numpy.typing as npt
import polars as pl
from PIL import Image

from dejavu_exp import images, progress, provenance, tables
from dejavu_exp.datasets.stores import ImageStore
from dejavu_exp.errors import ConfigError
from dejavu_exp.shards import Embeddings
from dejavu_exp.tables import IntArray, Role

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

VERSION = 1
"""Of the method; part of the cache keys: raise it when the same images give other prints or pairs."""

SIDE = 32
"""Pixels a side of a print: enough to tell pictures apart, and a million fit into memory."""

CROP = 0.07
"""Share of each side that the cropped variants of a print leave out: the middle of slight crops, 4 to 10 %."""

VARIANTS = 4
"""Of a print, each with a hash: whole, cropped, whole and mirrored, cropped and mirrored."""

MIRRORED = 2
"""How much further on the mirrored variant stands."""

STARTS = ((0, 0, 1.0), (0, 1, 1 - 2 * CROP), (1, 0, 1 / (1 - 2 * CROP)))
"""Which variants of two pictures may agree (0: whole, 1: cropped), and how much of each side of the second picture the
first then shows: all, the middle, or more than there is."""

PLAIN = 2.0
"""Grey levels. A print with a smaller standard deviation shows nothing by which a picture could be recognized."""

CANDIDATES = 8
"""Pairs of each way to agree that are looked at, a picture on average over the pictures compared together: the closest.
Photographs have far fewer; drawings on a plain ground may have more."""

BLOCK = 1 << 18
"""Pairs of hashes compared at a time: what stays in the processor's cache."""

TASK = 1024
"""Pictures that a thread compares with all of another role before it takes others."""

REGISTERED = 512
"""Pairs registered at a time."""

STEPS = 6
"""Of Gauss-Newton; the start is at most a pixel or two off."""

FARTHEST = 0.1
"""Half picture sides that one step may move an edge by: farther away the linear fit means nothing."""

LEAST_CONTRAST = 0.2
"""Of one picture in units of the other's; where the fit finds less, or a negative, it is no copy."""

LARGEST_CUT = 0.16
"""Share of a side by which a copy may show less, or more: a crop of 12 % a side, as seen from the crop. Pictures of one
upright thing agree, whatever it is, if they may be shifted and scaled at will."""

BLUR = 5
"""Pixels a side of the box whose mean is taken away from a print: what remains are edges and texture."""

SLIGHT = 0.02
"""Share of a side: a copy whose edges lie closer to the other's counts as uncropped."""

SHOWN = 200
"""Pairs listed in figures.json, and so in the report."""

ORDER = (Role.TARGET, Role.UNSEEN, Role.HELDOUT, Role.SHARED, Role.PUBLIC)
"""Of the roles of a pair, the one that comes first here stands first: measured rows before the rest."""

LEAVES = {
    (Role.TARGET, Role.UNSEEN): ("other_id",),
    (Role.TARGET, Role.HELDOUT): ("id", "other_id"),
    (Role.TARGET, Role.SHARED): ("id",),
    (Role.TARGET, Role.PUBLIC): ("other_id",),
    (Role.UNSEEN, Role.HELDOUT): ("id",),
    (Role.UNSEEN, Role.SHARED): ("id",),
    (Role.UNSEEN, Role.PUBLIC): ("other_id",),
    (Role.HELDOUT, Role.SHARED): ("id",),
    (Role.HELDOUT, Role.PUBLIC): ("other_id",),
}
"""Which rows of a pair have to leave, see `Leaks.to_exclude`; only a pair of shared and public rows may stay."""

PAIRS: tables.Schema = {
    "id": pl.String,
    "role": pl.String,
    "other_id": pl.String,
    "other_role": pl.String,
    "kind": pl.String,  # exact (the same bytes) or near
    "similarity": pl.Float64,  # correlation of the registered pictures' details, at most 1; 1 for exact
    "how": pl.String,  # in which way the two differ
}
PRINTS: tables.Schema = {
    "content": pl.String,
    "grey": pl.Array(pl.UInt8, SIDE * SIDE),  # the whole picture, squeezed to a square
    "hashes": pl.Array(pl.UInt64, VARIANTS),  # perceptual hash of each variant
}
PROPOSED: tables.Schema = {
    "first": pl.Int64,  # places of the prints
    "second": pl.Int64,
    "mirrored": pl.Boolean,  # the first is to be mirrored
    "start": pl.Int64,  # place in `STARTS`
    "distance": pl.UInt8,  # bits in which the hashes differ; null for a pair that an embedding proposed
}

HOW = (
    pl.when(pl.col("mirrored") & pl.col("cropped"))
    .then(pl.lit("mirrored and cropped"))
    .when("mirrored")
    .then(pl.lit("mirrored"))
    .when("cropped")
    .then(pl.lit("cropped"))
    .otherwise(pl.lit("re-encoded"))
)

Hashes: TypeAlias = npt.NDArray[np.uint64]
Prints: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Leaks:
    """The copies found between the roles of a run.

    Attributes:
        pairs: columns of `PAIRS`, one row a pair of rows in different roles; by roles, exact ones first, the most
            similar first.
        action: "report" or "exclude".
        method: how they were looked for, in words.
        skipped: image files that could not be read or decoded, or that are too plain to be known again.
    """

    pairs: pl.DataFrame
    action: Literal["report", "exclude"]
    method: str
    skipped: int

    def to_exclude(self) -> list[str]:
        """Ids of the rows that must leave so that no remaining pair of roles harms a figure, sorted.

        A public row that copies a target, unseen or heldout row leaves: with it, to find the picture itself is enough
        to infer its label. The measured row stays, and the bank is large.
        A target or unseen row whose copy is in the heldout or shared role leaves: what should not know it has learned
        from the copy, and a network that was trained elsewhere cannot forget it, so taking out the copy would not do.
        The same holds for a heldout row, which a test in the other direction measures, with a copy in the target or
        shared role. An unseen row that copies a target row leaves, as the encoder was trained on it; the target row
        stays. Where both a shared and a public row show a picture, no measured row is touched, and both stay.
        """
        leaving = [pl.Series("id", [], dtype=pl.String)]
        for (first, second), columns in LEAVES.items():
            between = self.pairs.filter(pl.col("role") == str(first), pl.col("other_role") == str(second))
            leaving += [between[column].alias("id") for column in columns]
        return pl.concat(leaving).unique().sort().to_list()

    def figures(self, excluded: int) -> dict[str, Any]:
        """What figures.json holds of them.

        Args:
            excluded: rows that were taken out.
        """
        is_exact = pl.col("kind") == "exact"
        counts = self.pairs.group_by(first_role="role", second_role="other_role", maintain_order=True).agg(
            exact=is_exact.sum(), near=(~is_exact).sum()
        )
        return {
            "method": self.method,
            "counts": counts.to_dicts(),
            "pairs": self.pairs.head(SHOWN).to_dicts(),
            "n_pairs": len(self.pairs),
            "excluded": excluded,
            "sentence": self._sentence(counts, excluded),
        }

    def _sentence(self, counts: pl.DataFrame, excluded: int) -> str:
        """What was found, and what was done about it."""
        exact, near = counts["exact"].sum(), counts["near"].sum()
        pairs = ", ".join(f"{first} and {second} {one + other}" for first, second, one, other in counts.iter_rows())
        found = f"No image was found in two roles ({self.method})."
        if len(self.pairs):
            found = (
                f"The same image in two roles: {exact} pairs of rows byte for byte, {near} in another form ({pairs}; "
                f"{self.method})."
            )
        leaving = len(self.to_exclude())
        if self.action == "exclude":
            found += f" {excluded} rows were taken out because of it." if leaving else ""
        elif leaving:
            found += f" All rows stay; leaks=exclude would take out {leaving}."
        if self.skipped:
            found += f" {self.skipped} files could not be read, or are too plain to be known again in another form."
        return found


@dataclass(frozen=True)
class CopySearch:
    """Looks for copies of an image in two roles.

    Exact copies are files with the same bytes. Near copies are looked for in two steps. Perceptual hashes (of the
    library imagehash) of four variants of a small grey picture, whole or cropped, mirrored or not, propose pairs. Each
    is then confirmed, or not, by registering one picture with the other: position and scale along both axes and
    contrast are fitted, and the similarity is the correlation of what is left of both once their blurred selves are
    taken away. So pictures that merely have light and dark in the same places are no copies. Embeddings, where they
    are given, propose further pairs, which the same step confirms.

    Not found are copies that are rotated, cropped by clearly more than a tenth a side, or pasted into
    another picture; and near copies of pictures that show nothing but a plain area.

    Attributes:
        action: "report" counts and lists them; "exclude" also takes rows out, see `Leaks.to_exclude`.
        near: whether near copies are looked for; exact ones always are, for they cost nothing.
        embeddings: whether the encoder under test proposes pairs too, the nearest whole image in each other role.
        max_distance: bits, of 64, in which the hashes of a pair that is looked at may differ.
        min_similarity: correlation, at least, of a near copy.
    """

    action: Literal["report", "exclude"] = "report"
    near: bool = True
    embeddings: bool = False
    max_distance: int = 12
    min_similarity: float = 0.8

    def __post_init__(self) -> None:
        if self.action not in ("report", "exclude"):
            raise ConfigError(f"leaks.action={self.action}: must be report or exclude.")
        if self.embeddings and not self.near:
            raise ConfigError("leaks.embeddings=true proposes near copies, which leaks.near=false does not look for.")
        if not 0 <= self.max_distance <= 24:
            raise ConfigError(
                f"leaks.max_distance={self.max_distance}: must lie from 0 to 24 bits; hashes of unrelated pictures "
                "differ in about 32."
            )
        if not 0 < self.min_similarity < 1:
            raise ConfigError(f"leaks.min_similarity={self.min_similarity}: must lie between 0 and 1 (a correlation).")

    @property
    def method(self) -> str:
        """How copies are looked for, in words."""
        proposed_by = "perceptual hash, embedding" if self.embeddings else "perceptual hash"
        return f"by file content, {proposed_by} and registration" if self.near else "by file content alone"

    def find(self, rows: pl.DataFrame, store: ImageStore, cache: Path, embeddings: Embeddings | None = None) -> Leaks:
        """Look for copies between roles; what the same files gave before is taken from the cache.

        Args:
            rows: columns id, role, path and content (null where the file could not be read).
            store: gives the bytes of a path.
            cache: folder of the cache.
            embeddings: of whole images, with view ids "<id>#..."; rows they do not hold are searched by hash alone.

        Returns:
            The pairs, each once.
        """
        known = rows.select("id", "role", "path", "content").filter(pl.col("content").is_not_null())
        found, skipped = [_exact(known)], 0
        if self.near:
            near, skipped = self._near(known, store, cache, embeddings)
            found.append(near)
        by = (_rank("role"), _rank("other_role"), "kind", -pl.col("similarity"), "id", "other_id")
        pairs = pl.concat(found).sort(*by)
        return Leaks(pairs, self.action, self.method, skipped + rows["content"].null_count())

    def _near(
        self, rows: pl.DataFrame, store: ImageStore, cache: Path, embeddings: Embeddings | None
    ) -> tuple[pl.DataFrame, int]:
        """Near copies, columns of `PAIRS`, and how many files could not be compared."""
        files = rows.unique("content", keep="first", maintain_order=True).sort("content").select("content", "path")
        made_by = {"version": VERSION, "decoder": images.decoder_text("pillow"), "hash": version("imagehash")}
        print_key = provenance.key_of({**made_by, "contents": provenance.hash_table(files.select("content"))})
        prints = _cached(cache / "leaks" / f"prints-{print_key}.parquet", partial(_prints, files, store))
        usable = prints.filter(pl.col("grey").arr.std() >= PLAIN).with_row_index("place")
        members = rows.select("id", "role", "content").join(usable.select("content", "place"), on="content")
        key = provenance.key_of(
            {
                "prints": print_key,
                "members": provenance.hash_table(members.sort("id")),
                "search": asdict(self),
                "embeddings": None if embeddings is None else embeddings.shards.key,
            }
        )
        search = partial(self._search, usable, members, embeddings)
        return _cached(cache / "leaks" / f"pairs-{key}.parquet", search), len(files) - len(usable)

    def _search(self, prints: pl.DataFrame, members: pl.DataFrame, embeddings: Embeddings | None) -> pl.DataFrame:
        """Near copies among prints, columns of `PAIRS`.

        Args:
            prints: columns of `PRINTS`.
            members: the rows that have a print; columns id, role, content and place, which is the row in `prints`.
            embeddings: see `find`.
        """
        greys, hashes = prints["grey"].to_numpy().reshape(-1, SIDE, SIDE), prints["hashes"].to_numpy()
        of_role = {role: members.filter(pl.col("role") == str(role)) for role in ORDER}
        found = [pl.DataFrame(schema=PAIRS)]
        for first, second in combinations(ORDER, 2):
            here, there = of_role[first], of_role[second]
            if not len(here) or not len(there):
                continue
            proposed = _agreeing(hashes, here, there, self.max_distance, f"{first} and {second}")
            if embeddings is not None:
                proposed = pl.concat([proposed, _nearest(here, there, embeddings)])
            # The same file in both roles is an exact copy.
            proposed = proposed.filter(pl.col("first") != pl.col("second"))
            same = _registered(greys, proposed, f"{first} and {second}")
            same = same.filter(pl.col("similarity") >= self.min_similarity)
            same = same.join(here.select("id", "role", first="place"), on="first")
            same = same.join(there.select(other_id="id", other_role="role", second="place"), on="second")
            found.append(same.with_columns(kind=pl.lit("near")).select(list(PAIRS)))
        return pl.concat(found)


def _rank(column: str) -> pl.Expr:
    """Where a role stands in `ORDER`."""
    return pl.col(column).replace_strict({str(role): rank for rank, role in enumerate(ORDER)}, return_dtype=pl.Int8)


def _exact(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of different roles with the same file content, columns of `PAIRS`."""
    known = rows.select("id", "role", "content", rank=_rank("role"))
    pairs = known.join(known.rename({"id": "other_id", "role": "other_role", "rank": "other_rank"}), on="content")
    same = pairs.filter(pl.col("rank") < pl.col("other_rank"))
    told = {"kind": pl.lit("exact"), "similarity": pl.lit(1.0), "how": pl.lit("the same file")}
    return same.with_columns(**told).select(list(PAIRS))


def _cached(path: Path, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """A table from the cache; made and written where it is not there, or damaged."""
    if path.exists():
        try:
            return pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            log.warning("%s is damaged and will be made again: %s", path, error)
    made = make()
    tables.write(made, path)
    return made


def _prints(files: pl.DataFrame, store: ImageStore) -> pl.DataFrame:
    """Columns of `PRINTS` of those files (columns content and path) that decode; each is read once."""

    def look(path: str) -> tuple[Prints, list[int]] | None:
        try:
            return _print(store.read(path))
        except images.UNREADABLE_ERRORS:
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool, progress.bar("hashing images", len(files), delay=2) as bar:
        looks = []
        for found in pool.map(look, files["path"], chunksize=64):
            looks.append(found)
            bar.update()
    seen = [found for found in looks if found is not None]
    return pl.DataFrame(
        {
            "content": files["content"].filter(pl.Series([found is not None for found in looks], dtype=pl.Boolean)),
            "grey": np.array([grey for grey, _ in seen], dtype=np.uint8).reshape(-1, SIDE * SIDE),
            "hashes": np.array([hashes for _, hashes in seen], dtype=np.uint64).reshape(-1, VARIANTS),
        },
        schema=PRINTS,
    )


def _print(content: bytes) -> tuple[Prints, list[int]]:
    """The small grey picture of an image file, and the hashes of its variants."""
    with images.opened(content) as picture:
        # A large JPEG is decoded at a half, a quarter or an eighth of its size, which is several times faster.
        drafted = picture.draft("L", (SIDE, SIDE))
        # Then its last column and row may be of a part of the picture only, which a mirrored copy has at the other end.
        shown = drafted[1] if drafted else None
        whole = images.eight_bits(picture).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=shown)
    inner = (SIDE * CROP, SIDE * CROP, SIDE * (1 - CROP), SIDE * (1 - CROP))
    variants = [whole, whole.resize(whole.size, Image.Resampling.BICUBIC, box=inner)]
    variants += [variant.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for variant in variants]
    return np.asarray(whole).ravel(), [int(str(imagehash.phash(variant)), 16) for variant in variants]


def _agreeing(hashes: Hashes, here: pl.DataFrame, there: pl.DataFrame, most: int, title: str) -> pl.DataFrame:
    """Pairs of prints whose hashes agree, columns of `PROPOSED`, once for each way in which they do.

    Args:
        hashes: shape (N, VARIANTS), of all prints.
        here: column place.
        there: column place.
        most: bits that may differ.
        title: the two roles, for the progress bar.
    """
    first, second = (part["place"].unique().sort().to_numpy() for part in (here, there))
    ways = product(range(len(STARTS)), (False, True))
    tasks = [(first[at : at + TASK], *way) for way in ways for at in range(0, len(first), TASK)]

    def look(task: tuple[IntArray, int, bool]) -> pl.DataFrame:
        asked, start, mirrored = task
        mine, theirs, _ = STARTS[start]
        rows, columns, distances = _close(hashes[asked, mine + MIRRORED * mirrored], hashes[second, theirs], most)
        pairs = {"first": asked[rows], "second": second[columns], "distance": distances}
        return _as_proposed(pl.DataFrame(pairs).with_columns(start=pl.lit(start), mirrored=pl.lit(mirrored)))

    found = [pl.DataFrame(schema=PROPOSED)]
    total = sum(len(asked) for asked, _, _ in tasks) * len(second)
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress.bar(f"comparing {title}", total, 2, unit="pair") as bar:
        for (asked, _, _), pairs in zip(tasks, pool.map(look, tasks), strict=True):
            found.append(pairs)
            bar.update(len(asked) * len(second))
    return pl.concat(found)


def _close(asked: Hashes, known: Hashes, most: int) -> tuple[IntArray, IntArray, Prints]:
    """Pairs of hashes that differ in few bits: their places in both, and in how many bits they differ."""
    step = max(1, BLOCK // len(known))
    found = []
    for at in range(0, len(asked), step):
        distances = np.bitwise_count(asked[at : at + step, None] ^ known).ravel()
        places = np.flatnonzero(distances <= most)
        limit = CANDIDATES * len(distances) // len(known)
        if len(places) > limit:
            places = places[np.argsort(distances[places], kind="stable")[:limit]]
        found.append((at + places // len(known), places % len(known), distances[places]))
    rows, columns, near = (np.concatenate(part) for part in zip(*found, strict=True))
    return rows, columns, near


def _as_proposed(pairs: pl.DataFrame) -> pl.DataFrame:
    """With the columns and types of `PROPOSED`."""
    return pairs.select(pl.col(name).cast(dtype) for name, dtype in PROPOSED.items())


def _nearest(here: pl.DataFrame, there: pl.DataFrame, embeddings: Embeddings) -> pl.DataFrame:
    """For each print the one with the most similar embedding, columns of `PROPOSED`; every start is to be tried.

    Args:
        here: columns id and place.
        there: the same, of another role.
        embeddings: of whole images, see `CopySearch.find`.
    """
    from dejavu_exp import neighbours  # imports torch

    known = pl.DataFrame({"id": [view.rsplit("#", 1)[0] for view in embeddings.view_ids]}).with_row_index("row")
    asked, bank = (
        part.unique("place", maintain_order=True).join(known, on="id", maintain_order="left") for part in (here, there)
    )
    if not len(asked) or not len(bank):
        return pl.DataFrame(schema=PROPOSED)
    queries, keys = (embeddings.take(part["row"].to_numpy().astype(np.int64)) for part in (asked, bank))
    near = neighbours.search(queries, keys, 1, "cosine").positions[:, 0]
    pairs = pl.DataFrame({"first": asked["place"], "second": bank["place"].gather(near)})
    ways = pl.DataFrame(product(range(len(STARTS)), (False, True)), schema=["start", "mirrored"], orient="row")
    return _as_proposed(pairs.join(ways, how="cross").with_columns(distance=pl.lit(None)))


def _registered(greys: Prints, proposed: pl.DataFrame, title: str) -> pl.DataFrame:
    """How similar the pictures of proposed pairs are once they are registered.

    Args:
        greys: shape (N, SIDE, SIDE), of all prints.
        proposed: columns of `PROPOSED`.
        title: the two roles, for the progress bar.

    Returns:
        Columns first, second, similarity and how, one row a pair: by the start that led to the highest similarity.
    """
    import torch

    scales = torch.tensor([scale for _, _, scale in STARTS])
    found = [pl.DataFrame(schema={name: PAIRS[name] for name in ("similarity", "how")})]
    with torch.inference_mode(), progress.bar(f"confirming {title}", len(proposed), delay=2, unit="pair") as bar:
        for at in range(0, len(proposed), REGISTERED):
            block = proposed[at : at + REGISTERED]
            first, second = (torch.from_numpy(greys[block[name].to_numpy()]) / 255 for name in ("first", "second"))
            mirrored = torch.from_numpy(block["mirrored"].to_numpy().copy())
            first = torch.where(mirrored[:, None, None], first.flip(2), first)
            similarity, cut = register(first, second, scales[torch.from_numpy(block["start"].to_numpy().copy())])
            how = pl.DataFrame({"mirrored": block["mirrored"], "cropped": (cut > SLIGHT).numpy()}).select(how=HOW)
            found.append(how.select(pl.Series("similarity", similarity.double().numpy()).round(4), "how"))
            bar.update(len(block))
    pairs = proposed.select("first", "second").hstack(pl.concat(found))
    return pairs.sort("similarity", descending=True).unique(["first", "second"], keep="first", maintain_order=True)


def register(first: Tensor, second: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Find the window of each second picture that the first one shows, and compare the two.

    Position and size of the window along both axes, and brightness and contrast of what it shows, are fitted to the
    first picture by least squares (Gauss-Newton). Their details are then compared where both show something.

    Args:
        first: shape (P, S, S), grey, 0 to 1.
        second: the same.
        scale: shape (P,), size of the window to start from, in sides of the second picture; its middle is the middle.

    Returns:
        Shape (P,) each: the correlation of the details, in [-1, 1], or 0 where the window is farther off than
        `LARGEST_CUT`; and how far off it is: the share of a side by which the two differ in what they show, at the
        edge where it is largest.
    """
    import torch
    from torch.nn import functional

    centres = (torch.arange(first.shape[1]) * 2 + 1) / first.shape[1] - 1
    x, y = centres.expand_as(first), centres[:, None].expand_as(first)
    target = first.flatten(1)[..., None]
    size, shift = scale[:, None].repeat(1, 2), torch.zeros(len(first), 2)  # along x and y, in halves of a side
    for _ in range(STEPS):
        shown, inside = _shown(second, size, shift)
        slope_y, slope_x = torch.gradient(shown, spacing=2 / first.shape[1], dim=(1, 2))
        columns = [x * slope_x, y * slope_y, slope_x, slope_y, shown, torch.ones_like(shown)]
        design = torch.stack(columns, dim=-1).flatten(1, 2)
        weighted = (design * inside.flatten(1)[..., None]).mT
        normal = weighted @ design
        # A picture without slopes in some direction says nothing of that direction: then it does not move.
        ridge = torch.diag_embed(1e-4 * normal.diagonal(dim1=1, dim2=2) + 1e-6)
        fitted = torch.linalg.solve(normal + ridge, weighted @ target)[..., 0]
        step = fitted[:, :4] / fitted[:, 4:5].clamp(min=LEAST_CONTRAST)
        step = step.clamp(-FARTHEST, FARTHEST)
        size, shift = size * (1 + step[:, :2]), shift + size * step[:, 2:]
    shown, inside = _shown(second, size, shift)
    # Where the blur reaches over the border of the second picture there is nothing to compare.
    known = 1 - functional.max_pool2d(1 - inside[:, None], BLUR, 1, BLUR // 2)[:, 0]
    similarity = _correlation(_details(first), _details(shown), known)
    cut = ((1 - size).abs() + shift.abs()).amax(dim=1) / 2
    return torch.where(cut <= LARGEST_CUT, similarity, 0), cut


def _shown(second: Tensor, size: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """What a window of each picture shows, shape (P, S, S), and 1 where it lies within the picture, else 0."""
    import torch
    from torch.nn import functional

    window = torch.cat([torch.diag_embed(size), shift[..., None]], dim=2)
    grid = functional.affine_grid(window, [len(second), 1, *second.shape[1:]], align_corners=False)
    shown = functional.grid_sample(second[:, None], grid, padding_mode="border", align_corners=False)
    return shown[:, 0], (grid.abs() <= 1).all(dim=-1).float()


def _details(pictures: Tensor) -> Tensor:
    """Pictures, shape (P, S, S), less their blurred selves."""
    from torch.nn import functional

    return pictures - functional.avg_pool2d(pictures[:, None], BLUR, 1, BLUR // 2, count_include_pad=False)[:, 0]


def _correlation(first: Tensor, second: Tensor, inside: Tensor) -> Tensor:
    """Correlation of each two pictures over the pixels where `inside` is 1; 0 where one of them is plain there."""
    count = inside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    one, other = ((part - (part * inside).sum(dim=(1, 2), keepdim=True) / count) * inside for part in (first, second))
    spread = (one.square().sum(dim=(1, 2)) * other.square().sum(dim=(1, 2))).sqrt()
    return (one * other).sum(dim=(1, 2)) / spread.clamp(min=1e-6)
