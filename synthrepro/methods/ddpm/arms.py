"""Every arm of the comparison, trained on the same labelled slices, and the networks that some of them start from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from synthrepro.data import Task, load_task
from synthrepro.errors import UserError
from synthrepro.evidence import Cell, Config, Context, Result
from synthrepro.methods.ddpm.ddpm_seg import DdpmSegSettings, ddpm_seg
from synthrepro.methods.ddpm.finetuning import (
    labelled_slices,
    rows_of,
    segmentation_loss,
    train,
    volume_dice,
    volume_scores,
)
from synthrepro.methods.ddpm.nnunet import nnunet
from synthrepro.methods.ddpm.pretraining import Objective, PretrainSettings, UNetSettings, unet_of
from synthrepro.models.baselines import PRETRAINED, baseline
from synthrepro.models.diffusion_unet import Segmenter, freeze, load_unet, without_steps
from synthrepro.synthesis.mask_augmentation import PairedAugmentation
from synthrepro.training import seeded, segment, stream


@dataclass(frozen=True)
class Arm:
    """What an arm is.

    Attributes:
        label: as tables name it.
        network: the UNet as segmenter ("unet"), pixel classifiers on its features ("ddpm-seg"), "nnunet", or the name
            of a baseline.
        start: what the UNet was pre-trained to do, None for random weights.
        strategy: what is trained of the UNet: "linear", "decoder" or "full".
        plain: whether all that belongs to the step is taken out of the UNet.
        augmented: whether the labelled slices are turned and shifted.
        noised: whether the UNet sees the image at step t of the diffusion instead of the clean one.
        several: whether the head sees several layers of the decoder.
    """

    label: str
    network: str = "unet"
    start: Objective | None = None
    strategy: Literal["linear", "decoder", "full"] = "full"
    plain: bool = False
    augmented: bool = False
    noised: bool = False
    several: bool = False


ARMS = {
    "scratch": Arm("from scratch", plain=True),
    "linear": Arm("linear", start="noise", strategy="linear"),
    "decoder": Arm("fine-tuned decoder", start="noise", strategy="decoder"),
    "full": Arm("everything fine-tuned", start="noise"),
    "scratch-augmented": Arm("from scratch, augmented", plain=True, augmented=True),
    "decoder-augmented": Arm("fine-tuned decoder, augmented", start="noise", strategy="decoder", augmented=True),
    "random-encoder": Arm("decoder on a random encoder", strategy="decoder"),
    "autoencoder": Arm("decoder after an autoencoder", start="image", strategy="decoder"),
    "noised": Arm("fine-tuned decoder, noised image", start="noise", strategy="decoder", noised=True),
    "linear-layers": Arm("linear, several layers", start="noise", strategy="linear", several=True),
    "decoder-layers": Arm("fine-tuned decoder, several layers", start="noise", strategy="decoder", several=True),
    "ddpm-seg": Arm("DDPM-Seg", network="ddpm-seg", start="noise"),
    "deeplabv3plus": Arm("DeepLabV3+", network="deeplabv3plus"),
    "resunet": Arm("ResU-Net", network="resunet"),
    "unetplusplus": Arm("U-Net++", network="unetplusplus"),
    "attention-unet": Arm("Attention U-Net", network="attention-unet"),
    "unetr": Arm("UNETR", network="unetr"),
    "swin-unetr": Arm("Swin UNETR", network="swin-unetr"),
    "nnunet": Arm("nnU-Net 2D", network="nnunet"),
}

PARTS = ("labels", "start", "training")  # what a seed draws: see `Block.redrawn`
RATIOS = ("0.1", "1", "10", "100")  # per cent of the training slices


class Size(Config):
    """One of the paper's sizes: channels of the UNet, and channels within the head."""

    channels: int
    hidden: int


class DdpmSettings(Config):
    """Configuration that pre-training depends on.

    Attributes:
        size: rows and columns of the images.
        options: of each task, beside its size.
        unlabelled: options of each task that give it its split "unlabelled".
        unet: shape of the UNets.
        pretrain: task -> how UNets are pre-trained on it.
        pretrainings: UNets of each kind; seed s starts from the one of seed s mod this.
    """

    size: tuple[int, int]
    options: dict[str, dict[str, Any]]
    unlabelled: dict[str, dict[str, Any]]
    unet: UNetSettings
    pretrain: dict[str, PretrainSettings]
    pretrainings: int


class ArmSettings(DdpmSettings):
    """Configuration that an arm's training depends on.

    Attributes:
        sizes: S, M and L.
        transfer: channels -> iteration whose checkpoint is fine-tuned, null for the last.
        layers: output blocks that a head on several layers sees besides the last.
        steps: ratio -> iterations of a training.
        batch: slices an iteration.
        lr: base rate of "pre-trained" networks, of the UNet that starts from random weights, "unet", and of each
            baseline.
        head_factor: the head's rate over the base rate.
        weight_decay, head_weight_decay: of all but the head, and of the head.
        cache_gib: up to which size the frozen part's outputs are kept; beyond it they are made anew each time.
        precision: as in pre-training.
        ddpm_seg: of DDPM-Seg.
        baselines: base width of each baseline, null for its own.
        imagenet: file with torchvision's weights of a ResNet-34, for the baselines that have one, null for random ones.
        nnunet_cases: ratio -> cases that nnU-Net is given; the paper has 1 and 5 for 1 % and 10 %, and none for 0.1 %.
        nnunet_epochs: of 250 iterations.
        spacing: of each task's pixels, mm.
        boundary: slices of a case on which boundary scores are taken.
    """

    sizes: dict[str, Size]
    transfer: dict[int, int | None]
    layers: tuple[int, ...]
    steps: dict[str, int]
    batch: int
    lr: dict[str, float]
    head_factor: float
    weight_decay: float
    head_weight_decay: float
    cache_gib: float
    precision: Literal["no", "bf16"]
    ddpm_seg: DdpmSegSettings
    baselines: dict[str, int | None]
    imagenet: str | None
    nnunet_cases: dict[str, int]
    nnunet_epochs: int
    spacing: dict[str, float]
    boundary: int


def ddpm_spec(
    task: str, channels: int, objective: Objective, seed: int, config: DdpmSettings, data: str
) -> dict[str, Any]:
    """What a pre-trained UNet depends on; see :func:`~synthrepro.methods.ddpm.pretraining.train_ddpm`."""
    options = {"size": list(config.size)} | config.options.get(task, {}) | config.unlabelled[task]
    found = {"task": task, "options": options, "channels": channels, "objective": objective, "data": data}
    found |= {"unet": config.unet.model_dump(mode="json"), "config": config.pretrain[task].model_dump(mode="json")}
    return found | {"seed": seed % config.pretrainings}


def pretrained(arm: Arm, spec: dict[str, Any], config: ArmSettings, context: Context) -> Path:
    """Folder of the checkpoint that an arm starts from, pre-trained now unless another cell has done it."""
    assert arm.start is not None
    channels = config.sizes[spec["size"]].channels
    wanted = ddpm_spec(spec["task"], channels, arm.start, spec["seeds"]["start"], config, spec["data"])
    settings = config.pretrain[spec["task"]]
    k = config.transfer[channels] or settings.steps
    if k not in {*settings.checkpoints, settings.steps}:
        raise UserError(
            f"Pre-training keeps no checkpoint at iteration {k}: list it in `checkpoints`, or transfer another."
        )
    return context.artefact("ddpm", wanted) / f"step-{k}"


def task_of(name: str, config: DdpmSettings) -> Task:
    """A task with the configuration's options, without unlabelled images."""
    return load_task(name, size=config.size, **config.options.get(name, {}))


def unet_for(arm: Arm, spec: dict[str, Any], config: ArmSettings, context: Context) -> Any:
    """The UNet that an arm starts from, on the CPU."""
    channels = config.sizes[spec["size"]].channels
    fresh = unet_of(config.size, channels, config.unet, spec["seeds"]["start"])
    if arm.start is not None:
        return load_unet(pretrained(arm, spec, config, context), fresh)
    return without_steps(fresh) if arm.plain else fresh


def segmenter_for(arm: Arm, spec: dict[str, Any], classes: int, config: ArmSettings, context: Context) -> Segmenter:
    """The segmenter of an arm as its training starts, with what is frozen frozen."""
    unet = unet_for(arm, spec, config, context)
    noise = torch.randn(1, *config.size, generator=stream(0, "noise")) if arm.noised else None
    layers = config.layers if arm.several else ()
    hidden, build = config.sizes[spec["size"]].hidden, stream(spec["seeds"]["training"], "head")
    network = seeded(lambda: Segmenter(unet, classes, hidden, spec["t"], layers, noise), build)
    freeze(network, arm.strategy)  # type: ignore[arg-type]
    return network.to(context.device)  # type: ignore[return-value]


def train_arm(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `arm`: what an arm predicts on the validation and test slices after its training.

    Args:
        spec: method, task, ratio, size, t, seeds (of each of `PARTS`), config (:class:`ArmSettings`), data (hash of
            the samples), ddpm (address of the UNet it starts from, so that another one makes another arm).
        folder: Gets ``arm.pt``: ``test`` and, but for nnU-Net, ``validation`` (N, H, W), uint8, and the number of
            trained parameters; of a network also ``network.pt``, its state.
    """
    config = ArmSettings(**spec["config"])
    arm, device = ARMS[spec["method"]], context.device
    task = task_of(spec["task"], config)
    found: dict[str, Any] = {"trained": 0}
    if arm.network == "nnunet":
        chosen = labelled_cases(task, config.nnunet_cases[spec["ratio"]], spec["seeds"]["labels"])
        spacing, epochs = config.spacing[spec["task"]], config.nnunet_epochs
        found["test"] = nnunet(task, chosen, context.folder / "nnunet", spacing=spacing, epochs=epochs, device=device)
        torch.save(found, folder / "arm.pt")
        return
    images, labels = labelled(task, spec["ratio"], config, spec["seeds"]["labels"])
    if arm.network == "ddpm-seg":
        unet = unet_for(arm, spec, config, context).to(device)
        classes = len(task.classes)
        predict = ddpm_seg(unet, images, labels, classes, config.ddpm_seg, spec["seeds"]["training"], context)
    else:
        network = network_for(arm, spec, task, config, context)
        fit(network, arm, images.to(device), labels.to(device), spec, config, context)
        found["trained"] = sum(p.numel() for p in network.parameters() if p.requires_grad)
        torch.save(network.state_dict(), folder / "network.pt")

        def predict(x: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                return segment(network, x.to(device), 16).cpu()

    for name in ("validation", "test"):
        found[name] = predict(task.splits[name].images).to(torch.uint8)
    torch.save(found, folder / "arm.pt")


def labelled(task: Task, ratio: str, config: ArmSettings, seed: int) -> tuple[Tensor, Tensor]:
    """The labelled slices of a seed: a batch of them that shows every organ, or a random share of the training set."""
    split = task.splits["train"]
    n = max(config.batch, round(float(ratio) / 100 * len(split)))
    rows = labelled_slices(split, n, len(task.classes), seed, every_class=n == config.batch)
    return split.images[rows], split.labels[rows]


def labelled_cases(task: Task, n: int, seed: int) -> list[str]:
    """The n labelled cases of a seed, for nnU-Net, which learns from whole ones."""
    everybody = task.splits["train"].individuals
    return [everybody[i] for i in torch.randperm(len(everybody), generator=stream(seed, "labelled"))[:n].tolist()]


def network_for(arm: Arm, spec: dict[str, Any], task: Task, config: ArmSettings, context: Context) -> nn.Module:
    """An arm's network as its training starts."""
    classes = len(task.classes)
    if arm.network == "unet":
        return segmenter_for(arm, spec, classes, config, context)
    features, weights = config.baselines[arm.network], config.imagenet and Path(config.imagenet)
    build = stream(spec["seeds"]["start"], "weights")
    return seeded(
        lambda: baseline(arm.network, classes, config.size, features=features, weights=weights or None), build
    ).to(context.device)


def fit(
    network: nn.Module,
    arm: Arm,
    images: Tensor,
    labels: Tensor,
    spec: dict[str, Any],
    config: ArmSettings,
    context: Context,
) -> None:
    """Train an arm's network, in place, on images (n, 1, H, W) and label maps (n, H, W).

    What the frozen part makes of the images is made once and kept, unless they change from batch to batch or it is
    larger than `cache_gib`.
    """
    seed, steps = spec["seeds"]["training"], config.steps[spec["ratio"]]
    lr = config.lr["pre-trained" if arm.start else arm.network]
    frozen, rest = parts(network, arm)
    augmentation = PairedAugmentation("all", flip=0.0)  # a mirrored abdomen has its liver on the wrong side

    kept = None if frozen is None or arm.augmented else kept_outputs(frozen, images, config)

    def batches(k: int) -> tuple[Any, Tensor]:
        rows = rows_of(len(images), config.batch, k, seed)
        if kept is not None:
            return [part[rows] for part in kept], labels[rows]
        x, y = images[rows], labels[rows]
        if arm.augmented:
            x, y = augmentation(x, y, stream(seed, f"augmentation {k}"))
        if frozen is None:
            return x, y
        with torch.no_grad(), torch.autocast(context.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return frozen(x), y

    if isinstance(network, Segmenter):
        body = [p for name, p in network.named_parameters() if p.requires_grad and not name.startswith("head.")]
        groups = [
            {"params": body, "lr": lr, "weight_decay": config.weight_decay},
            {
                "params": list(network.head.parameters()),
                "lr": lr * config.head_factor,
                "weight_decay": config.head_weight_decay,
            },
        ]
    else:
        groups = [{"params": list(network.parameters()), "lr": lr, "weight_decay": config.weight_decay}]
    train(
        network,
        [group for group in groups if group["params"]],
        batches,
        lambda x, y: segmentation_loss(rest(x).float(), y),
        steps,
        config.precision,
        context,
    )


@torch.no_grad()
def kept_outputs(frozen: Any, images: Tensor, config: ArmSettings) -> list[Tensor] | None:
    """What the frozen part makes of all images, or None if that is larger than `cache_gib`."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        first = frozen(images[: config.batch])
        size = sum(part.nbytes for part in first) / len(first[0]) * len(images)
        if size > config.cache_gib * 2**30:
            return None
        kept = [part.new_empty(len(images), *part.shape[1:]) for part in first]
        for rows in torch.arange(len(images)).split(config.batch):
            for whole, part in zip(kept, frozen(images[rows]), strict=True):
                whole[rows] = part
        return kept


def parts(network: nn.Module, arm: Arm) -> tuple[Any, Any]:
    """The network in two functions: what is frozen (None if nothing is), and the rest, which takes its outputs."""
    if not isinstance(network, Segmenter) or arm.strategy == "full":
        return None, network
    if arm.strategy == "decoder":
        return network.encode, network.decode
    return lambda x: (network.features(network.encode(x)),), lambda found: network.head(found[0])


def predicted(cell: Cell, config: ArmSettings, context: Context) -> tuple[Task, dict[str, Any]]:
    """The task, and what training the arm left (:func:`train_arm`), trained now unless another cell has done it."""
    task = context.data(task_of(cell.task, config))
    arm = ARMS[cell.method]
    spec: dict[str, Any] = {
        "method": cell.method,
        "task": cell.task,
        "ratio": cell.setting["ratio"],
        "size": cell.setting["size"],
        "t": cell.setting["t"],
        "seeds": {part: cell.seed if cell.setting["redrawn"] in ("all", part) else 0 for part in PARTS},
        "config": only(config, cell),
        "data": context.data_hashes[cell.task],
    }
    if arm.start is not None:
        spec["seeds"]["start"] %= config.pretrainings
        spec["ddpm"] = pretrained(arm, spec, config, context).parent.name
    return task, torch.load(context.artefact("arm", spec) / "arm.pt", weights_only=True)


def only(config: ArmSettings, cell: Cell) -> dict[str, Any]:
    """The configuration as JSON, without what other tasks, sizes, ratios and arms are given."""
    dump = config.model_dump(mode="json", include=set(ArmSettings.model_fields))
    size = str(cell.setting["size"])
    wanted: dict[str, Any] = {
        "options": cell.task,
        "unlabelled": cell.task,
        "spacing": cell.task,
        "pretrain": cell.task,
    }
    wanted |= {"sizes": size, "steps": cell.setting["ratio"], "nnunet_cases": cell.setting["ratio"]}
    wanted |= {"baselines": ARMS[cell.method].network, "transfer": config.sizes[size].channels}
    if ARMS[cell.method].start is None:  # what it does not start from is no part of its address
        wanted |= {"unlabelled": None, "pretrain": None, "transfer": None}
        dump["pretrainings"] = 1
    if ARMS[cell.method].network not in PRETRAINED:
        dump["imagenet"] = None
    for name, key in wanted.items():
        dump[name] = {k: value for k, value in dump[name].items() if str(k) == str(key)}
    return dump


def scored(cell: Cell, config: ArmSettings, context: Context) -> Result:
    """Train one arm and score what it predicts on the test cases; on the validation cases, only the mean Dice."""
    task, found = predicted(cell, config, context)
    arguments = task.classes, config.spacing[cell.task], config.boundary
    cases = volume_scores(found["test"].long(), task.splits["test"], "test", *arguments)
    metrics: dict[str, Any] = {"trained": found["trained"], "dice_validation": float("nan")}
    if "validation" in found:
        volumes = volume_dice(found["validation"].long(), task.splits["validation"], len(task.classes))
        metrics["dice_validation"] = float(volumes.nanmean(1).nanmean())
    for score in [name for name in cases[0] if name not in ("subject", "split")]:
        metrics[score] = mean(cases, score)
    metrics["dice_trivial"] = trivial(task)
    return Result(metrics, cases)


def mean(cases: Sequence[dict[str, Any]], score: str) -> float:
    """Mean over the cases that have the score, NaN if none has."""
    values = [case[score] for case in cases if case[score] is not None]
    return float(np.mean(values)) if values else float("nan")


def trivial(task: Task) -> float:
    """Mean Dice per volume of the best answer that is the same for every slice: one class everywhere."""
    split, k = task.splits["test"], len(task.classes)
    everywhere = (torch.full_like(split.labels, c) for c in range(1, k))
    return max(float(volume_dice(answer, split, k).nanmean(1).nanmean()) for answer in everywhere)
