"""Experiment `horizon`: what is learned when hypergradients look further than one step ahead.

The authors' noise of 0.05 comes out as 0.042. Is that the bias of a hypergradient of one step, taken on a network that
is still under-trained? Every estimator here trains a network for as many steps on the same images.
"""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from synthrepro.bilevel import (
    NotConverged,
    Step,
    after_step,
    conjugate_gradient,
    finite_difference,
    hypergradient,
    neumann,
    stateless,
    unrolled,
)
from synthrepro.data import load_task
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Context, Result
from synthrepro.methods.learn2synth.algorithm import Pairs, _to, inner_update, scalars
from synthrepro.methods.learn2synth.known import (
    Halves,
    KnownTargets,
    degrader,
    generator,
    network_for,
    noise_level,
    target_set,
    trivial_dice,
)
from synthrepro.metrics import cases
from synthrepro.synthesis import GaussianNoise
from synthrepro.training import LOSSES, segment, stream

ESTIMATORS = ("exact", "finite-difference", "neumann", "cg")  # that step the augmenter at each step of the network


class Horizon(KnownTargets):
    """Configuration of `horizon`."""

    terms: int  # of the Neumann series, and iterations of conjugate gradients
    neumann_lr: float
    damping: float  # of conjugate gradients
    noises: tuple[str, ...] = Field(exclude=True)
    methods: tuple[str, ...] = Field(exclude=True)  # such as "unrolled-4": 4 steps, all differentiated
    seeds: int = Field(exclude=True)


def horizon_cells(config: Horizon) -> list[Cell]:
    """All seeds of an estimator before the next."""
    return [
        Cell(method, "brain-mni", seed, {"noise": noise})
        for noise in config.noises
        for method in config.methods
        for seed in range(config.seeds)
    ]


def window(method: str) -> tuple[int, int | None]:
    """Steps between two steps of the augmenter, and how many of them are differentiated through (None: all).

    ``unrolled-8`` is (8, None), ``truncated-8-2`` is (8, 2); the others step the augmenter at each step.

    Raises:
        UserError: An unknown method.
    """
    if method in ESTIMATORS:
        return 1, None
    match = re.fullmatch(r"unrolled-([1-9]\d*)|truncated-([1-9]\d*)-([1-9]\d*)", method)
    if match is None:
        raise UserError(
            f"There is no hypergradient {method!r}; take {', '.join(ESTIMATORS)}, unrolled-K or truncated-K-T."
        )
    steps, ahead, last = match.groups()
    return (int(steps), None) if steps else (int(ahead), int(last))


def estimator(method: str, config: Horizon) -> str | Callable[..., Step]:
    """What :func:`synthrepro.bilevel.hypergradient` takes, for the methods that look one step ahead or infinitely far.

    The implicit ones pretend that the network is trained to a minimum of the current batch's loss; the Hessian there
    is indefinite, so that conjugate gradients often stop early and warn. That is a finding, not an accident.
    """
    match method:
        case "exact":
            return "exact"
        case "finite-difference":
            return partial(finite_difference, radius=1e-2)
        case "neumann":
            return after_step(partial(neumann, terms=config.terms, lr=config.neumann_lr))
        case _:
            solver = partial(conjugate_gradient, iterations=config.terms, damping=config.damping, tolerance=1e-2)
            return after_step(solver)


def horizon_train(
    method: str,
    network: nn.Module,
    augmenter: GaussianNoise,
    synthetic: Pairs,
    real: Pairs,
    config: Horizon,
    seed: int,
    context: Context,
) -> list[dict[str, float]]:
    """Train network and augmenter in place, `config.steps` steps of the network; a dictionary a step of the augmenter.

    The learning rate of the augmenter decays as in :func:`learn2synth`.
    """
    phi = {name: p.detach().clone() for name, p in network.named_parameters()}
    theta: dict[str, Tensor] = dict(augmenter.named_parameters())
    ahead, truncate = window(method)
    if config.steps % ahead:
        raise UserError(f"{config.steps} steps cannot be taken {ahead} at a time, as {method} does: take a multiple.")
    optimiser = torch.optim.Adam(theta.values(), config.hyper_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps // ahead)
    loss, update, state = LOSSES[config.loss], inner_update(config), None
    trail: list[dict[str, float]] = []
    if saved := context.load("horizon"):
        phi, state, trail = _to(saved["phi"], context.device), _to(saved["state"], context.device), saved["trail"]
        augmenter.load_state_dict(saved["augmenter"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])

    def inner(i: int) -> Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]:
        x, y = synthetic(i)
        draw = augmenter.draw(x, stream(seed, f"augmentation {i}"))
        return lambda phi, theta: loss(stateless(network.train(), phi, stateless(augmenter, theta, x, draw)), y)

    for i in context.progress(range(len(trail) * ahead, config.steps, ahead), "horizon"):
        x_real, y_real = real(i)

        def outer(phi: dict[str, Tensor], theta: dict[str, Tensor], x: Tensor = x_real, y: Tensor = y_real) -> Tensor:
            return config.alpha * loss(stateless(network.eval(), phi, x), y)

        losses = [inner(i + k) for k in range(ahead)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)  # at nearly every step, see `estimator`
            if method.startswith(("unrolled", "truncated")):
                step = unrolled(losses, outer, phi, theta, update, state, truncate=truncate)
            else:
                step = hypergradient(losses[0], outer, phi, theta, update, state, estimator(method, config))
        phi, state = step.params, step.state
        for name, p in theta.items():
            p.grad = step.hypergradient[name]
        optimiser.step()
        schedule.step()
        trail.append({name: float(value) for name, value in scalars(augmenter).items()})
        if context.checkpoint_due():
            saved = {"phi": phi, "state": state, "trail": trail, "augmenter": augmenter.state_dict()}
            context.save("horizon", saved | {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()})
    network.load_state_dict(phi, strict=False)
    return trail


def horizon_run(cell: Cell, config: Horizon, context: Context) -> Result:
    """Learn the noise with one estimator; where it ends, the path there, and the network's Dice."""
    task = context.data(load_task(cell.task, **config.anatomy.model_dump()))
    noise = str(cell.setting["noise"])
    degrade = degrader(noise).to(context.device)
    halves = Halves(task, generator(task, config.anatomy), config.batch, cell.seed, context.device)
    network = network_for(task, config, cell.seed, context.device)
    augmenter = GaussianNoise("fixed", generator=stream(cell.seed, "augmenter")).to(context.device)
    targets = halves.target(degrade)
    trail = horizon_train(cell.method, network, augmenter, halves.synthetic, targets, config, cell.seed, context)
    sigmas = np.abs([point["sigma"] for point in trail])
    metrics: dict[str, Any] = {
        "preset": noise_level(noise)[0],
        "sigma": float(sigmas[-max(1, len(sigmas) // 5) :].mean()),
        "sigma_lowest": float(sigmas.min()),
        "trail_sigma": [round(float(value), 5) for value in sigmas[:: max(1, len(sigmas) // 50)]],
        "dice_trivial": trivial_dice(task, "test"),
    }
    x, y = target_set(task, halves.synthesis, degrade, context.device)
    subjects = task.splits["test"].subjects
    found = cases(segment(network, x).cpu(), y.cpu(), subjects, "test", task.classes, config.anatomy.spacing)
    return Result(metrics, found)
