"""Real images and weights, where they are: the folder named by DEJAVU_REAL_DATA."""

import os
from pathlib import Path

import polars as pl
import pytest
from conftest import measure

COCO = Path(__file__).parents[1] / "conf" / "tagger" / "vocabulary" / "coco.txt"
FOLDER = Path(os.environ.get("DEJAVU_REAL_DATA", ""))

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("DEJAVU_REAL_DATA"), reason="DEJAVU_REAL_DATA names no folder"),
]


def test_counts_add_up_and_a_better_encoder_alone_is_no_memorization(tmp_path: Path) -> None:
    """A strong encoder, its own classes as tags, few images: the raw gap is open, the verdict honest."""
    done = measure(
        tmp_path,
        "dataset=tiny_imagenet",
        f"dataset.root={FOLDER / 'tiny_imagenet_20.zip'}",
        "split=tiny_imagenet",
        "split.target=8",
        "split.heldout=8",
        "split.public=20",
        "split.unseen=8",
        "probe.k=30",
        "model=efficientnet_lite0",
        f"model.weights={FOLDER / 'tf_efficientnet_lite0.safetensors'}",
        "reference=naive_bayes",
        "tagger=timm_classifier",
        "tracking=none",
        timeout=600,
    )
    assert done.code == 0, done.stderr
    figures, scores = done.figures(), done.scores()
    for role, asked in (("target", 160), ("unseen", 160), ("heldout", 160), ("public", 400)):
        counts = figures["counts"][role]
        assert counts["rows"] == counts["used"] + counts["excluded"] == sum(counts["by_status"].values()) == asked
    for role in ("target", "unseen"):
        gap = figures["references"]["naive_bayes"]["roles"][role]["top1"]["100"]["gap"]
        assert gap["n_used"] + gap["n_excluded"] == len(scores.filter(pl.col("role") == role)) == 160
    # Chance is 5 %: real embeddings of real backgrounds say more.
    assert figures["references"]["naive_bayes"]["roles"]["target"]["top1"]["100"]["target"]["low"] > 0.1
    assert figures["verdict"].startswith("No memorization is shown")
    assert figures["encoder"]["random"] is False
    assert any("tagger is the encoder under test" in note for note in figures["notes"])


def test_coco_captions_are_measured_with_a_text_encoder(tmp_path: Path) -> None:
    """As published, in its zip; random weights, so that nothing but the counts means anything."""
    done = measure(
        tmp_path,
        "experiment=coco",
        f"dataset.root={FOLDER / 'coco_mini.zip'}",
        "model=clip_vitb32",
        "model.weights=random",
        "reference=[text_minilm,class_prior]",
        "utility=none",
        "tracking=none",
        timeout=600,
    )
    assert done.code == 0, done.stderr
    figures, scores = done.figures(), done.scores()
    counts = figures["counts"]
    assert (counts["target"]["rows"], counts["public"]["rows"]) == (80, 79)
    assert counts["target"]["used"] == 80 - counts["target"]["by_status"].get("no_objects", 0)
    assert "RANDOM WEIGHTS" in done.stdout
    minilm = figures["references"]["text_minilm"]["roles"]["target"]["all"]
    # A text encoder knows what goes together.
    assert minilm["reference_recall"]["low"] > minilm["target_recall"]["high"]
    assert set(scores["objects"].explode().drop_nulls()) <= set(COCO.read_text().splitlines())


def test_flickr_pairs_get_their_objects_from_a_tagger(tmp_path: Path) -> None:
    done = measure(
        tmp_path,
        "experiment=flickr8k",
        f"dataset.root={FOLDER / 'flickr8k_1000.zip'}",
        f"tagger.encoder.weights={FOLDER / 'tf_efficientnet_lite0.safetensors'}",
        "split.target=48",
        "split.public=60",
        "split.unseen=24",
        "model.recipe.epochs=1",
        "model.recipe.batch_size=16",
        "tracking=none",
        timeout=600,
    )
    assert done.code == 0, done.stderr
    counts = done.figures()["counts"]
    for role, rows in (("target", 48), ("public", 60), ("unseen", 24)):
        assert counts[role]["rows"] == counts[role]["used"] + counts[role]["excluded"] == rows
        assert counts[role]["used"] > rows / 2
    assert "corrected" in done.figures()["references"]["text_minilm"]
