"""Every arm of Learn2Synth's comparison, trained with one budget and scored on the tasks' test sets.

The budget is that of Learn2Synth: `steps` steps, of which one in `every` has a hypergradient and costs as much as 3.9
plain ones. Each arm is scored after as many steps (`dice`) and after as many FLOPs (`dice_flops`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from synthrepro.data import Task, load_task
from synthrepro.evidence import Cell, Context, Result
from synthrepro.methods.learn2synth.algorithm import Augmenter, Pairs, Settings, learn2synth, scalars
from synthrepro.methods.learn2synth.known import network_for
from synthrepro.metrics import cases, dice, jaccard
from synthrepro.models.atlas_mixture import Atlas, segment_by_atlas
from synthrepro.synthesis import GaussianNoise, IntensityNonUniformity, LabelsToImage, Nonparametric, Parametric
from synthrepro.synthesis.adversarial import Bounds, adversarial_images, consistency_loss, probabilities
from synthrepro.synthesis.remaps import IntensityRemap
from synthrepro.training import LOSSES, segment, stream


@dataclass(frozen=True)
class Arm:
    """What an arm may use, and what a step of it costs.

    Attributes:
        label: as tables name it.
        maps: whether it sees label maps without images.
        real: whether it sees real images with their label maps.
        plain_steps: FLOPs of one step in those of a plain training step; None: it has no training steps.
    """

    label: str
    maps: bool
    real: bool
    plain_steps: Callable[[Settings], float] | None


def plain(settings: Settings) -> float:
    """One forward and one backward pass."""
    return 1.0


def hyper(settings: Settings) -> float:
    """A plain step, and once in `every` steps an exact hypergradient, 3.9 plain steps on this network (`cost`).

    11 convolutions a layer in place of 3 make 3.67; the transposed convolutions of the UNet cost more.
    """
    return 1.0 + (3.9 - 1) / settings.every


def adversarial(settings: Settings) -> float:
    """Clean and adversarial images forward and backward, one ascent, which needs no gradients of weights, and the
    reference forward: 3 + 3 + 2 + 1 convolutions a layer in place of 3."""
    return 3.0


ARMS = {
    "supervised": Arm("supervised UNet", False, True, plain),
    "supervised-augmented": Arm("supervised UNet, strong intensity augmentation", False, True, plain),
    "atlas-mixture": Arm("atlas and Gaussian mixture, fitted per image", True, False, None),
    "synthseg": Arm("SynthSeg, its own generator", True, False, plain),
    "synthseg-plain": Arm("naive SynthSeg: Learn2Synth's generator, no augmenter", True, False, plain),
    "synthseg-searched": Arm("the same, noise and bias by random search", True, True, plain),
    "mixed": Arm("mixed SynthSeg", True, True, plain),
    "fine-tuned": Arm("fine-tuned SynthSeg", True, True, plain),
    "advchain": Arm("adversarial augmentation (AdvChain)", False, True, adversarial),
    "learn2synth-parametric": Arm("Learn2Synth, parametric, fixed", True, True, hyper),
    "learn2synth-varying": Arm("Learn2Synth, parametric, varying", True, True, hyper),
    "learn2synth-range": Arm("Learn2Synth, parametric, range", True, True, hyper),
    "learn2synth-nonparametric": Arm("Learn2Synth, nonparametric", True, True, hyper),
}
FOREIGN = "-foreign"  # with this behind its name, an arm takes its label maps from `brain-labelmaps`

# Structures whose intensities SAMSEG lets share a Gaussian: all white matter with the brain stem, and cortices with
# the grey nuclei that are as bright as they.
WHITE = ("cerebral white matter", "cerebellar white matter", "brain stem")
GREY = ("cerebral cortex", "cerebellar cortex", "caudate", "hippocampus", "amygdala")


class ArmSettings(Settings):
    """Configuration that an arm's training depends on."""

    size: tuple[int, int]  # pixels
    spacing: float  # mm
    options: dict[str, dict[str, Any]]  # of each task, beside size and spacing
    real: dict[str, int]  # task -> people whose real images "all" means
    nonparametric_lr: float  # of the nonparametric augmenter, in place of `hyper_lr`: its weights are many and small
    candidates: int  # augmentations tried by random search; they share the compute of Learn2Synth's hypergradients
    levels: int  # of the atlas: places along the head that slices come from


class InDomain(ArmSettings):
    """Configuration of `in_domain`."""

    tasks: tuple[str, ...] = Field(exclude=True)
    arms: tuple[str, ...] = Field(exclude=True)
    foreign: tuple[str, ...] = Field(exclude=True)  # arms of brain-oasis with label maps of other people, too
    seeds: int = Field(exclude=True)


class CrossContrast(ArmSettings):
    """Configuration of `cross_contrast`."""

    tasks: tuple[str, ...] = Field(exclude=True)
    arms: tuple[str, ...] = Field(exclude=True)
    few: tuple[str, ...] = Field(exclude=True)  # arms that are trained with five people's real images, too
    seeds: int = Field(exclude=True)


def in_domain_cells(config: InDomain) -> list[Cell]:
    """All seeds of an arm before the next, one task after the other; last the arms with foreign label maps."""
    found = [(arm, task) for task in config.tasks for arm in config.arms]
    found += [(arm + FOREIGN, "brain-oasis") for arm in config.foreign]
    return [Cell(arm, task, seed) for arm, task in found for seed in range(config.seeds)]


def cross_contrast_cells(config: CrossContrast) -> list[Cell]:
    """All seeds of an arm before the next; first with all people's real images, then with five people's."""
    found = []
    for task in config.tasks:
        for subjects, arms in (("all", config.arms), ("5", config.few)):
            for arm in arms:
                used = subjects if ARMS[arm].real else "none"
                found += [Cell(arm, task, seed, {"subjects": used}) for seed in range(config.seeds)]
    return found


def task_of(name: str, config: ArmSettings) -> Task:
    """A task with the configuration's options."""
    return load_task(name, size=config.size, spacing=config.spacing, **config.options.get(name, {}))


class Pool:
    """What the arms draw their batches from: real pairs, and label maps with a generator that paints them.

    A task with a split "maps" says which label maps are for synthesis; without one, a random half of the training
    people give label maps, the other half real images. A seed redraws who gives real images.

    Args:
        task: Images to train on.
        maps: Label maps (N, H, W) for synthesis in place of the task's own; value K stands for brain without a label,
            which is painted as a class of its own and answered as background.
        people: Number of people whose real images are used.
        seed: Of everything drawn.
    """

    def __init__(
        self, task: Task, people: int, batch: int, spacing: float, seed: int, device: torch.device, maps: Tensor | None
    ) -> None:
        train = task.splits["train"]
        order = torch.randperm(len(train.individuals), generator=stream(seed, "individuals")).tolist()
        named = [train.individuals[i] for i in order]
        if "maps" not in task.splits:
            named, others = named[: len(named) // 2], named[len(named) // 2 :]
            own = train.take(others).labels
        else:
            own = task.splits["maps"].labels
        if people > len(named):
            raise ValueError(f"{task.name} has {len(named)} people to train on, not {people}.")
        real = train.take(named[:people])
        self.images, self.labels = real.images.to(device), real.labels.to(device)
        self.maps = (own if maps is None else maps).to(device)
        self.classes = len(task.classes)
        values = max(self.classes, int(self.maps.max()) + 1)
        self.learn2synth = LabelsToImage.learn2synth(values, spacing=spacing)
        self.synthseg = LabelsToImage.synthseg(values, spacing=spacing)
        self.batch, self.seed = batch, seed

    def real(self, step: int) -> tuple[Tensor, Tensor]:
        """Real images as measured, with their label maps."""
        rows = torch.randint(len(self.labels), (self.batch,), generator=stream(self.seed, f"real {step}"))
        return self.images[rows], self.labels[rows]

    def remapped(self, step: int) -> tuple[Tensor, Tensor]:
        """Real images under strong intensity augmentation."""
        x, y = self.real(step)
        return IntensityRemap()(x, stream(self.seed, f"remap {step}")), y

    def painted(self, step: int, synthesis: LabelsToImage) -> tuple[Tensor, Tensor]:
        """Synthetic images with their deformed label maps."""
        draws = stream(self.seed, f"synthesis {step}")
        rows = torch.randint(len(self.maps), (self.batch,), generator=draws)
        x, y = synthesis(self.maps[rows], draws)
        return x, y.masked_fill(y >= self.classes, 0)

    def synthetic(self, step: int) -> tuple[Tensor, Tensor]:
        """By Learn2Synth's generator."""
        return self.painted(step, self.learn2synth)

    def from_synthseg(self, step: int) -> tuple[Tensor, Tensor]:
        """By SynthSeg's generator."""
        return self.painted(step, self.synthseg)

    def mixed(self, step: int) -> tuple[Tensor, Tensor]:
        """Half a batch synthetic, half real."""
        half = self.batch // 2
        x, y = self.synthetic(step)
        x_real, y_real = self.real(step)
        return torch.cat([x[half:], x_real[:half]]), torch.cat([y[half:], y_real[:half]])


def descend(
    network: nn.Module,
    loss_at: Callable[[int], Tensor],
    settings: Settings,
    marks: Sequence[int],
    context: Context,
    name: str = "descend",
) -> list[dict[str, Tensor]]:
    """Train in place by ordinary steps to the last of `marks`; the network's state at each of them.

    A killed run goes on from its last checkpoint.
    """
    optimiser: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), settings.lr)
    if settings.update == "sgd":
        optimiser = torch.optim.SGD(network.parameters(), settings.lr, momentum=0.9)
    start, kept = 0, {}
    if saved := context.load(name):
        start, kept = saved["step"], saved["kept"]
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
    network.train()
    for i in context.progress(range(start, max(marks)), name):
        optimiser.zero_grad()
        value = loss_at(i)
        if not torch.isfinite(value):
            raise ValueError(f"The loss is {value.item()} at step {i} of {name}: lower the learning rate.")
        value.backward()
        optimiser.step()
        if i + 1 in marks:
            kept[i + 1] = {key: value.detach().clone() for key, value in network.state_dict().items()}
        if context.checkpoint_due():
            states = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
            context.save(name, {"step": i + 1, "kept": kept} | states)
    return [kept[mark] for mark in marks]


def search(pool: Pool, build: Callable[[], nn.Module], settings: ArmSettings, context: Context) -> Augmenter:
    """Noise and bias field by random search: the candidate whose network, trained a while, does best on real images.

    All candidates together take as many FLOPs as Learn2Synth's hypergradients: each starts from the same weights and
    is judged by the loss on all real images of the arm, which Learn2Synth's outer loss sees too. Sigma is log-uniform
    from 0.005 to 0.5, the three exponents are uniform. A short training favours what is easy to learn early, as a
    hypergradient of one step does.
    """
    steps = max(1, round((hyper(settings) - 1) * settings.steps / settings.candidates))
    draws = stream(pool.seed, "candidates")
    loss = LOSSES[settings.loss]
    best: tuple[float, Augmenter] | None = None
    for k in range(settings.candidates):
        sigma = 0.005 * 100 ** float(torch.rand((), generator=draws))
        exponents = torch.rand(3, generator=draws).tolist()
        candidate = Parametric(IntensityNonUniformity(exponents=exponents), GaussianNoise("fixed", sigma))
        candidate = candidate.to(pool.images.device).requires_grad_(False)
        network = build()
        descend(network, augmented(network, candidate, pool, loss), settings, [steps], context, f"candidate {k}")
        network.eval()
        with torch.no_grad():
            parts = zip(pool.images.split(64), pool.labels.split(64), strict=True)
            risk = float(np.mean([float(loss(network(x), y)) for x, y in parts]))
        if best is None or risk < best[0]:
            best = risk, candidate
    assert best is not None
    return best[1]


def augmented(
    network: nn.Module, augmenter: Augmenter, pool: Pool, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[int], Tensor]:
    """Loss of a step on synthetic images through a fixed augmenter."""

    def at(step: int) -> Tensor:
        x, y = pool.synthetic(step)
        with torch.no_grad():
            x = augmenter(x, augmenter.draw(x, stream(pool.seed, f"augmentation {step}")))
        return loss(network(x), y)

    return at


def train_arm(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `arm`: a network trained as the arm says.

    Args:
        spec: method, task, seed, people (of real images), config (:class:`ArmSettings`), data (hashes of the samples,
            so that other files make another artefact).
        folder: Gets ``networks.pt``: states after equal steps and after equal FLOPs, and what was learned beside.
    """
    settings = ArmSettings(**spec["config"])
    task, seed, device = task_of(spec["task"], settings), spec["seed"], context.device
    method = spec["method"].removesuffix(FOREIGN)
    maps = None
    if method != spec["method"]:
        maps = task_of("brain-labelmaps", settings).splits["maps"].labels
    pool = Pool(task, spec["people"], settings.batch, settings.spacing, seed, device, maps)
    network = network_for(task, settings, seed, device)
    if method.startswith("learn2synth"):
        learned = with_learn2synth(method, network, pool, settings, context)
        state = network.state_dict()
        states = [state, state]
    else:
        states, learned = with_plain_steps(method, network, pool, task, settings, context)
    torch.save({"states": states, "learned": learned}, folder / "networks.pt")


def with_learn2synth(
    method: str, network: nn.Module, pool: Pool, settings: ArmSettings, context: Context
) -> dict[str, Any]:
    """Train network and augmenter; the augmenter's scalars and their trail."""
    start = stream(pool.seed, "augmenter")
    if method == "learn2synth-nonparametric":
        augmenter: Augmenter = Nonparametric(start)
        settings = settings.model_copy(update={"hyper_lr": settings.nonparametric_lr})
    else:
        modes = {"parametric": "fixed", "varying": "modulated", "range": "range"}
        mode: Any = modes[method.removeprefix("learn2synth-")]
        augmenter = Parametric(IntensityNonUniformity(generator=start), GaussianNoise(mode, generator=start))
    augmenter = augmenter.to(pool.images.device)
    trail = learn2synth(network, augmenter, pool.synthetic, pool.real, settings, pool.seed, context)
    every = max(1, len(trail) // 50)
    learned: dict[str, Any] = {name: float(value) for name, value in scalars(augmenter).items()}
    if "sigma" in learned:
        learned["sigma"] = abs(learned["sigma"])  # its sign means nothing
    return learned | {f"trail_{name}": [round(point[name], 5) for point in trail[::every]] for name in trail[0]}


def with_plain_steps(
    method: str, network: nn.Module, pool: Pool, task: Task, settings: ArmSettings, context: Context
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Train by ordinary steps; the network's state at both budgets, and what random search chose."""
    loss = LOSSES[settings.loss]
    cost = ARMS[method].plain_steps
    assert cost is not None
    marks = [settings.steps, max(1, round(settings.steps * hyper(settings) / cost(settings)))]
    learned: dict[str, Any] = {}
    batches: dict[str, Pairs] = {
        "supervised": pool.real,
        "supervised-augmented": pool.remapped,
        "synthseg": pool.from_synthseg,
        "synthseg-plain": pool.synthetic,
        "mixed": pool.mixed,
        "fine-tuned": lambda step: pool.synthetic(step) if step < settings.steps // 2 else pool.real(step),
    }
    if method == "synthseg-searched":
        chosen = search(pool, lambda: network_for(task, settings, pool.seed, pool.images.device), settings, context)
        learned = {name: float(value) for name, value in scalars(chosen).items()}
        loss_at = augmented(network, chosen, pool, loss)
        marks[1] = settings.steps  # the search has had the rest
    elif method == "advchain":

        def loss_at(step: int) -> Tensor:
            x, y = pool.real(step)
            reference = probabilities(network, x)
            draws = stream(pool.seed, f"adversary {step}")
            hard, target = adversarial_images(network, x, reference, consistency_loss, Bounds(), generator=draws)
            return loss(network(x), y) + consistency_loss(network(hard), target)

    else:

        def loss_at(step: int) -> Tensor:
            x, y = batches[method](step)
            return loss(network(x), y)

    return descend(network, loss_at, settings, marks, context), learned


def segmenters(cell: Cell, people: int, task: Task, config: ArmSettings, context: Context) -> tuple[Any, Any, Any]:
    """Two functions from images to label maps, of equal steps and of equal FLOPs, and what was learned beside."""
    if cell.method == "atlas-mixture":
        pool = Pool(task, people, config.batch, config.spacing, cell.seed, context.device, None)
        atlas = Atlas.from_labels(pool.maps, len(task.classes), levels=config.levels)
        tissue = ["white" if name in WHITE else "grey" if name in GREY else name for name in task.classes]
        # brain without a label is mostly CSF outside the ventricles
        tissue += [next(n for n in task.classes if n in ("ventricles", "CSF"))] * (atlas.prior.shape[1] - len(tissue))
        gaussians = [tissue.index(name) for name in tissue]

        def answer(images: Tensor) -> Tensor:
            return segment_by_atlas(images, atlas, gaussians)

        return answer, answer, {}
    dump = config.model_dump(mode="json", include=set(ArmSettings.model_fields) - {"levels"})
    named = (cell.task, "brain-labelmaps") if cell.method.endswith(FOREIGN) else (cell.task,)
    dump["options"] = {name: config.options[name] for name in named if name in config.options}
    dump["levels"], dump["real"] = 0, {}  # of other arms, or said by `people`
    for name in named:
        context.data(task_of(name, config))
    spec = {"method": cell.method, "task": cell.task, "seed": cell.seed, "people": people, "config": dump}
    spec |= {"data": dict(sorted(context.data_hashes.items()))}
    saved = torch.load(context.artefact("arm", spec) / "networks.pt", map_location=context.device, weights_only=True)

    def of(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        network = network_for(task, config, cell.seed, context.device)
        network.load_state_dict(state)
        return lambda images: segment(network, images)

    return of(saved["states"][0]), of(saved["states"][1]), saved["learned"]


def by_subject(
    prediction: Tensor, label: Tensor, subjects: Sequence[str], split: str, classes: Sequence[str], spacing: float
) -> list[dict[str, Any]]:
    """Scores of each person: overlap of all slices together, boundary distances as the mean over slices.

    Arguments as :func:`synthrepro.metrics.cases`; a class that a person's slices lack does not count.
    """
    slices = cases(prediction, label, subjects, split, classes, spacing)
    found = []
    for subject in dict.fromkeys(subjects):
        rows = [i for i, name in enumerate(subjects) if name == subject]
        stacked = prediction[rows].flatten(0, 1)[None], label[rows].flatten(0, 1)[None]  # (1, S H, W)
        per_class = dice(*stacked, len(classes))[0]
        row: dict[str, Any] = {"subject": subject, "split": split, "dice": float(per_class.nanmean())}
        row["jaccard"] = float(jaccard(*stacked, len(classes)).nanmean())
        for name in ("surface_dice", "hausdorff95"):
            values = [slices[i][name] for i in rows if slices[i][name] is not None]
            row[name] = float(np.mean(values)) if values else math.nan
        row |= {f"dice_{name.lower()}": float(value) for name, value in zip(classes[1:], per_class, strict=True)}
        found.append({key: round(v, 4) if isinstance(v, float) and math.isfinite(v) else v for key, v in row.items()})
    return [{key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()} for row in found]


def scored(cell: Cell, people: int, config: ArmSettings, context: Context, wanted: Callable[[str], bool]) -> Result:
    """Train an arm, or find it trained, and score it on the test sets that are wanted."""
    task = context.data(task_of(cell.task, config))
    at_steps, at_flops, learned = segmenters(cell, people, task, config, context)
    metrics: dict[str, Any] = dict(learned)
    found: list[dict[str, Any]] = []
    for name, split in task.splits.items():
        if not wanted(name):
            continue
        images = split.images.to(context.device)
        rows = by_subject(at_steps(images).cpu(), split.labels, split.subjects, name, task.classes, config.spacing)
        other = at_flops(images).cpu()
        for row in rows:
            mine = [i for i, subject in enumerate(split.subjects) if subject == row["subject"]]
            stacked = other[mine].flatten(0, 1)[None], split.labels[mine].flatten(0, 1)[None]
            row["dice_flops"] = round(float(dice(*stacked, len(task.classes)).nanmean()), 4)
        for score in ("dice", "dice_flops", "jaccard", "surface_dice", "hausdorff95"):
            metrics[f"{score} {name}"] = float(np.nanmean([row[score] for row in rows]))
        together = split.labels.flatten(0, 1)[None]  # (1, N H, W)
        constant = (
            dice(torch.full_like(together, k), together, len(task.classes)).nan_to_num(0).mean()
            for k in range(1, len(task.classes))
        )
        metrics[f"dice_trivial {name}"] = float(max(constant))
        found += rows
    return Result(metrics, found)


def in_domain_run(cell: Cell, config: InDomain, context: Context) -> Result:
    """Train one arm and score it on people nobody trained on, in the contrast that was trained on.

    On brain-oasis, split "test" is all test people, "test-young" and "test-old" are its parts.
    """
    return scored(
        cell, config.real[cell.task], config, context, lambda name: name in ("test", "test-young", "test-old")
    )


def cross_contrast_run(cell: Cell, config: CrossContrast, context: Context) -> Result:
    """Train one arm on one contrast and score it on that and on four FLASH angles."""
    people = 5 if cell.setting["subjects"] == "5" else config.real[cell.task]
    return scored(cell, people, config, context, lambda name: name == "test" or name.startswith("test-flash"))
