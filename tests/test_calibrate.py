"""The calibration itself: it finds what was planted, and it says so where the instrument is broken."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from conftest import SMALL

from dejavu_exp import calibrate, config, evidence, metrics, statistics
from dejavu_exp.calibration import canaries, planted, told
from dejavu_exp.calibration.planted import ALL_ROWS, RATE, Bench, Planting, Population, Roc, Trial
from dejavu_exp.datasets.shapes import Shapes
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.scoring import LabelInference
from dejavu_exp.splits import PerClassSplit
from dejavu_exp.stages import Plan


def settings_of(*overrides: str) -> dict[str, Any]:
    settings, _ = config.compose(overrides)
    settings.pop("run")
    return settings


LABELS = ("a", "b", "c")
UNSEEN, REPEATED = 300, 30
SCORING = LabelInference(resamples=100, fractions=(1.0, 0.2))


def answers(truth: np.ndarray[Any, Any], right: np.ndarray[Any, Any], rng: np.random.Generator, top: float) -> Evidence:
    """Evidence whose first label is the true one where `right` is, with a share of about `top`."""
    first = np.where(right, truth, (truth + rng.integers(1, 3, len(truth))) % 3)
    share = rng.uniform(top - 0.1, top + 0.1, len(truth))
    probabilities = np.repeat(((1 - share) / 2)[:, None], 3, axis=1)
    probabilities[np.arange(len(truth)), first] = share
    return evidence.from_probabilities([f"{row:03}" for row in range(len(truth))], LABELS, probabilities)


@pytest.fixture(scope="module")
def rows() -> pl.DataFrame:
    count = UNSEEN + REPEATED
    return pl.DataFrame(
        {
            "id": [f"{row:03}" for row in range(count)],
            "role": ["unseen"] * UNSEEN + ["target"] * REPEATED,
            "label": [LABELS[row % 3] for row in range(count)],
            "status": ["ok"] * count,
        }
    )


@pytest.fixture(scope="module")
def population(rows: pl.DataFrame) -> Population:
    """300 rows of which the encoder knows 40 % and the reference 30 %; of 30 repeated rows it remembers all but 3."""
    rng = np.random.default_rng(0)
    truth = np.arange(len(rows)) % 3
    known = rng.random(len(rows)) < 0.4
    known[UNSEEN:] = np.arange(REPEATED) >= 3
    target = answers(truth, known, rng, 0.5)
    sure = answers(truth, known, rng, 0.85)
    probabilities = np.where((np.arange(len(rows)) < UNSEEN)[:, None], target.probabilities, sure.probabilities)
    target = evidence.from_probabilities(target.ids, LABELS, probabilities)
    reference = answers(truth, rng.random(len(rows)) < 0.3, rng, 0.5)
    repeats = dict.fromkeys(rows.filter(pl.col("role") == "target")["id"], 8) | {"000": 8}
    return Population.of(rows, target, reference, repeats, "known")


def is_right(found: Evidence, count: int) -> np.ndarray[Any, Any]:
    return np.array([LABELS[found.ranking[row, 0]] == LABELS[row % 3] for row in range(count)])


def test_a_population_is_the_unseen_rows_and_the_remembered_of_the_repeated_ones(population: Population) -> None:
    assert len(population.rows) == UNSEEN
    assert population.repeated == REPEATED
    assert {label: len(places) for label, places in population.donors.items()} == {"a": 9, "b": 9, "c": 9}


def test_a_class_without_a_remembered_row_ends_with_the_way_out(rows: pl.DataFrame, population: Population) -> None:
    found = replace(population.target, ids=tuple(rows["id"][: len(population.target.ids)]))
    known = rows[: len(found.ids)]
    with pytest.raises(DataError, match=r"class a \(3 such\).*--canaries"):
        Population.of(known, found, found, {}, "known")


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2])
def test_the_truth_is_the_rate_times_what_the_encoder_would_get_wrong(population: Population, rate: float) -> None:
    known, guessed = (is_right(found, UNSEEN) for found in (population.target, population.reference))
    anywhere = planted.truths(population, SCORING, Planting(rate))
    assert anywhere[ALL_ROWS] == pytest.approx(rate * (1 - known.mean()), abs=1e-6)
    unguessed = planted.truths(population, SCORING, Planting(rate, "unguessed"))
    assert unguessed[ALL_ROWS] == pytest.approx(rate * (1 - known[~guessed].mean()), abs=1e-6)
    assert anywhere[RATE] == pytest.approx(rate)
    assert unguessed[RATE] == pytest.approx(rate)


def test_the_truth_at_a_confident_fraction_is_that_of_a_sample_without_end(population: Population) -> None:
    planting, rng = Planting(0.2), np.random.default_rng(1)
    drawn = rng.integers(UNSEEN, size=200_000)
    given = rng.random(len(drawn)) < planting.rate
    places = drawn.copy()
    places[given] = [rng.choice(population.donors[LABELS[row % 3]]) for row in drawn[given]]
    codes = drawn % 3
    gains = []
    for chosen in (places, drawn):
        right = population.target.ranking[chosen, 0] == codes
        gains.append(metrics.confident_means(right, population.target.confidence[chosen], [0.2])[0, 0])
    truth = planted.truths(population, SCORING, planting)["corrected gap, surest 20 %"]
    # Each is a mean of 40,000 rows: known to 0.25 points.
    assert truth == pytest.approx(gains[0] - gains[1], abs=0.012)


def test_a_deal_has_no_row_twice_and_plants_none_but_target_rows(population: Population) -> None:
    scores, is_planted = population.deal(SCORING, Planting(0.5), 150, np.random.default_rng(0))
    rows = scores["id"].str.split("/").list.get(0).cast(pl.Int64)
    assert rows.n_unique() == 300
    assert scores["role"].to_list() == ["target"] * 150 + ["unseen"] * 150
    assert not is_planted[150:].any()
    assert scores.filter(is_planted)["target_correct"].all()
    assert 50 < is_planted.sum() < 100
    same = population.deal(SCORING, Planting(0.0), 150, np.random.default_rng(0))
    assert not same[1].any()
    # What is not planted keeps its own answer.
    kept = ~is_planted
    assert same[0].filter(kept)["id"].to_list() == scores.filter(kept)["id"].to_list()


def test_more_than_can_be_planted_is_refused(population: Population) -> None:
    with pytest.raises(ConfigError, match=r"a rate of 0\.9 cannot be planted unguessed"):
        population.chances(Planting(0.9, "unguessed"))
    with pytest.raises(ConfigError, match="--rows=151: there are 300 usable unseen rows"):
        Bench(population, SCORING, 151)
    with pytest.raises(ConfigError, match=r"scoring\.ties=shared"):
        Bench(population, replace(SCORING, ties="first"), 50)


PLANTINGS = (Planting(0.0), Planting(0.5))
SEEDS = 8


def calibration(population: Population) -> dict[str, Any]:
    """What a calibration finds, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        found, _ = planted.measure(Bench(population, SCORING, 75), PLANTINGS, SEEDS)
    return found | {"encoder": "an encoder", "data": "Shapes"}


@pytest.fixture(scope="module")
def sound(population: Population) -> dict[str, Any]:
    return calibration(population)


def checked(found: dict[str, Any], begin: str) -> dict[str, bool]:
    return {check["name"]: check["passed"] for check in found["checks"] if check["name"].startswith(begin)}


def test_what_is_planted_is_recovered(sound: dict[str, Any]) -> None:
    nothing, much = ({figure["figure"]: figure for figure in part["figures"]} for part in sound["planted"])
    assert nothing[ALL_ROWS]["truth"] == 0
    assert much[ALL_ROWS]["truth"] > 0.25
    for figures in (nothing, much):
        for figure in (figures[ALL_ROWS], figures[RATE]):
            error = figure["deviation"] / math.sqrt(SEEDS)
            assert abs(figure["mean"] - figure["truth"]) < 4 * error
    assert much[ALL_ROWS]["above_zero"] > 5 * (nothing[ALL_ROWS]["above_zero"] + 1)
    assert all(checked(sound, "recovered").values())


def test_intervals_that_are_too_narrow_fail_the_calibration(
    population: Population, sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    intervals = statistics.intervals

    def narrow(samples: Any, level: float) -> Any:
        low, high = intervals(samples, level)
        return 0.55 * low + 0.45 * high, 0.45 * low + 0.55 * high

    monkeypatch.setattr(statistics, "intervals", narrow)
    broken = calibration(population)
    assert not any(checked(broken, "recovered").values())
    assert not any(checked(broken, "false positives").values())
    assert told.summary(broken["checks"], SEEDS).startswith("NOT CALIBRATED")
    assert [part["figures"][0]["mean"] for part in broken["planted"]] == [
        part["figures"][0]["mean"] for part in sound["planted"]
    ]


def test_an_encoder_that_is_measured_better_than_it_is_fails_the_calibration(
    population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = LabelInference.score

    def flattering(self: LabelInference, rows: pl.DataFrame, *parts: Any) -> pl.DataFrame:
        # Four in ten target rows count as right whatever was answered.
        scores = score(self, rows, *parts)
        lucky = (pl.col("role") == "target") & (pl.col("id").hash(1) % 10 < 4)
        return scores.with_columns(target_correct=pl.col("target_correct") | lucky)

    monkeypatch.setattr(LabelInference, "score", flattering)
    assert not checked(calibration(population), "recovered")["recovered: 0 % planted"]


def test_processes_change_nothing(population: Population, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(population, SCORING, 50)
    found = {}
    for count in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        found[count] = planted.trials(bench, PLANTINGS, 2)
    assert found[1] == found[2]
    assert [len(some) for some in found[1]] == [2, 2]
    assert len({some[0].estimates[ALL_ROWS] for some in found[1]}) == 2


def test_shares_of_intervals_and_lists_by_hand() -> None:
    def trial(low: float, high: float, listed: int, found: int) -> Trial:
        return Trial({"x": ((low + high) / 2, low, high)}, 2, listed, found)

    trials = [trial(-1, 1, 2, 1), trial(0.2, 0.4, 0, 0), trial(0.1, 0.3, 4, 2), Trial({"x": None}, 2, 0, 0)]
    (found,) = planted.recovered(trials, {"x": 0.25})
    counts = {key: found[key] for key in ("seeds", "undefined", "held", "held_of_100", "above_zero", "below_zero")}
    assert counts == {"seeds": 3, "undefined": 1, "held": 3, "held_of_100": 3, "above_zero": 2, "below_zero": 0}
    assert found["mean"] == pytest.approx((0 + 0.3 + 0.2) / 3)
    assert planted.recovered(trials, {"x": 0.35})[0]["held"] == 2
    listed = planted.listed(trials)
    assert listed["false_share"] == pytest.approx((0.5 + 0 + 0.5 + 0) / 4)
    assert listed["found_share"] == 3 / 8
    assert planted.listed([Trial({}, 0, 0, 0)])["found_share"] is None


def test_a_roc_is_what_counting_pairs_gives() -> None:
    rng = np.random.default_rng(0)
    remembered, others = rng.normal(1, 1, 40).round(1), rng.normal(0, 1, 200).round(1)
    roc = Roc.of(remembered, others)
    assert roc.area == pytest.approx(metrics.auroc(remembered, others))
    # At most 2 of 200 others at or above the threshold.
    allowed = np.sort(others)[-3]
    assert roc.found_at(0.01) == pytest.approx((remembered > allowed).mean())
    twice = Roc.of(np.append(remembered, remembered[:1]), others)
    weighted = Roc.of(remembered, others, np.array([2.0, *[1.0] * 39]))
    assert weighted.area == pytest.approx(twice.area)


def test_a_score_that_not_every_row_has_puts_the_others_last(population: Population) -> None:
    rocs = planted.detection(population, SCORING)
    entropy = population.every_answer(replace(SCORING, memorization_score="entropy"))
    assert entropy["memorization_score"].null_count() > 0
    assert rocs["probability", "unguessed"].area > rocs["probability", "anywhere"].area
    positive = entropy.filter("remembered")
    own = entropy.filter(~pl.col("remembered"))["memorization_score"].fill_null(-9.0).to_numpy()
    # Every class has as many donors, so that all pairs count alike.
    expected = metrics.auroc(positive["memorization_score"].fill_null(-9.0).to_numpy(), own)
    assert rocs["entropy", "anywhere"].area == pytest.approx(expected)


def test_the_document_holds_the_figures_and_the_picture(sound: dict[str, Any], tmp_path: Path) -> None:
    rocs = {("probability", "anywhere"): Roc(np.array([0.0, 0, 1]), np.array([0.0, 1, 1]))}
    told.planted_picture(sound, rocs, tmp_path / "calibration.svg")
    told.planted_picture(sound, rocs, tmp_path / "again.svg")
    assert (tmp_path / "calibration.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    parts, last = told.planted_tables(sound), told.summary(sound["checks"], SEEDS)
    text = told.document("calibration", "python -m dejavu_exp.calibrate", told.planted_text(sound), parts, last)
    held = sound["planted"][1]["figures"][0]["held"]
    assert f"| {100 * held / SEEDS:.1f} [" in text
    assert f"![{told.ALTERNATIVE}](calibration.svg)" in text
    assert text.count("passed |") + text.count("FAILED |") == len(sound["checks"])
    widths = {line.count("|") for line in parts[0].markdown().splitlines() if line.startswith("|")}
    assert widths == {8}
    told.show(told.planted_text(sound), parts, tmp_path, last)


SPLIT = PerClassSplit(target=20, heldout=5, shared=0, public=5, unseen=5, min_side_px=8)
SHAPES = Shapes(classes=3, train_per_class=30, val_per_class=5)


def test_canaries_are_target_rows_in_equal_numbers_and_nothing_else_is_repeated() -> None:
    found = canaries.Canaries(SHAPES, SPLIT, 0, 0.3, (2, 8, 32)).manifest().rows
    roles = SPLIT.assign(SHAPES.manifest().rows, 0)
    target = roles.filter(pl.col("role") == "target")["id"]
    repeated = found.filter(pl.col("planted_repeats") > 1)
    assert set(repeated["id"]) <= set(target)
    assert dict(repeated.group_by("planted_repeats").len().iter_rows()) == {2: 6, 8: 6, 32: 6}
    assert found.drop("planted_repeats").equals(SHAPES.manifest().rows.drop("planted_repeats"))
    # The draw is of ids, so that a lower share keeps the first of them.
    fewer = canaries.Canaries(SHAPES, SPLIT, 0, 0.1, (2,)).manifest().rows.filter(pl.col("planted_repeats") > 1)
    assert set(fewer["id"]) < set(repeated["id"])


@pytest.mark.parametrize(
    ("share", "repeats", "message"),
    [
        (0.0, (2,), "--share=0.0: must lie between 0 and 1"),
        (0.3, (1, 2), "--canaries=1,2: must be different whole numbers above 1"),
        (0.3, (2, 2), "--canaries=2,2: must be different"),
        (0.3, (), "--canaries=: must be"),
    ],
)
def test_canaries_check_themselves(share: float, repeats: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        canaries.Canaries(SHAPES, SPLIT, 0, share, repeats)


def test_too_few_target_rows_for_the_canaries() -> None:
    with pytest.raises(DataError, match="3 of 60 target rows would be canaries"):
        canaries.Canaries(SHAPES, SPLIT, 0, 0.05, (2, 4, 8, 16)).manifest()


def test_canaries_by_repeats(population: Population) -> None:
    """60 rows with others' answers that are remembered count as repeated 8 times, 90 with their own as not repeated."""
    unseen, target = np.arange(150, 300), np.arange(150)
    places = target.copy()
    places[:60] = [population.donors[LABELS[row % 3]][0] for row in target[:60]]
    roles = ["target"] * 150 + ["unseen"] * 150
    scores = population.scores(SCORING, np.concatenate([target, unseen]), np.concatenate([places, unseen]), roles)
    repeats = scores.select("id", planted_repeats=pl.Series([8] * 60 + [1] * 240))
    plan: Any = SimpleNamespace(scoring=SCORING, seed=0)
    (plain, often), rocs = canaries.by_repeats(plan, scores, repeats)
    assert [(row["repeats"], row["rows"], row["unseen"]) for row in (plain, often)] == [(1, 90, 150), (8, 60, 150)]
    known, guessed = (is_right(found, 300) * 1.0 for found in (population.target, population.reference))
    gap = (1 - guessed[:60]).mean() - (known - guessed)[150:].mean()
    assert often["corrected_gap"]["value"] == pytest.approx(gap)
    assert often["corrected_gap"]["low"] > plain["corrected_gap"]["high"]
    column = scores["memorization_score"].to_numpy()
    assert often["auroc"] == pytest.approx(metrics.auroc(column[:60], column[150:])) == rocs[8].area
    assert often["listed"] == (scores["q_value"][:60] <= 0.1).mean() > plain["listed"]
    broken = scores.with_columns(
        status=pl.when(pl.col("role") == "unseen").then(pl.lit("too_small")).otherwise("status")
    )
    with pytest.raises(DataError, match="no unseen row could be used"):
        canaries.by_repeats(plan, broken, repeats)


def test_a_configuration_with_canaries_builds() -> None:
    settings = canaries.with_canaries(settings_of(*SMALL), 0.3, [2, 8])
    found: Any = config.build(settings)["dataset"]
    assert found == canaries.Canaries(found.dataset, found.split, 0, 0.3, (2, 8))
    assert (found.repeats, found.dataset.train_per_class, found.split.target) == ((2, 8), 30, 8)


def test_the_command_writes_the_same_figures_again(
    population: Population, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "population", lambda plan: (population, "an encoder"))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    found = []
    for name in ("first", "second"):
        with pytest.raises(SystemExit) as ended:
            calibrate.main(["--seeds", "2", "--rows", "20", "--out", str(tmp_path / name), "scoring.resamples=100"])
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "calibration.json",
            "calibration.md",
            "calibration.svg",
        }
        found.append((tmp_path / name / "calibration.json").read_text())
        told_all = json.loads(found[-1])
        assert ended.value.code == (not all(check["passed"] for check in told_all["checks"]))
        assert [planted["rate"] for planted in told_all["planted"]] == [0.0, 0.01, 0.05, 0.2, 0.05]
        assert told_all["run"]["config"]["scoring"]["resamples"] == 100
    assert found[0] == found[1]


TRAINED = (*SMALL, "model.recipe.epochs=30", "dataset.planted_share=1.0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"trainer.cache={tmp_path_factory.mktemp('cache')}"


@pytest.mark.slow
def test_a_population_comes_out_of_the_stages_of_a_run(cache: str) -> None:
    plan = Plan(**config.build(settings_of(*TRAINED, cache)))
    found, encoder = calibrate.population(plan)
    assert set(found.rows["id"]) == {f"val/{label}/{row:04}.png" for label in found.donors for row in range(8)}
    assert found.name == "naive_bayes"
    assert "trained here on 24 images" in encoder
    manifest = plan.dataset.manifest().rows
    repeated = set(manifest.filter(pl.col("planted_repeats") > 1)["id"])
    donors = found.target.ids[len(found.rows) :]
    assert set(donors) <= repeated
    assert len(donors) == sum(map(len, found.donors.values())) > 6


@pytest.mark.slow
def test_canaries_are_trained_and_measured(cache: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        calibrate.main(["--canaries", "4,8", "--share", "0.5", "--out", str(tmp_path), *TRAINED, cache])
    assert not ended.value.code
    found = json.loads((tmp_path / "canaries.json").read_text())
    assert [(row["repeats"], row["rows"]) for row in found["repeats"]] == [(1, 12), (4, 6), (8, 6)]
    assert [row["unseen"] for row in found["repeats"]] == [24, 24, 24]
    # What is written down is what was run: built again, it has the same canaries.
    again = config.build(yaml.safe_load((tmp_path / "config.yaml").read_text()))["dataset"].manifest().rows
    counts = dict(again.group_by("planted_repeats").len().iter_rows())
    assert counts == {1: len(again) - 12, 4: 6, 8: 6}
    scores = pl.read_parquet(tmp_path / "scores.parquet").filter(
        pl.col("reference") == "naive_bayes", pl.col("role") == "target"
    )
    often = scores.join(again.filter(pl.col("planted_repeats") == 8), on="id", how="semi")
    assert found["repeats"][2]["target_right"] == often["target_correct"].mean()
    assert (tmp_path / "canaries.md").read_text().count("| repeated ") == 2
    assert (tmp_path / "canaries.svg").exists()


def test_bad_command_lines_end_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--canaries", "2,x"], "--canaries=2,x: must be whole numbers"),
        (["--seeds", "0"], "--seeds=0: must be at least 1"),
        (["modle=x"], "modle"),
        (["--canaries", "2", "model=efficientnet_lite0"], "the model is not trained here"),
        (["scoring=object_inference"], "cannot be planted"),
    ):
        with pytest.raises(SystemExit) as stopped:
            calibrate.main(arguments)
        assert message in str(stopped.value)
    with pytest.raises(SystemExit):
        calibrate.main(["--share", "0.1"])
    assert "--share is for a calibration with --canaries" in capsys.readouterr().err


def test_help_needs_nothing_heavy() -> None:
    code = "import sys, dejavu_exp.calibrate; sys.exit(bool({'torch', 'polars', 'hydra', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    shown = subprocess.run(
        [sys.executable, "-m", "dejavu_exp.calibrate", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--canaries" in shown
