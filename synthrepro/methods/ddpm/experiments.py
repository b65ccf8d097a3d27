"""The tables of label-efficient diffusion: which cells they have, and what a cell adds to an arm's scores."""

from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from synthrepro.data import check_task, load_task
from synthrepro.evidence import Cell, Config, Context, Result
from synthrepro.generation import generation_scores
from synthrepro.methods.ddpm.arms import ArmSettings, DdpmSettings, ddpm_spec, scored, task_of
from synthrepro.methods.ddpm.finetuning import rows_of, train
from synthrepro.methods.ddpm.pretraining import sample, unet_of
from synthrepro.models import unet as segmentation_unet
from synthrepro.models.diffusion_unet import load_unet
from synthrepro.models.extractors import inception, unet_extractor
from synthrepro.training import seeded, soft_dice_loss, stream


class Block(Config):
    """Cells of a table: every combination of what it lists, all seeds of one before the next.

    Attributes:
        arms: of :data:`~synthrepro.methods.ddpm.arms.ARMS`.
        ratios: per cent of the training slices that are labelled.
        sizes: S, M or L.
        t: steps at which the UNet is used.
        redrawn: what a seed draws anew: "labels" (which slices), "start" (the pre-training), "training" (the head and
            the batches), or "all". What it does not is drawn by seed 0.
    """

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    ratios: tuple[str, ...]
    sizes: tuple[str, ...] = ("S",)
    t: tuple[int, ...] = (0,)
    redrawn: tuple[str, ...] = ("all",)
    seeds: int


class Table(ArmSettings):
    """Configuration of every table of arms."""

    blocks: tuple[Block, ...] = Field(exclude=True)


def table_cells(config: Table) -> list[Cell]:
    """Block by block; what two blocks list is one cell."""
    found = [
        Cell(arm, task, seed, {"ratio": ratio, "size": size, "t": t, "redrawn": redrawn})
        for block in config.blocks
        for task, arm, ratio, size, t, redrawn in product(
            block.tasks, block.arms, block.ratios, block.sizes, block.t, block.redrawn
        )
        for seed in range(block.seeds)
    ]
    return list(dict.fromkeys(found))


def table_run(cell: Cell, config: Table, context: Context) -> Result:
    """Train one arm, unless another table has, and score it."""
    return scored(cell, config, context)


class Generation(DdpmSettings):
    """Configuration of `generation`.

    Attributes:
        inception: file with the weights of torchvision's Inception v3, null for a segmenter's encoder.
        extractor: channels of that segmenter's levels; extractor_steps, extractor_lr, extractor_batch: its training.
        images: how many are generated, and how many real ones they are compared with.
        pictures: how many of those of the last checkpoint the record keeps, if the task is embedded.
    """

    inception: str | None
    extractor: tuple[int, ...]
    extractor_steps: int
    extractor_lr: float
    extractor_batch: int
    images: int
    pictures: int
    tasks: tuple[str, ...] = Field(exclude=True)
    samplers: dict[str, tuple[int, ...]] = Field(exclude=True)  # sampler -> evaluations an image
    channels: tuple[int, ...] = Field(exclude=True)
    seeds: int = Field(exclude=True)


def generation_cells(config: Generation) -> list[Cell]:
    """All seeds of a width and a sampler before the next."""
    return [
        Cell(sampler, task, seed, {"channels": channels, "evaluations": evaluations})
        for task in config.tasks
        for channels in config.channels
        for sampler, counts in config.samplers.items()
        for evaluations in counts
        for seed in range(config.seeds)
    ]


def generation_run(cell: Cell, config: Generation, context: Context) -> Result:
    """Generate images with every checkpoint of a pre-trained UNet, and compare them with real unlabelled ones.

    The trails `fid`, `sfid`, `precision`, `recall` and `f1` have one value a checkpoint of the trail `iteration`, the
    metrics of the same names are the last ones'. `fid_real` and so on compare two halves of real images: the best
    there is. `samples` are pictures of 8 bits, `samples_count` of them, pixel by pixel in one long row.
    """
    task = context.data(task_of(cell.task, config))
    channels = int(cell.setting["channels"])
    spec = ddpm_spec(cell.task, channels, "noise", cell.seed, config, context.data_hashes[cell.task])
    folder = context.artefact("ddpm", spec)
    extract = extractor_for(cell, len(task.classes), config, context)
    real = task_of_unlabelled(cell.task, config).splits["unlabelled"].images
    rows = torch.randperm(len(real), generator=stream(cell.seed, "real images"))[: 2 * config.images]
    real = real[rows]
    half = len(real) // 2
    first, second = extract(real[:half]), extract(real[half:])
    trail: dict[str, list[Any]] = context.load("trail") or {"iteration": []}
    for path in sorted(folder.glob("step-*"), key=iteration):
        if iteration(path) in trail["iteration"]:  # made before this process began
            continue
        unet = load_unet(path, unet_of(config.size, channels, config.unet, 0)).to(context.device)
        count = int(cell.setting["evaluations"])
        made = sample(unet, half, config.size, cell.method, count, cell.seed, context)  # type: ignore[arg-type]
        scores = generation_scores(*pooled_and_spatial(first, extract(made)))
        for name, value in scores.items():
            trail.setdefault(name, []).append(value)
        trail["iteration"].append(iteration(path))
        trail["samples"] = (made[: config.pictures] * 255).round().int().flatten().tolist()
        context.save("trail", trail)
    best = generation_scores(*pooled_and_spatial(first, second))
    samples = trail.pop("samples")
    pictures: dict[str, Any] = {}
    if check_task(cell.task).family == "embedded":  # pictures made from other people's data are not ours to hand on
        pictures = {"samples": samples, "samples_count": config.pictures}
        pictures |= {"samples_rows": config.size[0], "samples_columns": config.size[1]}
    return Result(
        {name: values[-1] for name, values in trail.items()}
        | pictures
        | {f"{name}_real": value for name, value in best.items()}
        | {f"trail {name}": values for name, values in trail.items()}
        | {"inception": float(config.inception is not None)}
    )


def iteration(path: Path) -> int:
    """k of a folder `step-<k>`."""
    return int(path.name.removeprefix("step-"))


def pooled_and_spatial(real: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """In the order of `generation_scores`."""
    return real[0], made[0], real[1], made[1]


def task_of_unlabelled(name: str, config: DdpmSettings) -> Any:
    """A task with its split "unlabelled"."""
    return task_of(name, config.model_copy(update={"options": {name: unlabelled_options(name, config)}}))


def unlabelled_options(name: str, config: DdpmSettings) -> dict[str, Any]:
    """Options of a task, beside its size, that give it its split "unlabelled"."""
    return config.options.get(name, {}) | config.unlabelled[name]


def extractor_for(cell: Cell, classes: int, config: Generation, context: Context) -> Any:
    """What gives the features that images are compared by: images (N, 1, H, W) -> pooled and spatial features."""
    if config.inception is not None:
        return inception(Path(config.inception)).to(context.device)
    settings = {name: getattr(config, name) for name in ("extractor_steps", "extractor_lr", "extractor_batch")}
    spec: dict[str, Any] = {
        "task": cell.task,
        "options": {"size": list(config.size)} | config.options.get(cell.task, {}),
    }
    spec |= {"features": list(config.extractor), "data": context.data_hashes[cell.task], "classes": classes} | settings
    network = segmentation_unet(1, classes, config.extractor, norm="batch")
    path = context.artefact("extractor", spec) / "extractor.pt"
    network.load_state_dict(torch.load(path, weights_only=True))
    return unet_extractor(network.to(context.device))


def train_extractor(spec: dict[str, Any], folder: Path, context: Context) -> None:
    """Artefact `extractor`: a segmentation UNet trained on all labelled training slices, the same for all seeds.

    Its norms are BatchNorm, since an instance norm would make features blind to an image's contrast.

    Args:
        spec: task, options (of the task), classes, features, extractor_steps, extractor_lr, extractor_batch, data.
        folder: Gets ``extractor.pt``, its state.
    """
    split = load_task(spec["task"], **spec["options"]).splits["train"]
    images, labels = split.images.to(context.device), split.labels.to(context.device)
    build = stream(0, "extractor")
    network: nn.Module = seeded(lambda: segmentation_unet(1, spec["classes"], spec["features"], norm="batch"), build)
    network.to(context.device)

    def batches(k: int) -> tuple[Tensor, Tensor]:
        rows = rows_of(len(images), spec["extractor_batch"], k, 0)
        return images[rows], labels[rows]

    groups = [{"params": list(network.parameters()), "lr": spec["extractor_lr"]}]
    train(network, groups, batches, lambda x, y: soft_dice_loss(network(x), y), spec["extractor_steps"], "no", context)
    torch.save(network.state_dict(), folder / "extractor.pt")
