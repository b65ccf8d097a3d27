"""Experiment `cost`: seconds, FLOPs and memory of one training step of every arm and estimator.

FLOPs and memory are counted, and are the same on every machine; seconds are this one's.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from synthrepro.bilevel import (
    NotConverged,
    after_step,
    conjugate_gradient,
    finite_difference,
    hypergradient,
    neumann,
    stateless,
    unrolled,
)
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Context, Result
from synthrepro.methods.learn2synth.algorithm import inner_update, plain_step
from synthrepro.methods.learn2synth.arms import ArmSettings, Pool, task_of
from synthrepro.methods.learn2synth.known import network_for
from synthrepro.synthesis import GaussianNoise, IntensityNonUniformity, Nonparametric, Parametric
from synthrepro.synthesis.adversarial import Bounds, adversarial_images, consistency_loss, probabilities
from synthrepro.training import LOSSES, stream


class Cost(ArmSettings):
    """Configuration of `cost`."""

    repeats: int  # steps timed; the median counts
    methods: tuple[str, ...] = Field(exclude=True)


def cost_cells(config: Cost) -> list[Cell]:
    """One cell a kind of step; nothing is drawn anew, so one seed."""
    return [Cell(method, "brain-mni", 0) for method in config.methods]


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes that autograd keeps between forward and backward passes at their most: every storage once.

    The largest sum of storages saved and not yet freed; parameters and inputs, which are there anyway, count too.
    """
    alive: dict[int, int] = {}
    count: dict[int, int] = {}
    most = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal most
            self.tensor = tensor.detach()
            self.key = tensor.untyped_storage().data_ptr()
            alive[self.key] = tensor.untyped_storage().nbytes()
            count[self.key] = count.get(self.key, 0) + 1
            most = max(most, sum(alive.values()))

        def __del__(self) -> None:
            count[self.key] -= 1
            if not count[self.key]:
                del alive[self.key], count[self.key]

    # autograd puts its own graph back onto what the second hook returns, so that double backward goes through
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        function()
    return most


def step_of(method: str, config: Cost, context: Context) -> Callable[[], Any]:
    """One step of a method, to be called as often as wanted.

    Methods: ``plain`` (every arm that trains on images as they come or through a fixed augmenter), ``advchain``,
    ``exact`` on the parametric and ``exact-nonparametric`` on the nonparametric augmenter, and on the parametric one
    ``finite-difference``, ``unrolled-4`` (per inner step, see `cost_run`), ``neumann-5``, ``cg-5``, ``neumann-1``.
    """
    task, device = task_of("brain-mni", config), context.device
    pool = Pool(task, config.real["brain-mni"], config.batch, config.spacing, 0, device, None)
    network = network_for(task, config, 0, device)
    loss, update = LOSSES[config.loss], inner_update(config)
    (x, y), (x_real, y_real) = pool.synthetic(0), pool.real(0)
    start = stream(0, "augmenter")
    augmenter = Parametric(IntensityNonUniformity(generator=start), GaussianNoise("fixed", generator=start))
    chosen = (Nonparametric(start) if method == "exact-nonparametric" else augmenter).to(device)
    draw = chosen.draw(x, stream(0, "draw"))
    phi = {name: p.detach() for name, p in network.named_parameters()}
    theta = {name: p.detach() for name, p in chosen.named_parameters()}
    state = update.init(phi)

    def inner(phi: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
        return loss(stateless(network.train(), phi, stateless(chosen, theta, x, draw)), y)

    def outer(phi: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
        return loss(stateless(network.eval(), phi, x_real), y_real)

    def adversarial() -> None:
        network.zero_grad()
        reference = probabilities(network, x_real)
        draws = stream(0, "adversary")
        hard, target = adversarial_images(network, x_real, reference, consistency_loss, Bounds(), generator=draws)
        (loss(network(x_real), y_real) + consistency_loss(network(hard), target)).backward()

    if method == "plain":
        return lambda: plain_step(network, chosen, phi, (x, y, draw), config, state)
    if method == "advchain":
        return adversarial
    if method == "unrolled-4":
        return lambda: unrolled([inner] * 4, outer, phi, theta, update, state)
    estimators: dict[str, Any] = {
        "exact": "exact",
        "exact-nonparametric": "exact",
        "finite-difference": finite_difference,
        "neumann-1": after_step(partial(neumann, terms=1, lr=1e-2)),
        "neumann-5": after_step(partial(neumann, terms=5, lr=1e-2)),
        "cg-5": after_step(partial(conjugate_gradient, iterations=5, damping=100.0, tolerance=0.0)),
    }
    if method not in estimators:
        raise UserError(f"There is no step {method!r}; take plain, advchain, unrolled-4, {', '.join(estimators)}.")
    return lambda: hypergradient(inner, outer, phi, theta, update, state, estimators[method])


def cost_run(cell: Cell, config: Cost, context: Context) -> Result:
    """Seconds, FLOPs and saved memory of a step of the network, synthesis left out; `unrolled-4` is four of them."""
    step = step_of(cell.method, config, context)
    steps = 4 if cell.method == "unrolled-4" else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        with FlopCounterMode(display=False) as counter:
            step()
        memory = saved_bytes(step)
        seconds = []
        for _ in range(config.repeats):
            _wait(context.device)
            began = time.perf_counter()
            step()
            _wait(context.device)
            seconds.append(time.perf_counter() - began)
    return Result(
        {
            "seconds": statistics.median(seconds) / steps,
            "gflops": counter.get_total_flops() / steps / 1e9,
            "saved_megabytes": memory / 1e6,
        }
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
