"""Run all benchmarks and write docs/benchmarks.md: `make bench`, about half an hour on two cores."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import bayes, evidence, extraction, images, scale, search, start, statistics
from benchmarks.timing import Comparison

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
MODULES = (images, extraction, search, evidence, bayes, statistics, start)
PACKAGES = ("torch", "torchvision", "faiss-cpu", "numpy", "scipy", "scikit-learn", "polars", "pillow")
HEAD = """# Benchmarks

Made by `make bench`: each task done by this package and by other ways, one after another in one run, after a check that
they agree. Times are the best of several tries on a machine that others share: the ratios are what to look at. "Limit"
is what this hardware allows, measured in the same run.
"""


def machine() -> str:
    """Processor, cores, versions."""
    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"{name}, {os.cpu_count()} cores, no GPU; Python {platform.python_version()}, {packages}."


def table(found: Comparison) -> str:
    """One task in Markdown."""
    ours = next(iter(found.seconds.values()))
    lines = [f"### {found.task}", "", "| way | seconds | times the first |", "|---|---|---|"]
    lines += [f"| {way} | {taken:.3f} | {taken / ours:.2f} |" for way, taken in found.seconds.items()]
    lines += ["", f"Limit: {found.limit}."]
    lines += [f"Aim: {found.aim}."] if found.aim else []
    lines += [found.note] if found.note else []
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for; write the document where all was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = {module.__name__.rpartition(".")[2]: module for module in MODULES}
    parser.add_argument("only", nargs="*", choices=[*names, []], help="run these alone, and write nothing")
    only = parser.parse_args().only
    threads, parts = torch.get_num_threads(), []
    for name, module in names.items():
        for compare in module.COMPARISONS if name in only or not only else ():
            torch.set_num_threads(threads)  # which a benchmark of one core may have changed
            parts.append(table(compare()))
            print(parts[-1], end="\n\n", flush=True)
    if not only:
        grown = f"### Memory and time against size\n\n{scale.run()}\n\n![time and memory against size](scale.png)"
        DOCUMENT.write_text("\n\n".join([HEAD.strip(), machine(), *parts, grown]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
