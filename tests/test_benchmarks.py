"""The pieces of the benchmarks work: what is compared computes the same thing."""

import functools
import json
import logging
import multiprocessing
import multiprocessing.dummy

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import ddpm_seg_memory, diffusion
from benchmarks import hypergradient as bench
from synthrepro.evidence import Context
from synthrepro.methods.ddpm.ddpm_seg import FeatureFile
from synthrepro.methods.ddpm.pretraining import UNetSettings

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


UNET = UNetSettings(multipliers=(1, 2), blocks=1, attention=(8,), head_channels=4, groups=4)
TINY = diffusion.Problem(size=16, channels=8, batch=2, unet=UNET, device="cpu")


@functools.cache
def counted(kind):
    """Parameters, and FLOPs of training on one image."""
    return diffusion.training_flops(
        {diffusion.OURS: diffusion.our_unet, diffusion.MONAI: diffusion.monai_unet}[kind], TINY
    )


@pytest.fixture
def one_precision_after_another():
    """A process has one precision, as accelerate sees it."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_a_turn_is_an_iteration_that_is_not_counted_and_the_wanted_ones():
    here, there = multiprocessing.Pipe()
    for iterations in (3, 2, 0):
        here.send(iterations)
    assert list(diffusion.Turns(there, "cpu").progress(range(100), "")) == list(range(4 + 3))
    assert min(here.recv(), here.recv()) >= 0
    assert not here.poll()


def test_flops_of_training_are_those_of_its_products():
    class Network(torch.nn.Conv2d):
        def forward(self, image, step):
            return super().forward(image)

    products = 9 * 3 * TINY.size**2
    count, work = diffusion.training_flops(lambda p: Network(1, 3, 3, padding=1), TINY)
    assert (count, work) == (9 * 3 + 3, 2 * 2 * products)  # forward, and backward to the weights; none to the image


@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize("name", [name for name in diffusion.LOOPS if "compiled" not in name])
def test_an_iteration_is_one_pass_over_one_batch(name, one_precision_after_another):
    here, there = multiprocessing.Pipe()
    for iterations in (1, 0):
        here.send(iterations)
    found = diffusion.flops(lambda: diffusion.LOOPS[name](TINY, TINY.images(), diffusion.Turns(there, "cpu")))
    assert found == 2 * TINY.batch * counted(diffusion.MONAI if name.startswith(diffusion.MONAI) else diffusion.OURS)[1]
    assert here.recv() > 0


def test_monais_network_is_ours_but_for_the_step():
    """So that their loops may be compared: the step's projections have one output a channel, ours have two."""
    (ours, work), (theirs, other) = counted(diffusion.OURS), counted(diffusion.MONAI)
    blocks = [block for block in diffusion.our_unet(TINY).modules() if hasattr(block, "time_emb_proj")]
    projections = sum(block.time_emb_proj.weight.numel() + block.time_emb_proj.bias.numel() for block in blocks)
    assert ours - theirs == pytest.approx(projections / 2, rel=0.01)  # MONAI has a norm more
    assert other == pytest.approx(work, rel=0.01)


@pytest.mark.filterwarnings("ignore")
def test_the_tables_of_the_diffusion_benchmark(monkeypatch, capsys, tmp_path, one_precision_after_another):
    """Threads in place of processes, and therefore one precision."""
    loops = {name: loop for name, loop in diffusion.LOOPS.items() if name.endswith("fp32")}
    monkeypatch.setattr(diffusion, "LOOPS", loops)
    monkeypatch.setattr(diffusion.multiprocessing, "get_context", lambda _: multiprocessing.dummy)
    monkeypatch.setattr(diffusion, "SAMPLERS", (("ddpm", 3), ("ddim", 2)))
    diffusion.training(TINY, 1, 1)
    diffusion.folding(TINY, 1)
    judge = diffusion.Judge(3, lambda images: float(images.shape[0]))
    diffusion.sampling(diffusion.our_unet(TINY), TINY, Context(tmp_path), judge)
    out = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in out.splitlines() if line[:1] == "|")}
    assert rows[diffusion.PLAIN][3] == "1.00"  # of itself
    assert set(loops) <= set(rows)
    assert all(rows[name][-1] == "–" for name in loops)  # a CPU has no share of a GPU's peak
    assert 0 < float(rows["saved"][0].rstrip("%")) < 100
    assert rows["ddpm"][0::2] == ["3", "3"]  # evaluations, and what the judge says of as many images as it wants
    assert float(out.split("Outputs differ by ")[1].split()[0]) < 1e-4


def test_only_known_gpus_have_a_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "Tesla T4"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        found[name] = diffusion.bf16_peak()
    assert list(found.values()) == [756e12, 989e12, None]


def test_features_in_ram_are_those_in_a_file(tmp_path, monkeypatch):
    """The two ways of the memory benchmark hold the same pixels, in single and in half precision."""
    monkeypatch.setattr(ddpm_seg_memory, "SIZE", 4)
    monkeypatch.setattr(ddpm_seg_memory, "DIM", 3)
    ways = ddpm_seg_memory.Resident(2), FeatureFile.create(tmp_path / "f.npy", 2 * 16, 3, "float16")
    images = torch.randn(2, 3, 4, 4)
    for way in ways:
        for i, image in enumerate(images):
            way.write(i, image)
    ram, file = (way.read(torch.tensor([17, 5])) for way in ways)
    assert torch.equal(ram, torch.stack([images[1, :, 0, 1], images[0, :, 1, 1]]))
    assert torch.equal(file, ram.half())


def test_memory_is_that_of_this_process():
    """Linux says so beside what getrusage says, which is the parent's where that had more."""
    before = ddpm_seg_memory.peak()
    touched = torch.ones(2**24)
    assert ddpm_seg_memory.peak() >= before >= touched.numel()
    assert diffusion.peak_memory("cpu") >= before
