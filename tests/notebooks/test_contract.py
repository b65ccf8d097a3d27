"""Every chapter keeps the contract of ``tools.contract``, and the contract bites where it is broken."""

from collections import Counter
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode, v4

from tools import contract, notebooks

CHAPTERS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))

in_every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


@in_every_chapter
def test_the_chapter_keeps_the_contract(chapter: Path):
    notebook = nbformat.read(chapter, as_version=4)
    nbformat.validate(notebook)
    assert contract.violations(notebook, of_a_paper=contract.is_of_a_paper(chapter)) == []


@in_every_chapter
def test_the_chapter_is_stored_in_the_repositorys_form(chapter: Path):
    stored = chapter.read_text(encoding="utf8")
    assert notebooks.text(notebooks.normalise(nbformat.reads(stored, as_version=4))) == stored


def test_no_two_figures_of_the_book_share_a_name():
    names = Counter(name for path in CHAPTERS for name in contract.figure_names(nbformat.read(path, as_version=4)))
    assert names, "the book has no figure with a name"
    assert max(names.values()) == 1, names.most_common(3)


# ----- the contract itself, tried on a chapter that keeps it and on the same chapter broken in one place


def code(source: str, count: int, *outputs: NotebookNode, **metadata: object) -> NotebookNode:
    return v4.new_code_cell(source, execution_count=count, outputs=list(outputs), metadata=metadata)


def printed(text: str, name: str = "stdout") -> NotebookNode:
    return v4.new_output("stream", name=name, text=text)


def exercise(label: str) -> str:
    return (
        f"```{{exercise}} Try\n:label: {label}\n\nDo.\n```\n\n```{{solution}} {label}\n:class: dropdown\n\nDone.\n```"
    )


@pytest.fixture
def chapter() -> NotebookNode:
    """A chapter that keeps the contract."""
    cells = [v4.new_markdown_cell("# A title")]
    cells += [code('profile: str = "smoke"  # smoke | cpu | gpu | paper', 1, tags=["parameters"])]
    cells += [code(f"print({count})", count, printed(f"{count}\n")) for count in range(2, 10)]
    cells += [code("seconds\nassert seconds < 9", 10, printed("8.1\n"), tags=["nbval-ignore-output"])]
    picture = v4.new_output("display_data", data={"image/png": "iVBO", "text/plain": "<Figure size 640x480>"})
    described = {
        "image": {"alt": "A line that rises from the lower left to the upper right."},
        "figure": {"name": "fig-line", "caption": "A line."},
    }
    cells += [code("draw()", 11, picture, mystnb=described)]
    cells += [v4.new_markdown_cell("\n\n".join(exercise(label) for label in ("ex-a", "ex-b", "ex-c")))]
    return v4.new_notebook(cells=cells)


def test_a_good_chapter_has_no_violation(chapter: NotebookNode):
    assert contract.violations(chapter, of_a_paper=True) == []


def _uncounted(notebook: NotebookNode) -> None:
    notebook.cells[4].execution_count = None


def _out_of_order(notebook: NotebookNode) -> None:
    notebook.cells[4].execution_count = 40


def _silent(notebook: NotebookNode) -> None:
    notebook.cells[4].outputs = []


def _only_a_figures_name(notebook: NotebookNode) -> None:
    notebook.cells[4].outputs = [v4.new_output("display_data", data={"text/plain": "<Figure size 640x480>"})]


def _ignored_without_assert(notebook: NotebookNode) -> None:
    notebook.cells[10].source = "seconds  # assert seconds < 9"


def _skipped(notebook: NotebookNode) -> None:
    notebook.cells[10].metadata.tags = ["nbval-skip"]


def _skipped_by_comment(notebook: NotebookNode) -> None:
    notebook.cells[10].source += "\n# NBVAL_IGNORE_OUTPUT"


def _warning(notebook: NotebookNode) -> None:
    notebook.cells[4].outputs.append(printed("UserWarning: look", "stderr"))


def _widget(notebook: NotebookNode) -> None:
    notebook.cells[4].outputs = [v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}})]


def _path(notebook: NotebookNode) -> None:
    notebook.cells[4].outputs = [printed("saved to /home/jane/runs/x.json")]


def _no_alt(notebook: NotebookNode) -> None:
    notebook.cells[11].metadata.mystnb.image.alt = "a figure"


def _no_name(notebook: NotebookNode) -> None:
    del notebook.cells[11].metadata.mystnb.figure["name"]


def _no_title(notebook: NotebookNode) -> None:
    notebook.cells[0].source = "A title"


def _no_parameters(notebook: NotebookNode) -> None:
    notebook.cells[1].metadata.tags = []


def _other_profile(notebook: NotebookNode) -> None:
    notebook.cells[1].source = 'profile = "gpu"'


def _two_exercises(notebook: NotebookNode) -> None:
    notebook.cells[12].source = exercise("ex-a") + "\n\n" + exercise("ex-b")


def _unsolved(notebook: NotebookNode) -> None:
    notebook.cells[12].source = notebook.cells[12].source.replace("{solution} ex-b", "{solution} ex-a")


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (_uncounted, "execution counts"),
        (_out_of_order, "execution counts"),
        (_silent, "only 7 cells"),
        (_only_a_figures_name, "only 7 cells"),
        (_ignored_without_assert, "asserts nothing"),
        (_skipped, "keeps itself from nbval"),
        (_skipped_by_comment, "keeps itself from nbval"),
        (_warning, "an error or a warning"),
        (_widget, "without the network"),
        (_path, "path of the machine"),
        (_no_alt, "not described"),
        (_no_name, "no name"),
        (_no_title, "title"),
        (_no_parameters, "'parameters'"),
        (_other_profile, "smoke"),
        (_two_exercises, "too few"),
        (_unsolved, "ex-b has no solution"),
    ],
)
def test_a_broken_chapter_is_caught(chapter: NotebookNode, break_it, complaint: str):
    break_it(chapter)
    assert any(complaint in violation for violation in contract.violations(chapter, of_a_paper=True))


def test_only_chapters_on_papers_need_exercises(chapter: NotebookNode):
    del chapter.cells[12]
    assert contract.violations(chapter, of_a_paper=False) == []


# ----- the repository's form


def test_the_form_keeps_outputs_and_counts_and_drops_what_belongs_to_one_machine(chapter: NotebookNode):
    before = deepcopy(chapter)
    chapter.metadata = {"kernelspec": {"name": "conda-env-jane", "display_name": "x"}, "papermill": {"duration": 3.1}}
    for cell in chapter.cells:
        cell.metadata["papermill"] = {"start_time": "today"}
    notebooks.normalise(chapter)
    assert chapter.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert "papermill" not in notebooks.text(chapter)
    assert chapter.cells == before.cells
    once = notebooks.text(chapter)
    assert notebooks.text(notebooks.normalise(nbformat.reads(once, as_version=4))) == once


def test_the_cell_papermill_injected_goes_and_the_counts_close_up(chapter: NotebookNode):
    before = deepcopy(chapter)
    for cell in chapter.cells[2:12]:
        cell.execution_count += 1
    chapter.cells.insert(2, code('profile = "smoke"', 2, tags=["injected-parameters"]))
    assert notebooks.normalise(chapter).cells == before.cells


def test_checking_reports_a_notebook_out_of_form_and_leaves_it_alone(chapter: NotebookNode, tmp_path: Path, capsys):
    path = tmp_path / "chapter.ipynb"
    chapter.metadata["papermill"] = {"duration": 3.1}
    path.write_text(nbformat.writes(chapter), encoding="utf8")
    before = path.read_text(encoding="utf8")
    assert notebooks.main(["--check", str(path)]) == 1
    assert path.read_text(encoding="utf8") == before
    assert str(path) in capsys.readouterr().out
    assert notebooks.main([str(path)]) == 0
    assert notebooks.main(["--check", str(path)]) == 0
