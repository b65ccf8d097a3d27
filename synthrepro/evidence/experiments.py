"""What is measured: cells, the experiments that list them, and the chapters that hold the experiments."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from synthrepro import paths
from synthrepro.errors import UserError

if TYPE_CHECKING:
    from synthrepro.evidence.context import Context


class Config(BaseModel):
    """Base of every experiment's configuration: typed, frozen, and without unknown keys.

    A field that only says *which* cells there are (the seeds, a list of presets) is declared `Field(exclude=True)`:
    it is then no part of a record's configuration, so that a profile may gain a seed and keep its records.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Cell:
    """One cell of a table, measured once.

    Attributes:
        method: the arm; letters, digits, `-` and `_`.
        task: name of the task; the same letters.
        seed: redraws label subset, initialisation and generator; all arms share it.
        setting: what else tells this cell from the others, such as `{"noise": "0.05"}`.

    Raises:
        ValueError: a name with other letters, or a value that is neither text nor a number.
    """

    method: str
    task: str
    seed: int
    setting: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.method, self.task, *self.setting):
            if not re.fullmatch(r"[\w-]+", name, re.ASCII):
                raise ValueError(f"a cell's names are letters, digits, '-' and '_', not {name!r}")
        for name, value in self.setting.items():
            if not isinstance(value, str | int | float):
                raise ValueError(f"setting {name!r} of a cell is text or a number, not {value!r}")
        object.__setattr__(self, "setting", dict(sorted(self.setting.items())))

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> str:
        """Readable and safe as a file name: `fixed.brain-mni.noise=0.05.seed=0`."""
        setting = [f"{name}={quote(str(value), safe='+')}" for name, value in self.setting.items()]
        return ".".join([self.method, self.task, *setting, f"seed={self.seed}"])


@dataclass
class Result:
    """What a cell's function gives back.

    Attributes:
        metrics: name -> number, or list of numbers. A number that is not finite is stored as missing and read as NaN.
        cases: one dictionary a test case: `{"subject": ..., "split": ..., metric: value, ...}`.
    """

    metrics: dict[str, Any]
    cases: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """One table or figure of a paper.

    Attributes:
        name: its key in `EXPERIMENTS`, in profiles and in file names.
        title: one line.
        config: class of its configuration, a `Config`; its section of a profile is validated into it.
        cells: configuration -> cells in order of priority, all seeds of what decides the main claim first.
        run: measures one cell. It takes all randomness from the cell's seed and the configuration.
        steps: (cell, configuration) -> number of optimisation steps, for `--dry-run`.
        artefacts: name -> builder of what several cells share. `builder(spec, folder, context)` fills the empty
            `folder`; its `context` has a scratch folder of its own, where checkpoints survive until it is built.
        across_tasks: whether cells of several tasks share artefacts. Their addresses then leave out the code that reads
            a task, so a builder that reads one has the hash of its data in the spec.
    """

    name: str
    title: str
    config: type[BaseModel]
    cells: Callable[[Any], list[Cell]]
    run: Callable[[Cell, Any, "Context"], Result]
    steps: Callable[[Cell, Any], int]
    artefacts: Mapping[str, Callable[[dict[str, Any], Path, "Context"], None]] = field(default_factory=dict)
    across_tasks: bool = False


def chapters() -> dict[str, str]:
    """Name -> first line of the docstring of every module of `synthrepro.methods` that assigns `EXPERIMENTS`.

    Reads the sources and imports nothing, so that it costs no torch and one broken chapter does not hide the others.
    """
    folder = paths.PACKAGE / "methods"
    found = {}
    for module in pkgutil.iter_modules([str(folder)]):
        path = folder / module.name / "__init__.py" if module.ispkg else folder / f"{module.name}.py"
        title = _title(path.read_text(encoding="utf-8"))
        if title is not None:
            found[module.name] = title
    return found


@cache
def _title(source: str) -> str | None:
    """First line of a module's docstring, None for a module that is no chapter."""
    tree = ast.parse(source)
    return (ast.get_docstring(tree) or "").partition("\n")[0] if "EXPERIMENTS" in assigned_names(tree) else None


def assigned_names(tree: ast.Module) -> set[str]:
    """Names that a module's top level assigns."""
    targets = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign):
            targets.append(node.target)
    return {target.id for target in targets if isinstance(target, ast.Name)}


def load_chapter(chapter: str) -> dict[str, Experiment]:
    """The experiments of a chapter.

    Raises:
        UserError: no such chapter.
    """
    known = chapters()
    if chapter not in known:
        raise UserError(f"There is no chapter {chapter!r}; the chapters are {', '.join(known) or 'none yet'}.")
    experiments: dict[str, Experiment] = importlib.import_module(f"synthrepro.methods.{chapter}").EXPERIMENTS
    for name, experiment in experiments.items():
        if name != experiment.name:
            raise ValueError(f"EXPERIMENTS[{name!r}] of chapter {chapter} is named {experiment.name!r}")
    return experiments
