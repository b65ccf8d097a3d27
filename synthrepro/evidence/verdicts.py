"""From scores to a verdict: the kinds of claim, and what decides each.

Scores are arrays (..., seeds, subjects); what has one number a seed has `subjects = 1`. Arms are paired: a seed has the
same labels, initialisation and generator in every arm, and subjects are the same in all, so claims are on differences.

**Interval.** Seeds and subjects are both samples. The variance of a mean is the variance between seed means over the
number of seeds plus the variance between subject means over the number of subjects, with Welch-Satterthwaite degrees of
freedom for Student's t: the bootstrap over seeds and subjects in closed form, each part corrected for its small sample.
The correction matters. Percentiles of resampled seeds give, with five of them, a "95 %" interval that misses the truth
16 times in 100; seeds without subjects (a t-test over seed means) miss it up to 100 times in 100 where it is subjects
that vary.

**Decision.** A claim holds when its 95 % interval lies wholly on the claim's side of the margin, fails when it lies
wholly on the other, and is undecided else: two one-sided tests at 2.5 %. Where several comparisons must all pass (an
ordered trend, an optimum, a claim over several presets), the claim holds at the largest of their p-values
(intersection-union, which needs no correction) and fails at the smallest times their number (Bonferroni).

**Measured at five seeds**, with the truth exactly on the margin, where errors are most likely: false "holds" / false
"fails" in percent, nominally 2.5 / 2.5, from 20,000 draws. tests/evidence/test_verdicts.py measures it again.

    normal scores                                          no subjects   20 subjects
    superiority, non-inferiority, threshold, interaction    2.5 / 2.6     2.7 / 2.7
    ratio                                                   2.5 / 2.7     2.6 / 2.6
    equivalence, margin of three standard deviations        2.5 / 2.7     2.6 / 2.6
    equivalence, margin of half a standard deviation        0.5 / 2.6     0.0 / 2.6
    trend of 4 levels, optimum of 4, one part on margin     2.3 / 0.8     2.4 / 1.1
    optimum of 4, all parts on their margins                0.1 / 2.3     0.1 / 2.8
    equivalence at 8 presets, all on the margin             0.0 / 2.6     0.0 / 3.6

Skewed scores cost more. With exponential ones, an extreme case, a single arm against a constant errs in 0.4 % on one
side and 12 % on the other; the difference of two arms, whose skews cancel, in 2 % on each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]

SEEDS = 5  # no verdict stands on fewer
ALPHA = 0.05


@dataclass(frozen=True)
class Effect:
    """A mean over seeds and subjects, its standard error and degrees of freedom, each of the scores' leading shape."""

    mean: Array
    error: Array
    df: Array

    def interval(self, level: float = 1 - ALPHA) -> tuple[Array, Array]:
        """Two-sided confidence interval."""
        half = stats.t.isf((1 - level) / 2, self.df) * self.error
        return self.mean - half, self.mean + half

    def above(self, bound: float) -> Array:
        """p-value against "the true mean is at most `bound`"."""
        with np.errstate(divide="ignore", invalid="ignore"):
            p = stats.t.sf((self.mean - bound) / self.error, self.df)
        return np.where(self.error == 0, np.where(self.mean > bound, 0.0, 1.0), p)

    def below(self, bound: float) -> Array:
        """p-value against "the true mean is at least `bound`"."""
        return Effect(-self.mean, self.error, self.df).above(-bound)

    def smallest(self, power: float = 0.8) -> Array:
        """The smallest distance from the margin that as many seeds and subjects would have seen with this power."""
        return (stats.t.isf(ALPHA / 2, self.df) + stats.t.ppf(power, self.df)) * self.error


def effect(scores: ArrayLike) -> Effect:
    """Mean of scores `(..., seeds, subjects)` with its uncertainty over both.

    Raises:
        ValueError: fewer than two seeds.
    """
    scores = np.asarray(scores, dtype=np.float64)
    seeds, subjects = scores.shape[-2:]
    if seeds < 2:
        raise ValueError(f"An interval needs at least two seeds, not {seeds}: measure more.")
    between_seeds = scores.mean(-1).var(-1, ddof=1) / seeds
    between_subjects = scores.mean(-2).var(-1, ddof=1) / subjects if subjects > 1 else np.zeros_like(between_seeds)
    variance = between_seeds + between_subjects
    with np.errstate(divide="ignore", invalid="ignore"):
        df = variance**2 / (between_seeds**2 / (seeds - 1) + between_subjects**2 / max(subjects - 1, 1))
    return Effect(scores.mean((-1, -2)), np.sqrt(variance), np.where(variance > 0, df, seeds - 1))


@dataclass(frozen=True)
class Part:
    """One comparison of a claim.

    Attributes:
        holds, fails: p-values of the evidence for and against it.
        estimate, low, high: what was compared with the margin, and its 95 % interval.
        smallest: the smallest distance from the margin that would have been seen, in the score's unit.
        label: what was compared, where a claim has several parts.
    """

    holds: Array
    fails: Array
    estimate: Array
    low: Array
    high: Array
    smallest: Array
    label: str = ""


def _part(scores: Array, bound: float, label: str = "") -> Part:
    """The mean exceeds `bound`."""
    found = _effect(scores)
    return Part(found.above(bound), found.below(bound), found.mean, *found.interval(), found.smallest(), label)


def _effect(scores: Array) -> Effect:
    if scores.shape[-2] < SEEDS:
        raise ValueError(f"A verdict needs at least {SEEDS} seeds, not {scores.shape[-2]}: measure more.")
    return effect(scores)


def superiority(difference: Array, margin: float) -> list[Part]:
    """The difference exceeds `margin`."""
    return [_part(difference, margin)]


def noninferiority(difference: Array, margin: float) -> list[Part]:
    """The difference is not below `-margin`."""
    return [_part(difference, -margin)]


def threshold(scores: Array, margin: float) -> list[Part]:
    """The score itself exceeds `margin`."""
    return [_part(scores, margin)]


def equivalence(difference: Array, margin: float) -> list[Part]:
    """The difference lies within `margin` on either side of 0: two one-sided tests."""
    found = _effect(difference)
    holds = np.maximum(found.above(-margin), found.below(margin))
    fails = np.minimum(found.above(margin), found.below(-margin))
    return [Part(holds, fails, found.mean, *found.interval(), found.smallest())]


def interaction(here: Array, there: Array, margin: float) -> list[Part]:
    """The difference `here` exceeds the difference `there` by more than `margin`."""
    return [_part(here - there, margin)]


def trend(levels: Sequence[Array], margin: float) -> list[Part]:
    """From level to level no score falls by `margin` or more, and the last exceeds the first."""
    steps = enumerate(pairwise(levels), start=1)
    parts = [_part(after - before, -margin, f"level {number} to {number + 1}") for number, (before, after) in steps]
    return [*parts, _part(levels[-1] - levels[0], 0.0, "first to last level")]


def optimum(chosen: Array, others: Sequence[Array], margin: float) -> list[Part]:
    """The chosen level's regret, against any other level, is below `margin`.

    Each other level is compared by itself: the best of several noisy means, taken as the reference, would be too good.
    """
    return [_part(chosen - other, -margin, f"against level {i}") for i, other in enumerate(others, start=1)]


def ratio(sizes: Sequence[float], curve: Sequence[Array], reference: Array, size: float, margin: float) -> list[Part]:
    """The curve's method reaches, with over `margin` times fewer samples, what the reference scores with `size`.

    Decided by the curve's score at `size / margin` (interpolated over the logarithm of the size) minus the reference's.
    Where that size was not measured, the nearest measured one can decide in one direction only, learning curves being
    taken as rising. Estimate and interval are `size` over the size at which the curve crosses the reference; they are
    censored, 0 or infinite, where it stays below or above at every measured size.

    Args:
        sizes: the measured sizes, rising.
        curve: the method's scores at each of them.
    """
    at = np.log(np.asarray(sizes, dtype=np.float64))

    def gain(wanted: float) -> Array:
        right = int(np.clip(np.searchsorted(at, wanted), 1, len(at) - 1))
        share = (np.clip(wanted, at[0], at[-1]) - at[right - 1]) / (at[right] - at[right - 1])
        return (1 - share) * curve[right - 1] + share * curve[right] - reference

    wanted = np.log(size / margin)
    found = _effect(gain(wanted))
    holds = found.above(0.0) if wanted >= at[0] - 1e-9 else np.ones_like(found.mean)
    fails = found.below(0.0) if wanted <= at[-1] + 1e-9 else np.ones_like(found.mean)
    grid = np.linspace(at[-1], at[0], 401)  # samples saved, rising
    effects = [effect(gain(point)) for point in grid]
    saved = size / np.exp(grid)
    lows, highs = zip(*(one.interval() for one in effects), strict=True)
    return [
        Part(
            holds,
            fails,
            _crossing(np.stack([one.mean for one in effects]), saved),
            _crossing(np.stack(lows), saved),
            _crossing(np.stack(highs), saved),
            found.smallest(),
        )
    ]


def _crossing(gains: Array, saved: Array) -> Array:
    """The first `saved` at which the gain is no longer positive: 0 where it never was, infinite where it always is."""
    lost = gains <= 0
    first = np.where(lost.any(0), lost.argmax(0), len(saved) - 1)
    return np.where(lost[0], 0.0, np.where(lost.any(0), saved[first], np.inf))


def combine(parts: Sequence[Part]) -> tuple[Array, Array]:
    """p-values for and against a claim whose parts must all hold: the largest, and the smallest times their number."""
    holds = np.max([part.holds for part in parts], axis=0)
    fails = np.minimum(1.0, len(parts) * np.min([part.fails for part in parts], axis=0))
    return holds, fails


def two_sided(holds: ArrayLike, fails: ArrayLike) -> Array:
    """p-value of a decision in either direction."""
    return np.minimum(1.0, 2 * np.minimum(holds, fails))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of any false decision among all claims stays below the level."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running
    return adjusted
