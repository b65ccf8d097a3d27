"""The real task `brain-oasis`: T1-weighted scans with structures drawn by hand (MICCAI 2012 multi-atlas challenge).

The folder holds, under the challenge's numbers, skull-stripped scans and their label maps:

    train/       1000 ... 1012: NNNN_SS.nii.gz and NNNN_glm.nii.gz; 1013, 1014, 1015, 1017, 1036: NNNN_glm.nii.gz
    test_young/  1003, 1005, 1018, 1019: both files
    test_old/    1110, 1113, 1116, 1119, 1125, 1128: both files

Further files are not read. From every scan axial slices are cut. What is brain and has no label (sulcal CSF, meninges,
vessels) is background in "train", "validation" and the test sets. In "maps", from which images are synthesised, it has
the value `len(CLASSES)`, and there is no image.

The test people are also shown in contrasts that nobody measured: the measured intensity gives a T1 by one monotone map
per scan, the label the proton density and T2*, and the signal equation of `mri` the FLASH images, as in `brain_mni`.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator
from torch import Tensor

from synthrepro.data.brain_mni import BIAS_SPACING, Anatomy, acquire, signal, stream, t1_of_intensity
from synthrepro.data.individuals import smooth_field
from synthrepro.data.mri import rescale
from synthrepro.data.task import Card, Split, Task
from synthrepro.data.volumes import ADVICE, Cut, Volume, average, cut_axially, inside, majority, read_labels, read_pair
from synthrepro.errors import UserError

FAMILY = "real"

CLASSES = (
    "background",
    "cerebral white matter",
    "cerebral cortex",
    "ventricles",
    "thalamus",
    "caudate",
    "putamen",
    "pallidum",
    "hippocampus",
    "amygdala",
    "cerebellar cortex",
    "cerebellar white matter",
    "brain stem",
)
UNLABELLED = len(CLASSES)  # inside the brain, but of no class

# Number of a structure in the label maps -> class, left and right together. The challenge's table also numbers sulci
# and landmarks; those stand in no label map and are unknown here.
STRUCTURES: dict[int, int] = {
    0: 0,
    74: 0,  # vitamin E tablet stuck to the head
    46: UNLABELLED,  # CSF outside the ventricles
    **dict.fromkeys((63, 64), UNLABELLED),  # vessels
    **dict.fromkeys((44, 45), 1),
    **dict.fromkeys((53, 54), 1),  # lesions of white matter
    **dict.fromkeys(range(100, 208), 2),  # gyri
    **dict.fromkeys((42, 43), 2),  # cerebral exterior: rest of the cortical ribbon that belongs to no gyrus
    **dict.fromkeys((65, 66), 2),  # insula, where it belongs to neither of its two parts
    **dict.fromkeys((75, 76), 2),  # basal forebrain: grey matter that goes on from the subcallosal cortex
    **dict.fromkeys((4, 11, 15), 3),  # third, fourth and fifth (cavum septi pellucidi)
    **dict.fromkeys((49, 50, 51, 52), 3),  # lateral and inferior lateral
    **dict.fromkeys((59, 60), 4),
    **dict.fromkeys((36, 37), 5),
    **dict.fromkeys((23, 30), 5),  # accumbens, which joins the caudate's head without a border
    **dict.fromkeys((57, 58), 6),
    **dict.fromkeys((55, 56), 7),
    **dict.fromkeys((47, 48), 8),
    **dict.fromkeys((31, 32, 33, 34), 9),  # with its anterior part
    **dict.fromkeys((38, 39), 10),
    **dict.fromkeys((71, 72, 73), 10),  # lobules of the vermis
    **dict.fromkeys((40, 41), 11),
    35: 12,
    **dict.fromkeys((61, 62), 12),  # ventral diencephalon, above the midbrain without a border
    69: 12,  # optic chiasm, under the ventral diencephalon
}

# Tissue of each class (0 CSF, 1 GM, 2 WM) as the challenge's table has it; what has no class is CSF.
TISSUE_OF_CLASS = (0, 2, 1, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 0)
TISSUES = ("background", "CSF", "GM", "WM")  # CSF is that of the ventricles only

WITH_IMAGE = ("1000", "1001", "1002", "1006", "1007", "1008", "1009", "1010", "1011", "1012")
PEOPLE = {
    "train": (*WITH_IMAGE, "1013", "1014", "1015", "1017", "1036"),
    "test_young": ("1003", "1005", "1018", "1019"),
    "test_old": ("1110", "1113", "1116", "1119", "1125", "1128"),
}
SECOND_SCANS = {"1023": "1003", "1024": "1004", "1025": "1005", "1038": "1018", "1039": "1019"}

CONTRASTS = ("flash3", "flash5", "flash20", "flash30")
SPAN = (0.12, 0.80)  # of the brain's height: from the cerebellum to above the ventricles
BOX = (200, 240, 200)  # mm along slices, rows and columns, around the brain's middle: holds the receive field


class Options(BaseModel):
    """Options of the task.

    Attributes:
        size: rows (front to back) and columns (left to right).
        spacing: side of a pixel in mm; a slice is as many whole mm thick. The brain is about 185 x 145 mm.
        subjects: how many of the ten people of train/ with a scan train and validate, in the order of their numbers.
        slices: slices a person, spread evenly over the brain's height between the fractions of `SPAN`.
        classes: "structures" (`CLASSES`), or "tissues" (`TISSUES`), as the challenge's table groups them.
        bias: standard deviation of the logarithm of the receive field of simulated contrasts.
        noise: range of the uniform draw of their noise level, relative to bright tissue.
        seed: of bias and noise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[PositiveInt, PositiveInt] = (64, 56)
    spacing: Annotated[float, Field(ge=1, le=9)] = 3.0
    subjects: tuple[PositiveInt, NonNegativeInt] = (10, 0)
    slices: PositiveInt = 12
    classes: Literal["structures", "tissues"] = "structures"
    bias: NonNegativeFloat = 0.3
    noise: tuple[NonNegativeFloat, NonNegativeFloat] = (0.02, 0.06)
    seed: int = 0

    @field_validator("subjects")
    @classmethod
    def _are_there(cls, subjects: tuple[int, int]) -> tuple[int, int]:
        if sum(subjects) > len(WITH_IMAGE):
            raise ValueError(f"train/ has {len(WITH_IMAGE)} people with a scan")
        return subjects

    @field_validator("noise")
    @classmethod
    def _is_a_range(cls, noise: tuple[float, float]) -> tuple[float, float]:
        if noise[0] > noise[1]:
            raise ValueError("the range must be (low, high)")
        return noise


def files(folder: Path) -> list[Path]:
    """Scans and label maps."""
    return [
        folder / part / f"{name}_{kind}.nii.gz"
        for part, names in PEOPLE.items()
        for name in names
        for kind in (("SS", "glm") if part != "train" or name in WITH_IMAGE else ("glm",))
    ]


def check(folder: Path) -> None:
    """Read and check every file.

    Raises:
        UserError: see `read_people`.
    """
    for _ in read_people(folder):
        pass


@dataclass(frozen=True)
class Person:
    """One person's label map, values 0 to `UNLABELLED`, and, if there is one, the scan and its `anchors`."""

    name: str
    part: str
    labels: Volume
    image: Volume | None = None
    anchors: Tensor | None = None


def read_people(folder: Path) -> Iterator[Person]:
    """Everybody, one after another.

    Raises:
        UserError: a person stands in two parts of the folder; see `volumes.read_pair` and `anchors_of` for what may be
            wrong with a file.
    """
    _check_parts(folder)
    for part, names in PEOPLE.items():
        for name in names:
            image, labels = (folder / part / f"{name}_{kind}.nii.gz" for kind in ("SS", "glm"))
            if part == "train" and name not in WITH_IMAGE:
                yield Person(name, part, read_labels(labels, STRUCTURES))
            else:
                scan, map_ = read_pair(image, labels, STRUCTURES)
                yield Person(name, part, map_, scan, anchors_of(scan, map_))


def anchors_of(image: Volume, labels: Volume) -> Tensor:
    """Median intensity of ventricles, cerebral cortex and cerebral white matter, (3,).

    Raises:
        UserError: one of them is not there, or they do not rise in this order, so the scan is not T1-weighted.
    """
    tissues = [image.planes[labels.planes == k] for k in (3, 2, 1)]
    if not all(map(len, tissues)):
        raise UserError(f"{labels.path} lacks ventricles, cerebral cortex or white matter: {ADVICE}.")
    anchors = torch.tensor([float(np.median(values)) for values in tissues])
    if not (anchors.diff() > 0).all():
        raise UserError(f"{image.path} is not T1-weighted (ventricles below cortex below white matter): {ADVICE}.")
    return anchors


def _check_parts(folder: Path) -> None:
    """A second scan counts as its first: nobody may stand on both sides of a split, read or not."""
    found: dict[str, Path] = {}
    for part in PEOPLE:
        for path in sorted((folder / part).glob("[0-9]*_*.nii.gz")):
            name = path.name.split("_")[0]
            person = SECOND_SCANS.get(name, name)
            other = found.setdefault(person, path)
            if other.parent != path.parent:
                raise UserError(f"{path} and {other} show the same person, who may stand in one folder only: move one.")


def load(options: Options, folder: Path) -> Task:
    """Build the task.

    Splits: "train", "validation" (may be empty), "maps" (everybody in train/ but the validating people; images have no
    channel), "test-young", "test-old", "test" (both) and "test-<contrast>" (both, simulated).

    Raises:
        UserError: see `read_people`.
    """
    train, validation = options.subjects
    images: dict[str, list[Tensor]] = defaultdict(list)
    labels: dict[str, list[Tensor]] = defaultdict(list)
    people: dict[str, list[str]] = defaultdict(list)

    def put(split: str, person: Person, pictures: Tensor, maps: Tensor) -> None:
        images[split].append(pictures)
        labels[split].append(maps)
        people[split] += [person.name] * options.slices

    for person in read_people(folder):
        order = PEOPLE[person.part].index(person.name)
        trains, validates = (
            person.part == "train" and first <= order < last
            for first, last in ((0, train), (train, train + validation))
        )
        whole = with_unlabelled(person.labels) if person.part == "train" and not validates else person.labels.planes
        brain = whole > 0 if person.image is None else person.image.planes > 0  # scans are skull-stripped
        cut = cut_axially(brain, person.labels.voxel, options.size, options.spacing, options.slices, SPAN)
        maps = majority(whole, cut, UNLABELLED)
        if person.part == "train" and not validates:
            put("maps", person, torch.zeros(options.slices, 0, *options.size), maps)
        if person.image is None:
            continue
        target = without_unlabelled(maps)
        pictures = picture(person.image, cut)
        if person.part == "train":
            if trains or validates:
                put("validation" if validates else "train", person, pictures, target)
            continue
        for split in (person.part.replace("_", "-"), "test"):
            put(split, person, pictures, target)
        assert person.anchors is not None
        for contrast, simulated in simulate(person, person.image, person.anchors, cut, options).items():
            put(f"test-{contrast}", person, simulated, target)

    names = ("train", "validation", "maps", "test-young", "test-old", "test", *(f"test-{c}" for c in CONTRASTS))
    empty = Split(torch.zeros(0, 1, *options.size), torch.zeros(0, *options.size, dtype=torch.int64), ())
    splits = {
        name: Split(torch.cat(images[name]), torch.cat(labels[name]), tuple(people[name])) if people[name] else empty
        for name in names
    }
    task = Task("brain-oasis", CLASSES, 1, splits, CARD)
    return task if options.classes == "structures" else with_tissues(task)


def with_tissues(task: Task) -> Task:
    """The same task with classes `TISSUES`; in "maps", brain without a class is `len(TISSUES)`."""
    tissue = torch.tensor([0, *(k + 1 for k in TISSUE_OF_CLASS[1:-1]), len(TISSUES)])
    splits = {name: replace(split, labels=tissue[split.labels]) for name, split in task.splits.items()}
    return replace(task, classes=TISSUES, splits=splits)


def with_unlabelled(labels: Volume) -> np.ndarray:
    """The label map with `UNLABELLED` wherever `volumes.inside` finds brain that has no class."""
    planes = labels.planes
    return np.where((planes == 0) & inside(planes > 0, labels.voxel), np.uint8(UNLABELLED), planes)


def without_unlabelled(maps: Tensor) -> Tensor:
    """What a segmenter is asked for: `UNLABELLED` is background."""
    return maps.where(maps != UNLABELLED, 0)


def picture(image: Volume, cut: Cut) -> Tensor:
    """Slices of a scan, (S, 1, H, W) in [0, 1], each with a display scale of its own."""
    return rescale(average(image.planes, cut).clamp_min(0)).clamp_max(1)[:, None]


def simulate(person: Person, image: Volume, anchors: Tensor, cut: Cut, options: Options) -> dict[str, Tensor]:
    """A test person in the contrasts of `CONTRASTS`.

    T1 comes from the measured intensity by `brain_mni.t1_of_intensity`, anchored at the scan's `anchors_of`; proton
    density and T2* come from the tissue of the label, and brain without a label is CSF. Signals are computed voxel by
    voxel, then averaged to pixels.

    Returns:
        Contrast -> (S, 1, H, W) in [0, 1].
    """
    covered = cut.planes.any(axis=0)
    planes = np.ascontiguousarray(image.planes[covered])
    tissue = np.array(TISSUE_OF_CLASS)[person.labels.planes[covered]]
    fractions = F.one_hot(torch.from_numpy(tissue), 3).permute(0, 3, 1, 2)[None].float()  # (1, n, 3, R, C)
    scale = float(anchors[-1])  # white matter is 1, far enough below the end of the map
    intensity = torch.from_numpy(planes)[None] / scale
    t1 = t1_of_intensity(intensity, anchors / scale)
    anatomy = Anatomy((intensity > 0).float(), fractions, intensity, t1)
    thin = Cut(cut.planes[:, covered], cut.rows, cut.columns, cut.heights)
    grid = receive_grid(cut, options)
    result = {}
    for contrast in CONTRASTS:
        generator = stream(options.seed, person.name, contrast)
        field = (options.bias * smooth_field(BOX, BIAS_SPACING, 1, grid, generator)[:, 0]).exp()
        clean = average(signal(anatomy, contrast)[0].numpy(), thin)
        result[contrast] = acquire(clean, field, options.noise, generator)
    return result


def receive_grid(cut: Cut, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the pixels in `BOX`, mm along slices, rows and columns; what lies beyond is moved to its border."""
    rows, columns = ((torch.arange(n) + 0.5 - n / 2) * options.spacing for n in options.size)
    heights = torch.from_numpy(cut.heights).float()
    z, r, c = ((x + side / 2).clamp(0, side) for x, side in zip((heights, rows, columns), BOX, strict=True))
    return z, r, c


CARD = Card(
    what=(
        "Axial slices of skull-stripped T1-weighted MPRAGE scans at 1 mm, averaged to the pixel, with structures drawn "
        "by hand, grouped into twelve classes, left and right together. Brain without a label (sulcal CSF, meninges, "
        "vessels) is background; in 'maps' it is an extra value, found by closing the labels. FLASH at 3, 5, 20 and 30 "
        "degrees is simulated, not measured: T1 from the scan's own intensity, proton density and T2* from the labels, "
        "with a receive field and Rician noise of undisclosed level."
    ),
    splits=(
        "By person. The ten people of train/ with a scan train or validate; label maps for synthesis come from them "
        "and from five more, not from those who validate. Test: four people of 20 to 29 years like those in training "
        "(19 to 34), six of 45 to 90. The simulated test sets show all ten test people."
    ),
    doubt=(
        "Few people, one protocol of acquisition. Slices of one person are not independent. The scans are "
        "stripped closely around the labels, so the outline of the brain is given away. Simulated contrasts inherit "
        "noise and receive field of the scan they are made from, know no iron in the deep nuclei, and follow from "
        "labels at whole voxels: they say how a method takes a change of contrast, not how it takes a FLASH scan."
    ),
    source=(
        "MICCAI 2012 Grand Challenge and Workshop on Multi-Atlas Labeling (Landman and Warfield): MRI originating from "
        "the OASIS project, labels provided by Neuromorphometrics, Inc. (neuromorphometrics.com) under academic "
        "subscription. Files: github.com/muschellij2/malf.templates, folder inst/extdata."
    ),
    licence="CC BY-NC, as the challenge states it; credit OASIS and Neuromorphometrics as above.",
)
