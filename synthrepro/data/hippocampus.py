"""The real task `hippocampus`: MR volumes around a hippocampus, of task 4 of the Medical Segmentation Decathlon.

The folder holds one of two layouts, with the same names for volume and labels:

    train/t2/   hippocampus_102.nii.gz, volumes; train/t1/ their labels      as in GenSeg's repository; val/ likewise
    imagesTr/   hippocampus_001.nii.gz, volumes; labelsTr/ their labels      as the Decathlon publishes it

Sagittal slices are cut, in which both parts of the hippocampus lie side by side; axial and coronal ones seldom show
both. A slice has the volume's own pixels: it is cut or padded with black to the asked size, the volume in its middle.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from synthrepro.data import pairs
from synthrepro.data.pairs import Pair
from synthrepro.data.task import Card, Sample, Task
from synthrepro.data.volumes import ADVICE, read_pair
from synthrepro.errors import UserError

FAMILY = "real"

CLASSES = ("background", "anterior", "posterior")
TABLE = {0: 0, 1: 1, 2: 2}  # value in the files -> class
RANGE = (0.5, 99.5)  # percentiles of a volume that become 0 and 1


class Options(pairs.Options):
    """Options of the task; `seed` draws who is where.

    Attributes:
        size: rows (from above) and columns (from the front), pixels of 1 mm; volumes have about 36 x 50.
        subjects: how many volumes train, validate and test; in GenSeg's layout those that test come from val/.
        slices: sagittal slices a volume, spread evenly over those in which both parts appear.
        unlabelled: whether there is a split "unlabelled" too.
    """

    size: tuple[PositiveInt, PositiveInt] = (48, 64)
    subjects: tuple[PositiveInt, NonNegativeInt, PositiveInt] = (200, 8, 52)
    slices: PositiveInt = 4
    unlabelled: bool = False


def files(folder: Path) -> list[Path]:
    """Volumes and labels that are there."""
    return pairs.files(pairs_of, folder)


def check(folder: Path) -> None:
    """Read and check every file.

    Raises:
        UserError: see `pairs_of` and `slices_of`.
    """
    for found in pairs_of(folder).values():
        for pair in found:
            slices_of(pair, Options(slices=1))


def load(options: Options, folder: Path) -> Task:
    """Build the task: "train", "validation" (may be empty), "test" and, if asked for, "unlabelled".

    "unlabelled" has every sagittal slice of the volumes that train, also those with one part of the hippocampus or
    none, and -1 for every label. Nothing of the volumes that validate or test is in it.

    Raises:
        UserError: see `pairs_of`, `pairs.divide` and `slices_of`.
    """
    train, validation, test = options.subjects
    first, *others = pairs_of(folder).values()
    rounds = [(first, {"test": test, "validation": validation, "train": train})]
    if others:
        rounds = [(others[0], {"test": test}), (first, {"validation": validation, "train": train})]
    drawn: dict[str, list[Sample]] = {}
    for found, counts in rounds:
        drawn |= pairs.divide("hippocampus", found, counts, options.seed, lambda pair: slices_of(pair, options))
    splits = {name: pairs.stack(drawn[name], options.size, 1) for name in ("train", "validation", "test")}
    if options.unlabelled:
        of = {pair.subject: pair for pair in first}
        pool = [sample for name in splits["train"].individuals for sample in unlabelled_slices(of[name], options.size)]
        splits["unlabelled"] = pairs.stack(pool, options.size, 1)
    return Task("hippocampus", CLASSES, 1, splits, CARD)


def pairs_of(folder: Path) -> dict[str, list[Pair]]:
    """The volumes of "train" and "val" in GenSeg's layout, of "msd" in the Decathlon's.

    Raises:
        UserError: neither or both of the layouts are there; a folder is missing or empty; see `pairs.match`.
    """
    genseg, decathlon = (folder / "train").is_dir(), (folder / "imagesTr").is_dir()
    if genseg == decathlon:
        there = "both train/ and" if genseg else "neither train/ nor"
        raise UserError(f"{folder} holds {there} imagesTr/: put one of the two layouts there.")
    if decathlon:
        return {"msd": volumes(folder / "imagesTr", folder / "labelsTr")}
    return {part: volumes(folder / part / "t2", folder / part / "t1") for part in ("train", "val")}


def volumes(images: Path, labels: Path) -> list[Pair]:
    """The volumes in a folder and their labels in another; which of them show the same person is not published.

    Raises:
        UserError: a folder is missing or empty; see `pairs.match`.
    """
    found = []
    for folder in (images, labels):
        found.append({path.name.split(".")[0]: (path,) for path in sorted(folder.glob("hippocampus_*.nii.gz"))})
        if not found[-1]:
            raise UserError(f"{folder} holds no file like hippocampus_001.nii.gz: {ADVICE}.")
    return [Pair(case, image, labels) for case, (image, labels) in pairs.match(*found).items()]


def slices_of(pair: Pair, options: Options) -> list[Sample]:
    """Sagittal slices through both parts of the hippocampus, rows from above, columns from the front.

    Raises:
        UserError: the volume has fewer such slices than asked for, or one value only; see `volumes.read_pair`.
    """
    values, classes = read_planes(pair)
    both = np.flatnonzero((classes == 1).any((1, 2)) & (classes == 2).any((1, 2)))
    if len(both) < options.slices:
        raise UserError(
            f"{pair.masks[0]} has {len(both)} sagittal slices with both parts of the hippocampus, but {options.slices} "
            "are asked for: ask for fewer, by the option 'slices'."
        )
    at = both[((np.arange(options.slices) + 0.5) / options.slices * len(both)).astype(int)]
    pictures = fit(torch.from_numpy(values[at]), options.size)
    maps = fit(torch.from_numpy(classes[at].astype(np.int64)), options.size)
    return [Sample(picture[None], map_, pair.subject) for picture, map_ in zip(pictures, maps, strict=True)]


def unlabelled_slices(pair: Pair, size: tuple[int, int]) -> list[Sample]:
    """All sagittal slices of a volume, as those of `slices_of` but with -1 for every label.

    Raises:
        UserError: the volume has one value only; see `volumes.read_pair`.
    """
    nothing = torch.full(size, -1)
    pictures = fit(torch.from_numpy(read_planes(pair)[0]), size)
    return [Sample(picture[None], nothing, pair.subject) for picture in pictures]


def read_planes(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Sagittal planes (C, Z, R) of a volume, rows from above, columns from the front: values and classes.

    Returns:
        float32 in [0, 1], from the volume's 0.5th to its 99.5th percentile; uint8.

    Raises:
        UserError: the volume has one value only; see `volumes.read_pair`.
    """
    image, labels = read_pair(pair.image, pair.masks[0], TABLE)
    values, classes = (np.moveaxis(volume.planes[::-1], 2, 0) for volume in (image, labels))
    low, high = np.percentile(values, RANGE)
    if not high > low:
        raise UserError(f"{pair.image} has almost the same value everywhere, so it shows nothing: {ADVICE}.")
    return ((values - low) / (high - low)).clip(0, 1).astype(np.float32), classes


def fit(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Planes (..., h, w) cut or padded with zeros to (..., H, W), with the middle in the middle."""
    (top, bottom), (left, right) = (
        ((wanted - there) // 2, wanted - there - (wanted - there) // 2)
        for wanted, there in zip(size, planes.shape[-2:], strict=True)
    )
    return F.pad(planes, (left, right, top, bottom))  # a negative margin cuts


CARD = Card(
    what=(
        "Sagittal slices of small MR volumes (T1-weighted, 1 mm) around one hippocampus, with its anterior and its "
        "posterior part traced by hand. Each volume has its own scale, from its 0.5th to its 99.5th percentile."
    ),
    splits=(
        "By volume. In the layout of GenSeg's repository its train/ trains and validates and its val/ is 'test', as "
        "there; in the Decathlon's layout, where only volumes for training have labels, all parts are drawn from "
        "these. 'unlabelled', if asked for, has every sagittal slice of the volumes that train."
    ),
    doubt=(
        "The challenge has 394 volumes of 195 people and does not say whose they are, so the two hippocampi of a "
        "person may stand on both sides of the split. Slices of one volume are not independent. The volumes are "
        "cropped around the hippocampus, which gives its place away. There is no second domain."
    ),
    source=(
        "medicaldecathlon.com, Task04_Hippocampus (Simpson et al., arXiv 1902.09063, 2019; Antonelli et al., Nature "
        "Communications 13:4128, 2022); or github.com/importZL/GenSeg, folder GenSeg-3D/data_hippo."
    ),
    licence="CC BY-SA 4.0, as the Decathlon states it.",
)
