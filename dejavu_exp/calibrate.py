"""Is the instrument right? `python -m dejavu_exp.calibrate [--seeds N] [--canaries 2,8,32] [KEY=VALUE...]`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu_exp import config
from dejavu_exp.errors import ConfigError

if TYPE_CHECKING:
    from dejavu_exp.calibration.planted import Population
    from dejavu_exp.stages import Plan

POOL = ("dataset.val_per_class=200", "split.unseen=200")
"""Of the embedded data set: five times the unseen rows of a run, so that each trial draws others."""
RATES = (0.0, 0.01, 0.05, 0.2)
UNGUESSED_RATE = 0.05
SEEDS = 200
ROWS = 400
SHARE = 0.3
FOLDER = Path("outputs")


def population(plan: Plan) -> tuple[Population, str]:
    """Embed once what trials draw from: unseen rows, and target rows that training repeated.

    Returns:
        The population, and the encoder in words.

    Raises:
        DataError: as `Population.of`, and the stages of a run.
    """
    from dejavu_exp import neighbours, stages
    from dejavu_exp.calibration.planted import Population

    encoder = stages.check(plan)
    views = stages.name_truth(plan, stages.prepare(plan))
    lessons = stages.training_inputs(plan, views)
    encoder = encoder or stages.train(plan, lessons)
    views, queries, bank = stages.embed(plan, views, encoder)
    measured = views.measured()
    near = neighbours.search(queries, bank, plan.probe.k, plan.probe.metric, **plan.trainer.search_settings)
    truth = views.public()["truth"]
    target = neighbours.infer(measured["id"].to_list(), near, truth, views.labels(), plan.probe.ties)
    name, reference = next(iter(plan.references.items()))
    found = reference.evidence(stages.reference_inputs(plan, views, encoder, target, lessons))
    return Population.of(
        measured, target, found, lessons.repeats, name
    ), f"{encoder.description.split(',')[0]}, {encoder.weights}"


def plant(plan: Plan, folder: Path, seeds: int, count: int, command: str, settings: Mapping[str, Any]) -> bool:
    """Plant memorization into evidence, measure it, and write calibration.json, .md and .svg.

    Args:
        plan: the run whose unseen rows, encoder and reference are used.
        folder: where to write.
        seeds: trials of each planted rate.
        count: rows of each role in a trial.
        command: what the document says was run.
        settings: the resolved configuration.

    Returns:
        True where all checks passed.

    Raises:
        ConfigError: the run infers objects.
    """
    from dejavu_exp.calibration import planted, told
    from dejavu_exp.scoring import LabelInference

    if not isinstance(plan.scoring, LabelInference):
        raise ConfigError(
            "evidence about sets of objects cannot be planted here. Choose scoring=label_inference, or --canaries."
        )
    drawn_from, encoder = population(plan)
    plantings = [*map(planted.Planting, RATES), planted.Planting(UNGUESSED_RATE, "unguessed")]
    found, rocs = planted.measure(planted.Bench(drawn_from, plan.scoring, count), plantings, seeds)
    found |= {"encoder": encoder, "data": type(plan.dataset).__name__}
    told.planted_picture(found, rocs, folder / "calibration.svg")
    parts, last = told.planted_tables(found), told.summary(found["checks"], seeds)
    text = told.planted_text(found)
    _write(folder, "calibration", found, settings, told.document("calibration", command, text, parts, last))
    told.show(text, parts, folder, last)
    return all(check["passed"] for check in found["checks"])


def train_canaries(plan: Plan, folder: Path, command: str, settings: Mapping[str, Any]) -> bool:
    """Train with canaries, measure them, and write canaries.json, .md and .svg beside what a run writes.

    Args:
        plan: of a configuration `canaries.with_canaries`.
        folder: where to write.
        command: what the document says was run.
        settings: that configuration, resolved.

    Returns:
        True: what is measured is the training's doing, and no fault of the instrument.
    """
    from dejavu_exp.calibration import canaries, told

    found, rocs = canaries.measure(plan, folder, settings)
    told.canary_picture(found, rocs, folder / "canaries.svg")
    text, parts = told.canary_text(found), told.canary_tables(found)
    _write(folder, "canaries", found, settings, told.document("canaries", command, text, parts))
    told.show(text, parts, folder)
    return True


def _write(folder: Path, name: str, found: Mapping[str, Any], settings: Mapping[str, Any], document: str) -> None:
    from dejavu_exp import provenance, tables

    run = {"versions": provenance.versions(), "commit": provenance.commit(), "config": config.that_decides(settings)}
    tables.write_json({**found, "run": run}, folder / f"{name}.json")
    tables.write_text(document, folder / f"{name}.md")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dejavu_exp.calibrate",
        description="Is the instrument right? Plants memorization at known rates into rows that no encoder saw, and "
        "tells how often the intervals hold what was planted, how often memorization is shown where there is none, "
        "and how well single rows are found. With --canaries the encoder of a configuration is trained with repeated "
        "target rows, and it is told how much of that is measured.",
        epilog="KEY=VALUE are overrides of `python -m dejavu_exp`. Without --canaries it takes ten minutes on two "
        "cores, and half of that with --seeds 100. Writes calibration.json, .md and .svg; with --canaries "
        "canaries.json, .md and .svg, beside the files of a run. Exit status 1 where a check failed. "
        "HYDRA_FULL_ERROR=1 shows tracebacks.",
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="e.g. reference=crop_classifier probe.k=50")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"trials of each planted rate (default: {SEEDS})")
    parser.add_argument("--rows", type=int, metavar="N", help=f"target rows of a trial, and unseen rows ({ROWS})")
    parser.add_argument("--canaries", metavar="COUNTS", help="how often training repeats canaries, e.g. 2,8,32")
    parser.add_argument("--share", type=float, metavar="S", help=f"of the target rows that are canaries ({SHARE})")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default: outputs/calibration, or outputs/canaries)"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_intermixed_args(given)
    for flag, of_canaries in (("seeds", False), ("rows", False), ("share", True)):
        if getattr(asked, flag) is not None and of_canaries != bool(asked.canaries):
            parser.error(f"--{flag} is for a calibration {'with' if of_canaries else 'without'} --canaries")
    command = shlex.join(["python", "-m", "dejavu_exp.calibrate", *given])
    with config.spoken_errors():
        passed = _calibrate(asked, command)
    sys.exit(not passed)


def _calibrate(asked: argparse.Namespace, command: str) -> bool:
    """Do what was asked; True where nothing is wrong with the instrument."""
    folder = (asked.out or FOLDER / ("canaries" if asked.canaries else "calibration")).absolute()
    settings, _ = config.compose(_overrides(asked))
    settings.pop("run")
    # Imported here: torch takes seconds, and --help must not.
    from dejavu_exp import ranks
    from dejavu_exp.calibration import canaries
    from dejavu_exp.stages import Plan

    if asked.canaries:
        share = SHARE if asked.share is None else asked.share
        settings = canaries.with_canaries(settings, share, _counts(asked.canaries))
    plan = Plan(**config.build(settings))
    with ranks.joined(plan.trainer.device_count, plan.trainer.cache) as lead:
        if not lead:
            return True
        if asked.canaries:
            return train_canaries(plan, folder, command, settings)
        return plant(
            plan, folder, _count("seeds", asked.seeds, SEEDS), _count("rows", asked.rows, ROWS), command, settings
        )


def _overrides(asked: argparse.Namespace) -> list[str]:
    """Those given; without canaries, and where no other data set or split is chosen, a larger pool of unseen rows."""
    chosen = any(override.split("=")[0] in ("dataset", "split", "experiment") for override in asked.overrides)
    return [*(() if asked.canaries or chosen else POOL), *asked.overrides]


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--canaries={text}: must be whole numbers with commas between, e.g. 2,8,32.") from error


def _count(flag: str, given: int | None, default: int) -> int:
    count = default if given is None else given
    if count < 1:
        raise ConfigError(f"--{flag}={count}: must be at least 1.")
    return count


if __name__ == "__main__":
    main()
