"""The vision-language test on the embedded pairs, whole, against the planted truth."""

from typing import Any

import polars as pl
import pytest
from conftest import Finished, measure

pytestmark = pytest.mark.slow

ONE_MODEL, TWO_MODEL = "text_embedding", "two_model"


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = measure(tmp_path_factory.mktemp("captions"), "experiment=captions", timeout=900)
    assert done.code == 0, done.stderr
    return done


def references(run: Finished) -> Any:
    return run.figures()["references"]


@pytest.mark.parametrize("name", [ONE_MODEL, TWO_MODEL])
def test_pairs_with_an_emblem_that_no_caption_tells_are_found(captions: Finished, name: str) -> None:
    auroc = references(captions)[name]["planted"]["auroc"]
    assert auroc["value"] >= 0.9
    assert auroc["n_used"] == 240


@pytest.mark.parametrize("name", [ONE_MODEL, TWO_MODEL])
def test_unseen_pairs_show_no_gap_and_target_pairs_do(captions: Finished, name: str) -> None:
    found = references(captions)[name]
    unseen = found["roles"]["unseen"]["all"]["prg"]
    assert unseen["low"] <= 0 <= unseen["high"]
    assert found["corrected"]["all"]["prg"]["low"] > 0


def test_the_verdict_says_so(captions: Finished) -> None:
    assert captions.figures()["headline"] == ONE_MODEL
    assert captions.figures()["verdict"].startswith("Memorization is shown")


def test_what_captions_imply_is_correlated_and_what_they_leave_out_is_memorized(captions: Finished) -> None:
    groups = {group["planted"]: group for group in references(captions)[ONE_MODEL]["planted"]["groups"]}
    assert groups[False]["correlated"] > 0.95
    assert groups[True]["memorized"] > 0.7
    objects = references(captions)[ONE_MODEL]["per_object"]
    gained = [found["object"] for found in objects if found["gap"]["value"] == 1]
    assert len(gained) > 20
    assert all(" " in name for name in gained), "only emblems have names of two words"


def test_both_references_call_the_same_pairs_memorized(captions: Finished) -> None:
    (pair,) = [
        pair
        for pair in captions.figures()["agreement"]["pairs"]
        if {pair["first"], pair["second"]} == {ONE_MODEL, TWO_MODEL}
    ]
    assert pair["kappa_memorized"]["low"] > 0.5
    assert pair["corrected"]["100"]["low"] <= 0 <= pair["corrected"]["100"]["high"]


def test_the_report_shows_the_pairs(captions: Finished) -> None:
    page = (captions.folder / "report.html").read_text()
    best = captions.scores().filter(
        pl.col("reference") == ONE_MODEL, pl.col("role") == "target", pl.col("quadrant") == "memorized"
    )
    first = best.sort(["memorization_score", "id"], descending=[True, False])["id"][0]
    assert first in page


def test_text_randomization_lowers_the_gap(captions: Finished, tmp_path: Any) -> None:
    masked = measure(
        tmp_path,
        "experiment=captions",
        f"reference={ONE_MODEL}",
        "model.recipe.masking_rate=0.9",
        "utility=none",
        cache=captions.folder / "cache",
        timeout=900,
    )
    assert masked.code == 0, masked.stderr
    plain, mitigated = (references(run)[ONE_MODEL]["roles"]["target"]["all"]["prg"] for run in (captions, masked))
    assert mitigated["value"] < plain["value"] - 0.02
