"""Whole runs: caches, a kill in the middle, bad input, and what the user reads then."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import SMALL, Finished, measure
from PIL import Image

from dejavu_exp.config import that_decides
from dejavu_exp.datasets.manifest import ManifestFile
from dejavu_exp.splits import PerClassSplit


def without_times(figures: dict[str, Any]) -> str:
    run = {key: value for key, value in figures["run"].items() if key not in ("created", "seconds")}
    return json.dumps({**figures, "run": run}, sort_keys=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = measure(tmp_path_factory.mktemp("small"), *SMALL, "reference=class_prior")
    assert done.code == 0, done.stderr
    return done


def cache_files(run: Finished) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (run.folder / "cache").rglob("*")}


def test_the_terminal_shows_the_verdict_and_the_references(small: Finished) -> None:
    assert small.figures()["verdict"][:40] in " ".join(small.stdout.split())
    assert "class_prior" in small.stdout


def test_another_reference_embeds_nothing_again(small: Finished, tmp_path: Path) -> None:
    before = cache_files(small)
    done = measure(tmp_path, *SMALL, "reference=[naive_bayes,label_shuffle]", cache=small.folder / "cache")
    assert done.code == 0, done.stderr
    assert "embedding" not in done.stderr
    assert "training" not in done.stderr
    assert {path: stamp for path, stamp in cache_files(small).items() if "arrow" in path or "safetensors" in path} == {
        path: stamp for path, stamp in before.items() if "arrow" in path or "safetensors" in path
    }


def test_the_same_command_gives_the_same_figures(small: Finished, tmp_path: Path) -> None:
    again = measure(tmp_path, *SMALL, "reference=class_prior", cache=small.folder / "cache")
    assert without_times(again.figures()) == without_times(small.figures())


def test_unseen_rows_are_compared_and_weighted_and_references_made_twice(small: Finished, tmp_path: Path) -> None:
    more = ("reference=[naive_bayes,class_prior]", "reference_seeds=2", "scoring.adjust=match", "scoring.cluster=label")
    done = measure(tmp_path, *SMALL, *more, cache=small.folder / "cache")
    assert done.code == 0, done.stderr
    figures, plain = done.figures(), small.figures()
    likeness = figures["likeness"]
    # Eight rows a class and role: too few for the classes to differ, enough for the others to be tested.
    assert {"class balance", "box size", "crop size", "background tags", "two-sample classifier"} == {
        test["name"] for test in likeness["tests"]
    }
    assert likeness["adjust"] == "match"
    assert 1 <= likeness["effective_unseen"] < plain["likeness"]["effective_unseen"] == 24
    weights = done.scores().filter(pl.col("role") == "unseen", pl.col("status") == "ok").group_by("reference")
    assert weights.agg(pl.col("weight").mean())["weight"].to_list() == pytest.approx([1.0] * len(figures["references"]))
    assert figures["coverage"]["usable rows"] == {"target": 24, "unseen": 24}
    for name, found in figures["references"].items():
        gap = found["roles"]["target"]["top1"]["100"]["gap"]
        assert len(found["seeds"]["gap"]["values"]) == 2
        assert found["seeds"]["gap"]["values"][0] == gap["value"], name
    # Target rows count alike, whatever unseen rows do; only their draws are of classes here.
    prior, before = (run["references"]["class_prior"] for run in (figures, plain))
    assert prior["seeds"]["gap"]["deviation"] == 0
    gaps = [found["roles"]["target"]["top1"]["100"]["gap"]["value"] for found in (prior, before)]
    assert gaps[0] == gaps[1]


def test_the_resolved_configuration_is_kept_and_runs(small: Finished) -> None:
    import yaml

    kept = yaml.safe_load((small.folder / "config.yaml").read_text())
    assert kept["probe"]["k"] == 10
    assert that_decides(kept) == small.figures()["run"]["config"]


@pytest.mark.slow
def test_a_kill_in_the_middle_of_extraction_changes_nothing(tmp_path: Path) -> None:
    """kill -9 while shards are written, then the same command: the same figures.json but for the times."""
    slow = [
        *SMALL,
        "reference=class_prior",
        "dataset.train_per_class=700",
        "split.public=660",
        "trainer.batch_size=8",
        "trainer.workers=0",
    ]
    settings = {**os.environ, "DEJAVU_CACHE": "cache", "HF_HUB_OFFLINE": "1"}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir()
        command = [sys.executable, "-m", "dejavu_exp", "hydra.run.dir=run", *slow]
        return subprocess.Popen(command, cwd=folder, env=settings, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(timeout=300) == 0
    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 200
    # The bank has two shards; the kill comes between the first and the second.
    cache = tmp_path / "killed" / "cache"  # not searched whole: training makes and removes folders in it
    while not list(cache.glob("embeddings/*/000000-of-000002.arrow")) and time.monotonic() < deadline:
        if killed.poll() is not None:
            break
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not list((tmp_path / "killed").rglob("000001-of-000002.arrow"))
    assert not (tmp_path / "killed" / "run" / "figures.json").exists()
    (tmp_path / "killed" / "run").rename(tmp_path / "killed" / "first")
    command = [sys.executable, "-m", "dejavu_exp", "hydra.run.dir=run", *slow]
    subprocess.run(command, cwd=tmp_path / "killed", env=settings, check=True, capture_output=True, timeout=300)
    whole, resumed = (
        json.loads((tmp_path / name / "run" / "figures.json").read_text()) for name in ("whole", "killed")
    )
    assert without_times(whole) == without_times(resumed)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+probe.kk=3"], "probe.kk is not a key of the configuration: did you mean probe.k?"),
        (["probe.k=43"], "probe.k=43 is more than the bank holds: the split has 42 usable public rows"),
        (["split.min_side_px=64"], "no target row can be used"),
        (["model=clip_vitl14"], "model.weights=PATH"),
        (["model=efficientnet_lite0", "model.weights=/no/such/file.safetensors"], "/no/such/file.safetensors"),
        (["tagger=open_clip", "reference=naive_bayes"], "weights"),
    ],
)
def test_bad_input_is_one_sentence_without_a_traceback(
    small: Finished, tmp_path: Path, overrides: list[str], message: str
) -> None:
    kept = [value for value in SMALL if not (overrides[0].startswith("model=") and value.startswith("model."))]
    done = measure(tmp_path, *kept, *overrides, cache=small.folder / "cache")
    assert done.code == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "figures.json").exists()


def test_a_traceback_is_shown_when_asked_for(tmp_path: Path) -> None:
    done = measure(tmp_path, *SMALL, "probe.k=0", HYDRA_FULL_ERROR="1")
    assert done.code == 1
    assert "Traceback" in done.stderr


def test_missing_weights_name_themselves_and_three_ways_on(tmp_path: Path) -> None:
    done = measure(tmp_path, "model=clip_vitl14", "reference=naive_bayes", "tracking=none")
    last = done.stderr.strip().splitlines()[-1]
    assert done.code == 1
    for part in ("ViT-L-14", "openai", "model.weights=PATH", "model.weights=random"):
        assert part in last


def user_images(folder: Path, count: int = 24) -> pl.DataFrame:
    """A user's own folder: two classes, 48 by 40 pixels, a box in the left upper corner."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        name = f"{index:03d}.jpg"
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / name)
        rows.append(
            {
                "path": name,
                "label": "ab"[index % 2],
                "origin": "train" if index < count * 3 // 4 else "val",
                "boxes": [[1, 1, 15, 15]],
                "tags": ["grass" if index % 4 < 2 else "sky"],
            }
        )
    return pl.DataFrame(rows)


OWN = (
    "dataset=manifest",
    "split.target=3",
    "split.heldout=2",
    "split.public=4",
    "split.unseen=3",
    "probe.k=4",
    "scoring.resamples=100",
    "model=efficientnet_lite0",
    "model.arch=test_resnet.r160_in1k",
    "model.weights=random",
    "tracking=none",
    "reference=class_prior",
)


def own_run(folder: Path, rows: pl.DataFrame, *more: str) -> Finished:
    rows.write_parquet(folder / "images.parquet")
    return measure(folder / "run", *OWN, f"dataset.path={folder / 'images.parquet'}", *more)


def test_a_users_own_images_are_measured_and_random_weights_are_labelled_everywhere(tmp_path: Path) -> None:
    done = own_run(tmp_path, user_images(tmp_path))
    assert done.code == 0, done.stderr
    assert done.figures()["encoder"]["random"] is True
    assert done.figures()["verdict"].startswith("Nothing is measured")
    assert "random" in done.stdout
    assert "random" in (done.folder / "report.html").read_text()


def test_a_broken_jpeg_is_excluded_counted_and_named(tmp_path: Path) -> None:
    rows = user_images(tmp_path)
    clean = own_run(tmp_path, rows)
    victim = clean.scores().filter(role="target")["id"][0]
    # Cut in the middle: the header still tells the size, so only decoding finds out.
    content = (tmp_path / victim).read_bytes()
    (tmp_path / victim).write_bytes(content[: len(content) // 2])
    done = own_run(tmp_path, rows)
    assert done.code == 0, done.stderr
    assert done.scores().filter(id=victim)["status"].to_list() == ["unreadable"]
    assert done.figures()["counts"]["target"] == {
        "rows": 6, "used": 5, "excluded": 1, "by_status": {"ok": 5, "unreadable": 1},
    }  # fmt: skip
    assert any(victim in problem for problem in done.figures()["problems"])


def test_a_box_outside_the_image_is_excluded_and_counted(tmp_path: Path) -> None:
    rows = user_images(tmp_path).with_row_index()
    outside = pl.lit([[1, 1, 99, 15]])
    rows = rows.with_columns(boxes=pl.when(pl.col("index") < 18).then(outside).otherwise("boxes")).drop("index")
    done = own_run(tmp_path, rows)
    assert done.code == 1
    assert "no target row can be used (6 box_outside)" in done.stderr
    one = user_images(tmp_path).with_columns(
        boxes=pl.when(pl.col("path") == "000.jpg").then(outside).otherwise("boxes")
    )
    done = own_run(tmp_path, one, "split.target=8", "split.heldout=0", "split.public=1", "probe.k=1", "split.unseen=1")
    assert done.figures()["counts"]["target"]["by_status"] == {"box_outside": 1, "ok": 15}


def test_a_class_without_public_images_is_refused(tmp_path: Path) -> None:
    done = own_run(tmp_path, user_images(tmp_path), "split.public=0")
    assert done.code == 1
    assert "public" in done.stderr
    assert "split." in done.stderr


def test_a_class_whose_public_image_does_not_decode_is_refused(tmp_path: Path) -> None:
    rows = user_images(tmp_path)
    rows.write_parquet(tmp_path / "images.parquet")
    split = PerClassSplit(target=3, heldout=2, shared=0, public=1, unseen=3, min_side_px=8)
    roles = split.assign(ManifestFile(tmp_path / "images.parquet").manifest().rows, seed=0)
    (victim,) = roles.filter(role="public", label="a")["id"]
    content = (tmp_path / victim).read_bytes()
    (tmp_path / victim).write_bytes(content[: len(content) // 2])
    done = own_run(tmp_path, rows, "split.public=1", "probe.k=1")
    assert done.code == 1
    assert "Traceback" not in done.stderr
    assert "class a has no usable public image" in done.stderr


def test_duplicate_ids_and_missing_columns_are_refused(tmp_path: Path) -> None:
    rows = user_images(tmp_path)
    done = own_run(tmp_path, pl.concat([rows, rows.head(1)]))
    assert done.code == 1
    assert "000.jpg" in done.stderr
    done = own_run(tmp_path, rows.drop("label"))
    assert done.code == 1
    assert "label" in done.stderr


def test_no_boxes_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "train" / "n01" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n01\n")
    (folder / "words.txt").write_text("n01\tthing\n")
    Image.new("RGB", (64, 64)).save(folder / "train" / "n01" / "images" / "n01_0.JPEG")
    done = measure(
        tmp_path / "run", "dataset=tiny_imagenet", f"dataset.root={tmp_path}", "split=tiny_imagenet", *OWN[7:]
    )
    assert done.code == 1
    assert "boxes" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_image_in_two_roles_is_noted_and_taken_out_on_request(tmp_path: Path) -> None:
    rows = user_images(tmp_path)
    first = (tmp_path / "000.jpg").read_bytes()
    for name in rows["path"][::6]:
        (tmp_path / name).write_bytes(first)
    done = own_run(tmp_path, rows)
    assert any(note.startswith("The same image in two roles") for note in done.figures()["notes"])
    assert done.figures()["leaks"]["excluded"] == 0
    pairs = pl.read_parquet(done.folder / "leaks.parquet")
    assert set(pairs["kind"]) == {"exact"}
    assert set(pairs["id"]) | set(pairs["other_id"]) <= set(rows["path"][::6])
    without = own_run(tmp_path, rows, "leaks=exclude")
    assert without.code == 0, without.stderr
    figures = without.figures()
    leaked = sum(count["by_status"].get("leaked", 0) for count in figures["counts"].values())
    assert leaked == figures["leaks"]["excluded"] > 0
    measured = without.scores().filter(pl.col("status") == "ok")
    still = pairs.filter(
        pl.col("id").is_in(measured["id"].implode()), pl.col("other_id").is_in(measured["id"].implode())
    )
    assert not len(still)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit.r160_in1k").state_dict(), tmp_path / "vit.safetensors")
    done = own_run(tmp_path, user_images(tmp_path), f"model.weights={tmp_path / 'vit.safetensors'}")
    assert done.code == 1
    assert "vit.safetensors" in done.stderr
    assert "test_resnet" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_large_model_with_random_weights_runs_through_on_a_handful_of_images(tmp_path: Path) -> None:
    user_images(tmp_path, 16).write_parquet(tmp_path / "images.parquet")
    kept = [value for value in OWN if not value.startswith(("model", "split", "probe", "reference"))]
    few = [
        "split.target=1",
        "split.heldout=2",
        "split.public=2",
        "split.unseen=1",
        "probe.k=2",
        "reference=naive_bayes",
    ]
    chosen = ["model=clip_vitl14", "model.weights=random", f"dataset.path={tmp_path / 'images.parquet'}"]
    done = measure(tmp_path / "run", *kept, *few, *chosen)
    assert done.code == 0, done.stderr
    assert done.figures()["encoder"]["random"] is True


@pytest.mark.slow
def test_a_sweep_over_epochs_trains_once_and_is_compared(tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        "model.recipe.epochs=2",
        "training.checkpoint_every=1",
        "reference=class_prior",
        "utility=none",
    ]
    command = [sys.executable, "-m", "dejavu_exp", "experiment=epochs", "hydra.sweep.dir=sweep", "model.epoch=1,2"]
    settings = {**os.environ, "DEJAVU_CACHE": str(tmp_path / "cache")}
    subprocess.run([*command, *overrides], cwd=tmp_path, env=settings, check=True, capture_output=True, timeout=300)
    (trained,) = (tmp_path / "cache" / "trained").iterdir()
    assert sorted(path.name for path in trained.glob("epoch-*")) == ["epoch-0001", "epoch-0002"]
    compare = [sys.executable, "-m", "dejavu_exp.compare", "sweep", "--out", "compared"]
    subprocess.run(compare, cwd=tmp_path, check=True, capture_output=True, timeout=100)
    table = pl.read_parquet(tmp_path / "compared" / "comparison.parquet")
    assert sorted(table["epoch"].unique()) == [1, 2]
    assert "model.epoch" in (tmp_path / "compared" / "comparison.html").read_text()
