"""The contract every chapter keeps, so that replaying it with nbval proves something and its page can be read by all.

nbval silently skips the comparison of a cell without an execution count, compares nothing in a cell told to ignore its
output, and never compares pictures. Hence: every cell has been run, in order; enough cells have text to compare; an
ignored output is still held to a range by an ``assert``; a picture is described in words.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

COMPARED_CELLS = 8  # at least, a chapter
EXERCISES = 3  # at least, a chapter on a paper
ALT_LENGTH = 30  # characters; less does not describe a figure

IGNORED = "nbval-ignore-output"
# Ways to keep a cell from nbval altogether, as tags or as comments.
EVASIONS = {"nbval-skip", "nbval-raises-exception", "raises-exception", "skip-execution"}
EVADING_COMMENT = re.compile(r"#\s*(?:NBVAL_\w+|PYTEST_VALIDATE_\w+)")

SHOWABLE = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png"}
PERSONAL = re.compile(r"/home/\w|/Users/\w|/root/|/tmp/|[A-Z]:\\\\?Users|site-packages")


def violations(notebook: NotebookNode, *, of_a_paper: bool) -> list[str]:
    """Return what in a chapter breaks the contract, one sentence each; an empty list is a chapter that keeps it.

    Args:
        notebook: the chapter, as stored.
        of_a_paper: whether the chapter reproduces a paper, and so needs exercises.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [*_form(notebook, code), *_replay(code), *_figures(code), *(_exercises(prose) if of_a_paper else ())]


def _form(notebook: NotebookNode, code: list[NotebookNode]) -> Iterator[str]:
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell is not Markdown that starts with the chapter's title, '# ...'"
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if not code or tagged != code[:1]:
        yield "the first code cell, and no other, must carry the tag 'parameters'"
    elif not re.search(r"^profile\b.*=\s*[\"']smoke[\"']", tagged[0].source, re.MULTILINE):
        yield "the 'parameters' cell does not set profile = \"smoke\""


def _replay(code: list[NotebookNode]) -> Iterator[str]:
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "the execution counts are not 1, 2, 3 ...: restart the kernel, run all cells and save"
    compared = [cell for cell in code if IGNORED not in cell.metadata.get("tags", []) and _text(cell)]
    if len(compared) < COMPARED_CELLS:
        yield f"only {len(compared)} cells show text that nbval compares; {COMPARED_CELLS} are the least"
    for cell in code:
        tags = set(cell.metadata.get("tags", []))
        start = cell.source.strip().splitlines()[0]
        if IGNORED in tags and not re.search(r"^\s*assert\b", cell.source, re.MULTILINE):
            yield f"cell '{start}' is tagged {IGNORED} but asserts nothing"
        if tags & EVASIONS or EVADING_COMMENT.search(cell.source):
            yield f"cell '{start}' keeps itself from nbval; only the tag {IGNORED} is allowed"
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                yield f"cell '{start}' shows an error or a warning"
            elif strange := set(output.get("data", {})) - SHOWABLE:
                yield f"cell '{start}' shows {', '.join(sorted(strange))}, which a page without the network cannot"
        if match := PERSONAL.search("\n".join([_text(cell), *_of_kind(cell, "text/html")])):
            yield f"cell '{start}' shows a path of the machine it ran on: {match.group()}"


def _figures(code: list[NotebookNode]) -> Iterator[str]:
    for cell in code:
        if not _of_kind(cell, "image/png"):
            continue
        start = cell.source.strip().splitlines()[0]
        shown = cell.metadata.get("mystnb", {})
        if len(shown.get("image", {}).get("alt", "")) < ALT_LENGTH:
            yield f"the figure of cell '{start}' is not described: metadata mystnb.image.alt"
        figure = shown.get("figure", {})
        if not figure.get("name") or not figure.get("caption"):
            yield f"the figure of cell '{start}' has no name or no caption: metadata mystnb.figure.name and .caption"


def _exercises(prose: str) -> Iterator[str]:
    labels = re.findall(r"\{exercise(?:-start)?\}[^\n]*\n(?:[^\n]*\n)*?\s*:label:\s*(\S+)", prose)
    solved = set(re.findall(r"\{solution(?:-start)?\}\s*(\S+)", prose))
    if len(labels) < EXERCISES:
        yield f"{len(labels)} exercises are too few; {EXERCISES} are the least"
    for label in labels:
        if label not in solved:
            yield f"exercise {label} has no solution"


def figure_names(notebook: NotebookNode) -> list[str]:
    """Return the names under which the book refers to the chapter's figures."""
    names = (cell.metadata.get("mystnb", {}).get("figure", {}).get("name") for cell in notebook.cells)
    return [name for name in names if name]


def is_of_a_paper(chapter: Path) -> bool:
    """Whether the chapter reproduces a paper: it does where the paper's own numbers are transcribed."""
    package = chapter.resolve().parent.parent / "synthrepro"
    return (package / "evidence" / "papers" / f"{chapter.stem}.yaml").is_file()


def _text(cell: NotebookNode) -> str:
    """What the cell prints or returns as text; what matplotlib calls its figures is no text."""
    printed = [output.text for output in cell.outputs if output.output_type == "stream"]
    shown = [text for text in _of_kind(cell, "text/plain") if not text.startswith("<Figure")]
    return "\n".join(printed + shown)


def _of_kind(cell: NotebookNode, mime: str) -> list[str]:
    return [output.data[mime] for output in cell.outputs if mime in output.get("data", {})]
