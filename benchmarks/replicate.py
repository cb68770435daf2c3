"""The paper's central comparison at the scale of two cores: runs it and writes the result into docs/results.md.

Usage: python benchmarks/replicate.py --data FOLDER, which holds tiny_imagenet_20.zip and
tf_efficientnet_lite0.safetensors. A run that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- replicate: written by make replicate -->", "<!-- replicate: end -->"
IMAGES, TAGGER = "tiny_imagenet_20.zip", "tf_efficientnet_lite0.safetensors"
MEASURES = {
    "kappa_memorized": "kappa, memorized",
    "jaccard_memorized": "Jaccard, memorized",
    "jaccard_correlated": "Jaccard, correlated",
    "rank_correlation": "rank correlation of scores",
}


def main() -> None:
    """Run the comparison, then write its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {IMAGES} and {TAGGER}")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "replicate", help="folder of the run")
    parser.add_argument("overrides", nargs="*", help="further configuration, as for python -m dejavu_exp")
    arguments = parser.parse_args()
    for name in (IMAGES, TAGGER):
        if not (arguments.data / name).is_file():
            sys.exit(
                f"{arguments.data / name}: there is no such file. Give its folder with make replicate DATA=FOLDER."
            )
    command = [
        *(sys.executable, "-m", "dejavu_exp", "experiment=replicate", f"hydra.run.dir={arguments.out.resolve()}"),
        f"dataset.root={(arguments.data / IMAGES).resolve()}",
        f"tagger.encoder.weights={(arguments.data / TAGGER).resolve()}",
        *arguments.overrides,
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    figures = json.loads((arguments.out / "figures.json").read_text())
    RESULTS.write_text(insert(RESULTS.read_text(), section(figures)))
    print(f"written to {RESULTS}")


def insert(document: str, text: str) -> str:
    """The document with the text between the two marks."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def section(figures: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    names = figures["agreement"]["references"]  # in the order of the configuration
    return "\n\n".join(
        [
            _counts(figures),
            _gaps(figures, names),
            _quadrants(figures, names),
            _differences(figures),
            _agreement(figures),
            _utility(figures),
            _costs(figures, names),
            figures["verdict"],
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def points(estimate: Mapping[str, Any] | None) -> str:
    """A share in % with its interval."""
    if estimate is None or estimate["value"] is None:
        return "–"
    return f"{100 * estimate['value']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def number(estimate: Mapping[str, Any]) -> str:
    """A coefficient with its interval."""
    if estimate["value"] is None:
        return "–"
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _counts(figures: Mapping[str, Any]) -> str:
    rows = [
        [role, str(count["rows"]), str(count["used"]), ", ".join(f"{n} {status}" for status, n in others)]
        for role, count in figures["counts"].items()
        if (others := [(s, n) for s, n in count["by_status"].items() if s != "ok"]) or count["rows"]
    ]
    return table(["role", "rows", "used", "excluded"], rows)


def _gaps(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        found = figures["references"][name]
        for percent, cell in found["roles"]["target"]["top1"].items():
            unseen = found["roles"]["unseen"]["top1"][percent]
            rows.append(
                [
                    name,
                    f"{percent} %",
                    *(points(cell[what]) for what in ("target", "reference", "gap")),
                    points(unseen["gap"]),
                    points(found["corrected_gap"]["top1"][percent]),
                ]
            )
    head = [
        "reference",
        "surest",
        "encoder, %",
        "reference, %",
        "gap",
        "gap, unseen",
        "corrected gap",
    ]
    return table(head, rows)


def _quadrants(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    kinds = ("memorized", "correlated", "forgotten", "unassociated")
    rows = [
        [name, role, *(points(figures["references"][name]["roles"][role]["quadrants"][kind]) for kind in kinds)]
        for name in names
        for role in ("target", "unseen")
    ]
    return table(["reference", "rows", *(f"{kind}, %" for kind in kinds)], rows)


def _differences(figures: Mapping[str, Any]) -> str:
    rows = [
        [f"{pair['first']} less {pair['second']}", points(pair["target"]["100"]), points(pair["corrected"]["100"])]
        for pair in figures["agreement"]["pairs"]
    ]
    return table(["difference of gaps, points", "on target rows", "of corrected gaps"], rows)


def _agreement(figures: Mapping[str, Any]) -> str:
    rows = [
        [f"{pair['first']}, {pair['second']}", *(number(pair[measure]) for measure in MEASURES)]
        for pair in figures["agreement"]["pairs"]
    ]
    return table(["target rows", *MEASURES.values()], rows)


def _utility(figures: Mapping[str, Any]) -> str:
    rows = [[found["measure"], points(found["estimate"]), found["detail"]] for found in figures["utility"]]
    return table(["of the encoder", "%", "how"], rows)


def _costs(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    seconds = figures["run"]["seconds"]
    fastest = min(seconds[f"references/{name}"] for name in names if name != "class_prior")
    rows = [["the encoder itself", f"{seconds['encoder']:.0f}", ""]]
    rows += [
        [name, f"{seconds[f'references/{name}']:.0f}", f"{seconds[f'references/{name}'] / fastest:.1f}"]
        for name in names
    ]
    return table(["cost, training and asking", "seconds, this run", "times the cheapest reference but the prior"], rows)


if __name__ == "__main__":
    main()
