"""Put notebooks into the one form the repository keeps.

    python -m tools.notebooks [--check] [NOTEBOOK ...]

Outputs and execution counts stay, because readers look at them and nbval compares them. What only one machine or one
run knows goes: kernel names, editor state, papermill's times and paths, and the cell papermill injected. Without
names, every notebook in ``notebooks/`` is put right; with ``--check`` nothing is written and the exit status says
whether something would be.
"""

import argparse
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent

KEPT_IN_NOTEBOOK = {"mystnb"}
KEPT_IN_CELL = {"mystnb", "slideshow", "tags"}


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook (changed in place) without what belongs to one machine or one run.

    A run by papermill counts its injected cell too; where that cell goes, the counts behind it move up by one, so
    that a notebook copied from ``runs/`` is numbered as if it had been run by hand from top to bottom.
    """
    injected = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    notebook.cells = [cell for cell in notebook.cells if cell not in injected]
    missing = [cell.execution_count for cell in injected if cell.execution_count]

    kept = {key: value for key, value in notebook.metadata.items() if key in KEPT_IN_NOTEBOOK}
    notebook.metadata = nbformat.from_dict(
        kept
        | {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT_IN_CELL and v})
        if cell.cell_type == "code":
            _renumber(cell, missing)
    return notebook


def _renumber(cell: NotebookNode, missing: list[int]) -> None:
    if cell.execution_count:
        cell.execution_count -= sum(count < cell.execution_count for count in missing)
    for output in cell.outputs:
        if output.output_type == "execute_result":
            output.execution_count = cell.execution_count


def text(notebook: NotebookNode) -> str:
    """Return the notebook as the repository stores it."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Normalise or check the notebooks named, or all; return 1 where one differed under ``--check``."""
    parser = argparse.ArgumentParser(description="Put notebooks into the one form the repository keeps.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a notebook would change")
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all of notebooks/")
    options = parser.parse_args(arguments)

    differs = False
    for path in options.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb")):
        before = path.read_text(encoding="utf8")
        after = text(normalise(nbformat.reads(before, as_version=4)))
        if after != before:
            differs = True
            if options.check:
                print(f"{path} is not in the form the repository keeps: run  python -m tools.notebooks {path}")
            else:
                path.write_text(after, encoding="utf8")
                print(f"{path} brought into form")
    return int(options.check and differs)


if __name__ == "__main__":
    sys.exit(main())
