"""Tables: checked on the way in, whole on the way out."""

import os
import uuid
from pathlib import Path

import polars as pl
import pytest

from dejavu_exp import tables
from dejavu_exp.errors import DataError
from dejavu_exp.tables import Estimate

SCHEMA = {"id": pl.String, "count": pl.Int32}


def test_extra_columns_stay_behind_the_schemas() -> None:
    frame = tables.validate(pl.DataFrame({"more": [1.0], "count": [2], "id": ["a"]}), SCHEMA, "toy")
    assert frame.columns == ["id", "count", "more"]
    assert frame["count"].dtype == pl.Int32


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pl.DataFrame({"id": ["a"]}), "toy: missing column count"),
        (pl.DataFrame({"id": ["a"], "count": ["x"]}), "toy: a column has values of another type"),
        (pl.DataFrame({"id": ["a", "a"], "count": [1, 2]}), "toy: 1 values of id occur more than once, e.g. a"),
        (pl.DataFrame({"id": ["a", None], "count": [1, 2]}), "toy: 1 rows have no id"),
    ],
)
def test_what_does_not_fit_is_named(frame: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tables.validate(frame, SCHEMA, "toy")


def test_metadata_travels_with_the_table(tmp_path: Path) -> None:
    tables.write(pl.DataFrame({"id": ["a"]}), tmp_path / "deep" / "t.parquet", {"key": {"k": 1}})
    assert pl.read_parquet_metadata(tmp_path / "deep" / "t.parquet")["key"] == '{"k": 1}'
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["t.parquet"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full, on Linux")
def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    tables.write_json({"old": 1}, path)
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    (tmp_path / ".figures.json.00000000.partial").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"figures\.json.*No space left.*Free some space"):
        tables.write_json({"new": list(range(10_000))}, path)
    assert path.read_text() == '{\n "old": 1\n}\n'
    assert [found.name for found in tmp_path.iterdir()] == ["figures.json"]


def test_undefined_is_null_in_json_with_its_count() -> None:
    assert Estimate.undefined(3).as_dict() == {"value": None, "low": None, "high": None, "n_used": 0, "n_excluded": 3}
    assert not Estimate.undefined(3).contains(0.0)
