"""The pages as a browser shows them: they sort, fit a phone, are readable on light and dark screens, open at once.

Needs Chromium (DEJAVU_CHROMIUM, or on the path) and axe-core: after `npm install --prefix FOLDER axe-core`, DEJAVU_AXE
is FOLDER/node_modules/axe-core/axe.min.js.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
from conftest import Finished
from playwright.sync_api import Browser, Page, sync_playwright
from test_compare import planted, write
from test_object_report import pair, run
from test_report import HOSTILE, complete, item, picture

from dejavu_exp import compare
from dejavu_exp.report import compared, html

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE_PX, DESKTOP_PX = 390, 1280
SERIOUS = ("serious", "critical")
PAGES = ("run", "labels", "pairs", "comparison")


def needed(what: str, found: str | None) -> str:
    """What the tests need. Where they must not be skipped, its absence is a failure."""
    if not found:
        reason = f"there is no {what}; see the head of tests/test_browser.py"
        pytest.fail(reason) if os.environ.get("DEJAVU_CI") == "1" else pytest.skip(reason)
    return str(found)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    installed = next((path for path in map(shutil.which, NAMES) if path), None)
    chromium = needed("Chromium", os.environ.get("DEJAVU_CHROMIUM") or installed)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def axe() -> str:
    return Path(needed("axe-core", os.environ.get("DEJAVU_AXE"))).read_text("utf-8")


@pytest.fixture(scope="module")
def pages(default_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a real run; planted reports with all that a run may have; a planted comparison."""
    folder = tmp_path_factory.mktemp("pages")
    facts, scores = complete()
    long = f"{HOSTILE}{'x' * 10_000}"
    facts["references"]["naive_bayes"]["per_class"][0]["name"] = long
    facts["verdict"] = f"The verdict with {HOSTILE}."
    (folder / "labels.html").write_text(html.render(facts, scores, [item()] * 3, pictures={"twin": picture()}))
    objects, found = run()
    (folder / "pairs.html").write_text(html.render(objects, found, [pair()] * 2))
    for k in (5, 10, 20):
        write(folder / "runs" / str(k), planted(target=k / 30, probe__k=k, encoder=f"timm resnet{k} {HOSTILE}"))
    result = compare.gather([folder / "runs"])
    test = {
        "first": "5", "second": "10", "reference": "naive_bayes", "role": "target", "n_used": 38, "difference": 0.01,
        "p_permutation": 0.5, "p_mcnemar": 0.5, "p_holm": 1.0,
    }  # fmt: skip
    result = replace(result, tests=pl.DataFrame([test], schema=dict(compared.TESTS)))
    (folder / "comparison.html").write_text(compared.html(result))
    return {
        "run": default_run.folder / "report.html",
        **{name: folder / f"{name}.html" for name in ("labels", "pairs", "comparison")},
    }


@pytest.fixture
def visit(browser: Browser) -> Iterator[Any]:
    """Opens a file and fails where the page complains, or asks for anything that is not in the file."""
    complaints: list[str] = []
    contexts = []

    def opened(path: Path, width: int = DESKTOP_PX, scheme: Literal["light", "dark"] = "light", **more: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def column(page: Page, table: str, number: int) -> list[str]:
    cells = page.locator(f"{table} tbody tr:visible td:nth-child({number})")
    return [text.strip() for text in cells.all_text_contents()]


CLASSES = "[aria-label='Classes against naive_bayes'] table"


def test_a_click_on_a_heading_sorts_and_says_so(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["run"])
    heading = page.locator(f"{CLASSES} th", has_text="encoder, %")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    values = [float(text.split(" ")[0]) for text in column(page, CLASSES, 4)]
    assert len(set(values)) > 2
    assert values == sorted(values, reverse=True)
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [float(text.split(" ")[0]) for text in column(page, CLASSES, 4)] == sorted(values)
    # By keyboard, on text; the other column is no longer the sorted one.
    first = page.locator(f"{CLASSES} th").first
    first.get_by_role("button").focus()
    page.keyboard.press("Enter")
    names = column(page, CLASSES, 1)
    assert names == sorted(names)
    assert (first.get_attribute("aria-sort"), heading.get_attribute("aria-sort")) == ("ascending", None)


def test_undefined_cells_stay_below_whatever_the_order(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["labels"])
    table = "[aria-label='Estimated share of memorized rows'] table"
    assert column(page, table, 2) == ["43.2 [33.2, 53.2]"]
    tested = "[aria-label='Accuracies and gaps by reference'] table"
    page.evaluate("table => { document.querySelector(table).tBodies[0].rows[0].cells[6].textContent = '–'; }", tested)
    button = page.locator(f"{tested} th", has_text="corrected gap").get_by_role("button")
    for _ in range(2):
        button.click()
        assert column(page, tested, 7)[-1] == "–"


def test_a_filter_leaves_the_rows_that_match(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["run"])
    names = column(page, CLASSES, 1)
    field = page.get_by_label("Show only class with").first
    field.fill(names[1].upper())
    assert column(page, CLASSES, 1) == [names[1]]
    assert f"1 of {len(names)} rows" in page.locator(".filter output").all_text_contents()
    field.fill("")
    assert column(page, CLASSES, 1) == names


def test_details_open_and_show_the_whole_text(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["labels"])
    label = page.locator(f"{CLASSES} details.text").first
    assert not label.evaluate("element => element.open")
    label.locator("summary").click()
    assert label.evaluate("element => element.open")
    assert f"{HOSTILE}{'x' * 10_000}" in label.inner_text()
    assert page.locator(".verdict").inner_text() == f"The verdict with {HOSTILE}."
    config = page.locator("summary", has_text="Resolved configuration")
    config.click()
    assert page.locator("pre").is_visible()


def test_without_scripts_everything_is_there_but_buttons(pages: dict[str, Path], visit: Any) -> None:
    page = visit(pages["run"], java_script_enabled=False)
    assert page.get_by_role("button").count() == 0
    assert page.locator(".filter").count() == 0
    assert page.locator(f"{CLASSES} tbody tr").count() > 2
    assert page.get_by_role("heading", name="The gap by reference").is_visible()


@pytest.mark.parametrize("name", PAGES[1:])
@pytest.mark.parametrize(("scheme", "width"), [("light", DESKTOP_PX), ("dark", PHONE_PX)])
def test_nobody_is_shut_out(
    pages: dict[str, Path], visit: Any, axe: str, scheme: Literal["light", "dark"], width: int, name: str
) -> None:
    page = visit(pages[name], width, scheme)
    page.evaluate("() => document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.evaluate(axe)
    violations, passes = page.evaluate(
        "async () => { const all = await axe.run(); return [all.violations, all.passes]; }"
    )
    told = [
        f"{fault['id']} ({fault['impact']}): {[node['html'][:200] for node in fault['nodes'][:3]]}"
        for fault in violations
        if fault["impact"] in SERIOUS
    ]
    assert told == []
    assert "color-contrast" in {rule["id"] for rule in passes}


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_the_whole_width(pages: dict[str, Path], visit: Any, name: str) -> None:
    page = visit(pages[name], width=PHONE_PX)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE_PX
    page.evaluate("() => document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE_PX


def test_the_page_s_policy_stops_a_foreign_script_and_a_request(
    pages: dict[str, Path], browser: Browser, tmp_path: Path
) -> None:
    foreign = "<script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x.png' alt='' onerror='owned()'>"
    path = tmp_path / "attacked.html"
    path.write_text(pages["labels"].read_text().replace("<main>", f"<main>{foreign}", 1))
    page = browser.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.goto(path.as_uri())
    assert page.title() != "owned"
    for what in ("inline script", "loading the image", "inline event handler"):
        assert [text for text in told if what in text.lower()], told
    assert page.locator("th button").count() > 10  # the page's own script has run
    page.close()


def test_plots_follow_the_screen_and_print_is_light(pages: dict[str, Path], visit: Any) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page = visit(pages["run"], scheme=scheme)
        text = page.locator(".plot svg text").first
        colours[scheme] = text.evaluate("element => getComputedStyle(element).fill")
    assert colours == {"light": "rgb(28, 28, 28)", "dark": "rgb(232, 232, 232)"}
    page.emulate_media(media="print")
    assert text.evaluate("element => getComputedStyle(element).fill") == colours["light"]
    assert page.locator("nav").is_hidden()


def test_a_run_of_139183_rows_opens_within_two_seconds(tmp_path: Path, visit: Any) -> None:
    facts, _ = complete()
    rng = np.random.default_rng(0)
    found = facts["references"]["naive_bayes"]
    found["per_class"] = [{**found["per_class"][0], "name": f"class {number}"} for number in range(1_000)]
    names = ("naive_bayes", "two_model", "crop_classifier")
    facts["references"] = {name: {**found, "detected": None} for name in names}
    rows = pl.DataFrame(
        {"id": "x", "role": ["target", "unseen"], "label": "a"},
    ).select(pl.all().repeat_by(69_592).explode())
    scores = pl.concat(
        rows.with_columns(reference=pl.lit(name), memorization_score=pl.Series(rng.normal(size=len(rows))))
        for name in names
    )
    path = tmp_path / "report.html"
    path.write_text(html.render(facts, scores, [item()] * 12))
    assert path.stat().st_size < 5_000_000
    page = visit(path)
    loaded = "() => performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert 0 < page.evaluate(loaded) < 2_000
    assert page.locator("[aria-label='Classes against naive_bayes'] tbody tr").count() == 1_000
