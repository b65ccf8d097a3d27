"""The builder stages what it should, writes under _build only, and says once what went wrong."""

import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from tools import book, browser


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one page and one chapter, in which the builder works."""
    (tmp_path / "book" / "records").mkdir(parents=True)
    (tmp_path / "book" / "index.md").write_text("# Book")
    (tmp_path / "book" / "records" / "x.jsonl").write_text("{}")
    (tmp_path / "_config.yml").write_text("title: Book")
    (tmp_path / "_toc.yml").write_text("root: book/index\nchapters:\n- file: notebooks/toy\n")
    (tmp_path / "notebooks").mkdir()
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("1")]), tmp_path / "notebooks" / "toy.ipynb")
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "BUILD", tmp_path / "_build")
    for name, folder in {"RUNS": "runs", "STAGE": "stage", "HTML": "html"}.items():
        monkeypatch.setattr(book, name, tmp_path / "_build" / folder)
    return tmp_path


def executed(project: Path) -> Path:
    """What papermill leaves of the chapter."""
    cells = [
        v4.new_code_cell('profile = "smoke"', execution_count=1, metadata={"tags": ["parameters"]}),
        v4.new_code_cell('profile = "smoke"', execution_count=2, metadata={"tags": ["injected-parameters"]}),
        v4.new_code_cell("1", execution_count=3, metadata={"papermill": {"duration": 3}}),
    ]
    path = project / "_build" / "runs" / "toy" / "toy-smoke.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata={"papermill": {"version": "2"}}), path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_staged_copy_has_pages_verdicts_and_the_chapter_as_executed(project: Path):
    before = {name: content for name, content in files(project).items() if not name.startswith("_build")}
    book.stage({"toy": executed(project)})
    staged = files(book.STAGE)
    assert staged.keys() == {
        "_config.yml",
        "_toc.yml",
        "book/index.md",
        "book/generated/claims.md",
        "notebooks/toy.ipynb",
    }
    assert b"not tested" in staged["book/generated/claims.md"]
    chapter = nbformat.reads(staged["notebooks/toy.ipynb"].decode(), as_version=4)
    assert [cell.execution_count for cell in chapter.cells] == [1, 2]
    assert b"papermill" not in staged["notebooks/toy.ipynb"]
    assert {name: content for name, content in files(project).items() if not name.startswith("_build")} == before


def test_staging_again_forgets_the_pages_of_before(project: Path):
    chapter = executed(project)
    book.stage({"toy": chapter})
    (book.STAGE / "book" / "old.md").write_text("# Old")
    book.stage({"toy": chapter})
    assert not (book.STAGE / "book" / "old.md").exists()


def test_a_chapter_that_fails_is_shown_once_and_nothing_is_rendered(project: Path, monkeypatch, capfd):
    traceback = "Traceback (most recent call last)\nZeroDivisionError"
    commands = []

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        commands.append(program)
        return subprocess.CompletedProcess([program], 1, stdout="", stderr=traceback)

    monkeypatch.setattr(book, "_run", run)
    assert book.main() == 1
    assert commands == ["papermill"]
    said = capfd.readouterr()
    assert (said.out + said.err).count("ZeroDivisionError") == 1
    assert "notebooks/toy.ipynb failed" in said.err


def test_chapters_with_experiments_run_as_a_reader_runs_them_and_other_pages_by_papermill(project: Path, monkeypatch):
    commands = []

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(book, "_run", run)
    executed = [book.execute(project / "notebooks" / f"{name}.ipynb") for name in ("learn2synth", "toy")]
    assert executed == [book.RUNS / name / f"{name}-smoke.ipynb" for name in ("learn2synth", "toy")]
    assert commands[0][:5] == ("synthrepro", "run", "learn2synth", "--profile", "smoke")
    assert commands[1][:6] == (
        "papermill",
        *map(str, (project / "notebooks" / "toy.ipynb", executed[1])),
        "-p",
        "profile",
        "smoke",
    )


def test_a_warning_of_jupyter_book_is_an_error(project: Path, monkeypatch):
    monkeypatch.setattr(
        book,
        "_run",
        lambda *command: subprocess.CompletedProcess(command, 1, stdout="", stderr="WARNING: no such label"),
    )
    with pytest.raises(book.Failure, match="no such label"):
        book.render()


def test_a_page_that_was_not_rendered_is_an_error(project: Path):
    book.HTML.mkdir(parents=True)
    (book.HTML / "index.html").write_text("")
    with pytest.raises(book.Failure, match="notebooks/toy"):
        book.check(["notebooks/toy"])


def test_what_the_browser_sees_is_an_error_and_its_absence_is_not(project: Path, monkeypatch, capsys):
    book.HTML.mkdir(parents=True)
    (book.HTML / "index.html").write_text("")
    monkeypatch.setattr(browser, "problems", lambda html, pages: ["page a: formulas are not typeset"])
    with pytest.raises(book.Failure, match="not typeset"):
        book.check([])

    def missing(html: Path, pages: list[str]) -> list[str]:
        raise browser.Unavailable("chromium is not installed")

    monkeypatch.setattr(browser, "problems", missing)
    book.check([])
    assert "not looked at in a browser: chromium is not installed" in capsys.readouterr().out
