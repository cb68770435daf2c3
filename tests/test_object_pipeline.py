"""The vision-language test from end to end, on few pairs: hostile captions, what is excluded, what is refused."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import Finished, measure
from PIL import Image
from test_detectors import rt_detr

SMALL_PAIRS = (
    "experiment=captions",
    "dataset.train=40",
    "dataset.val=40",
    "dataset.public=60",
    "dataset.common=8",
    "dataset.public_share=1",
    "model.recipe.epochs=2",
    "scoring.resamples=200",
    "tracking=none",
    "utility=none",
)
"""The embedded pairs, few enough for a run in seconds; their figures mean nothing."""
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> \"quoted\" & done"
LONG = "a very long walk " * 600


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("pairs")
    references = "reference=[text_ngrams,text_minilm,two_model,class_prior,label_shuffle]"
    done = measure(folder, *SMALL_PAIRS, references, "references.two_model.directions=both")
    assert done.code == 0, done.stderr
    return done


def test_all_references_answer_the_same_rows(small: Finished) -> None:
    figures, scores = small.figures(), small.scores()
    names = ["text_ngrams", "text_minilm", "two_model", "class_prior", "label_shuffle"]
    assert figures["infers"] == "objects"
    assert scores["reference"].unique(maintain_order=True).to_list() == names
    for name, rows in scores.group_by("reference"):
        for role in ("target", "unseen"):
            of_role = rows.filter(pl.col("role") == role)
            assert len(of_role) == of_role["id"].n_unique() == figures["counts"][role]["rows"] == 40, name
            gap = figures["references"][name[0]]["roles"][role]["all"]["prg"]
            assert gap["n_used"] + gap["n_excluded"] == 40
    assert "both_directions" in figures["references"]["two_model"]
    assert "both_directions" not in figures["references"]["text_ngrams"]


def test_the_encoder_is_the_same_against_every_reference(small: Finished) -> None:
    scores = small.scores().filter(pl.col("role") != "heldout")
    columns = [name for name in scores.columns if name.startswith("target_")]
    first, *others = [
        rows.sort("id").select("id", *columns) for _, rows in scores.group_by("reference", maintain_order=True)
    ]
    assert all(first.equals(other) for other in others)


def test_memorized_less_forgotten_is_the_gap(small: Finished) -> None:
    for found in small.figures()["references"].values():
        shares = found["roles"]["target"]["quadrants"]
        prg = found["roles"]["target"]["all"]["prg"]["value"]
        assert shares["memorized"]["value"] - shares["forgotten"]["value"] == pytest.approx(prg, abs=1e-12)


def test_the_agreement_compares_the_gaps_that_are_told(small: Finished) -> None:
    figures = small.figures()
    gaps = {name: found["roles"]["target"]["all"]["gap"]["value"] for name, found in figures["references"].items()}
    for pair in figures["agreement"]["pairs"]:
        difference = gaps[pair["first"]] - gaps[pair["second"]]
        assert pair["target"]["100"]["value"] == pytest.approx(difference, abs=1e-12)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Pairs of one's own in a file, with everything that goes wrong."""
    folder = tmp_path_factory.mktemp("listed")
    rows: list[dict[str, Any]] = []
    for number in range(48):
        name = f"{number:02d}.png"
        Image.new("RGB", (40, 30), (number * 5, 255 - number * 5, 90)).save(folder / name)
        origin = ("train", "public")[number % 2]
        rows.append({"path": name, "origin": origin, "captions": [f"a picture of number {number}"]})
        rows[-1]["objects"] = ["dog", "ball"] if number % 3 else ["cat"]
    changes: dict[int, dict[str, Any]] = {
        0: {"captions": [EVIL]},
        2: {"captions": [LONG]},
        4: {"objects": []},
        6: {"objects": None},
        8: {"captions": []},
        10: {"captions": ["", "   "]},
        12: {"captions": ["a caption whose image is gone"], "path": "gone.png"},
        14: {"objects": ["unicorn"]},
        16: {"captions": ["naïve\ncafé \N{SNOWMAN}", "second caption"]},
        1: {"objects": []},
        3: {"objects": None},
    }
    for number, change in changes.items():
        rows[number] |= change
    pl.DataFrame(rows, schema_overrides={"objects": pl.List(pl.String)}).write_parquet(folder / "pairs.parquet")
    (folder / "broken.png").write_bytes(b"no image")
    done = measure(
        folder / "run",
        "experiment=captions",
        "dataset=manifest",
        f"dataset.path={folder / 'pairs.parquet'}",
        "split.target=train",
        "split.heldout=null",
        "split.shared=null",
        "split.public=public",
        "split.unseen=null",
        "model.recipe.epochs=1",
        "model.recipe.batch_size=16",
        "probe.k=5",
        "probe.query.choose=all",
        "reference=[text_ngrams]",
        "scoring.resamples=200",
        "tracking=none",
    )
    assert done.code == 0, done.stderr
    return done


def test_every_excluded_row_keeps_its_reason(listed: Finished) -> None:
    statuses = dict(listed.scores().select("id", "status").iter_rows())
    expected = {
        "00.png": "ok",
        "02.png": "ok",
        "04.png": "no_objects",
        "06.png": "no_annotation",
        "08.png": "no_caption",
        "10.png": "no_caption",
        "gone.png": "unreadable",
        "14.png": "ok",
        "16.png": "ok",
    }
    assert {name: statuses[name] for name in expected} == expected
    counts = listed.figures()["counts"]
    assert counts["target"]["by_status"] == {
        "no_annotation": 1,
        "no_caption": 2,
        "no_objects": 1,
        "ok": 19,
        "unreadable": 1,
    }
    # A public image in which nothing is answers; one of which nothing is known does not.
    assert counts["public"]["by_status"] == {"no_annotation": 1, "ok": 23}


def test_an_object_that_no_public_row_carries_counts_in_the_recall_and_is_told(listed: Finished) -> None:
    (row,) = listed.scores().filter(pl.col("id") == "14.png").iter_rows(named=True)
    assert row["objects"] == ["unicorn"]
    assert row["target_recall_all"] == 0
    assert any("unicorn" in note for note in listed.figures()["notes"])


def test_without_unseen_rows_the_verdict_says_what_it_may_contain(listed: Finished) -> None:
    assert listed.figures()["verdict"].startswith("Memorization is not separated from knowledge")


def test_captions_cannot_break_the_report(listed: Finished) -> None:
    page = (listed.folder / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page


def refused(tmp_path: Path, *overrides: str) -> str:
    done = measure(tmp_path, *SMALL_PAIRS, *overrides)
    assert done.code == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reference=naive_bayes"], "references.naive_bayes infers the label from a region of an image"),
        (["model=shapes_resnet"], "model is a TrainedEncoder, which cannot embed texts"),
        (["tagger=dataset_tags", "probe.k=61"], "probe.k=61 is more than the bank holds"),
        (["scoring.predictions=[]"], "scoring.predictions=[]"),
        (["tagger=timm_classifier", "tagger.encoder.weights=random", "tagger.min_score=1"], "no public row carries"),
        (["reference=text_minilm", "references.text_minilm.encoder.model=/nowhere"], "/nowhere"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in refused(tmp_path, *overrides)


def test_an_annotation_pickle_with_a_class_in_it_is_refused(tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "annotations.pkl"
    path.write_bytes(pickle.dumps([[1, 2], [Path("/")]]))
    message = refused(tmp_path / "run", "tagger=authors_annotations", f"tagger.path={path}")
    assert "annotations.pkl" in message
    assert "pathlib" in message


def test_annotation_pickles_of_lists_and_arrays_are_read(tmp_path: Path) -> None:
    import pickle

    import numpy as np

    path = tmp_path / "annotations.pkl"
    # The rows that the data set has, sorted by id: 40 of each measured origin, 8 shared and 60 public ones.
    path.write_bytes(pickle.dumps([np.array([number % 7, 3]) for number in range(40 + 40 + 8 + 60 + 40)]))
    (tmp_path / "names.txt").write_text("\n".join(["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]))
    done = measure(
        tmp_path / "run",
        *SMALL_PAIRS,
        "reference=text_ngrams",
        "tagger=authors_annotations",
        f"tagger.path={path}",
        f"tagger.names={tmp_path / 'names.txt'}",
    )
    assert done.code == 0, done.stderr
    objects = {name for names in done.scores()["objects"] for name in names}
    assert objects == {"ant", "bee", "cat", "dog", "elk", "fox", "gnu"}


def test_two_processes_train_what_one_trains(small: Finished, tmp_path: Path) -> None:
    """The caches are apart, so both train; the weights differ in the last digits, the objects named hardly ever."""
    done = measure(tmp_path, *SMALL_PAIRS, "reference=text_ngrams", "training.devices=2")
    assert done.code == 0, done.stderr
    one, two = (
        run.scores().filter(pl.col("reference") == "text_ngrams").sort("id").select("id", "status", "target_found")
        for run in (small, done)
    )
    assert one["id"].equals(two["id"])
    assert (one["target_found"] == two["target_found"]).sum() >= 0.97 * len(one)
    told = [json.loads((run.folder / "figures.json").read_text()) for run in (small, done)]
    gaps = [found["references"]["text_ngrams"]["roles"]["target"]["all"]["prg"]["value"] for found in told]
    assert gaps[0] == pytest.approx(gaps[1], abs=0.051)


def test_a_detector_from_a_local_folder_says_what_is_in_the_images(tmp_path: Path) -> None:
    rt_detr(tmp_path / "detector")
    done = measure(
        tmp_path / "run",
        *SMALL_PAIRS,
        "reference=text_ngrams",
        "tagger=rtdetr",
        f"tagger.encoder.model={tmp_path / 'detector'}",
        "tagger.min_score=0.6",
    )
    assert done.code == 0, done.stderr
    objects = {name for names in done.scores()["objects"].drop_nulls() for name in names}
    assert objects
    assert objects <= {"cat", "dog", "bus"}
    counts = done.figures()["counts"]["target"]
    assert counts["used"] + counts["by_status"].get("no_objects", 0) == counts["rows"] == 40
