r"""What is segmented in a medical image, one structure at a time, and how an answer is scored.

A person points at one connected region. So a structure of an image is the largest connected component of a class, and
components or classes that are too small to point at are left out; two kidneys of one class are one kidney.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.transforms import KeepLargestConnectedComponent
from torch import Tensor

from synthrepro import metrics
from synthrepro.data import Split
from synthrepro.errors import UserError


@dataclass(frozen=True)
class Structures:
    """Structures of a set of images.

    Attributes:
        labels: (N, H, W) int64, of each image the largest component of every class.
        images: (T,) rows of the images that structures are in; classes: (T,) their classes.
    """

    labels: Tensor
    images: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def masks(self, rows: Tensor) -> Tensor:
        """Binary masks (B, H, W), int64, of some structures."""
        return (self.labels[self.images[rows]] == self.classes[rows, None, None]).long()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows of random structures: a class by chance, then one of its images, so that rare ones count as others."""
        present = self.classes.unique()
        drawn = present[torch.randint(len(present), (count,), generator=generator)]
        place = torch.rand(count, generator=generator)
        found = []
        for c, u in zip(drawn.tolist(), place.tolist(), strict=True):
            rows = (self.classes == c).nonzero()[:, 0]
            found.append(int(rows[int(u * len(rows))]))
        return torch.tensor(found)


def structures_of(split: Split, classes: int, smallest: float) -> Structures:
    """Structures of a split, in the order of its images.

    Args:
        smallest: Area from which on a structure counts, in shares of the image.

    Raises:
        UserError: No structure is so large.
    """
    keep = KeepLargestConnectedComponent(applied_labels=list(range(1, classes)), is_onehot=False, connectivity=1)
    labels = torch.stack([torch.as_tensor(np.asarray(keep(label[None].clone())))[0].long() for label in split.labels])
    areas = torch.stack([(labels == c).flatten(1).sum(1) for c in range(1, classes)], 1)  # (N, K - 1)
    found = (areas >= max(smallest * labels[0].numel(), 1)).nonzero()
    if not len(found):
        raise UserError(f"No structure has {smallest:g} of its image's area: lower `smallest`.")
    return Structures(labels, found[:, 0], found[:, 1] + 1)


def few(split: Split, images: int) -> Split:
    """So many images of each subject, evenly spread over the ones there are."""
    rows = []
    for subject in split.individuals:
        of = [i for i, each in enumerate(split.subjects) if each == subject]
        rows += sorted({of[round(place)] for place in np.linspace(0, len(of) - 1, min(images, len(of)))})
    return Split(split.images[rows], split.labels[rows], tuple(split.subjects[i] for i in rows))


def rows_of_subjects(
    answers: dict[str, Tensor],
    structures: Structures,
    split: Split,
    name: str,
    classes: Sequence[str],
    spacing: float,
) -> list[dict[str, Any]]:
    """Every score of every subject.

    Args:
        answers: Binary masks (T, H, W), bool, one a structure: "" the answer that counts, others by their names.
        name: Of the split.
        spacing: Side of a pixel in mm, also the tolerance of the surface Dice.

    Returns:
        A dictionary a subject: means over its images and then over its structures. ``dice``, ``jaccard``,
        ``surface_dice``, ``hausdorff95`` and ``dice_<structure>`` are of the answer that counts; ``dice_<name>`` is of
        the other answers. A structure that a subject has in no image is missing, and so is a subject without any.
    """
    truth, answer = structures.masks(torch.arange(len(structures))), answers[""].long()
    scores = {
        "dice": metrics.dice(answer, truth, 2)[:, 0],
        "jaccard": metrics.jaccard(answer, truth, 2)[:, 0],
        "surface_dice": metrics.surface_dice(answer, truth, 2, spacing, spacing)[:, 0].nan_to_num(0.0),
        "hausdorff95": metrics.hausdorff95(answer, truth, 2, spacing)[:, 0],
    }
    diagonal = spacing * math.hypot(*truth.shape[1:])  # of an empty answer
    scores["hausdorff95"] = scores["hausdorff95"].nan_to_num(diagonal, diagonal)
    scores |= {f"dice_{key}": metrics.dice(other.long(), truth, 2)[:, 0] for key, other in answers.items() if key}
    rows = []
    for subject, by_class in groups(structures, split).items():
        row = {key: mean_of(values, by_class) for key, values in scores.items()}
        row |= {f"dice_{classes[c].lower()}": float(scores["dice"][of].mean()) for c, of in by_class.items()}
        rows.append({"subject": subject, "split": name} | {key: round(value, 5) for key, value in row.items()})
    return rows


def groups(structures: Structures, split: Split) -> dict[str, dict[int, Tensor]]:
    """Subject -> class -> which structures (T,) are that subject's of that class."""
    subjects = np.array(split.subjects)[structures.images.numpy()]
    found = {}
    for subject in dict.fromkeys(subjects.tolist()):
        of = torch.from_numpy(subjects == subject)
        found[subject] = {c: of & (structures.classes == c) for c in structures.classes[of].unique().tolist()}
    return found


def mean_of(values: Tensor, by_class: dict[int, Tensor]) -> float:
    """Mean over a subject's classes of the mean over the class's images, of values (T,) of structures."""
    return float(np.mean([float(values[of].mean()) for of in by_class.values()]))
