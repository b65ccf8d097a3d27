"""Experiment `known_augmentation`: the parametric against the nonparametric augmenter where the kind is known.

The "real" images are synthetic ones with noise and a bias field, which is exactly what the parametric augmenter models
and what the nonparametric one must find out.
"""

from typing import Any

import numpy as np
from pydantic import Field

from synthrepro.data import load_task
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Context, Result
from synthrepro.methods.learn2synth.algorithm import Augmenter, fit, learn2synth, scalars
from synthrepro.methods.learn2synth.known import (
    Halves,
    KnownTargets,
    degrader,
    generator,
    network_for,
    target_set,
    trivial_dice,
)
from synthrepro.metrics import cases
from synthrepro.synthesis import GaussianNoise, IntensityNonUniformity, Nonparametric, Parametric
from synthrepro.training import segment, stream


class KnownAugmentation(KnownTargets):
    """Configuration of `known_augmentation`; `bias_noise` is the noise of the targets."""

    target_exponents: str  # preset of the targets' bias field
    nonparametric_lr: float  # of the nonparametric augmenter, in place of `hyper_lr`
    arms: tuple[str, ...] = Field(exclude=True)
    seeds: int = Field(exclude=True)


def known_augmentation_cells(config: KnownAugmentation) -> list[Cell]:
    """All seeds of an arm before the next."""
    return [Cell(arm, "brain-mni", seed) for arm in config.arms for seed in range(config.seeds)]


def known_augmentation_run(cell: Cell, config: KnownAugmentation, context: Context) -> Result:
    """Train one arm against targets with noise and a bias field, and score it on test label maps with the same.

    Arms: ``learn2synth-parametric``, ``learn2synth-nonparametric``, ``synthseg-plain`` (no augmenter).
    """
    task = context.data(load_task(cell.task, **config.anatomy.model_dump()))
    device = context.device
    halves = Halves(task, generator(task, config.anatomy), config.batch, cell.seed, device)
    degrade = degrader(config.bias_noise, config.target_exponents).to(device)
    network = network_for(task, config, cell.seed, device)
    start = stream(cell.seed, "augmenter")
    metrics: dict[str, Any] = {}
    settings = config
    augmenter: Augmenter | None = None
    match cell.method:
        case "learn2synth-parametric":
            augmenter = Parametric(IntensityNonUniformity(generator=start), GaussianNoise("fixed", generator=start))
        case "learn2synth-nonparametric":
            augmenter = Nonparametric(start)
            settings = config.model_copy(update={"hyper_lr": config.nonparametric_lr})
        case "synthseg-plain":
            fit(network, halves.synthetic, config, cell.seed, context)
        case _:
            raise UserError(f"There is no arm {cell.method!r} in known_augmentation.")
    if augmenter is not None:
        targets = halves.target(degrade)
        learn2synth(network, augmenter.to(device), halves.synthetic, targets, settings, cell.seed, context)
        metrics = {name: abs(float(value)) for name, value in scalars(augmenter).items()}  # sigma's sign means nothing
    x, y = target_set(task, halves.synthesis, degrade, device)
    subjects = task.splits["test"].subjects
    found = cases(segment(network, x).cpu(), y.cpu(), subjects, "test", task.classes, config.anatomy.spacing)
    metrics["dice_real"] = float(np.nanmean([case["dice"] for case in found]))
    return Result(metrics | {"dice_trivial": trivial_dice(task, "test")}, found)
