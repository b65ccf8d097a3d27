"""A chapter is one module, one profile file, one claims file, one file of the paper's numbers and one notebook."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

import synthrepro

MODULE = '''"""Sixth: a sixth paper, whose new arm is better than the old one."""

import random

from pydantic import Field

from synthrepro.evidence import Cell, Config, Context, Experiment, Result


class Comparison(Config):
    gain: float
    steps: int
    seeds: tuple[int, ...] = Field(exclude=True)


def cells(config: Comparison) -> list[Cell]:
    return [Cell(method, "numbers", seed) for seed in config.seeds for method in ("new", "old")]


def run(cell: Cell, config: Comparison, context: Context) -> Result:
    noise = random.Random(cell.seed)
    for _ in context.progress(range(config.steps), "training"):
        scores = [0.5 + config.gain * (cell.method == "new") + noise.gauss(0, 0.01) for _ in range(4)]
    cases = [{"subject": f"s{i}", "split": "test", "dice": score} for i, score in enumerate(scores)]
    return Result({"dice": sum(scores) / 4}, cases)


EXPERIMENTS = {
    "comparison": Experiment(
        "comparison", "New against old", Comparison, cells, run, lambda cell, config: config.steps
    )
}
'''

PROFILES = """
smoke: {comparison: {gain: 0.2, steps: 2, seeds: [0]}}
cpu: {comparison: {gain: 0.2, steps: 5, seeds: [0, 1, 2, 3, 4]}}
gpu: {comparison: {gain: 0.2, steps: 50, seeds: [0, 1, 2, 3, 4]}}
paper: {comparison: {gain: 0.2, steps: 500, seeds: [0, 1, 2, 3, 4]}}
"""

PAPER = """
title: The sixth paper
authors: Somebody
venue: Nowhere 2026
arxiv: "0000.00000"
code: none
sources: {paper: the paper}
tables:
  - {id: main, title: Dice, source: paper, where: Table 1, row: method, column: score, columns: [Dice],
     rows: {new: [0.712], old: [0.514]}}
not_tested: []
"""

CLAIMS = """
tiers: {numbers: embedded}
claims:
  - {id: better, primary: true, title: The new arm is better, sentence: Ours is better., table: main,
     kind: superiority, margin: 0.05, why: A quarter of the gain., experiment: comparison, tasks: [numbers],
     metric: dice, where: {method: new, split: test}, against: {method: old}}
tables:
  comparison:
    - id: main
      title: New against old
      rows: {method: [new, old]}
      metrics: [{metric: dice, split: test, label: Dice, paper: {table: main, row: "{method}", column: Dice}}]
"""

NOTEBOOK = [
    'profile = "smoke"',
    "from synthrepro.evidence import measure",
    "print(len(measure('sixth', 'comparison', profile)), 'records')",
]


def add_chapter(root: Path) -> None:
    package = root / "synthrepro"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(synthrepro.__file__).parent, package, ignore=ignored)
    (package / "methods" / "sixth.py").write_text(MODULE)
    (package / "methods" / "profiles" / "sixth.yaml").write_text(PROFILES)
    (package / "evidence" / "papers" / "sixth.yaml").write_text(PAPER)
    (package / "evidence" / "claims" / "sixth.yaml").write_text(CLAIMS)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in NOTEBOOK])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    (root / "notebooks").mkdir()
    nbformat.write(notebook, root / "notebooks" / "sixth.ipynb")


def test_a_sixth_chapter_is_five_files(tmp_path):
    add_chapter(tmp_path)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SYNTHREPRO_")}

    def cli(*arguments: str) -> str:
        process = subprocess.run(
            [sys.executable, "-c", "import sys; from synthrepro.cli import main; sys.exit(main())", *arguments],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
        return process.stdout

    listed = cli("chapters")
    assert "sixth: Sixth: a sixth paper, whose new arm is better than the old one.\n" in listed
    assert "    comparison  (smoke, cpu, gpu, paper)\n" in listed

    notebook = Path(cli("run", "sixth", "--profile", "smoke").strip())
    assert notebook == tmp_path / "runs" / "sixth" / "sixth-smoke.ipynb"
    assert nbformat.read(notebook, as_version=4).cells[-1].outputs[0].text == "2 records\n"

    cli("measure", "sixth", "--profile", "cpu")
    assert cli("publish") == f"{tmp_path}/book/records/sixth/comparison.jsonl: 10 records\n"
    shutil.rmtree(tmp_path / "runs")
    verdict = next(one for one in json.loads(cli("claims", "--format", "json")) if one["chapter"] == "sixth")
    assert [verdict[name] for name in ("verdict", "tier", "profile", "seeds")] == ["holds here", "embedded", "cpu", 5]
    assert "| new | 0.712 | 0.698 [" in cli("table", "sixth", "comparison")
