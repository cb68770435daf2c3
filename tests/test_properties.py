"""What holds for any input, against plain rewrites and laws: crops, votes, evidence, metrics, statistics, tables."""

import itertools
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import polars as pl
import properties
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from properties import examples
from scipy import stats
from test_crops import images
from test_object_metrics import by_hand

from dejavu_exp import crops, evidence, metrics, neighbours, statistics, tables
from dejavu_exp.errors import DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.neighbours import Metric, Neighbours, Ties
from dejavu_exp.statistics import Rows
from dejavu_exp.tables import Estimate, Float32Array, FloatArray, IntArray

Sets: TypeAlias = list[list[int]]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
"""Any text that UTF-8 can hold, also of control characters, of marks alone, or empty."""
ANY_TEXT = TEXT | st.text(st.sampled_from("a\udc80\udcff"), max_size=8)
"""Also with what Python has for bytes that are no UTF-8, as in the name of a file."""
SHARE = st.integers(0, 20).map(lambda count: count / 20)
LEVEL = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])
TIES = st.sampled_from(["nearest", "lowest_label"])
SEED = st.integers(0, 2**32 - 1)


# The number of examples


@pytest.mark.parametrize(("asked", "count"), [("", 3), ("7", 7)])
def test_a_property_has_as_many_examples_as_it_or_the_environment_asks_for(
    asked: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(properties, "ASKED", asked)

    def run() -> list[int]:
        seen: list[int] = []

        @examples(3)
        @given(SEED)
        def see(seed: int) -> None:
            seen.append(seed)

        see()
        return seen

    first, second = run(), run()
    assert len(first) == len(second) == count
    assert (first == second) == (not asked), "from a fixed seed in CI alone"


def test_every_property_has_its_examples_from_there() -> None:
    for path in Path(__file__).parent.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for before, line in itertools.pairwise(lines):
            if line.startswith("@given("):
                assert before.startswith("@examples("), f"{path.name}: {line}"
        if path.name != "properties.py":
            assert not any(line.startswith("@settings(") for line in lines), path.name


# Crops


def runs_by_pixels(width: int, height: int, boxes: Sequence[Sequence[int]]) -> list[crops.Rect]:
    """The free runs of rows of every strip, by looking at its pixels."""
    marked = np.zeros((height, width), dtype=bool)
    for xmin, ymin, xmax, ymax in boxes:
        marked[ymin:ymax, xmin:xmax] = True
    edges = sorted({0, width}.union(*((box[0], box[2]) for box in boxes)))
    found: list[crops.Rect] = []
    for left, right in itertools.pairwise(edges):
        free = np.logical_not(marked[:, left:right].any(axis=1)).tolist()
        for is_free, group in itertools.groupby(range(height), key=free.__getitem__):
            rows = list(group)
            if is_free:
                found.append((left, rows[0], right, rows[-1] + 1))
    return found


@examples(150)
@given(images(), st.integers(0, 5))
def test_the_authors_crop_is_the_last_of_the_best_runs_of_free_pixels(
    image: tuple[int, int, list[list[int]]], min_px: int
) -> None:
    runs = runs_by_pixels(*image)
    sides = [min(xmax - xmin, ymax - ymin) for xmin, ymin, xmax, ymax in runs]
    best = max(sides, default=0)
    found = crops.authors_rectangle(*image, min_px)
    assert (found.n_candidates, found.best_min_side, found.n_tied_best) == (len(runs), best, sides.count(best))
    assert found.crop == (runs[max(np.flatnonzero(np.equal(sides, best)))] if best > min_px else None)


@examples(100)
@given(images(), st.integers(2, 400))
def test_a_crop_grows_with_its_image_and_its_sides_change_places_with_the_axes(
    image: tuple[int, int, list[list[int]]], scale: int
) -> None:
    width, height, boxes = image
    found = crops.largest_rectangle(*image)
    large = crops.largest_rectangle(width * scale, height * scale, (np.array(boxes, dtype=int) * scale).tolist())
    turned = crops.largest_rectangle(height, width, [[ymin, xmin, ymax, xmax] for xmin, ymin, xmax, ymax in boxes])
    if found is None or turned is None:
        assert (found, large, turned) == (None, None, None)
        return
    assert large == tuple(end * scale for end in found)
    sides = [sorted((rect[2] - rect[0], rect[3] - rect[1])) for rect in (found, turned)]
    assert sides[0] == sides[1]


# Votes


@st.composite
def ballots(draw: st.DrawFn) -> tuple[IntArray, list[str]]:
    """The labels of the neighbours of some queries, as positions among labels: more of them, often, than are ranked."""
    labels = [f"label{number:02d}" for number in range(draw(st.integers(1, 14)))]
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 24)))
    return draw(nps.arrays(np.int64, shape, elements=st.integers(0, len(labels) - 1))), labels


def assert_counted(found: Evidence, carried: Sequence[Sequence[Iterable[str]]], ties: Ties) -> None:
    """That evidence is what a loop over the neighbours gives; `carried`: the labels of each neighbour of each row."""
    for row, voters in enumerate(carried):
        votes = Counter(label for labels in voters for label in set(labels))
        nearest = {label: min(place for place, labels in enumerate(voters) if label in labels) for label in votes}
        order = sorted(votes, key=lambda label: (-votes[label], nearest[label] if ties == "nearest" else 0, label))
        ranked = [found.labels[column] for column in found.ranking[row] if column >= 0]
        assert ranked == order[:10]
        assert found.ranking.shape[1] == min(10, len(found.labels))
        shares = np.array([votes[label] / len(voters) for label in found.labels], dtype=np.float32)
        np.testing.assert_array_equal(found.probabilities[row], shares)
        assert found.tied[row] == ((shares == shares.max()).sum() > 1)
        even = dict.fromkeys(found.labels, 1)
        assert found.confidence[row] == pytest.approx(-stats.entropy(list((votes or even).values())), abs=1e-12)


@examples(60)
@given(ballots(), TIES, st.integers(1, 40))
def test_votes_are_those_counted_one_by_one(ballot: tuple[IntArray, list[str]], ties: Ties, block: int) -> None:
    codes, labels = ballot
    with patch.object(neighbours, "COUNTED_VOTERS", block):
        found = neighbours.vote([str(row) for row in range(len(codes))], codes, labels, ties)
    assert_counted(found, [[[labels[code]] for code in row] for row in codes], ties)


def assert_same(found: Evidence, expected: Evidence, but: Sequence[str] = ()) -> None:
    """That two are the same, to the last bit."""
    for field in fields(Evidence):
        if field.name not in but:
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name), field.name)


@examples(60)
@given(ballots(), SEED)
def test_the_order_of_voters_breaks_ties_only_and_names_of_labels_and_order_of_queries_nothing(
    ballot: tuple[IntArray, list[str]], seed: int
) -> None:
    codes, labels = ballot
    ids, rng = [str(row) for row in range(len(codes))], np.random.default_rng(seed)
    shuffled = rng.permuted(codes, axis=1)
    assert_same(
        neighbours.vote(ids, shuffled, labels, "lowest_label"), neighbours.vote(ids, codes, labels, "lowest_label")
    )
    found = neighbours.vote(ids, codes, labels, "nearest")
    assert_same(neighbours.vote(ids, shuffled, labels, "nearest"), found, but=["ranking"])
    names = rng.permutation(len(labels))
    renamed = neighbours.vote(ids, names[codes], labels, "nearest")
    np.testing.assert_array_equal(renamed.ranking, np.where(found.ranking >= 0, names[found.ranking], -1))
    np.testing.assert_array_equal(renamed.probabilities[:, names], found.probabilities)
    np.testing.assert_array_equal(renamed.confidence, found.confidence)
    order = rng.permutation(len(ids))
    asked = [ids[row] for row in order]
    assert_same(neighbours.vote(asked, codes[order], labels, "nearest"), found.take(asked))


@st.composite
def carriers(draw: st.DrawFn) -> tuple[list[str], list[list[str]], Neighbours]:
    """Labels of any text, a bank whose rows carry several, one or none, and neighbours in it."""
    labels = sorted(draw(st.sets(TEXT, min_size=1, max_size=14)))
    most = draw(st.sampled_from([1, 3]))
    of_row = st.lists(st.sampled_from(labels), min_size=draw(st.integers(0, 1)), max_size=most)
    bank = draw(st.lists(of_row, min_size=1, max_size=6))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 8)))
    positions = draw(nps.arrays(np.int64, shape, elements=st.integers(0, len(bank) - 1)))
    return labels, bank, Neighbours(positions, np.sort(np.random.default_rng(0).random(shape, dtype=np.float32)))


@examples(60)
@given(carriers(), TIES, st.integers(1, 40))
def test_votes_for_sets_are_those_counted_one_by_one(
    carried: tuple[list[str], list[list[str]], Neighbours], ties: Ties, block: int
) -> None:
    labels, bank, near = carried
    ids, bank_ids = [str(row) for row in range(len(near.positions))], [f"bank{row}" for row in range(len(bank))]
    truth = pl.Series(bank, dtype=pl.List(pl.String))
    with patch.object(neighbours, "COUNTED_VOTERS", block):
        found = neighbours.infer(ids, near, truth, labels, ties, bank_ids)
    assert_counted(found, [[bank[place] for place in row] for row in near.positions], ties)
    expected = [[bank_ids[place] for place in row[:5]] for row in near.positions]
    assert found.nearest_by_id() == dict(zip(ids, expected, strict=True))
    assert found.distance is not None
    assert found.distance.tolist() == near.distances[:, 0].tolist()


# Search


@st.composite
def on_a_grid(draw: st.DrawFn) -> tuple[Float32Array, Float32Array, int, Metric]:
    """Queries and a bank with so few different values that nearly all distances tie, and none is rounded."""
    metric: Metric = draw(st.sampled_from(["l2", "cosine"]))
    n_queries, n_bank = draw(st.integers(1, 4)), draw(st.integers(1, 90))
    if metric == "l2":
        width, element = draw(st.integers(1, 3)), st.integers(-2, 2)
        values = draw(nps.arrays(np.float32, (n_queries + n_bank, width), elements=element))
    else:
        # Lengths are powers of two, or zero.
        sides = [*itertools.product([-1, 1], repeat=4), *(2 * np.eye(4)).tolist(), [0] * 4]
        drawn = draw(nps.arrays(np.int64, (2, n_queries + n_bank), elements=st.integers(0, len(sides) - 1)))
        values = np.array(sides, dtype=np.float32)[drawn[0]] * np.float32(2) ** (drawn[1] % 5 - 2)[:, None]
    return values[:n_queries], values[n_queries:].astype(np.float32), draw(st.integers(1, n_bank)), metric


@examples(80)
@given(on_a_grid())
def test_the_nearest_on_a_grid_are_those_of_brute_force_ties_by_position(
    case: tuple[Float32Array, Float32Array, int, Metric],
) -> None:
    queries, bank, k, metric = case
    found = neighbours.search(queries, bank, k, metric)
    for row, query in enumerate(queries.tolist()):
        if metric == "l2":
            distances = [sum((one - other) ** 2 for one, other in zip(query, known, strict=True)) for known in bank]
        else:
            distances = [
                1 - sum(map(operator.mul, query, known)) / (math.hypot(*query) * math.hypot(*known) or 1)
                for known in bank.tolist()
            ]
        order = sorted(range(len(bank)), key=lambda place: (distances[place], place))[:k]
        assert found.positions[row].tolist() == order
        assert found.distances[row].tolist() == [distances[place] for place in order]


@examples(40)
@given(SEED, st.sampled_from(["l2", "cosine"]), st.integers(1, 80), st.integers(1, 6), st.integers(0, 3))
def test_however_a_bank_is_cut_the_nearest_are_the_same_to_the_last_bit(
    seed: int, metric: Metric, n_bank: int, width: int, n_cuts: int
) -> None:
    rng = np.random.default_rng(seed)
    # Copies, and values far from the origin, where rounding in the candidates' distances is large.
    values = (rng.normal(size=(n_bank, width)) + rng.choice([0, 30])).astype(np.float32)
    bank, queries = values[rng.integers(n_bank, size=n_bank)], values[:3]
    k = int(rng.integers(1, n_bank + 1))
    whole = neighbours.search(queries, bank, k, metric)
    pieces = np.array_split(rng.permutation(n_bank), np.sort(rng.integers(0, n_bank + 1, n_cuts)))
    one, other, merged = (neighbours._Nearest(queries, k, metric) for _ in range(3))
    for number, places in enumerate(pieces):
        for nearest in (one, other) if number % 2 else (one, merged):
            if len(places):
                nearest.add(places, bank[places])
    merged.merge(other.distances, other.positions)
    for found in (one, merged):
        np.testing.assert_array_equal(found.positions, whole.positions)
        np.testing.assert_array_equal(found.distances, whole.distances)


# Evidence


@st.composite
def told(draw: st.DrawFn) -> Evidence:
    """Evidence with ties, rows without an answer, and what else a predictor may tell."""
    n_rows, n_labels = draw(st.integers(0, 6)), draw(st.integers(1, 13))
    probabilities = draw(
        nps.arrays(
            draw(st.sampled_from([np.float32, np.float64])),
            (n_rows, n_labels),
            elements=SHARE.filter(lambda share: share % 0.25 == 0),
        )
    )
    probabilities[draw(nps.arrays(np.bool_, n_rows))] = np.nan
    ids, labels = [f"row{row}" for row in range(n_rows)], [f"label{column}" for column in range(n_labels)]
    found = evidence.from_probabilities(ids, labels, probabilities)
    if draw(st.booleans()):
        found = replace(found, distance=np.arange(n_rows) / 3, entropy=np.arange(n_rows) / 7)
    if draw(st.booleans()):
        near = np.array([[f"{name} near", f"{name} far"] for name in ids], dtype=object).reshape(n_rows, 2)
        found = replace(found, nearest=near)
    return found


def of_row(found: Evidence, row: int) -> list[Any]:
    """All that evidence says of a row."""
    names = ("probabilities", "ranking", "confidence", "tied", "distance", "nearest", "entropy")
    values = (getattr(found, name) for name in names)
    return [None if value is None else value[row].tolist() for value in values]


@examples(80)
@given(told(), st.data())
def test_rows_of_evidence_go_with_their_ids(found: Evidence, data: st.DataObject) -> None:
    asked = data.draw(st.permutations(found.ids))[: data.draw(st.integers(0, len(found.ids)))]
    fewer = found.take(asked)
    assert fewer.ids == tuple(asked)
    assert fewer.labels == found.labels
    for row, name in enumerate(asked):
        np.testing.assert_equal(of_row(fewer, row), of_row(found, found.ids.index(name)))
    again = data.draw(st.permutations(asked))
    assert_same(fewer.take(again), found.take(again))
    assert fewer.nearest_by_id().items() <= found.nearest_by_id().items()
    with pytest.raises(DataError, match=re.escape("2 rows are missing, e.g. other.")):
        found.take([*asked, "other", "another"])
    if asked:
        with pytest.raises(DataError, match="a row id occurs twice"):
            found.take([*asked, asked[0]])


@examples(80)
@given(told(), st.lists(st.sampled_from([*(f"row{row}" for row in range(6)), "other", "another"]), unique=True))
def test_spread_evidence_says_of_a_row_the_same_or_nothing(found: Evidence, asked: list[str]) -> None:
    spread = found.spread_over(asked)
    assert spread.ids == tuple(asked)
    n_labels, kept = len(found.labels), min(10, len(found.labels))
    some = found.distance is not None, found.nearest is not None
    nothing = [
        *([math.nan] * n_labels, [-1] * kept, math.nan, False),
        *(math.nan if some[0] else None, ["", ""] if some[1] else None, math.nan if some[0] else None),
    ]
    for row, name in enumerate(asked):
        known = name in found.ids
        np.testing.assert_equal(of_row(spread, row), of_row(found, found.ids.index(name)) if known else nothing)
        assert spread.answered()[row] == (known and bool(found.answered()[found.ids.index(name)]))
    inside = [name for name in asked if name in found.ids]
    assert_same(spread.take(inside), found.take(inside))


@st.composite
def probabilities_and_ties(draw: st.DrawFn) -> tuple[FloatArray, IntArray | None]:
    shape = draw(st.tuples(st.integers(0, 5), st.integers(1, 14)))
    probabilities = draw(nps.arrays(np.float64, shape, elements=st.integers(0, 4).map(float)))
    probabilities[draw(nps.arrays(np.bool_, shape[0]))] = np.nan
    of_ties = st.sampled_from([None, shape[1:], shape])
    asked = draw(of_ties)
    return probabilities, None if asked is None else draw(nps.arrays(np.int64, asked, elements=st.integers(0, 3)))


@examples(80)
@given(probabilities_and_ties(), st.integers(1, 40), st.data())
def test_labels_are_ranked_as_a_sort_of_each_row_does(
    case: tuple[FloatArray, IntArray | None], block: int, data: st.DataObject
) -> None:
    probabilities, ties = case
    n_rows, n_labels = probabilities.shape
    with patch.object(evidence, "BLOCK_CELLS", block):
        found = evidence.from_probabilities(
            [str(row) for row in range(n_rows)], [str(column) for column in range(n_labels)], probabilities, ties
        )
    truth = data.draw(nps.arrays(np.int64, n_rows, elements=st.integers(-1, n_labels - 1)))
    top = data.draw(st.integers(1, 10))
    correct = found.correct(truth, top)
    for row, of_labels in enumerate(probabilities.tolist()):
        second = np.zeros(n_labels) if ties is None else np.broadcast_to(ties, probabilities.shape)[row]
        order = sorted(range(n_labels), key=lambda column: (-of_labels[column], second[column], column))
        order = [column for column in order if of_labels[column] > 0]
        assert [column for column in found.ranking[row].tolist() if column >= 0] == order[:10]
        assert found.tied[row] == (of_labels.count(max(of_labels)) > 1 and not math.isnan(of_labels[0]))
        assert correct[row] == (truth[row] in order[:top])
        assert found.confidence[row] == pytest.approx(-stats.entropy(of_labels) if order else math.nan, nan_ok=True)


# Metrics


@examples(60)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_the_gap_is_what_is_memorized_less_what_is_forgotten(rows: list[tuple[bool, bool]]) -> None:
    target, reference = (np.array(column) for column in zip(*rows, strict=True))
    names = {(1, 0): "memorized", (1, 1): "correlated", (0, 1): "forgotten", (0, 0): "unassociated"}
    found = [metrics.QUADRANTS[place] for place in metrics.quadrant(target, reference)]
    assert found == [names[row] for row in rows]
    gap = metrics.accuracy_gap(target, reference)
    assert gap == pytest.approx((found.count("memorized") - found.count("forgotten")) / len(rows), abs=1e-12)
    assert gap == -metrics.accuracy_gap(reference, target)


@examples(60)
@given(
    st.lists(st.tuples(SHARE, st.integers(0, 4), st.integers(0, 3), st.integers(-2, 2)), min_size=1, max_size=30),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=3),
    SEED,
)
def test_means_of_the_top_are_those_of_a_loop_and_of_rows_repeated_in_any_order(
    rows: list[tuple[float, int, int, int]], fractions: list[float], seed: int
) -> None:
    values, ranking, times, noise = (np.array(column) for column in zip(*rows, strict=True))
    # Rounding does not break ties.
    levels, ranking = ranking, ranking + 1e-10 * noise
    columns = np.stack([values, values**2], axis=1)
    repeated = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(rows)), times))
    weights = np.stack([times.astype(np.float64), np.zeros(len(rows))])
    found = metrics.top_means(columns, ranking, fractions, weights)
    assert np.isnan(found[1]).all()
    if not len(repeated):
        assert np.isnan(found).all()
        return
    each = metrics.top_means(columns[repeated], ranking[repeated], fractions, np.ones((1, len(repeated))))
    np.testing.assert_allclose(found[0], each[0], atol=1e-12)
    np.testing.assert_allclose(
        metrics.confident_means(values, ranking, fractions, weights)[0], each[0, :, 0], atol=1e-12
    )
    by_loop = [by_hand(values, levels, fraction, times) for fraction in fractions]
    np.testing.assert_allclose(found[0, :, 0], by_loop, atol=1e-12)
    everything = metrics.top_means(columns, ranking, [1.0], weights)[0, 0]
    np.testing.assert_allclose(everything, np.average(columns, axis=0, weights=times), atol=1e-12)


@examples(60)
@given(st.lists(st.tuples(st.booleans(), st.integers(-2, 2)), min_size=1, max_size=30), st.floats(0.01, 1))
def test_the_authors_orders_are_those_of_a_stable_sort(rows: list[tuple[bool, int]], fraction: float) -> None:
    correct, confidence = np.array([row[0] for row in rows]), np.array([float(row[1]) for row in rows])
    count = int(fraction * len(rows))
    for later_first, sign in ((False, 1), (True, -1)):
        order = sorted(range(len(rows)), key=lambda row: (-rows[row][1], sign * row))
        expected = Fraction(sum(rows[row][0] for row in order[:count]), count) if count else math.nan
        found = metrics.accuracy_in_order(correct, confidence, fraction, later_first=later_first)
        assert found == pytest.approx(float(expected), nan_ok=True)
        if not later_first:
            assert metrics.authors_top(confidence, fraction).tolist() == order[: max(1, count)]


@examples(60)
@given(*[st.lists(st.integers(-3, 3) | st.floats(allow_nan=False), max_size=12)] * 2)
def test_the_auroc_is_the_share_of_pairs_in_order(positive: list[float], negative: list[float]) -> None:
    found = metrics.auroc(np.array(positive, dtype=np.float64), np.array(negative, dtype=np.float64))
    pairs = [(one > other) + Fraction(one == other, 2) for one in positive for other in negative]
    assert found == pytest.approx(float(Fraction(sum(pairs)) / len(pairs)) if pairs else math.nan, nan_ok=True)


@examples(60)
@given(nps.arrays(np.int64, (3, 5), elements=st.integers(0, 6)))
def test_f_is_the_harmonic_mean_and_precision_is_recall_the_other_way_round(counts: IntArray) -> None:
    correct, predicted, true = counts[0], counts[0] + counts[1], counts[0] + counts[2]
    precision, recall, f = metrics.set_scores(correct, predicted, true)
    other_recall, other_precision = metrics.set_scores(correct, true, predicted)[:2][::-1]
    np.testing.assert_array_equal(precision, other_recall)
    np.testing.assert_array_equal(recall, other_precision)
    for row in range(5):
        if correct[row]:
            both = [Fraction(int(correct[row]), int(sizes[row])) for sizes in (predicted, true)]
            assert (precision[row], recall[row]) == pytest.approx([float(ratio) for ratio in both])
            assert f[row] == pytest.approx(float(2 / (1 / both[0] + 1 / both[1])))
        else:
            assert f[row] == pytest.approx(0 if true[row] else math.nan, nan_ok=True)
    with pytest.raises(ValueError, match="more members are correct"):
        metrics.set_scores(np.minimum(predicted, true) + (np.arange(5) == 3), predicted, true)


@examples(60)
@given(st.lists(st.tuples(SHARE | st.just(math.nan), SHARE | st.just(math.nan)), max_size=20))
def test_gap_and_area_are_what_counting_and_the_integral_give(rows: list[tuple[float, float]]) -> None:
    target, reference = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    both = [row for row in rows if not any(map(math.isnan, row))]
    signs = sum((one > other) - (one < other) for one, other in both)
    gap = metrics.dominance_gap(target, reference)
    assert gap == pytest.approx(signs / len(both) if both else math.nan, nan_ok=True)
    assert metrics.dominance_gap(reference, target) == pytest.approx(-gap, nan_ok=True)
    known = [[value for value in column if not math.isnan(value)] for column in (target.tolist(), reference.tolist())]
    # A survival curve is a step in each twentieth.
    areas = [
        sum(Fraction(sum(value >= step / 20 for value in values), 20 * len(values)) for step in range(1, 21))
        for values in known
        if values
    ]
    expected = float(areas[0] - areas[1]) if len(areas) == 2 else math.nan
    assert metrics.area_between_curves(target, reference) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def flat(sets: Sets) -> tuple[IntArray, IntArray]:
    offsets = np.cumsum([0, *map(len, sets)], dtype=np.int64)
    return offsets, np.array(list(itertools.chain(*sets)), dtype=np.int64)


OBJECTS = st.lists(st.integers(0, 5) | st.integers(0, 300), max_size=6)


@examples(60)
@given(
    st.lists(OBJECTS, min_size=1, max_size=5),
    st.lists(st.tuples(OBJECTS, st.lists(st.integers(0, 4), min_size=3, max_size=3)), max_size=5),
    st.sampled_from([1, 64, 100, 4096]),
    st.integers(1, 4),
)
def test_set_counts_are_pythons_whatever_the_blocks(
    bank: Sets, rows: list[tuple[list[int], list[int]]], object_block: int, row_block: int
) -> None:
    truth = [objects for objects, _ in rows]
    near = np.array([[place % len(bank) for place in places] for _, places in rows], dtype=np.int64).reshape(-1, 3)
    with patch.multiple(metrics, OBJECT_BLOCK=object_block, ROW_BLOCK=row_block):
        found = metrics.neighbour_set_counts(near, flat(bank), flat(truth))
    predicted = [set().union(*(bank[place] for place in places)) for places in near.tolist()]
    expected = [[len(said & set(true)), len(said), len(set(true))] for said, true in zip(predicted, truth, strict=True)]
    assert np.stack(found, axis=1).tolist() == expected


COUNTS = nps.arrays(np.int64, (2, 4), elements=st.integers(0, 9))


@examples(60)
@given(COUNTS, st.integers(-3, 3), st.integers(1, 9))
def test_the_entropy_is_scipys_and_adds_up_over_what_is_independent(counts: IntArray, power: int, block: int) -> None:
    with patch.object(metrics, "BLOCK_CELLS", block):
        found = metrics.entropy(counts)
        together = metrics.entropy(np.outer(counts[0], counts[1]).reshape(1, -1))
    for row, each in zip(counts, found, strict=True):
        assert each == pytest.approx(stats.entropy(row) if row.any() else math.nan, abs=1e-12, nan_ok=True)
    np.testing.assert_array_equal(metrics.entropy(counts * 2.0**power), found)
    assert together[0] == pytest.approx(found.sum(), abs=1e-12, nan_ok=True)


# Statistics


@st.composite
def successes(draw: st.DrawFn, most: int) -> tuple[int, int]:
    rows = draw(st.integers(1, most))
    return draw(st.integers(0, rows)), rows


@examples(60)
@given(successes(400), LEVEL, st.floats(0, 1))
def test_exact_intervals_are_scipys_and_those_of_parts_of_a_row_lie_between(
    case: tuple[int, int], level: float, part: float
) -> None:
    count, rows = case
    low, high = statistics.proportion(count / rows, rows, level)
    np.testing.assert_allclose((low, high), stats.binomtest(count, rows).proportion_ci(level, "exact"), atol=1e-9)
    np.testing.assert_allclose(statistics.proportion(1 - count / rows, rows, level), (1 - high, 1 - low), atol=1e-9)
    if count < rows:
        between = statistics.proportion((count + part) / rows, rows, level)
        after = statistics.proportion((count + 1) / rows, rows, level)
        assert low - 1e-9 <= between[0] <= after[0] + 1e-9
        assert high - 1e-9 <= between[1] <= after[1] + 1e-9


@examples(40)
@given(st.integers(1, 30), st.floats(0, 1), LEVEL)
def test_exact_intervals_hold_any_truth_as_often_as_they_say(rows: int, chance: float, level: float) -> None:
    held = 0.0
    for count in range(rows + 1):
        low, high = statistics.proportion(count / rows, rows, level)
        if low - 1e-9 <= chance <= high + 1e-9:
            held += math.comb(rows, count) * chance**count * (1 - chance) ** (rows - count)
    assert held >= level - 1e-9


@examples(60)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_adds_up_all_that_is_no_more_probable(only_first: int, only_second: int) -> None:
    rows = only_first + only_second
    ways = [math.comb(rows, count) for count in range(rows + 1)]
    expected = Fraction(sum(way for way in ways if way <= ways[only_first]), 2**rows)
    assert statistics.mcnemar(only_first, only_second) == pytest.approx(float(expected))


P_VALUES = st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.3, 1.0]) | st.floats(0, 1), max_size=9)


@examples(80)
@given(P_VALUES, st.lists(st.integers(0, 8), max_size=3))
def test_adjusted_p_values_are_what_their_definitions_say(p_values: list[float], untested: list[int]) -> None:
    count = len(p_values)
    # The step-down procedure goes past all that are smaller, and needs each of them.
    holm = [
        max(min(1, (count - sum(p < other for p in p_values)) * other) for other in p_values if other <= own)
        for own in p_values
    ]
    # The step-up procedure takes the largest that fits, and all below.
    rates = [
        min(count * other / sum(p <= other for p in p_values) for other in p_values if other >= own) for own in p_values
    ]
    np.testing.assert_allclose(statistics.false_discovery(np.array(p_values)), rates, rtol=1e-12)
    places = [min(place, count) for place in untested]
    with_nan = np.insert(np.array(p_values, dtype=np.float64), places, np.nan)
    found = statistics.holm(with_nan)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(with_nan))
    np.testing.assert_allclose(found[~np.isnan(found)], holm, rtol=1e-12)


@examples(80)
@given(
    st.lists(st.integers(-3, 3) | st.floats(allow_nan=False), max_size=9),
    st.lists(st.tuples(st.integers(-3, 3) | st.floats(allow_nan=False), st.floats(0, 3)), max_size=12),
)
def test_a_p_value_counts_the_null_rows_that_are_as_large(scores: list[float], null: list[tuple[float, float]]) -> None:
    values, weights = np.array(null, dtype=np.float64).reshape(-1, 2).T
    for asked, each in ((None, [1.0] * len(null)), (weights, weights.tolist())):
        above = [
            sum(weight for (value, _), weight in zip(null, each, strict=True) if value >= score) for score in scores
        ]
        expected = [min((1 + weight) / (1 + sum(each)), 1) for weight in above]
        found = statistics.conformal_p_values(np.array(scores, dtype=np.float64), values, asked)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@examples(40)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7), SEED)
def test_permutations_find_the_share_of_all_signs(differences: list[int], seed: int) -> None:
    sums = [
        abs(sum(map(operator.mul, signs, differences))) for signs in itertools.product([-1, 1], repeat=len(differences))
    ]
    exact = np.mean(np.array(sums) >= abs(sum(differences)))
    values = np.array(differences, dtype=np.float64)
    found = statistics.paired_permutation(values, 4000, np.random.default_rng(seed))
    # Hoeffding: farther once in 10^12.
    assert found == pytest.approx(exact, abs=0.06)
    turned = statistics.paired_permutation(-2 * values, 4000, np.random.default_rng(seed))
    assert turned == found


@st.composite
def weighted_rows(draw: st.DrawFn) -> Rows:
    """Rows that count alike or not, single or in groups."""
    count = draw(st.integers(1, 9))
    weights = draw(st.none() | nps.arrays(np.float64, count, elements=st.floats(0.25, 4)))
    labels = draw(st.none() | nps.arrays(np.int64, count, elements=st.integers(0, 3)))
    return Rows.of(np.ones(count) if weights is None else weights, labels)


@examples(40)
@given(weighted_rows(), SEED)
def test_a_resample_weighs_rows_as_if_they_stood_there_as_often_as_they_were_drawn(rows: Rows, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=rows.count)
    with patch.object(statistics, "PART", 4):
        found = rows.resampled(5, np.random.default_rng(seed))
        groups = np.arange(rows.count) if rows.groups is None else rows.groups
        drawn = statistics.resample(int(groups.max()) + 1, 5, np.random.default_rng(seed))
    np.testing.assert_array_equal(drawn.sum(axis=1), drawn.shape[1])
    for times, weights in zip(drawn, found, strict=True):
        standing = [
            row for group, count in enumerate(times) for row in np.flatnonzero(groups == group).tolist() * int(count)
        ]
        expected = np.average(values[standing], weights=None if rows.weights is None else rows.weights[standing])
        assert weights @ values / rows.count == pytest.approx(expected, abs=1e-12)


@examples(30)
@given(weighted_rows(), SEED, st.integers(1, 60), st.integers(9, 40))
def test_a_bootstrap_is_repeatable_linear_and_the_same_alone_or_together(
    rows: Rows, seed: int, resamples: int, block: int
) -> None:
    values = np.random.default_rng(seed).normal(size=(rows.count, 2))

    def mean_of(columns: FloatArray) -> Callable[[FloatArray], FloatArray]:
        return lambda weights: weights @ columns / rows.count

    def draws_of(columns: FloatArray) -> statistics.Draws:
        return statistics.bootstrap(mean_of(columns), rows, resamples, np.random.default_rng(seed), 3)

    with patch.object(statistics, "BLOCK_ELEMENTS", block):
        found, more = draws_of(values), draws_of(2 * values + 1)
        statistics_of = {"one": mean_of(values), "more": mean_of(2 * values + 1)}
        both = statistics.bootstrap_together(statistics_of, rows, resamples, np.random.default_rng(seed), 3)
        np.testing.assert_array_equal(draws_of(values).samples, found.samples)
    assert found.samples.shape == (resamples, 2)
    np.testing.assert_allclose(found.value, np.average(values, axis=0, weights=rows.weights), atol=1e-12)
    np.testing.assert_allclose(more.samples, 2 * found.samples + 1, atol=1e-12)
    for draws, name in ((found, "one"), (more, "more")):
        np.testing.assert_allclose(both[name].samples, draws.samples, atol=1e-12)
        np.testing.assert_allclose(both[name].value, draws.value, atol=1e-12)
    for estimate, value in zip(found.estimates(0.9), found.value, strict=True):
        assert (estimate.value, estimate.n_used, estimate.n_excluded) == (value, rows.count, 3)


@examples(60)
@given(
    nps.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=SHARE | st.just(math.nan)), LEVEL
)
def test_an_interval_leaves_out_as_much_on_either_side(samples: FloatArray, level: float) -> None:
    low, high = statistics.intervals(samples, level)
    for column in range(samples.shape[1]):
        known = sorted(value for value in samples[:, column].tolist() if not math.isnan(value))
        for found, tail in ((low[column], (1 - level) / 2), (high[column], (1 + level) / 2)):
            # The i-th of n stands at i / (n + 1), and what lies between two is drawn as a line (Weibull 1939).
            places = np.arange(1, len(known) + 1) / (len(known) + 1)
            expected = np.interp(tail, places, known) if known else math.nan
            assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


@st.composite
def estimates(draw: st.DrawFn) -> Estimate:
    low, value, high = sorted(draw(st.tuples(SHARE, SHARE, SHARE)))
    return Estimate(value, low, high, 10, 0)


@examples(60)
@given(estimates(), estimates(), st.floats(-1, 1))
def test_the_interval_of_a_difference_turns_round_with_it(
    first: Estimate, second: Estimate, correlation: float
) -> None:
    low, high = statistics.difference(first, second, correlation)
    assert low <= first.value - second.value <= high
    turned = statistics.difference(second, first, correlation)
    assert turned == pytest.approx((-high, -low), abs=1e-12)
    # What is known for certain only moves the other's interval.
    certain = replace(second, low=second.value, high=second.value)
    moved = statistics.difference(first, certain, correlation)
    assert moved == pytest.approx((first.low - second.value, first.high - second.value), abs=1e-12)
    # The sides add up like those of a triangle: opposite, at a right angle, and along each other.
    far, right, near = (statistics.difference(first, second, c)[1] - (first.value - second.value) for c in (-1, 0, 1))
    sides = first.high - first.value, second.value - second.low
    assert (far, right, near) == pytest.approx((sum(sides), math.hypot(*sides), abs(sides[0] - sides[1])), abs=1e-7)


# Tables


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


EVERY_KIND: dict[str, tuple[pl.DataType | type[pl.DataType], st.SearchStrategy[Any]]] = {
    "id": (pl.String, st.none() | TEXT),
    "count": (pl.Int32, st.none() | st.integers(-(2**31), 2**31 - 1)),
    "value": (pl.Float64, st.none() | st.floats()),
    "seen": (pl.Boolean, st.none() | st.booleans()),
    "texts": (pl.List(pl.String), st.none() | st.lists(st.none() | TEXT, max_size=3)),
    "scores": (pl.List(pl.Float32), st.none() | st.lists(st.none() | st.floats(width=32), max_size=3)),
    "boxes": (tables.BOXES, st.none() | st.lists(st.none() | st.lists(st.integers(0, 9), max_size=4), max_size=3)),
}
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def is_finite(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, dict):
        return is_finite(list(value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@examples(60)
@given(
    rows=st.lists(st.tuples(*(values for _, values in EVERY_KIND.values())), max_size=5),
    metadata=st.dictionaries(st.sampled_from(["of", "what", "é 1"]), JSON.filter(is_finite)),
)
def test_a_table_is_read_as_it_was_written(rows: list[tuple[Any, ...]], metadata: dict[str, Any], place: Path) -> None:
    frame = pl.DataFrame(rows, {name: dtype for name, (dtype, _) in EVERY_KIND.items()}, orient="row")
    path = place / "table.parquet"
    tables.write(frame, path, metadata)
    found = tables.read(path)
    assert found.schema == frame.schema
    np.testing.assert_equal(found.rows(), frame.rows())
    told_of = pl.read_parquet_metadata(path)
    assert {name: json.loads(told_of[name]) for name in metadata} == metadata
    assert told_of["schema_version"] == str(tables.SCHEMA_VERSION)
    assert [other.name for other in place.glob("*table.parquet*")] == ["table.parquet"]


@examples(80)
@given(
    rows=st.lists(st.tuples(st.none() | TEXT, st.integers(-(2**31) - 2, 2**31 + 1) | st.integers(0, 3)), max_size=6),
    columns=st.permutations(["id", "count", "more"]),
    left_out=st.sampled_from(["", "", "id", "count", "more"]),
)
def test_a_table_is_refused_for_each_fault_and_else_put_in_order(
    rows: list[tuple[str | None, int]], columns: list[str], left_out: str
) -> None:
    frame = pl.DataFrame(rows, {"id": pl.String, "count": pl.Int64}, orient="row").with_columns(more=pl.lit(1.5))
    frame = frame.select([name for name in columns if name != left_out])
    ids, counts = [row[0] for row in rows], [row[1] for row in rows]
    repeated = sum(number > 1 for name, number in Counter(ids).items() if name is not None)
    message = ""
    if left_out in ("id", "count"):
        message = f"toy: missing column {left_out};"
    elif any(not -(2**31) <= count < 2**31 for count in counts):
        message = "toy: a column has values of another type"
    elif None in ids:
        message = f"toy: {ids.count(None)} rows have no id"
    elif repeated:
        message = f"toy: {repeated} values of id occur more than once"
    schema: tables.Schema = {"id": pl.String, "count": pl.Int32}
    if message:
        with pytest.raises(DataError, match=re.escape(message)):
            tables.validate(frame, schema, "toy")
        return
    found = tables.validate(frame, schema, "toy")
    assert found.columns == ["id", "count", *([] if left_out == "more" else ["more"])]
    assert found["count"].dtype == pl.Int32
    assert found.select("id", "count").rows() == rows


@examples(80)
@given(value=JSON)
def test_json_is_read_as_it_was_written_or_refused_where_a_figure_is_no_number(value: Any, place: Path) -> None:
    path = place / "figures.json"
    tables.write_json("before", path)
    if is_finite(value):
        tables.write_json(value, path)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    else:
        with pytest.raises(ValueError, match="Out of range float"):
            tables.write_json(value, path)
        assert json.loads(path.read_text(encoding="utf-8")) == "before"


@examples(60)
@given(text=ANY_TEXT)
def test_a_text_is_written_whole_or_not_at_all(text: str, place: Path) -> None:
    path = place / "text.md"
    tables.write_text("before", path)
    if any("\ud800" <= character <= "\udfff" for character in text):
        with pytest.raises(UnicodeEncodeError):
            tables.write_text(text, path)
        text = "before"
    else:
        tables.write_text(text, path)
    assert path.read_bytes().decode() == text
    assert [other.name for other in place.glob("*text.md*")] == ["text.md"]
