"""Copies planted between roles are found, what only looks alike is not, and the rule says who leaves."""

import io
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from PIL import Image

from dejavu_exp import config, leaks, provenance
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.errors import ConfigError
from dejavu_exp.leaks import CopySearch, Leaks
from dejavu_exp.shards import Embeddings, ShardFolder
from dejavu_exp.tables import FloatArray, Role

log = logging.getLogger(__name__)
ROLES = [str(role) for role in Role]
FORMS = ("the same file", "re-encoded", "mirrored", "cropped", "mirrored and cropped")
REAL_DATA = os.environ.get("DEJAVU_REAL_DATA")


class Planted(NamedTuple):
    """Rows with copies among them.

    Attributes:
        rows: columns id, role, path and content.
        store: their files.
        truth: how each pair of ids (the original's and the copy's, sorted) differs.
    """

    rows: pl.DataFrame
    store: MemoryStore
    truth: dict[tuple[str, ...], str]


def jpeg(picture: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def mirrored(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def cropped(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another 4 to 10 % off each side, scaled back to the size it had."""
    (left, right), (top, bottom) = rng.uniform(0.04, 0.10, (2, 2))
    width, height = picture.size
    box = (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    return picture.crop(box).resize(picture.size, Image.Resampling.BICUBIC)


def in_form(content: bytes, form: str, rng: np.random.Generator) -> bytes:
    """The file again, in one of `FORMS`."""
    if form == "the same file":
        return content
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    picture = mirrored(picture) if "mirrored" in form else picture
    picture = cropped(picture, rng) if "cropped" in form else picture
    return jpeg(picture, int(rng.integers(60, 91)))


def table(files: dict[str, bytes], roles: dict[str, str]) -> pl.DataFrame:
    content = [provenance.hash_bytes(files[name]) for name in roles]
    return pl.DataFrame({"id": list(roles), "role": list(roles.values()), "path": list(roles), "content": content})


def planted(originals: dict[str, bytes], copied: int, seed: int) -> Planted:
    """Files in random roles; of the first `copied` a copy in each form, in another role."""
    rng = np.random.default_rng(seed)
    files, roles = dict(originals), {name: str(rng.choice(ROLES)) for name in originals}
    truth: dict[tuple[str, ...], str] = {}
    for name in list(originals)[:copied]:
        for form in FORMS:
            copy = f"{name} {form}"
            files[copy] = in_form(files[name], form, rng)
            roles[copy] = str(rng.choice([role for role in ROLES if role != roles[name]]))
            truth[name, copy] = form
    return Planted(table(files, roles), MemoryStore(files), truth)


def noise(rng: np.random.Generator, side: int = 96) -> FloatArray:
    """A grey picture with as much at every scale as photographs have, in [0, 1]."""
    along = np.fft.fftfreq(side)
    frequency = np.hypot(along, along[:, None])
    frequency[0, 0] = 1
    drawn = np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) / frequency).real
    return np.asarray((drawn - drawn.min()) / np.ptp(drawn))


def as_picture(values: FloatArray) -> Image.Image:
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def small() -> Planted:
    rng = np.random.default_rng(0)
    return planted({f"{number:03d}": jpeg(as_picture(noise(rng)), 95) for number in range(120)}, copied=24, seed=1)


@pytest.fixture(scope="module")
def found(small: Planted, tmp_path_factory: pytest.TempPathFactory) -> Leaks:
    """Hashes may differ more than by default: a crop changes that of noise more than that of a photograph."""
    return CopySearch(max_distance=16).find(small.rows, small.store, tmp_path_factory.mktemp("cache"))


def by_pair(pairs: pl.DataFrame) -> dict[tuple[str, ...], str]:
    return {tuple(sorted(row[:2])): row[2] for row in pairs.select("id", "other_id", "how").iter_rows()}


def family(name: str) -> str:
    """The original that a planted row shows."""
    return name.split()[0]


def test_planted_copies_are_found_with_the_way_they_differ_and_nothing_else(small: Planted, found: Leaks) -> None:
    how = by_pair(found.pairs)
    assert {pair: how.get(pair) for pair in small.truth} == small.truth
    assert [pair for pair in how if family(pair[0]) != family(pair[1])] == []
    assert found.skipped == 0


def test_pairs_are_of_two_roles_each_once_in_their_order(small: Planted, found: Leaks) -> None:
    roles = dict(small.rows.select("id", "role").iter_rows())
    pairs = found.pairs
    assert [roles[name] for name in pairs["id"]] == pairs["role"].to_list()
    assert [roles[name] for name in pairs["other_id"]] == pairs["other_role"].to_list()
    ranks = [leaks.ORDER.index(Role(role)) for role in pairs["role"]]
    others = [leaks.ORDER.index(Role(role)) for role in pairs["other_role"]]
    assert all(rank < other for rank, other in zip(ranks, others, strict=True))
    assert len(by_pair(pairs)) == len(pairs)
    keys = list(zip(ranks, others, pairs["kind"], -pairs["similarity"], strict=True))
    assert keys == sorted(keys)


def test_a_mirrored_jpeg_of_odd_size_is_not_taken_for_cropped(tmp_path: Path) -> None:
    """A JPEG of 133 pixels that is decoded at a quarter of its size has 34 columns, the last of one pixel."""
    picture = as_picture(noise(np.random.default_rng(7), 200)).crop((0, 0, 133, 200))
    files = {"a": jpeg(picture, 95), "b": jpeg(mirrored(picture), 95)}
    rows = table(files, {"a": "target", "b": "public"})
    assert by_pair(CopySearch().find(rows, MemoryStore(files), tmp_path).pairs) == {("a", "b"): "mirrored"}


def test_pictures_with_the_same_light_and_dark_but_other_details_are_no_copies(tmp_path: Path) -> None:
    """Their hashes agree, so only registration can tell."""
    rng = np.random.default_rng(3)
    ground = np.asarray(as_picture(noise(rng)).convert("L").resize((8, 8)).resize((96, 96)), dtype=np.float64) / 255
    files = {name: jpeg(as_picture(0.2 + 0.6 * ground + 0.2 * (noise(rng) - 0.5)), 90) for name in ("a", "b")}
    rows = table(files, {"a": "target", "b": "public"})
    (first, second) = (leaks._print(files[name])[1][0] for name in ("a", "b"))
    assert (first ^ second).bit_count() <= CopySearch().max_distance
    assert len(CopySearch().find(rows, MemoryStore(files), tmp_path).pairs) == 0


def test_registration_finds_a_planted_window() -> None:
    """A picture known at every point, so that the window needs no interpolation."""

    def scene(x: FloatArray, y: FloatArray) -> FloatArray:
        return np.sin(5 * x + 1) * np.cos(6 * y) + 0.5 * np.sin(7 * x - 5 * y) + 0.3 * np.cos(6 * x + 8 * y)

    centres = (np.arange(64) * 2 + 1) / 64 - 1
    x, y = np.meshgrid(centres, centres)
    # 4 % off the left, 10 % off the right, 8 % off the top, 6 % off the bottom; half the contrast.
    window = 0.5 * scene(0.86 * x - 0.06, 0.86 * y + 0.02) + 0.2
    first, second = (torch.from_numpy(part[None]).float() for part in (window, scene(x, y)))
    similarity, cut = leaks.register(first, second, torch.tensor([0.86]))
    assert similarity.item() > 0.995
    assert cut.item() == pytest.approx(0.10, abs=0.004)
    # The other way round the second shows less than the first, and the same overlap is compared.
    similarity, cut = leaks.register(second, first, torch.tensor([1 / 0.86]))
    assert similarity.item() > 0.995
    assert cut.item() == pytest.approx(0.10 / 0.86, abs=0.01)


def test_a_part_of_a_picture_is_no_copy_of_it() -> None:
    picture = torch.from_numpy(noise(np.random.default_rng(4), 32)[None]).float()
    assert leaks.register(picture, picture, torch.tensor([1.0]))[0].item() == pytest.approx(1, abs=1e-3)
    quarter = torch.nn.functional.interpolate(picture[:, None, 8:24, 8:24], size=(32, 32), mode="bilinear")[:, 0]
    assert leaks.register(quarter, picture, torch.tensor([0.5]))[0].item() == 0


def test_hashes_are_compared_as_by_counting_bits() -> None:
    drawn = np.random.default_rng(5).integers(0, 1 << 9, size=(2, 700), dtype=np.uint64)
    rows, columns, distances = leaks._close(drawn[0], drawn[1], 1)
    counted = np.array([[(int(one) ^ int(other)).bit_count() for other in drawn[1]] for one in drawn[0]])
    expected = np.argwhere(counted <= 1)
    # More than are kept, so the nearest ones are.
    assert len(expected) > leaks.CANDIDATES * len(drawn[0])
    assert len(rows) == leaks.CANDIDATES * len(drawn[0])
    np.testing.assert_array_equal(counted[rows, columns], distances)
    assert np.count_nonzero(distances == 0) == np.count_nonzero(counted == 0)


def test_it_does_not_matter_how_many_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.random.default_rng(6).integers(0, 1 << 16, size=(90, leaks.VARIANTS), dtype=np.uint64)
    here, there = pl.DataFrame({"place": range(50)}), pl.DataFrame({"place": range(40, 90)})
    at_once = leaks._agreeing(hashes, here, there, 3, "two roles")
    assert 0 < len(at_once) < leaks.CANDIDATES * 50
    monkeypatch.setattr(leaks, "TASK", 7)
    monkeypatch.setattr(leaks, "BLOCK", 150)
    assert leaks._agreeing(hashes, here, there, 3, "two roles").equals(at_once)
    expected = {
        (one, other, mirrored, start): bits
        for one in range(50)
        for other in range(40, 90)
        for mirrored in (False, True)
        for start, (mine, theirs, _) in enumerate(leaks.STARTS)
        if (bits := (int(hashes[one, mine + leaks.MIRRORED * mirrored]) ^ int(hashes[other, theirs])).bit_count()) <= 3
    }
    assert {tuple(row[:4]): row[4] for row in at_once.iter_rows()} == expected


def test_exact_copies_alone_need_no_file(small: Planted, tmp_path: Path) -> None:
    exact = CopySearch(near=False).find(small.rows, MemoryStore({}), tmp_path)
    assert by_pair(exact.pairs) == {pair: how for pair, how in small.truth.items() if how == "the same file"}
    assert set(exact.pairs["similarity"]) == {1.0}
    assert not list(tmp_path.iterdir())


def test_the_cache_answers_for_the_same_files_and_search_alone(
    small: Planted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = small.rows.filter(pl.col("id").str.slice(0, 3).is_in(["000", "001", "002", "003"]))
    first = CopySearch().find(rows, small.store, tmp_path)
    again = CopySearch().find(rows.reverse(), MemoryStore({}), tmp_path)
    assert again.pairs.equals(first.pairs)
    # The prints serve any search, the pairs only their own.
    strict = CopySearch(min_similarity=0.99).find(rows, MemoryStore({}), tmp_path)
    assert 0 < len(strict.pairs) < len(first.pairs)
    assert strict.pairs.equals(first.pairs.filter(pl.col("similarity") >= 0.99))
    for file in tmp_path.rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-10])
    assert CopySearch().find(rows, small.store, tmp_path).pairs.equals(first.pairs)
    assert "is damaged and will be made again" in caplog.text


def test_broken_missing_and_plain_files_are_counted(small: Planted, tmp_path: Path) -> None:
    original, copy = next(pair for pair, how in small.truth.items() if how == "re-encoded")
    names = [original, copy]
    plain = [jpeg(Image.new("RGB", (50, 50), (shade, shade, shade)), 90) for shade in (60, 200)]
    files = {name: small.store.files[name] for name in names}
    files |= {"plain": plain[0], "plain too": plain[1], "cut": files[original][:700], "no image": b"text", "gone": b"x"}
    roles = {name: str(small.rows.filter(pl.col("id") == name)["role"].item()) for name in names}
    roles |= {"plain": "target", "plain too": "public", "cut": "target", "no image": "unseen", "gone": "public"}
    rows = table(files, roles).with_columns(content=pl.when(pl.col("id") != "gone").then("content"))
    found = CopySearch().find(
        rows, MemoryStore({name: file for name, file in files.items() if name != "gone"}), tmp_path
    )
    assert set(by_pair(found.pairs)) == {(original, copy)}
    assert found.skipped == 5
    assert "5 files could not be read" in found.figures(0)["sentence"]


def test_embeddings_propose_what_hashes_do_not(small: Planted, tmp_path: Path) -> None:
    """Where hashes must agree in every bit, hardly a crop is proposed; by embeddings that know the original it is."""
    crops = {pair for pair, how in small.truth.items() if "cropped" in how}
    names = sorted({name for pair in crops for name in pair})
    rows = small.rows.filter(pl.col("id").is_in(names))
    search = CopySearch(max_distance=0)
    by_hash = crops & set(by_pair(search.find(rows, small.store, tmp_path).pairs))
    assert len(by_hash) < 0.1 * len(crops)
    centres = {name: np.random.default_rng(int(family(name))).normal(size=8) for name in names}
    shards = ShardFolder(tmp_path / "shards", "planted", len(names), 1000)
    shards.write_request(pl.DataFrame({"view_id": [f"{name}#full" for name in names]}))
    shards.write(0, np.array([centres[name] for name in names], dtype=np.float32), [""] * len(names))
    embeddings = Embeddings(shards, np.arange(len(names)), np.full(len(names), True), {}, None)
    proposed = set(by_pair(search.find(rows, small.store, tmp_path, embeddings).pairs))
    # A pair is proposed where the other role holds no second copy that is just as near.
    assert len(crops & proposed) > 0.8 * len(crops)
    assert all(family(one) == family(other) for one, other in proposed)


@pytest.mark.parametrize(
    ("role", "other_role", "leaving"),
    [
        ("target", "unseen", ["b"]),
        ("target", "heldout", ["a", "b"]),
        ("target", "shared", ["a"]),
        ("target", "public", ["b"]),
        ("unseen", "heldout", ["a"]),
        ("unseen", "shared", ["a"]),
        ("unseen", "public", ["b"]),
        ("heldout", "shared", ["a"]),
        ("heldout", "public", ["b"]),
        ("shared", "public", []),
    ],
)
def test_who_leaves(role: str, other_role: str, leaving: list[str]) -> None:
    files = {"a": b"same", "b": b"same", "c": b"other"}
    rows = table(files, {"b": other_role, "a": role, "c": "target"})
    found = CopySearch("exclude", near=False).find(rows, MemoryStore({}), Path("nowhere"))
    assert found.pairs.select("id", "role", "other_id", "other_role").rows() == [("a", role, "b", other_role)]
    assert found.to_exclude() == leaving
    assert f"{len(leaving)} rows were taken out" in found.figures(len(leaving))["sentence"] or not leaving


def test_figures_count_every_pair_and_list_no_more_than_the_report_shows() -> None:
    files = {f"{role}{number:02d}": b"same" for role in ("target", "public") for number in range(20)} | {
        "seen": b"same"
    }
    rows = table(files, {name: name.rstrip("0123456789").replace("seen", "unseen") for name in files})
    figures = CopySearch(near=False).find(rows, MemoryStore({}), Path("nowhere")).figures(excluded=0)
    assert figures["counts"] == [
        {"first_role": "target", "second_role": "unseen", "exact": 20, "near": 0},
        {"first_role": "target", "second_role": "public", "exact": 400, "near": 0},
        {"first_role": "unseen", "second_role": "public", "exact": 20, "near": 0},
    ]
    assert (figures["n_pairs"], len(figures["pairs"])) == (440, leaks.SHOWN)
    assert set(figures["pairs"][0]) == {"id", "role", "other_id", "other_role", "kind", "similarity", "how"}
    assert "leaks=exclude would take out 21." in figures["sentence"]
    json.dumps(figures, allow_nan=False)


def test_nothing_found_is_said(tmp_path: Path) -> None:
    rows = table({"a": b"one", "b": b"other"}, {"a": "target", "b": "public"})
    figures = CopySearch("exclude", near=False).find(rows, MemoryStore({}), tmp_path).figures(excluded=0)
    assert figures["sentence"] == "No image was found in two roles (by file content alone)."
    assert (figures["counts"], figures["pairs"], figures["n_pairs"]) == ([], [], 0)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"action": "delete"}, "leaks.action=delete"),
        ({"max_distance": 25}, "leaks.max_distance=25"),
        ({"min_similarity": 1.0}, "leaks.min_similarity=1.0"),
    ],
)
def test_bad_values_are_refused(changed: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        CopySearch(**changed)  # type: ignore[arg-type]


def test_the_configuration_files_differ_in_what_they_say() -> None:
    built = {
        name: config.bind(yaml.safe_load((config.CONF_DIR / "leaks" / f"{name}.yaml").read_text()), "leaks")
        for name in ("report", "exclude", "none")
    }
    assert built["report"] == CopySearch()
    assert built["exclude"] == CopySearch(action="exclude")
    assert built["none"] == CopySearch(near=False)


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA, reason="DEJAVU_REAL_DATA names no folder")
def test_recall_and_precision_on_tiny_imagenet(tmp_path: Path) -> None:
    """11,000 photographs and 500 copies in each form. No two photographs of the subset are copies of each other."""
    with zipfile.ZipFile(Path(str(REAL_DATA)) / "tiny_imagenet_20.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".JPEG"))
        order = np.random.default_rng(0).permutation(len(names))
        files = {Path(names[place]).stem: archive.read(names[place]) for place in order}
    plant = planted(files, copied=500, seed=0)
    how = by_pair(CopySearch().find(plant.rows, plant.store, tmp_path).pairs)
    wrong = [pair for pair in how if family(pair[0]) != family(pair[1])]
    for form in FORMS:
        of_form = [pair for pair, planted_form in plant.truth.items() if planted_form == form]
        hits = sum(pair in how for pair in of_form)
        log.info("%s: %d of %d found", form, hits, len(of_form))
        assert hits >= 0.95 * len(of_form)
    right = sum(pair in how for pair in plant.truth)
    log.info("%d planted pairs found, %d pairs that are no copies: %s", right, len(wrong), wrong[:20])
    assert right >= 0.95 * (right + len(wrong))
