"""Memory does not grow with the number of rows: measured in processes of their own, as the benchmark does."""

import pytest

from benchmarks import scale

MB_A_ROW = 1 / 2**20


@pytest.mark.slow
def test_extraction_holds_no_more_than_places_of_its_rows() -> None:
    small, large = (scale.measured("extract", rows) for rows in (10_000, 60_000))
    grown = (large["peak_mb"] - large["views_mb"]) - (small["peak_mb"] - small["views_mb"])
    # Ids, paths and regions are read from a file; what is left is a number or two a row. Lists would take 500 bytes.
    assert grown < 100 * 50_000 * MB_A_ROW + 20


@pytest.mark.slow
def test_a_search_holds_what_it_may_of_the_bank() -> None:
    small, large = (scale.measured("search", rows) for rows in (100_000, 300_000))
    assert large["bank_mb"] - small["bank_mb"] == pytest.approx(195, abs=1)
    # Both banks are larger than what a search may hold of them in float32.
    assert large["peak_mb"] - small["peak_mb"] < 60
