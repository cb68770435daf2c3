"""Target and unseen rows: differences that are planted are found, others are not, and weights take them away."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from dejavu_exp import evidence, likeness

LABELS = ("boat", "fox", "tree")


def rows_and_answers(seed: int, *, easier: float = 0.0, larger: float = 0.0, tagged: float = 0.0) -> Any:
    """400 target and 300 unseen rows; what is above zero makes target rows differ from unseen ones."""
    rng = np.random.default_rng(seed)
    is_target = np.arange(700) < 400
    labels = rng.choice(LABELS, 700)
    sides = rng.beta(2, 5, 700) + larger * is_target
    tags = [
        ["sea"] if draw < 0.4 + tagged * seen else ["sky", "sand"]
        for draw, seen in zip(rng.random(700), is_target, strict=True)
    ]
    rows = pl.DataFrame(
        {
            "id": [f"{row:03d}" for row in range(700)],
            "role": np.where(is_target, "target", "unseen"),
            "label": labels,
            "truth": [[label] for label in labels],
            "tags": tags,
            "box_share": sides,
            "crop_share": rng.random(700),
        }
    )
    logits = rng.normal(0, 1, (700, 3))
    logits[np.arange(700), np.searchsorted(LABELS, labels)] += 1 + easier * is_target
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return rows, evidence.from_probabilities(rows["id"].to_list(), LABELS, chance)


def compared(**differences: float) -> likeness.Likeness:
    rows, answers = rows_and_answers(0, **differences)
    found = likeness.compare(rows, answers, "none", 0.95, 0)
    assert found is not None
    return found


def test_rows_drawn_alike_are_called_so() -> None:
    found = compared()
    assert [test["name"] for test in found.tests] == [
        "class balance", "box size", "crop size", "background tags", "two-sample classifier",
    ]  # fmt: skip
    assert found.figures()["alike"]
    assert not found.warning
    assert found.figures()["effective_unseen"] == 300


@pytest.mark.parametrize(
    ("differences", "name"),
    [
        ({"easier": 1.0}, "two-sample classifier"),
        ({"larger": 0.1}, "box size"),
        ({"tagged": 0.2}, "background tags"),
    ],
)
def test_a_planted_difference_is_named_and_no_other(differences: dict[str, float], name: str) -> None:
    found = compared(**differences)
    assert [test["name"] for test in found.differing] == [name]
    assert name in found.warning
    assert "scoring.adjust=weight" in found.warning


def test_other_classes_are_found() -> None:
    rows, answers = rows_and_answers(0)
    fewer = rows.filter((pl.col("role") == "target") | (pl.col("label") != "fox") | (pl.col("id") < "500"))
    found = likeness.compare(fewer, answers, "none", 0.95, 0)
    assert found is not None
    assert [test["name"] for test in found.differing][:1] == ["class balance"]


def test_p_values_of_rows_drawn_alike_are_uniform() -> None:
    """As often below 20 % as 20 % says; the classifier's may be so less often, which its docstring allows."""
    drawn = [
        likeness.compare(rows, answers, "none", 0.95, seed)
        for seed, (rows, answers) in enumerate(map(rows_and_answers, range(60)))
    ]
    p_values = np.array([[test["p_value"] for test in found.tests] for found in drawn if found])
    below = (p_values < 0.2).sum(axis=0)
    # 3 and 21 of 60 are the 0.1 % and 99.9 % points of a binomial number with 20 %.
    assert (below[:4] >= 3).all()
    assert (below <= 21).all()


@pytest.mark.parametrize("adjust", ["weight", "match"])
def test_weights_take_a_planted_difference_away(adjust: str) -> None:
    """Accuracy of the reference differs by the planted difference before, and by next to nothing after."""
    rows, answers = rows_and_answers(0, easier=1.0)
    found = likeness.compare(rows, answers, adjust, 0.95, 0)
    assert found is not None
    right = answers.correct(np.searchsorted(LABELS, rows["label"].to_numpy())).astype(float)
    weights, is_target = found.weights["weight"].to_numpy(), (rows["role"] == "target").to_numpy()
    before = right[is_target].mean() - right[~is_target].mean()
    after = right[is_target].mean() - np.average(right[~is_target], weights=weights[~is_target])
    assert before > 0.15
    assert abs(after) < before / 4
    assert weights[~is_target].mean() == pytest.approx(1)
    assert (weights[is_target] == 1).all()
    assert found.figures()["effective_unseen"] < 300
    assert f"scoring.adjust={adjust}" in found.warning
    assert max(abs(item.after) for item in found.balance) < max(abs(item.before) for item in found.balance) / 2


def test_without_unseen_rows_there_is_nothing_to_compare() -> None:
    rows, answers = rows_and_answers(0)
    assert likeness.compare(rows.filter(role="target"), answers, "none", 0.95, 0) is None


def test_what_is_not_known_is_not_tested() -> None:
    rows, _ = rows_and_answers(0)
    nothing = rows.with_columns(
        label=pl.lit(None, pl.String), tags=pl.lit(None, pl.List(pl.String)), box_share=pl.lit(None, pl.Float64)
    )
    found = likeness.compare(nothing, None, "none", 0.95, 0)
    assert found is not None
    assert [test["name"] for test in found.tests] == ["crop size"]


def test_rows_without_an_answer_are_left_out_of_the_classifier() -> None:
    rows, answers = rows_and_answers(0)
    some = answers.take(rows["id"].to_list()[50:])
    found = likeness.compare(rows, some, "weight", 0.95, 0)
    assert found is not None
    (test,) = (test for test in found.tests if test["name"] == "two-sample classifier")
    assert (test["n_target"], test["n_unseen"]) == (350, 300)
    assert np.isfinite(found.weights["weight"].to_numpy()).all()
