"""What does a hypergradient cost? Ours and the libraries that people would use, side by side in one run.

    pip install -e '.[dev]' && python benchmarks/hypergradient.py --json costs.json

Prints Markdown tables, one section of them after another; ``--section`` chooses. On one CPU thread, methods taking
turns within every round, so that a busy machine slows all of them alike; CPU time leaves out waiting for others.
``--device cuda`` measures wall time there instead. The JSON has every round of every method, and where and when each
section was measured; sections are merged into a file that exists.

The task is learning how to synthesise: an inner step on images painted from label maps, with a noise scale and a grid
of a bias field's logarithm to be learned, and an outer loss on given images. Both losses are cross-entropy and soft
Dice of five classes; the inner step is SGD.

Peers that are not installed are left out. Betty 0.2.1 declares Python below 3.11 and yet runs on later ones:
``pip install --ignore-requires-python --no-deps betty-ml==0.2.1``.
"""

import argparse
import copy
import functools
import gc
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from synthrepro.bilevel import fused_kernels, hypergradient, sgd, stack, stacked, stateless

CLASSES, LR = 5, 0.1
WIDTHS = (16, 32, 64, 128)

Tensors = dict[str, Tensor]
Method = Callable[[], Tensors]  # its value is the hypergradient, or a gradient
Methods = dict[str, Method]

PLAIN, MIXED = "plain step, synthetic", "plain step, synthetic and real"
EXACT, FAST, LEAN = "exact", "exact, fast", "exact, lean"
FORWARD, CENTRAL = "forward difference", "central difference"
TORCHOPT, HIGHER, TORCH = "TorchOpt MetaSGD", "higher", "torch.optim.SGD(differentiable=True)"
PEERS = (TORCHOPT, HIGHER, TORCH)  # all of them exact
OTHER = "‡"  # marks what estimates another quantity than the derivative of the step
BETTY = "Betty"


# --- The task ---------------------------------------------------------------------------------------------------------


def block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two convolutions a level, pooling down, bilinear up; (B, 1, H, W) to logits (B, CLASSES, H, W)."""

    def __init__(self, widths: Sequence[int] = WIDTHS, pool: Callable[..., Tensor] = F.max_pool2d) -> None:
        super().__init__()
        self.pool = pool
        self.down = nn.ModuleList(block(a, b) for a, b in zip((1, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(block(a + b, a) for a, b in reversed(list(itertools.pairwise(widths))))
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, down in enumerate(self.down):
            x = down(self.pool(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for up in self.up:
            x = up(torch.cat([skips.pop(), F.interpolate(x, scale_factor=2, mode="bilinear")], 1))
        return self.head(x)


def monai_unet() -> nn.Module:
    from monai.networks.nets import UNet as Residual

    return Residual(2, 1, CLASSES, channels=WIDTHS, strides=(2, 2, 2), num_res_units=2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet": UNet,
    "MONAI UNet": monai_unet,
    "smooth UNet": lambda: UNet(pool=F.avg_pool2d),
    "tiny UNet": lambda: UNet((8, 16), F.avg_pool2d),
}


@dataclass(frozen=True)
class Problem:
    """A network, hyperparameters of its training images, and what the images are painted from.

    The data: ``base`` and ``real`` (B, 1, H, W), images without noise and given ones, ``white`` (B, 1, H, W), noise of
    scale 1, ``labels`` (B, H, W) and ``onehot`` (B, CLASSES, H, W).
    """

    network: nn.Module
    hparams: Tensors
    data: Tensors

    @property
    def params(self) -> Tensors:
        return dict(self.network.named_parameters())

    def image(self, hparams: Tensors, data: Tensors | None = None) -> Tensor:
        data = data or self.data
        size, bias = data["base"].shape[-1], hparams["bias"]
        field = F.interpolate(bias, size=(size, size), mode="bilinear", antialias=bias.shape[-1] > size)
        return data["base"] * field.exp() + hparams["noise"] * data["white"]

    def loss(self, logits: Tensor, data: Tensors | None = None) -> Tensor:
        data = data or self.data
        p, onehot = logits.softmax(1), data["onehot"]
        dice = (2 * (p * onehot).sum((2, 3)) + 1e-5) / ((p + onehot).sum((2, 3)) + 1e-5)
        return F.cross_entropy(logits, data["labels"]) + 1 - dice.mean()

    def inner(self, params: Tensors, hparams: Tensors, data: Tensors | None = None) -> Tensor:
        return self.loss(stateless(self.network, params, self.image(hparams, data)), data)

    def outer(self, params: Tensors, hparams: Tensors, data: Tensors | None = None) -> Tensor:
        return self.loss(stateless(self.network, params, (data or self.data)["real"]), data)


def problem(
    network: str,
    size: int,
    batch: int,
    *,
    nodes: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: torch.memory_format = torch.contiguous_format,
) -> Problem:
    """The same numbers in every dtype, layout and device: drawn in float32 on the CPU.

    Args:
        network: A name in NETWORKS.
        size, batch: Images of size x size pixels (a multiple of 8), and how many.
        nodes: The bias field has nodes x nodes of them.
    """
    torch.manual_seed(seed)
    net = NETWORKS[network]()
    blocks = torch.randint(CLASSES, (batch, size // 8, size // 8))
    labels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    base = torch.rand(CLASSES)[labels][:, None]
    floats = {
        "base": base,
        "white": torch.randn_like(base),
        "real": base + 0.1 * torch.randn_like(base),
        "onehot": F.one_hot(labels, CLASSES).movedim(-1, 1).contiguous().float(),
    }
    hparams = {"noise": torch.tensor(0.1), "bias": 0.1 * torch.randn(1, 1, nodes, nodes)}
    return Problem(
        net.to(device, dtype).to(memory_format=layout),  # type: ignore[call-overload]
        {name: t.to(device, dtype) for name, t in hparams.items()},
        {name: t.to(device, dtype, memory_format=layout) for name, t in floats.items()} | {"labels": labels.to(device)},
    )


def relative_error(found: Tensors, reference: Tensors) -> float:
    """Length of the difference over that of the reference, all hyperparameters together."""
    a, b = (torch.cat([h[name].flatten().cpu().double() for name in reference]) for h in (found, reference))
    return float((a - b).norm() / b.norm())


def reference(network: str, size: int, batch: int, **options: Any) -> Tensors:
    """The hypergradient in float64, by the exact estimator on torch's own kernels."""
    p = problem(network, size, batch, dtype=torch.float64, **options)
    return hypergradient(p.inner, p.outer, p.params, p.hparams, sgd(LR)).hypergradient


# --- Methods ----------------------------------------------------------------------------------------------------------


def baselines(p: Problem) -> Methods:
    """Training steps without a hypergradient."""
    params = list(p.network.parameters())

    def step(images: Iterable[Tensor]) -> Tensors:
        each = [torch.autograd.grad(p.loss(p.network(image)), params) for image in images]
        return {n: q.detach() - LR * sum(g) for (n, q), *g in zip(p.params.items(), *each, strict=True)}

    def images(real: bool) -> Iterable[Tensor]:
        with torch.no_grad():
            painted = p.image(p.hparams)
        return (painted, p.data["real"]) if real else (painted,)

    return {PLAIN: lambda: step(images(False)), MIXED: lambda: step(images(True))}


def in_kernels(loss: Callable[[Tensors, Tensors], Tensor]) -> Callable[[Tensors, Tensors], Tensor]:
    """A loss with second derivatives written by hand."""

    def within(params: Tensors, hparams: Tensors) -> Tensor:
        with fused_kernels():
            return loss(params, hparams)

    return within


def ours(p: Problem, estimator: Any, fused: bool = False, **options: Any) -> Method:
    inner, outer = (in_kernels(p.inner), in_kernels(p.outer)) if fused else (p.inner, p.outer)
    return lambda: hypergradient(inner, outer, p.params, p.hparams, sgd(LR), None, estimator, **options).hypergradient


def note(sentence: str) -> None:
    """Once, not from every process that measures memory."""
    if multiprocessing.parent_process() is None:
        print(sentence, file=sys.stderr)


def estimators(p: Problem) -> Methods:
    """Our settings for one inner step."""
    methods = {EXACT: ours(p, "exact")}
    methods[FAST] = ours(p, "exact", fused=True)
    methods[LEAN] = ours(p, "exact", fused=True, recompute=True)
    methods[FORWARD] = ours(p, "finite_difference")
    methods[CENTRAL] = ours(p, "finite_difference", scheme="central")
    for terms, words in ((1, "1 term"), (5, "5 terms")):
        methods[f"Neumann, {words} {OTHER}"] = ours(p, "neumann", terms=terms, lr=LR)
    for iterations, words in ((1, "1 iteration"), (5, "5 iterations")):
        # the damping outweighs negative curvature, at which the solver would stop: all iterations are taken
        options = {"iterations": iterations, "damping": 100.0, "tolerance": 0.0}
        methods[f"conjugate gradient, {words} {OTHER}"] = ours(p, "conjugate_gradient", **options)
    return methods


@functools.cache
def peer(name: str) -> Any:
    """The library, or None and one sentence where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        note(f"{name.split('.')[0]} is not installed, so it is left out.")
        return None


def leaves(tensors: Tensors) -> Tensors:
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def towards(loss: Tensor, hparams: Tensors) -> Tensors:
    return dict(zip(hparams, torch.autograd.grad(loss, list(hparams.values())), strict=True))


def exact_peers(p: Problem, steps: int = 1) -> Methods:
    """Libraries that unroll: the same inner steps and the same hypergradient as ours."""
    real, methods = p.data["real"], {}
    if torchopt := peer("torchopt"):
        net = copy.deepcopy(p.network)  # MetaSGD writes into the module; afterwards it gets its parameters back

        def with_torchopt() -> Tensors:
            hparams = leaves(p.hparams)
            before = torchopt.extract_state_dict(net, by="reference")
            optimiser = torchopt.MetaSGD(net, lr=LR)
            for _ in range(steps):
                optimiser.step(p.loss(net(p.image(hparams))))
            found = towards(p.loss(net(real)), hparams)
            torchopt.recover_state_dict(net, before)
            return found

        methods[TORCHOPT] = with_torchopt
    if higher := peer("higher"):

        def with_higher() -> Tensors:
            hparams = leaves(p.hparams)
            optimiser = torch.optim.SGD(p.network.parameters(), lr=LR)
            with higher.innerloop_ctx(p.network, optimiser) as (net, differentiable):
                for _ in range(steps):
                    differentiable.step(p.loss(net(p.image(hparams))))
                return towards(p.loss(net(real)), hparams)

        methods[HIGHER] = with_higher
    return methods


def with_torch_alone(p: Problem) -> Method:
    """A differentiable optimiser of torch.optim on clones of the parameters, for one step and without momentum."""

    def method() -> Tensors:
        hparams, params = leaves(p.hparams), leaves(p.params)
        g = torch.autograd.grad(p.inner(params, hparams), list(params.values()), create_graph=True)
        clones = {name: q.clone() for name, q in params.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of reading .grad of tensors that are no leaves
            optimiser = torch.optim.SGD(clones.values(), lr=LR, differentiable=True)
            for clone, d in zip(clones.values(), g, strict=True):
                clone.grad = d
            optimiser.step()
        return towards(p.outer(clones, hparams), hparams)

    return method


def with_betty(p: Problem, kind: str) -> Method:
    """One step of Betty's engine: the inner step, then its estimator, which looks at the weights after that step."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    logging.disable(logging.INFO)
    found: Tensors = {}

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return p.loss(self.lower(p.data["real"]))

        def custom_optimizer_step(self) -> None:  # afterwards they are gone
            found.update({name: h.grad.clone() for name, h in self.module.items()})

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            hparams = self.upper.module
            return p.loss(self.module(p.image({name: hparams[name] for name in p.hparams})))

    hparams, net = nn.ParameterDict(leaves(p.hparams)), copy.deepcopy(p.network)
    config = Config(type=kind, unroll_steps=1, neumann_iterations=1, neumann_alpha=LR, cg_iterations=1, cg_alpha=LR)
    nothing = [(torch.zeros(1),)] * 1000  # batches: the losses have theirs
    upper, lower = (
        cls(
            name=name,
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=lr),
            config=config,
            train_data_loader=nothing,
        )
        for cls, name, module, lr in ((Upper, "upper", hparams, 0.0), (Lower, "lower", net, LR))
    )
    strategy = "cpu" if p.data["base"].device.type == "cpu" else "gpu"
    engine = Engine(
        config=EngineConfig(train_iters=1, logger_type="none", strategy=strategy),
        problems=[upper, lower],
        dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
    )
    engine.train()

    def method() -> Tensors:
        with torch.no_grad():
            for after, before in zip(net.parameters(), p.network.parameters(), strict=True):
                after.copy_(before)
        engine.global_step += 1
        engine.train_step()
        return found

    return method


def all_methods(p: Problem, steps: int = 1) -> Methods:
    """Everything that gives a hypergradient through one step, and the plain steps."""
    methods = baselines(p) | estimators(p) | exact_peers(p) | {TORCH: with_torch_alone(p)}
    if peer("betty.engine"):
        for kind, words in (("darts", "darts"), ("neumann", "Neumann, 1 iteration"), ("cg", "cg, 1 iteration")):
            methods[f"{BETTY} {words} {OTHER}"] = with_betty(p, kind)
    return methods


def unrolling(p: Problem, steps: int = 1) -> Methods:
    """Everything that gives a hypergradient through several steps."""
    methods = {"unrolled": ours(p, "unrolled", steps=steps)}
    methods["unrolled, checkpoint"] = ours(p, "unrolled", steps=steps, checkpoint=True)
    methods["unrolled, fused"] = ours(p, "unrolled", steps=steps, fused=True)
    methods["unrolled, fused, checkpoint"] = ours(p, "unrolled", steps=steps, fused=True, checkpoint=True)
    methods["unrolled, truncate=1"] = ours(p, "unrolled", steps=steps, truncate=1)
    return methods | exact_peers(p, steps)


# --- Measures ---------------------------------------------------------------------------------------------------------


def synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Times:
    """Milliseconds a call, a value a round."""

    cpu: list[float]
    wall: list[float]

    def main(self) -> list[float]:
        """CPU time, but wall time where a GPU did the work."""
        return self.wall if torch.cuda.is_initialized() else self.cpu

    @property
    def median(self) -> float:
        return statistics.median(self.main())

    def record(self) -> dict[str, list[float]]:
        return {"cpu_ms": [round(t, 3) for t in self.cpu], "wall_ms": [round(t, 3) for t in self.wall]}


def measure(methods: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Times of every method, one value a round, after one round that is not counted."""
    times = {name: Times([], []) for name in methods}
    for counted in range(rounds + 1):
        for name, call in methods.items():
            gc.collect()  # or a method pays for the cycles that another left
            synchronise()
            cpu, wall = time.thread_time(), time.perf_counter()
            call()
            synchronise()
            if counted:
                times[name].cpu.append((time.thread_time() - cpu) * 1e3)
                times[name].wall.append((time.perf_counter() - wall) * 1e3)
    return times


def flops(call: Method) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak(builder: str, network: str, size: int, batch: int, name: str, steps: int, device: str) -> float:
    """MiB that one call of a method needs at most, beyond what the problem itself holds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    build = {"all_methods": all_methods, "unrolling": unrolling}[builder]
    build(problem(network, 32, 1, device=device), 1)[name]()  # what is loaded or allocated once, at first use
    call = build(problem(network, size, batch, device=device), steps)[name]
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def resident(peak: bool) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])  # KiB

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew; Linux only
    before = resident(peak=False)
    call()
    return (resident(peak=True) - before) / 2**10


def peaks(
    builder: str, network: str, size: int, batch: int, names: Iterable[str], steps: int, device: str
) -> dict[str, float]:
    """Peak memory by name; on the CPU each in a process of its own, which has imported but not run anything before."""
    if device == "cuda":
        return {name: peak(builder, network, size, batch, name, steps, device) for name in names}
    # Freed memory goes back to the system at once, so that what is resident is what is in use.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", PYTHONWARNINGS="ignore")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["synthrepro.bilevel", "monai.networks.nets", "torchopt", "higher"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return {name: pool.submit(peak, builder, network, size, batch, name, steps, device).result() for name in names}


def versions() -> dict[str, str]:
    found = {}
    for name in ("monai", "torchopt", "higher", "betty-ml"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def provenance(device: str, rounds: int) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": versions(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": models[0].split(":")[1].strip() if models else platform.processor() or platform.machine(),
        "tf32": device == "cuda" and torch.backends.cudnn.allow_tf32,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }


# --- Sections ---------------------------------------------------------------------------------------------------------

Record = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str, words: int = 1) -> None:
    """Print a table in Markdown whose first columns, as many as ``words``, are words and the rest numbers."""
    print(f"**{title}**\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * words + "--:|" * (len(head) - words))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def over(value: float | None, by: float | None) -> str:
    return "–" if value is None or by is None else f"{value / by:.2f}"


def best(values: dict[str, float]) -> float | None:
    """The least among the exact peers."""
    return min((values[name] for name in PEERS if name in values), default=None)


def peers_section(rounds: int, device: str) -> Record:
    record: Record = {}
    for network in ("UNet", "MONAI UNet"):
        size, batch = 96, 4
        p = problem(network, size, batch, device=device)
        right = reference(network, size, batch, device=device)
        methods = all_methods(p)
        work = {name: flops(call) for name, call in methods.items()}
        errors = {name: relative_error(call(), right) for name, call in methods.items() if name not in (PLAIN, MIXED)}
        times = measure(methods, rounds)
        # five products with H keep the graph that one does
        memory = peaks("all_methods", network, 192, 8, [n for n in methods if " 5 " not in n], 1, device)
        medians = {name: t.median for name, t in times.items()}
        head = "method, FLOPs / plain, CPU ms: median (min), wall ms: median, time / plain, time / best peer, MiB"
        rows = [
            [
                name,
                over(work[name], work[PLAIN]),
                f"{statistics.median(t.cpu):.0f} ({min(t.cpu):.0f})",
                f"{statistics.median(t.wall):.0f}",
                over(t.median, medians[PLAIN]),
                over(t.median, best(medians)),
                f"{memory[name]:.0f}" if name in memory else "–",
                over(memory.get(name), memory[PLAIN]),
                over(memory.get(name), best(memory)),
                f"{errors[name]:.1e}" if name in errors else "–",
            ]
            for name, t in times.items()
        ]
        title = f"{network}, {size} x {size}, batch of {batch}; memory at 192 x 192, batch of 8"
        table([*head.split(", "), "MiB / plain", "MiB / best peer", "relative error"], rows, title)
        record[network] = {
            name: t.record() | {"flops": work[name], "peak_mib": memory.get(name), "relative_error": errors.get(name)}
            for name, t in times.items()
        }
    smooth, right = problem("smooth UNet", 96, 4, device=device), reference("smooth UNet", 96, 4, device=device)
    calls = {n: f for n, f in estimators(smooth).items() if n in (FORWARD, CENTRAL)}
    record["smooth UNet"] = {n: {"relative_error": relative_error(call(), right)} for n, call in calls.items()}
    found = ", ".join(f"{r['relative_error']:.1e} ({name})" for name, r in record["smooth UNet"].items())
    print("The kinks of max-pooling and PReLU are what throws the differences of gradients off: with average pooling")
    print(f"in the first network their relative errors are {found}.\n")
    print(f"Best peer: the least of {', '.join(PEERS)}, all exact. Relative error: against the exact one in float64.")
    print(f"{OTHER} Estimates the derivative of a solution, not of the step: its error is a distance, not a fault.")
    print("Betty: times of a whole engine step. It takes the mixed derivative after the step, and its darts leaves out")
    print("the learning rate, which is a difference in scale.\n")
    return record


def growth_section(rounds: int, device: str) -> Record:
    rounds = max(rounds // 2, 1)
    wanted = (PLAIN, EXACT, FAST, LEAN, FORWARD, TORCHOPT, HIGHER)
    cells = [(size, 4, 16) for size in (64, 96, 128, 192)]
    cells += [(96, 1, 16), (96, 16, 16)]
    cells += [(96, 4, nodes) for nodes in (2, 32, 1000)]
    rows, record = [], []
    for size, batch, nodes in cells:
        p = problem("UNet", size, batch, nodes=nodes, device=device)
        methods = {n: f for n, f in (baselines(p) | estimators(p) | exact_peers(p)).items() if n in wanted}
        times = measure(methods, rounds)
        plain = times[PLAIN].median
        rows.append([f"{size} x {size}", str(batch), str(nodes**2 + 1), f"{plain:.0f}"])
        rows[-1] += [over(t.median, plain) for name, t in times.items() if name != PLAIN]
        record.append(
            {"size": size, "batch": batch, "hyperparameters": nodes**2 + 1}
            | {"methods": {name: t.record() for name, t in times.items()}}
        )
    head = ["image", "batch", "hyperparameters", "plain step, ms", *(name for name in methods if name != PLAIN)]
    table(head, rows, f"UNet: time over that of a plain step, {rounds_of(rounds)}")
    return {"cells": record}


def steps_section(rounds: int, device: str) -> Record:
    rounds = max(rounds // 2, 1)
    size, batch, counts = 48, 2, (1, 2, 4, 8, 16, 32)
    p = problem("UNet", size, batch, device=device)
    times = {steps: measure(unrolling(p, steps), rounds) for steps in counts}
    names = list(times[1])
    memory = {steps: peaks("unrolling", "UNet", size, batch, names, steps, device) for steps in counts}
    title = f"UNet, {size} x {size}, batch of {batch}: K inner steps"
    rows = [[str(steps), *(f"{times[steps][name].median:.0f}" for name in names)] for steps in counts]
    table(["K", *names], rows, f"{title}, ms, {rounds_of(rounds)}")
    rows = [[str(steps), *(f"{memory[steps][name]:.0f}" for name in names)] for steps in counts]
    rows.append(["32 / 8", *(over(memory[32][name], memory[8][name]) for name in names)])
    table(["K", *names], rows, f"{title}, peak memory in MiB (32 / 8 is 4 if linear in K, 2 if in its root)")
    return {
        name: {steps: times[steps][name].record() | {"peak_mib": memory[steps][name]} for steps in counts}
        for name in names
    }


def one_at_a_time(problems: Sequence[Problem]) -> Callable[[], list[Tensors]]:
    methods = [ours(p, "exact") for p in problems]
    return lambda: [method() for method in methods]


def together(problems: Sequence[Problem]) -> Method:
    first, data = problems[0], stack([p.data for p in problems])
    params, hparams = (stack([getattr(p, name) for p in problems]) for name in ("params", "hparams"))
    losses = stacked(first.inner, data), stacked(first.outer, data)
    return lambda: hypergradient(*losses, params, hparams, sgd(LR), seeds=len(problems)).hypergradient


def seeds_section(rounds: int, device: str) -> Record:
    rounds = max(rounds // 2, 1)
    rows, record = [], []
    for network, size, batch in (("tiny UNet", 24, 4), ("UNet", 64, 4)):
        for seeds in (1, 2, 5, 10):
            problems = [problem(network, size, batch, seed=seed, device=device) for seed in range(seeds)]
            times = measure({"one at a time": one_at_a_time(problems), "together": together(problems)}, rounds)
            alone, both = (t.median for t in times.values())
            rows.append([f"{network}, {size} x {size}", str(seeds), f"{alone:.1f}", f"{both:.1f}", over(alone, both)])
            record.append(
                {"network": network, "size": size, "batch": batch, "seeds": seeds}
                | {"methods": {name: t.record() for name, t in times.items()}}
            )
    head = ["network", "seeds", "one at a time, ms", "one batched model, ms", "times faster"]
    table(head, rows, f"Several seeds, exact, {rounds_of(rounds)}")
    return {"cells": record}


def outer_in_bfloat16(p: Problem) -> Method:
    kind = p.data["base"].device.type

    def outer(params: Tensors, hparams: Tensors) -> Tensor:
        with torch.autocast(kind, torch.bfloat16):
            logits = stateless(p.network, params, p.data["real"])
        return p.loss(logits.to(p.data["base"].dtype))

    return lambda: hypergradient(p.inner, outer, p.params, p.hparams, sgd(LR)).hypergradient


def outer_compiled(p: Problem) -> Method:
    compiled = torch.compile(lambda params: p.outer(params, {}))
    return lambda: (
        hypergradient(p.inner, lambda params, _: compiled(params), p.params, p.hparams, sgd(LR)).hypergradient
    )


def as_graph(method: Method) -> Method:
    """A replay of the kernels that one call launches (CUDA only)."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            method()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = method()

    def replay() -> Tensors:
        graph.replay()
        return found

    return replay


def settings_section(rounds: int, device: str) -> Record:
    network, size, batch = "UNet", 96, 4
    p = problem(network, size, batch, device=device)
    last = problem(network, size, batch, device=device, layout=torch.channels_last)
    methods = {PLAIN: baselines(p)[PLAIN], f"{PLAIN}, channels last": baselines(last)[PLAIN]}
    for fused in (False, True):
        words = ", fused" if fused else ""
        methods[f"exact{words}"] = ours(p, "exact", fused)
        methods[f"exact{words}, recompute"] = ours(p, "exact", fused, recompute=True)
        methods[f"exact{words}, channels last"] = ours(last, "exact", fused)
        methods[f"{FORWARD}{words}"] = ours(p, "finite_difference", fused)
    methods["exact, outer pass in bfloat16 (inexact)"] = outer_in_bfloat16(p)
    if device == "cuda":
        tries = {
            "exact, outer pass compiled": lambda: outer_compiled(p),
            "exact, as a CUDA graph": lambda: as_graph(methods[EXACT]),
        }
        for name, build in tries.items():
            try:
                method = build()
                method()
                torch.cuda.synchronize()
            except Exception as error:  # whatever a compiler or a capture fails with
                note(f"Left out: {name}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            else:
                methods[name] = method
    right = reference(network, size, batch, device=device)
    errors = {name: relative_error(call(), right) for name, call in methods.items() if not name.startswith(PLAIN)}
    times = measure(methods, rounds)
    rows = [
        [
            name,
            f"{statistics.median(t.cpu):.0f} ({min(t.cpu):.0f})",
            f"{statistics.median(t.wall):.0f}",
            over(t.median, times[PLAIN].median),
            over(t.median, times[EXACT].median),
            f"{errors[name]:.1e}" if name in errors else "–",
        ]
        for name, t in times.items()
    ]
    head = ["setting", "CPU ms: median (min)", "wall ms: median", "time / plain", "time / exact", "relative error"]
    table(head, rows, f"Settings: {network}, {size} x {size}, batch of {batch}")
    return {name: t.record() | {"relative_error": errors.get(name)} for name, t in times.items()}


def rounds_of(rounds: int) -> str:
    return f"{rounds} round{'s' * (rounds > 1)}"


SECTIONS: dict[str, Callable[[int, str], Record]] = {
    "peers": peers_section,
    "growth": growth_section,
    "steps": steps_section,
    "seeds": seeds_section,
    "settings": settings_section,
}


def save(path: Path, section: str, record: Record) -> None:
    """Put one section into the file, beside the others there."""
    sections = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(sections | {section: record}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7, help="of peers and settings; the others take half as many")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: leave --device out.")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.device == "cuda":
        torch.cuda.init()
    gc.freeze()  # modules and such need not be searched for cycles every time
    for name in options.section:
        where = provenance(options.device, options.rounds)
        print(f"## {name}\n")
        place = where["cpu"] if options.device == "cpu" else where["device"]
        print(f"{place}, {where['threads']} thread, torch {where['torch']}, {rounds_of(options.rounds)}\n", flush=True)
        record = SECTIONS[name](options.rounds, options.device)
        if options.json:
            save(options.json, name, {"provenance": where, "results": record})


if __name__ == "__main__":
    main()
