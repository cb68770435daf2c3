"""References that are trained here: the two-model test and the crop classifier."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl_lightning
import numpy as np
import polars as pl
import pytest
from conftest import SMALL
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from dejavu_exp import config, neighbours, stages
from dejavu_exp.captions import Caption
from dejavu_exp.crops import BackgroundCrop, FullImage
from dejavu_exp.encoders import LoadedEncoder, TimmEncoder
from dejavu_exp.encoders.base import IMAGES
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.references.base import ReferenceInputs
from dejavu_exp.references.crop_classifier import CropClassifier, validation_rows
from dejavu_exp.references.knn import KnnReference
from dejavu_exp.stages import Plan, Views
from dejavu_exp.training import Optimizer, Supervised, TrainedEncoder, TrainingInputs, fit

REFERENCES = "reference=[two_model,crop_classifier]"
PROBE = KnnProbe(query=BackgroundCrop(8), bank=FullImage())
SETTINGS = (*SMALL, REFERENCES, "references.crop_classifier.recipe.epochs=2", "dataset.val_per_class=6")


@dataclass(frozen=True)
class Prepared:
    """A small run up to the references."""

    plan: Plan
    views: Views
    inputs: ReferenceInputs


def plan_of(cache: Path, *overrides: str) -> Plan:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        return Plan(
            **config.build(config.resolve(compose("config", [*SETTINGS, f"trainer.cache={cache}", *overrides])))
        )


def prepared(cache: Path, *overrides: str) -> Prepared:
    plan = plan_of(cache, *overrides)
    views = stages.name_truth(plan, stages.prepare(plan))
    training = stages.training_inputs(plan, views)
    encoder = stages.train(plan, training)
    views, queries, bank = stages.embed(plan, views, encoder)
    near = neighbours.search(queries.values, bank.values, plan.probe.k)
    ids = views.measured()["id"].to_list()
    target = neighbours.infer(ids, near, views.public()["truth"], views.labels(), plan.probe.ties)
    return Prepared(plan, views, stages.reference_inputs(plan, views, encoder, target, training))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("cache"))


def reference(run: Prepared, name: str) -> KnnReference | CropClassifier:
    found = run.plan.references[name]
    assert isinstance(found, (KnnReference, CropClassifier))
    return found


def test_a_model_as_its_own_reference_has_no_gap(small: Prepared) -> None:
    own = KnnReference(encoder=_Ready(small)).evidence(small.inputs)
    np.testing.assert_array_equal(own.probabilities, small.inputs.target.probabilities)
    np.testing.assert_array_equal(own.ranking, small.inputs.target.ranking)


class _Ready:
    """The encoder under test, as an encoder that was trained elsewhere."""

    reads: ClassVar[frozenset[str]] = IMAGES

    def __init__(self, run: Prepared) -> None:
        self.run = run

    def check(self) -> None:
        pass

    def load(self) -> LoadedEncoder:
        return self.run.inputs.encoder


def test_the_second_encoder_is_the_same_recipe_on_heldout_images(small: Prepared) -> None:
    (second,) = reference(small, "two_model").train(small.inputs.training)
    assert second.weights.startswith("trained here on 24 images of heldout")
    assert second.weights_hash != small.inputs.encoder.weights_hash
    assert second.description == small.inputs.encoder.description


def test_the_second_encoder_is_asked_with_its_own_probe(small: Prepared) -> None:
    probe = replace(small.plan.probe, k=3)
    found = KnnReference(probe=probe).evidence(small.inputs)
    np.testing.assert_allclose(found.probabilities * 3, np.round(found.probabilities * 3), atol=1e-6)


def test_the_other_direction_measures_heldout_rows_with_the_roles_exchanged(small: Prepared) -> None:
    assert reference(small, "two_model").other_direction(small.inputs) is None
    both = KnnReference(directions="both")
    other = both.other_direction(small.inputs)
    assert other is not None
    assert set(other.rows["role"]) == {"heldout"}
    found = both.evidence(small.inputs)
    scores = stages.score(small.plan, small.views, None, small.inputs.target, found, other, "both")
    figures = small.plan.scoring.figures(scores, small.views.rows, 0)
    average = figures["both_directions"]["top1"]["100"]
    gaps = [figures["roles"][role]["top1"]["100"]["gap"] for role in ("target", "heldout")]
    assert average["value"] == pytest.approx((gaps[0]["value"] + gaps[1]["value"]) / 2)
    assert average["n_used"] + average["n_excluded"] == 48
    # Exchanged once more, from the other run's point of view, it is the same test.
    heldout = scores.filter(pl.col("role") == "heldout", pl.col("status") == "ok")
    assert heldout["target_probability"].to_list() == [
        other.target.take([name]).probability_of(np.array([other.target.labels.index(label)]))[0]
        for name, label in heldout.select("id", "label").iter_rows()
    ]


def test_a_second_encoder_must_be_given_where_the_model_is_ready_made() -> None:
    model = TimmEncoder("resnet18", "random")
    tagger = None
    with pytest.raises(ConfigError, match=r"references\.two_model\.encoder is null"):
        KnnReference().check(tagger, model, PROBE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"directions=both needs to know"):
        KnnReference(encoder=model, directions="both").check(tagger, model, PROBE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must not be trained on target"):
        KnnReference(encoder=TrainedEncoder(model, Supervised(1, Optimizer("sgd", 0.1))))
    KnnReference(encoder=model).check(tagger, model, PROBE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot embed texts, and its probe asks from caption to caption"):
        KnnReference(encoder=model, probe=KnnProbe(Caption(), Caption())).check(tagger, model, PROBE)  # type: ignore[arg-type]


def test_the_crop_classifier_learns_heldout_crops_and_nothing_else(
    small: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    original = TrainingInputs.run

    def run(self: TrainingInputs, job, epoch=None):  # type: ignore[no-untyped-def]
        seen.append({*job.views["id"], *job.validation["id"]})
        assert set(job.views["id"]).isdisjoint(job.validation["id"])
        return original(self, job, epoch)

    monkeypatch.setattr(TrainingInputs, "run", run)
    found = reference(small, "crop_classifier").evidence(small.inputs)
    (ids,) = seen
    assert ids == set(small.views.heldout()["id"])
    assert found.ids == tuple(small.inputs.queries["id"])
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)


def test_the_average_of_several_seeds_is_taken(small: Prepared) -> None:
    one = reference(small, "crop_classifier")
    assert isinstance(one, CropClassifier)
    networks = replace(one, seeds=2).train(small.inputs.training)
    assert networks[0].weights_hash != networks[1].weights_hash
    assert networks[0].weights_hash == one.train(small.inputs.training)[0].weights_hash
    found = replace(one, seeds=2).evidence(small.inputs)
    single = [
        small.plan.trainer.embed(network, small.inputs.queries, small.inputs.manifest.store).values
        for network in networks
    ]
    np.testing.assert_allclose(found.probabilities, np.mean(single, axis=0), atol=1e-6)


def test_a_class_that_heldout_lacks_gets_no_probability(small: Prepared) -> None:
    training = small.inputs.training
    backgrounds = training.backgrounds.filter((pl.col("role") != "heldout") | (pl.col("label") != "disc"))
    found = reference(small, "crop_classifier").evidence(
        replace(small.inputs, training=replace(training, backgrounds=backgrounds))
    )
    assert (found.probabilities[:, found.labels.index("disc")] == 0).all()


@pytest.mark.parametrize("name", ["two_model", "crop_classifier"])
@pytest.mark.parametrize("same", ["id", "content"])
def test_a_target_row_among_the_lessons_ends_the_run(small: Prepared, name: str, same: str) -> None:
    training = small.inputs.training
    target = training.images.filter(pl.col("role") == "target").row(0, named=True)
    twin = training.images.filter(pl.col("role") == "heldout").row(0, named=True)["id"]

    def plant(views: pl.DataFrame) -> pl.DataFrame:
        planted = pl.when(pl.col("id") == twin).then(pl.lit(target[same])).otherwise(same)
        return views.with_columns(planted.alias(same))

    planted = replace(training, images=plant(training.images), backgrounds=plant(training.backgrounds))
    with pytest.raises(DataError, match="1 images that are measured"):
        reference(small, name).evidence(replace(small.inputs, training=planted))


def test_the_run_refuses_copies_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path)
    views = stages.name_truth(plan, stages.prepare(plan))
    target = views.queries.filter(pl.col("role") == "target").row(0, named=True)
    twin = views.queries.filter(pl.col("role") == "heldout").row(0, named=True)["id"]
    content = pl.when(pl.col("id") == twin).then(pl.lit(target["content"])).otherwise("content")
    planted = replace(views, queries=views.queries.with_columns(content=content))
    with pytest.raises(DataError, match=r"training\.copies=drop"):
        stages.training_inputs(plan, planted)
    lenient = plan_of(tmp_path, "training.copies=drop")
    assert twin not in stages.training_inputs(lenient, planted).heldout()["id"]
    floors = replace(plan, references={})
    assert stages.training_inputs(floors, planted) is not None


def _recipe(classifier: CropClassifier) -> Supervised:
    assert isinstance(classifier.recipe, Supervised)
    return classifier.recipe


def test_early_stopping_takes_the_best_epoch(small: Prepared, tmp_path: Path) -> None:
    one = reference(small, "crop_classifier")
    assert isinstance(one, CropClassifier)
    # A rate that ruins the network after the first epochs.
    wild = replace(one, recipe=replace(_recipe(one), epochs=12, optimizer=Optimizer("sgd", 1.0)), patience=2)
    training = replace(small.inputs.training, cache=tmp_path, folders={}, waits={})
    wild.train(training)
    (folder,) = training.folders.values()
    curve = pl.read_parquet(folder / "history.parquet")
    losses = curve["validation_loss"].drop_nulls().to_list()
    assert len(losses) < 12
    assert pl.read_json(folder / "done.json")["best_epoch"][0] == int(np.argmin(losses)) + 1
    assert len(losses) == int(np.argmin(losses)) + 1 + 2


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_crop_classifier_killed_while_training_ends_the_same(
    small: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    one = reference(small, "crop_classifier")
    assert isinstance(one, CropClassifier)
    short = replace(one, recipe=replace(_recipe(one), epochs=4, batch_size=10), patience=3)
    whole = replace(small.inputs.training, cache=tmp_path / "whole", folders={}, waits={})
    killed = replace(small.inputs.training, cache=tmp_path / "killed", folders={}, waits={})
    (expected,) = short.train(whole)
    original = fit.Keeper.on_train_batch_end

    def kill(self: fit.Keeper, trainer: pl_lightning.Trainer, *arguments: Any) -> None:
        original(self, trainer, *arguments)
        if trainer.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit.Keeper, "on_train_batch_end", kill)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        short.train(killed)
    monkeypatch.undo()
    assert not list((tmp_path / "killed").rglob(fit.DONE))
    (resumed,) = short.train(killed)
    assert resumed.weights_hash == expected.weights_hash
    assert [path.read_bytes() for path in tmp_path.rglob(fit.DONE)].count(
        next((tmp_path / "whole").rglob(fit.DONE)).read_bytes()
    ) == 2


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 2), (0.5, 5)])
def test_validation_rows_are_a_share_of_each_class(share: float, expected: int) -> None:
    rows = pl.DataFrame({"id": [f"r{i}" for i in range(21)], "label": ["a"] * 10 + ["b"] * 10 + ["c"]})
    chosen = validation_rows(rows, share, 0)
    counts = rows.filter(chosen)["label"].value_counts()
    assert dict(counts.iter_rows()) == (
        {"a": max(1, expected // 2) if share == 0.1 else expected}
        | {"b": max(1, expected // 2) if share == 0.1 else expected}
        if share
        else {}
    )
    backwards = rows.reverse()
    assert set(backwards.filter(validation_rows(backwards, share, 0))["id"]) == set(rows.filter(chosen)["id"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda one: replace(one, seeds=0), r"crop_classifier\.seeds=0"),
        (lambda one: replace(one, validation_share=1.0), r"validation_share=1\.0"),
        (lambda one: replace(one, patience=0), r"patience=0"),
    ],
)
def test_bad_settings_name_their_key(small: Prepared, build: Callable[[CropClassifier], object], message: str) -> None:
    one = reference(small, "crop_classifier")
    assert isinstance(one, CropClassifier)
    with pytest.raises(ConfigError, match=message):
        build(one)
