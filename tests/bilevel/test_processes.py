"""Several processes: one step over all of them is the single-process step on the joined batch, and none hangs."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("joined.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def numbers() -> tuple[int, int]:
    """Of the parameters and of the hyperparameters in the script, each with one flag a tensor."""
    return (40 + 8 + 37) + 6, 3 + 3


def test_a_step_over_two_processes_is_the_step_on_the_joined_batch():
    """Hypergradient, stepped parameters and both losses, every estimator and update, the second step with moments
    carried. What goes over the wire is that of a few gradients, in float64."""
    out, err = start([*TORCHRUN, "--nproc-per-node", "2", str(SCRIPT)]).communicate(timeout=120)
    lines = re.findall(r"([01])\|([a-z_, ]+)\|(\w+)\|([0-9.e+-]+)\|(\d+)\|(\d+)", out)
    assert len(lines) == 2 * 9 * 3, err
    for _, estimator, update, worst, _, _ in lines:
        assert float(worst) <= 1e-12, (estimator, update, worst)
    sent = {estimator: (int(calls), int(size)) for _, estimator, _, _, calls, size in lines}
    for rank in (0, 1):  # an infinite loss of rank 1 ends both, for the same reason
        assert re.search(rf"^{rank}: The inner loss is -?inf: look for a division by zero", out, re.MULTILINE)
    phi, theta = numbers()
    loss = 2  # with its flag
    three = 3, 8 * (2 * (phi + loss) + theta)  # inner gradient, outer gradient, hypergradient
    for estimator in ("exact", "exact, recompute", "finite_difference"):
        assert sent[estimator] == three
    assert sent["unrolled"] == (3 + 1 + 2 + 1, 8 * (4 * (phi + loss) + 2 * phi + theta))  # 3 steps, outer, 2 adjoints
    calls, size = sent["chain"]
    assert calls == 2 * 2 + 1
    assert size == sent["chain, finite difference"][1]
    products = 3 + 1  # of four terms, and the residual
    assert sent["neumann"] == (3 + products, 8 * (2 * (phi + loss) + loss + products * phi + theta))


def test_torchrun_names_the_process_that_was_killed():
    started = time.monotonic()
    run = start([*TORCHRUN, "--nproc-per-node", "3", str(SCRIPT), "1"])
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert re.search(r"Root Cause.*rank\s+: 1 .*exitcode\s+: -9", err, re.DOTALL)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("lost", [0, 2])
def test_survivors_name_the_process_that_was_killed(lost):
    """Started by hand or by a scheduler, without torchrun to watch. Rank 0 keeps the store through which survivors
    find out who is missing; without it they can still say that somebody is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    runs = [start([sys.executable, str(SCRIPT), str(lost)], RANK=str(rank), **where) for rank in range(3)]
    ends = [run.communicate(timeout=120)[1] for run in runs]
    for rank, (run, err) in enumerate(zip(runs, ends, strict=True)):
        if rank == lost:
            assert run.returncode == -9
            continue
        who = f"rank {lost}" if lost else "a process"
        assert run.returncode == 1
        assert f"ConnectionError: Rank {rank} lost {who} while averaging gradients: look at what ended there" in err
