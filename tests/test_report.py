"""The report and the terminal: every figure as given, nothing foreign executed, nothing fetched."""

import base64
import copy
import hashlib
import io
import itertools
import json
import re
import time
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from markupsafe import Markup
from PIL import Image
from rich.console import Console

from dejavu_exp import agreement, evidence, leaks, report
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.errors import ConfigError
from dejavu_exp.neighbours import Neighbours
from dejavu_exp.report import card, gallery, html, plots, terminal, wording
from dejavu_exp.report.gallery import LabelItem, NearImage, Seen
from dejavu_exp.report.settings import ReportSettings
from dejavu_exp.scoring import LabelInference
from dejavu_exp.tables import MANIFEST, VIEWS

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def plotted() -> None:
    """Asks for real plots."""


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere they are made and not drawn, which is most of the time that a page takes."""
    if "plotted" not in request.fixturenames:
        monkeypatch.setattr(plots, "svg", lambda drawn, name: Markup("<svg></svg>"))


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(stream, "JPEG")
    return stream.getvalue()


@cache
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
    scores, found = copy.deepcopy(scored(n_unseen))
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


COPIES = pl.DataFrame(schema=leaks.PAIRS)
CORRELATED = pl.DataFrame(
    {"id": ["a", "b"], "label": ["x", "y"], "origin": ["train", "train"], "position": [3, 700]},
    schema={"id": pl.String, "label": pl.String, "origin": pl.String, "position": pl.Int64},
)


def compared(n_unseen: int = 60, others: tuple[str, ...] = (f"two{HOSTILE}", "prior")) -> tuple[Any, pl.DataFrame]:
    """As `comparison`, to be changed at will."""
    return copy.deepcopy(comparison(n_unseen, others))


@cache
def comparison(n_unseen: int, others: tuple[str, ...]) -> tuple[Any, pl.DataFrame]:
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


def complete() -> tuple[dict[str, Any], pl.DataFrame]:
    """As `completed`, to be changed at will."""
    return copy.deepcopy(completed())


@cache
def completed() -> tuple[dict[str, Any], pl.DataFrame]:
    """Figures and scores with everything that a run may have; the texts of others are hostile."""
    facts, scores = compared(others=("prior",))
    for name, found in facts["references"].items():
        found["power"] = {"corrected_gap": 0.123, "gap": 0.045, "level": 0.95, "power": 0.8}
        found["detected"] = {"rate": 0.1, "n": 0, "n_tested": 80, "n_null": 60, "smallest_p": 0.0321}
        found["rate"] = estimate(0.432) if name == "naive_bayes" else None
    facts["references"]["naive_bayes"]["detected"]["n"] = 3
    ranked = pl.col("memorization_score").rank("ordinal", descending=True).over("reference", "role")
    tested = (pl.col("role") == "target") & pl.col("memorization_score").is_not_null()
    listed = (pl.col("reference") == "naive_bayes") & (ranked <= 3)
    scores = scores.with_columns(
        p_value=pl.when(tested).then(pl.when(listed).then(0.00123).otherwise(0.5)),
        q_value=pl.when(tested).then(pl.when(listed).then(0.0456).otherwise(0.9)),
    )
    test = {"statistic": "total variation", "value": 0.0641, "p_value": 0.0234, "p_holm": 0.117}
    facts["likeness"] = {
        "tests": [{**test, "name": "class balance", "n_target": 80, "n_unseen": 60, "detail": f"how {HOSTILE}"}],
        "alike": False, "adjust": "weight", "effective_unseen": 41.5, "sentence": f"They differ {HOSTILE}.",
    }  # fmt: skip
    pair = {"id": f"a{HOSTILE}", "role": "target", "other_id": "twin", "other_role": "unseen"}
    facts["leaks"] = {
        "method": "hashes and a comparison", "n_pairs": 300, "excluded": 7, "sentence": f"300 pairs {HOSTILE}.",
        "counts": [{"first_role": "target", "second_role": "unseen", "exact": 2, "near": 298}],
        "pairs": [{**pair, "kind": "near", "similarity": 0.987, "how": "mirrored"}] * 200,
    }  # fmt: skip
    facts["coverage"] = {"share with a tag": {"target": 0.985, "unseen": None}, "classes": {"target": 12_345}}
    facts["gate"] = {"passed": False, "reason": f"above the limit {HOSTILE}", "thresholds": {"max_gap": 0.05}}
    for place, one in enumerate(facts["agreement"]["pairs"]):
        one["mcnemar"] = {"only_first": 17 + place, "only_second": 5, "p_value": 0.0169, "p_holm": 0.0507}
    return facts, scores


SECTIONS = {
    "power": "The smallest gap these rows can show",
    "detected": "Rows listed at the false-discovery rate",
    "rate": "How many target rows are memorized",
    "likeness": "Are target and unseen rows alike?",
    "leaks": "Copies of images between roles",
    "coverage": "What is known of the rows",
    "gate": "Release gate",
    "mcnemar": "McNemar's exact test",
}
"""Keys that not every run has, and what the page says where it has them."""


def text_of(content: str) -> str:
    return " ".join(" ".join(Page(content).texts).split())


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
    """Tags, links out of a page, anchors in it, texts; its own script is left out, so that one in `tags` is foreign."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.texts: list[str] = []
        self.descriptions: list[str] = []
        self.names: list[str] = []
        self.ids: list[str] = []
        self.feed(content.replace(f"<script>{html.SCRIPT}</script>", "", 1))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = [value or "" for name, value in attributes if name in ("src", "href")]
        self.links += [link for link in found if not link.startswith("#")]
        self.anchors += [link[1:] for link in found if link.startswith("#")]
        self.descriptions += [value or "" for name, value in attributes if name == "alt"]
        self.names += [value or "" for name, value in attributes if name == "aria-label"]
        self.ids += [value or "" for name, value in attributes if name == "id"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.usefixtures("plotted")
def test_the_report_shows_the_figures_and_runs_nothing() -> None:
    facts, scores = figures()
    page = Page(html.render(facts, scores, [item()]))
    text = " ".join(page.texts)
    assert "script" not in page.tags
    assert HOSTILE in text
    assert all(link.startswith("data:image/jpeg;") for link in page.links)
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


@pytest.mark.usefixtures("plotted")
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
    described = [text for text in page.names if "kappa" in text]
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
    assert not [text for text in page.names if "kappa" in text]


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
    report.write(tmp_path, facts, scores, [item()], CORRELATED, COPIES)
    names = {"scores.parquet", "figures.json", "report.html", "correlated.parquet", "correlated.npy"}
    names |= {"model_card.md", "model_card.json", "leaks.parquet"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert pl.read_parquet(tmp_path / "scores.parquet").equals(scores)
    assert pl.read_parquet(tmp_path / "correlated.parquet").equals(CORRELATED)
    positions = np.load(tmp_path / "correlated.npy", allow_pickle=False)
    assert positions.dtype == np.int64
    assert positions.tolist() == [3, 700]


def test_no_correlated_row_is_an_empty_list(tmp_path: Path) -> None:
    facts, scores = figures()
    report.write(tmp_path, facts, scores, [], CORRELATED.clear(), COPIES)
    positions = np.load(tmp_path / "correlated.npy", allow_pickle=False)
    assert (positions.dtype, positions.shape) == (np.int64, (0,))


def test_everything_a_run_may_have_is_shown_and_escaped() -> None:
    facts, scores = complete()
    page = html.render(facts, scores, [item()], pictures={"twin": picture()})
    text = text_of(page)
    assert "script" not in Page(page).tags
    for part in (
        *SECTIONS.values(), f"They differ {HOSTILE}.", f"how {HOSTILE}", "0.064", "0.023", "0.12", "41.5 rows",
        f"300 pairs {HOSTILE}.", "hashes and a comparison", "target and unseen", "298", "7 rows were left out",
        "100 of 300 pairs", "mirrored", "0.987", "share with a tag 0.985 –", "classes 12345 –",
        f"above the limit {HOSTILE}",
        "max gap", "12.3", "4.5", "43.2 [33.2, 53.2]", "3 of 80 target rows, at a rate of 10 %", "0.0012", "0.046",
        "0 of 80 target rows", "cannot be below 0.016", "smallest p-value of a row is 0.032", "17", "0.017", "0.051",
    ):  # fmt: skip
        assert part in text, part
    best = scores.filter(pl.col("q_value") <= 0.1)["id"].to_list()
    assert len(best) == 3
    table = page[page.index("Listed rows against naive_bayes") :]
    table = table[: table.index("</table>")]
    assert [table.count(name.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;")) for name in best] == [
        1
    ] * 3
    # Of the pictures of copies one is there, in each of the pairs shown; the gallery has three.
    assert page.count("data:image/jpeg") == 100 + 3


@pytest.mark.parametrize("missing", SECTIONS)
def test_what_a_run_does_not_have_is_not_on_the_page(missing: str) -> None:
    facts, scores = complete()
    facts.pop(missing, None)
    for found in (*facts["references"].values(), *facts["agreement"]["pairs"]):
        found.pop(missing, None)
    text = text_of(html.render(facts, scores, []))
    assert [key for key, said in SECTIONS.items() if said not in text] == [missing]
    for name in SECTIONS:
        if name in facts:
            facts[name] = None
    for found in facts["references"].values():
        found |= {"detected": None, "rate": None}
    text = text_of(html.render(facts, scores, []))
    assert {key for key, said in SECTIONS.items() if said in text} <= {"power", "mcnemar"}


@pytest.mark.usefixtures("plotted")
def test_every_section_is_in_the_list_of_contents() -> None:
    content = html.render(*complete(), [item()])
    page = Page(content)
    headings = re.findall(r'<h2 id="([^"]+)">', content)
    assert len(headings) > 15
    assert page.anchors == headings
    assert len(set(page.ids)) == len(page.ids)


def test_the_policy_allows_the_page_s_own_script_alone() -> None:
    content = html.render(*figures(), [])
    script = re.findall(r"<script>(.*?)</script>", content, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in content


def test_without_images_no_pixel_and_no_caption_is_in_the_file() -> None:
    facts, scores = complete()
    shown = item(captions=("a private caption",))
    pictures = {"twin": picture()}
    with_images = html.render(facts, scores, [shown], pictures=pictures)
    assert "data:image/jpeg" in with_images
    assert "a private caption" in with_images
    without = html.render(facts, scores, [shown], ReportSettings(images="none"), pictures)
    assert "data:image" not in without
    assert "<image" not in without
    assert "a private caption" not in without
    assert "asked to show no images" in without
    assert HOSTILE in text_of(without)


def test_without_images_pairs_show_objects_alone() -> None:
    from test_object_report import LONG, pair, run  # which takes its tools from here

    facts, scores = run(("prior",))
    without = html.render(facts, scores, [pair()], ReportSettings(images="none"))
    text = text_of(without)
    assert "data:image" not in without
    assert LONG not in Page(without).texts
    assert "a short one" not in text
    assert "found by the encoder only:" in text
    assert "asked to show no images and captions" in text
    assert "a short one" in text_of(html.render(facts, scores, [pair()]))


def test_long_labels_are_shortened_and_whole_inside() -> None:
    facts, scores = figures()
    name = f"{HOSTILE}{'x' * 10_000}"
    for row in facts["references"]["naive_bayes"]["per_class"]:
        row["name"] = name
    page = Page(html.render(facts, scores, [LabelItem(**{**vars(item()), "label_name": name, "target_label": name})]))
    assert page.texts.count(name) == 3  # two classes and the card
    assert f"{name[:60]}… " in page.texts
    assert "script" not in page.tags


@pytest.mark.usefixtures("plotted")
def test_a_plot_takes_the_page_s_colours_and_shows_names_as_text() -> None:
    facts, _ = figures()
    role = facts["references"]["naive_bayes"]["roles"]["target"]
    drawn = plots.curve(role, f"_a $x$ {HOSTILE}\x00")
    assert f"_a $x$ {HOSTILE.replace('<', '&lt;').replace('>', '&gt;')}?" in drawn
    assert set(re.findall(r"(?:fill|stroke): (?!none)([^;\"]+)", drawn)) <= {
        f"var(--{name})" for name in plots.VARIABLES.values()
    }
    assert "<style" not in drawn
    assert len(drawn) < 20_000


def test_every_colour_of_a_plot_has_a_value_on_light_and_on_dark_screens() -> None:
    content = html.render(*figures(), [])
    light, dark = content.split("prefers-color-scheme: dark", 1)
    for name in plots.VARIABLES.values():
        assert f"--{name}: #" in light
        assert f"--{name}: #" in dark.split("* {")[0]


@pytest.mark.usefixtures("plotted")
def test_a_run_of_139183_rows_has_a_small_file_in_seconds() -> None:
    """1,000 classes, three references and as many rows as the paper's, every one of them listed."""
    facts, _ = complete()
    names, rows, classes = ("naive_bayes", "two_model", "crop_classifier"), 139_183, 1_000
    rng = np.random.default_rng(0)
    found = facts["references"]["naive_bayes"]
    found["detected"] = {"rate": 0.1, "n": rows // 2, "n_tested": rows // 2, "n_null": rows // 2, "smallest_p": 1e-4}
    one = {key: estimate(0.123) for key in ("target", "reference", "gap")}
    found["per_class"] = [
        {"label": f"n{number:08d}", "name": f"a class with the number {number}", **one} for number in range(classes)
    ]
    facts["references"] = {name: copy.deepcopy(found) for name in names}
    scores = pl.concat(
        pl.DataFrame(
            {
                "id": [f"n{row % classes:08d}/n{row % classes:08d}_{row:06d}.JPEG" for row in range(rows)],
                "role": ["target", "unseen"] * (rows // 2) + ["target"],
                "reference": name,
                "label": [f"n{row % classes:08d}" for row in range(rows)],
                "memorization_score": rng.normal(size=rows),
                "p_value": 1e-4,
                "q_value": 1e-4,
            }
        )
        for name in names
    )
    before = time.process_time()
    content = html.render(facts, scores, [item()] * 12)
    seconds = time.process_time() - before
    page = Page(content)
    assert len(content.encode()) < 2_500_000
    assert seconds < 10
    assert content.count("a class with the number") == len(names) * (classes + 100)
    assert " ".join(page.texts).count("The 100 with the smallest p of 69591.") == len(names)


def test_classes_and_lists_are_cut_where_asked() -> None:
    facts, scores = complete()
    text = text_of(html.render(facts, scores, [], ReportSettings(listed=2, classes=1)))
    assert "2 classes, the 1 with the largest gap; figures.json has them all" in text
    assert "The 2 with the smallest p of 3." in text
    assert "2 of 300 pairs" in text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"images": "all"}, r"report.images='all': expected one of thumbnails, none"),
        ({"listed": 0}, r"report.listed=0 is below 1"),
        ({"classes": -1}, r"report.classes=-1 is below 1"),
    ],
)
def test_settings_check_themselves(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReportSettings(**asked)


def rows_and_views() -> tuple[Manifest, pl.DataFrame, pl.DataFrame]:
    """Three images of which the last cannot be read; a query view of the first and bank views of all."""
    names = ["a", "b", "broken"]
    facts = {"origin": "x", "width": 16, "height": 16, "status": "ok", "captions": ["a private caption"]}
    rows = [{**dict.fromkeys(MANIFEST), "id": name, "path": f"{name}.jpg", **facts} for name in names]
    store = MemoryStore({"a.jpg": picture(), "b.jpg": picture(), "broken.jpg": b"no image"})
    views = pl.DataFrame(
        [{**dict.fromkeys(VIEWS), "id": name, "path": f"{name}.jpg", "status": "ok", "truth": ["x"]} for name in names],
        schema=VIEWS,
    )
    region = {"xmin": 0, "ymin": 0, "xmax": 8, "ymax": 8}
    queries = views.head(1).with_columns(pl.lit(value).cast(pl.Int32).alias(name) for name, value in region.items())
    return Manifest("toy", pl.DataFrame(rows, schema=MANIFEST), store), queries, views


def test_the_gallery_opens_no_image_where_none_may_be_shown() -> None:
    manifest, queries, bank = rows_and_views()
    scores = pl.DataFrame(
        {
            "id": "a", "role": "target", "status": "ok", "quadrant": "memorized", "memorization_score": 0.5,
            "label": "x", "target_label": "x", "target_probability": 1.0,
            "reference_label": "y", "reference_probability": 0.0,
        }
    )  # fmt: skip
    near = Neighbours(np.array([[1, 2]]), np.zeros((1, 2), np.float32))
    (shown,) = gallery.most_memorized(scores, queries, bank, near, manifest, manifest.rows, 5)
    assert shown.seen.crop
    assert [bool(place.image) for place in shown.neighbours] == [True, False]
    closed = Manifest("toy", manifest.rows, MemoryStore({}))
    (hidden,) = gallery.most_memorized(scores, queries, bank, near, closed, manifest.rows, 5, with_images=False)
    assert (hidden.id, hidden.seen, hidden.neighbours) == ("a", Seen(None), ())


def test_pictures_of_copies_are_of_the_first_pairs_and_of_what_can_be_read() -> None:
    manifest, _, _ = rows_and_views()
    pairs = [{"id": "a", "other_id": "broken"}, {"id": "b", "other_id": "a"}]
    assert set(gallery.of_copies(pairs, manifest, 1)) == {"a"}
    found = gallery.of_copies(pairs, manifest, 2)
    assert set(found) == {"a", "b"}
    with Image.open(io.BytesIO(found["b"])) as opened:
        assert opened.format == "JPEG"


def test_the_model_card_has_the_headline_its_intervals_and_limits(tmp_path: Path) -> None:
    facts, scores = complete()
    report.write(tmp_path, facts, scores, [], CORRELATED, COPIES)
    found = json.loads((tmp_path / "model_card.json").read_text())
    shown = {(row["reference"], row["figure"]): row for row in found["figures"]}
    naive_bayes = facts["references"]["naive_bayes"]
    expected = {
        "corrected gap": naive_bayes["corrected_gap"]["top1"]["100"],
        "gap": naive_bayes["roles"]["target"]["top1"]["100"]["gap"],
        "gap, unseen rows": naive_bayes["roles"]["unseen"]["top1"]["100"]["gap"],
        "share of target rows memorized": naive_bayes["rate"],
    }
    for name, value in expected.items():
        assert shown["naive_bayes", name] == {"reference": "naive_bayes", "figure": name, "level": 0.95, **value}
    assert ("prior", "share of target rows memorized") not in shown
    assert (found["verdict"], found["rows"]["target"], found["gate"]["passed"]) == ("the verdict", 80, False)
    text = (tmp_path / "model_card.md").read_text()
    assert text.startswith("## Memorization of training data\n\n**the verdict**\n")
    assert f"| naive_bayes | corrected gap | {wording.percent(expected['corrected gap'])} | 140 (0 excluded) |" in text
    for part in ("3 of 80 target rows at a false-discovery rate of 10 %", "not passed: above the limit", *card.LIMITS):
        assert part in text
    assert "<script" not in text
    assert "Random weights" not in text
    facts["encoder"]["random"] = True
    assert "**Random weights" in card.markdown(card.card(facts))


def test_a_run_without_unseen_rows_has_a_model_card() -> None:
    facts, _ = figures(n_unseen=0)
    found = card.card(facts)
    assert [row["figure"] for row in found["figures"]] == ["gap"]
    assert "corrected" not in found["measured"]
    assert "| naive_bayes | gap |" in card.markdown(found)


def test_undefined_figures_are_refused_in_json(tmp_path: Path) -> None:
    facts, scores = figures()
    facts["probe"]["tied"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        report.write(tmp_path, facts, scores, [], CORRELATED, COPIES)
