"""A book with a page missing, broken, or dependent on the network is found out."""

from pathlib import Path

import pytest

from tools import pages

GOOD = """<html><head><link rel="stylesheet" href="_static/book.css"><link rel="author" href="https://example.org">
<script src="_static/x.js"></script></head><body><img src="a.png" alt="a brain"><a href="https://doi.org/1">paper</a>
</body></html>"""


@pytest.fixture
def html(tmp_path: Path) -> Path:
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "book.css").write_text("a { background: url(local.png) }")
    (tmp_path / "index.html").write_text("")
    (tmp_path / "page.html").write_text(GOOD)
    return tmp_path


def test_a_good_page_has_no_problem_though_it_links_to_the_world(html: Path):
    assert pages.problems(html, ["page"]) == []


def test_a_page_may_show_markdown_as_code(html: Path):
    (html / "page.html").write_text(GOOD.replace("</body>", "<pre>| --- | --- |</pre></body>"))
    assert pages.problems(html, ["page"]) == []


def test_a_page_of_the_table_of_contents_that_was_not_rendered_is_named(html: Path):
    assert pages.problems(html, ["page", "other"]) == ["page other of the table of contents was not rendered"]


def test_a_book_without_its_first_page_is_not_a_book(html: Path):
    (html / "index.html").unlink()
    assert len(pages.problems(html, ["page"])) == 1


@pytest.mark.parametrize(
    ("addition", "complaint"),
    [
        ('<script src="https://cdn.example.org/x.js"></script>', "asks the network"),
        ('<script src="//cdn.example.org/x.js"></script>', "asks the network"),
        ('<link rel="stylesheet" href="https://example.org/x.css">', "asks the network"),
        ('<link rel="preconnect" href="https://fonts.example.org">', "asks the network"),
        ('<img src="https://example.org/badge.svg" alt="a badge">', "asks the network"),
        ('<iframe src="https://example.org"></iframe>', "asks the network"),
        ('<img src="b.png">', "no alternative text"),
        ('<img src="b.png" alt=" ">', "no alternative text"),
        ("<pre>Traceback (most recent call last)\nboom</pre>", "traceback"),
        ('<div class="output traceback highlight"></div>', "error"),
        ("<p>| a | b | | --- | --- | | 1 | 2 |</p>", "Markdown source"),
        ("<p>| a | b | | — | — | | 1 | 2 |</p>", "Markdown source"),
        ('<span class="problematic">:foo:</span>', "error"),
    ],
)
def test_what_a_page_must_not_hold_is_found(html: Path, addition: str, complaint: str):
    (html / "page.html").write_text(GOOD.replace("</body>", f"{addition}</body>"))
    (problem,) = pages.problems(html, ["page"])
    assert problem.startswith("page page: ")
    assert complaint in problem


@pytest.mark.parametrize("rule", ['@import "https://fonts.example.org/a.css";', "a { src: url(//example.org/f.woff) }"])
def test_a_style_sheet_that_asks_the_network_is_found(html: Path, rule: str):
    (html / "_static" / "book.css").write_text(rule)
    (problem,) = pages.problems(html, ["page"])
    assert "book.css" in problem


def test_the_table_of_contents_is_read_through_parts_chapters_and_sections(tmp_path: Path):
    toc = tmp_path / "_toc.yml"
    toc.write_text(
        "format: jb-book\nroot: a\nparts:\n- caption: P\n  chapters:\n"
        "  - file: b\n    sections:\n    - file: c\n  - file: d\n"
    )
    assert pages.pages_of_toc(toc) == ["a", "b", "c", "d"]
