"""A small checkout of its own, with one toy chapter, for whatever must be killed, edited or published."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import synthrepro

TOY = '''"""Toy: numbers that take their time, and a log of every step that is really computed."""

import json
import os
import time

from pydantic import Field

from synthrepro import paths
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Config, Experiment, Result


class Counting(Config):
    steps: int
    pause: float
    methods: tuple[str, ...] = Field(exclude=True)
    seeds: tuple[int, ...] = Field(exclude=True)


def log(*words):
    with open(paths.ROOT / "log.txt", "a") as file:
        file.write(" ".join(map(str, [*words, os.getpid()])) + "\\n")


def cells(config):
    return [Cell(method, "numbers", seed) for method in config.methods for seed in config.seeds]


def run(cell, config, context):
    log("begin", cell.key, os.environ.get("OMP_NUM_THREADS"))
    if cell.method == "broken":
        raise RuntimeError("the broken arm broke")
    if cell.method == "spoilt":
        raise UserError("numbers.txt is spoilt: get it again.")
    base = float((context.artefact("base", {"of": cell.method}) / "value").read_text())
    checkpoint = context.folder / "checkpoint.json"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "value": base + cell.seed}
    while state["step"] < config.steps:
        log("step", cell.key, state["step"])
        time.sleep(config.pause)
        state = {"step": state["step"] + 1, "value": (state["value"] * 1.7 + 0.1) % 1}
        temporary = checkpoint.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(checkpoint)
    return Result({"value": state["value"]}, [{"subject": "s1", "split": "test", "dice": state["value"]}])


def build(spec, folder, context):
    log("build", spec["of"])
    time.sleep(0.05)
    (folder / "value").write_text(str(len(spec["of"]) / 10))


EXPERIMENTS = {
    "counting": Experiment(
        "counting", "Counting up", Counting, cells, run, lambda cell, config: config.steps, {"base": build}
    )
}
'''


class Checkout:
    """A copy of what carries evidence, with the chapter `toy`, and processes that run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.chapter = root / "synthrepro" / "methods" / "toy.py"
        self.profiles = root / "synthrepro" / "methods" / "profiles" / "toy.yaml"
        self.runs = root / "runs" / "toy" / "counting"
        self.published = root / "book" / "records" / "toy" / "counting.jsonl"
        source = Path(synthrepro.__file__).parent
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source / "evidence", root / "synthrepro" / "evidence", ignore=ignore)
        self.profiles.parent.mkdir(parents=True)
        for name in ("__init__.py", "cli.py", "paths.py", "errors.py", "methods/__init__.py"):
            shutil.copy(source / name, root / "synthrepro" / name)
        self.chapter.write_text(TOY)
        self.profile()

    def profile(self, name: str = "cpu", **changes: object) -> None:
        """Write the one profile there is: four cells of three short steps, but for `changes`."""
        section = {"steps": 3, "pause": 0.0, "methods": ["plain", "fanciful"], "seeds": [0, 1], **changes}
        self.profiles.write_text(json.dumps({name: {"counting": section}}))

    def start(self, *command: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start `python ...` in this checkout, as the leader of a group of its own."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SYNTHREPRO_")}
        environment |= {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def start_cli(self, *arguments: str) -> subprocess.Popen[str]:
        return self.start("-c", "import sys; from synthrepro.cli import main; sys.exit(main())", *arguments)

    def cli(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """Standard output and error of a command that ends with `status`."""
        process = self.start_cli(*arguments)
        output, error = process.communicate(timeout=60)
        assert process.returncode == status, (output, error)
        return output, error

    def log(self) -> list[list[str]]:
        """What the toy chapter really did: `begin`, `step` and `build` lines, the process id last."""
        path = self.root / "log.txt"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def count(self, word: str) -> int:
        return sum(words[0] == word for words in self.log())

    def values(self) -> dict[str, float]:
        """Cell -> metric of the whole records in runs/; a torn file raises."""
        found = [json.loads(path.read_text()) for path in self.runs.glob("*.json")]
        return {f"{r['cell']['method']} {r['cell']['seed']}": r["metrics"]["value"] for r in found}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")
