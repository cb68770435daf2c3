"""Files as the released code saves them, imported by the command, and the figures of the authors' own functions."""

import copy
import csv
import itertools
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from dejavu_exp import compare, config, metrics, provenance
from dejavu_exp.artefacts import __main__ as command
from dejavu_exp.artefacts import files
from dejavu_exp.datasets.pickles import read_arrays
from dejavu_exp.errors import DataError

GOLDEN = Path(os.environ.get("DEJAVU_GOLDEN", Path(__file__).parent / "golden"))
AUTHORS = ("scoring=authors", "probe.ties=lowest_label", "scoring.resamples=100")
QUICK = ("scoring.resamples=100",)


@dataclass(frozen=True)
class Golden:
    """Inputs and answers of the authors' functions."""

    told: Any
    arrays: Mapping[str, Any]

    @classmethod
    def of(cls, name: str) -> "Golden":
        arrays = GOLDEN / f"{name}.npz"
        told = json.loads((GOLDEN / f"{name}.json").read_text())
        return cls(told, dict(np.load(arrays)) if arrays.exists() else {})


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def figures(self) -> Any:
        return json.loads((self.folder / "figures.json").read_text())

    @property
    def scores(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "scores.parquet")


@pytest.fixture(autouse=True, scope="module")
def composed_once() -> Iterator[None]:
    """Most of a refusal's time is Hydra's, for the same few settings."""
    known = cache(config.compose)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "compose", lambda overrides: copy.deepcopy(known(tuple(overrides))))
        yield


def imported(out: Path, *arguments: object) -> Run:
    """Run the command."""
    command.main([*map(str, arguments), "--out", str(out)])
    return Run(out)


def told(*arguments: object) -> str:
    """What the command says where it refuses."""
    with pytest.raises(SystemExit) as refused:
        command.main([*map(str, arguments), "--out", "never-written"])
    assert not Path("never-written").exists()
    return str(refused.value)


def save_attack(folder: Path, name: str, indices: Any, labels: Any, near_labels: Any, near_indices: Any) -> None:
    """As the attack scripts save it, labels with an axis of length 1."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}_attk_idxs.npy", indices)
    np.save(folder / f"{name}_labels.npy", np.asarray(labels).reshape(-1, 1))
    np.save(folder / f"{name}_neighb_labels.npy", near_labels)
    np.save(folder / f"{name}_neighb_idxs.npy", near_indices)


def near_of(near_labels: Any) -> Any:
    """Image numbers for neighbours of which only the class is known: one image a class, far behind the attacked."""
    return np.asarray(near_labels, dtype=np.int64) + 10_000_000


def save_clean(folder: Path, name: str = "test_attk_A") -> Golden:
    golden = Golden.of("knn_clean")
    parts = (golden.arrays[f"out_{part}"] for part in ("attk_idxs", "true_label", "neighb_labels", "neighb_idxs"))
    save_attack(folder, name, *parts)
    return golden


# The authors' figures


def test_accuracies_of_the_knn_attack(tmp_path: Path) -> None:
    golden = save_clean(tmp_path / "attack")
    accuracies = golden.told["runs"]["k100_attk100"]["accuracy"]
    n_rows = len(golden.arrays["out_attk_idxs"])
    # A share such as 0.8999... of 800 keeps 720 rows here and 719 there; see `metrics.n_confident`.
    same = [
        share
        for share in np.linspace(0.1, 1, 100).tolist()
        if metrics.n_confident(n_rows, share) == int(share * n_rows)
    ]
    sweep = same[:-1:20]
    fractions = f"scoring.fractions={[1.0, 0.2, 0.05, *sweep]}"
    run = imported(tmp_path / "run", "labels", tmp_path / "attack", "--label-shuffle", *AUTHORS, fractions)
    target = run.figures["references"]["label_shuffle"]["roles"]["target"]
    for top in ("top1", "top5"):
        expected = {float(share): found["accuracy"] for share, found in accuracies[top]["fractions"].items()}
        told_of_sweep = zip(np.linspace(0.1, 1, 100).tolist(), accuracies[top]["sweep_n_and_accuracy"], strict=True)
        expected |= {share: accuracy for share, (_, accuracy) in told_of_sweep if share in sweep}
        assert len(expected) == 3 + len(sweep)
        for share, accuracy in expected.items():
            cell = target[top][metrics.percent_key(share)]["target"]
            assert cell["value"] == pytest.approx(accuracy, abs=1e-12)
            assert cell["low"] <= cell["value"] <= cell["high"]
            assert (cell["n_used"], cell["n_excluded"]) == (n_rows, 0)
    scores = run.scores.sort("id")
    order = np.argsort(golden.arrays["out_attk_idxs"])
    uncertain = golden.arrays["out_k100_attk100_attk_uncert"][order]
    np.testing.assert_allclose(-scores["target_confidence"].to_numpy(), uncertain, atol=1e-12)
    assert [int(label) for label in scores["target_label"]] == golden.arrays["out_k100_attk100_top1"][order, 0].tolist()


@pytest.mark.parametrize("voters", [100, 10])
def test_accuracies_with_ties(tmp_path: Path, voters: int) -> None:
    golden = Golden.of("knn_ties")
    parts = (golden.arrays[f"out_{part}"] for part in ("attk_idxs", "true_label", "neighb_labels", "neighb_idxs"))
    save_attack(tmp_path / "attack", "test_attk_A", *parts)
    arguments = ("labels", tmp_path / "attack", "--label-shuffle")
    for name, settings in (("authors", AUTHORS), ("ours", QUICK)):
        run = imported(tmp_path / name, *arguments, *settings, f"probe.k={voters}")
        found = run.figures["references"]["label_shuffle"]["roles"]["target"]["top1"]
        ranges = golden.told["runs"][f"k100_attk{voters}"]["accuracy_range_over_tie_breaks"]["top1"]
        for fraction, allowed in ranges.items():
            value = found[metrics.percent_key(float(fraction))]["target"]["value"]
            assert allowed["min"] - 1e-12 <= value <= allowed["max"] + 1e-12
        assert run.figures["probe"]["k"] == voters


def save_quadrants(folder: Path) -> Golden:
    golden = Golden.of("quadrants")
    for model, attacked in itertools.product("AB", "AB"):
        name = f"{model}_attk_{attacked}"
        near = golden.arrays[f"in_{name}_neighb_labels"]
        save_attack(
            folder, name, golden.arrays[f"in_{name}_attk_idxs"], golden.arrays[f"in_{name}_labels"], near, near_of(near)
        )
    return golden


def test_quadrants_and_accuracies_of_two_models(tmp_path: Path) -> None:
    golden = save_quadrants(tmp_path / "attack")
    fractions = sorted({int(key.split("_")[1]) / 100 for key in golden.told["accuracies"]})
    run = imported(tmp_path / "run", "labels", tmp_path / "attack", *AUTHORS, f"scoring.fractions={fractions}")
    found = run.figures["references"]["two_model"]
    directions = [found["roles"][role] for role in ("target", "heldout")]
    for key, expected in golden.told["accuracies"].items():
        top, percent = key.split("_")
        for who in ("target", "reference"):
            value = np.mean([direction[top][percent][who]["value"] for direction in directions])
            assert value == pytest.approx(expected[who], abs=1e-12)
        gap = found["both_directions"][top][percent]["value"]
        assert gap == pytest.approx(expected["target"] - expected["reference"], abs=1e-12)
    for name, expected in golden.told["shares"]["top1"].items():
        value = np.mean([direction["quadrants"][name]["value"] for direction in directions])
        assert value == pytest.approx(expected, abs=1e-12)
    assert run.figures["counts"]["heldout"]["used"] == len(golden.arrays["in_A_attk_B_attk_idxs"])
    scores = run.scores
    right = scores.group_by("role").agg(
        memorized=(pl.col("target_correct_top5") & ~pl.col("reference_correct_top5")).mean()
    )
    assert right["memorized"].mean() == pytest.approx(golden.told["shares"]["top5"]["memorized"], abs=1e-12)


def save_bayes(folder: Path, golden: Golden) -> tuple[list[str], list[str], list[str]]:
    """As the counting script saves it; returns keys, and key and path of each image."""
    given = golden.told["input"]
    for part in ("frequencies", "labels"):
        (folder / part).mkdir(parents=True)
    (folder / "labels.txt").write_text(given["labels_txt"])
    for key, counts in given["frequencies"].items():
        (folder / "frequencies" / f"{key}_freq.json").write_text(json.dumps(counts))
    for key, images in given["labels"].items():
        (folder / "labels" / f"{key}_labels.json").write_text(json.dumps(images))
    keys = ["_".join(row) for row in csv.reader(given["labels_txt"].splitlines())]
    images = [(key, image["image_path"]) for key in keys for image in given["labels"].get(key, [])]
    return keys, [key for key, _ in images], [path for _, path in images]


def save_images(path: Path, labels: Sequence[str], names: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """A list of the images in the order of an image folder, and the number of each by name.

    Every class has another image besides, and public ones.
    """
    lines = {f"{label}/{name}" for label, name in zip(labels, names, strict=True)}
    lines |= {f"{label}/{label}_public_{number}.JPEG" for label in classes for number in range(3)}
    ordered = sorted(lines, key=lambda line: line.split("/"))
    path.write_text("\n".join(ordered) + "\n")
    return {line.split("/")[1]: number for number, line in enumerate(ordered)}


@pytest.fixture(scope="module")
def bayes_attack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Golden, Path]]:
    """Naive Bayes on disk, with an attack on the same images whose neighbours are drawn at random."""

    def made(name: str) -> tuple[Golden, Path]:
        golden, folder = Golden.of(name), tmp_path_factory.mktemp(name)
        keys, of_images, paths = save_bayes(folder / "bayes", golden)
        classes = sorted(key.split("_")[0] for key in keys)
        labels = [key.split("_")[0] for key in of_images]
        numbers = save_images(folder / "images.txt", labels, paths, classes)
        rng = np.random.default_rng(0)
        near = rng.integers(0, len(classes), (len(paths), 10))
        public = np.array([numbers[f"{label}_public_0.JPEG"] for label in classes])
        order = rng.permutation(len(paths))
        truth = np.array([classes.index(label) for label in labels])
        indices = np.array([numbers[path] for path in paths])
        save_attack(folder / "attack", "test_attk_A", indices[order], truth[order], near[order], public[near[order]])
        return golden, folder

    return made


@pytest.mark.parametrize("name", ["nb_main", "nb_no_unseen"])
def test_naive_bayes_from_the_released_counts(
    name: str, bayes_attack: Callable[[str], tuple[Golden, Path]], tmp_path: Path
) -> None:
    golden, folder = bayes_attack(name)
    for top_tags, laplace in ((1, False), (5, False), (3, True)):
        run = imported(
            tmp_path / f"{top_tags}{laplace}", "labels", folder / "attack", "--naive-bayes", folder / "bayes",
            "--images", folder / "images.txt", "--top-tags", top_tags, *(["--laplace"] if laplace else []), *AUTHORS,
        )  # fmt: skip
        expected = golden.told["runs"][f"topk{top_tags}_laplace{laplace}"]
        scores = {row["id"].split("/")[-1]: row for row in run.scores.to_dicts()}
        rows = [scores[path] for path in golden.told["image_order"]]
        np.testing.assert_allclose([row["reference_confidence"] for row in rows], expected["score"], rtol=1e-12)
        for row, theirs, tied in zip(rows, expected["pred"], expected["best_classes_exact"], strict=True):
            if tied is None:
                assert row["reference_label"] == theirs.split("_")[0]
        found = run.figures["references"]["naive_bayes"]["roles"]["target"]["top1"]
        for fraction, allowed in expected["accuracy_range_over_all_ties"].items():
            value = found[metrics.percent_key(float(fraction))]["reference"]["value"]
            assert allowed["min"] - 1e-12 <= value <= allowed["max"] + 1e-12
        assert [row["label"] for row in rows] == [key.split("_")[0] for key in expected["target"]]


def save_sample_level(folder: Path) -> tuple[Golden, dict[str, int]]:
    """The attack, and the table of texts that the evaluation of the crop classifier saves."""
    golden = Golden.of("sample_level")
    arrays = golden.arrays
    truth, near = arrays["in_label"].ravel().astype(int), arrays["in_neighb_labels"].astype(int)
    softmax, rows = arrays["in_ref_softmax"], arrays["in_ref_rows"]
    count = 1 + max(truth.max(), near.max(), softmax.shape[1] - 1)
    classes = [f"n{number:08d}" for number in range(count)]
    names = [f"{image}.JPEG" for image in arrays["in_image_id"]]
    folder.mkdir(parents=True, exist_ok=True)
    numbers = save_images(folder / "images.txt", [classes[label] for label in truth], names, classes)
    public = np.array([numbers[f"{label}_public_0.JPEG"] for label in classes])
    save_attack(folder / "attack", "test_attk_A", [numbers[name] for name in names], truth, near, public[near])
    chosen = softmax[rows] if len(softmax) == len(truth) else softmax
    of_label = chosen[np.arange(len(rows)), truth[rows]]
    columns = [
        truth[rows], chosen.argmax(axis=1), chosen.max(axis=1), of_label, metrics.entropy(chosen),
        [f"/crops/{classes[truth[row]]}/{names[row]}" for row in rows],
    ]  # fmt: skip
    np.save(folder / "eval.npy", np.stack(columns, axis=-1))
    return golden, numbers


def test_memorization_scores_of_rows(tmp_path: Path) -> None:
    golden, _ = save_sample_level(tmp_path)
    assert np.load(tmp_path / "eval.npy").dtype.kind == "U"
    run = imported(
        tmp_path / "run", "labels", tmp_path / "attack", "--crop-classifier", tmp_path / "eval.npy", "--images",
        tmp_path / "images.txt", *AUTHORS,
    )  # fmt: skip
    scores = run.scores
    assert len(scores) == golden.told["n"]
    assert (scores["status"] == "ok").sum() == golden.told["n_joined"]
    assert (scores["status"] == "no_evidence").sum() == golden.told["n"] - golden.told["n_joined"]
    scored = scores.filter(pl.col("memorization_score").is_not_null()).sort("memorization_score", descending=True)
    assert len(scored) == golden.told["n_scored"]
    images = golden.arrays["in_image_id"][golden.arrays["out_scored_rows"]]
    assert [name.split("/")[-1] for name in scored["id"]] == [f"{image}.JPEG" for image in images]
    np.testing.assert_allclose(scored["memorization_score"], golden.arrays["out_mem_final"], atol=3e-6)
    assert (scored["memorization_score"] >= 0).sum() == golden.told["n_positive"]
    found = run.figures["references"]["crop_classifier"]
    mean = found["roles"]["target"]["memorization_score"]
    assert mean["value"] == pytest.approx(golden.told["mean"], abs=3e-6)
    for fraction, accuracy in golden.told["ref_accuracy"].items():
        cell = found["roles"]["target"]["top1"][metrics.percent_key(float(fraction))]["reference"]
        assert cell["value"] == pytest.approx(accuracy, abs=1e-12)
        assert cell["n_excluded"] == golden.told["n"] - golden.told["n_joined"]
    # The file tells the first label only.
    assert found["roles"]["target"]["top5"]["100"]["reference"]["value"] is None
    assert found["roles"]["target"]["top5"]["100"]["target"]["value"] is not None
    assert scores["reference_correct_top5"].null_count() == len(scores)


def save_pairs(folder: Path, given: Mapping[str, Any], lists: Mapping[str, Any], names: bool) -> None:
    folder.mkdir()
    np.savez(folder / "attack.npz", tgt=given["tgt_neighbors"], ref=given["ref_neighbors"])
    np.save(folder / "scores.npy", given["tgt_dist"])
    for side, found in lists.items():
        entries = [np.array(objects, dtype=np.int64) for objects in found]
        scores = [np.full(len(objects), 0.75, dtype=np.float32) for objects in found]
        (folder / f"{side}.p").write_bytes(pickle.dumps([entries, scores]))
    if names:
        (folder / "names.txt").write_text("\n".join(f"object {n}" for n in range(2000)))


def vlm_cases() -> dict[str, Any]:
    edge = json.loads((GOLDEN / "vlm_edge.json").read_text())["cases"]
    return {"vlm_main": None, **edge}


@pytest.mark.parametrize("name", [*vlm_cases()])
def test_figures_of_the_vision_language_test(name: str, tmp_path: Path) -> None:
    case = vlm_cases()[name]
    if case is None:
        golden = Golden.of("vlm_main")
        given = {key.removeprefix("in_"): value for key, value in golden.arrays.items()}
        lists = {
            side: np.split(given[f"{side}_label_values"], given[f"{side}_label_offsets"][1:-1])
            for side in ("tgt", "pub")
        }
        results, n_rows = golden.told["results"], golden.told["n_nonempty"]
    else:
        given, results, n_rows = case["input"], case["results"], case["n_nonempty"]
        lists = {side: given[f"{side}_labels"] for side in ("tgt", "pub")}
    save_pairs(tmp_path / "files", given, lists, names=case is None)
    at = tmp_path / "files"
    arguments = [
        "objects", "--neighbours", f"{at}/attack.npz:tgt", "--reference", f"{at}/attack.npz:ref", "--distances",
        at / "scores.npy", "--objects", f"target={at}/tgt.p", "--objects", f"public={at}/pub.p",
    ]  # fmt: skip
    if case is None:
        arguments += ["--names", at / "names.txt"]
    if not any(len(objects) for objects in lists["pub"]):
        assert "no public image holds an object" in told(*arguments)
        return
    run = imported(tmp_path / "run", *arguments, "scoring=object_inference_authors", *QUICK)
    found = run.figures["references"]["reference"]["roles"]["target"]
    assert found["all"]["prg"]["n_used"] == n_rows
    assert run.figures["counts"]["target"]["by_status"].get("no_objects", 0) == len(lists["tgt"]) - n_rows
    rankings = {"max_pred_gap": "object_gap", "min_dist": "min_distance", "crct_pred": "correct_objects"}
    for theirs_name, ranking in rankings.items():
        theirs = results[theirs_name]["stable"]
        assert found["all"]["authors"]["ppg"] == pytest.approx(theirs["population_precision_gap"], abs=1e-12)
        assert found["all"]["authors"]["prg"] == pytest.approx(theirs["population_recall_gap"], abs=1e-12)
        for area in ("tgt_auc", "ref_auc", "auc_gap"):
            assert found["all"]["authors"][area] == pytest.approx(theirs[area], abs=1e-9)
        for percent, expected in zip(("0.1", "1", "10"), theirs["top"], strict=True):
            mine = found["fine_grained"][ranking][percent]
            assert mine["n"] == expected["n"]
            for measure, of_theirs in (("precision", "precision"), ("recall", "recall"), ("f", "fscore")):
                value = mine[f"{measure}_gap"]["value"]
                assert value == pytest.approx(expected[f"{of_theirs}_gap"], abs=1e-12)


# What an import is


def planted(folder: Path, name: str, first: int, right: float, other_right: float, seed: int) -> None:
    """An attack and that of another encoder on 400 images of 10 classes: how often either is right is planted."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 10, 400)
    for model, share in (("own", right), ("other", other_right)):
        wrong = (truth + rng.integers(1, 10, 400)) % 10
        answers = np.where(np.arange(400) < share * 400, truth, wrong)
        near = np.repeat(answers[:, None], 10, axis=1)
        near[:, 7:] = rng.integers(0, 10, (400, 3))
        order = rng.permutation(400)
        indices = np.arange(first, first + 400)
        save_attack(folder, f"{model}_attk_{name}", indices[order], truth[order], near[order], near_of(near[order]))


PLANTED = ("--attack", "own_attk_seen", "--two-model", "other_attk_seen")
UNSEEN = ("--attack", "unseen=own_attk_new", "--two-model", "unseen=other_attk_new")


@pytest.fixture(scope="module")
def planted_attacks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    planted(folder, "seen", 0, right=0.8, other_right=0.4, seed=1)
    planted(folder, "new", 400, right=0.5, other_right=0.4, seed=2)
    np.save(folder / "public.npy", 10_000_000 + np.arange(500))
    return folder


def test_unseen_rows_give_the_corrected_gap(planted_attacks: Path, tmp_path: Path) -> None:
    run = imported(tmp_path / "run", "labels", planted_attacks, *PLANTED, *UNSEEN, *QUICK)
    corrected = run.figures["references"]["two_model"]["corrected_gap"]["top1"]["100"]
    assert corrected["value"] == pytest.approx(0.3, abs=1e-12)
    assert run.figures["verdict"].startswith("Memorization is shown: the corrected gap is 30.0")
    assert run.figures["likeness"]["alike"]
    assert {role: run.figures["counts"][role]["used"] for role in ("target", "unseen")} == {
        "target": 400,
        "unseen": 400,
    }
    assert set(run.scores["role"]) == {"target", "unseen"}


def test_without_unseen_rows_the_verdict_says_what_is_missing(planted_attacks: Path, tmp_path: Path) -> None:
    for name, settings in (("ours", QUICK), ("authors", AUTHORS)):
        run = imported(tmp_path / name, "labels", planted_attacks, *PLANTED, *settings)
        assert run.figures["references"]["two_model"]["roles"]["target"]["top1"]["100"]["gap"][
            "value"
        ] == pytest.approx(0.4)
        assert "corrected_gap" not in run.figures["references"]["two_model"]
        assert "Memorization is not separated from knowledge" in run.figures["verdict"]
        assert any("no usable unseen rows" in note for note in run.figures["notes"])
        assert "not separated from knowledge" in (run.folder / "report.html").read_text()
        written = yaml.safe_load((run.folder / "config.yaml").read_text())
        assert len(written["artefacts"]["hash"]) == 24
        assert written["probe"]["k"] == 10
        assert "min_side_px" not in written["probe"]["query"]


def test_the_order_of_rows_in_files_plays_no_part(planted_attacks: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for name in ("own_attk_seen", "other_attk_seen"):
        attack = files.read_attack(planted_attacks / name)
        order = rng.permutation(400)
        save_attack(
            tmp_path / "shuffled", name, attack.indices[order], attack.labels[order], attack.near_labels[order],
            attack.near_indices[order],
        )  # fmt: skip
    for settings in (QUICK, AUTHORS):
        runs = [
            imported(tmp_path / f"{number}{len(settings)}", "labels", folder, *PLANTED, *settings)
            for number, folder in enumerate((planted_attacks, tmp_path / "shuffled"))
        ]
        assert runs[0].scores.sort("id").equals(runs[1].scores.sort("id"))
        assert runs[0].figures["references"] == runs[1].figures["references"]


def test_one_archive_is_as_good_as_four_files(planted_attacks: Path, tmp_path: Path) -> None:
    for name in ("own_attk_seen", "other_attk_seen"):
        parts = {part: np.load(planted_attacks / f"{name}_{part}.npy") for part in files.PARTS}
        np.savez(tmp_path / f"{name}.npz", **parts)
    runs = [
        imported(tmp_path / name, "labels", folder, *PLANTED, *QUICK)
        for name, folder in (("files", planted_attacks), ("archives", tmp_path))
    ]
    assert runs[0].scores.equals(runs[1].scores)


def test_images_that_the_attack_dropped_are_counted(planted_attacks: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "bbox_A.npy", np.r_[np.arange(400.0), 900:925])
    np.save(tmp_path / "shared.npy", np.arange(1000, 1040))
    run = imported(
        tmp_path / "run", "labels", planted_attacks, *PLANTED, "--index", f"target={tmp_path}/bbox_A.npy", "--index",
        f"shared={tmp_path}/shared.npy", "--index", f"public={planted_attacks}/public.npy", *QUICK,
    )  # fmt: skip
    counts = run.figures["counts"]
    assert counts["target"] == {"rows": 425, "used": 400, "excluded": 25, "by_status": {"no_evidence": 25, "ok": 400}}
    assert counts["shared"]["used"] == 40
    assert counts["public"]["used"] == run.figures["probe"]["bank"] == 500
    gap = run.figures["references"]["two_model"]["roles"]["target"]["top1"]["100"]["gap"]
    assert (gap["n_used"], gap["n_excluded"]) == (400, 25)


def test_old_results_of_one_data_set_stand_side_by_side(planted_attacks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "later"
    planted(folder, "seen", 0, right=0.9, other_right=0.4, seed=1)
    runs = tmp_path / "runs"
    for epoch, attack in ((100, planted_attacks), (1000, folder)):
        imported(runs / str(epoch), "labels", attack, *PLANTED, *QUICK, "--encoder", "VICReg", "--epoch", epoch)
    found = compare.gather([runs])
    assert not found.skipped
    of_all = found.table.filter(pl.col("top") == "top1", pl.col("surest") == 100).sort("epoch")
    assert of_all["epoch"].to_list() == [100, 1000]
    np.testing.assert_allclose(of_all["gap"].to_numpy(), [0.4, 0.5], atol=1e-12)
    assert of_all["encoder"].to_list() == ["VICReg", "VICReg"]
    assert found.tests["n_used"].to_list() == [400]
    assert abs(found.tests["difference"][0]) == pytest.approx(0.1, abs=1e-12)


def test_a_data_set_gives_ids_and_the_hash_of_new_runs(tmp_path: Path) -> None:
    given = ("dataset.classes=4", "dataset.train_per_class=30", "dataset.val_per_class=10")
    resolved, _ = config.compose(("dataset=shapes", *given))
    manifest = config.bind(resolved["dataset"], "dataset").manifest()
    rng = np.random.default_rng(0)
    numbered = {}
    for origin, name in (("train", "test_attk_A"), ("val", "valid_attk_A")):
        rows = manifest.rows.filter(pl.col("origin") == origin).sort("label", "path").with_row_index("number")
        classes = sorted(rows["label"].unique())
        train = manifest.rows.filter(pl.col("origin") == "train").sort("label", "path")
        numbers = rng.choice(len(rows), 24, replace=False)
        truth = np.array([classes.index(label) for label in rows["label"].gather(numbers)])
        public = np.setdiff1d(np.arange(len(train)), numbers)[rng.integers(0, len(train) - 24, (24, 5))]
        near = np.array([[classes.index(train["label"][int(number)]) for number in line] for line in public])
        save_attack(tmp_path / "attack", name, numbers, truth, near, public)
        numbered[origin] = rows["id"].gather(numbers).to_list()
    run = imported(
        tmp_path / "run", "labels", tmp_path / "attack", "--attack", "test_attk_A", "--attack", "unseen=valid_attk_A",
        "--origin", "unseen=val", "--label-shuffle", *QUICK, "dataset=shapes", *given,
    )  # fmt: skip
    scores = run.scores
    assert set(scores.filter(pl.col("role") == "target")["id"]) == set(numbered["train"])
    assert set(scores.filter(pl.col("role") == "unseen")["id"]) == set(numbered["val"])
    known = manifest.rows.select("id", "label")
    joined = scores.join(known, on="id", validate="1:1", suffix="_of_data")
    assert len(joined) == 48
    assert (joined["label"] == joined["label_of_data"]).all()
    listed = manifest.rows.sort("id").drop("path")
    assert run.figures["dataset"]["hash"] == provenance.hash_table(listed)
    assert run.figures["dataset"]["rows"] == len(listed)


def test_image_folders_are_numbered_as_torchvision_does(planted_attacks: Path, tmp_path: Path) -> None:
    for label in range(10):
        (tmp_path / "train" / f"n{label:02d}").mkdir(parents=True)
    truth = np.sort(np.arange(30) % 10)
    for number, label in enumerate(truth):
        (tmp_path / "train" / f"n{label:02d}" / f"image_{99 - number}.JPEG").touch()
    near = np.repeat(truth[:, None], 4, axis=1)
    save_attack(tmp_path, "test_attk_A", np.arange(30), truth, near, np.arange(30)[:, None] // 3 * 3 + np.zeros(4, int))
    run = imported(tmp_path / "run", "labels", tmp_path, "--label-shuffle", "--images", tmp_path / "train", *QUICK)
    listed = sorted((path.parent.name, path.name) for path in (tmp_path / "train").glob("*/*"))
    expected = {f"train/{label}/{name}" for label, name in listed}
    assert set(run.scores["id"]) == expected
    assert run.scores["target_correct"].all()
    places = pl.read_parquet(run.folder / "correlated.parquet")
    assert all(
        f"train/{listed[row['position']][0]}/{listed[row['position']][1]}" == row["id"] for row in places.to_dicts()
    )


def test_the_released_pair_of_objects_and_scores_is_read(tmp_path: Path) -> None:
    path = tmp_path / "annotations.p"
    objects = [np.array([4, 4, 1]), np.array([], dtype=np.int64), np.array([7])]
    path.write_bytes(pickle.dumps([objects, [np.full(len(entry), 0.5) for entry in objects]]))
    assert read_arrays(path) == [[4, 4, 1], [], [7]]
    # Two images, and not objects with scores.
    path.write_bytes(pickle.dumps([np.array([1, 2]), np.array([3])]))
    assert read_arrays(path) == [[1, 2], [3]]
    path.write_bytes(pickle.dumps([objects, [np.array([0.5])]]))
    with pytest.raises(DataError, match="the objects of 3 images and the scores of 1"):
        read_arrays(path)


# Files that do not belong together


def altered(folder: Path, source: Path, part: str, change: Callable[[Any], Any], name: str = "own_attk_seen") -> Path:
    """The planted attacks with one file changed."""
    folder.mkdir(exist_ok=True)
    for path in source.glob("*.npy"):
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / f"{name}_{part}.npy"
    np.save(path, change(np.load(path)), allow_pickle=True)
    return folder


def put(values: Any, place: Any, value: Any) -> Any:
    values = values.copy()
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("labels", lambda v: v[:-1], "has 400 rows, and another file of own_attk_seen has 399"),
        ("neighb_labels", lambda v: v[:, :5], "has 5 neighbours a row and"),
        ("attk_idxs", lambda v: put(v, 1, v[0]), r"attk_idxs.npy: image \d+ occurs 2 times"),
        ("labels", lambda v: put(v, 3, -1), "labels.npy: -1 is no class"),
        ("neighb_labels", lambda v: np.roll(v, 1, axis=0), "neighb_labels.npy does not belong to .*neighb_idxs.npy"),
        ("neighb_labels", lambda v: np.empty(0), r"neighb_labels.npy: has the shape \(0,\)"),
        ("labels", lambda v: v + 0.5, "labels.npy: holds float64 values that are not all whole"),
        ("labels", lambda v: v.astype(object), "labels.npy: cannot be read .* Python objects can run programs"),
        ("labels", lambda v: (v + 1) % 10, r"image \d+ has one class in one attack and another"),
        (
            "attk_idxs",
            lambda v: v + 400,
            r"other_attk_seen_attk_idxs.npy: image \d+ is not in .*own_attk_seen_attk_idxs",
        ),
    ],
)
def test_files_of_an_attack_that_do_not_go_together(
    part: str, change: Callable[[Any], Any], message: str, planted_attacks: Path, tmp_path: Path
) -> None:
    folder = altered(tmp_path / "altered", planted_attacks, part, change)
    assert re.search(message, told("labels", folder, *PLANTED))


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_nothing_is_unpickled(planted_attacks: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = altered(tmp_path / "altered", planted_attacks, "labels", lambda v: np.array([[Payload(marker)]] * 400))
    assert "Python objects can run programs" in told("labels", folder, *PLANTED)
    for name in ("tgt", "pub"):
        (tmp_path / f"{name}.p").write_bytes(pickle.dumps([Payload(marker)]))
    np.save(tmp_path / "near.npy", np.zeros((1, 1), int))
    at = tmp_path / "near.npy"
    said = told(
        "objects",
        "--neighbours",
        at,
        "--reference",
        at,
        "--objects",
        f"target={tmp_path}/tgt.p",
        "--objects",
        f"public={tmp_path}/pub.p",
    )
    assert "tgt.p holds the class or function" in said
    assert not marker.exists()


def test_damaged_and_missing_files_are_named(planted_attacks: Path, tmp_path: Path) -> None:
    folder = altered(tmp_path / "cut", planted_attacks, "labels", lambda v: v)
    path = folder / "own_attk_seen_labels.npy"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: cannot be read as an .npy file" in told("labels", folder, *PLANTED)
    path.unlink()
    assert f"{path}: cannot be read as an .npy file" in told("labels", folder, *PLANTED)
    said = told("labels", planted_attacks, "--attack", "A_attk_A", "--label-shuffle")
    assert (
        "A_attk_A_attk_idxs.npy: there is no such file; that folder has the attacks other_attk_new, other_attk_seen"
        in said
    )
    np.savez(tmp_path / "C_attk_C.npz", attk_idxs=np.arange(3))
    assert "C_attk_C.npz: cannot be read as an .npz file with the array labels" in told(
        "labels", tmp_path, "--attack", "C_attk_C", "--label-shuffle"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--index", "target=few.npy"), r"own_attk_seen_attk_idxs.npy: image 10 is not in few.npy \(390 are not\)"),
        (("--index", "public=few.npy"), r"own_attk_seen_neighb_idxs.npy: image 10000000 is not in few.npy"),
        (("--index", "shared=few.npy"), "image train/0000000 is both shared and target"),
        (("--index", "public=twice.npy"), "twice.npy: image 3 is named 2 times"),
        (("--images", "short.txt"), "is a class number 9, and the 1 classes of short.txt"),
        (("--images", "unsorted.txt"), "unsorted.txt: train/n1/a.JPEG stands after train/n2/a.JPEG"),
        (("--images", "flat.txt"), "flat.txt, line 1: 'a.JPEG' is not <class folder>/<file name>"),
        (("--images", "classes.txt"), r"image \d+ is not among the 10 of classes.txt"),
        (("--images", "wrong.txt"), r"own_attk_seen_labels.npy: image \d+ has class n\d, and in wrong.txt it is"),
        (("--naive-bayes", "."), "names images by file, and the attack numbers them. List the images"),
        (("--attack", "own_attk_new"), "--attack: own_attk_seen and own_attk_new are both given for target"),
        (("--attack", "unseen=own_attk_seen"), "image train/0000000 is both target and unseen"),
        (("--two-model", "heldout=own_attk_new"), "there is no --attack heldout=NAME"),
        (("probe.k=11",), "probe.k=11: the attack own_attk_seen has 10 neighbours a row. Set probe.k to at most 10"),
        (("probe.query.compat=authors",), "probe.query.compat=authors: an import reads settings of dataset, probe"),
        (("model=clip_vitb32",), "model=clip_vitb32: an import reads settings of dataset, probe"),
        (
            ("scoring=object_inference",),
            "the test of labels is scored by LabelInference, and ObjectInference is chosen",
        ),
        (("--top-tags", "0"), "--top-tags 0: must be at least 1"),
    ],
)
def test_what_cannot_be_imported_is_told(
    options: tuple[str, ...], message: str, planted_attacks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("few.npy", np.arange(10))
    np.save("twice.npy", np.array([1, 3, 3]))
    Path("short.txt").write_text("n1/a.JPEG\n")
    Path("unsorted.txt").write_text("n2/a.JPEG\nn1/a.JPEG\n")
    Path("flat.txt").write_text("a.JPEG\n")
    Path("classes.txt").write_text("".join(f"n{label}/a.JPEG\n" for label in range(10)))
    Path("wrong.txt").write_text("".join(f"n{n // 50}/{n:03d}.JPEG\n" for n in range(500)))
    assert re.search(message, told("labels", planted_attacks, *PLANTED, *options))


def test_an_attack_alone_needs_something_to_be_compared_with(planted_attacks: Path, tmp_path: Path) -> None:
    assert "Give one or more of --two-model NAME" in told("labels", planted_attacks, "--attack", "own_attk_seen")
    assert "which of them is on target rows is not clear" in told("labels", planted_attacks, "--label-shuffle")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "figures.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds a run already"):
        imported(tmp_path / "run", "labels", planted_attacks, *PLANTED)


def test_naive_bayes_of_other_images_is_refused(
    bayes_attack: Callable[[str], tuple[Golden, Path]], tmp_path: Path
) -> None:
    _, folder = bayes_attack("nb_no_unseen")
    arguments = ("labels", folder / "attack", "--images", folder / "images.txt", "--naive-bayes", tmp_path)

    def write(images: Sequence[tuple[str, str]]) -> None:
        """Labels of some images, as pairs of key and path."""
        for part in ("labels", "frequencies"):
            (tmp_path / part).mkdir(exist_ok=True)
        for key in keys:
            entries = [{"image_path": path, "tags": ["a"], "scores": [1.0]} for of, path in images if of == key]
            (tmp_path / "labels" / f"{key}_labels.json").write_text(json.dumps(entries))
            (tmp_path / "frequencies" / f"{key}_freq.json").write_text(json.dumps({"a": [1, 1.0]}))

    text = (folder / "bayes" / "labels.txt").read_text()
    keys = ["_".join(row) for row in csv.reader(text.splitlines())]
    (tmp_path / "labels.txt").write_text(text)
    scores = files.read_attack(folder / "attack" / "test_attk_A")
    listed = (folder / "images.txt").read_text().splitlines()
    label, name = listed[scores.indices[0]].split("/")
    key = next(key for key in keys if key.startswith(f"{label}_"))
    other = next(key for key in keys if not key.startswith(f"{label}_"))
    write([(key, "elsewhere.JPEG")])
    assert "does not belong to the attack: none of its 1 images, e.g. elsewhere, is attacked" in told(*arguments)
    write([(key, name), (key, name)])
    assert "is named a second time" in told(*arguments)
    write([(other, name)])
    assert f"{other}_labels.json: {name} is of class {label} in the attack" in told(*arguments)
    (tmp_path / "labels.txt").write_text("\n".join(line for line in text.splitlines() if not line.startswith(label)))
    write([(other, listed[scores.indices[1]].split("/")[1])])
    assert f"has no class {label}" in told(*arguments) or "is of class" in told(*arguments)


def test_a_table_of_the_crop_classifier_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    save_sample_level(tmp_path)
    path = tmp_path / "eval.npy"
    arguments = ("labels", tmp_path / "attack", "--images", tmp_path / "images.txt", "--crop-classifier", path)
    right = np.load(path)
    for change, message in (
        (right[:, :4], "expected one row of texts a crop"),
        (put(right, (2, 2), "sure"), r"column 2 (confidence) holds texts that are no numbers"),
        (put(right, (2, 4), "nan"), "row 2: the entropy is not finite"),
        (put(right, (2, 0), str(int(right[2, 0]) + 1)), "row 2:"),
        (put(right, (2, 1), "99999"), "class 99999 is not among the classes"),
        (np.vstack([right, right[:1]]), "is named a second time"),
        (put(right, (slice(None), 5), "elsewhere.JPEG"), "does not belong to the attack"),
    ):
        np.save(path, change)
        assert message in told(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"near": np.zeros((2, 2), int)}, "near.npy has 2 rows, and target.p the objects of 3 images"),
        ({"near": np.full((3, 2), 4)}, "near.npy: 4 is no public image; public.p has 4, numbered from 0"),
        ({"near": np.full((3, 2), -1)}, "near.npy: -1 is no public image"),
        ({"near": np.zeros(3, int)}, "near.npy: has the shape (3,); expected a row of neighbours"),
        ({"distances": np.zeros((3, 1))}, "distances.npy has the shape (3, 1), and near.npy (3, 2)"),
        ({"distances": np.full((3, 2), np.nan)}, "distances.npy: holds something else than finite distances"),
        ({"names": "cat\ndog"}, "target.p, entry 2: object 2 has no name; --names has 2 lines"),
        ({"images": "a\nb"}, "images.txt lists 2 images, and target.p has the objects of 3"),
        ({"images": "a\nb\na"}, "images.txt: a is named more than once"),
    ],
)
def test_lists_of_neighbours_that_do_not_belong_are_refused(
    change: Mapping[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "near": np.array([[0, 1], [2, 3], [1, 0]]),
        "distances": np.ones((3, 2)),
        "names": "cat\ndog\nbus",
        **change,
    }
    for name in ("near", "distances"):
        np.save(f"{name}.npy", given[name])
    Path("names.txt").write_text(given["names"])
    Path("images.txt").write_text(given.get("images", "a\nb\nc"))
    Path("target.p").write_bytes(pickle.dumps([[0], [], [2, 1]]))
    Path("public.p").write_bytes(pickle.dumps([[0], [1, 2], [], [0, 1]]))
    said = told(
        "objects", "--neighbours", "near.npy", "--reference", "near.npy", "--distances", "distances.npy", "--objects",
        "target.p", "--objects", "public=public.p", "--names", "names.txt", "--images", "images.txt",
    )  # fmt: skip
    assert message in said


def test_unseen_pairs_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("public.p").write_bytes(pickle.dumps([[number] for number in range(20)]))
    truth = {"target": rng.integers(0, 20, 200), "unseen": rng.integers(0, 20, 200)}
    for role, share in (("target", 0.7), ("unseen", 0.3)):
        Path(f"{role}.p").write_bytes(pickle.dumps([[int(number)] for number in truth[role]]))
        found = np.arange(200) < share * 200
        np.save(f"{role}.npy", np.where(found, truth[role], (truth[role] + 1) % 20)[:, None])
        np.save(f"{role}_reference.npy", ((truth[role] + np.where(np.arange(200) % 5 == 0, 0, 2)) % 20)[:, None])
    options = ["objects", "--neighbours", "target.npy", "--reference", "target_reference.npy"]
    options += ["--objects", "target.p", "--objects", "public=public.p"]
    more = [
        "--neighbours",
        "unseen=unseen.npy",
        "--reference",
        "unseen=unseen_reference.npy",
        "--objects",
        "unseen=unseen.p",
    ]
    run = imported(tmp_path / "run", *options, *more, *QUICK)
    corrected = run.figures["references"]["reference"]["corrected"]["all"]["prg"]
    assert corrected["value"] == pytest.approx(0.4, abs=1e-12)
    assert run.figures["verdict"].startswith("Memorization is shown")
    assert "min_distance" not in run.figures["references"]["reference"]["roles"]["target"]["fine_grained"]
    raw = imported(tmp_path / "raw", *options, *QUICK)
    assert "Memorization is not separated from knowledge" in raw.figures["verdict"]
    assert "--objects: there are none of unseen rows" in told(*options, *more[:4])
    assert "--reference is given for target" in told(*options, *more[:2])
    assert "files are given for unseen rows" in told(*options, *more[4:])
