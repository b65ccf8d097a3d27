r"""The tables of SynthFM: which cells they have, and how a cell is scored."""

from collections.abc import Callable
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from synthrepro.data import Split, abdomen, abdomen_mr, abdomen_us
from synthrepro.evidence import Cell, Config, Context, Result
from synthrepro.methods.synthfm.arms import ARMS, RANGES, ArmSettings, task_of, trained
from synthrepro.methods.synthfm.segmenting import Prompt, answer
from synthrepro.methods.synthfm.structures import Structures, few, groups, mean_of, rows_of_subjects, structures_of
from synthrepro.models.sam import by_oracle, by_predicted_iou, embed, from_side, single
from synthrepro.synthesis.prompts import BoxPrompts, PointPrompts
from synthrepro.training import stream

Modality = Literal["ct", "mr", "us"]
Prompts = Literal["1,0", "3,0", "1,2", "3,2", "box", "box,1,0", "mask"]
MOST = (3, 2)  # points inside and outside of a structure that are drawn; fewer are the first of them

# The task `abdomen` has three renderings of the same people, each a task of its own; a real task has one modality.
RENDERINGS = {"ct": abdomen, "mr": abdomen_mr, "us": abdomen_us}  # modules, so that records know their code


class Block(Config):
    """Cells of a table: every combination of what it lists, all seeds of one before the next.

    Attributes:
        tasks: "abdomen" is shown in each of `modalities`; other tasks have one, which is all that is listed then.
        arms: of :data:`~synthrepro.methods.synthfm.arms.ARMS`.
        prompts: points inside and outside, "box", "box,1,0" (a box and a point), or "mask": a point, and
            then the same point with the answer to it as a mask prompt.
        models: what decoders start from, "promptable" for the baseline or a key of `checkpoints`.
        ranges: of the generator: "halved", "ours" or "doubled".
    """

    tasks: tuple[str, ...]
    modalities: tuple[Modality, ...]
    arms: tuple[str, ...]
    prompts: tuple[Prompts, ...] = ("1,0",)
    models: tuple[str, ...] = ("promptable",)
    ranges: tuple[str, ...] = ("ours",)
    seeds: int

    @model_validator(mode="after")
    def _known(self) -> "Block":
        for names, known in ((self.arms, ARMS), (self.ranges, RANGES)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return self


class Table(ArmSettings):
    """Configuration of every table.

    Attributes:
        images: of each test subject, evenly spread.
        smallest: area from which on a structure is tested, in shares of the image.
        spacing: of each task's pixels, mm.
    """

    images: int
    smallest: float
    spacing: dict[str, float]
    blocks: tuple[Block, ...] = Field(exclude=True)


def table_cells(config: Table) -> list[Cell]:
    """Block by block; what two blocks list is one cell."""
    found = [
        Cell(arm, task, seed, {"modality": modality, "prompts": prompts, "model": model, "ranges": ranges})
        for block in config.blocks
        for task, modality, prompts, arm, model, ranges in product(
            block.tasks, block.modalities, block.prompts, block.arms, block.models, block.ranges
        )
        for seed in range(block.seeds)
    ]
    return list(dict.fromkeys(found))


def shown(cell: Cell) -> str:
    """The task a cell is tested on."""
    if cell.task != "abdomen":
        return cell.task
    return RENDERINGS[str(cell.setting["modality"])].__name__.rpartition(".")[2].replace("_", "-")


def table_steps(cell: Cell, config: Table) -> int:
    """Iterations that a cell's arm is trained for."""
    return config.train.steps if ARMS[cell.method].images else 0


def table_run(cell: Cell, config: Table, context: Context) -> Result:
    """Train one arm, unless another cell has, and score it on the test images of a task it has not seen.

    ``dice`` and the other scores are of the answer that SAM's own estimate of the IoU chooses among the three;
    ``dice_oracle`` of the one that is best in truth, ``dice_single`` of SAM's single answer. ``dice_image`` is the
    Dice of the whole image as answer, and ``dice_disc`` that of the disc round the first point whose radius is best
    on these very images: what position alone can give.
    """
    name = shown(cell)
    task = context.data(task_of(name, config))
    network = trained(cell, name, config, context)
    split = few(task.splits["test"], config.images)
    structures = structures_of(split, len(task.classes), config.smallest)
    prompt = prompts_of(structures, str(cell.setting["prompts"]), config, cell.seed)
    answers = answers_of(network, split.images, structures, prompt, config.train.precision, context)
    cases = rows_of_subjects(answers, structures, split, "test", task.classes, config.spacing[name])
    metrics: dict[str, Any] = {
        score: float(np.mean([case[score] for case in cases if score in case]))
        for score in dict.fromkeys(key for case in cases for key in case if key not in ("subject", "split"))
    }
    metrics["structures"] = len(structures)
    metrics |= trivial(structures, split, config, cell.seed)
    return Result(metrics, cases)


def prompts_of(structures: Structures, prompts: str, config: ArmSettings, seed: int) -> Callable[[Tensor], Prompt]:
    """Rows of structures -> their prompts. All arms of a seed are given the same, fewer points the first of more."""
    masks = structures.masks(torch.arange(len(structures)))
    generator = stream(seed, "test prompts")
    drawn = PointPrompts((MOST[0], MOST[0]), (MOST[1], MOST[1]), config.prompting.margin, config.prompting.ring)
    points, labels = drawn.apply(masks, drawn.draw(len(masks), generator))
    tight = BoxPrompts(config.prompting.jitter)
    boxes = tight.apply(masks, tight.draw(len(masks), generator))
    box = boxes if prompts.startswith("box") else None
    pair = prompts.removeprefix("box,")
    again = prompts == "mask"
    if prompts == "box":
        return lambda rows: Prompt(box=boxes[rows])
    positive, negative = (1, 0) if again else (int(part) for part in pair.split(","))
    kept = [*range(positive), *range(MOST[0], MOST[0] + negative)]
    return lambda rows: Prompt(points[rows][:, kept], labels[rows][:, kept], None if box is None else box[rows], again)


@torch.no_grad()
def answers_of(
    network: Any,
    images: Tensor,
    structures: Structures,
    prompts: Callable[[Tensor], Prompt],
    precision: str,
    context: Context,
    batch: int = 16,
) -> dict[str, Tensor]:
    """Binary masks (T, H, W), bool, on the CPU: what the model chooses (""), "oracle" and "single".

    An image is encoded once, however many structures it has.
    """
    device, size = context.device, (images.shape[2], images.shape[3])
    side = network.image_encoder.img_size
    wanted = structures.images.unique()
    found: dict[str, list[Tensor]] = {"": [], "oracle": [], "single": []}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        parts = [embed(network, images[rows].to(device)).float() for rows in wanted.split(max(batch // 4, 1))]
    places = torch.searchsorted(wanted, structures.images)
    embeddings = torch.cat(parts)
    for rows in torch.arange(len(structures)).split(batch):
        prompt = prompts(rows).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits, iou = answer(network, embeddings[places[rows]], prompt, size)
        large = from_side(logits.float(), size, side)
        found[""].append((by_predicted_iou(large, iou) > 0).cpu())
        found["single"].append((single(large, iou) > 0).cpu())
        found["oracle"].append((by_oracle(large, structures.masks(rows).to(device)) > 0).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def trivial(structures: Structures, split: Split, config: ArmSettings, seed: int) -> dict[str, float]:
    """Dice of answers that do not look at the image."""
    masks = structures.masks(torch.arange(len(structures)))
    prompt = prompts_of(structures, "1,0", config, seed)(torch.arange(len(structures)))
    assert prompt.points is not None
    height, width = masks.shape[1:]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    x, y = prompt.points[:, 0, 0, None, None], prompt.points[:, 0, 1, None, None]
    distance = ((rows - y) ** 2 + (columns - x) ** 2).sqrt()  # (T, H, W)

    def dice(answer: Tensor) -> float:
        overlap = (answer & (masks == 1)).sum((1, 2))
        each = 2 * overlap / (answer.sum((1, 2)) + masks.sum((1, 2)))
        return float(np.mean([mean_of(each, by_class) for by_class in groups(structures, split).values()]))

    radii = torch.logspace(-2, 0, 17) * min(height, width) / 2
    everything = torch.ones_like(masks, dtype=torch.bool)
    return {"dice_image": dice(everything), "dice_disc": max(dice(distance <= radius) for radius in radii)}
