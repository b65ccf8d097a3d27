"""The real task `brain-labelmaps`: label maps from which SynthSeg was trained, for synthesis; there are no images.

The folder holds training_seg_01.nii.gz to training_seg_12.nii.gz, the first twelve of the twenty that its repository
ships; the others are not read. Classes, and the value of what is brain but has no class, are those of `brain_oasis`.
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from synthrepro.data.brain_oasis import CLASSES, SPAN, UNLABELLED, with_tissues
from synthrepro.data.task import Card, Split, Task
from synthrepro.data.volumes import cut_axially, majority, read_labels

FAMILY = "real"

# Value in FreeSurfer's aseg -> class, left and right together; see FreeSurferColorLUT.txt for the structures.
FREESURFER: dict[int, int] = {
    0: 0,
    24: UNLABELLED,  # CSF outside the ventricles
    **dict.fromkeys((30, 62), UNLABELLED),  # vessels
    **dict.fromkeys((80, 81, 82), UNLABELLED),  # hypointensities that are not of white matter
    **dict.fromkeys((2, 41), 1),
    **dict.fromkeys((25, 57, 77, 78, 79), 1),  # lesions and hypointensities of white matter
    **dict.fromkeys((192, 250, 251, 252, 253, 254, 255), 1),  # corpus callosum and fornix
    **dict.fromkeys((3, 42), 2),
    **dict.fromkeys((4, 5, 43, 44, 14, 15, 72), 3),  # lateral, inferior lateral, third, fourth, fifth
    **dict.fromkeys((31, 63), 3),  # choroid plexus, which lies in the ventricles
    **dict.fromkeys((9, 10, 48, 49), 4),
    **dict.fromkeys((11, 50), 5),
    **dict.fromkeys((26, 58), 5),  # accumbens
    **dict.fromkeys((12, 51), 6),
    **dict.fromkeys((13, 52), 7),
    **dict.fromkeys((17, 53), 8),
    **dict.fromkeys((18, 54), 9),
    **dict.fromkeys((8, 47), 10),
    **dict.fromkeys((7, 46), 11),
    16: 12,
    **dict.fromkeys((28, 60), 12),  # ventral diencephalon
    85: 12,  # optic chiasm
}

# What SynthSeg's maps hold besides.
STRUCTURES: dict[int, int] = {
    **FREESURFER,
    **dict.fromkeys((136, 137, 163, 164), 3),  # not in the maps' table; they lie within the ventricles, like a plexus
    **dict.fromkeys((502, 506, 507, 508, 509, 511, 512, 514, 515, 516, 530), 0),  # the head around the brain
}

NAMES = tuple(f"training_seg_{i:02d}" for i in range(1, 13))


class Options(BaseModel):
    """Options of the task.

    Attributes:
        size: rows (front to back) and columns (left to right).
        spacing: side of a pixel in mm; a slice is as many whole mm thick.
        slices: slices a map, spread evenly over the brain's height between the fractions of `brain_oasis.SPAN`.
        classes: "structures" or "tissues", as in `brain_oasis`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[PositiveInt, PositiveInt] = (64, 56)
    spacing: Annotated[float, Field(ge=1, le=9)] = 3.0
    slices: PositiveInt = 12
    classes: Literal["structures", "tissues"] = "structures"


def files(folder: Path) -> list[Path]:
    """The label maps."""
    return [folder / f"{name}.nii.gz" for name in NAMES]


def check(folder: Path) -> None:
    """Read and check every file.

    Raises:
        UserError: see `volumes.read_labels`.
    """
    for path in files(folder):
        read_labels(path, STRUCTURES)


def load(options: Options, folder: Path) -> Task:
    """Build the task, whose one split is "maps"; its images have no channel.

    Raises:
        UserError: see `volumes.read_labels`.
    """
    maps, people = [], []
    for path, name in zip(files(folder), NAMES, strict=True):
        labels = read_labels(path, STRUCTURES)
        brain = (labels.planes > 0) & (labels.planes < UNLABELLED)
        cut = cut_axially(brain, labels.voxel, options.size, options.spacing, options.slices, SPAN)
        maps.append(majority(np.ascontiguousarray(labels.planes), cut, UNLABELLED))
        people += [name] * options.slices
    split = Split(torch.zeros(len(people), 0, *options.size), torch.cat(maps), tuple(people))
    task = Task("brain-labelmaps", CLASSES, 1, {"maps": split}, CARD)
    return task if options.classes == "structures" else with_tissues(task)


CARD = Card(
    what=(
        "Axial slices of twelve label maps of the head at 1 mm, of those from which SynthSeg was trained: twelve "
        "classes of the brain, left and right together. CSF around the brain and vessels have an extra value. The rest "
        "of the head is background. There are no images."
    ),
    splits="All twelve are maps for synthesis; nobody is tested on.",
    doubt=(
        "How each map was made is not stated with it, and some heads are tilted. The extra value covers all CSF around "
        "the brain, in brain-oasis only what closing the brain's labels encloses. The borders of structures follow "
        "FreeSurfer's protocol, not that of Neuromorphometrics as in brain-oasis: the cortex is thinner here."
    ),
    source=(
        "github.com/BBillot/SynthSeg, folder data/training_label_maps (Billot et al., Medical Image Analysis "
        "86:102789, 2023)."
    ),
    licence="Apache 2.0, that of the repository; the maps have no statement of their own.",
)
