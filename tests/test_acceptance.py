"""The default run, and all references side by side, against the planted truth."""

import numpy as np
import polars as pl
import pytest
from conftest import Finished, measure

from dejavu_exp.datasets.shapes import Shapes

pytestmark = pytest.mark.slow


def test_the_run_folder_holds_everything(default_run: Finished) -> None:
    names = {path.name for path in default_run.folder.iterdir()}
    assert {"scores.parquet", "figures.json", "report.html", "config.yaml"} <= names


def test_all_three_references_are_measured(default_run: Finished) -> None:
    assert set(default_run.figures()["references"]) == {"naive_bayes", "class_prior", "label_shuffle"}
    assert default_run.figures()["headline"] == "naive_bayes"


def test_the_score_finds_the_planted_rows(default_run: Finished) -> None:
    auroc = default_run.figures()["references"]["naive_bayes"]["planted"]["auroc"]
    assert auroc["value"] >= 0.95
    assert auroc["n_used"] == 400


def test_unseen_rows_show_no_gap(default_run: Finished) -> None:
    gap = default_run.figures()["references"]["naive_bayes"]["roles"]["unseen"]["top1"]["100"]["gap"]
    assert gap["low"] <= 0 <= gap["high"]
    assert gap["n_used"] + gap["n_excluded"] == 400


def test_the_corrected_gap_shows_memorization_and_the_verdict_says_so(default_run: Finished) -> None:
    figures = default_run.figures()
    assert figures["references"]["naive_bayes"]["corrected_gap"]["top1"]["100"]["low"] > 0
    assert figures["verdict"].startswith("Memorization is shown")


def test_typical_backgrounds_are_correlated_not_memorized(default_run: Finished) -> None:
    groups = default_run.figures()["references"]["naive_bayes"]["planted"]["groups"]
    (typical,) = [group for group in groups if group["background"] == "typical"]
    assert typical["correlated"] > 0.9
    assert typical["memorized"] < 0.1
    (planted,) = [group for group in groups if group["planted"]]
    assert planted["memorized"] > 0.8


def test_every_row_is_in_the_scores_and_counts_add_up(default_run: Finished) -> None:
    scores = default_run.scores()
    counts = default_run.figures()["counts"]
    for name, rows in scores.group_by("reference"):
        for role in ("target", "unseen"):
            of_role = rows.filter(pl.col("role") == role)
            assert len(of_role) == counts[role]["rows"] == of_role["id"].n_unique(), name
            assert (of_role["status"] == "ok").sum() == counts[role]["used"]
    for count in counts.values():
        assert count["used"] + count["excluded"] == count["rows"]


@pytest.fixture(scope="module")
def side_by_side(default_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three references and the two-model test in one run; the encoder under test is that of the default run."""
    folder = tmp_path_factory.mktemp("side_by_side")
    done = measure(folder, "experiment=side_by_side", cache=default_run.folder / "cache", timeout=900)
    assert done.code == 0, done.stderr
    return done


def test_every_reference_finds_the_planted_rows(side_by_side: Finished) -> None:
    references = side_by_side.figures()["references"]
    assert set(references) == {"two_model", "crop_classifier", "naive_bayes", "naive_bayes_top2"}
    for name, found in references.items():
        assert found["planted"]["auroc"]["value"] >= 0.9, name
        assert found["planted"]["auroc"]["n_used"] == 400


def test_the_cheap_references_give_the_gap_of_the_two_model_test(side_by_side: Finished) -> None:
    pairs = side_by_side.figures()["agreement"]["pairs"]
    for pair in pairs[:3]:
        assert pair["first"] == "two_model"
        for kind in ("target", "corrected"):
            difference = pair[kind]["100"]
            assert abs(difference["value"]) <= 0.05, (pair["second"], kind)
            assert difference["low"] <= difference["value"] <= difference["high"]
        shown = f"two_model - {pair['second']}"
        assert shown in " ".join(side_by_side.stdout.split())
    assert "Where the references agree" in (side_by_side.folder / "report.html").read_text()


def test_the_images_that_all_call_correlated_are_the_typical_ones(side_by_side: Finished) -> None:
    listed = pl.read_parquet(side_by_side.folder / "correlated.parquet")
    positions = np.load(side_by_side.folder / "correlated.npy", allow_pickle=False)
    assert positions.tolist() == listed["position"].to_list()
    rows = Shapes().manifest().rows
    background = rows.filter(pl.col("id").is_in(listed["id"].implode()))["background"]
    assert len(listed) > 80
    assert (background == "typical").sum() > 0.9 * len(listed)
    train = rows.filter(pl.col("origin") == "train").sort("label", "path")
    assert train["id"].gather(positions).to_list() == listed["id"].to_list()


def test_training_is_not_repeated_and_its_cost_is_told(side_by_side: Finished) -> None:
    assert "training the encoder" not in side_by_side.stderr
    seconds = side_by_side.figures()["run"]["seconds"]
    assert seconds["references/two_model"] > seconds["references/naive_bayes"]
    assert seconds["encoder"] > 1


STRONG = (
    "dataset.train_per_class=280", "split.shared=100", "reference=[naive_bayes_top1,class_prior]", "utility=none",
    "gallery=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An encoder that was trained on a thousand other images, and on no target row."""
    done = measure(tmp_path_factory.mktemp("strong"), *STRONG, "model.roles=[shared]", timeout=900)
    assert done.code == 0, done.stderr
    return done


def test_knowing_better_than_a_weak_reference_is_not_called_memorization(strong: Finished) -> None:
    for name, found in strong.figures()["references"].items():
        raw, corrected = found["roles"]["target"]["top1"]["100"]["gap"], found["corrected_gap"]["top1"]["100"]
        assert raw["low"] > 0, name
        assert corrected["low"] <= 0 <= corrected["high"], name
        assert found["verdict"].startswith("No memorization is shown"), name


def test_the_same_encoder_trained_further_on_the_target_rows_has_memorized_them(
    strong: Finished, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (weights,) = (strong.folder / "cache").rglob("network.safetensors")
    tuned = ("model.roles=[target]", f"model.network.weights={weights}")
    done = measure(tmp_path_factory.mktemp("tuned"), *STRONG, *tuned, timeout=900)
    assert done.code == 0, done.stderr
    for name, found in done.figures()["references"].items():
        assert found["corrected_gap"]["top1"]["100"]["low"] > 0, name
        assert found["verdict"].startswith("Memorization is shown"), name
