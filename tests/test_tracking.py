"""Weights & Biases, offline."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from test_report import figures, item, without_all_rows

from dejavu_exp import tracking
from dejavu_exp.errors import ConfigError
from dejavu_exp.tracking import WandbTracking


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a key in the environment nor one in a home folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def tables(folder: Path) -> dict[str, Any]:
    """The logged tables by name."""
    found = {}
    for path in folder.rglob("*.table.json"):
        found[str(path.relative_to(next(folder.rglob("media")) / "table")).split("_0_")[0]] = json.loads(
            path.read_text()
        )
    return found


def test_logged_out_means_offline_without_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str = "") -> str:
        raise AssertionError("asked the user")

    monkeypatch.setattr("builtins.input", refuse)
    facts, scores = figures()
    WandbTracking().log(facts, scores, tmp_path, [item()], {"seed": 0})
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    compared = tables(run)["comparison"]
    row = dict(zip(compared["columns"], compared["data"][0], strict=True))
    found = facts["references"]["naive_bayes"]
    assert row["reference"] == "naive_bayes"
    assert row["gap"] == pytest.approx(found["roles"]["target"]["top1"]["100"]["gap"]["value"])
    assert row["corrected_gap_20_percent_low"] == pytest.approx(found["corrected_gap"]["top1"]["20"]["low"])
    assert not list(run.rglob("*.png"))  # images only on request


def refuse_login(*_: Any, **__: Any) -> bool:
    raise ConnectionError("no way out of this node")


def test_online_without_a_key_is_kept_offline_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts, scores = figures()
    WandbTracking(mode="online").log(facts, scores, tmp_path, [], {})
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert "not logged in" in caplog.text
    assert "wandb sync" in caplog.text


def test_a_key_without_network_is_kept_offline_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wandb.login", refuse_login)
    facts, scores = figures()
    WandbTracking().log(facts, scores, tmp_path, [], {})
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert "no way out of this node" in caplog.text


def test_the_environment_can_disable_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    facts, scores = figures()
    WandbTracking().log(facts, scores, tmp_path, [], {})
    assert not list(tmp_path.iterdir())


def test_references_and_fractions_may_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts, scores = figures()
    found = without_all_rows(facts)["references"]
    found["uncorrected"] = {name: part for name, part in found["naive_bayes"].items() if name != "corrected_gap"}
    WandbTracking(mode="offline").log(facts, scores, tmp_path, [], {})
    compared = tables(tmp_path)["comparison"]
    place = compared["columns"].index("corrected_gap_20_percent")
    value = found["naive_bayes"]["corrected_gap"]["top1"]["20"]["value"]
    assert [row[place] for row in compared["data"]] == [pytest.approx(value), None]
    assert not [record for record in caplog.records if record.name == "dejavu_exp.tracking"]


def test_images_are_uploaded_on_request(tmp_path: Path) -> None:
    facts, scores = figures()
    WandbTracking(mode="offline", images=True).log(facts, scores, tmp_path, [item()], {})
    assert len(list(tmp_path.rglob("media/images/*.png"))) == 1


def test_every_estimate_is_in_the_summary() -> None:
    facts, _ = figures()
    flat = dict(tracking.flat(facts))
    cell = facts["references"]["naive_bayes"]["roles"]["unseen"]["top5"]["20"]["gap"]
    assert flat["naive_bayes/unseen/top5/20/gap"] == cell["value"]
    assert flat["naive_bayes/unseen/top5/20/gap_high"] == cell["high"]
    assert flat["naive_bayes/corrected_gap/top1/100_n_used"] == 140


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    facts, scores = figures()
    WandbTracking(mode="disabled").log(facts, scores, tmp_path, [], {})
    assert not list(tmp_path.iterdir())


def test_a_failure_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room in the cloud")

    monkeypatch.setattr("wandb.init", fail)
    facts, scores = figures()
    with caplog.at_level(logging.WARNING):
        WandbTracking(mode="offline").log(facts, scores, tmp_path, [], {})
    assert "no room in the cloud" in caplog.text
    assert str(tmp_path) in caplog.text


def test_a_bad_mode_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.mode=loud"):
        WandbTracking(mode="loud")  # type: ignore[arg-type]
