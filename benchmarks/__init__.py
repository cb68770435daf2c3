"""The measurement's own parts beside other ways of doing the same: `python -m benchmarks`, or `make bench`."""
