r"""SAM as this chapter uses it: how one is prompted, what a decoder's loss is, and how decoders are trained.

The paper says: mask decoder from scratch, encoder frozen, Dice loss, 100 epochs of 10 000 synthetic images made on the
fly, one a batch, learning rate 1e-4. It leaves out the optimiser, which prompts an image is trained with, whether the
prompt encoder starts anew, and what becomes of SAM's three ambiguous masks and of its estimate of their IoU.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from synthrepro.evidence import Config, Context
from synthrepro.models.sam import by_predicted_iou, decode, encode_prompts, to_side
from synthrepro.synthesis.prompts import BoxPrompts, PointPrompts
from synthrepro.training import stream

Kind = Literal["points", "box", "mask"]
Loss = Literal["dice", "dice+ce"]


class Prompt(NamedTuple):
    """What a person gives: points (B, N, 2), x and y in pixels of the image, with labels (B, N), or a box (B, 4).

    With `again`, the answer to these is given back as a mask prompt, beside them, and the second answer counts.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    box: Tensor | None = None
    again: bool = False

    def to(self, device: torch.device) -> "Prompt":
        """The same on another device."""
        points, labels, box = (None if part is None else part.to(device) for part in self[:3])
        return Prompt(points, labels, box, self.again)


class TrainSettings(Config):
    """How a decoder, or a whole SAM, is trained.

    Attributes:
        steps: iterations; `batch`: images of each.
        lr: of AdamW, for the decoder; encoder_lr: for the encoder, where it is trained. Both fall linearly to
            zero, times a linear rise over the first `warm_up` iterations.
        weight_decay: of AdamW.
        kinds: prompts that iterations take turns with: "points", "box" (SAM takes a point or a box of equal chance)
            and "mask" (points, then the same points with the first answer).
        loss: see :func:`loss_of`.
        precision: "bf16" for autocast.
    """

    steps: int
    batch: int
    lr: float
    encoder_lr: float
    warm_up: int
    weight_decay: float
    kinds: tuple[Kind, ...]
    loss: Loss
    precision: Literal["no", "bf16"]


def answer(sam: Sam, embeddings: Tensor, prompt: Prompt, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Masks of one object an image.

    Args:
        embeddings: (B, C, h, w), of :func:`~synthrepro.models.sam.embed`.
        prompt: In pixels of the image.
        size: (H, W) of the image.

    Returns:
        Logits (B, 4, 4h, 4w), the single answer first, then the three for ambiguous prompts, and the estimates of
        their IoU, (B, 4).
    """
    side = sam.image_encoder.img_size
    points = None if prompt.points is None else to_side(prompt.points, size, side)
    box = None if prompt.box is None else to_side(prompt.box, size, side)
    logits, iou = decode(sam, embeddings, *encode_prompts(sam, points, prompt.labels, box))
    if prompt.again:
        best = by_predicted_iou(logits, iou).detach()[:, None]
        logits, iou = decode(sam, embeddings, *encode_prompts(sam, points, prompt.labels, box, best))
    return logits, iou


def small(masks: Tensor, sam: Sam) -> Tensor:
    """Masks as the decoder answers them: (B, H, W) to shares of each of its pixels, (B, 4h, 4w), padding as zero."""
    side, grid = sam.image_encoder.img_size, 4 * sam.prompt_encoder.image_embedding_size[0]
    height, width = masks.shape[1:]
    scale = side / max(height, width)
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    prepared = F.interpolate(masks[:, None].float(), size, mode="area")
    prepared = F.pad(prepared, (0, side - size[1], 0, side - size[0]))
    return F.adaptive_avg_pool2d(prepared, grid)[:, 0]


def dice_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus soft Dice of each answer: (B, M, h, w) and (B, h, w) to (B, M); smoothed by one pixel, as in SAM's."""
    p, y = logits.sigmoid().flatten(2), targets.flatten(1)[:, None]
    return 1 - (2 * (p * y).sum(-1) + 1) / (p.sum(-1) + y.sum(-1) + 1)


def balanced_cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each answer, half its mean over the object and half over the rest: to (B, M)."""
    y = targets.flatten(1)[:, None].expand(-1, logits.shape[1], -1)
    each = F.binary_cross_entropy_with_logits(logits.flatten(2), y, reduction="none")
    inside, outside = (each * y).sum(-1), (each * (1 - y)).sum(-1)
    return (inside / y.sum(-1).clamp_min(1) + outside / (1 - y).sum(-1).clamp_min(1)) / 2


def loss_of(logits: Tensor, iou: Tensor, targets: Tensor, kind: Loss) -> Tensor:
    """The loss of a batch of answers.

    The single answer is judged as it is; of the three, the best alone (SAM, section 3: only the lowest loss is
    propagated back); and the estimates of IoU by their mean squared error against the IoU of the four binary answers,
    as SAM's are, so that one of the three can be chosen without the truth.

    Args:
        logits: (B, 4, h, w); iou: (B, 4); targets: (B, h, w), shares.
        kind: "dice" is SynthFM's Dice loss; "dice+ce" adds a cross-entropy, as MedSAM does, of object and
            background in equal parts: else a fresh decoder soon answers nothing at all, or everything, and stays there
            for long, since objects are small. (SAM itself adds 20 times the focal loss.)
    """
    logits, iou = logits.float(), iou.float()
    each = dice_losses(logits, targets)
    if kind == "dice+ce":
        each = each + balanced_cross_entropies(logits, targets)
    with torch.no_grad():
        found, there = logits > 0, (targets > 0.5)[:, None]
        true = (found & there).sum((2, 3)) / (found | there).sum((2, 3)).clamp_min(1)
    return (each[:, 0] + each[:, 1:].amin(1)).mean() + F.mse_loss(iou, true)


Batch = Callable[[int], tuple[Any, Tensor]]  # iteration -> images, or whatever `embed` takes, and masks (B, H, W)


def train(
    sam: Sam,
    batches: Batch,
    embed: Callable[[Any], Tensor],
    points: PointPrompts,
    boxes: BoxPrompts,
    config: TrainSettings,
    seed: int,
    context: Context,
) -> list[float]:
    """Train what wants a gradient of a SAM, in place; resumes from the context's checkpoint.

    Args:
        batches: Iteration -> what `embed` takes, and binary masks (B, H, W).
        embed: To image embeddings; with the encoder's gradient where that is trained.
        points, boxes: Where an image is prompted.
        seed: Of the prompts.

    Returns:
        The loss of every tenth iteration.
    """
    device = context.device
    rest = [*sam.mask_decoder.parameters(), *sam.prompt_encoder.parameters()]
    parts = [(config.encoder_lr, [*sam.image_encoder.parameters()]), (config.lr, rest)]
    wanted = [(rate, [p for p in part if p.requires_grad]) for rate, part in parts]
    groups: list[dict[str, Any]] = [{"params": part, "lr": rate} for rate, part in wanted if part]
    rates = [group["lr"] for group in groups]
    optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=device.type == "cuda")
    start, trail = 0, []
    if saved := context.load("training"):
        start, trail = saved["step"], saved["trail"]
        sam.load_state_dict(saved["sam"], strict=False)
        optimiser.load_state_dict(saved["optimiser"])
    sam.train()
    for k in context.progress(range(start, config.steps), "training"):
        factor = min(1.0, (k + 1) / max(config.warm_up, 1)) * (1 - k / config.steps)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        x, masks = batches(k)
        prompt = training_prompt(masks, config.kinds[k % len(config.kinds)], points, boxes, seed, k)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits, iou = answer(sam, embed(x), prompt, (masks.shape[1], masks.shape[2]))
        value = loss_of(logits, iou, small(masks, sam), config.loss)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        if k % 10 == 0:
            trail.append(float(value.detach()))
        if context.checkpoint_due():
            states = {"sam": unfrozen(sam), "optimiser": optimiser.state_dict()}
            context.save("training", {"step": k + 1, "trail": trail} | states)
    sam.eval()
    return trail


def unfrozen(sam: Sam) -> dict[str, Tensor]:
    """The state of all but an image encoder that is frozen."""
    frozen = not any(p.requires_grad for p in sam.image_encoder.parameters())
    return {name: x for name, x in sam.state_dict().items() if not (frozen and name.startswith("image_encoder."))}


def training_prompt(masks: Tensor, kind: str, points: PointPrompts, boxes: BoxPrompts, seed: int, k: int) -> Prompt:
    """The prompts of iteration k: points, or a box, or points and then the first answer to them."""
    generator = stream(seed, f"prompts {k}")
    if kind == "box":
        return Prompt(box=boxes.apply(masks, boxes.draw(len(masks), generator)))
    return Prompt(*points.apply(masks, points.draw(len(masks), generator)), again=kind == "mask")
