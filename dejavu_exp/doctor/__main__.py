"""The command line: `python -m dejavu_exp.doctor data|model|run|environment`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dejavu_exp import safety
from dejavu_exp.doctor.findings import Examination, Severity, as_json, counted, show
from dejavu_exp.errors import DejavuError

PROGRAM = "python -m dejavu_exp.doctor"
SUBJECTS: Mapping[str, str] = {
    "data": "the data set and split of a configuration",
    "model": "the encoder of a configuration",
    "run": "run folders: are they whole, and do their figures follow from their scores?",
    "environment": "this machine: versions, devices, disk, Weights & Biases",
}
BAD_USAGE = 2
IMAGES = 1000
"""Images that `data` decodes unless told otherwise."""
FORWARD = 32
"""Images that `model` embeds unless told otherwise."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; ends with status 0 (all well), 1 (faults found) or 2 (it could not look)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Overrides and options may come in any order, which argparse's own sub-commands do not allow.
    subject = _parser().parse_args(given[:1]).subject
    asked = _parser_of(subject).parse_intermixed_args(given[1:])
    safety.keep_others_from_writing()
    try:
        sys.exit(_examine(subject, asked))
    except DejavuError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(BAD_USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Checks a data set, an encoder, run folders or this machine; says what is wrong and how to mend "
        "it.\n\n" + "\n".join(f"  {name:12} {text}" for name, text in SUBJECTS.items()),
        epilog=f"{PROGRAM} SUBJECT --help has the options of each.\n"
        "Exit status: 0 all well, 1 faults found, 2 bad usage.",
    )
    parser.add_argument("subject", choices=list(SUBJECTS), metavar="SUBJECT", help=", ".join(SUBJECTS))
    return parser


def _parser_of(subject: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {subject}", description=f"Checks {SUBJECTS[subject]}.")
    if subject == "run":
        parser.add_argument(
            "folders", metavar="DIR", nargs="+", type=Path, help="a run folder, or a folder that holds some"
        )
        parser.add_argument(
            "--inputs", action="store_true", help="also read data and weights again, and compare their hashes"
        )
    else:
        text = "as python -m dejavu_exp takes them, e.g. dataset=manifest dataset.path=images.csv"
        parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help=text)
    if subject == "data":
        parser.add_argument(
            "--images", metavar="N", type=_images, default=IMAGES, help=f"images to decode, or all; {IMAGES}"
        )
    if subject == "model":
        parser.add_argument("--images", metavar="N", type=_some, default=FORWARD, help=f"images to embed; {FORWARD}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all that was found to this file")
    return parser


def _images(text: str) -> int | None:
    """A number of images; None for all of them."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1, or all")
    return int(text)


def _some(text: str) -> int:
    """A number of images that says something of how embeddings vary."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 2")
    return int(text)


def _examine(subject: str, asked: argparse.Namespace) -> int:
    """Look, tell, write; the exit status."""
    # Imported here: polars and torch take seconds, and --help must not.
    from rich.console import Console

    from dejavu_exp import provenance, tables

    found = _look(subject, asked)
    show(found, Console())
    if asked.json is not None:
        tables.write_json(as_json(found, provenance.versions()), asked.json)
    return int(counted(found)[Severity.FAULT] > 0)


def _look(subject: str, asked: argparse.Namespace) -> list[Examination]:
    if subject == "data":
        from dejavu_exp.doctor import data

        return [data.examine(asked.overrides, asked.images)]
    if subject == "model":
        from dejavu_exp.doctor import model

        return [model.examine(asked.overrides, asked.images)]
    if subject == "run":
        from dejavu_exp.doctor import run

        return [run.examine(folder, inputs=asked.inputs) for folder in run.find(asked.folders)]
    from dejavu_exp.doctor import environment

    return [environment.examine(asked.overrides)]


if __name__ == "__main__":
    main()
