"""The embedded task `abdomen`: axial slices of computed tomography with thirteen organs, all in code.

A case is one random person (`abdomen_anatomy`): solids in three dimensions, placed around the spine, that move, turn,
grow and bend from person to person. It is cut axially at evenly spread levels from below the dome of the liver to the
lower poles of the kidneys (`Anatomy.spacing` says how many mm apart), top to bottom, and shown as in a scan after
contrast agent (`abdomen_looks`). The image's left is the patient's right, as radiologists look at it; rows go from
front to back. Classes are the organs of FLARE22 in its order. Bowel, muscles and many vessels look like organs and have
no class.

Images are Hounsfield units clipped to the 0.5th and 99.5th percentile and brought to [0, 1], as the paper on
label-efficient diffusion does (arXiv 2402.15216, section on pre-processing). The paper takes the percentiles over all
voxels of its unlabelled scans; here they are those of a reference draw of cases of the same distribution that is in no
split, so that no image depends on how many unlabelled ones were asked for.
"""

from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from synthrepro.data.abdomen_anatomy import Anatomy, draw_anatomy
from synthrepro.data.abdomen_looks import CLASSES, Looks, add_noise, draw_looks, picture
from synthrepro.data.brain_mni import stream
from synthrepro.data.task import Card, Split, Task

FAMILY = "embedded"
WITHHELD = -1  # label of every pixel of an unlabelled slice
REFERENCE, PERCENTILES = (12, 8, (64, 64)), (0.5, 99.5)  # cases, slices and size of the reference draw


def files(folder: Path) -> list[Path]:
    """The files the task needs: none."""
    return []


def check(folder: Path) -> None:
    """Nothing can be missing or wrong."""


class Options(BaseModel):
    """Options of the task.

    Attributes:
        size: rows and columns of the field of view, 384 mm x 384 mm whatever the size.
        cases: for training, validation and test.
        slices: of each of these cases.
        unlabelled: cases without labels.
        unlabelled_slices: of each of those.
        seed: of everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)]] = (64, 64)
    cases: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 8, 10)
    slices: PositiveInt = 48
    unlabelled: NonNegativeInt = 0
    unlabelled_slices: PositiveInt = 24
    seed: int = 0


def draw_case(seed: int, part: str, i: int) -> tuple[Anatomy, Looks]:
    """Anatomy and looks of case i of a part; they depend on nothing else."""
    return draw_anatomy(stream(seed, part, i, "anatomy")), draw_looks(stream(seed, part, i, "looks"))


def case(seed: int, part: str, i: int, slices: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Slices of a case from top to bottom.

    Returns:
        (slices, H, W) HU, and (slices, H, W) int64 classes.
    """
    anatomy, looks = draw_case(seed, part, i)
    hu, labels = picture(anatomy, looks, anatomy.levels(slices), size, (seed, part, i))
    return add_noise(hu, stream(seed, part, i, "noise")), labels


@lru_cache(maxsize=4)
def window(seed: int) -> tuple[float, float]:
    """HU shown as 0 and as 1: the percentiles of the reference draw."""
    cases, slices, size = REFERENCE
    hu = torch.cat([case(seed, "reference", i, slices, size)[0] for i in range(cases)]).double().flatten()
    low, high = hu.quantile(torch.tensor(PERCENTILES, dtype=torch.float64) / 100).tolist()
    return low, high


def load(options: Options, folder: Path) -> Task:
    """Build the task: splits "train", "validation", "test" and, where asked for, "unlabelled", whose labels are all -1.

    Case i of a split is the same whatever the number of cases and whatever is asked for of other splits. Its slices lie
    next to one another, top to bottom; subjects are "train-003" or "unlabelled-017".

    Args:
        folder: not used.
    """
    low, high = window(options.seed)

    def build(part: str, count: int, slices: int, labelled: bool = True) -> Split:
        images = torch.empty(count * slices, 1, *options.size)
        labels = torch.full((count * slices, *options.size), WITHHELD)
        for i in range(count):
            rows = slice(i * slices, (i + 1) * slices)
            hu, classes = case(options.seed, part, i, slices, options.size)
            images[rows, 0] = (hu - low).div_(high - low).clamp_(0, 1)
            if labelled:
                labels[rows] = classes
        return Split(images, labels, tuple(f"{part}-{i:03d}" for i in range(count) for _ in range(slices)))

    parts = zip(("train", "validation", "test"), options.cases, strict=True)
    splits = {part: build(part, count, options.slices) for part, count in parts}
    if options.unlabelled:
        splits["unlabelled"] = build("unlabelled", options.unlabelled, options.unlabelled_slices, labelled=False)
    return Task("abdomen", CLASSES, 1, splits, CARD)


CARD = Card(
    what=(
        "Synthetic axial slices of the upper abdomen as in computed tomography, with the thirteen organs of FLARE22. "
        "Organs are smooth solids placed around the spine, different in place, size, turn and shape in every case, in "
        "one of three phases of contrast agent, with texture and noise. Lungs, bones, muscles, bowel, fat and many "
        "vessels lie around them without a class; bowel looks like stomach and duodenum, veins like the vena cava."
    ),
    splits=(
        "By case, each one person. Training to validation is 4:1, the share by which the paper on label-efficient "
        "diffusion parts its labelled cases; the test cases come on top. Unlabelled cases, where asked for, are "
        "further people, whose labels are withheld (all -1)."
    ),
    doubt=(
        "Nothing here was measured on a scan. Positions, sizes and Hounsfield units are set by hand within textbook "
        "ranges, organs are healthy, smooth and all of one mould, and labelled and unlabelled cases come from the same "
        "distribution, which those of FLARE22 do not. Adrenal glands are a few pixels at the default size. Labels "
        "are exact, where people who outline organs disagree. A result here says that a method can work, not how well "
        "it does on patients."
    ),
    source=(
        "Code of this package. Positions after Gray's Anatomy (41st edition, 2016), sizes after the reference organ "
        "masses of ICRP Publication 89 (2002), Hounsfield units after Prokop and Galanski, Spiral and Multislice "
        "Computed Tomography of the Body (Thieme, 2003), classes after FLARE22 (Ma et al., Lancet Digital Health "
        "6:e815, 2024), of which nothing is contained."
    ),
    licence="That of this package.",
)
