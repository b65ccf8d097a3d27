"""The real task `flare22`: abdominal CT with 13 organs, few labelled cases and many unlabelled ones.

The data are those of the challenge FLARE22 of MICCAI 2022 (flare22.grand-challenge.org, after registration); its 50
labelled cases are on Zenodo too (record 7860267). Files are found by their names, however deep in the folder, since
the folders differ between the homes of the data:

    FLARE22_Tr_0001_0000.nii.gz  labelled    Training/FLARE22_LabeledCase50/images/, FLARE22Train/images/, imagesTr/
    FLARE22_Tr_0001.nii.gz       its labels  Training/FLARE22_LabeledCase50/labels/, FLARE22Train/labels/, labelsTr/
    Case_00001_0000.nii.gz       unlabelled  Training/FLARE22_UnlabeledCase1-1000/ and the like, unlabeled/

(in this order: the challenge's download, the archive on Zenodo, nnU-Net's convention). Nothing else is read.

The pictures are made as in "Label-efficient multi-organ segmentation with a diffusion model" (Huang et al., arXiv
2402.15216, section on pre-processing), in the order given there:

1. Resample to one spacing: trilinear for images, nearest for labels. The paper gives no spacing.
2. Clip to the 0.5th and 99.5th percentile of the voxels of the unlabelled cases, air included, and map these to 0 and
   1. The paper goes on to [-1, 1], which is left to the method. Here every voxel counts with its volume, as it would
   once all cases have one spacing, and the percentiles are taken from a histogram over whole Hounsfield units (HU).
3. Take the axial slices, all of them, rows from front to back, columns from the patient's right to the left.
4. Resize, bilinear for images, nearest for labels. Bilinear interpolation is antialiased where it shrinks.

Nothing is kept on the disk. Beside the slices one volume at a time is in memory, as it is in the file and resampled. A
slice takes 4 bytes a pixel for the image and, if it has labels, 8 for these. The paper's 207,029 unlabelled slices of
256 x 256 are 54 GB; `unlabelled` and `unlabelled_slices` bound that. The labels of "unlabelled" are one -1 in memory,
seen as (N, H, W).
"""

import glob
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from synthrepro.data import pairs
from synthrepro.data.abdomen_looks import CLASSES  # that phantom has FLARE22's organs; the index is the files' value
from synthrepro.data.pairs import Pair
from synthrepro.data.task import Card, Split, Task
from synthrepro.data.volumes import ADVICE, _read, read_labels
from synthrepro.errors import UserError

FAMILY = "real"

TABLE = {value: value for value in range(len(CLASSES))}
RANGE = (0.5, 99.5)  # percentiles that become 0 and 1
COARSEST = 20.0  # mm; no abdomen is scanned with larger voxels
OBLIQUE = 10.0  # degrees; a patient may lie as askew, so up to here the voxels' axes are taken for the body's
AIR, BONE = -200, 200  # HU; a scan has values below the one (air, at least in lung or bowel) and above the other
HU = np.iinfo(np.int16)  # HU are stored with 16 bits; metal reaches the far end

Spacing = Annotated[float, Field(gt=0, le=COARSEST)]


class Options(BaseModel):
    """Options of the task.

    Attributes:
        size: rows and columns of a slice.
        spacing: side of a voxel to the right, forward and up to which volumes are resampled, mm; None is the median of
            all labelled cases, for each side by itself. The paper says only that it was determined from the data.
        cases: how many labelled cases train, validate and test. The paper parts the 50 into 40 and 10 and chooses its
            step t on those 10; here the validation cases are taken from the 40.
        unlabelled: how many unlabelled cases give "unlabelled", the first in the order of their numbers; the paper's
            are 1000.
        unlabelled_slices: at most how many slices an unlabelled case gives, spread evenly over its height; None is all.
        unlabelled_statistics: over how many of the first unlabelled cases the percentiles are taken, whatever
            `unlabelled`; in the paper over all. 0 takes them over the labelled cases that train, for folders without
            unlabelled ones.
        seed: of the random draw of the labelled cases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[PositiveInt, PositiveInt] = (256, 256)
    spacing: tuple[Spacing, Spacing, Spacing] | None = None
    cases: tuple[PositiveInt, NonNegativeInt, PositiveInt] = (32, 8, 10)
    unlabelled: NonNegativeInt = 0
    unlabelled_slices: PositiveInt | None = None
    unlabelled_statistics: NonNegativeInt = 50
    seed: int = 0


@dataclass(frozen=True)
class Grid:
    """Where a volume's voxels lie, by axes to the right, forward and up.

    Attributes:
        shape, spacing: voxels, and the side of one in mm, along these axes.
        affine: (4, 4) from voxel to mm.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    affine: np.ndarray


def files(folder: Path) -> list[Path]:
    """Scans and labels that are there."""
    return pairs.files(cases_of, folder)


def check(folder: Path) -> None:
    """Read and check every file.

    Raises:
        UserError: see `cases_of`, `read_scan` and `read_organs`; an organ is in no case.
    """
    seen: set[int] = set()
    found = cases_of(folder)
    for case in found["labelled"]:
        read_scan(case)
        seen |= {*np.unique(read_organs(case)).tolist()}
    _all_organs(seen, found["labelled"])
    for case in found["unlabelled"]:
        read_scan(case)


def load(options: Options, folder: Path) -> Task:
    """Build the task: "train", "validation" (may be empty), "test" and, if asked for, "unlabelled".

    The subject of a sample is its case. Labels are 0 to 13, in "unlabelled" -1.

    Raises:
        UserError: fewer cases than asked for; an organ is in none of the labelled cases that were drawn; see
            `cases_of`, `grid_of`, `read_scan` and `read_organs`.
    """
    found = cases_of(folder)
    drawn = draw(found["labelled"], options, folder)
    statistics, pool = (
        first(found["unlabelled"], option, getattr(options, option), folder)
        for option in ("unlabelled_statistics", "unlabelled")
    )
    grids = [grid_of(case.image) for case in found["labelled"]]
    right, forward, up = options.spacing or np.median([grid.spacing for grid in grids], axis=0).tolist()
    window = window_of(statistics or drawn["train"])
    preparation = Preparation((right, forward, up), window, options.size)
    splits = {name: labelled_split(cases, preparation) for name, cases in drawn.items()}
    seen = {value for split in splits.values() for value in split.labels.unique().tolist()}
    _all_organs(seen, [case for cases in drawn.values() for case in cases])
    if pool:
        splits["unlabelled"] = unlabelled_split(pool, preparation, options.unlabelled_slices)
    return Task("flare22", CLASSES, 1, splits, CARD)


# ----- cases


def cases_of(folder: Path) -> dict[str, list[Pair]]:
    """The cases "labelled" and "unlabelled", in the order of their numbers; of the latter there may be none.

    Raises:
        UserError: there is no labelled case; a file of a case is there twice; see `pairs.match`.
    """
    images = by_case(folder, r"(FLARE22_Tr_\d+)_0000")
    labels = by_case(folder, r"(FLARE22_Tr_\d+)")
    for found, name in ((images, "FLARE22_Tr_0001_0000.nii.gz"), (labels, "FLARE22_Tr_0001.nii.gz")):
        if not found:
            raise UserError(
                f"{folder} holds no file like {name}, however deep: put the data there as book/data.md says."
            )
    return {
        "labelled": [Pair(case, image, masks) for case, (image, masks) in pairs.match(images, labels).items()],
        "unlabelled": [Pair(case, *paths, ()) for case, paths in by_case(folder, r"(Case_\d+)_0000").items()],
    }


def by_case(folder: Path, pattern: str) -> dict[str, tuple[Path]]:
    """The volumes below a folder whose name matches a pattern, by the case that its first group names, in order.

    Raises:
        UserError: two are of one case.
    """
    found: dict[str, tuple[Path]] = {}
    for path in sorted(glob.glob("**/*.nii.gz", root_dir=folder, recursive=True)):  # follows links to folders
        if named := re.fullmatch(pattern, Path(path).name.removesuffix(".nii.gz")):
            if named[1] in found:
                raise UserError(f"{folder / path} and {found[named[1]][0]} are of the same case: keep one of them.")
            found[named[1]] = (folder / path,)
    return dict(sorted(found.items()))


def draw(labelled: list[Pair], options: Options, folder: Path) -> dict[str, list[Pair]]:
    """The cases that train, validate and test; who tests does not depend on how many the others are.

    Raises:
        UserError: there are fewer than asked for.
    """
    if (asked := sum(options.cases)) > len(labelled):
        raise UserError(
            f"Task flare22, option 'cases': {asked} are asked for, but {folder} has {len(labelled)} labelled."
        )
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(options.seed)).tolist()
    _, validation, test = options.cases
    ends = {"train": (test + validation, asked), "validation": (test, test + validation), "test": (0, test)}
    return {name: [labelled[i] for i in order[start:end]] for name, (start, end) in ends.items()}


def first(unlabelled: list[Pair], option: str, count: int, folder: Path) -> list[Pair]:
    """The first cases.

    Raises:
        UserError: there are fewer than asked for by the option.
    """
    if count > len(unlabelled):
        raise UserError(
            f"Task flare22, option {option!r}: {count} cases like Case_00001_0000.nii.gz are asked for, but {folder} "
            f"has {len(unlabelled)}: put more there, or ask for fewer."
        )
    return unlabelled[:count]


# ----- files


def grid_of(path: Path) -> Grid:
    """Where the voxels of a volume lie, from the file's header alone.

    Raises:
        UserError: the file is missing or no volume; its header gives no orientation, axes far from the body's, voxels
            without extent or larger than `COARSEST`, or two different sizes of a voxel.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {ADVICE}.")
    try:
        image: Any = nib.load(path)
        shape, affine = image.shape, np.asarray(image.affine)
        said = [abs(float(size)) for size in image.header["pixdim"][1:4]]
        codes = int(image.header["qform_code"]), int(image.header["sform_code"])
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        OverflowError,
        ImageFileError,
        HeaderDataError,
        zlib.error,
    ) as error:
        raise UserError(f"{path} cannot be read ({error}): {ADVICE}.") from error
    if len(shape) != 3:
        raise UserError(f"{path} has the shape {tuple(shape)}, but 3 axes are needed: {ADVICE}.")
    if codes == (0, 0):
        raise UserError(f"{path} does not say how the patient lies (qform and sform codes are 0): {ADVICE}.")
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(0))
    for size in (*sizes, *said):
        if not 0 < size <= COARSEST:
            raise UserError(f"{path} says that a side of its voxels measures {size:g} mm: {ADVICE}.")
    if not np.allclose(sizes, said, rtol=0.01):
        stated, placed = (" x ".join(f"{size:g}" for size in three) for three in (said, sizes))
        raise UserError(f"{path} says that its voxels measure {stated} mm, but its affine says {placed} mm: {ADVICE}.")
    if (np.abs(affine[:3, :3] / sizes).max(0) < np.cos(np.radians(OBLIQUE))).any():
        raise UserError(f"{path} has axes that are more than {OBLIQUE:g} degrees off the patient's: {ADVICE}.")
    turns = nib.io_orientation(affine)
    order = np.argsort(turns[:, 0])  # the file's axis along right, forward and up
    canonical = affine @ nib.orientations.inv_ornt_aff(turns, shape)
    return Grid(tuple(shape[i] for i in order), tuple(float(sizes[i]) for i in order), canonical)


def read_scan(case: Pair) -> np.ndarray:
    """Axial planes from below (Z, R, C), rows from front to back, columns from right to left, HU.

    Raises:
        UserError: see `grid_of`; the file cannot be read to its end or holds values that are not finite or no HU.
    """
    grid_of(case.image)
    planes = _read(case.image, flat=False).planes[..., ::-1]
    low, high = float(planes.min()), float(planes.max())
    if not (HU.min <= low <= AIR and BONE < high <= HU.max):
        raise UserError(
            f"{case.image} holds values from {low:g} to {high:g}, which are no Hounsfield units of a CT scan (some "
            f"must be {AIR} or less, some above {BONE}, none beyond 16 bits): {ADVICE}."
        )
    return planes


def read_organs(case: Pair) -> np.ndarray:
    """Labels in the planes of `read_scan`, uint8.

    Raises:
        UserError: see `grid_of` and `volumes.read_labels`; scan and labels have not the same voxels.
    """
    labels = case.masks[0]
    scan, map_ = grid_of(case.image), grid_of(labels)
    if scan.shape != map_.shape:
        shapes = [" x ".join(str(n) for n in grid.shape) for grid in (map_, scan)]
        raise UserError(f"{labels} has {shapes[0]} voxels but its image {case.image.name} has {shapes[1]}: {ADVICE}.")
    if not np.allclose(scan.affine, map_.affine, atol=1e-2):
        raise UserError(f"{labels} and its image {case.image.name} lie at different places (their affines): {ADVICE}.")
    return read_labels(labels, TABLE).planes[..., ::-1]


def _all_organs(seen: set[int], cases: list[Pair]) -> None:
    """A single case may lack an organ, for instance the gallbladder; that all do means wrong labels."""
    if lacking := [f"{value} ({name})" for value, name in enumerate(CLASSES) if value not in seen]:
        where = cases[0].masks[0].parent
        raise UserError(
            f"None of the {len(cases)} label maps read in {where} has the label {', '.join(lacking)}: {ADVICE}."
        )


# ----- from volume to slices


@dataclass(frozen=True)
class Preparation:
    """How a volume becomes slices.

    Attributes:
        spacing: of the voxels once resampled, to the right, forward and up, mm.
        window: the values that become 0 and 1, HU.
        size: rows and columns of a slice.
    """

    spacing: tuple[float, float, float]
    window: tuple[float, float]
    size: tuple[int, int]

    def shape(self, grid: Grid) -> tuple[int, int, int]:
        """Planes, rows and columns once resampled: the volume keeps its extent up to half a voxel."""
        sides = zip(grid.shape, grid.spacing, self.spacing, strict=True)
        columns, rows, planes = (max(1, round(count * there / wanted)) for count, there, wanted in sides)
        return planes, rows, columns

    def images(self, case: Pair, at: np.ndarray | None = None) -> Tensor:
        """Slices (Z, 1, H, W) of a case in [0, 1], or only those `at` these places.

        Raises:
            UserError: see `read_scan`.
        """
        planes = resample(read_scan(case).astype(np.float32), self.shape(grid_of(case.image)))
        low, high = self.window
        planes = ((planes if at is None else planes[at]).clamp(low, high) - low) / (high - low)
        return F.interpolate(planes[:, None], self.size, mode="bilinear", antialias=True).clamp(0, 1)

    def labels(self, case: Pair) -> Tensor:
        """Labels (Z, H, W) int64 of all slices of a case.

        Raises:
            UserError: see `read_organs`.
        """
        planes = resample(read_organs(case), self.shape(grid_of(case.image)))
        return F.interpolate(planes[:, None], self.size, mode="nearest-exact")[:, 0].long()


def resample(planes: np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    """Planes (z, r, c) with another number of voxels over the same extent, (Z, R, C).

    Floats are interpolated linearly along all three axes, not antialiased and constant beyond the outermost voxels'
    middles; integers become those of the nearest voxel.
    """
    volume = torch.from_numpy(np.ascontiguousarray(planes))[None, None]
    if volume.is_floating_point():
        return F.interpolate(volume, shape, mode="trilinear", align_corners=False)[0, 0]
    return F.interpolate(volume, shape, mode="nearest-exact")[0, 0]


def window_of(cases: Iterable[Pair]) -> tuple[float, float]:
    """The percentiles `RANGE` of all voxels of these cases in whole HU, a voxel counting with its volume.

    A percentile is the least value that this share of the volume does not exceed. One volume is in memory at a time.

    Raises:
        UserError: see `read_scan`; the percentiles are equal.
    """
    volume = np.zeros(HU.max - HU.min + 1)
    for case in cases:
        counts = np.zeros(len(volume), dtype=np.int64)
        for plane in read_scan(case):
            counts += np.bincount((np.rint(plane).astype(np.intp) - HU.min).ravel(), minlength=len(volume))
        volume += counts * prod(grid_of(case.image).spacing)
    share = volume.cumsum() / volume.sum()
    low, high = (float(np.searchsorted(share, percent / 100) + HU.min) for percent in RANGE)
    if not high > low:
        raise UserError(f"{case.image} and the other scans have almost the same value everywhere: {ADVICE}.")
    return low, high


def labelled_split(cases: list[Pair], preparation: Preparation) -> Split:
    """All slices of these cases, perhaps none, in their order."""
    images, labels = [torch.zeros(0, 1, *preparation.size)], [torch.zeros(0, *preparation.size, dtype=torch.int64)]
    for case in cases:
        images.append(preparation.images(case))
        labels.append(preparation.labels(case))
    subjects = tuple(case.subject for case, maps in zip(cases, labels[1:], strict=True) for _ in maps)
    return Split(torch.cat(images), torch.cat(labels), subjects)


def unlabelled_split(cases: list[Pair], preparation: Preparation, most: int | None) -> Split:
    """Slices of these cases in their order, at most so many of each, with -1 for every label.

    The images are written where they stay, since a copy would be as large again.
    """
    heights = [preparation.shape(grid_of(case.image))[0] for case in cases]
    counts = [min(height, most or height) for height in heights]
    images = torch.empty(sum(counts), 1, *preparation.size)
    for case, height, part in zip(cases, heights, images.split(counts), strict=True):
        at = ((np.arange(len(part)) + 0.5) / len(part) * height).astype(int)
        part.copy_(preparation.images(case, at))
    labels = torch.full((1, 1, 1), -1).expand(len(images), *preparation.size)
    subjects = tuple(case.subject for case, count in zip(cases, counts, strict=True) for _ in range(count))
    return Split(images, labels, subjects)


CARD = Card(
    what=(
        "Axial slices of abdominal CT with 13 organs: liver, right and left kidney, spleen, pancreas, aorta, inferior "
        "vena cava, right and left adrenal gland, gallbladder, esophagus, stomach and duodenum. Few cases have labels, "
        "many have none. Patients are seen from their feet, the liver on the left."
    ),
    splits=(
        "The labelled cases are divided at random by case. 'unlabelled', if asked for, has the first of the unlabelled "
        "cases, none of which is a labelled one."
    ),
    doubt=(
        "The labelled scans are those of the Medical Segmentation Decathlon's pancreas task, so everybody has a "
        "disease of the pancreas and came to one hospital; the unlabelled scans come from many. Files are named by "
        "number only, so whether somebody's scan is in both parts cannot be seen from them. Slices of one case are not "
        "independent. Adrenal glands are so small that a case's score on them hangs on few voxels, and a mean over "
        "organs on these."
    ),
    source=(
        "flare22.grand-challenge.org (Ma et al., Lancet Digital Health, 2024); the labelled cases also "
        "zenodo.org/records/7860267 (scans: Simpson et al., arXiv 1902.09063, 2019; labels: Ma et al., IEEE TPAMI, "
        "AbdomenCT-1K, 2022)."
    ),
    licence="The challenge's terms on registration. Zenodo states its own for the labelled cases; read them there.",
)
