"""What a reader sees of a run that infers objects: pairs, tables, page, terminal, W&B and comparison."""

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import wandb
import yaml
from rich.console import Console
from test_compare import planted
from test_report import HOSTILE, Page, estimate, picture
from test_tracking import logged_out, summary, tables

from dejavu_exp import agreement, compare, evidence, neighbours, tracking
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.report import compared, gallery, html, pairs, terminal, wording
from dejavu_exp.report.gallery import LabelItem, NearImage, PairItem, Seen
from dejavu_exp.scoring import ObjectInference
from dejavu_exp.scoring.objects import OPTIMISTIC_WARNING
from dejavu_exp.tables import FIGURES_VERSION, MANIFEST, OBJECT_SCORES, VIEWS
from dejavu_exp.tracking import WandbTracking

LONG = f"{HOSTILE}\"'&amp; " + "x" * 10_000
VOCABULARY = tuple(sorted(["bird", "boat", "cat", "dog", HOSTILE, "tree"]))
_ = logged_out  # an autouse fixture: no test here logs in


def answers(ids: list[str], rng: np.random.Generator, rate: float, truth: list[list[str]]) -> evidence.Evidence:
    """Evidence that holds each true object with probability `rate`, and one other."""
    found = np.zeros((len(ids), len(VOCABULARY)), dtype=np.float32)
    for row, objects in enumerate(truth):
        for name in objects:
            found[row, VOCABULARY.index(name)] = rng.random() * (rng.random() < rate)
        found[row, rng.integers(len(VOCABULARY))] += 0.1
    return evidence.from_probabilities(ids, VOCABULARY, found, distance=rng.random(len(ids)))


def scored(names: tuple[str, ...], scoring: ObjectInference, n_unseen: int) -> tuple[pl.DataFrame, dict[str, Any]]:
    rng = np.random.default_rng(0)
    count = 80 + n_unseen
    ids = [f"{row:03d}{HOSTILE}" for row in range(count)]
    truth = [list(rng.choice(VOCABULARY, rng.integers(1, 4), replace=False)) for _ in ids]
    rows = pl.DataFrame(
        {
            "id": ids,
            "role": ["target"] * 80 + ["unseen"] * n_unseen,
            "label": pl.Series([None] * count, dtype=pl.String),
            "status": ["no_caption", *["ok"] * (count - 1)],
            "truth": truth,
            "planted_repeats": [8 if row % 9 == 0 else 1 for row in range(count)],
        }
    )
    target = answers(ids, rng, 0.8, truth)
    tables, figures = [], {}
    for name in names:
        tables.append(scoring.score(rows, target, answers(ids, rng, 0.4, truth), name))
        figures[name] = scoring.figures(tables[-1], rows, 0)
    return pl.concat(tables), figures


def run(
    names: tuple[str, ...] = ("text_embedding", f"two{HOSTILE}"), n_unseen: int = 60, **options: Any
) -> tuple[dict[str, Any], pl.DataFrame]:
    """Figures and scores as a run of the whole instrument has them."""
    scoring = ObjectInference(resamples=100, **options)
    scores, found = scored(names, scoring, n_unseen)
    for name, figures in found.items():
        figures |= {"description": f"a reference {HOSTILE}", "verdict": scoring.verdict(figures, name, random=False)}
    used = {"rows": 81, "used": 79, "excluded": 2, "by_status": {"ok": 79, "no_caption": 1, "no_objects": 1}}
    empty = {"rows": 0, "used": 0, "excluded": 0, "by_status": {}}
    facts = {
        **planted(references=found, scoring__predictions=list(scoring.predictions)),
        "title": f"a CLIP {HOSTILE}",
        "verdict": found[names[0]]["verdict"],
        "headline": names[0],
        "infers": "objects",
        "notes": [f"a note {HOSTILE}"],
        "problems": ["a file could not be read"],
        "probe": {
            "view": "caption", "bank_view": "full", "k": 10, "metric": "cosine", "ties": "nearest", "bank": 50,
            "bank_excluded": 0, "tied": 0.1,
        },
        "counts": {"target": used, "unseen": used, "heldout": empty, "public": empty, "shared": empty},
        "agreement": agreement.compare_references(scores, scoring.fractions, 0.95, 100, 0, scoring.reference_value()),
        "utility": [{"measure": "retrieval at 1", "detail": "caption to image", "estimate": estimate(0.777)}],
    }  # fmt: skip
    facts["run"] |= {"versions": {}, "commit": None}
    return facts, scores


@pytest.fixture(scope="module")
def finished() -> tuple[dict[str, Any], pl.DataFrame]:
    return run()


def pair(**changed: Any) -> PairItem:
    near = NearImage(picture(), ("cat", HOSTILE), (LONG,), 0.25, same=True)
    return PairItem(
        **{
            "id": f"pair {HOSTILE}", "score": 0.75, "target_only": (HOSTILE,), "both": ("cat",),
            "reference_only": ("dog",), "missed": ("tree",), "seen": Seen(picture(), (LONG, "a short one")),
            "neighbours": (near, near), "reference_neighbours": (NearImage(None, (), (), None, same=False),),
            **changed,
        }
    )  # fmt: skip


def text_of(page: Page) -> str:
    return " ".join(" ".join(page.texts).split())


def estimates(value: Any) -> Iterator[dict[str, Any]]:
    """All estimates inside."""
    if isinstance(value, dict) and "n_used" in value:
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from estimates(part)


def test_every_figure_of_the_run_is_on_the_page(finished: tuple[dict[str, Any], pl.DataFrame]) -> None:
    facts, scores = finished
    text = text_of(Page(html.render(facts, scores, [pair()])))
    for found in facts["references"].values():
        assert found["verdict"] in text
        shown = copy.deepcopy({**found["roles"], "corrected": found["corrected"]})
        for role in ("target", "unseen"):
            score = shown[role].pop("memorization_score")
            assert role == "unseen" or f"rows {score['value']:.3f} [{score['low']:.3f}" in text
        del shown["unseen"]["fine_grained"]  # of these the recall gaps are told, see below
        every = [
            *estimates(shown),
            *(row[key] for row in found["per_object"] for key in ("target", "reference", "gap")),
        ]
        selected = found["roles"]["unseen"]["fine_grained"].values()
        cells = [cell["recall_gap"] for cells in selected for cell in cells.values()]
        assert len(every) > 100
        assert [one for one in map(wording.percent, every + cells) if one not in text] == []
        assert f"AUROC {found['planted']['auroc']['value']:.3f}" in text
    for said in ("1 no_caption, 1 no_objects", "77.7 [67.7, 87.7]", "a file could not be read", "PPG is the same"):
        assert said in text


def test_what_selects_by_what_it_reports_is_marked(finished: tuple[dict[str, Any], pl.DataFrame]) -> None:
    facts, scores = finished
    content = html.render(facts, scores, [])
    assert OPTIMISTIC_WARNING in text_of(Page(content))
    cells = [cell.split("</td>")[0] for cell in content.split("<td>")]
    assert {cell.split(" <")[0] for cell in cells if '<span class="tag">optimistic' in cell} == {
        "object_gap",
        "correct_objects",
    }


def test_captions_are_shown_whole_and_run_nothing(finished: tuple[dict[str, Any], pl.DataFrame]) -> None:
    facts, scores = finished
    content = html.render(facts, scores, [pair()])
    page = Page(content)
    assert "script" not in page.tags
    assert all(link.startswith("data:image/") for link in page.links)
    assert page.tags.count("img") == len(page.descriptions)
    assert all(page.descriptions)
    # The caption of the pair and of each neighbour: short in the summary, whole inside.
    assert page.texts.count(LONG) == 3
    assert f"{LONG[:200]}… " in page.texts
    assert "a short one" in text_of(page)
    assert "cannot be read" in text_of(page)
    for objects in ("found by the encoder only", "by both", "by text_embedding only", "by neither"):
        assert f"{objects}:" in text_of(page)
    assert content.count('class="same"') == 2


def test_a_pair_asked_by_a_crop_shows_the_crop(finished: tuple[dict[str, Any], pl.DataFrame]) -> None:
    facts, scores = finished
    content = html.render(facts, scores, [pair(seen=Seen(picture(), (), picture(), (0.1, 0.2, 0.6, 0.8)))])
    assert "left:10.0%;top:20.0%;width:50.0%;height:60" in content
    assert "by neither:" in text_of(Page(content))


def test_without_unseen_rows_and_with_one_prediction(tmp_path: Path) -> None:
    facts, scores = run(("prior",), n_unseen=0, predictions=("top1",))
    text = text_of(Page(html.render(facts, scores, [])))
    assert "nothing to compare it with" in text
    assert [(row["predicted"], row["corrected PRG"]) for row in terminal.rows_of(facts)] == [("1 object", "–")]
    stream = io.StringIO()
    terminal.show(facts, tmp_path, Console(file=stream, width=80))
    assert "not separated from knowledge" in " ".join(stream.getvalue().split())


def test_the_authors_figures_are_told(tmp_path: Path) -> None:
    facts, scores = run(("prior",), predictions=("all",), compat="authors")
    value = facts["references"]["prior"]["roles"]["target"]["all"]["authors"]["tgt_auc"]
    assert f"tgt_auc {value:.3f}" in text_of(Page(html.render(facts, scores, [])))


def test_the_same_figures_give_the_same_bytes(finished: tuple[dict[str, Any], pl.DataFrame]) -> None:
    facts, scores = finished
    assert html.render(facts, scores, [pair()]) == html.render(facts, scores, [pair()])


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_the_terminal_cuts_no_figure_short(
    tmp_path: Path, width: int, finished: tuple[dict[str, Any], pl.DataFrame]
) -> None:
    facts, _ = finished
    stream = io.StringIO()
    terminal.show(facts, tmp_path, Console(file=stream, width=width, force_terminal=True, color_system=None))
    words = stream.getvalue().split()
    for row in terminal.rows_of(facts):
        for column in ("PRG", "PRG, unseen", "corrected PRG"):
            assert set(row[column].split()) <= set(words)
        if width >= 120:
            for column in ("PPG", "AUCG"):
                assert row[column].split()[0] in words
    assert max(map(len, stream.getvalue().replace(str(tmp_path / "report.html"), "").splitlines())) <= width


def manifest(names: list[str], captions: dict[str, list[str]]) -> Manifest:
    broken = {"p3"}
    store = MemoryStore({f"{name}.jpg": b"no image" if name in broken else picture() for name in names})
    empty = dict.fromkeys(MANIFEST)
    rows = [
        {**empty, "id": name, "path": f"{name}.jpg", "origin": "x", "width": 16, "height": 16, "status": "ok"}
        | {"captions": captions.get(name)}
        for name in names
    ]
    return Manifest("toy", pl.DataFrame(rows, schema=MANIFEST), store)


def views(names: list[str], role: str, **columns: Any) -> pl.DataFrame:
    rows = [{**dict.fromkeys(VIEWS), "id": name, "role": role, "path": f"{name}.jpg", "status": "ok"} for name in names]
    made = {name: pl.Series(name, values, dtype=VIEWS[name]) for name, values in columns.items()}
    return pl.DataFrame(rows, schema=VIEWS).with_columns(**made)


def test_the_gallery_holds_memorized_pairs_with_the_neighbours_of_both() -> None:
    ids = ["c", "a", "b", "d", "e"]
    public = [f"p{place}" for place in range(6)]
    whole = manifest([*ids, *public], {"p0": ["a cat in a tree", "second"], "p1": []})
    row = dict.fromkeys(OBJECT_SCORES) | {"role": "target", "status": "ok", "quadrant": "memorized"}
    sets = {
        "objects": ["cat", "dog", "bird", "boat"],
        "target_found": ["cat", "dog"],
        "reference_found": ["dog", "bird"],
    }
    scores = pl.DataFrame(
        [
            {**row, **sets, "id": "a", "memorization_score": 0.5},
            {**row, **sets, "id": "b", "memorization_score": 0.5},
            {**row, **sets, "id": "c", "memorization_score": 0.9},
            {**row, **sets, "id": "d", "memorization_score": 0.99, "quadrant": "correlated"},
            {**row, **sets, "id": "e", "memorization_score": 0.99, "role": "unseen"},
        ],
        schema=OBJECT_SCORES,
    )
    queries = views(ids, "target", texts=[[f"caption of {name}"] for name in ids])
    bank = views(public, "public", truth=[["cat"], ["dog"], [], ["boat"], ["bird", "cat"], ["tree"]])
    near = neighbours.Neighbours(
        np.array([[5, 4, 3, 2, 1, 0]] * 5), np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]] * 5, dtype=np.float32)
    )
    items = gallery.most_memorized(scores, queries, bank, near, whole, whole.rows, 2, {"c": ["p0", "p1"]})
    assert [item.id for item in items] == ["c", "a"]
    first, second = items
    assert isinstance(first, PairItem)
    assert isinstance(second, PairItem)
    assert (first.target_only, first.both, first.reference_only, first.missed) == (
        ("cat",), ("dog",), ("bird",), ("boat",)
    )  # fmt: skip
    assert first.seen.captions == ("caption of c",)
    assert (first.seen.crop, first.seen.region) == (None, None)
    assert [place.truth for place in first.neighbours] == [("tree",), ("bird", "cat"), ("boat",), (), ("dog",)]
    assert [place.same for place in first.neighbours] == [False, True, False, False, False]
    assert [place.distance for place in first.neighbours] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert first.neighbours[2].image is None  # a file that does not decode must not end a run
    assert [(place.truth, place.captions) for place in first.reference_neighbours] == [
        (("cat",), ("a cat in a tree",)),
        (("dog",), ()),
    ]
    assert second.reference_neighbours == ()
    assert first.told() == "c: cat, 0.90; caption of c"


def test_a_label_run_may_ask_with_captions() -> None:
    whole = manifest(["a", "p0"], {})
    row = {
        "id": "a",
        "role": "target",
        "status": "ok",
        "quadrant": "memorized",
        "memorization_score": 0.5,
        "label": "x",
    }
    row |= {"target_label": "x", "target_probability": 1.0, "reference_label": "y", "reference_probability": 0.0}
    queries = views(["a"], "target", texts=[["words"]])
    bank = views(["p0"], "public", truth=[["x"]])
    near = neighbours.Neighbours(np.array([[0]]), np.zeros((1, 1), np.float32))
    (item,) = gallery.most_memorized(pl.DataFrame([row]), queries, bank, near, whole, whole.rows, 5)
    assert isinstance(item, LabelItem)
    assert (item.seen.captions, item.seen.region) == (("words",), None)
    assert [(place.truth, place.same) for place in item.neighbours] == [(("x",), True)]


def test_evidence_keeps_the_ids_of_the_nearest_bank_rows() -> None:
    near = neighbours.Neighbours(np.array([[2, 0], [1, 2]]), np.zeros((2, 2), np.float32))
    truth = pl.Series([["cat"], [], ["dog"]])
    found = neighbours.infer(["q", "r"], near, truth, ["cat", "dog"], bank_ids=["x", "y", "z"])
    assert found.nearest_by_id() == {"q": ["z", "x"], "r": ["y", "z"]}
    assert found.take(["r"]).nearest_by_id() == {"r": ["y", "z"]}
    assert found.spread_over(["s", "q"]).nearest_by_id() == {"s": [], "q": ["z", "x"]}
    assert neighbours.infer(["q", "r"], near, truth, ["cat", "dog"]).nearest_by_id() == {}


def test_tracking_logs_tables_figures_and_no_caption_unasked(
    tmp_path: Path, finished: tuple[dict[str, Any], pl.DataFrame]
) -> None:
    facts, scores = finished
    WandbTracking(mode="offline").log(facts, scores, tmp_path, [pair()], {})
    logged = tables(tmp_path)
    table = logged["comparison"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["predicted"] for row in rows] == ["all", "top10", "top1"] * 2
    found = facts["references"]["text_embedding"]
    assert rows[1]["corrected_gap_low"] == pytest.approx(found["corrected"]["top10"]["prg"]["low"])
    assert rows[2]["aucg"] == pytest.approx(found["roles"]["target"]["top1"]["aucg"]["value"])
    wandb.teardown()  # what is logged last is written when W&B's process ends
    told = summary(tmp_path)
    assert told["text_embedding/unseen/top10/ppg"] == found["roles"]["unseen"]["top10"]["ppg"]["value"]
    assert told["text_embedding/corrected/all/prg_high"] == found["corrected"]["all"]["prg"]["high"]
    assert len(logged["text_embedding/per_object"]["data"]) == len(found["per_object"])
    fine = logged["text_embedding/fine_grained"]
    assert {row[fine["columns"].index("ranking")] for row in fine["data"]} == set(pairs.RANKINGS)
    assert not list(tmp_path.rglob("*.png"))
    assert LONG[-1000:] not in "".join(path.read_text("latin-1") for path in tmp_path.rglob("*.wandb"))


def test_pairs_are_uploaded_on_request(tmp_path: Path, finished: tuple[dict[str, Any], pl.DataFrame]) -> None:
    facts, scores = finished
    WandbTracking(mode="offline", images=True).log(
        facts, scores, tmp_path, [pair(), pair(seen=Seen(None, ("words",)))], {}
    )
    assert len(list(tmp_path.rglob("media/images/*.png"))) == 1


def write(folder: Path, figures: object) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    (folder / "figures.json").write_text(json.dumps(figures, sort_keys=True))


def object_run(finished: tuple[dict[str, Any], pl.DataFrame], k: int, *predictions: str) -> dict[str, Any]:
    facts = copy.deepcopy(finished[0])
    assert facts["schema"] == FIGURES_VERSION
    facts["run"]["config"] |= {"probe": {"k": k}, "scoring": {"_target_": "ObjectInference"}}
    if predictions:
        facts["run"]["config"]["scoring"]["predictions"] = list(predictions)
    return facts


def test_object_runs_are_compared_by_recall_and_prg(
    tmp_path: Path, finished: tuple[dict[str, Any], pl.DataFrame]
) -> None:
    for k in (5, 10):
        write(tmp_path / str(k), object_run(finished, k))
    result = compare.compare([tmp_path], tmp_path)
    table = result.table.filter(run="5", reference="text_embedding")
    found = finished[0]["references"]["text_embedding"]
    assert table["infers"].to_list() == ["objects"] * 3
    assert table["top"].to_list() == ["all", "top10", "top1"]
    for row in table.iter_rows(named=True):
        cell = found["roles"]["target"][row["top"]]
        assert row["target_accuracy"] == cell["target_recall"]["value"]
        assert row["reference_accuracy_high"] == cell["reference_recall"]["high"]
        assert row["gap"] == cell["prg"]["value"]
        assert row["gap_unseen"] == found["roles"]["unseen"][row["top"]]["prg"]["value"]
        assert row["corrected_gap_low"] == found["corrected"][row["top"]]["prg"]["low"]
        assert row["planted_auroc"] == found["planted"]["auroc"]["value"]
    assert result.widest()["top"].unique().to_list() == ["all"]
    assert {sweep.setting for sweep in compared.sweeps(result)} == {"probe.k"}
    page = (tmp_path / "comparison.html").read_text()
    assert "PRG is the share of rows" in page
    assert "Top-1 accuracy" not in page


def test_the_headline_of_an_object_run_is_its_first_prediction(
    tmp_path: Path, finished: tuple[dict[str, Any], pl.DataFrame]
) -> None:
    write(tmp_path / "1", object_run(finished, 5, "top1", "all", "top10"))
    result = compare.gather([tmp_path])
    assert result.widest()["top"].unique().to_list() == ["top1"]


def test_runs_of_both_kinds_stand_apart(tmp_path: Path, finished: tuple[dict[str, Any], pl.DataFrame]) -> None:
    for k in (5, 10):
        write(tmp_path / f"objects {k}", object_run(finished, k))
        write(tmp_path / f"labels {k}", planted(probe__k=k))
    result = compare.compare([tmp_path], tmp_path)
    kinds = result.kinds()
    assert [kind.table["infers"].unique().to_list() for kind in kinds] == [["label"], ["objects"]]
    for kind in kinds:
        for sweep in compared.sweeps(kind):
            for series in sweep.series:
                assert series.rows["infers"].n_unique() == 1
    text = " ".join((tmp_path / "comparison.html").read_text().split())
    markdown = (tmp_path / "comparison.md").read_text()
    for part in ("Top-1 accuracy at naming", "PRG is the share of rows", compared.TWO_KINDS):
        assert part in text.replace("&#39;", "'")
        assert part in markdown
    stream = io.StringIO()
    compared.show(result, Console(file=stream, width=120))
    assert "Top-1 accuracy" in stream.getvalue()
    assert "mean recall and PRG" in stream.getvalue()


def test_an_unknown_kind_is_left_out_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "good", planted())
    write(tmp_path / "bad", {**planted(seed=1), "infers": "captions"})
    (skipped,) = compare.gather([tmp_path]).skipped
    assert "infers is 'captions'; expected one of label, objects" in skipped.reason


def test_flat_figures_of_an_object_run_are_numbers(finished: tuple[dict[str, Any], pl.DataFrame]) -> None:
    flat = dict(tracking.flat(finished[0]))
    assert all(value is None or isinstance(value, int | float) for value in flat.values())
    assert "text_embedding/target/fine_grained/split_half/10/recall_gap" in flat
