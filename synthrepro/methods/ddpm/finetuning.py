r"""Fine-tuning: which labelled slices there are, the loss, the strategies, and how a segmentation is scored.

Sections "Transfer Strategy", "Fine-tuning strategies" and "Implementation Details" of the paper. It leaves out the base
learning rate, the batch size (four slices are "one batch"), the target spacing, and whether a Dice is of a slice, of a
volume, or of all voxels together.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.losses import GeneralizedDiceLoss
from torch import Tensor, nn
from torch.nn import functional as F

from synthrepro import metrics
from synthrepro.data import Split
from synthrepro.errors import UserError
from synthrepro.evidence import Context
from synthrepro.training import stream

Batches = Callable[[int], tuple[Tensor, Tensor]]  # iteration -> images and label maps


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Eqs. 6 to 8: half cross-entropy, half a Dice loss that pools all classes and voxels of the batch,

    .. math:: 1 - \frac{2 \sum_{c,i} g_i^c y_i^c + \epsilon}{\sum_{c,i} g_i^c + \sum_{c,i} y_i^c + \epsilon}.

    The paper's sums run over all classes; we take the background as one of them. Pooled so, the Dice loss weighs a
    class by its area, and small organs hardly count.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W), int64.
    """
    # MONAI's generalised Dice loss with equal weights is Eq. 8
    pooled = GeneralizedDiceLoss(
        softmax=True, to_onehot_y=True, w_type="uniform", batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )
    return 0.5 * F.cross_entropy(logits, labels) + 0.5 * pooled(logits, labels[:, None])


def labelled_slices(train: Split, n: int, classes: int, seed: int, every_class: bool) -> list[int]:
    """Rows of the n labelled slices of a seed.

    Args:
        every_class: Whether together they must show every class, as the paper's four slices do: of all such choices
            each is as likely.

    Raises:
        UserError: There are fewer slices, or no choice that shows every class has been found.
    """
    if n > len(train):
        raise UserError(f"{n} labelled slices are asked for, but there are {len(train)}: ask for a smaller ratio.")
    draws = stream(seed, "labelled")
    if not every_class:
        return torch.randperm(len(train), generator=draws)[:n].tolist()
    present = F.one_hot(train.labels.flatten(1), classes).amax(1)[:, 1:].bool()  # (N, K - 1)
    for _ in range(1000):
        choices = torch.rand(1000, len(train), generator=draws).topk(n).indices  # (1000, n), none twice
        good = present[choices].any(1).all(1).nonzero()
        if len(good):
            return choices[int(good[0])].tolist()
    raise UserError(f"No {n} training slices were found that show all {classes - 1} organs: ask for a larger ratio.")


def rows_of(n: int, batch: int, step: int, seed: int) -> list[int]:
    """The rows of a batch: all n rows in random order, then all in another, and so on. Four of four are always all."""
    places = range(step * batch, (step + 1) * batch)
    orders = {
        epoch: torch.randperm(n, generator=stream(seed, f"epoch {epoch}")).tolist()
        for epoch in range(places[0] // n, places[-1] // n + 1)
    }
    return [orders[place // n][place % n] for place in places]


def train(
    network: nn.Module,
    groups: Sequence[dict[str, Any]],
    batches: Batches,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    precision: str,
    context: Context,
) -> None:
    """Adam on what `groups` hold, in place; resumes from the context's checkpoint.

    The rates fall linearly to zero. The paper gives no schedule; at a constant rate the last state, which is the one
    that counts, would be one of many between which training with few slices swings.

    Args:
        groups: As torch.optim.Adam takes them: params, lr, weight_decay.
        loss_of: What a batch holds -> loss; the batch's first part need not be images.
    """
    device = context.device
    optimiser = torch.optim.Adam(list(groups), fused=device.type == "cuda")
    rates = [group["lr"] for group in groups]
    start = 0
    if saved := context.load("training"):
        start = saved["step"]
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
    network.train()
    for k in context.progress(range(start, steps), "training"):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - k / steps)
        x, y = batches(k)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(x, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if context.checkpoint_due():
            states = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
            context.save("training", {"step": k + 1} | states)


def volume_dice(prediction: Tensor, split: Split, classes: int) -> Tensor:
    """Dice of each organ over all slices of a case together: (cases, K - 1), NaN where the case lacks the organ.

    Args:
        prediction: Label maps (N, H, W), int64, of the split's images.
    """
    rows = [[i for i, each in enumerate(split.subjects) if each == subject] for subject in split.individuals]
    pairs = ((prediction[i].flatten(0, 1)[None], split.labels[i].flatten(0, 1)[None]) for i in rows)  # (1, S * H, W)
    return torch.cat([metrics.dice(p, y, classes) for p, y in pairs])


def volume_scores(
    prediction: Tensor, split: Split, name: str, classes: Sequence[str], spacing: float, boundary: int
) -> list[dict[str, Any]]:
    """Every score of every case.

    Args:
        prediction: Label maps (N, H, W), int64, of the split's images.
        name: Of the split.
        spacing: Side of a pixel in mm, also the tolerance of the surface Dice.
        boundary: Slices of a case, evenly spread, on which the boundary scores are taken.

    Returns:
        A dictionary a case. ``dice`` and ``jaccard`` are those of each organ over all slices of the case together,
        averaged over the organs the case has; ``dice_absent`` counts those it has not as well, as FLARE22's evaluation
        does: 1 if none is found, else 0. ``dice_slice`` and ``dice_slice_absent`` are the same slice by slice.
        ``surface_dice`` and ``hausdorff95`` are taken in the plane. ``dice_<organ>`` is missing where the organ is.
    """
    k, found = len(classes), []
    for subject, volume in zip(split.individuals, volume_dice(prediction, split, k), strict=True):
        rows = [i for i, each in enumerate(split.subjects) if each == subject]
        p, y = prediction[rows], split.labels[rows]
        slices = metrics.dice(p, y, k)  # (S, K - 1)
        few = [round(i) for i in np.linspace(0, len(rows) - 1, min(boundary, len(rows)))]
        edges = metrics.cases(p[few], y[few], [subject] * len(few), name, classes, spacing)
        case: dict[str, Any] = {
            "dice": volume.nanmean(),
            "jaccard": metrics.jaccard(p.flatten(0, 1)[None], y.flatten(0, 1)[None], k)[0].nanmean(),
            "dice_absent": with_absent(volume[None], p.flatten(0, 1)[None], k).mean(),
            "dice_slice": slices.nanmean(0).nanmean(),
            "dice_slice_absent": with_absent(slices, p, k).mean(),
        }
        for score in ("surface_dice", "hausdorff95"):
            values = [edge[score] for edge in edges if edge[score] is not None]
            case[score] = float(np.mean(values)) if values else math.nan
        case |= {f"dice_{organ}": value for organ, value in zip(classes[1:], volume, strict=True)}
        numbers = {key: float(value) for key, value in case.items()}
        found.append(
            {"subject": subject, "split": name}
            | {key: None if math.isnan(value) else round(value, 5) for key, value in numbers.items()}
        )
    return found


def with_absent(scores: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Scores (B, K - 1), where NaN, for the class is absent, becomes 1 if the prediction (B, ...) has none either."""
    predicted = torch.stack([(prediction == c).flatten(1).any(1) for c in range(1, classes)], 1)
    return torch.where(scores.isnan(), (~predicted).to(scores), scores)
