"""Tasks: images, labels, splits and a card. `load_task` is the door; it imports no method and no generator of a method.

Two families: an *embedded* task is built from what an installed library ships; a *real* one is read from
`$SYNTHREPRO_DATA/<name>`, where somebody put a data set in its publisher's layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from synthrepro import paths
from synthrepro.data import brain_mni
from synthrepro.data.task import Card, Sample, Split, Task, fingerprint
from synthrepro.errors import UserError

__all__ = [
    "TASKS",
    "Card",
    "Entry",
    "Report",
    "Sample",
    "Split",
    "Task",
    "check_task",
    "fingerprint",
    "list_tasks",
    "load_task",
]


@dataclass(frozen=True)
class Entry:
    """What the registry knows of a task.

    Attributes:
        family: "embedded" or "real".
        options: a frozen pydantic model of the task's options and their defaults.
        load: (options, folder) -> task.
        files: folder -> the files it needs; the folder is `<root>/<name>`.
        check: reads and checks those files, raising `UserError` at the first that is wrong.
        card: what the task is.
    """

    family: Literal["embedded", "real"]
    options: type[BaseModel]
    load: Callable[[Any, Path], Task]
    files: Callable[[Path], list[Path]]
    check: Callable[[Path], object]
    card: Card


TASKS: dict[str, Entry] = {
    "brain-mni": Entry(
        "embedded", brain_mni.Options, brain_mni.load, brain_mni.files, brain_mni.read_template, brain_mni.CARD
    ),
}


@dataclass(frozen=True)
class Report:
    """Whether a task can be used here; printed, it says so in a few lines.

    Attributes:
        present, missing: files the task needs.
        problem: the first thing that is wrong, one sentence; None if nothing is.
    """

    name: str
    family: str
    present: tuple[Path, ...]
    missing: tuple[Path, ...]
    problem: str | None
    source: str
    licence: str

    def __str__(self) -> str:
        lines = [
            f"{self.name} ({self.family}): {self.problem or 'ready'}",
            *(f"  there:   {path}" for path in self.present),
            *(f"  missing: {path}" for path in self.missing),
            f"  from:    {self.source}",
            f"  licence: {self.licence}",
        ]
        return "\n".join(lines)


def load_task(name: str, root: Path | None = None, **options: Any) -> Task:
    """Load a task; a second call with the same arguments gives the same object, so do not write into its tensors.

    Args:
        name: key of `TASKS`.
        root: folder of the data sets, `paths.DATA` if not given.
        options: the task's own, see its `Options`.

    Raises:
        UserError: unknown task or option, an option out of range, or files that are missing or wrong.
    """
    entry = _entry(name)
    try:
        checked = entry.options(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(entry.options.model_fields)
            raise UserError(f"Task {name} has no option {option!r}; it has {known}.") from None
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"Task {name}, option {option!r}: {message}, not {problem['input']!r}.") from None
    return _load(name, checked, _folder(name, root))


@lru_cache(maxsize=8)
def _load(name: str, options: BaseModel, folder: Path) -> Task:
    return TASKS[name].load(options, folder)


def check_task(name: str, root: Path | None = None) -> Report:
    """Look at a task's files: what is there, what is missing, the first that is wrong, where to get them.

    Raises:
        UserError: unknown task.
    """
    entry, folder = _entry(name), _folder(name, root)
    files: list[Path] = []
    problem = None
    try:
        files = entry.files(folder)
        entry.check(folder)
    except UserError as error:
        problem = str(error)
    return Report(
        name,
        entry.family,
        tuple(path for path in files if path.is_file()),
        tuple(path for path in files if not path.is_file()),
        problem,
        entry.card.source,
        entry.card.licence,
    )


def list_tasks(root: Path | None = None) -> list[Report]:
    """A report on every task."""
    return [check_task(name, root) for name in TASKS]


def _entry(name: str) -> Entry:
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[name]


def _folder(name: str, root: Path | None) -> Path:
    return Path(paths.DATA if root is None else root) / name
