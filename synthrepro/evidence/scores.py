"""From records to scores: which cells a claim or a table means, and what it reads from them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from synthrepro.evidence.records import Record
from synthrepro.evidence.verdicts import Array

Scalar = str | int | float
Fields = Mapping[str, Scalar]


def current(found: Iterable[Record]) -> list[Record]:
    """The records that share the newest one's configuration: what a profile says now, not what it said before."""
    found = list(found)
    newest = max(found, key=lambda record: record.provenance.started, default=None)
    return [record for record in found if newest and record.config_hash == newest.config_hash]


def field(record: Record, name: str) -> str | None:
    """A field of the record's cell as text, None where it has no such field."""
    value = {"method": record.cell.method, "task": record.cell.task, **record.cell.setting}.get(name)
    return None if value is None else str(value)


def agrees(record: Record, where: Fields) -> bool:
    """Whether the record's cell has these values; `split`, which is a matter of its cases, aside."""
    return all(field(record, name) == str(value) for name, value in where.items() if name != "split")


def scores(found: Iterable[Record], where: Fields, metric: str) -> dict[int, dict[str, float]]:
    """Seed -> subject -> score, for the cells that agree with `where`; a metric of the whole cell has subject "".

    Cases of one subject are averaged. A metric "a - b" is the difference of two.

    Raises:
        ValueError: a record lacks the metric or the split, or one seed has several such cells.
    """
    result: dict[int, dict[str, float]] = {}
    for record in found:
        if not agrees(record, where):
            continue
        name = f"{record.cell.key} of {record.experiment}"
        if record.cell.seed in result:
            raise ValueError(f"{name} is not its seed's only cell with {dict(where)}: name the field that differs.")
        cases = {"": [record.metrics]}
        if "split" in where:
            cases = {}
            for case in record.cases:
                if case.get("split") == where["split"]:
                    cases.setdefault(case["subject"], []).append(case)
        if not cases:
            raise ValueError(f"{name} has no case of split {where['split']!r}.")
        result[record.cell.seed] = {
            subject: float(np.mean([_number(values, metric, name) for values in several]))
            for subject, several in cases.items()
        }
    return result


def _number(values: Mapping[str, Any], metric: str, name: str) -> float:
    first, _, second = metric.partition(" - ")
    if second:
        return _number(values, first, name) - _number(values, second, name)
    if not isinstance(value := values.get(metric), int | float):
        raise ValueError(f"{name} has no number {metric!r}.")
    return float(value)


def paired(arms: Sequence[Mapping[int, Mapping[str, float]]]) -> list[Array]:
    """Arms as arrays (seeds, subjects), over the seeds that all of them have.

    Where the subjects are not the same throughout, they are part of what a seed redraws, and a seed counts by its mean.
    """
    seeds = sorted(set.intersection(*(set(arm) for arm in arms)))
    if not seeds:
        return [np.empty((0, 1)) for _ in arms]
    if len({frozenset(arm[seed]) for arm in arms for seed in seeds}) > 1:
        return [np.array([[np.mean([*arm[seed].values()])] for seed in seeds]) for arm in arms]
    subjects = sorted(arms[0][seeds[0]])
    return [np.array([[arm[seed][subject] for subject in subjects] for seed in seeds]) for arm in arms]
