"""The tasks, and how they earned their place: an admission card, measured before any method runs on a task.

A task is admitted if neither position alone nor intensity alone solves it, if it can be solved in every contrast or
style by a network trained there, if few labels cost something, and if a change of contrast or style costs something.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from pydantic import Field
from torch import Tensor, nn

from synthrepro.data import Split, Task, load_task
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Config, Context, Experiment, Record, Result
from synthrepro.metrics import dice, jaccard
from synthrepro.models import unet
from synthrepro.training import seeded, segment, soft_dice_loss, stream


class Admission(Config):
    """Configuration of `admission`.

    Attributes:
        size, spacing, subjects, slices: options of the task; the training individuals are those of the oracle.
        steps, batch, lr: of every training; the rate rises to `lr` and falls to zero along one cycle.
        checks: how often the Dice on the validation split is taken; the best state is kept.
        contrasts: oracles to train, the task's own contrast first.
        labelled: numbers of labelled individuals of the learning curve, below all.
    """

    size: tuple[int, int]
    spacing: float
    subjects: tuple[int, int, int]
    slices: int
    steps: int
    batch: int
    lr: float
    checks: int
    contrasts: tuple[str, ...] = Field(exclude=True)
    labelled: tuple[int, ...] = Field(exclude=True)
    seeds: int = Field(exclude=True)


class Position(nn.Module):
    """A table of logits, one entry a pixel: all that can be known without looking at the image."""

    def __init__(self, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes, *size))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1, -1, -1)


class Intensity(nn.Module):
    """A table of logits, one entry a grey level: all that can be known from a pixel by itself."""

    def __init__(self, classes: int, levels: int = 64) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(levels, classes))

    def forward(self, images: Tensor) -> Tensor:
        level = (images[:, 0] * (len(self.logits) - 1)).round().long()  # (B, H, W)
        return F.embedding(level, self.logits).movedim(-1, 1)


def scored(network: nn.Module, split: Split, classes: int, device: torch.device) -> Tensor:
    """Dice of each foreground class in each image, (N, classes - 1); NaN where an image lacks the class."""
    return dice(segment(network, split.images.to(device)).cpu(), split.labels, classes)


def by_individual(scores: Tensor, split: Split, name: str) -> list[dict[str, Any]]:
    """Mean of an individual's scores over its slices and the classes, as a record's cases."""
    rows = {person: [i for i, each in enumerate(split.subjects) if each == person] for person in split.individuals}
    return [
        {"subject": person, "split": name, "dice": round(float(scores[i].nanmean()), 5)} for person, i in rows.items()
    ]


def train(network: nn.Module, task: Task, labelled: Split, config: Admission, seed: int, context: Context) -> None:
    """Train on the labelled images with soft Dice, and leave the network as it was at its best validation Dice."""
    device, classes = context.device, len(task.classes)
    images, labels = labelled.images.to(device), labelled.labels.to(device)
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.steps)
    draws = stream(seed, "batches")
    best, state = -1.0, network.state_dict()
    for step in context.progress(range(1, config.steps + 1), "training"):
        rows = torch.randint(len(labelled), (config.batch,), generator=draws).to(device)
        optimiser.zero_grad()
        soft_dice_loss(network(images[rows]), labels[rows]).backward()
        optimiser.step()
        schedule.step()
        if step % (config.steps // config.checks) == 0:
            score = float(scored(network, task.splits["validation"], classes, device).nanmean())
            if score > best:
                best, state = score, {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(state)


def cells(config: Admission) -> list[Cell]:
    """The trivial predictors and the oracle first, then the oracles of other contrasts, then the learning curve."""
    own, *others = config.contrasts
    arms = [(method, own, "all") for method in ("position", "intensity", "network")]
    arms += [("network", contrast, "all") for contrast in others]
    arms += [("network", own, str(n)) for n in config.labelled]
    return [
        Cell(method, "brain-mni", seed, {"contrast": contrast, "labelled": labelled})
        for method, contrast, labelled in arms
        for seed in range(config.seeds)
    ]


def run(cell: Cell, config: Admission, context: Context) -> Result:
    """Train one predictor on one contrast, and score it on the test anatomies in every contrast.

    A seed redraws the labelled individuals (those of a smaller number are among those of a larger one), the first
    weights and the batches; the task stays.
    """
    contrast = str(cell.setting["contrast"])
    options = config.model_dump(include={"size", "spacing", "subjects", "slices"})
    task = context.data(load_task(cell.task, contrast=contrast, **options))
    classes, everybody = len(task.classes), task.splits["train"].individuals
    labelled = task.splits["train"]
    if cell.setting["labelled"] != "all":
        order = torch.randperm(len(everybody), generator=stream(cell.seed, "labelled")).tolist()
        labelled = labelled.take([everybody[i] for i in order[: int(cell.setting["labelled"])]])
    build: dict[str, Callable[[], nn.Module]] = {
        "position": lambda: Position(classes, config.size),
        "intensity": lambda: Intensity(classes),
        "network": lambda: unet(task.channels, classes),
    }
    network = seeded(build[cell.method], stream(cell.seed, "weights")).to(context.device)
    train(network, task, labelled, config, cell.seed, context)
    scores = {
        name: scored(network, split, classes, context.device) for name, split in task.splits.items() if name != "train"
    }
    cases = [
        case
        for name, values in scores.items()
        if name != "validation"
        for case in by_individual(values, task.splits[name], f"test-{contrast}" if name == "test" else name)
    ]
    metrics = {"dice": float(scores["test"].nanmean()), "dice_validation": float(scores["validation"].nanmean())}
    per_class = zip(task.classes[1:], scores["test"].nanmean(0).tolist(), strict=True)
    return Result(metrics | {f"dice_{name.lower()}": value for name, value in per_class}, cases)


def criteria(records: Sequence[Record]) -> dict[str, float]:
    """What decides on admission, each a difference of mean test Dice; a task without one of the gaps is not admitted.

    Args:
        records: of one profile and one task, the task's own contrast first.
    """

    def mean(method: str, contrast: str, labelled: str, split: str) -> float:
        wanted = {"contrast": contrast, "labelled": labelled}
        found = [r for r in records if r.cell.method == method and r.cell.setting == wanted]
        return statistics.mean(case["dice"] for r in found for case in r.cases if case["split"] == f"test-{split}")

    own = str(records[0].cell.setting["contrast"])
    trained_on = {(str(r.cell.setting["contrast"]), str(r.cell.setting["labelled"])): None for r in records}
    fewer = sorted((labelled for _, labelled in trained_on if labelled != "all"), key=int)
    oracle = mean("network", own, "all", own)
    found = {
        f"oracle above {method} alone": oracle - mean(method, own, "all", own) for method in ("position", "intensity")
    }
    found |= {f"oracle above {n} labelled": oracle - mean("network", own, n, own) for n in fewer}
    return found | {
        f"oracle of {other} above network of {own}, on {other}": mean("network", other, "all", other)
        - mean("network", own, "all", other)
        for other, labelled in trained_on
        if labelled == "all" and other != own
    }


class LesionAdmission(Config):
    """Configuration of `lesion_admission`.

    Attributes:
        size, subjects: options of the task.
        steps, batch, lr, checks: of every training, as in `Admission`.
        modalities: of the task.
        labelled: numbers of labelled training subjects of the learning curve, below all.
    """

    size: tuple[int, int]
    subjects: tuple[int, int, int]
    steps: int
    batch: int
    lr: float
    checks: int
    modalities: tuple[str, ...] = Field(exclude=True)
    labelled: tuple[int, ...] = Field(exclude=True)
    seeds: int = Field(exclude=True)


LESION_STYLES = {"dermoscopy": ("standard", "camera", "skin"), "ultrasound": ("standard", "probe", "tissue")}


class Colour(nn.Module):
    """A table of logits, one entry a colour: what `Intensity` is to grey images."""

    def __init__(self, classes: int, levels: int = 12) -> None:
        super().__init__()
        self.levels = levels
        self.logits = nn.Parameter(torch.zeros(levels**3, classes))

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = (images * (self.levels - 1)).round().long().unbind(1)  # (B, H, W) each
        return F.embedding((red * self.levels + green) * self.levels + blue, self.logits).movedim(-1, 1)


def lesion_cells(config: LesionAdmission) -> list[Cell]:
    """Trivial predictors and oracle of each modality first, then the oracles of other styles, then the curves."""
    arms = [
        (m, method, "standard", "all") for m in config.modalities for method in ("position", "intensity", "network")
    ]
    arms += [(m, "network", style, "all") for m in config.modalities for style in LESION_STYLES[m][1:]]
    arms += [(m, "network", "standard", str(n)) for m in config.modalities for n in config.labelled]
    return [
        Cell(method, "lesion", seed, {"modality": modality, "style": style, "labelled": labelled})
        for modality, method, style, labelled in arms
        for seed in range(config.seeds)
    ]


def lesion_run(cell: Cell, config: LesionAdmission, context: Context) -> Result:
    """Train one predictor on one style, and score it on the test lesions in every style of the modality.

    What a seed redraws, and which labels a smaller number has, is as in `run`.
    """
    style, options = str(cell.setting["style"]), config.model_dump(include={"size", "subjects"})
    task = context.data(load_task(cell.task, modality=cell.setting["modality"], style=style, **options))
    classes, everybody = len(task.classes), task.splits["train"].individuals
    labelled = task.splits["train"]
    if cell.setting["labelled"] != "all":
        order = torch.randperm(len(everybody), generator=stream(cell.seed, "labelled")).tolist()
        labelled = labelled.take([everybody[i] for i in order[: int(cell.setting["labelled"])]])
    build: dict[str, Callable[[], nn.Module]] = {
        "position": lambda: Position(classes, config.size),
        "intensity": lambda: Colour(classes) if task.channels == 3 else Intensity(classes),
        "network": lambda: unet(task.channels, classes, (16, 32, 64, 128)),
    }
    network = seeded(build[cell.method], stream(cell.seed, "weights")).to(context.device)
    # it reads steps, batch, lr and checks, which both configurations have
    train(network, task, labelled, cast(Admission, config), cell.seed, context)
    metrics: dict[str, float] = {}
    cases: list[dict[str, Any]] = []
    for name, split in task.splits.items():
        if name == "train":
            continue
        maps = segment(network, split.images.to(context.device)).cpu()
        scores = {
            "dice": dice(maps, split.labels, classes)[:, 0],
            "jaccard": jaccard(maps, split.labels, classes)[:, 0],
        }
        if name in ("test", "validation"):
            after = "" if name == "test" else "_validation"
            metrics |= {f"{score}{after}": float(values.mean()) for score, values in scores.items()}
        if name != "validation":
            cases += [
                {"subject": subject, "split": f"test-{style}" if name == "test" else name}
                | {score: round(float(values[i]), 5) for score, values in scores.items()}
                for i, subject in enumerate(split.subjects)
            ]
    return Result(metrics, cases)


class AbdomenAdmission(Config):
    """Configuration of `abdomen_admission`.

    Attributes:
        size, cases, slices: options of the task.
        features: channels of the network at each level, and of its last layer.
        steps, batch, checks: of every training, as in `Admission`; a batch holds no slice twice.
        lr: of the network; the rate rises to it and falls to zero along one cycle.
        table_lr: of the tables, whose entries have further to go than weights.
        labelled: numbers of labelled slices of the learning curve, at least `FEWEST` and below all.
    """

    size: tuple[int, int]
    cases: tuple[int, int, int]
    slices: int
    features: tuple[int, int, int, int, int, int]
    steps: int
    batch: int
    lr: float
    table_lr: float
    checks: int
    labelled: tuple[int, ...] = Field(exclude=True)
    seeds: int = Field(exclude=True)


FEWEST = 4  # labelled slices that show every organ, as few as in the paper on label-efficient diffusion


def labelled_order(train: Split, classes: int, seed: int) -> list[int]:
    """Rows of the training slices in the order in which a seed labels them: at random, but the first four show all.

    So the slices of a smaller number are among those of a larger one, and no organ is without a label.

    Raises:
        UserError: no four slices were found that show every class.
    """
    present = F.one_hot(train.labels.flatten(1), classes).amax(1).bool()  # (N, K)
    draws = stream(seed, "labelled")
    for _ in range(10_000):
        order = torch.randperm(len(train), generator=draws)
        if present[order[:FEWEST]].any(0).all():
            return order.tolist()
    raise UserError(
        f"No {FEWEST} training slices were found that show all {classes - 1} organs: ask for more cases or slices."
    )


def by_volume(
    score: Callable[[Tensor, Tensor, int], Tensor], maps: Tensor, split: Split, slices: int, classes: int
) -> Tensor:
    """A score of each organ over all slices of a case together: (cases, K - 1), NaN where the case lacks the organ.

    Args:
        maps: predicted label maps (N, H, W) of a split whose cases have `slices` rows each, next to one another.
    """
    found, true = (each.unflatten(0, (-1, slices)).flatten(1, 2) for each in (maps, split.labels))  # (cases, S * H, W)
    return score(found, true, classes)


def cross_entropy_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Half cross-entropy, half a Dice loss that pools the batch's pixels class by class and is a mean over the classes.

    So an organ counts whatever its size, and a class that a single slice lacks does not stand for a score of 0.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W), int64.
    """
    loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True, lambda_dice=0.5, lambda_ce=0.5)
    return cast(Tensor, loss(logits, labels[:, None]))


def abdomen_train(
    network: nn.Module,
    task: Task,
    labelled: Split,
    lr: float,
    config: AbdomenAdmission,
    seed: int,
    context: Context,
) -> None:
    """Train on the labelled slices, and leave the network as it was at its best validation Dice per volume."""
    device, classes, validation = context.device, len(task.classes), task.splits["validation"]
    images, labels = labelled.images.to(device), labelled.labels.to(device)
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=config.steps)
    draws = stream(seed, "batches")
    best, state = -1.0, network.state_dict()
    for step in context.progress(range(1, config.steps + 1), "training"):
        rows = torch.randperm(len(labelled), generator=draws)[: config.batch].to(device)
        optimiser.zero_grad()
        cross_entropy_dice_loss(network(images[rows]), labels[rows]).backward()
        optimiser.step()
        schedule.step()
        if step % (config.steps // config.checks) == 0:
            maps = segment(network, validation.images.to(device)).cpu()
            score = float(by_volume(dice, maps, validation, config.slices, classes).nanmean())
            if score > best:
                best, state = score, {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(state)


def abdomen_cells(config: AbdomenAdmission) -> list[Cell]:
    """Every arm at the first seed, then every arm at the next: trivial predictors, oracle, fewer labels."""
    arms = [(method, "all") for method in ("position", "intensity", "network")]
    arms += [("network", str(n)) for n in config.labelled]
    return [
        Cell(method, "abdomen", seed, {"labelled": labelled})
        for seed in range(config.seeds)
        for method, labelled in arms
    ]


def abdomen_run(cell: Cell, config: AbdomenAdmission, context: Context) -> Result:
    """Train one predictor, and score it on the test cases, each as one volume.

    The network keeps the full resolution in its first and last convolutions, as adrenal glands are a few pixels wide.
    What a seed redraws is as in `run`, but slices are labelled, not cases (`labelled_order`).
    """
    task = context.data(load_task(cell.task, **config.model_dump(include={"size", "cases", "slices"})))
    classes, labelled = len(task.classes), task.splits["train"]
    if cell.setting["labelled"] != "all":
        rows = labelled_order(labelled, classes, cell.seed)[: int(cell.setting["labelled"])]
        labelled = Split(labelled.images[rows], labelled.labels[rows], tuple(labelled.subjects[i] for i in rows))
    build: dict[str, Callable[[], nn.Module]] = {
        "position": lambda: Position(classes, config.size),
        "intensity": lambda: Intensity(classes, 256),  # soft tissues share a small part of the grey scale
        "network": lambda: BasicUNet(2, task.channels, classes, config.features),
    }
    network = seeded(build[cell.method], stream(cell.seed, "weights")).to(context.device)
    lr = config.lr if cell.method == "network" else config.table_lr
    abdomen_train(network, task, labelled, lr, config, cell.seed, context)
    metrics: dict[str, float] = {}
    cases: list[dict[str, Any]] = []
    for name, after in (("test", ""), ("validation", "_validation")):
        split = task.splits[name]
        maps = segment(network, split.images.to(context.device)).cpu()
        scores = {
            "dice": by_volume(dice, maps, split, config.slices, classes),
            "jaccard": by_volume(jaccard, maps, split, config.slices, classes),
        }
        means = {score: values.nanmean(1) for score, values in scores.items()}  # a case's, over the organs it has
        metrics |= {f"{score}{after}": float(values.mean()) for score, values in means.items()}
        if name == "test":
            per_organ = zip(task.classes[1:], scores["dice"].nanmean(0).tolist(), strict=True)
            metrics |= {f"dice_{organ}": value for organ, value in per_organ}
            cases = [
                {"subject": subject, "split": name}
                | {score: round(float(values[i]), 5) for score, values in means.items()}
                for i, subject in enumerate(split.individuals)
            ]
    return Result(metrics, cases)


ABDOMEN_MODALITIES = ("abdomen-mr", "abdomen-us")


def abdomen_modalities_cells(config: AbdomenAdmission) -> list[Cell]:
    """Those of `abdomen_cells` in each of `ABDOMEN_MODALITIES`, every one at a seed before the next seed."""
    every = [replace(cell, task=task) for task in ABDOMEN_MODALITIES for cell in abdomen_cells(config)]
    return sorted(every, key=lambda cell: cell.seed)  # cells of one seed stay in order


EXPERIMENTS = {
    "admission": Experiment(
        "admission",
        "Is the task worth a method's trouble? Trivial predictors, oracles, domain shifts, learning curve",
        Admission,
        cells,
        run,
        lambda cell, config: config.steps,
    ),
    "lesion_admission": Experiment(
        "lesion_admission",
        "Is the task lesion worth a method's trouble? As admission, in each modality",
        LesionAdmission,
        lesion_cells,
        lesion_run,
        lambda cell, config: config.steps,
    ),
    "abdomen_admission": Experiment(
        "abdomen_admission",
        "Is the task abdomen worth a method's trouble? Trivial predictors, oracle, learning curve",
        AbdomenAdmission,
        abdomen_cells,
        abdomen_run,
        lambda cell, config: config.steps,
    ),
    "abdomen_modalities_admission": Experiment(
        "abdomen_modalities_admission",
        "Are the tasks abdomen-mr and abdomen-us worth a method's trouble? As abdomen_admission, in each",
        AbdomenAdmission,
        abdomen_modalities_cells,
        abdomen_run,
        lambda cell, config: config.steps,
    ),
}
