"""Real images and weights, where they are: the folder named by DEJAVU_REAL_DATA."""

import os
from pathlib import Path

import polars as pl
import pytest
from conftest import measure

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
