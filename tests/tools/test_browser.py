"""What a reader would see wrong in a browser is found; where there is no browser, that is said."""

from pathlib import Path

import pytest

from tools import browser

PAGE = "<html><body style='margin:0'><main><article>{}</article></main></body></html>"


@pytest.fixture(scope="module")
def session():
    try:
        with browser.browser() as session:
            yield session
    except browser.Unavailable as reason:
        pytest.skip(f"no browser: {reason}")


def look(session: browser.Session, folder: Path, content: str, width: int = 390) -> list[str]:
    page = folder / "page.html"
    page.write_text(PAGE.format(content))
    return session.look(page, width)


def test_a_plain_page_is_in_order(session, tmp_path: Path):
    assert look(session, tmp_path, "<p>Text</p>") == []


def test_what_is_wider_than_a_phone_is_found_on_the_phone_only(session, tmp_path: Path):
    wide = "<p style='width: 600px'>wide</p>"
    assert look(session, tmp_path, wide, 1280) == []
    assert look(session, tmp_path, wide) == ["p 'wide' sticks out to the side"]


def test_what_scrolls_by_itself_is_in_order(session, tmp_path: Path):
    assert look(session, tmp_path, "<div style='overflow-x: auto'><p style='width: 600px'>wide</p></div>") == []


def test_a_formula_left_as_source_is_found(session, tmp_path: Path):
    assert look(session, tmp_path, r"<span class='math'>\(x^2\)</span>") == ["1 formulas are not typeset"]


def test_a_request_to_the_network_is_found(session, tmp_path: Path):
    assert any(
        "asked the network" in problem for problem in look(session, tmp_path, "<img src='http://127.0.0.1:9/x'>")
    )


def test_a_machine_without_the_driver_is_told_so(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(browser.Unavailable, match="chromedriver is not installed"):
        browser.problems(tmp_path, [])
