"""Tasks: images, labels, splits and a card. `load_task` is the door; it imports no method and no generator of a method.

Two families: an *embedded* task is built from what an installed library ships; a *real* one is read from
`$SYNTHREPRO_DATA/<name>`, where somebody put a data set in its publisher's layout.
"""

import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from synthrepro import paths
from synthrepro.data.task import Card, Sample, Split, Task, fingerprint
from synthrepro.errors import UserError

__all__ = ["TASKS", "Card", "Report", "Sample", "Split", "Task", "check_task", "fingerprint", "list_tasks", "load_task"]

# A task is a module here named like it, with underscores for hyphens, that holds
#   FAMILY   "embedded" or "real"
#   Options  a frozen pydantic model of the task's options and their defaults
#   load     (options, folder) -> Task; the folder is `<root>/<name>`
#   files    folder -> the files it needs
#   check    folder -> reads and checks those files, raising UserError at the first that is wrong
#   CARD     what the task is
# It is imported by name when asked for, so that neither a process nor a record's code fingerprint carries the readers
# of tasks it does not use.
_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
TASKS = tuple(path.stem.replace("_", "-") for path in _SOURCES if "\nFAMILY = " in path.read_text(encoding="utf-8"))


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
            *_few("there:  ", self.present),
            *_few("missing:", self.missing),
            f"  from:    {self.source}",
            f"  licence: {self.licence}",
        ]
        return "\n".join(lines)


def _few(what: str, paths: tuple[Path, ...], most: int = 4) -> list[str]:
    """A line a file; of many the first ones, and how many more there are."""
    lines = [f"  {what} {path}" for path in paths[:most]]
    return lines + [f"  {what} and {len(paths) - most} more"] * (len(paths) > most)


def load_task(name: str, root: Path | None = None, **options: Any) -> Task:
    """Load a task; a second call with the same arguments gives the same object, so do not write into its tensors.

    Args:
        name: key of `TASKS`.
        root: folder of the data sets, `paths.DATA` if not given.
        options: the task's own, see its `Options`.

    Raises:
        UserError: unknown task or option, an option out of range, or files that are missing or wrong.
    """
    reader = _reader(name)
    try:
        checked = reader.Options(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(reader.Options.model_fields)
            raise UserError(f"Task {name} has no option {option!r}; it has {known}.") from None
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"Task {name}, option {option!r}: {message}, not {problem['input']!r}.") from None
    return _load(name, checked, _folder(name, root))


@lru_cache(maxsize=8)
def _load(name: str, options: BaseModel, folder: Path) -> Task:
    task: Task = _reader(name).load(options, folder)
    return task


def check_task(name: str, root: Path | None = None) -> Report:
    """Look at a task's files: what is there, what is missing, the first that is wrong, where to get them.

    Raises:
        UserError: unknown task.
    """
    reader, folder = _reader(name), _folder(name, root)
    files: list[Path] = []
    problem = None
    try:
        files = reader.files(folder)
        reader.check(folder)
    except UserError as error:
        problem = str(error)
    return Report(
        name,
        reader.FAMILY,
        tuple(path for path in files if path.is_file()),
        tuple(path for path in files if not path.is_file()),
        problem,
        reader.CARD.source,
        reader.CARD.licence,
    )


def list_tasks(root: Path | None = None) -> list[Report]:
    """A report on every task."""
    return [check_task(name, root) for name in TASKS]


def _reader(name: str) -> ModuleType:
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    return importlib.import_module(f"synthrepro.data.{name.replace('-', '_')}")


def _folder(name: str, root: Path | None) -> Path:
    return Path(paths.DATA if root is None else root) / name
