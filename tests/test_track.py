"""Runs logged from their files, comparisons logged, paired tests between runs, and the dashboard."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from scipy.stats import binomtest
from test_compare import planted
from test_tracking import (  # noqa: F401 - fixtures
    CONFIG,
    PLACE,
    REPORT,
    key,
    logged_out,
    records,
    rows_of,
    serving,
    summary,
    tables,
    values,
    whole,
)

from dejavu_exp import cells, compare, dashboard, track, tracking
from dejavu_exp.errors import DataError
from dejavu_exp.report.compared import TESTS
from dejavu_exp.tables import FIGURES_VERSION

NO_TRACKING = {"_target_": "dejavu_exp.tracking.WandbTracking", "mode": "disabled"}


def finished(folder: Path, **tracked: Any) -> dict[str, Any]:
    """The files of a finished run; returns its figures."""
    facts, scores = whole()
    facts["schema"] = FIGURES_VERSION
    folder.mkdir(parents=True)
    (folder / "figures.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "tracking": {**NO_TRACKING, **tracked}}))
    (folder / "report.html").write_text(REPORT)
    scores.write_parquet(folder / "scores.parquet")
    return facts


def run_of(folder: Path) -> Any:
    (run,) = [record.run for record in records(folder) if record.HasField("run")]
    return run


def status_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        track.main(list(map(str, arguments)))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_run_without_tracking_is_logged_later_as_it_would_have_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = finished(tmp_path / "sweep" / "cell", project="its own", rows=10)
    cells.Status.here(cells.State.FINISHED, "dejavu_exp", (), True, None).write(tmp_path / "sweep" / "cell")
    assert status_of(tmp_path / "sweep") == 0
    assert capsys.readouterr().out.strip() == "cell: kept offline"
    run = run_of(tmp_path)
    assert (run.project, run.run_group, run.run_id) == ("its own", "sweep", tracking.run_id(facts))
    assert values(run.config.update)["seed"] == 3
    assert summary(tmp_path)["verdict"] == "the verdict"
    assert len(rows_of(tables(tmp_path)["prior/scores"])) == 10
    assert not list(tmp_path.rglob("media/html/*"))


def test_what_is_given_goes_before_what_the_run_was_configured_with(tmp_path: Path) -> None:
    finished(tmp_path / "run", project="its own")
    given = ("--project", "another", "--entity", "us", "--group", "g", "--rows", "4", "--images", "--mode", "offline")
    assert status_of(tmp_path, *given) == 0
    run = run_of(tmp_path)
    assert (run.project, run.entity, run.run_group) == ("another", "us", "g")
    rows = rows_of(tables(tmp_path)["prior/scores"])
    assert len(rows) == 4
    assert rows[0]["id"].startswith(PLACE)
    (page,) = tmp_path.rglob("media/html/*.html")
    assert page.read_text() == REPORT


def test_a_damaged_run_is_named_and_the_others_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1", "2", "3", "4"):
        finished(tmp_path / name)
    (tmp_path / "1" / "figures.json").write_text("{")
    (tmp_path / "2" / "scores.parquet").unlink()
    (tmp_path / "3" / "figures.json").write_text(json.dumps({"schema": FIGURES_VERSION - 1}))
    assert status_of(tmp_path, "--rows", 0) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["1", "2", "3", "4"]
    assert all("not logged" in line for line in lines[:3])
    assert f"schema {FIGURES_VERSION - 1}" in lines[2]
    assert lines[3] == "4: kept offline"


@pytest.mark.usefixtures("key")
def test_to_be_sent_and_not_sent_is_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path / "run")
    monkeypatch.setattr(tracking, "send", lambda *_: "the server is gone")
    assert status_of(tmp_path, "--mode", "online", "--rows", 0) == 1
    assert status_of(tmp_path, "--rows", 0) == 0
    monkeypatch.setattr(tracking, "send", lambda *_: None)
    assert status_of(tmp_path, "--mode", "online", "--rows", 0) == 0


def test_without_a_run_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no run folder below it"):
        track.main([str(tmp_path)])


def test_loading_the_command_loads_neither_wandb_nor_torch() -> None:
    code = "import sys, dejavu_exp.track, dejavu_exp.dashboard; sys.exit(bool({'wandb', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def write_run(folder: Path, right: dict[str, list[float]], reference: str = "naive_bayes", **figures: Any) -> Path:
    """A run whose scores are known: by role, whether each row is right (or its recall); row i has the id `<role>i`."""
    rows = [
        {
            "id": f"{role}{place}",
            "role": role,
            "reference": reference,
            "status": "ok",
            "target_recall_all": float(value),
        }
        for role, found in right.items()
        for place, value in enumerate(found)
    ]
    folder.mkdir(parents=True)
    (folder / "figures.json").write_text(json.dumps(planted(**figures)))
    scores = pl.DataFrame(rows).with_columns(target_correct=pl.col("target_recall_all") == 1)
    scores.write_parquet(folder / "scores.parquet")
    return folder


def test_two_runs_are_compared_row_by_row(tmp_path: Path) -> None:
    first, second = [1.0] * 60 + [0.0] * 40, [1.0] * 40 + [0.0] * 30 + [1.0] * 10 + [0.0] * 30
    write_run(tmp_path / "1", {"target": first, "unseen": first}, probe__k=1)
    write_run(tmp_path / "2", {"target": second, "unseen": first[:50]}, probe__k=2)
    table = compare.gather([tmp_path]).tests
    assert dict(table.schema) == dict(TESTS)
    target, unseen = table.rows(named=True)
    assert (target["first"], target["second"], target["reference"]) == ("1", "2", "naive_bayes")
    assert (target["role"], target["n_used"]) == ("target", 100)
    assert target["difference"] == pytest.approx(0.1)
    assert target["p_mcnemar"] == pytest.approx(binomtest(20, 30).pvalue)
    # Of differences that are all 1, 0 or -1 the permutation test is McNemar's, up to the luck of the draw.
    assert target["p_permutation"] == pytest.approx(
        target["p_mcnemar"], abs=4 * (0.1 * 0.9 / compare.PERMUTATIONS) ** 0.5
    )
    assert target["p_holm"] == pytest.approx(2 * target["p_permutation"])
    assert (unseen["role"], unseen["n_used"], unseen["difference"], unseen["p_holm"]) == ("unseen", 50, 0.0, 1.0)


def test_object_runs_are_compared_by_recall(tmp_path: Path) -> None:
    row = {"infers": "objects", "top": "all", "reference": "naive_bayes"}
    runs = [
        compare.Run(name, write_run(tmp_path / name, {"target": right}), "", "", {}, [row])
        for name, right in (("1", [0.5, 1.0, 0.25]), ("2", [0.0, 1.0, 0.5]))
    ]
    (found,) = compare.paired_tests(runs).rows(named=True)
    assert found["difference"] == pytest.approx(0.25 / 3)
    assert found["p_mcnemar"] is None


def test_only_usable_rows_of_a_shared_reference_count(tmp_path: Path) -> None:
    write_run(tmp_path / "1", {"target": [1.0, 1.0], "heldout": [1.0]}, probe__k=1)
    other = write_run(tmp_path / "2", {"target": [0.0, 0.0], "heldout": [0.0]}, probe__k=2)
    scores = pl.read_parquet(other / "scores.parquet")
    lost = scores.with_columns(status=pl.when(pl.col("id") == "target1").then(pl.lit("too_small")).otherwise("status"))
    lost.write_parquet(other / "scores.parquet")
    (found,) = compare.gather([tmp_path]).tests.rows(named=True)
    assert (found["role"], found["n_used"], found["difference"]) == ("target", 1, 1.0)
    lost.with_columns(reference=pl.lit("another")).write_parquet(other / "scores.parquet")
    assert compare.gather([tmp_path]).tests.is_empty()


def test_of_many_runs_the_most_similar_are_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, k, top in (("1", 1, 1), ("2", 2, 2), ("3", 1, 2)):
        write_run(tmp_path / name, {"target": [1.0, 0.0]}, probe__k=k, tagger__top=top)
    monkeypatch.setattr(compare, "MOST_TESTED", 2)
    assert compare.gather([tmp_path]).tests.select("first", "second").rows() == [("1", "3"), ("2", "3")]


def test_runs_without_scores_are_compared_without_tests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, k in (("1", 1), ("2", 2)):
        (write_run(tmp_path / name, {"target": [1.0]}, probe__k=k) / "scores.parquet").unlink()
    assert compare.compare([tmp_path], tmp_path).tests.is_empty()
    assert dict(pl.read_parquet(tmp_path / "tests.parquet").schema) == dict(TESTS)
    assert "no paired tests of 2 runs, among them 1" in caplog.text


def test_a_comparison_is_a_run_of_its_own_kind(tmp_path: Path) -> None:
    for name, k in (("1", 10), ("2", 20)):
        write_run(tmp_path / name, {"target": [1.0, 0.0]}, probe__k=k, model__weights=f"{PLACE}/{name}.safetensors")
    compare.main([str(tmp_path), "--track", "--project", "another", "--group", "g"])
    run = run_of(tmp_path)
    assert (run.project, run.run_group, run.job_type) == ("another", "g", "compare")
    assert run.display_name == "comparison of 2 runs"
    logged = tables(tmp_path)
    assert set(logged) == {
        "runs",
        "tests",
        *(f"label/{name}/gap_chart_table" for name in ("naive_bayes", "class_prior")),
    }
    kept = pl.read_parquet(tmp_path / "comparison.parquet")
    rows = rows_of(logged["runs"])
    assert [row["corrected_gap"] for row in rows] == pytest.approx(kept["corrected_gap"].to_list())
    assert {row["model.weights"] for row in rows} == {"1.safetensors", "2.safetensors"}
    assert rows_of(logged["tests"])[0]["n_used"] == 2
    bars = [(row["run"], row["corrected_gap"]) for row in rows_of(logged["label/naive_bayes/gap_chart_table"])]
    assert bars == [("1", pytest.approx(0.2)), ("2", pytest.approx(0.2))]
    (page,) = tmp_path.rglob("media/html/*.html")
    assert page.read_text() == (tmp_path / "comparison.html").read_text()


def panels(spec: Any) -> dict[str, Any]:
    """Panels of a report by their kind."""
    found: dict[str, Any] = {}
    for block in spec["blocks"]:
        for panel in block.get("metadata", {}).get("panelBankSectionConfig", {}).get("panels", []):
            found.setdefault(panel["viewType"], []).append(panel["config"])
    return found


@pytest.mark.usefixtures("key")
def test_the_dashboard_shows_what_runs_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    with serving("good") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        dashboard.main(["--project", "p", "--entity", "us", "--title", "the title"])
    (made,) = server.of("upsertView")
    assert (made["entityName"], made["projectName"], made["displayName"]) == ("us", "p", "the title")
    assert "/us/p/reports/" in capsys.readouterr().out
    shown = panels(json.loads(made["spec"]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    finished(tmp_path / "run")
    assert status_of(tmp_path) == 0
    known = summary(tmp_path)
    bars = {config["metrics"][0].removeprefix("summary_metrics.") for config in shown["Bar Chart"]}
    assert bars == set(dashboard.BARS)
    assert bars < set(known)
    assert set(dashboard.TABLES) < set(tables(tmp_path))
    columns = {column.removeprefix("summary:") for column in dashboard.COLUMNS if column.startswith("summary:")}
    assert columns < set(known)
    filters = json.dumps(json.loads(made["spec"]))
    for kind in (tracking.MEASURED, tracking.COMPARED_RUNS):
        assert f'"value": "{kind}"' in filters
    assert run_of(tmp_path).job_type == tracking.MEASURED


@pytest.mark.usefixtures("key")
def test_a_server_that_never_answers_does_not_hold_the_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    with serving("silent") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with pytest.raises(DataError, match="no answer within 1 s"):
            dashboard.save("p", None, "title", 1.0)


def test_why_there_is_no_dashboard_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such\nteam")

    monkeypatch.setattr(dashboard, "build", refuse)
    with pytest.raises(DataError, match=r"^Weights & Biases: no such team\. Log in"):
        dashboard.save("p", None, "title", 30.0)


def test_without_the_extra_the_dashboard_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit, match=r"dejavu_exp\[dashboard\]"):
        dashboard.main([])
