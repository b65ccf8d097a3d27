"""The algorithm of Learn2Synth: one step, the training loop, and the plain loop beside it."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synthrepro.bilevel import Step, Update, adam, exact, finite_difference, sgd, stateless
from synthrepro.evidence import Config, Context
from synthrepro.synthesis import GaussianNoise, IntensityNonUniformity, Nonparametric, Parametric
from synthrepro.training import LOSSES, stream

Augmenter = GaussianNoise | Parametric | Nonparametric
Pairs = Callable[[int], tuple[Tensor, Tensor]]  # step -> images (B, 1, H, W) and label maps (B, H, W)


class Settings(Config):
    """How a network, and an augmenter with it, is trained."""

    steps: int
    batch: int
    features: tuple[int, ...]  # channels of each level of the segmentation UNet
    norm: Literal["instance"] | None  # the paper's network has none
    loss: Literal["dice", "logit_mse"]  # the paper's soft Dice, or the released commands' logit MSE
    update: Literal["adam", "sgd"]  # the inner step
    lr: float  # of the segmentation network
    hyper_lr: float  # of the augmenter, decaying to zero as a cosine
    every: int  # the augmenter steps once in so many steps of the network (1 in the paper; 1 + 2.7 / every plain steps)
    alpha: float  # weight of the loss on real images (1 in the README, 12 in an older script)
    estimator: Literal["exact", "finite_difference"]


def inner_update(settings: Settings) -> Update:
    """The step of the segmentation network that hypergradients go through."""
    return adam(settings.lr) if settings.update == "adam" else sgd(settings.lr, momentum=0.9)


def learn2synth_step(
    network: nn.Module,
    augmenter: Augmenter,
    phi: dict[str, Tensor],
    theta: dict[str, Tensor],
    synthetic: tuple[Tensor, Tensor, Any],
    real: tuple[Tensor, Tensor],
    settings: Settings,
    state: dict[str, Any] | None,
) -> Step:
    """One Learn2Synth step: a training step on synthetic images and the hypergradient of the loss on real ones.

    Args:
        network: The segmentation network; its own parameters are not used.
        augmenter: The augmenter; its own parameters are not used.
        phi, theta: Parameters of the network and of the augmenter.
        synthetic: Images (B, 1, H, W), label maps (B, H, W) and the augmenter's draw for them.
        real: Images (B, 1, H, W) and label maps (B, H, W); they reach the augmenter only.
        settings: Loss, update, estimator and the weight of the real loss.
        state: State of the inner update.
    """
    x, y, draw = synthetic
    x_real, y_real = real
    loss = LOSSES[settings.loss]

    def inner_loss(phi: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
        augmented = stateless(augmenter, theta, x, draw)
        return loss(stateless(network.train(), phi, augmented), y)

    def outer_loss(phi: dict[str, Tensor], theta: dict[str, Tensor]) -> Tensor:
        return settings.alpha * loss(stateless(network.eval(), phi, x_real), y_real)

    estimator = exact if settings.estimator == "exact" else finite_difference
    return estimator(inner_loss, outer_loss, phi, theta, inner_update(settings), state)


def plain_step(
    network: nn.Module,
    augmenter: Augmenter,
    phi: dict[str, Tensor],
    synthetic: tuple[Tensor, Tensor, Any],
    settings: Settings,
    state: dict[str, Any] | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training step of :func:`learn2synth_step` without the hypergradient: parameters and state after it."""
    x, y, draw = synthetic
    update = inner_update(settings)
    phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
    with torch.no_grad():
        x = augmenter(x, draw)
    loss = LOSSES[settings.loss](stateless(network.train(), phi, x), y)
    gradients = dict(zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True))
    with torch.no_grad():
        return update.step(phi, gradients, update.init(phi) if state is None else state)


def learn2synth(
    network: nn.Module,
    augmenter: Augmenter,
    synthetic: Pairs,
    real: Pairs,
    settings: Settings,
    seed: int,
    context: Context,
) -> list[dict[str, float]]:
    """Train a network and an augmenter in place.

    Args:
        network: Maps images (B, 1, H, W) to logits (B, K, H, W).
        augmenter: Has ``draw(images, generator)`` and ``forward(images, draw)``.
        synthetic, real: Batch of each step.
        settings: Rates, loss, steps.
        seed: Of the augmenter's draws.
        context: For progress and checkpoints; a killed run goes on from the last one.

    Returns:
        A dictionary a step of the augmenter: both losses and every scalar of the augmenter.
    """
    phi = {name: p.detach().clone() for name, p in network.named_parameters()}
    theta: dict[str, Tensor] = dict(augmenter.named_parameters())
    optimiser = torch.optim.Adam(theta.values(), settings.hyper_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps // settings.every)
    state, trail = None, []
    if saved := context.load("learn2synth"):
        phi, state = _to(saved["phi"], context.device), _to(saved["state"], context.device)
        trail = saved["trail"]
        augmenter.load_state_dict(saved["augmenter"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
    for i in context.progress(range(len(trail) * settings.every, settings.steps), "learn2synth"):
        x, y = synthetic(i)
        draw = augmenter.draw(x, stream(seed, f"augmentation {i}"))
        if (i + 1) % settings.every:
            phi, state = plain_step(network, augmenter, phi, (x, y, draw), settings, state)
            continue
        step = learn2synth_step(network, augmenter, phi, theta, (x, y, draw), real(i), settings, state)
        phi, state = step.params, step.state
        for name, p in theta.items():
            p.grad = step.hypergradient[name]
        optimiser.step()
        schedule.step()
        trail.append({"synthetic": step.inner_loss, "real": step.outer_loss} | scalars(augmenter))
        if context.checkpoint_due():
            saved = {"phi": phi, "state": state, "trail": trail, "augmenter": augmenter.state_dict()}
            saved |= {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
            context.save("learn2synth", saved)
    network.load_state_dict(phi, strict=False)
    return [{name: float(value) for name, value in point.items()} for point in trail]


def fit(
    network: nn.Module,
    pairs: Pairs,
    settings: Settings,
    seed: int,
    context: Context,
    augmenter: Augmenter | None = None,
) -> None:
    """Train a network in place by ordinary steps, on images as they come or through a fixed augmenter."""
    loss = LOSSES[settings.loss]
    optimiser: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), settings.lr)
    if settings.update == "sgd":
        optimiser = torch.optim.SGD(network.parameters(), settings.lr, momentum=0.9)
    start = 0
    if saved := context.load("fit"):
        start = saved["step"]
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
    network.train()
    for i in context.progress(range(start, settings.steps), "fit"):
        x, y = pairs(i)
        if augmenter is not None:
            with torch.no_grad():
                x = augmenter(x, augmenter.draw(x, stream(seed, f"augmentation {i}")))
        optimiser.zero_grad()
        loss(network(x), y).backward()
        optimiser.step()
        if context.checkpoint_due():
            states = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
            context.save("fit", {"step": i + 1} | states)


def scalars(augmenter: nn.Module) -> dict[str, Tensor]:
    """What a parametric augmenter has learned, by the name the chapter gives it; nothing for a nonparametric one."""
    found: dict[str, Tensor] = {}
    for module in augmenter.modules():
        if isinstance(module, GaussianNoise):
            names = ("minimum", "maximum") if module.mode == "range" else ("sigma",)
            found |= dict(zip(names, module.sigma.detach().clone(), strict=True))
        if isinstance(module, IntensityNonUniformity):
            found |= dict(zip(("low", "mid", "high"), module.exponents.detach(), strict=True))
    return found


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, dict):
        return {key: _to(value, device) for key, value in tree.items()}
    return tree.to(device) if isinstance(tree, Tensor) else tree
