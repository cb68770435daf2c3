"""Memorization planted into the evidence of rows that no encoder saw: known rates, and what is measured of them."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl

from dejavu_exp import metrics, progress, provenance, statistics
from dejavu_exp.errors import ConfigError, DataError
from dejavu_exp.evidence import Evidence
from dejavu_exp.scoring import LabelInference
from dejavu_exp.tables import FloatArray, IntArray, Role

ALL_ROWS = "corrected gap, all rows"
RATE = "memorized rows"
UNGUESSED = ", rows the reference gets wrong"
VARIANTS: tuple[Literal["probability", "entropy"], ...] = ("probability", "entropy")
FALSE_POSITIVE_RATE = 0.01
SLACK = 0.02
"""By which the share of intervals that hold the truth may differ from what they promise."""
LEAST_AUROC = 0.95
"""For at least one memorization score."""
MASS = 1e6
"""What the weights of a population add up to: a share of it is cut to a millionth."""


@dataclass(frozen=True)
class Planting:
    """Which rows of a population are memorized, by chance.

    Attributes:
        rate: expected share of the rows, a fraction.
        where: any row alike, or only rows that the reference gets wrong, as unique pairs of background and label are.
    """

    rate: float
    where: Literal["anywhere", "unguessed"] = "anywhere"

    def chances(self, guessed: FloatArray) -> FloatArray:
        """How probable each row is to be planted, from 1 where the reference is right and 0 where it is not.

        Raises:
            ConfigError: there are fewer such rows.

        >>> Planting(0.25, "unguessed").chances(np.array([0.0, 1.0])).tolist()
        [0.5, 0.0]
        """
        eligible = np.ones(len(guessed)) if self.where == "anywhere" else 1 - guessed
        if self.rate > eligible.mean():
            raise ConfigError(
                f"a rate of {self.rate:g} cannot be planted {self.where}: only {eligible.mean():.2f} of the rows can "
                "be. Choose a lower rate."
            )
        return np.asarray(eligible * (self.rate / eligible.mean()))


@dataclass(frozen=True)
class Population:
    """Rows that no encoder saw, and what an encoder answers for rows that it remembers.

    Attributes:
        rows: columns id, label and status: N usable rows.
        target: the encoder's evidence for the rows, and after them for D donors: rows that its training repeated and
            whose label it names.
        reference: the reference's evidence for the rows.
        donors: by label, the places of its donors in `target`.
        repeated: rows that training repeated, remembered or not.
        name: of the reference.
    """

    rows: pl.DataFrame
    target: Evidence
    reference: Evidence
    donors: Mapping[str, IntArray]
    repeated: int
    name: str

    @classmethod
    def of(
        cls, rows: pl.DataFrame, target: Evidence, reference: Evidence, repeats: Mapping[str, int], name: str
    ) -> Population:
        """Choose rows and donors.

        Args:
            rows: columns id, role, label and status, of usable target and unseen rows.
            target: evidence of the encoder for them.
            reference: evidence of the reference for them.
            repeats: how often training repeats them, by id.
            name: of the reference.

        Raises:
            DataError: there are no unseen rows, or a class has no row that training repeated and the encoder remembers.
        """
        answered = reference.take(rows["id"].to_list()).answered()
        pool = rows.filter(pl.Series(answered), pl.col("role") == Role.UNSEEN).sort("id")
        shown_again = pl.col("id").is_in([row_id for row_id, count in repeats.items() if count > 1])
        repeated = rows.filter(pl.col("role") == Role.TARGET, shown_again).sort("id")
        if not len(pool):
            raise DataError("calibration needs rows that no encoder saw, and the split has none that can be used.")
        remembered = repeated.filter(pl.Series(_is_right(target, repeated), dtype=pl.Boolean))
        lost = sorted(set(pool["label"]) - set(remembered["label"]))
        if lost:
            raise DataError(
                f"class {lost[0]} ({len(lost)} such) has no row that training repeated (planted_repeats) and the "
                "encoder remembers, so there is no example of what memorization looks like. Repeat more rows, or more "
                "often (dataset.planted_share, dataset.planted_repeats), or use --canaries."
            )
        places = len(pool) + np.arange(len(remembered))
        labels = remembered["label"].to_numpy()
        return cls(
            pool.select("id", "label", "status"),
            target.take([*pool["id"], *remembered["id"]]),
            reference.take(pool["id"].to_list()),
            {label: places[labels == label] for label in np.unique(labels)},
            len(repeated),
            name,
        )

    def scores(self, scoring: LabelInference, rows: IntArray, answers: IntArray, roles: Sequence[str]) -> pl.DataFrame:
        """Score rows of the population as if the encoder gave other answers for them.

        Args:
            scoring: how.
            rows: shape (M,), places of rows.
            answers: shape (M,), places in `target`; the row's own place where it is not remembered.
            roles: M roles.

        Returns:
            Columns of `tables.SCORES`, M rows in this order.
        """
        ids = [f"{row}/{answer}" for row, answer in zip(rows.tolist(), answers.tolist(), strict=True)]
        table = self.rows[rows].with_columns(id=pl.Series(ids), role=pl.Series(list(roles), dtype=pl.String))
        return scoring.score(table, _picked(self.target, answers, ids), _picked(self.reference, rows, ids), self.name)

    def deal(
        self, scoring: LabelInference, planting: Planting, count: int, rng: np.random.Generator
    ) -> tuple[pl.DataFrame, pl.Series]:
        """Draw target and unseen rows, plant memorization among the target rows, and score them.

        Args:
            scoring: how to score.
            planting: how much to plant.
            count: rows of each role.
            rng: the generator.

        Returns:
            Scores of 2 * count rows, and which of them are planted.
        """
        rows = rng.permutation(len(self.rows))[: 2 * count]
        planted = rng.random(2 * count) < self.chances(planting)[rows]
        planted[count:] = False
        answers = rows.copy()
        labels = self.rows["label"].to_numpy()[rows]
        answers[planted] = [rng.choice(self.donors[label]) for label in labels[planted]]
        roles = [Role.TARGET] * count + [Role.UNSEEN] * count
        return self.scores(scoring, rows, answers, roles), pl.Series(planted)

    def chances(self, planting: Planting) -> FloatArray:
        """How probable each row is to be planted, shape (N,)."""
        return planting.chances(_is_right(self.reference, self.rows).astype(np.float64))

    def every_answer(self, scoring: LabelInference) -> pl.DataFrame:
        """Scores of every row with its own answer, and with that of every donor of its class.

        Returns:
            Columns of `tables.SCORES`, row (its place), remembered, and share: 1 for a row's own answer, and what a
            donor counts among those of its class.
        """
        own = np.arange(len(self.rows))
        given = [self.donors[label] for label in self.rows["label"]]
        sizes = np.array([len(places) for places in given])
        rows = np.concatenate([own, np.repeat(own, sizes)])
        answers = np.concatenate([own, *given])
        scores = self.scores(scoring, rows, answers, [Role.UNSEEN] * len(rows))
        share = np.concatenate([np.ones(len(own)), np.repeat(1 / sizes, sizes)])
        return scores.with_columns(
            row=pl.Series(rows), remembered=pl.Series(np.arange(len(rows)) >= len(own)), share=pl.Series(share)
        )


def _picked(evidence: Evidence, places: IntArray, ids: Sequence[str]) -> Evidence:
    """The evidence of some rows under other names; rows may come more than once."""
    return Evidence(
        tuple(ids),
        evidence.labels,
        evidence.probabilities[places],
        evidence.ranking[places],
        evidence.confidence[places],
        evidence.tied[places],
    )


def _is_right(evidence: Evidence, rows: pl.DataFrame) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where the first label of the evidence is that of the row."""
    codes = {label: code for code, label in enumerate(evidence.labels)}
    truth = rows["label"].replace_strict(codes, return_dtype=pl.Int64).to_numpy()
    return evidence.take(rows["id"].to_list()).correct(truth)


def fraction_names(scoring: LabelInference) -> dict[float, str]:
    """What the corrected gap at each confident fraction is called."""
    return {
        fraction: ALL_ROWS if fraction == 1 else f"corrected gap, surest {metrics.percent_key(fraction)} %"
        for fraction in scoring.fractions
    }


def truths(population: Population, scoring: LabelInference, planting: Planting) -> dict[str, float]:
    """What is to be found, from the whole population and no sample of it.

    The reference answers the same for a planted row, so the corrected gap is by how much planting raises the encoder's
    accuracy: over all rows the rate times the share of planted rows that it would not have got right.

    Returns:
        By figure: the corrected gaps, and the share of planted rows.
    """
    answers = population.every_answer(scoring)
    chances = population.chances(planting)
    chance = chances[answers["row"].to_numpy()]
    remembered = answers["remembered"].to_numpy()
    share = answers["share"].to_numpy()
    weights = np.stack([np.where(remembered, chance, 1 - chance) * share, np.where(remembered, 0, share)])
    means = metrics.TopMeans.of(
        answers.select(pl.col("target_correct").cast(pl.Float64)).to_numpy(),
        answers["target_confidence"].to_numpy(),
        scoring.fractions,
    )(weights * (MASS / len(population.rows)))[:, :, 0]
    gains = (means[0] - means[1]).tolist()
    return {**dict(zip(fraction_names(scoring).values(), gains, strict=True)), RATE: float(chances.mean())}


@dataclass(frozen=True)
class Trial:
    """One measurement of planted memorization.

    Attributes:
        estimates: value, low and high by figure; None where the figure is undefined.
        planted: target rows that were planted.
        listed: target rows that the false-discovery rate lists.
        found: of them, those that were planted.
    """

    estimates: Mapping[str, tuple[float, float, float] | None]
    planted: int
    listed: int
    found: int


@dataclass(frozen=True)
class Bench:
    """All that a trial needs beside its seed.

    Attributes:
        population: whence rows are drawn.
        scoring: how they are measured.
        count: rows of each role.
    """

    population: Population
    scoring: LabelInference
    count: int

    def __post_init__(self) -> None:
        rows = len(self.population.rows)
        if not 1 <= self.count <= rows // 2:
            raise ConfigError(
                f"--rows={self.count}: there are {rows} usable unseen rows, of which each trial draws twice as many. "
                f"Give at most {rows // 2}, or more unseen rows (for shapes dataset.val_per_class and split.unseen)."
            )
        if 1.0 not in self.scoring.fractions:
            raise ConfigError(
                f"scoring.fractions={list(self.scoring.fractions)}: calibration looks at all rows first; add 1.0."
            )
        if self.scoring.ties != "shared":
            raise ConfigError(
                "scoring.ties=first lets the order of rows decide, so that a population has no true figure at a "
                "confident fraction. Calibrate with scoring.ties=shared."
            )

    def figures_of_few(self) -> set[str]:
        """The figures whose interval is made from exact ones, as few rows are behind them."""
        return {
            name
            for fraction, name in fraction_names(self.scoring).items()
            if metrics.n_confident(self.count, fraction) < statistics.FEW_ROWS
        }

    def trial(self, planting: Planting, seed: int) -> Trial:
        """Deal, plant, and measure as an ordinary run does."""
        rng = provenance.rng(seed, f"calibration/{planting.where}/{planting.rate:g}")
        scores, planted = self.population.deal(self.scoring, planting, self.count, rng)
        figures = self.scoring.figures(scores, scores.select("id"), seed)
        gaps = figures["corrected_gap"]["top1"]
        found = {name: gaps[metrics.percent_key(fraction)] for fraction, name in fraction_names(self.scoring).items()}
        found[RATE] = figures["rate"]
        listed = (scores["q_value"] <= self.scoring.false_discovery).fill_null(value=False)
        return Trial(
            {name: _ends(estimate) for name, estimate in found.items()},
            int(planted.sum()),
            int(listed.sum()),
            int((listed & planted).sum()),
        )


def _ends(estimate: Mapping[str, Any]) -> tuple[float, float, float] | None:
    found = tuple(estimate[key] for key in ("value", "low", "high"))
    return None if None in found else found


_bench: Bench | None = None
"""Of a process that runs trials: what is large is handed to it once."""


def _hold(bench: Bench) -> None:
    global _bench
    _bench = bench


def _held_trial(job: tuple[Planting, int]) -> Trial:
    if _bench is None:
        raise RuntimeError("the process was not given its bench")
    return _bench.trial(*job)


def trials(bench: Bench, plantings: Sequence[Planting], seeds: int) -> list[list[Trial]]:
    """Run all trials on all processors; the number of processors changes nothing.

    Returns:
        For each planting its trials, by seed from 0 on.
    """
    jobs = [(planting, seed) for planting in plantings for seed in range(seeds)]
    found = list(_run(bench, jobs))
    return [found[start : start + seeds] for start in range(0, len(found), seeds)]


def _run(bench: Bench, jobs: Sequence[tuple[Planting, int]]) -> Iterator[Trial]:
    workers = min(os.cpu_count() or 1, len(jobs))
    with progress.bar("measuring what was planted", len(jobs), unit="trial") as bar:
        if workers == 1:
            for job in jobs:
                yield bench.trial(*job)
                bar.update()
            return
        # Not forked: threads of torch and polars would be left half alive in the child.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_hold, initargs=(bench,)) as pool:
            for trial in pool.map(_held_trial, jobs, chunksize=5):
                yield trial
                bar.update()


def recovered(trials: Sequence[Trial], truth: Mapping[str, float]) -> list[dict[str, Any]]:
    """How the estimates of each figure lie about the truth, and how often their interval holds it.

    Args:
        trials: of one planting.
        truth: by figure.

    Returns:
        For each figure, JSON-ready: truth; mean of the estimates and of the ends of their intervals; standard deviation
        of the estimates; `held`, `above_zero` and `below_zero`, how many intervals hold the truth, or lie on one side
        of zero; `held_of_100`, of the first hundred; seeds with a defined estimate, and how many had none.
    """
    result = []
    for name, true in truth.items():
        some = [trial.estimates[name] for trial in trials]
        ends = np.array([found for found in some if found is not None], dtype=np.float64).reshape(-1, 3)
        holds = (ends[:, 1] <= true) & (true <= ends[:, 2])
        first = [found for found in some[:100] if found is not None]
        means = ends.mean(axis=0).tolist() if len(ends) else [None] * 3
        result.append(
            {
                "figure": name,
                "truth": true,
                **dict(zip(("mean", "mean_low", "mean_high"), means, strict=True)),
                "deviation": float(ends[:, 0].std(ddof=1)) if len(ends) > 1 else None,
                "seeds": len(ends),
                "undefined": len(some) - len(ends),
                "held": int(holds.sum()),
                "held_of_100": sum(low <= true <= high for _, low, high in first),
                "above_zero": int((ends[:, 1] > 0).sum()),
                "below_zero": int((ends[:, 2] < 0).sum()),
            }
        )
    return result


def listed(trials: Sequence[Trial]) -> dict[str, float | None]:
    """What the list at a false-discovery rate holds, over the trials of one planting.

    Returns:
        JSON-ready: `planted` and `listed`, mean counts; `false_share`, the mean share of the list that was not planted,
        0 for an empty list, with its standard error; `found_share`, of all planted rows those on a list; None where
        nothing was planted.
    """
    false = np.array([(trial.listed - trial.found) / max(trial.listed, 1) for trial in trials])
    planted = sum(trial.planted for trial in trials)
    return {
        "planted": planted / len(trials),
        "listed": sum(trial.listed for trial in trials) / len(trials),
        "false_share": float(false.mean()),
        "false_share_error": float(false.std(ddof=1) / math.sqrt(len(false))) if len(false) > 1 else None,
        "found_share": sum(trial.found for trial in trials) / planted if planted else None,
    }


@dataclass(frozen=True)
class Roc:
    """How well a score tells remembered rows from others.

    Attributes:
        false_positive: shape (T,), shares of the others at or above each threshold, from 0 to 1.
        true_positive: shape (T,), shares of the remembered rows there.
    """

    false_positive: FloatArray
    true_positive: FloatArray

    @classmethod
    def of(cls, remembered: FloatArray, others: FloatArray, weights: FloatArray | None = None) -> Roc:
        """Count at every threshold.

        Args:
            remembered: shape (P,), scores; NaN is below all others.
            others: shape (Q,), likewise.
            weights: shape (P,), how much each remembered row counts; None for all alike.

        >>> roc = Roc.of(np.array([2.0, np.nan]), np.array([1.0, 3.0]))
        >>> roc.area, roc.found_at(0.5)
        (0.25, 0.5)
        """
        from sklearn.metrics import roc_curve

        scores = np.concatenate([remembered, others])
        finite = scores[np.isfinite(scores)]
        scores = np.where(np.isnan(scores), finite.min(initial=0) - 1, scores)
        is_remembered = np.arange(len(scores)) < len(remembered)
        weight = np.ones(len(scores))
        if weights is not None:
            weight[: len(remembered)] = weights
        false_positive, true_positive, _ = roc_curve(is_remembered, scores, sample_weight=weight)
        return cls(false_positive, true_positive)

    @property
    def area(self) -> float:
        """AUROC: how probable a remembered row is to score above another, ties counted half."""
        from sklearn.metrics import auc

        return float(auc(self.false_positive, self.true_positive))

    def found_at(self, false_positive_rate: float) -> float:
        """Largest share of remembered rows found with no more than this share of the others."""
        return float(
            self.true_positive[self.false_positive <= false_positive_rate + metrics.CONFIDENCE_TOLERANCE].max()
        )


def detection(population: Population, scoring: LabelInference) -> dict[tuple[str, str], Roc]:
    """How well each memorization score tells planted rows from others, over the whole population.

    Returns:
        By scoring.memorization_score, and by where rows are planted.
    """
    result: dict[tuple[str, str], Roc] = {}
    for variant in VARIANTS:
        answers = population.every_answer(replace(scoring, memorization_score=variant))
        remembered = answers["remembered"].to_numpy()
        scores = answers["memorization_score"].fill_null(np.nan).to_numpy()
        for where in ("anywhere", "unguessed"):
            # The rate drops out of a ROC: what counts is which rows may be planted.
            chances = population.chances(Planting(1 / len(population.rows), where))
            weights = (chances[answers["row"].to_numpy()] * answers["share"].to_numpy())[remembered]
            result[variant, where] = Roc.of(scores[remembered], scores[~remembered], weights)
    return result


@dataclass(frozen=True)
class Check:
    """Something that a calibrated instrument fulfils.

    Attributes:
        name: what.
        value: as measured.
        low: lower end of what so many trials leave possible.
        high: upper end.
        least: smallest value that is allowed.
        most: largest.
    """

    name: str
    value: float
    low: float
    high: float
    least: float
    most: float

    @classmethod
    def share(cls, name: str, count: int, of: int, level: float, least: float, most: float) -> Check:
        """A share of trials with its exact interval.

        >>> Check.share("held", 91, 100, 0.95, 0.95, 1.0).passed
        True
        """
        low, high = statistics.proportion(count / max(of, 1), of, level)
        return cls(name, count / max(of, 1), low, high, least, most)

    @property
    def passed(self) -> bool:
        """False where the trials show that the value is not allowed, or where there are none."""
        return self.low <= self.most and self.high >= self.least


def checks(found: Mapping[str, Any]) -> list[Check]:
    """What a calibrated instrument fulfils.

    Args:
        found: of `measure`.
    """
    level, result = found["level"], []
    for planted in found["planted"]:
        said = f"{100 * planted['rate']:g} % planted{UNGUESSED if planted['where'] == 'unguessed' else ''}"
        for figure in planted["figures"]:
            result += _figure_checks(figure, planted, said, level)
        false, error = planted["listed"]["false_share"], 2 * (planted["listed"]["false_share_error"] or 0.0)
        ends = (false - error, false + error)
        result.append(Check(f"false share of the list, {said}", false, *ends, 0.0, found["false_discovery"]))
    best = max(row["auroc"] for row in found["detection"])
    return [*result, Check("AUROC of the best score", best, best, best, LEAST_AUROC, 1.0)]


def _figure_checks(figure: Mapping[str, Any], planted: Mapping[str, Any], said: str, level: float) -> list[Check]:
    name, held, seeds = figure["figure"], figure["held"], figure["seeds"]
    # That the rate is right only where memorization may hit any row is told, not asked for.
    if name == RATE and planted["where"] != "anywhere":
        return []
    # An exact interval promises no more than that it holds the truth often enough.
    allowed = (level - SLACK, 1.0 if figure["few_rows"] else level + SLACK)
    result = [Check.share(f"interval holds the truth: {name}, {said}", held, seeds, level, *allowed)]
    if name == ALL_ROWS:
        result.append(Check.share(f"recovered: {said}", held, seeds, level, level, 1.0))
        if not planted["rate"]:
            false = figure["above_zero"] + figure["below_zero"]
            allowed = (1 - level - SLACK, 1 - level + SLACK)
            name = "false positives: interval without zero, nothing planted"
            result.append(Check.share(name, false, seeds, level, *allowed))
    return result


def measure(
    bench: Bench, plantings: Sequence[Planting], seeds: int
) -> tuple[dict[str, Any], dict[tuple[str, str], Roc]]:
    """The whole calibration.

    Args:
        bench: population and measurement.
        plantings: what to plant.
        seeds: trials of each.

    Returns:
        What was drawn from, what was found of each planting and of single rows, and the checks, JSON-ready; and the
        curves of `detection`.
    """
    population, scoring = bench.population, bench.scoring
    rocs = detection(population, scoring)
    found: dict[str, Any] = {
        "reference": population.name,
        "population": {
            "rows": len(population.rows),
            "donors": sum(map(len, population.donors.values())),
            "repeated": population.repeated,
        },
        "rows": bench.count,
        "seeds": seeds,
        "level": scoring.level,
        "false_discovery": scoring.false_discovery,
        "resamples": scoring.resamples,
        "planted": [
            {
                **asdict(planting),
                "figures": [
                    {**figure, "few_rows": figure["figure"] in bench.figures_of_few()}
                    for figure in recovered(some, truths(population, scoring, planting))
                ],
                "listed": listed(some),
            }
            for planting, some in zip(plantings, trials(bench, plantings, seeds), strict=True)
        ],
        "detection": [
            {"score": score, "where": where, "auroc": roc.area, "found": roc.found_at(FALSE_POSITIVE_RATE)}
            for (score, where), roc in rocs.items()
        ],
    }
    found["checks"] = [{**asdict(check), "passed": check.passed} for check in checks(found)]
    return found, rocs
