"""Comparisons are made from planted figures, so every cell of the table is known."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from dejavu_exp import compare, tables
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.report import compared
from dejavu_exp.report.html import SCRIPT

HOSTILE = "<script>alert(1)</script> a|b [/red] $x_$ _y"


def estimate(value: float | None, n_used: int = 40, n_excluded: int = 2) -> dict[str, Any]:
    """An estimate whose ends are known from its value."""
    low, high = (None, None) if value is None else (value - 0.05, value + 0.1)
    return {"value": value, "low": low, "high": high, "n_used": n_used, "n_excluded": n_excluded}


def cell(target: float, reference: float) -> dict[str, Any]:
    figures = {"target": target, "reference": reference, "gap": target - reference, "same_rows_gap": target - reference}
    return {name: estimate(value) for name, value in figures.items()}


def role(target: float, reference: float, shares: Sequence[float]) -> dict[str, Any]:
    names = ("memorized", "correlated", "forgotten", "unassociated")
    curve = [i / 20 for i in range(17)]
    return {
        "top1": {
            "100": cell(target, reference),
            "20": cell(target + 0.1, reference),
            "5": cell(target + 0.2, reference),
        },
        "top5": {share: cell(target + 0.3, reference + 0.3) for share in ("100", "20", "5")},
        "quadrants": {name: estimate(share) for name, share in zip(names, shares, strict=True)},
        "curve": dict.fromkeys(("percent", "target", "reference", "gap", "gap_low", "gap_high"), curve),
    }


def reference(target: float, rate: float, *, unseen: bool = True, n_classes: int = 2) -> dict[str, Any]:
    """Figures of one reference: accuracy `target` against `rate` on target rows, 0.3 against `rate` on unseen ones."""
    found: dict[str, Any] = {
        "description": "planted",
        "verdict": "planted",
        "roles": {"target": role(target, rate, (0.25, 0.35, 0.1, 0.3))},
        "per_class": [
            {
                "label": f"n{i:08d}",
                "name": f"class {i}",
                **{key: estimate(2 / 3) for key in ("target", "reference", "gap")},
            }
            for i in range(n_classes)
        ],
        "planted": {"auroc": estimate(0.9), "groups": []},
    }
    if unseen:
        found["roles"]["unseen"] = role(0.3, rate, (0.2, 0.3, 0.2, 0.3))
        by_share = {share: estimate(target - 0.3, n_used=80) for share in ("100", "20", "5")}
        found["corrected_gap"] = {"top1": by_share, "top5": by_share}
    return found


def planted(
    *,
    target: float = 0.5,
    encoder: str = "timm resnet18, logits",
    created: str = "2026-01-01T00:00:00+00:00",
    references: Mapping[str, Any] | None = None,
    trained_here: bool = True,
    epoch: int | None = None,
    data: str = "d" * 32,
    split: str = "0123456789abcdef",
    **config: Any,
) -> dict[str, Any]:
    """What figures.json of a run holds; `config` is in dotted keys with "__" for the dot."""
    nested: dict[str, Any] = {"seed": 0}
    for key, value in config.items():
        *parts, last = key.split("__")
        place = nested
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    return {
        "schema": tables.FIGURES_VERSION,
        "title": "planted",
        "headline": "naive_bayes",
        "infers": "label",
        "encoder": {
            "description": encoder,
            "weights": "file planted",
            "weights_hash": "0" * 32,
            "random": False,
            "trained_here": trained_here,
            "epoch": epoch,
        },
        "dataset": {"name": "planted", "rows": 100, "labels": 2, "hash": data},
        "split": {"hash": split},
        "references": references or {"class_prior": reference(target, 0.1), "naive_bayes": reference(target, 0.2)},
        "run": {"config": nested, "created": created, "seconds": {"encoder": 3.0, "references/naive_bayes": 1.25}},
    }


def write(folder: Path, figures: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    (folder / "figures.json").write_text(json.dumps(figures, indent=1, sort_keys=True))
    return folder


def page(path: Path) -> str:
    """A page without its own script, so that one in it is a foreign one."""
    return path.read_text().replace(f"<script>{SCRIPT}</script>", "", 1)


def command(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dejavu_exp.compare", *map(str, arguments)],
        env={**os.environ, "HYDRA_FULL_ERROR": "0", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_figure_reaches_its_cell(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "10", planted(target=0.6, epoch=7, probe__k=20))
    figures = planted(target=0.5, probe__k=10)
    figures["utility"] = [{"measure": "knn", "estimate": estimate(0.75)}]
    figures["references"]["naive_bayes"]["both_directions"] = {"top1": {"100": estimate(0.22)}}
    write(tmp_path / "runs" / "2", figures)
    result = compare.gather([tmp_path / "runs"])

    table = result.table
    assert table["run"].unique(maintain_order=True).to_list() == ["2", "10"]
    assert len(table) == 2 * 2 * 2 * 3
    assert result.settings == ("probe.k",)
    row = next(
        row for row in table.iter_rows(named=True) if (row["run"], row["top"], row["surest"]) == ("2", "top1", 20.0)
    )
    assert (row["reference"], row["headline"], row["probe.k"]) == ("naive_bayes", True, 10)
    assert (row["target_accuracy"], row["reference_accuracy"]) == (0.6, 0.2)
    assert row["gap"] == pytest.approx(0.4)
    assert (row["gap_low"], row["gap_high"]) == (pytest.approx(0.35), pytest.approx(0.5))
    assert (row["gap_n_used"], row["gap_n_excluded"]) == (40, 2)
    assert row["gap_unseen"] == pytest.approx(0.2)
    assert (row["corrected_gap"], row["corrected_gap_n_used"]) == (pytest.approx(0.2), 80)
    assert [row[name] for name in ("memorized", "correlated", "forgotten", "unassociated")] == [0.25, 0.35, 0.1, 0.3]
    assert (row["planted_auroc"], row["reference_seconds"], row["utility_knn"]) == (0.9, 1.25, 0.75)
    assert (row["split"], row["trained_here"], row["epoch"]) == ("01234567", True, None)
    whole = table.filter(pl.col("run") == "2", pl.col("top") == "top1", pl.col("surest") == 100)
    assert whole["both_directions"].to_list() == [0.22, None]
    assert whole["reference_seconds"].to_list() == [1.25, None]
    assert table.filter(run="10")["utility_knn"].null_count() == 12
    assert table.filter(run="10")["epoch"].unique().to_list() == [7]


def test_the_files_hold_the_same_table(tmp_path: Path) -> None:
    write(tmp_path / "1", planted(target=0.5, probe__k=10))
    write(tmp_path / "2", planted(target=0.6, probe__k=20))
    (write(tmp_path / "3", {}) / "figures.json").unlink()
    result = compare.compare([tmp_path], tmp_path)
    assert pl.read_parquet(tmp_path / "comparison.parquet").equals(result.table)
    csv = pl.read_csv(tmp_path / "comparison.csv", infer_schema_length=None)
    assert csv.columns == result.table.columns
    assert csv["corrected_gap"].to_list() == pytest.approx(result.table["corrected_gap"].to_list())
    markdown = (tmp_path / "comparison.md").read_text()
    assert "| 2 | timm resnet18 | naive_bayes | 100 % | 60.0 [55.0, 70.0] | 20.0 [15.0, 30.0] |" in markdown
    html = page(tmp_path / "comparison.html")
    assert "<td>60.0 [55.0, 70.0]</td>" in html
    assert "Left out</h2>\n<ul><li><b>3</b>: no figures.json" in html
    assert not re.search(r"<script|<link|src=\"(?!data:)|url\((?!#)", html)


def broken_figures() -> dict[str, Any]:
    missing, empty, odd = planted(seed=1), planted(seed=2), planted(seed=3)
    del missing["encoder"]["trained_here"]
    empty["references"] = {}
    odd["references"]["naive_bayes"]["roles"]["target"]["top1"]["100"]["gap"]["value"] = "much"
    shapeless = planted(seed=4)
    shapeless["references"]["naive_bayes"] = None
    utility = planted(seed=5)
    utility["utility"] = {"knn": 1}
    return {
        "has no encoder.trained_here": missing,
        "no figures of any reference": empty,
        "'much' and not a number": odd,
        "has no roles": shapeless,
        "utility is not a list": utility,
        f"schema 2, and this version reads {tables.FIGURES_VERSION}": {**planted(seed=6), "schema": 2},
        "schema None": {"title": "older still"},
        "has schema None": [1, 2],
        "other data: the manifest's hash is eeeeeeee, and 2 of 3 runs have dddddddd": planted(data="e" * 32, seed=7),
        "the same configuration as good 1": planted(created="2025-12-31T00:00:00+00:00", probe__k=10),
    }


@pytest.mark.parametrize("reason", broken_figures())
def test_what_cannot_be_compared_is_left_out_with_the_reason(tmp_path: Path, reason: str) -> None:
    write(tmp_path / "good 1", planted(probe__k=10))
    if not reason.startswith("the same"):
        write(tmp_path / "good 2", planted(probe__k=20))
    write(tmp_path / "bad", broken_figures()[reason])
    result = compare.gather([tmp_path])
    assert [item.run for item in result.skipped] == ["bad"]
    assert reason in result.skipped[0].reason
    assert "bad" not in result.table["run"].to_list()
    assert f"- bad: {result.skipped[0].reason}" in compared.markdown(result)


def test_killed_and_damaged_runs_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "good", planted())
    (write(tmp_path / "killed", {}) / "figures.json").unlink()
    (write(tmp_path / "cut", {}) / "figures.json").write_text('{"schema": 3, ')
    (write(tmp_path / "bytes", {}) / "figures.json").write_bytes(b"\xff\xfe")
    result = compare.gather([tmp_path])
    reasons = {item.run: item.reason for item in result.skipped}
    assert set(reasons) == {"killed", "cut", "bytes"}
    assert "has not finished" in reasons["killed"]
    assert "cannot be read" in reasons["cut"]
    assert "cannot be read" in reasons["bytes"]


def test_of_equal_configurations_the_newest_stays(tmp_path: Path) -> None:
    write(tmp_path / "a", planted(target=0.5, created="2026-01-01T00:00:00+00:00"))
    write(tmp_path / "b", planted(target=0.6, created="2026-01-03T00:00:00+00:00"))
    write(tmp_path / "c", planted(target=0.7, created="2026-01-02T00:00:00+00:00"))
    write(tmp_path / "d", planted(target=0.7, created="2026-01-02T00:00:00+00:00", data="e" * 32))
    result = compare.gather([tmp_path])
    assert result.table["run"].unique().to_list() == ["b"]
    assert {item.run: item.reason.split(",")[0] for item in result.skipped} == {
        "a": "the same configuration as b",
        "c": "the same configuration as b",
        "d": "other data: the manifest's hash is eeeeeeee",
    }


def test_where_two_data_sets_are_as_frequent_the_first_by_path_decides(tmp_path: Path) -> None:
    write(tmp_path / "2", planted(data="e" * 32))
    write(tmp_path / "10", planted(data="d" * 32))
    assert compare.gather([tmp_path]).table["run"].unique().to_list() == ["2"]


def test_run_folders_are_found_at_any_depth_and_nowhere_else(tmp_path: Path) -> None:
    write(tmp_path / "x" / "sweep" / "10", planted())
    write(tmp_path / "x" / "sweep" / "2", planted())
    for inside in ("x/sweep/2/.hydra", "x/sweep/2/deeper", "x/cache/1", "x/wandb/1", "x/.hidden/1"):
        write(tmp_path / inside, planted())
    run = write(tmp_path / "y", planted())
    found, unlisted = compare.find([tmp_path / "x", run, tmp_path / "x" / "sweep"])
    assert list(found.values()) == ["x/sweep/2", "x/sweep/10", "y"]
    assert not unlisted
    assert list(compare.find([tmp_path / "x"])[0].values()) == ["sweep/2", "sweep/10"]
    assert list(compare.find([run])[0].values()) == ["y"]


def test_folders_without_runs_are_an_error_that_names_them(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "1", planted())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: no run folder below it; one has config.yaml or figures.json"):
        compare.compare([tmp_path / "runs", tmp_path / "empty"], tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere: no such folder"):
        compare.compare([tmp_path / "nowhere"], tmp_path)


def test_no_usable_run_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    write(tmp_path / "1", {"schema": 2})
    write(tmp_path / "2", {"schema": tables.FIGURES_VERSION})
    with pytest.raises(DataError, match=r"(?s)none of the 2 run folders.*1: figures.json has schema 2.*2: .* no run\."):
        compare.compare([tmp_path], tmp_path)


def test_settings_are_those_that_tell_runs_apart() -> None:
    shared = {"model._target_": "Timm", "seed": 0, "tracking.mode": "auto", "trainer.cache": "a", "gallery": 12}
    here = {**shared, "split.side": 8, "probe.query.side": 8, "probe.k": 10, "references.nb._target_": "NB"}
    there = {**here, "split.side": 9, "probe.query.side": 9, "probe.k": 20, "tracking.mode": "none", "gallery": 3}
    assert compare.differing([here, there]) == ["split.side", "probe.k"]
    # A reference that only one run has is no setting of it: the column `reference` says so.
    assert compare.differing([here, {**here, "references.two._target_": "Knn", "references.two.k": 5}]) == []
    # A key that a run of the same part lacks is one.
    assert compare.differing([here, {**here, "model.layer": 4}]) == ["model.layer"]
    # Of another part, the part alone is told.
    assert compare.differing([{**here, "model.layer": 4}, {**here, "model._target_": "Clip"}]) == ["model._target_"]


def test_settings_of_mixed_kinds_become_text(tmp_path: Path) -> None:
    for place, value in enumerate((1, "auto", [1, 2], True, None)):
        write(tmp_path / str(place), planted(probe__k=value, probe__x=float(place), probe__on=place > 1))
    table = compare.gather([tmp_path]).table.unique("run", keep="first", maintain_order=True)
    assert table["probe.k"].to_list() == ["1", "auto", "[1, 2]", "True", None]
    assert table["probe.x"].to_list() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert table["probe.on"].dtype == pl.Boolean


def sweep_of(tmp_path: Path, setting: str, reference_name: str = "naive_bayes") -> compared.Sweep:
    found = compared.sweeps(compare.gather([tmp_path]))
    (chosen,) = [sweep for sweep in found if (sweep.setting, sweep.reference) == (setting, reference_name)]
    return chosen


def test_a_sweep_is_a_line_per_encoder_and_other_setting(tmp_path: Path) -> None:
    place = 0
    for encoder in ("timm a, logits", "timm b, logits"):
        for temperature in (0.1, 0.5):
            for k in (100, 5, 20):
                place += 1
                write(
                    tmp_path / str(place),
                    planted(
                        target=k / 200,
                        encoder=encoder,
                        probe__k=k,
                        model__arch=encoder,
                        model__recipe__temperature=temperature,
                    ),
                )
    sweep = sweep_of(tmp_path, "probe.k")
    assert [series.group for series in sweep.series] == [
        "timm a, temperature 0.1", "timm a, temperature 0.5", "timm b, temperature 0.1", "timm b, temperature 0.5"
    ]  # fmt: skip
    for series in sweep.series:
        assert series.rows["probe.k"].to_list() == [5, 20, 100]
        assert series.rows["target_accuracy"].to_list() == [0.025, 0.1, 0.5]
        assert series.rows["reference_accuracy"].to_list() == [0.2, 0.2, 0.2]
        assert series.rows["surest"].to_list() == [100.0, 100.0, 100.0]
        assert series.gap() == "corrected_gap"
    assert sweep.along == ()
    assert len(sweep_of(tmp_path, "model.recipe.temperature").series) == 6


def test_what_moves_along_with_a_setting_is_said_and_not_held_fixed(tmp_path: Path) -> None:
    for place, (arch, epoch) in enumerate([(arch, epoch) for arch in "ab" for epoch in (10, 20, 30)]):
        figures = planted(encoder=f"vicreg {arch}", epoch=epoch, model__weights=f"{arch}-{epoch}.pth", model__arch=arch)
        write(tmp_path / str(place), figures)
    sweep = sweep_of(tmp_path, "epoch")
    assert [(series.group, series.rows["epoch"].to_list()) for series in sweep.series] == [
        ("vicreg a", [10, 20, 30]),
        ("vicreg b", [10, 20, 30]),
    ]
    assert sweep.along == ("model.weights",)


def test_a_reference_s_own_setting_is_swept_for_it_alone(tmp_path: Path) -> None:
    for top_tags in (1, 5):
        write(tmp_path / str(top_tags), planted(references__naive_bayes__top_tags=top_tags))
    result = compare.gather([tmp_path])
    assert [(sweep.setting, sweep.reference) for sweep in compared.sweeps(result)] == [
        ("references.naive_bayes.top_tags", "naive_bayes")
    ]


def test_seeds_and_an_epoch_said_by_a_setting_make_no_axis(tmp_path: Path) -> None:
    for seed in (0, 1):
        for epochs in (1, 2):
            write(tmp_path / f"{seed}{epochs}", planted(seed=seed, epoch=epochs, model__recipe__epochs=epochs))
    result = compare.gather([tmp_path])
    assert {sweep.setting for sweep in compared.sweeps(result)} == {"model.recipe.epochs"}
    assert [series.group for series in compared.sweeps(result)[0].series] == ["seed 0", "seed 1"]


def test_without_unseen_rows_the_raw_gap_is_shown_and_said(tmp_path: Path) -> None:
    for k in (5, 10):
        found = {"naive_bayes": reference(k / 20, 0.1, unseen=False)}
        write(tmp_path / str(k), planted(references=found, probe__k=k))
    sweep = sweep_of(tmp_path, "probe.k")
    assert sweep.series[0].gap() == "gap"
    assert "their raw gap is not separated" in compared.markdown(compare.gather([tmp_path]))


def test_undefined_figures_stay_undefined(tmp_path: Path) -> None:
    figures = planted(probe__k=5)
    for found in figures["references"].values():
        for cells in found["roles"]["target"]["top1"].values():
            cells.update({name: estimate(None, 0) for name in cells})
        found["corrected_gap"]["top1"] = {share: estimate(None, 0) for share in ("100", "20", "5")}
        found["roles"]["target"]["quadrants"] = {
            name: estimate(None, 0) for name in found["roles"]["target"]["quadrants"]
        }
    write(tmp_path / "5", figures)
    write(tmp_path / "10", planted(probe__k=10))
    table = compare.compare([tmp_path], tmp_path).table.filter(pl.col("run") == "5", pl.col("top") == "top1")
    assert table["gap"].null_count() == len(table)
    assert table["gap_n_used"].unique().to_list() == [0]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "∕") / os.fsdecode(b"\xff")
    write(folder / "1", planted(encoder=f"{HOSTILE}\x00\ud800, logits", probe__k=1, probe__name=HOSTILE))
    found = {HOSTILE: reference(0.5, 0.1)}
    write(folder / "2", planted(encoder=HOSTILE, probe__k=2, probe__name=HOSTILE, references=found))
    write(folder / "3", {"schema": HOSTILE})
    result = compare.compare([tmp_path], tmp_path)
    html, markdown = page(tmp_path / "comparison.html"), (tmp_path / "comparison.md").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in lines[:3]} == {lines[0].count(" | ")}
    compared.show(result)


def test_tests_of_two_runs_have_a_table_where_there_are_any(tmp_path: Path) -> None:
    for k in (10, 20):
        write(tmp_path / str(k), planted(probe__k=k))
    result = compare.gather([tmp_path])
    said = "Do two runs differ?"
    assert said not in compared.html(replace(result, tests=result.tests.clear()))
    row = {
        "first": HOSTILE, "second": "20", "reference": "naive_bayes", "role": "target", "n_used": 38,
        "difference": -0.0234, "p_permutation": 0.0123, "p_mcnemar": None, "p_holm": 0.0369,
    }  # fmt: skip
    html = compared.html(replace(result, tests=pl.DataFrame([row], schema=dict(compared.TESTS))))
    table = html[html.index(said) : html.index("The runs</h2>")]
    cells = re.findall("<td.*?>(.*?)</td>", table)
    assert cells == [escape(HOSTILE), "20", "naive_bayes", "target", "38", "-2.3", "0.012", "–", "0.037"]


def test_many_runs_are_compared_in_seconds(tmp_path: Path) -> None:
    """A hundred runs as large as real ones: 3 references, 200 classes, two settings swept with five encoders."""
    names = ("naive_bayes", "class_prior", "label_shuffle")
    for place in range(100):
        found = {name: reference(place / 200, 0.1, n_classes=200) for name in names}
        settings: dict[str, Any] = {
            "model__arch": place % 5,
            "probe__k": 10 + place // 5 % 5,
            "split__target": place // 25,
        }
        write(tmp_path / str(place), planted(references=found, encoder=f"timm net{place % 5}, logits", **settings))
    assert (tmp_path / "0" / "figures.json").stat().st_size > 350_000
    # Processor time beside that of reading the files, for machines differ: 8 times as much on a quiet one.
    read_from = time.process_time()
    for place in range(100):
        json.loads((tmp_path / str(place) / "figures.json").read_text())
    reading = time.process_time() - read_from
    before = os.times()
    done = command(tmp_path, "--out", tmp_path / "out")
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0, done.stderr
    assert "260 more rows are in the files." in done.stdout
    html = (tmp_path / "out" / "comparison.html").read_text()
    assert "The 40 largest of 100; the table has them all." in html
    assert seconds < 16 * reading


def test_the_command_line(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "1", planted(target=0.5, probe__k=10))
    write(tmp_path / "runs" / "2", planted(target=0.6, probe__k=20))
    (write(tmp_path / "runs" / "3", {}) / "figures.json").unlink()
    done = command(tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert "30.0 [25.0, 40.0]" in done.stdout
    assert "Left out: 3: no figures.json" in done.stdout
    for name in ("html", "md", "csv", "parquet"):
        path = tmp_path / "runs" / f"comparison.{name}"
        assert str(path) in done.stdout
        assert path.is_file()
    again = command(tmp_path / "runs", "--out", tmp_path / "deep" / "er")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "deep" / "er" / "comparison.html").read_bytes() == (
        tmp_path / "runs" / "comparison.html"
    ).read_bytes()


def test_the_command_line_tells_errors_without_a_traceback(tmp_path: Path) -> None:
    done = command(tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith(f"ConfigError: {tmp_path / 'nowhere'}: no such folder.")
    assert "Traceback" not in done.stderr
    assert "Traceback" in command(tmp_path / "nowhere", HYDRA_FULL_ERROR="1").stderr
    write(tmp_path / "runs", planted())
    file = tmp_path / "file"
    file.touch()
    assert command(tmp_path / "runs", "--out", file).stderr.startswith(f"ConfigError: --out {file}: is a file.")
    assert command().returncode == 2
    helped = command("--help")
    assert helped.returncode == 0
    assert "--out FOLDER" in helped.stdout


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "hydra", "omegaconf", "wandb", "lightning", "sklearn", "faiss", "matplotlib")
    code = f"import sys, dejavu_exp.compare; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
