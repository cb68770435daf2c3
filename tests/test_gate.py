"""The release gate: what passes, what does not, and with which status the commands end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, Finished, measure
from omegaconf import OmegaConf

from dejavu_exp import cells, config, gate, launch
from dejavu_exp.cells import Cell, State
from dejavu_exp.errors import ConfigError
from dejavu_exp.gate import Thresholds

RUN = (*SMALL, "reference=class_prior", "utility=none")


def estimate(low: float | None, high: float | None) -> dict[str, Any]:
    value = None if low is None or high is None else (low + high) / 2
    return {"value": value, "low": low, "high": high, "n_used": 10, "n_excluded": 0}


def figures(raw: dict[str, Any], corrected: dict[str, Any] | None, *, random: bool = False) -> dict[str, Any]:
    """Of a label run whose narrower share and second reference say something else."""
    other = estimate(-1.0, -0.9)
    found: dict[str, Any] = {
        "roles": {"target": {"top1": {"5": {"gap": other}, "100": {"gap": raw}}, "top5": {"100": {"gap": other}}}}
    }
    if corrected is not None:
        found["corrected_gap"] = {"top1": {"5": other, "100": corrected}, "top5": {"100": other}}
    references = {"class_prior": {**found, "corrected_gap": {"top1": {"100": other}}}, "naive_bayes": found}
    return {"infers": "label", "headline": "naive_bayes", "encoder": {"random": random}, "references": references}


def object_figures(corrected: dict[str, Any]) -> dict[str, Any]:
    """Of an object run, its keys in the order of a file."""
    other = {"gap": estimate(-1.0, -0.9)}
    found = {
        "roles": {"target": {"all": other, "top10": {"gap": estimate(0.5, 0.6)}}},
        "corrected": {"all": other, "top10": {"gap": corrected}},
    }
    return {
        "infers": "objects",
        "headline": "text_embedding",
        "encoder": {"random": False},
        "references": {"text_embedding": found},
        "run": {"config": {"scoring": {"predictions": ["top10", "all"]}}},
    }


def passed(found: dict[str, Any] | None) -> bool:
    assert found is not None
    return bool(found["passed"])


@pytest.mark.parametrize(
    ("bound", "low", "high", "expected"),
    [
        ("high", -0.02, 0.04, True),
        ("high", -0.02, 0.05, True),  # not above it
        ("high", -0.02, 0.06, False),  # may be larger, and that is not ruled out
        ("low", -0.02, 0.06, True),  # as it is not shown either
        ("low", 0.06, 0.20, False),
    ],
)
def test_an_end_of_the_corrected_interval_decides(bound: Any, low: float, high: float, expected: bool) -> None:
    found = figures(estimate(0.3, 0.4), estimate(low, high))
    assert passed(gate.check(found, Thresholds(0.05, bound))) is expected
    assert passed(gate.check(object_figures(estimate(low, high)), Thresholds(0.05, bound))) is expected


def test_without_unseen_rows_the_raw_gap_counts_only_where_that_is_asked_for() -> None:
    found = figures(estimate(0.01, 0.03), None)
    stopped = gate.check(found, Thresholds(0.05))
    assert not passed(stopped)
    assert stopped is not None
    assert "gate.gap=raw" in stopped["reason"]
    assert passed(gate.check(found, Thresholds(0.05, gap="raw")))
    assert not passed(gate.check(found, Thresholds(0.02, gap="raw")))


@pytest.mark.parametrize("bound", ["high", "low"])
def test_what_is_undefined_does_not_pass(bound: Any) -> None:
    nothing = estimate(None, None)
    for gap in ("corrected", "raw"):
        assert not passed(gate.check(figures(nothing, nothing), Thresholds(1.0, bound, gap)))
    small = estimate(-0.01, 0.01)
    assert not passed(gate.check(figures(small, small, random=True), Thresholds(1.0, bound)))


def test_the_reason_is_one_line_with_the_figure_the_threshold_and_what_was_compared() -> None:
    found = gate.check(figures(estimate(0.3, 0.4), estimate(0.1, 0.2)), Thresholds(0.05))
    assert found == {
        "passed": False,
        "reason": "The corrected gap to naive_bayes is 15.0 [10.0, 20.0] points, and the interval's "
        "upper end is above gate.max_gap=0.05 (5 points).",
        "thresholds": {"max_gap": 0.05, "bound": "high", "gap": "corrected"},
    }
    objects = gate.check(object_figures(estimate(0.1, 0.2)), Thresholds(0.05))
    assert objects is not None
    assert objects["reason"].startswith("The corrected PRG to text_embedding is 15.0 [10.0, 20.0]")


def test_no_threshold_is_no_gate() -> None:
    assert gate.check(figures(estimate(0.3, 0.4), None), Thresholds()) is None


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"max_gap": 5}, "gate.max_gap=5: is a share"),
        ({"max_gap": float("nan")}, "gate.max_gap=nan"),
        ({"max_gap": "big"}, "gate.max_gap=big: must be a number or null"),
        ({"bound": "upper"}, "gate.bound=upper"),
        ({"gap": "rawest"}, "gate.gap=rawest"),
        ({"max_gapp": 0.1}, "did you mean gate.max_gap"),
    ],
)
def test_a_threshold_that_cannot_be_is_refused(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.bind({"_target_": "dejavu_exp.gate.Thresholds", **node}, "gate")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run whose gap is not shown to be at most zero."""
    return measure(tmp_path_factory.mktemp("stopped"), *RUN, "gate.max_gap=0")


def test_a_run_that_does_not_pass_is_whole_and_ends_with_status_3(stopped: Finished) -> None:
    assert stopped.code == 3, stopped.stderr
    (line,) = (line for line in stopped.stderr.splitlines() if line.startswith("Release"))
    assert line.startswith("Release gate not passed. The corrected gap to class_prior is ")
    assert {"report.html", "scores.parquet", "config.yaml"} <= {path.name for path in stopped.folder.iterdir()}
    found = stopped.figures()["gate"]
    assert (found["passed"], found["thresholds"]["max_gap"]) == (False, 0)
    assert found["reason"] in line
    status = cells.read(stopped.folder)
    assert status is not None
    assert (status.state, status.error) == (State.FINISHED, None)


def end_of_sweep(*finished: Cell) -> object:
    """The status, or the last words, that a sweep of these cells ends with."""
    callback = launch.SweepCallback()
    callback.cells = list(finished)
    try:
        callback.on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": "sweep"}}}))
    except SystemExit as ended:
        return ended.code
    return 0


def passing(folder: Path) -> Cell:
    """A cell whose gate lets through whatever was measured."""
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    resolved["gate"]["max_gap"] = 1
    path = folder / "figures.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "gate": gate.check(found, Thresholds(1.0))}))
    return Cell((), folder, resolved)


def test_a_sweep_ends_with_status_3_where_a_cell_does_not_pass(
    stopped: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where squeue is installed and no SLURM answers, asking takes ten seconds.
    monkeypatch.setattr(cells, "slurm_jobs", lambda: None)
    first, second = (Path(shutil.copytree(stopped.folder, tmp_path / name)) for name in ("first", "second"))
    cell = Cell((), second, yaml.safe_load((second / "config.yaml").read_text()))
    assert end_of_sweep(passing(first)) == 0
    assert end_of_sweep(passing(first), cell) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"release gate not passed: {second}: The corrected gap")
    # A cell that did not finish is the graver end, and its sentence comes with the other's.
    status = cells.read(first)
    assert status is not None
    replace(status, state=State.FAILED, error="out of memory").write(first)
    told = str(end_of_sweep(passing(first), cell))
    assert "out of memory" in told
    assert f"{second}: The corrected gap" in told


def test_a_cell_that_does_not_pass_ends_no_sweep() -> None:
    judged = {"passed": False, "reason": "The gap is too large."}
    launch._heed(judged, sweeping=True)
    launch._heed({**judged, "passed": True}, sweeping=False)
    with pytest.raises(SystemExit, match="3"):
        launch._heed(judged, sweeping=False)
