"""From records to scores: which cells a claim or a table means, and what it reads from them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from synthrepro.errors import UserError
from synthrepro.evidence.records import Record
from synthrepro.evidence.verdicts import Array

Scalar = str | int | float
Fields = Mapping[str, Scalar]


def current(found: Iterable[Record]) -> list[Record]:
    """The records that share the newest one's configuration: what a profile says now, not what it said before."""
    found = list(found)
    newest = max(found, key=lambda record: record.provenance.started, default=None)
    return [record for record in found if newest and record.config_hash == newest.config_hash]


def field(record: Record, name: str) -> str:
    """A field of the record's cell as text, "" where it has no such field."""
    return str({"method": record.cell.method, "task": record.cell.task, **record.cell.setting}.get(name, ""))


def agrees(record: Record, where: Fields) -> bool:
    """Whether the record's cell has these values; `split`, which is a matter of its cases, aside."""
    return all(field(record, name) == str(value) for name, value in where.items() if name != "split")


def scores(found: Iterable[Record], where: Fields, metric: str) -> dict[int, dict[str, float]]:
    """Seed -> subject -> score, for the cells that agree with `where`; a metric of the whole cell has subject "".

    Cases of one subject are averaged, without those that have no score (such as a slice without any structure). A
    metric "a - b" is the difference of two.

    Raises:
        UserError: a record lacks the metric or the split, or one seed has several such cells.
    """
    result: dict[int, dict[str, float]] = {}
    for record in found:
        if not agrees(record, where):
            continue
        name = f"{record.cell.key} of {record.experiment}"
        if record.cell.seed in result:
            raise UserError(f"{name} is not its seed's only cell with {dict(where)}: name the field that differs.")
        if "split" not in where:
            result[record.cell.seed] = {"": _number(record.metrics, metric, name)}
            continue
        cases: dict[str, list[float]] = {}
        for case in record.cases:
            if case.get("split") == where["split"]:
                score = _number(case, metric, name)
                cases.setdefault(case["subject"], []).extend([score] if math.isfinite(score) else [])
        if not cases:
            raise UserError(f"{name} has no case of split {where['split']!r}.")
        result[record.cell.seed] = {
            subject: float(np.mean(several)) if several else math.nan for subject, several in cases.items()
        }
    return result


def _number(values: Mapping[str, Any], metric: str, name: str) -> float:
    first, _, second = metric.partition(" - ")
    if second:
        return _number(values, first, name) - _number(values, second, name)
    if not isinstance(value := values.get(metric), int | float):
        raise UserError(f"{name} has no number {metric!r}.")
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


def plain(value: Any) -> Any:
    """JSON values of a nest of dictionaries, lists, models and numbers: what is not finite is null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if isinstance(value, float | np.ndarray):
        return float(value) if math.isfinite(value) else None
    return value
