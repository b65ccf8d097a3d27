from pathlib import Path

import pytest

from tools import picture


def test_the_readme_shows_the_figure_of_the_chapter_as_it_stands() -> None:
    found = picture.figure(picture.CHAPTER, picture.FIGURE)
    assert picture.PICTURE.read_bytes() == found, "run  python -m tools.picture"
    assert picture.PICTURE.relative_to(picture.ROOT).as_posix() in (picture.ROOT / "README.md").read_text()


def test_a_figure_that_is_not_there_is_named() -> None:
    with pytest.raises(SystemExit, match="shows no figure fig-nowhere"):
        picture.figure(Path(picture.CHAPTER), "fig-nowhere")
