"""The simulated scheduler against runs worked out by hand, and the document against what the simulation prints."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from benchmarks import simulate
from benchmarks.simulate import Leases, Loss, Outcome, World, barrier, ideal, leased, static

HOSTS = Leases(heartbeat_s=10.0, expiry_s=60.0, claim_s=0.0, ranks_per_host=1)
"""Every rank on a host of its own."""
ONE_HOST = Leases(heartbeat_s=10.0, expiry_s=60.0, claim_s=0.0, ranks_per_host=2)
FOUR = np.full(4, 10.0)
TWO = np.ones(2)


@pytest.mark.parametrize("shards", [1, 64, 65, 130])
def test_equal_shards_on_equal_ranks_take_as_many_rounds_as_they_need(shards: int) -> None:
    seconds, ranks = np.full(shards, 10.0), np.ones(64)
    expected = Outcome(10.0 * math.ceil(shards / 64), 0.0, 0)
    assert leased(seconds, ranks, [], HOSTS) == expected
    assert static(seconds, ranks, []) == expected
    assert barrier(seconds, ranks, []) == expected


def test_each_claim_takes_its_time() -> None:
    assert leased(np.full(3, 10.0), np.ones(1), [], Leases(claim_s=0.5)).makespan == 31.5


def test_the_shard_of_a_dead_rank_is_taken_over_after_the_expiry() -> None:
    # Rank 0: shards 0, 2, 3 until 30, then it waits: rank 1's last sign of life was at 0, so shard 1 from 60 to 70.
    died = [Loss(5.0, (1,))]
    assert leased(FOUR, TWO, died, HOSTS) == Outcome(70.0, 5 / 40, 0)
    # On the same host at once: 0, 1, 2, 3 one after the other.
    assert leased(FOUR, TWO, died, ONE_HOST) == Outcome(40.0, 5 / 40, 0)
    assert static(FOUR, TWO, died) == Outcome(math.inf, 5 / 40, 2)
    assert barrier(FOUR, TWO, died) == Outcome(math.inf, 10 / 40, 4)


def test_the_expiry_counts_from_the_last_heartbeat() -> None:
    # Shard 1 was begun at 0 and takes 30: signs of life at 0, 10, 20; dead at 25, free at 80.
    assert leased(np.full(2, 30.0), TWO, [Loss(25.0, (1,))], HOSTS) == Outcome(110.0, 25 / 60, 0)


def test_a_replaced_rank_goes_on() -> None:
    replaced = [Loss(5.0, (1,), back=20.0)]
    # Static: 20 to 30 and 30 to 40. Leases: at 20 nothing is left but shard 1, which is free at 60.
    assert static(FOUR, TWO, replaced) == Outcome(40.0, 5 / 40, 0)
    assert leased(FOUR, TWO, replaced, HOSTS) == Outcome(70.0, 5 / 40, 0)
    # With more to do, nobody waits: rank 0 has 0, 2, 3, 5, 7, 9 until 60; rank 1 has 4, 6, 8 from 20 to 50 and takes
    # shard 1 at 60, while rank 0 is done.
    assert leased(np.full(10, 10.0), TWO, replaced, HOSTS) == Outcome(70.0, 5 / 100, 0)
    # Barrier: both lose 5 seconds; steps from 20 to 30 and 30 to 40.
    assert barrier(FOUR, TWO, replaced) == Outcome(40.0, 10 / 40, 0)


def test_a_preempted_job_goes_on_where_it_was() -> None:
    both = (0, 1)
    # Back after the expiry: shards 0 and 1 again from 65 to 75, 2 and 3 until 85.
    assert leased(FOUR, TWO, [Loss(5.0, both, back=65.0)], HOSTS) == Outcome(85.0, 10 / 40, 0)
    # Back before it: 2 and 3 from 10 to 20, then 0 and 1 from 60 to 70.
    assert leased(FOUR, TWO, [Loss(5.0, both, back=10.0)], HOSTS) == Outcome(70.0, 10 / 40, 0)
    assert static(FOUR, TWO, [Loss(5.0, both, back=65.0)]) == Outcome(85.0, 10 / 40, 0)
    # Finished shards are kept.
    assert static(FOUR, TWO, [Loss(10.0, both, back=65.0)]).makespan == 75.0


def test_a_slow_rank_costs_its_own_shard_only() -> None:
    slow = np.array([1.0, 10.0])
    assert leased(FOUR, slow, [], HOSTS).makespan == 100.0
    assert static(FOUR, slow, []).makespan == 200.0
    assert barrier(FOUR, slow, []).makespan == 200.0


def test_a_rank_that_hangs_keeps_one_shard_with_leases_and_its_whole_part_without() -> None:
    hangs = np.array([1.0, math.inf])
    assert leased(FOUR, hangs, [], HOSTS) == Outcome(math.inf, 0.0, 1)
    assert static(FOUR, hangs, []) == Outcome(math.inf, 0.0, 2)
    assert barrier(FOUR, hangs, []) == Outcome(math.inf, 0.0, 4)


def test_all_ranks_lost_and_none_back_leaves_work() -> None:
    assert leased(FOUR, TWO, [Loss(15.0, (0, 1))], HOSTS) == Outcome(math.inf, 10 / 40, 2)


def test_losses_of_ranks_that_are_away_change_nothing() -> None:
    twice = [Loss(5.0, (1,), back=20.0), Loss(12.0, (1,), back=500.0)]
    assert leased(FOUR, TWO, twice, HOSTS) == leased(FOUR, TWO, twice[:1], HOSTS)
    assert static(FOUR, TWO, twice) == static(FOUR, TWO, twice[:1])


@examples(60)
@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=60), st.integers(1, 9))
def test_nothing_beats_the_ideal_and_leases_keep_to_grahams_bound(times: list[float], ranks: int) -> None:
    """Whoever is free takes the next: at most the ideal and the longest shard together (Graham 1966)."""
    seconds, equal = np.array(times), np.ones(ranks)
    best = ideal(seconds, equal)
    makespan = leased(seconds, equal, [], HOSTS).makespan
    assert best - 1e-9 <= makespan <= best + seconds.max() + 1e-9
    assert static(seconds, equal, []).makespan >= best - 1e-9
    assert barrier(seconds, equal, []).makespan >= static(seconds, equal, []).makespan - 1e-9


@examples(20)
@given(st.integers(0, 10_000))
def test_with_replacement_everything_is_done_whatever_is_lost(seed: int) -> None:
    world = World("", nodes=3, ranks_per_node=2, spread=0.5, losses_per_hour=60.0, back_after=30.0, preemptions=(0.5,))
    seconds, slowness, losses, best = world.draw(200, 10.0, np.random.default_rng(seed))
    found = leased(seconds, slowness, losses, Leases(ranks_per_host=2))
    assert found.unfinished == 0
    assert best <= found.makespan < math.inf
    # A rank works on one shard at a time: what it does is what is kept and what is lost.
    assert found.repeated * seconds.sum() <= 6 * found.makespan - seconds.sum() + 1e-6


def test_a_world_is_drawn_as_described() -> None:
    world = World("", slow_share=0.25, slow_factor=3.0, losses_per_hour=4.0, back_after=100.0, preemptions=(0.5,))
    seconds, slowness, losses, best = world.draw(100_000, 10.0, np.random.default_rng(0))
    again = world.draw(100_000, 10.0, np.random.default_rng(0))
    assert np.array_equal(seconds, again[0])
    assert losses == again[2]
    # The mean of 100,000 times with a spread of 20 % is known to 0.06 %.
    assert seconds.mean() == pytest.approx(10.0, rel=0.003)
    assert sorted(slowness) == [1.0] * 48 + [3.0] * 16
    assert losses[0] == Loss(best / 2, tuple(range(64)), best / 2 + 120.0)
    for node in range(8):
        own = [loss for loss in losses[1:] if loss.ranks == tuple(range(8 * node, 8 * node + 8))]
        assert all(first.back <= second.at for first, second in pairwise(own))
    # 8 nodes, each up for 900 s and away for 100 s on average, over 20 times the ideal.
    expected = 8 * 20 * best / 1000
    assert len(losses) - 1 == pytest.approx(expected, abs=5 * math.sqrt(expected))


def test_the_sums_by_hand() -> None:
    found = {step.name: step.seconds for step in simulate.steps()}
    assert found["read the images"] == 50e6 * 163e3 / 10e9 == 815.0
    assert found["embed images"] == pytest.approx(50e6 / (64 * 312e12 * 0.4 / 162e9))
    assert found["search, all nodes"] == pytest.approx(found["search, one node"] / 8)
    assert "| embeddings, width 768, float16 | 76.8 GB |" in simulate.sizes()
    assert "| images | 8.15 TB |" in simulate.sizes()


def test_the_document_holds_what_the_simulation_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    document = simulate.DOCUMENT.read_text(encoding="utf-8")
    assert simulate.insert(document, simulate.render()) == document
    monkeypatch.setattr(simulate, "INPUTS", {**simulate.INPUTS, "pairs": simulate.Input(1e6, "", "")})
    assert simulate.sizes() not in document
