"""Weights & Biases, offline."""

import importlib
import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_report import compared, figures, item, without_all_rows

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


BLOCK = 32768


def records(folder: Path) -> Iterator[Any]:
    """What an offline run wrote, record by record: a LevelDB log after a header of seven bytes."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (path,) = folder.rglob("offline-run-*/*.wandb")
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = messages.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(folder: Path) -> list[dict[str, Any]]:
    return [values(record.history.item) for record in records(folder) if record.HasField("history")]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(folder):
        if record.HasField("summary"):
            found |= values(record.summary.update)
    return found


def curve(*losses: float) -> pl.DataFrame:
    rows = [
        {"step": 10 * place, "epoch": place, "loss": loss, "learning_rate": 0.1, "validation_loss": None}
        for place, loss in enumerate(losses)
    ]
    rows[-1]["validation_loss"] = 0.75
    return pl.DataFrame(rows, schema_overrides={"validation_loss": pl.Float64})


CURVES = {"the encoder": curve(2.0, 1.0, 0.5), "a second one, seed 1": curve(3.0, 2.5)}


def assert_curves_are_logged(folder: Path) -> None:
    rows = history(folder)
    for name, frame in CURVES.items():
        base = f"training/{name}/"
        logged = [row for row in rows if f"{base}step" in row]
        for column in ("step", "epoch", "loss", "learning_rate"):
            assert [row[f"{base}{column}"] for row in logged] == frame[column].to_list()
        assert [row.get(f"{base}validation_loss") for row in logged] == frame["validation_loss"].to_list()
    axes = {record.metric.name: record.metric.step_metric for record in records(folder) if record.HasField("metric")}
    assert axes["training/the encoder/loss"] == "training/the encoder/step"
    assert axes["training/a second one, seed 1/loss"] == "training/a second one, seed 1/step"


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


def test_agreement_utility_and_both_directions_are_logged(tmp_path: Path) -> None:
    facts, scores = compared()
    WandbTracking(mode="offline").log(facts, scores, tmp_path, [], {}, CURVES)
    logged = tables(tmp_path)
    agreed, differing = (
        [dict(zip(logged[name]["columns"], row, strict=True)) for row in logged[name]["data"]]
        for name in ("agreement", "differences")
    )
    pairs = facts["agreement"]["pairs"]
    assert [(row["first"], row["second"]) for row in agreed] == [(pair["first"], pair["second"]) for pair in pairs]
    for row, pair in zip(agreed, pairs, strict=True):
        assert row["kappa_memorized"] == pytest.approx(pair["kappa_memorized"]["value"])
        assert row["rank_correlation_high"] == pytest.approx(pair["rank_correlation"]["high"])
        assert row["jaccard_correlated_n_used"] == 80
    assert len(differing) == 3 * len(pairs)
    by_key = {(row["first"], row["second"], row["percent"]): row for row in differing}
    row = by_key[pairs[1]["first"], pairs[1]["second"], 20]
    assert row["corrected_low"] == pytest.approx(pairs[1]["corrected"]["20"]["low"])
    assert row["target"] == pytest.approx(pairs[1]["target"]["20"]["value"])
    found = summary(tmp_path)
    (measure,) = facts["utility"]
    assert found[f"utility/{measure['measure']}"] == pytest.approx(0.777)
    assert found[f"utility/{measure['measure']}_low"] == pytest.approx(0.677)
    assert found["naive_bayes/both_directions/top1/20"] == pytest.approx(0.111)
    assert found["agreement/correlated_by_all_n_used"] == 80
    assert found["verdict"] == "the verdict"
    assert_curves_are_logged(tmp_path)


def test_a_run_without_a_comparison_has_no_such_tables(tmp_path: Path) -> None:
    facts, scores = figures()
    WandbTracking(mode="offline").log(facts, scores, tmp_path, [], {})
    assert not {"agreement", "differences"} & set(tables(tmp_path))


def test_a_training_alone_is_a_run_of_its_own_kind(tmp_path: Path) -> None:
    WandbTracking(mode="offline", group="a group").log_training(CURVES, {"seed": 7}, tmp_path)
    (run,) = [record.run for record in records(tmp_path) if record.HasField("run")]
    assert (run.job_type, run.run_group, run.display_name) == ("train", "a group", "the encoder, a second one, seed 1")
    assert {"seed": 7}.items() <= values(run.config.update).items()
    assert_curves_are_logged(tmp_path)


def test_a_failure_while_logging_a_training_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room in the cloud")

    monkeypatch.setattr("wandb.init", fail)
    WandbTracking(mode="offline").log_training(CURVES, {}, tmp_path)
    assert "no room in the cloud" in caplog.text


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    facts, scores = figures()
    WandbTracking(mode="disabled").log(facts, scores, tmp_path, [], {})
    WandbTracking(mode="disabled").log_training(CURVES, {}, tmp_path)
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
