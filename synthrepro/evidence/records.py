"""Records: what was measured, how, and from what. One JSON object a cell, kept in two places.

`runs/<chapter>/<experiment>/<key>.json` is written by `measure` and ignored by git; `publish` folds those files into
`book/records/<chapter>/<experiment>.jsonl`, which is committed.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from synthrepro import paths
from synthrepro.errors import UserError
from synthrepro.evidence import files
from synthrepro.evidence.experiments import Cell, chapters
from synthrepro.evidence.fingerprint import fingerprint


@dataclass(frozen=True)
class Provenance:
    """Where a record comes from.

    Attributes:
        commit: of the checkout, None outside git.
        dirty: whether the package differed from that commit, None outside git.
        code: fingerprint of the code, see `fingerprint`.
        data: task name -> hash of the samples, of every task that the cell passed through `Context.data`.
        python, torch, cuda: versions; cuda is None for a torch without it.
        device: name of the GPU or of the processor.
        seconds: wall-clock time, that of interrupted attempts up to their last checkpoint included.
        peak_memory: MB, of the GPU where one was used, else of the process.
        started: UTC, ISO 8601.
        same_as: other codes that gave this very cell the same numbers, digit for digit, when it was measured with them.
    """

    commit: str | None
    dirty: bool | None
    code: str
    data: dict[str, str]
    python: str
    torch: str | None
    cuda: str | None
    device: str
    seconds: float
    peak_memory: float
    started: str
    same_as: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """One measured cell.

    Attributes:
        config: the resolved configuration, without the fields that only list cells.
        metrics: name -> number or list of numbers; NaN where a number was not finite.
        cases: one dictionary a test case; NaN likewise.
        artefacts: `<name>-<hash>` of each artefact the cell used.
        stale: whether the code has changed since in a way that may matter; computed when read, not stored.
    """

    chapter: str
    experiment: str
    profile: str
    cell: Cell
    config: dict[str, Any]
    config_hash: str
    metrics: dict[str, Any]
    cases: list[dict[str, Any]]
    artefacts: list[str]
    provenance: Provenance
    stale: bool = False

    @property
    def key(self) -> str:
        """Identity of what was measured: records with one key are attempts at one number."""
        return record_key(self.chapter, self.experiment, self.profile, self.cell, self.config)


def record_key(chapter: str, experiment: str, profile: str, cell: Cell, config: dict[str, Any]) -> str:
    """File name without its ending: readable up front, unique by the hash at its end."""
    identity = files.digest([chapter, experiment, profile, asdict(cell), config])
    return f"{cell.key[:120]}.{profile}.{identity[:12]}"


def to_json(record: Record) -> str:
    """One line of standard JSON, the same for equal records."""
    content = _without_nan(asdict(record))
    del content["stale"]
    if not record.provenance.same_as:  # so that older lines stay as they are
        del content["provenance"]["same_as"]
    return json.dumps(content, sort_keys=True, allow_nan=False)


def from_json(text: str) -> Record:
    """Inverse of `to_json`.

    Raises:
        ValueError: not a whole record.
    """
    record = _adapter().validate_json(text)
    return replace(record, metrics=_with_nan(record.metrics), cases=_with_nan(record.cases))


@cache
def _adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


def _without_nan(value: Any) -> Any:
    """Plain JSON values: arrays, tensors and their scalars as lists and numbers, non-finite numbers as null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def code_of(chapter: str, name: str, task: str | None = None) -> str:
    """The code fingerprint of an experiment on a task, or of a function, of a chapter as the sources now stand."""
    return fingerprint(f"synthrepro.methods.{chapter}", paths.PACKAGE, name, task)


def read(path: Path, code: Callable[[str], str]) -> Record | None:
    """The record of a file of `runs/`, stale if not of its task's code; None if there is none, or no whole one."""
    try:
        record = from_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        warnings.warn(f"{path} is no whole record and is left out; delete it.", stacklevel=2)
        return None
    return replace(record, stale=record.provenance.code != code(record.cell.task))


def records(chapter: str, experiment: str, profile: str | None = None) -> list[Record]:
    """Measured and committed records of an experiment, sorted, one a key: the newest of those that are not stale.

    A record of older code is not stale if one of its siblings (the same cell and data, another seed) was measured with
    both codes and came out the same, digit for digit: then the change does not matter to it. So after a change that
    should change nothing, `measure --stale --seeds 0` and `publish` are enough to show it, in every setting.
    Where all of a key are stale, the committed one stands. A file in `runs/` that is no whole record is left out
    with a warning.

    Raises:
        UserError: unknown chapter, or a line of the committed file that is no record.
    """
    if chapter not in (known := chapters()):
        raise UserError(f"There is no chapter {chapter!r}; the chapters are {', '.join(known) or 'none yet'}.")
    code = cache(lambda task: code_of(chapter, experiment, task))
    measured = (read(path, code) for path in sorted((paths.RUNS / chapter / experiment).glob("*.json")))
    best: dict[str, Record] = {}
    for record in [*_committed(_published(chapter, experiment), code), *filter(None, measured)]:
        other = best.get(record.key)
        newer = other is None or other.stale or other.provenance.started < record.provenance.started
        if other is None or (newer and not record.stale):
            best[record.key] = record
    chosen = _confirmed(list(best.values()))
    return sorted((record for record in chosen if profile in (None, record.profile)), key=_order)


def _confirmed(found: list[Record]) -> list[Record]:
    """The same records, those of older code no longer stale where a sibling vouches for that code."""

    def family(record: Record) -> str:
        cell = record.cell
        same = [record.profile, cell.method, cell.task, dict(cell.setting), record.config_hash, record.provenance.data]
        return files.digest(same)

    vouched: dict[str, set[str]] = {}
    for record in found:
        if not record.stale:
            vouched.setdefault(family(record), set()).update(record.provenance.same_as)
    return [
        replace(record, stale=False) if record.provenance.code in vouched.get(family(record), ()) else record
        for record in found
    ]


def _remember(record: Record, before: Record | None) -> Record:
    """The record, with the codes that gave the same numbers before it."""
    if before is None or _numbers(before) != _numbers(record):
        return record
    known = {*before.provenance.same_as, *record.provenance.same_as, before.provenance.code}
    same = sorted(known - {record.provenance.code})
    return replace(record, provenance=replace(record.provenance, same_as=same))


def _numbers(record: Record) -> str:
    return json.dumps(_without_nan([record.metrics, record.cases]), sort_keys=True)


def publish() -> dict[Path, int]:
    """Fold `runs/` into `book/records/`: file -> number of its lines, for the files that have changed.

    One line a record, chosen and sorted as `records` does. `smoke` records are not published: they are no evidence.
    """
    changed = {}
    with files.lock(paths.RUNS / "publish.lock", wait=True):
        for chapter in chapters():
            for folder in sorted(path for path in (paths.RUNS / chapter).glob("*/") if any(path.glob("*.json"))):
                path = _published(chapter, folder.name)
                before = {record.key: record for record in _committed(path, lambda task: "")}
                kept = [record for record in records(chapter, folder.name) if record.profile != "smoke"]
                text = "".join(to_json(_remember(record, before.get(record.key))) + "\n" for record in kept)
                if text != (path.read_text() if path.exists() else ""):
                    files.write(path, lambda temporary, text=text: temporary.write_text(text))  # type: ignore[misc]
                    changed[path] = len(kept)
    return changed


def _published(chapter: str, experiment: str) -> Path:
    return paths.RECORDS / chapter / f"{experiment}.jsonl"


def _order(record: Record) -> Any:
    cell = record.cell
    return record.profile, cell.method, cell.task, [(k, str(v)) for k, v in cell.setting.items()], cell.seed, record.key


def _committed(path: Path, code: Callable[[str], str]) -> list[Record]:
    found = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            found.append(from_json(line))
        except ValueError:
            raise UserError(f"{path}, line {number}: not a record; restore the committed file.") from None
    return [replace(record, stale=record.provenance.code != code(record.cell.task)) for record in found]
