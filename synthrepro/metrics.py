"""Segmentation scores per case and class, computed by MONAI."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from monai.networks.utils import one_hot
from torch import Tensor


def dice(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Dice of each foreground class in each case.

    Args:
        prediction, label: Label maps (B, H, W), int64, values 0 to classes - 1.
        classes: Classes, background (0) included.

    Returns:
        (B, classes - 1) in [0, 1]; NaN where the label map lacks the class.
    """
    return compute_dice(*_one_hot(prediction, label, classes), include_background=False)


def jaccard(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Jaccard index (intersection over union) of each foreground class; arguments and result as :func:`dice`."""
    return compute_iou(*_one_hot(prediction, label, classes), include_background=False)


def surface_dice(prediction: Tensor, label: Tensor, classes: int, tolerance: float, spacing: float = 1.0) -> Tensor:
    """Normalised surface Dice (NSD): share of both boundaries within ``tolerance`` mm of each other.

    Arguments and result as :func:`dice`; ``spacing`` is the pixel's side in mm.
    """
    tolerances = [tolerance] * (classes - 1)
    # MONAI 1.6 warns of a deprecated argument that it passes to itself, and of classes that were not predicted
    with warnings.catch_warnings(action="ignore"):
        return compute_surface_dice(*_one_hot(prediction, label, classes), tolerances, spacing=spacing)


def hausdorff95(prediction: Tensor, label: Tensor, classes: int, spacing: float = 1.0) -> Tensor:
    """95th percentile of the Hausdorff distance in mm; arguments and shape as :func:`dice`.

    NaN or infinite where one of the two lacks the class.
    """
    pair = _one_hot(prediction, label, classes)
    with warnings.catch_warnings(action="ignore"):  # see surface_dice
        return compute_hausdorff_distance(*pair, include_background=False, percentile=95, spacing=spacing)


def cases(
    prediction: Tensor, label: Tensor, subjects: Sequence[str], split: str, classes: Sequence[str], spacing: float
) -> list[dict[str, Any]]:
    """Every score of every case, as a record keeps them.

    Args:
        prediction, label: Label maps (B, H, W), int64.
        subjects: Individual of each case, B of them.
        split: Name of the test set.
        classes: Names, background first.
        spacing: Side of a pixel in mm; also the tolerance of the surface Dice.

    Returns:
        A dictionary a case: subject, split, ``dice``, ``jaccard``, ``surface_dice`` and ``hausdorff95`` (means over the
        classes the label map holds; None where nothing is defined) and ``dice_<class>``.
    """
    k = len(classes)
    per_class = dice(prediction, label, k)  # (B, K - 1)
    scores = {
        "dice": per_class,
        "jaccard": jaccard(prediction, label, k),
        "surface_dice": surface_dice(prediction, label, k, spacing, spacing),
        "hausdorff95": hausdorff95(prediction, label, k, spacing),
    }
    # a class that only one of the two holds has no finite distance: the worst possible one, the image's diagonal
    diagonal = spacing * math.hypot(*label.shape[1:])
    distance, surface = scores["hausdorff95"], scores["surface_dice"]
    scores["hausdorff95"] = distance.nan_to_num(diagonal, diagonal).masked_fill(per_class.isnan(), torch.nan)
    scores["surface_dice"] = surface.nan_to_num(0.0).masked_fill(per_class.isnan(), torch.nan)
    columns = {name: values.nanmean(1) for name, values in scores.items()}
    columns |= {f"dice_{name.lower()}": per_class[:, i] for i, name in enumerate(classes[1:])}
    rows = {name: values.tolist() for name, values in columns.items()}
    return [
        {"subject": subjects[b], "split": split}
        | {name: None if math.isnan(values[b]) else round(values[b], 5) for name, values in rows.items()}
        for b in range(len(subjects))
    ]


def _one_hot(prediction: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    if prediction.shape != label.shape or label.dim() != 3:
        raise ValueError(
            f"Prediction {tuple(prediction.shape)} and label map {tuple(label.shape)} must both be of shape (B, H, W)."
        )
    if torch.max(label) >= classes:
        raise ValueError(f"The label map holds class {int(label.max())}, but there are {classes} classes from 0.")
    return one_hot(prediction[:, None], classes), one_hot(label[:, None], classes)
