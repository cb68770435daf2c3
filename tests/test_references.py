"""Naive Bayes and the floors."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dejavu_exp import evidence, provenance, tables
from dejavu_exp.datasets.base import Manifest
from dejavu_exp.datasets.stores import MemoryStore
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.extract import Extractor
from dejavu_exp.neighbours import KnnProbe
from dejavu_exp.references import naive_bayes
from dejavu_exp.references.base import ReferenceInputs
from dejavu_exp.references.floors import ClassPrior, LabelShuffle
from dejavu_exp.references.naive_bayes import NaiveBayes
from dejavu_exp.taggers import DatasetTags

LABELS = ("boat", "fox")


def views(rows: list[tuple[str, str, str]]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"view_id": f"{row_id}#b", "id": row_id, "view": "b", "role": role, "label": label, "path": row_id}
            | {"content": "", "xmin": 0, "ymin": 0, "xmax": 8, "ymax": 8, "status": "ok", "detail": None}
            | {"truth": [label], "texts": None}
            for row_id, role, label in rows
        ],
        schema=dict(tables.VIEWS),
    )


def inputs(
    tmp_path: Path, tags: dict[str, list[str] | None], heldout: dict[str, str], queries: list[str]
) -> ReferenceInputs:
    rows = pl.DataFrame(
        [
            {"id": row_id, "path": row_id, "origin": "train", "label": "x", "tags": found, "status": "ok"}
            | dict.fromkeys(("width", "height", "boxes", "captions", "objects", "tag_boxes", "detail"))
            for row_id, found in tags.items()
        ],
        schema=dict(tables.MANIFEST),
    )
    asked = views([(row_id, "target" if index % 2 else "unseen", "boat") for index, row_id in enumerate(queries)])
    rng = np.random.default_rng(0)
    target = evidence.from_probabilities(queries, LABELS, rng.dirichlet([1, 1], len(queries)))
    nothing: Any = None  # the encoder and what training sees: naive Bayes and the floors look at neither
    return ReferenceInputs(
        queries=asked,
        bank=asked.clear(),
        rows=rows,
        probe=KnnProbe(query=None, bank=None),
        encoder=nothing,
        training=nothing,
        heldout=views([(row_id, "heldout", label) for row_id, label in heldout.items()]),
        target=target,
        labels=LABELS,
        manifest=Manifest("toy", rows, MemoryStore({})),
        extractor=Extractor(tmp_path, accelerator="cpu"),
        tagger=DatasetTags(),
        seed=0,
    )


def toy(tmp_path: Path) -> ReferenceInputs:
    heldout = {f"h{index}": LABELS[index % 2] for index in range(20)}
    tags: dict[str, list[str] | None] = {
        row_id: ["sea" if label == "boat" else "tree"] for row_id, label in heldout.items()
    }
    tags |= {"q1": ["sea"], "q2": ["tree"], "q3": ["moon"], "q4": [], "q5": None}
    return inputs(tmp_path, tags, heldout, ["q1", "q2", "q3", "q4", "q5"])


def test_tags_decide_and_unknown_tags_give_the_prior(tmp_path: Any) -> None:
    found = NaiveBayes().evidence(toy(tmp_path))
    assert found.ranking[:2, 0].tolist() == [0, 1]
    np.testing.assert_allclose(found.probabilities[2:4], 0.5)
    assert found.tied[2:4].all()
    assert found.confidence[0] > found.confidence[2]


def test_a_query_without_known_tags_has_no_evidence(tmp_path: Any) -> None:
    found = NaiveBayes().evidence(toy(tmp_path))
    assert np.isnan(found.probabilities[4]).all()
    assert np.isfinite(found.probabilities[:4]).all()


def test_posterior_equals_bayes_by_hand() -> None:
    """Prior 3/4 and 1/4; P(sea | boat) = (2 + 1) / (3 + 2 * 1), P(sea | fox) = (0 + 1) / (1 + 2 * 1)."""
    found = naive_bayes.posterior(
        [["sea"], ["sea"], ["tree"], ["tree"]], ["boat", "boat", "boat", "fox"], [["sea"]], LABELS, 1.0, None
    )
    boat, fox = 3 / 4 * 3 / 5, 1 / 4 * 1 / 3
    np.testing.assert_allclose(found, [[boat / (boat + fox), fox / (boat + fox)]])


def test_the_temperature_softens_tags_that_mislead() -> None:
    """With tags that say little, the calibrated posterior is nearer to the prior than the raw one."""
    rng = np.random.default_rng(0)
    truth = [LABELS[index % 2] for index in range(200)]
    # The same weak clue five times over: naive Bayes counts it as five independent ones.
    clues = ["s" if (rng.random() < 0.7) == (label == "boat") else "t" for label in truth]
    lessons = [[f"{clue}{copy}" for copy in range(5)] for clue in clues]
    question = [[f"s{copy}" for copy in range(5)]]
    raw = naive_bayes.posterior(lessons, truth, question, LABELS, 1.0, None)[0, 0]
    calibrated = naive_bayes.posterior(lessons, truth, question, LABELS, 1.0, 0)[0, 0]
    assert raw > 0.8
    # The clue is right this often, and no more can be known from it.
    right = np.mean([(clue == "s") == (label == "boat") for clue, label in zip(clues, truth, strict=True)])
    assert calibrated == pytest.approx(right, abs=0.05)


def test_tags_that_tell_less_than_chance_leave_the_prior() -> None:
    """Each tag is once of either class: what it says of a held-out row is always wrong."""
    lessons, truth = [[f"t{row // 2}"] for row in range(40)], [LABELS[row % 2] for row in range(40)]
    questions = [["t0", "t1"], [], ["t3"]]
    found = naive_bayes.posterior(lessons, truth, questions, LABELS, 1.0, 0)
    np.testing.assert_allclose(found, 0.5, atol=1e-3)


@pytest.mark.parametrize("sample_rows", [100, 8_000])
def test_the_posterior_is_that_of_scikit_learn(sample_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted from a sample and all rows, or from all at once: the same temperature."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.model_selection import StratifiedKFold
    from sklearn.naive_bayes import MultinomialNB

    monkeypatch.setattr(naive_bayes, "SAMPLE_ROWS", sample_rows)
    rng = np.random.default_rng(0)
    labels = [f"label {code:02d}" for code in range(20)]
    codes = rng.integers(0, 20, 900)
    tags = np.where(rng.random((900, 4)) < 0.3, codes[:, None], rng.integers(0, 60, (900, 4)))
    crops = [[f"tag{tag}" for tag in row] for row in tags]
    lessons, truth = crops[:600], [labels[code] for code in codes[:600]]
    questions = [*crops[600:], [], ["never seen"]]
    columns, state = DictVectorizer(), provenance.hash_order(3, "rng", "folds") % 2**32
    folds = StratifiedKFold(naive_bayes.FOLDS, shuffle=True, random_state=state)
    for seed in (None, 3):
        model: Any = MultinomialNB(alpha=0.5)
        if seed is not None:
            model = CalibratedClassifierCV(model, method="temperature", cv=folds, ensemble=False)
        model.fit(columns.fit_transform([dict.fromkeys(names, 1.0) for names in lessons]), np.array(truth))
        expected = model.predict_proba(columns.transform([dict.fromkeys(names, 1.0) for names in questions]))
        found = naive_bayes.posterior(lessons, truth, questions, labels, 0.5, seed)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


def drawn_crops(count: int, seed: int) -> tuple[pl.Series, pl.Series]:
    """Tags and labels, where a third of the tags goes with the label."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 12, count)
    tags = np.where(rng.random((count, 4)) < 0.33, truth[:, None], rng.integers(12, 60, (count, 4)))
    names = pl.Series([[f"t{tag}" for tag in row] for row in tags.tolist()])
    return names, pl.Series([f"c{label:02d}" for label in truth.tolist()])


def test_what_is_judged_is_the_evidence_of_the_posterior() -> None:
    (lessons, truth), (questions, _) = drawn_crops(600, 0), drawn_crops(400, 1)
    labels = [f"c{label:02d}" for label in range(12)]
    ids = [str(row) for row in range(400)]
    found = naive_bayes.judge(ids, lessons, truth, questions, labels, 1.0, 0)
    expected = evidence.from_probabilities(ids, labels, found.probabilities)
    np.testing.assert_array_equal(found.ranking, expected.ranking)
    np.testing.assert_array_equal(found.tied, expected.tied)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-5)


def test_a_temperature_from_a_sample_is_near_that_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    (lessons, truth), (questions, _) = drawn_crops(4000, 0), drawn_crops(200, 1)
    labels = [f"c{label:02d}" for label in range(12)]
    whole = naive_bayes.posterior(lessons, truth, questions, labels, 1.0, 0)
    monkeypatch.setattr(naive_bayes, "CALIBRATION_ROWS", 1000)
    part = naive_bayes.posterior(lessons, truth, questions, labels, 1.0, 0)
    assert (whole != part).any()
    np.testing.assert_allclose(part, whole, atol=0.02)
    np.testing.assert_array_equal(part.argmax(axis=1), whole.argmax(axis=1))


def test_authors_form_vetoes_and_is_surest_of_unknown_tags(tmp_path: Any) -> None:
    found = NaiveBayes(compat="authors", top_tags=3).evidence(toy(tmp_path))
    assert found.ranking[:, 0].tolist()[:4] == [0, 1, 1, 1]
    assert found.confidence[2] == 1.0  # a tag never seen: the released code is surest of it
    assert found.confidence[3] == 0.0  # no tag at all


def test_no_tag_at_all_is_an_error_with_a_way_out(tmp_path: Any) -> None:
    given = inputs(tmp_path, {"h1": [], "h2": [], "q": ["sea"]}, {"h1": "boat", "h2": "fox"}, ["q"])
    with pytest.raises(DataError, match="nothing to learn"):
        NaiveBayes().evidence(given)


def test_a_data_set_without_tags_names_another_tagger(tmp_path: Any) -> None:
    given = inputs(tmp_path, {"h1": None, "q": None}, {"h1": "boat"}, ["q"])
    with pytest.raises(ConfigError, match="timm_classifier"):
        NaiveBayes().evidence(given)


def test_class_prior_is_the_heldout_frequency(tmp_path: Any) -> None:
    given = inputs(tmp_path, {}, {"h1": "fox", "h2": "fox", "h3": "boat"}, ["q1", "q2"])
    found = ClassPrior().evidence(given)
    np.testing.assert_allclose(found.probabilities, [[1 / 3, 2 / 3]] * 2, rtol=1e-6)
    assert found.ranking[:, 0].tolist() == [1, 1]


def test_label_shuffle_keeps_the_evidence_of_each_role_and_unties_it_from_the_rows(tmp_path: Any) -> None:
    names = [f"q{index:03d}" for index in range(100)]
    given = inputs(tmp_path, {}, {"h": "fox"}, names)
    found = LabelShuffle().evidence(given)
    assert found.ids == tuple(names)
    for start in (0, 1):
        mine, theirs = found.confidence[start::2], given.target.confidence[start::2]
        assert sorted(mine) == sorted(theirs)
        assert (mine != theirs).mean() > 0.9
    assert (LabelShuffle().evidence(given).confidence == found.confidence).all()


@pytest.mark.parametrize(
    ("key", "value"), [("top_tags", 0), ("smoothing", 0.0), ("compat", "x"), ("frequencies", "folder")]
)
def test_bad_settings_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"naive_bayes\.{key}"):
        NaiveBayes(**{key: value})
