"""Look at the rendered book in Chromium, as a reader on a laptop and on a phone would.

    python -m tools.browser [FOLDER]

For every page, at 1280 and at 390 pixels: nothing sticks out of the page to the side, all mathematics is typeset, and
nothing was asked of the network. With a folder, a picture of each page at each width is left there. Where Chromium or
its driver is not installed, one sentence says so and nothing is checked.
"""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.pages import pages_of_toc

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
)
WIDTHS = (1280, 390)  # CSS pixels: a laptop, a phone

# Runs in the page once MathJax has finished. What scrolls by itself (a wide table, a long line of code) is no overflow.
LOOK = """
const done = arguments[0];
const typeset = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
typeset.then(() => {
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const outside = [...document.querySelectorAll("main *")].filter(e => {
    const box = e.getBoundingClientRect();
    if (box.width === 0 || (box.right <= innerWidth + 1 && box.left >= -1)) return false;
    for (let up = e; up.tagName !== "MAIN"; up = up.parentElement)
      if (scrolls(up) || up.tagName === "MJX-ASSISTIVE-MML") return false;
    return true;
  });
  done({
    wide: outside.slice(0, 3).map(e => `${e.tagName.toLowerCase()} '${e.textContent.trim().slice(0, 40)}'`),
    scroll: document.documentElement.scrollWidth - innerWidth,
    untypeset: [...document.querySelectorAll("article .math")].filter(e => !e.querySelector("mjx-container")).length,
    broken: [...document.images].filter(i => i.complete && i.naturalWidth === 0).map(i => i.src.slice(0, 60)),
  });
});
"""


class Unavailable(Exception):
    """There is no Chromium to look with; the message says what is missing."""


class Session:
    """One browser under a running chromedriver, spoken to in the WebDriver protocol."""

    def __init__(self, port: int, profile: str) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        options = {
            "binary": shutil.which("chromium") or shutil.which("google-chrome"),
            "args": [*FLAGS, f"--user-data-dir={profile}"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self._base += "/" + self._post("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _post(self, path: str, body: dict) -> Any:
        request = urllib.request.Request(
            self._base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with local.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **parameters: object) -> Any:
        """Run a command of the DevTools protocol."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def look(self, page: Path, width: int) -> list[str]:
        """Open a page at a width and return what is wrong with it."""
        self._resize(width, 900)
        self._post("/url", {"url": page.as_uri()})
        seen = self._post("/execute/async", {"script": LOOK, "args": []})
        wrong = [f"{element} sticks out to the side" for element in seen["wide"]]
        if seen["scroll"] > 0 and not wrong:
            wrong.append(f"the page is {seen['scroll']} pixels wider than the window")
        if seen["untypeset"]:
            wrong.append(f"{seen['untypeset']} formulas are not typeset")
        wrong += [f"the browser cannot show {image}" for image in seen["broken"]]
        return wrong + [f"it asked the network for {address}" for address in self._fetched()]

    def _fetched(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self._post("/se/log", {"type": "performance"})]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if address.startswith(("http:", "https:"))]

    def picture(self, width: int) -> bytes:
        """Return a PNG of the page from its top; Chromium cannot draw more than 16384 pixels of it."""
        height = math.ceil(self.devtools("Page.getLayoutMetrics")["cssContentSize"]["height"])
        self._resize(width, min(height, 16384))
        return base64.b64decode(self.devtools("Page.captureScreenshot")["data"])

    def _resize(self, width: int, height: int) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def close(self) -> None:
        """End the browser."""
        urllib.request.urlopen(urllib.request.Request(self._base, method="DELETE"), timeout=60).close()


@contextmanager
def browser() -> Iterator[Session]:
    """Start Chromium without a window, and end it.

    Raises:
        Unavailable: Chromium or chromedriver is not installed, or does not start.
    """
    for program in ("chromedriver", "chromium"):
        if not shutil.which(program) and not (program == "chromium" and shutil.which("google-chrome")):
            raise Unavailable(f"{program} is not installed")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver,
    ):
        try:
            ports = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout or ())
            port = next((int(match.group(1)) for match in ports if match), None)
            if port is None:
                raise Unavailable("chromedriver does not start")
            try:
                session = Session(port, profile)
            except OSError as error:
                raise Unavailable(f"Chromium does not start ({error})") from error
            yield session
            session.close()
        finally:
            driver.terminate()


def problems(html: Path, pages: list[str], pictures: Path | None = None) -> list[str]:
    """Return what is wrong with the pages as Chromium shows them, one sentence each.

    Args:
        html: folder of the rendered book.
        pages: pages to look at, without suffix, relative to ``html``.
        pictures: folder for a picture of each page at each width, or None for no pictures.

    Raises:
        Unavailable: there is no Chromium here.
    """
    found = []
    with browser() as session:
        for page in pages:
            for width in WIDTHS:
                wrong = session.look(html / f"{page}.html", width)
                found += [f"page {page} at {width} pixels: {problem}" for problem in wrong]
                if pictures:
                    pictures.mkdir(parents=True, exist_ok=True)
                    (pictures / f"{page.replace('/', '-')}-{width}.png").write_bytes(session.picture(width))
    return found


def main() -> int:
    """Look at every page of the built book and return the exit status."""
    pictures = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        found = problems(ROOT / "_build" / "html", pages_of_toc(ROOT / "_toc.yml"), pictures)
    except Unavailable as reason:
        print(f"The pages were not looked at in a browser: {reason}.")
        return 0
    print("\n".join(found) or f"Every page is in order at {' and '.join(map(str, WIDTHS))} pixels.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
