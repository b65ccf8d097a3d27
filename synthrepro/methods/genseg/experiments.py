"""The tables of GenSeg: which cells they have, and what a cell adds to an arm's scores."""

from typing import Any

import torch
from pydantic import Field
from torch import nn

from synthrepro.evidence import Cell, Context, Result
from synthrepro.methods.genseg.algorithm import paint, pretrain, repeatable, train_jointly
from synthrepro.methods.genseg.arms import (
    ARMS,
    ArmSettings,
    Pool,
    gan_for,
    scored,
    segmenter_for,
    task_of,
    train_segmenter,
)
from synthrepro.metrics import jaccard
from synthrepro.models import pix2pix
from synthrepro.training import segment


class Main(ArmSettings):
    """Configuration of `main`: task -> segmenter -> arms; a task's numbers of labelled images."""

    arms: dict[str, dict[str, tuple[str, ...]]] = Field(exclude=True)
    labels: dict[str, tuple[int, ...]] = Field(exclude=True)
    seeds: int = Field(exclude=True)


def main_cells(config: Main) -> list[Cell]:
    """All seeds of an arm before the next arm."""
    return [
        Cell(arm, task, seed, {"segmenter": name, "labels": n})
        for task, by_segmenter in config.arms.items()
        for name, arms in by_segmenter.items()
        for n in config.labels[task]
        for arm in arms
        for seed in range(config.seeds)
    ]


def main_run(cell: Cell, config: Main, context: Context) -> Result:
    """Train one arm and score it, in domain and out of it."""
    return scored(cell, config, context)


class LabelEfficiency(ArmSettings):
    """Configuration of `label_efficiency`: arm -> numbers of labelled images."""

    tasks: tuple[str, ...] = Field(exclude=True)
    labels: dict[str, tuple[int, ...]] = Field(exclude=True)
    seeds: int = Field(exclude=True)


def label_efficiency_cells(config: LabelEfficiency) -> list[Cell]:
    """A seed of all arms and numbers of labelled images before the next seed."""
    return [
        Cell(arm, task, seed, {"labels": n})
        for task in config.tasks
        for seed in range(config.seeds)
        for arm, numbers in config.labels.items()
        for n in numbers
    ]


def label_efficiency_run(cell: Cell, config: LabelEfficiency, context: Context) -> Result:
    """Train one arm on so many labelled images."""
    return scored(cell, config, context)


class EndToEnd(ArmSettings):
    """Configuration of `end_to_end`."""

    tasks: dict[str, int] = Field(exclude=True)  # task -> labelled images
    arms: tuple[str, ...] = Field(exclude=True)
    seeds: int = Field(exclude=True)


def end_to_end_cells(config: EndToEnd) -> list[Cell]:
    """All seeds of an arm before the next."""
    return [
        Cell(arm, task, seed, {"labels": n})
        for task, n in config.tasks.items()
        for arm in config.arms
        for seed in range(config.seeds)
    ]


def end_to_end_run(cell: Cell, config: EndToEnd, context: Context) -> Result:
    """Train one arm; its record says how far the architecture moved and how long its hypergradient was."""
    return scored(cell, config, context)


class Search(ArmSettings):
    """Configuration of `search`."""

    tasks: dict[str, int] = Field(exclude=True)  # task -> labelled images
    arms: tuple[str, ...] = Field(exclude=True)
    searches: tuple[str, ...] = Field(exclude=True)  # where "genseg" searches besides the configured place
    seeds: int = Field(exclude=True)


def search_cells(config: Search) -> list[Cell]:
    """All seeds of an arm before the next; last, GenSeg with other convolutions searched."""
    found: list[tuple[str, int, str, str]] = [
        (task, n, arm, config.search) for task, n in config.tasks.items() for arm in config.arms
    ]
    found += [(task, n, "genseg", search) for task, n in config.tasks.items() for search in config.searches]
    return [
        Cell(arm, task, seed, {"labels": n, "search": search})
        for task, n, arm, search in found
        for seed in range(config.seeds)
    ]


def search_run(cell: Cell, config: Search, context: Context) -> Result:
    """Train one arm with the convolutions searched that the cell names."""
    return scored(cell, config.model_copy(update={"search": cell.setting["search"]}), context)


class Gamma(ArmSettings):
    """Configuration of `gamma`."""

    tasks: dict[str, int] = Field(exclude=True)  # task -> labelled images
    arms: tuple[str, ...] = Field(exclude=True)
    gammas: tuple[str, ...] = Field(exclude=True)
    seeds: int = Field(exclude=True)


def gamma_cells(config: Gamma) -> list[Cell]:
    """All seeds of an arm and a weight before the next."""
    return [
        Cell(arm, task, seed, {"labels": n, "gamma": gamma})
        for task, n in config.tasks.items()
        for arm in config.arms
        for gamma in config.gammas
        for seed in range(config.seeds)
    ]


def gamma_run(cell: Cell, config: Gamma, context: Context) -> Result:
    """Train one arm with the weight of the generated pairs that the cell names."""
    return scored(cell, config.model_copy(update={"gamma": float(cell.setting["gamma"])}), context)


class Generated(ArmSettings):
    """Configuration of `generated`."""

    tasks: dict[str, int] = Field(exclude=True)  # task -> labelled images
    arms: tuple[str, ...] = Field(exclude=True)
    marks: int  # looks at the generator in each of the two phases
    judge_steps: int  # of the segmenter that judges it
    seeds: int = Field(exclude=True)


def generated_cells(config: Generated) -> list[Cell]:
    """All seeds of an arm before the next."""
    return [
        Cell(arm, task, seed, {"labels": n})
        for task, n in config.tasks.items()
        for arm in config.arms
        for seed in range(config.seeds)
    ]


def generated_run(cell: Cell, config: Generated, context: Context) -> Result:
    """Train one generator and look at what it paints into masks of the test set, as it trains.

    `l1`: mean absolute difference to the test image whose mask it is. `faithful`: Jaccard of what a segmenter trained
    on all real images finds in the painted images, with the masks; `faithful_real`: the same in the real ones.
    """
    task = context.data(task_of(cell.task, config))
    arm, seed, device = ARMS[cell.method], cell.seed, context.device
    pool = Pool(task, int(cell.setting["labels"]), config.batch, seed, device)
    gan, network = gan_for(task, arm, config, seed, device), segmenter_for("unet", task, config, seed, device)
    test = task.splits["test"]
    images, labels = test.images.to(device), test.labels.to(device)
    judge = judge_for(task, config, seed, context)
    trail: dict[str, list[float]] = context.load("trail") or {"step": [], "l1": [], "faithful": []}

    def look(step: int) -> None:
        if step in trail["step"]:  # a resumed run comes by again
            return
        with torch.no_grad(), repeatable(seed):
            weights = {name: p.detach() for name, p in gan.generator.named_parameters()}
            parts = [paint(gan.generator, weights, part, pool.classes) for part in labels.split(config.batch)]
        made = torch.cat(parts)
        trail["step"].append(step)
        trail["l1"].append(float((made - images).abs().mean()))
        trail["faithful"].append(float(jaccard(segment(judge, made).cpu(), test.labels, pool.classes).nanmean()))
        context.save("trail", trail)

    def every(total: int, before: int) -> Any:
        marks = {round(total * (k + 1) / config.marks) for k in range(config.marks)}
        return lambda step: look(before + step) if step in marks else None

    look(0)
    pretrain(gan, pool.first, pool.classes, config, seed, context, every(config.pretrain_steps, 0))
    names = set(pix2pix.architecture(gan.generator)) if arm.drive == "validation" else set()
    if arm.images == "joint":
        later = every(config.steps, config.pretrain_steps)
        train_jointly(gan, network, pool.joint, pool.classes, config, arm.drive, names.__contains__, context, later)
    real = float(jaccard(segment(judge, images).cpu(), test.labels, pool.classes).nanmean())
    final = {name: values[-1] for name, values in trail.items() if name != "step"}
    return Result(final | {"faithful_real": real} | {f"trail {name}": values for name, values in trail.items()})


def judge_for(task: Any, config: Generated, seed: int, context: Context) -> nn.Module:
    """A segmenter trained on all real training images."""
    pool = Pool(task, len(task.splits["train"]), config.batch, seed, context.device, both=True)
    network = segmenter_for("unet", task, config, seed, context.device)
    settings = config.model_copy(update={"steps": config.judge_steps})
    train_segmenter(network, pool, ARMS["real"], None, settings, context, lambda step: None)
    return network
