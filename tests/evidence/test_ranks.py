"""Rank correlation between tasks, with its interval."""

import numpy as np
import pytest

from synthrepro.evidence import Cell, Provenance, Record
from synthrepro.evidence.ranks import rank_correlation

PROVENANCE = Provenance("c", False, "code", {}, "3", "2", None, "cpu", 1.0, 1.0, "2026-01-01")
ARMS = ("worst", "middle", "better", "best")


def records(level, noise=0.0, seeds=5, people=6, task="a", arms=ARMS):
    """Arms `level` apart on a task; `noise` of each seed and person, the same for all arms, and of each score alone."""
    rng = np.random.default_rng(sum(map(ord, task)))
    shared = rng.normal(size=(seeds, people))
    found = []
    for rank, arm in enumerate(arms):
        for seed in range(seeds):
            alone = rng.normal(size=people)
            cases = [
                {"subject": f"{task}{i}", "split": "test", "dice": level * rank + shared[seed, i] + noise * alone[i]}
                for i in range(people)
            ]
            found.append(Record("c", "e", "cpu", Cell(arm, task, seed), {}, "0", {}, cases, [], PROVENANCE))
    return found


def test_arms_in_the_same_order_correlate_fully_whatever_seeds_and_people_share():
    ranks = rank_correlation([*records(0.1), *records(0.2, task="b")], ("a", "b"), "dice", "test")
    assert ranks is not None
    assert (ranks.rho, ranks.low, ranks.high) == pytest.approx((1, 1, 1))
    assert ranks.arms == ("best", "better", "middle", "worst")
    assert ranks.first == pytest.approx(sorted(ranks.first, reverse=True))
    assert ranks.seeds == (5, 5)
    opposite = rank_correlation([*records(0.1), *records(-0.2, task="b")], ("a", "b"), "dice", "test")
    assert opposite is not None
    assert opposite.rho == opposite.high == pytest.approx(-1)


def test_arms_that_noise_mixes_up_have_a_wide_interval():
    found = [*records(0.05, noise=1.0), *records(0.05, noise=1.0, task="b")]
    ranks = rank_correlation(found, ("a", "b"), "dice", "test")
    assert ranks is not None
    assert ranks.high - ranks.low > 1
    assert -1 <= ranks.low <= ranks.high <= 1


def test_arms_of_one_task_only_are_left_out_and_too_few_give_nothing():
    found = [*records(0.1), *records(0.1, task="b", arms=(*ARMS[:3], "foreign"))]
    ranks = rank_correlation(found, ("a", "b"), "dice", "test")
    assert ranks is not None
    assert ranks.arms == ("better", "middle", "worst")
    assert rank_correlation([*records(0.1), *records(0.1, task="b", arms=ARMS[:2])], ("a", "b"), "dice", "test") is None
    assert rank_correlation([*records(0.1), *records(0.1, task="b", seeds=1)], ("a", "b"), "dice", "test") is None
