"""The one figure that a reader can move: executed pages leave it out, so it is tried here."""

import nbformat
import pytest
from ipywidgets import interactive

from synthrepro import paths

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ipywidgets outside of a notebook
def test_moving_a_slider_draws_the_valley_again(monkeypatch):
    notebook = nbformat.read(paths.NOTEBOOKS / "hypergradients-further.ipynb", as_version=4)
    page: dict = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(cell.source, page)
        if "move" in page:
            break
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gca().get_title()))
    widget = interactive(*page["move"].args, **page["move"].keywords)
    widget.update()
    steps, _ = widget.children[:2]
    steps.value = 16
    plt.close("all")
    assert drawn[0].startswith("4 steps: h = -")
    assert drawn[-1].startswith("16 steps: h = -")
