"""The test of object sets: which of the objects in an image does each predictor name from the query alone?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from dejavu_exp import metrics, provenance, statistics, tables
from dejavu_exp.errors import ConfigError
from dejavu_exp.evidence import Evidence
from dejavu_exp.scoring import common
from dejavu_exp.statistics import Draws, Rows
from dejavu_exp.tables import PREDICTIONS, BoolArray, FloatArray, IntArray, Role, Status

WHO = ("target", "reference")
GAPS = ("ppg", "prg", "aucg", "precision_gap", "f_gap")
SELECTED = ("precision_gap", "recall_gap", "f_gap")
"""What is told of the top rows of a ranking."""
OPTIMISTIC = {"object_gap": True, "min_distance": False, "correct_objects": True, "split_half": False}
"""Rankings of the fine-grained figures; True where rows are selected by what is then reported."""
OPTIMISTIC_WARNING = (
    "object_gap and correct_objects rank rows by what is then reported: their gaps are positive by selection, even "
    "between two equally noisy predictors. split_half ranks by one half of each row's objects and measures on the "
    "other, so only luck that both halves share, such as one neighbour that carries several objects, is left in it; "
    "the same figure on unseen rows shows how much."
)
BLOCK_CELLS = 4_000_000
"""Rows times labels that are looked at at a time."""
FACTORS = tuple(np.uint64(factor) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of the splitmix64 finaliser."""

RoleDraws: TypeAlias = dict[str, Draws]


@dataclass(frozen=True)
class _Truth:
    """The true objects of N rows side by side: those of row n are at `starts[n]` and on, at least one each.

    Attributes:
        rows: shape (P,), the row of each.
        names: O names, sorted.
        codes: shape (P,), the place of each in `names`; ascending within a row.
        starts: shape (N,).
        counts: shape (N,), objects of each row.
    """

    rows: IntArray
    names: pl.Series
    codes: IntArray
    starts: IntArray
    counts: IntArray


@dataclass(frozen=True)
class _Answer:
    """What one predictor says of the true objects.

    Attributes:
        share: shape (P,), the evidence for each true object; 0 for one that the predictor does not know.
        found: by prediction, shape (P,), True where the object is predicted.
        n_predicted: by prediction, shape (N,).
    """

    share: FloatArray
    found: Mapping[str, BoolArray]
    n_predicted: Mapping[str, IntArray]


@dataclass(frozen=True)
class _Held:
    """The true objects of scored rows as numbers, and who finds them.

    Attributes:
        names: O names, sorted.
        rows: shape (P,), the row of each true object.
        codes: shape (P,), its place in `names`; ascending within a row.
        counts: shape (N,), objects of each row.
        found: by predictor, shape (P,), True where it predicts the object.
    """

    names: pl.Series
    rows: IntArray
    codes: IntArray
    counts: IntArray
    found: Mapping[str, BoolArray]

    @classmethod
    def of(cls, used: pl.DataFrame) -> _Held:
        """From columns of `tables.OBJECT_SCORES`, rows with at least one object each."""
        truth = _flat(used["objects"])
        kind, width, found = pl.Enum(truth.names), len(truth.names), {}
        # Row and object as one number, ascending as both are sorted.
        keys = truth.rows * width + truth.codes
        for who in WHO:
            lists = used[f"{who}_found"]
            rows = np.repeat(np.arange(len(used)), lists.list.len().to_numpy())
            codes = lists.rename("object").explode().drop_nulls().cast(kind).to_physical().to_numpy()
            found[who] = np.zeros(len(keys), dtype=np.bool_)
            found[who][np.searchsorted(keys, rows * width + codes)] = True
        return cls(truth.names, truth.rows, truth.codes, truth.counts, found)


@dataclass(frozen=True)
class _Selection:
    """Rows that a ranking selects from, and what is averaged over the selected.

    Attributes:
        ranking: shape (M,), larger comes first.
        values: shape (M, 4), see `_measured`.
        rows: shape (N,), True for these among the role's usable rows.
    """

    ranking: FloatArray
    values: FloatArray
    rows: BoolArray


@dataclass(frozen=True)
class ObjectInference:
    """Does the encoder name more of the objects in an image than a reference does?

    Objects of the truth that no public row carries cannot be found; they count in the recall all the same.

    Attributes:
        predictions: which objects count as predicted: "all" with any evidence, or the "top10" or "top1" with the most.
            The first is the headline, which decides quadrants, rankings and per-object figures.
        top_fractions: of the rows first in each ranking of the fine-grained figures, each in (0, 1].
        memorization_score: per row, the target's share of evidence less the reference's, the largest over the true
            objects ("object") or their mean ("probability"), or the difference of recalls ("recall"); in [-1, 1].
        compat: "corrected": precision is undefined where nothing is predicted, rows tied at a cut share the places, F
            is of rows; "authors": precision is 0 there, earlier rows come first, F of the top rows is of mean precision
            and mean recall with 1e-5 in the divisor, and their histogram areas are given.
        level: of the intervals.
        resamples: of the bootstrap.
        adjust: as in `LabelInference`; likewise the other.
        false_discovery: expected share of false ones among the target rows that are listed as memorized.
    """

    predictions: tuple[str, ...] = PREDICTIONS
    top_fractions: tuple[float, ...] = (0.001, 0.01, 0.1)
    memorization_score: Literal["object", "probability", "recall"] = "object"
    compat: Literal["corrected", "authors"] = "corrected"
    level: float = 0.95
    resamples: int = 1000
    adjust: Literal["none", "weight", "match"] = "none"
    false_discovery: float = 0.1
    infers: ClassVar[str] = "objects"
    needs_tags: ClassVar[bool] = True
    fractions: ClassVar[tuple[float, ...]] = (1.0,)
    """Most confident fractions at which references are compared: all rows, for no figure here ranks by confidence."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "predictions", tuple(self.predictions))
        object.__setattr__(self, "top_fractions", tuple(self.top_fractions))
        known = set(self.predictions) <= set(PREDICTIONS) and len(set(self.predictions)) == len(self.predictions)
        if not self.predictions or not known:
            raise ConfigError(
                f"scoring.predictions={list(self.predictions)}: must be one or more of {', '.join(PREDICTIONS)}, each "
                "once; the first is the headline."
            )
        if not self.top_fractions or not all(0 < fraction <= 1 for fraction in self.top_fractions):
            raise ConfigError(f"scoring.top_fractions={list(self.top_fractions)}: each must lie in (0, 1].")
        if self.memorization_score not in ("object", "probability", "recall"):
            raise ConfigError(
                f"scoring.memorization_score={self.memorization_score}: must be object, probability or recall."
            )
        if self.compat not in ("corrected", "authors"):
            raise ConfigError(f"scoring.compat={self.compat}: must be corrected or authors.")
        common.check_settings(self.level, self.resamples, self.false_discovery, self.adjust)

    @property
    def headline(self) -> str:
        """The prediction that the verdict rests on."""
        return self.predictions[0]

    def check_bank(self, lost: Sequence[str]) -> list[str]:
        """A note for the reader where measured rows hold objects that no public row carries."""
        if not lost:
            return []
        shown = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        return [
            f"Objects of measured rows that no public row carries ({len(lost)}: {shown}) cannot be found by any "
            "neighbour; they count in the recall."
        ]

    def reference_value(self) -> pl.Expr:
        """What a reference's share of the gap is the mean of: 1 where it finds more than the target, -1 where fewer."""
        return (pl.col("quadrant") == "forgotten").cast(pl.Int8) - (pl.col("quadrant") == "memorized").cast(pl.Int8)

    def score(self, rows: pl.DataFrame, target: Evidence, reference: Evidence, name: str) -> pl.DataFrame:
        """Score every row; a row that cannot be measured keeps or gets a status and has no figures.

        Args:
            rows: columns id, role, label, status, truth (repeated objects count once), and weight where rows do not
                count alike: all rows of the roles measured.
            target: evidence of the encoder under test, for rows of status ok.
            reference: evidence of the reference, for the same rows; a row where one of the two has none becomes
                "no_evidence", and a row without true objects "no_objects".
            name: of the reference.

        Returns:
            Columns of `tables.OBJECT_SCORES`, one row for each of `rows`, in their order.
        """
        objects = pl.col("truth").list.drop_nulls().list.unique().list.sort()
        ok = rows.filter(pl.col("status") == Status.OK).select("id", objects=objects)
        both = [evidence.take(ok["id"].to_list()) for evidence in (target, reference)]
        answered = np.all([np.isfinite(evidence.probabilities).all(axis=1) for evidence in both], axis=0)
        why = (
            pl.when(pl.col("objects").is_null())
            .then(pl.lit(str(Status.NO_ANNOTATION)))
            .when(pl.col("objects").list.len() == 0)
            .then(pl.lit(str(Status.NO_OBJECTS)))
            .when(~pl.Series("answered", answered, dtype=pl.Boolean))
            .then(pl.lit(str(Status.NO_EVIDENCE)))
        )
        ok = ok.with_columns(why=why)
        used = ok.filter(pl.col("why").is_null()).select("id", "objects")
        if len(used) < len(ok):
            both = [evidence.take(used["id"].to_list()) for evidence in both]
        found = used.select("objects").hstack(self._columns(used, *both))
        was_ok = (rows["status"] == Status.OK).fill_null(False).to_numpy()
        excluded = _spread(ok.select("why"), was_ok)
        is_used = was_ok & excluded["why"].is_null().to_numpy()
        joined = (
            rows.select("id", "role", "label", "status", reference=pl.lit(name))
            .hstack(excluded)
            .with_columns(status=pl.coalesce("why", "status"))
            .hstack(_spread(found, is_used))
        )
        weight = rows["weight"] if "weight" in rows.columns else pl.Series([1.0]).new_from_index(0, len(rows))
        joined = joined.with_columns(weight=pl.when(pl.Series(is_used)).then(weight))
        return common.with_p_values(joined).select(
            pl.col(column).cast(dtype) for column, dtype in tables.OBJECT_SCORES.items()
        )

    def _columns(self, used: pl.DataFrame, target: Evidence, reference: Evidence) -> pl.DataFrame:
        truth = _flat(used["objects"])
        answers = {"target": _answer(truth, target), "reference": _answer(truth, reference)}
        columns: dict[str, Any] = {}
        for who, evidence in (("target", target), ("reference", reference)):
            for prediction in PREDICTIONS:
                scores = self._set_scores(truth, answers[who], prediction)
                measures = zip(("precision", "recall", "f"), scores, strict=True)
                columns |= {f"{who}_{measure}_{prediction}": value for measure, value in measures}
            distance = np.full(len(used), np.nan) if evidence.distance is None else evidence.distance
            columns |= {
                f"{who}_distance": distance,
                f"{who}_confidence": evidence.confidence,
                f"{who}_correct": columns[f"{who}_recall_{self.headline}"] == 1,
                f"{who}_tied": evidence.tied,
            }
        recalls = [columns[f"{who}_recall_{self.headline}"] for who in WHO]
        columns["memorization_score"] = self._memorization(truth, answers, recalls[0] - recalls[1])
        frame = pl.DataFrame({name: pl.Series(value, nan_to_null=True) for name, value in columns.items()})
        quadrant = pl.Series(
            "quadrant", np.array(metrics.QUADRANTS, dtype=object)[_quadrant(*recalls)], dtype=pl.String
        )
        return frame.hstack([quadrant, *self._found(truth, answers)])

    def _set_scores(self, truth: _Truth, answer: _Answer, prediction: str) -> tuple[FloatArray, FloatArray, FloatArray]:
        correct = np.bincount(truth.rows, answer.found[prediction], minlength=len(truth.counts))
        return metrics.set_scores(correct, answer.n_predicted[prediction], truth.counts, self._unpredicted)

    @property
    def _unpredicted(self) -> float:
        """Precision where nothing is predicted."""
        return 0.0 if self.compat == "authors" else np.nan

    def _memorization(self, truth: _Truth, answers: Mapping[str, _Answer], recall_gap: FloatArray) -> FloatArray:
        gained = answers["target"].share - answers["reference"].share
        if self.memorization_score == "recall" or not len(gained):
            return recall_gap
        if self.memorization_score == "object":
            return np.asarray(np.maximum.reduceat(gained, truth.starts), dtype=np.float64)
        return np.asarray(np.add.reduceat(gained, truth.starts) / truth.counts, dtype=np.float64)

    def _found(self, truth: _Truth, answers: Mapping[str, _Answer]) -> list[pl.Series]:
        """Lists of the true objects that each predicts."""
        result = []
        for who in WHO:
            found = answers[who].found[self.headline]
            ends = np.cumsum(np.bincount(truth.rows, found, minlength=len(truth.counts)).astype(np.int64))
            names = truth.names.gather(truth.codes[found]).to_arrow()
            lists = pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), names)
            result.append(pl.Series(f"{who}_found", lists, dtype=pl.List(pl.String)))
        return result

    def figures(self, scores: pl.DataFrame, images: pl.DataFrame, seed: int) -> dict[str, Any]:
        """All figures of one reference.

        Args:
            scores: columns of `tables.OBJECT_SCORES`, one reference.
            images: the manifest's rows; `planted_repeats` tells the planted truth, where there is one.
            seed: of the bootstrap and of the halves of objects.

        Returns:
            JSON-ready: per role and prediction precision, recall, F and their gaps, quadrants and fine-grained figures;
            the gaps corrected by unseen rows; how many rows are listed; the smallest PRG that would show; with heldout
            rows, whose target is the reference's encoder, the gaps averaged over both directions; per object; planted
            truth.
        """
        used, held, draws = {}, {}, {}
        for role in (Role.TARGET, Role.UNSEEN, Role.HELDOUT):
            of_role = scores.filter(pl.col("role") == role)
            if len(of_role):
                used[role] = of_role.filter(pl.col("status") == Status.OK).sort("id")
                held[role] = _Held.of(used[role])
                draws[role] = self._draws(used[role], held[role], len(of_role), seed, role)
        result: dict[str, Any] = {"roles": {str(role): self._role_figures(draws[role], used[role]) for role in draws}}
        corrected: RoleDraws = {}
        if Role.UNSEEN in draws and len(used[Role.UNSEEN]):
            corrected = {name: draws[Role.TARGET][name] - draws[Role.UNSEEN][name] for name in self._gap_names()}
            result["corrected"] = {name: self._gaps(corrected, name) for name in self.predictions}
        headline = f"{self.headline}/prg"
        result["power"] = common.power(draws[Role.TARGET][headline], corrected.get(headline), self.level)
        result["detected"] = common.detected(scores, self.false_discovery)
        if Role.HELDOUT in draws and len(used[Role.HELDOUT]):
            first, second = draws[Role.TARGET], draws[Role.HELDOUT]
            both = {name: common.mean_of(first[name], second[name]) for name in self._gap_names()}
            result["both_directions"] = {name: self._gaps(both, name) for name in self.predictions}
        result["per_object"] = self._per_object(held[Role.TARGET], seed) if Role.TARGET in held else []
        result["per_class"] = []
        if "planted_repeats" in images.columns:
            planted = images.select("id", *[c for c in ("background", "planted_repeats") if c in images.columns])
            joined = scores.filter(pl.col("role") == Role.TARGET).join(planted, on="id", how="left", validate="1:1")
            means = {f"{who}_recall": pl.col(f"{who}_recall_{self.headline}") for who in WHO}
            result["planted"] = common.planted(joined, means, self.level, self.resamples, seed)
        return result

    def _draws(self, used: pl.DataFrame, held: _Held, n_rows: int, seed: int, role: str) -> RoleDraws:
        """Bootstrap of one role, each figure by its name. All see the same resamples, whatever the reference."""
        columns = self._mean_columns(used)
        means = np.stack(list(columns.values()), axis=1)
        selections = self._selections(used, held, seed)
        parts: list[Callable[[FloatArray], FloatArray]] = [
            _Means.of(means),
            *(self._selected(chosen) for _, chosen in selections),
        ]

        def together(weights: FloatArray) -> FloatArray:
            return np.hstack([part(weights) for part in parts])

        rng = provenance.rng(seed, f"bootstrap/{role}")
        rows = Rows.of(used["weight"].to_numpy())
        draws = statistics.bootstrap(together, rows, self.resamples, rng, n_rows - len(used))
        names = [*columns, *(name for ranking, _ in selections for name in self._selected_names(ranking))]
        n_used = [*np.isfinite(means).sum(axis=0)]
        for _, chosen in selections:
            n_used += [len(chosen.ranking)] * (len(self.top_fractions) * len(SELECTED))
        single = (
            Draws(draws.value[place : place + 1], draws.samples[:, place : place + 1], int(n), n_rows - int(n))
            for place, n in enumerate(n_used)
        )
        found: RoleDraws = {}
        for name, one in zip(names, single, strict=True):
            # The two directions of the split half come under one name.
            found[name] = common.mean_of_same(found[name], one) if name in found else one
        return found

    def _mean_columns(self, used: pl.DataFrame) -> dict[str, FloatArray]:
        """What the plain figures are means of, shape (N,) each; NaN where a row has no value."""
        columns: dict[str, FloatArray] = {}
        for prediction in self.predictions:
            part = {
                f"{who}_{measure}": _numbers(used, f"{who}_{measure}_{prediction}")
                for who in WHO
                for measure in ("precision", "recall", "f")
            }
            gap = {m: part[f"target_{m}"] - part[f"reference_{m}"] for m in ("precision", "recall", "f")}
            part |= {"ppg": np.sign(gap["precision"]), "prg": np.sign(gap["recall"]), "aucg": gap["recall"]}
            part |= {"precision_gap": gap["precision"], "f_gap": gap["f"]}
            columns |= {f"{prediction}/{name}": value for name, value in part.items()}
        for name in metrics.QUADRANTS:
            columns[f"quadrants/{name}"] = (used["quadrant"] == name).cast(pl.Float64).to_numpy()
        return columns | {"memorization_score": _numbers(used, "memorization_score")}

    def _selections(self, used: pl.DataFrame, held: _Held, seed: int) -> list[tuple[str, _Selection]]:
        """The rankings; one whose quantity no row has is left out."""
        correct = {who: np.bincount(held.rows, held.found[who], minlength=len(used)) for who in WHO}
        measured = [
            tuple(_numbers(used, f"{who}_{measure}_{self.headline}") for measure in ("precision", "recall", "f"))
            for who in WHO
        ]
        values = self._measured(*measured)
        rankings = {
            "object_gap": correct["target"] - correct["reference"],
            "min_distance": -_numbers(used, "target_distance"),
            "correct_objects": correct["target"],
        }
        found = []
        for name, ranking in rankings.items():
            rows = np.isfinite(ranking)
            if rows.any() or not len(used):
                found.append((name, _Selection(self._ordered(ranking[rows]), values[rows], rows)))
        return [*found, *(("split_half", half) for half in self._halves(used, held, seed))]

    def _ordered(self, ranking: FloatArray) -> FloatArray:
        """Under `compat: authors` ranks instead of values: without ties, the order of rows decides."""
        if self.compat == "corrected":
            return ranking
        places = np.empty(len(ranking))
        places[np.argsort(-ranking, kind="stable")] = np.arange(len(ranking))
        return -places

    def _measured(self, target: Sequence[FloatArray], reference: Sequence[FloatArray]) -> FloatArray:
        """Precision, recall and F of both as the columns that are averaged over selected rows, shape (N, 4).

        Corrected: the precision gap where both have one, whether both have one, the recall gap, the F gap. Authors:
        precision and recall of the target, then of the reference.
        """
        if self.compat == "authors":
            return np.stack([target[0], target[1], reference[0], reference[1]], axis=1)
        gaps = [one - other for one, other in zip(target, reference, strict=True)]
        defined = np.isfinite(gaps[0])
        return np.stack([np.where(defined, gaps[0], 0), defined.astype(np.float64), *gaps[1:]], axis=1)

    def _selected(self, chosen: _Selection) -> Callable[[FloatArray], FloatArray]:
        """`SELECTED` at each fraction as a function of weights, shape (B, fractions * 3)."""
        slack = 0.0 if self.compat == "authors" else metrics.CONFIDENCE_TOLERANCE
        means = metrics.TopMeans.of(chosen.values, chosen.ranking, self.top_fractions, slack, chosen.rows)

        def selected(weights: FloatArray) -> FloatArray:
            one, two, three, four = np.moveaxis(means(weights), 2, 0)
            if self.compat == "authors":
                gaps = [one - three, two - four, metrics.authors_f(one, two) - metrics.authors_f(three, four)]
            else:
                gaps = [one / np.where(two > 0, two, np.nan), three, four]
            return np.stack(gaps, axis=2).reshape(len(weights), -1)

        return selected

    def _selected_names(self, ranking: str) -> Iterator[str]:
        for fraction in self.top_fractions:
            for measure in SELECTED:
                yield f"{ranking}/{metrics.percent_key(fraction)}/{measure}"

    def _halves(self, used: pl.DataFrame, held: _Held, seed: int) -> list[_Selection]:
        """Rank by the gap in one half of each row's objects, measure on the other half, and the other way round.

        The objects of a row are dealt by a hash of seed, id and object. Those of the ranking half are taken out of both
        the true and the predicted set. A row with a single object has no halves and is left out.
        """
        rows = held.counts >= 2
        part = used.filter(pl.Series(rows, dtype=pl.Boolean))
        total, correct = _dealt(held, used["id"], seed)
        total, correct = total[rows], {who: found[rows] for who, found in correct.items()}
        found = []
        for ranked, measured in ((0, 1), (1, 0)):
            scores = []
            for who in WHO:
                precision = _numbers(part, f"{who}_precision_{self.headline}")
                n_correct = correct[who].sum(axis=1)
                # Without a correct object any number of predictions gives the same figures: 1 stands for them.
                some = np.rint(n_correct / np.where(precision > 0, precision, 1)) + (precision == 0)
                rest = np.where(np.isnan(precision), 0, some) - correct[who][:, ranked]
                scores.append(
                    metrics.set_scores(correct[who][:, measured], rest, total[:, measured], self._unpredicted)
                )
            gap = np.asarray(correct["target"][:, ranked] - correct["reference"][:, ranked], dtype=np.float64)
            found.append(_Selection(self._ordered(gap), self._measured(*scores), rows))
        return found

    def _gaps(self, draws: Mapping[str, Draws], prediction: str) -> dict[str, Any]:
        gaps = {name: self._told(draws[f"{prediction}/{name}"]) for name in GAPS}
        return gaps | {"gap": gaps["prg"]}

    def _told(self, draws: Draws) -> dict[str, Any]:
        return draws.estimates(self.level)[0].as_dict()

    def _gap_names(self) -> list[str]:
        return [f"{prediction}/{name}" for prediction in self.predictions for name in GAPS]

    def _role_figures(self, draws: RoleDraws, used: pl.DataFrame) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for prediction in self.predictions:
            means = (f"{who}_{measure}" for who in WHO for measure in ("precision", "recall", "f"))
            result[prediction] = {name: self._told(draws[f"{prediction}/{name}"]) for name in means}
            result[prediction] |= self._gaps(draws, prediction)
            if self.compat == "authors":
                result[prediction]["authors"] = _authors(used, prediction)
        result["quadrants"] = {name: self._told(draws[f"quadrants/{name}"]) for name in metrics.QUADRANTS}
        result["memorization_score"] = self._told(draws["memorization_score"])
        result["fine_grained"] = {
            ranking: {
                percent: self._top_figures(draws, ranking, fraction, optimistic)
                for percent, fraction in zip(
                    map(metrics.percent_key, self.top_fractions), self.top_fractions, strict=True
                )
            }
            for ranking, optimistic in OPTIMISTIC.items()
            if f"{ranking}/{metrics.percent_key(self.top_fractions[0])}/recall_gap" in draws
        }
        return result

    def _top_figures(self, draws: RoleDraws, ranking: str, fraction: float, optimistic: bool) -> dict[str, Any]:
        found = {name: draws[f"{ranking}/{metrics.percent_key(fraction)}/{name}"] for name in SELECTED}
        n_rows = found["recall_gap"].n_used
        slack = 0.0 if self.compat == "authors" else metrics.CONFIDENCE_TOLERANCE
        n_top = max(1, int(fraction * n_rows + slack)) if n_rows else 0
        return {"n": n_top, **{name: self._told(one) for name, one in found.items()}, "optimistic": optimistic}

    def _per_object(self, held: _Held, seed: int) -> list[dict[str, Any]]:
        """Recall of each object among the target rows that hold it, by both, and the gap; most gained first.

        The weights of a resample of the rows that hold an object count only by who found it: their sums are one
        multinomial number.
        """
        table = _by_object(held)
        counts = table.select(common.CELLS).to_numpy()
        rng = provenance.rng(seed, "bootstrap/object")
        estimates = common.by_cells(counts, np.zeros(len(table), dtype=np.int64), self.level, self.resamples, rng)
        found = [
            {"object": name, "rows": rows, **estimate}
            for name, rows, estimate in zip(table["object"], table["rows"], estimates, strict=True)
        ]
        return sorted(found, key=lambda one: (-one["gap"]["value"], one["object"]))

    def headline_gaps(self, figures: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
        """What the verdict rests on: the PRG of each role, and the corrected one, None where undefined."""
        gaps = {role: found[self.headline]["gap"] for role, found in figures["roles"].items()}
        return gaps, figures.get("corrected", {}).get(self.headline, {}).get("gap")

    def verdict(self, figures: Mapping[str, Any], reference: str, *, random: bool) -> str:
        """One sentence: what the figures show, and what they do not."""
        gaps, corrected = self.headline_gaps(figures)
        more = (
            f"the share of rows where the encoder finds more of the objects than {reference}, less the share where it"
        )
        said = common.Wording(f"{more} finds fewer (PRG), is", " and")
        return common.verdict(gaps, corrected, said, self.level, random=random)


def _spread(frame: pl.DataFrame, chosen: BoolArray) -> pl.DataFrame:
    """The rows of the frame, in order, where `chosen` is True, and null elsewhere."""
    if chosen.all():
        return frame
    place = pl.Series(np.cumsum(chosen) - 1)
    return frame.select(pl.all().gather(place.set(pl.Series(~chosen), None)))


def _flat(objects: pl.Series) -> _Truth:
    """Lists of at least one object each, side by side."""
    counts = objects.list.len().cast(pl.Int64).to_numpy()
    flat = objects.rename("object").explode() if len(objects) else pl.Series("object", [], dtype=pl.String)
    names = flat.unique().sort()
    codes = flat.cast(pl.Enum(names)).to_physical().cast(pl.Int64).to_numpy()
    return _Truth(np.repeat(np.arange(len(counts)), counts), names, codes, np.cumsum(counts) - counts, counts)


def _answer(truth: _Truth, evidence: Evidence) -> _Answer:
    """What the evidence says of the true objects."""
    place = {label: column for column, label in enumerate(evidence.labels)}
    code = np.array([place.get(name, -1) for name in truth.names], dtype=np.int64)[truth.codes]
    known = code >= 0
    share = np.zeros(len(code))
    share[known] = evidence.probabilities[truth.rows[known], code[known]]
    first = np.hstack([evidence.ranking[:, :1], np.full((len(evidence.ids), 1), -1)])[:, 0]
    top1 = known & (first[truth.rows] == code)
    found = {"all": share > 0, "top10": _is_ranked(evidence, truth, code), "top1": top1}
    ranked = evidence.ranking >= 0
    n_predicted = {"all": (evidence.probabilities > 0).sum(axis=1)}
    n_predicted |= {"top10": ranked.sum(axis=1), "top1": ranked[:, :1].sum(axis=1)}
    return _Answer(share, found, n_predicted)


def _is_ranked(evidence: Evidence, truth: _Truth, code: IntArray) -> BoolArray:
    """True where a true object is in the ranking of its row, shape (P,); `code` is its column, -1 for none."""
    found = np.empty(len(code), dtype=np.bool_)
    # One more column for what is missing; which is never said to be ranked.
    width, ends = len(evidence.labels) + 1, np.append(truth.starts, len(code))
    block = max(1, BLOCK_CELLS // width)
    for start in range(0, len(truth.counts), block):
        rows = evidence.ranking[start : start + block]
        ranked = np.zeros((len(rows), width), dtype=np.bool_)
        ranked[np.arange(len(rows))[:, None], rows] = True
        ranked[:, -1] = False
        part = slice(ends[start], ends[start + len(rows)])
        found[part] = ranked[truth.rows[part] - start, code[part]]
    return found


def _quadrant(target: FloatArray, reference: FloatArray) -> IntArray:
    """Position in `metrics.QUADRANTS` by which recall is larger: correlated where both are equal and not 0."""
    same = metrics.quadrant(target > 0, reference > 0)
    return np.where(target > reference, 0, np.where(target < reference, 2, same)).astype(np.int64)


def _numbers(frame: pl.DataFrame, column: str) -> FloatArray:
    """A column as an array with NaN for null."""
    return frame[column].cast(pl.Float64).fill_null(np.nan).to_numpy()


@dataclass(frozen=True)
class _Means:
    """Weighted means of columns over the rows where each is defined; NaN where none is.

    Attributes:
        columns: shape (N, K + P): the columns, 0 where they are not defined, and for those P that are so in some row
            whether they are defined.
        partly: shape (K,), True for these.
    """

    columns: FloatArray
    partly: BoolArray

    @classmethod
    def of(cls, values: FloatArray) -> _Means:
        """From columns of shape (N, K) with NaN where they are not defined."""
        defined = np.isfinite(values)
        partly = np.asarray(~defined.all(axis=0))
        return cls(np.hstack([np.where(defined, values, 0), defined[:, partly].astype(np.float64)]), partly)

    def __call__(self, weights: FloatArray) -> FloatArray:
        """The means under weights of shape (B, N), shape (B, K)."""
        sums = weights @ self.columns
        width = len(self.partly)
        total = np.repeat(weights.sum(axis=1, keepdims=True), width, axis=1)
        total[:, self.partly] = sums[:, width:]
        return np.asarray(sums[:, :width] / np.where(total > 0, total, np.nan))


def _dealt(held: _Held, ids: pl.Series, seed: int) -> tuple[IntArray, dict[str, IntArray]]:
    """Objects of each row in either half, shape (N, 2), and by predictor those found."""
    by_row, by_object = (provenance.hash_orders(seed, "halves", names.to_list()) for names in (ids, held.names))
    order = _mixed(by_row[held.rows] ^ by_object[held.codes])
    half = np.empty(len(order), dtype=np.int64)
    starts = np.cumsum(held.counts) - held.counts
    # Rows with as many objects are a matrix, whose rows sort much faster than one long array would.
    for count in np.unique(held.counts):
        places = starts[held.counts == count][:, None] + np.arange(count)
        sorted_places = np.take_along_axis(places, order[places].argsort(axis=1, kind="stable"), axis=1)
        half[sorted_places] = np.arange(count) % 2
    cell, width = 2 * held.rows + half, 2 * len(held.counts)
    found = {who: np.bincount(cell[held.found[who]], minlength=width).reshape(-1, 2) for who in WHO}
    return np.bincount(cell, minlength=width).reshape(-1, 2), found


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser: nearby numbers become unrelated ones."""
    values = (values ^ (values >> np.uint64(30))) * FACTORS[0]
    values = (values ^ (values >> np.uint64(27))) * FACTORS[1]
    return np.asarray(values ^ (values >> np.uint64(31)))


def _by_object(held: _Held) -> pl.DataFrame:
    """Rows that hold each object, and how many of them each finds it in: both, only one, neither."""
    target, reference = held.found["target"], held.found["reference"]
    cells = {
        "both": target & reference,
        "target": target & ~reference,
        "reference": reference & ~target,
        "neither": ~(target | reference),
    }
    counts = {name: np.bincount(held.codes[chosen], minlength=len(held.names)) for name, chosen in cells.items()}
    return pl.DataFrame({"object": held.names, **counts}).with_columns(rows=pl.sum_horizontal(*cells))


def _authors(used: pl.DataFrame, prediction: str) -> dict[str, float | None]:
    """The released code's population figures; null without rows."""
    recalls = [_numbers(used, f"{who}_recall_{prediction}") for who in WHO]
    precisions = [_numbers(used, f"{who}_precision_{prediction}") for who in WHO]
    areas = [metrics.authors_area(recall) for recall in recalls]
    found = {
        "tgt_auc": areas[0],
        "ref_auc": areas[1],
        "auc_gap": areas[0] - areas[1],
        "ppg": metrics.dominance_gap(*precisions),
        "prg": metrics.dominance_gap(*recalls),
    }
    return {name: None if np.isnan(value) else float(value) for name, value in found.items()}
