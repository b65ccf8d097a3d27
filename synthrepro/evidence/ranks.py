"""Does one task predict another? The rank correlation of the arms' scores, with its interval."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from synthrepro.evidence.records import Record
from synthrepro.evidence.scores import paired, scores

DRAWS = 2000


@dataclass(frozen=True)
class Ranks:
    """Scores of the arms that two tasks share, and how well their orders agree.

    Attributes:
        arms: methods, best on the first task first.
        first, second: mean score of each arm on either task.
        rho: Spearman's rank correlation of the two.
        low, high: its 95 % bootstrap interval.
        seeds: of the first and of the second task, those that all arms have.
    """

    arms: tuple[str, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]
    rho: float
    low: float
    high: float
    seeds: tuple[int, int]


def rank_correlation(found: Iterable[Record], tasks: tuple[str, str], metric: str, split: str) -> Ranks | None:
    """Spearman's rank correlation of the arms between two tasks.

    The interval resamples seeds and subjects within each task, for all arms alike, since arms share them. The arms are
    what is compared and stay as they are: it says how surely these are ordered alike, not how others would be.

    Args:
        found: records of one experiment and profile.
        tasks: the two.
        metric, split: a score of the cases of a split.

    Returns:
        None where fewer than three arms share two seeds on both tasks.
    """
    records = list(found)
    per_task = [
        {arm: scores(records, {"method": arm, "task": task, "split": split}, metric) for arm in _arms(records)}
        for task in tasks
    ]
    arms = [arm for arm in _arms(records) if all(len(task[arm]) >= 2 for task in per_task)]
    if len(arms) < 3:
        return None
    tables = [np.stack(paired([task[arm] for arm in arms])) for task in per_task]  # (arms, seeds, subjects)
    if min(table.shape[1] for table in tables) < 2:
        return None
    means = [table.mean((1, 2)) for table in tables]
    rng = np.random.default_rng(0)
    drawn = [stats.spearmanr(*(_resampled(table, rng) for table in tables)).statistic for _ in range(DRAWS)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    order = np.argsort(-means[0])
    return Ranks(
        arms=tuple(arms[i] for i in order),
        first=tuple(means[0][order].tolist()),
        second=tuple(means[1][order].tolist()),
        rho=float(stats.spearmanr(*means).statistic),
        low=float(low),
        high=float(high),
        seeds=(tables[0].shape[1], tables[1].shape[1]),
    )


def _arms(records: list[Record]) -> list[str]:
    return sorted({record.cell.method for record in records})


def _resampled(table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of the arms over seeds and subjects drawn with replacement."""
    _, seeds, subjects = table.shape
    rows, columns = rng.integers(seeds, size=seeds), rng.integers(subjects, size=subjects)
    means: np.ndarray = table[:, rows][:, :, columns].mean((1, 2))
    return means
