"""Sensitivity: which variations are made, what they do to the conclusion, and the command as a whole."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL

from dejavu_exp import cells, config, sensitivity
from dejavu_exp.cells import State
from dejavu_exp.errors import ConfigError
from dejavu_exp.report import sensitive
from dejavu_exp.report.sensitive import Holds, Outcome, Scale, Sensitivity
from dejavu_exp.sensitivity import Axis

RUN = (*SMALL, "reference=[class_prior,label_shuffle]")
VARY = ("probe.k=5,10,43", "probe.metric=cosine")
"""One value is the chosen one, and one larger than the bank."""


def test_numbers_are_scaled_and_the_chosen_value_is_left_out() -> None:
    assert Axis("k", factors=(0.1, 0.5, 2)).tried(100) == ["10", "50", "200"]
    assert Axis("k", factors=(0.1, 0.5, 2)).tried(1) == ["2"]
    assert Axis("share", factors=(2 / 3, 4 / 3)).tried(0.3) == ["0.2", "0.4"]
    assert Axis("metric", values=("l2", "cosine")).tried("l2") == ["cosine"]
    assert Axis("switch", factors=(2,)).tried(True) == []


def keys(*overrides: str) -> dict[str, list[str]]:
    return sensitivity.grid(config.compose(overrides)[0])


def test_the_configuration_decides_what_is_varied() -> None:
    default = keys()
    assert default["probe.k"] == ["10", "50", "200"]
    assert default["references.naive_bayes.top_tags"] == ["1", "3", "10"]
    assert "model.layer" not in default
    assert "probe.query.fraction" not in default
    corner = keys("probe=corner_knn", "reference=[class_prior,naive_bayes]", "model=efficientnet_lite0")
    assert {"probe.query.fraction", "probe.query.corner", "model.output"} <= corner.keys()
    # Only what the first reference reads can change the conclusion.
    assert not [key for key in corner if key.startswith("references.")]
    assert "probe.query.choose" in keys("experiment=captions")


def test_values_that_the_chosen_parts_do_not_take_are_no_variations(tmp_path: Path) -> None:
    given = ["experiment=layer"]
    others = [f"{key}=" for key in keys(*given) if key != "model.layer"]
    _, found = sensitivity.plan(given, others, tmp_path)
    assert [one.name for one in found] == ["model.layer=1", "model.layer=2", "model.layer=3"]


def test_what_was_asked_for_replaces_the_default_and_equals_are_measured_once(tmp_path: Path) -> None:
    chosen, found = sensitivity.plan(RUN, ["probe.k=10,5", "probe.k=5", "probe.k=7"], tmp_path, only=True)
    assert [one.name for one in found] == ["probe.k=5", "probe.k=7"]
    assert found[0].chosen == "10"
    assert list(chosen.resolved["references"]) == ["class_prior", "label_shuffle"]
    assert list(found[0].resolved["references"]) == ["class_prior"]
    # The overrides alone give what was measured: the status command tells people to run them.
    again = config.compose([*sensitivity.SHORTENED, *found[0].overrides])[0]
    again.pop("run")
    assert again == found[0].resolved


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("probe.k", "expected a setting and its values"),
        ("probe.k=[1", "probe.k="),
        ("probe.kk=1,2", "probe.kk"),
        ("probe.metric=l3", "probe.metric=l3: must be one of"),
    ],
)
def test_a_variation_that_cannot_work_ends_the_command_before_any_work(
    tmp_path: Path, asked: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        sensitivity.plan(RUN, [asked], tmp_path, only=True)


def estimate(low: float, high: float) -> dict[str, Any]:
    return {"value": (low + high) / 2, "low": low, "high": high, "n_used": 10, "n_excluded": 0}


@pytest.mark.parametrize(
    ("chosen", "other", "expected"),
    [
        (estimate(0.1, 0.3), estimate(0.05, 0.1), Holds.SAME),
        (estimate(0.1, 0.3), estimate(-0.1, 0.09), Holds.CHANGED),
        (estimate(0.1, 0.3), estimate(-0.3, -0.1), Holds.CHANGED),
        (estimate(0.1, 0.3), estimate(-0.1, 0.11), Holds.UNDECIDED),
        (estimate(0.1, 0.3), None, Holds.UNDECIDED),
        (estimate(0.1, 0.3), {"value": None, "low": None, "high": None}, Holds.UNDECIDED),
        (estimate(-0.1, 0.1), estimate(-0.2, 0.4), Holds.SAME),
        (estimate(-0.1, 0.1), estimate(-0.2, -0.1), Holds.SAME),
        (estimate(-0.1, 0.1), estimate(0.01, 0.4), Holds.CHANGED),
    ],
)
def test_a_conclusion_holds_where_the_interval_gives_the_same_answer(
    chosen: Mapping[str, Any], other: Mapping[str, Any] | None, expected: Holds
) -> None:
    assert sensitivity.judge(chosen, other) == expected


def outcome(name: str, holds: Holds, low: float = 0.1, high: float = 0.3) -> Outcome:
    found = estimate(low, high)
    return Outcome(name, name.partition("=")[0], "", "", "", holds, found, estimate(0, 0.1), found)


def sensitivity_of(*outcomes: Outcome, **fields: Any) -> Sensitivity:
    made = Sensitivity("net on shapes", "naive_bayes", "gap", True, False, 0.95, outcomes, {"seed": 0})
    return replace(made, **fields)


CHOSEN = outcome("as chosen", Holds.CHOSEN)
TWELVE = [outcome(f"probe.k={number}", Holds.SAME) for number in range(2, 14)]


def test_the_sentence_counts_what_can_tell_and_names_what_does_not_hold() -> None:
    found = sensitivity_of(CHOSEN, *TWELVE, outcome("probe.k=1", Holds.CHANGED))
    expected = "The conclusion (memorization is shown) holds in 12 of 13 variations; it changes with probe.k=1."
    assert found.sentence == expected
    assert found.warnings[0].startswith("14 intervals of 95 % each")
    more = sensitivity_of(
        CHOSEN,
        *TWELVE,
        outcome("probe.ties=lowest_label", Holds.NO_EFFECT),
        outcome("surest rows: 5 %", Holds.UNDECIDED),
        Outcome("probe.k=900", "probe.k", "900", "", "", reason="more than the bank holds"),
    )
    assert more.sentence == (
        "The conclusion (memorization is shown) holds in 12 of 13 variations; the interval is too wide to tell with "
        "surest rows: 5 %; not measured were probe.k=900; 1 more change no figure and are not counted."
    )


def test_the_sentence_says_what_the_conclusion_rests_on() -> None:
    none = outcome("as chosen", Holds.CHOSEN, -0.1, 0.1)
    unshown = sensitivity_of(none, outcome("a=1", Holds.SAME))
    assert "(no memorization is shown) holds in 1 of 1" in unshown.sentence
    assert "does not mean that there is none" in unshown.warnings[-1]
    raw = sensitivity_of(CHOSEN, outcome("a=1", Holds.SAME), corrected=False)
    assert "(the raw gap is shown to be above zero)" in raw.sentence
    assert "no memorization" in raw.warnings[0]
    retrained = sensitivity_of(CHOSEN, replace(outcome("probe.query.compat=authors", Holds.SAME), retrained=True))
    assert retrained.warnings[-1].startswith("With probe.query.compat=authors the encoder was trained anew")
    assert "random" in sensitivity_of(CHOSEN, random=True).sentence
    assert "not put to the test" in sensitivity_of(CHOSEN, outcome("a=1", Holds.NO_EFFECT)).sentence


class Tags(HTMLParser):
    """Tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_shows_every_interval_on_one_scale_and_text_as_text() -> None:
    wild = outcome("model.weights=<script>alert(1)</script>", Holds.CHANGED, -0.1, 0.05)
    lost = Outcome("probe.k=900", "probe.k", "900", "100", "", reason="<b>too large</b>")
    found = sensitivity_of(CHOSEN, wild, lost)
    tags = Tags(sensitive.html(found)).found
    assert [tag for tag, _ in tags if tag in ("script", "b", "link", "img")] == ["script"]  # the report's own
    scale = Scale.of([estimate(0.1, 0.3), estimate(-0.1, 0.05)])
    lines = [attributes for tag, attributes in tags if tag == "line" and attributes["class"] == "mark"]
    assert [(line["x1"], line["x2"]) for line in lines] == [
        (scale.place(low), scale.place(high)) for low, high in ((0.1, 0.3), (-0.1, 0.05))
    ]
    assert "20.0 [10.0, 30.0] points" in [attributes.get("aria-label") for _, attributes in tags]


@pytest.mark.parametrize("ends", [(0.1, 0.3), (-0.013, 0.002), (-0.9, -0.2), (0.0, 0.0)])
def test_the_axis_holds_all_intervals_and_zero_with_few_round_ticks(ends: tuple[float, float]) -> None:
    scale = Scale.of([estimate(*ends)])
    assert scale.low <= min(0, ends[0])
    assert scale.high >= max(0, ends[1])
    assert min(abs(tick) for tick in scale.ticks) < 1e-12
    assert 2 <= len(scale.ticks) <= sensitive.TICKS + 3
    digits = f"{scale.step:e}"[0]
    assert digits in "125"


@dataclass(frozen=True)
class Command:
    """The command, after its end."""

    done: subprocess.CompletedProcess[str]
    folder: Path
    out: Path

    def json(self) -> Any:
        (path,) = self.out.glob("*/sensitivity.json")
        return json.loads(path.read_text())


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("sensitivity")
    vary = [word for text in VARY for word in ("--vary", text)]
    words = [sys.executable, "-m", "dejavu_exp.sensitivity", *RUN, "--only", *vary, "--out", str(folder / "out")]
    settings = {**os.environ, "DEJAVU_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return Command(done, folder, folder / "out")


def by_name(found: Any) -> dict[str, Any]:
    return {one["name"]: one for one in found["outcomes"]}


def test_variations_are_measured_and_readings_come_from_the_chosen_run(command: Command) -> None:
    found = by_name(command.json())
    assert list(found) == [
        *("as chosen", "probe.k=5", "probe.k=43", "probe.metric=cosine"),
        *("reference: label_shuffle", "predictions: top5", "surest rows: 20 %", "surest rows: 5 %"),
    ]
    five = Path(found["probe.k=5"]["folder"])
    figures = json.loads((five / "figures.json").read_text())
    assert yaml.safe_load((five / "config.yaml").read_text())["probe"]["k"] == 5
    assert found["probe.k=5"]["corrected"] == figures["references"]["class_prior"]["corrected_gap"]["top1"]["100"]
    chosen = json.loads((Path(found["as chosen"]["folder"]) / "figures.json").read_text())["references"]
    assert found["surest rows: 20 %"]["gap"] == chosen["class_prior"]["roles"]["target"]["top1"]["20"]["gap"]
    assert found["predictions: top5"]["corrected"] == chosen["class_prior"]["corrected_gap"]["top5"]["100"]
    assert not [name for name, one in found.items() if one["retrained"]]
    assert found["reference: label_shuffle"]["corrected"] == chosen["label_shuffle"]["corrected_gap"]["top1"]["100"]


def test_a_variation_that_fails_is_told_with_its_reason(command: Command) -> None:
    found = command.json()
    lost = by_name(found)["probe.k=43"]
    assert lost["holds"] == "not measured"
    assert "more than the bank holds" in lost["reason"]
    assert (lost["gap"], lost["corrected"]) == (None, None)
    assert "not measured were probe.k=43" in found["sentence"]
    assert sum(found["counts"].values()) == len(found["outcomes"])
    status = cells.read(Path(lost["folder"]))
    assert status is not None
    assert status.state == State.FAILED


def test_the_terminal_and_the_page_say_the_sentence(command: Command) -> None:
    found = command.json()
    shown = " ".join(command.done.stdout.split())
    assert found["sentence"] in shown
    # What the runs themselves say lies in their folders.
    assert "report.html" not in shown
    chosen = Path(by_name(found)["as chosen"]["folder"])
    assert "report.html" in (chosen / sensitivity.LOG).read_text()
    (page,) = command.out.glob("*/sensitivity.html")
    assert str(page) in command.done.stdout
    assert len([tag for tag, _ in Tags(page.read_text()).found if tag == "circle"]) == len(found["outcomes"]) - 1


def test_runs_that_have_finished_are_not_repeated(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    before = command.json()
    # A run depends on the cache's place in nothing but time.
    measured = []
    monkeypatch.setattr(sensitivity, "measure", lambda one: measured.append(one.name))
    (written,) = command.out.glob("*/sensitivity.json")
    assert sensitivity.run(RUN, ["probe.k=5,10", "probe.metric=cosine"], command.out, only=True) == 0
    assert measured == []
    after = json.loads(written.read_text())
    assert by_name(after) == {name: one for name, one in by_name(before).items() if name != "probe.k=43"}
    assert sensitivity.run([*RUN, "run.again=true"], ["probe.k=5"], command.out, only=True) == 0
    assert measured == ["as chosen", "probe.k=5"]


def test_variations_share_what_they_have_in_common(command: Command) -> None:
    trained = list((command.folder / "cache").rglob("network.safetensors"))
    assert len(trained) == 1


def test_help_needs_neither_torch_nor_hydra() -> None:
    code = (
        "import sys; from dejavu_exp import sensitivity\n"
        "try: sensitivity.main(['--help'])\n"
        "except SystemExit: assert not {'torch', 'hydra', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--vary" in done.stdout
