"""The pieces of the benchmarks work: what is compared computes the same thing."""

import json
import logging

import pytest
import torch

from benchmarks import hypergradient as bench

NETWORK, SIZE, BATCH = "tiny UNet", 16, 2


@pytest.fixture(autouse=True)
def as_it_was():
    """The script draws from the global generator, and Betty's engine talks."""
    with torch.random.fork_rng(devices=[]):
        yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def small():
    return bench.problem(NETWORK, SIZE, BATCH, dtype=torch.float64)


@pytest.fixture
def right():
    return bench.reference(NETWORK, SIZE, BATCH)


@pytest.mark.filterwarnings("ignore")  # of the peers, and of solvers that are stopped early
def test_methods_agree(small, right):
    """All that claim the derivative of the step; the others are marked."""
    methods = bench.all_methods(small)
    assert {bench.TORCHOPT, bench.HIGHER, bench.TORCH} <= set(methods)
    errors = {name: bench.relative_error(call(), right) for name, call in list(methods.items())[2:]}
    exact = [name for name in errors if name.startswith("exact") or name in bench.PEERS]
    assert max(errors[name] for name in exact) < 1e-10
    assert errors[bench.FORWARD] < 0.05
    assert errors[bench.CENTRAL] < 1e-3
    assert all(bench.OTHER in name for name in set(errors) - {*exact, bench.FORWARD, bench.CENTRAL})


@pytest.mark.filterwarnings("ignore")
def test_methods_agree_over_several_steps(small):
    methods = bench.unrolling(small, 3)
    values = {name: call() for name, call in methods.items() if "truncate" not in name}
    assert len(values) >= 4
    assert max(bench.relative_error(value, values[bench.HIGHER]) for value in values.values()) < 1e-10


def test_a_plain_step_is_that_of_sgd(small):
    stepped = bench.baselines(small)[bench.MIXED]()
    small.network.zero_grad()
    optimiser = torch.optim.SGD(small.network.parameters(), lr=bench.LR)
    (small.inner(small.params, small.hparams) + small.outer(small.params, small.hparams)).backward()
    optimiser.step()
    assert bench.relative_error(stepped, {name: p.detach() for name, p in small.params.items()}) < 1e-12


def test_seeds_together_are_seeds_one_at_a_time():
    problems = [bench.problem(NETWORK, SIZE, BATCH, seed=seed, dtype=torch.float64) for seed in range(2)]
    both = bench.together(problems)()
    for seed, alone in enumerate(bench.one_at_a_time(problems)()):
        assert bench.relative_error({name: h[seed] for name, h in both.items()}, alone) < 1e-10


def test_bfloat16_in_the_outer_pass_is_inexact_only(small, right):
    p = bench.problem(NETWORK, SIZE, BATCH)
    assert 1e-5 < bench.relative_error(bench.outer_in_bfloat16(p)(), right) < 0.5


def test_a_section_is_merged_into_the_file(tmp_path, monkeypatch, capsys):
    """One round on tiny images, beside what another run has left."""
    path, original = tmp_path / "costs.json", bench.problem
    monkeypatch.setattr(bench, "problem", lambda *_, **options: original(NETWORK, SIZE, BATCH, **options))
    bench.save(path, "peers", {"provenance": {"torch": "1"}, "results": {}})
    found = bench.SECTIONS["settings"](1, "cpu")
    bench.save(path, "settings", {"provenance": bench.provenance("cpu", 1), "results": found})
    written = json.loads(path.read_text())
    assert written["peers"]["provenance"] == {"torch": "1"}
    assert written["settings"]["provenance"]["torch"] == torch.__version__
    times = written["settings"]["results"][bench.PLAIN]
    assert len(times["cpu_ms"]) == len(times["wall_ms"]) == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| exact |")]
    assert row.split(" | ")[4] == "1.00"  # of itself
