"""What every rendered page must be: there, whole, readable without the network, and described for those who cannot see.

``problems(html, pages)`` returns one sentence for each thing wrong; ``tools.book`` fails the build on any.
"""

import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import yaml

EXTERNAL = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)
# Links of these kinds make the browser fetch something; the others (canonical, author, next ...) only say something.
FETCHED_LINKS = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "icon"}
CSS_EXTERNAL = re.compile(r"(?:url\(\s*|@import\s+)[\"']?(?:https?:)?//", re.IGNORECASE)
TRACEBACK = "Traceback (most recent call last)"
RAW_TABLE = re.compile(r"\|\s*(?:-{3,}|—)\s*\|")


def pages_of_toc(toc: Path) -> list[str]:
    """Return the pages a ``_toc.yml`` names, without suffix, in the order of the book."""

    def walk(entry: dict) -> Iterator[str]:
        for key in ("root", "file"):
            if key in entry:
                yield str(entry[key])
        for key in ("parts", "chapters", "sections", "entries", "subtrees"):
            for child in entry.get(key, []):
                yield from walk(child)

    return list(walk(yaml.safe_load(toc.read_text(encoding="utf8"))))


def problems(html: Path, pages: Iterable[str]) -> list[str]:
    """Return what is wrong with the book rendered in ``html``, one sentence each; an empty list is a good book.

    Args:
        html: folder of the rendered book.
        pages: the pages that must be there, without suffix, relative to ``html``.
    """
    found = []
    if not (html / "index.html").is_file():
        found.append(f"{html / 'index.html'} is missing")
    for page in pages:
        path = html / f"{page}.html"
        if not path.is_file():
            found.append(f"page {page} of the table of contents was not rendered")
            continue
        reader = _Reader()
        reader.feed(path.read_text(encoding="utf8"))
        found += [f"page {page}: {problem}" for problem in reader.problems]
    for sheet in sorted(html.rglob("*.css")):
        if CSS_EXTERNAL.search(sheet.read_text(encoding="utf8")):
            found.append(f"style sheet {sheet.relative_to(html)} asks the network for something")
    return found


class _Reader(HTMLParser):
    """Collects what is wrong with one page."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self._in_code = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        address = given.get("src", "")
        self._in_code += tag in ("pre", "script")
        if tag == "link" and FETCHED_LINKS & set(given.get("rel", "").split()):
            address = given.get("href", "")
        if EXTERNAL.match(address):
            self.problems.append(f"<{tag}> asks the network for {address}")
        if tag == "img" and not given.get("alt", "").strip():
            self.problems.append(f"image {address[:60]} has no alternative text")
        if {"traceback", "problematic"} & set(given.get("class", "").split()):
            self.problems.append("it shows an error (a traceback, or markup that could not be read)")

    def handle_endtag(self, tag: str) -> None:
        self._in_code -= tag in ("pre", "script")

    def handle_data(self, data: str) -> None:
        if TRACEBACK in data:
            self.problems.append("it holds a traceback")
        if not self._in_code and RAW_TABLE.search(data):
            self.problems.append("it shows a table as its Markdown source")
