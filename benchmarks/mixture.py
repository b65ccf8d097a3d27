"""What does a mixture of kernel sizes cost in GenSeg's generator, computed as one convolution or as three?

    pip install -e . && python benchmarks/mixture.py --quick

Prints a Markdown table for each generator: forward and backward pass of the up-convolution at each level, then of the
whole generator with searched up- and down-convolutions. Beside the mixture there are the plain layer with the largest
kernel alone, the least that a search over this size can cost, and the sum of separate convolutions, as in GenSeg's
released code. On one CPU thread, methods taking turns within every round, so that a busy machine slows all of them
alike; CPU time leaves out waiting for others. ``--device cuda`` measures wall time there instead.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from synthrepro.models import pix2pix
from synthrepro.models.pix2pix import KERNELS, Generator, MixedConv2d

LARGEST = f"{KERNELS[-1]} x {KERNELS[-1]} alone"
MIXTURE, SEPARATE = "mixture, one convolution", "mixture, separate convolutions"
BATCH = 2  # of the released scripts

Methods = dict[str, Callable[[], list[Tensor]]]  # each returns the gradients


class Separate(MixedConv2d):
    """The same mixture as the sum of its convolutions' outputs."""

    def forward(self, x: Tensor, mixture: Tensor) -> Tensor:
        convolve = F.conv_transpose2d if self.transposed else F.conv2d
        biases = self.biases or [None] * len(self.kernels)
        return sum(
            m * convolve(x, w, b, stride=2, padding=(k - 2) // 2)
            for m, w, b, k in zip(mixture, self.weights, biases, self.kernels, strict=True)
        )  # type: ignore[return-value]


def gradients(network: nn.Module, *given: Tensor) -> Callable[[], list[Tensor]]:
    """A call that computes the gradients of parameters and, where they require one, of what is given."""
    towards = [*network.parameters(), *(t for t in given if t.requires_grad)]
    # Views, for the counter of FLOPs cannot bear a leaf that is given to a module.
    return lambda: list(torch.autograd.grad(network(*(t.view_as(t) for t in given)).square().sum(), towards))


def level_methods(before: int, after: int, side: int, device: str = "cpu") -> Methods:
    """A transposed convolution from ``before`` channels of side x side pixels to ``after`` ones."""
    x = torch.randn(BATCH, before, side, side, device=device, requires_grad=True)
    mixture = torch.full((len(KERNELS),), 1 / len(KERNELS), device=device, requires_grad=True)
    alone = nn.ConvTranspose2d(before, after, KERNELS[-1], 2, (KERNELS[-1] - 2) // 2, bias=False)
    one, separate = (kind(before, after, bias=False, transposed=True) for kind in (MixedConv2d, Separate))
    return {
        LARGEST: gradients(alone.to(device), x),
        MIXTURE: gradients(one.to(device), x, mixture),
        SEPARATE: gradients(separate.to(device), x, mixture),
    }


def generator_methods(size: int, features: int, device: str = "cpu") -> Methods:
    """The generator with all convolutions searched, or none and all of the largest kernel; without dropout."""
    masks = torch.randn(BATCH, 1, size, size, device=device)

    def build(search: str) -> Generator:
        return Generator(1, 3, size, features, search, fixed_kernel=KERNELS[-1], dropout=0.0).to(device)

    one = build("both")
    with patch.object(pix2pix, "MixedConv2d", Separate):
        separate = build("both")
    separate.load_state_dict(one.state_dict())
    return {
        LARGEST: gradients(build("none"), masks),
        MIXTURE: gradients(one, masks),
        SEPARATE: gradients(separate, masks),
    }


def flops(call: Callable[[], object]) -> int:
    """Of the convolutions; the sums of kernels are not counted."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure(methods: Methods, rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds, after one round that is not counted."""
    clock = time.perf_counter if device == "cuda" else time.thread_time
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds + 1):
        for name, call in methods.items():
            wait()
            start = clock()
            call()
            wait()
            times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(kept[1:]) for name, kept in times.items()}


def table(size: int, features: int, rounds: int, device: str) -> None:
    print(f"**{size} x {size}, {features} features, batch of {BATCH}**\n")
    print(f"| | {LARGEST}, ms | {MIXTURE}: time | FLOPs | {SEPARATE}: time | FLOPs |\n|---|--:|--:|--:|--:|--:|")
    up = Generator(1, 3, size, features, "up").up
    cells = {
        f"level {level}, {layer.weights[0].shape[0]} to {layer.weights[0].shape[1]}, from {side} x {side}": (
            lambda layer=layer, side=side: level_methods(*layer.weights[0].shape[:2], side, device)
        )
        for level, layer in enumerate(up)
        for side in [size // 2 ** (level + 1)]
    }
    for row, build in (cells | {"whole generator": lambda: generator_methods(size, features, device)}).items():
        methods = build()
        times, work = measure(methods, rounds, device), {name: flops(call) for name, call in methods.items()}
        found = [f"{v[name] / v[LARGEST]:.2f}" for name in (MIXTURE, SEPARATE) for v in (times, work)]
        print(f"| {row} | {times[LARGEST]:.1f} | {' | '.join(found)} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="about a minute: the small generator alone, three rounds")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: leave --device out.")
    torch.set_num_threads(1)
    rounds = 3 if options.quick else options.rounds
    place = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, one thread"
    print(f"{place}, torch {torch.__version__}, medians of {rounds} rounds, relative to the largest kernel alone\n")
    for size, features in ((64, 16), (256, 64))[: 1 if options.quick else 2]:
        table(size, features, rounds, options.device)


if __name__ == "__main__":
    main()
