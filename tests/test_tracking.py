"""Weights & Biases: records of offline runs are read back; online there is a server of our own, good or bad."""

import importlib
import io
import json
import logging
import re
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from test_report import compared, estimate, figures, item, picture, without_all_rows

from dejavu_exp import cells, tracking
from dejavu_exp.errors import ConfigError
from dejavu_exp.tracking import WandbTracking


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a key in the environment nor one in a home folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


class Server:
    """What W&B's programs need of a server to send a run or a report; remembers what came.

    Attributes:
        url: where it listens.
        asked: name and variables of each GraphQL request.
        files: what was uploaded, by name.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}

    def of(self, name: str) -> list[dict[str, Any]]:
        return [variables for asked, variables in self.asked if asked == name]

    def answer(self, path: str, body: bytes) -> object:
        if path.startswith("/upload/"):
            self.files[path.removeprefix("/upload/")] = body
        if path != "/graphql":
            return {}
        request = json.loads(body)
        name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        given = request.get("variables") or {}
        self.asked.append((name[1] if name else "", given))
        return {"data": self.data(given).get(self.asked[-1][0], {})}

    def data(self, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "me"}}
        bucket = {key: given.get(key) for key in ("name", "displayName")}
        bucket |= {"id": "run", "description": None, "config": None, "sweepName": None, "historyLineCount": 0}
        viewer = {"id": "u", "username": "me", "entity": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given.get("files") or []]
        artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {
            "UpsertBucket": {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}},
            "CreateRunFiles": {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}},
            "CreateArtifact": {"createArtifact": {"artifact": artifact}},
            "Viewer": {"viewer": viewer},
            "GetDefaultEntity": {"viewer": viewer},
            "GetProjects": {"models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}},
            "UpsertModel": {"upsertModel": {"model": {"id": "p", "name": "p", "entityName": "me"}, "inserted": True}},
            "upsertView": {"upsertView": {"view": {"id": "view", "spec": given.get("spec")}}},
        }


@contextmanager
def serving(kind: str) -> Iterator[Server]:
    """A server that answers, fails with status 500, is silent (accepts and never answers), or is gone."""
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if kind == "silent":
                done.wait()
                return
            answer = json.dumps(found.answer(self.path, body)).encode()
            self.send_response(500 if kind == "failing" else 200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.handle_error = lambda *_: None  # type: ignore[method-assign] # a client that is killed
        found = Server(f"http://127.0.0.1:{server.server_port}")
        if kind == "gone":
            server.server_close()
            yield found
            return
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield found
        finally:
            done.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logged in; and what fails is tried again only once, for that takes seconds (0 would be for ever)."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_X_GRAPHQL_RETRY_MAX", "1")


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


def rows_of(table: Any) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


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


REPORT = "<!doctype html><title>the report</title>"
PLACE = "/home/somebody/private"
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
    (tmp_path / "report.html").write_text(REPORT)
    WandbTracking(mode="offline", images=True).log(facts, scores, tmp_path, [item()], {})
    (logged,) = tmp_path.rglob("media/images/*.png")
    assert np.array_equal(np.asarray(Image.open(logged)), np.asarray(Image.open(io.BytesIO(picture()))))
    (page,) = tmp_path.rglob("media/html/*.html")
    assert page.read_text() == REPORT
    (row,) = history(tmp_path)
    assert row["most_memorized/captions"] == [item().told()]
    assert rows_of(tables(tmp_path)["naive_bayes/scores"])[0]["id"] in set(scores["id"])


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


@pytest.mark.parametrize(
    ("values", "said"),
    [({"rows": -1}, r"tracking\.rows=-1"), ({"rows": 10_001}, "10000"), ({"timeout_s": 0.0}, r"tracking\.timeout_s=0")],
)
def test_a_value_that_cannot_work_names_its_key(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        WandbTracking(**values)


def whole() -> tuple[dict[str, Any], pl.DataFrame]:
    """Figures with every part that a run may have; ids are paths of a folder that is nobody's business."""
    facts, scores = compared(others=("prior",))
    scores = scores.with_columns(
        id=pl.format(PLACE + "/{}.jpg", pl.int_range(pl.len()).over("reference")),
        p_value=pl.when(pl.col("role") == "target").then(0.25),
        q_value=pl.when(pl.col("role") == "target").then(0.5),
        caption=pl.lit("a private caption"),
    )
    facts["dataset"]["hash"] = "d" * 32
    facts["split"] = {"hash": "e" * 32}
    facts["references"]["naive_bayes"] |= {
        "power": {"corrected_gap": 0.031, "gap": None, "level": 0.95, "power": 0.8},
        "detected": {"rate": 0.1, "n": 7, "n_tested": 80, "n_null": 60, "smallest_p": 0.25},
        "rate": estimate(0.2),
        "seeds": {"gap": {"values": [0.1, 0.3], "deviation": 0.14}},
    }
    test = {"name": "box size", "statistic": "KS distance", "value": 0.2, "p_value": 0.04, "p_holm": 0.2, "detail": "x"}
    facts["likeness"] = {
        "tests": [{**test, "n_target": 80, "n_unseen": 60}],
        "alike": True,
        "adjust": "none",
        "effective_unseen": 60.0,
        "sentence": "They are alike.",
    }
    pair = {"id": f"{PLACE}/3.jpg", "role": "target", "other_id": f"{PLACE}/9.jpg", "other_role": "public"}
    facts["leaks"] = {
        "method": "hashes",
        "counts": [{"first_role": "target", "second_role": "public", "exact": 1, "near": 0}],
        "pairs": [{**pair, "kind": "exact", "similarity": 1.0, "how": "bytes"}],
        "n_pairs": 1,
        "excluded": 0,
        "sentence": "One leak.",
    }
    facts["coverage"] = {"labels": {"target": 2, "public": 2}}
    facts["gate"] = {"passed": False, "reason": "0.2 is above 0.1", "thresholds": {"max_gap": 0.1}}
    facts["agreement"]["pairs"][0]["mcnemar"] = {"only_first": 3, "only_second": 9, "p_value": 0.15, "p_holm": 0.3}
    return facts, scores


CONFIG = {"seed": 3, "dataset": {"root": f"{PLACE}/images", "parts": [f"{PLACE}/a.tar"]}, "model": {"hub": "org/model"}}


@dataclass(frozen=True)
class Logged:
    """A run that was logged, and what it was logged from."""

    folder: Path
    facts: dict[str, Any]
    scores: pl.DataFrame
    tables: dict[str, Any] = field(repr=False)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("logged")
    facts, scores = whole()
    assert WandbTracking(mode="offline", rows=50).log(facts, scores, folder, [item()], CONFIG, CURVES) == "offline"
    return Logged(folder, facts, scores, tables(folder))


def test_a_run_has_its_configuration_and_says_where_its_figures_come_from(logged: Logged) -> None:
    (run,) = [record.run for record in records(logged.folder) if record.HasField("run")]
    assert (run.project, run.job_type, run.run_group) == ("dejavu_exp", "measure", "")
    assert (run.display_name, run.run_id) == (logged.facts["title"], tracking.run_id(logged.facts))
    config = values(run.config.update)
    config.pop("_wandb")
    origin: dict[str, Any] = {"commit": None, "versions": {}, "created": "now", "schema": None}
    hashes = {"dataset": "d" * 32, "split": "e" * 32, "weights": "abc"}
    assert config == {
        "seed": 3,
        "dataset": {"root": "images", "parts": ["a.tar"]},
        "model": {"hub": "org/model"},
        "provenance": {**origin, **hashes},
    }


def test_the_summary_has_all_parts(logged: Logged) -> None:
    found = summary(logged.folder)
    corrected = logged.facts["references"]["naive_bayes"]["corrected_gap"]["top1"]["100"]
    expected = {
        "headline/reference": "naive_bayes",
        "headline/corrected_gap": corrected["value"],
        "headline/corrected_gap_low": corrected["low"],
        "naive_bayes/power/corrected_gap": 0.031,
        "naive_bayes/detected/n": 7,
        "naive_bayes/rate": 0.2,
        "naive_bayes/seeds/gap/deviation": 0.14,
        "naive_bayes/rate_n_used": 40,
        "likeness/alike": True,
        "likeness/sentence": "They are alike.",
        "leaks/n_pairs": 1,
        "coverage/labels/public": 2,
        "gate/passed": False,
        "gate/thresholds/max_gap": 0.1,
    }
    assert {key: found.get(key) for key in expected} == pytest.approx(expected)
    assert "naive_bayes/power/gap" not in found  # undefined is left out, and not 0


def test_the_tables_are_these_and_no_more(logged: Logged) -> None:
    per_reference = {f"{name}/{table}" for name in ("naive_bayes", "prior") for table in ("scores", "per_class")}
    curves = {"naive_bayes/curve_table", "prior/curve_table", "gap_curves_table", "comparison_chart_table"}
    parts = {"comparison", "agreement", "differences", "likeness/tests", "leaks/counts", "leaks/pairs"}
    assert set(logged.tables) == per_reference | curves | parts
    assert rows_of(logged.tables["likeness/tests"])[0]["p_holm"] == pytest.approx(0.2)
    assert rows_of(logged.tables["agreement"])[0]["mcnemar_only_second"] == 9
    gaps = [row for row in rows_of(logged.tables["gap_curves_table"]) if row["lineKey"] == "naive_bayes, unseen"]
    curve = logged.facts["references"]["naive_bayes"]["roles"]["unseen"]["curve"]
    assert [row["lineVal"] for row in gaps] == pytest.approx(curve["gap"])


def test_of_a_table_of_scores_half_are_the_largest_and_ids_are_hashed(logged: Logged) -> None:
    rows = rows_of(logged.tables["prior/scores"])
    ours = logged.scores.filter(pl.col("reference") == "prior")
    largest = ours.sort("memorization_score", descending=True).head(25)
    told = [row["id"] for row in rows if row["chosen"] == "largest score"]
    assert told == [tracking.hashed_id(name, "d" * 32) for name in largest["id"]]
    random = {row["id"] for row in rows if row["chosen"] == "random"}
    assert len(rows) == 50
    assert len(random) == 25
    assert random < {tracking.hashed_id(name, "d" * 32) for name in ours["id"]} - set(told)
    assert {(row["p_value"], row["q_value"]) for row in rows if row["role"] == "target"} == {(0.25, 0.5)}
    assert "caption" not in rows[0]  # a column that is not known to be harmless
    (pair,) = rows_of(logged.tables["leaks/pairs"])
    assert pair["id"] == tracking.hashed_id(f"{PLACE}/3.jpg", "d" * 32)


def test_no_path_no_caption_and_no_image_leaves(logged: Logged) -> None:
    (run,) = (logged.folder / "wandb").glob("offline-run-*")
    sent = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "logs"]
    content = b"".join(path.read_bytes() for path in sent)
    assert b"likeness/sentence" in content  # what is there can be found
    for secret in (PLACE, "private caption", str(logged.folder), item().told()):
        assert secret.encode() not in content
    assert {path.suffix for path in sent} <= {".wandb", ".json", ".syncstate"}


def test_few_rows_are_all_there_and_an_undefined_score_is_not_the_largest() -> None:
    scores = pl.DataFrame({"id": ["a", "b", "c"], "memorization_score": [0.5, float("nan"), None]})
    chosen = tracking.sample(scores, 3)
    assert (chosen["id"].to_list(), set(chosen["chosen"])) == (["a", "b", "c"], {"all"})
    assert tracking.sample(scores, 2)["id"].to_list()[0] == "a"
    assert tracking.sample(scores, 1)["chosen"].to_list() == ["largest score"]


def test_ids_leave_on_request_and_no_rows_at_all_likewise(tmp_path: Path) -> None:
    facts, scores = whole()
    WandbTracking(mode="offline", ids=True).log(facts, scores, tmp_path / "ids", [], {})
    assert rows_of(tables(tmp_path / "ids")["leaks/pairs"])[0]["id"] == f"{PLACE}/3.jpg"
    WandbTracking(mode="offline", rows=0).log(facts, scores, tmp_path / "none", [], {})
    assert not [name for name in tables(tmp_path / "none") if name.endswith("scores")]


def test_cells_of_a_sweep_are_a_group(tmp_path: Path) -> None:
    facts, scores = figures()
    for multirun, group in ((True, "a sweep"), (False, "")):
        folder = tmp_path / str(multirun) / "a sweep" / "cell"
        cells.Status.here(cells.State.RUNNING, "dejavu_exp", (), multirun, None).write(folder)
        WandbTracking(mode="offline").log(facts, scores, folder, [], {})
        (run,) = [record.run for record in records(folder) if record.HasField("run")]
        assert run.run_group == group


@pytest.mark.usefixtures("key")
def test_whether_there_is_a_key_is_asked_of_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with serving("good") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert tracking.has_key()
        monkeypatch.delenv("WANDB_API_KEY")
        assert not tracking.has_key()
    assert not server.asked


@pytest.mark.usefixtures("key")
def test_online_the_whole_run_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, scores = whole()
    with serving("good") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_MODE", "offline")  # what is configured goes before it
        tracker = WandbTracking(mode="online", project="a project", group="a group")
        assert tracker.log(facts, scores, tmp_path, [], CONFIG) == "online"
    first = server.of("UpsertBucket")[0]
    assert (first["name"], first["project"], first["groupName"]) == (tracking.run_id(facts), "a project", "a group")
    assert json.loads(first["config"])["dataset"]["value"]["root"] == "images"
    assert json.loads(server.files["wandb-summary.json"])["verdict"] == "the verdict"
    here = {path.name: path.read_bytes() for path in tmp_path.rglob("*.table.json")}
    there = {Path(name).name: content for name, content in server.files.items() if name.endswith(".table.json")}
    assert there == here
    assert PLACE.encode() not in b"".join(server.files.values()) + json.dumps(server.asked).encode()


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("kind", "timeout_s", "said"),
    [
        ("gone", 40.0, "connection refused"),
        ("failing", 40.0, "HTTP 500"),
        ("silent", 4.0, "not all was sent within 4 s"),
    ],
)
def test_without_a_server_that_works_the_run_is_kept_and_says_why(
    kind: str,
    timeout_s: float,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    facts, scores = figures()
    before = time.monotonic()
    with serving(kind) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert WandbTracking(timeout_s=timeout_s).log(facts, scores, tmp_path, [], {}) == "offline"
    assert time.monotonic() - before < 60
    assert said in caplog.text
    (kept,) = (tmp_path / "wandb").glob("offline-run-*")
    assert f"wandb sync {kept}" in caplog.text
    if kind == "silent":  # killed in the middle; the records are whole all the same
        with serving("good") as server:
            monkeypatch.setenv("WANDB_BASE_URL", server.url)
            assert tracking.send(kept, 40.0) is None
        assert json.loads(server.files["wandb-summary.json"])["verdict"] == "the verdict"
