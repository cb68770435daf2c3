"""The report and the terminal: every figure as given, nothing executed, nothing fetched."""

import io
import itertools
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from rich.console import Console

from dejavu_exp import agreement, evidence, report
from dejavu_exp.report import html, plots, terminal, wording
from dejavu_exp.report.gallery import LabelItem, NearImage, Seen
from dejavu_exp.scoring import LabelInference

HOSTILE = "<script>alert('x')</script>"


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(stream, "JPEG")
    return stream.getvalue()


def scored(n_unseen: int) -> tuple[pl.DataFrame, dict[str, Any]]:
    rng = np.random.default_rng(0)
    count = 80 + n_unseen
    labels = [HOSTILE, "b"]
    rows = pl.DataFrame(
        {
            "id": [f"{row:03d}{HOSTILE}" for row in range(count)],
            "role": ["target"] * 80 + ["unseen"] * n_unseen,
            "label": [labels[row % 2] for row in range(count)],
            "status": "ok",
        }
    )
    target, reference = (
        evidence.from_probabilities(rows["id"].to_list(), labels, rng.dirichlet([1, 1], count)) for _ in range(2)
    )
    scoring = LabelInference(resamples=100)
    scores = scoring.score(rows, target, reference, "naive_bayes")
    return scores, scoring.figures(scores, rows, seed=0)


def figures(n_unseen: int = 60, *, random: bool = False) -> tuple[dict[str, Any], pl.DataFrame]:
    scores, found = scored(n_unseen)
    found |= {
        "description": "a reference",
        "verdict": "the verdict of the reference",
        "per_class": [{**row, "name": row["label"]} for row in found["per_class"]],
    }
    empty = {"rows": 0, "used": 0, "excluded": 0, "by_status": {}}
    used = {"rows": 83, "used": 80, "excluded": 3, "by_status": {"ok": 80, "too_small": 3}}
    return {
        "title": f"encoder {HOSTILE}",
        "verdict": "the verdict",
        "headline": "naive_bayes",
        "infers": "label",
        "notes": [f"a note {HOSTILE}"],
        "problems": ["a file could not be read"],
        "encoder": {"description": "an encoder", "weights": "a file", "weights_hash": "abc", "random": random},
        "dataset": {"name": "toy", "rows": 140, "labels": 2},
        "probe": {
            "view": "background", "bank_view": "full", "k": 5, "metric": "l2", "ties": "nearest", "bank": 50,
            "bank_excluded": 0, "tied": 0.1,
        },
        "counts": {"target": used, "unseen": empty, "heldout": empty, "public": empty, "shared": empty},
        "references": {"naive_bayes": found},
        "run": {"created": "now", "seconds": {"data": 1.0}, "versions": {}, "commit": None, "config": {"seed": 0}},
    }, scores  # fmt: skip


def item(**seen: Any) -> LabelItem:
    shown = {"crop": picture(), "region": (0.1, 0.2, 0.6, 0.8), **seen}
    return LabelItem(
        id=HOSTILE,
        label_name=HOSTILE,
        score=0.5,
        target_label="b",
        target_probability=0.9,
        reference_label="b",
        reference_probability=0.1,
        seen=Seen(picture(), **shown),
        neighbours=(NearImage(picture(), (HOSTILE,), (), 1.5, same=True),),
    )


CORRELATED = pl.DataFrame(
    {"id": ["a", "b"], "label": ["x", "y"], "origin": ["train", "train"], "position": [3, 700]},
    schema={"id": pl.String, "label": pl.String, "origin": pl.String, "position": pl.Int64},
)


def compared(n_unseen: int = 60, others: tuple[str, ...] = (f"two{HOSTILE}", "prior")) -> tuple[Any, pl.DataFrame]:
    """Figures of several references, with all that a run of today has."""
    facts, scores = figures(n_unseen)
    rng = np.random.default_rng(1)
    parts = [scores]
    for name in others:
        right = pl.Series(rng.random(len(scores)) < 0.5)
        quadrant = pl.when("target_correct").then(
            pl.when(right).then(pl.lit("correlated")).otherwise(pl.lit("memorized"))
        )
        changed = scores.with_columns(
            reference=pl.lit(name),
            reference_correct=right,
            quadrant=quadrant.otherwise(pl.lit("unassociated")),
            memorization_score=pl.Series(rng.random(len(scores))),
        )
        parts.append(changed)
        facts["references"][name] = {**facts["references"]["naive_bayes"]}
    facts["references"]["naive_bayes"]["both_directions"] = {
        top: {percent: estimate(0.111) for percent in ("100", "20", "5")} for top in ("top1", "top5")
    }
    scores = pl.concat(parts)
    facts["agreement"] = agreement.compare_references(scores, (1.0, 0.2, 0.05), 0.95, 100, 0)
    facts["utility"] = [{"measure": f"k-NN {HOSTILE}", "detail": f"k = 5 {HOSTILE}", "estimate": estimate(0.777)}]
    facts["run"]["seconds"] |= {f"references/{name}": 12.34 for name in facts["references"]}
    return facts, scores


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n_used": 40, "n_excluded": 2}


def without_all_rows(facts: dict[str, Any]) -> dict[str, Any]:
    """As with scoring.fractions=[0.2, 0.05]."""
    for found in facts["references"].values():
        for top in ("top1", "top5"):
            for cells in (*found["roles"].values(), found["corrected_gap"], found.get("both_directions", {})):
                cells.get(top, {}).pop("100", None)
    for pair in facts.get("agreement", {}).get("pairs", []):
        for kind in ("target", "unseen", "corrected"):
            del pair[kind]["100"]
    return facts


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.descriptions: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        self.descriptions += [value or "" for name, value in attributes if name == "alt"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_report_shows_the_figures_and_runs_nothing() -> None:
    facts, scores = figures()
    page = Page(html.render(facts, scores, [item()]))
    text = " ".join(page.texts)
    assert "script" not in page.tags
    assert HOSTILE in text
    assert all(link.startswith("data:image/") for link in page.links)
    for row in terminal.rows_of(facts):
        for value in row.values():
            assert value in text
    found = facts["references"]["naive_bayes"]
    assert wording.percent(found["roles"]["unseen"]["quadrants"]["memorized"]) in text
    assert "3 too_small" in text
    for sentence in ("the verdict", "a file could not be read", "the verdict of the reference"):
        assert sentence in text


def test_without_unseen_rows_the_corrected_gap_is_a_dash() -> None:
    facts, scores = figures(n_unseen=0)
    assert {row["corrected gap"] for row in terminal.rows_of(facts)} == {"–"}
    assert not [text for text in Page(html.render(facts, scores, [])).texts if text.startswith("unseen (n")]


def test_the_gallery_frames_the_crop_and_marks_public_images_of_the_true_label() -> None:
    facts, scores = figures()
    content = html.render(facts, scores, [item()])
    assert "left:10.0%;top:20.0%;width:50.0%;height:60" in content
    assert content.count('class="same"') == 1


def test_random_weights_have_a_banner() -> None:
    for random in (True, False):
        facts, scores = figures(random=random)
        assert ('class="banner"' in html.render(facts, scores, [])) is random


def test_the_same_figures_give_the_same_bytes() -> None:
    facts, scores = compared(others=("prior",))
    assert html.render(facts, scores, [item()]) == html.render(facts, scores, [item()])


def test_the_terminal_shows_gaps_counts_and_notes(tmp_path: Path) -> None:
    facts, _ = figures(random=True)
    stream = io.StringIO()
    terminal.show(facts, tmp_path, Console(file=stream, width=80))
    shown = stream.getvalue()
    for row in terminal.rows_of(facts):
        assert row["corrected gap"] in shown
        assert row["gap"] in shown
    for part in ("RANDOM WEIGHTS", "the verdict", "80 of 83 images used (3 too_small)", "a note"):
        assert part in shown


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("name", ["prior", "naive_bayes", "two_model_with_a_long_name"])
def test_no_width_cuts_a_figure_short(tmp_path: Path, width: int, name: str) -> None:
    facts, _ = figures()
    facts["references"] = {name: facts["references"]["naive_bayes"]}
    facts["headline"] = name
    stream = io.StringIO()
    terminal.show(facts, tmp_path, Console(file=stream, width=width, force_terminal=True, color_system=None))
    words = stream.getvalue().split()
    for row in terminal.rows_of(facts):
        for column in ("gap", "gap, unseen", "corrected gap"):
            assert set(row[column].split()) <= set(words)


def test_fractions_without_all_rows_have_a_report() -> None:
    facts, scores = figures()
    text = " ".join(Page(html.render(without_all_rows(facts), scores, [])).texts)
    assert "gap, top 1, surest 20 %" in text


def test_comparisons_without_all_rows_have_a_report(tmp_path: Path) -> None:
    facts, scores = compared(others=("prior",))
    text = " ".join(Page(html.render(without_all_rows(facts), scores, [])).texts)
    assert "mean gap of both directions, top 1, surest 20 %" in text
    stream = io.StringIO()
    terminal.show(facts, tmp_path, Console(file=stream, width=120))
    assert wording.percent(facts["agreement"]["pairs"][0]["target"]["20"]) in stream.getvalue()


def test_the_rows_behind_each_figure_are_told() -> None:
    facts, scores = figures()
    assert {row["rows"] for row in terminal.rows_of(facts)} == {"80 + 60"}
    facts["references"]["naive_bayes"]["roles"]["target"]["top1"]["100"]["gap"]["n_excluded"] = 7
    assert "80 + 60 (7 excluded)" in " ".join(Page(html.render(facts, scores, [])).texts)


def test_what_references_agree_on_is_told_and_escaped() -> None:
    facts, scores = compared()
    page = Page(html.render(facts, scores, []))
    text = " ".join(page.texts)
    assert "script" not in page.tags
    assert "Where the references agree" in text
    assert len(facts["agreement"]["pairs"]) == 3
    for pair in facts["agreement"]["pairs"]:
        assert f"{pair['first']} − {pair['second']}" in text
        assert f"{pair['first']}, {pair['second']}" in text
        for kind, fraction in itertools.product(("target", "unseen", "corrected"), ("100", "20", "5")):
            assert wording.percent(pair[kind][fraction]) in text
        for measure in agreement.MEASURES:
            assert wording.coefficient(pair[measure]) in text
    described = [text for text in page.descriptions if "kappa" in text]
    assert len(described) == 1
    assert all(title in described[0] for title in plots.MEASURES.values())


def test_every_measure_of_agreement_has_a_title() -> None:
    assert tuple(plots.MEASURES) == agreement.MEASURES


def test_the_rows_that_all_call_correlated_are_counted() -> None:
    facts, scores = compared(others=("prior",))
    target = scores.filter(pl.col("role") == "target")
    count = target.group_by("id").agg((pl.col("quadrant") == "correlated").all())["quadrant"].sum()
    text = " ".join(" ".join(Page(html.render(facts, scores, [])).texts).split())
    assert f"{count} of 80 target rows" in text
    assert "correlated.npy" in text


def test_costs_utility_and_both_directions_are_told() -> None:
    facts, scores = compared(others=("prior",))
    text = " ".join(Page(html.render(facts, scores, [])).texts)
    assert text.count("12.3") >= 2
    assert f"k = 5 {HOSTILE}" in text
    assert "77.7 [67.7, 87.7]" in text
    assert "mean gap of both directions, top 5" in text
    assert text.count("11.1 [1.1, 21.1] (n = 40)") == 2


def test_a_run_without_comparison_or_utility_has_no_such_sections() -> None:
    facts, scores = figures()
    text = " ".join(Page(html.render(facts, scores, [])).texts)
    for part in ("Where the references agree", "What the encoder is good for", "both directions", "cost in this run"):
        assert part not in text


def test_one_reference_has_nothing_to_agree_with() -> None:
    facts, scores = compared(others=())
    page = Page(html.render(facts, scores, []))
    assert "nothing to compare it with" in " ".join(page.texts)
    assert not [text for text in page.descriptions if "kappa" in text]


def test_comparisons_without_unseen_rows_are_dashes() -> None:
    facts, scores = compared(n_unseen=0, others=("prior",))
    assert "corrected" not in facts["agreement"]["pairs"][0]
    assert {row["corrected gaps"] for row in terminal.pairs_of(facts)} == {"–"}
    assert "Where the references agree" in html.render(facts, scores, [])


def test_what_is_undefined_between_references_is_a_dash() -> None:
    facts, scores = compared(others=("prior",))
    scores = scores.with_columns(quadrant=pl.lit("unassociated"), status=pl.lit("no_evidence"))
    facts["agreement"] = agreement.compare_references(scores, (1.0, 0.2, 0.05), 0.95, 100, 0)
    assert {row["kappa"] for row in terminal.pairs_of(facts)} == {"–"}
    assert "No target row can be judged by all references." in " ".join(Page(html.render(facts, scores, [])).texts)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_whole_pairs_and_utility(tmp_path: Path, width: int) -> None:
    facts, _ = compared(others=("crop_classifier", "naive_bayes_authors"))
    stream = io.StringIO()
    terminal.show(facts, tmp_path, Console(file=stream, width=width, force_terminal=True, color_system=None))
    shown = stream.getvalue()
    assert max(map(len, shown.replace(str(tmp_path / "report.html"), "").splitlines())) <= width
    words = shown.split()
    for row in terminal.pairs_of(facts):
        shown_at_any_width = {**row, **{name: row[name].split()[0] for name in terminal.COEFFICIENTS}}
        for value in (row if width == 120 else shown_at_any_width).values():
            assert set(value.split()) <= set(words)
    assert "77.7 [67.7, 87.7] %" in shown


def test_many_pairs_are_counted_not_shown(tmp_path: Path) -> None:
    facts, _ = figures()
    pair = {
        "first": "a", "second": "b", "target": {"100": estimate(0.5)}, "kappa_memorized": estimate(0.5),
        "rank_correlation": estimate(0.5),
    }  # fmt: skip
    facts["agreement"] = {"pairs": [pair] * 17}
    stream = io.StringIO()
    terminal.show(facts, tmp_path, Console(file=stream, width=120))
    assert stream.getvalue().count("a - b") == 15
    assert "2 more pairs" in stream.getvalue()


def test_the_terminal_says_what_was_trained(tmp_path: Path) -> None:
    curve = pl.DataFrame({"step": [1, 50], "epoch": [0, 4], "loss": [2.0, 0.25], "learning_rate": [0.1, 0.0]})
    stream = io.StringIO()
    folders = {"the encoder": tmp_path / "one", "[the classifier]": tmp_path / "two"}
    terminal.show_training({"the encoder": curve}, folders, Console(file=stream, width=80))
    shown = stream.getvalue()
    assert "the encoder: loss 2 at step 1, 0.25 at step 50" in shown
    for part in ("[the classifier]", *map(str, folders.values())):
        assert part in shown


def test_a_run_folder_gets_whole_files(tmp_path: Path) -> None:
    facts, scores = figures()
    report.write(tmp_path, facts, scores, [item()], CORRELATED)
    names = {"scores.parquet", "figures.json", "report.html", "correlated.parquet", "correlated.npy"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert pl.read_parquet(tmp_path / "scores.parquet").equals(scores)
    assert pl.read_parquet(tmp_path / "correlated.parquet").equals(CORRELATED)
    positions = np.load(tmp_path / "correlated.npy", allow_pickle=False)
    assert positions.dtype == np.int64
    assert positions.tolist() == [3, 700]


def test_no_correlated_row_is_an_empty_list(tmp_path: Path) -> None:
    facts, scores = figures()
    report.write(tmp_path, facts, scores, [], CORRELATED.clear())
    positions = np.load(tmp_path / "correlated.npy", allow_pickle=False)
    assert (positions.dtype, positions.shape) == (np.int64, (0,))


def test_undefined_figures_are_refused_in_json(tmp_path: Path) -> None:
    facts, scores = figures()
    facts["probe"]["tied"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        report.write(tmp_path, facts, scores, [], CORRELATED)
