import csv
import io
import json

import pytest

from synthrepro import paths
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Provenance, Record, tables, verdicts

PAPER = """
title: A toy
authors: A
venue: V
arxiv: "0"
code: none
sources: {paper: the paper}
tables:
  - id: main
    title: Main
    source: paper
    where: table 1
    row: method
    column: data
    columns: [x, y]
    rows: {New method: [0.900, 0.8], Old method: [0.7, null]}
    marks: [{row: Old method, column: x, note: Printed twice.}]
    note: One run each.
not_tested: []
"""
CLAIMS = """
tiers: {phantom: embedded}
claims: [{id: a, title: T, sentence: S, primary: true, not_tested: It is a toy.}]
tables:
  trial:
    - id: main
      title: Our main table
      where: {task: phantom}
      rows: {method: [new, old], noise: ["0", "0.1"]}
      names: {new: New method, old: Old method}
      metrics:
        - metric: dice
          label: Dice
          split: test
          paper:
            - {table: main, row: "{method}", column: x, label: x}
            - {table: main, row: "{method}", column: y, label: y}
        - {metric: sigma - preset, label: error, digits: 4}
"""


@pytest.fixture(autouse=True)
def house(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    for kind, text in (("papers", PAPER), ("claims", CLAIMS)):
        (tmp_path / "evidence" / kind).mkdir(parents=True)
        (tmp_path / "evidence" / kind / "toy.yaml").write_text(text)


def record(method, seed, noise="0", *, profile="gpu", stale=False, device="H200", config="0", started="1"):
    cases = [{"split": "test", "subject": s, "dice": 0.5 + 0.1 * seed + 0.01 * i} for i, s in enumerate("abc")]
    return Record(
        "toy",
        "trial",
        profile,
        Cell(method, "phantom", seed, {"noise": noise}),
        {},
        config,
        {"sigma": 0.11 + 0.001 * seed, "preset": 0.1, "trail": [1.0]},
        cases,
        [],
        Provenance(None, None, "", {}, "3", None, None, device, 1.0, 1.0, started),
        stale,
    )


def draw(*found, **more):
    return tables.tables("toy", "trial", [*found], **more)


def test_the_paper_stands_beside_our_mean_and_its_interval():
    found = [record("new", seed) for seed in range(3)]
    (table,) = draw(*found)
    row = table.rows[0]
    assert row.fields == {"method": "new", "noise": "0"}
    dice, error = row.values
    assert [quote.text for quote in dice.paper] == ["0.900", "0.800"]
    assert dice.mean == pytest.approx(0.61)
    scores = [[0.5 + 0.1 * seed + 0.01 * subject for subject in range(3)] for seed in range(3)]
    assert (dice.low, dice.high) == pytest.approx([float(end) for end in verdicts.effect(scores).interval()])
    assert (error.mean, error.paper, error.seeds) == (pytest.approx(0.011), (), 3)
    text = tables.markdown(table)
    assert "| method | noise | Dice, paper (x) | Dice, paper (y) | Dice, ours [95 %] | error [95 %] | seeds |" in text
    assert "| new | 0 | 0.900 | 0.800 | 0.610 [" in text
    assert "| 0.0110 [0.0085, 0.0135] | 3 | H200 | fresh |" in text
    assert "- Paper: the paper, table 1 (One run each)." in text
    assert table._repr_markdown_() == text


def test_a_table_can_be_drawn_at_any_moment_and_counts_what_is_missing():
    (empty,) = draw()
    assert [tuple(row.fields.values()) for row in empty.rows] == [
        ("new", "0"),
        ("new", "0.1"),
        ("old", "0"),
        ("old", "0.1"),
    ]
    assert "| new | 0 | 0.900 | 0.800 | – | – | 0 | – | – |" in tables.markdown(empty)
    (table,) = draw(record("new", 0), record("new", 1), record("old", 0, "0.1"))
    assert table.missing == 5
    assert "Profile gpu; 5 of 8 cells not measured." in tables.markdown(table)
    assert "| old | 0.1 | 0.700 ¹ | – | 0.510 | 0.0100 | 1 | H200 | fresh |" in tables.markdown(
        table
    )  # one seed: no interval
    assert "- ¹ Printed twice." in tables.markdown(table)


def test_the_strongest_profile_is_drawn_unless_another_is_asked_for():
    found = [record("new", 0), record("new", 0, profile="smoke", device="CPU")]
    assert draw(*found)[0].profile == "gpu"
    (smoke,) = draw(*found, profile="smoke")
    assert smoke.rows[0].devices == ("CPU",)
    assert "no claim rests on it" in tables.markdown(smoke)
    assert "no claim rests on it" not in tables.markdown(draw(*found)[0])


def test_stale_records_are_shown_as_such_and_those_of_another_configuration_not_at_all():
    text = tables.markdown(draw(record("new", 0, stale=True), record("new", 1))[0])
    assert "| 2 | H200 | 1 stale |" in text
    before = record("new", 0, config="before", started="0")
    assert draw(before, record("new", 1))[0].rows[0].seeds == 1


def test_tables_are_given_as_csv_and_json(monkeypatch):
    monkeypatch.setattr(tables, "stored_records", lambda chapter, experiment: [record("new", 0), record("new", 1)])
    lines = list(csv.DictReader(io.StringIO(tables.render("toy", "trial", "csv"))))
    assert len(lines) == 8
    assert (lines[0]["row"], lines[0]["paper"], lines[0]["seeds"]) == ("method new, noise 0", "0.900 0.800", "2")
    assert float(lines[0]["mean"]) == pytest.approx(0.56)
    assert lines[2]["mean"] == ""
    (table,) = json.loads(tables.render("toy", "trial", "json"))
    assert table["rows"][0]["values"][0]["mean"] == pytest.approx(0.56)
    assert table["rows"][1]["values"][0]["mean"] is None
    assert table["missing"] == 6
    assert table["columns"][1]["label"] == "error"
    with pytest.raises(UserError, match="no format 'html'"):
        tables.render("toy", "trial", "html")


def test_an_experiment_without_a_table_of_its_own_shows_all_it_has(house):
    for text in (CLAIMS.split("tables:")[0], None):
        path = paths.PACKAGE / "evidence" / "claims" / "toy.yaml"
        path.write_text(text) if text else path.unlink()
        (table,) = draw(record("new", 0), record("old", 0, "0.1"))
        assert [tuple(row.fields.values()) for row in table.rows] == [
            ("new", "phantom", "0"),
            ("old", "phantom", "0.1"),
        ]
        assert [column.label for column in table.columns] == ["sigma", "preset"]


def test_an_unknown_experiment_is_an_error_that_names_those_there_are(monkeypatch):
    monkeypatch.setattr(tables, "load_chapter", lambda chapter: {"trial": None, "other": None})
    with pytest.raises(UserError, match="no experiment 'trail'; it has trial, other"):
        tables.tables("toy", "trail", [])
    (table,) = tables.tables("toy", "other", [])
    assert "Nothing is measured yet." in tables.markdown(table)


def test_a_table_of_the_paper_can_stand_alone():
    text = tables.published("toy", "main")
    assert "| Old method | 0.700 ¹ | – |" in text
    assert "- Paper: the paper, table 1 (One run each)." in text
    assert "- ¹ Printed twice." in text
