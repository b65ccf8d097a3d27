"""The chapter that book/contributing.md shows, copied to where its captions say, runs, is measured and is judged."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from nbformat import v4, write

ROOT = Path(__file__).resolve().parent.parent
SHOWN = re.compile(r"```\{code-block\} \w+\n:caption: (\S+)\n\n(.*?)```", re.DOTALL)


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


def shown_files() -> dict[str, str]:
    """Path -> content, as the page shows them."""
    return dict(SHOWN.findall((ROOT / "book" / "contributing.md").read_text(encoding="utf8")))


def test_the_page_shows_the_five_files_of_a_chapter():
    assert shown_files().keys() == {
        "synthrepro/methods/nearest_mean.py",
        "synthrepro/methods/profiles/nearest_mean.yaml",
        "synthrepro/evidence/papers/nearest_mean.yaml",
        "synthrepro/evidence/claims/nearest_mean.yaml",
        "notebooks/nearest_mean.ipynb",
    }


def test_the_shown_chapter_runs_is_measured_judged_and_drawn(tmp_path: Path):
    shutil.copytree(ROOT / "synthrepro", tmp_path / "synthrepro", ignore=shutil.ignore_patterns("__pycache__"))
    for path, content in shown_files().items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".ipynb":
            write(notebook(content), target)
        else:
            # Five seeds are what a verdict needs; they do not need the images of a real cpu profile.
            target.write_text(content.replace("size: [96, 80], spacing: 2.0", "size: [48, 40], spacing: 4.0"))

    commands = [
        ["run", "nearest_mean", "--profile", "smoke"],
        ["measure", "nearest_mean", "--profile", "cpu"],
        ["table", "nearest_mean", "smoothing"],
        ["claims", "--format", "json"],
    ]
    # One process for all: importing torch takes longer than everything else together.
    program = f"import sys; from synthrepro.cli import main; sys.exit(any(main(c) for c in {commands}))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SYNTHREPRO_")}
    environment |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr

    executed = json.loads((tmp_path / "runs" / "nearest_mean" / "nearest_mean-smoke.ipynb").read_text())
    shown = [output["data"]["text/plain"] for cell in executed["cells"] for output in cell.get("outputs", [])]
    assert shown[0] == ["2"]
    assert "smoothed" in "".join(shown[1])
    assert "10 records" in outcome.stdout
    assert "0.734" in outcome.stdout, "the paper's number is not in the table"
    claims = json.loads(outcome.stdout[outcome.stdout.index("\n[") :])
    (claim,) = [claim for claim in claims if claim["id"] == "smoothing-helps"]
    assert claim["verdict"] in {"holds here", "does not hold here", "undecided here"}
    assert claim["seeds"] == 5
