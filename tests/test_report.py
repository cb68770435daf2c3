"""The report and the terminal: every figure as given, nothing executed, nothing fetched."""

import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from rich.console import Console

from dejavu_exp import evidence, report
from dejavu_exp.report import html, terminal
from dejavu_exp.report.gallery import GalleryItem, NearImage
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
        "notes": [f"a note {HOSTILE}"],
        "problems": ["a file could not be read"],
        "encoder": {"description": "an encoder", "weights": "a file", "weights_hash": "abc", "random": random},
        "dataset": {"name": "toy", "rows": 140, "labels": 2},
        "probe": {
            "view": "background", "k": 5, "metric": "l2", "ties": "nearest", "bank": 50, "bank_excluded": 0,
            "tied": 0.1,
        },
        "counts": {"target": used, "unseen": empty, "heldout": empty, "public": empty, "shared": empty},
        "references": {"naive_bayes": found},
        "run": {"created": "now", "seconds": {"data": 1.0}, "versions": {}, "commit": None, "config": {"seed": 0}},
    }, scores  # fmt: skip


def item() -> GalleryItem:
    near = NearImage(picture(), HOSTILE, HOSTILE, 1.5)
    return GalleryItem(
        HOSTILE, HOSTILE, HOSTILE, 0.5, "b", 0.9, "b", 0.1, picture(), picture(), (0.1, 0.2, 0.6, 0.8), (near,)
    )


def without_all_rows(facts: dict[str, Any]) -> dict[str, Any]:
    """As with scoring.fractions=[0.2, 0.05]."""
    for found in facts["references"].values():
        for top in ("top1", "top5"):
            for cells in (*found["roles"].values(), found["corrected_gap"]):
                del cells[top]["100"]
    return facts


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

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
    assert terminal.percent(found["roles"]["unseen"]["quadrants"]["memorized"]) in text
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
    facts, scores = figures()
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


def test_the_rows_behind_each_figure_are_told() -> None:
    facts, scores = figures()
    assert {row["rows"] for row in terminal.rows_of(facts)} == {"80 + 60"}
    facts["references"]["naive_bayes"]["roles"]["target"]["top1"]["100"]["gap"]["n_excluded"] = 7
    assert "80 + 60 (7 excluded)" in " ".join(Page(html.render(facts, scores, [])).texts)


def test_a_run_folder_gets_three_whole_files(tmp_path: Path) -> None:
    facts, scores = figures()
    report.write(tmp_path, facts, scores, [item()])
    assert {path.name for path in tmp_path.iterdir()} == {"scores.parquet", "figures.json", "report.html"}
    assert pl.read_parquet(tmp_path / "scores.parquet").equals(scores)


def test_undefined_figures_are_refused_in_json(tmp_path: Path) -> None:
    facts, scores = figures()
    facts["probe"]["tied"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        report.write(tmp_path, facts, scores, [])
