"""The procedure is measured on scores whose truth is known; verdicts.py states the rates that these tests recompute."""

import numpy as np
import pytest

from synthrepro.evidence import verdicts

DRAWS, SEEDS, MARGIN = 4000, 5, 3.0
LEVEL = verdicts.ALPHA / 2  # each of the two directions
HIGHEST = LEVEL + 4 * np.sqrt(LEVEL * (1 - LEVEL) / DRAWS)  # what a rate of LEVEL may look like in DRAWS draws


class Draws:
    """Scores (DRAWS, seeds, subjects) of arms whose true mean is 0: effects of seed, of subject, and of both."""

    def __init__(self, subjects: int, shape: str = "normal") -> None:
        generator = np.random.default_rng(20)
        self.subjects = subjects
        self.noise = {
            "normal": generator.standard_normal,
            "exponential": lambda size: generator.exponential(size=size) - 1,
        }[shape]

    def __call__(self) -> np.ndarray:
        scores = self.noise((DRAWS, SEEDS, 1))
        if self.subjects > 1:
            scores = scores + self.noise((DRAWS, 1, self.subjects)) + self.noise((DRAWS, SEEDS, self.subjects))
        return scores


def rates(parts):
    """How often a claim is found to hold, and to fail."""
    holds, fails = verdicts.combine(parts)
    return float((holds < LEVEL).mean()), float((fails < LEVEL).mean())


def on_the_margin(kind, draw):
    m = MARGIN
    if kind == "superiority":
        return verdicts.superiority(draw() + m, m)
    if kind == "non-inferiority":
        return verdicts.noninferiority(draw() - m, m)
    if kind == "threshold":
        return verdicts.threshold(draw() + m, m)
    if kind == "equivalence":
        return verdicts.equivalence(draw() + m, m)
    if kind == "interaction":
        return verdicts.interaction(draw() + m, draw(), m)
    if kind == "ratio":
        sizes = [10, 20, 40, 80]  # the curve passes the reference's level, 0, at 40: half of 80
        return verdicts.ratio(sizes, [draw() + 4 * np.log2(n / 40) for n in sizes], draw(), 80, 2.0)
    if kind == "trend":
        return verdicts.trend([draw(), draw() + 3 * m, draw() + 2 * m, draw() + 5 * m], m)
    assert kind == "optimum"
    return verdicts.optimum(draw(), [draw() + m, draw() - 3 * m, draw() - 3 * m], m)


SINGLE = ("superiority", "non-inferiority", "threshold", "equivalence", "interaction", "ratio")
SEVERAL = ("trend", "optimum")


@pytest.mark.parametrize("subjects", [1, 20])
@pytest.mark.parametrize("kind", SINGLE + SEVERAL)
def test_on_the_margin_five_seeds_err_about_as_often_as_stated(kind, subjects):
    holds, fails = rates(on_the_margin(kind, Draws(subjects)))
    assert 0.014 < holds < HIGHEST
    assert (0.014 if kind in SINGLE else 0.002) < fails < HIGHEST


@pytest.mark.parametrize("subjects", [1, 20])
def test_many_parts_on_their_margins_do_not_add_up_to_more_errors(subjects):
    draw = Draws(subjects)
    presets = [part for _ in range(8) for part in verdicts.equivalence(draw() + MARGIN, MARGIN)]
    holds, fails = rates(presets)
    assert holds < 0.002
    assert fails < 0.045
    holds, fails = rates(verdicts.optimum(draw(), [draw() + MARGIN for _ in range(3)], MARGIN))
    assert holds < 0.005
    assert fails < HIGHEST


def test_skewed_scores_cost_what_is_stated():
    draw = Draws(1, "exponential")
    holds, fails = rates(verdicts.threshold(draw() + MARGIN, MARGIN))
    assert holds < 0.01
    assert 0.08 < fails < 0.14
    assert max(rates(verdicts.superiority(draw() - draw() + MARGIN, MARGIN))) < HIGHEST


def test_subjects_count_as_a_sample_where_seeds_alone_would_be_sure_of_anything():
    generator = np.random.default_rng(1)
    only_subjects = generator.standard_normal((DRAWS, 1, 20)).repeat(SEEDS, axis=1)
    only_subjects += 1e-6 * generator.standard_normal((DRAWS, SEEDS, 20))
    assert sum(rates(verdicts.superiority(only_subjects, 0))) == pytest.approx(0.05, abs=0.015)
    seeds_alone = only_subjects.mean(-1, keepdims=True)
    assert sum(rates(verdicts.superiority(seeds_alone, 0))) > 0.99


def test_percentiles_of_resampled_seeds_would_miss_the_truth_three_times_as_often():
    generator = np.random.default_rng(2)
    scores = generator.standard_normal((DRAWS, SEEDS))
    means = scores[:, generator.integers(0, SEEDS, (1000, SEEDS))].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert ((low > 0) | (high < 0)).mean() == pytest.approx(0.16, abs=0.02)
    low, high = verdicts.effect(scores[..., None]).interval()
    assert ((low > 0) | (high < 0)).mean() == pytest.approx(0.05, abs=0.014)


def test_the_standard_error_is_the_bootstraps_over_seeds_and_over_subjects():
    generator = np.random.default_rng(3)
    scores = (
        generator.standard_normal((6, 1)) + 2 * generator.standard_normal((1, 9)) + generator.standard_normal((6, 9))
    )
    seeds = scores.mean(1)[generator.integers(0, 6, (200_000, 6))].mean(1).var() * 6 / 5
    subjects = scores.mean(0)[generator.integers(0, 9, (200_000, 9))].mean(1).var() * 9 / 8
    assert verdicts.effect(scores).error ** 2 == pytest.approx(seeds + subjects, rel=0.02)


WITH_EFFECT = {
    "superiority": lambda d, e: verdicts.superiority(d() + MARGIN + e, MARGIN),
    "non-inferiority": lambda d, e: verdicts.noninferiority(d() - MARGIN + e, MARGIN),
    "threshold": lambda d, e: verdicts.threshold(d() + MARGIN + e, MARGIN),
    "equivalence": lambda d, e: verdicts.equivalence(d() + 5 - e, 5),
    "interaction": lambda d, e: verdicts.interaction(d() + MARGIN + 1.5 * e, d(), MARGIN),
    "trend": lambda d, e: verdicts.trend([d() + 1.5 * e * level for level in range(3)], 0.0),
    "optimum": lambda d, e: verdicts.optimum(d(), [d() + MARGIN - 1.5 * e, d() + MARGIN - 1.5 * e], MARGIN),
    "ratio": lambda d, e: verdicts.ratio(
        [10, 20, 40, 80], [d() + 1.5 * e + 4 * np.log2(n / 40) for n in (10, 20, 40, 80)], d(), 80, 2.0
    ),
}


@pytest.mark.parametrize("kind", WITH_EFFECT)
def test_a_real_effect_is_seen_and_its_opposite_is_seen_as_the_opposite(kind):
    draw = Draws(1)
    holds, fails = rates(WITH_EFFECT[kind](draw, 4.0))
    assert holds > 0.9
    assert fails < 0.001
    holds, fails = rates(WITH_EFFECT[kind](draw, -4.0))
    assert holds < 0.001
    assert fails > 0.9


def test_the_smallest_difference_it_could_have_seen_is_seen_four_times_in_five():
    draw = Draws(1)
    distance = np.sqrt((verdicts.effect(draw()).smallest() ** 2).mean())
    assert rates(verdicts.superiority(draw() + distance, 0.0))[0] == pytest.approx(0.8, abs=0.04)


def test_holm_keeps_any_false_decision_among_all_claims_below_the_level():
    draw = Draws(1)
    p = []
    for kind in SINGLE:
        p.append(verdicts.two_sided(*verdicts.combine(on_the_margin(kind, draw))))
    adjusted = np.array([verdicts.holm(list(one)) for one in np.array(p).T])
    uncorrected = (np.array(p).min(0) < verdicts.ALPHA).mean()
    assert uncorrected > 0.2
    assert 0.03 < (adjusted.min(1) < verdicts.ALPHA).mean() < 0.065


def test_holm_by_hand():
    assert verdicts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert verdicts.holm([]) == []


def test_an_optimum_needs_every_other_level_and_a_trend_every_step():
    generator = np.random.default_rng(4)
    arms = [level + 0.01 * generator.standard_normal((SEEDS, 1)) for level in (0.0, 1.0, 2.0, 1.5)]
    assert verdicts.combine(verdicts.trend(arms[:3], 0.1))[0] < 0.001
    rises, falls = verdicts.combine(verdicts.trend(arms, 0.1))
    assert rises > 0.99
    assert falls < 0.001
    best, not_best = verdicts.optimum(arms[2], arms[:2], 0.1), verdicts.optimum(arms[1], [arms[0], arms[2]], 0.1)
    assert verdicts.combine(best)[0] < 0.001
    assert verdicts.combine(not_best)[1] < 0.001


def curves(level):
    """Scores at 10, 20, 40, 80 samples that rise by 1 a doubling and reach 0 at `level` samples."""
    generator = np.random.default_rng(5)
    sizes = [10, 20, 40, 80]
    return sizes, [np.log2(n / level) + 0.01 * generator.standard_normal((SEEDS, 1)) for n in sizes]


def test_a_ratio_is_where_learning_curves_cross():
    sizes, curve = curves(level=25)
    part = verdicts.ratio(sizes, curve, np.zeros((SEEDS, 1)), 100, 3.0)[0]
    assert part.estimate == pytest.approx(4.0, rel=0.02)
    assert part.low <= part.estimate <= part.high
    assert part.high - part.low < 0.3
    assert part.holds < 0.001
    assert verdicts.ratio(sizes, curve, np.zeros((SEEDS, 1)), 100, 5.0)[0].fails < 0.001


def test_a_ratio_without_crossing_is_censored_and_decides_one_direction_only():
    reference = np.zeros((SEEDS, 1))
    above = verdicts.ratio(*curves(level=1), reference, 100, 8.0)[0]
    assert above.estimate == np.inf
    assert above.holds < 0.001
    beyond = verdicts.ratio(*curves(level=1), reference, 100, 20.0)[0]  # asks for 5 samples; 10 were the fewest
    assert (beyond.holds, beyond.fails) == (1.0, pytest.approx(1.0))
    below = verdicts.ratio(*curves(level=1000), reference, 100, 20.0)[0]
    assert below.estimate == 0
    assert below.fails < 0.001


def test_no_verdict_stands_on_four_seeds():
    for kind in WITH_EFFECT:
        with pytest.raises(ValueError, match="at least 5 seeds, not 4"):
            WITH_EFFECT[kind](lambda: np.zeros((4, 1)), 1.0)
    with pytest.raises(ValueError, match="at least two seeds"):
        verdicts.effect(np.zeros((1, 3)))


def test_equal_scores_decide_without_dividing_by_zero():
    same = np.full((SEEDS, 1), 0.25)
    holds, fails = verdicts.combine(verdicts.equivalence(same, 0.5))
    assert (holds, fails) == (0.0, 1.0)
    holds, fails = verdicts.combine(verdicts.superiority(same, 0.25))
    assert (holds, fails) == (1.0, 1.0)
