"""Every arm of GenSeg's comparison, trained on the same labelled images with one budget, scored on unseen ones.

All arms of a seed share the labelled images, the first weights of the segmenter and its real batches, and the
segmenter takes as many steps. An arm that generates sees as many generated pairs in addition, as in the paper, which
costs it more. Of n labelled images a fifth is for validation, in every arm: to choose the segmenter's best state, and
in GenSeg to drive the architecture; only the arm "train-validation" trains on all n, and takes its last state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from synthrepro.data import Split, Task, load_task
from synthrepro.evidence import Cell, Context, Result
from synthrepro.methods.genseg.algorithm import (
    Batch,
    Drive,
    Gan,
    GanSettings,
    Settings,
    draw,
    paint,
    pretrain,
    repeatable,
    segmentation_loss,
    train_jointly,
)
from synthrepro.metrics import cases, jaccard
from synthrepro.models import pix2pix, wgan
from synthrepro.models.segmenters import segmenter
from synthrepro.synthesis.mask_augmentation import MaskAugmentation, PairedAugmentation
from synthrepro.training import seeded, segment, stream

Kind = Literal["rotate", "flip", "translate", "all"]


@dataclass(frozen=True)
class Arm:
    """What an arm trains on.

    Attributes:
        label: as tables name it.
        augmentation: of the real pairs.
        images: where generated images come from, if any: a GAN trained beforehand and frozen ("separate"), one that
            goes on training beside the segmenter ("joint"), or one that makes mask and image together ("wgan").
        drive: what moves the architecture in joint training.
        kernels: of the generator's searched convolutions.
        architecture: where it starts: "even" is near the even mixture, as released, "random" a normal draw of
            standard deviation 1.
        hyper: what the hypergradient moves.
        released_rates: whether joint training takes the released rates of GAN and architecture.
    """

    label: str
    augmentation: Kind | None = None
    images: Literal["separate", "joint", "wgan"] | None = None
    drive: Drive = "none"
    kernels: tuple[int, ...] = pix2pix.KERNELS
    architecture: Literal["even", "random"] = "even"
    hyper: Literal["architecture", "last convolution"] = "architecture"
    released_rates: bool = False


ARMS = {
    "real": Arm("real images only"),
    "rotate": Arm("real images, rotated", augmentation="rotate"),
    "flip": Arm("real images, flipped", augmentation="flip"),
    "translate": Arm("real images, translated", augmentation="translate"),
    "all": Arm("real images, rotated, flipped, translated", augmentation="all"),
    "train-validation": Arm("real images, validation images among them"),
    "wgan": Arm("WGAN that makes mask and image", images="wgan"),
    "separate": Arm("separate: GAN first, then frozen", images="separate"),
    "as-coded": Arm("GenSeg as its code is", images="joint", drive="as-coded", released_rates=True),
    "genseg-released": Arm(
        "GenSeg as written, released rates", images="joint", drive="validation", released_rates=True
    ),
    "genseg": Arm("GenSeg as written", images="joint", drive="validation"),
    "fixed-mixture": Arm("joint, mixture fixed", images="joint"),
    "kernel-8": Arm("joint, one 8 x 8 kernel", images="joint", kernels=(8,)),
    "random-architecture": Arm("joint, random mixture", images="joint", architecture="random"),
    "gan-architecture": Arm("joint, mixture by the GAN loss", images="joint", drive="gan"),
    "weights": Arm("joint, hypergradient on weights", images="joint", drive="validation", hyper="last convolution"),
}


class ArmSettings(Settings):
    """Configuration that an arm's training depends on."""

    checks: int  # how often the segmenter is validated; its best state is kept
    released_generator_lr: float  # 1e-6 in the ISIC script
    released_architecture_lr: float  # 1e-6
    wgan_steps: int  # of the generator
    wgan_lr: float
    segmenters: dict[str, dict[str, Any]]  # options of each segmenter
    options: dict[str, dict[str, Any]]  # of each task, beside size


def task_of(name: str, config: ArmSettings) -> Task:
    """A task with the configuration's options."""
    return load_task(name, size=config.size, **config.options.get(name, {}))


class Pool:
    """The labelled images of a seed, and what the arms draw their batches from.

    Args:
        task: Its split "train" gives the labelled images: one a subject, then a second of each, and so on, so that few
            images show many subjects. More labelled images contain those of fewer.
        n: Labelled images, those for validation included: every fifth of them.
        both: Whether the validation images are trained on, too.
        seed: Of everything drawn.

    Raises:
        ValueError: fewer than 5 labelled images, or more than there are.
    """

    def __init__(self, task: Task, n: int, batch: int, seed: int, device: torch.device, *, both: bool = False) -> None:
        train = task.splits["train"]
        if not 5 <= n <= len(train):
            raise ValueError(f"{task.name} has {len(train)} images to label, so n must be from 5 to that, not {n}.")
        chosen = labelled(train, n, seed)
        held = chosen[4::5]
        used = chosen if both else [row for row in chosen if row not in set(held)]
        self.images, self.labels = train.images[used].to(device), train.labels[used].to(device)
        self.validation = train.images[held].to(device), train.labels[held].to(device)
        self.classes, self.batch, self.seed = len(task.classes), batch, seed

    def real(self, step: int) -> tuple[Tensor, Tensor]:
        """Real images as they are, with their label maps."""
        rows = torch.randint(len(self.labels), (self.batch,), generator=stream(self.seed, f"real {step}"))
        return self.images[rows], self.labels[rows]

    def first(self, step: int) -> tuple[Tensor, Tensor]:
        """The same, drawn for the pre-training of a GAN."""
        rows = torch.randint(len(self.labels), (self.batch,), generator=stream(self.seed, f"first {step}"))
        return self.images[rows], self.labels[rows]

    def augmented(self, step: int, kind: Kind) -> tuple[Tensor, Tensor]:
        """Real images and label maps under one of the standard augmentations."""
        return PairedAugmentation(kind)(*self.real(step), stream(self.seed, f"augmentation {step}"))

    def masks(self, step: int) -> Tensor:
        """Augmented label maps (B, H, W) of training images, to be painted."""
        rows = torch.randint(len(self.labels), (self.batch,), generator=stream(self.seed, f"masks {step}"))
        return MaskAugmentation()(self.labels[rows], stream(self.seed, f"mask augmentation {step}"))

    def joint(self, step: int) -> Batch:
        """What an iteration of the three levels looks at."""
        images, labels = self.real(step)
        x, y = self.validation
        rows = torch.randint(len(y), (self.batch,), generator=stream(self.seed, f"validation {step}"))
        return Batch(images, labels, self.masks(step), (x[rows], y[rows]), draw(self.seed, f"dropout {step}"))


def labelled(train: Split, n: int, seed: int) -> list[int]:
    """Rows of the n labelled images: a random one of each subject in random order, then a second of each, ..."""
    draws = stream(seed, "labelled")
    turns: list[tuple[int, float, int]] = []
    seen: dict[str, int] = {}
    for row in torch.randperm(len(train), generator=draws).tolist():
        subject = train.subjects[row]
        turn = seen[subject] = seen.get(subject, -1) + 1
        turns.append((turn, len(turns), row))
    return [row for _, _, row in sorted(turns)[:n]]


class Keeper:
    """Keeps the state of a network at its best mean Jaccard on the validation images; a later equal one wins."""

    def __init__(self, network: nn.Module, pool: "Pool", config: ArmSettings, context: Context) -> None:
        self.network, self.pool, self.context = network, pool, context
        self.every = max(1, config.steps // config.checks)
        saved = context.load("kept") or {"best": -1.0, "state": copied(network)}
        self.best, self.state = saved["best"], saved["state"]

    def __call__(self, step: int) -> None:
        if step % self.every:
            return
        refresh(self.network, self.pool)
        x, y = self.pool.validation
        found = float(jaccard(segment(self.network, x).cpu(), y.cpu(), self.pool.classes).nanmean())
        if found >= self.best:
            self.best, self.state = found, copied(self.network)
            self.context.save("kept", {"best": self.best, "state": self.state})


def refresh(network: nn.Module, pool: Pool) -> None:
    """Take BatchNorm's running statistics, where there are any, from the training images: hypergradients touch none."""
    with repeatable(pool.seed):  # DeepLabV3 has dropout
        torch.optim.swa_utils.update_bn(pool.images.split(16), network)


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def gan_for(task: Task, arm: Arm, config: GanSettings, seed: int, device: torch.device) -> Gan:
    """Generator and discriminator as a seed starts them."""
    masks, features = len(task.classes) - 1, config.generator_features
    generator = seeded(
        lambda: pix2pix.Generator(
            masks, task.channels, config.size[0], features, config.search, arm.kernels, dropout=config.dropout
        ),
        stream(seed, "generator"),
    )
    if arm.architecture == "random":
        draws = stream(seed, "architecture")
        with torch.no_grad():
            for p in pix2pix.architecture(generator).values():
                p.copy_(torch.randn(p.shape, generator=draws))
    discriminator = seeded(
        lambda: pix2pix.PatchDiscriminator(masks + task.channels, features, config.discriminator_layers),
        stream(seed, "discriminator"),
    )
    return Gan(generator.to(device), discriminator.to(device))  # type: ignore[arg-type]


def segmenter_for(name: str, task: Task, config: "ArmSettings", seed: int, device: torch.device) -> nn.Module:
    """The segmenter as a seed starts it."""
    options = config.segmenters[name]
    build = stream(seed, "weights")
    return seeded(lambda: segmenter(name, task.channels, len(task.classes), **options), build).to(device)


def train_gan(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `gan`: generator and discriminator after pre-training, shared by all arms that start from them.

    Args:
        spec: task, options (of the task), labels (n), seed, kernels, architecture, config (:class:`GanSettings`), data
            (hash of the samples).
        folder: Gets ``gan.pt``.
    """
    config = GanSettings(**spec["config"])
    task = load_task(spec["task"], size=config.size, **spec["options"])
    arm = Arm("", kernels=tuple(spec["kernels"]), architecture=spec["architecture"])
    pool = Pool(task, spec["labels"], config.batch, spec["seed"], context.device)
    found = gan_for(task, arm, config, spec["seed"], context.device)
    pretrain(found, pool.first, pool.classes, config, spec["seed"], context)
    states = {"generator": found.generator.state_dict(), "discriminator": found.discriminator.state_dict()}
    torch.save(states, folder / "gan.pt")


def gan_spec(task: str, labels: int, seed: int, arm: Arm, config: "ArmSettings", data: str) -> dict[str, Any]:
    """What the GAN depends on that an arm starts from. Arms that differ only in what comes later share it."""
    found: dict[str, Any] = {"task": task, "options": config.options.get(task, {}), "labels": labels, "seed": seed}
    found |= {"kernels": list(arm.kernels), "architecture": arm.architecture, "data": data}
    return found | {"config": config.model_dump(mode="json", include=set(GanSettings.model_fields))}


def train_arm(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `arm`: a segmenter trained as the arm says.

    Args:
        spec: method, task, labels (n), seed, segmenter, config (:class:`ArmSettings`), data (hash of the samples), gan
            (address of the GAN it starts from, so that another GAN makes another arm).
        folder: Gets ``arm.pt``: the segmenter at its best validation score, the generator of an arm that has one, and
            what was noted on the way.
    """
    config = ArmSettings(**spec["config"])
    arm, seed, device = ARMS[spec["method"]], spec["seed"], context.device
    task = task_of(spec["task"], config)
    both = spec["method"] == "train-validation"
    pool = Pool(task, spec["labels"], config.batch, seed, device, both=both)
    network = segmenter_for(spec["segmenter"], task, config, seed, device)
    keeper = Keeper(network, pool, config, context)
    saved: dict[str, Any] = {"noted": {"moved": 0.0}}
    if arm.images in ("separate", "joint"):
        gan = gan_for(task, arm, config, seed, device)
        wanted = gan_spec(spec["task"], spec["labels"], seed, arm, config, spec["data"])
        before = torch.load(context.artefact("gan", wanted) / "gan.pt", map_location=device, weights_only=True)
        gan.generator.load_state_dict(before["generator"])
        gan.discriminator.load_state_dict(before["discriminator"])
        if arm.images == "joint":
            saved["noted"] = joint(arm, gan, network, pool, config, context, keeper)
        else:
            weights = {name: p.detach() for name, p in gan.generator.named_parameters()}
            train_segmenter(network, pool, arm, painted(gan, weights, pool), config, context, keeper)
        saved["generator"] = gan.generator.state_dict()
    else:
        synthetic = unconditional(pool, task.channels, config, context) if arm.images == "wgan" else None
        train_segmenter(network, pool, arm, synthetic, config, context, keeper)
    refresh(network, pool)
    saved["segmenter"] = copied(network) if both else keeper.state
    torch.save(saved, folder / "arm.pt")


def joint(
    arm: Arm, gan: Gan, network: nn.Module, pool: Pool, config: ArmSettings, context: Context, keeper: Keeper
) -> dict[str, Any]:
    """Train all networks together; what the architecture did, as a record keeps it."""
    if arm.released_rates:
        rates = {"generator_lr": config.released_generator_lr, "architecture_lr": config.released_architecture_lr}
        config = config.model_copy(update=rates)
    if arm.hyper == "last convolution":  # weights move at the rate of weights
        config = config.model_copy(update={"architecture_lr": config.generator_lr})
    names: set[str] = set()
    if arm.drive in ("validation", "gan"):
        names = set(pix2pix.architecture(gan.generator))
        if arm.hyper == "last convolution":
            names = {name for name in pix2pix.weights(gan.generator) if name.startswith("up.0.")}
    before = {name: p.detach().clone() for name, p in pix2pix.architecture(gan.generator).items()}
    trail = train_jointly(
        gan, network, pool.joint, pool.classes, config, arm.drive, names.__contains__, context, keeper
    )
    noted: dict[str, Any] = {"moved": 0.0}
    for name, p in pix2pix.architecture(gan.generator).items():
        noted["moved"] = max(noted["moved"], float((p.detach().softmax(1) - before[name].softmax(1)).abs().max()))
        noted[f"mixture {name.removesuffix('_architecture')}"] = p.detach().softmax(1).flatten().tolist()
    for name, norms in pix2pix.kernel_norms(gan.generator).items():
        noted[f"norms {name}"] = norms.flatten().tolist()
    if trail:
        every = max(1, len(trail) // 25)
        noted |= {f"trail {name}": [round(point[name], 6) for point in trail[::every]] for name in trail[0]}
        for name in trail[0]:  # a part of length zero has no direction
            values = [point[name] for point in trail if math.isfinite(point[name])]
            noted[f"mean {name}"] = float(np.mean(values)) if values else math.nan
    return noted


Synthetic = Callable[[int], tuple[Tensor, Tensor]]  # step -> generated images and their label maps


def painted(gan: Gan, weights: dict[str, Tensor], pool: Pool) -> Synthetic:
    """Augmented masks, painted by a frozen generator."""

    def at(step: int) -> tuple[Tensor, Tensor]:
        masks = pool.masks(step)
        with repeatable(draw(pool.seed, f"dropout {step}")):
            return paint(gan.generator, weights, masks, pool.classes), masks

    return at


def unconditional(pool: Pool, channels: int, config: ArmSettings, context: Context) -> Synthetic:
    """Train the WGAN that makes mask and image together, and draw from it."""
    size, width = config.size[0], channels + pool.classes - 1
    build, device = stream(pool.seed, "wgan"), pool.images.device
    generator = seeded(lambda: wgan.Generator(width, size, config.generator_features), build).to(device)
    critic = seeded(lambda: wgan.Critic(width, size, config.generator_features), build).to(device)
    optimisers = [torch.optim.Adam(part.parameters(), config.wgan_lr, (0.0, 0.9)) for part in (generator, critic)]
    start = 0
    if saved := context.load("wgan"):
        start = saved["step"]
        for part, optimiser, states in zip((generator, critic), optimisers, saved["states"], strict=True):
            part.load_state_dict(states[0])
            optimiser.load_state_dict(states[1])

    def sample(draws: torch.Generator) -> Tensor:
        return generator(torch.randn(config.batch, wgan.NOISE, generator=draws).to(device))

    for i in context.progress(range(start, config.wgan_steps), "wgan"):
        draws = stream(pool.seed, f"wgan {i}")
        for k in range(wgan.CRITIC_STEPS):
            images, labels = pool.first(i * wgan.CRITIC_STEPS + k)
            real = wgan.join(images, labels, pool.classes)
            optimisers[1].zero_grad()
            wgan.critic_loss(critic, real, sample(draws).detach(), draws).backward()
            optimisers[1].step()
        optimisers[0].zero_grad()
        (-wgan.generator_score(critic, sample(draws))).backward()
        optimisers[0].step()
        if context.checkpoint_due():
            parts = zip((generator, critic), optimisers, strict=True)
            states = [[part.state_dict(), optimiser.state_dict()] for part, optimiser in parts]
            context.save("wgan", {"step": i + 1, "states": states})

    @torch.no_grad()
    def at(step: int) -> tuple[Tensor, Tensor]:
        return wgan.split(sample(stream(pool.seed, f"generated {step}")), channels)

    return at


def train_segmenter(
    network: nn.Module,
    pool: Pool,
    arm: Arm,
    synthetic: Synthetic | None,
    config: ArmSettings,
    context: Context,
    keeper: Callable[[int], None],
) -> None:
    """Train the segmenter alone, in place: on real pairs, augmented or not, and generated ones if there are any."""
    optimiser = torch.optim.Adam(network.parameters(), config.segmenter_lr)
    start = 0
    if saved := context.load("segmenter"):
        start = saved["step"]
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
    for i in context.progress(range(start, config.steps), "segmenter"):
        network.train()
        x, y = pool.real(i) if arm.augmentation is None else pool.augmented(i, arm.augmentation)
        painted_pairs = None if synthetic is None else synthetic(i)
        optimiser.zero_grad()
        with repeatable(draw(pool.seed, f"segmenter {i}")):
            loss = segmentation_loss(network(x), y, config.loss)
            if painted_pairs is not None:
                x, y = painted_pairs
                loss = loss + config.gamma * segmentation_loss(network(x), y, config.loss)
        loss.backward()
        optimiser.step()
        keeper(i + 1)
        if context.checkpoint_due():
            states = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
            context.save("segmenter", {"step": i + 1} | states)


def trained(cell: Cell, config: ArmSettings, context: Context) -> tuple[Task, dict[str, Any]]:
    """The task, and what training the arm left (:func:`train_arm`), trained now unless another cell has done it."""
    task = context.data(task_of(cell.task, config))
    spec = {
        "method": cell.method,
        "task": cell.task,
        "labels": cell.setting["labels"],
        "seed": cell.seed,
        "segmenter": cell.setting.get("segmenter", "unet"),
        "config": only(config, cell),
        "data": context.data_hashes[cell.task],
    }
    if (arm := ARMS[cell.method]).images in ("separate", "joint"):
        data = context.data_hashes[cell.task]
        wanted = gan_spec(cell.task, int(cell.setting["labels"]), cell.seed, arm, config, data)
        spec["gan"] = context.artefact("gan", wanted).name
    return task, torch.load(context.artefact("arm", spec) / "arm.pt", map_location=context.device, weights_only=True)


def only(config: ArmSettings, cell: Cell) -> dict[str, Any]:
    """The configuration as JSON, without what other tasks and segmenters are given."""
    dump = config.model_dump(mode="json", include=set(ArmSettings.model_fields))
    name = str(cell.setting.get("segmenter", "unet"))
    dump["segmenters"] = {name: config.segmenters[name]}
    dump["options"] = {cell.task: config.options[cell.task]} if cell.task in config.options else {}
    return dump


def scored(cell: Cell, config: ArmSettings, context: Context) -> Result:
    """Train one arm and score its segmenter on every test set: per image, as the released code does."""
    task, saved = trained(cell, config, context)
    network = segmenter_for(str(cell.setting.get("segmenter", "unet")), task, config, cell.seed, context.device)
    network.load_state_dict(saved["segmenter"])
    found: list[dict[str, Any]] = []
    metrics: dict[str, Any] = dict(saved["noted"])
    for name, split in task.splits.items():
        if not name.startswith("test"):
            continue
        prediction = segment(network, split.images.to(context.device)).cpu()
        rows = cases(prediction, split.labels, split.subjects, name, task.classes, spacing=1.0)
        for score in ("jaccard", "dice", "surface_dice", "hausdorff95"):
            values = [row[score] for row in rows if row[score] is not None]
            metrics[f"{score} {name}"] = float(np.mean(values)) if values else math.nan
        metrics[f"jaccard_trivial {name}"] = trivial(split, len(task.classes))
        found += rows
    return Result(metrics, found)


def trivial(split: Split, classes: int) -> float:
    """Mean Jaccard of the best answer that is the same for every image: one class everywhere."""
    everywhere = (torch.full_like(split.labels, k) for k in range(1, classes))
    return max(float(jaccard(answer, split.labels, classes).nanmean(1).nanmean()) for answer in everywhere)
