import os
import signal
import subprocess
import sys

import pytest
import torch

from synthrepro.data import Card, Split, Task
from synthrepro.evidence import Context
from synthrepro.evidence import context as context_module


def test_what_is_saved_is_loaded_by_the_next_process_and_time_adds_up(tmp_path):
    first = Context(tmp_path)
    assert first.load("state") is None
    generator = torch.Generator().manual_seed(3)
    model = torch.nn.Linear(2, 1)
    first._started -= 100  # as if it had worked for 100 s
    first.save("state", {"model": model.state_dict(), "random": generator.get_state(), "step": 7})
    second = Context(tmp_path)
    state = second.load("state")
    assert state["step"] == 7
    assert torch.equal(state["model"]["weight"], model.weight)
    again = torch.Generator()
    again.set_state(state["random"])
    assert torch.equal(torch.rand(3, generator=again), torch.rand(3, generator=generator))
    assert 100 <= second.seconds < 110


def test_only_data_is_loaded_never_code(tmp_path):
    context = Context(tmp_path)
    context.save("state", {"step": print})
    with pytest.raises(Exception, match="weights_only"):
        context.load("state")


def test_a_checkpoint_is_due_once_a_minute(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(context_module.time, "monotonic", lambda: now)
    context = Context(tmp_path)
    due = []
    for _ in range(5):
        now += 25
        due.append(context.checkpoint_due())
    assert due == [False, False, True, False, False]


def test_progress_gives_the_items_and_is_silent_where_nobody_looks(tmp_path, capsys):
    assert list(Context(tmp_path).progress(range(3), "steps")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_data_records_a_fingerprint_that_follows_the_samples(tmp_path):
    def task(value: float, subject: str = "a") -> Task:
        split = Split(torch.full((1, 1, 2, 2), value), torch.zeros(1, 2, 2, dtype=torch.int64), (subject,))
        return Task("numbers", ("background",), 1, {"test": split}, Card("", "", "", "", ""))

    context = Context(tmp_path)
    hashes = []
    for made in (task(0.5), task(0.5), task(0.6), task(0.5, "b")):
        assert context.data(made) is made
        hashes.append(context.data_hashes["numbers"])
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_an_artefact_is_built_once_for_each_spec_and_code(tmp_path):
    built = []

    def build(spec, folder, context):
        built.append(spec["size"])
        assert list(folder.iterdir()) == []
        (folder / "value").write_text(str(spec["size"]))

    def context(code="1"):
        return Context(tmp_path / "cell", {"base": build}, tmp_path / "shared", {"base": code})

    first = context()
    path = first.artefact("base", {"size": 1, "kind": "a"})
    assert (path / "value").read_text() == "1"
    assert first.artefact("base", {"kind": "a", "size": 1}) == path
    assert context().artefact("base", {"size": 1, "kind": "a"}) == path
    assert built == [1]
    other = first.artefact("base", {"size": 2, "kind": "a"})
    newer = context("2").artefact("base", {"size": 1, "kind": "a"})
    assert built == [1, 2, 1]
    assert len({path, other, newer}) == 3
    assert first.artefacts == sorted([path.name, other.name])
    assert {p.name for p in (tmp_path / "shared").iterdir()} == {path.name, other.name, newer.name}


BUILDER = """
import os, signal, sys
from pathlib import Path
from synthrepro.evidence import Context

def build(spec, folder, context):
    state = context.folder / "step"
    step = int(state.read_text()) if state.exists() else 0
    print("from", step, sorted(p.name for p in folder.iterdir()))
    (folder / "value").write_text("half")
    state.write_text("5")
    if step == 0:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "value").write_text("whole")

root = Path(sys.argv[1])
path = Context(root / "cell", {"base": build}, root / "shared").artefact("base", {})
print((path / "value").read_text(), sorted(p.name for p in (root / "shared").iterdir()) == [path.name])
"""


def test_a_killed_build_leaves_no_half_artefact_and_goes_on_from_its_checkpoint(tmp_path):
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", BUILDER, tmp_path], capture_output=True, text=True, env=dict(os.environ)
        )

    killed = run()
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "from 0 []\n")
    resumed = run()
    assert (resumed.returncode, resumed.stdout) == (0, "from 5 []\nwhole True\n"), resumed.stderr
