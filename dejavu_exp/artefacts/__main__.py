"""Results of the released code as run folders: `python -m dejavu_exp.artefacts labels|objects ... [KEY=VALUE...]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu_exp import config
from dejavu_exp.errors import ConfigError

if TYPE_CHECKING:
    from dejavu_exp.artefacts.base import Imported, Settings

ROLES = ("target", "unseen", "heldout", "shared", "public")
READ = ("dataset", "probe", "scoring", "report", "seed")
"""Parts of a run's configuration that an import has, too."""
OF_PROBE = ("probe", "probe.k", "probe.ties")
"""What of the probe an import reads: how crops were cut and embeddings compared was settled by the released code."""
DEFAULTS = {
    "labels": {"probe": "background_knn", "scoring": "label_inference"},
    "objects": {"probe": "caption_to_image", "scoring": "object_inference"},
}
SEVERAL: Mapping[str, Any] = {"action": "append", "default": []}
"""Of an option that is given once for each role, or origin."""
SCORINGS = {"labels": "LabelInference", "objects": "ObjectInference"}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dejavu_exp.artefacts",
        description="Turn what the released code of the papers leaves on disk into a run folder of ours.",
        epilog="ROLE is target (the default), unseen, heldout, shared or public. KEY=VALUE are settings as of "
        "python -m dejavu_exp: dataset, probe, scoring, report and seed; the papers' way of counting is "
        "scoring=authors (objects: scoring=object_inference_authors) probe.ties=lowest_label. HYDRA_FULL_ERROR=1 shows "
        "tracebacks.",
    )
    tests = parser.add_subparsers(required=True, metavar="labels|objects", dest="test")
    _labels(tests.add_parser("labels", help="results of the k-NN attack, naive Bayes and the crop classifier"))
    _objects(tests.add_parser("objects", help="neighbour lists and annotations of the vision-language test"))
    # A list of settings after options is more than argparse takes behind subcommands: they are what is left over.
    asked, settings = parser.parse_known_args(arguments)
    for text in settings:
        if text.startswith("-") or "=" not in text:
            parser.error(f"unrecognized argument: {text}")
    asked.settings = settings
    with config.spoken_errors():
        _run(asked)


def _labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the attack saved NAME_neighb_labels.npy ...")
    parser.add_argument(
        "--attack", metavar="[ROLE=]NAME", help="of the encoder; heldout: of the second encoder on its images "
        "(default: A_attk_A and B_attk_B, or test_attk_A)", **SEVERAL,
    )  # fmt: skip
    parser.add_argument(
        "--two-model", metavar="[ROLE=]NAME", help="of the other encoder on the same images (default: B_attk_A and "
        "A_attk_B, where they are)", **SEVERAL,
    )  # fmt: skip
    parser.add_argument("--naive-bayes", metavar="DIR", type=Path, help="with labels.txt, frequencies/ and labels/")
    parser.add_argument("--top-tags", metavar="K", type=int, default=5, help="naive Bayes: strongest tags that count")
    parser.add_argument("--laplace", action="store_true", help="naive Bayes: the rule of the released --laplace")
    parser.add_argument("--crop-classifier", metavar="FILE", type=Path, help=".npy that its evaluation saves")
    parser.add_argument("--label-shuffle", action="store_true", help="add the floor: answers dealt to other rows")
    parser.add_argument(
        "--images",
        metavar="[ORIGIN=]PATH",
        help="image folder, or a list of its files: what numbers stand for",
        **SEVERAL,
    )
    parser.add_argument(
        "--origin", metavar="[ROLE=]NAME", help="part that numbers count in (default: train)", **SEVERAL
    )
    parser.add_argument("--index", metavar="ROLE=FILE", help="index files, such as public=public.npy", **SEVERAL)
    _common(parser, "labels")


def _objects(parser: argparse.ArgumentParser) -> None:
    arrays = "FILE is .npy or .npz:NAME"
    parser.add_argument(
        "--neighbours", metavar="[ROLE=]FILE", help=f"of the encoder, rows of positions; {arrays}", **SEVERAL
    )
    parser.add_argument("--reference", metavar="[ROLE=]FILE", help="the same of the reference", **SEVERAL)
    parser.add_argument("--distances", metavar="[ROLE=]FILE", help="of the encoder's neighbours", **SEVERAL)
    parser.add_argument(
        "--objects", metavar="ROLE=FILE", help="annotation pickles of target, unseen, public", **SEVERAL
    )
    parser.add_argument("--names", metavar="FILE", type=Path, help="object names, one a line, that of number 0 first")
    parser.add_argument("--images", metavar="[ROLE=]FILE", help="the images of the entries, one a line", **SEVERAL)
    _common(parser, "objects")


def _common(parser: argparse.ArgumentParser, test: str) -> None:
    parser.add_argument("--encoder", metavar="NAME", help="what the encoder is called in the report")
    parser.add_argument("--epoch", type=int, help="of its training, for comparisons")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the run folder that is written")
    parser.usage = f"{parser.prog} {'FOLDER ' if test == 'labels' else ''}OPTIONS --out FOLDER [KEY=VALUE ...]"
    parser.set_defaults(read={"labels": _read_labels, "objects": _read_objects}[test])


def _run(asked: argparse.Namespace) -> None:
    """Import, score, write."""
    if asked.out.exists() and not asked.out.is_dir():
        raise ConfigError(f"--out {asked.out}: is a file. Give the folder to write to.")
    if (asked.out / "figures.json").exists():
        raise ConfigError(f"--out {asked.out}: holds a run already. Give another folder, or delete that one.")
    resolved, views = _resolved(asked)
    from dejavu_exp import report
    from dejavu_exp.artefacts import folder
    from dejavu_exp.artefacts.base import Settings

    dataset = config.bind(resolved["dataset"], "dataset") if "dataset" in resolved else None
    probe = config.bind({**resolved["probe"], **views}, "probe")
    k = probe.k if "probe.k" in _chosen(asked) else None
    settings = Settings(probe, k, dataset, resolved["seed"])
    scoring = config.bind(resolved["scoring"], "scoring")
    read: Callable[[argparse.Namespace, Settings], tuple[Imported, str]] = asked.read
    found, name = read(asked, settings)
    encoder = {"description": asked.encoder or f"the encoder of {name}", "epoch": asked.epoch}
    shown = config.bind(resolved["report"], "report")
    report.show(folder.write(found, settings, scoring, shown, encoder, resolved, asked.out), asked.out)


def _resolved(asked: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The part of a run's configuration that an import reads, and the views of the probe, of which it reads the names.

    Raises:
        ConfigError: a setting of another part is given.
    """
    for text in asked.settings:
        key = text.partition("=")[0]
        if key.partition(".")[0] not in READ or (key.startswith("probe") and key not in OF_PROBE):
            raise ConfigError(
                f"{text}: an import reads settings of {', '.join(READ)} only; what encoder and references were, the "
                "files say."
            )
    chosen = _chosen(asked)
    defaults = [f"{key}={value}" for key, value in DEFAULTS[asked.test].items() if key not in chosen]
    composed, _ = config.compose([*defaults, *asked.settings])
    with_dataset = any(key.partition(".")[0] == "dataset" for key in chosen)
    resolved = {key: composed[key] for key in READ if key != "dataset" or with_dataset}
    scoring = resolved["scoring"]["_target_"].rpartition(".")[2]
    if scoring != SCORINGS[asked.test]:
        raise ConfigError(
            f"scoring: the test of {asked.test} is scored by {SCORINGS[asked.test]}, and {scoring} is chosen. Take "
            f"scoring={DEFAULTS[asked.test]['scoring']}, or the authors' one of the same kind."
        )
    views = {view: resolved["probe"][view] for view in ("query", "bank")}
    resolved["probe"] |= {view: {"_target_": node["_target_"]} for view, node in views.items()}
    test: dict[str, Any] = {"test": asked.test}
    if asked.test == "labels" and asked.naive_bayes is not None:
        test |= {"top_tags": asked.top_tags, "laplace": asked.laplace}
    return {**resolved, "artefacts": test}, views


def _chosen(asked: argparse.Namespace) -> set[str]:
    """Keys of the settings given."""
    return {text.partition("=")[0] for text in asked.settings}


def _paths(option: str, values: Sequence[str], keys: Sequence[str], default: str) -> dict[str, Path]:
    from dejavu_exp.artefacts.base import by_key

    return {key: Path(value).expanduser() for key, value in by_key(option, values, keys, default).items()}


def _read_labels(asked: argparse.Namespace, settings: Settings) -> tuple[Imported, str]:
    """What the files of the label test hold, and the name of their folder."""
    from dejavu_exp.artefacts import base, labels

    origins = base.by_key("--origin", asked.origin, ROLES, "target")
    known = sorted({"train", *origins.values()})
    found = labels.Asked(
        asked.folder,
        base.by_key("--attack", asked.attack, ROLES[:3], "target"),
        base.by_key("--two-model", asked.two_model, ROLES[:3], "target"),
        asked.naive_bayes,
        asked.top_tags,
        asked.laplace,
        asked.crop_classifier,
        asked.label_shuffle,
        _paths("--images", asked.images, known, "train"),
        origins,
        _paths("--index", asked.index, ROLES, "target"),
    )
    return labels.read(found, settings), asked.folder.resolve().name


def _read_objects(asked: argparse.Namespace, settings: Settings) -> tuple[Imported, str]:
    """What the files of the test of objects hold, and the name of the encoder's."""
    from dejavu_exp.artefacts import base, objects

    measured, all_roles = ("target", "unseen"), ("target", "unseen", "public")
    found = objects.Asked(
        base.by_key("--neighbours", asked.neighbours, measured, "target"),
        base.by_key("--reference", asked.reference, measured, "target"),
        _paths("--objects", asked.objects, all_roles, "target"),
        base.by_key("--distances", asked.distances, measured, "target"),
        asked.names,
        _paths("--images", asked.images, all_roles, "target"),
    )
    return objects.read(found, settings), Path(found.neighbours["target"]).name


if __name__ == "__main__":
    main()
