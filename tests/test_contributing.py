"""The chapter that book/contributing.md shows, copied to where its captions say, runs, is measured and is judged."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat import v4, write

ROOT = Path(__file__).resolve().parent.parent
SHOWN = re.compile(r"```\{code-block\} \w+\n:caption: (\S+)\n\n(.*?)```", re.DOTALL)


class Checkout:
    """A copy of the package with the shown chapter in it, and nothing else of the project."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(ROOT / "synthrepro", root / "synthrepro", ignore=shutil.ignore_patterns("__pycache__"))
        for path, content in SHOWN.findall((ROOT / "book" / "contributing.md").read_text(encoding="utf8")):
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix == ".ipynb":
                write(notebook(content), target)
            else:
                target.write_text(content, encoding="utf8")

    def synthrepro(self, *arguments: str) -> str:
        """What the command says in this checkout, given that it succeeds."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SYNTHREPRO_")}
        environment |= {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        program = "import sys; from synthrepro.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, *arguments]
        outcome = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout


def notebook(script: str):
    """A notebook from a script in which ``# %%`` begins a cell."""
    cells = []
    for head, body in re.findall(r"^# %%([^\n]*)\n(.*?)(?=^# %%|\Z)", script, re.MULTILINE | re.DOTALL):
        body = body.strip()
        if "[markdown]" in head:
            cells.append(v4.new_markdown_cell(re.sub(r"^# ?", "", body, flags=re.MULTILINE)))
        else:
            tags = re.search(r"tags=(\[.*\])", head)
            cells.append(v4.new_code_cell(body, metadata={"tags": json.loads(tags.group(1))} if tags else {}))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return v4.new_notebook(cells=cells, metadata=kernel)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))


def test_the_page_shows_the_five_files_of_a_chapter(checkout: Checkout):
    shown = {path for path, _ in SHOWN.findall((ROOT / "book" / "contributing.md").read_text(encoding="utf8"))}
    assert shown == {
        "synthrepro/methods/nearest_mean.py",
        "synthrepro/methods/profiles/nearest_mean.yaml",
        "synthrepro/evidence/papers/nearest_mean.yaml",
        "synthrepro/evidence/claims/nearest_mean.yaml",
        "notebooks/nearest_mean.ipynb",
    }


def test_the_chapters_notebook_runs(checkout: Checkout):
    checkout.synthrepro("run", "nearest_mean", "--profile", "smoke")
    executed = json.loads((checkout.root / "runs" / "nearest_mean" / "nearest_mean-smoke.ipynb").read_text())
    shown = [output["data"]["text/plain"] for cell in executed["cells"] for output in cell.get("outputs", [])]
    assert shown[0] == ["2"]
    assert "smoothed" in "".join(shown[1])


def test_the_chapters_claim_gets_a_verdict_and_its_table_is_drawn(checkout: Checkout):
    # The cells of the cpu profile, at the size of smoke: five seeds are what a verdict needs.
    profile = checkout.root / "synthrepro" / "methods" / "profiles" / "nearest_mean.yaml"
    profile.write_text(profile.read_text().replace("size: [96, 80], spacing: 2.0", "size: [48, 40], spacing: 4.0"))
    assert "10 records" in checkout.synthrepro("measure", "nearest_mean", "--profile", "cpu")
    claims = json.loads(checkout.synthrepro("claims", "--format", "json"))
    (claim,) = [claim for claim in claims if claim["id"] == "smoothing-helps"]
    assert claim["verdict"] in {"holds here", "does not hold here", "undecided here"}
    assert claim["seeds"] == 5
    assert "0.734" in checkout.synthrepro("table", "nearest_mean", "smoothing")
