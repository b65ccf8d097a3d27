"""The papers' own numbers: `papers/<chapter>.yaml`, read into typed tables.

A number is transcribed once, keeps its source, and is marked where the source garbles it, contradicts itself or
disagrees with another source.
"""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from synthrepro import paths
from synthrepro.errors import UserError

Model = TypeVar("Model", bound=BaseModel)

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times faster, and not everywhere


class Data(BaseModel):
    """Base of what a YAML file holds: typed, frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Mark(Data):
    """A doubt about one value (`row` and `column`), or about a whole row (no `column`)."""

    row: str
    column: str | None = None
    note: str


class Table(Data):
    """One published table, or a part of one.

    `source` is a key of the paper's `sources`, `where` the place in it; `row` and `column` say what rows and columns
    are; `digits` is the least number of decimals printed, one for all columns or one each.
    """

    id: str
    title: str
    source: str
    where: str
    row: str
    column: str
    columns: list[str]
    rows: dict[str, list[float | str | None]]
    digits: int | list[int] = 3
    note: str = ""
    marks: list[Mark] = []

    @model_validator(mode="after")
    def _consistent(self) -> "Table":
        if isinstance(self.digits, list) and len(self.digits) != len(self.columns):
            raise ValueError(f"digits has {len(self.digits)} entries for {len(self.columns)} columns")
        for row, values in self.rows.items():
            if len(values) != len(self.columns):
                raise ValueError(f"row {row!r} has {len(values)} values for {len(self.columns)} columns")
        for mark in self.marks:
            if mark.row not in self.rows or (mark.column is not None and mark.column not in self.columns):
                raise ValueError(f"a mark names ({mark.row!r}, {mark.column!r}), which the table does not have")
        return self

    def value(self, row: str, column: str) -> float | str | None:
        """The published value, or None where the table has no such row or column."""
        if row not in self.rows or column not in self.columns:
            return None
        return self.rows[row][self.columns.index(column)]

    def text(self, row: str, column: str) -> str:
        """The published value as it is printed: `digits` decimals or more, "–" where there is none."""
        value = self.value(row, column)
        if not isinstance(value, float):
            return value or "–"
        least = self.digits if isinstance(self.digits, int) else self.digits[self.columns.index(column)]
        return f"{value:.{max(least, len(repr(value).partition('.')[2]))}f}"

    def notes(self, row: str, column: str) -> list[str]:
        """What is doubtful about the value: the marks on it and on its row."""
        return [mark.note for mark in self.marks if mark.row == row and mark.column in (None, column)]


class NotTested(Data):
    """What the paper has and this project does not, with the reason."""

    what: str
    why: str


class Paper(Data):
    """One paper: what it is, where its numbers come from, its tables, and what is left untested."""

    title: str
    authors: str
    venue: str
    arxiv: str
    code: str
    sources: dict[str, str]
    tables: list[Table]
    not_tested: list[NotTested]

    @model_validator(mode="after")
    def _consistent(self) -> "Paper":
        ids = [table.id for table in self.tables]
        for table in self.tables:
            if table.source not in self.sources:
                raise ValueError(f"table {table.id!r} names source {table.source!r}, which sources does not have")
            if ids.count(table.id) > 1:
                raise ValueError(f"table {table.id!r} stands twice")
        return self

    def table(self, id: str) -> Table:
        """One of the tables.

        Raises:
            UserError: there is none of that name; the sentence lists those there are.
        """
        tables = {table.id: table for table in self.tables}
        if id not in tables:
            raise UserError(f"{self.title!r} has no table {id!r}: choose one of {', '.join(tables)}.")
        return tables[id]

    def source(self, table: Table) -> str:
        """Where a reader looks a table up, as one phrase."""
        return f"{self.sources[table.source]}, {table.where}"


def load(path: Path, model: type[Model]) -> Model:
    """Read a YAML file into a typed model.

    Raises:
        UserError: there is no such file, or it is no YAML or does not fit the model; the sentence names file and place.
    """
    shown = path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path
    if not path.is_file():
        found = ", ".join(chapters(path.parent)) or "none yet"
        raise UserError(f"There is no {shown}: write it, or name a chapter that has one ({found}).")
    try:
        return model.model_validate(yaml.load(path.read_text(encoding="utf-8"), _LOADER))
    except yaml.YAMLError as error:
        raise UserError(f"{shown} is no valid YAML: {' '.join(str(error).split())}.") from None
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"]) or "its top"
        raise UserError(f"{shown} is wrong at {place}: {fault['msg'].removeprefix('Value error, ')}.") from None


def chapters(folder: Path) -> list[str]:
    """Names of the chapters that have a file in a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def paper(chapter: str) -> Paper:
    """The paper of a chapter.

    Raises:
        UserError: the chapter's file is missing or faulty (one sentence).
    """
    return load(paths.PACKAGE / "evidence" / "papers" / f"{chapter}.yaml", Paper)


def table(chapter: str, id: str) -> Table:
    """One published table of a chapter's paper; errors as for `paper` and `Paper.table`."""
    return paper(chapter).table(id)
