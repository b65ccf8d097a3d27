"""Make the book: run every chapter, render a staged copy, and look at every page.

    python -m tools.book

Everything written lands under ``_build/``; the working tree stays as it was. The chapters run in the ``smoke``
profile and measure into ``_build/runs``, which starts empty, so what a page calls "this run" is this run and not a
record left from an earlier state of the code. Measurements worth keeping reach the book through
``synthrepro publish`` and ``book/records``.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

from tools import browser, notebooks, pages

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
RUNS = BUILD / "runs"
STAGE = BUILD / "stage"
HTML = BUILD / "html"

# Small networks keep one core busy, not several: notebooks run side by side, each with its share of the cores.
CORES = os.cpu_count() or 1
SIDE_BY_SIDE = min(CORES, 4)  # each takes about a gigabyte of memory
THREADS = CORES // SIDE_BY_SIDE
TIMEOUT = 900  # seconds after which a notebook counts as hanging; in smoke it takes about one minute


class Failure(Exception):
    """The book cannot be made; the message says why."""


def execute_all() -> dict[str, Path]:
    """Run all notebooks, several side by side. Name -> executed notebook.

    Raises:
        Failure: one failed; those that had not begun are not begun.
    """
    shutil.rmtree(RUNS, ignore_errors=True)
    found = sorted((ROOT / "notebooks").glob("*.ipynb"))

    def timed(notebook: Path) -> Path:
        started = time.monotonic()
        executed = execute(notebook)
        print(f"{notebook.stem}: executed in {time.monotonic() - started:.0f} s", flush=True)
        return executed

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        begun = [pool.submit(timed, notebook) for notebook in found]
        try:
            return {notebook.stem: future.result() for notebook, future in zip(found, begun, strict=True)}
        except Failure:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def execute(notebook: Path) -> Path:
    """Run a notebook in the smoke profile and return the executed one.

    Chapters with experiments go through `synthrepro run`, as a reader would run them; a page that only explains,
    and so has no profile file, goes through papermill itself.

    Raises:
        Failure: the notebook failed; its traceback is the message.
    """
    from synthrepro.evidence import chapters

    name = notebook.stem
    executed = RUNS / name / f"{name}-smoke.ipynb"
    if name in chapters():
        outcome = _run("synthrepro", "run", name, "--profile", "smoke", "--timeout", str(TIMEOUT))
    else:
        executed.parent.mkdir(parents=True)
        options = ("--kernel", "python3", "--no-progress-bar", "--execution-timeout", str(TIMEOUT))
        outcome = _run("papermill", str(notebook), str(executed), "-p", "profile", "smoke", *options)
    if outcome.returncode:
        raise Failure(f"notebooks/{name}.ipynb failed.\n{outcome.stderr}")
    return executed


def stage(executed: dict[str, Path]) -> None:
    """Lay out what Jupyter Book is to render: the pages, the chapters as just executed, and the claims' verdicts.

    Args:
        executed: name of each notebook -> the notebook as executed.
    """
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(ROOT / "book", STAGE / "book", ignore=shutil.ignore_patterns("records"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, STAGE / name)
    (STAGE / "book" / "generated").mkdir()
    (STAGE / "book" / "generated" / "claims.md").write_text(map_of_claims(), encoding="utf8")
    (STAGE / "notebooks").mkdir()
    for name, path in executed.items():
        notebook = notebooks.normalise(nbformat.read(path, as_version=4))
        (STAGE / "notebooks" / f"{name}.ipynb").write_text(notebooks.text(notebook), encoding="utf8")


def map_of_claims() -> str:
    """The verdicts as the landing page shows them: a table a chapter, and what was found right beside the claim.

    The chapters themselves show the estimates, intervals and p-values too.
    """
    from synthrepro.evidence import chapters, claims

    titles = chapters()
    lines = []
    for chapter, verdicts in itertools.groupby(claims.judge_all(), key=lambda one: one.chapter):
        lines += [
            f"### {titles[chapter].rstrip('.')}",
            "",
            "| Claim | Verdict | On what, or why not |",
            "| --- " * 3 + "|",
        ]
        for one in verdicts:
            stands_on = (
                f"{claims.TIERS[one.tier]}: {one.task}, {one.profile}, {one.seeds} seeds" if one.tier else one.reason
            )
            lines.append(f"| {one.claim.title} | {one.verdict} | {stands_on} |")
        lines.append("")
    return "\n".join(lines)


def render() -> None:
    """Render the staged copy into ``_build/html``, afresh.

    Raises:
        Failure: Jupyter Book failed or warned; what it said is the message.
    """
    shutil.rmtree(HTML, ignore_errors=True)
    strict = ("--all", "--quiet", "--nitpick", "--warningiserror", "--keep-going")
    outcome = _run("jupyter-book", "build", str(STAGE), "--path-output", str(ROOT), *strict)
    if outcome.returncode:
        raise Failure(f"Jupyter Book failed or warned.\n{outcome.stderr}")


def check(expected: list[str]) -> None:
    """Look at every page, in the files and as Chromium shows it.

    Raises:
        Failure: a page is missing or not in order.
    """
    wrong = pages.problems(HTML, expected)
    if not wrong:
        try:
            wrong = browser.problems(HTML, expected)
        except browser.Unavailable as reason:
            print(f"The pages were not looked at in a browser: {reason}.")
    if wrong:
        raise Failure("\n  ".join(["the rendered book is not in order.", *wrong]))


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment; what it says is kept, so that a traceback is shown once, by the caller."""
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    environment = {"OMP_NUM_THREADS": str(THREADS)} | os.environ | {"SYNTHREPRO_RUNS": str(RUNS)}
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    outcome.stderr = re.sub(r"\x1b\[[0-9;]*m", "", outcome.stderr)  # colours, which both programs send to files too
    return outcome


def main() -> int:
    """Make the book and return the exit status."""
    started = time.monotonic()
    try:
        stage(execute_all())
        render()
        expected = pages.pages_of_toc(ROOT / "_toc.yml")
        check(expected)
    except Failure as failure:
        print(f"make book: {failure}", file=sys.stderr)
        return 1
    print(f"{len(expected)} pages in {time.monotonic() - started:.0f} s: open {HTML / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
