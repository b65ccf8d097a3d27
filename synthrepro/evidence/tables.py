"""The paper's values beside ours: a table of an experiment, drawn from whatever records there are.

Which cells make the rows, which metrics the columns, and where the paper's value stands is data: `tables` in
`claims/<chapter>.yaml`. Intervals are 95 % over seeds, and over subjects for a score of cases (see `verdicts`).
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from synthrepro.errors import UserError
from synthrepro.evidence import papers, verdicts
from synthrepro.evidence.claims import PROFILES, Column, Place, TableSpec, claims_file, load_claims
from synthrepro.evidence.experiments import load_chapter
from synthrepro.evidence.records import Record
from synthrepro.evidence.records import records as stored_records
from synthrepro.evidence.scores import Scalar, agrees, current, field, paired, plain, scores


@dataclass(frozen=True)
class Quote:
    """A value of the paper as printed, "–" where it has none, and what is doubtful about it."""

    text: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """One entry: what the paper has, and our mean with its interval.

    `mean` is None where nothing is measured, `low` and `high` with fewer than two seeds.
    """

    paper: tuple[Quote, ...]
    mean: float | None
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Row:
    """One row: the fields that name it, a value a metric, and what they stand on.

    Attributes:
        seeds: how many were measured.
        stale: how many of these with code that has changed since.
        devices: where they were measured.
    """

    fields: dict[str, str]
    values: tuple[Value, ...]
    seeds: int
    stale: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table of one experiment at one profile.

    Attributes:
        columns: its metrics.
        seeds: how many different seeds any of its rows has, at least 1.
        sources: where the paper's values stand, one phrase a table of the paper.
    """

    id: str
    title: str
    chapter: str
    experiment: str
    profile: str | None
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    seeds: int
    sources: tuple[str, ...]

    @property
    def missing(self) -> int:
        """How many of its cells, a row at a seed, are not measured."""
        return sum(self.seeds - row.seeds for row in self.rows)

    def _repr_markdown_(self) -> str:
        """Notebooks show a table as Markdown."""
        return markdown(self)


def tables(
    chapter: str, experiment: str, records: Sequence[Record] | None = None, profile: str | None = None
) -> list[Table]:
    """The tables of an experiment, at any moment: what is not measured yet is left open and counted.

    Args:
        records: what to draw from; the stored ones unless given.
        profile: the strongest of `paper`, `gpu`, `cpu`, `smoke` that has records unless given.

    Raises:
        UserError: unknown chapter or experiment, or a faulty file of claims or of the paper's numbers.
    """
    found = list(stored_records(chapter, experiment) if records is None else records)
    if profile is None:
        have = {record.profile for record in found}
        profile = next((name for name in (*PROFILES, "smoke") if name in have), None)
    usable = current(record for record in found if record.profile == profile)
    specs = load_claims(chapter).tables.get(experiment, []) if claims_file(chapter).is_file() else []
    if not (specs or found) and experiment not in (known := load_chapter(chapter)):
        raise UserError(f"Chapter {chapter!r} has no experiment {experiment!r}; it has {', '.join(known)}.")
    drawn = [_draw(chapter, experiment, profile, spec, usable) for spec in specs or [_default(experiment, usable)]]
    if not specs:  # only the records say which rows are wanted
        drawn = [replace(table, rows=tuple(row for row in table.rows if row.seeds)) for table in drawn]
    return drawn


def _default(experiment: str, found: Sequence[Record]) -> TableSpec:
    """A table for an experiment that has none of its own: all fields of its cells, all numbers they have."""
    names = ["method", "task", *sorted({name for record in found for name in record.cell.setting})]
    values: dict[str, list[Scalar]] = {
        name: [*dict.fromkeys(field(record, name) for record in found)] for name in names
    }
    metrics = dict.fromkeys(
        name for record in found for name, value in record.metrics.items() if isinstance(value, int | float)
    )
    columns = [Column(metric=name, label=name) for name in metrics]
    return TableSpec(id=experiment, title=experiment.replace("_", " "), rows=values, metrics=columns)


def _draw(chapter: str, experiment: str, profile: str | None, spec: TableSpec, found: Sequence[Record]) -> Table:
    named = dict.fromkeys(place.table for column in spec.metrics for place in column.places)
    published = papers.paper(chapter) if named else None
    rows = []
    for values in product(*spec.rows.values()):
        fields = dict(zip(spec.rows, (str(value) for value in values), strict=True))
        here = [record for record in found if agrees(record, {**spec.where, **fields})]
        names = {name: spec.names.get(value, value) for name, value in fields.items()}
        drawn = [
            _value(column, here, [_quote(published, place, names) for place in column.places if published])
            for column in spec.metrics
        ]
        stale = sum(record.stale for record in here)
        devices = sorted({record.provenance.device for record in here})
        rows.append(Row(fields, tuple(drawn), len({record.cell.seed for record in here}), stale, tuple(devices)))
    seeds = max(1, len({record.cell.seed for record in found}))
    return Table(
        spec.id,
        spec.title,
        chapter,
        experiment,
        profile,
        tuple(spec.metrics),
        tuple(rows),
        seeds,
        tuple(_source(published, name) for name in named if published),
    )


def _quote(published: papers.Paper, place: Place, names: dict[str, str]) -> Quote:
    table = published.table(place.table)
    row, column = place.row.format(**names), place.column.format(**names)
    return Quote(table.text(row, column), tuple(table.notes(row, column)))


def _source(published: papers.Paper, id: str) -> str:
    table = published.table(id)
    return published.source(table) + (f" ({table.note.rstrip('.')})" if table.note else "")


def _value(column: Column, found: Sequence[Record], quotes: Sequence[Quote]) -> Value:
    has = [record for record in found if column.split or column.metric.partition(" - ")[0] in record.metrics]
    array = paired([scores(has, {"split": column.split} if column.split else {}, column.metric)])[0]
    mean = low = high = None
    if len(array):
        mean = float(array.mean())
    if len(array) > 1:
        low, high = (float(end) for end in verdicts.effect(array).interval())
    return Value(tuple(quotes), mean, low, high, len(array))


def render(chapter: str, experiment: str, format: str = "md", profile: str | None = None) -> str:
    """The tables of an experiment as text.

    Args:
        format: "md", "csv" (one line an entry) or "json".

    Raises:
        UserError: as `tables`, or an unknown format.
    """
    drawn = tables(chapter, experiment, profile=profile)
    if format == "md":
        return "\n".join(markdown(table) for table in drawn)
    if format == "csv":
        return _csv(drawn)
    if format == "json":
        return json.dumps(plain([asdict(table) | {"missing": table.missing} for table in drawn]), ensure_ascii=False)
    raise UserError(f"There is no format {format!r} for tables: choose md, csv or json.")


def markdown(table: Table) -> str:
    """A table as Markdown: for each metric the paper's values and ours [95 % interval]; sources and doubts below."""
    if not table.rows:
        return f"**{table.title}**\n\nNothing is measured yet.\n"
    notes: dict[str, int] = {}
    head = [*table.rows[0].fields]
    for column in table.columns:
        head += [f"{column.label}, paper{f' ({place.label})' if place.label else ''}" for place in column.places]
        head += [f"{column.label}{', ours' if column.places else ''} [95 %]"]
    head += ["seeds", "device", "code"]
    lines = [_line(head), "| --- " * len(head) + "|"]
    for row in table.rows:
        cells = [*row.fields.values()]
        for value, column in zip(row.values, table.columns, strict=True):
            cells += [_marked(quote, notes) for quote in value.paper]
            cells.append(_ours(value, column.digits))
        code = "–" if not row.seeds else f"{row.stale} stale" if row.stale else "fresh"
        lines.append(_line([*cells, str(row.seeds), ", ".join(row.devices) or "–", code]))
    below = [f"Profile {table.profile or '–'}; {table.missing} of {table.seeds * len(table.rows)} cells not measured."]
    below += ["A smoke run shows that the code runs; no claim rests on it."] * (table.profile == "smoke")
    below += [f"Paper: {source}." for source in table.sources]
    below += [f"{_raised(number)} {note}" for note, number in notes.items()]
    return "\n".join([f"**{table.title}**", "", *lines, "", *(f"- {line}" for line in below)]) + "\n"


def published(chapter: str, id: str) -> str:
    """A table of the paper alone, as Markdown, with its source and doubts: for what has no experiment of ours.

    Raises:
        UserError: unknown chapter or table.
    """
    paper = papers.paper(chapter)
    table = paper.table(id)
    notes: dict[str, int] = {}
    lines = [_line([table.row, *table.columns]), "| --- " * (1 + len(table.columns)) + "|"]
    for row in table.rows:
        quotes = [Quote(table.text(row, column), tuple(table.notes(row, column))) for column in table.columns]
        lines.append(_line([row, *(_marked(quote, notes) for quote in quotes)]))
    below = [f"Paper: {_source(paper, id)}.", *(f"{_raised(number)} {note}" for note, number in notes.items())]
    return "\n".join([f"**{table.title}**", "", *lines, "", *(f"- {line}" for line in below)]) + "\n"


def _marked(quote: Quote, notes: dict[str, int]) -> str:
    """The value and the numbers of its notes, which `notes` collects."""
    return " ".join([quote.text, *(_raised(notes.setdefault(note, len(notes) + 1)) for note in quote.notes)])


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _ours(value: Value, digits: int) -> str:
    if value.mean is None:
        return "–"
    interval = "" if value.low is None else f" [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return f"{value.mean:.{digits}f}{interval}"


def _csv(drawn: Sequence[Table]) -> str:
    """One line an entry, so that tables with other rows still share the columns; papers' values joined by spaces."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "metric", "paper", "mean", "low", "high", "seeds", "profile", "device", "stale"])
    for table in drawn:
        for row in table.rows:
            name = ", ".join(f"{key} {value}" for key, value in row.fields.items())
            for column, value in zip(table.columns, row.values, strict=True):
                ours = ["" if number is None else number for number in (value.mean, value.low, value.high)]
                quotes = " ".join(quote.text for quote in value.paper if quote.text != "–")
                about = [value.seeds, table.profile or "", ", ".join(row.devices), row.stale]
                writer.writerow([table.id, name, column.label, quotes, *ours, *about])
    return file.getvalue()
